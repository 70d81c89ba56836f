"""MVTec AD: the official split and masks, on a small copy of the layout and on the real one."""

from collections import Counter

import numpy as np
import pytest
from support import DATA, save

from blemish.data.mvtec import CATEGORIES, MVTec
from blemish.edge.errors import InputError


@pytest.fixture
def root(tmp_path):
    image, mask = np.full((16, 16), 90, np.uint8), np.zeros((16, 16), np.uint8)
    mask[4:8, 6:12] = 255
    for i in range(8):
        save(tmp_path / f"screw/train/good/{i:03}.png", image + np.uint8(i))
    for i in range(3):
        save(tmp_path / f"screw/test/good/{i:03}.png", image)
        for defect in ("scratch_neck", "thread"):
            save(tmp_path / f"screw/test/{defect}/{i:03}.png", image)
            save(tmp_path / f"screw/ground_truth/{defect}/{i:03}_mask.png", mask)
    (tmp_path / "readme.txt").touch()
    (tmp_path / "screw/test/thread/.DS_Store").touch()
    return tmp_path


def test_the_official_split_and_the_mask_of_each_image(root):
    save(root / "screw/ground_truth/good/000_mask.png", np.zeros((16, 16), np.uint8))  # blank: no orphan
    data = MVTec(root, "screw", **DATA)
    data.setup()
    assert Counter((s.split, s.label, s.defect) for s in data.samples) == {
        ("train", 0, "good"): 6,
        ("calibrate", 0, "good"): 2,
        ("test", 0, "good"): 3,
        ("test", 1, "scratch_neck"): 3,
        ("test", 1, "thread"): 3,
    }
    assert data.sample("screw/test/thread/001.png").mask == "screw/ground_truth/thread/001_mask.png"
    assert not any(s.mask for s in data.samples if s.label == 0)
    batch = next(iter(data.test_dataloader()))
    assert batch.path == [f"screw/test/good/{i:03}.png" for i in range(3)] + ["screw/test/scratch_neck/000.png"]
    assert batch.mask.sum(dim=(1, 2)).tolist() == [0, 0, 0, 4 * 6 * 4]  # 16 px shown at 32


def test_a_defect_without_mask_and_a_mask_without_image(root):
    mask = root / "screw/ground_truth/thread/001_mask.png"
    mask.rename(mask.with_name("007_mask.png"))
    with pytest.raises(InputError, match=r"thread/001\.png: no mask; expected .*ground_truth/thread/001_mask\.png"):
        MVTec(root, "screw", **DATA).scan()
    save(mask, np.zeros((16, 16), np.uint8))
    with pytest.raises(InputError, match=r"007_mask\.png: a mask without an image \(1 such\); expected one in .*test/thread"):
        MVTec(root, "screw", **DATA).scan()


def test_what_is_missing_is_named_with_the_choices(root):
    with pytest.raises(InputError, match=r"no category 'scrwe'; did you mean 'screw'\? found screw") as error:
        MVTec(root, "scrwe", **DATA).setup()
    assert all(name in str(error.value) for name in CATEGORIES) and len(CATEGORIES) == 15
    with pytest.raises(InputError, match=r"nowhere: no such folder\nmvtec expects"):
        MVTec(root / "nowhere", "screw", **DATA).setup()
    with pytest.raises(InputError, match=r"data\.category=null: .* found screw"):
        MVTec(root, None, **DATA).setup()
    (root / "screw/test").rename(root / "screw/tset")
    with pytest.raises(InputError, match=r"screw/test: no such folder\nmvtec expects"):
        MVTec(root, "screw", **DATA).setup()


def test_real_screws(real_data):
    if not (real_data / "mvtec/screw").is_dir():
        pytest.skip("no mvtec/screw in BLEMISH_DATA")
    found = MVTec(real_data / "mvtec", "screw", **DATA).scan()
    counts = Counter((s.split, s.label) for s in found)
    assert counts == {("train", 0): 320, ("test", 0): 41, ("test", 1): 119}
    assert len({s.defect for s in found}) == 6
