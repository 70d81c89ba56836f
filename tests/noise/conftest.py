"""The oracle files of the noise detector, made with the authors' program."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch


@pytest.fixture
def oracle() -> Callable[[str], dict]:
    """A function from a file's name to its arrays; (H, W, C) images come as tensors (C, H, W)."""
    folder = os.environ.get("BLEMISH_NOISE_ORACLES")
    if not folder or not Path(folder).is_dir():
        pytest.skip("BLEMISH_NOISE_ORACLES names no folder with the oracle files of the noise detector")

    def read(name: str) -> dict:
        with np.load(Path(folder) / f"{name}.npz") as file:
            arrays = {key: file[key] for key in file.files}
        return {
            key: torch.from_numpy(a).movedim(-1, 0).contiguous()
            if a.ndim == 3 and a.dtype == np.float32 and not key.startswith("cpp_nn")
            else a
            for key, a in arrays.items()
        }

    return read
