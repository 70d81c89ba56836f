"""Score an image by tiles: its tiles as batches, and its score and map from theirs, with no more than a row of tiles in memory."""

import tempfile
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from lightning.pytorch import Callback
from torch import Tensor

from blemish.data.dataset import TileBatches, Tiles
from blemish.data.images import prepare, to_image
from blemish.data.roi import Roi
from blemish.data.tiles import largest_blocks, reduction, tile_at
from blemish.detector import Detector
from blemish.edge.errors import InputError
from blemish.edge.geometry import Blend, Geometry, grid, mask_to_network, mirrored
from blemish.ops.maps import apply_ignore_mask
from blemish.types import IGNORED, Batch, Prediction

TOGETHER = 64  # tiles in a batch where no batch size is given


class Preprocessing(NamedTuple):
    """How a run's data module brings an image to the network's input."""

    geometry: Geometry
    window: dict  # dtype name to (lo, hi)
    tile: int | None = None  # side of the tiles that an image is cut into, None for the full image
    overlap: int = 0
    roi: Roi | None = None

    def inside(self, path: Path | None, height: int, width: int) -> np.ndarray | None:
        """Return the ROI (H, W) of an image, None for the full image."""
        return self.roi and self.roi.inside(path, height, width)

    @property
    def tile_geometry(self) -> Geometry:
        """How a tile is brought to the network's input: resized, but not cropped."""
        return Geometry(self.geometry.side)


def tile_batches(
    array: np.ndarray, preprocessing: Preprocessing, batch_size: int, inside: np.ndarray | None = None
) -> Iterator[tuple[list[tuple[int, int]], Tensor, Tensor | None]]:
    """Yield the corners (x, y), network inputs (B, 3, h, w) and ignore mask (B, h, w) of the tiles of an image (H, W) or (H, W, 3).

    A side of the image below `tile` is continued by its mirror image. `inside` is the ROI (H, W); without one there is no ignore mask.
    """
    _, window, tile, overlap, _ = preprocessing
    geometry, places = preprocessing.tile_geometry, list(grid(array.shape[1], array.shape[0], tile, overlap))
    for begin in range(0, len(places), batch_size):
        corners, inputs, ignored = [], [], []
        for x, y, w, h in places[begin : begin + batch_size]:
            part = slice(y, y + h), slice(x, x + w)
            roi = None if inside is None else mirrored(inside[part], tile)
            corners.append((x, y))
            inputs.append(prepare(mirrored(np.ascontiguousarray(array[part]), tile), window, geometry, roi))
            ignored += [] if roi is None else [mask_to_network(~roi, geometry, True)]
        yield corners, torch.stack(inputs), torch.from_numpy(np.stack(ignored)) if ignored else None


class Stitched:
    """The score and the map of an image, from its tiles in the order of `grid`.

    Finished rows of the map go to `keep`, with −∞ in place of `least`, known at the end, outside the ROI. Values are the largest of blocks
    of side × side pixels.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        preprocessing: Preprocessing,
        inside: np.ndarray | None,
        keep: Callable[[np.ndarray], object],
        side: int = 1,
    ):
        self.blend = Blend(*shape, preprocessing.tile, preprocessing.overlap, self._finish)
        self.tile, self.geometry, self.inside, self.keep, self.side = preprocessing.tile, preprocessing.tile_geometry, inside, keep, side
        self.score, self.least, self.row = -np.inf, np.float32(np.inf), 0
        self.pending = np.empty((0, shape[1]), np.float32)  # rows that fill no block yet

    def add(self, x: int, y: int, score: float, map: Tensor | None) -> None:
        """Add a tile with its corner, score and map (h, w) of the network's input."""
        self.score = max(self.score, score)
        if map is not None:
            self.blend.add(to_image(map.detach().cpu(), self.tile, self.tile, self.geometry).numpy(), x, y)

    def _finish(self, rows: np.ndarray) -> None:
        if self.inside is not None:
            inside = self.inside[self.row : self.row + len(rows)]
            self.least = min(self.least, rows.min(where=inside, initial=np.inf))
            rows = np.where(inside, rows, np.float32(-np.inf))
        self.row += len(rows)
        rows = np.concatenate([self.pending, rows])
        full = len(rows) if self.row == self.blend.height else len(rows) // self.side * self.side
        if full:
            self.keep(largest_blocks(rows[:full], self.side))
        self.pending = rows[full:].copy()


class MapOnDisk:
    """A map (H, W) float32 in a file without a name in `folder`, written from the top down and read by slices of rows."""

    def __init__(self, shape: tuple[int, int], folder: Path | None):
        self.shape, self.least = shape, np.float32(0)  # what is read in place of −∞
        self.file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 it lives as long as the map
        weakref.finalize(self, self.file.close)

    def __getitem__(self, rows: slice) -> np.ndarray:
        begin, end, _ = rows.indices(self.shape[0])
        self.file.seek(4 * begin * self.shape[1])
        values = np.fromfile(self.file, np.float32, (end - begin) * self.shape[1]).reshape(-1, self.shape[1])
        return np.where(np.isneginf(values), self.least, values)


