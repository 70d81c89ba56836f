"""The memory of a stream of predicted images in monitor.json: a summary of the scores, and a test of whether they drift."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from .calibration import RARE, Threshold, chance_of_alarms
from .drift import Drift, Summary
from .errors import InputError
from .outputs import write_whole
from .reading import digest_of

CLAIMED, NOT_CLAIMED = "claimed", "not claimed"  # whether the bound on false alarms is claimed for an image


def unusual(count: int, images: int, threshold: Threshold) -> str | None:
    """Return a warning if hardly ever so many normal images, `count` of `images`, are called anomalous.

    The number of normal images above the k-th of n calibration scores is beta-binomial, whatever the distribution of the scores.
    """
    if threshold.value is None or threshold.by_hand:
        return None
    chance = chance_of_alarms(count, images, threshold.requested, threshold.n)
    if chance > RARE:
        return None
    return (
        f"{count} of {images} images are called anomalous; of normal images like the {threshold.n} calibration images so many have a "
        f"probability of {chance:.1g}. Unless most of them have defects, camera, light or product have changed: calibrate again."
    )


def digest_of_scores(scores: Sequence[float]) -> str:
    """Return what identifies calibration scores, in a monitor's file and in the record of a run."""
    return digest_of(json.dumps(sorted(scores)).encode())


@dataclass
class Monitor:
    """Summary and test of a stream of scores; while it is off, scores are summed up and a test that has begun is paused."""

    path: Path
    on: bool
    rate: float  # probability of a false alarm over the full stream
    calibration: str  # digest of the calibration scores
    images: int  # calibration images
    summary: Summary
    drift: Drift | None = None
    alarm: dict | None = None
    position: int | None = None  # bytes of the log of `watch` whose scores are counted; None for images of `predict`

    @classmethod
    def open(cls, path: Path, on: bool, rate: float, calibration: Sequence[float], seed: int) -> "Monitor":
        """Read a monitor from its file, or begin a new one, with calibration scores (n,).

        InputError without calibration scores to compare with, and for a file that is damaged, or of a test at another rate or with other
        calibration scores.
        """
        if on and not calibration:
            raise InputError("monitor=on: the run has no calibration scores to compare with; expected a run with protocol=clean")
        monitor = cls(path, on, rate, digest_of_scores(calibration), len(calibration), Summary(seed))
        if path.is_file():
            monitor._read()
        if on and monitor.drift is None:
            monitor.drift = Drift(list(calibration), seed)
        return monitor

    def _read(self) -> None:
        try:
            saved = json.loads(self.path.read_text(encoding="utf-8"))
            test, calibration, state = saved["test"], saved["calibration"], saved["state"]
            rate, alarm = (test["rate"], test["alarm"]) if test else (self.rate, None)
            summary = Summary(**{key: value for key, value in state["summary"].items() if value is not None})
            logs = test and [-math.inf if log is None else log for log in state["drift"]["logs"]]
            drift = Drift(**state["drift"] | {"logs": logs}) if test else None
        except (OSError, ValueError, KeyError, TypeError, InputError) as error:
            raise InputError(f"{self.path}: damaged ({type(error).__name__}: {error}); move it away to begin again") from error
        if calibration != self.calibration:
            if test:
                raise InputError(f"{self.path}: of a run with other calibration scores; choose another output, or move it away")
            return  # a summary alone is replaced
        if self.on and rate != self.rate:
            raise InputError(f"monitor_rate={self.rate}: {self.path} has {rate}; expected that, or move the file away")
        self.rate, self.summary, self.drift, self.alarm, self.position = rate, summary, drift, alarm, state.get("position")

    def take(self, scores: Sequence[float]) -> list[str]:
        """Count scores in the order in which the images were made; returns CLAIMED or NOT_CLAIMED for each."""
        bounds = []
        for score in scores:
            self.summary.take(score)
            if self.on:
                self.drift.take(score)
                if self.alarm is None and self.drift.log_wealth >= -math.log(self.rate):
                    self.alarm = {"score": self.drift.count, "time": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"}
            bounds.append(CLAIMED if self.alarm is None else NOT_CLAIMED)
        return bounds

    def save(self) -> None:
        test = self.drift and {
            "rate": self.rate,
            "scores": self.drift.count,
            "log10_wealth": self.drift.log_wealth / math.log(10),
            "log10_wealth_of_an_alarm": -math.log10(self.rate),
            "alarm": self.alarm,
            "bound": CLAIMED if self.alarm is None else NOT_CLAIMED,
        }
        state = {"summary": finite(asdict(self.summary)), "drift": self.drift and finite(asdict(self.drift)), "position": self.position}
        content = {"calibration": self.calibration, "summary": self.summary.metadata(), "test": test, "state": state}
        write_whole(self.path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())

    def explain(self) -> str:
        """Describe the state of the test in one or two sentences."""
        wealth = f"wealth 10^{self.drift.log_wealth / math.log(10):.1f}, an alarm takes 10^{-math.log10(self.rate):.1f}"
        if self.alarm is None:
            return (
                f"monitor: {self.drift.count} scores give no reason to think that production differs from the {self.images} calibration "
                f"images ({wealth}); the bound on false alarms is claimed."
            )
        return (
            f"monitor: production differs from the {self.images} calibration images since score {self.alarm['score']} "
            f"({self.alarm['time']}; {wealth}, by chance with a probability of at most {100 * self.rate:.3g} %); the bound on false "
            "alarms is not claimed any more. "
            f"More anomalous parts, or other parts, light or camera: look at the images, calibrate again, then move {self.path} away."
        )


def finite(state: dict) -> dict:
    """The state of a dataclass with None for infinities, which JSON does not have."""

    def of(value: object) -> object:
        return None if isinstance(value, float) and math.isinf(value) else value

    return {key: [of(one) for one in value] if isinstance(value, list) else of(value) for key, value in state.items()}
