"""DFKDE against scikit-learn's PCA and scipy's kernel density, and what few or equal images do to it."""

import numpy as np
import pytest
import torch
from scipy.stats import gaussian_kde
from sklearn.decomposition import PCA
from support import fitted, make

from blemish.edge.errors import InputError


def dfkde(**changes):
    return make("dfkde", **changes)


def images(n, seed=0, side=64):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, 3, 1, 1, generator=generator) * torch.rand(n, 3, side, side, generator=generator)


def pooled(model, pictures):
    return model.features(pictures)[0].double().mean((2, 3)).numpy()


def plain_dfkde(model, train, test, components, bandwidth, scaling="scale"):
    reduce = PCA(components, svd_solver="full").fit(pooled(model, train))
    x, z = reduce.transform(pooled(model, train)), reduce.transform(pooled(model, test))
    lengths = [np.linalg.norm(rows, axis=1, keepdims=True) for rows in (x, z)]
    x, z = (rows / (lengths[0].max() if scaling == "scale" else own) for rows, own in zip((x, z), lengths, strict=True))
    return -gaussian_kde(x.T, bandwidth).logpdf(z.T)


@pytest.mark.parametrize("bandwidth", ["scott", "silverman", 0.7])
@pytest.mark.parametrize(("components", "scaling"), [(3, "scale"), (16, "scale"), (3, "norm")])
def test_is_the_plain_chain(components, bandwidth, scaling):
    model = fitted(dfkde(components=components, bandwidth=bandwidth, scaling=scaling), images(40))
    expected = plain_dfkde(model, images(40), images(5, seed=1), components, bandwidth, scaling)
    score, map = model(images(5, seed=1))
    assert map is None
    np.testing.assert_allclose(score, expected, rtol=1e-3, atol=1e-3)


def test_far_images_still_rank():
    """Images ever brighter than all others: densities that underflow keep their order."""
    model = fitted(dfkde(), images(40))
    score = model(torch.stack([torch.full((3, 64, 64), level) for level in (1.0, 10.0, 100.0)])).score
    assert score.isfinite().all()
    assert score[0] < score[1] < score[2]


@pytest.mark.parametrize(("n", "components"), [(2, 1), (6, 5), (17, 16), (24, 16)])
def test_few_images_span_fewer_components(n, components):
    model = fitted(dfkde(), images(n))
    assert len(model.variance) == components
    assert model(images(3, seed=1)).score.isfinite().all()


def test_copies_of_an_image_add_no_component():
    """Three images ten times over, in batches of all sizes, are three images: rounding is no direction."""
    model = fitted(dfkde(), images(3).repeat(10, 1, 1, 1), batch=7)
    assert len(model.variance) == 2
    once = fitted(dfkde(), images(3))
    torch.testing.assert_close(model.axes, once.axes, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("pictures", [images(1), images(1).repeat(4, 1, 1, 1)])
def test_one_image_is_refused(pictures):
    with pytest.raises(InputError, match="rows"):
        fitted(dfkde(), pictures, batch=2)
