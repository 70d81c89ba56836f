"""Decoded images and tiles as rows of a batch."""

import math
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from blemish.data.images import check_some_inside, compact, mask_to_network, prepare, restored
from blemish.data.manifest import Sample, parse_boxes, parse_tile
from blemish.data.masks import read_mask
from blemish.data.ranges import ValueCheck
from blemish.data.roi import Roi
from blemish.data.tiles import MIXED, bytes_of, mean_blocks, reduction, tiles_of
from blemish.edge.errors import InputError
from blemish.edge.geometry import Geometry, mirrored
from blemish.edge.reading import read
from blemish.types import IGNORED, NO_TRUTH, NORMAL, Batch

RECENT = 2**28  # bytes of decoded images kept for the next tile


KEPT = 2**29  # bytes of images, at their size in the network, kept for the next epoch


class Images(Dataset):
    """Rows (image (3, h, w) float32, label, mask (h, w) uint8, key) of the samples; a batch is decoded by several threads.

    Rows of batches that are asked for a second time, as in each epoch of a training, are kept up to KEPT bytes: decoding them again would
    cost more than a step on a GPU.
    """

    def __init__(self, samples: list[Sample], root: Path, window: dict, geometry: Geometry, roi: Roi | None = None):
        self.samples, self.root = samples, root
        self.window, self.geometry, self.roi = window, geometry, roi
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
        again = bool(sample.tile)  # other tiles want the same files
        path = self.root / sample.path
        whole = (self.recent.read if again else self.recent.load)(path)
        load = self.recent.mask if again else read_mask
        self.values(path, whole, lambda: self.roi and self.roi.inside(path, *whole.shape[:2], load=load))
        array = cut(self.root, sample, whole)
        inside = inside_of(self.roi, self.root, sample, whole.shape[:2], load) if self.roi else None
        mask = self.truth_of(sample, whole.shape[:2], load)
        if self.tile is not None:
            array, mask = mirrored(array, self.tile), mirrored(mask, self.tile)
            inside = None if inside is None else mirrored(inside, self.tile)
        try:
            image, mask = prepare(array, self.window, self.geometry, inside), mask_to_network(torch.from_numpy(mask), self.geometry)
            if self.tile is None:
                check_some_inside(mask == IGNORED)
        except InputError as error:
            raise InputError(f"{self.root / sample.path}: {error}") from None
        return image, sample.label, mask, sample.key

    def truth_of(self, sample: Sample, whole: tuple[int, int], load: Callable[[Path], np.ndarray]) -> np.ndarray:
        """The mask (H, W) of a sample, see the function `truth`, with IGNORED where nothing is looked at."""
        mask = truth(self.root, sample, whole, load)
        return np.where(inside_of(self.roi, self.root, sample, whole, load), mask, np.uint8(IGNORED)) if self.roi else mask

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
            metadata = (self.root / self.samples[index].path).stat()
        except OSError:
            return None
        return metadata.st_mtime_ns, metadata.st_size, metadata.st_ino


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
        roi: Roi | None = None,
        fit: bool = False,
    ):
        cut_up = [tiles_of(sample, sizes[sample.path], tile, overlap) for sample in samples]
        if roi:
            some = [self._with_something(roi, root, tiles, sizes) for tiles in cut_up]
            cut_up = some if fit else cut_up
        super().__init__([one for tiles in cut_up for one in tiles], root, window, Geometry(size), roi)
        self.tile, self.overlap, self.sizes = tile, overlap, sizes
        self.parents = {sample.path: sample for sample in samples}
        self.extents = [(len(tiles), math.prod(sizes[s.path])) for tiles, s in zip(cut_up, samples, strict=True)]  # tiles and pixels
        # as many images as ShuffledTiles mixes, and at least one with its mask
        self.recent = Recent(4 * MIXED, 2, self.digests)

    def _with_something(self, roi: Roi, root: Path, tiles: list[Sample], sizes: dict) -> list[Sample]:
        inside = roi.inside(root / tiles[0].path, *sizes[tiles[0].path][::-1])
        try:
            check_some_inside(~inside)
        except InputError as error:
            raise InputError(f"{root / tiles[0].path}: {error}") from None
        return [tile for tile in tiles for x, y, w, h in [parse_tile(tile.tile)] if inside[y : y + h, x : x + w].any()]

    def truth(self, path: str) -> np.ndarray:
        """The mask (H, W) of a whole image, see `truth_of`."""
        return self.truth_of(self.parents[path], self.sizes[path][::-1], self.recent.mask)

    def inside(self, path: str) -> np.ndarray | None:
        """What is looked at of a whole image, (H, W) bool; None for all."""
        return None if self.roi is None else self.roi.inside(self.root / path, *self.sizes[path][::-1])

    def whole(self, path: str) -> Tensor:
        """A whole image (3, h, w) float32 in [0, 1], each pixel the mean of a block, `reduction` a side."""
        shown = bytes_of(self.recent.read(self.root / path), self.window)
        blocks = np.ascontiguousarray(mean_blocks(shown, reduction(self.sizes[path])))  # a grey image's are three times the same memory
        return torch.from_numpy(blocks).permute(2, 0, 1).float() / 255


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
    return Batch(images, torch.tensor(label, dtype=torch.int64), masks, list(path), ignore_mask=ignore_mask_of(masks))


def ignore_mask_of(mask: Tensor) -> Tensor | None:
    """Where masks (B, H, W) are IGNORED, None for nowhere."""
    ignore_mask = mask == IGNORED
    return ignore_mask if ignore_mask.any() else None


def cut(root: Path, sample: Sample, array: np.ndarray) -> np.ndarray:
    """The sample's tile of its image (H, W, …), all of it without a roi; InputError if the tile reaches beyond."""
    height, width = array.shape[:2]
    x, y, w, h = parse_tile(sample.tile) or (0, 0, width, height)
    if x + w > width or y + h > height:
        raise InputError(f"{root / sample.path}: the tile {sample.tile} (x,y,w,h) is not inside its {width}×{height} pixels")
    return np.ascontiguousarray(array[y : y + h, x : x + w])


def truth(root: Path, sample: Sample, whole: tuple[int, int], load: Callable[[Path], np.ndarray]) -> np.ndarray:
    """The mask of a sample, uint8 of the size of its tile: the mask file, else the boxes, else 0 if normal and NO_TRUTH if not.

    `whole` is the (height, width) of the image, and `load` reads a mask; InputError if the mask file has another size.
    """
    height, width = whole
    x, y, w, h = parse_tile(sample.tile) or (0, 0, width, height)
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


def inside_of(roi: Roi, root: Path, sample: Sample, whole: tuple[int, int], load: Callable[[Path], np.ndarray]) -> np.ndarray:
    """What is looked at of a sample, (H, W) bool of its tile, in an image of the size `whole`."""
    return roi.inside(root / sample.path, *whole, parse_tile(sample.tile), load)


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


class Batches(Dataset):
    """Whole batches, each of some rows of the tiles: where Lightning predicts, it takes no sampler of batches but its own."""

    def __init__(self, tiles: Tiles, rows: list[list[int]]):
        self.tiles, self.rows = tiles, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Batch:
        return collate(self.tiles.__getitems__(self.rows[index]))
