"""Layouts of published data sets that `data=folder` recognises by itself: which images are normal, defective, and their masks."""

import csv
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from blemish.data.dataset import threaded
from blemish.data.masks import read_mask
from blemish.edge.errors import InputError
from blemish.edge.reading import find_images

NORMAL_NAMES = ("good", "ok", "normal", "0")  # labels of normal images in a CSV
MASK_ENDING = re.compile(r"[_-](mask|label|gt)$", re.IGNORECASE)  # of the stem of a mask beside its image

Folders = dict[str, list[str] | str | None]  # settings of `Folder`


class Listing(NamedTuple):
    """The images of a data set. Normal test images are drawn from `normal` where there are none."""

    normal: list[Path]
    normal_test: list[Path]
    abnormal: dict[Path, str]  # defect type of each
    masks: dict[Path, Path]
    validation: Sequence[Path] = ()
    note: str = ""  # what is left out


def recognise(base: Path) -> tuple[str, Folders | Listing]:
    """The name of the layout below a folder, and its images; InputError unless it is exactly one of LAYOUTS."""
    if (base / "normal").is_dir():
        return "normal/", {"normal": ["normal"]}
    images = find_images(base)
    found = {name: layout for name, recognised in LAYOUTS.items() if (layout := recognised(base, images))}
    if len(found) != 1:
        several = f"the layouts {' and '.join(found)} fit" if found else "no layout is recognised"
        folders = ", ".join(_folders(base)) or "none"
        raise InputError(f"data.normal=null: {several} in {base}; {EXPECTED} (folders there: {folders}), or data.category=<folder>")
    return next(iter(found.items()))


def mvtec(base: Path, images: Sequence[Path], good: str = "good") -> Folders | None:
    """train/good, test/good, test/<defect> and ground_truth/<defect>; validation/good where there is one."""
    if not (base / "test").is_dir() or _folders(base / "train") != [good]:
        return None
    known = {part: [f"{part}/{good}"] * (base / part / good).is_dir() for part in ("train", "validation", "test")}
    abnormal = [f"test/{name}" for name in _folders(base / "test") if name != good]
    masks = "ground_truth" if (base / "ground_truth").is_dir() else None
    named = {"normal": known["train"], "validation": known["validation"], "normal_test": known["test"]}
    return {**named, "abnormal": abnormal, "masks": masks}


def btad(base: Path, images: Sequence[Path]) -> Folders | None:
    """train/ok, test/ok, test/ko and ground_truth/ko."""
    return mvtec(base, images, "ok")


def kolektor(base: Path, images: Sequence[Path]) -> Listing | None:
    """A mask beside each image, Part0_label.bmp, 7_GT.png or 7_mask.png, empty for normal ones; in train/ and test/, or any folders."""
    masks = masks_beside(images)
    if not masks:
        return None
    if lone := sorted(set(images) - masks.keys() - set(masks.values())):
        raise InputError(f"{lone[0]}: no mask beside it, as {len(masks)} images have ({len(lone)} such); {EXPECTED}")
    filled = dict(zip(masks, threaded(lambda mask: bool(read_mask(mask).any()), list(masks.values())), strict=True))
    parts = {image: image.relative_to(base).parts[0] for image in masks}
    trains = {image: set(parts.values()) != {"train", "test"} or parts[image] == "train" for image in masks}
    official = not all(trains.values())
    abnormal = [image for image in masks if filled[image] and not (official and trains[image])]
    return Listing(
        [image for image in masks if not filled[image] and trains[image]],
        [image for image in masks if not filled[image] and not trains[image]],
        dict.fromkeys(abnormal, "defect"),
        {image: masks[image] for image in abnormal},
        note=f"{left} defective images of train/ are left out" if (left := sum(filled.values()) - len(abnormal)) else "",
    )


def visa(base: Path, images: Sequence[Path]) -> Listing | None:
    """split_csv/1cls.csv of the data set, or image_anno.csv of a category: image and label; split, mask and object are optional."""
    choices = (base / "split_csv/1cls.csv", base, None), (base.parent / "split_csv/1cls.csv", base.parent, base.name)
    choices += ((base / "image_anno.csv", base.parent, None),)
    file, top, category = next((choice for choice in choices if choice[0].is_file()), (None, None, None))
    if file is None:
        return None
    with file.open(newline="", encoding="utf-8-sig") as text:
        rows = [(f"{file}, line {line}", row) for line, row in enumerate(csv.DictReader(text), 2)]
    if not rows or not {"image", "label"} <= rows[0][1].keys():
        raise InputError(f"{file}: expected rows with the columns object, split, label, image, mask, of which image and label must be")
    rows = [(where, row) for where, row in rows if category in (None, row.get("object"))]
    if len(objects := sorted({row.get("object") or "" for _, row in rows})) != 1:
        raise InputError(f"data.category={category or 'null'}: expected one object of {file}; found {', '.join(objects) or 'none'}")
    found = Listing([], [], {}, {})
    for where, row in rows:
        path, normal, split = top / row["image"], row["label"].strip().lower() in NORMAL_NAMES, row.get("split") or ""
        if not path.is_file():
            raise InputError(f"{where}: {path}: no such file")
        if not normal and split == "train":
            raise InputError(f"{where}: label {row['label']} in split train; expected normal images there")
        if normal:
            (found.normal_test if split == "test" else found.normal).append(path)
            continue
        found.abnormal[path] = row["label"].strip()
        if row.get("mask"):
            found.masks[path] = top / row["mask"]
    return found


def flat(base: Path, images: Sequence[Path]) -> Folders | None:
    """Normal images in the folder itself, and none below it."""
    return {"normal": ["."]} if images and all(path.parent == base for path in images) and not masks_beside(images) else None


LAYOUTS: dict[str, Callable[[Path, Sequence[Path]], Folders | Listing | None]] = {
    "MVTec AD": mvtec,
    "BTAD": btad,
    "VisA": visa,
    "masks beside images": kolektor,
    "normal images alone": flat,
}
EXPECTED = "expected data.normal=<folder>, with data.abnormal=[<folder>,…] and data.masks=<folder> where there are any"


def masks_beside(images: Sequence[Path]) -> dict[Path, Path]:
    """The masks among images, by the image in the same folder: Part0_label.bmp of Part0.jpg."""
    is_named = {path: bool(MASK_ENDING.search(path.stem)) for path in images}
    by_name = {path.with_suffix(""): path for path in images if not is_named[path]}
    owners = {path: by_name.get(path.with_name(MASK_ENDING.sub("", path.stem))) for path in images if is_named[path]}
    return {image: mask for mask, image in owners.items() if image}


def _folders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != ".") if folder.is_dir() else []
