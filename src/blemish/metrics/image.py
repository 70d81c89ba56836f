"""Image metrics on raw scores, ties exact: AUROC, AP and F1-max, pooled and per defect type.

F1-max and its threshold use the true labels: they are an oracle's, never to decide with. A metric is None where a class is absent.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from blemish.edge.errors import InputError
from blemish.metrics import ranking
from blemish.metrics.ranking import Ranks, Steps
from blemish.types import ANOMALOUS, NORMAL, UNKNOWN

if TYPE_CHECKING:
    from torch import Tensor

GOOD = "good"  # the group of normal images, which is part of every defect type's row
POOLED = "pooled"
IMAGE_METRICS = {"image_auroc": ranking.auroc, "image_ap": ranking.average_precision, "image_f1_max": ranking.f1_max}


class ImageMetrics:
    """Accumulates scores of images; metrics of all of them, and of each defect type with the good ones."""

    def __init__(self) -> None:
        self._rows: dict[str, list[np.ndarray]] = {}  # (N, 2) of score and label, by defect type

    def update(self, score: Tensor | np.ndarray, label: Tensor | np.ndarray, group: Iterable[str]) -> None:
        """score (B,), label (B,) in {0, 1}, −1 left out, group: B defect types, "good" for normal images; InputError unless finite."""
        check_groups(group)
        rows = np.stack([np.asarray(score, np.float64), np.asarray(label, np.float64)], 1)  # (B, 2)
        known = rows[:, 1] != UNKNOWN
        if broken := np.count_nonzero(~np.isfinite(rows[known])):
            raise InputError(f"score: {broken} of {known.sum()} are NaN or infinite; finite expected")
        for name, row in zip(group, rows, strict=True):
            if row[1] != UNKNOWN:
                self._rows.setdefault(name, []).append(row[None])

    def merge(self, other: ImageMetrics) -> None:
        """Add the images of another process."""
        for name, rows in other._rows.items():
            self._rows.setdefault(name, []).extend(rows)

    def _steps(self, names: list[str]) -> Steps | None:
        score, label = np.concatenate([np.empty((0, 2)), *(part for name in names for part in self._rows[name])]).T
        value, positive = np.unique(score[label == ANOMALOUS], return_counts=True)
        return ranking.walk(value, positive, positive.astype(np.float64), [Ranks(np.sort(score[label == NORMAL]))])

    def compute(self) -> dict[str, dict[str, float | None]]:
        """{"pooled" or defect type: {image_auroc, image_ap, image_f1_max, image_f1_max_threshold}}."""
        return {
            row: ranking.values(self._steps(names), IMAGE_METRICS, "image_f1_max_threshold") for row, names in rows_of(self._rows).items()
        }

    def curves(self, points: int = 1000) -> dict[str, np.ndarray]:
        """Pooled {"roc": (K, 2) of FPR, TPR; "pr": (K, 2) of recall, precision}, K ≤ points, K = 0 where a class is absent."""
        return ranking.curves(self._steps(list(self._rows)), ("roc", "pr"), points)


def check_groups(group: Iterable[str]) -> None:
    """InputError for a defect type with the name of the row of all images."""
    if POOLED in list(group):
        raise InputError(f"group: {POOLED!r} is the row of all images; rename that defect type")


def rows_of(groups: Iterable[str]) -> dict[str, list[str]]:
    """The rows of a table and the groups that each consists of."""
    groups = sorted(groups)
    return {POOLED: groups} | {name: [g for g in groups if g in (name, GOOD)] for name in groups if name != GOOD}
