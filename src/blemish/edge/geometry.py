"""The way of an image to a network's input and of a map back, in numpy: resizing, letterbox, crop, masks, tiles and blending."""

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from .errors import InputError

STRIP = 16  # rows or columns resized by one product: few enough that it has few zeros
GREY = 128  # of 255: what is painted where nothing is looked at, and what lies beside an image in a letterbox
RESIZES = ("stretch", "letterbox")
UINT16 = (0.0, 65535.0)  # the range of uint16 where none is given


class Geometry(NamedTuple):
    """How an image comes to a network's input: resized to a square of `size` pixels, of which the centre crop×crop is kept.

    None leaves either out. resize: "stretch" makes both sides `size`; "letterbox" the longer one, and the image lies in the middle of a
    grey square.
    """

    size: int | None = None
    crop: int | None = None
    resize: str = "stretch"

    @property
    def side(self) -> int | None:
        """Of the network's input; None for images of their own sizes."""
        return self.crop or self.size

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of the image itself after resizing, to the nearest pixel."""
        if self.size is None:
            return height, width
        if self.resize == "stretch":
            return self.size, self.size
        longest = max(height, width)
        high, wide = (max(1, (2 * side * self.size + longest) // (2 * longest)) for side in (height, width))
        return high, wide

    def padded(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of that with what lies beside it, before the crop."""
        return (height, width) if self.size is None else (self.size, self.size)


def to_network(array: np.ndarray, window: dict, geometry: Geometry) -> np.ndarray:
    """An image as its geometry brings it to the network: uint8 as uint8, deeper ones as float32 in [0, 1] by their window.

    uint8 is equal to what torch's antialiased bilinear resizing of bytes gives, and so to what the detector was fitted to.
    """
    if array.dtype != np.uint8:
        ranges = {"uint16": UINT16, **window}
        if array.dtype.name not in ranges:
            raise InputError(f"an image of {array.dtype}; this detector takes {', '.join(sorted({'uint8', *ranges}))}")
        lo, hi = ranges[array.dtype.name]
        array = ((array.astype(np.float32) - np.float32(lo)) / np.float32(hi - lo)).clip(0, 1)
    resized, padded, crop = geometry.resized(*array.shape[:2]), geometry.padded(*array.shape[:2]), geometry.crop
    if array.shape[:2] != resized:
        for axis in (1, 0):
            array = resize_axis(array, axis, resized[axis])
        array = array.clip(0, 1) if array.dtype != np.uint8 else array
    if resized != padded:
        array = beside(array, padded, GREY if array.dtype == np.uint8 else GREY / 255)
    if crop is not None:
        height, width = padded
        if crop > min(padded):
            raise InputError(f"an image of {width}×{height} pixels; expected at least {crop}×{crop}, the crop of this detector")
        array = array[middle(padded, (crop, crop))]
    return array


