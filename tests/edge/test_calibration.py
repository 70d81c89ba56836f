"""The false-alarm bound by simulation, the exact rank, and the p-value that says the same as the decision."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blemish.edge.calibration import Threshold, conformal_threshold, p_values
from blemish.edge.errors import InputError

# ---- reference ----


@pytest.mark.parametrize(
    ("n", "alpha", "k"),
    [
        (19, 0.05, 19),
        (20, 0.05, 20),
        (39, 0.05, 38),
        (9, 0.1, 9),
        (9, 0.3, 7),
        (2, 1 / 3, 2),
        (48, 1 / 49, 48),
        (99, 0.01, 99),
        (5, 0.99, 1),
    ],
)
def test_rank_is_free_of_rounding(n, alpha, k):
    scores = torch.from_numpy(np.random.default_rng(n).permutation(n) + 1).float()
    assert conformal_threshold(scores, alpha) == Threshold(float(k), alpha, alpha, n)


def test_every_hundredth_and_every_reachable_rate_has_its_rank():
    for n in range(1, 120):
        scores = torch.arange(1.0, n + 1)
        rates = [Fraction(j, 100) for j in range(1, 100)] + [Fraction(j, n + 1) for j in range(1, n + 1)]
        for rate in rates:
            k = math.ceil((n + 1) * (1 - rate))
            result = conformal_threshold(scores, float(rate))
            assert (result.value, result.reachable) == (min(k, n), k <= n)


def test_p_values_are_the_definition():
    rng = np.random.default_rng(0)
    scores, calibration = rng.integers(0, 9, 50).astype(np.float32), rng.integers(0, 9, 30)
    expected = [(1 + (calibration >= s).sum()) / 31 for s in scores]
    result = p_values(torch.from_numpy(scores), torch.from_numpy(calibration).half())
    assert result.dtype == torch.float64
    np.testing.assert_array_equal(result.numpy(), expected)
    assert p_values(torch.from_numpy(scores), torch.empty(0)).unique().tolist() == [1.0]


# ---- the bound ----


@pytest.mark.parametrize("levels", [None, 1, 3])  # 1 and 3: heavy ties
@pytest.mark.parametrize(("n", "alpha"), [(19, 0.05), (30, 0.05), (9, 0.1), (50, 0.1), (5, 0.05)])
def test_false_alarm_rate_over_many_draws(levels, n, alpha):
    rng = np.random.default_rng(n)
    draws = rng.standard_exponential((20_000, n + 1))
    if levels:
        draws = np.round(draws * levels)
    bound = conformal_threshold(torch.from_numpy(draws[0, :n]), alpha).alpha
    k = min(math.ceil((n + 1) * (1 - Fraction(str(alpha)))), n)
    thresholds = np.sort(draws[:, :n], axis=1)[:, k - 1]
    for row in range(200):
        assert conformal_threshold(torch.from_numpy(draws[row, :n]), alpha).value == thresholds[row]
    rate = np.mean(draws[:, n] > thresholds)
    noise = 4 * math.sqrt(bound / len(draws))
    assert rate <= bound + noise
    if levels is None:  # without ties the bound is met up to one rank
        assert rate >= bound - 1 / (n + 1) - noise


# ---- invariants ----


@settings(max_examples=300, deadline=None)
@given(
    calibration=st.lists(st.integers(-4, 4).map(float) | st.floats(-1e3, 1e3, width=32), min_size=1, max_size=60),
    scores=st.lists(st.integers(-5, 5).map(float) | st.floats(-1e3, 1e3, width=32), min_size=1, max_size=10),
    alpha=st.integers(1, 99).map(lambda j: j / 100) | st.floats(1e-4, 0.9999),
)
def test_decision_is_p_at_most_alpha(calibration, scores, alpha):
    scores = torch.tensor(scores + calibration)
    threshold = conformal_threshold(torch.tensor(calibration), alpha)
    p = p_values(scores, torch.tensor(calibration))
    assert ((scores > threshold.value) == (p <= threshold.alpha)).all()
    assert threshold.alpha == (alpha if threshold.reachable else 1 / (len(calibration) + 1))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=40), st.floats(0.01, 0.99), st.floats(0.01, 0.99))
def test_fewer_false_alarms_need_a_higher_threshold(calibration, first, second):
    calibration = torch.tensor(calibration, dtype=torch.float64)
    low, high = sorted((first, second))
    assert conformal_threshold(calibration, low).value >= conformal_threshold(calibration, high).value
    assert (p_values(calibration.sort().values, calibration).diff() <= 0).all()
    shuffled = calibration[torch.randperm(len(calibration), generator=torch.Generator().manual_seed(0))]
    assert conformal_threshold(shuffled, low) == conformal_threshold(calibration, low)


# ---- contract ----


def test_a_rate_out_of_reach_says_so():
    result = conformal_threshold(torch.tensor([3.0, 1.0, 2.0]), 0.05)
    assert result == Threshold(3.0, 0.25, 0.05, 3)
    assert not result.reachable
    assert result.explain() == (
        "From 3 normal calibration images 5 % false alarms cannot be promised (that takes 19 images), "
        "but at most 25 % of normal images like them are expected above 3, to be called anomalous."
    )


def test_a_rate_within_reach_is_explained():
    result = conformal_threshold(torch.arange(19.0), 0.05)
    assert result.reachable
    assert result.explain() == (
        "From 19 normal calibration images: at most 5 % of normal images like them are expected above 18, to be called anomalous."
    )


def test_no_images_no_threshold():
    result = conformal_threshold(torch.empty(0), 0.05)
    assert result == Threshold(None, 1.0, 0.05, 0)
    assert not result.reachable
    assert "no threshold" in result.explain()


@pytest.mark.parametrize("alpha", [0, 1, -0.1, 1.5, math.nan])
def test_rates_outside_zero_and_one_are_refused(alpha):
    with pytest.raises(InputError, match="alpha"):
        conformal_threshold(torch.ones(3), alpha)


def test_scores_that_are_no_numbers_are_refused():
    with pytest.raises(InputError, match="calibration scores: 1 of 2"):
        conformal_threshold(torch.tensor([1.0, torch.nan]), 0.1)
    with pytest.raises(InputError, match="calibration scores: 1 of 1"):
        p_values(torch.ones(1), torch.tensor([torch.inf]))
    with pytest.raises(InputError, match="^scores: .*NaN"):
        p_values(torch.tensor([torch.nan]), torch.ones(2))
    with pytest.raises(InputError, match=r"\(n,\)"):
        conformal_threshold(torch.ones(2, 2), 0.1)
