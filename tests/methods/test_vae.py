"""The evidence lower bound by torch's distributions, and the VAE's prior."""

import pytest
import torch
from support import batch, images, make, stripes, trained
from torch.distributions import Normal, kl_divergence


def vae(score="max", kl_weight=1.0, sigma=0.0):
    return make("vae", side=32, latent=8, kl_weight=kl_weight, score=score, sigma=sigma)


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
    assert torch.equal(vae("elbo", kl_weight, sigma=2.5)(x).score, score)
    score, map = vae()(x)
    assert torch.equal(score, map.amax((1, 2)))


@torch.no_grad()
def test_the_loss_is_the_bound_at_a_draw():
    """With variances of nearly 0 a draw is the mean, and the loss is the score."""
    model, x = vae("elbo"), images(4, side=32)
    model.encoder.last.weight[8:] = 0
    model.encoder.last.bias[8:] = -40
    torch.testing.assert_close(model.loss(batch(x)), model(x).score.mean())
    model.encoder.last.bias[8:] = 2
    assert model.loss(batch(x)) != model(x).score.mean()
    assert model.loss(batch(x)) == model.loss(batch(x))  # the same step draws the same


@pytest.mark.slow
def test_a_large_weight_gives_the_prior():
    model, _ = trained(vae(kl_weight=1e4), stripes(32, seed=0), steps=180, rate=3e-3)
    with torch.no_grad():
        mean, log_variance = model.posterior(stripes(16, seed=0))
    assert mean.square().mean() < 0.05
    assert log_variance.abs().mean() < 0.2
