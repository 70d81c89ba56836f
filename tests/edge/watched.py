"""What the tests of `watch` share, and by itself the test of kills: a scorer without a model, and simulated time.

An image of theirs is a text of its score and END; without END it is incomplete. Arguments: a folder to work in, files, kills.
"""

import collections
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np

from blemish.edge import journal
from blemish.edge.arrivals import Clock
from blemish.edge.errors import InputError
from blemish.edge.result import Result
from blemish.edge.watch import Scorer, Settings, Watch

THRESHOLD = 2.0
CALIBRATION = np.random.default_rng(0).normal(size=40).tolist()


def score(image) -> Result:
    text = image.read_text() if isinstance(image, Path) else f"{image.mean()} END"
    if not text.endswith(" END"):
        raise InputError(f"{image}: cut short")
    value, pixels = float(text.split()[0]), np.zeros((16, 24), np.uint8)
    return Result(value, 0.5, value > THRESHOLD, np.zeros((16, 24), np.float32), image=pixels, threshold=THRESHOLD, map_threshold=1.0)


SCORER = Scorer(score, CALIBRATION, "0123456789abcdef")


class Simulated(Clock):
    """A time that passes only where it is waited for."""

    def __init__(self):
        self.passed = 0.0

    def now(self) -> float:
        return self.passed

    def wall(self) -> float:
        return 1.8e9 + self.passed

    def sleep(self, seconds: float) -> None:
        self.passed += seconds


def watching(source: Path, output: Path, clock: Clock | None = None, post=None, scorer: Scorer = SCORER, arrivals=None, **more) -> Watch:
    """A watch that ends when nothing is left, with what it says in `printed` and `heard`."""
    printed, heard = [], []
    options = {"once": True, "settle": 0.0, "patience": 1.0, "interval": 0.01, "pictures": False, **more}
    work = Watch(scorer, Settings(str(source), str(output), **options), printed.append, heard.append, arrivals, clock, post)
    work.printed, work.heard = printed, heard
    return work


def lines(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "watch.jsonl").read_text().splitlines()]


# ---- kills


def burst(source: Path, begin: int, end: int) -> None:
    """Write files, every third in two halves with a pause between, every third under another name first."""
    halves = []
    for number in range(begin, end):
        path, text = source / f"{number % 7}" / f"{number:05}.png", f"{number / 1000} END"
        path.parent.mkdir(exist_ok=True)
        if number % 3 == 0:
            path.write_text(text[:-3])
            halves.append((path, text[-3:]))
        elif number % 3 == 1:
            (path.parent / ".part").write_text(text)
            (path.parent / ".part").rename(path)
        else:
            path.write_text(text)
    time.sleep(0.02)
    for path, rest in halves:
        with path.open("a") as file:
            file.write(rest)


def killed_at(kind: str, moment: int) -> None:
    """Let this process die at its n-th line: before it is in the index, or with half of it written."""
    note, write, seen = journal.Journal._note, os.write, collections.Counter()

    def dying(real, half):
        def call(*arguments):
            seen[kind] += 1
            if seen[kind] == moment:
                if half:
                    write(arguments[0], arguments[1][: len(arguments[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments)

        return call

    if kind == "unnoted":
        journal.Journal._note = dying(note, False)
    elif kind == "torn":
        os.write = dying(write, True)


def forked(source: Path, output: Path, kind: str, moment: int, once: bool) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        signal.alarm(300)
        killed_at(kind, moment)
        watching(source, output, once=once, patience=60.0, settle=0.01).run()
        os._exit(0)
    except BaseException as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        os._exit(1)


def main(place: Path, files: int, kills: int) -> None:
    source, output, rng, kinds = place / "in", place / "out", random.Random(0), collections.Counter()
    source.mkdir()
    written, died = 0, 0
    while died < kills or written < files:
        pid = forked(source, output, kind := rng.choice(["moment", "unnoted", "torn"]), rng.randint(1, max(2, 2 * files // kills)), False)
        if written < files:
            burst(source, written, written := min(written + -(-files // kills), files))
        end = time.monotonic() + (rng.random() * 0.3 if kind == "moment" else 1.5)
        while not (done := os.waitpid(pid, os.WNOHANG)[0]) and time.monotonic() < end:
            time.sleep(0.005)
        if not done:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        kinds[kind] += 1
        died += 1
        if rng.random() < 0.1:
            (output / ".watch.db").unlink(missing_ok=True)  # it is made again from the log
    status = os.waitstatus_to_exitcode(os.waitpid(forked(source, output, "none", 0, True), 0)[1])
    assert status == 0, status
    sys.stdout.write(json.dumps(kinds) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
