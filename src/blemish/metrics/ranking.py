"""A ranking reduced to the distinct scores of the positives: metrics, their error bounds and curves are sums over these steps."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

FPR_LIMIT = 0.3  # AUPRO integrates up to here (Bergmann et al., The MVTec Anomaly Detection Dataset, IJCV 2021)


class Tally(NamedTuple):
    """Pixels by value: K ascending distinct values, the number of pixels with each and their total weight."""

    value: np.ndarray  # (K,) int32
    count: np.ndarray  # (K,) int64
    weight: np.ndarray  # (K,) float64


NOTHING = Tally(np.empty(0, np.int32), np.empty(0, np.int64), np.empty(0))


def ordered(score: np.ndarray) -> np.ndarray:
    """float32 → int32 in the same order, −0.0 and +0.0 being equal; `unordered` is the inverse."""
    bits = (score + np.float32(0)).view(np.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def unordered(value: np.ndarray) -> np.ndarray:
    """The float32 scores behind `ordered` ones."""
    return (value ^ ((value >> 31) & 0x7FFFFFFF)).view(np.float32)


def count_sorted(value: np.ndarray, weight: np.ndarray | None = None) -> Tally:
    """Tally of ascending values (N,) int32 with weights (N,), none by default."""
    if len(value) == 0:
        return NOTHING
    start = np.append(0, 1 + np.flatnonzero(value[1:] != value[:-1]))
    total = np.zeros(len(start)) if weight is None else np.add.reduceat(weight, start)
    return Tally(value[start], np.diff(start, append=len(value)), total)


def combine(tallies: list[Tally], shift: int = 0) -> Tally:
    """One tally of all, their values without the lowest `shift` bits."""
    value, count, weight = (np.concatenate(parts) for parts in zip(NOTHING, *tallies, strict=True))
    if len(value) == 0:
        return NOTHING
    value = value >> shift
    order = np.argsort(value, kind="stable")  # merges sorted runs
    value = value[order]
    start = np.append(0, 1 + np.flatnonzero(value[1:] != value[:-1]))
    return Tally(value[start], np.add.reduceat(count[order], start), np.add.reduceat(weight[order], start))


def sort_parts(parts: list[np.ndarray], dtype: type) -> np.ndarray:
    """One ascending array of all parts; a single part is sorted in place."""
    whole = parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, dtype), *parts])
    if (whole[1:] < whole[:-1]).any():
        whole.sort()
    return whole


class Steps(NamedTuple):
    """The K distinct scores of the positives, descending, with the negatives above and at each; both classes are present."""

    score: np.ndarray  # (K,)
    positive: np.ndarray  # (K,) int64 positives with this score
    weight: np.ndarray  # (K,) float64 sum of 1 / (pixels of the region) over these positives
    above: np.ndarray  # (K,) int64 negatives with a higher score
    tied: np.ndarray  # (K,) int64 negatives with this score
    negatives: int


class Ranks(NamedTuple):
    """Sorted negatives, of which `through[i]` are in the first i entries (None: one each)."""

    value: np.ndarray  # (N,) ascending
    through: np.ndarray | None = None  # (N + 1,) int64

    def total(self) -> int:
        return len(self.value) if self.through is None else int(self.through[-1])

    def below(self, value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The numbers of negatives that are smaller than each `value` (K,), and that are not larger."""
        first = np.searchsorted(self.value, value)
        last = first.copy()
        met = np.flatnonzero(self.value[np.minimum(first, len(self.value) - 1)] == value) if len(self.value) else first[:0]
        last[met] = np.searchsorted(self.value, value[met], side="right")  # ties are rare: the second search is for them alone
        return (first, last) if self.through is None else (self.through[first], self.through[last])


def walk(value: np.ndarray, positive: np.ndarray, weight: np.ndarray, negatives: list[Ranks]) -> Steps | None:
    """Steps of positives with ascending distinct `value` (K,) through all `negatives`; None where a class is absent."""
    total = sum(ranks.total() for ranks in negatives)
    if total == 0 or len(value) == 0:
        return None
    smaller, through = np.zeros(len(value), np.int64), np.zeros(len(value), np.int64)
    for ranks in negatives:
        first, last = ranks.below(value)
        smaller += first
        through += last
    return Steps(value[::-1], positive[::-1], weight[::-1], (total - through)[::-1], (through - smaller)[::-1], total)


def climb(rise: np.ndarray, start: np.ndarray, end: np.ndarray) -> tuple[float, float]:
    """Integral over [0, 1] of a curve with a linear `rise` from each `start` to its `end`, divided by the total rise, and its error bound.

    The bound covers every monotone curve through the same corners: each rise at its `start` at best, at its `end` at worst.
    """
    early, late, width = np.maximum(1 - start, 0), np.maximum(1 - end, 0), end - start
    cut = np.divide(early**2, 2 * width, out=np.zeros_like(width), where=width > 0)  # the step on which the integral ends
    total = rise.sum()
    area, best, worst = ((rise * share).sum() / total for share in (np.where(end <= 1, (early + late) / 2, cut), early, late))
    return float(area), float(max(best - area, area - worst))


