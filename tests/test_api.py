"""`AnomalyDetector` as a person uses it who has no config: what goes in, what comes out, and files from strangers."""

import os
import pickle
import random
import re
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from scipy import ndimage
from skimage.measure import label, regionprops
from support import CONFIGS, METHODS, composed, quick, tiny_run

import blemish
from blemish import AnomalyDetector, Result
from blemish import api as module
from blemish.edge.boxes import boxes_of
from blemish.edge.errors import InputError
from blemish.edge.reading import read
from blemish.run.options import OTHERS
from blemish.run.predict import predict
from blemish.run.train import train

TINY = {"backbone": "test_resnet", "weights": "random", "image_size": 64, "batch_size": 8, "epoch_size": None}
TINY |= {"device": "cpu", "progress": False}
# a method's file is tested here, not what it learns
LEAST = {
    "cflow": {"blocks": 2},
    "dfr": {"stages": [1]},
    "ganomaly": {"channels": 8},
    "patch_svdd": {"image_size": 128, "dim": 8, "strides": {64: 32, 32: 16}},
    "riad": {"channels": 8, "cells": [4]},
    "noise_residual": {"image_size": 48},
    "self_similarity": {"stride": 32},
}


def tiny_detector(method: str, **options) -> AnomalyDetector:
    epochs = {"epochs": 1} if any("max_epochs" in text for text in quick(method)) else {}
    return AnomalyDetector(method, **{**TINY, "recipe": False, **epochs, **LEAST.get(method, {}), **options})


def arrays(folder: Path) -> np.ndarray:
    return np.stack([read(path) for path in sorted(folder.glob("*.png"))])[..., None]  # (B, H, W, 1)


def equal(a: Result, b: Result) -> bool:
    maps = a.map is None if b.map is None else np.array_equal(a.map, b.map)
    return maps and a.to_dict() == b.to_dict()


@pytest.fixture(scope="module")
def padim(tiny) -> AnomalyDetector:
    return tiny_detector("padim", calibration=0.25).train(tiny / "normal")


