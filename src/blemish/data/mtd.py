"""Magnetic tile defects: grey images of magnet segments with pixel masks (Huang, Qiu, Guo, Yang, The Visual Computer, 2018)."""

import re
from dataclasses import dataclass
from pathlib import Path

from blemish.data.dataset import threaded
from blemish.data.manifest import Sample
from blemish.data.module import ImageData
from blemish.data.samplers import shuffled
from blemish.edge.checks import check_choice, check_number
from blemish.edge.errors import InputError
from blemish.edge.reading import read
from blemish.types import ANOMALOUS, NORMAL

FREE = "MT_Free"
DEFECTS = ("MT_Blowhole", "MT_Break", "MT_Crack", "MT_Fray", "MT_Uneven")
SAME_TILE = 100  # frame numbers: two images further apart show different tiles; exposures of one tile are about 20 apart


@dataclass(kw_only=True, eq=False, repr=False)
class MagneticTiles(ImageData):
    """All six folders, without categories or an official split: a seeded share `train_share` of MT_Free trains, everything else tests.

    split_by: "image" draws image by image, as published results do, but a tile was photographed under up to six exposures, which are then
    in training and test. "tile" keeps images with neighbouring frame numbers together and so tests on unseen tiles.
    A few MT_Uneven images have a blank mask: their pixels count as unknown, not as normal.
    """

    name = "mtd"
    published = (
        "Huang, Qiu, Guo, Yang, Surface defect saliency of magnetic tile, The Visual Computer, 2018; "
        "github.com/abin24/Magnetic-tile-defect-datasets.; free to use with citation"
    )
    layout = f"""
<root>/{FREE}/Imgs/*.jpg
<root>/<defect>/Imgs/*.jpg, with a mask *.png of the same name, for {", ".join(DEFECTS)}
"""

    train_share: float
    split_by: str

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.category is not None:
            raise InputError(f"data.category={self.category}: magnetic tiles have none; expected null")
        check_number("data", "(0, 1)", train_share=self.train_share)
        check_choice("data", ("image", "tile"), split_by=self.split_by)

    def scan(self) -> list[Sample]:
        root = self.folder()
        if absent := [name for name in (FREE, *DEFECTS) if not (root / name / "Imgs").is_dir()]:
            raise self.missing(f"{root / absent[0] / 'Imgs'}: no such folder ({len(absent)} of {len(DEFECTS) + 1} are missing)")
        free = [self.relative(path) for path in _pairs(root / FREE / "Imgs")]
        groups = [[path] for path in free] if self.split_by == "image" else tiles(free)
        train = draw_groups(groups, round(self.train_share * len(free)), self.seed)
        samples = [Sample(path, "train" if path in train else "test", NORMAL, "good") for path in free]
        for name in DEFECTS:
            pairs = _pairs(root / name / "Imgs")
            blank = threaded(_is_blank, list(pairs.values()))
            for (path, mask), nothing in zip(pairs.items(), blank, strict=True):
                defect, mask = name.removeprefix("MT_").lower(), "" if nothing else self.relative(mask)
                samples.append(Sample(self.relative(path), "test", ANOMALOUS, defect, mask))
        return samples


def draw_groups(groups: list[list[str]], most: int, seed: int) -> set[str]:
    """The paths in randomly drawn groups, as many whole ones as hold at most `most` paths."""
    chosen: set[str] = set()
    for group in shuffled(groups, seed):
        if len(chosen) + len(group) <= most:
            chosen.update(group)
    return chosen


def tiles(paths: list[str]) -> list[list[str]]:
    """Images that may show the same tile: runs of frame numbers (…_num_<frame>.jpg) without a gap of more than SAME_TILE."""
    groups, last = [], None
    for frame, path in sorted((_frame(path), path) for path in paths):
        if last is None or frame - last > SAME_TILE:
            groups.append([])
        groups[-1].append(path)
        last = frame
    return groups


def _frame(path: str) -> int:
    match = re.search(r"_num_(\d+)\.", path)
    if not match:
        raise InputError(f"{path}: no frame number in the name; expected exp<exposure>_num_<frame>.jpg, or data.split_by=image")
    return int(match[1])


def _pairs(folder: Path) -> dict[Path, Path]:
    """The mask of each image of a folder; InputError for one without the other."""
    images, masks = ({path.stem: path for path in sorted(folder.glob(f"[!.]*.{suffix}"))} for suffix in ("jpg", "png"))
    if lonely := sorted((images | masks)[stem] for stem in images.keys() ^ masks.keys()):
        what = "an image without a mask" if lonely[0].suffix == ".jpg" else "a mask without an image"
        raise InputError(f"{lonely[0]}: {what} ({len(lonely)} such); expected a .jpg and a .png of the same name")
    return {image: masks[stem] for stem, image in images.items()}


def _is_blank(mask: Path) -> bool:
    try:
        return read(mask).max() < 128
    except InputError:  # reported, or skipped, when the image is used
        return False
