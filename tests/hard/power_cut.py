"""Runs that are killed, each in a process forked from this one, which has everything loaded: what `test_power_cut.py` starts.

Arguments: the folder of the data, a folder to work in, and as JSON {method: [number of kills, overrides]}.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from support import composed, tiny_run

from blemish.files import is_locked
from blemish.run.checkpoint import contents, load
from blemish.run.record import FINISHED, read_record
from blemish.run.train import train

TINY, PLACE = Path(sys.argv[1]), Path(sys.argv[2])
GROUP = 5  # kills that one folder and one store have to bear
WRITES = {"open", "os.rename", "os.link", "os.remove", "os.mkdir"}  # audit events around what is written


def forked(work: Callable[[], object], log: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        signal.alarm(100)
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def killed(pid: int) -> bool:
    """Wait for the end of a process: True for a kill, False for an end of its own, AssertionError for an error."""
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, -signal.SIGKILL), f"exit status {status}\n{(PLACE / 'log.txt').read_text()[-4000:]}"
    return status != 0


def run(overrides: list[str], folder: Path, store: Path, resumed: bool) -> None:
    if resumed:
        train(composed(f"resume='{folder}'"))
    else:
        options = ["store=on", f"store.root='{store}'", "batch_size=1", "save.pictures=1", "save.curves=false"]
        train(tiny_run(TINY, folder, *overrides, *options))


def counted(work: Callable[[], object], folder: Path, last: int | None) -> Callable[[], None]:
    """The work, killed at its `last` event of writing below the folder; without one, the file `events` tells how many there were."""

    def counting() -> None:
        seen = 0

        def hook(event: str, arguments: tuple) -> None:
            nonlocal seen
            if event not in WRITES or not str(arguments[0]).startswith(str(folder)):
                return
            if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
                return
            seen += 1
            if seen == last:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        work()
        if last is None:
            (PLACE / "events").write_text(str(seen))

    return counting


def results(folder: Path) -> tuple[dict, str]:
    metrics = json.loads((folder / "metrics.json").read_text())
    return {name: value for name, value in metrics.items() if not name.endswith("_seconds")}, (folder / "scores.csv").read_text()


def assert_whole(folder: Path) -> None:
    """No file has its name and not its content."""
    for path in folder.glob("[!.]*.json"):
        json.loads(path.read_text())
    for path in folder.glob("[!.]*.ckpt"):
        contents(path)
    if (folder / "model.ckpt").exists() and (folder / "config.yaml").exists():
        load(folder, "cpu")


def finished(folder: Path) -> bool:
    return (read_record(folder) or {}).get("status") == FINISHED


def undisturbed(overrides: list[str], place: Path) -> tuple[float, int, tuple[dict, str]]:
    """Seconds, events of writing, and results of a run that nothing happens to; AssertionError if a second one differs."""
    for attempt in ("first", "second"):
        began, folder = time.monotonic(), place / attempt
        work = partial(run, overrides, folder, folder / "store", False)
        assert not killed(forked(counted(work, PLACE, None), PLACE / "log.txt"))
        seconds = time.monotonic() - began
    expected = results(place / "first")
    assert results(place / "second") == expected, "two undisturbed runs differ"
    return seconds, int((PLACE / "events").read_text()), expected


def trial(method: str, most: int, overrides: list[str]) -> dict:
    """Kill runs of a method until there were `most`; each GROUP of them in one folder with one store, then a run that is left alone."""
    place, rng = PLACE / method, random.Random(method)
    place.mkdir()
    overrides = [f"model={method}", *overrides]
    seconds, events, expected = undisturbed(overrides, place)
    told = {"moment": 0, "write": 0, "resumed": 0, "runs": 0}
    while told["moment"] + told["write"] < most:
        folder, store, borne = place / f"run{told['runs']}", place / f"store{told['runs']}", 0
        while borne < GROUP:
            resumed = method != "padim" and (folder / "config.yaml").is_file() and rng.random() < 0.7
            work = partial(run, overrides, folder, store, resumed)
            kind = rng.choice(["moment", "write"])
            if kind == "write":
                # the later events of a run that finds its store filled never come: the earlier ones are more likely
                pid = forked(counted(work, PLACE, 1 + int(events * rng.random() ** 1.5)), PLACE / "log.txt")
            else:
                pid = forked(work, PLACE / "log.txt")
                time.sleep(seconds * rng.random())
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if not killed(pid):
                break  # it was quicker, or had fewer events
            borne += 1
            told[kind] += 1
            told["resumed"] += resumed
            assert_whole(folder)
        if not finished(folder):
            resumed = method != "padim" and (folder / "config.yaml").is_file()
            assert not killed(forked(partial(run, overrides, folder, store, resumed), PLACE / "log.txt"))
        assert finished(folder)
        assert_whole(folder)
        assert results(folder) == expected, f"{folder} after {borne} kills"
        assert not is_locked(folder)  # which removes the lock of a run that was killed when it had finished
        left = [path.name for path in folder.rglob(".*")]
        assert not left, f"{folder}: {left} left"
        parts = list(store.rglob(".part-*"))
        assert len(parts) <= borne, f"{store}: {len(parts)} parts left of {borne} kills"
        shutil.rmtree(folder)
        shutil.rmtree(store, ignore_errors=True)
        told["runs"] += 1
    return told | {"seconds": seconds, "events": events}


torch.set_num_threads(1)
(PLACE / "temporary").mkdir()
os.environ["TMPDIR"] = str(PLACE / "temporary")
told = {method: trial(method, *metadata) for method, metadata in json.loads(sys.argv[3]).items()}
strays = [path.name for path in (PLACE / "temporary").iterdir()]
assert not strays, f"left in the system's folder for temporary files: {strays}"
sys.stdout.write(json.dumps(told) + "\n")
