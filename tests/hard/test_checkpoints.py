"""Files of runs that were cut at any byte or had a bit flipped: a named error or the same result, never a crash or another's code."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support import composed, tiny_run

from blemish.api import AnomalyDetector
from blemish.deploy.export import Program, export_run
from blemish.edge.errors import InputError
from blemish.edge.runtime import Model
from blemish.report import page as report
from blemish.report import tables
from blemish.run.checkpoint import load
from blemish.run.config import read_config
from blemish.run.predict import predict
from blemish.run.train import train

LEAN = ["save.curves=false", "save.pictures=2", "model.n_features=20"]


def cuts(whole: bytes, count: int) -> list[int]:
    """Places to cut at: the first bytes, the last ones, and a spread between."""
    spread = np.linspace(0, len(whole) - 1, count).astype(int)
    return sorted({0, 1, 2, 30, len(whole) - 1, len(whole) - 2, len(whole) - 23, *spread.tolist()} & set(range(len(whole))))


def flips(whole: bytes, count: int) -> list[bytes]:
    """Copies with one bit flipped, spread over the file."""
    rng, copies = np.random.default_rng(0), []
    for place in (len(whole) * (np.arange(count) + rng.random(count)) / count).astype(int):
        copy = bytearray(whole)
        copy[place] ^= 1 << rng.integers(8)
        copies.append(bytes(copy))
    return copies


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(tiny_run(tiny, folder, *LEAN))
    return folder


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy of a finished run that a test may damage."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def image(tiny) -> np.ndarray:
    return np.array(Image.open(tiny / "square" / "000.png"))


def same(model, other) -> bool:
    state, found = model.state_dict(), other.state_dict()
    return state.keys() == found.keys() and all(torch.equal(state[key], found[key]) for key in state)


def test_a_checkpoint_of_a_run(run):
    path, model = run / "model.ckpt", load(run, "cpu")[1]
    whole = path.read_bytes()
    for place in cuts(whole, 40):
        path.write_bytes(whole[:place])
        with pytest.raises(InputError, match=r"run/model\.ckpt: not a complete checkpoint"):
            load(run, "cpu")
    refused = 0
    for damaged in flips(whole, 150):
        path.write_bytes(damaged)
        try:
            assert same(load(run, "cpu")[1], model)
        except InputError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 100
    path.write_bytes(whole)
    assert same(load(run, "cpu")[1], model)


class Evil:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


@pytest.mark.parametrize("kind", ["pickle", "archive"])
def test_a_checkpoint_runs_no_code(kind, run, tmp_path):
    trap, path = tmp_path / "owned", run / "model.ckpt"
    if kind == "pickle":
        path.write_bytes(pickle.dumps({"state_dict": Evil(trap)}))
    else:
        with zipfile.ZipFile(path) as archive:
            parts = {name: archive.read(name) for name in archive.namelist()}
        data = next(name for name in parts if name.endswith("data.pkl"))
        parts[data] = pickle.dumps({"state_dict": Evil(trap)})
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in parts.items():
                archive.writestr(name, content)
    with pytest.raises(InputError, match=r"run/model\.ckpt: not a complete checkpoint"):
        load(run, "cpu")
    assert not trap.exists()


def test_the_state_of_a_training(tiny, tmp_path):
    run = tmp_path / "run"
    options = ["model=autoencoder", "trainer.max_epochs=2", "model.latent=16", "save.curves=false", "save.pictures=0"]
    from blemish.methods.autoencoder import Autoencoder

    after_training = Autoencoder.after_training
    Autoencoder.after_training = lambda *_: (_ for _ in ()).throw(RuntimeError("cut off"))
    try:
        with pytest.raises(RuntimeError, match="cut off"):
            train(tiny_run(tiny, run, *options))
    finally:
        Autoencoder.after_training = after_training
    state = run / "last.ckpt"
    whole = state.read_bytes()
    for place in cuts(whole, 6):
        state.write_bytes(whole[:place])
        with pytest.raises(InputError, match=r"run/last\.ckpt: not the complete state of a training .* remove it"):
            train(composed(f"resume='{run}'"))
    state.unlink()
    found = train(composed(f"resume='{run}'"))
    assert found["image_auroc"] == train(tiny_run(tiny, tmp_path / "fresh", *options))["image_auroc"]


def test_a_config(run, image):
    path, model = run / "config.yaml", load(run, "cpu")[1]
    whole = path.read_bytes()
    expected = model(torch.from_numpy(image / np.float32(255)).expand(3, -1, -1)[None]).score
    equal = 0
    for place in cuts(whole, 60):
        path.write_bytes(whole[:place])
        try:
            cfg, found = load(run, "cpu")
        except InputError as error:
            assert str(path) in str(error), error
            continue
        assert torch.equal(found(torch.from_numpy(image / np.float32(255)).expand(3, -1, -1)[None]).score, expected)
        assert {"data", "batch_size", "seed", "alpha"} <= cfg.keys()
        equal += 1
    assert equal <= 3, "the last byte alone is not missed"
    for damaged in flips(whole, 60):
        path.write_bytes(damaged)
        try:
            cfg, found = load(run, "cpu")
        except InputError as error:
            assert str(path) in str(error) or str(run / "model.ckpt") in str(error), error
    path.write_bytes(b"\xff\xfe\x00 no text")
    with pytest.raises(InputError, match=r"config\.yaml: not the config of a run"):
        read_config(run)


@pytest.mark.parametrize("name", ["record.json", "metrics.json", "scores.csv", "config.yaml", "manifest.csv"])
def test_what_tables_reports_and_predictions_read(name, run, tiny, tmp_path, caplog):
    path = run / name
    whole = path.read_bytes()
    shutil.copytree(run, tmp_path / "sound")
    table = (run.parent, None, None, None, None, "run", "image_auroc", None)
    options = [f"run='{run}'", f"input='{tiny / 'square' / '000.png'}'", f"output='{tmp_path / 'out'}'", "device=cpu"]
    damages = (
        [whole[:place] for place in cuts(whole, 12)] + flips(whole, 25) + [b"[1, 2]", b"null", b"{}", b'{"status": "finished"}', b"\xff\0"]
    )
    for key in (b'"seed":', b'"method":', b'"weights":'):  # a value that is lost or of another kind
        damages += [whole.replace(key, other) for other in (b'"lost":', key + b' [1], "lost":')]
    for number, damaged in enumerate(damages):
        path.write_bytes(damaged)
        caplog.clear()
        rows, _ = tables.write(*table)
        assert rows in (1, 2)
        assert rows == 2 or name != "scores.csv"
        assert rows == 2 or str(run) in caplog.text, "what is left out is named"
        if number % 6 == 0:
            assert report.write(run.parent, tmp_path / "report.html", 1, 1, 64) >= 1
            try:
                assert len(predict(composed(*options, config="predict")).rows) == 1
            except InputError as error:
                assert str(run) in str(error)


def test_a_saved_detector(finished, image, tmp_path):
    detector, path = AnomalyDetector.load(finished, device="cpu"), tmp_path / "detector.ckpt"
    detector.save(path)
    whole, expected = path.read_bytes(), detector.predict(image).score
    for place in cuts(whole, 30):
        path.write_bytes(whole[:place])
        with pytest.raises(InputError, match=r"detector\.ckpt: "):
            AnomalyDetector.load(path, device="cpu")
    refused = 0
    for damaged in flips(whole, 80):
        path.write_bytes(damaged)
        try:
            assert AnomalyDetector.load(path, device="cpu").predict(image).score == expected
        except InputError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 60


@pytest.mark.slow
@pytest.mark.parametrize(("format", "name", "engine"), [("onnx", "model.onnx", "onnxruntime"), ("openvino", "model.xml", "openvino")])
def test_an_exported_file(finished, image, tmp_path, capfd, format, name, engine):
    for needed in ("onnx", "onnxscript", engine):
        pytest.importorskip(needed, reason=f"{needed} is not installed, which writes or reads such files: pip install blemish[export]")
    options = [f"run='{finished}'", f"output='{tmp_path / name}'", f"format={format}", "n=2"]
    path, _ = export_run(composed(*options, config="export"))
    expected = Model(path).predict(image)[0].score
    capfd.readouterr()
    for file in sorted(tmp_path.glob("model.*")):  # with OpenVINO, the weights have a file of their own
        whole = file.read_bytes()
        for damaged in [*(whole[:place] for place in cuts(whole, 25)), *flips(whole, 200), whole + b"\n"]:
            file.write_bytes(damaged)
            with pytest.raises(InputError, match=rf"{re.escape(str(path))}: (damaged)"):
                Model(path)
        file.unlink()
        with pytest.raises(InputError, match=re.escape(str(file))):
            Model(path)
        file.write_bytes(whole)
    assert capfd.readouterr().out == ""  # no engine has seen them: ONNX Runtime prints there what it makes of some
    assert Model(path).predict(image)[0].score == expected


@pytest.mark.slow
def test_an_exported_program(finished, image, tmp_path):
    options = ["format=torch_export", f"output='{tmp_path / 'model.pt2'}'", "n=2"]
    path, _ = export_run(composed(f"run='{finished}'", *options, config="export"))
    whole, expected = path.read_bytes(), Program(path).predict(image)[0].score
    for place in cuts(whole, 8):
        path.write_bytes(whole[:place])
        with pytest.raises(InputError, match=r"model\.pt2: "):
            Program(path)
    refused = 0
    for damaged in flips(whole, 30):
        path.write_bytes(damaged)
        try:
            assert Program(path).predict(image)[0].score == expected  # a bit of the archive's padding
        except InputError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 20


READER = """
import json, sys
from pathlib import Path
while not Path(sys.argv[2]).exists():
    json.loads(Path(sys.argv[1]).read_text())
"""


def test_json_of_a_run_is_never_half(run):
    """What is written aside and renamed: readers at work see one of the contents, whole."""
    from blemish.files import write_json

    path = run / "metrics.json"
    reader = subprocess.Popen([sys.executable, "-c", READER, str(path), str(run / "stop")])
    try:
        for number in range(300):
            write_json(path, {"values": list(range(number % 7 * 1000)), "number": number})
    finally:
        (run / "stop").touch()
        assert reader.wait(60) == 0
    assert json.loads(path.read_text())["number"] == 299
