"""A fitted detector on images of any size: scores, decisions, and maps in each image's own pixels."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from blemish.data.images import hidden, prepare, unplace
from blemish.data.regions import Region
from blemish.data.tiles import bands, bytes_of, largest_blocks, mean_blocks, reduction
from blemish.deploy.monitor import Monitor
from blemish.deploy.tiling import RowsOnDisk, score_image, write_png
from blemish.detector import Detector, within
from blemish.edge.errors import named
from blemish.edge.geometry import Geometry
from blemish.edge.reading import find_images, read
from blemish.records.draw import overlay
from blemish.records.record import aside, tidy, write_csv
from blemish.scoring.calibration import conformal_threshold, p_values
from blemish.types import InputError, Prediction

LARGEST = 4096  # pixels of the longer side of an overlay; that of a larger image is reduced
COLUMNS = ("path", "score", "threshold", "decision", "p_value", "map_min", "map_max")
BOUND = "bound"  # whether the bound on false alarms is claimed for an image, a column where a monitor is on


class Found(NamedTuple):
    """What is said of one image; the map is in the image's own pixels."""

    path: Path | None  # None of an array
    image: np.ndarray  # (H, W, 3) uint8, as the detector's window shows it
    score: float
    map: Tensor | RowsOnDisk | None  # (H, W) float32
    seen: np.ndarray | None = None  # (H, W) bool, where it is looked at; None for all of it


class View(NamedTuple):
    """How the run's data module brought an image to the network's input."""

    geometry: Geometry
    window: dict  # dtype name to (lo, hi)
    tile: int | None = None  # side of the tiles that an image is cut into, None for the image as a whole
    overlap: int = 0
    region: Region | None = None

    def seen(self, path: Path | None, height: int, width: int) -> np.ndarray | None:
        """What is looked at of an image, (H, W) bool; None for all."""
        return self.region and self.region.seen(path, height, width)


def images_at(path: str | Path) -> list[Path]:
    """The image itself, or every image below a folder; InputError if there is none."""
    path = Path(path).expanduser()
    if path.is_file():
        return [path]
    found = find_images(path) if path.is_dir() else []
    if not found:
        raise InputError(f"input={path}: {'no image in this folder' if path.is_dir() else 'no such file or folder'}")
    return found


def output_names(paths: Sequence[Path], root: Path) -> dict[Path, Path]:
    """Where an image's results go, relative to the output folder: its own path without its ending, or with it where two would meet."""
    bare = {path: path.relative_to(root).with_suffix("") for path in paths}
    often = Counter(bare.values())
    return {path: name if often[name] == 1 else name.with_name(path.name.replace(".", "_")) for path, name in bare.items()}


@torch.inference_mode()
def predict(
    model: Detector,
    images: Sequence[Path | np.ndarray],
    view: View,
    batch_size: int,
    folder: Path | None = None,
    load: Callable[[Path | np.ndarray], np.ndarray] = read,
) -> Iterator[Found]:
    """Scores of images in their order, `batch_size` images or tiles at a time; InputError names a file that cannot be used.

    `load` gives the pixels of an image, here of a file. Maps made of tiles are kept on disk in `folder`, None for the system's place for
    such files, until they are let go. What is not looked at has no part in a score, and takes the least value of the map.
    """
    if view.tile is not None:
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
        for image in images:
            array = load(image)
            seen = view.seen(path_of(image), *array.shape[:2])
            size = view.geometry.side
            with named(image):
                score, map = score_image(model, array, view.window, size, view.tile, view.overlap, batch_size, folder, seen)
            yield Found(path_of(image), bytes_of(array, view.window), score, map, seen)
            del array, map  # before the next image is read
        return
    size = batch_size if view.geometry.size else 1  # images of their own sizes do not stack
    for begin in range(0, len(images), size):
        chosen = images[begin : begin + size]
        arrays = [load(image) for image in chosen]
        seen = [view.seen(path_of(image), *array.shape[:2]) for image, array in zip(chosen, arrays, strict=True)]
        score, map = within(*brought(model, chosen, arrays, seen, view))
        for i, (image, array) in enumerate(zip(chosen, arrays, strict=True)):
            own = None if map is None else unplace(map[i].cpu(), *array.shape[:2], view.geometry, seen[i])  # (H, W)
            yield Found(path_of(image), bytes_of(array, view.window), float(score[i]), own, seen[i])


