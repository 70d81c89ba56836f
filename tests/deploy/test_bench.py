"""The clock of stages: what it measures is the run, and what it writes is what it measured."""

import json
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from support import composed, slow, tiny_run

from blemish.deploy import bench
from blemish.deploy.bench import Engine, Plan, Row, bench_run, graph_engine, limited, measured, timed, torch_engine
from blemish.deploy.export import chosen, loaded
from blemish.edge.errors import InputError
from blemish.run.checkpoint import load
from blemish.run.config import build
from blemish.run.results import preprocessing_of
from blemish.run.train import train

STAGES = ["resize", "backbone", "score", "map", "image to score", "image to map"]


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "padim"
    train(tiny_run(tiny, folder, "model=padim", "crop=48"))
    return folder


def config(run: Path, *overrides: str):
    return composed(f"run='{run}'", "threads=1", "warmup=1", "repeats=3", "n=4", "batch=2", *overrides, config="bench")


@pytest.fixture(scope="module")
def arrays(run) -> list[np.ndarray]:
    return [loaded(*image) for image in chosen(None, run, partial(build, load(run, "cpu")[0].data), 3)]


@pytest.mark.parametrize("name", ["onnxruntime", slow("openvino")])
def test_engines_compute_the_run_whole_and_in_parts(run, arrays, name, tmp_path):
    for module in ("onnx", "onnxscript", name):
        pytest.importorskip(module, reason=f"no {module} here: pip install blemish[export]")
    saved, model = load(run, "cpu")
    view = preprocessing_of(saved)
    plain = torch_engine(model, view)
    other = graph_engine(name, load(run, "cpu")[1], view, (48, 48), "uint8", True, 1, 20, tmp_path)
    expected = plain.whole(plain.stack([plain.resize(array) for array in arrays]))
    batch = other.stack([other.resize(array) for array in arrays])
    for found in (
        other.whole(batch),
        other.score(other.backbone(batch)),
        plain.score(plain.backbone(torch.from_numpy(batch).permute(0, 3, 1, 2) / 255)),
    ):
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    own = other.enlarge(np.asarray(expected[1][0]), 70, 90)
    np.testing.assert_allclose(own, plain.enlarge(expected[1][0], 70, 90), rtol=1e-4, atol=1e-5)


def test_what_is_written(run, tiny, tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- latency: begin -->\nold\n<!-- latency: end -->\nafter\n")
    cfg = config(run, "engines=[torch]", f"output='{tmp_path}/b.json'", f"doc='{page}'")
    rows = bench_run(cfg, load, build)
    assert [(r.engine, r.batch, r.stage) for r in rows] == [("any", 1, "decode")] + [
        ("torch", n, stage) for n in (1, 2) for stage in STAGES
    ]
    assert all(0 < r.median <= r.p95 <= r.p99 and r.calls == 3 for r in rows)
    written = json.loads((tmp_path / "b.json").read_text())
    assert [Row(**row) for row in written["milliseconds"]] == rows
    assert (written["threads"], written["warmup"], written["repeats"], written["size"]) == (1, 1, 3, [48, 48])
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "48×48 px" in text and "1 threads" in text and "| torch | 2 | image to score |" in text
    assert bench.table(rows).row_count == len(rows)


def test_without_maps_there_is_no_stage_for_them(run, arrays):
    view = preprocessing_of(load(run, "cpu")[0])
    rows = measured("torch", torch_engine(load(run, "cpu")[1], view), arrays, 1, False, Plan(0, 1, 9))
    assert [r.stage for r in rows] == ["resize", "backbone", "score", "image to score"]


def test_the_clock():
    calls = []

    def work(seconds: float) -> None:
        calls.append(seconds)
        time.sleep(seconds)

    found = timed(work, [0.002, 0.012], Plan(warmup=3, repeats=4, seconds=9))
    assert calls == [0.002, 0.012] * 3 + [0.002]  # those given take turns, and warm-up is not counted
    assert len(found) == 4
    assert min(found[0], found[2]) >= 12 > 2
    assert timed(work, [0.01], Plan(warmup=1, repeats=1000, seconds=0.05)).__len__() < 10
    row = bench.row("e", 1, "s", list(range(101)))
    assert row == Row("e", 1, "s", 50, 95, 99, 101)


def test_a_method_without_a_backbone_is_one_stage():
    engine = Engine(lambda a: a, np.stack, None, None, lambda batch: (batch.sum((1, 2, 3)),), lambda m, h, w: m, None)
    rows = measured("e", engine, [np.zeros((8, 8, 3))], 2, True, Plan(0, 2, 9))
    assert [(r.batch, r.stage) for r in rows] == [(2, "resize"), (2, "score"), (2, "image to score")]


def test_threads_are_given_back():
    before = torch.get_num_threads()
    with limited(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_what_has_no_export_is_timed_by_torch(run, monkeypatch, tmp_path, caplog):
    pytest.importorskip("onnxruntime", reason="no onnxruntime here: pip install blemish[export]")

    def refuse(*_):
        raise InputError("no graph")

    monkeypatch.setattr(bench, "traced", refuse)
    rows = bench_run(config(run, "engines=[torch,onnxruntime]", "batch=1", f"output='{tmp_path}/b.json'"), load, build)
    assert {r.engine for r in rows} == {"any", "torch"}
    assert "onnxruntime is left out: no graph" in caplog.text


def test_settings_that_measure_nothing(run):
    with pytest.raises(InputError, match="batch=0: expected"):
        bench_run(config(run, "batch=0", "repeats=0"), load, build)
    with pytest.raises(InputError, match="images=nowhere"):
        bench_run(config(run, "images=nowhere"), load, build)


def test_an_engine_that_does_not_exist(run):
    with pytest.raises(InputError, match="no tensorrt; expected torch, onnxruntime, openvino"):
        bench_run(config(run, "engines=[tensorrt]"), load, build)
