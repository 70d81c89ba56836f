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
from blemish.files import atomic_write, is_locked, plain, release, write_csv, write_json, write_text
from blemish.run import record
from blemish.run.record import Record, environment, git_state, lock_run_folder, read_record, truth_kind


def content(folder):
    return json.loads((folder / "record.json").read_text(encoding="utf-8"))


def test_text_is_written_as_given_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "new" / "größe 大きさ.txt"
    write_text(path, "α = 0.05\r\nβ\n")
    assert path.read_bytes() == "α = 0.05\r\nβ\n".encode()
    write_text(path, "second")
    assert path.read_text() == "second"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("moment", ["in the block", "while writing", "while renaming"])
def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch, moment):
    path = tmp_path / "metrics.json"
    path.write_text("old")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    if moment == "while renaming":
        monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(InputError, match=r"metrics\.json.*No space left on device.*run_dir="), atomic_write(path) as temporary:
        temporary.write_text("half of the n")
        if moment != "while renaming":
            full()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_of_another_kind_keeps_the_old_file_and_stays_itself(tmp_path):
    path = tmp_path / "scores.csv"
    write_csv(path, ["a"], [[1]])

    def rows():
        yield [2]
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_csv(path, ["a"], rows())
    assert path.read_text() == "a\n1\n"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_is_named_with_the_way_out(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    for path in (tmp_path / "file" / "a.json", tmp_path / "file" / "deeper" / "a.json"):
        with pytest.raises(InputError, match=r"file.*cannot write a\.json.*run_dir=PATH"):
            write_json(path, {})
    with pytest.raises(InputError, match=r"file.*run_dir=PATH"):
        lock_run_folder(tmp_path / "file" / "run", overwrite=True)

    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)  # the tests may run as root, whom no folder refuses
    with pytest.raises(InputError, match=f"{tmp_path}: cannot write a.txt there .Permission denied.*run_dir=PATH"):
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
    }
    write_json(tmp_path / "a.json", value | {"named": Threshold(1.0, 0.05, 0.05, 19)})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    back = json.loads(text)
    assert list(back) == ["z", "a", "t", "p", "n", "nan", "named"]
    assert back["z"] == 0.1 + 0.2
    assert back["a"] == float(np.float32(0.1))
    assert back["t"] == [1.5, None]
    assert back["n"] == 3
    assert back["nan"] is None
    assert back["named"]["alpha"] == 0.05
    assert os.sep + "ü" in text
    assert plain(True) is True


def test_csv_reads_back_as_written(tmp_path):
    odd = os.fsdecode(b"caf\xe9.png")  # a file name that is not UTF-8
    rows = [["a, b.png", 1, 0.1 + 0.2, None], [odd, -1, 1e-300, 0]]
    write_csv(tmp_path / "s.csv", ["path", "label", "score", "decision"], rows)
    with (tmp_path / "s.csv").open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        back = list(csv.reader(file))
    assert back[0] == ["path", "label", "score", "decision"]
    assert back[1] == ["a, b.png", "1", repr(0.1 + 0.2), ""]
    assert back[2] == [odd, "-1", "1e-300", "0"]


def test_environment_agrees_with_the_machine():
    here = environment()
    assert here["python"] == ".".join(map(str, sys.version_info[:3]))
    assert here["packages"]["torch"] == torch.__version__.split("+")[0] or here["packages"]["torch"] == torch.__version__
    assert {"lightning", "timm", "numpy", "blemish"} <= here["packages"].keys()
    assert here["torch_threads"] == torch.get_num_threads()
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
    assert git_state(package) == {"commit": commit, "dirty": False}
    (tmp_path / "notes.txt").write_text("not a source")
    assert git_state(package) == {"commit": commit, "dirty": False}
    (package / "b.py").write_text("2")
    assert git_state(package) == {"commit": commit, "dirty": True}
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "nowhere"))  # as inside a hook
    assert git_state(package) == {"commit": commit, "dirty": True}
    wheel = tmp_path / ".venv" / "lib" / "house"
    wheel.mkdir(parents=True)
    (wheel / "a.py").write_text("1")
    assert git_state(wheel) is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(package) is None  # no git


def test_truth_kind():
    mask, box = Sample("a", "test", 1, "x", mask="m"), Sample("b", "test", 1, "x", boxes="0 0 1 1")
    good = Sample("c", "test", 0, "good")
    assert truth_kind([good]) == "none"
    assert truth_kind([good, mask._replace(split="train")]) == "none"
    assert truth_kind([good, mask]) == "pixel masks"
    assert truth_kind([box, mask._replace(boxes="0 0 1 1"), good]) == "pixel masks and boxes rasterised to masks"
    assert truth_kind([box]) == "boxes rasterised to masks"