def brought(
    model: Detector, images: Sequence[Path | np.ndarray], arrays: Sequence[np.ndarray], seen: Sequence[np.ndarray | None], view: View
) -> tuple[Prediction, Tensor | None]:
    """The prediction of a batch of images as the network takes them, and what is hidden there (B, h, w), None for nothing."""
    pictures, hides = [], []
    for image, array, where in zip(images, arrays, seen, strict=True):
        with named(image):
            pictures.append(prepare(array, view.window, view.geometry, where))
            hides.append(hidden(*array.shape[:2], view.geometry, where))
    batch = torch.stack(pictures).to(model.device)  # (B, 3, h, w)
    if all(one is None for one in hides):
        return model(batch), None
    none = torch.zeros(batch.shape[2:], dtype=torch.bool)
    return model(batch), torch.stack([none if one is None else one for one in hides]).to(model.device)


def path_of(image: Path | np.ndarray) -> Path | None:
    return image if isinstance(image, Path) else None


def write(
    found: Iterator[Found],
    names: Mapping[Path, Path],
    output: Path,
    calibration: Tensor,
    alpha: float,
    scale: tuple[float, float] | None,
    level: float | None = None,
    monitor: Monitor | None = None,
) -> list[tuple]:
    """Write `<name>_overlay.png`, `_map.png` (16 bit) and `_mask.png` per image and scores.csv; returns its rows, see COLUMNS.

    `calibration` (n, 2) gives the thresholds of score and map at `alpha`; without it there is no decision and no mask. `level` is a
    method's own threshold of its maps, which then takes the place of the calibration's. A map's 16 bits run from its map_min to its map_max
    in scores.csv. `scale` are the map values at the ends of the overlay's colours. A `monitor` is shown all scores at the end and saved;
    one that is on adds the column BOUND.
    """
    threshold = conformal_threshold(calibration[:, 0].cpu(), alpha).value
    level = conformal_threshold(calibration[:, 1].cpu(), alpha).value if level is None else level
    rows = []
    tidy(output)
    for path, image, score, map, seen in found:
        stem = output / names[path]
        decision = p = None
        if threshold is not None:
            decision = int(score > threshold)
            p = float(p_values(torch.tensor([score]), calibration[:, 0].cpu()))
        low = high = None
        if map is not None:
            low, high = draw(image, map, seen, scale, level, stem)
        rows.append((str(path), score, threshold, decision, p, low, high))
    header = COLUMNS
    if monitor:
        said = monitor.take([row[1] for row in rows])
        if monitor.on:
            header, rows = (*COLUMNS, BOUND), [(*row, one) for row, one in zip(rows, said, strict=True)]
    write_csv(output / "scores.csv", header, rows)
    if monitor:
        monitor.save()
    return rows


def draw(
    image: np.ndarray,
    map: Tensor | RowsOnDisk,
    seen: np.ndarray | None,
    scale: tuple[float, float] | None,
    level: float | None,
    stem: Path,
) -> tuple[float, float]:
    """The three pictures of an image (H, W, 3) uint8 and its map (H, W), beside `stem`; returns the map's ends.

    The overlay of an image with a side above LARGEST shows the means of its blocks, and the largest map values there. Nothing is above the
    level where it is not `seen` (H, W).
    """
    height, width = map.shape
    ends = [(float(band.min()), float(band.max())) for band in bands(map)]
    low, high = min(least for least, _ in ends), max(most for _, most in ends)
    deep = (((band - low) / np.float32(max(high - low, 1e-30)) * 65535).round().astype(np.uint16) for band in bands(map))
    with aside(_beside(stem, "map")) as temporary:
        write_png(temporary, width, height, deep)
    if level is not None:
        with aside(_beside(stem, "mask")) as temporary:
            parts = ((band > level) & where for band, where in zip(bands(map), _bands_of(seen, map.shape), strict=True))
            write_png(temporary, width, height, (part.astype(np.uint8) * 255 for part in parts))
    side = reduction((width, height), LARGEST)
    shown = largest_blocks(map, side)
    if seen is not None:
        shown = np.where(largest_blocks(seen, side), shown, -np.inf)
    with aside(_beside(stem, "overlay")) as temporary:
        overlay(mean_blocks(image, side), shown, scale or (low, high), level).save(temporary)
    return low, high


def _bands_of(seen: np.ndarray | None, shape: tuple[int, int]) -> Iterator[np.ndarray]:
    return bands(np.broadcast_to(True, shape) if seen is None else seen)


def _beside(stem: Path, kind: str) -> Path:
    return stem.with_name(f"{stem.name}_{kind}.png")
