"""Decisions on many images at once: how many alarms of a folder may be false, whatever threshold is chosen after looking.

`adjusted` controls the expected share of false alarms (Benjamini and Hochberg 1995; for p-values from one calibration set Bates, Candès,
Lei, Romano and Sesia 2023, arXiv 2104.08279). `false_alarm_bounds` bounds their number at all thresholds at once, by an envelope of the
p-values of normal images that is found by sampling from their joint distribution, as Song, Jin and Candès 2026 (arXiv 2605.20726) propose.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from .calibration import CONFIDENCE
from .errors import InputError

DRAWS = 999  # of the envelope's level: with so many the bound holds exactly, and more make it hardly tighter
RANKS = 24  # ranks among the calibration scores at which the envelope is checked, dense at the high scores
SHRINK = 0.9  # ratio of the numbers of normal images that are tried
SEED = 0  # of the draws


class Step(NamedTuple):
    """What a threshold just below a score says of a folder of images."""

    score: float
    alarms: int  # images that score at least as high
    false_at_most: int  # normal ones among them, see `false_alarm_bounds`


def certificate(scores: ArrayLike, p_values: ArrayLike, n: int, confidence: float = CONFIDENCE) -> list[Step]:
    """A Step for each of the scores (m,) of a folder, the highest first: any of them may be chosen after looking.

    p_values (m,) are those of the scores among n held-out normal ones; InputError for p-values that are not.
    """
    scores = np.asarray(scores, np.float64)
    bounds = false_alarm_bounds(scores, p_values, n, confidence)
    values, last, alarms = np.unique(-scores, return_index=True, return_counts=True)
    return [Step(-float(v), int(a), int(bounds[i])) for v, i, a in zip(values, last, alarms.cumsum(), strict=True)]


def region_levels(peaks: ArrayLike, confidence: float = CONFIDENCE) -> np.ndarray:
    """Levels c₁ ≥ c₂ ≥ … (J,): with the confidence a normal image has, for every j at once, fewer than j regions of its map above c_j.

    peaks (n, K): the highest local maxima of the maps of n held-out normal images, highest first. That the j-th of one more, exchangeable,
    is above all n has a probability of at most 1 / (n + 1), so that as many levels as that keep 1 − confidence together are the
    largest of each column: one for 19 images, five for 99.
    """
    peaks = np.asarray(peaks, np.float64)
    count = int((1 - confidence) * (len(peaks) + 1) + 1e-9)
    levels = peaks.max(0, initial=-np.inf)[:count]
    return levels[np.isfinite(levels)]


def regions_at_most(levels: ArrayLike, threshold: float) -> int | None:
    """The largest number of regions above a threshold that `region_levels` leave a normal image, None below the last of them."""
    below = np.flatnonzero(np.asarray(levels, np.float64) <= threshold)
    return int(below[0]) if len(below) else None


def adjusted(p_values: ArrayLike) -> np.ndarray:
    """Benjamini and Hochberg's adjusted p-values (m,): selecting those ≤ q has an expected share of false alarms of at most q."""
    p = _checked(p_values)
    order = np.argsort(p)
    steps = p[order] * len(p) / np.arange(1, len(p) + 1)
    values = np.empty_like(p)
    values[order] = np.minimum(np.minimum.accumulate(steps[::-1])[::-1], 1.0)
    return values


def false_alarm_bounds(scores: ArrayLike, p_values: ArrayLike, n: int, confidence: float = CONFIDENCE) -> np.ndarray:
    """An upper bound (m,) int on the normal images among those that score at least as high as each, valid for all m at once.

    The p-values (m,) of a folder's scores (m,) are from one set of n held-out normal scores, see `p_values`. If these and the scores of the
    folder's normal images, whatever their number, are exchangeable, the probability that any bound is too small is at most 1 − confidence.

    Let V(c) be the number of normal images with at most c calibration scores at or above theirs. Of m₀ normal images its law is
    negative hypergeometric, and the law of all V(c) together depends on m₀ and n alone. `_envelope` has B with P(any V(c) > B(c)) ≤ δ.
    As V(c) ≤ B(c) leaves at least R(c) − B(c) defects among the R(c) images, m₀ ≤ m − R(c) + B(c), which in turn allows the
    envelope of a smaller m₀ (closed testing; B grows with m₀). Between two thresholds the normal
    images grow by no more than all do.
    """
    p, scores = _checked(p_values), np.asarray(scores, np.float64)
    m, calibration = len(p), np.rint(p * (n + 1)).astype(int) - 1  # (m,) calibration scores at or above each
    if not np.allclose(p * (n + 1), calibration + 1, rtol=0, atol=1e-6):
        raise InputError(f"p-values: not of {n} calibration scores; expected multiples of 1/{n + 1}")
    own = m - np.searchsorted(np.sort(scores), scores, "left")  # (m,) images that score as high
    if m == 0 or n == 0:
        return own
    ranks = _ranks(n)
    reached = np.searchsorted(np.sort(calibration), ranks, "right")  # (C,) R(c)
    sizes = _sizes(m)
    for i, below in enumerate((*sizes[1:], 0)):  # descending
        bound = _envelope(sizes[i:], n, confidence)  # (C,)
        normal = min(int((m - reached + bound).min()), sizes[i])  # at most so many images are normal
        if normal > below:
            break
    grown = bound + np.maximum(own[:, None] - reached, 0)  # (m, C)
    return np.minimum(np.minimum(grown.min(1), own), normal).clip(0)


