"""Upsampling and blurring as matrices against torch's interpolation and scipy's filter."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter1d, label

from blemish.edge.errors import InputError
from blemish.ops.maps import align, blur, peaks, smooth_upsample


@pytest.mark.parametrize(
    ("cells", "size", "sigma"), [((8, 8), (64, 64), 4.0), ((5, 9), (40, 33), 2.5), ((3, 3), (10, 10), 4.0), ((7, 4), (7, 4), 1.0)]
)
def test_smooth_upsample_is_interpolate_then_blur(cells, size, sigma):
    map = torch.rand(3, *cells, generator=torch.Generator().manual_seed(0))
    up = F.interpolate(map[:, None].double(), size, mode="bilinear", align_corners=False)[:, 0].numpy()
    expected = gaussian_filter1d(
        gaussian_filter1d(up, sigma, axis=1, mode="reflect", truncate=4), sigma, axis=2, mode="reflect", truncate=4
    )
    np.testing.assert_allclose(smooth_upsample(map, size, sigma), expected, atol=1e-5)


def test_without_blur_and_constant_maps():
    map = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = F.interpolate(map[:, None], (16, 16), mode="bilinear", align_corners=False)[:, 0]
    torch.testing.assert_close(smooth_upsample(map, (16, 16), 0.0), expected)
    torch.testing.assert_close(smooth_upsample(torch.full((1, 4, 4), 7.0), (32, 32), 4.0), torch.full((1, 32, 32), 7.0))


def test_a_blur_that_is_none():
    for sigma in (-1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match=r"model\.sigma=.*1000"):
            blur(torch.rand(1, 4, 4), sigma)


def test_align_brings_stages_to_the_first_grid():
    fine, coarse = torch.rand(2, 3, 8, 8), torch.rand(2, 5, 4, 4)
    expected = F.interpolate(coarse, (8, 8), mode="bilinear", align_corners=False)
    torch.testing.assert_close(align([fine, coarse]), torch.cat([fine, expected], 1))
    both = align([fine, coarse], "nearest")
    assert both.shape == (2, 8, 8, 8)
    torch.testing.assert_close(both[:, 3:, ::2, ::2], coarse)


def test_no_more_regions_than_peaks_are_above_a_value():
    maps = smooth_upsample(torch.rand(3, 12, 12, generator=torch.Generator().manual_seed(0)), (40, 40), 1.5)
    found = peaks(maps, 200)
    for map, values in zip(maps, found, strict=True):
        assert values[0] == map.max() and torch.equal(values.sort(descending=True).values, values)
        for threshold in map.quantile(torch.linspace(0.3, 0.99, 20)):
            assert label(map > threshold, np.ones((3, 3)))[1] <= int((values > threshold).sum())
    assert peaks(torch.zeros(1, 2, 2), 6)[0].isneginf().sum() == 2
