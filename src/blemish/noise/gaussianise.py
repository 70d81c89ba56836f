"""Transform of a residual to the normal law that the number of false alarms assumes."""

import math

import torch
from torch import Tensor

EXPONENTS = [k / 10 for k in range(5, 15)]
BINS = 20


def gaussianise(residual: Tensor) -> Tensor:
    """Transform every channel of every image (B, C, H, W) to roughly N(0, 1); an all-zero channel stays as it is.

    x = sign(r)|r|^α for α in .5 .. 1.4 is fitted by a Laplace and by a Gauss law centred at 0; of the 20 laws the one with the smallest
    squared differences of cumulative histograms is taken. Zeros stay out of the fit and remain zero.
    """
    r = residual.double()
    used = r != 0
    count = used.sum((2, 3))  # (B, C)
    sign, log = r.sign(), r.abs().log()
    spread = torch.stack([deviation(sign * torch.exp(a * log), used, count) for a in EXPONENTS], 2)  # (B, C, 10)
    choice = misfits(r, count, spread).argmin(2, keepdim=True)  # (B, C, 1), the first of equals, so Laplace before Gauss
    law = choice % len(EXPONENTS)
    x = sign * torch.exp(r.new_tensor(EXPONENTS)[law][..., None] * log) / spread.gather(2, law)[..., None]
    y = torch.where(choice[..., None] < len(EXPONENTS), laplace_to_normal(x * math.sqrt(2)), x)
    return torch.where(x.isfinite(), y, 0).to(residual.dtype)


def deviation(x: Tensor, used: Tensor, count: Tensor) -> Tensor:
    """Standard deviation (B, C) of the used values about their own mean."""
    mean = x.sum((2, 3)) / count  # unused values are zero
    return (torch.where(used, x - mean[..., None, None], 0).square().sum((2, 3)) / count).sqrt()


def misfits(r: Tensor, count: Tensor, spread: Tensor) -> Tensor:
    """Σ over 20 bins of (cumulative histogram of F(Z) − k/20)² for the ten Laplace laws, then the ten Gauss laws: (B, C, 20).

    F and the powers are monotone, so a bin's edge is a threshold on the residual itself, and one sort serves all laws.
    """
    level = torch.arange(1, BINS, device=r.device, dtype=r.dtype) / BINS  # the last bin is always complete
    laplace = -(level - 0.5).sign() * torch.log1p(-2 * (level - 0.5).abs()) * math.sqrt(0.5)
    edges = torch.stack([laplace, torch.special.ndtri(level)])  # (2, 19) quantiles at unit variance
    exponent = r.new_tensor(EXPONENTS)[:, None]
    threshold = edges.sign()[:, None] * (edges.abs()[:, None] * spread[:, :, None, :, None]) ** (1 / exponent)  # (B, C, 2, 10, 19)
    below = torch.searchsorted(r.flatten(2).sort(2).values.contiguous(), threshold.flatten(2).contiguous()).view(threshold.shape)
    count = count[:, :, None, None, None]
    below = below - torch.where(threshold > 0, r[0, 0].numel() - count, 0)  # without the zeros
    return ((below / count - level) ** 2).sum(4).flatten(2)


def laplace_to_normal(x: Tensor) -> Tensor:
    """Φ⁻¹(F(x)) for the Laplace law with scale 1, through the smaller of the two tails for precision.

    Beyond |x| > 706, where the tail underflows, x is clamped: the strongest residual must not become zero.
    """
    return -x.sign() * torch.special.ndtri(0.5 * torch.exp(-x.abs().clamp_max(706)))
