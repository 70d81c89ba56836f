"""The record of a run, its folder, and the files that both are made of."""

import csv
import json
import multiprocessing
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from blemish.data.manifest import Sample
from blemish.edge.calibration import Threshold
from blemish.edge.errors import InputError
from blemish.files import atomic_write, is_locked, release, write_csv, write_json, write_text
from blemish.run import record
from blemish.run.record import Record, environment, git_state, lock_run_folder, read_record, truth_kind

no_windows = pytest.mark.skipif(platform.system() == "Windows", reason="there is neither fork nor SIGKILL")


def full(*_, **__):
    raise OSError(28, "No space left on device")


# ---- files


def test_text_is_written_as_given_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "new" / "größe 大きさ.txt"
    write_text(path, "α = 0.05\r\nβ\n")
    assert path.read_bytes() == "α = 0.05\r\nβ\n".encode()
    write_text(path, "second")
    assert path.read_text() == "second"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("moment", ["while writing", "while renaming"])
def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch, moment):
    path = tmp_path / "metrics.json"
    path.write_text("old")
    if moment == "while renaming":
        monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(InputError, match=r"metrics\.json.*No space left on device.*choose another folder"), atomic_write(path) as temporary:
        temporary.write_text("half of the n")
        if moment == "while writing":
            full()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_of_another_kind_keeps_the_old_file_and_stays_itself(tmp_path):
    path = tmp_path / "scores.csv"
    write_csv(path, ["a"], [[1]])
    with pytest.raises(ZeroDivisionError):
        write_csv(path, ["a"], ([1 / number] for number in (1, 0)))
    assert path.read_text() == "a\n1\n"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_is_named_with_the_way_out(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    for path in (tmp_path / "file" / "a.json", tmp_path / "file" / "deeper" / "a.json"):
        with pytest.raises(InputError, match=r"file.*a\.json.*choose another folder$"):
            write_json(path, {})
    with pytest.raises(InputError, match=r"file.*run_dir=PATH"):
        lock_run_folder(tmp_path / "file" / "run", overwrite=True)

    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)  # the tests may run as root, whom no folder refuses
    with pytest.raises(InputError, match=rf"{tmp_path}.*a\.txt.*Permission denied.*choose another folder$"):
        write_text(tmp_path / "a.txt", "")
    monkeypatch.setattr(Path, "mkdir", denied)
    with pytest.raises(InputError, match=r"run.*Permission denied.*run_dir=PATH"):
        lock_run_folder(tmp_path / "run", overwrite=False)


def test_json_keeps_order_and_full_precision_and_has_no_infinities(tmp_path):
    value = {
        "z": 0.1 + 0.2,
        "a": np.float32(0.1),
        "t": torch.tensor([1.5, torch.inf]),
        "p": Path("x") / "ü",
        "n": np.int64(3),
        "nan": np.nan,
        "flag": True,
        "named": Threshold(1.0, 0.05, 0.05, 19),
    }
    write_json(tmp_path / "a.json", value)
    back = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert list(back) == list(value)
    assert back.pop("named")["alpha"] == 0.05
    assert back == {
        "z": 0.1 + 0.2,
        "a": float(np.float32(0.1)),
        "t": [1.5, None],
        "p": str(Path("x") / "ü"),
        "n": 3,
        "nan": None,
        "flag": True,
    }


def test_csv_reads_back_as_written(tmp_path):
    odd = os.fsdecode(b"caf\xe9.png")  # a file name that is not UTF-8
    write_csv(tmp_path / "s.csv", ["path", "label", "score", "decision"], [["a, b.png", 1, 0.1 + 0.2, None], [odd, -1, 1e-300, 0]])
    with (tmp_path / "s.csv").open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [["path", "label", "score", "decision"], ["a, b.png", "1", repr(0.1 + 0.2), ""], [odd, "-1", "1e-300", "0"]]


# ---- metadata


