"""Adjusted p-values, and bounds on false alarms that hold at every threshold, by simulation."""

import numpy as np
import pytest
from scipy.stats import betabinom, false_discovery_control

from blemish.edge.calibration import p_values
from blemish.edge.errors import InputError
from blemish.edge.selection import _counts, _ranks, _tail, adjusted, certificate, false_alarm_bounds, region_levels, regions_at_most


def folder(rng: np.random.Generator, n: int, m: int, defects: int, levels: int | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores of m images, the first of them `defects`, their p-values among n normal scores, and the normal ones at or above each."""
    scores = rng.normal(size=n + m)
    scores[n : n + defects] += 3
    scores = np.round(scores * levels) if levels else scores
    p = p_values(scores[n:], scores[:n])
    false = (scores[n + defects :] >= scores[n:, None]).sum(1)
    return scores[n:], p, false


def test_adjusted_values_are_benjamini_and_hochbergs():
    rng = np.random.default_rng(0)
    for m in (1, 2, 7, 100):
        p = rng.integers(1, 31, m) / 30
        np.testing.assert_allclose(adjusted(p), false_discovery_control(p))
    assert adjusted([]).shape == (0,)


def test_selected_folders_have_few_false_alarms():
    rng, level, shares = np.random.default_rng(1), 0.2, []
    for _ in range(2000):
        _, p, _ = folder(rng, 100, 50, 10)
        chosen = adjusted(p) <= level
        shares.append(chosen[10:].sum() / max(chosen.sum(), 1))
    assert np.mean(shares) <= level * 40 / 50 + 4 * np.std(shares) / 2000**0.5  # of 50 images 40 are normal
    assert np.mean(shares) > 0.05


@pytest.mark.parametrize(("m", "n"), [(1, 1), (7, 3), (40, 19), (30, 200)])
def test_counts_of_normal_images_have_their_law(m, n):
    ranks = _ranks(n)
    tail, drawn = _tail(m, n, ranks), _counts(m, n, ranks)
    assert (np.diff(drawn, axis=1) >= 0).all() and drawn.max() <= m
    for row, c in enumerate(ranks):
        np.testing.assert_allclose(tail[row], betabinom.sf(np.arange(m + 1) - 1, m, c + 1, n - c), rtol=1e-9, atol=1e-12)
        mean, deviation = betabinom.stats(m, c + 1, n - c)
        assert abs(drawn[:, row].mean() - mean) <= 4.5 * (deviation / len(drawn)) ** 0.5


@pytest.mark.parametrize("levels", [None, 2])
@pytest.mark.parametrize(("n", "m", "defects"), [(19, 30, 0), (50, 200, 2), (50, 200, 40), (200, 60, 12), (30, 1, 0)])
def test_no_bound_of_a_folder_is_too_small_but_for_one_in_twenty(n, m, defects, levels):
    rng, draws, wrong = np.random.default_rng(n + m), 400, 0
    for _ in range(draws):
        scores, p, false = folder(rng, n, m, defects, levels)
        bound = false_alarm_bounds(scores, p, n)
        wrong += (false > bound).any()
        order = np.argsort(-scores, kind="stable")
        assert (np.diff(bound[order]) >= 0).all() and (bound >= 0).all()
        assert (bound <= (scores >= scores[:, None]).sum(1)).all()
    assert wrong / draws <= 0.05 + 3.5 * (0.05 * 0.95 / draws) ** 0.5


def test_bounds_are_of_use():
    scores, p, false = folder(np.random.default_rng(0), 200, 500, 100)
    alarm = p <= 0.05
    assert alarm.sum() > 90 and false[alarm].max() <= false_alarm_bounds(scores, p, 200)[alarm].max() < 0.5 * alarm.sum()


def test_a_certificate_has_every_threshold_once():
    scores, calibration = np.array([3.0, 1.0, 3.0, 0.0]), np.arange(40) / 20
    p = p_values(scores, calibration)
    steps, bounds = certificate(scores, p, 40), false_alarm_bounds(scores, p, 40)
    assert [(step.score, step.alarms) for step in steps] == [(3.0, 2), (1.0, 3), (0.0, 4)]
    assert [step.false_at_most for step in steps] == [bounds[0], bounds[1], bounds[3]]
    assert certificate([], [], 40) == [] and false_alarm_bounds([2.0, 3.0], [1.0, 1.0], 0).tolist() == [2, 1]


@pytest.mark.parametrize("wrong", [[0.0, 1.0], [0.5, 1.1], [[0.5]], [np.nan], [0.01]])
def test_what_are_no_p_values(wrong):
    with pytest.raises(InputError, match="p-values"):
        false_alarm_bounds(wrong, wrong, 19)


def test_the_regions_of_a_normal_image_are_bounded_at_all_levels_at_once():
    """Simulated maps: the share of normal ones that have j regions above the j-th level, for any j, against 5 %."""
    rng, wrong, draws = np.random.default_rng(0), 0, 400
    for _ in range(draws):
        peaks = -np.sort(-rng.gumbel(size=(100, 8)) - rng.normal(size=(100, 1)), 1)  # images differ in level
        levels = region_levels(peaks[:99])
        assert len(levels) == 5 and (np.diff(levels) <= 0).all()
        wrong += bool((peaks[99, :5] > levels).any())
    assert wrong / draws < 0.05 + 2.6 * (0.05 * 0.95 / draws) ** 0.5
    assert regions_at_most(levels, levels[0]) == 0 and regions_at_most(levels, levels[2]) == 2
    assert regions_at_most(levels, levels[4] - 1e-9) is None and len(region_levels(peaks[:18])) == 0 and len(region_levels(peaks[:19])) == 1
