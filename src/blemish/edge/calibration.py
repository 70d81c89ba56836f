"""Decisions from normal images held out of the training: a threshold with a bound on false alarms (split conformal prediction).

Vovk, Gammerman and Shafer, Algorithmic Learning in a Random World, 2005; as anomaly detection: Laxhammar and Falkman, 2010.
"""

from __future__ import annotations

import math
from fractions import Fraction
from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple

from .checks import check_number
from .errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

RARE = 0.01  # probability below which a number of false alarms is worth a warning


class Threshold(NamedTuple):
    """Anomalous is a score > value; at most alpha of the normal images are, on average over the draw of the calibration images."""

    value: float | None  # None: no calibration image, no decision
    alpha: float | None  # the bound that holds: as requested, or the smallest that n images reach, 1 / (n + 1); None: set by hand
    requested: float | None
    n: int  # calibration images
    above: int = 0  # of them, with a score above a value that was set by hand

    @property
    def by_hand(self) -> bool:
        return self.alpha is None

    @property
    def reachable(self) -> bool:
        return self.by_hand or self.alpha <= self.requested

    def explain(self) -> str:
        """What the threshold promises, in one sentence."""
        images = f"{self.n} normal calibration image" + "s" * (self.n != 1)
        if self.value is None:
            return "There are no calibration images, so there is no threshold and no image is decided on."
        if self.by_hand:
            found = f"of {images} {self.above} score above it" if self.n else "there are no calibration images to compare it with"
            return f"The threshold {self.value:.6g} was set by hand, without a bound on false alarms; {found}."
        promise = f"at most {100 * self.alpha:.3g} % of normal images like them are expected above {self.value:.6g}, to be called anomalous"
        if self.reachable:
            return f"From {images}: {promise}."
        needed = math.ceil(1 / exact(self.requested)) - 1
        return f"From {images} {100 * self.requested:.3g} % false alarms cannot be promised (that takes {needed} images), but {promise}."


def exact(alpha: float) -> Fraction:
    """The rational number meant by a float in (0, 1): 0.05 is 1/20, which its binary digits are not; InputError outside."""
    check_number("", "(0, 1)", alpha=alpha)
    binary = Fraction(float(alpha))
    simple = binary.limit_denominator(10**6)
    return simple if float(simple) == float(binary) else binary


def conformal_threshold(scores: Tensor, alpha: float) -> Threshold:
    """The k-th smallest of the scores (n,) of normal images, k = ceil((n + 1)(1 − alpha)).

    If those and a new normal image are exchangeable, the new one scores above it with probability ≤ alpha, ties included. With
    n < ceil(1 / alpha) − 1 no threshold has that bound: the largest score is returned, with its bound 1 / (n + 1).
    Raises InputError for NaN or infinite scores and for alpha outside (0, 1).
    """
    scores = _finite(scores)
    n, rate = len(scores), exact(alpha)
    if n == 0:
        return Threshold(None, 1.0, float(alpha), 0)
    k = math.ceil((n + 1) * (1 - rate))
    bound = float(alpha) if k <= n else 1 / (n + 1)
    return Threshold(scores.sort().values[min(k, n) - 1].item(), bound, float(alpha), n)


def chance_of_alarms(alarms: int, normal: int, alpha: float, n: int) -> float:
    """Probability of at least so many false alarms among `normal` images like the n that a threshold was calibrated with at `alpha`.

    The threshold is the k-th smallest of n exchangeable scores, k = ceil((n + 1)(1 − alpha)): the share above it is Beta(n + 1 − k, k),
    and the alarms among m new images are beta-binomial (Vovk 2012, Conditional validity of inductive conformal predictors).
    """
    k = min(math.ceil((n + 1) * (1 - exact(alpha))), n)
    a, b = n + 1 - k, k

    def log_beta(x: float, y: float) -> float:
        return math.lgamma(x) + math.lgamma(y) - math.lgamma(x + y)

    terms = (log_beta(a + j, b + normal - j) - log_beta(a, b) - log_beta(j + 1, normal - j + 1) for j in range(alarms, normal + 1))
    return min(1.0, sum(math.exp(term) for term in terms) / (normal + 1))  # the last quotient makes the third term a binomial coefficient


def by_hand(value: float, scores: Tensor) -> Threshold:
    """A threshold that a person chose, with the scores (n,) of normal images to tell what it means."""
    scores = _finite(scores)
    return Threshold(float(value), None, None, len(scores), int((scores > value).sum()))


def finite(name: str, value: Any) -> float:
    """A finite number, as a float; InputError with the name of what was given for anything else."""
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise InputError(f"{name}={value}: expected a finite number")
    return float(value)


def rate(name: str, value: Any) -> float:
    """A number between 0 and 1, both excluded, as a float; InputError with the name of what was given for anything else."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value < 1:
        raise InputError(f"{name}={value}: expected a number between 0 and 1, both excluded")
    return float(value)


def p_values(scores: Tensor, calibration: Tensor) -> Tensor:
    """(1 + #{calibration ≥ score}) / (n + 1) for scores (B,) against calibration (n,) → (B,) float64, on the scores' device.

    p ≤ alpha says the same as score > conformal_threshold(calibration, alpha).value. Raises InputError for NaN scores.
    """
    import torch

    if scores.isnan().any():
        raise InputError("scores: found NaN, numbers expected")
    ranked = _finite(calibration).to(scores.device).sort().values  # (n,)
    below = torch.searchsorted(ranked, scores.detach().double().contiguous())  # (B,) how many are < score
    return (1 + len(ranked) - below).double() / (len(ranked) + 1)


def _finite(scores: Tensor) -> Tensor:
    scores = scores.detach().double()
    if scores.ndim != 1:
        raise InputError(f"calibration scores: shape {tuple(scores.shape)} found, (n,) expected")
    if not scores.isfinite().all():
        raise InputError(f"calibration scores: {int((~scores.isfinite()).sum())} of {len(scores)} are NaN or infinite; finite expected")
    return scores
