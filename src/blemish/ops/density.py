"""Gaussian kernel density with the data's own covariance as the kernel's shape."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from blemish.edge.errors import InputError
from blemish.ops.neighbours import pairwise

TILE = 2**22  # distances held at a time: 32 MB of float64


class KDE(NamedTuple):
    """Kernels of covariance L Lᵀ around the training points, which are stored whitened by L; float64."""

    points: Tensor  # (N, D) L⁻¹ (point − mean)
    factor: Tensor  # (D, D) L, lower triangular
    mean: Tensor  # (D,)


@torch.no_grad()
def fit(points: Tensor, bandwidth: str | float) -> KDE:
    """Density of points (N, D), as `scipy.stats.gaussian_kde`: kernel covariance = factor² · sample covariance.

    The factor is n^(−1/(d+4)) for "scott", (n(d+2)/4)^(−1/(d+4)) for "silverman", or the number given.
    InputError if the points are not finite or span fewer than D dimensions, as they then have no density.
    """
    if not points.isfinite().all():
        raise InputError("points: NaN or infinity, a density needs finite points")
    count, dims = points.shape
    if count <= dims:
        raise InputError(f"points: {count} points in {dims} dimensions have no density; use at least {dims + 1} or fewer dimensions")
    rules = {"scott": float(count), "silverman": count * (dims + 2) / 4}
    width = rules[bandwidth] ** (-1 / (dims + 4)) if bandwidth in rules else float(bandwidth)
    points = points.double()
    mean = points.mean(0)
    centred = points - mean
    covariance = centred.T @ centred / (count - 1)  # (D, D)
    # by the correlation matrix, so that features of very different scale are not taken for singular
    deviation, eps = covariance.diagonal().sqrt(), torch.finfo(torch.float64).eps
    constant = deviation <= eps * count * points.abs().amax(0)
    if constant.any() or torch.linalg.eigvalsh(covariance / torch.outer(deviation, deviation))[0] <= eps * max(count, dims):
        raise InputError(f"points: they span fewer than their {dims} dimensions, a density needs full rank; reduce them by PCA first")
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
    for part in points.split(TILE):  # (n, D)
        step = max(1, TILE // len(part))
        for out, some in zip(result.split(step), rows.split(step), strict=True):
            # direct differences: a matrix product would lose the kernel's width for points far from all
            distance = pairwise(some, part)  # (q, n)
            out.copy_(torch.logaddexp(out, torch.logsumexp(-0.5 * distance.square(), 1)))
    return result - level[0] - level[1] - level[2]


def _whiten(centred: Tensor, factor: Tensor) -> Tensor:
    if torch.compiler.is_exporting():  # no exporter solves, but the inverse is a constant
        return centred @ torch.linalg.solve_triangular(factor, torch.eye(len(factor), dtype=factor.dtype), upper=False).T
    return torch.linalg.solve_triangular(factor, centred.T, upper=False).T.contiguous()