@torch.inference_mode()
def score_image(
    model: Detector, array: np.ndarray, preprocessing: Preprocessing, batch_size: int, folder: Path | None, inside: np.ndarray | None = None
) -> tuple[float, MapOnDisk | None]:
    """Return the score of an image by tiles and its map, on disk in `folder`, None for the system's temporary folder.

    Outside the ROI `inside` (H, W) the map has the least value inside.
    """
    map = MapOnDisk(array.shape[:2], folder)
    image = Stitched(map.shape, preprocessing, inside, lambda rows: map.file.write(rows.tobytes()))
    for corners, inputs, ignore_mask in tile_batches(array, preprocessing, batch_size, inside):
        ignore_mask = None if ignore_mask is None else ignore_mask.to(model.device)
        scores, maps = apply_ignore_mask(model(inputs.to(model.device)), ignore_mask, model.map_share)
        for i, corner in enumerate(corners):
            image.add(*corner, float(scores[i]), None if maps is None else maps[i])
    if inside is not None and image.score == -np.inf:
        raise InputError("no pixel of its ROI is left in the tiles at the size of the network; expected a larger ROI")
    map.file.flush()
    map.least = image.least
    return image.score, map if image.row else None


@torch.inference_mode()
def reconstruct_tiles(model: Detector, image: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Return the reconstruction of an image (1, 3, H, W) in [0, 1], blended from those of its tiles."""
    rows = ([], [], [])
    channels = [Stitched(image.shape[2:], preprocessing, None, kept.append) for kept in rows]
    for corners, inputs, _ in tile_batches(to_bytes(image[0]), preprocessing, TOGETHER):
        for corner, reconstruction in zip(corners, model.reconstruct(inputs.to(model.device)).float(), strict=True):
            for channel, values in zip(channels, reconstruction, strict=True):
                channel.add(*corner, 0.0, values)
    return torch.from_numpy(np.stack([np.concatenate(kept) for kept in rows]))[None]


def to_bytes(image: Tensor) -> np.ndarray:
    """Convert an image (3, H, W) in [0, 1] to (H, W, 3) uint8."""
    return (image.detach().float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()


class ImageCallback(Callback):
    """A callback that sees images: subclasses implement `add`, and pass the batches of a loader to `add_batch`.

    An image that comes as tiles is added once they are complete: with their largest score, their maps blended, and its mask, the latter
    two reduced to the largest values of blocks where a side is above `data.tiles.SIDE`. `datamodule.image(key)` has its pixels.
    """

    def add(self, trainer, prediction: Prediction, batch: Batch, reconstruct: Callable[[Tensor], Tensor] | None) -> None:
        """Add images, with the method's reconstruction of images (B, 3, H, W) if it makes one."""
        raise NotImplementedError

    def add_batch(self, trainer, loader, module, outputs: Prediction, batch: Batch) -> None:
        reconstruct = module.reconstruct
        if not isinstance(loader.dataset, TileBatches):
            self.add(trainer, outputs, batch, reconstruct)
            return
        tiles = loader.dataset.tiles
        preprocessing = Preprocessing(tiles.geometry, {}, tiles.tile, tiles.overlap)
        for i, key in enumerate(batch.path):
            path, (x, y, w, h) = tile_at(key)
            width, height = tiles.sizes[path]
            if (x, y) == (0, 0):
                self._bands, side = [], reduction((width, height))
                self._stitched = Stitched((height, width), preprocessing, tiles.inside(path), self._bands.append, side)
            self._stitched.add(x, y, float(outputs.score[i]), None if outputs.map is None else outputs.map[i])
            if (x + w, y + h) == (width, height):
                by_tiles = partial(reconstruct_tiles, module, preprocessing=preprocessing)
                self.add(trainer, *self._complete(tiles, path), by_tiles if reconstruct and self._stitched.side == 1 else None)

    def _complete(self, tiles: Tiles, path: str) -> tuple[Prediction, Batch]:
        map, side = None, self._stitched.side
        if self._bands:
            rows = np.concatenate(self._bands)
            map = torch.from_numpy(np.where(np.isneginf(rows), self._stitched.least, rows))[None]  # (1, h, w)
        truth = tiles.truth(path)
        known = truth != IGNORED  # a block is ignored where all of it is
        mask = np.where(largest_blocks(known, side), largest_blocks(np.where(known, truth, 0).astype(np.uint8), side), np.uint8(IGNORED))
        label, mask = torch.tensor([tiles.parents[path].label]), torch.from_numpy(mask)[None]
        return Prediction(torch.tensor([self._stitched.score]), map), Batch(torch.empty(1, 0, *mask.shape[1:]), label, mask, [path])
