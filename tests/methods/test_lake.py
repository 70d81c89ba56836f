"""LAKE's loss and vectors against the paper's formulas, and its densities against scipy and scikit-learn."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import gaussian_kde, multivariate_normal
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler
from support import batch, images, make, stripes

from blemish.edge.errors import InputError


def lake(**changes):
    return make("lake", side=32, latent=6, **{"components": 4, **changes})


@torch.no_grad()
def with_density(model, pictures, size=7):
    model.eval().after_training(batch(part) for part in pictures.split(size))
    return model


def plain_layers(model, image):
    """Outputs of the encoder's convolutions and inputs of the decoder's at the mean, by hand."""
    outputs, x = [], image
    for convolution in model.encoder.convolutions:
        x = F.leaky_relu(F.conv2d(x, convolution.weight, convolution.bias, convolution.stride, 1), 0.2)
        outputs.append(x)
    mean, log_variance = model.encoder.last(x.flatten(1)).chunk(2, 1)
    inputs, x = [], F.leaky_relu(model.decoder.first(mean), 0.2).reshape(x.shape)
    for i, convolution in enumerate(model.decoder.convolutions):
        inputs.append(x)
        x = F.conv_transpose2d(x, convolution.weight, convolution.bias, convolution.stride, 1)
        x = F.leaky_relu(x, 0.2) if i < 7 else x.sigmoid()
    return [image] + outputs, [x] + inputs[::-1], mean, log_variance


@torch.no_grad()
@pytest.mark.parametrize("layer_weight", [0.0, 0.7])
def test_the_loss_is_the_papers(layer_weight):
    model, x = lake(layer_weight=layer_weight), images(3, side=32)
    model.encoder.last.weight[6:] = 0
    model.encoder.last.bias[6:] = -40  # no noise, so that the draw is the mean
    layers, others, mean, log_variance = plain_layers(model, x)
    squares = [(a - b).pow(2).sum() for a, b in zip(layers, others, strict=True)]
    assert len(squares) == 9
    kl = -0.5 * (1 + log_variance - mean.pow(2) - log_variance.exp()).sum()
    torch.testing.assert_close(model.loss(batch(x)), (squares[0] + layer_weight * sum(squares[1:]) + kl) / x.numel())


@torch.no_grad()
def test_the_vector_holds_mean_distances_and_cosines():
    model, x = lake(), images(3, side=32)
    layers, others, mean, _ = plain_layers(model, x)
    for i, row in enumerate(model.vectors(x).numpy()):
        pairs = [(a[i].flatten().double().numpy(), b[i].flatten().double().numpy()) for a, b in zip(layers, others, strict=True)]
        distances = [np.linalg.norm(a - b) / np.linalg.norm(a) for a, b in pairs]
        cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in pairs]
        np.testing.assert_allclose(row, np.concatenate([mean[i].numpy(), distances, cosines]), rtol=1e-3, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("bandwidth", ["scott", 0.5])
@pytest.mark.parametrize("density", ["kde", "gaussian"])
def test_the_density_is_scipys(density, bandwidth):
    train, test = stripes(30, seed=0), stripes(5, seed=1)
    model = with_density(lake(density=density, bandwidth=bandwidth), train)
    scaler = StandardScaler().fit(model.vectors(train).double().numpy())
    reduce = PCA(4, svd_solver="full").fit(scaler.transform(model.vectors(train).double().numpy()))
    x, z = (reduce.transform(scaler.transform(model.vectors(p).double().numpy())) for p in (train, test))
    kernels, bell = gaussian_kde(x.T, bandwidth), multivariate_normal(np.zeros(4), np.cov(x.T))
    expected = -(kernels if density == "kde" else bell).logpdf(z.T if density == "kde" else z)
    score, map = model(test)
    assert map is None
    np.testing.assert_allclose(score, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("n", "components"), [(2, 1), (4, 3), (12, 8)])
def test_few_images_span_fewer_components(n, components):
    model = with_density(lake(components=8), stripes(n, seed=0))
    assert len(model.variance) == components
    with torch.no_grad():
        assert model(stripes(3, seed=1)).score.isfinite().all()


def test_a_value_that_never_varies_does_not_count():
    """A code that the prior took over is rounding: it must not decide."""
    model = lake()
    with torch.no_grad():
        model.encoder.last.weight[:6] *= 1e-9
        model = with_density(model, stripes(20, seed=0))
        assert model(stripes(5, seed=1)).score.max() < 100


def test_one_image_is_refused():
    with pytest.raises(InputError, match="rows"):
        with_density(lake(), stripes(1, seed=0).repeat(4, 1, 1, 1), 2)


def test_reload_keeps_the_density():
    model, again = with_density(lake(), stripes(20, seed=0)), lake(seed=1)
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(model(stripes(3, seed=1)).score, again.eval()(stripes(3, seed=1)).score)
