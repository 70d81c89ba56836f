"""Any tree of folders: normal images in some, each defect type in one of its own, masks in another."""

import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from blemish.data.layouts import EXPECTED, Listing, masks_beside, recognise
from blemish.data.manifest import GOOD, Sample
from blemish.data.module import ImageData
from blemish.data.samplers import seeded_share
from blemish.edge.checks import check_number
from blemish.edge.errors import InputError
from blemish.edge.reading import find_images
from blemish.types import ANOMALOUS, NORMAL

log = logging.getLogger(__name__)


@dataclass(kw_only=True, eq=False, repr=False)
class Folder(ImageData):
    """Your own images, in folders named relative to root/category and searched at any depth.

    normal: folders of normal training images; None is "normal" or, if no other folder is named, a layout of `layouts.recognise`.
    validation: of normal images for the decision threshold, never trained on; without them `protocol` decides what is held out.
    normal_test: of normal test images; without them a seeded share `test_share` of `normal`, at least one image unless it is 0. abnormal:
    of test images with defects, whose type is the folder's name. masks: folder of masks, matched by relative path or by stem, with or
    without "_mask" behind it; an image without a mask has image-level results only. Masks beside their images, as Part0_label.bmp, are
    never taken for images. InputError for a folder that is absent or empty, an image in two of them, and a mask without an image.
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

    normal: str | Sequence[str] | None
    validation: str | Sequence[str] | None
    normal_test: str | Sequence[str] | None
    abnormal: str | Sequence[str] | None
    masks: str | None
    test_share: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("data", "[0, 1)", test_share=self.test_share)
        named = any((self.validation, self.normal_test, self.abnormal, self.masks))
        self.recognises = self.normal is None and not named
        for name in ("normal", "validation", "normal_test", "abnormal"):
            value = "normal" if name == "normal" and self.normal is None else getattr(self, name)
            setattr(self, name, [value] if isinstance(value, str) else list(value or []))
        if not self.normal:
            raise InputError(f"data.normal: no folder named; {EXPECTED}")

    def scan(self) -> list[Sample]:
        base, title, layout = self.folder(), "", {}
        if self.recognises:
            title, layout = recognise(base)
        if isinstance(layout, Listing):
            listing, note = layout, layout.note
        else:
            for name, value in layout.items():
                setattr(self, name, value)
            listing, note = self._listing(base), " ".join(f"data.{name}={_typed(value)}" for name, value in layout.items() if value)
        if not listing.abnormal:
            log.warning("data.abnormal names no folder: the test has normal images only, there will be no ranking metrics")
        tested = listing.normal_test or (seeded_share(listing.normal, self.test_share, self.seed) if self.test_share else [])
        splits = dict.fromkeys(listing.normal, "train") | dict.fromkeys(listing.validation, "calibrate") | dict.fromkeys(tested, "test")
        rows = [(path, split, NORMAL, GOOD) for path, split in splits.items()]
        rows += [(path, "test", ANOMALOUS, defect) for path, defect in listing.abnormal.items()]
        masks = {path: self.relative(mask) for path, mask in listing.masks.items()}
        samples = [Sample(self.relative(path), *row, masks.get(path, "")) for path, *row in rows]
        if title:
            counts = sorted(Counter(f"{sample.split}/{sample.defect}" for sample in samples).items())
            found = ", ".join([*(f"{count} {kind}" for kind, count in counts), f"{len(masks)} masks"])
            log.info("layout of %s: %s (%s)%s", base, title, found, note and f"; {note}")
        return samples

    def _listing(self, base: Path) -> Listing:
        """The images in the folders that the settings name."""
        names = self.normal + self.validation + self.normal_test + self.abnormal
        found = {name: self._images(base, name) for name in names}
        if twice := [path for path, count in Counter(path for name in names for path in found[name]).items() if count > 1]:
            raise InputError(
                f"{some(twice)}: in two of the folders of data.normal, data.validation, data.normal_test, data.abnormal; expected one"
            )
        beside = {image: mask for images in found.values() for image, mask in masks_beside(images).items()}
        if beside:
            log.info("%s: %d masks beside their images, as %s, are not taken for images", base, len(beside), min(beside.values()).name)
        drop = set(beside.values())
        found = {name: [path for path in images if path not in drop] for name, images in found.items()}
        normal, validation, normal_test = (
            [path for name in names for path in found[name]] for names in (self.normal, self.validation, self.normal_test)
        )
        abnormal = {path: base / name for name in self.abnormal for path in found[name]}
        defects = {path: folder.name for path, folder in abnormal.items()}
        return Listing(normal, normal_test, defects, beside | self._masks(base, abnormal), validation)

    def explain(self, split: str, samples: Sequence[Sample]) -> str:
        found = super().explain(split, samples)
        if split == "train" and self.test_share and any(sample.label == NORMAL and sample.split == "test" for sample in samples):
            found += f"; data.test_share={self.test_share} took the only normal image: expected 0, or more images in data.normal"
        if split == "test" and not self.abnormal:
            found += f"; expected data.abnormal=[<folder>,…], data.normal_test=<folder> or data.test_share={self.test_share} above 0"
        return found

    def _held_out(self, samples: list[Sample]) -> list[Sample]:
        return samples if self.validation else super()._held_out(samples)  # no protocol trains on validation images

    def _images(self, base: Path, name: str) -> list[Path]:
        if not (base / name).is_dir():
            folders = sorted(path.name for path in base.iterdir() if path.is_dir())
            raise self.missing(f"{base / name}: no such folder; found {', '.join(folders) or 'none'}")
        found = [path for path in find_images(base / name) if not (self.masks and path.is_relative_to(base / self.masks))]
        if not found:
            raise self.missing(f"{base / name}: no image in it")
        return found

    def _masks(self, base: Path, abnormal: Mapping[Path, Path]) -> dict[Path, Path]:
        """The masks of abnormal images, given the folder that each image is in; images without a mask are left out."""
        if self.masks is None:
            return {}
        folder = base / self.masks
        if not folder.is_dir():
            raise self.missing(f"{folder}: no such folder (data.masks)")
        masks = {mask: _bare(mask, folder) for mask in find_images(folder, results=True)}
        # masks may belong to normal images, where they are all 0, and to defects that this run leaves out
        images = [PurePosixPath(_bare(path, base)).parts for path in find_images(base, results=True) if not path.is_relative_to(folder)]
        ends = {"/".join(parts[i:]) for parts in images for i in range(len(parts))}
        owned = {mask for mask, name in masks.items() if ends & {name, name.removesuffix("_mask")}}
        names = {}  # that the mask of an image may have, the most specific first
        for path, own in abnormal.items():
            names[path] = [_bare(path, base), f"{own.name}/{_bare(path, own)}", _bare(path, own), path.stem]
        matched = match_masks(names, masks, by_path_only={mask for mask in owned if mask.parent != folder})
        if orphans := masks.keys() - owned - set(matched.values()):
            raise InputError(f"{some(orphans)}: a mask without an image; expected an image of the same relative path or stem")
        return matched


def match_masks(images: Mapping[Path, Sequence[str]], masks: Mapping[Path, str], by_path_only: Set[Path]) -> dict[Path, Path]:
    """Match images to masks, given the names that the mask of each image may have and the relative path without suffix of each mask.

    A mask may have "_mask" behind its name. The first name that a mask bears wins. The last, the mere stem, is tried when all others are
    matched, and not for masks in `by_path_only` or in a folder that is part of some image's names. InputError for an ambiguous match.
    """
    by_path, by_stem = defaultdict(list), defaultdict(list)
    for mask, name in masks.items():
        by_path[name].append(mask)
    fits = {image: _first(by_path, names[:-1]) for image, names in images.items()}
    used = by_path_only | {mask for several in fits.values() for mask in several}
    closed = {PurePosixPath(name).parent.as_posix() for names in images.values() for name in names} - {"."}
    for mask, name in masks.items():
        if mask not in used and PurePosixPath(name).parent.as_posix() not in closed:
            by_stem[mask.stem].append(mask)
    owner: dict[Path, Path] = {}
    for image, names in images.items():
        several = fits[image] or _first(by_stem, names[-1:])
        if len(several) > 1:
            raise InputError(f"{image}: {len(several)} masks fit, {some(several)}; expected one")
        for mask in several:
            if mask in owner:
                raise InputError(f"{mask}: fits {owner[mask]} and {image}; expected a mask under the relative path of its image")
            owner[mask] = image
    return {image: mask for mask, image in owner.items()}


def _first(index: Mapping[str, list[Path]], names: Iterable[str]) -> list[Path]:
    return next((index[key] for name in names for key in (name, f"{name}_mask") if key in index), [])


def _typed(value: str | list[str]) -> str:
    """A folder, or a list of folders, as on the command line."""
    return value if isinstance(value, str) else value[0] if len(value) == 1 else f"[{','.join(value)}]"


def _bare(path: Path, folder: Path) -> str:
    """The relative path without its suffix."""
    return path.relative_to(folder).with_suffix("").as_posix()


def some(items: Iterable, most: int = 10) -> str:
    """The first items, and how many more there are."""
    texts = sorted(map(str, items))
    return ", ".join(texts[:most]) + (f" and {len(texts) - most} more" if len(texts) > most else "")
