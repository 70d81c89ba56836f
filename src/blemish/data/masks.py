"""Which pixels a mask marks, in a file or an array: one rule for defects and regions of interest."""

from functools import reduce
from pathlib import Path
from typing import NamedTuple

import numpy as np

from blemish.edge.errors import InputError
from blemish.edge.reading import read

REACH = 2  # pixels: a level with a lower and a higher one within this reach is an edge there, neither an area nor a line
FEW = 16  # masks of no higher level hold class numbers; with more levels than this, a class has an area
FAINT = 1 / 8  # of the highest level: a soft mask has noise below, and a lower level without an area is noise
EVEN = 10 / 255  # of the highest level: the most that an area of a compressed mask varies
AREA = 0.02  # of all areas: the least share of a level that a soft mask was painted in
ONE_COLOUR = 8 / 255  # of full scale: colours no further apart are one, varied by a codec or a brush
BAND = 2**18  # pixels that are processed together, so few that they stay in the processor's cache


class Marked(NamedTuple):
    """A mask and how it was read."""

    mask: np.ndarray  # (H, W) uint8, 1 on marked pixels and 0 elsewhere
    levels: tuple[float, ...]  # that occur, ascending
    kind: str  # "plain": at most one level beside 0; "classes": each level above 0 is marked; "soft": levels above a threshold are
    alpha: bool  # the mask is the transparency, not the colour


def read_mask(path: str | Path) -> np.ndarray:
    """A mask file as (H, W) uint8, 1 on marked pixels and 0 elsewhere; InputError as for `read`."""
    return binary(read(path, labels=True))


def binary(mask: np.ndarray) -> np.ndarray:
    """The mask (H, W) uint8 of `interpret`."""
    return interpret(mask).mask


def interpret(mask: np.ndarray) -> Marked:
    """Tell which pixels an array (H, W) or (H, W, C) marks: grey, grey and alpha, RGB, or RGB and alpha.

    The mask is alpha if it varies while the colour of visible pixels does not, else the largest channel on black. Integers wider than 16
    bits are class numbers, and so are levels with areas or lines of their own: each above 0 is marked. A mask most of whose levels only
    lead from lower to higher ones is soft: blurred or compressed. It is marked above half of the lowest level that areas of it have, which
    is above 127 for white on black, and if no level has areas; above half of its highest level if that is at most half the scale, or the
    mask is coloured. InputError for another shape or dtype, and for values that are not finite.
    """
    if mask.dtype.kind not in "buif":
        raise InputError(f"an array of {mask.dtype}; expected a mask of bool, whole numbers or floats")
    if mask.ndim not in (2, 3) or mask.shape[2:] not in ((), (1,), (2,), (3,), (4,)) or 0 in mask.shape:
        raise InputError(f"an array of shape {mask.shape}; expected a mask (H, W), or (H, W, C) of 1 to 4 channels")
    if mask.dtype.kind == "f" and not np.isfinite(mask).all():
        raise InputError("a mask with values that are NaN or infinite; expected finite values")
    level, alpha = _flat(mask.astype(np.uint8) if mask.dtype == bool else mask)
    top, marked = level.max(), level > 0
    if (~marked | (level == top)).all():
        levels = ([] if marked.all() else [0.0]) + [float(top)] * bool(top > 0)
        return Marked(marked.astype(np.uint8), tuple(levels), "plain", alpha)
    if level.dtype not in (np.uint8, np.uint16) and level.dtype.kind in "iu":
        return Marked(marked.astype(np.uint8), tuple(np.unique(level.clip(0)).astype(float).tolist()), "classes", alpha)
    code, unit = _coded(level, float(top))
    threshold, levels = _threshold(code, not alpha and _is_coloured(mask))
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
    whole = mask.dtype.kind in "iu"
    full = np.iinfo(mask.dtype).max if whole else max(float(mask.max()), 1.0)
    least, most = alpha.min(), alpha.max()
    visible = alpha > most / 2 if most > 0 else np.ones(alpha.shape, bool)  # invisible pixels may have any colour
    visible_levels = [channel[visible] for channel in channels]
    is_one_colour = all(int(levels.max()) - int(levels.min()) <= ONE_COLOUR * full for levels in visible_levels)
    if is_one_colour and (least < most or most == 0):
        return alpha, True
    if least == most:
        return colour, False
    on_black = colour * (alpha / full)
    return np.rint(on_black).astype(mask.dtype) if whole else on_black, False


