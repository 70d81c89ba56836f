"""Pixel metrics on raw scores, ties exact: AUROC, AP, F1-max and AUPRO, pooled and per defect type.

F1-max and its threshold use the true masks: they are an oracle's, never to decide with. A metric is None where a class is absent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage

from blemish.edge.errors import InputError
from blemish.metrics import ranking
from blemish.metrics.image import check_groups, rows_of
from blemish.metrics.ranking import NOTHING, Ranks, Steps, Tally, combine, count_sorted, ordered, sort_parts, unordered
from blemish.types import ANOMALOUS, NORMAL

if TYPE_CHECKING:
    from torch import Tensor

BINS = 2**16  # of one histogram; 16 bits of a float32 never need more
PIXEL_METRICS = {
    "pixel_auroc": ranking.auroc,
    "pixel_ap": ranking.average_precision,
    "aupro": ranking.aupro,
    "pixel_f1_max": ranking.f1_max,
}


def region_sizes(defect: np.ndarray) -> np.ndarray:
    """Size in pixels of the 8-connected region that each True pixel of (H, W) belongs to, in the pixels' order."""
    label, _ = ndimage.label(defect, structure=np.ones((3, 3)))
    label = label[defect]
    return np.bincount(label)[label]


class _Group:
    """Pixels of one defect type: stored one by one until there are too many, in histograms from then on."""

    def __init__(self) -> None:
        self.normal: list[np.ndarray] = []  # int32 ordered scores
        self.defect: list[np.ndarray] = []  # int64: ordered score << 32 | pixels of the region
        self.normal_bins = self.defect_bins = NOTHING

    def defects(self) -> Tally:
        """The stored defect pixels, each with weight 1 / (pixels of its region)."""
        self.defect = [key := sort_parts(self.defect, np.int64)]
        return count_sorted((key >> 32).astype(np.int32), 1 / (key & 0xFFFFFFFF))

    def normals(self) -> Ranks:
        self.normal = [value := sort_parts(self.normal, np.int32)]
        return Ranks(value)


