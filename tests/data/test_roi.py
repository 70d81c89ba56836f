"""Regions of interest, and the batches that a data set makes with them."""

import numpy as np
import pytest
import torch
from support import composed, save, tiny_overrides

from blemish.data.dataset import Images
from blemish.data.manifest import Sample
from blemish.data.roi import Roi
from blemish.edge.errors import InputError
from blemish.edge.geometry import GREY, Geometry
from blemish.run.config import build
from blemish.types import IGNORED, NO_TRUTH


def disc(height, width):
    y, x = np.mgrid[:height, :width]
    return (y / height - 0.5) ** 2 + (x / width - 0.5) ** 2 < 0.16


@pytest.mark.parametrize("scale", [1, 255])
def test_one_mask_is_scaled_to_every_image(tmp_path, scale):
    roi = Roi(save(tmp_path / "roi.png", (disc(40, 60) * scale).astype(np.uint8)))
    assert np.array_equal(roi.inside(None, 40, 60), disc(40, 60))
    assert np.array_equal(roi.inside(tmp_path / "any.png", 80, 120), disc(40, 60).repeat(2, 0).repeat(2, 1))
    assert np.array_equal(roi.inside(None, 20, 20), disc(40, 60)[1::2, 1::3])
    assert np.array_equal(roi.inside(None, 80, 120, (30, 20, 50, 40)), roi.inside(None, 80, 120)[20:60, 30:80])
    assert np.array_equal(Roi(disc(40, 60)).inside(None, 40, 60), disc(40, 60))
    assert Roi(disc(40, 60)).digest() == roi.digest() == roi.digest(tmp_path / "any.png") != Roi(disc(60, 40)).digest()


def test_a_folder_has_a_mask_for_each_image(tmp_path):
    masks = {"good/a.png": disc(9, 9), "bad/a.bmp": ~disc(9, 9), "b.png": disc(12, 9)}
    for name, mask in masks.items():
        save(tmp_path / "regions" / name, mask.astype(np.uint8) * 255)
    root = tmp_path / "data"
    roi = Roi(tmp_path / "regions", root)
    for name, mask in {"good/a.jpg": "good/a.png", "bad/a.png": "bad/a.bmp", "bad/b.tif": "b.png"}.items():
        assert np.array_equal(roi.inside(root / name, *masks[mask].shape), masks[mask])
    assert len({roi.digest(root / name) for name in ("good/a.jpg", "bad/a.png", "bad/b.tif")} | {roi.digest()}) == 4
    with pytest.raises(InputError, match=r"data.bad.c\.png: no mask of its ROI; expected .*regions.bad.c\.png or .*regions.c\.png"):
        roi.inside(root / "bad" / "c.png", 9, 9)
    save(tmp_path / "regions" / "c.png", np.zeros((9, 9), np.uint8))
    (tmp_path / "regions" / "d.png").touch()
    roi = Roi(tmp_path / "regions", root)
    with pytest.raises(InputError, match=r"data.bad.c\.png: .*regions.c\.png is a mask without a white pixel"):
        roi.inside(root / "bad" / "c.png", 9, 9)
    with pytest.raises(InputError, match=r"data.d\.png: .*regions.d\.png: the file is empty"):
        roi.inside(root / "d.png", 9, 9)
    with pytest.raises(InputError, match="data.roi=.*regions"):
        roi.inside(None, 9, 9)


def test_what_is_no_roi(tmp_path):
    with pytest.raises(InputError, match=r"data\.roi=.*none\.png: no such file or folder"):
        Roi(tmp_path / "none.png")
    with pytest.raises(InputError, match=r"black\.png is a mask without a white pixel"):
        Roi(save(tmp_path / "black.png", np.zeros((9, 9), np.uint8)))


def rows_of(data, split):
    return {key: (image, mask) for b in data.loader(split) for image, mask, key in zip(b.image, b.mask, b.path, strict=True)}


def data_of(tiny, *overrides):
    data = build(composed(*tiny_overrides(tiny), *overrides).data)
    data.setup()
    return data


def test_batches_are_grey_and_ignored_outside(tiny, tmp_path):
    inside = disc(64, 64)
    save(tmp_path / "roi.png", inside.astype(np.uint8))
    with_roi, without = (data_of(tiny, *more) for more in ([f"data.roi='{tmp_path}/roi.png'"], []))
    for split in ("train", "calibrate", "test"):
        plain = rows_of(without, split)
        for key, (image, mask) in rows_of(with_roi, split).items():
            assert torch.equal(image[:, inside], plain[key][0][:, inside]) and (image[:, ~inside] == np.float32(GREY / 255)).all()
            assert torch.equal(mask[inside], plain[key][1][inside]) and (mask[~inside] == IGNORED).all()
    assert with_roi.digest == without.digest


def test_worker_processes_have_the_roi(tiny, tmp_path):
    save(tmp_path / "roi.png", disc(64, 64).astype(np.uint8))
    options = [f"data.roi='{tmp_path}/roi.png'", "resize=letterbox", "image_size=32"]
    here, there = (rows_of(data_of(tiny, *options, f"workers={workers}"), "test") for workers in (0, 1))
    assert here.keys() == there.keys() and all(torch.equal(a, b) for key in here for a, b in zip(here[key], there[key], strict=True))


