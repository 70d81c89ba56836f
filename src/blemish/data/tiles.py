"""Tiles of large images, and the reduction of images and maps to blocks of pixels."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from blemish.data.images import to_unit
from blemish.data.manifest import Sample, parse_tile
from blemish.edge.errors import InputError
from blemish.edge.geometry import grid

SIDE = 2048  # pixels: an image with a longer side is reduced for the test's maps and pictures
BAND = 2**22  # pixels of an image, or values of its map, that are processed at a time


def tiles_of(sample: Sample, size: tuple[int, int], tile: int, overlap: int) -> list[Sample]:
    """The tiles of an image of size (width, height), as samples; InputError if the sample is a tile already."""
    if sample.tile:
        raise InputError(f"tiling={tile}: {sample.key} is a tile already; expected whole images, or tiling=null")
    return [sample._replace(tile=",".join(map(str, place))) for place in grid(*size, tile, overlap)]


def tile_at(key: str) -> tuple[str, tuple[int, int, int, int]]:
    """The path and (x, y, w, h) of a tile, from its key."""
    path, _, text = key.rpartition("#")
    return path, parse_tile(text)


def bands(array: Sequence, multiple: int = 1) -> Iterator[np.ndarray]:
    """Successive rows (n, W, …) of anything that has a shape (H, W, …) and can be sliced; n is a multiple except in the last band."""
    step = max(1, BAND // (array.shape[1] * multiple)) * multiple
    for row in range(0, array.shape[0], step):
        yield np.asarray(array[row : row + step])


def bytes_of(array: np.ndarray, window: Mapping[str, tuple[float, float]]) -> np.ndarray:
    """An image (H, W) or (H, W, 3) of any dtype as (H, W, 3) uint8 for display; uint8 is not copied."""
    if array.dtype != np.uint8:
        deep, array = array, np.empty(array.shape, np.uint8)
        for source, target in zip(bands(deep), bands(array), strict=True):
            unit = to_unit(source, window)[: 1 if source.ndim == 2 else 3]  # (1 or 3, n, W)
            target[:] = (unit * 255).round().byte().permute(1, 2, 0).numpy().reshape(target.shape)
    return array if array.ndim == 3 else np.broadcast_to(array[..., None], (*array.shape, 3))


def reduction(size: Sequence[int], side: int = SIDE) -> int:
    """The side of the blocks that reduce the longer side of an image to at most `side` blocks."""
    return -(-max(size) // side)


def reduce_blocks(array: Sequence, side: int, function: np.ufunc, dtype: type | None = None) -> Iterator[np.ndarray]:
    """Each block of side × side pixels of (H, W, …) reduced by a binary ufunc, in bands of rows; smaller blocks at the right and bottom."""
    for band in bands(array, side):
        for axis in (0, 1):  # strided slices are several times as fast as ufunc.reduceat
            before = (slice(None),) * axis
            result = band[(*before, slice(0, None, side))].astype(dtype or band.dtype)
            for i in range(1, side):
                more = band[(*before, slice(i, None, side))]
                part = result[(*before, slice(more.shape[axis]))]
                function(part, more, out=part)
            band = result
        yield band


def mean_blocks(array: np.ndarray, side: int) -> np.ndarray:
    """The rounded means (⌈H / side⌉, ⌈W / side⌉, …) of the blocks of a uint8 array (H, W, …)."""
    if side == 1:
        return array
    high, wide = (np.minimum(side, length - np.arange(0, length, side)) for length in array.shape[:2])
    pixels = np.outer(high, wide).reshape(len(high), len(wide), *[1] * (array.ndim - 2))  # of each block
    rows, first = [], 0
    for sums in reduce_blocks(array, side, np.add, np.uint32):
        rows.append((sums / pixels[first : first + len(sums)]).round().astype(np.uint8))
        first += len(sums)
    return np.concatenate(rows)


def largest_blocks(array: Sequence, side: int) -> np.ndarray:
    """The largest value of each block of (H, W, …), so that no small defect is lost."""
    return np.asarray(array[:]) if side == 1 else np.concatenate(list(reduce_blocks(array, side, np.maximum)))
