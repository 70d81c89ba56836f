"""Differences of an image and its reconstruction, and of a Gaussian and its prior."""

import torch
from kornia.metrics import ssim
from torch import Tensor


def squared_error(image: Tensor, reconstruction: Tensor) -> Tensor:
    """Squared error (B, H, W), averaged over the channels of (B, C, H, W)."""
    return (image - reconstruction).square().mean(1)


def dissimilarity(image: Tensor, reconstruction: Tensor, window: int) -> Tensor:
    """1 − SSIM (B, H, W) in [0, 2], averaged over the channels of (B, C, H, W) in [0, 1] (Wang et al. 2004).

    The window is a Gaussian of σ = 1.5 cut to `window`×`window` pixels, an odd number; borders are reflected.
    """
    return 1 - ssim(image, reconstruction, window).mean(1)


def gaussian_kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, diag exp(log_variance)) ‖ N(0, I)) in nats, (B,) of (B, d) (Kingma and Welling 2014, appendix B)."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1)


def sampled(mean: Tensor, log_variance: Tensor, generator: torch.Generator) -> Tensor:
    """A draw (B, d) of N(mean, diag exp(log_variance)) through which gradients flow to both."""
    noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
    return mean + (0.5 * log_variance).exp() * noise


def relative_distance(values: Tensor, others: Tensor) -> Tensor:
    """‖values − others‖ / ‖values‖ (B,), each image's (B, …) taken as one vector; finite for zero vectors."""
    values, others = values.flatten(1), others.flatten(1)
    return (values - others).norm(dim=1) / values.norm(dim=1).clamp_min(1e-8)
