"""Image and pixel metrics on raw scores, ties exact: AUROC, AP, F1-max and AUPRO, pooled and per defect type.

F1-max and its threshold look at the truth: an oracle's figure, never a threshold to decide with. A figure is None where a class is absent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage

from blemish.edge.errors import InputError
from blemish.metrics import ranking
from blemish.metrics.ranking import NOTHING, Ranks, Steps, Tally, combine, count_sorted, ordered, sort_parts, unordered
from blemish.types import ANOMALOUS, IGNORED, NO_TRUTH, NORMAL, UNKNOWN

if TYPE_CHECKING:
    from torch import Tensor

GOOD = "good"  # the group of normal images, part of every defect type's row
POOLED = "pooled"
BINS = 2**16  # of one histogram; 16 bits of a float32 never need more

IMAGE_METRICS = {"image_auroc": ranking.auroc, "image_ap": ranking.average_precision, "image_f1_max": ranking.f1_max}
PIXEL_METRICS = {
    "pixel_auroc": ranking.auroc,
    "pixel_ap": ranking.average_precision,
    "aupro": ranking.aupro,
    "pixel_f1_max": ranking.f1_max,
}


def auroc(score: Tensor, label: Tensor) -> float | None:
    """Area under the ROC curve of score (N,) against label (N,) in {0, 1}, −1 left out; a tie counts half."""
    steps = _image_steps(*_known(score, label))
    return None if steps is None else ranking.auroc(steps)[0]


def average_precision(score: Tensor, label: Tensor) -> float | None:
    """Σ (R_k − R_{k−1}) P_k over the distinct scores (N,), label (N,) in {0, 1}, −1 left out; nothing is interpolated."""
    steps = _image_steps(*_known(score, label))
    return None if steps is None else ranking.average_precision(steps)[0]


def f1_max(score: Tensor, label: Tensor) -> tuple[float, float] | None:
    """Largest F1 over all thresholds and the oracle threshold that reaches it (anomalous: score ≥ threshold)."""
    steps = _image_steps(*_known(score, label))
    return None if steps is None else (ranking.f1_max(steps)[0], ranking.f1_threshold(steps))


def _array(values: Tensor | np.ndarray) -> np.ndarray:
    return values.detach().cpu().numpy() if hasattr(values, "detach") else np.asarray(values)


def _known(score: Tensor, label: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Finite scores and labels of the images whose label is known; InputError for any other score, label or shape."""
    score, label = _array(score).astype(np.float64), _array(label)  # (N,)
    if score.ndim != 1 or score.shape != label.shape:
        raise InputError(f"score {score.shape} and label {label.shape}: both must be (N,)")
    if len(stray := np.setdiff1d(label, (NORMAL, ANOMALOUS, UNKNOWN))):
        raise InputError(f"label: found {stray[0]}, allowed are 0 (normal), 1 (anomalous) and -1 (unknown)")
    known = label != UNKNOWN
    if not np.isfinite(score[known]).all():
        raise InputError(f"score: {np.count_nonzero(~np.isfinite(score[known]))} of {known.sum()} are NaN or infinite; finite expected")
    return score[known], label[known]


def _image_steps(score: np.ndarray, label: np.ndarray) -> Steps | None:
    value, positive = np.unique(score[label == ANOMALOUS], return_counts=True)
    return ranking.walk(value, positive, positive.astype(np.float64), [Ranks(np.sort(score[label == NORMAL]))])


def _check_groups(group: list[str], images: int) -> None:
    if len(group) != images:
        raise InputError(f"group: {len(group)} names for {images} images")
    if POOLED in group:
        raise InputError(f"group: {POOLED!r} names the row of all images; a defect type needs another name")


def _members(groups: Iterable[str]) -> dict[str, list[str]]:
    """The rows of a table and the groups each is made of."""
    groups = sorted(groups)
    return {POOLED: groups} | {name: [g for g in groups if g in (name, GOOD)] for name in groups if name != GOOD}


def _values(steps: Steps | None, figures: dict[str, Callable], threshold: str) -> dict[str, float | None]:
    if steps is None:
        return dict.fromkeys((*figures, threshold))
    return {key: figure(steps)[0] for key, figure in figures.items()} | {threshold: ranking.f1_threshold(steps)}


