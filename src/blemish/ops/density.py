"""Densities of few points in few dimensions: Gaussian kernels shaped by the data's own covariance, or a single Gaussian."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from blemish.edge.errors import InputError
from blemish.ops.neighbours import pairwise

TILE = 2**22  # distances held at a time: 32 MB of float64


class Density(NamedTuple):
    """The mean of N(point, L Lᵀ) over the points, which are stored whitened by L; a single Gaussian has one, its mean. In float64."""

    points: Tensor  # (N, D) L⁻¹ (point − mean)
    factor: Tensor  # (D, D) L, lower triangular
    mean: Tensor  # (D,)


Moments = tuple[Tensor, Tensor]  # the mean (D,) of points and L (D, D), lower triangular, of their covariance L Lᵀ


@torch.no_grad()
def kernels(points: Tensor, bandwidth: str | float, known: Moments | None = None) -> Density:
    """Density of points (N, D), as `scipy.stats.gaussian_kde`: kernel covariance = `bandwidth_factor`² · sample covariance.

    known: their `moments`, where they are not to be computed. InputError if the points are not finite or span fewer than D dimensions,
    as they then have no density.
    """
    mean, lower = known or moments(points)
    factor = lower * bandwidth_factor(bandwidth, *points.shape)
    return Density(_whiten(points.double() - mean, factor), factor, mean)


@torch.no_grad()
def gaussian(points: Tensor, known: Moments | None = None) -> Density:
    """The Gaussian with the mean and sample covariance of points (N, D); InputError as for `kernels`."""
    mean, lower = known or moments(points)
    return Density(torch.zeros_like(mean)[None], lower, mean)


def bandwidth_factor(bandwidth: str | float, count: int, dims: int) -> float:
    """n^(−1/(d+4)) for "scott", (n(d+2)/4)^(−1/(d+4)) for "silverman", or the number given."""
    rules = {"scott": float(count), "silverman": count * (dims + 2) / 4}
    return rules[bandwidth] ** (-1 / (dims + 4)) if bandwidth in rules else float(bandwidth)


def moments(points: Tensor) -> Moments:
    """The moments of points (N, D) with their sample covariance, in float64. InputError if they have no density."""
    if not points.isfinite().all():
        raise InputError("points: NaN or infinity, a density needs finite points")
    count, dims = points.shape
    if count <= dims:
        raise InputError(f"points: {count} points in {dims} dimensions have no density; use at least {dims + 1} or fewer dimensions")
    points = points.double()
    mean = points.mean(0)
    centred = points - mean
    covariance = centred.T @ centred / (count - 1)  # (D, D)
    # by the correlation matrix, so that features of very different scale are not taken for singular
    deviation, eps = covariance.diagonal().sqrt(), torch.finfo(torch.float64).eps
    constant = deviation <= eps * count * points.abs().amax(0)
    if constant.any() or torch.linalg.eigvalsh(covariance / torch.outer(deviation, deviation))[0] <= eps * max(count, dims):
        raise InputError(f"points: they span fewer than their {dims} dimensions, a density needs full rank; reduce them by PCA first")
    return mean, torch.linalg.cholesky(covariance)


@torch.no_grad()
def log_density(density: Density, rows: Tensor) -> Tensor:
    """Natural logarithm (Q,) float64 of the density at rows (Q, D); finite and still ordered where the density itself underflows."""
    points, factor, mean = (part.double() for part in density)
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


@torch.no_grad()
def leave_one_out(points: Tensor, *bandwidths: str | float | None, known: Moments | None = None) -> Tensor:
    """Log density (M, N) at each of points (N, D) of what is fitted to the others: `kernels` of M bandwidths, or for None the `gaussian`.

    −∞ where the others span fewer than D dimensions. Without point i, at u from the mean, the covariance S becomes
    (S (N − 1) − u uᵀ N/(N − 1)) / (N − 2), whose inverse and determinant follow from those of S (Sherman and Morrison).
    """
    (count, dims), (mean, lower) = points.shape, known or moments(points)
    z = _whiten(points.double() - mean, lower)  # (N, D)
    square = z.square().sum(1)  # (N,) uᵀS⁻¹u
    left = 1 - square * count / (count - 1) ** 2  # (N,) det of the others' scatter as a share of that of all
    singular = (left <= torch.finfo(torch.float64).eps * count) | (count - 1 <= dims)
    left = left.masked_fill(singular, 1)
    # −log of the others' Gaussian at its mean
    level = 0.5 * dims * math.log(2 * math.pi * (count - 1) / max(count - 2, 1)) + lower.diagonal().log().sum() + 0.5 * left.log()  # (N,)

    def length(plain: Tensor, along: Tensor, left: Tensor) -> Tensor:
        """vᵀS⁻¹v without point i, from `plain` vᵀS⁻¹v and `along` uᵀS⁻¹v."""
        return (count - 2) / (count - 1) * (plain + along.square() * (count / (count - 1) ** 2 / left))

    found = []
    for bandwidth in bandwidths:
        if bandwidth is None:
            ratio = count / (count - 1)  # of x − the others' mean, and u
            found.append(-0.5 * length(ratio**2 * square, ratio * square, left))
        else:
            factor = bandwidth_factor(bandwidth, count - 1, dims)
            product = z @ z.T  # (N, N)
            distance = length(square[:, None] + square - 2 * product, square[:, None] - product, left[:, None]).fill_diagonal_(math.inf)
            found.append(torch.logsumexp(-0.5 * distance / factor**2, 1) - math.log(count - 1) - dims * math.log(factor))
    return (torch.stack(found) - level).masked_fill(singular, -math.inf)


def _whiten(centred: Tensor, factor: Tensor) -> Tensor:
    if torch.compiler.is_exporting():  # no exporter solves, but the inverse is a constant
        return centred @ torch.linalg.solve_triangular(factor, torch.eye(len(factor), dtype=factor.dtype), upper=False).T
    return torch.linalg.solve_triangular(factor, centred.T, upper=False).T.contiguous()
