"""A fitted detector on images of any size: scores, decisions, and maps in each image's own pixels."""

import contextlib
import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from blemish.data.images import ignore_mask, prepare, to_image
from blemish.data.roi import Roi
from blemish.data.tiles import bands, bytes_of, largest_blocks, mean_blocks, reduction
from blemish.detector import Detector, apply_ignore_mask
from blemish.draw import overlay
from blemish.edge.calibration import Threshold, by_hand, conformal_threshold, p_values
from blemish.edge.errors import InputError, named
from blemish.edge.geometry import Geometry
from blemish.edge.reading import digest_of, find_images, is_result, read
from blemish.files import Outputs, atomic_write, picture_info, remove_stale, write_csv
from blemish.run.monitor import NOT_CLAIMED, Monitor
from blemish.run.tiling import RowsOnDisk, score_image, write_png
from blemish.types import Prediction

LARGEST = 4096  # pixels of the longer side of an overlay; that of a larger image is reduced
LONGEST = 255 - len("_detections.json")  # bytes of an output's name before what tells its kind
TABLES = ("scores.csv", "failed.csv")
COLUMNS = ("path", "score", "threshold", "decision", "p_value", "map_min", "map_max", "threshold_from")
BOUND = "bound"  # whether the bound on false alarms is claimed for an image, a column where a monitor is on


class Failure(NamedTuple):
    """An image that could not be scored."""

    path: Path
    reason: str


class ImageResult(NamedTuple):
    """The result of one image; the map is in the image's own pixels."""

    path: Path | None  # None of an array
    image: np.ndarray  # (H, W, 3) uint8, as the detector's window shows it
    score: float
    map: Tensor | RowsOnDisk | None  # (H, W) float32
    inside: np.ndarray | None = None  # (H, W) bool, where it is looked at; None for all of it


class Preprocessing(NamedTuple):
    """How the run's data module brought an image to the network's input."""

    geometry: Geometry
    window: dict  # dtype name to (lo, hi)
    tile: int | None = None  # side of the tiles that an image is cut into, None for the image as a whole
    overlap: int = 0
    roi: Roi | None = None

    def inside(self, path: Path | None, height: int, width: int) -> np.ndarray | None:
        """What is looked at of an image, (H, W) bool; None for all."""
        return self.roi and self.roi.inside(path, height, width)


def images_at(path: str | Path) -> list[Path]:
    """The image itself, or every image below a folder; InputError if there is none, or it is a picture that blemish wrote."""
    path = Path(path).expanduser()
    if path.is_file():
        if is_result(path):
            raise InputError(f"input={path}: a picture that blemish wrote, which is a result and no image to judge; expected a photograph")
        return [path]
    found = find_images(path) if path.is_dir() else []
    if not found:
        raise InputError(f"input={path}: {'no image in this folder' if path.is_dir() else 'no such file or folder'}")
    return found


def output_names(paths: Sequence[Path], root: Path) -> dict[Path, Path]:
    """Where an image's results go, relative to the output folder: its own path without its ending, or with it where two would meet.

    A name that is too long for a file system, or meets another one even so, also where case does not count, ends with a digest of the path.
    """
    bare = {path: path.relative_to(root).with_suffix("") for path in paths}
    often = Counter(map(_folded, bare.values()))
    full = {path: name.with_name(path.name.replace(".", "_")) for path, name in bare.items()}
    names = {path: name if often[_folded(name)] == 1 else full[path] for path, name in bare.items()}
    often = Counter(map(_folded, names.values()))
    return {path: name if often[_folded(name)] == 1 and fits(name.name) else _digested(name, path, root) for path, name in names.items()}


def _folded(name: Path) -> str:
    return unicodedata.normalize("NFC", str(name)).casefold()


def fits(name: str) -> bool:
    return len(os.fsencode(name)) <= LONGEST


def _digested(name: Path, path: Path, root: Path) -> Path:
    """The name with a digest of the image's path behind as much of it as a file system takes."""
    stem, end = name.name, f"-{digest_of(os.fsencode(path.relative_to(root)))}"
    while not fits(stem + end):
        stem = stem[:-1]
    return name.with_name(stem + end)


