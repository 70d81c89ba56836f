"""GDXray+: radiographs of castings, welds, baggage and natural objects (Mery et al., J. Nondestructive Evaluation 34, 2015)."""

import difflib
import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from skimage.measure import label, regionprops

from blemish.data.manifest import Sample
from blemish.data.masks import read_mask
from blemish.data.module import ImageData, drawn
from blemish.edge.checks import check_choice, check_number, check_whole
from blemish.edge.errors import InputError
from blemish.edge.geometry import starts
from blemish.types import ANOMALOUS, NORMAL, UNKNOWN

GROUPS = {"B": "Baggages", "C": "Castings", "N": "Nature", "S": "Settings", "W": "Welds"}
MASKS = {"W0001": "W0002"}  # series whose masks are the images of another series, under the same numbers
TRUTH = "ground_truth.txt"

Tile = tuple[int, int, int, int]  # x, y, w, h in pixels


class Row(NamedTuple):
    """One box of a ground_truth.txt, as half-open pixels from 0 that may still reach beyond the image."""

    line: int
    box: tuple[int, int, int, int]  # x1, y1, x2, y2


class Defect(NamedTuple):
    """The pixels of one defect within the box around it."""

    box: tuple[int, int, int, int]  # x1, y1, x2, y2, half-open
    pixels: np.ndarray  # (y2 − y1, x2 − x1) bool


class Rules(NamedTuple):
    """How the frames of a series become samples; see `GDXray`."""

    unit: str
    tile: int
    stride: int
    min_cover: float
    train_share: float
    train_frames: tuple[int, int] | None  # first and last
    seed: int


