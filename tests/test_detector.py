"""The score of a map, and predictions under an ignore mask."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import make

from blemish.ops.maps import apply_ignore_mask
from blemish.types import Prediction


@pytest.mark.parametrize(("score", "share"), [("max", 0), ("top", 0.01), (0.05, 0.05), (1.0, 1.0), (1, 1.0)])
def test_the_score_is_the_mean_of_the_top_share(score, share):
    model, map = make("autoencoder", score=score), torch.rand(3, 40, 30, generator=torch.Generator().manual_seed(0))
    ordered = np.sort(map.flatten(1).double().numpy(), 1)[:, ::-1]
    np.testing.assert_allclose(model.from_map(map).score, ordered[:, : max(1, int(share * 1200))].mean(1), rtol=1e-6)


def test_a_rule_of_its_own_is_the_methods_score():
    own, map = torch.rand(3), torch.rand(3, 8, 8)
    assert torch.equal(make("vae", score="elbo").from_map(map, own).score, own)
    assert torch.equal(make("vae", score="max").from_map(map, own).score, map.amax((1, 2)))


@given(st.integers(0, 2**32), st.floats(0, 1), st.booleans(), st.sampled_from([0.0, 0.01, 0.1, 1.0]))
def test_a_score_of_the_map_is_that_of_the_other_pixels(seed, share, ties, top):
    generator = torch.Generator().manual_seed(seed)
    map = torch.rand(4, 9, 7, generator=generator)
    map = (3 * map).round() if ties else map
    ignore_mask = torch.rand(4, 9, 7, generator=generator) < share
    score, found = apply_ignore_mask(Prediction(torch.full((4,), 9.0), map), ignore_mask, top)
    own, _ = apply_ignore_mask(Prediction(torch.full((4,), 9.0), map), ignore_mask, None)
    for i in range(4):
        shown = map[i][~ignore_mask[i]]
        if len(shown) == 0:  # a tile that has no part in its image's score
            assert score[i] == own[i] == -torch.inf and found[i].isfinite().all()
            continue
        expected = np.sort(shown.numpy())[-max(1, int(top * len(shown))) :].mean()
        assert float(score[i]) == pytest.approx(expected, rel=1e-5) and own[i] == 9
        assert torch.equal(found[i][~ignore_mask[i]], shown) and (found[i][ignore_mask[i]] == shown.min()).all()


def test_without_ignored_pixels_it_is_the_prediction_itself():
    prediction, nothing = Prediction(torch.ones(2), torch.ones(2, 5, 5)), torch.zeros(2, 5, 5, dtype=torch.bool)
    assert apply_ignore_mask(prediction, None, 0.0) is prediction
    assert all(torch.equal(a, b) for a, b in zip(apply_ignore_mask(prediction, nothing, 0.0), prediction, strict=True))
    partly = nothing | torch.tensor([True, False, True, True, True])
    assert torch.equal(apply_ignore_mask(Prediction(prediction.score), partly, 0.0).score, prediction.score)