def test_the_life_of_a_run(tmp_path):
    run = Record(tmp_path, {"method": "padim", "seed": 0, "category": None})
    first = content(tmp_path)
    assert first["status"] == "running"
    assert first["method"] == "padim"
    assert first["ended"] is None
    assert set(record.FIELDS) <= first.keys()
    assert first["command"]
    run.note({"seconds": {"fit": np.float64(1.5)}})
    assert content(tmp_path)["seconds"] == {"fit": 1.5}
    run.finish({"scale": (0.0, 2.0)})
    last = content(tmp_path)
    assert last["status"] == "finished"
    assert last["error"] is None
    assert last["scale"] == [0, 2]
    assert last["started"] <= last["ended"]
    assert 0 <= last["wall_seconds"] < 60
    assert platform.system() == "Windows" or last["peak_memory_mb"]["host"] > 50
    assert list(last) == list(first)
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]
    assert read_record(tmp_path) == last


def test_a_fact_that_no_record_has_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no metod"):
        Record(tmp_path, {"metod": "padim"})


def test_a_failed_run_says_so(tmp_path):
    run = Record(tmp_path, {})
    run.fail(InputError("data.root=x: no such folder"))
    told = content(tmp_path)
    assert told["status"] == "failed"
    assert told["error"]["type"] == "InputError"
    assert told["error"]["message"] == "data.root=x: no such folder"
    assert told["error"]["time"] == told["ended"]


def test_errors_that_go_round_in_a_circle_come_to_an_end():
    first, second = ValueError("a"), ValueError("b")
    first.__context__, second.__cause__ = second, first
    assert not record.is_interruption(first)
    second.__cause__ = KeyboardInterrupt()
    assert record.is_interruption(first)


@pytest.mark.parametrize("how", ["directly", "as Lightning raises it"])
def test_an_interrupted_run_says_so(tmp_path, how):
    run = Record(tmp_path, {})
    if how == "directly":
        run.fail(KeyboardInterrupt())
    else:
        try:
            try:
                raise KeyboardInterrupt
            except KeyboardInterrupt:
                sys.exit(1)
        except SystemExit as error:
            run.fail(error)
    assert content(tmp_path)["status"] == "interrupted"


def test_a_record_that_cannot_be_written_does_not_hide_the_error_of_the_run(tmp_path, monkeypatch, caplog):
    run = Record(tmp_path, {})

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    run.fail(RuntimeError("the one to be raised"))
    assert "No space left" in caplog.text


def test_other_processes_of_a_distributed_run_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    lock_run_folder(tmp_path / "run", overwrite=False)
    Record(tmp_path / "run", {}).finish({})
    release(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def finished(folder, metadata):
    lock_run_folder(folder, overwrite=False)
    Record(folder, {}).finish(metadata)
    release(folder)


def test_a_finished_run_is_overwritten_only_when_told(tmp_path):
    finished(tmp_path, {"method": "knn", "pictures": ["images/good_a.png", "../outside.png"]})
    (tmp_path / "images").mkdir()
    kept = [tmp_path / "notes.txt", tmp_path / "images" / "holiday.png", tmp_path.parent / "outside.png"]
    gone = [tmp_path / "metrics.json", tmp_path / "images" / "good_a.png"]
    for path in kept + gone:
        path.write_text("x")
    with pytest.raises(InputError, match=r"finished run \(knn.*overwrite=true.*run_dir="):
        lock_run_folder(tmp_path, overwrite=False)
    assert all(path.exists() for path in kept + gone)
    assert not (tmp_path / ".lock").exists()
    lock_run_folder(tmp_path, overwrite=True)
    assert all(path.exists() for path in kept)
    assert not any(path.exists() for path in gone)
    assert read_record(tmp_path)["status"] == "interrupted", "until the next record takes its place"
    release(tmp_path)


def test_a_checkpoint_that_is_still_needed_is_kept(tmp_path):
    finished(tmp_path, {})
    (tmp_path / "model.ckpt").write_text("x")
    lock_run_folder(tmp_path, overwrite=True, keep=["model.ckpt"])
    assert (tmp_path / "model.ckpt").exists()
    release(tmp_path)


def test_a_failed_run_gives_way_and_foreign_files_do_not(tmp_path):
    lock_run_folder(tmp_path / "a", overwrite=False)
    Record(tmp_path / "a", {}).fail(RuntimeError("x"))
    release(tmp_path / "a")
    lock_run_folder(tmp_path / "a", overwrite=False)
    release(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "config.yaml").write_text("of another program")
    with pytest.raises(InputError, match=r"holds config\.yaml but no record"):
        lock_run_folder(tmp_path / "b", overwrite=False)
    assert (tmp_path / "b" / "config.yaml").read_text() == "of another program"


def test_two_claims_of_one_folder(tmp_path):
    lock_run_folder(tmp_path, overwrite=False)
    with pytest.raises(InputError, match=f"{tmp_path}: another process is writing to this folder; .*run_dir="):
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
@pytest.mark.skipif(platform.system() == "Windows", reason="there is no SIGKILL")
def test_the_lock_of_a_killed_process_is_none(tmp_path):
    killed(tmp_path)
    assert not is_locked(tmp_path)
    assert not (tmp_path / ".lock").exists()
    killed(tmp_path)
    lock_run_folder(tmp_path, overwrite=False)
    assert is_locked(tmp_path)
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
@pytest.mark.skipif(platform.system() == "Windows", reason="needs fork")
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
