"""Subspace against scikit-learn's PCA of all patches."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from support import batch, fitted, images

from blemish.edge.calibration import FULL, conformal_threshold
from blemish.methods import subspace as subspace_module
from blemish.methods.subspace import Subspace
from blemish.ops.accumulators import RowBuffer, RunningCovariance
from blemish.ops.maps import align, smooth_upsample


def subspace(keep=0.9, rotations=0, score="top", sigma=0.0):
    return Subspace("test_resnet", [2, 3], "random", keep, rotations, sigma, score, seed=0)


def patches(model, pictures):
    return align(model.features(pictures)).permute(0, 2, 3, 1)  # (B, h, w, D)


@pytest.mark.parametrize("keep", [0.9, 5])
def test_the_map_is_the_squared_residual_of_scikit_learns_pca(keep):
    model = fitted(subspace(keep), images(20))
    pca = PCA(keep, svd_solver="full").fit(patches(model, images(20)).flatten(0, 2).double().numpy())
    x = patches(model, images(3, seed=1)).double().numpy()
    rows = x.reshape(-1, x.shape[-1])
    residual = np.square(rows - pca.inverse_transform(pca.transform(rows))).sum(1).reshape(x.shape[:3])
    score, map = model(images(3, seed=1))
    expected = smooth_upsample(torch.from_numpy(residual), (64, 64), 0.0)
    np.testing.assert_allclose(map, expected, rtol=1e-3)
    np.testing.assert_allclose(score, expected.flatten(1).topk(40).values.mean(1), rtol=1e-3)  # 1 % of 64² pixels


def test_restored_moments_continue_to_those_of_all_images():
    model, both = fitted(subspace(), images(12)), fitted(subspace(), torch.cat([images(12), images(8, seed=1)]))
    state = RunningCovariance(pooled=True)
    model.restore(state)
    state.update(model.collect(model.features(images(8, seed=1))))
    model.fit(state)
    x = images(4, seed=2)
    torch.testing.assert_close(model(x).score, both(x).score, rtol=1e-4, atol=1e-6)


def test_rotated_images_join_the_fit():
    picture = images(1)
    model = subspace(keep=1.0, rotations=3)
    model.state = RunningCovariance(pooled=True)
    model.training_step(batch(picture), 0)
    model.fit(model.state)
    assert model.patches == 4 * patches(model, picture).flatten(0, 2).shape[0] and model.inputs_for("train") == (True, True)
    upright = fitted(subspace(keep=5), picture)
    turned = subspace(keep=5, rotations=3)
    turned.state = RunningCovariance(pooled=True)
    turned.training_step(batch(picture), 0)
    turned.fit(turned.state)
    quarter = picture.rot90(1, (2, 3))
    assert turned(quarter).score < upright(quarter).score


def bagged(rows, **options):
    """A method that keeps the cells of images from their features (N, h, w, D)."""
    model = subspace(**options)
    model.expects_bag = True
    state = model.new_state(len(rows))
    state.update(rows)
    model.fit(state)
    assert len(model.rows) == len(rows)
    return model


def features(count, side=3, seed=0):
    """Of long tails, and of two kinds of images: (N, h, w, D)."""
    generator = torch.Generator().manual_seed(seed)
    kind = torch.randint(2, (count, 1, 1, 1), generator=generator)
    return torch.randn(count, side, side, 6, generator=generator).exp() * torch.linspace(3, 0.1, 6) + 2 * kind


@pytest.mark.parametrize("keep", [0.9, 3])
@pytest.mark.parametrize("count", [1, 2, 3, 11, 12])
def test_scores_of_a_bag_are_those_of_fits_to_the_other_half(count, keep):
    every, model = features(count + 1, side=4), bagged(features(count + 1, side=4)[:count], keep=keep, score="max")
    fold, rows = model.folds(count + 1), every.flatten(1, 2)
    expected = torch.empty(count + 1)
    for half in (0, 1):
        state = RunningCovariance(pooled=True)
        state.update(rows[fold != half])
        _, mean, scatter = state.compute()
        away = (rows[fold == half] - mean) @ model._left(scatter[0]).T
        expected[fold == half] = away.square().sum(2).amax(1)
    found = model.bag(every[-1], None)
    own = fold[:-1] == fold[-1]
    torch.testing.assert_close(found, torch.cat([expected[:-1][own], expected[:-1][~own], expected[-1:]]), rtol=1e-3, atol=1e-4)


def test_cells_of_a_bag_are_means_where_there_are_many(monkeypatch):
    monkeypatch.setattr(subspace_module, "CELLS", 5 * 8**2)
    rows = features(5, side=16)
    model = bagged(rows)
    torch.testing.assert_close(model.rows, rows.unflatten(1, (8, 2)).unflatten(3, (8, 2)).mean((2, 4)).flatten(1, 2))
    assert model.patches == 5 * 16**2  # the fit is to all patches
    assert model.bag(rows[0], None).shape == (6,)
    assert bagged(features(4, side=8)).rows.shape == (4, 64, 6)


@torch.no_grad()
def test_false_alarms_are_bounded_with_no_image_held_out():
    """Features instead of images: 19 of them promise 5 %, exactly so where no two scores are equal."""
    alarms, draws = 0, 500
    for seed in range(draws):
        rows = features(20, side=2, seed=seed)
        model, maps = bagged(rows[:19], keep=3, score="max"), [rows.movedim(3, 1)]
        left = model.leave_one_out([maps[0][:19]], (2, 2), range(19)).score
        model.set_calibration(torch.stack([left, left], 1), FULL)
        assert model.whole_bag
        alarms += float(model.score([maps[0][19:]], (2, 2)).score) > conformal_threshold(left.numpy(), 0.05, FULL).value
    assert alarms / draws == pytest.approx(0.05, abs=3 * (0.05 * 0.95 / draws) ** 0.5)


def test_images_are_kept_for_a_bag_only():
    model, both = fitted(subspace(), images(12)), subspace()
    assert model.rows.numel() == 0 and not model.whole_bag and isinstance(model.new_state(12), RunningCovariance)
    both.expects_bag = True
    assert isinstance(both.new_state(80), RowBuffer) and isinstance(both.new_state(81), RunningCovariance)
    torch.testing.assert_close(fitted(both, images(12))(images(3, seed=1)).map, model(images(3, seed=1)).map, rtol=1e-3, atol=1e-6)
    turned = subspace(rotations=2)
    turned.expects_bag = True
    assert isinstance(turned.new_state(12), RunningCovariance)
