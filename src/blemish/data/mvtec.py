"""MVTec AD: fifteen categories of objects and textures with pixel masks (Bergmann, Fauser, Sattlegger, Steger, CVPR 2019)."""

from pathlib import Path

from blemish.data.manifest import Sample
from blemish.data.module import ImageData
from blemish.edge.errors import InputError
from blemish.edge.reading import find_images
from blemish.types import ANOMALOUS, NORMAL

OBJECTS = ("bottle", "cable", "capsule", "hazelnut", "metal_nut", "pill", "screw", "toothbrush", "transistor", "zipper")
TEXTURES = ("carpet", "grid", "leather", "tile", "wood")
CATEGORIES = tuple(sorted(OBJECTS + TEXTURES))
GOOD = "good"


class MVTec(ImageData):
    """The official layout and split of one category: train/good trains, test/<defect> tests, one mask per defect image."""

    name = "mvtec"
    published = "MVTec AD, mvtec.com (Research & Teaching, Datasets); CC BY-NC-SA 4.0: for research and evaluation only"
    layout = """
<root>/<category>/train/good/000.png …
<root>/<category>/test/good/000.png …
<root>/<category>/test/<defect>/000.png …
<root>/<category>/ground_truth/<defect>/000_mask.png …
with <category> one of """ + ", ".join(CATEGORIES)

    def categories(self) -> list[str]:
        return [name for name in super().categories() if (self.root / name / "train").is_dir()]

    def folder(self) -> Path:
        folder = super().folder()
        if self.category is None:
            raise self.missing(f"data.category: none given. ImageResult in {self.root}: {', '.join(self.categories()) or 'none'}")
        return folder

    def scan(self) -> list[Sample]:
        folder = self.folder()
        for part in ("train/good", "test"):
            if not (folder / part).is_dir():
                raise self.missing(f"{folder / part}: no such folder")
        return [
            sample._replace(path=f"{self.category}/{sample.path}", mask=sample.mask and f"{self.category}/{sample.mask}")
            for sample in samples(folder)
        ]


def samples(folder: Path) -> list[Sample]:
    """The samples of one category, paths relative to its folder; InputError for a defect without a mask or a mask without an image."""
    found = [Sample(_under(path, folder), "train", NORMAL, GOOD) for path in find_images(folder / "train" / GOOD)]
    masks = {(path.parent.name, path.stem): path for path in find_images(folder / "ground_truth", results=True) if path.parent.name != GOOD}
    for defect in sorted(path.name for path in (folder / "test").iterdir() if path.is_dir()):
        for path in find_images(folder / "test" / defect):
            if defect == GOOD:
                found.append(Sample(_under(path, folder), "test", NORMAL, GOOD))
                continue
            mask = masks.pop((defect, f"{path.stem}_mask"), None)
            if mask is None:
                raise InputError(f"{path}: no mask; expected {folder / 'ground_truth' / defect / (path.stem + '_mask.png')}")
            found.append(Sample(_under(path, folder), "test", ANOMALOUS, defect, mask=_under(mask, folder)))
    if masks:
        first = min(masks.values())
        raise InputError(f"{first}: a mask without an image ({len(masks)} such); expected one in {folder / 'test' / first.parent.name}")
    return found


def _under(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()
