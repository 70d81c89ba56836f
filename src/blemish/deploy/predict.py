"""A fitted detector on images of any size: scores, decisions, and maps in each image's own pixels."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from blemish.data.images import find_images, prepare, read, to_unit, unplace
from blemish.detector import Detector
from blemish.records.draw import overlay
from blemish.records.record import aside, write_csv
from blemish.scoring.calibration import conformal_threshold, p_values
from blemish.types import InputError

COLUMNS = ("path", "score", "threshold", "decision", "p_value", "map_min", "map_max")


class Found(NamedTuple):
    """What is said of one image; the map is in the image's own pixels."""

    path: Path
    image: np.ndarray  # (H, W, 3) uint8, as the detector's window shows it
    score: float
    map: Tensor | None  # (H, W) float32


class View(NamedTuple):
    """How the run's data module brought an image to the network's input."""

    image_size: int | None
    crop: int | None
    window: dict  # dtype name to (lo, hi)


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
def predict(model: Detector, paths: Sequence[Path], view: View, batch_size: int) -> Iterator[Found]:
    """Scores of image files in their order, read `batch_size` at a time; InputError names a file that cannot be used."""
    size = batch_size if view.image_size else 1  # images of their own sizes do not stack
    for begin in range(0, len(paths), size):
        chosen = paths[begin : begin + size]
        arrays = [read(path) for path in chosen]
        batch = torch.stack([prepare(array, view.window, view.image_size, view.crop) for array in arrays])  # (B, 3, h, w)
        score, map = model(batch.to(model.device))
        for i, (path, array) in enumerate(zip(chosen, arrays, strict=True)):
            own = None if map is None else unplace(map[i].cpu(), *array.shape[:2], view.image_size, view.crop)  # (H, W)
            shown = (to_unit(array, view.window) * 255).round().byte().permute(1, 2, 0).numpy()  # (H, W, 3)
            yield Found(path, shown, float(score[i]), own)


def write(
    found: Iterator[Found],
    names: Mapping[Path, Path],
    output: Path,
    calibration: Tensor,
    alpha: float,
    scale: tuple[float, float] | None,
    level: float | None = None,
) -> list[tuple]:
    """Write `<name>_overlay.png`, `_map.png` (16 bit) and `_mask.png` per image and scores.csv; returns its rows, see COLUMNS.

    `calibration` (n, 2) gives the thresholds of score and map at `alpha`; without it there is no decision and no mask. `level` is a
    method's own threshold of its maps, which then takes the place of the calibration's. A map's 16 bits run from its map_min to its map_max
    in scores.csv. `scale` are the map values at the ends of the overlay's colours.
    """
    threshold = conformal_threshold(calibration[:, 0].cpu(), alpha).value
    level = conformal_threshold(calibration[:, 1].cpu(), alpha).value if level is None else level
    rows = []
    for path, image, score, map in found:
        stem = output / names[path]
        decision = p = None
        if threshold is not None:
            decision = int(score > threshold)
            p = float(p_values(torch.tensor([score]), calibration[:, 0].cpu()))
        low = high = None
        if map is not None:
            low, high = float(map.min()), float(map.max())
            deep = ((map - low) / max(high - low, 1e-30) * 65535).round().to(torch.int32).numpy().astype(np.uint16)
            _save(Image.fromarray(deep), stem, "map")
            if level is not None:
                _save(Image.fromarray((map > level).numpy().astype(np.uint8) * 255), stem, "mask")
            _save(overlay(image, map.numpy(), scale or (low, high), level), stem, "overlay")
        rows.append((str(path), score, threshold, decision, p, low, high))
    write_csv(output / "scores.csv", COLUMNS, rows)
    return rows


def _save(image: Image.Image, stem: Path, kind: str) -> None:
    with aside(stem.with_name(f"{stem.name}_{kind}.png")) as temporary:
        image.save(temporary)
