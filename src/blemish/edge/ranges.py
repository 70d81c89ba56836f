"""The values that the training images had, and whether those of another image are like them."""

from typing import NamedTuple

import numpy as np


class Range(NamedTuple):
    """The values of the training images of a dtype."""

    lo: float  # 0.05 % of all values are lower
    hi: float  # 0.05 % of all values are higher
    least: float  # `largest` of the darkest image


def sampled(array: np.ndarray, most: int = 2**16) -> np.ndarray:
    """At most so many values of an image, drawn at random."""
    values = array.ravel()
    return values if values.size <= most else values[np.random.default_rng(0).integers(values.size, size=most)]


def largest(array: np.ndarray) -> float:
    """The value that a thousandth of an image's pixels exceed."""
    return float(np.quantile(sampled(array), 0.999, method="inverted_cdf")) if array.size else np.inf


def range_of(lo: float, hi: float) -> Range:
    """The range to expect where only black and white are known."""
    return Range(lo, hi, lo + 0.3 * (hi - lo))


def doubt(array: np.ndarray, expected: Range) -> str:
    """How the values of an image differ from those expected, "" if they do not.

    They do if more than half of them lie outside, or all but a thousandth are below a third of those of the darkest training image.
    """
    values, (lo, hi, least) = sampled(array), expected
    above, below = (float((values > hi).mean()), float((values < lo).mean())) if values.size else (0.0, 0.0)
    if above + below > 0.5:
        return f"{above:.0%} of its values are above {hi:g}" if above > below else f"{below:.0%} of its values are below {lo:g}"
    dark = lo + (least - lo) / 3
    return f"hardly a value is above {dark:g}" if largest(array) < dark else ""
