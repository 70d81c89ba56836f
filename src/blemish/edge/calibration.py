"""Decisions from the scores of normal images: a threshold with a bound on false alarms (conformal prediction).

Vovk, Gammerman and Shafer, Algorithmic Learning in a Random World, 2005; as anomaly detection: Laxhammar and Falkman, 2010.
"""

import math
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from .checks import check_number
from .errors import InputError

RARE = 0.01  # probability below which a number of false alarms is worth a warning
CONFIDENCE = 0.95  # of a bound that holds for one set of calibration images
SPLIT, FULL, CROSS = "split", "full", "cross"
PROMISES = {  # how calibration images were scored, which decides what a threshold from their scores promises
    SPLIT: "normal calibration image{s}",  # held out from the fit: P(false alarm) ≤ alpha
    FULL: "normal image{s} that the detector was also fitted to, each scored without itself",  # P(false alarm) ≤ alpha
    CROSS: "normal image{s} that the detector was also fitted to, each scored by a fit without it",  # nothing is proven
}


class Threshold(NamedTuple):
    """An image is anomalous if its score is above `value`; on average over calibration sets, at most alpha of the normal images are.

    This is proven for the `promise` SPLIT and FULL. With CROSS alpha is the share of the calibration images themselves.
    """

    value: float | None  # None: no calibration image, no decision
    alpha: float | None  # the bound that holds: as requested, or the smallest that n images reach, 1 / (n + 1); None: set by hand
    requested: float | None
    n: int  # calibration images
    above: int = 0  # of them, with a score above a value that was set by hand
    promise: str = SPLIT  # one of PROMISES

    @property
    def by_hand(self) -> bool:
        return self.alpha is None

    @property
    def reachable(self) -> bool:
        return self.by_hand or self.alpha <= self.requested

    @property
    def conditional(self) -> float | None:
        """The bound on the false alarms of this very threshold, with CONFIDENCE over the draw of the images; None where none is proven."""
        proven = self.promise == SPLIT and not self.by_hand and self.n
        return conditional_bound(self.n, self.requested, CONFIDENCE) if proven else None

    def explain(self) -> str:
        """What the threshold promises, in one sentence."""
        images = f"{self.n} {PROMISES[self.promise].format(s='s' * (self.n != 1))}"
        if self.value is None:
            return "There are no calibration images, so there is no threshold and no image is decided on."
        if self.by_hand:
            found = f"of {images} {self.above} score above it" if self.n else "there are no calibration images to compare it with"
            return f"The threshold {self.value:.6g} was set by hand, without a bound on false alarms; {found}."
        least = "about" if self.promise == CROSS else "at most"
        promise = f"{least} {100 * self.alpha:.3g} % of normal images like them are expected above {self.value:.6g}, to be called anomalous"
        promise += f"; with {100 * CONFIDENCE:.3g} % confidence at most {100 * self.conditional:.3g} %" if self.conditional else ""
        promise += ", which is measured, not proven" if self.promise == CROSS else ""
        if self.reachable:
            return f"From {images}: {promise}."
        needed = math.ceil(1 / exact(self.requested)) - 1
        return f"From {images}, {100 * self.requested:.3g} % false alarms cannot be promised (that takes {needed} images), but {promise}."


def exact(alpha: float) -> Fraction:
    """The rational number that a float in (0, 1) stands for: 0.05 is 1/20, which its binary digits are not."""
    check_number("", "(0, 1)", alpha=alpha)
    simple = Fraction(float(alpha)).limit_denominator(10**6)
    return simple if float(simple) == float(alpha) else Fraction(float(alpha))


def rank(n: int, alpha: float) -> int:
    """The rank k = ceil((n + 1)(1 − alpha)) of the threshold among n scores; above n where they cannot promise alpha."""
    return math.ceil((n + 1) * (1 - exact(alpha)))


