"""From a list of samples to batches: splits, truth, decoding, and the errors a user can act on."""

import contextlib
import logging
import math
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from operator import itemgetter
from pathlib import Path
from threading import Lock
from typing import ClassVar

import numpy as np
import torch
from lightning import LightningDataModule
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, SequentialSampler, get_worker_info

from blemish.checks import LARGEST_SEED, check_choice, check_number, check_whole, nearest
from blemish.data.images import check_seen, compact, place_mask, prepare, restored
from blemish.data.masks import read_mask
from blemish.data.ranges import ValueCheck, fit_ranges, window_in
from blemish.data.regions import Region
from blemish.data.samples import Sample, manifest_digest, parse_boxes, parse_region, read_manifest
from blemish.data.tiles import MIXED, ShuffledTiles, by_image, bytes_of, check_tiling, mean_blocks, reduction, tiles_of
from blemish.edge.geometry import RESIZES, UINT16, Geometry, mirrored
from blemish.edge.ranges import Range
from blemish.edge.reading import file_digest, read, size_of
from blemish.ops.randomness import stream
from blemish.types import NO_TRUTH, NORMAL, OUTSIDE, Batch, InputError

PROTOCOLS = ("clean", "paper")
ON_ERROR = ("stop", "skip")
FEWEST = 19  # calibration images below which no threshold can promise 5 % false alarms: ceil(1 / 0.05) − 1
MANY = 5000  # files from which on even a digest of each takes seconds
RECENT = 2**28  # bytes of decoded images kept for the next tile
DTYPE = {"uint8": (0.0, 255.0), "uint16": UINT16}  # data.window=dtype
KEPT = 2**29  # bytes of images, at their size in the network, kept for the next epoch

log = logging.getLogger(__name__)


