"""Datasets whose rows are decoded images, or tiles of them, at the size of the network."""

import math
import os
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from blemish.data.images import check_not_all_ignored, compact, mask_to_network, prepare, restored
from blemish.data.manifest import Sample, parse_boxes, parse_tile
from blemish.data.masks import read_mask
from blemish.data.ranges import ValueCheck
from blemish.data.roi import Roi
from blemish.data.samplers import shuffle_tiles
from blemish.data.tiles import bytes_of, mean_blocks, reduction, tiles_of
from blemish.edge.errors import InputError, named
from blemish.edge.geometry import Geometry, mirrored
from blemish.edge.reading import read, size_of
from blemish.types import IGNORED, NO_TRUTH, NORMAL, Batch

MIXED = 2**27  # pixels: tiles are shuffled among as many images as have so many together, which stay decoded
RECENT = 2**28  # bytes of decoded images that stay in memory for the next tile
KEPT = 2**29  # bytes of network inputs that stay in memory for the next epoch

Row = tuple[Tensor, int, Tensor, str]  # image (3, h, w) float32 in [0, 1], label, mask (h, w) uint8, key


class Files(NamedTuple):
    """Where pixels come from: image files, which must still have the digests that they had."""

    digests: Mapping[Path, str]

    def __call__(self, path: Path) -> np.ndarray:
        return read(path, self.digests.get(path, ""))

    def size(self, path: Path) -> tuple[int, int]:
        """(width, height) in pixels."""
        return size_of(path)

    def name(self, path: Path) -> str:
        """What an image is called in messages."""
        return str(path)


@dataclass(eq=False)
class Images(Dataset):
    """A `Row` for each sample; the images of a batch are decoded by several threads.

    source: reads an image given its path, see `Files`. Rows that are asked for a second time, as in the second epoch of a training, stay in
    memory up to KEPT bytes: decoding takes longer than a training step on a GPU.
    """

    samples: list[Sample]
    root: Path
    window: dict
    geometry: Geometry
    roi: Roi | None = None
    values: ValueCheck = field(default_factory=lambda: ValueCheck({}, {}))
    source: Callable[[Path], np.ndarray] | None = None
    tile: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        self.source = self.source or Files({self.root / sample.path: sample.digest for sample in self.samples})
        self.recent = Recent(RECENT)
        self.decoded: set[int] = set()  # rows that were asked for
        self.kept: dict[int, tuple] = {}  # by row: the stamp of its file, and the row with its image `compact`
        self.room = KEPT

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Row:
        sample = self.samples[index]
        array, mask, inside = self.decode(sample)
        if self.tile is not None:
            array, mask, inside = (one if one is None else mirrored(one, self.tile) for one in (array, mask, inside))
        with named(self.source.name(self.root / sample.path)):
            image, mask = prepare(array, self.window, self.geometry, inside), mask_to_network(torch.from_numpy(mask), self.geometry)
            if self.tile is None:
                check_not_all_ignored(mask == IGNORED)
        return image, sample.label, mask, sample.key

    def decode(self, sample: Sample) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """The pixels (H, W, …) of a sample, its mask (H, W) uint8 and its ROI (H, W) bool, None for all; InputError if one is unusable."""
        path = self.root / sample.path
        array = self.recent(path, self.source) if sample.tile else self.source(path)  # other tiles want the same file
        size = array.shape[:2]
        self.values(self.source.name(path), array, lambda: self._inside(sample._replace(tile=""), size))
        return cut(self.root, sample, array), self.mask(sample, size), self._inside(sample, size)

    def mask(self, sample: Sample, size: tuple[int, int]) -> np.ndarray:
        """The mask (H, W) uint8 of a sample, of the size of its tile: from its mask file, else its boxes, else its label.

        size: (height, width) of the image, which a mask file must have. IGNORED outside the ROI, NO_TRUTH where a mask is missing.
        """
        x, y, w, h = parse_tile(sample.tile) or (0, 0, *size[::-1])
        if sample.mask:
            mask = self._read_mask(self.root / sample.mask, sample)
            if mask.shape != size:
                found = f"{mask.shape[1]}×{mask.shape[0]} pixels for the image {self.root / sample.path} of {size[1]}×{size[0]}"
                raise InputError(f"{self.root / sample.mask}: a mask of {found}; expected the same size")
            mask = np.ascontiguousarray(mask[y : y + h, x : x + w])
        else:
            mask = np.full((h, w), 0 if sample.label == NORMAL or sample.boxes else NO_TRUTH, dtype=np.uint8)
            for x1, y1, x2, y2 in parse_boxes(sample.boxes):
                mask[max(y1 - y, 0) : max(y2 - y, 0), max(x1 - x, 0) : max(x2 - x, 0)] = 1
        inside = self._inside(sample, size)
        return mask if inside is None else np.where(inside, mask, np.uint8(IGNORED))

    def _read_mask(self, path: Path, sample: Sample) -> np.ndarray:
        return self.recent(path, read_mask) if sample.tile or self.tile else read_mask(path)

    def _inside(self, sample: Sample, size: tuple[int, int]) -> np.ndarray | None:
        load = partial(self._read_mask, sample=sample)
        return self.roi and self.roi.inside(self.root / sample.path, *size, parse_tile(sample.tile), load)

    def __getitems__(self, indices: list[int]) -> list[Row]:
        if get_worker_info() is not None:  # the worker processes take the place of threads
            return [self[index] for index in indices]
        rows = {index: self._kept(index) for index in set(indices)}
        groups = defaultdict(list)  # tiles of an image stay with one thread, which decodes it once
        for index in rows:
            if rows[index] is None:
                groups[self.samples[index].path].append(index)
        for group in threaded(lambda group: [(index, self[index]) for index in group], list(groups.values())):
            for index, row in group:
                rows[index] = row
                if self.tile is None:  # the images of tiles are in `recent`
                    self._keep(index, *row)
        return [rows[index] for index in indices]

    def _keep(self, index: int, image: Tensor, *rest: int | Tensor | str) -> None:
        old = self.kept.pop(index, None)
        self.room += 0 if old is None else _bytes_of(old)
        if index in self.decoded and image[0].numel() <= self.room:
            new = (self._stamp(index), compact(image), *rest)
            if _bytes_of(new) <= self.room:
                self.kept[index] = new
                self.room -= _bytes_of(new)
        self.decoded.add(index)

    def _kept(self, index: int) -> Row | None:
        if index not in self.kept or self.kept[index][0] != self._stamp(index):
            return None
        _, image, *rest = self.kept[index]
        return restored(image), *rest

    def _stamp(self, index: int) -> tuple[int, int, int] | None:
        """Changes with a sample's file, which is then read again and refused if its content has changed."""
        try:
            stat = (self.root / self.samples[index].path).stat()
        except OSError:
            return None
        return stat.st_mtime_ns, stat.st_size, stat.st_ino


