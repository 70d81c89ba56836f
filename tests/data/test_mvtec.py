from collections import Counter

import numpy as np
import pytest
from PIL import Image

from blemish.data.mvtec import CATEGORIES, MVTec, samples
from blemish.edge.errors import InputError

PLAIN = {"image_size": 32, "crop": None, "batch_size": 4, "workers": 0, "seed": 0, "protocol": "clean", "calibration": 0.1}
PLAIN |= {"window": "auto", "on_error": "stop"}


def save(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.full((16, 16), 90, np.uint8)
    array[4:8, 6:12] = value
    Image.fromarray(array if "mask" not in path.name else np.where(array == 255, 255, 0).astype(np.uint8)).save(path)


@pytest.fixture
def root(tmp_path):
    for i in range(8):
        save(tmp_path / f"screw/train/good/{i:03}.png")
    for i in range(3):
        save(tmp_path / f"screw/test/good/{i:03}.png")
        for defect in ("scratch_neck", "thread"):
            save(tmp_path / f"screw/test/{defect}/{i:03}.png")
            save(tmp_path / f"screw/ground_truth/{defect}/{i:03}_mask.png", 255)
    (tmp_path / "readme.txt").touch()
    (tmp_path / "screw/test/thread/.DS_Store").touch()
    return tmp_path


def test_the_official_split_and_the_mask_of_each_image(root):
    data = MVTec(root, "screw", **PLAIN)
    data.setup()
    assert Counter((s.split, s.label, s.defect) for s in data.samples) == {
        ("train", 0, "good"): 6,
        ("calibrate", 0, "good"): 2,
        ("test", 0, "good"): 3,
        ("test", 1, "scratch_neck"): 3,
        ("test", 1, "thread"): 3,
    }
    sample = data.sample("screw/test/thread/001.png")
    assert sample.mask == "screw/ground_truth/thread/001_mask.png"
    batch = next(iter(data.test_dataloader()))
    assert batch.path == [f"screw/test/good/{i:03}.png" for i in range(3)] + ["screw/test/scratch_neck/000.png"]
    assert batch.mask.sum(dim=(1, 2)).tolist() == [0, 0, 0, 4 * 6 * 4]  # 16 px shown at 32


def test_a_defect_without_mask_and_a_mask_without_image(root):
    (root / "screw/ground_truth/thread/001_mask.png").rename(root / "screw/ground_truth/thread/007_mask.png")
    with pytest.raises(InputError, match=r"thread/001.png: no mask; expected .*ground_truth/thread/001_mask.png"):
        samples(root / "screw")
    save(root / "screw/ground_truth/thread/001_mask.png")
    with pytest.raises(InputError, match=r"007_mask.png: a mask without an image \(1 such\); expected one in .*test/thread"):
        samples(root / "screw")


def test_blank_masks_of_normal_images_are_no_orphans(root):
    save(root / "screw/ground_truth/good/000_mask.png")
    assert all(not s.mask for s in samples(root / "screw") if s.label == 0)


def test_what_is_missing_is_named_with_the_choices(root):
    with pytest.raises(InputError, match=r"no category 'scrwe'; did you mean 'screw'\? ImageResult: screw") as error:
        MVTec(root, "scrwe", **PLAIN).setup()
    assert all(name in str(error.value) for name in CATEGORIES) and len(CATEGORIES) == 15
    with pytest.raises(InputError, match=r"nowhere: no such folder\nmvtec expects"):
        MVTec(root / "nowhere", "screw", **PLAIN).setup()
    with pytest.raises(InputError, match="data.category: none given. ImageResult in .*: screw"):
        MVTec(root, None, **PLAIN).setup()
    (root / "screw/test").rename(root / "screw/tset")
    with pytest.raises(InputError, match=r"screw/test: no such folder\nmvtec expects"):
        MVTec(root, "screw", **PLAIN).setup()


def test_real_screws(real_data):
    if not (real_data / "mvtec/screw").is_dir():
        pytest.skip("no mvtec/screw in BLEMISH_DATA")
    found = samples(real_data / "mvtec/screw")
    counts = Counter((s.split, s.label) for s in found)
    assert counts == {("train", 0): 320, ("test", 0): 41, ("test", 1): 119}
    assert len({s.defect for s in found}) == 6
