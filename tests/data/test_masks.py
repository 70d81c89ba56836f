"""What a mask marks, in each way that programs write masks."""

import numpy as np
import pytest
import tifffile
from PIL import Image
from scipy import ndimage

from blemish.data.masks import binary, interpret, read_mask
from blemish.data.roi import Roi
from blemish.edge.errors import InputError

Y, X = np.mgrid[:64, :80]
DISC = (Y - 30) ** 2 + (X - 40) ** 2 < 15**2
SOFT = ndimage.gaussian_filter(DISC.astype(float), 1.5)
PARTS = np.select([(X - 14) ** 2 + (Y - 20) ** 2 < 81, abs(X - 35) < 6, abs(X - 46) < 6], [1, 2, 3], 0).astype(np.uint8)
PARTS[50:] = 0  # two of them touch


def marked(tmp_path, image, name="mask.png", **options):
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(tmp_path / name, **options)
    return read_mask(tmp_path / name)


def palette(numbers, colours, **options):
    image = Image.fromarray(numbers.astype(np.uint8)).convert("P")
    image.putpalette(np.array(colours, np.uint8).ravel().tolist())
    image.info.update(options)
    return image


def rgba(colour, alpha):
    return np.dstack([np.broadcast_to(np.asarray(colour, np.uint8), (*DISC.shape, 3)), alpha.astype(np.uint8)])


VOC = [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0)]
ANY = np.random.default_rng(0).integers(0, 256, (*DISC.shape, 3), dtype=np.uint8)


@pytest.mark.parametrize("colour", [(255, 255, 255), (0, 0, 0), (255, 0, 0), (7, 7, 7)])
@pytest.mark.parametrize("below", ["the same", "any"])
@pytest.mark.parametrize("alpha", [DISC * 255, DISC * 128, np.rint(SOFT * 255)], ids=["hard", "half", "soft"])
def test_one_colour_on_transparency_marks_where_it_is(tmp_path, colour, below, alpha):
    painted = rgba(colour if below == "the same" else np.where((alpha > 0)[..., None], colour, ANY), alpha)
    assert np.array_equal(marked(tmp_path, painted), DISC)
    assert np.array_equal(marked(tmp_path, painted[..., [0, 3]] if len(set(colour)) == 1 else painted), DISC)
    assert np.array_equal(marked(tmp_path, painted, "mask.tif"), DISC)
    assert np.array_equal(marked(tmp_path, painted, "mask.webp", lossless=True), DISC)
    assert binary(painted).dtype == np.uint8 and interpret(painted).alpha
    assert np.array_equal(Roi(painted).inside(None, *DISC.shape), DISC) and np.array_equal(Roi(tmp_path / "mask.png").mask, DISC)


def test_alpha_of_deep_images(tmp_path):
    for colour in (0, 65535):
        deep = np.dstack([np.full((*DISC.shape, 3), colour, np.uint16), DISC.astype(np.uint16) * 65535])
        tifffile.imwrite(tmp_path / "deep.tif", deep, photometric="rgb", extrasamples=["unassalpha"])
        assert np.array_equal(read_mask(tmp_path / "deep.tif"), DISC)
    tifffile.imwrite(tmp_path / "extra.tif", deep, photometric="rgb", extrasamples=["unspecified"])
    assert read_mask(tmp_path / "extra.tif").all()


@pytest.mark.parametrize("alpha", [0, 100, 255])
def test_colour_marks_where_alpha_is_the_same_everywhere(tmp_path, alpha):
    assert np.array_equal(marked(tmp_path, rgba(DISC[..., None] * (0, 255, 0), np.full(DISC.shape, alpha))), DISC)
    assert marked(tmp_path, rgba((255, 255, 255), np.full(DISC.shape, alpha))).all() == (alpha > 0)
    assert not marked(tmp_path, rgba((0, 0, 0), np.full(DISC.shape, alpha))).any() or alpha == 100


def test_colours_on_transparency_are_laid_on_black(tmp_path):
    around = DISC | (X < 10)
    black_and_white = rgba(np.where(DISC[..., None], (255, 255, 255), (0, 0, 0)), around * 255)
    assert np.array_equal(marked(tmp_path, black_and_white), DISC)
    assert np.array_equal(marked(tmp_path, rgba(np.array(VOC)[PARTS], (PARTS > 0) * 200)), PARTS > 0)


def test_a_transparent_number_of_a_palette(tmp_path):
    for colour in ((0, 0, 0), (255, 255, 255), (9, 200, 3)):
        for number, numbers in ((0, DISC), (1, ~DISC)):
            image = palette(numbers, [colour, colour])
            assert np.array_equal(marked(tmp_path, image, transparency=number), DISC)
            assert np.array_equal(marked(tmp_path, image, "mask.gif", transparency=number), DISC)
    assert np.array_equal(marked(tmp_path, np.where(DISC, 255, 0).astype(np.uint8), transparency=0), DISC)


@pytest.mark.parametrize("levels", [(1, 2, 3), (50, 100, 200), (85, 170, 255), (1, 15, 255), (200, 100, 50), (10, 255, 255), (60, 60, 60)])
@pytest.mark.parametrize("scale", [1, 257, 1 / 255])
def test_every_class_is_marked(tmp_path, levels, scale):
    numbers = np.array([0, *levels])[PARTS]
    if scale == 1:
        assert np.array_equal(marked(tmp_path, numbers.astype(np.uint8)), PARTS > 0)
        assert np.array_equal(marked(tmp_path, np.dstack([numbers, 0 * numbers, 0 * numbers]).astype(np.uint8)), PARTS > 0)
        assert np.array_equal(binary(numbers), PARTS > 0) and np.array_equal(binary(numbers.astype(float)), PARTS > 0)
        colours = np.zeros((256, 3), int)
        colours[list(levels)] = 0 if levels == (1, 2, 3) else VOC[1:]  # their colours do not count
        assert np.array_equal(marked(tmp_path, palette(numbers, colours)), PARTS > 0)
    elif scale > 1:
        assert np.array_equal(marked(tmp_path, (numbers * scale).astype(np.uint16)), PARTS > 0)
    else:
        assert np.array_equal(marked(tmp_path, (numbers * scale).astype(np.float32), "mask.tif"), PARTS > 0)


