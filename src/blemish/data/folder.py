"""Any tree of folders: normal images in some, each defect type in one of its own, masks in another."""

import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from blemish.data.manifest import Sample
from blemish.data.module import ImageData, drawn
from blemish.edge.checks import check_number
from blemish.edge.errors import InputError
from blemish.edge.reading import find_images
from blemish.types import ANOMALOUS, NORMAL

log = logging.getLogger(__name__)


@dataclass(kw_only=True, eq=False, repr=False)
class Folder(ImageData):
    """Images of your own; folders are named relative to root/category and searched at any depth.

    normal: folder or folders of normal training images. validation: the same for the decision threshold, never trained on; without
    it `protocol` says what is held out. normal_test: the same for the test; without it a seeded share `test_share` of `normal` is
    kept for it, one image at least, none for 0. abnormal: folders of test images with defects, each folder's own name is the defect
    type. masks: folder of masks, found by the image's relative path or by its stem, with or without "_mask" behind it; without
    it, or for an image without a mask, there are image-level results only. InputError for a folder that is absent or empty, for
    an image that is in two of them, and for a mask that belongs to no image.
    """

    name = "folder"
    published = "your own images"
    layout = """
<root>/[<category>/]
  <normal>/       normal images                  data.normal=<folder>
  <validation>/   normal images to calibrate    data.validation=<folder> (optional)
  <normal_test>/  normal images for the test     data.normal_test=<folder> (optional)
  <defect>/       images with one defect type    data.abnormal=[<folder>,…]
  <masks>/        masks, white on the defects    data.masks=<folder> (optional)
"""

    normal: str | Sequence[str]
    validation: str | Sequence[str] | None
    normal_test: str | Sequence[str] | None
    abnormal: str | Sequence[str] | None
    masks: str | None
    test_share: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("data", "[0, 1)", test_share=self.test_share)
        self.normal, self.normal_test, self.abnormal = _list(self.normal), _list(self.normal_test), _list(self.abnormal)
        self.validation = _list(self.validation)
        if not self.normal:
            raise InputError("data.normal: no folder named; expected the folder of the normal training images")

    def scan(self) -> list[Sample]:
        base = self.folder()
        names = self.normal + self.validation + self.normal_test + self.abnormal
        found = {name: self._images(base, name) for name in names}
        twice = [path for path, count in Counter(path for name in names for path in found[name]).items() if count > 1]
        if twice:
            raise InputError(
                f"{some(twice)}: in two of the folders of data.normal, data.validation, data.normal_test, data.abnormal; expected one"
            )
        groups = (self.normal, self.validation, self.normal_test)
        normal, validation, normal_test = ([path for name in names for path in found[name]] for names in groups)
        abnormal = {path: name for name in self.abnormal for path in found[name]}
        if not abnormal:
            log.warning("data.abnormal names no folder: the test has normal images only, there will be no ranking metrics")
        tested = set(normal_test or (drawn(normal, self.test_share, self.seed) if self.test_share else []))
        masks = self._masks(base, abnormal)
        split = dict.fromkeys(normal, "train") | dict.fromkeys(validation, "calibrate") | dict.fromkeys(tested, "test")
        good = [Sample(self.relative(path), split[path], NORMAL, "good") for path in normal + validation + normal_test]
        bad = [
            Sample(self.relative(path), "test", ANOMALOUS, (base / name).name, masks[path] and self.relative(masks[path]))
            for path, name in abnormal.items()
        ]
        return good + bad

    def _held_out(self, samples: list[Sample]) -> list[Sample]:
        return samples if self.validation else super()._held_out(samples)  # validation images are for no protocol to train on

    def _images(self, base: Path, name: str) -> list[Path]:
        if not (base / name).is_dir():
            folders = sorted(path.name for path in base.iterdir() if path.is_dir())
            raise self.missing(f"{base / name}: no such folder; found {', '.join(folders) or 'none'}")
        found = [path for path in find_images(base / name) if not (self.masks and path.is_relative_to(base / self.masks))]
        if not found:
            raise self.missing(f"{base / name}: no image in it")
        return found

    def _masks(self, base: Path, abnormal: Mapping[Path, str]) -> dict[Path, Path | str]:
        """The mask of every abnormal image, "" where there is none; `abnormal` has the folder that each was found by."""
        if self.masks is None:
            return dict.fromkeys(abnormal, "")
        folder = base / self.masks
        if not folder.is_dir():
            raise self.missing(f"{folder}: no such folder (data.masks)")
        masks = {mask: mask.relative_to(folder).with_suffix("").as_posix() for mask in find_images(folder, results=True)}
        # all images count, also normal ones, whose masks are all 0, and those of a defect that this run leaves out
        images = (
            path.relative_to(base).with_suffix("").parts for path in find_images(base, results=True) if not path.is_relative_to(folder)
        )
        ends = {"/".join(parts[i:]) for parts in images for i in range(len(parts))}
        owned = {mask for mask, name in masks.items() if ends & {name, name.removesuffix("_mask")}}
        by_path_only = {mask for mask in owned if mask.parent != folder}
        names = {path: _names(base, base / name, path) for path, name in abnormal.items()}
        matched = match_masks(names, masks, by_path_only)
        if orphans := masks.keys() - owned - set(matched.values()):
            raise InputError(f"{some(orphans)}: a mask without an image; expected an image of the same relative path or stem")
        return dict.fromkeys(abnormal, "") | matched