def middle(padded: tuple[int, int], resized: tuple[int, int]) -> tuple[slice, slice]:
    """The rows and columns of the centre of an array."""
    first = [(whole - part) // 2 for whole, part in zip(padded, resized, strict=True)]
    return slice(first[0], first[0] + resized[0]), slice(first[1], first[1] + resized[1])


def beside(array: np.ndarray, padded: tuple[int, int], value: float) -> np.ndarray:
    """An array (h, w, …) in the middle of a larger one that is filled with a value."""
    whole = np.full((*padded, *array.shape[2:]), value, array.dtype)
    whole[middle(padded, array.shape[:2])] = array
    return whole


def nearest(length: int, pixels: int) -> np.ndarray:
    """For each of so many output pixels the input pixel under its centre, ⌊(i + ½)·length/pixels⌋."""
    return (2 * np.arange(pixels) + 1) * length // (2 * pixels)


def mask_to_network(mask: np.ndarray, geometry: Geometry, fill: int | bool) -> np.ndarray:
    """A mask (H, W) to where `to_network` puts its image, by the nearest pixel so that no value is made up; `fill` lies beside it."""
    resized, padded = geometry.resized(*mask.shape), geometry.padded(*mask.shape)
    if mask.shape != resized:
        mask = mask[np.ix_(nearest(mask.shape[0], resized[0]), nearest(mask.shape[1], resized[1]))]
    mask = mask if resized == padded else beside(mask, padded, fill)
    return mask if geometry.crop is None else mask[middle(padded, (geometry.crop, geometry.crop))]


def fill_masked(array: np.ndarray, inside: np.ndarray, window: Mapping) -> np.ndarray:
    """An image (H, W) or (H, W, 3) with mid-grey of its window where it is not `inside`, (H, W) bool."""
    if array.dtype == np.uint8:
        grey = GREY
    else:
        lo, hi = {"uint16": UINT16, **window}.get(array.dtype.name, (0.0, 0.0))  # what has no range is refused later
        grey = lo + (hi - lo) * GREY / 255
    grey = array.dtype.type(round(grey) if array.dtype.kind == "u" else grey)
    return np.where(inside if array.ndim == 2 else inside[..., None], array, grey)


def ignore_mask_in_network(height: int, width: int, geometry: Geometry, inside: np.ndarray | None) -> np.ndarray | None:
    """Where in the network's input (h, w) of an image (height, width) nothing is looked at: beside it, and where it is not `inside`.

    None where all is.
    """
    if inside is None and geometry.resized(height, width) == geometry.padded(height, width):
        return None
    return mask_to_network(np.zeros((height, width), bool) if inside is None else ~inside, geometry, True)


def apply_ignore_mask(score: float, map: np.ndarray | None, ignore_mask: np.ndarray | None) -> tuple[float, np.ndarray | None]:
    """Apply an ignore mask (h, w) to a score and its map: see `detector.apply_ignore_mask`."""
    if ignore_mask is not None and ignore_mask.all():  # as a tile may be
        return -np.inf, map if map is None else np.full_like(map, map.max())
    if map is None or ignore_mask is None:
        return score, map
    shown = map[~ignore_mask]
    return float(shown.max()) if score == float(map.max()) else score, np.where(ignore_mask, shown.min(), map)


def to_image(map: np.ndarray, height: int, width: int, geometry: Geometry) -> np.ndarray:
    """A map of an image that `to_network` brought to the network, (height, width) float32: outside the crop it has its minimum."""
    resized, padded = geometry.resized(height, width), geometry.padded(height, width)
    if geometry.crop:
        map = beside(np.asarray(map, np.float32), padded, map.min())
    map = map if resized == padded else map[middle(padded, resized)]
    return resize_axis(resize_axis(map, 1, width), 0, height)


def starts(length: int, tile: int, stride: int) -> list[int]:
    """First pixels of tiles that cover `length` pixels; the last tile is flush with the end, a tile longer than it is cut."""
    last = max(length - tile, 0)
    return [*range(0, last, stride), last]


def grid(width: int, height: int, tile: int, overlap: int) -> Iterator[tuple[int, int, int, int]]:
    """(x, y, w, h) of the tiles of an image, row by row: the last ones are flush with its ends, a side below `tile` is one tile's."""
    for y in starts(height, tile, tile - overlap):
        for x in starts(width, tile, tile - overlap):
            yield x, y, min(tile, width), min(tile, height)


def mirrored(array: np.ndarray, tile: int) -> np.ndarray:
    """An array (H, W, …) continued to the right and below by its mirror image, as often as needed, where a side is below `tile`."""
    more = [(0, max(0, tile - side)) for side in array.shape[:2]]
    return np.pad(array, more + [(0, 0)] * (array.ndim - 2), mode="symmetric") if any(after for _, after in more) else array


def ramp(length: int, overlap: int) -> np.ndarray:
    """Weights (length,) of a tile's pixels along one axis: 1, falling linearly towards either end within the overlap."""
    inwards = np.minimum(np.arange(length), np.arange(length)[::-1]) + 1.0
    return np.minimum(inwards / (overlap + 1), 1).astype(np.float32)


class Blend:
    """The weighted mean of tiles' maps, which `add` takes row by row from the left; finished rows (n, width) go to `emit` in order.

    A pixel's weight in a tile is the product of `ramp` along both axes. Means are updated tile by tile, m ← m + (new − m)·w / Σw, so that
    where all tiles agree the result is what they say to the last bit.
    """

    def __init__(self, height: int, width: int, tile: int, overlap: int, emit: Callable[[np.ndarray], None]):
        self.height, self.width, self.emit = height, width, emit
        self.high, self.wide = min(tile, height), min(tile, width)  # of every tile
        self.down, self.across = ramp(self.high, overlap), ramp(self.wide, overlap)
        self.strip, self.strip_weight = np.zeros((self.high, width), np.float32), np.zeros(width, np.float32)
        self.open, self.open_weight = np.zeros((self.high, width), np.float32), np.zeros(self.high, np.float32)
        self.top = 0  # the image's row that is the first of `open`

    def add(self, map: np.ndarray, x: int, y: int) -> None:
        """A tile's map, at least (high, wide), whose pixel (0, 0) is the image's (y, x)."""
        columns = slice(x, x + self.wide)
        self.strip_weight[columns] += self.across
        share = self.across / self.strip_weight[columns]  # (wide,)
        part = self.strip[:, columns]
        part += (map[: self.high, : self.wide] - part) * share
        if x + self.wide == self.width:
            self._row_done(y)

    def _row_done(self, y: int) -> None:
        """Blend a whole row of tiles, which are a grid, so that the mean over both axes is a mean over one of means over the other."""
        self._move_to(y)
        self.open_weight += self.down
        self.open += (self.strip - self.open) * (self.down / self.open_weight)[:, None]
        self.strip[:], self.strip_weight[:] = 0, 0
        if y + self.high == self.height:
            self.emit(self.open)

    def _move_to(self, y: int) -> None:
        done = y - self.top
        if done:
            self.emit(self.open[:done])
            for rows in (self.open, self.open_weight):
                rows[:-done], rows[-done:] = rows[done:].copy(), 0
            self.top = y


def resize_axis(array: np.ndarray, axis: int, pixels: int) -> np.ndarray:
    """(H, W) or (H, W, 3), uint8 or float32, with one axis resized to so many pixels: bilinear, antialiased, half-pixel centres."""
    if array.shape[axis] == pixels:
        return array
    bits, strips = (exact_strips if array.dtype == np.uint8 else strips_of)(array.shape[axis], pixels)
    channels = array.shape[2] if axis == 1 and array.ndim == 3 else 1
    # (rows, columns·channels), of which the one or the other is resized
    flat = array.reshape(len(array), -1)
    kind = np.float64 if array.dtype == np.uint8 else np.float32
    out = np.empty((pixels, flat.shape[1]) if axis == 0 else (len(flat), pixels * channels), kind)
    for start, stop, first, weights in strips:
        last = first + weights.shape[1]
        if axis == 0:
            np.matmul(weights, flat[first:last].astype(kind), out=out[start:stop])
        else:
            apart = np.kron(weights, np.eye(channels, dtype=kind)) if channels > 1 else weights
            part = flat[:, first * channels : last * channels].astype(kind)
            out[:, start * channels : stop * channels] = part @ apart.T
    if array.dtype == np.uint8:
        out += 2 ** (bits - 1)
        out *= 2.0**-bits  # whole numbers far below 2⁵³ until here: nothing was rounded
        np.clip(np.floor(out, out=out), 0, 255, out=out)
    shape = list(array.shape)
    shape[axis] = pixels
    return out.astype(array.dtype).reshape(shape)


def weights_of(length: int, pixels: int) -> tuple[np.ndarray, np.ndarray]:
    """First input pixel (pixels,) and weights (pixels, taps) of every output pixel: triangles of the width of the coarser grid's step."""
    scale = length / pixels
    support = max(scale, 1.0)
    centre = scale * (np.arange(pixels) + 0.5)
    first = np.maximum((centre - support + 0.5).astype(np.int64), 0)
    last = np.minimum((centre + support + 0.5).astype(np.int64), length)
    reach = np.arange(int((last - first).max()))
    # in torch's order of operations: a weight that rounds the other way is a grey level in some image
    distance = np.abs((reach + (first - centre)[:, None] + 0.5) * (1 / support))
    weights = np.where(reach < (last - first)[:, None], np.maximum(0, 1 - distance), 0)
    return first, weights / weights.cumsum(1)[:, -1:]


@lru_cache(maxsize=16)
def strips_of(length: int, pixels: int) -> tuple[int, list[tuple[int, int, int, np.ndarray]]]:
    """0, and the resizing of so many output pixels at a time as (start, stop, first input pixel, weights (stop - start, n))."""
    return 0, _strips(*weights_of(length, pixels), length)


@lru_cache(maxsize=16)
def exact_strips(length: int, pixels: int) -> tuple[int, list[tuple[int, int, int, np.ndarray]]]:
    """As `strips_of` with whole numbers for weights, and by how many bits they are too large: 16-bit arithmetic, as torch has for bytes."""
    first, weights = weights_of(length, pixels)
    bits = next(b for b in range(23) if b == 22 or int(0.5 + weights.max() * 2 ** (b + 1)) >= 2**15)
    return bits, _strips(first, np.floor(0.5 + weights * 2**bits), length, np.float64)


def _strips(first: np.ndarray, weights: np.ndarray, length: int, kind: type = np.float32) -> list[tuple[int, int, int, np.ndarray]]:
    strips = []
    for start in range(0, len(first), STRIP):
        rows = range(start, min(start + STRIP, len(first)))
        low = int(first[start])
        high = min(int(first[rows[-1]]) + weights.shape[1], length)
        block = np.zeros((len(rows), high - low), kind)
        for i, row in enumerate(rows):
            taps = min(weights.shape[1], high - int(first[row]))
            block[i, first[row] - low : first[row] - low + taps] = weights[row, :taps]
        strips.append((start, rows[-1] + 1, low, block))
    return strips
