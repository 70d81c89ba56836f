"""The way of an image to a network's input and of a map back, in numpy: resizing, letterbox, crop, masks, tiles and blending."""

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from .errors import InputError

STRIP = 16  # output pixels that one product computes: few enough that its weights have few zeros
GREY = 128  # of 255: fills the bars of a letterbox and what is outside the ROI
RESIZES = ("stretch", "letterbox")
UINT16 = (0.0, 65535.0)  # the default range of uint16 images


class Geometry(NamedTuple):
    """How an image is brought to a network's input: resized to a square of `size` pixels, of which the centre crop×crop is kept.

    None leaves a step out. resize: "stretch" makes both sides `size`; "letterbox" the longer one, and puts the image in a grey square.
    """

    size: int | None = None
    crop: int | None = None
    resize: str = "stretch"

    @property
    def side(self) -> int | None:
        """Side of the network's input; None for images of their own sizes."""
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
        """(height, width) after padding, before the crop."""
        return (height, width) if self.size is None else (self.size, self.size)


def to_network(array: np.ndarray, window: Mapping, geometry: Geometry) -> np.ndarray:
    """An image (H, W) or (H, W, 3) at the size of the network: uint8 as uint8, deeper ones as float32 in [0, 1] by their window.

    uint8 is equal to what torch's antialiased bilinear resizing of bytes gives, and so to what the detector was fitted to.
    """
    is_bytes = array.dtype == np.uint8
    if not is_bytes:
        ranges = {"uint16": UINT16, **window}
        if array.dtype.name not in ranges:
            raise InputError(f"an image of {array.dtype}; expected {', '.join(sorted({'uint8', *ranges}))}")
        lo, hi = ranges[array.dtype.name]
        array = ((array.astype(np.float32) - np.float32(lo)) / np.float32(hi - lo)).clip(0, 1)
    padded, crop = geometry.padded(*array.shape[:2]), geometry.crop
    array = resize(array, *geometry.resized(*array.shape[:2]))
    array = pad_center(array if is_bytes else array.clip(0, 1), padded, GREY if is_bytes else GREY / 255)
    if crop is None:
        return array
    if crop > min(padded):
        raise InputError(f"an image of {padded[1]}×{padded[0]} pixels; expected at least {crop}×{crop}, the crop of this detector")
    return array[middle(padded, (crop, crop))]


def to_image(map: np.ndarray, height: int, width: int, geometry: Geometry) -> np.ndarray:
    """A map (h, w) of the network's input in the pixels of its image, (height, width) float32; outside the crop it has its minimum."""
    padded = geometry.padded(height, width)
    if geometry.crop:
        map = pad_center(np.asarray(map, np.float32), padded, map.min())
    return resize(map[middle(padded, geometry.resized(height, width))], height, width)


def mask_to_network(mask: np.ndarray, geometry: Geometry, fill: int | bool) -> np.ndarray:
    """A mask (H, W) moved to where `to_network` puts its image, by nearest neighbour; padding is `fill`."""
    padded = geometry.padded(*mask.shape)
    mask = pad_center(resize_nearest(mask, *geometry.resized(*mask.shape)), padded, fill)
    return mask if geometry.crop is None else mask[middle(padded, (geometry.crop, geometry.crop))]


def ignore_mask_in_network(height: int, width: int, geometry: Geometry, inside: np.ndarray | None) -> np.ndarray | None:
    """Ignored pixels of the network's input (h, w) of an image (height, width): padding, and what is not `inside` the ROI (height, width).

    None if there are none.
    """
    if inside is None and geometry.resized(height, width) == geometry.padded(height, width):
        return None
    return mask_to_network(np.zeros((height, width), bool) if inside is None else ~inside, geometry, True)


def fill_masked(array: np.ndarray, inside: np.ndarray | None, window: Mapping) -> np.ndarray:
    """An image (H, W) or (H, W, 3) with mid-grey of its window wherever it is not `inside` (H, W); None for all of it."""
    if inside is None:
        return array
    is_bytes = array.dtype == np.uint8
    lo, hi = (0, 255) if is_bytes else {"uint16": UINT16, **window}.get(array.dtype.name, (0.0, 0.0))  # what has no range is refused later
    grey = lo + (hi - lo) * GREY / 255
    grey = array.dtype.type(round(grey) if array.dtype.kind == "u" else grey)
    return np.where(inside if array.ndim == 2 else inside[..., None], array, grey)