@pytest.fixture(scope="module")
def saved(padim, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "padim.ckpt"
    with pytest.raises(InputError, match=r"m\.safetensors"):
        padim.save(path.with_name("m.safetensors"))
    padim.save(path)
    return path


@pytest.mark.parametrize("method", METHODS)
def test_every_method_comes_back_from_its_file(method, tiny, tmp_path):
    images = np.concatenate([arrays(tiny / "square")[:1], arrays(tiny / "normal")[:1]])
    detector = tiny_detector(method)
    if method != "noise_residual":
        detector.train(arrays(tiny / "normal")[:8])
        assert detector.threshold.n == 2
    expected = detector.predict(images)
    detector.save(tmp_path / "saved")
    again = AnomalyDetector.load(tmp_path / "saved", device="cpu")
    assert all(equal(a, b) for a, b in zip(again.predict(images), expected, strict=True))
    assert (again.method, type(again.model), again.scale) == (method, type(detector.model), detector.scale)
    assert all(type(result.score) is float and type(result.decision) is bool for result in expected)
    assert expected[0].map is None or (expected[0].map.shape == (64, 64) and expected[0].map.dtype == np.float32)


def test_what_comes_out_of_what_goes_in(padim, tiny):
    folder = tiny / "square"
    results = padim.predict(folder)
    assert [result.path for result in results] == sorted(folder.glob("*.png"))
    one = padim.predict(folder / "000.png")
    assert isinstance(one, Result)
    assert one.path == folder / "000.png"
    several = padim.predict(arrays(folder))
    mixed = padim.predict([folder / "000.png", str(folder / "001.png"), *arrays(folder)[2:]])
    for form in (several, mixed):
        assert len(form) == len(results)
        assert all(equal(replace(a, path=None), replace(b, path=None)) for a, b in zip(form, results, strict=True))
    assert len(padim.predict(arrays(folder)[:1])) == 1
    score, p_value, decision = one.score, one.p_value, one.decision
    grey = read(folder / "000.png")
    forms = [grey, grey[..., None], np.stack([grey] * 3, -1), grey[::-1][::-1], np.asfortranarray(grey)]
    rgba = np.dstack([grey] * 3 + [np.zeros_like(grey)])  # what is transparent has pixels too
    forms += [rgba, torch.from_numpy(rgba).movedim(-1, 0), Image.open(folder / "000.png"), Image.fromarray(rgba)]
    forms += [torch.from_numpy(grey), torch.from_numpy(grey)[None], torch.from_numpy(np.stack([grey] * 3))]
    forms += [grey.astype(np.uint16) * 257, (grey.astype(np.uint16) * 257).astype(">u2"), grey / 255, grey.astype(np.float32) / 255]
    for form in forms:
        found = padim.predict(form)
        assert found.score == pytest.approx(score, rel=1e-2)  # bytes are resized as bytes
        assert (found.p_value, found.decision) == (p_value, decision)
    assert equal(padim.predict(torch.from_numpy(grey).expand(1, 3, -1, -1))[0], padim.predict(grey))
    assert padim.predict(torch.from_numpy(grey / 255).bfloat16()).decision is decision
    assert one.map.shape == grey.shape and one.boxes


def test_an_iterator_is_read_as_its_results_are_taken(padim, tiny, caplog):
    frames, taken = arrays(tiny / "square"), []

    def camera():
        for i in range(10**9):
            taken.append(i)
            yield [frames[i % 6], Image.fromarray(frames[0, ..., 0]), frames[0] * np.uint16(16), tiny / "square" / "000.png"][i % 4]

    results = padim.predict(camera())
    assert taken == []
    first = next(results)
    assert taken == [0] and equal(first, padim.predict(frames[0])) and not caplog.records
    for number in range(2, 12):
        assert next(results).map.shape == (64, 64) and len(taken) == number
    assert len([record for record in caplog.records if "hardly fit" in record.getMessage()]) == 1  # not of every frame
    with pytest.raises(InputError, match="int: not an image"):
        list(padim.predict(iter([3])))
    assert list(padim.predict(iter([]))) == []
    with pytest.raises(InputError, match="not been fitted"):
        tiny_detector("padim").predict(camera())
    assert len(tiny_detector("padim").train(frame for frame in frames).predict(set((tiny / "square").glob("*.png")))) == 6


def test_a_damaged_picture_of_pillow_is_told(padim, tiny, tmp_path):
    data = (tiny / "square" / "000.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    with Image.open(tmp_path / "cut.png") as picture, pytest.raises(InputError, match=r"cut\.png: damaged"):
        padim.predict(picture)


def test_a_detector_and_its_results_in_a_line(padim, tiny):
    assert repr(tiny_detector("padim")) == "AnomalyDetector(padim, not fitted, cpu)"
    assert re.fullmatch(r"AnomalyDetector\(padim, threshold=\S+ \(alpha=0\.143\), cpu\)", repr(padim))
    result = padim.predict(tiny / "square" / "000.png")
    assert re.fullmatch(r"Result\(\S+000\.png, anomalous, score=\S+, p_value=0\.143, map=64×64\)", repr(result))
    assert result.overlay().size == (64, 64)
    assert (np.asarray(result.overlay())[20:] != np.dstack([read(result.path)] * 3)[20:]).any()


def test_maps_and_boxes_are_in_the_pixels_of_the_input(padim, tiny):
    large = np.asarray(Image.open(tiny / "square" / "000.png").resize((200, 90)))
    result = padim.predict(large)
    assert result.map.shape == (90, 200)
    level = padim.map_threshold
    assert result.boxes == boxes_of(result.map, level)
    assert (result.map_threshold, result.threshold, result.low) == (level, padim.threshold.value, padim.scale[0])
    regions = regionprops(label(result.map > level, connectivity=2), result.map)
    expected = sorted(regions, key=lambda roi: -roi.intensity_max)
    found = [(roi.bbox[1], roi.bbox[0], roi.bbox[3] - roi.bbox[1], roi.bbox[2] - roi.bbox[0]) for roi in expected]
    assert result.boxes == found
    mask = np.asarray(Image.open(tiny / "masks" / "000.png").resize((200, 90))) > 0
    inside = np.zeros_like(mask)
    for x, y, w, h in result.boxes:
        inside[y : y + h, x : x + w] = True
    assert inside[mask].mean() > 0.5


def test_boxes_are_ordered_by_the_peaks_of_their_own_parts():
    rng = np.random.default_rng(0)
    for number in range(60):  # parts inside the boxes of others, ties, and what is not looked at
        map = ndimage.gaussian_filter(rng.random(rng.integers(1, 50, 2)), number % 3 / 2).astype(np.float32)
        map = (map * 8).round() / 8 if number % 2 else map
        level = float(np.quantile(map, rng.random()))
        map[rng.random(map.shape) < 0.2] = -np.inf
        parts, count = ndimage.label(map > level, np.ones((3, 3)))
        peaks = ndimage.maximum(map, parts, range(1, count + 1))
        boxes = [(x.start, y.start, x.stop - x.start, y.stop - y.start) for y, x in ndimage.find_objects(parts)]
        assert boxes_of(map, level) == [boxes[i] for i in np.argsort(-np.array(peaks), kind="stable")]
    assert boxes_of(np.zeros((5, 7)), 0.0) == [] and boxes_of(np.zeros((5, 7)), -1.0) == [(0, 0, 7, 5)]


def test_thresholds_come_from_val_or_from_a_share_of_train(padim, tiny):
    assert padim.threshold.n == 6
    given = tiny_detector("padim").train(tiny / "normal", val=tiny / "normal_test")
    scores = sorted(result.score for result in given.predict(tiny / "normal_test"))
    assert given.threshold.n == 6
    assert given.threshold.value == pytest.approx(scores[-1], rel=1e-5)
    assert given.model.fitted == 24  # none of train was held out
    for result in given.predict(tiny / "square"):
        assert result.p_value == (1 + sum(score >= result.score for score in scores)) / 7
        assert result.decision == (result.score > given.threshold.value)
    with pytest.raises(InputError, match=r"train and val"):
        tiny_detector("padim").train(tiny / "normal", val=tiny)


def test_a_held_out_image_that_cannot_be_used_is_told_before_the_training(tiny, tmp_path, monkeypatch):
    detector = tiny_detector("stfpm")
    (tmp_path / "b.png").write_bytes(b"no image")
    Image.new("L", (64, 64)).save(tmp_path / "a.png")
    monkeypatch.setattr(type(detector.model), "loss", lambda self, batch: pytest.fail("was trained"))
    with pytest.raises(InputError, match=r"b\.png: not an image"):
        detector.train(tiny / "normal", val=tmp_path)


def test_without_held_out_images_there_is_no_decision(tiny):
    detector = tiny_detector("patchcore", coreset_ratio=0.1).train(tiny / "normal" / "000.png")
    result = detector.predict(tiny / "square" / "000.png")
    assert (result.p_value, result.decision, result.boxes) == (None, None, [])
    assert result.map is not None
    result = detector.train(tiny / "normal" / "000.png", val=arrays(tiny / "normal_test")).predict(tiny / "square" / "000.png")
    assert result.decision is not None


def test_one_image_is_enough_for_self_similarity(tmp_path):
    generator = np.random.default_rng(0)
    texture = generator.integers(90, 110, (160, 200), dtype=np.uint8)
    detector = AnomalyDetector(device="cpu", progress=False, weights="random", backbone="test_resnet").train(texture)
    broken = texture.copy()
    broken[64:128, 96:160:2] = 250
    result = detector.predict(broken)
    assert result.map.shape == (160, 200) and result.decision is None
    x, y, w, h = result.boxes[0]
    assert x < 128 < x + w and y < 96 < y + h


@pytest.mark.parametrize("method", ["dfkde", "dfkdm", "dfm", "lake"])
def test_too_few_images_are_refused_before_the_training(method, tiny):
    images = arrays(tiny / "normal")
    detector = tiny_detector(method)
    for few, val in ((images[:1], images[1:3]), (images[:2], None)):
        with pytest.raises(InputError, match=f"{method} compares whole images and takes 2"):
            detector.train(few, val)


def test_the_noise_detector_needs_no_training(tmp_path):
    image = np.random.default_rng(0).normal(128, 8, (60, 70)).clip(0, 255).astype(np.uint8)
    image[20:28, 30:38] = 200
    detector = AnomalyDetector("noise_residual", device="cpu", mode="calibrated")
    result = detector.predict(image)
    found = detector.model.detect(torch.from_numpy(image / np.float32(255)).expand(1, 3, -1, -1))[0]
    assert result.boxes == [(d.x1, d.y1, d.x2 - d.x1, d.y2 - d.y1) for d in found] != []
    assert (result.p_value, result.decision) == (None, True)
    quiet = detector.predict(np.random.default_rng(1).normal(128, 8, (60, 70)).clip(0, 255).astype(np.uint8))
    assert (quiet.decision, quiet.boxes) == (False, [])
    calibrated = AnomalyDetector("noise_residual", device="cpu", progress=False, scales=1)
    calibrated.train([image[:40, :30], image[30:, :]])
    assert calibrated.threshold.n == 2


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (np.zeros((4, 20), np.uint8), "8×8"),
        (np.zeros((3, 20, 20), np.uint8), r"\(3, 20, 20\).*torch \(H, W\), \(3, H, W\)"),
        (np.zeros((20, 20, 5), np.uint8), "not an image"),
        (np.zeros((20, 20), np.int64), "int64.*uint8, uint16 or floats"),
        (torch.zeros(20, 20, 3), "channels moved"),
        (np.full((20, 20), np.nan), "400 values are NaN"),
        (np.full((20, 20), 1e300), "infinite"),
        (np.full((20, 20), 200.0), r"200 to 200; expected \[0, 1\], or value_range"),
        (3.0, "float: not an image"),
        ([], "empty list"),
        ("nowhere", "no such file"),
    ],
)
def test_images_that_are_none(padim, image, says, tmp_path):
    with pytest.raises(InputError, match=says):
        padim.predict(image)
    with pytest.raises(InputError, match=says):
        padim.train(image)