class PixelMetrics:
    """Accumulates scores of pixels; metrics of all of them, and of each defect type with the good images.

    Exact up to `limit` pixels (4 bytes a normal pixel, 8 a defect pixel, as much again while computing). Beyond, the scores go into
    histograms, one a group and class, and those that share a bin count as tied. A bin is a float32 without its lowest bits, as few
    dropped as leave each histogram at most 2^16 bins: whatever the order, the batches and the processes, the bins are the same,
    and memory stays at `limit` pixels and 3 MB a defect type. Every score is known to 2^-7 of itself or better. `bounds` gives the error.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._groups: dict[str, _Group] = {}
        self._kept = 0  # pixels that are in no histogram
        self._shift: int | None = None  # bits dropped; None while there are no histograms

    def update(self, map: Tensor, mask: Tensor, group: list[str]) -> None:
        """map (B, H, W), mask (B, H, W) of 0 and 1, other values left out, group: B defect types, "good" for normal images.

        InputError for NaN or infinite scores where the mask is 0 or 1.
        """
        check_groups(group)
        for name, score, truth in zip(group, map.detach().float().cpu().numpy(), mask.cpu().numpy(), strict=True):
            normal, defect = truth == NORMAL, truth == ANOMALOUS  # (H, W)
            if not (np.isfinite(score) | ~(normal | defect)).all():
                raise InputError(f"map of an image in group {name!r}: NaN or infinite scores; finite expected")
            normals, defects = np.count_nonzero(normal), np.count_nonzero(defect)
            if normals + defects:
                value = ordered(score)
                kept = self._groups.setdefault(name, _Group())
                kept.normal.append(value[normal])
                if defects:
                    kept.defect.append(value[defect].astype(np.int64) << 32 | region_sizes(defect))
                self._kept += normals + defects
        if self._kept > self.limit:
            self._fold()

    def merge(self, other: PixelMetrics) -> None:
        """Add the pixels of another process; the metrics are those of one process with all pixels."""
        if other._shift is not None:
            self._coarsen(max(self._shift or 0, other._shift))
        drop = (self._shift or 0) - (other._shift or 0)
        for name, theirs in other._groups.items():
            ours = self._groups.setdefault(name, _Group())
            ours.normal += theirs.normal
            ours.defect += theirs.defect
            ours.normal_bins = combine([ours.normal_bins, combine([theirs.normal_bins], drop)])
            ours.defect_bins = combine([ours.defect_bins, combine([theirs.defect_bins], drop)])
        self._kept += other._kept
        if self._shift is not None or self._kept > self.limit:
            self._fold()

    def _coarsen(self, shift: int) -> None:
        drop, self._shift = shift - (self._shift or 0), shift
        for group in self._groups.values() if drop else ():
            group.normal_bins = combine([group.normal_bins], drop)
            group.defect_bins = combine([group.defect_bins], drop)

    def _fold(self) -> None:
        """Move the stored pixels into the histograms and drop bits until each has at most BINS bins."""
        for group in self._groups.values():
            normal, defect = group.normals().value, group.defects()
            shift = self._shift or 0
            change = normal[1:] ^ normal[:-1]
            while np.count_nonzero(change >> shift) >= BINS:  # before counting, or the tally is larger than the pixels
                shift += 1
            self._coarsen(shift)
            group.normal_bins = combine([group.normal_bins, count_sorted(normal >> shift)])
            group.defect_bins = combine([group.defect_bins, combine([defect], shift)])
            group.normal, group.defect = [], []
        while max(max(len(g.normal_bins.value), len(g.defect_bins.value)) for g in self._groups.values()) > BINS:
            self._coarsen(self._shift + 1)
        self._kept = 0

    def _parts(self) -> dict[str, tuple[Tally, Ranks]]:
        """Defect and normal pixels of every group, in order."""
        if self._shift is None:
            return {name: (group.defects(), group.normals()) for name, group in self._groups.items()}
        if self._kept:
            self._fold()
        through = {name: np.append(0, np.cumsum(group.normal_bins.count)) for name, group in self._groups.items()}
        return {name: (g.defect_bins, Ranks(g.normal_bins.value, through[name])) for name, g in self._groups.items()}

    def _steps(self, parts: list[tuple[Tally, Ranks]]) -> Steps | None:
        steps = ranking.walk(*combine([tally for tally, _ in parts]), [ranks for _, ranks in parts])
        # a bin begins at its lowest score, so that "score ≥ it" is the bin and all above
        return None if steps is None else steps._replace(score=unordered(steps.score << (self._shift or 0)))

    def _rows(self) -> dict[str, Steps | None]:
        parts = self._parts()
        return {row: self._steps([parts[name] for name in names]) for row, names in rows_of(self._groups).items()}

    def compute(self) -> dict[str, dict[str, float | None]]:
        """{"pooled" or defect type: {pixel_auroc, pixel_ap, aupro, pixel_f1_max, pixel_f1_max_threshold}}.

        All normal pixels of the row's images count for the FPR, also those next to a defect. Regions are 8-connected after ignored
        pixels are removed, and all have the same weight.
        """
        return {row: ranking.values(steps, PIXEL_METRICS, "pixel_f1_max_threshold") for row, steps in self._rows().items()}

    def bounds(self) -> dict[str, dict[str, float | None]]:
        """Bounds on the error of each metric of `compute`: 0 while all scores are stored, rigorous in histograms.

        AUROC: Σ_bins positives·negatives / 2, over all pairs. AUPRO: the same with the region weights, up to FPR 0.3. AP and F1-max:
        from the best and the worst order inside each bin.
        """
        exact = not self._shift  # a histogram that has dropped no bit is exact too
        return {
            row: {key: None if steps is None else 0.0 if exact else metric(steps)[1] for key, metric in PIXEL_METRICS.items()}
            for row, steps in self._rows().items()
        }

    def curves(self, points: int = 1000) -> dict[str, np.ndarray]:
        """Pooled {"roc": (K, 2) of FPR, TPR; "pr": (K, 2) of recall, precision; "pro": (K, 2) of FPR, overlap}, K ≤ points."""
        return ranking.curves(self._steps(list(self._parts().values())), ("roc", "pr", "pro"), points)