@dataclass(kw_only=True, eq=False, repr=False)
class GDXray(ImageData):
    """Series of radiographs as whole images or as tiles, with the boxes of ground_truth.txt or, for W0001, the masks of W0002.

    category: a series, "C0047", or several joined, "C0001+C0002". unit "image": images without a defect are normal, a share
    `train_share` of them (drawn with seed, series by series) trains, all others test. unit "tile": tiles of `tile` pixels every
    `stride` (null: `tile`), the last row and column flush with the border. A tile without any defect pixel is normal; one that
    holds at least `min_cover` of the most a tile could hold of some defect is anomalous; those between are left out. The split
    goes by frame: the normal tiles of a share `train_share` of the frames train, all tiles of the other frames test.
    train_frames: "first-last", numbers that take the place of that share. A series without ground_truth.txt is unlabelled.

    The frames of a rotation show another part of the object each: those with defects may differ from the normal ones by the view
    alone (C0002, C0029 and C0045 reach image AUROC 1 that way). Tiles and pixel metrics are the honest measure.
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

    unit: str
    tile: int
    stride: int | None
    min_cover: float
    train_share: float
    train_frames: str | None

    def __post_init__(self) -> None:
        tile, stride = self.tile, self.tile if self.stride is None else self.stride
        super().__post_init__()  # `tile` is the side of the loaders' tiles from here on
        check_choice("data", ("image", "tile"), unit=self.unit)
        check_whole("data", 8, tile=tile)
        check_whole("data", 1, tile, stride=stride)
        check_number("data", "[0, 1]", min_cover=self.min_cover)
        check_number("data", "(0, 1)", train_share=self.train_share)
        self.rules = Rules(self.unit, tile, stride, self.min_cover, self.train_share, frame_range(self.train_frames), self.seed)

    @property
    def series(self) -> list[str]:
        """The series named by the category, each once."""
        return list(dict.fromkeys(self.category.split("+"))) if self.category else []

    def categories(self) -> list[str]:
        return sorted(
            path.name
            for letter, group in GROUPS.items()
            for path in self.root.glob(f"{group}/{letter}[0-9][0-9][0-9][0-9]")
            if path.is_dir() and path.name not in MASKS.values()
        )

    def folder(self) -> Path:
        if not self.root.is_dir():
            raise self.missing(f"{self.root}: no such folder")
        choices = self.categories()
        if not self.series:
            raise self.missing(f"data.category: none given. ImageResult in {self.root}: {', '.join(choices) or 'no series'}")
        for series in self.series:
            if owner := next((owner for owner, masks in MASKS.items() if masks == series), None):
                raise InputError(f"data.category={self.category}: {series} holds the masks of {owner}; expected data.category={owner}")
            if series not in choices:
                nearest = difflib.get_close_matches(series, choices, 1)
                guess = f"; did you mean {nearest[0]!r}?" if nearest else ""
                raise self.missing(f"{self.root}: no series {series!r}{guess} ImageResult: {', '.join(choices) or 'none'}")
        return self.root

    def scan(self) -> list[Sample]:
        folder = self.folder()
        return [sample for series in self.series for sample in samples(folder, series, self.rules, self.on_error == "skip")]

    def setup(self, stage: str | None = None) -> None:
        """As the base class, but says why a series has nothing to train on and what can be done about it."""
        if not self.digest:
            self.samples = self.samples or self.listed()
            if not any(sample.split == "train" for sample in self.samples):
                raise InputError(f"{self.manifest or self.root}: {self.category} has nothing to train on: {self._why_no_training()}")
        super().setup(stage)

    def _why_no_training(self) -> str:
        if self.manifest is not None:
            return "no row has the split train"
        splits = {sample.split for sample in self.samples}
        if splits == {"skipped"}:
            return "no image can be read"
        if splits <= {"unlabelled", "skipped"}:
            return (
                f"without a {TRUTH} no image of it is known to be normal; expected an annotated series, alone or joined to it "
                f"(data.category={self.category}+<series>); images of this series can be predicted with a fitted run"
            )
        if self.rules.train_frames:
            first, last = self.rules.train_frames
            return f"no normal {self.rules.unit} in the frames {first}-{last}; expected another data.train_frames, or null"
        if self.rules.unit == "image":
            return "every image shows a defect; expected data.unit=tile, which trains on the tiles without one, or another series"
        return f"no tile of {self.rules.tile} pixels without a defect in the training frames; expected a smaller data.tile"


def frame_range(text: str | None) -> tuple[int, int] | None:
    """ "1-48" as (1, 48); InputError for anything else but None."""
    if text is None:
        return None
    match = re.fullmatch(r"\s*(\d+)\s*-\s*(\d+)\s*", str(text))
    if not match or int(match[1]) > int(match[2]):
        raise InputError(f"data.train_frames={text}: expected first-last, as in 1-48, or null")
    return int(match[1]), int(match[2])


def samples(root: Path, series: str, rules: Rules, skip: bool = False) -> list[Sample]:
    """The samples of one series, paths relative to the root.

    skip: an image that cannot be read, or whose mask cannot, becomes a row of its own for the base class to set aside. InputError
    for a malformed ground_truth.txt (with the line), a row without an image, an image of W0001 without its mask or with one of
    another size, a tile larger than an image.
    """
    images = frames(root / GROUPS[series[0]] / series)
    if not images:
        raise InputError(f"{root / GROUPS[series[0]] / series}: no image; expected {series}_0001.png …")
    rows = _rows(images, series)
    masks = _masks(root, images, series)
    if rows is None and masks is None:
        return [
            Sample(path.relative_to(root).as_posix(), "unlabelled", UNKNOWN, "unknown", tile=_text(tile))
            for path in images.values()
            for tile in _tiles(path, rules, skip)
        ]
    found, train = [], _train_frames(list(images), rules)
    for frame, path in images.items():
        base = Sample(path.relative_to(root).as_posix(), "test", NORMAL, "good")
        mask = masks[frame].relative_to(root).as_posix() if masks else ""
        try:
            defects = _components(masks[frame], path) if masks else _boxed(path, rows.get(frame, []))
        except Unreadable:
            if not skip:
                raise
            found.append(base._replace(mask=mask))  # whole and with its mask, so that the base class sets it aside
            continue
        of_frame = [_judged(base, mask, defects, tile, rules.min_cover) for tile in _tiles(path, rules, skip)]
        found += _split(list(filter(None, of_frame)), frame in train, rules.unit)
    return found if rules.unit == "tile" or rules.train_frames else _share_of_normals(found, rules)


def _judged(base: Sample, mask: str, defects: list[Defect], tile: Tile | None, min_cover: float) -> Sample | None:
    """The sample of one tile, or of the whole image; None for a tile that holds too little of a defect and too much to be normal."""
    base = base._replace(tile=_text(tile))
    shares = {i: share for i, defect in enumerate(defects) if (share := held_share(defect, tile)) > 0}
    if not shares:
        return base
    if max(shares.values()) < min_cover:
        return None
    boxes = ";".join(" ".join(map(str, _within(defects[i].box, tile))) for i in shares)
    return base._replace(label=ANOMALOUS, defect="defect", mask=mask, boxes="" if mask else boxes)


def _split(of_frame: list[Sample], train: bool, unit: str) -> list[Sample]:
    """One frame in training or in the test; the anomalous tiles of a training frame are in neither, as their surroundings trained."""
    if not train:
        return of_frame
    kept = [sample for sample in of_frame if sample.label == NORMAL or unit == "image"]
    return [sample._replace(split="train") if sample.label == NORMAL else sample for sample in kept]


def frames(folder: Path) -> dict[int, Path]:
    """Frame number to image, in order: the files <Series>_NNNN.png of a series' folder and no others."""
    named = {path: re.fullmatch(rf"{folder.name}_(\d{{4}})\.png", path.name) for path in sorted(folder.iterdir())}
    return {int(match[1]): path for path, match in named.items() if match}


