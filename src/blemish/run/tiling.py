"""Maps of large images from the predictions of their tiles: seams are blended, and no more than a row of tiles is in memory."""

import struct
import tempfile
import weakref
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from lightning.pytorch import Callback
from torch import Tensor

from blemish.data.images import prepare, to_image
from blemish.data.module import ImageData
from blemish.data.tiles import largest_blocks, reduction, tile_at
from blemish.detector import Detector, apply_ignore_mask
from blemish.edge.errors import InputError
from blemish.edge.geometry import Blend, Geometry, grid, mask_to_network, mirrored
from blemish.edge.reading import RESULT
from blemish.run.evaluate import bytes_of
from blemish.types import IGNORED, Batch, Prediction

TOGETHER = 64  # tiles at a time where nobody says how many


class Shown:
    """Rows of a map from the first to the last: what is not `inside` (H, W) is marked by −∞, and in the end takes the least of the rest."""

    def __init__(self, inside: np.ndarray | None):
        self.inside, self.row, self.least = inside, 0, np.float32(np.inf)

    def marked(self, rows: np.ndarray) -> np.ndarray:
        """The next rows (n, W) float32."""
        if self.inside is None:
            return rows
        inside = self.inside[self.row : self.row + len(rows)]
        self.row += len(rows)
        self.least = min(self.least, rows.min(where=inside, initial=np.inf))
        return np.where(inside, rows, np.float32(-np.inf))

    def filled(self, rows: np.ndarray) -> np.ndarray:
        """Rows that were marked, or the largest values of their blocks, when all rows have been."""
        return rows if self.inside is None else np.where(np.isneginf(rows), self.least, rows)


class RowsOnDisk:
    """The rows of a map (H, W) float32 in a file without a name, written from the first to the last and then read by slices.

    What is not `inside` (H, W) is read as the least value of the rest.
    """

    def __init__(self, shape: tuple[int, int], folder: Path | None, inside: np.ndarray | None = None):
        self.shape, self.shown = shape, Shown(inside)
        self.file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 it lives as long as the map
        weakref.finalize(self, self.file.close)

    def add(self, rows: np.ndarray) -> None:
        self.file.write(self.shown.marked(rows).tobytes())

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        begin, end, _ = rows.indices(self.shape[0])
        self.file.flush()
        self.file.seek(begin * self.shape[1] * 4)
        values = np.empty((end - begin, self.shape[1]), np.float32)
        self.file.readinto(memoryview(values).cast("B"))
        return self.shown.filled(values)


@torch.inference_mode()
def score_tiles(
    model: Detector,
    array: np.ndarray,
    window: Mapping,
    size: int | None,
    tile: int,
    overlap: int,
    batch_size: int,
    inside: np.ndarray | None = None,
) -> Iterator[tuple[int, int, float, np.ndarray | None]]:
    """(x, y, score, map (tile, tile) float32 or None) of the tiles of an image (H, W) or (H, W, 3), `batch_size` at a time.

    A tile is resized to `size`, None for not at all; a side of the image below `tile` is continued by its mirror image. Only pixels
    `inside` the ROI (H, W) count: the score of a tile of which nothing is inside is −∞.
    """
    geometry = Geometry(size)
    places = list(grid(array.shape[1], array.shape[0], tile, overlap))
    for begin in range(0, len(places), batch_size):
        some = places[begin : begin + batch_size]
        parts = [(slice(y, y + h), slice(x, x + w)) for x, y, w, h in some]
        pixels = [mirrored(np.ascontiguousarray(array[part]), tile) for part in parts]
        shown = [None if inside is None else mirrored(inside[part], tile) for part in parts]
        tiles = [prepare(one, window, geometry, where) for one, where in zip(pixels, shown, strict=True)]
        score, map = model(torch.stack(tiles).to(model.device))
        if inside is not None:
            ignore_mask = np.stack([mask_to_network(~where, geometry, True) for where in shown])
            score, map = apply_ignore_mask(Prediction(score, map), torch.from_numpy(ignore_mask).to(model.device))
        for i, (x, y, _, _) in enumerate(some):
            yield x, y, float(score[i]), None if map is None else own_pixels(map[i], tile, size)


