"""Predictions under an ignore mask."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from blemish.detector import apply_ignore_mask
from blemish.types import Prediction


@given(st.integers(0, 2**32), st.floats(0, 1), st.booleans())
def test_a_largest_value_is_that_of_the_other_pixels(seed, share, ties):
    generator = torch.Generator().manual_seed(seed)
    map = torch.rand(4, 9, 7, generator=generator)
    map = (3 * map).round() if ties else map
    ignore_mask = torch.rand(4, 9, 7, generator=generator) < share
    score, found = apply_ignore_mask(Prediction(map.amax((1, 2)), map), ignore_mask)
    mean, _ = apply_ignore_mask(Prediction(map.mean((1, 2)), map), ignore_mask)
    for i in range(4):
        shown = map[i][~ignore_mask[i]]
        if len(shown) == 0:  # a tile that has no part in its image's score
            assert score[i] == mean[i] == -torch.inf and found[i].isfinite().all()
            continue
        assert score[i] == shown.max() == found[i].max() and mean[i] == map[i].mean()
        assert torch.equal(found[i][~ignore_mask[i]], shown) and (found[i][ignore_mask[i]] == shown.min()).all()


def test_without_ignored_pixels_it_is_the_prediction_itself():
    prediction, nothing = Prediction(torch.rand(2), torch.rand(2, 5, 5)), torch.zeros(2, 5, 5, dtype=torch.bool)
    assert apply_ignore_mask(prediction, None) is prediction
    assert all(torch.equal(a, b) for a, b in zip(apply_ignore_mask(prediction, nothing), prediction, strict=True))
    partly = nothing | torch.tensor([True, False, True, True, True])
    assert torch.equal(apply_ignore_mask(Prediction(prediction.score), partly).score, prediction.score)
