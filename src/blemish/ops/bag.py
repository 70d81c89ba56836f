"""Full conformal prediction with a new image in the bag: principal components of all rows but one, for each of them, and what it says.

Of n + 1 rows, the last one new, each is scored by a fit to the n others. If they are exchangeable, so are the scores, and the new one is
among the (n + 1)α largest with probability ≤ α (Vovk, Gammerman and Shafer, Algorithmic Learning in a Random World, 2005).
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Others(NamedTuple):
    """For each of N rows the PCA of the N − 1 others, by components of falling variance; 0 beyond their rank. In float64."""

    variance: Tensor  # (N, k) without row i, N − 2 in the denominator
    coordinates: Tensor  # (N, N, k) without row i: of all rows, i among them, about the mean of the others


def fit_others(rows: Tensor) -> Others:
    """PCA of rows (N, D) without each of them, by the eigenvectors of the others' products: N matrices of N × N, whatever D is."""
    x = rows.double() - rows.double().mean(0)  # (N, D): the mean of all but row i is −x_i / (N − 1)
    count, gram = len(x), x @ x.T  # (N, N)
    shift = gram / (count - 1)
    products = gram + shift[:, :, None] + shift[:, None] + (shift.diagonal() / (count - 1))[:, None, None]  # (N, N, N) without row i
    own = products.diagonal(dim1=0, dim2=1).T.clone()  # (N, N) of row i with all
    every = torch.arange(count, device=x.device)
    products[every, every], products[every, :, every] = 0.0, 0.0
    scatter, vectors = torch.linalg.eigh(products)  # ascending
    scatter, vectors = scatter.flip(1)[:, : count - 2], vectors.flip(2)[:, :, : count - 2]  # the others span no more
    least = torch.finfo(x.dtype).eps * max(count - 1, x.shape[1]) * scatter[:, :1].maximum(gram.diagonal().amax())  # as `pca.fit`
    root = scatter.where(scatter > least, 0).sqrt()
    coordinates = vectors * root[:, None]
    away = (own[:, None] @ vectors)[:, 0] / root  # (N, k)
    coordinates[every, every] = away.masked_fill(root == 0, 0)
    return Others(root.square() / max(count - 2, 1), coordinates)


def residuals(rows: Tensor, others: Others, kept: Tensor) -> Tensor:
    """What the first `kept` (N,) components of the others do not explain of rows (N, D): (N, D)."""
    x, (variance, coordinates) = rows.double() - rows.double().mean(0), others
    count, chosen = len(x), within(kept, variance.shape[1])
    # a component is the sum of the others, about their mean, times their coordinates along it, over its scatter
    along = (coordinates.diagonal(dim1=0, dim2=1).T / (variance * (count - 2))).masked_fill(~chosen, 0)  # (N, k)
    weights = (coordinates @ along[:, :, None])[:, :, 0].fill_diagonal_(0)  # (N, N) of the others in what is explained of row i
    return (count - weights.sum(1, keepdim=True)) / (count - 1) * x - weights @ x


def within(kept: Tensor, most: int) -> Tensor:
    """Which of `most` components are among the first `kept` (…): (…, most)."""
    return torch.arange(most, device=kept.device) < kept[..., None]


def placed(score: Tensor, bags: Tensor, calibration: Tensor) -> Tensor:
    """Scores (B,) moved no farther than to where `calibration` (n,) gives them the p-values that they have among their `bags` (B, n + 1).

    With r of the n others in a bag at least as high as its last one, that is above the r + 1-th largest calibration score and not above
    the r-th.
    """
    ends = torch.cat([calibration.new_tensor([-torch.inf]), calibration.sort().values, calibration.new_tensor([torch.inf])])
    above = (bags[:, :-1] >= bags[:, -1:]).sum(1)  # (B,)
    low, high = ends[len(ends) - 2 - above], ends[len(ends) - 1 - above]
    return torch.minimum(torch.maximum(score, torch.nextafter(low, high)), high)
