"""From a list of samples to batches: splits, truth, decoding, and the errors a user can act on."""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, SequentialSampler

from blemish.data.dataset import RECENT, Batches, Images, Recent, Tiles, collate, cut, inside_of, threaded, truth
from blemish.data.images import check_some_inside
from blemish.data.manifest import Sample, manifest_digest, read_manifest
from blemish.data.ranges import ValueCheck, fit_ranges, window_in
from blemish.data.roi import Roi
from blemish.data.samplers import FixedLengthSampler, ShardedBatchSampler, Shuffled, ShuffledTiles, by_image, shuffled
from blemish.data.tiles import check_tiling
from blemish.edge.checks import LARGEST_SEED, check_choice, check_number, check_whole, nearest
from blemish.edge.errors import InputError
from blemish.edge.geometry import RESIZES, UINT16, Geometry
from blemish.edge.ranges import Range
from blemish.edge.reading import file_digest, read, size_of
from blemish.types import NORMAL, Batch

PROTOCOLS = ("clean", "paper")
ON_ERROR = ("stop", "skip")
FEWEST = 19  # calibration images below which no threshold can promise 5 % false alarms: ceil(1 / 0.05) − 1
MANY = 5000  # files from which on even a digest of each takes seconds
DTYPE = {"uint8": (0.0, 255.0), "uint16": UINT16}  # data.window=dtype

log = logging.getLogger(__name__)


