"""Whole runs as a user makes them: what is left behind, again the same, and what happens when something is wrong."""

import csv
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from support import CONFIGS, DRAWN, composed, tiny_overrides, tiny_run

from blemish.edge.errors import InputError
from blemish.run.checkpoint import load
from blemish.run.predict import predict
from blemish.run.record import METRICS, read_record
from blemish.run.test import test as retest
from blemish.run.train import train

ROOT = CONFIGS.parent


def without_times(metrics: dict) -> dict:
    return {key: value for key, value in metrics.items() if not key.endswith("_seconds")}


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    return folder, train(tiny_run(tiny, folder, "logger=csv", *DRAWN))


def rows_of(path: Path) -> list[dict]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_leaves_every_file(finished):
    folder, metrics = finished
    files = {"config.yaml", "model.ckpt", "metrics.json", "scores.csv", "manifest.csv", "curves.png", "curves.json", "record.json"}
    assert {path.name for path in folder.iterdir()} == {*files, "images", "logs"}
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    assert {*METRICS, "fit_seconds", "test_seconds"} <= metrics.keys()
    assert metrics["defects"].keys() >= {"square"}
    assert len(list((folder / "images").glob("*.png"))) == 4
    record = read_record(folder)
    assert record["status"] == "finished"
    assert record["counts"] == {"calibrate/good": 6, "test/good": 6, "test/square": 6, "train/good": 18}
    assert all(record[key] for key in ("method", "seconds", "environment", "manifest_digest", "weights_digest", "peak_memory_mb"))
    assert "${" not in (folder / "config.yaml").read_text()
    rows = rows_of(folder / "scores.csv")
    assert list(rows[0])[:5] == ["path", "label", "score", "threshold", "decision"]
    assert len(rows) == 12
    assert all((float(row["score"]) > float(row["threshold"])) == bool(int(row["decision"])) for row in rows)


def test_checkpoint_needs_no_unpickling(finished):
    checkpoint = torch.load(finished[0] / "model.ckpt", weights_only=True)
    assert checkpoint["hyper_parameters"]["n_features"] == 100


def test_testing_again_gives_identical_numbers(finished, tmp_path):
    folder, metrics = finished
    again = retest(composed(f"run='{folder}'", f"output='{tmp_path / 'again'}'", "device=cpu", config="test"))
    assert without_times(again) == without_times(metrics)
    assert (tmp_path / "again" / "scores.csv").read_text() == (folder / "scores.csv").read_text()
    with pytest.raises(InputError, match="output=.*holds the model"):
        retest(composed(f"run='{folder}'", f"output='{folder}'", config="test"))


def test_predicts_in_the_images_own_pixels(finished, tiny, tmp_path):
    folder = finished[0]
    source = tmp_path / "in put" / "ä"
    source.mkdir(parents=True)
    large = Image.open(tiny / "square" / "000.png").resize((200, 90))
    large.save(source / "große.png")
    large.save(source / "große.jpg")
    large.convert("RGB").save(source.parent / "other.bmp")
    cfg = composed(f"run='{folder}'", f"input='{source.parent}'", f"output='{tmp_path / 'out'}'", "device=cpu", config="predict")
    assert len(predict(cfg).rows) == 3
    written = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("[!.]*.*"))
    kinds = ("map", "mask", "overlay")
    expected = [f"{n}_{k}.png" for n in ("other", "ä/große_jpg", "ä/große_png") for k in kinds]
    assert written == sorted([*expected, "monitor.json", "results.jsonl", "scores.csv"])
    for kind, dtype in (("map", np.uint16), ("mask", np.uint8), ("overlay", np.uint8)):
        array = np.asarray(Image.open(tmp_path / "out" / f"other_{kind}.png"))
        assert array.shape[:2] == (90, 200)
        assert array.dtype == dtype
    rows = {Path(row["path"]).name: row for row in rows_of(tmp_path / "out" / "scores.csv")}
    values = np.asarray(Image.open(tmp_path / "out" / "other_map.png")) / 65535
    low, high = (float(rows["other.bmp"][name]) for name in ("map_min", "map_max"))
    assert low < high
    assert values.min() == 0
    assert values.max() == 1


def test_too_few_calibration_images_are_said(finished, tiny, tmp_path, caplog):
    train(tiny_run(tiny, tmp_path / "run"))
    assert "cannot be promised" in caplog.text  # 6 images, alpha 0.05
    assert read_record(tmp_path / "run")["calibration"]["alpha"] == pytest.approx(1 / 7)


def test_paper_protocol_trains_on_all_and_decides_nothing(tiny, tmp_path):
    train(tiny_run(tiny, tmp_path / "run", "protocol=paper"))
    record = read_record(tmp_path / "run")
    assert record["counts"]["train/good"] == 24
    assert record["calibration"]["value"] is None
    assert {row["decision"] for row in rows_of(tmp_path / "run" / "scores.csv")} == {""}


def test_an_epoch_of_so_many_images(tiny, tmp_path):
    more = ["model=lake", "model.latent=4", "model.components=4", "trainer.max_epochs=2", "batch_size=8", "store=off"]
    runs = {size: tmp_path / str(size) for size in (None, 5, 18, 40)}
    for size, run in runs.items():
        train(tiny_run(tiny, run, *more, f"epoch_size={'null' if size is None else size}"))
    records = [read_record(run) for run in runs.values()]
    assert [(record["epochs"], record["epoch_size"]) for record in records] == [(2, size) for size in runs]
    models = {size: load(run, "cpu")[1] for size, run in runs.items()}
    assert [len(model.points) for model in models.values()] == [18] * 4  # its density knows every image once, whatever an epoch is
    parameters = {size: torch.cat([value.flatten() for value in model.encoder.parameters()]) for size, model in models.items()}
    assert torch.equal(parameters[None], parameters[18])
    assert not torch.equal(parameters[5], parameters[40])
    with pytest.raises(InputError, match="epoch_size=5: .*null"):
        train(tiny_run(tiny, tmp_path / "padim", "epoch_size=5"))


