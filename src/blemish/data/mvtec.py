"""MVTec AD: fifteen categories of objects and textures with pixel masks (Bergmann, Fauser, Sattlegger, Steger, CVPR 2019)."""

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
    """One category in the official layout and split: train/good trains, test/<defect> tests, with a mask for each image of a defect."""

    name = "mvtec"
    published = "MVTec AD, mvtec.com (Research & Teaching, Datasets); CC BY-NC-SA 4.0: for research and evaluation only"
    layout = """
<root>/<category>/train/good/000.png …
<root>/<category>/test/good/000.png …
<root>/<category>/test/<defect>/000.png …
<root>/<category>/ground_truth/<defect>/000_mask.png …
with <category> one of """ + ", ".join(CATEGORIES)
    needs_category = True

    def categories(self) -> list[str]:
        return [name for name in super().categories() if (self.root / name / "train").is_dir()]

    def scan(self) -> list[Sample]:
        folder = self.folder()
        for part in ("train/good", "test"):
            if not (folder / part).is_dir():
                raise self.missing(f"{folder / part}: no such folder")
        samples = [Sample(self.relative(path), "train", NORMAL, GOOD) for path in find_images(folder / "train" / GOOD)]
        masks = {(path.parent.name, path.stem): path for path in find_images(folder / "ground_truth", results=True)}
        for defect in sorted(path.name for path in (folder / "test").iterdir() if path.is_dir()):
            for path in find_images(folder / "test" / defect):
                mask = masks.pop((defect, f"{path.stem}_mask"), None)
                if defect == GOOD:
                    samples.append(Sample(self.relative(path), "test", NORMAL, GOOD))
                elif mask:
                    samples.append(Sample(self.relative(path), "test", ANOMALOUS, defect, mask=self.relative(mask)))
                else:
                    raise InputError(f"{path}: no mask; expected {folder / 'ground_truth' / defect / (path.stem + '_mask.png')}")
        if orphans := sorted(path for (defect, _), path in masks.items() if defect != GOOD):
            expected = folder / "test" / orphans[0].parent.name
            raise InputError(f"{orphans[0]}: a mask without an image ({len(orphans)} such); expected one in {expected}")
        return samples