@dataclass(eq=False, repr=False)
class ImageData(LightningDataModule):
    """A data set of normal training images and mixed test images; subclasses say by `scan` which file is what.

    root: folder of the data set. category: its part to use, None for all there is. image_size, crop, resize: as `edge.geometry.Geometry`.
    protocol: "clean" holds out a share `calibration` of the normal training images, "paper" trains on all. window: range of
    the values of 16-bit and float images, "auto" (fitted to the training images), "dtype" (all of uint16), [lo, hi] or
    {dtype: [lo, hi]}. on_error: "stop" at the first image that cannot be used, or "skip" all of them. manifest: CSV that
    takes the place of the scan. roi: mask of what is looked at, or folder of masks, see `Roi`. InputError for a value that is none of
    these.

    After setup: samples, digest (of the manifest), ranges (the training images' values by dtype, unless they were set before), window
    (dtype to (lo, hi)), skipped (key to reason).
    """

    name: ClassVar[str]  # as in configs/data/<name>.yaml
    published: ClassVar[str]  # citation and where the images are published
    layout: ClassVar[str]  # the folders and files expected under the root, a short text of several lines

    root: str | Path
    category: str | None
    image_size: int | None
    crop: int | None
    batch_size: int
    workers: int
    seed: int
    protocol: str
    calibration: float
    window: str | Sequence[float] | Mapping[str, Sequence[float]]
    on_error: str
    manifest: str | Path | None = None
    resize: str = "stretch"
    roi: str | Path | np.ndarray | None = None

    def __post_init__(self) -> None:
        super().__init__()
        check_choice("", PROTOCOLS, protocol=self.protocol)
        check_choice("data", ON_ERROR, on_error=self.on_error)
        check_number("data", "(0, 1)", calibration=self.calibration)
        check_whole("", 8, also=(None,), image_size=self.image_size)
        check_whole("", 8, self.image_size, also=(None,), crop=self.crop)
        check_choice("", RESIZES, resize=self.resize)
        check_whole("", 1, batch_size=self.batch_size)
        check_whole("", 0, workers=self.workers)
        check_whole("", 0, LARGEST_SEED, seed=self.seed)
        self.root = Path(self.root).expanduser()
        self.category = None if self.category is None else str(self.category)  # a folder named 0001 arrives as a number
        self.geometry = Geometry(self.image_size, self.crop, self.resize)
        self.roi = None if self.roi is None else Roi(self.roi, self.root)
        self.manifest = None if self.manifest is None else Path(self.manifest).expanduser()
        self.window = plain_window(self.window)
        self.ranges: dict[str, Range] = {}
        self.values = ValueCheck({}, {})
        self.samples: list[Sample] = []
        self.skipped: dict[str, str] = {}
        self.digest = ""
        self._by_key: dict[str, Sample] = {}
        self.process, self.processes = 0, 1  # the number of this process, and how many share the batches
        self.tile: int | None = None  # side of the tiles that loaders cut images into, None for whole images
        self.overlap = 0
        self.epoch_size: int | None = None  # rows that an epoch draws, None for every one once

    def tiled(self, tile: int | None, overlap: int) -> None:
        """Let the loaders give tiles, each resized to what the network's input would be of a whole image; None for whole images.

        The samples stay the whole images. InputError for a side or an overlap that cannot be used.
        """
        check_tiling(tile, overlap)
        self.tile, self.overlap = tile, overlap

    def paced(self, epoch_size: int | None) -> None:
        """Let an epoch draw so many images, or tiles, however many there are; None for every one once. InputError for none."""
        check_whole("", 1, also=(None,), epoch_size=epoch_size)
        self.epoch_size = epoch_size

    def scan(self) -> list[Sample]:
        """Every sample found under self.folder(), paths relative to self.root; splits "train", "test" or "unlabelled"."""
        raise NotImplementedError

    def categories(self) -> list[str]:
        """The categories to choose from: override where they are not simply the folders of the root."""
        return sorted(path.name for path in self.root.iterdir() if path.is_dir() and not path.name.startswith("."))

    def folder(self) -> Path:
        """root/category, checked: InputError for a missing root or a category that is not one of `categories`."""
        if not self.root.is_dir():
            raise self.missing(f"{self.root}: no such folder")
        if self.category is None:
            return self.root
        choices = self.categories()
        if self.category not in choices:
            found = f"{nearest(self.category, choices)}ImageResult: {', '.join(choices) or 'none'}"
            raise self.missing(f"{self.root}: no category {self.category!r}; {found}")
        return self.root / self.category

    def missing(self, found: str) -> InputError:
        """The one error for data that is not where it should be: what was found, the layout, where the data is published."""
        return InputError(
            f"{found}\n{self.name} expects\n{self.layout.strip(chr(10))}\n"
            f"Published: {self.published}\nPoint to your copy by data.root=<folder>, to a part of it by data.category=<name>."
        )

    def relative(self, path: Path) -> str:
        """The path as the manifest has it; InputError for one that is not below the root."""
        if not path.is_relative_to(self.root) or ".." in path.relative_to(self.root).parts:
            raise InputError(f"{path}: outside of data.root={self.root}; expected a path below it")
        return path.relative_to(self.root).as_posix()

    def setup(self, stage: str | None = None) -> None:
        """Find the samples, split them and fit the window, once; InputError if there is nothing to train on or to test."""
        if self.digest:
            return
        samples = self.samples or self.listed()
        for split in ("train", "test"):
            if not any(sample.split == split for sample in samples):
                raise self.missing(f"{self.manifest or self.root / (self.category or '')}: no {split} image; found {_counts(samples)}")
        fixed = bool(self.ranges)  # by the run that is tested again or updated, and so is its window
        self.window = self._fitted(samples)
        self.values = ValueCheck(self.ranges, self.window, "" if fixed else "data.window")
        self.samples = samples
        self._by_key = {sample.key: sample for sample in samples}
        self.digest = manifest_digest(samples)

    def listed(self) -> list[Sample]:
        """The samples as `setup` will keep them, with digests and splits, but without asking whether there are enough."""
        if self.manifest is None:
            samples = self.scan()
        else:
            self.folder()
            samples = read_manifest(self.manifest)
        samples = self._digested(sorted(samples, key=lambda sample: sample.key))
        if self.on_error == "skip":
            samples = self._without_unreadable(samples)
        return self._held_out(samples)

    def _digested(self, samples: list[Sample]) -> list[Sample]:
        paths = sorted({sample.path for sample in samples})
        digests = dict(zip(paths, threaded(self._digest_of, paths, "digests" if len(paths) > MANY else None), strict=True))
        for sample in samples:
            if sample.digest and digests[sample.path] and sample.digest != digests[sample.path]:
                raise InputError(
                    f"{self.root / sample.path}: changed since the manifest {self.manifest} was written "
                    f"(digest {digests[sample.path]}, there {sample.digest}); expected the same file, or a manifest without digests"
                )
        return [sample._replace(digest=digests[sample.path]) for sample in samples]

    def _digest_of(self, path: str) -> str:
        try:
            return file_digest(self.root / path)
        except OSError as error:
            if self.on_error == "skip":
                return ""  # the reading that follows says why
            listed = f"; listed in the manifest {self.manifest}" if self.manifest else ""
            raise InputError(f"{self.root / path}: cannot be read ({error.strerror}){listed}; expected an image file") from error

    def _without_unreadable(self, samples: list[Sample]) -> list[Sample]:
        tried = [sample for sample in samples if sample.split != "skipped"]
        recent = Recent(RECENT)
        reasons = threaded(lambda sample: self._reason(sample, recent), tried, "reading every image")
        self.skipped = {sample.key: reason for sample, reason in zip(tried, reasons, strict=True) if reason}
        for key, reason in self.skipped.items():
            log.warning("skipped %s: %s", key, reason)
        if self.skipped:
            log.warning("skipped %d of %d images (data.on_error=skip)", len(self.skipped), len(tried))
        return [sample._replace(split="skipped") if sample.key in self.skipped else sample for sample in samples]

    def _reason(self, sample: Sample, recent: "Recent") -> str:
        try:
            whole = recent.read(self.root / sample.path)
            cut(self.root, sample, whole)
            truth(self.root, sample, whole.shape[:2], recent.mask)
            if self.roi:
                check_some_inside(~inside_of(self.roi, self.root, sample, whole.shape[:2], recent.mask))
        except InputError as error:
            return str(error)
        return ""

    def _held_out(self, samples: list[Sample]) -> list[Sample]:
        if self.protocol == "paper":
            return [sample._replace(split="train") if sample.split == "calibrate" else sample for sample in samples]
        if any(sample.split == "calibrate" for sample in samples):  # a manifest that has its own hold-out
            return samples
        normal = sorted({sample.path for sample in samples if sample.split == "train" and sample.label == NORMAL})
        out = held_out(normal, self.calibration, self.seed)
        return [s._replace(split="calibrate") if s.split == "train" and s.path in out else s for s in samples]

    def _fitted(self, samples: list[Sample]) -> dict[str, tuple[float, float]]:
        if not self.ranges:
            paths = [self.root / path for path in sorted({sample.path for sample in samples if sample.split == "train"})]
            self.ranges = fit_ranges(paths, self._looked_at if self.roi else read)
        if self.window == "dtype":
            return DTYPE
        return window_in(self.ranges) if self.window == "auto" else self.window

    def _looked_at(self, path: Path) -> np.ndarray:
        """The pixels of an image that are looked at, (n,) or (n, 3)."""
        array = read(path)
        return array[self.roi.inside(path, *array.shape[:2])]

    def sample(self, key: str) -> Sample:
        """The manifest row behind an entry of Batch.path; KeyError if there is none."""
        return self._by_key[key]

    def loader(self, split: str, shuffle: bool = False, dealt: bool = True) -> DataLoader:
        """Batches of one split in the manifest's order, or in an order drawn anew each epoch from the seed.

        `dealt`: this process's share of them, where there are several, instead of all.
        """
        samples = [s for s in self.samples if s.split == split]
        if self.tile is not None:
            return self._tile_loader(samples, shuffle)
        return self.batches(self.images(samples), shuffle, collate, self.workers, dealt)

    def _tile_loader(self, samples: list[Sample], shuffle: bool) -> DataLoader:
        """Batches of tiles; unless they are shuffled, those of an image follow one another and a batch has tiles of one image."""
        if self.processes > 1:
            raise InputError(f"tiling={self.tile}: {self.processes} processes would share an image; expected trainer.devices=1")
        dataset = self.tiles(samples, fit=shuffle)
        counts, pixels = zip(*dataset.extents, strict=True) if dataset.extents else ((), ())
        if not shuffle:
            batches = Batches(dataset, by_image(counts, self.batch_size))
            return self._loader(batches, {"batch_size": 1}, itemgetter(0), self.workers)
        order = {"sampler": self._pace(ShuffledTiles(counts, pixels, self.seed)), "batch_size": self.batch_size}
        return self._loader(dataset, order, collate, self.workers)

    def tiles(self, samples: list[Sample], fit: bool = False) -> "Tiles":
        """The tiles of the samples, decoded when asked for; `fit` as `Tiles` has it."""
        sizes = dict(zip((s.path for s in samples), threaded(lambda s: size_of(self.root / s.path), samples), strict=True))
        tiles = Tiles(samples, sizes, self.tile, self.overlap, self.root, self.window, self.geometry.side, self.roi, fit)
        tiles.values = self.values
        return tiles

    def images(self, samples: list[Sample]) -> "Images":
        """The samples, decoded when asked for."""
        images = Images(samples, self.root, self.window, self.geometry, self.roi)
        images.values = self.values
        return images

    def image(self, key: str) -> Tensor:
        """The image (3, h, w) behind an entry of Batch.path; where tiles are cut, in its own pixels and reduced as its map is."""
        if self.tile is not None:
            return self.tiles([self.sample(key)]).whole(key)
        return self.images([self.sample(key)])[0][0]

    def batches(self, dataset: Dataset, shuffle: bool, collate: Callable[[list], Batch], workers: int, dealt: bool = True) -> DataLoader:
        """A loader of a data set in the order and the batches of this module; batch_size is that of all processes together."""
        sampler: Sampler = self._pace(Shuffled(len(dataset), self.seed)) if shuffle else SequentialSampler(dataset)
        order = {"sampler": sampler, "batch_size": self.batch_size}
        if dealt and self.processes > 1 and shuffle:
            order = {"batch_sampler": ShardedBatchSampler(sampler, self.batch_size, self.process, self.processes)}
        elif dealt and self.processes > 1:
            order["sampler"] = range(self.process, len(dataset), self.processes)
            order["batch_size"] = max(1, self.batch_size // self.processes)
        return self._loader(dataset, order, collate, workers)

    def _pace(self, sampler: "Shuffled | ShuffledTiles") -> Sampler:
        return sampler if self.epoch_size is None else FixedLengthSampler(sampler, self.epoch_size)

    def _loader(self, dataset: Dataset, order: dict, collate: Callable[[list], Batch], workers: int) -> DataLoader:
        return DataLoader(
            dataset,
            **order,
            generator=torch.Generator().manual_seed(self.seed),  # or each epoch would draw from the global stream
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
            collate_fn=collate,
        )

    def train_dataloader(self) -> DataLoader:
        return self.loader("train", shuffle=True)

    def calibrate_dataloader(self) -> DataLoader:
        return self.loader("calibrate")

    def test_dataloader(self) -> DataLoader:
        return self.loader("test")

    def predict_dataloader(self) -> DataLoader:
        return self.loader("unlabelled")


def held_out(paths: Sequence[str], share: float, seed: int) -> set[str]:
    """The images kept from training: max(⌈share·N⌉, 19) of N, never more than a quarter, one at least when there are two."""
    count = min(max(math.ceil(round(share * len(paths), 9)), FEWEST), len(paths) // 4)
    count = max(count, 1) if len(paths) > 1 else 0
    return {paths[i] for i in np.random.default_rng(seed).permutation(len(paths))[:count]}


def drawn(items: Sequence, share: float, seed: int) -> list:
    """A seeded share of the items, one at least."""
    return shuffled(items, seed)[: max(1, round(share * len(items)))]


def plain_window(window: str | Sequence[float] | Mapping[str, Sequence[float]]) -> str | dict[str, tuple[float, float]]:
    """(lo, hi) by dtype, or the word that stands for them; InputError for anything else."""
    expected = "auto, dtype, [lo, hi] with lo < hi, or {uint16: [lo, hi], float32: [lo, hi]}"
    if window in ("auto", "dtype"):
        return window
    try:
        if not isinstance(window, Mapping):
            window = {"uint16": window, "float32": window}
        plain = {dtype: (float(lo), float(hi)) for dtype, (lo, hi) in window.items()}
    except (TypeError, ValueError):
        raise InputError(f"data.window={window}: expected {expected}") from None
    for dtype, (lo, hi) in plain.items():
        possible = (lo, hi) == DTYPE["uint8"] if dtype == "uint8" else dtype in ("uint16", "float32")
        if not (possible and lo < hi and math.isfinite(hi - lo)):
            raise InputError(f"data.window={window}: expected {expected}")
    return plain


def _counts(samples: Iterable[Sample]) -> str:
    splits = [sample.split for sample in samples]
    return ", ".join(f"{splits.count(split)} {split}" for split in sorted(set(splits))) or "no images at all"
