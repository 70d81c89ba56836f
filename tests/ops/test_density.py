import numpy as np
import pytest
import torch
from scipy.stats import gaussian_kde, multivariate_normal

from blemish.edge.errors import InputError
from blemish.ops import density
from blemish.ops.density import gaussian, kernels, leave_one_out, log_density


def points(count: int, dims: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(dims, dims, generator=g, dtype=torch.float64)
    return torch.randn(count, dims, generator=g, dtype=torch.float64) @ mix + torch.randn(dims, generator=g, dtype=torch.float64)


@pytest.mark.parametrize(("count", "dims"), [(5, 1), (40, 3), (300, 16)])
@pytest.mark.parametrize("bandwidth", ["scott", "silverman", 0.3])
def test_agrees_with_scipy(count, dims, bandwidth):
    x, new = points(count, dims), points(50, dims, seed=0) * 1.5
    reference = gaussian_kde(x.numpy().T, bandwidth)
    fitted = kernels(x, bandwidth)
    assert np.allclose(fitted.factor @ fitted.factor.T, reference.covariance)
    assert np.allclose(log_density(fitted, new), reference.logpdf(new.numpy().T), rtol=1e-9, atol=1e-9)


def test_one_gaussian_agrees_with_scipy():
    x, new = points(40, 5), points(20, 5, seed=1)
    expected = multivariate_normal(x.mean(0).numpy(), np.cov(x.numpy().T)).logpdf(new.numpy())
    assert np.allclose(log_density(gaussian(x), new), expected)


@pytest.mark.parametrize(("count", "dims"), [(5, 1), (9, 6), (40, 3)])
@pytest.mark.parametrize("bandwidth", ["scott", "silverman", 0.3, None])
def test_leaving_one_out_is_a_fit_to_the_others(count, dims, bandwidth):
    x = points(count, dims)
    for i, found in enumerate(leave_one_out(x, bandwidth)[0].tolist()):
        others = torch.cat([x[:i], x[i + 1 :]])
        fitted = gaussian(others) if bandwidth is None else kernels(others, bandwidth)
        assert found == pytest.approx(float(log_density(fitted, x[i : i + 1])), rel=1e-6, abs=1e-6)


def test_a_point_that_alone_spans_a_dimension_has_no_density_left():
    x = torch.cat([points(6, 2), torch.zeros(6, 1)], 1)
    x[3, 2] = 1.0
    assert leave_one_out(x, "scott", None).isneginf().tolist() == 2 * [[i == 3 for i in range(6)]]
    assert leave_one_out(points(6, 5), "scott").isneginf().all()


def test_tiles_do_not_change_the_density(monkeypatch):
    fitted, new = kernels(points(100, 4), "scott"), points(30, 4, seed=2)
    whole = log_density(fitted, new)
    monkeypatch.setattr(density, "TILE", 7)
    assert torch.allclose(log_density(fitted, new), whole, rtol=1e-12)
    assert log_density(fitted, new[:0]).shape == (0,)


def test_far_points_still_rank():
    x = points(200, 8)
    away = torch.tensor([0, 1e2, 1e3, 1e4, 1e5, 1e6], dtype=torch.float64)[:, None] * x.std(0) + x.mean(0)
    density = log_density(kernels(x, "scott"), away)
    assert density.isfinite().all()
    assert (density.diff() < 0).all()


def test_units_of_the_features_do_not_matter():
    x, new = points(80, 4), points(10, 4, seed=1)
    scale = torch.tensor([1e-9, 1.0, 1e3, 1e9], dtype=torch.float64)
    shifted = log_density(kernels(x * scale, "scott"), new * scale) + scale.log().sum()
    assert torch.allclose(shifted, log_density(kernels(x, "scott"), new), rtol=1e-6)


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
        kernels(x, "scott")
