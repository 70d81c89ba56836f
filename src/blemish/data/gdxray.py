"""GDXray+: radiographs of castings, welds, baggage and natural objects (Mery et al., J. Nondestructive Evaluation 34, 2015)."""

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from skimage.measure import label, regionprops

from blemish.data.manifest import Sample
from blemish.data.masks import read_mask
from blemish.data.module import ImageData
from blemish.data.samplers import seeded_share
from blemish.edge.checks import check_choice, check_number, check_whole
from blemish.edge.errors import InputError
from blemish.edge.geometry import grid
from blemish.edge.reading import size_of
from blemish.types import ANOMALOUS, NORMAL, UNKNOWN

GROUPS = {"B": "Baggages", "C": "Castings", "N": "Nature", "S": "Settings", "W": "Welds"}
MASKS = {"W0001": "W0002"}  # series whose masks are the images of another series, under the same numbers
TRUTH = "ground_truth.txt"

Box = tuple[int, int, int, int]  # x1, y1, x2, y2, half-open pixels
Tile = tuple[int, int, int, int]  # x, y, w, h in pixels


class Row(NamedTuple):
    """One box of a ground_truth.txt."""

    line: int
    box: Box  # may reach beyond the image


class Defect(NamedTuple):
    """The pixels of one defect in its bounding box."""

    box: Box
    pixels: np.ndarray  # (y2 − y1, x2 − x1) bool


@dataclass(kw_only=True, eq=False, repr=False)
class GDXray(ImageData):
    """Series of radiographs as whole images or as tiles, with the boxes of ground_truth.txt or, for W0001, the masks of W0002.

    category: a series, "C0047", or several, "C0001+C0002". unit "image": images without a defect are normal, of which a seeded share
    `train_share` of each series trains; all others test. unit "tile": tiles of `tile` pixels every `stride` (null: `tile`), the last of
    a row and column flush with the border. A tile without a defect pixel is normal; one that holds at least `min_cover` of what it could
    hold of some defect is anomalous; others are left out. The normal tiles of a share `train_share` of the frames train, all tiles of
    the other frames test. train_frames: "first-last", frames that replace that share. A series without ground_truth.txt is unlabelled.

    The frames of a rotation show different parts of the object: those with defects may differ from the normal ones by the view alone
    (C0002, C0029 and C0045 reach image AUROC 1 that way). Tiles and pixel metrics are the honest measure.
    """

    name = "gdxray"
    published = (
        "Mery, Riffo, Zscherpel, Mondragón, Lillo, Zuccar, Lobel, Carrasco, GDXray: The database of X-ray images for nondestructive "
        "testing, J. Nondestructive Evaluation 34:42, 2015; GRIMA, domingomery.ing.puc.cl; for education and research only"
    )
    layout = f"""
<root>/Castings/C0001/C0001_0001.png …
<root>/Castings/C0001/{TRUTH}    rows "image x1 x2 y1 y2", where the series is annotated
<root>/Welds/W0001/W0001_0001.png …      masks in <root>/Welds/W0002/W0002_0001.png …
and so on in {", ".join(GROUPS.values())}; data.category is a series, or several joined by +
"""
    needs_category = True

    unit: str
    tile: int
    stride: int | None
    min_cover: float
    train_share: float
    train_frames: str | None

    def __post_init__(self) -> None:
        check_choice("data", ("image", "tile"), unit=self.unit)
        check_whole("data", 8, tile=self.tile)  # before image_size, which may come from it
        self.side, self.stride = self.tile, self.tile if self.stride is None else self.stride
        super().__post_init__()  # from here on `tile` is the side of the loaders' tiles
        check_whole("data", 1, self.side, stride=self.stride)
        check_number("data", "[0, 1]", min_cover=self.min_cover)
        check_number("data", "(0, 1)", train_share=self.train_share)
        self.train_range = frame_range(self.train_frames)

    @property
    def series(self) -> list[str]:
        return list(dict.fromkeys(self.category.split("+"))) if self.category else []

    def categories(self) -> list[str]:
        folders = [path for letter, group in GROUPS.items() for path in self.root.glob(f"{group}/{letter}[0-9][0-9][0-9][0-9]")]
        return sorted(path.name for path in folders if path.is_dir() and path.name not in MASKS.values())

    def folder(self) -> Path:
        for owner, masks in MASKS.items():
            if masks in self.series:
                raise InputError(f"data.category={self.category}: {masks} holds the masks of {owner}; expected data.category={owner}")
        self.check_categories(self.series)
        return self.root

    def scan(self) -> list[Sample]:
        root = self.folder()
        return [sample for series in self.series for sample in self._scan_series(root / GROUPS[series[0]] / series)]

    def _scan_series(self, folder: Path) -> list[Sample]:
        """The samples of a series. With on_error=skip an image that cannot be used is one sample, which the base class skips."""
        images = frames(folder)
        if not images:
            raise InputError(f"{folder}: no image; expected {folder.name}_0001.png …")
        boxes, masks = boxes_of(folder, images), masks_of(folder, images)
        samples = []  # with their frames
        for frame, path in images.items():
            mask = self.relative(masks[frame]) if masks else ""
            whole = Sample(self.relative(path), "test", NORMAL, "good", mask)
            if boxes is None and masks is None:
                whole = whole._replace(split="unlabelled", label=UNKNOWN, defect="unknown")
            try:
                size = size_of(path)
                defects = components(masks[frame], path, size) if masks else None
            except InputError:
                if self.on_error != "skip":
                    raise
                samples.append((frame, whole))
                continue
            if defects is None:
                defects = [cut_at_border(row, path, size) for row in (boxes or {}).get(frame, [])]
            judged = [judge(whole, defects, tile, self.min_cover) for tile in self._tiles(path, size)]
            samples += [(frame, sample) for sample in judged if sample]
        train = self._train_frames(list(images), samples)
        if self.unit == "tile":  # around the anomalous tiles of a training frame the model was trained
            samples = [(frame, sample) for frame, sample in samples if sample.label != ANOMALOUS or frame not in train]
        return [sample._replace(split="train") if sample.label == NORMAL and frame in train else sample for frame, sample in samples]

    def _train_frames(self, numbers: list[int], samples: Sequence[tuple[int, Sample]]) -> set[int]:
        if self.train_range:
            return {number for number in numbers if self.train_range[0] <= number <= self.train_range[1]}
        if self.unit == "image":
            numbers = [frame for frame, sample in samples if sample.label == NORMAL]
        return set(seeded_share(numbers, self.train_share, self.seed))

    def _tiles(self, path: Path, size: tuple[int, int]) -> list[Tile | None]:
        if self.unit == "image":
            return [None]
        if min(size) < self.side:
            raise InputError(f"{path}: {size[0]}×{size[1]} pixels; expected at least data.tile={self.side} in both directions")
        return list(grid(*size, self.side, self.side - self.stride))

    def explain(self, split: str, samples: Sequence[Sample]) -> str:
        splits = {sample.split for sample in samples} - {"skipped"}
        if split != "train" or self.manifest or not splits:
            return super().explain(split, samples)
        if splits == {"unlabelled"}:
            expected = f"an annotated series, alone or joined to it (data.category={self.category}+<series>)"
            return f"no image is known to be normal without a {TRUTH}; expected {expected}, or a prediction by a fitted run"
        if self.train_range:
            return f"no normal {self.unit} in the frames {self.train_frames}; expected other data.train_frames, or null"
        smaller = "data.unit=tile, which trains on the tiles without one" if self.unit == "image" else f"data.tile below {self.side}"
        return f"every {self.unit} in training has a defect; expected {smaller}, or another series"


