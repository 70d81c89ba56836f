"""GANomaly's step against a plain one with separate passes, and its networks against the paper's sizes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support import images, make, trained_by_lightning

from blemish.methods.ganomaly import COLLAPSED, pyramid


def ganomaly(side=32, **changes):
    return make("ganomaly", side, **{"channels": 8, "latent": 10, **changes})


def fitted(model, pictures):
    return trained_by_lightning(model, pictures, epochs=1)[0]


def plain_step(model, image):
    """One step with a pass of the discriminator for every use of it: generator first, then discriminator from its old weights."""
    discriminator = model.train().networks["discriminator"]
    first, second = model.configure_optimizers()
    x = 2 * image - 1
    _, fake, code, again = model.generate(image)
    real_logit, fake_logit = discriminator(x)[0], discriminator(fake.detach())[0]
    adversarial = (discriminator(x)[1] - discriminator(fake)[1]).pow(2).mean()
    loss = adversarial + 50 * (fake - x).abs().mean() + (code - again).pow(2).mean()
    first.zero_grad()
    loss.backward()
    second.zero_grad()  # the generator's loss has reached it too
    judged = F.binary_cross_entropy(real_logit.sigmoid(), torch.ones(len(x))) + F.binary_cross_entropy(
        fake_logit.sigmoid(), torch.zeros(len(x))
    )
    (0.5 * judged).backward()
    first.step()
    second.step()


def test_a_step_is_the_plain_one():
    model = ganomaly(learning_rate=1e-3)
    before, plain = copy.deepcopy(model.networks), copy.deepcopy(model)
    pictures = images(4, side=32)
    plain_step(plain, pictures)
    fitted(model, pictures)
    moved = 0
    for (name, ours), theirs, old in zip(model.networks.named_parameters(), plain.networks.parameters(), before.parameters(), strict=True):
        # Adam's first step is the sign of the gradient: rounding decides where that is nearly 0
        same = torch.isclose(ours, theirs, atol=1e-5).float().mean()
        assert same > 0.99, name
        moved += int((ours != old).sum())
    assert moved > 0.9 * sum(p.numel() for p in before.parameters())


@torch.no_grad()
def test_the_score_is_the_codes_mean_squared_difference():
    model, x = ganomaly().eval(), images(3, side=32)
    _, fake, code, again = model.generate(x)
    score, map = model(x)
    assert map is None
    torch.testing.assert_close(score, (code - again).pow(2).mean(1))
    torch.testing.assert_close(model.reconstruct(x), (fake + 1) / 2)
    assert 0 <= model.reconstruct(x).min() <= model.reconstruct(x).max() <= 1


@pytest.mark.parametrize(
    ("side", "widths", "grid"),
    [
        (32, [64, 128, 256], 4),
        (64, [64, 128, 256, 512], 4),
        (256, [64, 128, 256, 512, 512, 512], 4),
        (48, [64, 128, 256, 512], 3),
        (16, [64, 128], 4),
    ],
)
def test_widths_double_up_to_the_bound(side, widths, grid):
    assert pyramid(side, 64, 512) == (widths, grid)


@torch.no_grad()
@pytest.mark.parametrize("side", [16, 48, 80, 128])
def test_other_sides(side):
    model = ganomaly(side).eval()
    assert model.reconstruct(images(1, side=side)).shape == (1, 3, side, side)
    assert model(images(2, side=side)).score.shape == (2,)


def test_a_collapsed_discriminator_is_drawn_anew():
    """A discriminator that is always right has a loss below the limit."""
    model = ganomaly(learning_rate=1e-12)
    with torch.no_grad():
        model.networks["discriminator"].classifier.weight.zero_()
    seen = copy.deepcopy(model.networks["discriminator"].classifier.weight)
    fitted(model, images(4, side=32))
    assert torch.allclose(model.networks["discriminator"].classifier.weight, seen)  # loss log 2: left alone
    right = ganomaly(learning_rate=1e-12)
    hook = right.networks["discriminator"].register_forward_hook(once_real_then_fake())
    fitted(right, images(4, side=32))
    hook.remove()
    weight = right.networks["discriminator"].classifier.weight.detach()
    assert not torch.allclose(weight, ganomaly().networks["discriminator"].classifier.weight)
    assert weight.std() == pytest.approx(0.02, rel=0.2)


def once_real_then_fake():
    """A forward hook that says of the first input that it is an image and of the second that it is not, both beyond doubt."""
    answers = iter([30.0, -30.0])

    def hook(module, inputs, outputs):
        return outputs[0] * 0 + next(answers), outputs[1]

    assert F.softplus(torch.tensor(-30.0)) < COLLAPSED
    return hook


@torch.no_grad()
def test_first_weights_are_dcgans():
    model = ganomaly(channels=32)
    weights = torch.cat([m.weight.flatten() for m in model.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.ConvTranspose2d)])
    assert weights.std() == pytest.approx(0.02, rel=0.01)


def test_clip_bounds_the_step():
    """With a tiny bound the gradients of all steps are tiny, and Adam's ε then shortens the steps."""
    start = ganomaly()
    free, clipped = fitted(ganomaly(), images(4, side=32)), fitted(ganomaly(clip=1e-9), images(4, side=32))

    def way(model):
        return sum(float((a - b).detach().abs().sum()) for a, b in zip(model.parameters(), start.parameters(), strict=True))

    assert way(clipped) < 0.1 * way(free)
