"""The bound on false alarms by simulation, the exact rank, and p-values that say the same as the decisions."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta

from blemish.edge.calibration import CROSS, FULL, Threshold, conditional_bound, conformal_threshold, p_values, rank
from blemish.edge.errors import InputError


@pytest.mark.parametrize(
    ("n", "alpha", "k"),
    [(19, 0.05, 19), (20, 0.05, 20), (39, 0.05, 38), (9, 0.3, 7), (2, 1 / 3, 2), (48, 1 / 49, 48), (99, 0.01, 99), (5, 0.99, 1)],
)
def test_rank_is_free_of_rounding(n, alpha, k):
    scores = np.random.default_rng(n).permutation(n) + 1.0
    assert conformal_threshold(scores, alpha) == Threshold(k, alpha, alpha, n)


def test_every_hundredth_and_every_reachable_rate_has_its_rank():
    for n in range(1, 120):
        for rate in [Fraction(j, 100) for j in range(1, 100)] + [Fraction(j, n + 1) for j in range(1, n + 1)]:
            k = math.ceil((n + 1) * (1 - rate))
            result = conformal_threshold(np.arange(1.0, n + 1), float(rate))
            assert (result.value, result.reachable) == (min(k, n), k <= n)


def test_p_values_are_the_definition():
    rng = np.random.default_rng(0)
    scores, calibration = rng.integers(0, 9, (5, 10)).astype(np.float32), rng.integers(0, 9, 30)
    expected = [[(1 + (calibration >= s).sum()) / 31 for s in row] for row in scores]
    for kind in (np.asarray, torch.from_numpy):  # tensors on the CPU are arrays too
        result = p_values(kind(scores), kind(calibration))
        assert result.dtype == np.float64
        np.testing.assert_array_equal(result, expected)
    assert p_values(scores[0, 0], calibration) == expected[0][0]
    assert set(p_values(scores[0], [])) == {1.0}


@pytest.mark.parametrize("levels", [None, 1, 3])  # 1 and 3: heavy ties
@pytest.mark.parametrize(("n", "alpha"), [(19, 0.05), (30, 0.05), (9, 0.1), (50, 0.1), (5, 0.05)])
def test_false_alarm_rate_over_many_draws(levels, n, alpha):
    draws = np.random.default_rng(n).standard_exponential((20_000, n + 1))
    draws = np.round(draws * levels) if levels else draws
    bound = conformal_threshold(draws[0, :n], alpha).alpha
    k = min(math.ceil((n + 1) * (1 - Fraction(str(alpha)))), n)
    thresholds = np.sort(draws[:, :n], axis=1)[:, k - 1]
    for row in range(50):
        assert conformal_threshold(draws[row, :n], alpha).value == thresholds[row]
    rate = np.mean(draws[:, n] > thresholds)
    noise = 4 * math.sqrt(bound / len(draws))
    assert rate <= bound + noise
    if levels is None:  # without ties the bound is met up to one rank
        assert rate >= bound - 1 / (n + 1) - noise


@settings(max_examples=300, deadline=None)
@given(
    calibration=st.lists(st.integers(-4, 4).map(float) | st.floats(-1e3, 1e3, width=32), min_size=1, max_size=60),
    scores=st.lists(st.integers(-5, 5).map(float) | st.floats(-1e3, 1e3, width=32), min_size=1, max_size=10),
    alpha=st.integers(1, 99).map(lambda j: j / 100) | st.floats(1e-4, 0.9999),
    other=st.floats(0.01, 0.99),
)
def test_decisions_and_p_values_agree(calibration, scores, alpha, other):
    scores = np.array(scores + calibration)
    threshold = conformal_threshold(calibration, alpha)
    assert ((scores > threshold.value) == (p_values(scores, calibration) <= threshold.alpha)).all()
    assert threshold.alpha == (alpha if threshold.reachable else 1 / (len(calibration) + 1))
    low, high = sorted((alpha, other))
    assert conformal_threshold(calibration, low).value >= conformal_threshold(calibration, high).value
    assert (np.diff(p_values(np.sort(scores), calibration)) <= 0).all()
    assert conformal_threshold(calibration[::-1], alpha) == threshold


@pytest.mark.parametrize(
    ("scores", "expected", "words"),
    [
        ([3.0, 1.0, 2.0], Threshold(3.0, 0.25, 0.05, 3), "5 % false alarms cannot be promised (that takes 19 images), but at most 25 % of"),
        (np.arange(19.0), Threshold(18.0, 0.05, 0.05, 19), "From 19 normal calibration images: at most 5 % of normal images"),
        ([], Threshold(None, 1.0, 0.05, 0), "no threshold"),
    ],
)
def test_a_threshold_explains_what_it_promises(scores, expected, words):
    result = conformal_threshold(scores, 0.05)
    assert result == expected and result.reachable == (len(scores) == 19)
    assert words in result.explain()


@pytest.mark.parametrize("alpha", [0, 1, -0.1, 1.5, math.nan])
def test_rates_outside_zero_and_one_are_refused(alpha):
    with pytest.raises(InputError, match="alpha"):
        conformal_threshold(np.ones(3), alpha)


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (lambda: conformal_threshold([1.0, np.nan], 0.1), "calibration scores: 1 of 2"),
        (lambda: p_values([1.0], [np.inf]), "calibration scores: 1 of 1"),
        (lambda: p_values([np.nan], [1.0, 1.0]), "^scores: NaN"),
        (lambda: conformal_threshold(np.ones((2, 2)), 0.1), r"\(n,\)"),
    ],
)
def test_scores_that_are_no_numbers_are_refused(work, message):
    with pytest.raises(InputError, match=message):
        work()


@pytest.mark.parametrize(("n", "alpha"), [(1, 0.5), (19, 0.05), (32, 0.05), (99, 0.01), (200, 0.05), (30, 0.9), (5, 0.01)])
def test_the_bound_for_one_set_of_images_is_a_quantile_of_beta(n, alpha):
    k = min(rank(n, alpha), n)
    for confidence in (0.9, 0.95):
        assert conditional_bound(n, alpha, confidence) == pytest.approx(beta.ppf(confidence, n + 1 - k, k), rel=1e-9)


def test_the_bound_for_one_set_of_images_by_simulation():
    n, rng = 40, np.random.default_rng(0)
    thresholds = np.sort(rng.random((20_000, n)))[:, rank(n, 0.05) - 1]
    assert np.mean(1 - thresholds > conformal_threshold(rng.random(n), 0.05).conditional) == pytest.approx(0.05, abs=0.006)


@pytest.mark.parametrize(("promise", "proven"), [("split", True), (FULL, True), (CROSS, False)])
def test_a_threshold_tells_what_it_promises(promise, proven):
    threshold = conformal_threshold(np.arange(40.0), 0.05, promise)
    assert ("at most 5 %" in threshold.explain()) == proven and ("not proven" in threshold.explain()) != proven
    assert (threshold.conditional is None) == ("95 % confidence" not in threshold.explain()) == (promise != "split")
