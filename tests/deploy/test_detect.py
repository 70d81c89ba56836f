"""Single images through the noise-residual detector, as tools/predict.py does it."""

import csv
import json

import numpy as np
import pytest
import skimage.data
from PIL import Image
from support import composed

from blemish.run import predict
from blemish.types import InputError


def test_finds_what_was_put_into_a_photograph(tmp_path):
    photograph = skimage.data.brick()[100:228, 60:220].copy()
    photograph[50:58, 90:98] = 255
    (tmp_path / "in").mkdir()
    Image.fromarray(photograph).save(tmp_path / "in" / "brick.png")
    cfg = composed("model=noise_residual", "model.channels=1", f"input='{tmp_path / 'in'}'", f"output='{tmp_path}/out'", config="predict")
    assert predict(cfg) == 1
    found = json.loads((tmp_path / "out" / "brick_detections.json").read_text())
    strongest = found[0]
    assert strongest["log10_nfa"] < -5
    assert strongest["x1"] < 98
    assert strongest["x2"] > 90
    assert strongest["y1"] < 58
    assert strongest["y2"] > 50
    with (tmp_path / "out" / "brick_detections.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(found)
    with (tmp_path / "out" / "scores.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert float(row["score"]) == pytest.approx(-strongest["log10_nfa"])
    mask = np.asarray(Image.open(tmp_path / "out" / "brick_mask.png"))
    assert mask.shape == photograph.shape
    assert (mask > 0).sum() == sum(detection["area"] for detection in found)
    assert np.asarray(Image.open(tmp_path / "out" / "brick_overlay.png")).shape == (128, 160, 3)
    assert np.asarray(Image.open(tmp_path / "out" / "brick_map.png")).dtype == np.uint16


def test_other_models_want_a_run(tmp_path):
    Image.fromarray(skimage.data.brick()).save(tmp_path / "a.png")
    with pytest.raises(InputError, match="run: none given"):
        predict(composed(f"input='{tmp_path}'", config="predict"))
    with pytest.raises(InputError, match="has to be fitted first"):
        tiny = ["backbone=test_resnet", "weights=random"]
        predict(composed("model=padim", *tiny, f"input='{tmp_path}'", config="predict"))
