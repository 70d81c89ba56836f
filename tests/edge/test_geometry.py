"""The way of an image to the network and of a map back, in numpy and in torch, for every size and shape."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from blemish.data.images import ignore_mask, mask_to_network, prepare, to_image, to_network, to_unit
from blemish.edge import geometry as edge
from blemish.edge import runtime
from blemish.edge.errors import InputError
from blemish.edge.geometry import GREY, Geometry
from blemish.ops.maps import apply_ignore_mask
from blemish.types import IGNORED, Prediction

SIDES = st.integers(8, 400)
WINDOW = {"uint16": (5.0, 50000.0), "float32": (-3.5, 40000.25)}


@st.composite
def geometries(draw, sizes=(None, 8, 33, 64, 129, 256), height=8, width=8):
    """A geometry that images (height, width) can take."""
    size = draw(st.sampled_from(sizes))
    crop = draw(st.none() | st.integers(8, size or min(height, width)))
    return Geometry(size, crop, draw(st.sampled_from(edge.RESIZES)))


def extent(length: int, resized: int, padded: int, crop: int | None) -> tuple[float, float]:
    """From where to where the pixels of one axis of an image are in the network's input."""
    if crop is None:
        return 0.0, float(length)
    first, before = (padded - crop) // 2, (padded - resized) // 2
    return max(0, (first - before) / resized) * length, min(1, (first + crop - before) / resized) * length


def picture(seed: int, height: int, width: int, dtype: str, colour: bool) -> np.ndarray:
    shape = (height, width, 3) if colour else (height, width)
    return (np.random.default_rng(seed).random(shape) * {"uint8": 256, "uint16": 60000, "float32": 40000}[dtype]).astype(dtype)


# ---- where things lie ----


@settings(max_examples=200)
@given(SIDES, SIDES, st.integers(8, 300))
def test_a_letterbox_never_distorts(height, width, size):
    resized, padded = Geometry(size, None, "letterbox").resized(height, width), Geometry(size, None, "letterbox").padded(height, width)
    assert max(resized) == size and padded == (size, size)
    scale = size / max(height, width)
    for side, placed in zip((height, width), resized, strict=True):
        assert abs(placed - scale * side) <= 0.5 + 1e-9 or placed == 1  # 46.5 of 139 × 93 / 278 is not what floats make of it
    assert (resized[0] - resized[1]) * (height - width) >= 0


@settings(max_examples=120)
@given(SIDES, SIDES, st.data())
def test_bars_of_grey_lie_where_the_mask_says(height, width, data):
    geometry = data.draw(geometries(height=height, width=width))
    image = to_network(torch.zeros(3, height, width, dtype=torch.uint8), geometry)
    mask = mask_to_network(torch.zeros(height, width, dtype=torch.uint8), geometry)
    outside = ignore_mask(height, width, geometry, None)
    assert torch.equal(image == GREY, (mask == IGNORED).expand_as(image))
    assert set(image.unique().tolist()) <= {0, GREY}
    assert torch.equal(mask == IGNORED, torch.zeros_like(mask).bool() if outside is None else outside)
    bars = geometry.resize == "letterbox" and geometry.size is not None and height != width and geometry.crop is None
    assert bars or geometry.crop or not (mask == IGNORED).any()


@settings(max_examples=200)
@given(SIDES, SIDES, st.floats(-0.5, 0.5), st.floats(-0.5, 0.5), st.data())
def test_a_blob_comes_back_to_its_place(height, width, u, v, data):
    geometry = data.draw(geometries(height=height, width=width))
    resized, padded = geometry.resized(height, width), geometry.padded(height, width)
    spans = [extent(*axis, geometry.crop) for axis in zip((height, width), resized, padded, strict=True)]
    wide, pitch = [end - begin for begin, end in spans], [max(1, a / b) for a, b in zip((height, width), resized, strict=True)]
    y, x = ((begin + end) / 2 + share * (end - begin) / 2 for (begin, end), share in zip(spans, (u, v), strict=True))
    rows, columns = torch.arange(height)[:, None] + 0.5, torch.arange(width)[None] + 0.5
    blob = torch.exp(-(((rows - y) / wide[0]) ** 2 + ((columns - x) / wide[1]) ** 2) / (2 * 0.06**2))  # (H, W)
    back = to_image(to_network(blob.expand(3, -1, -1), geometry)[0], height, width, geometry)
    assert back.shape == (height, width) and back.dtype == torch.float32
    weight = back - back.min()
    assume(weight.sum() > 0)  # a blob between the only two pixels of a side may be as flat as a map of one value
    assert abs((weight * rows).sum() / weight.sum() - y) < pitch[0]
    assert abs((weight * columns).sum() / weight.sum() - x) < pitch[1]


def test_an_image_of_the_right_size_is_left_alone():
    image = torch.rand(3, 48, 48)
    for resize in edge.RESIZES:
        assert to_network(image, Geometry(48, None, resize)) is image
        assert torch.equal(to_image(image[0], 48, 48, Geometry(48, None, resize)), image[0])


def test_a_crop_of_a_letterbox_has_its_bars():
    image = to_network(torch.zeros(1, 30, 90), Geometry(90, 60, "letterbox"))[0]
    expected = torch.full((60, 60), GREY / 255)
    expected[15:45] = 0
    assert torch.equal(image, expected)
    map = to_image(1 - image, 30, 90, Geometry(90, 60, "letterbox"))
    assert (map[:, 15:75] == 1).all() and (map[:, :15] == (1 - image).min()).all() and (map[:, 75:] == (1 - image).min()).all()


# ---- numpy and torch ----


