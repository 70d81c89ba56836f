"""What tests share: real data where there is some, and a tiny data set made on the spot."""

import contextlib
import os
import sys
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # a thread for each worker, and for what it starts; before numpy and torch count the cores
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")

import numpy as np
import pytest
import skimage.data
from hypothesis import settings
from PIL import Image
from support import draw_squares

# a busy machine is slow, not wrong
settings.register_profile("blemish", deadline=None, print_blob=True)
settings.load_profile("blemish")

# absl, which openvino and tensorboard bring along, closes the stream of its handler when Hydra sets up logging: not pytest's, then
with contextlib.suppress(ImportError):
    import absl.logging

    absl.logging.get_absl_handler().python_handler.stream = sys.__stderr__


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets; skips where $BLEMISH_DATA names none."""
    root = os.environ.get("BLEMISH_DATA")
    if not root or not Path(root).is_dir():
        pytest.skip("BLEMISH_DATA names no folder with mvtec/, mtd/, gdxray/")
    return Path(root)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """64-px crops of brick: 24 normal for training, 6 normal and 6 with a white and a black square for the test, masks for the latter."""
    root = tmp_path_factory.mktemp("tiny")
    generator = np.random.default_rng(0)
    brick = skimage.data.brick()

    def crop() -> np.ndarray:
        y, x = generator.integers(0, np.array(brick.shape) - 64)
        return brick[y : y + 64, x : x + 64].copy()

    for name, count in (("normal", 24), ("normal_test", 6), ("square", 6)):
        (root / name).mkdir()
        for i in range(count):
            image, mask = crop(), np.zeros((64, 64), np.uint8)
            if name == "square":
                draw_squares(image, mask, generator)
                (root / "masks").mkdir(exist_ok=True)
                Image.fromarray(mask).save(root / "masks" / f"{i:03}.png")
            Image.fromarray(image).save(root / name / f"{i:03}.png")
    return root