def auroc(steps: Steps) -> tuple[float, float]:
    """Area under the ROC curve, and the bound Σ positives·negatives/2 over pairs that share a step."""
    start, end = steps.above / steps.negatives, (steps.above + steps.tied) / steps.negatives
    return climb(steps.positive.astype(np.float64), start, end)


def aupro(steps: Steps) -> tuple[float, float]:
    """Mean overlap of the regions as a function of the FPR, integrated to FPR_LIMIT and divided by it, and its bound."""
    unit = FPR_LIMIT * steps.negatives
    return climb(steps.weight, steps.above / unit, (steps.above + steps.tied) / unit)


def average_precision(steps: Steps) -> tuple[float, float]:
    """Σ (R_k − R_{k−1}) P_k, and its bound.

    Of p positives in a step that A positives precede, the j-th has at best precision (A+p)/(A+p+above) and at worst
    (A+j)/(A+j+above+tied), which is concave in j, so the mean of its two ends bounds the mean over j from below.
    """
    found = np.cumsum(steps.positive)  # (K,)
    false = steps.above + steps.tied
    first = found - steps.positive + 1
    tied = found / (found + false)
    worst = (first / (first + false) + tied) / 2
    share = steps.positive / found[-1]
    value, best, low = ((share * precision).sum() for precision in (tied, found / (found + steps.above), worst))
    return float(min(value, 1.0)), float(max(best - value, value - low))


def f1_max(steps: Steps) -> tuple[float, float]:
    """Largest F1 of all thresholds, and a bound on the gain of a threshold inside a step."""
    found = np.cumsum(steps.positive)
    f1, best = (2 * found / (found[-1] + found + false) for false in (steps.above + steps.tied, steps.above))
    return float(f1.max()), float(best.max() - f1.max())


def f1_threshold(steps: Steps) -> float:
    """The highest threshold that reaches the largest F1 (positive: score ≥ threshold)."""
    found = np.cumsum(steps.positive)
    return float(steps.score[(found / (found[-1] + found + steps.above + steps.tied)).argmax()])


def values(steps: Steps | None, metrics: dict[str, Callable], threshold: str) -> dict[str, float | None]:
    """The metrics by name, and the oracle threshold of F1-max under the name `threshold`; None where a class is absent."""
    if steps is None:
        return dict.fromkeys((*metrics, threshold))
    return {key: metric(steps)[0] for key, metric in metrics.items()} | {threshold: f1_threshold(steps)}


def thin(x: np.ndarray, y: np.ndarray, points: int) -> np.ndarray:
    """At most `points` of the vertices (K, 2), ends included, spread evenly along the curve and along x."""
    travel = np.cumsum(np.abs(np.diff(x, prepend=x[0])) + np.abs(np.diff(y, prepend=y[0])))
    place = travel / max(travel[-1], 1e-12) + (x - x[0]) / max(x[-1] - x[0], 1e-12)
    keep = np.arange(len(x)) if len(x) <= points else np.searchsorted(place, np.linspace(0, place[-1], points - 1))
    keep = np.unique(np.append(np.minimum(keep, len(x) - 1), len(x) - 1))
    return np.stack([x[keep], y[keep]], axis=1)


def corners(rise: np.ndarray, steps: Steps) -> tuple[np.ndarray, np.ndarray]:
    """Vertices (2K + 2,) of the curve of the cumulative share of `rise` over the FPR."""
    height = np.cumsum(rise)
    height = height / height[-1]
    x = np.stack([steps.above, steps.above + steps.tied], axis=1).ravel() / steps.negatives
    y = np.stack([np.append(0, height[:-1]), height], axis=1).ravel()
    return np.concatenate([[0], x, [1]]), np.concatenate([[0], y, [1]])


def roc(steps: Steps) -> tuple[np.ndarray, np.ndarray]:
    """FPR and TPR."""
    return corners(steps.positive, steps)


def pro(steps: Steps) -> tuple[np.ndarray, np.ndarray]:
    """FPR up to FPR_LIMIT and mean overlap of the regions."""
    x, y = corners(steps.weight, steps)
    inside = int(np.searchsorted(x, FPR_LIMIT, side="right"))
    last = y[inside - 1] + (y[inside] - y[inside - 1]) * (FPR_LIMIT - x[inside - 1]) / (x[inside] - x[inside - 1])
    return np.append(x[:inside], FPR_LIMIT), np.append(y[:inside], last)


def pr(steps: Steps) -> tuple[np.ndarray, np.ndarray]:
    """Recall and precision, to be drawn as steps."""
    found = np.cumsum(steps.positive)
    precision = found / (found + steps.above + steps.tied)
    return np.append(0, found / found[-1]), np.append(precision[0], precision)


def curves(steps: Steps | None, names: Iterable[str], points: int) -> dict[str, np.ndarray]:
    """The curves "roc", "pr" or "pro" by name, (K, 2) with K ≤ points, K = 0 where a class is absent."""
    all_curves = {"roc": roc, "pr": pr, "pro": pro}
    return {name: np.empty((0, 2)) if steps is None else thin(*all_curves[name](steps), points) for name in names}
