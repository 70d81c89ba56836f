from collections import Counter

import numpy as np
import pytest
from PIL import Image

from blemish.data.mtd import DEFECTS, FREE, MagneticTiles, drawn, samples, tiles
from blemish.edge.errors import InputError
from blemish.types import NO_TRUTH

PLAIN = {"image_size": 32, "crop": None, "batch_size": 8, "workers": 0, "seed": 0, "protocol": "paper", "calibration": 0.1}
PLAIN |= {"window": "auto", "on_error": "stop"}


def save(folder, name, top):
    """An image and its mask, whose left half is `top` with a blurred rim, as JPEG-like masks have."""
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((40, 20), 90, np.uint8)).save(folder / f"{name}.jpg")
    mask = np.zeros((40, 20), np.uint8)
    mask[:, :10] = top
    mask[:, 10] = top // 3
    Image.fromarray(mask).save(folder / f"{name}.png")


@pytest.fixture
def root(tmp_path):
    for i in range(30):  # five exposures each of six tiles
        save(tmp_path / FREE / "Imgs", f"exp{i % 5 + 1}_num_{1000 * (i // 5) + 20 * (i % 5)}", 0)
    for name in DEFECTS:
        save(tmp_path / name / "Imgs", "exp1_num_7", 250)
    save(tmp_path / "MT_Uneven" / "Imgs", "exp2_num_27", 0)
    return tmp_path


def data_of(root, **changes):
    return MagneticTiles(**{"root": root, "category": None, "train_share": 0.8, "split_by": "image", **PLAIN, **changes})


def test_splits_defects_and_masks(root):
    data = data_of(root)
    data.setup()
    counts = Counter((s.split, s.label, s.defect) for s in data.samples)
    assert counts.pop(("train", 0, "good")) == 24
    assert counts == {("test", 0, "good"): 6, ("test", 1, "uneven"): 2} | {
        ("test", 1, name): 1 for name in ("blowhole", "break", "crack", "fray")
    }
    truth = {path: mask for batch in data.test_dataloader() for path, mask in zip(batch.path, batch.mask, strict=True)}
    assert truth["MT_Crack/Imgs/exp1_num_7.jpg"].sum() == 32 * 16  # the rim, below 128, is not in it
    assert (truth["MT_Uneven/Imgs/exp2_num_27.jpg"] == NO_TRUTH).all()
    assert all((mask == 0).all() for path, mask in truth.items() if path.startswith(FREE))


def test_the_split_is_the_seeds(root):
    of = [frozenset(s.path for s in samples(root, 0.8, "image", seed) if s.split == "train") for seed in (0, 0, 1, 2)]
    assert of[0] == of[1] and len(set(of)) == 3


def test_by_tile_no_tile_is_on_both_sides(root):
    found = [s for s in samples(root, 0.8, "tile", 3) if s.defect == "good"]
    sides = {}
    for s in found:
        sides.setdefault(int(s.path.split("_num_")[1][:-4]) // 1000, set()).add(s.split)
    assert all(len(side) == 1 for side in sides.values()) and len(sides) == 6
    assert sum(s.split == "train" for s in found) == 20  # four tiles of five are the most within 24


def test_runs_of_frames_are_tiles():
    names = [f"exp1_num_{n}.jpg" for n in (250, 10, 100, 140, 400)]
    assert tiles(names) == [["exp1_num_10.jpg", "exp1_num_100.jpg", "exp1_num_140.jpg"], ["exp1_num_250.jpg"], ["exp1_num_400.jpg"]]
    assert len(drawn(names, 0.8, "image", 0)) == 4
    with pytest.raises(InputError, match=r"a.jpg: no frame number .* data.split_by=image"):
        tiles(["a.jpg"])


def test_errors_name_what_is_wrong(root):
    for changes, message in (
        ({"category": "MT_Fray"}, "data.category=MT_Fray: magnetic tiles have none; expected null"),
        ({"train_share": 1.0}, "data.train_share=1.0: expected"),
        ({"split_by": "tiles"}, "data.split_by=tiles: expected image or tile"),
    ):
        with pytest.raises(InputError, match=message):
            data_of(root, **changes)
    with pytest.raises(InputError, match=r"nowhere: no such folder\nmtd expects"):
        data_of(root / "nowhere").setup()
    (root / "MT_Fray/Imgs/exp1_num_7.jpg").unlink()
    with pytest.raises(InputError, match=r"MT_Fray/Imgs/exp1_num_7.png: a mask without an image \(1 such\)"):
        data_of(root).setup()
    (root / "MT_Break/Imgs/exp1_num_7.png").unlink()
    with pytest.raises(InputError, match=r"MT_Break/Imgs/exp1_num_7.jpg: an image without a mask"):
        data_of(root).setup()
    (root / "MT_Blowhole").rename(root / "Blowhole")
    with pytest.raises(InputError, match=r"MT_Blowhole/Imgs: no such folder \(1 of 6 are missing\)\nmtd expects"):
        data_of(root).setup()


def test_real_tiles(real_data):
    if not (real_data / "mtd").is_dir():
        pytest.skip("no mtd in BLEMISH_DATA")
    found = samples(real_data / "mtd", 0.8, "image", 0)
    assert Counter(s.split for s in found) == {"train": 762, "test": 582}
    defects = Counter(s.defect for s in found if s.label == 1)
    assert defects == {"blowhole": 115, "break": 85, "crack": 57, "fray": 32, "uneven": 103}
    assert sum(not s.mask for s in found if s.label == 1) == 4  # blank masks, all of them uneven