def _is_coloured(mask: np.ndarray) -> bool:
    """Whether a pixel of a mask is clearly not grey."""
    if mask.ndim == 2 or mask.shape[2] < 3:
        return False
    channels = np.moveaxis(mask[..., :3], 2, 0)
    high = reduce(np.maximum, channels)
    return bool((high - reduce(np.minimum, channels) > FAINT * float(high.max())).any())


def _coded(level: np.ndarray, top: float) -> tuple[np.ndarray, float]:
    """Levels as uint8 or uint16, of which none above 0 becomes 0, and the value of one of their units."""
    if level.dtype.kind in "iu":
        return level, 1.0
    level = level.clip(0)
    if top <= 65535 and (level == np.rint(level)).all():
        return level.astype(np.uint16), 1.0
    scale = next((scale for scale in (1.0, 255.0, 65535.0) if top <= scale), top)
    return np.ceil(level * (65535 / scale)).astype(np.uint16), scale / 65535


def _threshold(level: np.ndarray, coloured: bool) -> tuple[float, np.ndarray]:
    """The threshold of a mask (H, W) uint8 or uint16 of several levels, 0 for classes; and its levels above 0."""
    rows, columns = (np.flatnonzero(level.any(axis)) for axis in (1, 0))
    part = level[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    part = np.pad(part, REACH, "edge" if level.all() else "constant")
    top, step = int(part.max()), max(1, BAND // part.shape[1])
    counts = sum(_counted(part[i : i + step + 2 * REACH], top) for i in range(0, len(part) - 2 * REACH, step))
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
    """(top + 1, 5): of each level above 0 all pixels, and those on an edge or alone, below a higher level, in an area, in an even area."""
    own = padded[REACH:-REACH, REACH:-REACH]
    low, high = _around(padded, np.minimum), _around(padded, np.maximum)
    facts = (low < own) & (own < high) | _alone(padded), own < high, low == high, high - low <= EVEN * top
    code = own.astype(np.uint32 if own.itemsize > 1 else np.uint16) << len(facts)  # one count of level and facts together
    for i, fact in enumerate(facts):
        code |= fact.astype(np.uint8) << i
    counts = np.bincount(code[own > 0], minlength=(top + 1) << len(facts)).reshape(top + 1, -1)
    codes = np.arange(counts.shape[1])
    return counts @ np.stack([codes >= 0] + [codes >> i & 1 for i in range(len(facts))], 1)


def _around(padded: np.ndarray, pick: np.ufunc) -> np.ndarray:
    """The lowest or highest level within REACH of each pixel along both axes, of an array that reaches as far beyond them."""
    for _ in range(2):
        padded = reduce(pick, [padded[i : len(padded) - 2 * REACH + i] for i in range(2 * REACH + 1)]).T
    return padded


def _alone(padded: np.ndarray) -> np.ndarray:
    """Where none of the eight neighbours has a pixel's level."""
    height, width = (length - 2 * REACH for length in padded.shape)
    shifts = [(y, x) for y in range(REACH - 1, REACH + 2) for x in range(REACH - 1, REACH + 2) if (y, x) != (REACH, REACH)]
    own = padded[REACH:-REACH, REACH:-REACH]
    return ~reduce(np.logical_or, [own == padded[y : y + height, x : x + width] for y, x in shifts])