def conformal_threshold(scores: ArrayLike, alpha: float, promise: str = SPLIT) -> Threshold:
    """The k-th smallest of the scores (n,) of normal images, k as `rank`; `promise` says how they were scored, see PROMISES.

    If they and a new normal image are exchangeable, the new one scores above it with probability ≤ alpha, ties included. With
    n < ceil(1 / alpha) − 1 no threshold has that bound: the largest score is returned, with its bound 1 / (n + 1).
    Raises InputError for NaN or infinite scores and for alpha outside (0, 1).
    """
    scores = _finite(scores)
    n, k = len(scores), rank(len(scores), alpha)
    bound = float(alpha) if k <= n else 1 / (n + 1)
    return Threshold(float(np.sort(scores)[min(k, n) - 1]) if n else None, bound, float(alpha), n, promise=promise)


def conditional_bound(n: int, alpha: float, confidence: float) -> float:
    """The false alarm rate that a threshold from n held-out scores at `alpha` does not exceed with `confidence` over their draw.

    The rate given the n scores is Beta(n + 1 − k, k), k as `rank`, or below it where scores are tied (Vovk 2012, as below): its
    quantile x has P(Binomial(n, x) ≤ n − k) = 1 − confidence. As Clopper and Pearson's bound from n − k alarms of n.
    """
    above = n - min(rank(n, alpha), n)
    low, high = above / n, 1.0
    for _ in range(60):  # halve the interval down to the precision of floats
        rate = (low + high) / 2
        terms = (log_choose(n, j) + j * math.log(rate) + (n - j) * math.log1p(-rate) for j in range(above + 1))
        low, high = (rate, high) if sum(map(math.exp, terms)) > 1 - confidence else (low, rate)
    return high


def log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def chance_of_alarms(alarms: int, normal: int, alpha: float, n: int) -> float:
    """Probability of at least so many false alarms among `normal` images like the n that a threshold was calibrated with at `alpha`.

    The share of normal images above the k-th of n exchangeable scores is Beta(n + 1 − k, k), so that the alarms among m new images are
    beta-binomial (Vovk 2012, Conditional validity of inductive conformal predictors).
    """
    b = min(rank(n, alpha), n)
    a = n + 1 - b

    def log_beta(x: float, y: float) -> float:
        return math.lgamma(x) + math.lgamma(y) - math.lgamma(x + y)

    terms = (log_beta(a + j, b + normal - j) - log_beta(a, b) - log_beta(j + 1, normal - j + 1) for j in range(alarms, normal + 1))
    return min(1.0, sum(math.exp(term) for term in terms) / (normal + 1))  # the last quotient makes the third term a binomial coefficient


def by_hand(value: float, scores: ArrayLike, promise: str = SPLIT) -> Threshold:
    """A threshold set by hand, with how many of the scores (n,) of normal images are above it."""
    scores = _finite(scores)
    return Threshold(float(value), None, None, len(scores), int((scores > value).sum()), promise)


def p_values(scores: ArrayLike, calibration: ArrayLike) -> np.ndarray:
    """(1 + #{calibration ≥ score}) / (n + 1) of scores of any shape against calibration (n,), as float64 of their shape.

    p ≤ alpha says the same as score > conformal_threshold(calibration, alpha).value. Raises InputError for NaN scores.
    """
    scores, calibration = np.asarray(scores, np.float64), np.sort(_finite(calibration))
    if np.isnan(scores).any():
        raise InputError("scores: NaN found; expected numbers")
    below = np.searchsorted(calibration, scores)  # how many calibration scores are < score
    return (1 + len(calibration) - below) / (len(calibration) + 1)


def _finite(scores: ArrayLike) -> np.ndarray:
    scores = np.asarray(scores, np.float64)
    if scores.ndim != 1:
        raise InputError(f"calibration scores: shape {scores.shape} found, (n,) expected")
    if not np.isfinite(scores).all():
        raise InputError(f"calibration scores: {np.count_nonzero(~np.isfinite(scores))} of {len(scores)} are NaN or infinite")
    return scores