def _bytes_of(kept: tuple) -> int:
    return kept[1].nbytes + kept[3].nbytes


@dataclass(eq=False, kw_only=True)
class Tiles(Images):
    """A `Row` for each tile of the samples, which are whole images; sides shorter than `tile` are continued by mirroring.

    fit: leaves out tiles outside the ROI. InputError for an image without a pixel in its ROI.
    """

    overlap: int
    fit: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        whole, self.parents = self.samples, {sample.path: sample for sample in self.samples}
        sizes = threaded(lambda sample: self.source.size(self.root / sample.path), whole)
        self.sizes = {sample.path: size for sample, size in zip(whole, sizes, strict=True)}  # (width, height)
        tiles = [self._checked(tiles_of(sample, size, self.tile, self.overlap)) for sample, size in zip(whole, sizes, strict=True)]
        self.counts, self.pixels = [len(some) for some in tiles], [math.prod(size) for size in sizes]  # of each image
        self.samples = [one for some in tiles for one in some]
        self.recent = Recent(4 * MIXED, 2)  # the images among which `shuffled` mixes, and at least one with its mask

    def _checked(self, tiles: list[Sample]) -> list[Sample]:
        inside = self.inside(tiles[0].path)
        if inside is None:
            return tiles
        with named(self.root / tiles[0].path):
            check_not_all_ignored(~inside)
        parts = [parse_tile(tile.tile) for tile in tiles]
        return [tile for tile, (x, y, w, h) in zip(tiles, parts, strict=True) if not self.fit or inside[y : y + h, x : x + w].any()]

    def shuffled(self, generator: torch.Generator) -> list[int]:
        """A random order of the tiles in which few enough images are mixed to stay decoded."""
        return shuffle_tiles(self.counts, self.pixels, MIXED, generator)

    def truth(self, path: str) -> np.ndarray:
        """The mask (H, W) of a whole image, see `mask`."""
        return self.mask(self.parents[path], self.sizes[path][::-1])

    def inside(self, path: str) -> np.ndarray | None:
        """The ROI (H, W) bool of a whole image, None for all of it."""
        return self._inside(self.parents[path], self.sizes[path][::-1])

    def whole(self, path: str) -> Tensor:
        """A whole image (3, h, w) float32 in [0, 1], each pixel the mean of a block with a side of `reduction` pixels."""
        shown = bytes_of(self.recent(self.root / path, self.source), self.window)
        blocks = np.ascontiguousarray(mean_blocks(shown, reduction(self.sizes[path])))  # a grey image's are three times the same memory
        return torch.from_numpy(blocks).permute(2, 0, 1).float() / 255