def _envelope(sizes: tuple[int, ...], n: int, confidence: float) -> np.ndarray:
    """B(c) (C,) at `_ranks` for so many normal images as the first of the sizes: the largest over all sizes, so that it grows with them."""
    return np.max([_bound(size, n, confidence) for size in sizes], axis=0)


@lru_cache(maxsize=1024)
def _bound(size: int, n: int, confidence: float) -> np.ndarray:
    """B(c) (C,) for `size` normal images: the largest v with P(V(c) ≥ v) at a level that all c together keep."""
    ranks = _ranks(n)
    tail = _tail(size, n, ranks)  # (C, size + 1) P(V(c) ≥ v)
    drawn = _counts(size, n, ranks)  # (DRAWS, C)
    least = np.sort(tail[np.arange(len(ranks)), drawn].min(1))  # (DRAWS,)
    # one more draw is below the k-th smallest of these with a probability of at most k / (DRAWS + 1)
    level = least[max(int((1 - confidence) * (DRAWS + 1) + 1e-9), 1) - 1]
    return (tail >= level).sum(1) - 1


def _ranks(n: int) -> np.ndarray:
    """At most RANKS numbers of calibration scores from 0 to n − 1, ever farther apart."""
    return np.unique(np.geomspace(1, n, RANKS).round().astype(int)) - 1


@lru_cache(maxsize=64)
def _sizes(m: int) -> tuple[int, ...]:
    """Numbers of normal images, from m down to 1."""
    sizes = [m]
    while sizes[-1] > 1:
        sizes.append(min(int(sizes[-1] * SHRINK), sizes[-1] - 1))
    return tuple(sizes)


def _tail(m: int, n: int, ranks: np.ndarray) -> np.ndarray:
    """P(V(c) ≥ v) (C, m + 1) for v = 0 … m: V(c) counts which of m scores come before the (c + 1)-th of n others in a random order."""
    logs = np.concatenate([[0.0], np.log(np.arange(1, m + n + 1)).cumsum()])  # of factorials
    v, c = np.arange(m + 1), ranks[:, None]
    before = logs[v + c] - logs[v] - logs[c]
    after = logs[m - v + n - c - 1] - logs[m - v] - logs[n - c - 1]
    mass = np.exp(before + after - (logs[m + n] - logs[m] - logs[n]))
    return np.minimum(mass[:, ::-1].cumsum(1)[:, ::-1], 1.0)


def _counts(m: int, n: int, ranks: np.ndarray) -> np.ndarray:
    """Draws (DRAWS, C) of all V(c) together: the gaps between n uniform scores are gamma distributed, and m others fall into them."""
    rng = np.random.default_rng([SEED, m, n])
    gaps = rng.standard_gamma(np.diff(np.concatenate([[0], ranks + 1, [n + 1]])), (DRAWS, len(ranks) + 1))
    shares, left, counts = gaps / gaps[:, ::-1].cumsum(1)[:, ::-1], np.full(DRAWS, m), []
    for k in range(len(ranks)):
        inside = rng.binomial(left, shares[:, k].clip(0, 1))
        left = left - inside
        counts.append(m - left)
    return np.stack(counts, 1)


def _checked(p_values: ArrayLike) -> np.ndarray:
    p = np.asarray(p_values, np.float64)
    if p.ndim != 1 or not ((p > 0) & (p <= 1)).all():
        raise InputError(f"p-values: shape {p.shape}; expected (m,) numbers in (0, 1]")
    return p