def test_environment_agrees_with_the_machine():
    here = environment()
    assert here["python"] == platform.python_version()
    assert here["packages"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert {"lightning", "timm", "numpy", "blemish"} <= here["packages"].keys()
    assert 1 <= here["cores_usable"] <= here["cores"]
    assert len(here["gpus"]) == torch.cuda.device_count()
    assert here["date"].endswith("+00:00")
    if platform.system() == "Linux":
        assert here["cpu"]
        total = next(int(line.split()[1]) for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
        assert here["ram_mb"] == pytest.approx(total / 1024, rel=0.02)
    json.dumps(here, allow_nan=False)


def git(folder, *arguments):
    identity = {"GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b", "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@b"}
    settings = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | identity | settings).stdout.strip()


def test_git_state_tells_commit_and_changes_of_the_checkout_that_tracks_the_files(tmp_path, monkeypatch):
    package = tmp_path / "src" / "house"
    package.mkdir(parents=True)
    (package / "a.py").write_text("1")
    assert git_state(package) is None  # no checkout
    try:
        git(tmp_path, "init")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("there is no git")
    assert git_state(package) is None  # a checkout that does not track the files
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "one")
    commit = git(tmp_path, "rev-parse", "HEAD")
    (tmp_path / "notes.txt").write_text("not a source")
    assert git_state(package) == {"commit": commit, "dirty": False}
    (package / "b.py").write_text("2")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "nowhere"))  # as inside a hook
    assert git_state(package) == {"commit": commit, "dirty": True}
    wheel = tmp_path / ".venv" / "lib" / "house"
    wheel.mkdir(parents=True)
    (wheel / "a.py").write_text("1")
    assert git_state(wheel) is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(package) is None  # no git


def test_truth_kind():
    mask, box, good = Sample("a", "test", 1, "x", mask="m"), Sample("b", "test", 1, "x", boxes="0 0 1 1"), Sample("c", "test", 0, "good")
    assert truth_kind([good, mask._replace(split="train")]) == "none"
    assert truth_kind([good, mask]) == "pixel masks"
    assert truth_kind([box]) == "boxes rasterised to masks"
    assert truth_kind([box, mask._replace(boxes="0 0 1 1"), good]) == "pixel masks and boxes rasterised to masks"


# ---- the record


def test_the_life_of_a_run(tmp_path):
    run = Record(tmp_path, {"method": "padim", "seed": 0, "category": None})
    first = read_record(tmp_path)
    assert (first["status"], first["method"], first["ended"]) == ("running", "padim", None)
    assert {*record.FIELDS, "command", "environment"} <= first.keys()
    run.note({"seconds": {"fit": np.float64(1.5)}})
    assert read_record(tmp_path)["seconds"] == {"fit": 1.5}
    run.finish({"scale": (0.0, 2.0)})
    last = read_record(tmp_path)
    assert (last["status"], last["error"], last["scale"]) == ("finished", None, [0, 2])
    assert last["started"] <= last["ended"]
    assert 0 <= last["wall_seconds"] < 60
    assert platform.system() == "Windows" or last["peak_memory_mb"]["host"] > 50
    assert list(last) == list(first)
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]
    with pytest.raises(ValueError, match="metod"):
        run.note({"metod": "padim"})


def by_lightning() -> BaseException:
    try:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)
    except SystemExit as error:
        return error


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (InputError("data.root=x: no such folder"), "failed", "InputError"),
        (KeyboardInterrupt(), "interrupted", "KeyboardInterrupt"),
        (by_lightning(), "interrupted", "KeyboardInterrupt"),
    ],
)
def test_a_run_that_failed_or_was_stopped_says_so(error, status, kind, tmp_path):
    Record(tmp_path, {}).fail(error)
    written = read_record(tmp_path)
    assert (written["status"], written["error"]["type"], written["error"]["time"]) == (status, kind, written["ended"])
    assert status == "interrupted" or written["error"]["message"] == str(error)


def test_errors_that_go_round_in_a_circle_come_to_an_end():
    first, second = ValueError("a"), ValueError("b")
    first.__context__, second.__cause__ = second, first
    assert not record.is_interruption(first)
    second.__cause__ = KeyboardInterrupt()
    assert record.is_interruption(first)