class TileBatches(Dataset):
    """Batches of consecutive tiles, each of one image; for prediction, where Lightning accepts no batch sampler but its own."""

    def __init__(self, tiles: Tiles, batch_size: int):
        self.tiles, self.rows = tiles, batches_by_image(tiles.counts, batch_size)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Batch:
        return collate(self.tiles.__getitems__(self.rows[index]))


def batches_by_image(counts: Sequence[int], batch_size: int) -> list[list[int]]:
    """Batches of consecutive rows, none of which has rows of two images; `counts` are the rows of each image."""
    rows = np.split(np.arange(sum(counts)), np.cumsum(counts)[:-1])
    return [some[i : i + batch_size].tolist() for some in rows for i in range(0, len(some), batch_size)]


class Recent:
    """The arrays read last, up to a number of bytes but at least `fewest`, so that tiles of one image do not decode it each time."""

    def __init__(self, most: int, fewest: int = 1):
        self.most, self.fewest = most, fewest
        self.arrays: OrderedDict[tuple[Path, bool], np.ndarray] = OrderedDict()
        self.lock = Lock()

    def __call__(self, path: Path, load: Callable[[Path], np.ndarray]) -> np.ndarray:
        key = path, load is read_mask
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

    def __reduce__(self) -> tuple:  # neither the lock nor the arrays go to a worker process
        return Recent, (self.most, self.fewest)


def collate(rows: list[Row]) -> Batch:
    """One Batch of the rows; InputError if their images differ in size."""
    image, label, mask, path = zip(*rows, strict=True)
    sizes = {tuple(one.shape[1:]): key for one, key in zip(image, path, strict=True)}
    if len(sizes) > 1:
        found = ", ".join(f"{key} {w}×{h}" for (h, w), key in sizes.items())
        raise InputError(f"image_size=null with images of several sizes in a batch ({found}); expected image_size=<pixels> or batch_size=1")
    # numpy: torch.stack shares a copy, which is bound by memory, among threads that then wait for each other
    images, masks = (torch.from_numpy(np.stack([one.numpy() for one in many])) for many in (image, mask))
    return Batch(images, torch.tensor(label, dtype=torch.int64), masks, list(path), ignore_mask=ignore_mask_of(masks))


def ignore_mask_of(mask: Tensor) -> Tensor | None:
    """Where masks (B, H, W) are IGNORED, None if nowhere."""
    ignore_mask = mask == IGNORED
    return ignore_mask if ignore_mask.any() else None


def cut(root: Path, sample: Sample, array: np.ndarray) -> np.ndarray:
    """A sample's tile of its image (H, W, …), or all of it; InputError if the tile is not inside."""
    height, width = array.shape[:2]
    x, y, w, h = parse_tile(sample.tile) or (0, 0, width, height)
    if x + w > width or y + h > height:
        raise InputError(f"{root / sample.path}: the tile {sample.tile} (x,y,w,h) is not inside its {width}×{height} pixels")
    return np.ascontiguousarray(array[y : y + h, x : x + w])


def threaded(work: Callable, items: Sequence, title: str | None = None) -> list:
    """work(item) for all items in order, in at most 8 threads; decoding releases the interpreter's lock. A title shows a progress bar."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = min(cores, 8, len(items))
    if threads < 2:
        return [work(item) for item in items]
    with ThreadPoolExecutor(threads) as pool:
        screen = Console(stderr=True)
        silent = not (title and screen.is_terminal)
        return list(track(pool.map(work, items), title or "", len(items), console=screen, transient=True, disable=silent))
