"""Principal components."""

from typing import NamedTuple

import torch
from torch import Tensor

from blemish.edge.errors import InputError


class PCA(NamedTuple):
    """An affine subspace with the variance (N − 1 in the denominator) along each of its axes, largest first."""

    mean: Tensor  # (D,)
    components: Tensor  # (k, D) orthonormal rows; the entry of largest magnitude in each row is positive
    variance: Tensor  # (k,) > 0


@torch.no_grad()
def fit(rows: Tensor, keep: int | float) -> PCA:
    """PCA of rows (N, D): the first `keep` components (int) or the fewest that hold more than that share of the variance (float).

    No more components than the rank of the data, so that whitening never divides by zero.
    InputError if there are fewer than two rows, NaN or infinity among them, or no variance at all.
    """
    if len(rows) < 2:
        raise InputError(f"rows: shape {tuple(rows.shape)}, PCA needs (N, D) with N of at least 2")
    if not rows.isfinite().all():
        raise InputError("rows: NaN or infinity among the features, PCA needs finite values")
    mean = rows.mean(0, dtype=torch.float64)  # (D,)
    # With ten rows a dimension the covariance is several times cheaper, and in float64 it resolves all that float32 features hold.
    if len(rows) >= 10 * rows.shape[1]:
        covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64, device=rows.device)  # (D, D)
        for tile in rows.split(max(1, 2**23 // len(mean))):
            centred = tile.double() - mean
            covariance.addmm_(centred.T, centred, alpha=1 / (len(rows) - 1))
        fitted = from_moments(mean, covariance, keep)
    else:
        _, values, axes = torch.linalg.svd(rows.double() - mean, full_matrices=False)
        fitted = _cut(mean, axes, values.square() / (len(rows) - 1), keep, torch.finfo(torch.float64).eps * max(rows.shape))
    return PCA(*(part.to(rows.dtype) for part in fitted))


@torch.no_grad()
def from_moments(mean: Tensor, covariance: Tensor, keep: int | float) -> PCA:
    """`fit` from the mean (D,) and covariance (D, D) of the rows, best in float64."""
    if not covariance.isfinite().all():
        raise InputError("covariance: NaN or infinity among the features, PCA needs finite values")
    variance, axes = torch.linalg.eigh((covariance + covariance.T) / 2)  # ascending
    return _cut(mean, axes.T.flip(0), variance.flip(0), keep, torch.finfo(covariance.dtype).eps * len(mean))


def kept(variance: Tensor, keep: int | float, tolerance: float = 0.0) -> Tensor:
    """How many components `fit` keeps (…) of those with the variances (…, D), largest first, and 0 up to a share `tolerance` of it."""
    count = (variance > tolerance * variance[..., :1]).sum(-1)  # the rank
    if isinstance(keep, int):
        return count.clamp_max(keep)
    share = variance.cumsum(-1) / variance.clamp_min(0).sum(-1, keepdim=True)
    return torch.minimum((share <= keep).sum(-1) + 1, count)


def _cut(mean: Tensor, axes: Tensor, variance: Tensor, keep: int | float, tolerance: float) -> PCA:
    count = int(kept(variance, keep, tolerance))
    if count == 0:
        raise InputError("rows: all rows are equal, PCA needs features that vary")
    axes = axes[:count]
    sign = axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()  # (k, 1)
    return PCA(mean, (axes * sign).contiguous(), variance[:count].contiguous())


def transform(pca: PCA, rows: Tensor, whiten: bool = False) -> Tensor:
    """Coordinates (…, k) of rows (…, D) in the subspace, of unit variance on the training rows if whitened."""
    scores = (rows.to(pca.components.dtype) - pca.mean) @ pca.components.T  # (…, k)
    return scores / pca.variance.sqrt() if whiten else scores


def inverse(pca: PCA, scores: Tensor) -> Tensor:
    """Rows (…, D) of the subspace that have these coordinates (…, k)."""
    return scores @ pca.components + pca.mean