@settings(max_examples=150)
@given(SIDES, SIDES, st.sampled_from(["uint8", "uint16", "float32"]), st.booleans(), st.booleans(), st.integers(0, 2**32), st.data())
def test_numpy_places_as_torch_does(height, width, dtype, colour, roi, seed, data):
    geometry = data.draw(geometries(height=height, width=width))
    array = picture(seed, height, width, dtype, colour)
    inside = np.random.default_rng(seed).random((height, width)) < 0.7 if roi else None
    expected = prepare(array, WINDOW, geometry, inside)
    metadata = {"input": "float", "source": None, "window": WINDOW, "size": list(expected.shape[1:])}
    metadata |= {"image_size": geometry.size, "crop": geometry.crop, "resize": geometry.resize}
    metadata["roi"] = None if inside is None else runtime.packed(inside)
    found = runtime.to_input(edge.fill_masked(array, inside, WINDOW), metadata)
    assert found.dtype == np.float32
    if dtype == "uint8":
        assert np.array_equal(found, expected)
    np.testing.assert_allclose(found, expected, atol=3e-5)
    map = np.random.default_rng(seed).random(expected.shape[1:], dtype=np.float32)
    back = edge.to_image(map, height, width, geometry)
    np.testing.assert_allclose(back, to_image(torch.from_numpy(map), height, width, geometry), atol=3e-5)
    where = edge.ignore_mask_in_network(height, width, geometry, runtime.inside_of(height, width, metadata))
    if where is not None and where.all():
        with pytest.raises(InputError, match="ROI"):
            ignore_mask(height, width, geometry, inside)
        return
    other = ignore_mask(height, width, geometry, inside)
    assert (where is None) == (other is None)
    if where is None:
        return
    assert np.array_equal(where, other)
    for share in (0.0, 0.1, None):
        judged = edge.apply_ignore_mask(0.123, map, where, share)
        again = apply_ignore_mask(Prediction(torch.tensor([0.123]), torch.from_numpy(map)[None]), other[None], share)
        assert judged[0] == pytest.approx(float(again.score), rel=1e-5) and np.array_equal(judged[1], again.map[0])


@pytest.mark.parametrize(("height", "width", "size"), [(58, 8, 8), (79, 9, 13), (8, 58, 8)])
@pytest.mark.parametrize("colour", [False, True])
def test_bytes_become_one_pixel_wide_as_torch_rounds(height, width, size, colour):
    geometry = Geometry(size, None, "letterbox")
    resized, padded = geometry.resized(height, width), geometry.padded(height, width)
    for seed in range(20):
        image = torch.from_numpy(runtime.coloured(picture(seed, height, width, "uint8", colour))).permute(2, 0, 1)
        expected = F.interpolate(image[None], resized, mode="bilinear", antialias=True)[0]
        placed = to_network(image, geometry)
        assert torch.equal(placed[..., *edge.middle(padded, resized)], expected)
        found = edge.to_network(image.permute(1, 2, 0).numpy(), WINDOW, geometry)
        assert np.array_equal(found, placed.permute(1, 2, 0))


@settings(max_examples=50)
@given(SIDES, SIDES, st.integers(0, 2**32))
def test_a_roi_comes_back_from_its_text(height, width, seed):
    mask = np.random.default_rng(seed).random((height, width)) < 0.5
    metadata = runtime.packed(mask)
    assert np.array_equal(runtime.inside_of(height, width, {"roi": metadata}), mask)
    assert runtime.inside_of(2 * height, 3 * width, {"roi": metadata})[1::2, 1::3].tolist() == mask.tolist()


# ---- what is not inside ----


@settings(max_examples=100)
@given(SIDES, SIDES, st.sampled_from(["uint8", "uint16", "float32"]), st.booleans(), st.integers(0, 2**32), st.data())
def test_pixels_outside_of_the_roi_change_nothing(height, width, dtype, colour, seed, data):
    geometry = data.draw(geometries(height=height, width=width))
    array, other = (picture(seed + i, height, width, dtype, colour) for i in (0, 1))
    inside = np.random.default_rng(seed).random((height, width)) < 0.5
    other[inside] = array[inside]
    kept = array.copy()
    assert torch.equal(prepare(array, WINDOW, geometry, inside), prepare(other, WINDOW, geometry, inside))
    assert np.array_equal(array, kept)
    everything = np.ones((height, width), bool)
    assert torch.equal(prepare(array, WINDOW, geometry, everything), prepare(array, WINDOW, geometry))


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_the_grey_is_the_same_share_of_every_range(dtype):
    array = np.full((9, 9), 7, dtype)
    painted = to_unit(edge.fill_masked(array, np.zeros((9, 9), bool), WINDOW), WINDOW)
    np.testing.assert_allclose(painted, GREY / 255, atol=2e-5)


def test_the_map_outside_takes_the_least_value_inside():
    inside = np.zeros((20, 30), bool)
    inside[5:15, 10:20] = True
    map = torch.rand(64, 64) + 1
    map[:8] = -3
    back = to_image(map, 20, 30, Geometry(64), inside)
    plain = to_image(map, 20, 30, Geometry(64))
    assert torch.equal(back[inside], plain[inside]) and (back[~torch.from_numpy(inside)] == plain[inside].min()).all()


def test_values_that_training_did_not_have():
    metadata = {"ranges": {"uint16": [320, 3840, 3800]}, "window": {"uint16": [320, 3840]}, "roi": None}
    deep = np.random.default_rng(0).integers(320, 3840, (64, 64)).astype(np.uint16)
    runtime.check_values(deep, metadata)
    for other in (deep * 16, deep // 16):
        with pytest.warns(UserWarning, match="uint16 from 320 to 3840"):
            runtime.check_values(other, metadata)
    with pytest.raises(runtime.InputError, match=r"uint8.*uint16.*data\.window"):
        runtime.check_values((deep // 16).astype(np.uint8), metadata)
