"""What `predict` remembers of a stream of images in monitor.json: a summary of all scores, and whether they still come as they did."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from blemish.edge.calibration import RARE, Threshold, chance_of_alarms
from blemish.edge.checks import check_number
from blemish.edge.errors import InputError
from blemish.files import write_json
from blemish.metrics.drift import Drift, Summary

FORMAT = "blemish monitor 1"
CLAIMED, NOT_CLAIMED = "claimed", "not claimed"  # the bound on false alarms, for an image


def unusual(count: int, images: int, threshold: Threshold) -> str | None:
    """A warning where normal images like the calibration images would hardly ever have so many called anomalous, `count` of `images`.

    The number of normal images above the k-th of n calibration scores is beta-binomial, whatever the scores' distribution.
    """
    if threshold.value is None or threshold.by_hand:
        return None
    chance = chance_of_alarms(count, images, threshold.requested, threshold.n)
    if chance > RARE:
        return None
    return (
        f"{count} of {images} images are called anomalous; if all were normal and came as the {threshold.n} calibration images did, so "
        f"many would be with a probability of {chance:.1g}. If most of these images are normal, the camera, the light or the product has "
        "changed since the calibration: look at the overlays, and calibrate anew before you rely on decisions. If most have defects, all "
        "is well."
    )


class Monitor:
    """The memory in the file `path`, begun anew where there is none; `take` counts scores in, `save` writes it in one step.

    on: whether scores are tested against the calibration scores (n), with a false-alarm `rate` for the whole stream. While it is off they
    are only summed up, and the test, if one was begun, waits. InputError for a rate outside (0, 1), no calibration score to test against,
    or a file that is damaged, of another run's calibration or of a test at another rate.
    """

    def __init__(self, path: Path, on: bool, rate: float, calibration: Sequence[float], seed: int):
        check_number("", "(0, 1)", monitor_rate=rate)
        if on and not calibration:
            raise InputError("monitor=on: the run has no calibration scores to compare with; expected a run with protocol=clean")
        self.path, self.on, self.rate, self.images = path, on, rate, len(calibration)
        self.of = hashlib.blake2b(json.dumps(sorted(calibration)).encode(), digest_size=8).hexdigest()
        self.summary, self.drift, self.alarm = Summary(seed), None, None
        if path.is_file():
            self._load()
        if on and self.drift is None:
            self.drift = Drift(list(calibration), seed)

    def _load(self) -> None:
        try:
            saved = json.loads(self.path.read_text(encoding="utf-8"))
            if saved["format"] != FORMAT:
                raise ValueError(f"format {saved['format']!r}, expected {FORMAT!r}")
            test, of, state = saved["test"], saved["calibration"], saved["state"]
            summary = Summary(**{key: value for key, value in state["summary"].items() if value is not None})
            drift = test and Drift(**state["drift"] | {"logs": [-math.inf if log is None else log for log in state["drift"]["logs"]]})
            alarm = test and test["alarm"]
        except (OSError, ValueError, KeyError, TypeError, InputError) as error:
            raise InputError(
                f"{self.path}: not a whole monitor.json ({type(error).__name__}: {error}); move it away to begin anew"
            ) from error
        if of != self.of:
            if test:
                raise InputError(f"{self.path}: belongs to a run with other calibration scores; choose another output, or move it away")
            return  # a mere summary of another detector's scores makes room
        if self.on and test and test["rate"] != self.rate:
            raise InputError(f"monitor_rate={self.rate}: {self.path} was begun with {test['rate']}; keep that, or move the file away")
        self.summary, self.drift, self.alarm = summary, drift or None, alarm
        self.rate = test["rate"] if test else self.rate

    def take(self, scores: Sequence[float]) -> list[str]:
        """Count scores in, in the order in which the images were made; says of each whether the bound on false alarms is claimed for it."""
        said = []
        for score in scores:
            self.summary.take(score)
            if self.on:
                self.drift.take(score)
                if self.alarm is None and self.drift.log_wealth >= -math.log(self.rate):
                    self.alarm = {"score": self.drift.count, "time": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"}
            said.append(CLAIMED if self.alarm is None else NOT_CLAIMED)
        return said

    def save(self) -> None:
        state = {"summary": asdict(self.summary), "drift": asdict(self.drift) if self.drift else None}
        test = self.drift and {
            "rate": self.rate,
            "scores": self.drift.count,
            "log10_wealth": self.drift.log_wealth / math.log(10),
            "log10_wealth_of_an_alarm": -math.log10(self.rate),
            "alarm": self.alarm,
            "bound": CLAIMED if self.alarm is None else NOT_CLAIMED,
        }
        metadata = {"format": FORMAT, "calibration": self.of, "summary": self.summary.metadata(), "test": test, "state": state}
        write_json(self.path, metadata)

    def explain(self) -> str:
        """What the test says so far, in one or two sentences."""
        wealth = f"wealth 10^{self.drift.log_wealth / math.log(10):.1f}, an alarm takes 10^{-math.log10(self.rate):.1f}"
        if self.alarm is None:
            return (
                f"monitor: {self.drift.count} scores give no reason to think that production differs from the {self.images} calibration "
                f"images ({wealth}); the bound on false alarms is claimed."
            )
        return (
            f"monitor: production no longer looks like the {self.images} calibration images since score {self.alarm['score']} "
            f"({self.alarm['time']}; {wealth}, by chance with a probability of at most {100 * self.rate:.3g} %). The bound on false alarms "
            "is not claimed any more. Either the share of anomalous parts has grown, or normal parts, light or camera have changed: "
            f"look at the images, then calibrate anew and move {self.path} away."
        )
