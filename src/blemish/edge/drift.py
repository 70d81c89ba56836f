"""Drift of scores: a conformal test martingale against the calibration scores, and a summary in fixed space.

Vovk, Nouretdinov and Gammerman, Testing exchangeability on-line, ICML 2003; Vovk et al., Retrain or not retrain: conformal test
martingales for change-point detection, COPA 2021; Ville, Étude critique de la notion de collectif, 1939.
"""

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from .errors import InputError

POWERS = (0.1, 0.3, 0.5, 0.7, 0.9)  # of bets ε·p^(ε−1) on high scores, and on low ones with 1 − p; the smaller the bolder
KEPT = 50_000  # largest number of scores that a new one is ranked among
SAMPLE = 4096  # scores from which quantiles are estimated
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
TINY = 2.0**-60  # in place of a p-value of 0, which has probability 2⁻⁵³


@dataclass
class Drift:
    """A sequential test of the hypothesis that calibration and production scores are exchangeable, valid after every score.

    `take(score)` ranks the score among all before it, calibration scores included: with u uniform in [0, 1),
    p = (#{s > score} + u·(1 + #{s = score})) / (n + 1), of all n scores s before. Under the hypothesis these p are independent and uniform,
    whatever the scores' distribution. The wealth is that of a gambler who begins with 1 and bets on p at fair odds: a martingale, which
    reaches 1 / rate with a probability of at most `rate`, however long the stream is.

    A reserve r_t = 1 / (1 + ln(1 + t)) is kept, and r_{t−1} − r_t of it is divided among the bets of POWERS at step t: this leaves
    money for a late change, whose delay grows as the logarithm of the number of scores before it.
    Above `kept` scores one of them, the new one included, is dropped at random, which leaves the p-values independent and uniform.
    """

    scores: list[float]  # sorted: what the next score is ranked among; the calibration scores at first
    seed: int
    count: int = 0  # scores taken
    logs: list[float] = field(default_factory=lambda: [-math.inf] * (2 * len(POWERS)))  # natural logarithms of the bets' wealth
    kept: int = KEPT

    def __post_init__(self) -> None:
        if not self.scores or not np.isfinite(self.scores).all():
            raise InputError(f"monitor: {len(self.scores)} calibration scores, all finite and one at least expected")
        self.scores = sorted(self.scores)

    def take(self, score: float) -> float:
        """Add a score and return its p-value; InputError unless it is finite."""
        if not math.isfinite(score):
            raise InputError(f"monitor: a score of {score}; a finite one expected")
        self.count += 1
        random = np.random.default_rng([self.seed, self.count])  # one for each score, so that a restart changes nothing
        first, last = bisect.bisect_left(self.scores, score), bisect.bisect_right(self.scores, score)
        n = len(self.scores)
        p = (n - last + random.random() * (last - first + 1)) / (n + 1)
        self.logs = bet(self.logs, p, reserve(self.count - 1) - reserve(self.count))
        self.scores.insert(last, score)
        if len(self.scores) > self.kept:
            del self.scores[random.integers(len(self.scores))]
        return p

    @property
    def log_wealth(self) -> float:
        """Natural logarithm of reserve and bets together."""
        return float(np.logaddexp.reduce([math.log(reserve(self.count)), *self.logs]))


def reserve(count: int) -> float:
    """The share of the initial wealth that is not at stake after `count` scores."""
    return 1 / (1 + math.log1p(count))


def bet(logs: Sequence[float], p: float, stake: float) -> list[float]:
    """The logarithms of the bets' wealth after a p-value, with a `stake` divided among them before it: ∫ ε·p^(ε−1) dp = 1."""
    more = math.log(stake / len(logs))
    low, high = math.log(max(p, TINY)), math.log(max(1 - p, TINY))
    gains = [math.log(power) + (power - 1) * side for side in (low, high) for power in POWERS]
    return [float(np.logaddexp(log, more)) + gain for log, gain in zip(logs, gains, strict=True)]


@dataclass
class Summary:
    """Count, mean, deviation, extremes and quantiles of a stream of scores, in fixed space.

    Quantiles are those of a uniform sample of at most `size` scores (Vitter, Random sampling with a reservoir, 1985).
    """

    seed: int
    count: int = 0
    mean: float = 0.0
    scatter: float = 0.0  # Σ (score − mean)²
    low: float = math.inf
    high: float = -math.inf
    sample: list[float] = field(default_factory=list)
    size: int = SAMPLE
    not_finite: int = 0

    def take(self, score: float) -> None:
        if not math.isfinite(score):
            self.not_finite += 1
            return
        self.count += 1
        delta = score - self.mean
        self.mean += delta / self.count
        self.scatter += delta * (score - self.mean)
        self.low, self.high = min(self.low, score), max(self.high, score)
        if len(self.sample) < self.size:
            self.sample.append(score)
        elif (place := int(np.random.default_rng([self.seed, self.count, 1]).integers(self.count))) < self.size:
            self.sample[place] = score

    def metadata(self) -> dict[str, float | int | dict[str, float]]:
        """The statistics by name, the deviation with n − 1."""
        if not self.count:
            return {"count": 0, "not_finite": self.not_finite}
        quantiles = {f"{q:g}": float(value) for q, value in zip(QUANTILES, np.quantile(self.sample, QUANTILES), strict=True)}
        deviation = math.sqrt(self.scatter / (self.count - 1)) if self.count > 1 else 0.0
        moments = {"count": self.count, "mean": self.mean, "deviation": deviation}
        return moments | {"min": self.low, "max": self.high, "quantiles": quantiles, "not_finite": self.not_finite}