def frame_range(text: str | None) -> tuple[int, int] | None:
    """The frame numbers (1, 48) in "1-48"; InputError for anything else but None."""
    if text is None:
        return None
    match = re.fullmatch(r"\s*(\d+)\s*-\s*(\d+)\s*", str(text))
    if not match or int(match[1]) > int(match[2]):
        raise InputError(f"data.train_frames={text}: expected first-last, as in 1-48, or null")
    return int(match[1]), int(match[2])


def frames(folder: Path) -> dict[int, Path]:
    """The images of a series by frame number, in order: the files <Series>_NNNN.png and no others."""
    named = {path: re.fullmatch(rf"{folder.name}_(\d{{4}})\.png", path.name) for path in sorted(folder.iterdir())}
    return {int(match[1]): path for path, match in named.items() if match}


def boxes_of(folder: Path, images: dict[int, Path]) -> dict[int, list[Row]] | None:
    """The boxes of a series by frame number, None without a ground_truth.txt."""
    path = folder / TRUTH
    if not path.is_file():
        return None
    rows = read_boxes(path)
    if not rows:
        raise InputError(f"{path}: no box in it, which would make every image normal; expected rows, or no such file")
    for frame in rows.keys() - images.keys():
        numbers = f"{folder.name} has images from {min(images)} to {max(images)}"
        raise InputError(f"{path}, line {rows[frame][0].line}: image {frame} does not exist; {numbers}")
    return rows


