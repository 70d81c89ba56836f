"""Score what arrives, for days: each image once in a log that survives kills and full disks, alarms by webhook and on a page."""

import errno
import json
import math
import os
import signal
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .arrivals import Arrivals, Clock, Item, arrivals
from .checks import check_number, check_switch, check_text, check_whole
from .errors import InputError
from .journal import Journal
from .monitor import Monitor
from .outputs import encoded, remove_stale, write_whole
from .reading import file_digest
from .result import Result
from .runtime import Model
from .webhook import POSITION, SECRET, Post, Webhook

SAVED, MONITORED = 10, 600  # seconds between two times that log and index, and the monitor, are brought to the disk
NAP = 0.2  # seconds after which a wait looks whether to stop
SHOWN = 1  # seconds between two states of the page
RETRY = 1  # seconds before another try to write to a full disk
HOUR, RECENT = 3600, 60  # seconds of the alarms and of the rate that the health has
LAST = 1000  # images that its percentiles are of
TAIL = 2**22  # bytes of the log whose alarms the page lists after a start
FAREWELL = 10  # seconds for alarms that are not sent yet when nothing more arrives


@dataclass(frozen=True)
class Settings:
    """The keys of configs/watch.yaml that `blemish.edge` has too, as described and with the values that it has."""

    input: str
    output: str
    pictures: bool = True
    stdout: bool = False
    once: bool = False
    settle: float = 0.5
    patience: float = 10.0
    interval: float = 0.25
    queue: int = 8
    webhook: str | None = None
    monitor: bool = True
    monitor_rate: float = 0.01
    health: float = 60.0
    serve: bool = False
    port: int = 8765

    def __post_init__(self) -> None:
        """InputError for values that cannot be used."""
        check_text("", input=self.input, output=self.output)
        check_switch("", **{name: getattr(self, name) for name in ("pictures", "stdout", "once", "monitor", "serve")})
        check_number("", "[0, inf)", settle=self.settle, patience=self.patience)
        check_number("", "(0, inf)", interval=self.interval, health=self.health)
        check_number("", "(0, 1)", monitor_rate=self.monitor_rate)
        check_whole("", 1, queue=self.queue)
        check_whole("", 0, 65535, port=self.port)
        source, output = Path(self.input).expanduser(), Path(self.output).expanduser()
        if source.is_dir() and output.resolve().is_relative_to(source.resolve()):
            raise InputError(f"output={output}: inside of input={source}, where images are waited for; choose another folder")


class Scorer(NamedTuple):
    """A detector as it is needed here; a run's and an export's alike."""

    predict: Callable[[Path | np.ndarray], Result]
    calibration: Sequence[float]  # scores (n,) of held-out normal images
    model: str  # its digest, for the log


def exported(path: str | Path, threads: int | None = None) -> Scorer:
    """The detector of an export."""
    model = Model(Path(path).expanduser(), threads)
    return Scorer(lambda image: model.predict(image)[0], model.calibration, file_digest(Path(path).expanduser()))