@dataclass(eq=False, repr=False)
class ImageData(LightningDataModule):
    """A data set of normal training images and mixed test images; subclasses say by `scan` which file is what.

    root: folder of the data set. category: its part to use, None for all there is. image_size, crop, resize: as `edge.geometry.Geometry`.
    protocol: "clean" holds out a share `calibration` of the normal training images, "paper" trains on all. window: range of
    the values of 16-bit and float images, "auto" (fitted to the training images), "dtype" (all of uint16), [lo, hi] or
    {dtype: [lo, hi]}. on_error: "stop" at the first image that cannot be used, or "skip" all of them. manifest: CSV that
    takes the place of the scan. region: mask of what is looked at, or folder of masks, see `Region`. InputError for a value that is none of
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
    region: str | Path | np.ndarray | None = None

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
        self.region = None if self.region is None else Region(self.region, self.root)
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
            found = f"{nearest(self.category, choices)}Found: {', '.join(choices) or 'none'}"
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
            if self.region:
                check_seen(~seen_of(self.region, self.root, sample, whole.shape[:2], recent.mask))
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
            self.ranges = fit_ranges(paths, self._looked_at if self.region else read)
        if self.window == "dtype":
            return DTYPE
        return window_in(self.ranges) if self.window == "auto" else self.window

    def _looked_at(self, path: Path) -> np.ndarray:
        """The pixels of an image that are looked at, (n,) or (n, 3)."""
        array = read(path)
        return array[self.region.seen(path, *array.shape[:2])]

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
        tiles = Tiles(samples, sizes, self.tile, self.overlap, self.root, self.window, self.geometry.side, self.region, fit)
        tiles.values = self.values
        return tiles

    def images(self, samples: list[Sample]) -> "Images":
        """The samples, decoded when asked for."""
        images = Images(samples, self.root, self.window, self.geometry, self.region)
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
            order = {"batch_sampler": Dealt(sampler, self.batch_size, self.process, self.processes)}
        elif dealt and self.processes > 1:
            order["sampler"] = range(self.process, len(dataset), self.processes)
            order["batch_size"] = max(1, self.batch_size // self.processes)
        return self._loader(dataset, order, collate, workers)

    def _pace(self, sampler: "Shuffled | ShuffledTiles") -> Sampler:
        return sampler if self.epoch_size is None else Paced(sampler, self.epoch_size)

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


def shuffled(items: Sequence, seed: int) -> list:
    """The items in the seeded order in which a data set without an official split draws one."""
    # a stream of its own: the hold-out for calibration draws from the plain seed
    return [items[i] for i in np.random.default_rng([seed, 1]).permutation(len(items))]


def drawn(items: Sequence, share: float, seed: int) -> list:
    """A seeded share of the items, one at least."""
    return shuffled(items, seed)[: max(1, round(share * len(items)))]


class Shuffled(Sampler):
    """An order of `count` rows drawn anew each epoch from seed and epoch alone, so that a resumed training sees what it would have seen."""

    def __init__(self, count: int, seed: int):
        self.count, self.seed, self.epoch = count, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch; who iterates by hand gets one epoch after the other."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(self.count, generator=stream(self.seed, self.epoch))
        self.epoch += 1
        return iter(order.tolist())


class Paced(Sampler):
    """`count` rows an epoch, of a sampler that draws an order of all rows for each epoch.

    Fewer than all are the first of that epoch's order. More are the next ones of all orders laid end to end, so that rows come equally
    often, but for one time. A resumed training sees what it would have seen. Within `whole` an epoch is every row once.
    """

    def __init__(self, sampler: Shuffled | ShuffledTiles, count: int):
        self.sampler, self.count, self.epoch, self.all = sampler, count, 0, False

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        self.all = True
        try:
            yield
        finally:
            self.all = False

    def __len__(self) -> int:
        return len(self.sampler) if self.all else self.count

    def __iter__(self) -> Iterator[int]:
        if self.all:
            self.sampler.set_epoch(0)
            yield from self.sampler
            return
        rows = len(self.sampler)
        order, seen = divmod(self.epoch * self.count, rows) if self.count > rows else (self.epoch, 0)
        self.epoch += 1
        left = self.count
        while left:
            self.sampler.set_epoch(order)
            part = list(islice(self.sampler, seen, seen + left))
            yield from part
            order, seen, left = order + 1, 0, left - len(part)


class Dealt(Sampler):
    """One process's share of every batch, so that all processes together see the batches that one alone would see, each image once.

    A last batch of fewer images than processes joins the one before. InputError if there are fewer images than processes.
    """

    def __init__(self, sampler: Shuffled | Paced, batch_size: int, process: int, processes: int):
        if len(sampler) < processes or batch_size < processes:
            found = f"{len(sampler)} images in batches of {batch_size} for {processes} processes"
            raise InputError(f"trainer.devices: {found}; expected an image of every batch for each")
        self.sampler, self.process, self.processes = sampler, process, processes
        self.starts = list(range(0, len(sampler), batch_size))  # of the batches of all processes
        if len(sampler) - self.starts[-1] < processes:
            self.starts.pop()

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[list[int]]:
        order = list(self.sampler)
        for start, end in zip(self.starts, [*self.starts[1:], len(order)], strict=True):
            yield order[start:end][self.process :: self.processes]


class Images(Dataset):
    """Rows (image (3, h, w) float32, label, mask (h, w) uint8, key) of the samples; a batch is decoded by several threads.

    Rows of batches that are asked for a second time, as in each epoch of a training, are kept up to KEPT bytes: decoding them again would
    cost more than a step on a GPU.
    """

    def __init__(self, samples: list[Sample], root: Path, window: dict, geometry: Geometry, region: Region | None = None):
        self.samples, self.root = samples, root
        self.window, self.geometry, self.region = window, geometry, region
        self.digests = {root / sample.path: sample.digest for sample in samples}
        self.recent = Recent(RECENT, digests=self.digests)
        self.values = ValueCheck({}, {})
        self.tile: int | None = None
        self.asked: set[int] = set()  # rows decoded once
        self.kept: dict[int, tuple] = {}  # the file's stamp, and the row with its image `compact`
        self.room = KEPT

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int, Tensor, str]:
        sample = self.samples[index]
        again = bool(sample.region)  # other tiles want the same files
        path = self.root / sample.path
        whole = (self.recent.read if again else self.recent.load)(path)
        load = self.recent.mask if again else read_mask
        self.values(path, whole, lambda: self.region and self.region.seen(path, *whole.shape[:2], load=load))
        array = cut(self.root, sample, whole)
        seen = seen_of(self.region, self.root, sample, whole.shape[:2], load) if self.region else None
        mask = self.truth_of(sample, whole.shape[:2], load)
        if self.tile is not None:
            array, mask = mirrored(array, self.tile), mirrored(mask, self.tile)
            seen = None if seen is None else mirrored(seen, self.tile)
        try:
            image, mask = prepare(array, self.window, self.geometry, seen), place_mask(torch.from_numpy(mask), self.geometry)
            if self.tile is None:
                check_seen(mask == OUTSIDE)
        except InputError as error:
            raise InputError(f"{self.root / sample.path}: {error}") from None
        return image, sample.label, mask, sample.key

    def truth_of(self, sample: Sample, whole: tuple[int, int], load: Callable[[Path], np.ndarray]) -> np.ndarray:
        """The mask (H, W) of a sample, see the function `truth`, with OUTSIDE where nothing is looked at."""
        mask = truth(self.root, sample, whole, load)
        return np.where(seen_of(self.region, self.root, sample, whole, load), mask, np.uint8(OUTSIDE)) if self.region else mask

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, int, Tensor, str]]:
        if get_worker_info() is not None:  # the processes are the threads
            return [self[index] for index in indices]
        groups: dict[str, list[int]] = {}  # tiles of one image stay with one thread, which decodes it once
        known = {index for index in set(indices) & self.kept.keys() if self.kept[index][0] == self._stamp(index)}
        for index in set(indices) - known:
            groups.setdefault(self.samples[index].path, []).append(index)
        rows = threaded(lambda group: [(index, self[index]) for index in group], list(groups.values()))
        by_index = dict(row for group in rows for row in group)
        if self.tile is None:  # tiles have their whole images in `recent`
            self._keep(by_index)
        return [by_index[index] if index in by_index else self._again(index) for index in indices]

    def _keep(self, rows: Mapping[int, tuple[Tensor, int, Tensor, str]]) -> None:
        for index in rows.keys() & self.asked:
            image, label, mask, key = rows[index]
            if index in self.kept:  # written anew, with the same content
                self.kept[index] = (self._stamp(index), *self.kept[index][1:])
            elif image[0].numel() + mask.nbytes <= self.room:  # a byte a pixel is the least
                image = compact(image)
                if (size := image.nbytes + mask.nbytes) <= self.room:
                    self.kept[index] = (self._stamp(index), image, label, mask, key)
                    self.room -= size
        self.asked |= rows.keys()

    def _again(self, index: int) -> tuple[Tensor, int, Tensor, str]:
        _, image, *rest = self.kept[index]
        return restored(image), *rest

    def _stamp(self, index: int) -> tuple[int, int, int] | None:
        """What changes with a sample's file: one that does is read again, and refused."""
        try:
            facts = (self.root / self.samples[index].path).stat()
        except OSError:
            return None
        return facts.st_mtime_ns, facts.st_size, facts.st_ino


