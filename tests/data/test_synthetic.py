"""Drawn defects: exact masks, inside where there is something to see, and a folder that trains and tests."""

import numpy as np
import pytest
import skimage.data
from PIL import Image
from support import composed

from blemish.data.synthetic import blemish, place, write
from blemish.edge.errors import InputError
from blemish.edge.reading import read
from blemish.run.config import build


@pytest.mark.parametrize(
    "image", [skimage.data.brick(), skimage.data.coffee(), skimage.data.camera()[:40, :31]], ids=["grey", "rgb", "small"]
)
def test_only_the_masked_pixels_change(image):
    rng = np.random.default_rng(0)
    for _ in range(8):
        changed, mask, _ = blemish(image, [skimage.data.gravel()[:20, :20]], rng)
        assert changed.dtype == np.uint8
        assert changed.shape == image.shape
        assert mask.any()
        assert np.array_equal(changed[~mask], image[~mask])
        assert (changed[mask] != image[mask]).mean() > 0.3


def test_the_same_seed_draws_the_same():
    first, again = (blemish(skimage.data.brick(), [], np.random.default_rng(3)) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


def test_defects_fall_on_the_object_rather_than_on_its_background():
    image = np.full((200, 200), 200, np.uint8)
    image[50:150, 50:150] = skimage.data.brick()[:100, :100]
    rng = np.random.default_rng(0)
    inside = [all(40 <= c < 160 for c in place(image, rng)) for _ in range(50)]
    assert sum(inside) > 45


def test_the_folder_is_made_of_training_images_alone_and_can_be_used(tiny, tmp_path):
    data = build(
        composed("data=folder", f"data.root='{tiny}'", "data.normal_test=normal_test", "data.abnormal=[square]", "image_size=64").data
    )
    data.setup()
    assert write(data, tmp_path / "made", 0.25, seed=0) == 6
    made = tmp_path / "made"
    train = {np.asarray(Image.open(path)).tobytes() for path in (tiny / "normal").iterdir()}
    written = [np.asarray(Image.open(path)).tobytes() for folder in ("normal", "normal_test") for path in (made / folder).iterdir()]
    assert set(written) == train
    names = sorted(path.name for path in (made / "normal_test").iterdir())
    assert names == sorted(path.name for path in (made / "defects").iterdir()) == sorted(path.name for path in (made / "masks").iterdir())
    options = ["data.normal_test=normal_test", "data.abnormal=[defects]", "data.masks=masks", "image_size=64"]
    again = build(composed("data=folder", f"data.root='{made}'", *options).data)
    again.setup()
    assert sum(sample.label == 1 for sample in again.samples) == 6
    with pytest.raises(InputError, match="exists"):
        write(data, made, 0.25, seed=0)


def test_deep_images_are_refused_and_nothing_is_left(tmp_path):
    (tmp_path / "data" / "normal").mkdir(parents=True)
    for i in range(4):
        Image.fromarray(np.full((40, 40), 1000 * i, np.uint16)).save(tmp_path / "data" / "normal" / f"{i}.png")
    data = build(composed("data=folder", f"data.root='{tmp_path / 'data'}'", "image_size=32").data)
    data.setup()
    with pytest.raises(InputError, match="expected images of 8 bits"):
        write(data, tmp_path / "made", 0.5, seed=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]


def test_defects_are_inside_the_roi(tiny, tmp_path):
    inside = np.zeros((64, 64), bool)
    inside[20:50, 30:60] = True
    Image.fromarray(inside).save(tmp_path / "roi.png")
    (tmp_path / "masks").mkdir()
    options = ["data=folder", f"data.root='{tiny}'", "data.normal_test=normal_test", "data.abnormal=[square]", "image_size=64"]
    with pytest.raises(InputError, match="a mask for each image"):
        write(build(composed(*options, f"data.roi='{tmp_path}/masks'").data), tmp_path / "none", 0.5, 0)
    data = build(composed(*options, f"data.roi='{tmp_path}/roi.png'").data)
    data.setup()
    assert write(data, tmp_path / "out", 0.5, 0) == 12
    for changed in sorted((tmp_path / "out" / "defects").iterdir()):
        mask, normal = read(tmp_path / "out" / "masks" / changed.name) > 0, read(tmp_path / "out" / "normal_test" / changed.name)
        assert mask.any() and not mask[~inside].any()
        assert np.array_equal(read(changed)[~mask], normal[~mask])


def test_larger_defects_are_drawn_on_request():
    small, large = (
        [blemish(skimage.data.brick(), [], np.random.default_rng(seed), sides=sides)[1].mean() for seed in range(8)]
        for sides in ((0.12, 0.45), (0.5, 1.0))
    )
    assert np.mean(large) > 3 * np.mean(small)
