"""The bench: what it times is the run, and what it writes is what it timed."""

import json
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support import composed, tiny_run

from blemish.deploy import bench
from blemish.deploy.bench import (
    Engine,
    Rate,
    Row,
    bench_run,
    graph_engine,
    graphs_of,
    measured,
    parts_as_programs,
    roof,
    timed,
    torch_engine,
)
from blemish.deploy.parity import chosen, loaded
from blemish.edge.errors import InputError
from blemish.run.checkpoint import load
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


def plan(warmup: int, repeats: int, seconds: float = 9, maps: bool = True) -> SimpleNamespace:
    return SimpleNamespace(warmup=warmup, repeats=repeats, seconds=seconds, maps=maps)


@pytest.fixture(scope="module")
def arrays(run) -> list[np.ndarray]:
    return [loaded(*image) for image in chosen(None, run, load(run, "cpu")[0].data, 3)]


@pytest.mark.slow  # three graphs go through the ONNX exporter
@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_engines_compute_the_run_complete_and_in_parts(run, arrays, name):
    for module in ("onnx", "onnxscript", name):
        pytest.importorskip(module, reason=f"no {module} here: pip install blemish[export]")
    saved, model = load(run, "cpu")
    preprocessing = preprocessing_of(saved)
    plain = torch_engine(model, preprocessing, (48, 48))
    parts = parts_as_programs(load(run, "cpu")[1], preprocessing, (48, 48), "uint8", True)
    assert parts["full"].operations == pytest.approx(parts["backbone"].operations + parts["score"].operations)
    assert parts["score"].bytes > model.cholesky.nbytes / 2 and parts["score"].operations > model.cholesky.numel() / 2
    assert [r.stage for r in roof(parts)] == ["image to score", "backbone", "score"]
    other = graph_engine(name, graphs_of(parts, 20), preprocessing, (48, 48), "uint8", 1)
    expected = plain.calls["full"](plain.stack([plain.resize(array) for array in arrays]))
    batch = other.stack([other.resize(array) for array in arrays])
    unit = torch.from_numpy(batch).permute(0, 3, 1, 2) / 255
    for calls, x in ((other.calls, batch), (plain.calls, unit)):
        for a, b, c in zip(calls["full"](x), calls["score"](calls["backbone"](x)), expected, strict=True):
            np.testing.assert_allclose(a, c, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(b, c, rtol=1e-4, atol=1e-5)
    own = other.enlarge(np.asarray(expected[1][0]), 70, 90)
    np.testing.assert_allclose(own, plain.enlarge(expected[1][0], 70, 90), rtol=1e-4, atol=1e-5)


def test_what_is_written(run, tmp_path, monkeypatch, caplog):
    """Engines that have no export are left out."""
    pytest.importorskip("onnxruntime", reason="no onnxruntime here: pip install blemish[export]")

    def refuse(*_):
        raise InputError("no graph")

    monkeypatch.setattr(bench, "traced", refuse)
    page, threads = tmp_path / "page.md", torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    page.write_text("before\n<!-- latency: begin -->\nold\n<!-- latency: end -->\nafter\n")
    rows, rates = bench_run(config(run, "engines=[torch,onnxruntime]", f"output='{tmp_path}/b.json'", f"doc='{page}'"))
    assert torch.get_num_threads() == threads + 1
    torch.set_num_threads(threads)
    assert "no graph" in caplog.text
    assert [rate[:3] for rate in rates] == [("torch", 1, 1), ("torch", 1, 2)] and all(rate.images_per_second > 0 for rate in rates)
    assert len(bench.best([*rates, Rate("torch", 2, 1, 9.0)])) == 2
    stages = [("torch", n, stage) for n in (1, 2) for stage in STAGES]
    assert [(r.engine, r.batch, r.stage) for r in rows] == [("any", 1, "decode"), *stages]
    assert all(0 < r.median <= r.p95 <= r.p99 and r.calls == 3 for r in rows)
    written = json.loads((tmp_path / "b.json").read_text())
    assert [Row(**row) for row in written["milliseconds"]] == rows and [Rate(**rate) for rate in written["throughput"]] == rates
    assert (written["threads"], written["warmup"], written["repeats"], written["size"]) == (1, 1, 3, [48, 48])
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "48×48 px" in text and "1 threads" in text and "| torch | 2 | image to score |" in text and "- torch, 1 threads: " in text
    assert bench.table(rows).row_count == len(rows)


def test_stages_are_those_that_a_method_has(run, arrays):
    engine = torch_engine(load(run, "cpu")[1], preprocessing_of(load(run, "cpu")[0]), (48, 48))
    rows = measured("torch", engine, arrays, 1, plan(0, 1, maps=False))
    assert [r.stage for r in rows] == ["resize", "backbone", "score", "image to score"]
    engine = Engine(lambda a: a, np.stack, {"full": lambda batch: (batch.sum((1, 2, 3)),)}, lambda m, h, w: m)
    rows = measured("e", engine, [np.zeros((8, 8, 3))], 2, plan(0, 2))
    assert [(r.batch, r.stage) for r in rows] == [(2, "resize"), (2, "score"), (2, "image to score")]


def test_the_clock():
    calls = []

    def work(seconds: float) -> None:
        calls.append(seconds)
        time.sleep(seconds)

    found = timed(work, [0.002, 0.012], plan(warmup=3, repeats=4))
    assert calls == [0.002, 0.012] * 3 + [0.002]  # inputs take turns, and warm-up is not counted
    assert len(found) == 4 and min(found[0], found[2]) >= 12 > 2
    assert len(timed(work, [0.01], plan(warmup=1, repeats=1000, seconds=0.05))) < 10
    assert bench.row("e", 1, "s", list(range(101))) == Row("e", 1, "s", 50, 95, 99, 101)


@pytest.mark.parametrize("wrong", ["batch=0", "images=nowhere", "engines=[tensorrt]", "engines=torch", "seconds=0"])
def test_settings_that_measure_nothing_are_refused(run, wrong):
    with pytest.raises(InputError, match=wrong.partition("=")[0]):
        bench_run(config(run, wrong))
