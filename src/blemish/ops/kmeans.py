"""k-means for dictionaries of a few words.

Own code, since scikit-learn's runs on the CPU only and faiss's on a GPU needs another wheel, while the features are on the backbone's
device; neither draws from a torch generator or finds the same words on both devices.
"""

import math
from typing import NamedTuple

import torch
from torch import Generator, Tensor

TILE = 2**18  # values processed at a time: small enough for the cache


class KMeans(NamedTuple):
    """A local minimum of the sum of squared distances of the rows to their nearest centre."""

    centres: Tensor  # (k, D)
    labels: Tensor  # (N,) int64
    inertia: Tensor  # () float64, the sum


@torch.no_grad()
def fit(rows: Tensor, k: int, generator: Generator, restarts: int = 10, steps: int = 300, tolerance: float = 1e-5) -> KMeans:
    """The best of `restarts` runs of Lloyd's algorithm on finite rows (N, D), each from greedy k-means++ (Arthur & Vassilvitskii 2007).

    A run ends after `steps` or when a step lowers the sum by no more than `tolerance` of it, which is as strict for tight clusters far
    apart. Draws come from `generator`, on its own device, so that a CPU generator gives every device the same start. In float64.
    """
    mean = rows.mean(0, dtype=torch.float64)
    centred = rows.double() - mean  # float32 products would misplace rows of tight clusters that lie far apart
    square = centred.square().sum(1)  # (N,)
    best = None
    for _ in range(restarts):
        run = _lloyd(centred, square, _seed(centred, square, k, generator), steps, tolerance)
        if best is None or run.inertia < best.inertia * (1 - 1e-9):  # rounding must not choose between equal runs
            best = run
    return best._replace(centres=(best.centres + mean).to(rows.dtype))


def _seed(rows: Tensor, square: Tensor, k: int, generator: Generator) -> Tensor:
    trials = min(2 + int(math.log(k)), len(rows))  # scikit-learn's number of candidates for each centre
    centres = rows.new_empty(k, rows.shape[1])
    weight = torch.ones_like(square)  # (N,) squared distance to the nearest centre; the first centre is drawn uniformly
    for i in range(k):
        # An exponential race draws without replacement in proportion to the weights, with no running sum, which GPUs round differently.
        race = torch.empty(len(rows), device=generator.device, dtype=rows.dtype).exponential_(generator=generator).to(rows.device)
        drawn = rows[(race / weight).topk(trials if i else 1, largest=False).indices]  # (t, D)
        nearest = torch.addmm(drawn.square().sum(1), rows, drawn.T, alpha=-2).add_(square[:, None]).clamp_min_(0)  # (N, t)
        if i:
            nearest = torch.minimum(nearest, weight[:, None])
        chosen = nearest.sum(0).argmin()
        centres[i], weight = drawn[chosen], nearest[:, chosen]
    return centres


def _lloyd(rows: Tensor, square: Tensor, centres: Tensor, steps: int, tolerance: float) -> KMeans:
    labels, distance, total, size = _assign(rows, square, centres)
    for _ in range(steps):
        before = distance.sum()
        centres = total / size.clamp_min(1)[:, None]
        empty = (size == 0).nonzero()[:, 0]
        centres[empty] = rows[distance.topk(len(empty)).indices]  # an empty cluster moves to a row far from its centre
        labels, distance, total, size = _assign(rows, square, centres)
        if before - distance.sum() <= tolerance * before:
            break
    return KMeans(centres, labels, distance.sum())


def _assign(rows: Tensor, square: Tensor, centres: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Label (N,) of the nearest centre, squared distance (N,) to it, and each cluster's sum (k, D) and size (k,)."""
    labels, distances = torch.empty(len(rows), dtype=torch.int64, device=rows.device), torch.empty_like(square)
    total, size, words = torch.zeros_like(centres), centres.new_zeros(len(centres)), torch.arange(len(centres), device=rows.device)
    step = max(1, TILE // max(centres.shape))
    for start in range(0, len(rows), step):
        where = slice(start, start + step)
        distances[where], labels[where] = torch.addmm(centres.square().sum(1), rows[where], centres.T, alpha=-2).min(1)
        member = (labels[where, None] == words).to(rows.dtype)  # (n, k): its product sums in one order, index_add on a GPU does not
        total += member.T @ rows[where]
        size += member.sum(0)
    return labels, distances.add_(square).clamp_min_(0), total, size
