import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from blemish.edge.calibration import p_values
from blemish.ops import bag, pca


def rows(count, dims, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, dims, generator=g, dtype=torch.float64) * 0.8 ** torch.arange(dims) + 3


@pytest.mark.parametrize(("count", "dims"), [(3, 5), (12, 40), (30, 6)])
@pytest.mark.parametrize("keep", [1, 0.9])
def test_others_are_those_of_scikit_learn(count, dims, keep):
    x = rows(count, dims)
    others = bag.fit_others(x)
    kept = pca.kept(others.variance, keep)
    residual = bag.residuals(x, others, kept).numpy()
    for i in range(count):
        left = np.delete(x.numpy(), i, 0)
        full, k = PCA(min(count - 2, dims), svd_solver="full").fit(left), int(kept[i])
        assert np.allclose(others.variance[i, : full.n_components_], full.explained_variance_)
        assert np.allclose(others.coordinates[i, :, :k].abs(), np.abs(full.transform(x.numpy())[:, :k]), atol=1e-7)
        assert k == PCA(keep, svd_solver="full").fit(left).n_components_
        reduce = PCA(k, svd_solver="full").fit(left)
        assert np.allclose(residual[i], x.numpy()[i] - reduce.inverse_transform(reduce.transform(x.numpy()[i : i + 1]))[0], atol=1e-7)


def test_equal_rows_have_no_components():
    others = bag.fit_others(torch.cat([torch.ones(5, 3), rows(1, 3)]))
    assert (others.variance[5] == 0).all() and (others.coordinates[5] == 0).all() and others.coordinates.isfinite().all()


def test_placed_scores_have_the_p_values_of_their_bags_and_move_no_farther():
    generator = torch.Generator().manual_seed(0)
    calibration = torch.randn(19, generator=generator)
    score, bags = 2 * torch.randn(500, generator=generator), torch.randn(500, 20, generator=generator)
    found = bag.placed(score, bags, calibration)
    expected = (1 + (bags[:, :-1] >= bags[:, -1:]).sum(1).double()) / 20
    assert np.array_equal(p_values(found, calibration), expected)
    own = p_values(score, calibration)
    assert torch.equal(found[own == expected.numpy()], score[own == expected.numpy()])
    for low, high in ((0.05, 0.1), (0.5, 0.55)):  # scores of one p-value keep their order
        same = ((expected >= low - 1e-9) & (expected <= high + 1e-9)).nonzero().flatten()
        order = score[same].argsort()
        rank = expected[same][order]
        for value in rank.unique():
            assert (found[same][order][rank == value].diff() >= 0).all()


def test_equal_calibration_scores_make_a_p_value_larger_only():
    calibration = torch.tensor([1.0, 2.0, 2.0, 2.0, 3.0])
    bags = torch.arange(6.0).repeat(6, 1)
    bags[:, -1] = torch.arange(6.0) - 0.5
    found = bag.placed(torch.full((6,), 2.5), bags, calibration)
    assert (p_values(found, calibration) >= (1 + (bags[:, :-1] >= bags[:, -1:]).sum(1).numpy()) / 6).all()
