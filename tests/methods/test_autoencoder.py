"""The autoencoder's losses and scores written plainly."""

import pytest
import torch
from kornia.losses import ssim_loss
from support import batch, images, make


@torch.no_grad()
def test_losses_and_maps():
    x = images(3)
    model = make("autoencoder", loss="l2")
    again = model.reconstruct(x)
    torch.testing.assert_close(model.loss(batch(x)), torch.nn.functional.mse_loss(again, x))
    torch.testing.assert_close(model(x).map, (x - again).pow(2).sum(1) / 3)
    model = make("autoencoder", loss="ssim")
    torch.testing.assert_close(model.loss(batch(x)), 2 * ssim_loss(x, model.reconstruct(x), 11))


@torch.no_grad()
@pytest.mark.parametrize("loss", ["l2", "ssim"])
def test_scores(loss):
    x = images(3)
    score, map = make("autoencoder", loss=loss, score="max")(x)
    assert torch.equal(score, map.flatten(1).max(1).values)
    torch.testing.assert_close(make("autoencoder", loss=loss, score=1.0)(x).score, map.flatten(1).mean(1))


@torch.no_grad()
def test_reconstructions_are_images():
    again = make("autoencoder")._apply(lambda t: 100 * t).reconstruct(images(2))
    assert again.shape == (2, 3, 64, 64)
    assert 0 <= again.min() <= again.max() <= 1


def test_the_optimiser_is_the_papers():
    group = make("autoencoder").configure_optimizers().param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (2e-4, 1e-5)