def apply_ignore_mask(
    score: float, map: np.ndarray | None, ignore_mask: np.ndarray | None, share: float | None
) -> tuple[float, np.ndarray | None]:
    """Score and map of an image without the pixels of an ignore mask (h, w); see `ops.maps.apply_ignore_mask`."""
    if ignore_mask is not None and ignore_mask.all():  # as a tile may be
        return -np.inf, map if map is None else np.full_like(map, map.max())
    if map is None or ignore_mask is None:
        return score, map
    seen = np.sort(map[~ignore_mask])
    if share is not None:
        score = float(seen[-max(1, int(share * len(seen))) :].mean())
    return score, np.where(ignore_mask, seen[0], map)


def middle(padded: tuple[int, int], size: tuple[int, int]) -> tuple[slice, slice]:
    """The rows and columns of the centre of an array."""
    top, left = ((full - part) // 2 for full, part in zip(padded, size, strict=True))
    return slice(top, top + size[0]), slice(left, left + size[1])


def pad_center(array: np.ndarray, padded: tuple[int, int], value: float) -> np.ndarray:
    """An array (h, w, …) in the centre of a larger one that is filled with a value."""
    if array.shape[:2] == padded:
        return array
    full = np.full((*padded, *array.shape[2:]), value, array.dtype)
    full[middle(padded, array.shape[:2])] = array
    return full


def nearest(length: int, pixels: int) -> np.ndarray:
    """The input pixel under the centre of each output pixel, ⌊(i + ½)·length/pixels⌋."""
    return (2 * np.arange(pixels) + 1) * length // (2 * pixels)


def resize_nearest(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """A mask (H, W) at (height, width) by nearest neighbour."""
    if mask.shape == (height, width):
        return mask
    return mask[np.ix_(nearest(mask.shape[0], height), nearest(mask.shape[1], width))]


def resize(array: np.ndarray, height: int, width: int) -> np.ndarray:
    """An array (H, W) or (H, W, 3), uint8 or float32, at (height, width): bilinear, antialiased, half-pixel centres."""
    return _resize_axis(_resize_axis(array, 1, width), 0, height)


def _resize_axis(array: np.ndarray, axis: int, pixels: int) -> np.ndarray:
    length = array.shape[axis]
    if length == pixels:
        return array
    is_bytes, channels = array.dtype == np.uint8, array.shape[2] if axis == 1 and array.ndim == 3 else 1
    bits, strips = strips_of(length, pixels, is_bytes, channels)
    flat, kind = array.reshape(len(array), -1), np.float64 if is_bytes else np.float32  # (H, W·channels)
    out = np.empty((pixels, flat.shape[1]) if axis == 0 else (len(flat), pixels * channels), kind)
    for to, of, weights in strips:
        if axis == 0:
            np.matmul(weights, flat[of].astype(kind), out=out[to])
        else:
            out[:, to] = flat[:, of].astype(kind) @ weights.T
    if is_bytes:
        out += 2 ** (bits - 1)
        out *= 2.0**-bits  # integers far below 2⁵³ until here: nothing was rounded
        np.clip(np.floor(out, out=out), 0, 255, out=out)
    return out.astype(array.dtype).reshape(*array.shape[:axis], pixels, *array.shape[axis + 1 :])


@lru_cache(maxsize=16)
def strips_of(length: int, pixels: int, exact: bool, channels: int = 1) -> tuple[int, list[tuple[slice, slice, np.ndarray]]]:
    """Resizing one axis as products for a few output pixels at a time: (bits, [(output pixels, input pixels, weights (output, input))]).

    A weight is a triangle of the width of the coarser grid's step. `exact`: the weights are integers, too large by `bits` bits: the
    16-bit arithmetic that torch has for bytes. With several `channels` a pixel is that many neighbouring values.
    """
    scale = length / pixels
    support = max(scale, 1.0)
    centre = scale * (np.arange(pixels) + 0.5)
    first = np.maximum((centre - support + 0.5).astype(np.int64), 0)
    count = np.minimum((centre + support + 0.5).astype(np.int64), length) - first
    taps = np.arange(count.max())
    # in torch's order of operations: a weight that rounds the other way is a grey level in some image
    distance = np.abs((taps + (first - centre)[:, None] + 0.5) * (1 / support))
    weights = np.where(taps < count[:, None], np.maximum(0, 1 - distance), 0)  # (pixels, taps)
    weights, bits = weights / weights.cumsum(1)[:, -1:], 0
    if exact:
        bits = next(b for b in range(23) if b == 22 or int(0.5 + weights.max() * 2 ** (b + 1)) >= 2**15)
        weights = np.floor(0.5 + weights * 2**bits)
    strips, values = [], np.eye(channels)
    for start in range(0, pixels, STRIP):
        stop = min(start + STRIP, pixels)
        low, high = int(first[start]), int(first[stop - 1]) + len(taps)
        block = np.zeros((stop - start, high - low))
        np.put_along_axis(block, first[start:stop, None] - low + taps, weights[start:stop], 1)
        high = min(high, length)
        block = np.kron(block[:, : high - low], values).astype(np.float64 if exact else np.float32)
        strips.append((slice(start * channels, stop * channels), slice(low * channels, high * channels), block))
    return bits, strips


def starts(length: int, tile: int, stride: int) -> list[int]:
    """First pixels of tiles that cover `length` pixels, the last one flush with the end; just 0 for a tile that is longer."""
    last = max(length - tile, 0)
    return [*range(0, last, stride), last]


def grid(width: int, height: int, tile: int, overlap: int) -> Iterator[tuple[int, int, int, int]]:
    """(x, y, w, h) of the tiles of an image, row by row; a side of the image below `tile` is covered by one tile that is cut to it."""
    for y in starts(height, tile, tile - overlap):
        for x in starts(width, tile, tile - overlap):
            yield x, y, min(tile, width), min(tile, height)


def mirrored(array: np.ndarray, tile: int) -> np.ndarray:
    """An array (H, W, …) continued to the right and below by its mirror image, as often as needed, where a side is below `tile`."""
    more = [(0, max(0, tile - side)) for side in array.shape[:2]]
    return np.pad(array, more + [(0, 0)] * (array.ndim - 2), mode="symmetric") if any(after for _, after in more) else array


def ramp(length: int, overlap: int) -> np.ndarray:
    """Weights (length,) of a tile's pixels along one axis: 1, falling linearly towards both ends within the overlap."""
    inwards = np.minimum(np.arange(length), np.arange(length)[::-1]) + 1.0
    return np.minimum(inwards / (overlap + 1), 1).astype(np.float32)


class Blend:
    """The weighted mean of the maps of the tiles of a `grid`, added row by row; complete rows (n, width) go to `emit` in order.

    A pixel's weight in a tile is the product of `ramp` along both axes. Means are updated tile by tile, m ← m + (new − m)·w / Σw, so that
    where all tiles agree the result is their value to the last bit.
    """

    def __init__(self, height: int, width: int, tile: int, overlap: int, emit: Callable[[np.ndarray], None]):
        self.height, self.width, self.emit = height, width, emit
        self.high, self.wide = min(tile, height), min(tile, width)  # of every tile
        self.down, self.across = ramp(self.high, overlap), ramp(self.wide, overlap)
        self.strip, self.strip_weight = np.zeros((self.high, width), np.float32), np.zeros(width, np.float32)  # the row of tiles
        self.open, self.open_weight = np.zeros((self.high, width), np.float32), np.zeros(self.high, np.float32)  # rows below `top`
        self.top = 0

    def add(self, map: np.ndarray, x: int, y: int) -> None:
        """Add the map of a tile, at least (high, wide), whose pixel (0, 0) is the image's (y, x)."""
        columns = slice(x, x + self.wide)
        self.strip_weight[columns] += self.across
        part = self.strip[:, columns]
        part += (map[: self.high, : self.wide] - part) * (self.across / self.strip_weight[columns])
        if x + self.wide < self.width:
            return
        if done := y - self.top:  # no further tile has these rows
            self.emit(self.open[:done])
            for rows in (self.open, self.open_weight):
                rows[:-done], rows[-done:] = rows[done:].copy(), 0
            self.top = y
        # tiles are a grid: the mean over both axes is a mean over one of means over the other
        self.open_weight += self.down
        self.open += (self.strip - self.open) * (self.down / self.open_weight)[:, None]
        self.strip[:], self.strip_weight[:] = 0, 0
        if y + self.high == self.height:
            self.emit(self.open)