def match_masks(images: Mapping[Path, Sequence[str]], masks: Mapping[Path, str], by_path_only: Set[Path]) -> dict[Path, Path]:
    """Image to mask, given the names the mask of each image may have and the relative path without ending of each mask.

    A mask may have "_mask" behind its name. The first name that a mask bears wins. The last one, the mere stem, comes when all
    others are matched, and neither for the masks `by_path_only` nor for those in a folder that is part of some image's names.
    InputError if two masks fit an image, or two images a mask.
    """
    by_path, by_stem = defaultdict(list), defaultdict(list)
    for mask, name in masks.items():
        by_path[name].append(mask)
    fits = {image: _first(by_path, names[:-1]) for image, names in images.items()}
    used = {mask for several in fits.values() for mask in several}
    closed = {PurePosixPath(name).parent.as_posix() for names in images.values() for name in names} - {"."}
    used |= by_path_only
    for mask, name in masks.items():
        if mask not in used and PurePosixPath(name).parent.as_posix() not in closed:
            by_stem[mask.stem].append(mask)
    fits = {image: fits[image] or _first(by_stem, names[-1:]) for image, names in images.items()}
    owner: dict[Path, Path] = {}
    for image, several in fits.items():
        if len(several) > 1:
            raise InputError(f"{image}: {len(several)} masks fit, {some(several)}; expected one")
        for mask in several:
            if mask in owner:
                raise InputError(f"{mask}: fits {owner[mask]} and {image}; expected a mask under the relative path of its image")
            owner[mask] = image
    return {image: mask for mask, image in owner.items()}


def _first(index: Mapping[str, list[Path]], names: Iterable[str]) -> list[Path]:
    return next((index[key] for name in names for key in (name, f"{name}_mask") if key in index), [])


def _names(base: Path, folder: Path, image: Path) -> list[str]:
    """What the mask of an image may be called, the most telling name first."""
    inside = image.relative_to(folder).with_suffix("").as_posix()
    return [image.relative_to(base).with_suffix("").as_posix(), f"{folder.name}/{inside}", inside, image.stem]


def _list(folders: str | Sequence[str] | None) -> list[str]:
    return [] if folders is None else [folders] if isinstance(folders, str) else list(folders)


def some(items: Iterable, most: int = 10) -> str:
    """The first items, and how many more there are."""
    texts = sorted(map(str, items))
    return ", ".join(texts[:most]) + (f" and {len(texts) - most} more" if len(texts) > most else "")
