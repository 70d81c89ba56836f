import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA as Reference

from blemish.edge.errors import InputError
from blemish.ops import pca


def correlated(rows: int, dims: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    scale = 0.8 ** torch.arange(dims, dtype=torch.float64)
    mix = torch.linalg.qr(torch.randn(dims, dims, generator=g, dtype=torch.float64))[0]
    return (torch.randn(rows, dims, generator=g, dtype=torch.float64) * scale) @ mix + 5 * torch.randn(
        dims, generator=g, dtype=torch.float64
    )


@pytest.mark.parametrize(("rows", "dims"), [(12, 40), (60, 20), (3000, 20)])  # fewer rows than dimensions, SVD, covariance
@pytest.mark.parametrize("keep", [1, 5, 0.5, 0.90, 0.95, 0.97])
@pytest.mark.parametrize("whiten", [False, True])
def test_agrees_with_scikit_learn(rows, dims, keep, whiten):
    x = correlated(rows, dims)
    new = correlated(7, dims, seed=1)
    reference = Reference(keep, svd_solver="full", whiten=whiten).fit(x.numpy())
    fitted = pca.fit(x, keep)
    assert len(fitted.variance) == reference.n_components_
    assert np.allclose(fitted.mean, reference.mean_)
    assert np.allclose(fitted.variance, reference.explained_variance_)
    assert np.allclose(fitted.variance / x.var(0).sum(), reference.explained_variance_ratio_)
    assert np.allclose(fitted.components, reference.components_, atol=1e-8)  # signs and all
    z = pca.transform(fitted, new, whiten)
    assert np.allclose(z, reference.transform(new.numpy()), atol=1e-8)
    if not whiten:
        assert np.allclose(pca.inverse(fitted, z), reference.inverse_transform(z.numpy()), atol=1e-8)


def test_moments_give_the_same_as_rows():
    x = correlated(50, 30)
    for keep in (4, 0.9):
        for mine, other in zip(pca.fit(x, keep), pca.from_moments(x.mean(0), x.T.cov(), keep), strict=True):
            assert torch.allclose(mine, other, atol=1e-10)


def test_float32_with_a_large_mean_keeps_the_small_components():
    x = correlated(500, 10)
    near, far = pca.fit(x.float(), 10), pca.fit((x + 1000).float(), 10)
    assert near.mean.dtype == torch.float32
    assert torch.allclose(near.variance, far.variance, rtol=1e-2)


def test_rank_bounds_the_number_of_components():
    x = correlated(9, 40).float()
    assert len(pca.fit(x, 16).variance) == 8  # nine points span eight dimensions
    assert len(pca.fit(x, 1.0).variance) == 8
    flat = correlated(400, 3) @ torch.randn(3, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    assert len(pca.fit(flat, 12).variance) == 3
    assert pca.transform(pca.fit(x, 16), x, whiten=True).std(0).allclose(torch.ones(8), rtol=1e-4)


def test_refuses_rows_without_variance():
    x = correlated(20, 5)
    broken = x.clone()
    broken[3, 2] = torch.nan
    for rows, words in ((torch.ones(20, 5), "equal"), (x[:1], r"\(1, 5\)"), (broken, "NaN")):
        with pytest.raises(InputError, match=f"rows: .*{words}"):
            pca.fit(rows, 2)