class ImageMetrics:
    """Scores of images as they come; figures of all of them and of each defect type with the good ones."""

    def __init__(self) -> None:
        self._score: dict[str, list[np.ndarray]] = {}
        self._label: dict[str, list[np.ndarray]] = {}

    def update(self, score: Tensor, label: Tensor, group: list[str]) -> None:
        """score (B,) finite, label (B,) in {0, 1}, −1 left out, group: B names of defect types, "good" for normal images."""
        _check_groups(group, len(score))
        known = _array(label) != UNKNOWN
        score, label = _known(score, label)
        names = np.array(group, dtype=object)[known]
        for name in dict.fromkeys(names):
            self._score.setdefault(name, []).append(score[names == name])
            self._label.setdefault(name, []).append(label[names == name])

    def merge(self, other: ImageMetrics) -> None:
        """Takes in what another process has seen."""
        for name in other._score:
            self._score.setdefault(name, []).extend(other._score[name])
            self._label.setdefault(name, []).extend(other._label[name])

    def _steps(self, names: list[str]) -> Steps | None:
        if not names:
            return None
        return _image_steps(*(np.concatenate([part for g in names for part in parts[g]]) for parts in (self._score, self._label)))

    def compute(self) -> dict[str, dict[str, float | None]]:
        """{"pooled" or defect type: {image_auroc, image_ap, image_f1_max, image_f1_max_threshold}}."""
        rows = {row: self._steps(names) for row, names in _members(self._score).items()}
        return {row: _values(steps, IMAGE_METRICS, "image_f1_max_threshold") for row, steps in rows.items()}

    def curves(self, points: int = 1000) -> dict[str, np.ndarray]:
        """Pooled {"roc": (K, 2) of FPR, TPR; "pr": (K, 2) of recall, precision}, K ≤ points, K = 0 where a class is absent."""
        steps = self._steps(sorted(self._score))
        return {"roc": ranking.roc(steps, points), "pr": ranking.pr(steps, points)}


def region_sizes(defect: np.ndarray) -> np.ndarray:
    """Size in pixels of the 8-connected region that each True pixel of (H, W) belongs to, in the pixels' order."""
    label, _ = ndimage.label(defect, structure=np.ones((3, 3)))
    label = label[defect]
    return np.bincount(label)[label]


class _Group:
    """Pixels of one defect type: kept one by one until there are too many, in histograms from then on."""

    def __init__(self) -> None:
        self.normal: list[np.ndarray] = []  # int32 ordered scores
        self.defect: list[np.ndarray] = []  # int64: ordered score << 32 | pixels of the region
        self.normal_bins = NOTHING
        self.defect_bins = NOTHING

    def defects(self) -> Tally:
        """The kept defect pixels, each weighing 1 / (pixels of its region)."""
        self.defect = [key := sort_parts(self.defect, np.int64)]
        return count_sorted((key >> 32).astype(np.int32), 1 / (key & 0xFFFFFFFF))

    def normals(self) -> Ranks:
        self.normal = [value := sort_parts(self.normal, np.int32)]
        return Ranks(value)