def test_scaling_is_of_the_dtype_never_of_the_values(padim, tiny, tmp_path):
    deep = arrays(tiny / "normal_test")[0, ..., 0].astype(np.uint16) * 257
    dark = deep // 16  # 12 bits
    assert padim.predict(dark).score != padim.predict(deep).score
    window = tiny_detector("padim", value_range=(0, 4095)).train(arrays(tiny / "normal"))
    assert window.predict(dark).score == pytest.approx(window.predict(deep // 257 / 255 * 4095.0).score, rel=1e-2)
    assert tiny_detector("padim", value_range={"uint16": [0, 4095]}).train(dark[None, ..., None].repeat(2, 0)).threshold.n == 1
    Image.fromarray(np.full((20, 20), 7.0, np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(InputError, match=r"float\.tif: floats from 7 to 7"):
        padim.predict(tmp_path / "float.tif")
    for wrong in ("auto", "none", (1,), (3, 2), {"uint8": (0, 1)}):
        with pytest.raises(InputError, match="value_range"):
            AnomalyDetector("padim", value_range=wrong)


def test_images_with_other_values_than_those_of_the_training_are_told_of(padim, tiny, tmp_path, caplog):
    bright = arrays(tiny / "normal_test")
    padim.predict(bright)
    assert not caplog.records
    padim.predict(bright.astype(np.uint16) * 16)
    new, dark = (record.getMessage() for record in caplog.records)
    assert "uint16" in new and "65535" in new and "6 of 6" in dark and "value_range=(lo, hi)" in dark
    caplog.clear()
    tiny_detector("padim", value_range=(0, 4095)).train(arrays(tiny / "normal")).predict(bright.astype(np.uint16) * 16)
    assert not [record for record in caplog.records if "hardly fit" in record.getMessage()]
    deep = tiny_detector("padim").train(arrays(tiny / "normal").astype(np.uint16) * 16)
    deep.save(tmp_path / "deep")
    caplog.clear()
    AnomalyDetector.load(tmp_path / "deep", device="cpu").predict(bright.astype(np.uint16) * 256)
    assert [record.getMessage()[:6] for record in caplog.records] == ["6 of 6"]


@pytest.mark.parametrize(
    ("method", "options", "says"),
    [
        ("padin", {}, "did you mean 'padim'"),
        ("../padim", {}, "Allowed: autoencoder"),
        ("padim", {"n_featurs": 3}, "did you mean 'n_features'"),
        ("padim", {"_target_": "os.system"}, "_target_: no option of padim"),
        ("padim", {"stages": {"_target_": "os.system"}}, "expected a number"),
        ("padim", {"backbone": "${oc.env:HOME}"}, "expected a number"),
        ("padim", {"epochs": 3}, "epochs=3"),
        ("padim", {"align": "cubic"}, "bilinear or nearest"),
        ("padim", {"alpha": 2}, "alpha"),
        ("padim", {"image_size": 3}, "image_size=3"),
        ("padim", {"batch_size": 0}, "batch_size=0"),
        ("padim", {"backbone": "no_such_net"}, "not a timm model"),
        ("padim", {"device": "abacus"}, "device=abacus"),
        ("stfpm", {"epochs": 0}, "epochs=0"),
    ],
)
def test_options_that_are_none(method, options, says):
    with pytest.raises(InputError, match=re.escape(says)):
        AnomalyDetector(method, **{**TINY, **options})


def test_defaults_need_no_network():
    for method in METHODS:
        cfg = module.configured(method, {})
        assert not set(OTHERS) & set(cfg.model), f"{method}: an option with two meanings"
        if "backbone" in cfg.model and method != "noise_residual":
            assert (cfg.model.backbone, cfg.model.weights) == ("tf_efficientnet_lite0", "bundled"), method
    assert module.configured("padim", {}).image_size == 384  # the recipe's
    assert module.configured("padim", {"recipe": False}).image_size == 256  # the paper's
    assert module.configured("padim", {"recipe": False}).weights == "bundled"
    assert module.configured("padim", {"recipe": False, "weights": "pretrained"}).backbone == "resnet18"
    assert module.configured("padim", {"backbone": "resnet50"}).model.weights == "pretrained"


def test_a_method_that_must_be_trained_says_so(tmp_path):
    detector = tiny_detector("padim")
    for act in (lambda: detector.predict(np.zeros((20, 20), np.uint8)), lambda: detector.save(tmp_path / "x")):
        with pytest.raises(InputError, match="padim has not been fitted"):
            act()


def test_training_leaves_no_trace(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002 the caller's streams
    detector = tiny_detector("stfpm").train(tiny / "normal")
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # noqa: NPY002
    assert not list(tmp_path.iterdir())
    first = detector.predict(tiny / "square")
    assert all(equal(a, b) for a, b in zip(detector.train(tiny / "normal").predict(tiny / "square"), first, strict=True))  # anew


def test_writes_pictures_and_scores(padim, tiny, tmp_path):
    results = padim.test(tiny / "square", tmp_path / "out")
    expected = padim.predict(tiny / "square")
    assert [result.to_dict() for result in expected] == [result.to_dict() for result in results]
    assert all(result.map is None for result in results)
    for result in expected:
        mask = np.asarray(Image.open(tmp_path / "out" / f"{result.path.stem}_mask.png"))
        assert np.array_equal(mask > 0, result.map > padim.map_threshold)
        assert read(tmp_path / "out" / f"{result.path.stem}_overlay.png").shape == (*result.map.shape, 3)
    rows = (tmp_path / "out" / "scores.csv").read_text().splitlines()
    assert len(rows) == 7
    inside = tmp_path / "in"
    inside.mkdir()
    Image.open(tiny / "square" / "000.png").save(inside / "a.png")
    for _ in range(2):  # its own pictures are none of the folder's
        assert len(padim.test(inside, inside / "out")) == 1
    for _ in range(2):  # nor where they lie beside it
        assert len(padim.test(inside, inside)) == 1
    assert len(padim.test(inside / "a.png", tmp_path / "one")) == 1
    assert (tmp_path / "one" / "a_mask.png").is_file()


def test_a_run_folder_is_a_detector_too(tiny, tmp_path):
    cfg = tiny_run(tiny, tmp_path / "run", "model=padim")
    train(cfg)
    detector = AnomalyDetector.load(tmp_path / "run", device="cpu")
    cfg = composed(
        f"run='{tmp_path / 'run'}'", f"input='{tiny / 'square'}'", f"output='{tmp_path / 'out'}'", "device=cpu", config="predict"
    )
    predict(cfg)
    rows = [line.split(",") for line in (tmp_path / "out" / "scores.csv").read_text().splitlines()[1:]]
    results = detector.predict(tiny / "square")
    assert [(str(r.path), r.score, r.p_value) for r in results] == [(row[0], float(row[1]), float(row[4])) for row in rows]
    detector.save(tmp_path / "x.ckpt")
    again = AnomalyDetector.load(tmp_path / "x.ckpt", device="cpu").predict(tiny / "square")
    assert all(equal(a, b) for a, b in zip(again, results, strict=True))


def test_a_saved_detector_is_a_run_for_the_tools(tiny, tmp_path):
    mask = np.zeros((64, 64), np.uint8)
    mask[8:, 8:] = 255
    detector = tiny_detector("padim", roi=mask).train(tiny / "normal")
    detector.threshold, detector.map_threshold = 3.5, 2.5
    detector.save(tmp_path / "x.ckpt")
    options = [f"run='{tmp_path / 'x.ckpt'}'", f"input='{tiny / 'square'}'", f"output='{tmp_path / 'out'}'", "device=cpu"]
    found = predict(composed(*options, config="predict"))
    results = detector.predict(tiny / "square")
    assert [row[1] for row in found.rows] == [result.score for result in results]
    assert [bool(row[3]) for row in found.rows] == [result.decision for result in results]
    again = AnomalyDetector.load(tmp_path / "x.ckpt", device="cpu")
    assert (again.threshold.value, again.map_threshold) == (3.5, 2.5)
    assert all(equal(a, b) for a, b in zip(again.predict(tiny / "square"), results, strict=True))


def test_a_loaded_detector_can_be_trained_again(padim, saved, tiny):
    again = AnomalyDetector.load(saved)  # where `padim` was trained
    again.cfg.trainer.enable_progress_bar = False
    images = arrays(tiny / "square")
    assert all(equal(a, b) for a, b in zip(again.train(tiny / "normal").predict(images), padim.predict(images), strict=True))


class Malicious:
    def __init__(self, place: Path):
        self.place = place

    def __reduce__(self):
        return os.system, (f"touch '{self.place}'",)


def forged(saved: Path, path: Path, **changes) -> Path:
    """The saved file with another config inside; `options` are of its model, `top` of the rest."""
    content = torch.load(saved, weights_only=True)
    config = yaml.safe_load(content["config"])
    config["model"] |= changes.pop("options", {})
    torch.save({**content, "config": yaml.safe_dump({**config, **changes})}, path)
    return path


def test_files_of_strangers_run_no_code(saved, tmp_path):
    place = tmp_path / "ran"
    command = {"_target_": "os.system", "command": f"touch '{place}'"}
    for name in ("x.ckpt", "x.pkl"):
        (tmp_path / name).write_bytes(pickle.dumps(Malicious(place)))
    torch.save({"state_dict": Malicious(place)}, tmp_path / "x.pt")
    torch.save(Malicious(place), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("model: {_target_: blemish.methods.padim.PaDiM}\n")
    torch.save({"state_dict": Malicious(place)}, folder / "model.ckpt")
    beyond = tmp_path / "beyond"  # a path below our modules that leads out of them
    beyond.mkdir()
    way_out = f"{{_target_: blemish.methods.noise_residual.torch.load, f: '{tmp_path / 'x.pt'}', weights_only: false}}"
    (beyond / "config.yaml").write_text(f"model: {way_out}\n")
    torch.save({"state_dict": {}}, beyond / "model.ckpt")
    files = [folder, beyond, *(tmp_path / name for name in ("x.ckpt", "x.pkl", "x.pt", "old.pt"))]
    for name, options in {
        "target": command,
        "nested": {"stages": command},
        "deep": {"stages": [[command]]},
        "method": {"_target_": "os.system"},
        "yaml": {"_target_": "../../../method"},
    }.items():
        files.append(forged(saved, tmp_path / name, options=options))
    for file in files:
        with pytest.raises(InputError, match=re.escape(str(file))):
            AnomalyDetector.load(file)
        assert not place.exists(), file
    pickle.loads((tmp_path / "x.pkl").read_bytes())
    assert place.exists()  # the pickle would have run


def test_files_that_are_not_whole(saved, tmp_path):
    data = saved.read_bytes()
    for cut in (0, 1, 7, 8, 9, len(data) // 2, len(data) - 1):
        (tmp_path / "cut").write_bytes(data[:cut])
        with pytest.raises(InputError, match="cut: "):
            AnomalyDetector.load(tmp_path / "cut")
    torch.save({"a": torch.zeros(2)}, tmp_path / "foreign.ckpt")
    with pytest.raises(InputError, match=r"foreign\.ckpt: not a complete checkpoint"):
        AnomalyDetector.load(tmp_path / "foreign.ckpt")
    for changes in (
        {"options": {"_target_": "blemish.methods.stfpm.STFPM"}},
        {"options": {"stages": [1]}},
        {"scale": "a"},
        {"seed": "big"},
        {"options": {"x": 1}},
    ):
        with pytest.raises(InputError, match="forged: "):
            AnomalyDetector.load(forged(saved, tmp_path / "forged", **changes))
    for nothing in (tmp_path / "absent", tmp_path):
        with pytest.raises(InputError, match=re.escape(str(nothing))):
            AnomalyDetector.load(nothing)


def test_a_failed_save_leaves_the_old_file(padim, tmp_path, monkeypatch):
    padim.save(tmp_path / "x")
    before = (tmp_path / "x").read_bytes()

    def full(checkpoint, file):
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(InputError, match="no space left"):
        padim.save(tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_the_package_alone_imports_nothing_heavy():
    code = "import blemish, blemish.cli, sys; print([name for name in ('torch', 'lightning', 'hydra', 'numpy') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_without_torch_one_line_says_what_is_missing():
    block = "import sys; sys.modules |= dict.fromkeys(('torch', 'lightning', 'hydra'));"
    code = f"{block} sys.argv = ['blemish', 'predict']; import blemish.cli; blemish.cli.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and re.fullmatch(r"error: predict: needs hydra.*python -m blemish\.edge.*\n", done.stderr)
    done = subprocess.run([sys.executable, "-c", f"{block} from blemish import AnomalyDetector"], capture_output=True, text=True)
    assert re.match("ImportError: AnomalyDetector needs", done.stderr.splitlines()[-1])


def test_the_package_names_what_it_has():
    assert sorted(blemish.__all__) == dir(blemish) == ["AnomalyDetector", "InputError", "Result", "__version__"]
    assert all(getattr(blemish, name) is not None for name in blemish.__all__)
    assert blemish.__version__ == version("blemish")
    assert (Path(blemish.__file__).parent / "py.typed").is_file()  # editors follow its types
    with pytest.raises(AttributeError, match="Detektor"):
        _ = blemish.Detektor


@pytest.mark.parametrize(("page", "count"), [("docs/python.md", 4), ("README.md", 1)])
def test_the_examples_of_the_docs(page, count, tiny, tmp_path, monkeypatch):
    """Every Python block of a page, one after the other, in a folder with the images they name."""
    monkeypatch.chdir(tmp_path)
    frame = np.full((96, 128, 3), 100, np.uint8)
    opencv = Mock(cvtColor=lambda image, code: image[..., ::-1])
    opencv.VideoCapture.return_value.read.side_effect = [(True, frame), (True, frame), (False, None)]
    monkeypatch.setitem(sys.modules, "cv2", opencv)
    for name, source in (("good", "normal"), ("parts", "square"), ("nuts", "normal"), ("screws", "normal_test"), ("bolts", "square")):
        (tmp_path / name).mkdir()
        for path in sorted((tiny / source).glob("*.png"))[:6]:
            Image.open(path).resize((96, 96)).save(tmp_path / name / path.name)
    text = (CONFIGS.parent / page).read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= count
    space = {}
    for block in blocks:
        exec(compile(block, page, "exec"), space)
    assert list((tmp_path / "out").glob("*_overlay.png"))
    assert opencv.imshow.call_count == (2 if page == "docs/python.md" else 0)
