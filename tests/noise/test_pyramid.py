import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from blemish.noise.pyramid import from_cells, grow, halve, mirror, pyramid


def test_oracle(oracle):
    z = oracle("pyramid_coffee")
    for s, level in enumerate(pyramid(z["level0"][None], 4)):
        torch.testing.assert_close(level[0], z[f"level{s}"], rtol=0, atol=1e-3)


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (5, 3), (1, 2)])
def test_halving_is_scipys_blur_at_every_second_pixel(size):
    image = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = gaussian_filter(image.numpy(), (0, 0, 1.39, 1.39), mode="reflect", radius=(0, 0, 6, 6))[..., ::2, ::2]
    np.testing.assert_allclose(halve(image).numpy(), expected, atol=1e-12)


@given(st.integers(1, 20), st.integers(0, 50))
def test_mirror_is_numpys_symmetric_pad(size, margin):
    expected = np.pad(np.arange(size), margin, mode="symmetric")
    assert mirror(size, margin, torch.device("cpu")).tolist() == expected.tolist()


@pytest.mark.parametrize("size", [(64, 64), (61, 83), (9, 40)])
def test_grown_maps_stay_where_they_were_sampled(size):
    y, x = torch.meshgrid(*(torch.arange(float(s)) for s in size), indexing="ij")
    for level in range(4):
        step = 2**level
        for truth in (y, x):
            grown = grow(truth[::step, ::step], *size, level)
            inner = truth <= truth[::step, ::step].max()
            assert (grown - truth).abs()[inner].max() <= step / 2
            assert torch.equal(grown[::step, ::step], truth[::step, ::step])


def test_cells_are_blocks():
    cells = torch.arange(6).view(2, 3)
    assert torch.equal(from_cells(cells, 8, 12), cells.repeat_interleave(4, 0).repeat_interleave(4, 1))
    assert torch.equal(from_cells(cells, 2, 3), cells)