class PixelMetrics:
    """Scores of pixels as they come; figures of all of them and of each defect type with the good images.

    Exact up to `limit` pixels (4 bytes a normal pixel, 8 a defect pixel, as much again while computing). Beyond, the scores go into
    histograms, one a group and class, and those that share a bin count as tied. A bin is a float32 without its lowest bits, as few
    dropped as leave each histogram at most 2^16 bins: whatever the order, the batches and the processes, the bins come out the same,
    and memory stays at `limit` pixels and 3 MB a defect type. No score is known worse than to 2^-7 of itself. `bounds` gives the error.
    """

    def __init__(self, limit: int) -> None:
        if limit < 0:
            raise InputError(f"limit: found {limit}, a number of pixels ≥ 0 expected")
        self.limit = limit
        self._groups: dict[str, _Group] = {}
        self._kept = 0  # pixels that are in no histogram
        self._shift: int | None = None  # bits dropped; None while everything is kept

    def update(self, map: Tensor, mask: Tensor, group: list[str]) -> None:
        """map (B, H, W) taken as float32, mask (B, H, W) uint8, group: B defect types, "good" for normal images.

        A mask is 0 or 1; NO_TRUTH and IGNORED are left out. Raises InputError for other shapes or mask values, and for NaN or infinite
        scores where the mask is 0 or 1.
        """
        score, truth = map.detach().float().cpu().numpy(), mask.detach().cpu().numpy()
        if score.ndim != 3 or score.shape != truth.shape or truth.dtype != np.uint8:
            raise InputError(f"map {score.shape} and mask {truth.shape} {truth.dtype}: both must be (B, H, W), the mask uint8")
        _check_groups(group, len(score))
        for name, values, values_truth in zip(group, score, truth, strict=True):
            self._add(name, values, values_truth)
        if self._kept > self.limit:
            self._fold()

    def _add(self, name: str, score: np.ndarray, mask: np.ndarray) -> None:
        normal, defect = mask == NORMAL, mask == ANOMALOUS  # (H, W)
        counts = np.count_nonzero(normal), np.count_nonzero(defect)
        out = (mask == NO_TRUTH) | (mask == IGNORED)
        if sum(counts) + np.count_nonzero(out) != mask.size:
            raise InputError(
                f"mask of an image in group {name!r}: found values {np.unique(mask)[:8].tolist()}, "
                f"allowed are 0, 1, {IGNORED} and {NO_TRUTH}"
            )
        if not (np.isfinite(score) | out).all():
            raise InputError(f"map of an image in group {name!r}: NaN or infinite scores; finite expected")
        if sum(counts) == 0:
            return
        value = ordered(score)
        kept = self._groups.setdefault(name, _Group())
        kept.normal.append(value[normal])
        if counts[1]:
            kept.defect.append(value[defect].astype(np.int64) << 32 | region_sizes(defect))
        self._kept += sum(counts)

    def merge(self, other: PixelMetrics) -> None:
        """Takes in what another process has seen; the figures are those of one process that saw it all."""
        if other._shift is not None:
            self._coarsen(max(self._shift or 0, other._shift))
        for name, theirs in other._groups.items():
            ours = self._groups.setdefault(name, _Group())
            ours.normal += theirs.normal
            ours.defect += theirs.defect
            if other._shift is not None:
                drop = self._shift - other._shift
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
        """Moves the kept pixels into the histograms and drops bits until each has at most BINS bins."""
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
        defect = combine([tally for tally, _ in parts])
        steps = ranking.walk(*defect, [ranks for _, ranks in parts])
        # a bin begins at its lowest score, so "score ≥ it" is the bin and all above
        return None if steps is None else steps._replace(score=unordered(steps.score << (self._shift or 0)))

    def _rows(self) -> dict[str, Steps | None]:
        parts = self._parts()
        return {row: self._steps([parts[name] for name in names]) for row, names in _members(self._groups).items()}

    def compute(self) -> dict[str, dict[str, float | None]]:
        """{"pooled" or defect type: {pixel_auroc, pixel_ap, aupro, pixel_f1_max, pixel_f1_max_threshold}}.

        Each normal pixel of the row's images counts for the FPR, those beside a defect too. Regions are 8-connected, what is left out
        between two parts of one makes them two, and each weighs the same.
        """
        return {row: _values(steps, PIXEL_METRICS, "pixel_f1_max_threshold") for row, steps in self._rows().items()}

    def bounds(self) -> dict[str, dict[str, float | None]]:
        """How far each figure of `compute` can be from that of the scores themselves: 0 while they are kept, rigorous in histograms.

        AUROC: Σ_bins positives·negatives / 2, over all pairs. AUPRO: the same with the region weights, up to FPR 0.3. AP and F1-max:
        from the best and the worst order inside each bin.
        """
        exact = not self._shift  # a histogram that has dropped no bit is exact too
        return {
            row: {key: None if steps is None else 0.0 if exact else figure(steps)[1] for key, figure in PIXEL_METRICS.items()}
            for row, steps in self._rows().items()
        }

    def curves(self, points: int = 1000) -> dict[str, np.ndarray]:
        """Pooled {"roc": (K, 2) of FPR, TPR; "pr": (K, 2) of recall, precision; "pro": (K, 2) of FPR, overlap}, K ≤ points."""
        steps = self._steps(list(self._parts().values()))
        return {"roc": ranking.roc(steps, points), "pr": ranking.pr(steps, points), "pro": ranking.pro(steps, points)}
