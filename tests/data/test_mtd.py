"""Magnetic tiles: splits by image and by tile, and masks, on a small copy of the layout and on the real one."""

from collections import Counter

import numpy as np
import pytest
from PIL import Image
from support import DATA, save

from blemish.data.mtd import DEFECTS, FREE, MagneticTiles, tiles
from blemish.edge.errors import InputError
from blemish.types import NO_TRUTH


def pair(folder, name, top):
    """An image and its mask, whose left half is `top` with a blurred rim, as JPEG-like masks have."""
    save(folder / "Imgs" / f"{name}.jpg", np.full((40, 20), 90 + sum(name.encode()) % 50, np.uint8))  # not all alike
    mask = np.zeros((40, 20), np.uint8)
    mask[:, :10] = top
    mask[:, 10] = top // 3
    Image.fromarray(mask).save(folder / "Imgs" / f"{name}.png")


@pytest.fixture
def root(tmp_path):
    for i in range(30):  # five exposures each of six tiles
        pair(tmp_path / FREE, f"exp{i % 5 + 1}_num_{1000 * (i // 5) + 20 * (i % 5)}", 0)
    for name in DEFECTS:
        pair(tmp_path / name, "exp1_num_7", 250)
    pair(tmp_path / "MT_Uneven", "exp2_num_27", 0)
    return tmp_path


def data_of(root, **changes):
    return MagneticTiles(
        **{"root": root, "category": None, "train_share": 0.8, "split_by": "image", **DATA, "protocol": "paper", **changes}
    )


def test_splits_defects_and_masks(root):
    data = data_of(root)
    data.setup()
    counts = Counter((s.split, s.label, s.defect) for s in data.samples)
    assert counts.pop(("train", 0, "good")) == 24
    assert counts == {("test", 0, "good"): 6, ("test", 1, "uneven"): 2} | {
        ("test", 1, name): 1 for name in ("blowhole", "break", "crack", "fray")
    }
    truth = {path: mask for batch in data.test_dataloader() for path, mask in zip(batch.path, batch.mask, strict=True)}
    assert truth["MT_Crack/Imgs/exp1_num_7.jpg"].sum() == 32 * 16  # without the rim, which is below 128
    assert (truth["MT_Uneven/Imgs/exp2_num_27.jpg"] == NO_TRUTH).all()
    assert all((mask == 0).all() for path, mask in truth.items() if path.startswith(FREE))


def test_the_split_is_the_seeds(root):
    of = [frozenset(s.path for s in data_of(root, seed=seed).scan() if s.split == "train") for seed in (0, 0, 1, 2)]
    assert of[0] == of[1] and len(set(of)) == 3


def test_by_tile_no_tile_is_on_both_sides(root):
    found = [s for s in data_of(root, split_by="tile", seed=3).scan() if s.defect == "good"]
    sides = {}
    for s in found:
        sides.setdefault(int(s.path.split("_num_")[1][:-4]) // 1000, set()).add(s.split)
    assert all(len(side) == 1 for side in sides.values()) and len(sides) == 6
    assert sum(s.split == "train" for s in found) == 20  # four tiles of five are the most within 24


def test_runs_of_frames_are_tiles():
    names = [f"exp1_num_{n}.jpg" for n in (250, 10, 100, 140, 400)]
    assert tiles(names) == [["exp1_num_10.jpg", "exp1_num_100.jpg", "exp1_num_140.jpg"], ["exp1_num_250.jpg"], ["exp1_num_400.jpg"]]
    with pytest.raises(InputError, match=r"a\.jpg: .*data\.split_by=image"):
        tiles(["a.jpg"])


def test_errors_name_what_is_wrong(root):
    for key, value in {"category": "MT_Fray", "train_share": 1.0, "split_by": "tiles"}.items():
        with pytest.raises(InputError, match=f"data.{key}={value}"):
            data_of(root, **{key: value})
    with pytest.raises(InputError, match=r"nowhere: no such folder\nmtd expects"):
        data_of(root / "nowhere").setup()
    for gone, message in (
        ("MT_Fray/Imgs/exp1_num_7.jpg", r"MT_Fray/Imgs/exp1_num_7\.png: a mask without an image \(1"),
        ("MT_Break/Imgs/exp1_num_7.png", r"MT_Break/Imgs/exp1_num_7\.jpg: an image without a mask"),
        ("MT_Blowhole", r"MT_Blowhole/Imgs: no such folder \(1 of 6 .*\nmtd expects"),
    ):
        (root / gone).rename(root / f"moved {gone.replace('/', ' ')}")
        with pytest.raises(InputError, match=message):
            data_of(root).setup()


def test_real_tiles(real_data):
    if not (real_data / "mtd").is_dir():
        pytest.skip("no mtd in BLEMISH_DATA")
    found = data_of(real_data / "mtd").scan()
    assert Counter(s.split for s in found) == {"train": 762, "test": 582}
    defects = Counter(s.defect for s in found if s.label == 1)
    assert defects == {"blowhole": 115, "break": 85, "crack": 57, "fray": 32, "uneven": 103}
    assert sum(not s.mask for s in found if s.label == 1) == 4  # blank masks, all of them uneven