class Tiles(Images):
    """Rows as `Images` has them, one for each tile of the samples, which are whole images; a batch's `path` holds the tiles' keys.

    A side below `tile` is continued by its mirror image. sizes: (width, height) by path. `fit`: without the tiles of
    which nothing is looked at. InputError for an image with no other tiles.
    """

    def __init__(
        self,
        samples: list[Sample],
        sizes: dict,
        tile: int,
        overlap: int,
        root: Path,
        window: dict,
        size: int | None,
        region: Region | None = None,
        fit: bool = False,
    ):
        cut_up = [tiles_of(sample, sizes[sample.path], tile, overlap) for sample in samples]
        if region:
            some = [self._with_something(region, root, tiles, sizes) for tiles in cut_up]
            cut_up = some if fit else cut_up
        super().__init__([one for tiles in cut_up for one in tiles], root, window, Geometry(size), region)
        self.tile, self.overlap, self.sizes = tile, overlap, sizes
        self.parents = {sample.path: sample for sample in samples}
        self.extents = [(len(tiles), math.prod(sizes[s.path])) for tiles, s in zip(cut_up, samples, strict=True)]  # tiles and pixels
        # as many images as ShuffledTiles mixes, and at least one with its mask
        self.recent = Recent(4 * MIXED, 2, self.digests)

    def _with_something(self, region: Region, root: Path, tiles: list[Sample], sizes: dict) -> list[Sample]:
        seen = region.seen(root / tiles[0].path, *sizes[tiles[0].path][::-1])
        try:
            check_seen(~seen)
        except InputError as error:
            raise InputError(f"{root / tiles[0].path}: {error}") from None
        return [tile for tile in tiles for x, y, w, h in [parse_region(tile.region)] if seen[y : y + h, x : x + w].any()]

    def truth(self, path: str) -> np.ndarray:
        """The mask (H, W) of a whole image, see `truth_of`."""
        return self.truth_of(self.parents[path], self.sizes[path][::-1], self.recent.mask)

    def seen(self, path: str) -> np.ndarray | None:
        """What is looked at of a whole image, (H, W) bool; None for all."""
        return None if self.region is None else self.region.seen(self.root / path, *self.sizes[path][::-1])

    def whole(self, path: str) -> Tensor:
        """A whole image (3, h, w) float32 in [0, 1], each pixel the mean of a block, `reduction` a side."""
        shown = bytes_of(self.recent.read(self.root / path), self.window)
        blocks = np.ascontiguousarray(mean_blocks(shown, reduction(self.sizes[path])))  # a grey image's are three times the same memory
        return torch.from_numpy(blocks).permute(2, 0, 1).float() / 255


