"""What a mask means: which pixels a file or an array marks, by one rule for defects and for regions of interest."""

from functools import reduce
from pathlib import Path
from typing import NamedTuple

import numpy as np

from blemish.edge.errors import InputError
from blemish.edge.reading import read

REACH = 2  # pixels: a level that has a lower and a higher one within this reach is an edge there, neither an area nor a line
FEW = 16  # a mask of no higher level has numbers of classes, whatever it looks like; of more levels a class has an area
FAINT = 1 / 8  # of the highest level: below, a soft mask has noise, and a level without an area is noise too
EVEN = 10 / 255  # of the highest level: an area of a compressed mask varies by no more
AREA = 0.02  # of all areas: a level that has so much of them is one that a soft mask was painted in
BAND = 2**18  # pixels that are looked at together: more would leave the processor's cache
ONE_COLOUR = 8 / 255  # of the scale: colours no further apart are one, which a codec or a brush has varied


class Marked(NamedTuple):
    """A mask as it is interpret."""

    mask: np.ndarray  # (H, W) uint8, 1 on what is marked and 0 elsewhere
    levels: tuple[float, ...]  # that occur, ascending
    kind: str  # "plain": at most one level beside 0; "classes": each level but 0 is marked; "soft": those above a threshold are
    alpha: bool  # the transparency was the mask, not the colour


def read_mask(path: str | Path) -> np.ndarray:
    """A mask file as (H, W) uint8, 1 on what is marked and 0 elsewhere; InputError as `read` has it."""
    return binary(read(path, labels=True))


def binary(mask: np.ndarray) -> np.ndarray:
    """The mask of `interpret`."""
    return interpret(mask).mask


def interpret(mask: np.ndarray) -> Marked:
    """Which pixels are marked by an array (H, W) of levels, or (H, W, C) of colours: grey, grey and alpha, RGB, or RGB and alpha.

    Alpha is the mask where it varies and the colour of what is visible does not; else colours count by their largest channel, laid on
    black. Integers wider than 16 bits are numbers of classes, and so are levels with areas or lines of their own: each above 0 is marked.
    A mask most of whose levels only lead from lower to higher ones is a blurred or compressed one. It is marked above half of the lowest
    level that areas of it have, which is above 127 for white on black, and so where it has none; above half of the highest level if that is
    no more than half the scale, or coloured. InputError for another shape or dtype, and for values that are not finite.
    """
    if mask.dtype.kind not in "buif":
        raise InputError(f"an array of {mask.dtype}; expected a mask of bool, whole numbers or floats")
    if mask.ndim not in (2, 3) or mask.shape[2:] not in ((), (1,), (2,), (3,), (4,)) or 0 in mask.shape:
        raise InputError(f"an array of shape {mask.shape}; expected a mask (H, W), or (H, W, C) of 1 to 4 channels")
    if mask.dtype.kind == "f" and not np.isfinite(mask).all():
        raise InputError("a mask with values that are NaN or infinite; expected finite values")
    level, alpha = _flat(mask.astype(np.uint8) if mask.dtype == bool else mask)
    top = level.max()
    marked = level > 0
    if (~marked | (level == top)).all():
        found = ([0] if not marked.all() else []) + [top] * bool(top > 0)
        return Marked(marked.astype(np.uint8), tuple(float(value) for value in found), "plain", alpha)
    if level.dtype not in (np.uint8, np.uint16) and level.dtype.kind in "iu":
        return Marked(marked.astype(np.uint8), tuple(np.unique(level.clip(0)).astype(float).tolist()), "classes", alpha)
    code, unit = _coded(level, float(top))
    threshold, levels = _threshold(code, not alpha and _coloured(mask))
    found = ([] if marked.all() else [0.0]) + (levels * unit).tolist()
    return Marked((code > threshold).astype(np.uint8), tuple(found), "soft" if threshold else "classes", alpha)


def _flat(mask: np.ndarray) -> tuple[np.ndarray, bool]:
    """The levels (H, W) of a mask, and whether they are those of its alpha."""
    if mask.ndim == 2:
        return mask, False
    channels = list(np.moveaxis(mask, 2, 0))
    alpha = channels.pop() if len(channels) in (2, 4) else None
    colour = reduce(np.maximum, channels)
    if alpha is None:
        return colour, False
    full = np.iinfo(mask.dtype).max if mask.dtype.kind in "iu" else max(float(mask.max()), 1.0)
    least, most = alpha.min(), alpha.max()
    shown = alpha > most / 2 if most > 0 else np.ones(alpha.shape, bool)  # what is invisible may have any colour
    single = all(int(seen.max()) - int(seen.min()) <= ONE_COLOUR * full for seen in (channel[shown] for channel in channels))
    if single and (least < most or most == 0):
        return alpha, True
    if least == most:
        return colour, False
    return np.rint(colour * (alpha / full)).astype(mask.dtype) if mask.dtype.kind in "iu" else colour * (alpha / full), False