def read_boxes(path: Path) -> dict[int, list[Row]]:
    """The boxes of a ground_truth.txt by frame number; InputError with the line for a row that is not "image x1 x2 y1 y2".

    The file counts pixels from 1 and includes both ends, as its numbers show: boxes drawn up to the border run from 0 to width + 1, one
    beyond 1…width on either side. A box x1…x2 is therefore the pixels from x1 − 1 up to, not including, x2.
    """
    found: dict[int, list[Row]] = defaultdict(list)
    for line, text in enumerate(path.read_text(encoding="utf-8-sig", errors="replace").splitlines(), 1):
        if not text.strip():
            continue
        where = f"{path}, line {line}: {text.strip()!r}"
        try:
            frame, x1, x2, y1, y2 = numbers = [float(word) for word in text.split()]
            if not (frame.is_integer() and all(map(math.isfinite, numbers))):
                raise ValueError
        except ValueError:
            raise InputError(f'{where}; expected five finite numbers "image x1 x2 y1 y2", the first of them whole') from None
        if x2 < x1 or y2 < y1:
            raise InputError(f"{where}: an empty box; expected x1 ≤ x2 and y1 ≤ y2")
        found[int(frame)].append(Row(line, (math.floor(x1) - 1, math.floor(y1) - 1, math.ceil(x2), math.ceil(y2))))
    return found


def cut_at_border(row: Row, image: Path, size: tuple[int, int]) -> Defect:
    """The defect of a box, without what is outside its image of size (width, height); InputError if nothing is left."""
    x1, y1, x2, y2 = row.box
    box = max(x1, 0), max(y1, 0), min(x2, size[0]), min(y2, size[1])
    if box[0] >= box[2] or box[1] >= box[3]:
        found = f"the box {x1 + 1}…{x2} × {y1 + 1}…{y2} is outside of the {size[0]}×{size[1]} pixels of {image.name}"
        raise InputError(f"{image.parent / TRUTH}, line {row.line}: {found}")
    return Defect(box, np.broadcast_to(True, (box[3] - box[1], box[2] - box[0])))


def masks_of(folder: Path, images: dict[int, Path]) -> dict[int, Path] | None:
    """The mask files of a series by frame number, None for a series without masks."""
    if folder.name not in MASKS:
        return None
    other = MASKS[folder.name]
    masks = {frame: folder.parents[1] / GROUPS[other[0]] / other / f"{other}_{frame:04}.png" for frame in images}
    for frame, path in masks.items():
        if not path.is_file():
            raise InputError(f"{path}: no such file; expected the mask of {images[frame]}")
    return masks


def components(path: Path, image: Path, size: tuple[int, int]) -> list[Defect]:
    """The connected components of a mask file; InputError unless it has its image's size (width, height)."""
    mask = read_mask(path)
    if mask.shape != size[::-1]:
        found = f"{mask.shape[1]}×{mask.shape[0]} pixels for {image} of {size[0]}×{size[1]}"
        raise InputError(f"{path}: a mask of {found}; expected the same size")
    return [Defect((x1, y1, x2, y2), part.image) for part in regionprops(label(mask, connectivity=2)) for y1, x1, y2, x2 in [part.bbox]]


def judge(whole: Sample, defects: Sequence[Defect], tile: Tile | None, min_cover: float) -> Sample | None:
    """The sample of one tile of an image, None for the whole; None for a tile that is neither normal nor anomalous."""
    sample = whole._replace(tile=",".join(map(str, tile)) if tile else "", mask="")
    shares = [held_share(defect, tile) for defect in defects]
    if not any(shares):
        return sample
    if max(shares) < min_cover:
        return None
    x, y, w, h = tile or (0, 0, math.inf, math.inf)
    held = [defect.box for defect, share in zip(defects, shares, strict=True) if share > 0]
    cut = [(max(x1, x), max(y1, y), min(x2, x + w), min(y2, y + h)) for x1, y1, x2, y2 in held]
    boxes = "" if whole.mask else ";".join(" ".join(map(str, box)) for box in cut)
    return sample._replace(label=ANOMALOUS, defect="defect", mask=whole.mask, boxes=boxes)


def held_share(defect: Defect, tile: Tile | None) -> float:
    """The part of a defect in a tile, as a share of the most that any tile of this size could hold; 1 for the whole image.

    That most is estimated as the defect's pixels times the share of its box that fits into a tile, so that a tile inside a defect larger
    than it counts as much as one that holds all of a small defect.
    """
    if tile is None:
        return 1.0
    x, y, w, h = tile
    x1, y1, x2, y2 = defect.box
    if x >= x2 or y >= y2 or x + w <= x1 or y + h <= y1:
        return 0.0
    inside = defect.pixels[max(y - y1, 0) : y + h - y1, max(x - x1, 0) : x + w - x1].sum()
    fitting = min(x2 - x1, w) * min(y2 - y1, h) / ((x2 - x1) * (y2 - y1))
    return float(inside / (defect.pixels.sum() * fitting))