def own_pixels(map: Tensor, tile: int, size: int | None) -> np.ndarray:
    """A tile's map (size, size) in the pixels (tile, tile) it was cut from."""
    return to_image(map.detach().cpu(), tile, tile, Geometry(size)).numpy()


def score_image(
    model: Detector,
    array: np.ndarray,
    window: Mapping,
    size: int | None,
    tile: int,
    overlap: int,
    batch_size: int,
    folder: Path | None,
    inside: np.ndarray | None = None,
) -> tuple[float, RowsOnDisk | None]:
    """The largest score of an image's tiles, and its map in its own pixels, kept in a file in `folder`; see `score_tiles`."""
    best, map, blend = -np.inf, None, None
    for x, y, score, part in score_tiles(model, array, window, size, tile, overlap, batch_size, inside):
        best = max(best, score)
        if part is not None:
            if blend is None:
                map = RowsOnDisk(array.shape[:2], folder, inside)
                blend = Blend(*array.shape[:2], tile, overlap, map.add)
            blend.add(part, x, y)
    if inside is not None and best == -np.inf:
        raise InputError("no pixel of its ROI is left in the tiles at the size of the network; expected a larger ROI")
    return best, map


@torch.inference_mode()
def reconstruct_tiles(model: Detector, image: Tensor, size: int | None, tile: int, overlap: int) -> Tensor:
    """What a method that reconstructs makes of the tiles of an image (1, 3, H, W) in [0, 1], blended as their maps are: of its shape."""
    height, width = image.shape[2:]
    array, channels = bytes_of(image[0]), [[], [], []]
    blends = [Blend(height, width, tile, overlap, lambda rows, kept=kept: kept.append(rows.copy())) for kept in channels]
    places = list(grid(width, height, tile, overlap))
    for begin in range(0, len(places), TOGETHER):
        some = places[begin : begin + TOGETHER]
        pixels = [mirrored(np.ascontiguousarray(array[y : y + h, x : x + w]), tile) for x, y, w, h in some]
        again = model.reconstruct(torch.stack([prepare(one, {}, Geometry(size)) for one in pixels]).to(model.device))  # (n, 3, h, w)
        for (x, y, _, _), one in zip(some, again, strict=True):
            for blend, channel in zip(blends, one.float(), strict=True):
                blend.add(own_pixels(channel, tile, size), x, y)
    return torch.from_numpy(np.stack([np.concatenate(kept) for kept in channels]))[None]


