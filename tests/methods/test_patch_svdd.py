"""Patch SVDD: dense embeddings equal those of single patches, draws that stay inside, the search, and learning."""

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support import batch, images, make, trained

from blemish.edge.errors import InputError
from blemish.methods.patch_svdd import OFFSETS, cut, draw_corners


def model_of(**changes):
    return make("patch_svdd", dim=16, **changes)


@torch.no_grad()
def test_a_full_image_is_embedded_as_its_patches_are():
    model = model_of(strides={64: 8, 32: 2}).eval()
    image = images(1, side=136)
    for size, dense in zip((64, 32), model.patches(image), strict=True):
        stride, side = model.strides[size], dense.shape[1]
        assert dense.shape == (1, side, side, 16)
        assert side == (136 - size) // stride + 1
        for y, x in ((0, 0), (3, 7), (side - 1, side - 1)):
            patch = image[..., stride * y : stride * y + size, stride * x : stride * x + size]
            torch.testing.assert_close(model.embed(patch)[0], dense[0, y, x], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_large_patch_is_its_four_quarters():
    """As the official encoder: the codes of the quarters on a grid of 2×2, a convolution over them, another one of one cell."""
    model, patch = model_of().eval(), images(1)
    grid = torch.zeros(1, 16, 2, 2)
    for y in range(2):
        for x in range(2):
            grid[0, :, y, x] = model.embed(patch[..., 32 * y : 32 * y + 32, 32 * x : 32 * x + 32])[0]
    first, last = model.large[0], model.large[2]
    hidden = F.leaky_relu(F.conv2d(grid, first.weight, first.bias), 0.1)
    torch.testing.assert_close(model.embed(patch)[0], F.conv2d(hidden, last.weight, last.bias).tanh().flatten())


def test_the_networks_are_the_official_ones():
    model = make("patch_svdd")
    layers = [
        (layer.in_channels, layer.out_channels, layer.kernel_size[0], layer.stride[0], layer.padding[0]) for layer in model.small[::2]
    ]
    widths = [3, 32, 64, 128, 128, 64, 32, 32, 64]
    assert layers == [(a, b, 3, 2 if a == 3 else 1, 0) for a, b in pairwise(widths)]
    weight = model.compass["64"][-1].weight
    torch.testing.assert_close(weight.norm(dim=0), torch.ones(128))
    (group,) = model.configure_optimizers().param_groups
    assert group["weight_decay"] == 0
    assert not any(weight is parameter for parameter in group["params"])


@given(st.integers(128, 200), st.integers(128, 200), st.sampled_from([32, 64]), st.integers(0, 99))
def test_draws_stay_inside_and_keep_their_distances(height, width, size, seed):
    first, near, second, far, direction = draw_corners((height, width), size, 40, torch.Generator().manual_seed(seed))
    span = torch.tensor([height, width]) - size
    for corner in (first, near, second, far):
        assert ((corner >= 0) & (corner <= span)).all()
    for start, end, least, most in ((first, near, 0, size // 32), (second, far, 3 * size // 4, size - 1)):
        shift, clipped = (end - start).abs(), (end == 0) | (end == span)
        assert (shift <= most).all()
        assert (clipped | (shift == 0) | (shift >= least)).all()
    assert ((near != first) | (near == 0) | (near == span)).any(1).all()
    way = torch.tensor(OFFSETS)[direction]
    inside = (far > 0) & (far < span)
    assert ((far - second).sign() == way)[inside].all()


def test_every_direction_is_drawn():
    assert draw_corners((128, 128), 64, 400, torch.Generator().manual_seed(0))[4].unique().tolist() == list(range(8))


def test_cut_is_slicing():
    x = images(3, side=80)
    owner, corner = torch.tensor([2, 0]), torch.tensor([[5, 7], [48, 0]])
    patches = cut(x, owner, corner, 32)
    assert torch.equal(patches[0], x[2, :, 5:37, 7:39])
    assert torch.equal(patches[1], x[0, :, 48:80, :32])


@torch.no_grad()
def test_scores_are_those_of_a_plain_search():
    model = model_of(strides={64: 16, 32: 8}).eval()
    train, query = images(3, 0, side=96), images(2, 1, side=96)
    model.before_training([batch(train)])
    assert torch.allclose(model.mean.flatten(), train.mean((0, 2, 3)), atol=1e-5)
    model.after_training([batch(train[:2]), batch(train[2:])])
    maps = []
    for size, stride, bank, own in zip((64, 32), (16, 8), model.patches(train), model.patches(query), strict=True):
        distance = np.linalg.norm(own.numpy()[..., None, :] - bank.flatten(0, 2).numpy(), axis=-1).min(-1)  # (B, h, w)
        total, count = np.zeros((2, 96, 96)), np.zeros((96, 96))
        for i, y in enumerate(range(0, 96 - size + 1, stride)):
            for j, x in enumerate(range(0, 96 - size + 1, stride)):
                total[:, y : y + size, x : x + size] += distance[:, i, j, None, None]
                count[y : y + size, x : x + size] += 1
        maps.append(total / count)
    found = model(query)
    np.testing.assert_allclose(found.map.numpy(), maps[0] * maps[1], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.score.numpy(), found.map.amax((1, 2)).numpy())


@torch.no_grad()
def test_a_warning_of_codes_that_are_all_alike(caplog):
    model = model_of(weight=0.5).eval()
    model.after_training([batch(images(2, side=96))])
    assert not caplog.records
    model.small[-2].weight *= 1e-6
    model.after_training([batch(images(2, side=96))])
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert "model.weight=0.5: all patches of 64 px have nearly one code" in caplog.text


def test_images_that_are_too_small():
    with pytest.raises(InputError, match="image_size.*128"):
        model_of().loss(batch(images(1, side=100)))
    with pytest.raises(InputError, match="image_size.*64"):
        model_of()(images(1, side=48))


def test_it_learns_where_patches_lie():
    ramp = torch.linspace(0, 1, 128)
    pictures = torch.stack([ramp.expand(128, 128), ramp[:, None].expand(128, 128), torch.zeros(128, 128)])[None]
    model = model_of(learning_rate=1e-3, pairs=3)
    model.before_training([batch(pictures)])
    _, losses = trained(model, pictures, steps=12)
    assert losses[0] == pytest.approx(2 * np.log(8), rel=0.1)
    assert np.mean(losses[-5:]) < 0.6 * losses[0]