@torch.inference_mode()
def predict(
    model: Detector,
    images: Sequence[Path | np.ndarray],
    preprocessing: Preprocessing,
    batch_size: int,
    folder: Path | None = None,
    load: Callable[[Path | np.ndarray], np.ndarray] = read,
    failed: list[Failure] | None = None,
) -> Iterator[ImageResult]:
    """Scores of images in their order, `batch_size` images or tiles at a time; InputError names a file that cannot be used.

    With `failed` such a file is added there in place of the error, and the others are scored. `load` gives the pixels of an image, here of
    a file. Maps made of tiles are kept on disk in `folder`, None for the system's place for such files, until they are let go. What is not
    looked at has no part in a score, and takes the least value of the map.
    """

    def scored(chosen: Sequence[Path | np.ndarray]) -> Iterator[ImageResult]:
        arrays = [load(image) for image in chosen]
        inside = [preprocessing.inside(path_of(image), *array.shape[:2]) for image, array in zip(chosen, arrays, strict=True)]
        with named(chosen[0]) if len(chosen) == 1 else contextlib.nullcontext():
            if preprocessing.tile:
                side, tile, overlap = preprocessing.geometry.side, preprocessing.tile, preprocessing.overlap
                score, map = score_image(model, arrays[0], preprocessing.window, side, tile, overlap, batch_size, folder, inside[0])
                scores, maps = [score], [map]
            else:
                scores, maps = apply_ignore_mask(*predicted(model, chosen, arrays, inside, preprocessing))
        scores = [float(score) for score in scores]
        if failed is not None and not np.isfinite(scores).all():
            raise InputError("its score is not finite")
        return results(chosen, arrays, inside, scores, maps, preprocessing)

    if preprocessing.tile and folder:
        folder.mkdir(parents=True, exist_ok=True)
    size = batch_size if preprocessing.geometry.size and not preprocessing.tile else 1  # images of their own sizes do not stack
    for begin in range(0, len(images), size):
        queue = [images[begin : begin + size]]
        while queue:
            chosen = queue.pop(0)
            try:
                found = scored(chosen)
            except InputError as error:
                if failed is None:
                    raise
                if len(chosen) == 1:
                    failed.append(Failure(chosen[0], str(error).removeprefix(f"{chosen[0]}: ")))
                else:  # one bad image does not cost its batch
                    queue = [[image] for image in chosen]
                continue
            yield from found
            del found  # its images, before the next ones are read


def results(
    images: Sequence[Path | np.ndarray],
    arrays: list,
    inside: list,
    scores: list[float],
    maps: Sequence | None,
    preprocessing: Preprocessing,
) -> Iterator[ImageResult]:
    """The result of each image of a batch; a map is brought to its image's own pixels when it is asked for."""
    for i, image in enumerate(images):
        array, own = arrays[i], None if maps is None else maps[i]
        if isinstance(own, Tensor):
            own = to_image(own.cpu(), *array.shape[:2], preprocessing.geometry, inside[i])  # (H, W)
        yield ImageResult(path_of(image), bytes_of(array, preprocessing.window), scores[i], own, inside[i])


def predicted(
    model: Detector,
    images: Sequence[Path | np.ndarray],
    arrays: Sequence[np.ndarray],
    inside: Sequence[np.ndarray | None],
    preprocessing: Preprocessing,
) -> tuple[Prediction, Tensor | None]:
    """The prediction of a batch of images, and the ignore mask of the network input (B, h, w) or None."""
    pictures, hides = [], []
    for image, array, where in zip(images, arrays, inside, strict=True):
        with named(image):
            pictures.append(prepare(array, preprocessing.window, preprocessing.geometry, where))
            hides.append(ignore_mask(*array.shape[:2], preprocessing.geometry, where))
    batch = torch.stack(pictures).to(model.device)  # (B, 3, h, w)
    if all(one is None for one in hides):
        return model(batch), None
    none = torch.zeros(batch.shape[2:], dtype=torch.bool)
    return model(batch), torch.stack([none if one is None else one for one in hides]).to(model.device)


def path_of(image: Path | np.ndarray) -> Path | None:
    return image if isinstance(image, Path) else None