class Batches(Dataset):
    """Whole batches, each of some rows of the tiles: where Lightning predicts, it takes no sampler of batches but its own."""

    def __init__(self, tiles: Tiles, rows: list[list[int]]):
        self.tiles, self.rows = tiles, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Batch:
        return collate(self.tiles.__getitems__(self.rows[index]))


class Recent:
    """The images and masks read last, up to a number of bytes and some at least, so that tiles of one image do not decode it each time.

    InputError for a file that is no longer what `digests` has for it.
    """

    def __init__(self, most: int, fewest: int = 1, digests: Mapping[Path, str] | None = None):
        self.most, self.fewest, self.digests = most, fewest, digests or {}
        self.arrays: OrderedDict[Path | tuple[Path], np.ndarray] = OrderedDict()
        self.lock = Lock()

    def read(self, path: Path) -> np.ndarray:
        return self._once(path, path, self.load)

    def mask(self, path: Path) -> np.ndarray:
        """The mask of a file, as `read_mask` has it."""
        return self._once((path,), path, read_mask)

    def _once(self, key: Path | tuple[Path], path: Path, load: Callable[[Path], np.ndarray]) -> np.ndarray:
        with self.lock:
            if key in self.arrays:
                self.arrays.move_to_end(key)
                return self.arrays[key]
        array = load(path)
        with self.lock:
            self.arrays[key] = array
            while len(self.arrays) > self.fewest and sum(kept.nbytes for kept in self.arrays.values()) > self.most:
                self.arrays.popitem(last=False)
        return array

    def load(self, path: Path) -> np.ndarray:
        """The image, whether it was read before or not."""
        return read(path, self.digests.get(path, ""))

    def __getstate__(self) -> dict:  # to a worker process go neither the lock nor the images
        return {"most": self.most, "fewest": self.fewest, "digests": self.digests}

    def __setstate__(self, state: dict) -> None:
        self.__init__(**state)


