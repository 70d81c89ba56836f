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
SAME_TILE = 100  # frame counter: two images further apart show different tiles; within a tile's exposures steps are about 20


@dataclass(kw_only=True, eq=False, repr=False)
class MagneticTiles(ImageData):
    """All six folders; there is no official split and no category.

    A share `train_share` of MT_Free, drawn with seed, trains; the rest tests with all defects. split_by "image" draws image by
    image, as published results do. But a tile was photographed under up to six exposures, whose images then fall on both sides;
    split_by "tile" keeps images together whose frame numbers are neighbours and so asks for tiles that were never seen.
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

    def categories(self) -> list[str]:
        return []

    def scan(self) -> list[Sample]:
        root = self.folder()
        if absent := [name for name in (FREE, *DEFECTS) if not (root / name / "Imgs").is_dir()]:
            raise self.missing(f"{root / absent[0] / 'Imgs'}: no such folder ({len(absent)} of {len(DEFECTS) + 1} are missing)")
        return samples(root, self.train_share, self.split_by, self.seed)


def samples(root: Path, train_share: float, split_by: str, seed: int) -> list[Sample]:
    """The samples of all folders, paths relative to the root; InputError for a defect without a mask or a mask without an image."""
    free = list(_pairs(root, FREE))
    train = drawn(free, train_share, split_by, seed)
    found = [Sample(path, "train" if path in train else "test", NORMAL, "good") for path in free]
    for name in DEFECTS:
        pairs = _pairs(root, name)
        blank = threaded(lambda mask: _blank(root / mask), list(pairs.values()))
        for (path, mask), nothing in zip(pairs.items(), blank, strict=True):
            found.append(Sample(path, "test", ANOMALOUS, name.removeprefix("MT_").lower(), mask="" if nothing else mask))
    return found


def drawn(paths: list[str], share: float, split_by: str, seed: int) -> set[str]:
    """The seeded share of the images that trains; by "tile", whole tiles up to that share."""
    groups = [[path] for path in paths] if split_by == "image" else tiles(paths)
    wanted, chosen = round(share * len(paths)), set()
    for group in shuffled(groups, seed):
        if len(chosen) + len(group) <= wanted:
            chosen.update(group)
    return chosen


def tiles(paths: list[str]) -> list[list[str]]:
    """Images that may show the same tile: runs of frame numbers (…_num_<frame>.jpg) without a gap of more than 100."""
    numbered = sorted((_frame(path), path) for path in paths)
    groups = []
    for i, (frame, path) in enumerate(numbered):
        if i and frame - numbered[i - 1][0] <= SAME_TILE:
            groups[-1].append(path)
        else:
            groups.append([path])
    return groups


def _frame(path: str) -> int:
    match = re.search(r"_num_(\d+)\.", path)
    if not match:
        raise InputError(f"{path}: no frame number in the name; expected exp<exposure>_num_<frame>.jpg, or data.split_by=image")
    return int(match[1])


def _pairs(root: Path, name: str) -> dict[str, str]:
    """Image to mask of one folder, both relative to the root."""
    folder = root / name / "Imgs"
    images, masks = ({path.stem: path for path in sorted(folder.glob(f"[!.]*.{ending}"))} for ending in ("jpg", "png"))
    lonely = sorted((images | masks)[stem] for stem in images.keys() ^ masks.keys())
    if lonely:
        what = "an image without a mask" if lonely[0].suffix == ".jpg" else "a mask without an image"
        raise InputError(f"{lonely[0]}: {what} ({len(lonely)} such); expected a .jpg and a .png of the same name")
    return {image.relative_to(root).as_posix(): masks[stem].relative_to(root).as_posix() for stem, image in images.items()}


def _blank(path: Path) -> bool:
    try:
        return read(path).max() < 128
    except InputError:  # said again, or skipped, when the image is used
        return False