def test_numbers_of_instances(tmp_path):
    numbers = np.zeros((15, 9, 15, 9), np.uint8)
    numbers[:, 1:6, :, 1:6] = np.arange(1, 226).reshape(15, 1, 15, 1)
    numbers = numbers.reshape(135, 135)
    assert np.array_equal(marked(tmp_path, numbers), numbers > 0)
    assert np.array_equal(marked(tmp_path, numbers.astype(np.uint16) * np.uint16(290)), numbers > 0)


def test_a_palette_that_encodes_a_grey_image(tmp_path):
    grey = np.rint(SOFT * 255).astype(np.uint8)
    assert np.array_equal(marked(tmp_path, Image.fromarray(grey), "mask.gif"), DISC)
    assert np.array_equal(marked(tmp_path, palette(~DISC, [(255, 255, 255), (0, 0, 0)])), DISC)
    assert np.array_equal(marked(tmp_path, palette(~DISC, [(255, 0, 0), (0, 0, 0)])), DISC)
    assert np.array_equal(marked(tmp_path, palette(DISC, [(120, 120, 120), (255, 0, 0)])), DISC)


@pytest.mark.parametrize("shape", [DISC, abs(X - Y) < 2, (X // 3 == 9) & (Y // 4 == 5)], ids=["disc", "line", "tiny"])
def test_soft_edges_are_cut_at_half(tmp_path, shape):
    white = Image.fromarray(shape.astype(np.uint8) * 255)
    for quality in (95, 75, 40):
        assert np.array_equal(marked(tmp_path, white, "mask.jpg", quality=quality), shape)
    made = [white.resize((80 * k // 4, 64 * k // 4), how) for k in (2, 3, 8, 11) for how in (Image.BILINEAR, Image.BOX, Image.LANCZOS)]
    made += [made[0].resize((80, 64), Image.NEAREST), white.resize((63, 51), Image.BICUBIC)]
    for image in made:
        if np.max(image) > 200:
            assert np.array_equal(marked(tmp_path, image), np.asarray(image) > 127)
    for sigma in (0.7, 1.5, 4):
        values = ndimage.gaussian_filter(shape.astype(np.float32), sigma)
        if values.max() > 0.6:
            assert (marked(tmp_path, (values * 65535).astype(np.uint16)) != (values > 0.5)).sum() <= 1
            assert (marked(tmp_path, values, "mask.tif") != (values > 0.5)).sum() <= 1


@pytest.mark.parametrize("colours", [[(255, 0, 0), (0, 255, 0), (0, 0, 255)], [(250, 50, 83), (51, 221, 255), (61, 61, 245)], VOC[1:]])
def test_coloured_classes_in_a_jpeg(tmp_path, colours):
    image = np.array([(0, 0, 0), *colours], np.uint8)[PARTS]
    assert np.array_equal(marked(tmp_path, image), PARTS > 0)
    wrong = marked(tmp_path, image, "mask.jpg", quality=90) != (PARTS > 0)
    assert wrong.sum() < 0.05 * (PARTS > 0).sum()  # a JPEG's colours have half the resolution


@pytest.mark.parametrize("level", [1, 128, 255])
def test_one_level(tmp_path, level):
    assert marked(tmp_path, np.full(DISC.shape, level, np.uint8)).all()
    assert np.array_equal(marked(tmp_path, DISC.astype(np.uint8) * level), DISC)
    assert not marked(tmp_path, np.zeros(DISC.shape, np.uint8)).any()


@pytest.mark.parametrize("name", ["mask.png", "mask.tif"])
def test_one_bit(tmp_path, name):
    assert np.array_equal(marked(tmp_path, DISC, name), DISC) and np.array_equal(binary(DISC), DISC)


def test_single_pixels():
    def mask(*values, dtype=np.uint8):
        return np.array([values], dtype)

    assert binary(mask(0, 1, 1)).tolist() == [[0, 1, 1]]
    assert binary(mask(0, 255, 127, 128, 3)).tolist() == [[0, 1, 0, 1, 0]]  # blurred edges of a JPEG
    assert binary(mask(0, 1, 2, 3)).tolist() == [[0, 1, 1, 1]]  # class numbers
    assert binary(mask(0, 65535, 30000, dtype=np.uint16)).tolist() == [[0, 1, 0]]
    assert binary(mask(0, 255, 100, dtype=np.uint16)).tolist() == [[0, 1, 0]]
    assert binary(mask(0, 300, 7, dtype=np.uint16)).tolist() == [[0, 1, 1]]  # instance numbers
    assert binary(mask(0, 1, 0.4, dtype=np.float32)).tolist() == [[0, 1, 0]]
    assert binary(np.array([[[0, 0, 0], [255, 0, 0], [0, 0, 200]]], np.uint8)).tolist() == [[0, 1, 1]]


@pytest.mark.parametrize("wrong", [np.zeros((9, 9, 5)), np.zeros((0, 9)), np.full((9, 9), np.nan), np.zeros((9, 9), "c8")])
def test_what_is_no_mask(wrong):
    with pytest.raises(InputError, match="data.roi: "):
        Roi(wrong)
