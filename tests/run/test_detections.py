"""Single images through the noise-residual detector, as tools/predict.py does it."""

import csv
import json

import numpy as np
import pytest
import skimage.data
from PIL import Image
from support import composed

from blemish.edge.errors import InputError
from blemish.files import LOCK, locked
from blemish.run.predict import predict


def test_finds_what_was_put_into_a_photograph(tmp_path):
    photograph = skimage.data.brick()[100:228, 60:220].copy()
    photograph[50:58, 90:98] = 255
    (tmp_path / "in").mkdir()
    Image.fromarray(photograph).save(tmp_path / "in" / "brick.png")
    options = ["model=noise_residual", "model.mode=calibrated", "model.channels=1"]
    cfg = composed(*options, f"input='{tmp_path / 'in'}'", f"output='{tmp_path}/out'", config="predict")
    assert len(predict(cfg).rows) == 1
    found = json.loads((tmp_path / "out" / "brick_detections.json").read_text())
    strongest = found[0]
    assert strongest["log10_nfa"] < -5 and strongest["x1"] < 98 < strongest["x2"] + 8 and strongest["y1"] < 58 < strongest["y2"] + 8
    with (tmp_path / "out" / "brick_detections.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(found)
    with (tmp_path / "out" / "scores.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert float(row["score"]) == pytest.approx(-strongest["log10_nfa"])
    assert (row["threshold"], row["decision"], row["threshold_from"]) == ("2.0", "1", "method")
    mask = np.asarray(Image.open(tmp_path / "out" / "brick_mask.png"))
    assert mask.shape == photograph.shape and (mask > 0).sum() == sum(detection["area"] for detection in found)
    assert np.asarray(Image.open(tmp_path / "out" / "brick_overlay.png")).shape == (128, 160, 3)
    assert np.asarray(Image.open(tmp_path / "out" / "brick_map.png")).dtype == np.uint16


def test_other_models_want_a_run(tmp_path):
    Image.fromarray(skimage.data.brick()).save(tmp_path / "a.png")
    with pytest.raises(InputError, match="run: none given"):
        predict(composed(f"input='{tmp_path}'", config="predict"))
    with pytest.raises(InputError, match="has to be fitted first"):
        tiny = ["backbone=test_resnet", "weights=random"]
        predict(composed("model=padim", *tiny, f"input='{tmp_path}'", config="predict"))


def test_nothing_is_detected_outside_the_roi(tmp_path):
    photograph = skimage.data.brick()[100:228, 60:220].copy()
    for x in (30, 90):
        photograph[50:58, x : x + 8] = 255
    Image.fromarray(photograph).save(tmp_path / "brick.png")
    right = np.zeros((64, 80), np.uint8)  # of a smaller copy: scaled to the image
    right[:, 35:] = 255
    Image.fromarray(right).save(tmp_path / "roi.png")
    options = ["model=noise_residual", "model.mode=calibrated", "model.channels=1", f"input='{tmp_path / 'brick.png'}'"]
    found = {}
    for name, more in {"all": [], "right": [f"roi='{tmp_path / 'roi.png'}'"]}.items():
        assert len(predict(composed(*options, f"output='{tmp_path / name}'", *more, config="predict")).rows) == 1
        found[name] = json.loads((tmp_path / name / "brick_detections.json").read_text())
    assert {one["x1"] >= 70 for one in found["all"]} == {True, False}
    assert found["right"] == [one for one in found["all"] if one["x1"] >= 70], "the same noise, and as many tests"
    mask = np.asarray(Image.open(tmp_path / "right" / "brick_mask.png"))
    assert not mask[:, :70].any() and mask.any()


def test_an_image_without_a_pixel_in_the_roi(tmp_path):
    Image.fromarray(skimage.data.brick()[:64, :64]).save(tmp_path / "brick.png")
    dot = np.zeros((128, 128), np.uint8)
    dot[0, 0] = 255  # between the pixels of the image
    Image.fromarray(dot).save(tmp_path / "roi.png")
    options = ["model=noise_residual", f"input='{tmp_path / 'brick.png'}'", f"roi='{tmp_path / 'roi.png'}'", f"output='{tmp_path}/out'"]
    with pytest.raises(InputError, match=r"brick\.png: .*ROI"):
        predict(composed(*options, config="predict"))


def test_two_predictions_do_not_share_a_folder(tmp_path):
    Image.fromarray(skimage.data.brick()[:64, :64]).save(tmp_path / "brick.png")
    options = ["model=noise_residual", f"input='{tmp_path / 'brick.png'}'", f"output='{tmp_path}/out'"]
    with locked(tmp_path / "out", "elsewhere"), pytest.raises(InputError, match=r"is writing to this folder; choose .* output=FOLDER"):
        predict(composed(*options, config="predict"))
    assert len(predict(composed(*options, config="predict")).rows) == 1
    assert not (tmp_path / "out" / LOCK).exists()