def test_a_record_that_cannot_be_written_does_not_hide_the_error_of_the_run(tmp_path, monkeypatch, caplog):
    run = Record(tmp_path, {})
    monkeypatch.setattr(Path, "open", full)
    run.fail(RuntimeError("the one to be raised"))
    assert "No space left" in caplog.text


def test_other_processes_of_a_distributed_run_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    lock_run_folder(tmp_path / "run", overwrite=False)
    Record(tmp_path / "run", {}).finish({})
    release(tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ---- the folder


def test_a_finished_run_is_overwritten_only_when_told(tmp_path):
    Record(tmp_path, {}).finish({"method": "knn", "pictures": ["images/good_a.png", "../outside.png"]})
    (tmp_path / "images").mkdir()
    kept = [tmp_path / "notes.txt", tmp_path / "images" / "holiday.png", tmp_path.parent / "outside.png", tmp_path / "model.ckpt"]
    gone = [tmp_path / "metrics.json", tmp_path / "images" / "good_a.png"]
    for path in kept + gone:
        path.write_text("x")
    with pytest.raises(InputError, match=r"knn.*overwrite=true.*run_dir="):
        lock_run_folder(tmp_path, overwrite=False)
    assert all(path.exists() for path in kept + gone)
    assert not (tmp_path / ".lock").exists()
    lock_run_folder(tmp_path, overwrite=True, keep=["model.ckpt"])
    assert all(path.exists() for path in kept)
    assert not any(path.exists() for path in gone)
    assert read_record(tmp_path)["status"] == "interrupted", "until the next record takes its place"
    release(tmp_path)


def test_a_failed_run_gives_way_and_foreign_files_do_not(tmp_path):
    Record(tmp_path / "a", {}).fail(RuntimeError("x"))
    lock_run_folder(tmp_path / "a", overwrite=False)
    release(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "config.yaml").write_text("of another program")
    with pytest.raises(InputError, match=r"config\.yaml"):
        lock_run_folder(tmp_path / "b", overwrite=False)
    assert (tmp_path / "b" / "config.yaml").read_text() == "of another program"


def test_a_locked_folder_is_refused(tmp_path):
    lock_run_folder(tmp_path, overwrite=False)
    with pytest.raises(InputError, match=f"{tmp_path}: another process is writing.*run_dir="):
        lock_run_folder(tmp_path, overwrite=True)
    assert is_locked(tmp_path)
    release(tmp_path)
    release(tmp_path)
    assert not is_locked(tmp_path)
    lock_run_folder(tmp_path, overwrite=False)
    release(tmp_path)
    assert list(tmp_path.iterdir()) == []


def killed(folder):
    """Leave the lock of a process that was killed in a folder."""
    code = "import os, sys; from blemish.run.record import lock_run_folder; lock_run_folder(sys.argv[1], False); os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", code, str(folder)]).returncode
    assert (folder / ".lock").exists()


@pytest.mark.slow
@no_windows
def test_the_lock_of_a_killed_process_is_none(tmp_path):
    killed(tmp_path)
    assert not is_locked(tmp_path)
    assert not (tmp_path / ".lock").exists()
    killed(tmp_path)
    lock_run_folder(tmp_path, overwrite=False)
    release(tmp_path)
    (tmp_path / ".lock").write_text("of whatever")
    assert not is_locked(tmp_path)


def compete(folder, start, results):
    start.wait()
    try:
        lock_run_folder(folder, overwrite=False)
        results.put(True)
    except InputError:
        results.put(False)
    start.wait()  # nobody ends, and so gives its lock back, before all have tried


@pytest.mark.slow
@no_windows
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # the children only touch files
@pytest.mark.parametrize("stale", [False, True])
def test_of_many_processes_one_gets_the_folder(tmp_path, stale):
    if stale:
        killed(tmp_path)
    context = multiprocessing.get_context("fork")
    start, results = context.Barrier(8), context.Queue()
    children = [context.Process(target=compete, args=(tmp_path, start, results)) for _ in range(8)]
    for child in children:
        child.start()
    won = [results.get(timeout=120) for _ in children]
    for child in children:
        child.join()
    assert sum(won) == 1
