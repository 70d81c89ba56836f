"""Gaussian kernel density with the data's own covariance as the kernel's shape."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from blemish.edge.errors import InputError
from blemish.ops.neighbours import pairwise

TILE = 2**22  # distances held at a time: 32 MB of float64


class KDE(NamedTuple):
    """Kernels of covariance L Lᵀ around the training points, which are kept whitened by L; float64."""

    points: Tensor  # (N, D) L⁻¹ (point − mean)
    factor: Tensor  # (D, D) L, lower triangular
    mean: Tensor  # (D,)


@torch.no_grad()
def fit(points: Tensor, bandwidth: str | float) -> KDE:
    """Density of points (N, D), as `scipy.stats.gaussian_kde`: kernel covariance = factor² · sample covariance.

    The factor is n^(−1/(d+4)) for "scott", (n(d+2)/4)^(−1/(d+4)) for "silverman", or the number given.
    InputError if the points are not finite, span fewer than D dimensions (there is no density; reduce them by PCA first), or the
    bandwidth is unknown.
    """
    if points.ndim != 2 or not points.isfinite().all():
        raise InputError(f"points: shape {tuple(points.shape)} or values that are not finite, a density needs finite (N, D)")
    count, dims = points.shape
    rules = {"scott": float(count), "silverman": count * (dims + 2) / 4}
    if bandwidth in rules:
        width = rules[bandwidth] ** (-1 / (dims + 4)) if count else math.nan
    elif isinstance(bandwidth, int | float) and not isinstance(bandwidth, bool) and bandwidth > 0:
        width = float(bandwidth)
    else:
        raise InputError(f"bandwidth: {bandwidth!r}, allowed are 'scott', 'silverman' or a factor above 0")
    if count <= dims:
        raise InputError(f"points: {count} points in {dims} dimensions have no density, at least {dims + 1} are needed or fewer dimensions")
    points = points.double()
    mean = points.mean(0)
    centred = points - mean
    covariance = centred.T @ centred / (count - 1)  # (D, D)
    # Judged on the correlation matrix, so that features of very different scale do not pass for singular.
    deviation = covariance.diagonal().sqrt()
    rounding = torch.finfo(torch.float64).eps * count * points.abs().amax(0)
    if (deviation <= rounding).any():
        raise InputError(
            f"points: dimension {int((deviation <= rounding).nonzero()[0])} is constant, a density needs points that vary in all"
        )
    if torch.linalg.eigvalsh(covariance / torch.outer(deviation, deviation))[0] <= torch.finfo(torch.float64).eps * max(count, dims):
        raise InputError(f"points: they span fewer than their {dims} dimensions, a density needs full rank (reduce them by PCA first)")
    factor = torch.linalg.cholesky(covariance) * width
    return KDE(_whiten(centred, factor), factor, mean)


@torch.no_grad()
def log_density(kde: KDE, rows: Tensor) -> Tensor:
    """Natural logarithm (Q,) float64 of the density at rows (Q, D); finite and still ordered where the density itself underflows."""
    points, factor, mean = (part.double() for part in kde)
    rows = _whiten(rows.double() - mean, factor)  # (Q, D)
    level = math.log(len(points)), 0.5 * len(mean) * math.log(2 * math.pi), factor.diagonal().log().sum()
    if torch.compiler.is_exporting():
        return (-0.5 * pairwise(rows, points).square()).logsumexp(1) - sum(level)
    result = rows.new_full((len(rows),), -math.inf)
    for first in range(0, len(points), TILE):
        part = points[first : first + TILE]  # (n, D)
        step = max(1, TILE // len(part))
        for start in range(0, len(rows), step):
            where = slice(start, start + step)
            # Direct differences: the matrix-product form would lose the kernel's width for points far from all.
            distance = pairwise(rows[where], part)  # (q, n)
            result[where] = torch.logaddexp(result[where], torch.logsumexp(-0.5 * distance.square(), 1))
    return result - level[0] - level[1] - level[2]


def _whiten(centred: Tensor, factor: Tensor) -> Tensor:
    if torch.compiler.is_exporting():  # no exporter solves, but the inverse is a constant
        return centred @ torch.linalg.solve_triangular(factor, torch.eye(len(factor), dtype=factor.dtype), upper=False).T
    return torch.linalg.solve_triangular(factor, centred.T, upper=False).T.contiguous()
