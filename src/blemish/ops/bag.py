"""Full conformal prediction with a new image in the bag: principal components of all rows but a fold of them, and what the scores say.

Of n + 1 rows, the last one new, each is scored by a fit to those outside its own fold. If the rows are exchangeable and the folds are drawn
without looking at them, so are the scores, and the new one is among the (n + 1)α largest with probability ≤ α (Vovk, Gammerman and Shafer,
Algorithmic Learning in a Random World, 2005).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from blemish.ops.rng import stream

BAG = 80  # training images up to which a new one and they are scored by further fits
FOLDS, FEW = (10, 5), 50  # fits for each new image in a bag of up to FEW and of more: a fit takes up to the cube of its images


class Others(NamedTuple):
    """The PCA of the n rows outside a fold, by components of falling variance; 0 beyond their rank. In float64."""

    inside: Tensor  # (m,) numbers of the rows that are left out
    outside: Tensor  # (n,) and of the others
    variance: Tensor  # (k,) with n − 1 in the denominator
    left: Tensor  # (m, k) coordinates of the rows that are left out about the mean of the others
    others: Tensor  # (n, k) and of the others


def folds(count: int, parts: int, seed: int) -> Tensor:
    """The fold (N,) of each row, of `parts`: as equal in size as can be, and drawn."""
    return torch.randperm(count, generator=stream(seed)) % parts


def fit_others(rows: Tensor, fold: Tensor) -> Iterator[Others]:
    """PCA of rows (N, D) without each fold (N,), by the eigenvectors of the others' products: matrices of n × n, whatever D is."""
    x = rows.double()
    x = x - x.mean(0)  # (N, D)
    gram = x @ x.T  # (N, N)
    floor = torch.finfo(x.dtype).eps * max(x.shape) * gram.diagonal().amax()
    for number in range(int(fold.max()) + 1):
        inside, outside = (part.nonzero()[:, 0].to(x.device) for part in (fold == number, fold != number))
        kept = gram[:, outside]  # (N, n)
        along = kept.mean(1)  # (N,) products with the mean of the others
        products = kept - along[:, None] - (along[outside] - along[outside].mean())  # (N, n) about it
        scatter, vectors = torch.linalg.eigh(products[outside])  # ascending
        scatter, vectors = scatter.flip(0)[: len(outside) - 1], vectors.flip(1)[:, : len(outside) - 1]  # the others span no more
        root = scatter.where(scatter > floor, 0).sqrt()  # (k,)
        left = (products[inside] @ vectors / root).masked_fill(root == 0, 0)
        yield Others(inside, outside, root.square() / (len(outside) - 1), left, vectors * root)


def residuals(rows: Tensor, fit: Others, kept: int) -> Tensor:
    """What the first `kept` components of the others do not explain of the rows that are left out, of rows (N, D): (m, D)."""
    base, own = fit.others[:, :kept], fit.left[:, :kept]  # (n, k), (m, k)
    # a component is the sum of the others, about their mean, times their coordinates along it, over its scatter
    weights = (own / (fit.variance[:kept] * (len(base) - 1))) @ base.T  # (m, n) of the others in what is explained
    every = rows.new_zeros(len(own), len(rows), dtype=torch.float64)  # (m, N) of all rows in what is left
    every[:, fit.outside] = (weights.sum(1, keepdim=True) - 1) / len(base) - weights
    every[torch.arange(len(own), device=rows.device), fit.inside] = 1
    return every.to(rows) @ rows


def placed(score: Tensor, bags: Tensor, calibration: Tensor) -> Tensor:
    """Scores (B,) moved no farther than to where `calibration` (n,) gives them the p-values that they have among their `bags` (B, n + 1).

    With r of the n others in a bag at least as high as its last one, that is above the r + 1-th largest calibration score and not above
    the r-th.
    """
    ends = torch.cat([calibration.new_tensor([-torch.inf]), calibration.sort().values, calibration.new_tensor([torch.inf])])
    above = (bags[:, :-1] >= bags[:, -1:]).sum(1)  # (B,)
    low, high = ends[len(ends) - 2 - above], ends[len(ends) - 1 - above]
    return torch.minimum(torch.maximum(score, torch.nextafter(low, high)), high)
