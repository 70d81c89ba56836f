"""Subspace against scikit-learn's PCA of all patches."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from support import batch, fitted, images

from blemish.methods.subspace import Subspace
from blemish.ops.accumulators import RunningCovariance
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
    state = RunningCovariance()
    model.restore(state)
    state.update(model.collect(model.features(images(8, seed=1))))
    model.fit(state)
    x = images(4, seed=2)
    torch.testing.assert_close(model(x).score, both(x).score, rtol=1e-4, atol=1e-6)


def test_rotated_images_join_the_fit():
    picture = images(1)
    model = subspace(keep=1.0, rotations=3)
    model.state = RunningCovariance()
    model.training_step(batch(picture), 0)
    model.fit(model.state)
    assert model.patches == 4 * patches(model, picture).flatten(0, 2).shape[0] and model.inputs_for("train") == (True, True)
    upright = fitted(subspace(keep=5), picture)
    turned = subspace(keep=5, rotations=3)
    turned.state = RunningCovariance()
    turned.training_step(batch(picture), 0)
    turned.fit(turned.state)
    quarter = picture.rot90(1, (2, 3))
    assert turned(quarter).score < upright(quarter).score
