import numpy as np
import pytest
import torch
from scipy.stats import gaussian_kde

from blemish.edge.errors import InputError
from blemish.ops import kde


def points(count: int, dims: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(dims, dims, generator=g, dtype=torch.float64)
    return torch.randn(count, dims, generator=g, dtype=torch.float64) @ mix + torch.randn(dims, generator=g, dtype=torch.float64)


@pytest.mark.parametrize(("count", "dims"), [(5, 1), (40, 3), (300, 16)])
@pytest.mark.parametrize("bandwidth", ["scott", "silverman", 0.3])
def test_agrees_with_scipy(count, dims, bandwidth):
    x, new = points(count, dims), points(50, dims, seed=0) * 1.5
    reference = gaussian_kde(x.numpy().T, bandwidth)
    fitted = kde.fit(x, bandwidth)
    assert np.allclose(fitted.factor @ fitted.factor.T, reference.covariance)
    assert np.allclose(kde.log_density(fitted, new), reference.logpdf(new.numpy().T), rtol=1e-9, atol=1e-9)


def test_tiles_do_not_change_the_density(monkeypatch):
    fitted, new = kde.fit(points(100, 4), "scott"), points(30, 4, seed=2)
    whole = kde.log_density(fitted, new)
    monkeypatch.setattr(kde, "TILE", 7)
    assert torch.allclose(kde.log_density(fitted, new), whole, rtol=1e-12)
    assert kde.log_density(fitted, new[:0]).shape == (0,)


def test_far_points_still_rank():
    x = points(200, 8)
    away = torch.tensor([0, 1e2, 1e3, 1e4, 1e5, 1e6], dtype=torch.float64)[:, None] * x.std(0) + x.mean(0)
    density = kde.log_density(kde.fit(x, "scott"), away)
    assert density.isfinite().all()
    assert (density.diff() < 0).all()


def test_units_of_the_features_do_not_matter():
    x, new = points(80, 4), points(10, 4, seed=1)
    scale = torch.tensor([1e-9, 1.0, 1e3, 1e9], dtype=torch.float64)
    shifted = kde.log_density(kde.fit(x * scale, "scott"), new * scale) + scale.log().sum()
    assert torch.allclose(shifted, kde.log_density(kde.fit(x, "scott"), new), rtol=1e-6)


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (points(5, 5), "points.* 6 "),
        (points(9, 2) @ torch.ones(2, 3, dtype=torch.float64), "full rank"),
        (torch.cat([points(9, 2), torch.full((9, 1), 0.1)], 1), "full rank"),
        (points(9, 2).log(), "finite"),
    ],
)
def test_refuses_points_without_a_density(x, words):
    with pytest.raises(InputError, match=words):
        kde.fit(x, "scott")
