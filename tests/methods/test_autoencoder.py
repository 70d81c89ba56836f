"""The autoencoder's losses and scores written plainly, and what it learns."""

import pytest
import torch
from kornia.losses import ssim_loss
from scipy.ndimage import gaussian_filter
from support import batch, images, stripes, trained

from blemish.edge.errors import InputError
from blemish.methods.autoencoder import Autoencoder


def autoencoder(loss="l2", score="max", side=32, latent=20, seed=0, window=11, sigma=0.0, **more):
    return Autoencoder(side, None, latent, loss, window, score, learning_rate=2e-4, weight_decay=1e-5, seed=seed, sigma=sigma, **more)


@torch.no_grad()
def test_losses_and_maps():
    x = images(3, side=32)
    model = autoencoder("l2")
    again = model.reconstruct(x)
    torch.testing.assert_close(model.loss(batch(x)), torch.nn.functional.mse_loss(again, x))
    torch.testing.assert_close(model(x).map, (x - again).pow(2).sum(1) / 3)
    model = autoencoder("ssim")
    torch.testing.assert_close(model.loss(batch(x)), 2 * ssim_loss(x, model.reconstruct(x), 11))


@torch.no_grad()
@pytest.mark.parametrize("loss", ["l2", "ssim"])
def test_scores(loss):
    x = images(3, side=32)
    score, map = autoencoder(loss, "max")(x)
    assert torch.equal(score, map.flatten(1).max(1).values)
    torch.testing.assert_close(autoencoder(loss, "mean")(x).score, map.flatten(1).mean(1))


@torch.no_grad()
@pytest.mark.parametrize("loss", ["l2", "ssim"])
def test_a_blurred_map_has_a_score_of_its_own(loss):
    x = images(3, side=32)
    map = autoencoder(loss)(x).map
    expected = gaussian_filter(map.double().numpy(), (0, 2.5, 2.5), mode="reflect", truncate=4)
    score, blurred = autoencoder(loss, sigma=2.5)(x)
    torch.testing.assert_close(blurred, torch.from_numpy(expected).float(), rtol=1e-4, atol=1e-6)
    assert torch.equal(score, blurred.amax((1, 2)))


@torch.no_grad()
def test_reconstructions_are_images():
    again = autoencoder()._apply(lambda t: 100 * t).reconstruct(images(2, side=32))
    assert again.shape == (2, 3, 32, 32)
    assert again.min() >= 0
    assert again.max() <= 1


@pytest.mark.parametrize("loss", ["l2", "ssim"])
def test_learns_what_is_normal(loss):
    normal, square = stripes(8, seed=1), stripes(8, seed=2)
    square[:, :, 10:18, 10:18] = 1
    mask = torch.zeros(8, 32, 32, dtype=torch.bool)
    mask[:, 10:18, 10:18] = True

    def contrast(model):
        with torch.no_grad():
            map = model(square).map
            return float(map[mask].mean() / map[~mask].mean())

    untrained = contrast(autoencoder(loss))
    model, losses = trained(autoencoder(loss), stripes(16, seed=0), steps=100, rate=3e-3)
    assert losses[-1] < 0.5 * losses[0]
    assert contrast(model) > 1.2 * untrained
    with torch.no_grad():
        assert model(square).score.mean() > 1.5 * model(normal).score.mean()


def test_the_optimiser_is_the_papers():
    group = autoencoder().configure_optimizers().param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (2e-4, 1e-5)


def test_weights_come_from_the_seed_and_leave_the_global_stream():
    state = torch.get_rng_state()
    first, second, other = autoencoder(seed=3), autoencoder(seed=3), autoencoder(seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    x = images(1, side=32)
    assert torch.equal(first.reconstruct(x), second.reconstruct(x))
    assert not torch.equal(first.reconstruct(x), other.reconstruct(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": "l1"}, "loss=l1"),
        ({"score": "sum"}, "score=sum"),
        ({"side": 40}, "image_size=40"),
        ({"window": 10}, "window=10"),
        ({"sigma": -1}, "sigma=-1"),
    ],
)
def test_wrong_choices(change, message):
    with pytest.raises(InputError, match=message):
        autoencoder(**change)


def test_images_of_another_size_are_refused():
    with pytest.raises(InputError, match="image_size"):
        autoencoder()(images(1, side=48))
