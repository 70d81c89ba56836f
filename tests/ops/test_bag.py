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
@pytest.mark.parametrize("single", [True, False])
def test_others_are_those_of_scikit_learn(count, dims, keep, single):
    x, fold = rows(count, dims), torch.arange(count) if single or count < 4 else bag.folds(count, 10, seed=3)
    for others in bag.fit_others(x, fold):
        own, left, k = x[others.inside].numpy(), x[others.outside].numpy(), int(pca.kept(others.variance, keep))
        full = PCA(min(len(left) - 1, dims), svd_solver="full").fit(left)
        assert np.allclose(others.variance[: full.n_components_], full.explained_variance_)
        for rows_of, coordinates in ((own, others.left), (left, others.others)):
            assert np.allclose(coordinates[:, :k].abs(), np.abs(full.transform(rows_of)[:, :k]), atol=1e-7)
        assert k == PCA(keep, svd_solver="full").fit(left).n_components_
        reduce = PCA(k, svd_solver="full").fit(left)
        assert np.allclose(bag.residuals(x, others, k).numpy(), own - reduce.inverse_transform(reduce.transform(own)), atol=1e-7)


def test_equal_rows_have_no_components():
    *_, others = bag.fit_others(torch.cat([torch.ones(5, 3), rows(1, 3)]), torch.arange(6))
    assert others.inside.tolist() == [5]
    assert all((part == 0).all() for part in (others.variance, others.left, others.others))


@pytest.mark.parametrize(("count", "folds"), [(2, 2), (4, 4), (20, 10), (50, 10), (51, 5), (81, 5)])
def test_folds_are_drawn_and_of_equal_size(count, folds):
    fold = torch.stack([bag.folds(count, folds, seed) for seed in range(200)])
    for one in fold:
        size = one.bincount()
        assert len(size) == folds and size.sum() == count and size.max() - size.min() <= 1
    share = (fold[:, -1:] == torch.arange(folds)).double().mean(0)  # of the new image
    assert (share - 1 / folds).abs().max() < 4 * (1 / folds * (1 - 1 / folds) / 200) ** 0.5


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