def collate(rows: list[tuple[Tensor, int, Tensor, str]]) -> Batch:
    """Rows of `Images` as one Batch; InputError if the images differ in size, which takes image_size=null."""
    image, label, mask, path = zip(*rows, strict=True)
    sizes = {tuple(one.shape[1:]): key for one, key in zip(image, path, strict=True)}
    if len(sizes) > 1:
        found = ", ".join(f"{key} {w}×{h}" for (h, w), key in sizes.items())
        raise InputError(f"image_size=null with images of several sizes in a batch ({found}); expected image_size=<pixels> or batch_size=1")
    # a copy is bound by memory: torch.stack shares it among threads that wait for each other, for long on a busy machine
    images, masks = (torch.from_numpy(np.stack([one.numpy() for one in many])) for many in (image, mask))
    return Batch(images, torch.tensor(label, dtype=torch.int64), masks, list(path), hidden=hidden_in(masks))


def hidden_in(mask: Tensor) -> Tensor | None:
    """Where masks (B, H, W) are OUTSIDE, None for nowhere."""
    hidden = mask == OUTSIDE
    return hidden if hidden.any() else None


def cut(root: Path, sample: Sample, array: np.ndarray) -> np.ndarray:
    """The sample's tile of its image (H, W, …), all of it without a region; InputError if the tile reaches beyond."""
    height, width = array.shape[:2]
    x, y, w, h = parse_region(sample.region) or (0, 0, width, height)
    if x + w > width or y + h > height:
        raise InputError(f"{root / sample.path}: the tile {sample.region} (x,y,w,h) is not inside its {width}×{height} pixels")
    return np.ascontiguousarray(array[y : y + h, x : x + w])


def truth(root: Path, sample: Sample, whole: tuple[int, int], load: Callable[[Path], np.ndarray]) -> np.ndarray:
    """The mask of a sample, uint8 of the size of its tile: the mask file, else the boxes, else 0 if normal and NO_TRUTH if not.

    `whole` is the (height, width) of the image, and `load` reads a mask; InputError if the mask file has another size.
    """
    height, width = whole
    x, y, w, h = parse_region(sample.region) or (0, 0, width, height)
    if sample.mask:
        mask = load(root / sample.mask)
        if mask.shape != whole:
            raise InputError(
                f"{root / sample.mask}: a mask of {mask.shape[1]}×{mask.shape[0]} pixels for the image {root / sample.path} "
                f"of {width}×{height}; expected the same size"
            )
        return np.ascontiguousarray(mask[y : y + h, x : x + w])
    mask = np.full((h, w), 0 if sample.label == NORMAL or sample.boxes else NO_TRUTH, dtype=np.uint8)
    for x1, y1, x2, y2 in parse_boxes(sample.boxes):
        mask[max(y1 - y, 0) : max(y2 - y, 0), max(x1 - x, 0) : max(x2 - x, 0)] = 1
    return mask


def seen_of(region: Region, root: Path, sample: Sample, whole: tuple[int, int], load: Callable[[Path], np.ndarray]) -> np.ndarray:
    """What is looked at of a sample, (H, W) bool of its tile, in an image of the size `whole`."""
    return region.seen(root / sample.path, *whole, parse_region(sample.region), load)


def threaded(work: Callable, items: Sequence, told: str | None = None) -> list:
    """work(item) for all items, in order, by at most 8 threads: reading and decoding let go of the interpreter's lock.

    `told` names the work on a progress bar.
    """
    threads = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 8, len(items))
    if threads < 2:
        return [work(item) for item in items]
    with ThreadPoolExecutor(threads) as pool:
        done = pool.map(work, items)
        screen = Console(stderr=True)
        return list(track(done, told or "", len(items), console=screen, transient=True, disable=not (told and screen.is_terminal)))


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