def test_tiles_of_an_image_have_their_part_of_its_mask(tmp_path):
    save(tmp_path / "a.png", np.random.default_rng(0).integers(0, 100, (40, 60), dtype=np.uint8))
    inside = disc(20, 30)
    save(tmp_path / "mask.png", inside.astype(np.uint8))
    samples = [Sample("a.png", "test", 0, "good", tile=f"{x},8,20,24") for x in (0, 17, 40)]
    images = Images([*samples, Sample("a.png", "test", 0, "good", tile="0,0,8,8")], tmp_path, {}, Geometry(), Roi(tmp_path / "mask.png"))
    whole = inside.repeat(2, 0).repeat(2, 1)
    for i, x in enumerate((0, 17, 40)):
        assert np.array_equal(images[i][2] != IGNORED, whole[8:32, x : x + 20])
    with pytest.raises(InputError, match=r"a\.png: no pixel of its ROI"):
        images[3]


def test_a_letterbox_of_images_of_several_shapes(tmp_path):
    rng = np.random.default_rng(0)
    shapes = {"wide": (30, 90), "high": (90, 40), "square": (50, 50)}
    for name, shape in shapes.items():
        save(tmp_path / f"{name}.png", rng.integers(0, 100, shape, dtype=np.uint8))
    samples = [Sample(f"{name}.png", "test", 1, "bad", boxes="3 3 20 20") for name in shapes] + [Sample("wide.png", "test", 1, "bad")]
    images = Images(samples, tmp_path, {}, Geometry(60, None, "letterbox"))
    rows = [images[i] for i in range(len(samples))]
    for (image, _, mask, _), (high, wide) in zip(rows, [(20, 60), (60, 27), (60, 60), (20, 60)], strict=True):
        assert image.shape == (3, 60, 60) and mask.shape == (60, 60)
        assert int((mask != IGNORED).sum()) == high * wide
        assert torch.equal((image == np.float32(GREY / 255)).all(0), mask == IGNORED)
    assert set(rows[3][2].unique().tolist()) == {NO_TRUTH, IGNORED} and set(rows[0][2].unique().tolist()) == {0, 1, IGNORED}


def test_an_image_of_which_nothing_is_left_is_named(tiny, tmp_path):
    inside = np.zeros((64, 64), np.uint8)
    inside[0, 0] = 255
    save(tmp_path / "roi.png", inside)
    data = data_of(tiny, f"data.roi='{tmp_path}/roi.png'", "image_size=16")
    with pytest.raises(InputError, match=r"normal_test/000\.png: no pixel of its ROI"):
        next(iter(data.loader("test")))


def test_images_without_a_mask_stop_or_are_skipped(tiny, tmp_path):
    for folder in ("normal", "normal_test", "square"):
        for path in sorted((tiny / folder).glob("*.png"))[1:]:
            save(tmp_path / "regions" / folder / path.name, np.full((8, 8), 255, np.uint8))
    own = f"data.roi='{tmp_path}/regions'"
    with pytest.raises(InputError, match=r"000\.png: no mask of its ROI"):
        [batch.image for split in ("train", "calibrate") for batch in data_of(tiny, own).loader(split)]
    data = data_of(tiny, own, "data.on_error=skip")
    assert sorted(data.skipped) == ["normal/000.png", "normal_test/000.png", "square/000.png"]
    assert len(rows_of(data, "test")) == 10


def test_the_range_of_deep_images_is_that_of_the_roi(tmp_path):
    rng = np.random.default_rng(0)
    for folder in ("normal", "normal_test"):
        for i in range(4):
            image = rng.integers(1000, 2000, (40, 40)).astype(np.uint16)
            image[:, 20:] = 60000
            save(tmp_path / folder / f"{i}.png", image)
    roi = np.zeros((40, 40), np.uint8)
    roi[:, :20] = 255
    save(tmp_path / "roi.png", roi)
    options = [f"data.root='{tmp_path}'", "data.normal_test=normal_test", "image_size=32", f"data.roi='{tmp_path}/roi.png'"]
    data = build(composed("data=folder", *options).data)
    data.setup()
    lo, hi = data.window["uint16"]
    assert 1000 <= lo < hi < 2000


@pytest.mark.parametrize("data", ["mvtec", "folder", "gdxray", "mtd", "textures"])
def test_every_data_set_takes_both(data, tmp_path):
    save(tmp_path / "roi.png", np.full((9, 9), 255, np.uint8))
    cfg = composed(f"data={data}", f"data.root='{tmp_path}'", f"data.roi='{tmp_path}/roi.png'", "resize=letterbox")
    module = build(cfg.data)
    assert module.geometry.resize == "letterbox" and module.roi.mask.all()
    with pytest.raises(InputError, match="resize=fill: expected stretch or letterbox"):
        build(composed(f"data={data}", f"data.root='{tmp_path}'", "resize=fill").data)
