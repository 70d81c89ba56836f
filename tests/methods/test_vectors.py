"""Full conformal prediction of methods that are fitted to one vector of each image: a new image in the bag, against refits."""

import pytest
import torch
from support import make

from blemish.detector import RowBuffer
from blemish.edge.calibration import FULL, conformal_threshold
from blemish.ops.bag import folds

CASES = [
    ("dfm", {"keep": 0.9}), ("dfm", {"keep": 3}), ("dfm", {"keep": 0.9, "score": "max"}), ("dfm", {"keep": 0.97, "score": "top"}),
    ("dfm", {"keep": 0.9, "score": "nll"}), ("dfkdm", {"density": "gaussian", "components": 4}),
    ("dfkdm", {"density": "kde", "components": 4}), ("dfkdm", {"density": "auto", "components": 4}),
    ("dfkdm", {"density": "auto", "components": 128}), ("dfkde", {"components": 5, "bandwidth": 0.5}), ("dfkde", {"components": 128}),
]  # fmt: skip
SIZE = (16, 16)


def maps(n, channels, seed=0, side=2):
    """Features (n, C, h, w) with long tails, of two kinds of images and of channels of different scale."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(3, 0.1, channels)[None, :, None, None]
    kind = torch.randint(2, (n, 1, 1, 1), generator=generator)
    return torch.randn(n, channels, side, side, generator=generator).exp() * scale + 2 * kind


def refit(model, rows):
    state = RowBuffer(len(rows))
    state.update(rows)
    model.fit(state)


@torch.no_grad()
@pytest.mark.parametrize("channels", [40, 6])  # more values than images, and fewer
@pytest.mark.parametrize(("method", "options"), CASES)
def test_scores_of_a_bag_are_those_of_fits_to_the_others(method, options, channels):
    model, stage = make(method, **options), maps(13, channels)
    rows, fold = model.collect([stage]), folds(13, 10, 0)
    for i, found in enumerate(model.bag_scores(rows, fold, [stage]).tolist()):
        refit(model, rows[fold != fold[i]])
        assert found == pytest.approx(float(model.score([stage[i : i + 1]], SIZE).score), rel=1e-4, abs=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("method", "options"), CASES)
def test_scores_of_a_bag_go_with_its_rows(method, options):
    model, stage = make(method, **options), maps(12, 20)
    rows, order = model.collect([stage]), torch.randperm(12, generator=torch.Generator().manual_seed(1))
    fold = folds(12, 10, 0)
    score = model.bag_scores(rows, fold, [stage])
    torch.testing.assert_close(model.bag_scores(rows[order], fold[order], [stage]), score[order], rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize(("method", "options"), [CASES[1], CASES[4], CASES[9]])
def test_false_alarms_are_bounded_with_no_image_held_out(method, options):
    """Vectors instead of images: 19 of them promise 5 %, exactly so where no two scores are equal."""
    model, alarms, draws = make(method, **options), 0, 500
    for seed in range(draws):
        stage = maps(20, 8, seed, side=1)
        refit(model, model.collect([stage[:19]]))
        left = model.bag_scores(model.rows, torch.arange(19), [stage])
        model.set_calibration(torch.stack([left, left], 1).float(), FULL)
        assert model.whole_bag
        alarms += float(model.score([stage[19:]], SIZE).score) > conformal_threshold(left.float().numpy(), 0.05, FULL).value
    assert alarms / draws == pytest.approx(0.05, abs=3 * (0.05 * 0.95 / draws) ** 0.5)


@torch.no_grad()
def test_each_image_of_a_batch_has_a_bag_of_its_own():
    stage = maps(16, 12)
    model = make("dfm", keep=0.8)
    refit(model, model.collect([stage[:12]]))
    left = model.bag_scores(model.rows, torch.arange(12), [stage]).float()
    model.set_calibration(torch.stack([left, left], 1), FULL)
    both, single = model.score([stage[12:]], SIZE), [model.score([one[None]], SIZE).score for one in stage[12:]]
    torch.testing.assert_close(both.score, torch.cat(single), rtol=1e-5, atol=0)