class Stitch(Callback):
    """Shows a callback whole images in place of their tiles: score the largest, map blended, the truth in the image's own pixels.

    Map and truth of an image with a side above `tiles.SIDE` are reduced to the largest values of blocks. Batches must come as
    `ImageData.loader` makes them. The images themselves are left out, `datamodule.image(key)` has them.
    """

    def __init__(self, callback: Callback, tile: int, overlap: int):
        self.callback, self.tile, self.overlap = callback, tile, overlap
        self.path: str | None = None

    def _done(self, dataset, outputs: Prediction, batch: Batch, truth: bool) -> Iterator[tuple[Prediction, Batch]]:
        """The image that these tiles of it complete, if they do."""
        for i, key in enumerate(batch.path):
            path, (x, y, w, h) = tile_at(key)
            width, height = dataset.sizes[path]
            if path != self.path:
                self.path, self.score, self.rows = path, -torch.inf, []
                self.blend = Blend(height, width, self.tile, self.overlap, self._keep)
                self.side, self.pending = reduction((width, height)), np.empty((0, width), np.float32)
                self.shown = Shown(dataset.inside(path))
            self.score = max(self.score, float(outputs.score[i]))
            if outputs.map is not None:
                self.blend.add(own_pixels(outputs.map[i], self.tile, dataset.geometry.size), x, y)
            if (x + w, y + h) == (width, height):
                yield self._whole(dataset, truth)
                self.path = None

    def _keep(self, rows: np.ndarray) -> None:
        """Reduce finished rows, as many as fill blocks."""
        rows = np.concatenate([self.pending, self.shown.marked(rows)])
        full = len(rows) // self.side * self.side
        if full:
            self.rows.append(largest_blocks(rows[:full], self.side))
        self.pending = rows[full:].copy()

    def _whole(self, dataset, truth: bool) -> tuple[Prediction, Batch]:
        if len(self.pending):
            self.rows.append(largest_blocks(self.pending, self.side))
        map = torch.from_numpy(self.shown.filled(np.concatenate(self.rows)))[None] if self.rows else None  # (1, h, w)
        size, inside = [-(-length // self.side) for length in dataset.sizes[self.path][::-1]], self.shown.inside
        if truth or inside is not None:
            mask = dataset.truth(self.path) if truth else np.where(inside, np.uint8(0), np.uint8(IGNORED))
            mask = torch.from_numpy(self._truth(mask))
        else:
            mask = torch.zeros(size, dtype=torch.uint8)
        label = torch.tensor([dataset.parents[self.path].label])
        return Prediction(torch.tensor([self.score]), map), Batch(torch.empty(1, 0, *size), label, mask[None], [self.path])

    def _truth(self, mask: np.ndarray) -> np.ndarray:
        """The largest values of a mask's blocks: IGNORED where all of a block is."""
        outside = mask == IGNORED
        blocks = largest_blocks(np.where(outside, np.uint8(0), mask), self.side)
        return np.where(largest_blocks(~outside, self.side), blocks, np.uint8(IGNORED))

    def on_predict_start(self, trainer, module) -> None:
        self.callback.on_predict_start(trainer, module)

    def on_predict_batch_end(self, trainer, module, outputs: Prediction, batch: Batch, index: int, loader: int = 0) -> None:
        for prediction, image in self._done(trainer.predict_dataloaders.dataset.tiles, outputs, batch, truth=False):
            self.callback.on_predict_batch_end(trainer, module, prediction, image, index, loader)

    def on_predict_end(self, trainer, module) -> None:
        self.callback.on_predict_end(trainer, module)

    def on_test_start(self, trainer, module) -> None:
        self.callback.on_test_start(trainer, module)

    def on_test_batch_end(self, trainer, module, outputs: Prediction, batch: Batch, index: int, loader: int = 0) -> None:
        dataset = trainer.test_dataloaders.dataset.tiles
        for prediction, image in self._done(dataset, outputs, batch, truth=True):
            self.callback.on_test_batch_end(trainer, self._by_tiles(module, dataset), prediction, image, index, loader)

    def _by_tiles(self, module, dataset) -> SimpleNamespace | None:
        """What of a module a callback may ask of whole images: its reconstruction, None where there is none or the image is reduced."""
        if not hasattr(module, "reconstruct") or self.side > 1:
            return None
        return SimpleNamespace(reconstruct=lambda image: reconstruct_tiles(module, image, dataset.geometry.size, self.tile, self.overlap))

    def on_test_end(self, trainer, module) -> None:
        self.callback.on_test_end(trainer, module)


def stitch_callbacks(data: ImageData, *callbacks: Callback) -> Sequence[Callback]:
    """The callbacks, which are shown whole images where the data come as tiles."""
    return callbacks if data.tile is None else [Stitch(callback, data.tile, data.overlap) for callback in callbacks]


def write_png(path: Path, width: int, height: int, rows: Iterable[np.ndarray]) -> None:
    """A grey PNG of 8 or 16 bits from its rows (n, width), uint8 or uint16, which are never all in memory (PNG specification, W3C 2003)."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    packer, above = zlib.compressobj(3), None
    with path.open("wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for band in rows:
            values = np.ascontiguousarray(band, band.dtype.newbyteorder(">")).view(np.uint8).reshape(len(band), -1)  # (n, bytes)
            if above is None:
                file.write(chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8 * band.dtype.itemsize, 0, 0, 0, 0)))
                file.write(chunk(RESULT[:4], RESULT[4:]))
                above = np.zeros_like(values[:1])
            lines = np.empty((len(values), values.shape[1] + 1), np.uint8)
            lines[:, 0] = 2  # each byte as its difference to the one above
            lines[:, 1:] = values - np.concatenate([above, values[:-1]])
            above = values[-1:]
            if packed := packer.compress(lines.tobytes()):
                file.write(chunk(b"IDAT", packed))
        file.write(chunk(b"IDAT", packer.flush()) + chunk(b"IEND", b""))
