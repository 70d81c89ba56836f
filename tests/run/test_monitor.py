"""The memory of a stream in monitor.json, alone and behind tools/predict.py."""

import json
import logging
import shutil

import numpy as np
import pytest
import torch
from support import composed, tiny_run

from blemish.edge.errors import InputError
from blemish.edge.monitor import CLAIMED, NOT_CLAIMED, Monitor
from blemish.run.predict import predict
from blemish.run.train import train

CALIBRATION = np.random.default_rng(0).normal(size=40).tolist()


def scores(count: int, shift: float = 0.0, seed: int = 1) -> list[float]:
    return (np.random.default_rng(seed).normal(size=count) + shift).tolist()


def monitor(path, on: bool = True, rate: float = 0.01, calibration=CALIBRATION) -> Monitor:
    return Monitor.open(path / "monitor.json", on, rate, calibration, 0)


def test_a_shift_ends_the_claim_and_says_since_when(tmp_path):
    watch = monitor(tmp_path)
    said = watch.take(scores(60) + scores(60, 3.0, seed=2))
    first = said.index(NOT_CLAIMED)
    assert 60 < first < 80 and said == [CLAIMED] * first + [NOT_CLAIMED] * (120 - first)
    watch.save()
    saved = json.loads((tmp_path / "monitor.json").read_text())
    assert saved["test"]["alarm"]["score"] == first + 1 and saved["test"]["bound"] == NOT_CLAIMED and saved["test"]["scores"] == 120
    assert f"since score {first + 1}" in watch.explain() and "not claimed any more" in watch.explain()
    assert monitor(tmp_path).take(scores(3)) == [NOT_CLAIMED] * 3  # an alarm stays, whatever comes


def test_a_restart_changes_nothing(tmp_path):
    stream = scores(150, 0.5)
    once = monitor(tmp_path)
    once.take(stream)
    once.save()
    whole = json.loads((tmp_path / "monitor.json").read_text())
    (tmp_path / "monitor.json").unlink()
    for begin, end in ((0, 1), (1, 70), (70, 70), (70, 150)):
        part = monitor(tmp_path)
        part.take(stream[begin:end])
        part.save()
    again = json.loads((tmp_path / "monitor.json").read_text())
    for one in (whole, again):
        if one["test"]["alarm"]:
            del one["test"]["alarm"]["time"]
    assert again == whole


def test_order_matters(tmp_path):
    """Sorted scores are no exchangeable stream, the same scores shuffled are."""
    stream = scores(300)
    assert NOT_CLAIMED not in monitor(tmp_path).take(stream)
    assert NOT_CLAIMED in monitor(tmp_path).take(sorted(stream))


def test_off_sums_up_and_lets_the_test_wait(tmp_path):
    off = monitor(tmp_path, on=False, calibration=[])
    off.take(scores(50, 99.0))
    off.save()
    saved = json.loads((tmp_path / "monitor.json").read_text())
    assert saved["test"] is None and saved["summary"]["count"] == 50
    assert saved["summary"]["mean"] == pytest.approx(np.mean(scores(50, 99.0)))
    # another detector's summary makes room
    on = monitor(tmp_path)
    assert on.summary.count == 0
    on.take(scores(10))
    on.save()
    off = monitor(tmp_path, on=False)
    assert off.take(scores(10, 99.0)) == [CLAIMED] * 10 and off.drift.count == 10 and off.summary.count == 20
    off.save()
    assert monitor(tmp_path).drift.count == 10


def test_refuses(tmp_path):
    watch = monitor(tmp_path)
    watch.take(scores(3))
    watch.save()
    for change, message in (
        ({"rate": 0.05}, r"monitor_rate=0\.05: .*0\.01"),
        ({"calibration": []}, "protocol=clean"),
        ({"calibration": CALIBRATION[:-1]}, "other calibration scores"),
        ({"calibration": CALIBRATION[:-1], "on": False}, "other calibration scores"),
    ):
        with pytest.raises(InputError, match=message):
            monitor(tmp_path, **change)
    for text in ("", "{}", "[]", (tmp_path / "monitor.json").read_text()[:200], '{"test": null}'):
        (tmp_path / "monitor.json").write_text(text)
        with pytest.raises(InputError, match=r"monitor\.json: damaged"):
            monitor(tmp_path)


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "padim"
    train(tiny_run(tiny, folder, "model=padim"))
    return folder


def told(run, source, output, *overrides: str) -> int:
    return len(
        predict(composed(f"run='{run}'", f"input='{source}'", f"output='{output}'", "device=cpu", *overrides, config="predict")).rows
    )


def test_prediction_with_a_monitor(finished, tiny, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    assert told(finished, tiny / "normal_test", tmp_path, "monitor=on", "monitor_rate=0.2") == 6
    assert "bound on false alarms is claimed" in caplog.text
    rows = [row.split(",") for row in (tmp_path / "scores.csv").read_text().splitlines()]
    assert rows[0][-1] == "bound" and {row[-1] for row in rows[1:]} == {CLAIMED}
    for _ in range(2):
        told(finished, tiny / "square", tmp_path, "monitor=on", "monitor_rate=0.2")
    assert caplog.records[-1].levelno == logging.WARNING and "not claimed any more" in caplog.text
    rows = [row.split(",") for row in (tmp_path / "scores.csv").read_text().splitlines()]
    assert {row[-1] for row in rows[1:]} == {NOT_CLAIMED}
    assert json.loads((tmp_path / "monitor.json").read_text())["summary"]["count"] == 18


def test_prediction_without_a_monitor_sums_up(finished, tiny, tmp_path):
    told(finished, tiny / "normal_test", tmp_path)
    first = (tmp_path / "scores.csv").read_text()
    told(finished, tiny / "normal_test", tmp_path)
    assert (tmp_path / "scores.csv").read_text() == first and "bound" not in first
    metadata = json.loads((tmp_path / "monitor.json").read_text())
    values = [float(row.split(",")[1]) for row in first.splitlines()[1:]]
    assert metadata["summary"]["count"] == 12 and metadata["test"] is None
    assert metadata["summary"]["mean"] == pytest.approx(np.mean(values)) and metadata["summary"]["quantiles"]["0.5"] == pytest.approx(
        np.median(values)
    )
    told(finished, tiny / "normal_test", tmp_path / "elsewhere", f"monitor_file='{tmp_path / 'monitor.json'}'")
    assert json.loads((tmp_path / "monitor.json").read_text())["summary"]["count"] == 18
    assert not (tmp_path / "elsewhere" / "monitor.json").exists()


def test_a_monitor_needs_calibration_scores(finished, tiny, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    state = torch.load(run / "model.ckpt", weights_only=True)
    state["state_dict"]["calibration"] = torch.empty(0, 2)
    torch.save(state, run / "model.ckpt")
    with pytest.raises(InputError, match="protocol=clean"):
        told(run, tiny / "normal_test", tmp_path / "out", "monitor=on")