def _coloured(mask: np.ndarray) -> bool:
    """Whether a mask has a pixel that is clearly not grey."""
    if mask.ndim == 2 or mask.shape[2] < 3:
        return False
    channels = np.moveaxis(mask[..., :3], 2, 0)
    high = reduce(np.maximum, channels)
    return bool((high - reduce(np.minimum, channels) > FAINT * float(high.max())).any())


def _coded(level: np.ndarray, top: float) -> tuple[np.ndarray, float]:
    """Levels as uint8 or uint16, none above 0 as 0, and what one of these stands for."""
    if level.dtype.kind in "iu":
        return level, 1.0
    level = level.clip(0)
    if top <= 65535 and (level == np.rint(level)).all():
        return level.astype(np.uint16), 1.0
    scale = next((scale for scale in (1.0, 255.0, 65535.0) if top <= scale), top)
    return np.ceil(level * (65535 / scale)).astype(np.uint16), scale / 65535


def _threshold(level: np.ndarray, coloured: bool) -> tuple[float, np.ndarray]:
    """Above which level of a mask (H, W) uint8 or uint16 of several levels pixels are marked, 0 for classes; and the levels above 0."""
    part = np.pad(level[_extent(level.any(1)), _extent(level.any(0))], REACH, "edge" if level.all() else "constant")
    top = int(part.max())
    rows = max(1, BAND // part.shape[1])
    counts = sum(_counted(part[i : i + rows + 2 * REACH], top) for i in range(0, len(part) - 2 * REACH, rows))
    levels = np.flatnonzero(counts[:, 0])
    pixels, edge, below, area, even = counts[levels].T
    half = (255 if top <= 255 else 65535) / 2
    soft = 2 * edge > pixels
    if top > half:
        soft |= (levels < FAINT * top) & (area == 0)
    if len(levels) > FEW:
        soft |= (below > 0) & (area == 0)
    if top <= FEW or 255 < top <= half or 2 * np.count_nonzero(soft) < len(levels):
        return 0, levels
    painted = levels[(even > AREA * even.sum()) & (levels >= FAINT * top)]
    lowest = painted[0] if len(painted) else top if coloured or top <= half else 2 * half
    return (half if lowest > 1.8 * half else lowest / 2), levels


def _counted(padded: np.ndarray, top: int) -> np.ndarray:
    """(top + 1, 5): of each level above 0 the pixels, those that are edges or alone, near a higher one, in an area, in an even one."""
    own = padded[REACH:-REACH, REACH:-REACH]
    low, high = _around(padded, np.minimum), _around(padded, np.maximum)
    metadata = (low < own) & (own < high) | _alone(padded), own < high, low == high, high - low <= EVEN * top
    code = own.astype(np.uint32 if own.itemsize > 1 else np.uint16) << len(metadata)
    for i, fact in enumerate(metadata):
        code |= fact.astype(np.uint8) << i
    counts = np.bincount(code[own > 0], minlength=(top + 1) << len(metadata)).reshape(top + 1, -1)
    of = np.arange(counts.shape[1])
    return counts @ np.stack([of >= 0] + [of >> i & 1 for i in range(len(metadata))], 1)


def _extent(some: np.ndarray) -> slice:
    """From the first to the last that is true."""
    return slice(int(some.argmax()), len(some) - int(some[::-1].argmax()))


def _around(padded: np.ndarray, pick: np.ufunc) -> np.ndarray:
    """The lowest or highest level within REACH of each pixel, along both axes, of an array that reaches as far beyond them."""
    for _ in range(2):
        padded = reduce(pick, [padded[i : len(padded) - 2 * REACH + i] for i in range(2 * REACH + 1)]).T
    return padded


def _alone(padded: np.ndarray) -> np.ndarray:
    """Where none of the eight neighbours has a pixel's level."""
    inner = padded[REACH - 1 : 1 - REACH, REACH - 1 : 1 - REACH]
    same = np.zeros(inner.shape, bool)
    for down, right in ((0, 1), (1, -1), (1, 0), (1, 1)):
        a = (slice(None, -down or None), slice(max(-right, 0), -right if right > 0 else None))
        b = (slice(down, None), slice(max(right, 0), right if right < 0 else None))
        equal = inner[a] == inner[b]
        same[a] |= equal
        same[b] |= equal
    return ~same[1:-1, 1:-1]