def thresholds(
    calibration: Tensor, alpha: float, own: float | None = None, threshold: float | None = None, map_threshold: float | None = None
) -> tuple[Threshold, float | None]:
    """The threshold of scores and that of maps, None for none: set by hand, a method's `own` of maps, or of the calibration (n, 2)."""
    scores, peaks = calibration.cpu().T if len(calibration) else torch.empty(2, 0)
    chosen = conformal_threshold(scores, alpha) if threshold is None else by_hand(threshold, scores)
    level = own if map_threshold is None else map_threshold
    return chosen, conformal_threshold(peaks, alpha).value if level is None else level


def write(
    found: Iterator[ImageResult],
    names: Mapping[Path, Path],
    output: Path,
    calibration: Tensor,
    threshold: Threshold,
    level: float | None,
    scale: tuple[float, float] | None,
    failed: Sequence[Failure] = (),
    monitor: Monitor | None = None,
) -> list[tuple]:
    """Write `<name>_overlay.png`, `_map.png` (16 bit) and `_mask.png` per image and scores.csv; returns its rows, see COLUMNS.

    Scores are decided on by the `threshold`; without its value there is no decision, and without a `level` of the maps no mask. The scores
    of the `calibration` (n, 2) give the p-values. A map's 16 bits run from its map_min to its map_max in scores.csv. `scale` are the map
    values at the ends of the overlay's colours. What has `failed` when all is done goes into failed.csv. A `monitor` is shown all scores at
    the end and saved; one that is on adds the column BOUND. InputError, before anything is scored, where an output would replace what
    blemish did not write there; scores.csv is also written where the work is broken off, of what was scored.
    """
    kinds = ["overlay.png", "map.png"] if level is None else ["overlay.png", "map.png", "mask.png"]
    outputs = check_outputs(output, names, kinds)
    scores = calibration[:, 0].cpu()

    def row(one: ImageResult) -> tuple:
        decision = None if threshold.value is None else int(one.score > threshold.value)
        p = float(p_values(one.score, scores)) if len(scores) else None
        ends = (None, None) if one.map is None else draw(one.image, one.map, one.inside, scale, level, output / names[one.path], outputs)
        source = None if threshold.value is None else "by hand" if threshold.by_hand else "calibration"
        return str(one.path), one.score, threshold.value, decision, p, *ends, source

    def finish(rows: list[tuple], whole: bool) -> None:
        header = COLUMNS
        bounds = monitor.take([row[1] for row in rows]) if monitor else []
        if monitor and monitor.on:
            bounds = [NOT_CLAIMED] * len(rows) if threshold.by_hand else bounds
            header, rows = (*COLUMNS, BOUND), [(*row, bound) for row, bound in zip(rows, bounds, strict=True)]
        write_tables(output, header, rows, failed, outputs)
        if monitor and whole:
            monitor.save()

    return finished(map(row, found), finish, failed)


def check_outputs(output: Path, names: Mapping[Path, Path], kinds: Sequence[str]) -> Outputs:
    """The outputs of a folder; InputError where one of these kinds would replace what blemish did not write."""
    outputs = Outputs()
    outputs.check([output / name for name in TABLES] + [output_path(output / name, kind) for name in names.values() for kind in kinds])
    remove_stale(output)
    return outputs


def finished(rows: Iterator[tuple], finish: Callable[[list[tuple], bool], None], failed: Sequence[Failure]) -> list[tuple]:
    """All rows, after `finish` has written them, which it does as well where the work is broken off; InputError if there is none."""
    kept: list[tuple] = []
    try:
        kept.extend(rows)
    except BaseException:
        if kept:
            with contextlib.suppress(InputError):  # what ended the work is the error to be raised
                finish(kept, False)
        raise
    finish(kept, True)
    if not kept:
        first = "; ".join(f"{path}: {reason}" for path, reason in failed[:5])
        raise InputError(f"{first}{f'; and {len(failed) - 5} more: no image could be scored' if len(failed) > 5 else ''}")
    return kept


def write_tables(output: Path, header: Sequence[str], rows: Sequence[tuple], failed: Sequence[Failure], outputs: Outputs) -> None:
    """scores.csv, and failed.csv where there is something to list, in place of those of an earlier call."""
    scores, failures = (output / name for name in TABLES)
    write_csv(scores, header, rows, outputs)
    if failed:
        write_csv(failures, Failure._fields, failed, outputs)
    else:
        failures.unlink(missing_ok=True)


