"""The error bounds against every order that the scores of a step can have."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blemish.metrics.ranking import Ranks, aupro, auroc, average_precision, f1_max, ordered, unordered, walk

METRICS = {"auroc": auroc, "aupro": aupro, "ap": average_precision, "f1": f1_max}


def steps_of(score, label, weight):
    value, place = np.unique(score[label == 1], return_inverse=True)
    return walk(value, np.bincount(place), np.bincount(place, weight[label == 1]), [Ranks(np.sort(score[label == 0]))])


def within_step(size):
    """Every assignment of `size` pixels to scores in [0, 1), ties included."""
    return np.array(sorted(itertools.product(range(size), repeat=size))) / max(size, 1) if size else np.zeros((1, 0))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_bounds_hold_for_every_order_inside_the_steps(data):
    sizes = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=2)) + [1] * data.draw(st.integers(0, 6))
    base = np.repeat(np.random.default_rng(data.draw(st.integers(0, 99))).permutation(len(sizes)), sizes).astype(float)
    label = np.array(data.draw(st.lists(st.integers(0, 1), min_size=len(base), max_size=len(base))))
    weight = np.array(data.draw(st.lists(st.sampled_from([1.0, 0.5, 0.25]), min_size=len(base), max_size=len(base))))
    if len(set(label)) < 2:
        return
    coarse = {name: figure(steps_of(base, label, weight)) for name, figure in METRICS.items()}
    worst = dict.fromkeys(METRICS, 0.0)
    for offsets in itertools.product(*map(within_step, sizes)):
        steps = steps_of(base + np.concatenate(offsets), label, weight)
        for name, figure in METRICS.items():
            worst[name] = max(worst[name], abs(figure(steps)[0] - coarse[name][0]))
    for name, (_, bound) in coarse.items():
        assert worst[name] <= bound + 1e-12, name
    assert worst["auroc"] == pytest.approx(coarse["auroc"][1], abs=1e-12)  # this bound is reached


def test_ordered_scores_compare_as_the_scores():
    tiny, top = np.finfo(np.float32).smallest_subnormal, np.finfo(np.float32).max
    score = np.array([-top, -2, -1, -tiny, 0, tiny, 1, 2, top], np.float32)
    assert (np.diff(ordered(score).astype(np.int64)) > 0).all()
    np.testing.assert_array_equal(unordered(ordered(score)), score)
    assert ordered(np.float32([-0.0])) == ordered(np.float32([0.0]))