def read_boxes(path: Path) -> dict[int, list[Row]]:
    """The boxes of a ground_truth.txt by frame number; InputError with the line for a row that is not "image x1 x2 y1 y2".

    The file counts pixels from 1 and includes both ends, as the numbers themselves show: those drawn up to the border run from 0
    to width + 1, one beyond 1…width on either side. A box x1…x2 is therefore the pixels x1 − 1 up to, not including, x2.
    """
    found: dict[int, list[Row]] = defaultdict(list)
    for line, text in enumerate(path.read_text(encoding="utf-8-sig", errors="replace").splitlines(), 1):
        if not text.strip():
            continue
        where, expected = f"{path}, line {line}: {text.strip()!r}", 'five numbers "image x1 x2 y1 y2"'
        try:
            frame, x1, x2, y1, y2 = (float(word) for word in text.split())
        except ValueError:
            raise InputError(f"{where}; expected {expected}") from None
        if not all(map(math.isfinite, (frame, x1, x2, y1, y2))) or frame != int(frame):
            raise InputError(f"{where}; expected {expected}, finite, the first of them whole")
        if x2 < x1 or y2 < y1:
            raise InputError(f"{where}: an empty box; expected x1 ≤ x2 and y1 ≤ y2")
        found[int(frame)].append(Row(line, (math.floor(x1) - 1, math.floor(y1) - 1, math.ceil(x2), math.ceil(y2))))
    return found


def corners(width: int, height: int, tile: int, stride: int) -> list[tuple[int, int]]:
    """Upper left corners (x, y) of square tiles that cover the image, the last of a row or column flush with the border."""
    return [(x, y) for y in starts(height, tile, stride) for x in starts(width, tile, stride)]


