"""Sweeps as a user starts them: cells that fail, that take too long, that are resumed, and those that other launchers run."""

import csv
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from support import CONFIGS, tiny_overrides

from blemish.edge.errors import InputError
from blemish.files import is_locked, release
from blemish.run.config import first_values
from blemish.run.record import Record, finish_for, lock_run_folder, read_record
from blemish.run.sweep import apart, cell_name, pinned, quoted

TRAIN = CONFIGS.parent / "tools" / "train.py"


def command(root: Path, *overrides: str) -> list[str]:
    return [sys.executable, str(TRAIN), "-m", *tiny_overrides(root), "sweep.name=s", *overrides]


def sweep(root: Path, place: Path, *overrides: str) -> tuple[int, str, dict[str, dict]]:
    """Exit status, what was said, and the rows of cells.csv by the cells' names."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command(root, *overrides), cwd=place, env=environment, capture_output=True, text=True, timeout=600)
    with (place / "results/runs/sweeps/s/cells.csv").open() as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    return done.returncode, done.stdout + done.stderr, rows


@pytest.mark.slow
def test_failed_cells_are_listed_and_finished_ones_kept(tiny, tmp_path):
    status, said, rows = sweep(tiny, tmp_path, "model=padim,dfm", "batch_size=8,0", "store=on", "store.root=maps")
    assert status == 1
    assert [row["status"] for row in rows.values()] == ["failed", "finished"] * 2
    assert "batch_size=0: expected" in said
    assert all("batch_size=0" in row["error"] for row in rows.values() if row["status"] == "failed")
    folder = tmp_path / "results/runs/sweeps/s"
    stores = [read_record(folder / name)["store"] for name, row in rows.items() if row["status"] == "finished"]
    assert sum(store["computed"] > 0 for store in stores) == 1, "cells share what the first has computed"
    before = {name: (folder / name / "record.json").read_bytes() for name in rows}
    status, said, again = sweep(tiny, tmp_path, "model=padim,dfm", "batch_size=8,0", "store=on", "store.root=maps", "resume=true")
    assert status == 1
    assert said.count("finished before") == 2
    changed = {name for name in again if (folder / name / "record.json").read_bytes() != before[name]}
    assert changed == {name for name, row in rows.items() if row["status"] == "failed"}


@pytest.mark.slow
def test_seeds_are_repeated_only_where_the_first_was_quick(tiny, tmp_path):
    _, said, rows = sweep(tiny, tmp_path, "model=dfkde,dfm", "seed=0,1", "sweep.repeat_seconds=0")
    assert len(rows) == 2 and said.count("left out") == 2
    _, said, rows = sweep(tiny, tmp_path, "model=dfkde,dfm", "seed=0,1", "sweep.repeat_seconds=600", "resume=true")
    assert [row["status"] for row in rows.values()] == ["finished"] * 4, said


@pytest.mark.slow
def test_a_method_that_makes_no_sense_has_no_cell(tiny, tmp_path):
    status, said, rows = sweep(tiny, tmp_path, "model=dfkde,dfm", "sweep.without=[dfm]")
    assert status == 0 and len(rows) == 1 and said.count("left out, sweep.without has dfm") == 1, said


@pytest.mark.slow
def test_a_cell_over_its_limit_is_stopped_and_can_go_on(tiny, tmp_path):
    endless = ["model=autoencoder", "trainer.max_epochs=1000000", "sweep.minutes=0.15"]
    epochs = []
    for more in ([], ["resume=true"]):
        status, said, rows = sweep(tiny, tmp_path, *endless, *more)
        (row,) = rows.values()
        assert status == 1
        assert row["status"] == "timed out"
        assert "sweep.minutes=0.15" in said
        state = next((tmp_path / "results/runs/sweeps/s").glob("*/last.ckpt"))
        epochs.append(torch.load(state, weights_only=True)["epoch"])
    assert 0 < epochs[0] < epochs[1]


@pytest.mark.slow
def test_a_killed_sweep_takes_its_cell_with_it(tiny, tmp_path):
    process = subprocess.Popen(
        command(tiny, "model=autoencoder", "trainer.max_epochs=1000000"), cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 300
        while not (locks := list(tmp_path.glob("results/runs/sweeps/s/*/.lock"))) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert locks
        started = psutil.Process(process.pid).children(recursive=True)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    deadline = time.monotonic() + 40
    while any(child.is_running() for child in started) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert started
    assert not any(child.is_running() for child in started)


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "options"), [("joblib", ["hydra.launcher.n_jobs=2"]), ("submitit", [])])
def test_launchers(launcher, options, tiny, tmp_path):
    if not importlib.util.find_spec(f"hydra_plugins.hydra_{launcher}_launcher"):
        pytest.skip(f"hydra-{launcher}-launcher is not installed")
    status, said, rows = sweep(tiny, tmp_path, f"launch={launcher}", *options, "model=padim,dfm")
    assert status == 0, said
    assert [row["status"] for row in rows.values()] == ["finished"] * 2


@pytest.mark.slow
def test_search_sees_drawn_defects_and_no_test_image(tiny, tmp_path):
    if not importlib.util.find_spec("hydra_plugins.hydra_optuna_sweeper"):
        pytest.skip("hydra-optuna-sweeper is not installed")
    tried = ["sweep=search", "model=padim", "hydra.sweeper.n_trials=2", "model.sigma=choice(1,2)", "store.root=maps"]
    status, said, rows = sweep(tiny, tmp_path, *tried)
    assert status == 0, said
    folder = tmp_path / "results/runs/sweeps/s"
    assert len(rows) in (1, 2)  # a setting that is proposed again is not run again
    best = (folder / "optimization_results.yaml").read_text()
    metrics = [json.loads((folder / name / "metrics.json").read_text()) for name in rows]
    assert f"{max((one['image_auroc'] + one['aupro']) / 2 for one in metrics):.6f}"[:7] in best
    tested = {path.read_bytes() for part in ("normal_test", "square") for path in (tiny / part).iterdir()}
    seen = {path.read_bytes() for path in folder.glob("data/*/*/*.png")}
    assert len(seen) > 24
    assert not tested & seen


def test_a_search_has_no_other_objective(tiny):
    with pytest.raises(InputError, match="objective=image_auroc: expected .*synthetic"):
        pinned(["model=padim", *tiny_overrides(tiny), "objective=image_auroc"])


def test_globs_name_the_categories_that_are_there(tmp_path):
    for name in ("screw", "a b", "bolt's"):
        (tmp_path / name / "train").mkdir(parents=True)
    (tmp_path / "notes").mkdir()
    more, folder = pinned(["model=padim,dfm", "data=mvtec", f"data.root='{tmp_path}'", "data.category=glob(*)", "sweep.name=n"])
    assert more == ["sweep.name=n", r"data.category='a b','bolt\'s','screw'"]
    assert folder == Path("results/runs/sweeps/n")
    more, _ = pinned(["data=mvtec", f"data.root='{tmp_path}'", "data.category=glob([s*,b*],exclude=*w)", "sweep.name=n"])
    assert more[1] == r"data.category='bolt\'s'"
    more, _ = pinned(["sweep=one_pass", "data=mvtec", f"data.root='{tmp_path}'"])
    assert more == ["sweep.name=one_pass", r"data.category='a b','bolt\'s','screw'"]
    with pytest.raises(InputError, match="none of a b, bolt's, screw"):
        pinned(["data=mvtec", f"data.root='{tmp_path}'", "data.category=glob(z*)"])
    with pytest.raises(InputError, match="several data sets"):
        pinned(["data=mvtec,mtd", f"data.root='{tmp_path}'", "data.category=glob(*)"])
    with pytest.raises(InputError, match=r"sweep\.name=a/b"):
        pinned(["sweep.name=a/b"])


def test_names_of_cells():
    one = cell_name(["seed=0", "model=padim", "data.category='a b'", "sweep.name=x", "logger=none"])
    assert one.startswith("padim_a-b_0-")
    assert one == cell_name(["data.category='a b'", "model=padim", "seed=0", "resume=true"])
    assert one != cell_name(["data.category='a-b'", "model=padim", "seed=0"])
    long = cell_name([f"model.key{i}={'/' * 40}x" for i in range(40)])
    assert len(long) < 100
    assert "/" not in long


def test_quoting_survives_hydra():
    from hydra.core.override_parser.overrides_parser import OverridesParser

    for text in ("plain", "a b", "it's", "back\\slash", "comma,", "${x}", "tail\\"):
        assert OverridesParser.create().parse_override(f"key={quoted(text)}").value() == text
    assert first_values(["x=3,4", "y=glob(*)", "z=interval(1,2)"]) == ["x=3", "z=1.0"]


def test_a_run_that_could_not_write_its_end(tmp_path):
    finish_for(tmp_path, "failed", "exit code -9", 3.0)
    record = read_record(tmp_path)
    assert (record["status"], record["error"]["message"], record["wall_seconds"]) == ("failed", "exit code -9", 3.0)


@pytest.mark.slow
def test_a_cell_that_another_sweep_is_at_is_left_to_it(tmp_path):
    lock_run_folder(tmp_path, overwrite=False)  # by this process, which lives
    Record(tmp_path, {})
    before = (tmp_path / "record.json").read_bytes()
    apart(tmp_path, os._exit, (2,), None, None)
    assert (tmp_path / "record.json").read_bytes() == before
    assert is_locked(tmp_path)
    release(tmp_path)
    apart(tmp_path, os._exit, (2,), None, None)
    record = read_record(tmp_path)
    assert (record["status"], record["error"]["message"][:11]) == ("failed", "exit code 2")
