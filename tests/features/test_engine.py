"""The backbone by ONNX Runtime: its maps are torch's, its graph is made once, and where there is none torch does the work."""

import copy
import json
import logging
import pickle

import pytest
import torch
from support import tiny_run

from blemish.edge.errors import InputError
from blemish.features import engine
from blemish.features.extractor import Features
from blemish.run.checkpoint import build_detector, load
from blemish.run.record import read_record
from blemish.run.train import train

for module in engine.NEEDS:
    pytest.importorskip(module, reason=f"no {module} here: pip install blemish[export]")


def images(n: int, height: int = 64, width: int = 64) -> torch.Tensor:
    return torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("BLEMISH_CACHE", str(folder))
        yield folder


@pytest.fixture
def features(cache) -> Features:
    features = Features("test_efficientnet", [1, 2], "random", seed=0)
    features.engine = "onnxruntime"
    return features


@pytest.mark.parametrize(("chunk", "threads"), [(2**40, 1), (2.5, 1), (1, 2)])
def test_maps_are_torchs(features, monkeypatch, chunk, threads):
    monkeypatch.setattr(engine, "CHUNK_BYTES", chunk * features.pixel_bytes * 64 * 64)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    batch = images(7)
    for one, other in zip(features(batch), features.by_torch(batch), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.std()))
        assert one.is_contiguous(memory_format=torch.channels_last)
    assert features.used == "onnxruntime" and features.metadata()["engine"].startswith("onnxruntime 1.")


def test_a_graph_is_made_once_for_its_network_and_size(features, cache, monkeypatch):
    features(images(2))
    (path,) = (cache / "graphs").iterdir()
    assert path.name.startswith("test_efficientnet-1-2-64x64-")
    monkeypatch.setattr(engine, "make", None)  # the next one is opened
    for again in (copy.deepcopy(features), pickle.loads(pickle.dumps(features))):
        assert again.graph is None
        torch.testing.assert_close(again(images(3))[1], features(images(3))[1], rtol=0, atol=0)
        assert again.used == "onnxruntime"
    features(images(1, 96, 64))  # of another size than the first
    assert features.used == "torch"
    with torch.autocast("cpu", torch.bfloat16):
        assert features(images(1))[0].dtype == torch.bfloat16
    features.load_state_dict({key: value + 0.1 for key, value in features.state_dict().items()})
    assert features.graph is None and engine.place_of(features, images(1)) != path


def test_a_file_that_is_damaged_or_of_other_weights_is_made_anew(features, cache):
    features(images(1))
    (path,) = (cache / "graphs").glob("*-64x64-*")
    whole, other = path.read_bytes(), Features("test_efficientnet", [1, 2], "random", seed=1)
    engine.make(path, other, images(1))
    for content in (path.read_bytes(), whole[:1000], b""):
        path.write_bytes(content)
        again = copy.deepcopy(features)
        for one, expected in zip(again(images(2)), features.by_torch(images(2)), strict=True):
            torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-4 * float(expected.std()))
        assert again.used == "onnxruntime" and len(path.read_bytes()) == pytest.approx(len(whole), abs=100)


@pytest.mark.parametrize("where", ["onnx_of", "difference", "find_spec"])
def test_torch_takes_over_with_one_line(features, cache, monkeypatch, caplog, where):
    def fails(*_):
        raise RuntimeError("no such operator\nand a page of details")

    replies = {"onnx_of": fails, "difference": lambda *_: float("nan"), "find_spec": lambda name: None}
    monkeypatch.setattr(engine, where, replies[where])
    batch = images(2, 96, 96)
    for one, other in zip(features(batch), features.by_torch(batch), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    features(batch)
    (line,) = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert "torch" in line and "\n" not in line
    assert features.used == "torch" and not list((cache / "graphs").glob("*-96x96-*"))


@pytest.mark.parametrize(("times", "used"), [((1.0, 2.0), "torch"), ((2.0, 1.0), "onnxruntime")])
def test_auto_takes_the_faster_one(features, monkeypatch, times, used):
    features(images(1))  # there is a graph
    features.engine, features.graph = "auto", None
    opened = engine.opened
    found = dict(zip(("torch", "onnxruntime"), times, strict=True))
    monkeypatch.setattr(engine, "opened", lambda *of: opened(*of)._replace(milliseconds=found))
    features(images(1))
    assert features.used == used


def test_the_key_of_a_run(tiny, tmp_path, cache):
    with pytest.raises(InputError, match=r"engine=tensorrt: expected .*onnxruntime"):
        train(tiny_run(tiny, tmp_path / "no", "model=padim", "engine=tensorrt"))
    cfg = tiny_run(tiny, tmp_path / "run", "model=padim", "engine=onnxruntime")
    train(cfg)
    assert read_record(tmp_path / "run")["engine"].startswith("onnxruntime")
    assert load(tmp_path / "run", "cpu")[1].backbone.engine == "onnxruntime"
    assert len(list((cache / "graphs").glob("test_resnet-*"))) == 1
    cfg.engine = "auto"  # weights of a single run
    assert build_detector(cfg).backbone.engine == "torch"
    plain = tiny_run(tiny, tmp_path / "plain", "model=padim", "engine=torch")
    expected, found = train(plain), json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert read_record(tmp_path / "plain")["engine"].startswith("torch")
    assert found["image_auroc"] == pytest.approx(expected["image_auroc"], abs=1e-3)
