"""How far an export is from its run on real images."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from blemish.data.dataset import cut
from blemish.data.images import ignore_mask, prepare
from blemish.data.manifest import Sample, read_manifest
from blemish.deploy.quantize import Band, band_of
from blemish.detector import Detector
from blemish.edge.errors import InputError
from blemish.edge.geometry import fill_masked, middle, mirrored
from blemish.edge.reading import read
from blemish.edge.runtime import Model
from blemish.ops.maps import apply_ignore_mask
from blemish.run.config import build
from blemish.run.results import Preprocessing, images_at
from blemish.run.tiling import TOGETHER, score_image
from blemish.types import UNKNOWN, Prediction


class Parity(NamedTuple):
    """How far an export is from its run on the same images."""

    images: int
    score_difference: float  # the largest
    score_scale: float  # what it is measured by, see `spread`
    map_difference: float | None  # the largest of any pixel; None without maps
    map_scale: float | None
    flipped: int  # decisions that are not the run's
    band: Band | None = None  # of an export in two precisions, whose differences are those of float32

    def holds(self, tolerance: float, map_tolerance: float, flips: int) -> bool:
        """Whether no difference is above its share of its scale, and no more decisions than `flips` differ."""
        close = self.score_difference <= tolerance * self.score_scale and self.flipped <= flips
        return close and (self.map_difference is None or self.map_difference <= map_tolerance * self.map_scale)

    def __str__(self) -> str:
        found = [("a score", self.score_difference, self.score_scale), ("a map's pixel", self.map_difference, self.map_scale)]
        shares = [f"of {name} {d:.3g}, {d / scale:.2g} of a spread of {scale:.3g}" for name, d, scale in found if d is not None]
        return f"{self.images} images: largest difference {'; '.join(shares)}; {self.flipped} decisions flipped" + (
            f"; {self.band}" if self.band else ""
        )


@torch.inference_mode()
def compare(model: Detector, preprocessing: Preprocessing, other: Model, images: Iterable[tuple[Path, Sample]]) -> Parity:
    """Scores, maps and decisions of the run, from its own preprocessing of each image, against those of the export from its file.

    Of a sample that is a part of a file the export is given the pixels.
    """
    scores, peaks, differences, map_differences, flipped = [], [], [], [], 0
    for path, sample in images:
        array = loaded(path, sample)
        score, map = score_of_run(model, preprocessing, array, other.metadata["maps"])
        ((*_, found, found_map),) = other.scored([array if sample.tile else path], TOGETHER)
        scores.append(score)
        differences.append(abs(found - score))
        flipped += other.threshold is not None and (score > other.threshold) != (found > other.threshold)
        if found_map is not None:
            peaks.append(float(map.max()))
            map_differences.append(float(np.abs(found_map - map).max()))
    if not np.isfinite(differences + map_differences).all():
        differences = [float("inf")]
    calibration = model.calibration.cpu().double().numpy()
    maps = (max(map_differences), spread(calibration[:, 1], peaks)) if map_differences else (None, None)
    return Parity(len(scores), max(differences), spread(calibration[:, 0], scores), *maps, int(flipped))


def score_of_run(model: Detector, preprocessing: Preprocessing, array: np.ndarray, maps: bool) -> tuple[float, np.ndarray | None]:
    """Score and map of an image by the run: (h, w) in the pixels of the network's input, or by tiles in the image's own.

    InputError where an export without `maps` could not have the score.
    """
    geometry, window, tile, *_ = preprocessing
    inside = preprocessing.inside(None, *array.shape[:2])
    if tile:
        score, map = score_image(model, array, preprocessing, TOGETHER, None, inside)
        map, by_map = None if map is None else map[:], map is not None and inside is not None
    else:
        found = model(prepare(array, window, geometry, inside)[None])
        ignored = ignore_mask(*array.shape[:2], geometry, inside)
        by_map = found.map is not None and ignored is not None and model.map_share is not None
        score, map = found if ignored is None else apply_ignore_mask(Prediction(*found), ignored[None], model.map_share)
        score, map = float(score), None if map is None else map[0].numpy()
    if by_map and not maps:
        raise InputError("maps=false: the score is that of the map inside the ROI or the letterbox; expected maps=true")
    return score, map


def spread(normal: Sequence[float], shown: Sequence[float]) -> float:
    """The standard deviation of the scores of held-out normal images; if there are none or all are equal, of the images compared, and
    if these are equal too, their magnitude."""
    for values in (np.asarray(normal), np.asarray(shown)):
        if len(values) > 1 and values.std(ddof=1) > 1e-6 * np.abs(values).max():
            return float(values.std(ddof=1))
    return float(np.abs(shown).max()) or 1.0


def certified(other: Model, held_out: Sequence[tuple[Path, Sample]], images: Sequence[tuple[Path, Sample]]) -> Band:
    """The band of an export in two precisions from images held out, with its decisions on other `images` counted."""
    band = band_of(scores_of(other, held_out, exact=False), scores_of(other, held_out, exact=True), other.threshold)
    other.metadata["band"] = band._asdict()
    found, exact = (scores_of(other, images, exact) for exact in (False, True))
    flips = sum((one > other.threshold) != (two > other.threshold) for one, two in zip(found, exact, strict=True))
    return band._replace(tested=len(found), flips=flips, twice=other.twice / len(found))


def scores_of(other: Model, images: Iterable[tuple[Path, Sample]], exact: bool) -> list[float]:
    """Scores of images by an export in two precisions: all in float32, or none but those in its band, if it has one."""
    other.exact = exact
    return [score for image in images for _, _, score, _ in other.scored([loaded(*image)], 1)]


def arrays_of(images: Iterable[tuple[Path, Sample]], preprocessing: Preprocessing) -> list[np.ndarray]:
    """Decoded images as a network's input is made of them: tiles of the middle where the run scores tiles, and the ROI's outside filled."""
    arrays = []
    for path, sample in images:
        array, side = loaded(path, sample), preprocessing.tile
        array = fill_masked(array, preprocessing.inside(None, *array.shape[:2]), preprocessing.window)
        if side:
            array = mirrored(array[middle(array.shape[:2], [min(side, length) for length in array.shape[:2]])], side)
        arrays.append(array)
    return arrays


def chosen(folder: str | None, run: Path, data: Any, n: int, split: str = "test") -> list[tuple[Path, Sample]]:
    """At most n images, evenly spaced in their order: of a folder, or those of a run's split, with their rows of its manifest.

    `data` is the config of the run's data, which knows where they are. InputError if none were tested.
    """
    if not folder:
        module = build(data)
        module.prepare_data()  # drawn images are drawn again where they are gone
        found = [(module.root / sample.path, sample) for sample in read_manifest(run / "manifest.csv") if sample.split == split]
    elif not Path(folder).expanduser().exists():
        raise InputError(f"images={folder}: no such file or folder")
    else:
        found = [(path, Sample(path.name, "test", UNKNOWN, "unknown")) for path in images_at(folder)]
    if not found and split == "test":
        raise InputError(f"images={folder}: no images; expected images=FOLDER where the run was not tested")
    return [found[i] for i in np.unique(np.linspace(0, len(found) - 1, min(n, len(found))).round().astype(int))]


def loaded(path: Path, sample: Sample) -> np.ndarray:
    """The decoded image, or the tile of it that the sample is."""
    try:
        return cut(path.parent, sample, read(path))
    except InputError as error:
        raise InputError(f"{error}; images come from the run's own test: where they have moved, give images=FOLDER") from None
