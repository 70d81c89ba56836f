"""Random changes of training images against torchvision, and where they are made."""

import pytest
import torch
from support import batch, images, make, tiny_run
from torchvision.transforms.v2 import functional as reference

from blemish.data.augment import Augment
from blemish.edge.errors import InputError
from blemish.ops.rng import stream
from blemish.run.train import build_model


def drawn(n: int) -> torch.Tensor:
    return torch.rand(4, n, generator=stream(3))


def test_rotation_flip_and_crop_are_torchvisions():
    x, chance = images(6, side=33), drawn(6)
    found = Augment(rotate=30, flip=True, crop=16)(x, stream(3))
    for one, image, (turn, mirror, y, x_) in zip(found, x, chance.T.tolist(), strict=True):
        image = reference.rotate(image, 30 * (2 * turn - 1))
        image = reference.horizontal_flip(image) if mirror < 0.5 else image
        expected = reference.crop(image, int(18 * y), int(18 * x_), 16, 16)
        assert (one == expected).float().mean() > 0.99  # the nearest pixel is a matter of rounding
    assert 0 < (chance[1] < 0.5).sum() < 6


def test_nothing_is_switched_on_by_default():
    x = images(3)
    assert not Augment()
    assert torch.equal(Augment()(x, stream(0)), x)


def test_a_step_is_drawn_from_the_generator_alone():
    change = Augment(rotate=5, flip=True, crop=40)
    state = torch.get_rng_state()
    first, second, other = (change(images(4), stream(seed)) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert first.shape == (4, 3, 40, 40)


@pytest.mark.parametrize("change", [{"rotate": -1}, {"rotate": 181}, {"flip": 1.5}, {"crop": 4}], ids=str)
def test_a_wrong_value_is_refused_by_its_key(change):
    with pytest.raises(InputError, match=f"augment.{next(iter(change))}="):
        Augment(**change)


def test_a_crop_larger_than_the_images_is_refused():
    with pytest.raises(InputError, match=r"augment.crop=80"):
        Augment(crop=80)(images(1), stream(0))


def test_only_training_steps_are_augmented_and_without_cached_maps():
    model, one = make("cflow"), batch(images(2))
    assert model.inputs_for("train") == (True, False)
    assert model.augmented(one) is one
    model.augment = Augment(flip=True)
    assert model.inputs_for("train") == (False, True)
    assert model.inputs_for("test") == (True, False)
    seen = [model.augmented(one).image for _ in range(2)]
    assert torch.equal(*seen)  # of the same step
    expected = Augment(flip=True)(one.image, stream(0, 0, 0, 1))
    assert torch.equal(seen[0], expected)


def test_a_single_pass_is_not_augmented(tmp_path):
    cfg = tiny_run(tmp_path, tmp_path / "run", "model=padim", "augment.rotate=5")
    with pytest.raises(InputError, match=r"augment=.*rotate"):
        build_model(cfg)
    assert build_model(tiny_run(tmp_path, tmp_path / "run", "model=stfpm", "augment.rotate=5")).augment == Augment(rotate=5)