def test_everything_can_be_switched_off(tiny, tmp_path):
    train(tiny_run(tiny, tmp_path / "run", "save.checkpoint=false", "save.scores=false"))
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"config.yaml", "metrics.json", "manifest.csv", "record.json"}


@pytest.mark.parametrize("logger", ["tensorboard", "wandb"])
def test_loggers(logger, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    extra = ["logger.offline=true", "sweep.name=cells-of-one-sweep"] if logger == "wandb" else []
    train(tiny_run(tiny, tmp_path / "run", f"logger={logger}", *DRAWN, *extra))
    written = [path.name for path in (tmp_path / "run").rglob("*")]
    assert any(name.startswith("events.out") if logger == "tensorboard" else name.endswith(".wandb") for name in written)
    if logger == "wandb":
        (log,) = (tmp_path / "run").rglob("*.wandb")
        assert b"cells-of-one-sweep" in log.read_bytes()
        assert b"image_auroc" in log.read_bytes()
        kinds = [path.name.partition("_")[0] for path in (tmp_path / "run").rglob("media/images/*.png")]
        assert kinds.count("curves") == 1
        assert kinds.count("images") == 4


def test_a_finished_run_is_not_overwritten(finished, tiny):
    before = (finished[0] / "scores.csv").read_text()
    with pytest.raises(InputError, match="overwrite=true"):
        train(tiny_run(tiny, finished[0]))
    assert (finished[0] / "scores.csv").read_text() == before


def test_an_unusable_results_folder_is_named(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file/run.*run_dir="):
        train(tiny_run(tiny, tmp_path / "file" / "run"))


def test_a_failed_run_says_so_in_its_folder(tiny, tmp_path):
    data = tmp_path / "data"
    for part in ("normal", "normal_test", "square", "masks"):
        (data / part).mkdir(parents=True)
        for path in (tiny / part).iterdir():
            os.link(path, data / part / path.name)
    broken = data / "square" / "003.png"
    content = broken.read_bytes()
    broken.unlink()
    broken.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"square/003\.png"):
        train(tiny_run(data, tmp_path / "run"))
    record = read_record(tmp_path / "run")
    assert record["status"] == "failed"
    assert "003.png" in record["error"]["message"]
    train(tiny_run(data, tmp_path / "skipping", "data.on_error=skip"))
    counts = read_record(tmp_path / "skipping")["counts"]
    assert counts["skipped/square"] == 1


def test_a_failed_start_leaves_no_folder_but_one_that_was_there(tiny, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    for folder in ("runs/deep/one", "mine"):
        for option in ("tiling=128", "+trainer.max_epocs=3"):
            with pytest.raises(InputError, match=option.partition("=")[0].lstrip("+")):
                train(tiny_run(tiny, tmp_path / folder, "model=padim", "store=on", option))
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert (tmp_path / "mine" / "notes.txt").exists() and read_record(tmp_path / "mine")["status"] == "failed"


def test_wrong_runs_are_refused(finished, tmp_path):
    with pytest.raises(InputError, match=r"no config\.yaml"):
        load(tmp_path)
    config = OmegaConf.load(finished[0] / "config.yaml")
    (tmp_path / "model.ckpt").write_bytes((finished[0] / "model.ckpt").read_bytes()[:5000])
    OmegaConf.save(config, tmp_path / "config.yaml")
    with pytest.raises(InputError, match="not a complete checkpoint"):
        load(tmp_path)


@pytest.mark.parametrize("place", ["model", "data", "trainer", "logger", "model.backbone", "data.root", "save"])
@pytest.mark.parametrize(
    "target", ["os.system", "blemish.methods.noise_residual.torch.load", "lightning.pytorch.loggers.csv_logs.os.system"]
)
def test_a_strangers_config_calls_nothing_else(place, target, finished, tmp_path):
    config = OmegaConf.load(finished[0] / "config.yaml")
    OmegaConf.update(config, place, {"_target_": target, "command": "touch /tmp/owned"}, force_add=True)
    OmegaConf.save(config, tmp_path / "config.yaml")
    (tmp_path / "model.ckpt").touch()
    with pytest.raises(InputError, match=target):
        load(tmp_path)


def test_notes_of_lightning_are_not_printed(finished):
    assert logging.getLogger("lightning.pytorch").level >= logging.WARNING


@pytest.mark.slow
def test_ctrl_c_during_fit_leaves_a_record_and_no_checkpoint(tiny, tmp_path):
    command = [sys.executable, str(ROOT / "tools" / "train.py"), "model=padim", *tiny_overrides(tiny), f"run_dir={tmp_path / 'run'}"]
    # one image a batch and large images, so that the fit lasts long enough to be interrupted
    process = subprocess.Popen(
        [*command, "batch_size=1", "image_size=256"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # jobs in the background of a shell, and theirs, ignore it
    )
    deadline = time.time() + 300
    while not (tmp_path / "run" / "manifest.csv").exists() and time.time() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    assert process.wait(300) != 0
    record = read_record(tmp_path / "run")
    assert record["status"] == "interrupted"
    assert not list((tmp_path / "run").glob("model.ckpt*"))
