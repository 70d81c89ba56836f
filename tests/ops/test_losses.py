"""Losses against numpy, scikit-image and torch's own distributions."""

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity
from support import images
from torch.distributions import Normal, kl_divergence

from blemish.ops.losses import dissimilarity, gaussian_kl, relative_distance, sampled, squared_error


def test_squared_error():
    a, b = images(2), images(2, seed=1)
    expected = ((a.numpy() - b.numpy()) ** 2).mean(1)
    np.testing.assert_allclose(squared_error(a, b), expected, rtol=1e-5)


def test_dissimilarity_is_scikit_images():
    a, b = images(2).double(), images(2, seed=1).double()
    ours = dissimilarity(a, b, 11)
    # truncate 3.5 and σ 1.5 give the same 11 taps; borders differ by half a pixel in the reflection
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0, "channel_axis": 0, "full": True}
    for i in range(2):
        expected = 1 - structural_similarity(a[i].numpy(), b[i].numpy(), **options)[1].mean(0)
        np.testing.assert_allclose(ours[i, 5:-5, 5:-5], expected[5:-5, 5:-5], atol=1e-6)


def test_kl_is_torchs():
    mean, log_variance = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    expected = kl_divergence(Normal(mean, (0.5 * log_variance).exp()), Normal(0, 1)).sum(1)
    torch.testing.assert_close(gaussian_kl(mean, log_variance), expected)
    torch.testing.assert_close(gaussian_kl(torch.zeros(1, 3), torch.zeros(1, 3)), torch.zeros(1))


def test_draws_have_mean_and_variance_and_repeat():
    mean, log_variance = torch.tensor([[-1.0, 2.0]]), torch.tensor([[0.0, -2.0]])
    drawn = sampled(mean.expand(20000, 2), log_variance.expand(20000, 2), torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn.mean(0), mean[0], atol=0.03, rtol=0)
    torch.testing.assert_close(drawn.var(0), log_variance[0].exp(), atol=0.03, rtol=0)
    assert torch.equal(drawn, sampled(mean.expand(20000, 2), log_variance.expand(20000, 2), torch.Generator().manual_seed(0)))


def test_gradients_flow_through_a_draw():
    mean, log_variance = (torch.zeros(1, 2, requires_grad=True) for _ in range(2))
    drawn = sampled(mean, log_variance, torch.Generator().manual_seed(0))
    drawn.sum().backward()
    torch.testing.assert_close(mean.grad, torch.ones(1, 2))
    torch.testing.assert_close(log_variance.grad, 0.5 * drawn.detach())  # d/dv exp(v/2)·ε at v = 0


@pytest.mark.parametrize("factor", [0.0, 1.0, 3.0])
def test_relative_distance(factor):
    a = images(3)
    torch.testing.assert_close(relative_distance(a, factor * a), torch.full((3,), abs(1 - factor)))
    assert relative_distance(torch.zeros_like(a), a).isfinite().all()
