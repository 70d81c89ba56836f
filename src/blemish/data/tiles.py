"""Large images as tiles: where these lie, and batches in which the tiles of an image stay together, so that it is decoded once."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from blemish.data.images import to_unit
from blemish.data.manifest import Sample, parse_tile
from blemish.edge.checks import check_whole
from blemish.edge.errors import InputError
from blemish.edge.geometry import grid

SIDE = 2048  # pixels of the longer side at most of what a test keeps of an image and its map
BAND = 2**22  # pixels of an image, or values of its map, that are worked on at a time
MIXED = 2**27  # pixels of the images whose tiles are shuffled among each other: as many are kept decoded


def check_tiling(tile: int | None, overlap: int) -> None:
    """InputError for a side of tiles or an overlap that cannot be used."""
    check_whole("", 8, also=(None,), tiling=tile)
    check_whole("", 0, tile and tile - 1, overlap=overlap)  # with tiling below it


def tiles_of(sample: Sample, size: tuple[int, int], tile: int, overlap: int) -> list[Sample]:
    """The tiles of an image of size (width, height), as samples; InputError if it is a tile already."""
    if sample.tile:
        raise InputError(f"tiling={tile}: {sample.key} is a tile already; expected whole images, or tiling=null")
    return [sample._replace(tile=",".join(map(str, place))) for place in grid(*size, tile, overlap)]


def tile_at(key: str) -> tuple[str, tuple[int, int, int, int]]:
    """Path and (x, y, w, h) of a tile by its key."""
    path, _, text = key.rpartition("#")
    return path, parse_tile(text)


def bands(array: Sequence, multiple: int = 1) -> Iterator[np.ndarray]:
    """The rows (n, W, …) of what has a shape (H, W, …) and gives rows by slices, n a multiple but for the last."""
    step = max(1, BAND // (array.shape[1] * multiple)) * multiple
    for row in range(0, array.shape[0], step):
        yield np.asarray(array[row : row + step])


def bytes_of(array: np.ndarray, window: Mapping[str, tuple[float, float]]) -> np.ndarray:
    """An image (H, W) or (H, W, 3) of any dtype as (H, W, 3) uint8, as its window shows it; bytes are not copied."""
    if array.dtype != np.uint8:
        deep, array = array, np.empty(array.shape, np.uint8)
        row = 0
        for band in bands(deep):
            unit = to_unit(band, window)[: 1 if band.ndim == 2 else 3]  # (1 or 3, n, W)
            array[row : row + len(band)] = (unit * 255).round().byte().permute(1, 2, 0).numpy().reshape(band.shape)
            row += len(band)
    return array if array.ndim == 3 else np.broadcast_to(array[..., None], (*array.shape, 3))


def reduction(size: Sequence[int], side: int = SIDE) -> int:
    """The side of the blocks whose number is at most `side` along the longer side of an image."""
    return -(-max(size) // side)


def folded(array: np.ndarray, side: int, axis: int, of: np.ufunc, dtype: type) -> np.ndarray:
    """Every `side` neighbours along axis 0 or 1, the last ones being fewer, taken together by a ufunc of two."""
    before = (slice(None),) * axis
    result = array[(*before, slice(0, None, side))].astype(dtype)
    for i in range(1, side):
        more = array[(*before, slice(i, None, side))]
        part = result[(*before, slice(more.shape[axis]))]
        of(part, more, out=part)
    return result


def mean_blocks(array: np.ndarray, side: int) -> np.ndarray:
    """The rounded means (⌈H / side⌉, ⌈W / side⌉, …) of the blocks of bytes (H, W, …), smaller ones at the ends included."""
    if side == 1:
        return array
    wide = np.minimum(side, array.shape[1] - np.arange(0, array.shape[1], side)).reshape(-1, *[1] * (array.ndim - 2))
    rows = []
    for band in bands(array, side):
        sums = folded(folded(band, side, 0, np.add, np.uint32), side, 1, np.add, np.uint32)
        high = np.minimum(side, len(band) - np.arange(0, len(band), side)).reshape(-1, *[1] * (array.ndim - 1))
        rows.append((sums / (high * wide)).round().astype(np.uint8))
    return np.concatenate(rows)


def largest_blocks(array: Sequence, side: int) -> np.ndarray:
    """The largest value of each block as `mean_blocks` has them, so that nothing small is lost."""
    if side == 1:
        return np.asarray(array[:])
    rows = [folded(folded(band, side, 0, np.maximum, band.dtype), side, 1, np.maximum, band.dtype) for band in bands(array, side)]
    return np.concatenate(rows)