def draw(
    image: np.ndarray,
    map: Tensor | RowsOnDisk,
    inside: np.ndarray | None,
    scale: tuple[float, float] | None,
    level: float | None,
    stem: Path,
    outputs: Outputs,
) -> tuple[float, float]:
    """The three pictures of an image (H, W, 3) uint8 and its map (H, W), beside `stem`; returns the map's ends.

    The overlay of an image with a side above LARGEST shows the means of its blocks, and the largest map values there. Nothing is above the
    level where it is not `inside` (H, W).
    """
    height, width = map.shape
    ends = [(float(band.min()), float(band.max())) for band in bands(map)]
    low, high = min(least for least, _ in ends), max(most for _, most in ends)
    deep = (((band - low) / np.float32(max(high - low, 1e-30)) * 65535).round().astype(np.uint16) for band in bands(map))
    with atomic_write(output_path(stem, "map.png"), outputs) as temporary:
        write_png(temporary, width, height, deep)
    if level is not None:
        with atomic_write(output_path(stem, "mask.png"), outputs) as temporary:
            parts = ((band > level) & where for band, where in zip(bands(map), _bands_of(inside, map.shape), strict=True))
            write_png(temporary, width, height, (part.astype(np.uint8) * 255 for part in parts))
    side = reduction((width, height), LARGEST)
    shown = largest_blocks(map, side)
    if inside is not None:
        shown = np.where(largest_blocks(inside, side), shown, -np.inf)
    with atomic_write(output_path(stem, "overlay.png"), outputs) as temporary:
        overlay(mean_blocks(image, side), shown, scale or (low, high), level).save(temporary, pnginfo=picture_info())
    return low, high


def _bands_of(inside: np.ndarray | None, shape: tuple[int, int]) -> Iterator[np.ndarray]:
    return bands(np.broadcast_to(True, shape) if inside is None else inside)


def output_path(stem: Path, ending: str) -> Path:
    """Where a result of an image is written."""
    return stem.with_name(f"{stem.name}_{ending}")


def anomalous(rows: Sequence[tuple]) -> int:
    """How many rows of scores.csv have a decision for anomalous."""
    return sum(bool(row[COLUMNS.index("decision")]) for row in rows)


def has_maps(rows: Sequence[tuple]) -> bool:
    """Whether there are maps."""
    return any(row[COLUMNS.index("map_max")] is not None for row in rows)


def outcome(rows: Sequence[tuple], threshold: Threshold, output: Path, names: Mapping[Path, Path]) -> list[str]:
    """Lines for a person on the decisions and on where the results are."""
    if threshold.value is None:
        lines = [
            "no decision: the run has no calibration images, as with protocol=paper; set threshold=NUMBER, or train with protocol=clean"
        ]
    else:
        bound = "set by hand: no bound on false alarms" if threshold.by_hand else f"bound on false alarms {100 * threshold.alpha:.3g} %"
        lines = [f"{anomalous(rows)} of {len(rows)} anomalous (threshold {threshold.value:.6g}, {bound})"]
        lines += [] if threshold.reachable else [threshold.explain()]
    return [*lines, *places(rows, output, names)]


def places(rows: Sequence[tuple], output: Path, names: Mapping[Path, Path]) -> list[str]:
    """Lines that say where the overlay of the highest score and all scores are."""
    highest = max(rows, key=lambda row: row[1])
    overlay = output_path(output / names[Path(highest[0])], "overlay.png")
    lines = [f"highest score: {overlay}"] if overlay.is_file() else []
    return [*lines, f"{len(rows)} images scored: {output / TABLES[0]}"]


def preprocessing_of(saved: Any, roi: str | None = None, root: str | Path | None = None) -> Preprocessing:
    """How a run's images came to the network, from its config, with another roi, or images below another root."""
    data = saved.data
    window = {dtype: tuple(ends) for dtype, ends in data.window.items()} if hasattr(data.window, "items") else {}
    geometry = Geometry(data.image_size, data.crop, data.resize)
    roi = roi or data.get("roi")
    roi = None if roi is None else Roi(roi, root or data.root)
    return Preprocessing(geometry, window, saved.tiling, saved.overlap, roi)
