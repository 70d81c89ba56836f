"""The conformal test martingale against its definition, its false alarms and its delays."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from blemish.edge.drift import POWERS, Drift, Summary, bet, reserve
from blemish.edge.errors import InputError


def odds(p: float) -> list[float]:
    return [power * q ** (power - 1) for q in (p, 1 - p) for power in POWERS]


def wealth_by_definition(p: list[float]) -> float:
    """Σ over starts τ of the reserve given out at τ, divided among the bets, times what each won since, + what is still in reserve."""
    total = reserve(len(p))
    for start in range(1, len(p) + 1):
        won = np.prod([odds(one) for one in p[start - 1 :]], axis=0)  # (bets,)
        total += (reserve(start - 1) - reserve(start)) * won.mean()
    return total


def stopped(calibration: np.ndarray, stream: np.ndarray, rate: float, seed: int) -> int | None:
    """The score at which the wealth reaches 1 / rate, None if it never does."""
    drift = Drift(calibration.tolist(), seed)
    for i, score in enumerate(stream.tolist()):
        drift.take(score)
        if drift.log_wealth >= -math.log(rate):
            return i + 1
    return None


@settings(max_examples=25)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=8), st.lists(st.integers(0, 6), min_size=1, max_size=25), st.integers(0, 99))
def test_p_values_and_wealth_by_their_definitions(calibration, stream, seed):
    """Whole numbers, so that there are ties."""
    drift, before, p = Drift([float(s) for s in calibration], seed), list(calibration), []
    for i, score in enumerate(stream):
        u = np.random.default_rng([seed, i + 1]).random()
        higher, ties = sum(s > score for s in before), sum(s == score for s in before)
        p.append((higher + u * (1 + ties)) / (len(before) + 1))
        assert drift.take(float(score)) == pytest.approx(p[-1], rel=1e-12)
        before.append(score)
        assert drift.scores == sorted(before)
    assert math.exp(drift.log_wealth) == pytest.approx(wealth_by_definition(p), rel=1e-9)


def test_the_bets_are_fair():
    """Each gives back its stake on average over uniform p, so the wealth is a martingale."""
    for i in range(2 * len(POWERS)):
        won, _ = integrate.quad(lambda p, i=i: odds(p)[i], 0.01, 0.99)
        power = POWERS[i % len(POWERS)]
        assert won == pytest.approx(0.99**power - 0.01**power)  # of which the limit is 1
    logs = bet([-math.inf] * (2 * len(POWERS)), 0.3, 0.5)
    np.testing.assert_allclose(np.exp(logs), 0.05 * np.array(odds(0.3)))
    assert all(reserve(t) > reserve(t + 1) > 0 for t in range(100)) and reserve(0) == 1


def test_p_values_of_an_exchangeable_stream_are_uniform_and_independent():
    """Also where scores are forgotten."""
    p = []
    for seed in range(60):
        rng = np.random.default_rng([7, seed])
        drift = Drift(rng.integers(0, 5, 10).astype(float).tolist(), seed, kept=20)
        p.append([drift.take(float(score)) for score in rng.integers(0, 5, 100)])
        assert len(drift.scores) == 20
    p = np.array(p)
    assert stats.kstest(p.ravel(), "uniform").pvalue > 0.001
    for lag in (1, 2, 5, 20):
        assert abs(np.corrcoef(p[:, lag:].ravel(), p[:, :-lag].ravel())[0, 1]) < 4 / math.sqrt(p.size)


@pytest.mark.parametrize("draw", ["normal", "lognormal", "ties"])
def test_false_alarms_stay_below_the_rate(draw):
    """100 normal streams of 200 images after 20 calibration images: at most a share of 0.1, and the binomial's luck, ever alarms."""
    rate, alarms, streams = 0.1, 0, 100
    for seed in range(streams):
        rng = np.random.default_rng([11, seed])
        scores = rng.integers(0, 4, 220).astype(float) if draw == "ties" else getattr(rng, draw)(size=220)
        alarms += stopped(scores[:20], scores[20:], rate, seed) is not None
    assert alarms <= stats.binom.ppf(0.999, streams, rate)


@pytest.mark.parametrize(("shift", "quiet", "most"), [(2, 0, 30), (2, 200, 30), (-2, 200, 30), (1, 200, 100), (4, 0, 15)])
def test_delay_of_detection(shift, quiet, most):
    """The median number of images from a shift, in standard deviations, to the alarm at a rate of 0.01, after 50 calibration images."""
    delays = []
    for seed in range(9):
        rng = np.random.default_rng([13, seed])
        scores = rng.normal(size=50 + quiet + 200)
        scores[50 + quiet :] += shift
        found = stopped(scores[:50], scores[50:], 0.01, seed)
        delays.append(math.inf if found is None else found - quiet)
    assert 0 < np.median(delays) <= most


def test_refuses():
    with pytest.raises(InputError, match="monitor: 0"):
        Drift([], 0)
    with pytest.raises(InputError, match="finite"):
        Drift([1.0, math.nan], 0)
    with pytest.raises(InputError, match="nan"):
        Drift([1.0], 0).take(math.nan)


def test_extremes_do_not_break_the_arithmetic():
    drift = Drift([0.0], 0)
    for i in range(3000):
        drift.take(float(i + 1))  # always the highest so far
    assert math.isfinite(drift.log_wealth) and drift.log_wealth > 1000


@settings(max_examples=30)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60))
def test_summary(values):
    summary = Summary(0)
    for value in values:
        summary.take(value)
    metadata = summary.metadata()
    assert metadata["count"] == len(values) and metadata["min"] == min(values) and metadata["max"] == max(values)
    assert metadata["mean"] == pytest.approx(np.mean(values), abs=1e-6)
    assert metadata["deviation"] == pytest.approx(np.std(values, ddof=1) if len(values) > 1 else 0, abs=1e-5, rel=1e-9)
    assert metadata["quantiles"]["0.95"] == pytest.approx(np.quantile(values, 0.95))


def test_a_summary_keeps_a_uniform_sample():
    hits = np.zeros(200)
    for seed in range(200):
        summary = Summary(seed, size=20)
        for i in range(200):
            summary.take(float(i))
        hits[np.array(summary.sample, int)] += 1
    assert len(summary.sample) == 20 and hits.sum() == 20 * 200
    assert stats.chisquare(hits).pvalue > 0.001
    summary.take(math.nan)
    assert summary.metadata()["count"] == 200 and summary.metadata()["not_finite"] == 1 and Summary(0).metadata()["count"] == 0
