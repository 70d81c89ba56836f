"""Textures: exact masks, disjoint crops, and a cache that is complete or absent."""

import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from support import DATA

from blemish.data import textures
from blemish.data.textures import DEFECTS, TEXTURES, Textures, blemished, build, cropped, key, make, photograph
from blemish.edge.errors import InputError
from blemish.edge.reading import read


def data_of(root, **changes):
    own = {"root": root, "category": "brick", "crop_size": 64, "texture_seed": 0, "image_size": 64, "batch_size": 16}
    return Textures(**{**DATA, **own, **changes})


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("textures")


@pytest.mark.parametrize("name", TEXTURES)
def test_images_and_masks_are_what_the_seed_makes(name):
    first, again, other = build(name, 96, 0), build(name, 96, 0), build(name, 96, 1)
    assert all(np.array_equal(first[path], again[path]) for path in first) and first.keys() == again.keys()
    assert not any(np.array_equal(first[path], other[path]) for path in first)
    assert Counter(path.rpartition("/")[0] for path in first) == {"train/good": 80, "test/good": 20} | {
        f"{part}/{defect}": 8 for part in ("test", "ground_truth") for defect in DEFECTS
    }
    assert len({image.tobytes() for path, image in first.items() if path.startswith("test/")}) == 20 + 8 * len(DEFECTS)
    for path, image in first.items():
        assert image.shape == (96, 96) and image.dtype == np.uint8
        if path.startswith("ground_truth"):
            assert set(np.unique(image)) == {0, 255}
            assert 0.001 < (image > 0).mean() < 0.3


@pytest.mark.parametrize("size", [32, 128, 192])
@pytest.mark.parametrize("defect", DEFECTS)
def test_masks_are_exact(defect, size):
    rng = np.random.default_rng(0)
    others = [photograph("grass"), photograph("gravel")]
    for strength in np.linspace(0.3, 1, 8):
        clean = cropped(photograph("brick"), size, rng)
        image, mask = blemished(clean, DEFECTS[defect], strength, others, rng)
        assert mask.any() and np.array_equal(image[~mask], clean[~mask])
        assert (image[mask] != clean[mask]).mean() > 0.6
        assert np.abs(image[mask].astype(int) - clean[mask]).max() > 8


def test_no_test_pixel_was_trained_on(monkeypatch):
    pixels = np.arange(512 * 512).reshape(512, 512)  # photographs whose values say where they come from
    monkeypatch.setattr(textures, "photograph", lambda name: pixels % 512 // 2)  # value = column / 2
    made = build("grass", 64, 0)
    assert max(image.max() for path, image in made.items() if path.startswith("train/")) < 160
    assert min(image.min() for path, image in made.items() if path.startswith("test/good/")) >= 160


def test_it_is_an_mvtec_data_set_made_once(root):
    data = data_of(root)
    data.setup()
    counts = Counter((s.split, s.label) for s in data.samples)
    assert counts == {("train", 0): 61, ("calibrate", 0): 19, ("test", 0): 20, ("test", 1): 48}
    for batch in data.test_dataloader():
        assert batch.image.shape[1:] == (3, 64, 64)
        assert np.array_equal(batch.mask.flatten(1).any(1), batch.label == 1)
    made = {path: path.stat().st_mtime_ns for path in root.rglob("*.png")}
    again = data_of(root, seed=5, protocol="paper")
    again.prepare_data()
    again.setup()
    assert made == {path: path.stat().st_mtime_ns for path in root.rglob("*.png")}
    assert not list(root.rglob(".*"))
    assert np.array_equal(read(data.root / "brick/test/hole/003.png"), build("brick", 64, 0)["test/hole/003.png"])


def test_other_settings_are_another_folder(root):
    assert len({key(64, 0), key(64, 1), key(128, 0)}) == 3
    assert data_of(root, texture_seed=1).root != data_of(root).root == data_of(root, seed=1).root


def test_a_killed_or_failing_making_leaves_nothing_that_is_taken_for_whole(tmp_path, monkeypatch):
    def killed(name, crop_size, seed):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(textures, "build", killed)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path, "brick", 64, 0)
    assert not list(tmp_path.iterdir())
    (left := tmp_path / ".123-01234567").mkdir()  # by a kill, two days ago
    os.utime(left, (0, 0))
    make(tmp_path, "brick", 64, 0)
    assert len(list((tmp_path / "brick").rglob("*.png"))) == 80 + 20 + 2 * 8 * len(DEFECTS) and not left.exists()


def test_several_at_once_and_the_loser_of_a_race_uses_the_winners_files(tmp_path, monkeypatch):
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: make(tmp_path, "gravel", 32, 0), range(4)))

    def slow(name, crop_size, seed):
        monkeypatch.undo()
        make(tmp_path, name, crop_size, seed)
        return build(name, crop_size, seed)

    monkeypatch.setattr(textures, "build", slow)
    make(tmp_path, "grass", 32, 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grass", "gravel"]


def test_errors(tmp_path):
    for category in ("bricks", "../brick", None):
        with pytest.raises(InputError, match=f"data.category={category}: no such texture; expected one of brick, grass, gravel"):
            data_of(tmp_path, category=category).setup()
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="data.crop_size=256: expected .* 32 to 192"):
        data_of(tmp_path, crop_size=256)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file.*: cannot be written"):
        data_of(tmp_path / "file").setup()


def test_a_cache_that_lost_a_file_is_made_again(tmp_path):
    make(tmp_path, "brick", 64, 0)
    (tmp_path / "brick" / "train" / "good" / "000.png").unlink()
    make(tmp_path, "brick", 64, 0)
    assert (tmp_path / "brick" / "train" / "good" / "000.png").is_file()
