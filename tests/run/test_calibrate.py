"""Calibration with the images that a detector was fitted to, against fits without them."""

import numpy as np
import pytest
import torch
from PIL import Image
from support import tiny_run

from blemish.api import AnomalyDetector
from blemish.data.manifest import read_manifest
from blemish.deploy.export import check_exportable
from blemish.edge.errors import InputError
from blemish.run.calibrate import FOLDS, folds
from blemish.run.checkpoint import load
from blemish.run.record import read_record
from blemish.run.train import train

OPTIONS = {
    "padim": ["model=padim", "model.n_features=20"],
    "spade": ["model=spade", "model.neighbors=5"],
    "patchcore": ["model=patchcore", "model.coreset=none", "model.reweight=false"],
    "coreset": ["model=patchcore", "model.coreset_ratio=0.5"],
    "dfm": ["model=dfm"],
    "bag": ["model=dfm", "model.score=max"],
    "dfkdm": ["model=dfkdm", "model.density=gaussian"],
    "subspace": ["model=subspace", "model.rotations=0"],
}


@pytest.mark.parametrize(("name", "calibrate", "promise"), [
    ("padim", "full", "full"), ("spade", "full", "full"), ("patchcore", "full", "full"), ("coreset", "cross", "cross"),
    ("dfm", "cross", "cross"), ("bag", "full", "full"), ("dfkdm", "cross", "cross"), ("dfkdm", "full", "full"),
    ("subspace", "cross", "cross"), ("subspace", "full", "full"),
])  # fmt: skip
def test_every_image_trains_and_calibrates(name, calibrate, promise, tiny, tmp_path, capsys):
    train(tiny_run(tiny, tmp_path / "run", *OPTIONS[name], f"calibrate={calibrate}"))
    model, found = load(tmp_path / "run", "cpu")[1], read_record(tmp_path / "run")["calibration"]
    assert int(model.fitted) == len(model.calibration) == found["n"] == 24
    assert found["promise"] == model.promise == promise and found["conditional"] is None
    assert ("not proven" in found["explanation"]) == (promise == "cross")
    if name not in ("padim", "coreset"):  # a fit to the others
        paths = sorted(sample.path for sample in read_manifest(tmp_path / "run" / "manifest.csv") if sample.split == "train")
        images = [torch.from_numpy(np.array(Image.open(tiny / path).convert("RGB"))).permute(2, 0, 1) / 255 for path in paths]
        for i in (0, 23):
            other = AnomalyDetector.load(tmp_path / "run", device="cpu").model
            other.calibration, state = torch.empty(0, 2), other.new_state(23)
            state.update(other.collect(other.features(torch.stack([*images[:i], *images[i + 1 :]]))))
            with torch.no_grad():
                other.fit(state)
                torch.testing.assert_close(other(images[i][None]).score[0], model.calibration[i, 0], rtol=1e-3, atol=1e-4)


def test_methods_that_leave_no_image_out_are_calibrated_in_folds(tiny, tmp_path):
    train(tiny_run(tiny, tmp_path / "run", "model=subspace", "model.rotations=1", "calibrate=cross"))
    model = load(tmp_path / "run", "cpu")[1]
    assert int(model.fitted) == len(model.calibration) == 24 and model.promise == "cross"
    samples = [s for s in read_manifest(tmp_path / "run" / "manifest.csv") if s.split == "train"]
    assert len(samples) == 24
    parts = folds(samples, FOLDS, seed=0)
    held = [{s.path for s in part if s.split == "calibrate"} for part in parts]
    assert len(parts) == FOLDS and sum(map(len, held)) == 24 and set.union(*held) == {s.path for s in samples}
    assert model.calibration.isfinite().all()


@pytest.mark.parametrize(("options", "says"), [
    (["model=dfm", "model.groups=2", "calibrate=full"], "no proof for DFM"),
    (["model=dfm", "model.score=max", "data.resize=letterbox", "calibrate=full"], "data.resize"),
    (["model=dfkdm", "model.scaling=norm", "calibrate=full"], "no proof for DFKDM"),
    (["model=subspace", "model.rotations=2", "calibrate=full"], "no proof for Subspace"),
    (["model=patchcore", "calibrate=full"], "no proof for PatchCore"),
    (["model=padim", "calibrate=full", "tiling=32", "overlap=8"], "on tiles"),
    (["model=padim", "calibrate=full", "protocol=paper"], "protocol=clean"),
    (["model=padim", "calibrate=half"], "calibrate=half"),
])  # fmt: skip
def test_what_is_not_proven_is_refused(options, says, tiny, tmp_path):
    with pytest.raises(InputError, match=says):
        train(tiny_run(tiny, tmp_path / "run", *options))


def test_a_bag_of_many_images_is_refused(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("blemish.run.calibrate.BAG", 23)
    with pytest.raises(InputError, match="at most 23"):
        train(tiny_run(tiny, tmp_path / "run", "model=dfm", "calibrate=full"))


@pytest.mark.parametrize("name", ["bag", "dfkdm", "subspace"])
def test_the_p_value_of_an_image_is_that_among_refits_of_its_bag(name, tiny, tmp_path):
    train(tiny_run(tiny, tmp_path / "run", *OPTIONS[name], "calibrate=full"))
    detector, plain = (AnomalyDetector.load(tmp_path / "run", device="cpu") for _ in range(2))
    plain.model.calibration = torch.empty(0, 2)
    for path in [next((tiny / folder).iterdir()) for folder in ("normal_test", "square")]:
        found, own, raw = detector.predict(path), detector.model.calibration[:, 0], plain.predict(path).score
        image = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)[None] / 255
        maps = plain.model.features(image)
        scores = plain.model.bag(plain.model.collect(maps)[0], maps)
        assert found.p_value == (1 + int((scores[:-1] >= scores[-1]).sum())) / 25
        assert found.decision == (found.score > detector.threshold.value)
        assert found.score == raw or (1 + int((own >= raw).sum())) / 25 != found.p_value  # moved where it has to be
    with pytest.raises(InputError, match="calibrate=split"):
        check_exportable(detector.model, maps=False)


def test_from_python(tiny, tmp_path):
    detector = AnomalyDetector("padim", backbone="test_resnet", weights="random", image_size=64, calibrate="full", device="cpu")
    detector.train(tiny / "normal")
    assert detector.threshold.n == 24 and detector.threshold.promise == "full"
    detector.save(tmp_path / "x.ckpt")
    assert AnomalyDetector.load(tmp_path / "x.ckpt", device="cpu").threshold == detector.threshold
    with pytest.raises(InputError, match="held-out"):
        detector.certificate(detector.predict(tiny / "square"))
