"""The evidence lower bound by torch's distributions, and what the VAE learns."""

import pytest
import torch
from scipy.ndimage import gaussian_filter
from support import batch, images, stripes, trained
from torch.distributions import Normal, kl_divergence

from blemish.edge.errors import InputError
from blemish.methods.vae import VAE


def vae(score="reconstruction", kl_weight=1.0, latent=8, seed=0, sigma=0.0):
    return VAE(32, None, latent, kl_weight, score, learning_rate=2e-4, weight_decay=1e-5, seed=seed, sigma=sigma)


@torch.no_grad()
@pytest.mark.parametrize("kl_weight", [0.0, 1.0, 50.0])
def test_the_score_is_the_bound_at_the_mean(kl_weight):
    """With p(x|z) of variance kl_weight / 2: −ELBO without its constant, times kl_weight, over the number of values."""
    model, x = vae("elbo", kl_weight), images(4, side=32)
    mean, log_variance = model.posterior(x)
    kl = kl_divergence(Normal(mean, (0.5 * log_variance).exp()), Normal(0, 1)).sum(1)
    expected = ((x - model.decoder(mean)).pow(2).flatten(1).sum(1) + kl_weight * kl) / (3 * 32 * 32)
    score, map = model(x)
    torch.testing.assert_close(score, expected)
    torch.testing.assert_close(map, (x - model.reconstruct(x)).pow(2).mean(1))


@torch.no_grad()
def test_the_loss_is_the_bound_at_a_draw():
    """Without noise, which variances of nearly 0 leave, the loss is the score."""
    model, x = vae("elbo"), images(4, side=32)
    model.encoder.last.weight[8:] = 0
    model.encoder.last.bias[8:] = -40
    torch.testing.assert_close(model.loss(batch(x)), model(x).score.mean())
    model.encoder.last.bias[8:] = 2
    assert model.loss(batch(x)) != model(x).score.mean()
    assert model.loss(batch(x)) == model.loss(batch(x))  # the same step draws the same


@torch.no_grad()
def test_reconstruction_score_is_the_maps_largest_value():
    score, map = vae()(images(3, side=32))
    assert torch.equal(score, map.amax((1, 2)))


@torch.no_grad()
def test_a_blurred_map_leaves_the_bound():
    x, sigma = images(3, side=32), 2.5
    map = vae()(x).map
    expected = gaussian_filter(map.double().numpy(), (0, sigma, sigma), mode="reflect", truncate=4)
    score, blurred = vae(sigma=sigma)(x)
    torch.testing.assert_close(blurred, torch.from_numpy(expected).float(), rtol=1e-4, atol=1e-6)
    assert torch.equal(score, blurred.amax((1, 2)))
    assert torch.equal(vae("elbo", sigma=sigma)(x).score, vae("elbo")(x).score)


@pytest.mark.slow
@pytest.mark.parametrize("score", ["reconstruction", "elbo"])
def test_learns_what_is_normal(score):
    normal, square = stripes(8, seed=1), stripes(8, seed=2)
    square[:, :, 10:18, 10:18] = 1
    model, losses = trained(vae(score, kl_weight=0.1), stripes(32, seed=0), steps=180, rate=3e-3)
    assert losses[-1] < 0.5 * losses[0]
    with torch.no_grad():
        assert model(square).score.mean() > 1.2 * model(normal).score.mean()


@pytest.mark.slow
def test_a_large_weight_gives_the_prior():
    model, _ = trained(vae(kl_weight=1e4), stripes(32, seed=0), steps=180, rate=3e-3)
    with torch.no_grad():
        mean, log_variance = model.posterior(stripes(16, seed=0))
    assert mean.square().mean() < 0.05
    assert log_variance.abs().mean() < 0.2


def test_wrong_settings():
    with pytest.raises(InputError, match=r"model\.score=max"):
        vae("max")
    with pytest.raises(InputError, match=r"model\.sigma=-1"):
        vae(sigma=-1)
