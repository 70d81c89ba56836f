"""DFM against scikit-learn's PCA on the pooled features, its map, and its grid."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA
from sklearn.mixture import GaussianMixture
from support import fitted, images, make


def dfm(**changes):
    return make("dfm", **{"stages": [2], "pool": 2, "keep": 0.9, **changes})


def pooled(model, pictures, pool=2):
    return F.avg_pool2d(model.features(pictures)[0].double(), pool)  # (B, C, h, w)


def reduced(model, train, keep=0.9):
    return PCA(keep, svd_solver="full").fit(pooled(model, train).flatten(1).numpy())


def test_reconstruction_error_is_the_plain_chain():
    model = fitted(dfm(), images(30))
    x = pooled(model, images(4, seed=1))  # (B, C, h, w)
    reduce = reduced(model, images(30))
    rows = x.flatten(1).numpy()
    residual = rows - reduce.inverse_transform(reduce.transform(rows))
    cells = np.linalg.norm(residual.reshape(x.shape), axis=1)  # (B, h, w)
    score, map = model(images(4, seed=1))
    assert model.axes.shape[:2] == (1, reduce.n_components_)
    np.testing.assert_allclose(score, np.linalg.norm(residual, axis=1), rtol=1e-4)
    expected = F.interpolate(torch.from_numpy(cells)[:, None], (64, 64), mode="bilinear", align_corners=False)[:, 0]
    np.testing.assert_allclose(map, expected, rtol=1e-4)


def test_the_cells_of_the_map_make_up_the_score():
    """score² is the sum of the squared cells, so that a defect raises the score by what the map shows."""
    model = fitted(dfm(), images(20))
    score, map = model(images(3, seed=1))
    side = pooled(model, images(1)).shape[-1]
    cells = map[:, 64 // side // 2 :: 64 // side, 64 // side // 2 :: 64 // side]  # near the centre of each cell
    torch.testing.assert_close(cells.flatten(1).norm(dim=1), score, rtol=0.05, atol=0.0)


def test_likelihood_is_the_gaussian_of_the_components():
    model = fitted(dfm(score="nll"), images(30))
    reduce = reduced(model, images(30))
    z = reduce.transform(pooled(model, images(4, seed=1)).flatten(1).numpy())
    expected = 0.5 * (z**2 / reduce.explained_variance_ + np.log(2 * np.pi * reduce.explained_variance_)).sum(1)
    score, map = model(images(4, seed=1))
    assert map is None
    np.testing.assert_allclose(score, expected, rtol=1e-3)


def test_training_images_are_reconstructed():
    """All of the variance kept: nothing of a training image is left over, much of another is."""
    model = fitted(dfm(keep=1.0), images(10))
    own, other = model(images(10)).score, model(images(10, seed=1)).score
    assert own.max() < 1e-3 * other.min()


@pytest.mark.parametrize(("side", "pool", "cells"), [(64, 2, 4), (64, 1, 8), (64, 4, 2), (80, 2, 5), (72, 2, 4), (128, 4, 4), (16, 4, 1)])
def test_grid(side, pool, cells):
    """Stage 2 has stride 8; pooling loses no border where it does not divide the grid."""
    x = dfm(pool=pool).embed([torch.ones(1, 3, side // 8, side // 8)])
    assert x.shape[2:] == (cells, cells)
    torch.testing.assert_close(x, torch.ones_like(x))


def two_kinds(n, seed=0):
    """Dark and bright images by turns."""
    return 0.3 * images(n, seed) + 0.6 * (torch.arange(n) % 2)[:, None, None, None]


def test_each_group_has_a_subspace_of_its_own():
    model = fitted(dfm(groups=2), two_kinds(24))
    rows = pooled(model, two_kinds(4, seed=1)).flatten(1).numpy()
    residuals = []
    for kind in (0, 1):
        reduce = reduced(model, two_kinds(24)[kind::2])
        residuals.append(np.linalg.norm(rows - reduce.inverse_transform(reduce.transform(rows)), axis=1))
    np.testing.assert_allclose(model(two_kinds(4, seed=1)).score, np.min(residuals, 0), rtol=1e-3)


def test_a_group_may_be_one_image():
    pictures = torch.cat([0.3 * images(6), 0.7 + 0.3 * images(1, 2)])
    model = fitted(dfm(groups=2, keep=1.0), pictures)
    assert model(pictures).score.max() < 1e-3 * model(images(2, 1)).score.min()


def test_likelihood_of_groups_is_that_of_a_mixture():
    model = fitted(dfm(score="nll", groups=2, keep=3), two_kinds(30))
    reduce = reduced(model, two_kinds(30), 3)
    train, test = (
        reduce.transform(pooled(model, pictures).flatten(1).numpy()) / reduce.explained_variance_**0.5
        for pictures in (two_kinds(30), two_kinds(4, seed=1))
    )
    reference = GaussianMixture(2, covariance_type="diag", reg_covar=1e-3, n_init=3, random_state=0).fit(train)
    expected = -reference.score_samples(test) + 0.5 * np.log(reduce.explained_variance_).sum()
    np.testing.assert_allclose(model(two_kinds(4, seed=1)).score, expected, rtol=1e-3, atol=1e-3)


def test_stages_are_joined():
    model = fitted(dfm(stages=[2, 3]), images(10))
    assert model.embed(model.features(images(1))).shape[1] == sum(model.backbone.channels)
    assert model(images(2, seed=1)).map.shape == (2, 64, 64)


@torch.no_grad()
def test_components_give_no_bound_for_an_image_that_joins():
    """Why `calibrate=full` looks at the new image with fewer components than directions: a far one takes one, and the others lose it."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(20, 12, generator=generator) * torch.tensor([9.0] + 11 * [0.1])  # one direction explains most
    model, scores = dfm(keep=1, pool=1), []
    for far in (0.0, 1e4):
        state = model.new_state(20)
        state.update(torch.cat([rows[1:], far * torch.randn(1, 12, generator=generator)]))
        model.fit(state)
        scores.append(float(model.score([rows[:1, :, None, None]], (8, 8)).score))
    assert scores[1] > 5 * scores[0]
