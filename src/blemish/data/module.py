"""The data module: from a scan of files to splits, and from splits to batches."""

import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from blemish.data import contradictions, knowledge
from blemish.data.dataset import Images, TileBatches, Tiles, collate, threaded
from blemish.data.images import check_not_all_ignored
from blemish.data.manifest import Sample, lines_of, manifest_digest, read_manifest, with_defect
from blemish.data.ranges import ValueCheck, fit_ranges, window_in
from blemish.data.roi import Roi
from blemish.data.samplers import ShardedBatchSampler, Shuffled
from blemish.edge.checks import LARGEST_SEED, check_choice, check_number, check_whole, nearest
from blemish.edge.errors import InputError
from blemish.edge.geometry import RESIZES, UINT16, Geometry
from blemish.edge.ranges import Range
from blemish.edge.reading import file_digest, read
from blemish.types import NORMAL, Batch

FEWEST = 19  # calibration images below which no threshold can promise 5 % false alarms: ceil(1 / 0.05) − 1
MANY = 5000  # files whose digests take so long that a progress bar is shown
DTYPE = {"uint8": (0.0, 255.0), "uint16": UINT16}  # data.window=dtype

log = logging.getLogger(__name__)


@dataclass(eq=False, repr=False)
class ImageData(LightningDataModule):
    """A data set of normal training images and mixed test images; a subclass lists its files in `scan`.

    root: folder of the data set. category: a part of it, None for all of it. image_size, crop, resize: see `edge.geometry.Geometry`.
    protocol: "clean" holds out a share `calibration` of the normal training images, "paper" trains on all, "unlabelled"
    on the test images. window: value range of 16-bit
    and float images, "auto" (fitted to the training images), "dtype" (all of uint16), [lo, hi] or {dtype: [lo, hi]}. on_error: "stop" at
    the first unusable image, or "skip" them. manifest: CSV that replaces the scan. roi: a mask or a folder of masks, see `Roi`. shots,
    defects, contamination: see `knowledge.limit`.
    InputError for any other value.

    Set up, it has samples, digest (of the manifest), ranges (of the values of the training images by dtype, unless set before), window
    ((lo, hi) by dtype) and skipped (reason by key).
    """

    name: ClassVar[str]  # as in configs/data/<name>.yaml
    published: ClassVar[str]  # citation and where the images are published
    layout: ClassVar[str]  # the folders and files expected under the root, in several lines
    needs_category: ClassVar[bool] = False
    source: ClassVar[Callable[[Path], np.ndarray] | None] = None  # of the pixels, None for files with the digests of the manifest

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
    shots: int | None = None
    defects: int | Sequence[str] = 0
    contamination: float = 0.0

    def __post_init__(self) -> None:
        super().__init__()
        check_choice("", ("clean", "paper", "unlabelled"), protocol=self.protocol)
        check_choice("data", ("stop", "skip"), on_error=self.on_error)
        check_number("data", "(0, 1)", calibration=self.calibration)
        check_whole("", 8, also=(None,), image_size=self.image_size)
        check_whole("", 8, self.image_size, also=(None,), crop=self.crop)
        check_choice("", RESIZES, resize=self.resize)
        check_whole("", 1, batch_size=self.batch_size)
        check_whole("", 0, workers=self.workers)
        check_whole("", 0, LARGEST_SEED, seed=self.seed)
        knowledge.check(self.shots, self.defects, self.contamination)
        if self.protocol == "unlabelled" and self.knowledge:
            raise InputError(f"protocol=unlabelled: fits to the test images; expected clean or paper with {self.knowledge}")
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
        self.process, self.processes = 0, 1  # this process's number, and how many share the batches
        self.set_loading(None, 0, None)

    def set_loading(self, tile: int | None, overlap: int, epoch_size: int | None) -> None:
        """Let the loaders cut images into tiles of side `tile`, None for whole images, and draw `epoch_size` images or tiles an epoch.

        InputError for values that cannot be used. The samples remain whole images.
        """
        check_whole("", 8, also=(None,), tiling=tile)
        check_whole("", 0, tile and tile - 1, overlap=overlap)
        check_whole("", 1, also=(None,), epoch_size=epoch_size)
        self.tile, self.overlap, self.epoch_size = tile, overlap, epoch_size

    @property
    def knowledge(self) -> str | None:
        """What differs from training on all normal images in words, as "4 shots"; None if nothing does."""
        return knowledge.describe(self.shots, self.defects, self.contamination)

    def scan(self) -> list[Sample]:
        """All samples below self.folder(), with paths relative to self.root and splits "train", "test" or "unlabelled"."""
        raise NotImplementedError

    def categories(self) -> list[str]:
        """The valid categories, by default the folders below the root."""
        return sorted(path.name for path in self.root.iterdir() if path.is_dir() and not path.name.startswith("."))

    def folder(self) -> Path:
        """root/category; InputError for a missing root or an unknown category."""
        self.check_categories([self.category] if self.category else [])
        return self.root / (self.category or "")

    def check_categories(self, names: Sequence[str]) -> None:
        if not self.root.is_dir():
            raise self.missing(f"{self.root}: no such folder")
        choices = self.categories() if names or self.needs_category else []
        found = f"found {', '.join(choices) or 'none'}"
        if self.needs_category and not names:
            raise self.missing(f"data.category=null: expected one in {self.root}; {found}")
        for name in names:
            if name not in choices:
                raise self.missing(f"{self.root}: no category {name!r}; {nearest(name, choices)}{found}")

    def missing(self, found: str) -> InputError:
        """An error about absent data: what was found, the layout, where the data is published."""
        return InputError(
            f"{found}\n{self.name} expects\n{self.layout.strip(chr(10))}\n"
            f"Published: {self.published}\nSet data.root=<folder> to your copy, data.category=<name> to a part of it."
        )

    def relative(self, path: Path) -> str:
        """A path as in the manifest; InputError for one outside the root."""
        if not path.is_relative_to(self.root) or ".." in path.relative_to(self.root).parts:
            raise InputError(f"{path}: outside of data.root={self.root}; expected a path below it")
        return path.relative_to(self.root).as_posix()

    def setup(self, stage: str | None = None) -> None:
        """List and split the samples and fit the window, once; InputError if there is nothing to train on or to test."""
        if self.digest:
            return
        samples, fitted = self.samples or self.listed(), self.split_of("train")
        for split in (fitted, "test"):
            if not any(sample.split == split for sample in samples):
                raise self.missing(f"{self.manifest or self.folder()}: no {split} image; {self.explain(split, samples)}")
        self.check_truth(samples, fitted)
        fixed = bool(self.ranges)  # by the run that is tested again or updated
        if not fixed:
            paths = sorted({sample.path for sample in samples if sample.split == fitted})
            self.ranges = fit_ranges([self.root / path for path in paths], self.values_in_roi)
        named = {"dtype": DTYPE, "auto": window_in(self.ranges)}
        self.window = named[self.window] if isinstance(self.window, str) else self.window
        self.values = ValueCheck(self.ranges, self.window, "" if fixed else "data.window")
        self.samples, self.digest = samples, manifest_digest(samples)
        self._by_key = {sample.key: sample for sample in samples}

    def check_truth(self, samples: Sequence[Sample], fitted: str) -> None:
        """InputError for labels that cannot be true, a warning of files with the same content."""
        wrong, same = found = contradictions.find(samples, self.root, fitted)
        if wrong:
            sample, reason = wrong[0]
            line = f"{self.manifest}, line {lines_of(self.manifest)[sample.key]}: " if self.manifest else ""
            more = f" ({len(wrong)} such rows, listed by `data check`)" if len(wrong) > 1 else ""
            raise InputError(f"{line}{self.root / sample.key}: {reason}{more}")
        if same:
            log.warning("files with the content of another: %s; `data check` lists them", found.counts)

    def explain(self, split: str, samples: Sequence[Sample]) -> str:
        """Why a split has no sample."""
        counts = Counter(sample.split for sample in samples)
        return f"found {', '.join(f'{count} {name}' for name, count in sorted(counts.items())) or 'no images at all'}"

    def listed(self) -> list[Sample]:
        """The samples with digests and splits, even if there are too few for `setup`."""
        self.folder()
        samples = map(with_defect, read_manifest(self.manifest) if self.manifest else self.scan())
        samples = sorted(samples, key=lambda sample: sample.key)
        paths = sorted({sample.path for sample in samples})
        digests = dict(zip(paths, threaded(self._digest_of, paths, "digests" if len(paths) > MANY else None), strict=True))
        for sample in samples:
            if sample.digest and digests[sample.path] and sample.digest != digests[sample.path]:
                found = f"digest {digests[sample.path]}, there {sample.digest}"
                raise InputError(f"{self.root / sample.path}: changed since the manifest {self.manifest} was written ({found})")
        samples = [sample._replace(digest=digests[sample.path]) for sample in samples]
        samples = self._without_unusable(samples) if self.on_error == "skip" else samples
        return self._held_out(knowledge.limit(samples, self.shots, self.defects, self.contamination, self.seed))

    def _digest_of(self, path: str) -> str:
        try:
            return file_digest(self.root / path)
        except OSError as error:
            if self.on_error == "skip":
                return ""  # `_without_unusable` finds the reason
            listed = f"; listed in the manifest {self.manifest}" if self.manifest else ""
            raise InputError(f"{self.root / path}: cannot be read ({error.strerror}){listed}; expected an image file") from error

    def _without_unusable(self, samples: list[Sample]) -> list[Sample]:
        images = self.images([sample for sample in samples if sample.split != "skipped"])
        reasons = threaded(lambda sample: _reason(images, sample), images.samples, "reading every image")
        self.skipped = {sample.key: reason for sample, reason in zip(images.samples, reasons, strict=True) if reason}
        for key, reason in self.skipped.items():
            log.warning("skipped %s: %s", key, reason)
        if self.skipped:
            log.warning("skipped %d of %d images (data.on_error=skip)", len(self.skipped), len(images))
        return [sample._replace(split="skipped") if sample.key in self.skipped else sample for sample in samples]

    def _held_out(self, samples: list[Sample]) -> list[Sample]:
        if self.protocol != "clean":
            return [sample._replace(split="train") if sample.split == "calibrate" else sample for sample in samples]
        if any(sample.split == "calibrate" for sample in samples):  # a manifest with a hold-out of its own
            return samples
        normal = sorted({sample.path for sample in samples if sample.split == "train" and sample.label == NORMAL})
        out = held_out(normal, self.calibration, self.seed)
        return [s._replace(split="calibrate") if s.split == "train" and s.path in out else s for s in samples]

    def values_in_roi(self, image: Path | np.ndarray, load: Callable = read) -> np.ndarray:
        """The pixels of an image, those in the ROI alone if there is one: (n,) or (n, 3)."""
        array = load(image)
        return array if self.roi is None else array[self.roi.inside(image, *array.shape[:2])]

    def split_of(self, split: str) -> str:
        """The split in the manifest of a loader's: with protocol=unlabelled, "train" has the test images, without their labels."""
        return "test" if split == "train" and self.protocol == "unlabelled" else split

    def samples_of(self, split: str) -> list[Sample]:
        return [sample for sample in self.samples if sample.split == self.split_of(split)]

    def sample(self, key: str) -> Sample:
        """The sample with a key, as in Batch.path."""
        return self._by_key[key]

    def image(self, key: str) -> Tensor:
        """The network input (3, h, w) of a sample; with tiles, the whole image, reduced as its map is."""
        samples = [self.sample(key)]
        return self.images(samples)[0][0] if self.tile is None else self.tiles(samples).whole(key)

    def images(self, samples: list[Sample]) -> Images:
        return Images(samples, self.root, self.window, self.geometry, self.roi, self.values, self.source)

    def tiles(self, samples: list[Sample], fit: bool = False) -> Tiles:
        """The tiles of the samples; `fit` leaves out those outside the ROI."""
        geometry = Geometry(self.geometry.side)
        how = {"tile": self.tile, "overlap": self.overlap, "fit": fit}
        return Tiles(samples, self.root, self.window, geometry, self.roi, self.values, self.source, **how)

    def loader(self, split: str, shuffle: bool = False, sharded: bool = True) -> DataLoader:
        """Batches of a split, in the order of the manifest or shuffled with the seed in each epoch.

        sharded: where several processes share the batches, only this process's share of each. Tiles that are not shuffled come image by
        image, and no batch has tiles of two images.
        """
        samples = self.samples_of(split)
        if self.tile is None:
            return self.batches(self.images(samples), shuffle, collate, self.workers, sharded)
        if self.processes > 1:
            raise InputError(f"tiling={self.tile}: {self.processes} processes cannot share an image; expected trainer.devices=1")
        tiles = self.tiles(samples, fit=shuffle)
        if shuffle:
            return self.batches(tiles, True, collate, self.workers, draw=tiles.shuffled)
        return self._loader(TileBatches(tiles, self.batch_size), itemgetter(0), self.workers, batch_size=1)

    def batches(
        self,
        dataset: Dataset,
        shuffle: bool,
        collate: Callable[[list], Batch],
        workers: int,
        sharded: bool = True,
        draw: Callable[[torch.Generator], list[int]] | None = None,
    ) -> DataLoader:
        """A loader of any dataset; batch_size is that of all processes together, `draw` as for `Shuffled`."""
        processes = self.processes if sharded else 1
        sampler = Shuffled(len(dataset), self.seed, self.epoch_size, draw) if shuffle else None
        if processes == 1:
            return self._loader(dataset, collate, workers, sampler=sampler, batch_size=self.batch_size)
        if shuffle:
            sampler = ShardedBatchSampler(sampler, self.batch_size, self.process, processes)
            return self._loader(dataset, collate, workers, batch_sampler=sampler)
        rows = range(self.process, len(dataset), processes)
        return self._loader(dataset, collate, workers, sampler=rows, batch_size=max(1, self.batch_size // processes))

    def _loader(self, dataset: Dataset, collate: Callable[[list], Batch], workers: int, **order) -> DataLoader:
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


def _reason(images: Images, sample: Sample) -> str:
    """Why a sample cannot be used, "" if it can."""
    try:
        _, _, inside = images.decode(sample)
        if inside is not None:
            check_not_all_ignored(~inside)
    except InputError as error:
        return str(error)
    return ""


def held_out(paths: Sequence[str], share: float, seed: int) -> set[str]:
    """The images to calibrate with: max(⌈share·N⌉, 19) of N, but at most a quarter, and at least one of two or more."""
    count = min(max(math.ceil(round(share * len(paths), 9)), FEWEST), len(paths) // 4)
    count = max(count, 1) if len(paths) > 1 else 0
    return {paths[i] for i in np.random.default_rng(seed).permutation(len(paths))[:count]}


def plain_window(window: str | Sequence[float] | Mapping[str, Sequence[float]]) -> str | dict[str, tuple[float, float]]:
    """A window as (lo, hi) by dtype, or "auto" or "dtype" unchanged; InputError for anything else."""
    wrong = InputError(f"data.window={window}: expected auto, dtype, [lo, hi] with lo < hi, or {{uint16: [lo, hi], float32: [lo, hi]}}")
    if isinstance(window, str):
        if window in ("auto", "dtype"):
            return window
        raise wrong
    try:
        ranges = window if isinstance(window, Mapping) else {"uint16": window, "float32": window}
        plain = {dtype: (float(lo), float(hi)) for dtype, (lo, hi) in ranges.items()}
    except (TypeError, ValueError):
        raise wrong from None
    for dtype, (lo, hi) in plain.items():
        allowed = (lo, hi) == DTYPE["uint8"] if dtype == "uint8" else dtype in ("uint16", "float32")
        if not (allowed and lo < hi and math.isfinite(hi - lo)):
            raise wrong
    return plain
