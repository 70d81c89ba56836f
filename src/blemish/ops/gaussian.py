"""One Gaussian per position: its two exact forms, and the Mahalanobis distance to it.

With N samples X (N, d) about their mean, Σ = XᵀX/(N-1) + ε·I. Where N > d the d×d inverse Cholesky factor is the smaller thing to
keep; where N ≤ d Woodbury's identity turns the same inverse into an (N, d) factor: Σ⁻¹ = (I - WᵀW)/ε with W = L⁻¹X and
LLᵀ = XXᵀ + ε(N-1)·I.
"""

import torch
from torch import Tensor

CHUNK = 256  # positions at a time: the temporaries stay small beside the statistics


def merge_moments(count: int, mean: Tensor, scatter: Tensor, rows: Tensor) -> int:
    """Fold samples (P, n, d) into means (P, d) and scatters Σ(x-μ)(x-μ)ᵀ (P, d, d), both in place; returns the new count.

    Chan, Golub, LeVeque 1979: about each batch's own mean, so that nothing large cancels.
    """
    n = rows.shape[1]
    fresh = rows.mean(1)  # (P, d)
    delta = fresh - mean  # (P, d)
    # the between-batch term is one more row, so that a single product updates the scatter
    between = delta.mul((count * n / (count + n)) ** 0.5)[:, None]  # (P, 1, d)
    centred = torch.cat([rows - fresh[:, None], between], 1)  # (P, n+1, d)
    scatter.baddbmm_(centred.mT, centred)
    mean.add_(delta, alpha=n / (count + n))
    return count + n


def cholesky_factor(scatter: Tensor, count: int, epsilon: float) -> Tensor:
    """Overwrite scatters (P, d, d) of `count` samples by L⁻¹, where LLᵀ = scatter/(count-1) + ε·I."""
    for chunk in scatter.split(CHUNK):
        covariance = chunk / max(count - 1, 1)
        covariance.diagonal(dim1=1, dim2=2).add_(epsilon)
        lower = torch.linalg.cholesky(covariance)
        eye = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
        # an expanded right-hand side would be solved twenty times slower than a whole one
        chunk.copy_(torch.linalg.solve_triangular(lower, eye.expand_as(lower).contiguous(), upper=False))
    return scatter


def woodbury_factor(rows: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Overwrite samples (N, P, d) by W; returns (means (P, d), W (N, P, d))."""
    count = rows.shape[0]
    mean = rows.mean(0)  # (P, d)
    rows -= mean
    for chunk in rows.split(CHUNK, dim=1):
        x = chunk.transpose(0, 1)  # (p, N, d)
        gram = x @ x.mT  # (p, N, N)
        gram.diagonal(dim1=1, dim2=2).add_(epsilon * max(count - 1, 1))
        chunk.copy_(torch.linalg.solve_triangular(torch.linalg.cholesky(gram), x, upper=False).transpose(0, 1))
    return mean, rows


def mahalanobis_cholesky(x: Tensor, mean: Tensor, factor: Tensor) -> Tensor:
    """Distances √((x-μ)ᵀΣ⁻¹(x-μ)) of samples (P, B, d) from L⁻¹ (P, d, d): (P, B)."""
    return ((x - mean[:, None]) @ factor.mT).norm(dim=2)


def mahalanobis_woodbury(x: Tensor, mean: Tensor, factor: Tensor, epsilon: float) -> Tensor:
    """The same distances from W (N, P, d): (P, B)."""
    y = x - mean[:, None]  # (P, B, d)
    along = y @ factor.permute(1, 2, 0)  # (P, B, N)
    squared = y.square().sum(2) - along.square().sum(2)  # (P, B)
    return squared.div(epsilon).clamp_min(0).sqrt()
