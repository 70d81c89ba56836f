"""Files of runs that were cut at any byte or had a bit flipped: a named error or the same result, never a crash or another's code."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
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
from blemish.files import write_json
from blemish.methods.autoencoder import Autoencoder
from blemish.report import page as report
from blemish.report import tables
from blemish.run.checkpoint import load
from blemish.run.config import read_config
from blemish.run.predict import predict
from blemish.run.resume import state_in
from blemish.run.train import train

LEAN = ["save.curves=false", "save.pictures=2", "model.n_features=20"]


def cuts(sound: bytes, count: int) -> list[bytes]:
    """The content of a file cut at the first bytes, the last ones, and a spread between."""
    size = len(sound)
    places = {0, 1, 2, 30, size - 1, size - 2, size - 23, *np.linspace(0, size - 1, count).astype(int).tolist()}
    return [sound[:place] for place in sorted(places & set(range(size)))]


def flips(sound: bytes, count: int) -> list[bytes]:
    """Copies with one bit flipped, spread over the file."""
    rng, copies = np.random.default_rng(0), []
    for place in (len(sound) * (np.arange(count) + rng.random(count)) / count).astype(int):
        copy = bytearray(sound)
        copy[place] ^= 1 << rng.integers(8)
        copies.append(bytes(copy))
    return copies


def check_damages(path: Path, use: Callable[[], object], cut: int, flip: int, least: int) -> None:
    """A file that was cut is refused by its path; one with a flipped bit, too, or gives what the sound one gives, which few do."""
    sound, expected, refused = path.read_bytes(), use(), 0
    for damaged in cuts(sound, cut):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=re.escape(str(path))):
            use()
    for damaged in flips(sound, flip):
        path.write_bytes(damaged)
        try:
            assert use() == expected
        except InputError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > least
    path.write_bytes(sound)
    assert use() == expected


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


def test_a_checkpoint_of_a_run(run):
    check_damages(
        run / "model.ckpt", lambda: {key: value.numpy().tobytes() for key, value in load(run, "cpu")[1].state_dict().items()}, 40, 150, 100
    )


class Evil:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


@pytest.mark.parametrize("kind", ["pickle", "archive"])
def test_a_checkpoint_runs_no_code(kind, run, tmp_path):
    trap, path = tmp_path / "owned", run / "model.ckpt"
    evil = pickle.dumps({"state_dict": Evil(trap)})
    if kind == "pickle":
        path.write_bytes(evil)
    else:
        with zipfile.ZipFile(path) as archive:
            parts = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in parts.items():
                archive.writestr(name, evil if name.endswith("data.pkl") else content)
    with pytest.raises(InputError, match=re.escape(str(path))):
        load(run, "cpu")
    assert not trap.exists()


def test_the_state_of_a_training(tiny, tmp_path, monkeypatch):
    run = tmp_path / "run"
    options = ["model=autoencoder", "trainer.max_epochs=2", "model.latent=16"]

    def cut_off(*_):
        raise RuntimeError("cut off")

    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="cut off"):
        patched.setattr(Autoencoder, "after_training", cut_off)
        train(tiny_run(tiny, run, *options))
    state = run / "last.ckpt"
    for damaged in cuts(state.read_bytes(), 6):
        state.write_bytes(damaged)
        with pytest.raises(InputError, match=re.escape(str(state))):
            state_in(run)
    with pytest.raises(InputError, match=r"run/last\.ckpt: .* remove it"):
        train(composed(f"resume='{run}'"))
    state.unlink()
    found = train(composed(f"resume='{run}'"))
    assert found["image_auroc"] == train(tiny_run(tiny, tmp_path / "fresh", *options))["image_auroc"]


def test_a_config(run, image):
    path, pixels = run / "config.yaml", torch.from_numpy(image / np.float32(255)).expand(3, -1, -1)[None]
    sound, expected = path.read_bytes(), load(run, "cpu")[1](pixels).score
    equal = 0
    for damaged in cuts(sound, 60):
        path.write_bytes(damaged)
        try:
            cfg, found = load(run, "cpu")
        except InputError as error:
            assert str(path) in str(error), error
            continue
        assert torch.equal(found(pixels).score, expected)
        assert {"data", "batch_size", "seed", "alpha"} <= cfg.keys()
        equal += 1
    assert equal <= 3, "the last byte alone is not missed"
    for damaged in flips(sound, 60):
        path.write_bytes(damaged)
        try:
            load(run, "cpu")
        except InputError as error:
            assert str(path) in str(error) or str(run / "model.ckpt") in str(error), error
    path.write_bytes(b"\xff\xfe\x00 no text")
    with pytest.raises(InputError, match=re.escape(str(path))):
        read_config(run)


@pytest.mark.parametrize("name", ["record.json", "metrics.json", "scores.csv", "config.yaml", "manifest.csv"])
def test_what_tables_reports_and_predictions_read(name, run, tiny, tmp_path, caplog):
    path = run / name
    sound = path.read_bytes()
    shutil.copytree(run, tmp_path / "sound")
    table = (run.parent, None, None, None, None, "run", "image_auroc", None)
    options = [f"run='{run}'", f"input='{tiny / 'square' / '000.png'}'", f"output='{tmp_path / 'out'}'", "device=cpu"]
    damages = cuts(sound, 12) + flips(sound, 25) + [b"[1, 2]", b"null", b"{}", b'{"status": "finished"}', b"\xff\0"]
    for key in (b'"seed":', b'"method":', b'"weights":'):  # a value that is lost or of another kind
        damages += [sound.replace(key, other) for other in (b'"lost":', key + b' [1], "lost":')]
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
    assert AnomalyDetector.load(path, device="cpu").predict(image).score == detector.predict(image).score
    check_damages(path, lambda: AnomalyDetector.load(path, device="cpu").predict(image).score, 30, 80, 60)


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
        sound = file.read_bytes()
        for damaged in [*cuts(sound, 25), *flips(sound, 200), sound + b"\n"]:
            file.write_bytes(damaged)
            with pytest.raises(InputError, match=re.escape(str(path))):
                Model(path)
        file.unlink()
        with pytest.raises(InputError, match=re.escape(str(file))):
            Model(path)
        file.write_bytes(sound)
    assert capfd.readouterr().out == ""  # no engine has seen them: ONNX Runtime prints there what it makes of some
    assert Model(path).predict(image)[0].score == expected


@pytest.mark.slow
def test_an_exported_program(finished, image, tmp_path):
    options = ["format=torch_export", f"output='{tmp_path / 'model.pt2'}'", "n=2"]
    path, _ = export_run(composed(f"run='{finished}'", *options, config="export"))
    check_damages(path, lambda: Program(path).predict(image)[0].score, 8, 30, 20)


READER = """
import json, sys
from pathlib import Path
while not Path(sys.argv[2]).exists():
    json.loads(Path(sys.argv[1]).read_text())
"""


def test_json_of_a_run_is_never_half(tmp_path):
    """Readers of a file that is replaced again and again see one of its contents, complete."""
    path = tmp_path / "metrics.json"
    write_json(path, {})
    reader = subprocess.Popen([sys.executable, "-c", READER, str(path), str(tmp_path / "stop")])
    try:
        for number in range(300):
            write_json(path, {"values": list(range(number % 7 * 1000)), "number": number})
    finally:
        (tmp_path / "stop").touch()
        assert reader.wait(60) == 0
    assert json.loads(path.read_text())["number"] == 299