def held_share(defect: Defect, tile: Tile | None) -> float:
    """What a tile holds of a defect, as a share of the most that a tile of this size could hold of it; 1 for the whole image.

    That most is taken to be the defect's pixels times the share of its box that fits into a tile, so that the inside of a defect
    larger than the tile counts as well as the whole of a small one.
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


class Unreadable(InputError):
    """An image whose size cannot be read, or whose mask cannot be used."""


def _size(path: Path) -> tuple[int, int]:
    try:
        with Image.open(path) as image:
            return image.size
    except (OSError, SyntaxError, ValueError) as error:
        raise Unreadable(f"{path}: not an image that can be read ({error}); expected a PNG") from error


def _rows(images: Mapping[int, Path], series: str) -> dict[int, list[Row]] | None:
    path = next(iter(images.values())).parent / TRUTH
    if not path.is_file():
        return None
    rows = read_boxes(path)
    if not rows:
        raise InputError(f"{path}: no box in it, which would make every image of {series} normal; expected rows, or no such file")
    for frame, of_frame in rows.items():
        if frame not in images:
            numbers = f"{min(images)} to {max(images)}"
            raise InputError(f"{path}, line {of_frame[0].line}: image {frame} does not exist; {series} has images from {numbers}")
    return rows


def _masks(root: Path, images: Mapping[int, Path], series: str) -> dict[int, Path] | None:
    if series not in MASKS:
        return None
    other = MASKS[series]
    masks = {frame: root / GROUPS[other[0]] / other / f"{other}_{frame:04}.png" for frame in images}
    for frame, path in masks.items():
        if not path.is_file():
            raise InputError(f"{path}: no such file; expected the mask of {images[frame]}")
    return masks


def _boxed(path: Path, rows: list[Row]) -> list[Defect]:
    """The boxes of one image, cut at its border."""
    if not rows:
        return []
    width, height = _size(path)
    found = []
    for line, (x1, y1, x2, y2) in rows:
        box = max(x1, 0), max(y1, 0), min(x2, width), min(y2, height)
        if box[0] >= box[2] or box[1] >= box[3]:
            raise InputError(
                f"{path.parent / TRUTH}, line {line}: the box {x1 + 1}…{x2} × {y1 + 1}…{y2} lies outside of "
                f"the {width}×{height} pixels of {path.name}"
            )
        found.append(Defect(box, np.broadcast_to(True, (box[3] - box[1], box[2] - box[0]))))
    return found


def _components(path: Path, image: Path) -> list[Defect]:
    try:
        mask = read_mask(path)
    except InputError as error:
        raise Unreadable(str(error)) from error
    width, height = _size(image)
    if mask.shape != (height, width):
        raise Unreadable(
            f"{path}: a mask of {mask.shape[1]}×{mask.shape[0]} pixels for {image} of {width}×{height}; expected the same size"
        )
    parts = regionprops(label(mask, connectivity=2))
    return [Defect((part.bbox[1], part.bbox[0], part.bbox[3], part.bbox[2]), part.image) for part in parts]


def _tiles(path: Path, rules: Rules, skip: bool) -> list[Tile | None]:
    """The tiles of an image; None, the whole of it, for unit=image and for one to be skipped."""
    if rules.unit == "image":
        return [None]
    try:
        width, height = _size(path)
    except Unreadable:
        if skip:
            return [None]
        raise
    if min(width, height) < rules.tile:
        raise InputError(f"{path}: {width}×{height} pixels; expected at least data.tile={rules.tile} in both directions")
    return [(x, y, rules.tile, rules.tile) for x, y in corners(width, height, rules.tile, rules.stride)]


def _train_frames(numbers: list[int], rules: Rules) -> set[int]:
    if rules.train_frames:
        first, last = rules.train_frames
        return {number for number in numbers if first <= number <= last}
    return set(drawn(numbers, rules.train_share, rules.seed)) if rules.unit == "tile" else set()


def _share_of_normals(found: list[Sample], rules: Rules) -> list[Sample]:
    train = set(drawn([sample.path for sample in found if sample.label == NORMAL], rules.train_share, rules.seed))
    return [sample._replace(split="train") if sample.path in train else sample for sample in found]


def _within(box: tuple[int, int, int, int], tile: Tile | None) -> tuple[int, int, int, int]:
    """A box cut at the border of a tile, still in pixels of the whole image."""
    if tile is None:
        return box
    x, y, w, h = tile
    return max(box[0], x), max(box[1], y), min(box[2], x + w), min(box[3], y + h)


def _text(tile: Tile | None) -> str:
    return ",".join(map(str, tile)) if tile else ""