class Watch:
    """The images of a source, one by one, until `stopping` or no more can come.

    source, clock, post: in place of those that the settings name, for tests.
    """

    def __init__(
        self,
        scorer: Scorer,
        settings: Settings,
        say: Callable[[str], None],
        tell: Callable[[str], None],
        source: Arrivals | None = None,
        clock: Clock | None = None,
        post: Post | None = None,
    ):
        self.scorer, self.settings, self.say, self.tell, self.clock = scorer, settings, say, tell, clock or Clock()
        self.output, self.stopping, self.trouble = Path(settings.output).expanduser(), False, None
        self.journal = Journal(self.output)
        self.images = self.failed = 0
        self.times: deque[tuple[float, float]] = deque(maxlen=LAST)  # of an image's end, and the seconds it took
        self.alarms: deque[list[int]] = deque(maxlen=HOUR // 60)  # minute, alarms in it
        self.saved = self.monitored = self.told = self.shown = self.clock.now()
        try:
            self._begin(source, post)
        except BaseException:
            self.journal.close()
            raise

    def _begin(self, source: Arrivals | None, post: Post | None) -> None:
        settings, seen = self.settings, self.journal.__contains__
        for folder in (self.output, self.output / "alarms"):
            remove_stale(folder, age=0)  # of a process that was killed
        self.monitor, self.page, self.webhook = self._monitor(), None, None
        if settings.serve:
            from .page import Page

            tail = (line for line, _ in self.journal.lines(max(self.journal.size - TAIL, 0)))
            self.page = Page(self.output, settings.port, self._image_of, tail)
            self.tell(f"watch: {self.page.address}")
        options = (settings.settle, settings.patience, settings.queue, settings.once)
        self.source = source or arrivals(settings.input, seen, self.clock, *options)
        if settings.webhook:
            self.webhook = Webhook(settings.webhook, os.environ.get(SECRET, ""), self.journal, self.tell, post)

    def _monitor(self) -> Monitor | None:
        """The monitor, with the scores that the log has since it was saved."""
        if not (self.settings.monitor and self.scorer.calibration):
            return None
        monitor = Monitor.open(self.output / "monitor.json", True, self.settings.monitor_rate, self.scorer.calibration, 0)
        if monitor.position is not None:
            begin = monitor.position if monitor.position <= self.journal.size else 0
            for line, _ in self.journal.lines(begin):
                if "score" in line:
                    monitor.take([line["score"]])
        return monitor

    def run(self) -> None:
        """Score until the end, then write and send what is left."""
        self._save()
        try:
            while not self.stopping:
                items = self.source.take()
                for item in items:
                    if self.stopping or not self.one(item):
                        break
                    self._regularly()
                if self.source.finished:
                    break
                if not items:
                    self._regularly()
                    self._wait(self.settings.interval)
            if self.trouble is None:
                self._save()
        finally:
            self.source.close()
            if self.page:
                self.page.close()
            if self.webhook:
                self.webhook.close(0 if self.stopping else FAREWELL)
            self.tell(self.line())
            self.journal.close()

    def one(self, item: Item) -> bool:
        """Score an image and log it; False if it could not be logged before the end, so that it is scored again after the next start."""
        began, result, values = self.clock.now(), None, {}
        try:
            result = self.scorer.predict(item.image)
            if not math.isfinite(result.score):
                raise InputError(f"a score of {result.score}")
            values = {key: value for key, value in result.to_dict().items() if key != "path"}
        except InputError as error:
            if self.source.again(item):
                return True
            result, values = None, {"error": str(error).removeprefix(f"{item.name}: ")}
        if self.source.changed(item):
            return True
        alarm, picture = bool(values.get("decision")), None
        if alarm and self.settings.pictures:
            picture = f"alarms/{item.id}.png"
            if not self._insist(lambda: self._picture(item, result)):
                return False
        if result and self.monitor:
            values["bound"] = self.monitor.take([result.score])[0]
        moment = datetime.fromtimestamp(self.clock.wall(), UTC)
        line = {"id": item.id, "time": f"{moment:%Y-%m-%dT%H:%M:%S.%f}Z", "name": item.name}
        line |= ({} if item.frame is None else {"frame": item.frame}) | values | {"picture": picture, "model": self.scorer.model}
        if not self._insist(lambda: self.journal.append(line)):
            return False
        self.source.done(item)
        self._count(began, alarm, result is None)
        if self.settings.stdout:
            try:
                self.say(json.dumps(line))
            except OSError as error:  # whoever read it is gone
                self.tell(f"watch: standard output: {error.strerror}")
                self.stopping = True
        if self.webhook and (alarm or result is None):
            self.webhook.new.set()
        if self.page:
            self.page.add(line, result)
        return True

    def _picture(self, item: Item, result: Result) -> None:
        """Write the overlay of an alarm, and of a frame, which is no file, the image itself."""
        pictures = {f"{item.id}.png": encoded(result.overlay())}
        if isinstance(item.image, np.ndarray):
            pictures[f"{item.id}_image.png"] = encoded(item.image, result=False)
        for name, data in pictures.items():
            try:
                write_whole(self.output / "alarms" / name, data)
            except InputError as error:
                raise error.__cause__ from None

    def _image_of(self, line: dict) -> Path | None:
        """The image of a line of the log as it was when it was scored; None if it is gone."""
        if "frame" in line:
            path = self.output / "alarms" / f"{line['id']}_image.png"
            return path if path.is_file() else None
        with suppress(OSError):
            return Path(line["name"]) if self.source.id_of(line["name"]) == line["id"] else None
        return None

    def _insist(self, write: Callable[[], None]) -> bool:
        """Write, and wait where there is no room, until there is; False if the end comes first."""
        while True:
            try:
                write()
            except OSError as error:
                trouble = f"{self.output}: cannot be written to ({error.strerror or error})"
                if trouble != self.trouble:
                    room = ": free some space" * (error.errno in (errno.ENOSPC, errno.EDQUOT))
                    self.tell(f"watch: {trouble}{room}; nothing is lost, images wait")
                self.trouble = trouble
                if self.stopping:
                    return False
                self._show()
                self._wait(RETRY)
            else:
                if self.trouble is not None:
                    self.tell("watch: written again")
                self.trouble = None
                return True

    def _count(self, began: float, alarm: bool, failed: bool) -> None:
        now = self.clock.now()
        self.images, self.failed = self.images + 1, self.failed + failed
        self.times.append((now, now - began))
        if alarm:
            if not self.alarms or self.alarms[-1][0] != now // 60:
                self.alarms.append([now // 60, 0])
            self.alarms[-1][1] += 1

    def _regularly(self) -> None:
        now = self.clock.now()
        if now - self.saved >= SAVED:
            self._save(end=False)
        if now - self.told >= self.settings.health:
            self.told = now
            self.tell(self.line())
        self._show()

    def _show(self) -> None:
        if self.page and self.clock.now() - self.shown >= SHOWN:
            self.shown = self.clock.now()
            self.page.show(self.state())

    def _wait(self, seconds: float) -> None:
        end = self.clock.now() + seconds
        while not self.stopping and (left := end - self.clock.now()) > 0:
            self.clock.sleep(min(left, NAP))

    def _save(self, end: bool = True) -> None:
        """Bring to the disk what is written, and the monitor unless it was lately: a start takes from the log what it lacks."""
        self.saved = now = self.clock.now()
        with suppress(InputError, OSError):  # a full disk, as the next line of the log tells
            self.journal.sync(**({POSITION: self.webhook.position} if self.webhook else {}))
            if self.monitor and (end or now - self.monitored >= MONITORED):
                self.monitor.position, self.monitored = self.journal.size, now
                self.monitor.save()

    def state(self) -> dict[str, Any]:
        """The health: images and failures since the start, rate per second, milliseconds an image, and what waits."""
        now, milliseconds = self.clock.now(), [1000 * seconds for _, seconds in self.times]
        recent = [end for end, _ in self.times if now - end <= RECENT]
        p50, p99 = np.percentile(milliseconds, (50, 99)).round(1).tolist() if milliseconds else (None, None)
        rate = len(recent) / max(now - recent[0], 1e-9) if len(recent) > 1 else 0.0
        state = {"images": self.images, "failed": self.failed, "rate": round(rate, 2), "p50": p50, "p99": p99}
        state |= {"waiting": self.source.waiting, "dropped": self.source.dropped}
        state["alarms"] = sum(count for minute, count in self.alarms if now // 60 - minute < HOUR // 60)
        if self.monitor:
            state |= {"drift": round(self.monitor.drift.log_wealth / np.log(10), 2), "drifted": self.monitor.alarm is not None}
        if self.webhook:
            state["webhook"] = {"sent": self.webhook.sent, "refused": self.webhook.refused, "trouble": self.webhook.trouble}
        return state | {"trouble": self.trouble or self.source.lost}

    def line(self) -> str:
        """The health in a line."""
        state = self.state()
        parts = [f"{state['images']} images", f"{state['failed']} failed", f"{state['rate']:g}/s"]
        parts += [] if state["p50"] is None else [f"p50 {state['p50']:g} ms, p99 {state['p99']:g} ms"]
        parts += [f"{state['waiting']} waiting", f"{state['dropped']} dropped", f"{state['alarms']} alarms in the last hour"]
        if self.monitor:
            parts.append(f"drift 10^{state['drift']:g}" + ", the bound on false alarms is not claimed" * state["drifted"])
        if hook := state.get("webhook"):
            parts.append(f"webhook {hook['sent']} sent, {hook['refused']} refused" + (f" ({hook['trouble']})" if hook["trouble"] else ""))
        return f"watch: {', '.join(parts)}" + (f"; {state['trouble']}" if state["trouble"] else "")


def watch(scorer: Scorer, settings: Settings, say: Callable[[str], None], tell: Callable[[str], None]) -> int:
    """Watch until SIGTERM, which ends with status 0, or Ctrl-C, which ends with 130; the image at work is finished first."""
    work, status = Watch(scorer, settings, say, tell), 0

    def end(number: int, _: object) -> None:
        nonlocal status
        status = 130 if number == signal.SIGINT else 0
        signal.signal(number, signal.SIG_DFL)  # a second one does not wait
        work.stopping = True  # no event: a handler must not wait for a lock

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        work.run()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return status
