"""The encoder and the decoder against the paper's table, and which images they take."""

import pytest
import torch
from support import images

from blemish.edge.errors import InputError
from blemish.ops.conv import Decoder, Encoder, input_side
from blemish.ops.rng import seeded


def networks(side, size=10):
    with seeded(0):
        return Encoder(side, size), Decoder(side, size)


def test_is_the_papers_table():
    """Output sizes of arXiv 1807.02011, table 1, for 128 px."""
    encoder, decoder = networks(128, 100)
    shapes = [(64, 32), (32, 32), (32, 32), (16, 64), (16, 64), (8, 128), (8, 64), (8, 32)]
    outputs = encoder.layers(images(1, side=128))
    assert [(x.shape[-1], x.shape[1]) for x in outputs] == shapes
    assert encoder(images(1, side=128)).shape == (1, 100)
    image, *inputs = decoder.layers(torch.zeros(1, 100))
    assert image.shape == (1, 3, 128, 128)
    assert [x.shape for x in inputs] == [x.shape for x in outputs]
    kernels = [(convolution.kernel_size[0], convolution.stride[0]) for convolution in encoder.convolutions]
    assert kernels == [(4, 2), (4, 2), (3, 1), (4, 2), (3, 1), (4, 2), (3, 1), (3, 1)]
    assert kernels == [(convolution.kernel_size[0], convolution.stride[0]) for convolution in decoder.convolutions][::-1]


@pytest.mark.parametrize(("side", "grid"), [(16, 1), (48, 3), (64, 4), (224, 7), (240, 15), (256, 8), (512, 8)])
def test_other_sides(side, grid):
    encoder, decoder = networks(side)
    outputs = encoder.layers(images(1, side=side))
    assert outputs[-1].shape == (1, 32, grid, grid)
    assert [x.shape for x in decoder.layers(encoder.code(outputs[-1]))] == [(1, 3, side, side)] + [x.shape for x in outputs]


def test_the_linear_layer_is_the_papers_convolution():
    """A kernel as large as the grid: the same products, in the order of the flattened map."""
    encoder, _ = networks(64)
    last = encoder.layers(images(2))[-1]
    kernel = encoder.last.weight.unflatten(1, last.shape[1:])
    expected = torch.nn.functional.conv2d(last, kernel, encoder.last.bias).flatten(1)
    torch.testing.assert_close(encoder(images(2)), expected, rtol=1e-4, atol=1e-5)


def test_the_signal_neither_vanishes_nor_explodes():
    encoder, decoder = networks(256)
    outputs = encoder.layers(images(2, side=256))
    signals = outputs + [outputs[-1]] + decoder.layers(torch.randn(2, 10, generator=torch.Generator().manual_seed(0)))[1:]
    assert all(0.2 < x.std() < 3 for x in signals)


def test_the_side_is_that_of_the_crop_and_can_be_halved():
    assert input_side(250, 224) == 224
    assert input_side(256, None) == 256
    for image_size, crop in ((100, None), (None, None), (8, None), (0, None), (256, 100)):
        with pytest.raises(InputError, match="image_size.*16"):
            input_side(image_size, crop)


@pytest.mark.parametrize("shape", [(1, 3, 48, 48), (1, 3, 64, 48)])
def test_images_of_another_side_are_refused(shape):
    with pytest.raises(InputError, match="image_size.*64×64"):
        networks(64)[0](torch.zeros(shape))
