"""Run folders as the page shows them: record, metrics, scores, config and pictures."""

import csv
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from blemish.files import read_json
from blemish.report.tables import DAMAGED, row_from, run_key
from blemish.run.record import FINISHED, read_record


class ScoredImage(NamedTuple):
    """A tested image."""

    key: str
    defect: str


class Scores(NamedTuple):
    """The scores.csv of a run, N images."""

    images: list[ScoredImage]
    label: np.ndarray  # (N,) int
    score: np.ndarray  # (N,) float64
    threshold: float | None
    p_value: np.ndarray  # (N,) float64, NaN without calibration images


class Run(NamedTuple):
    """A run folder, finished or not."""

    folder: Path
    name: str  # the folder, relative to the searched one
    record: dict
    metrics: dict
    row: dict | None  # as in a table, of a finished run
    scores: Scores | None
    config: str
    drift: str | None = None  # when a monitor of its predictions below the searched folder raised an alarm


def scan(folder: str | Path) -> list[Run]:
    """All runs below a folder, sorted by setting and start; repeated tests of a run do not count."""
    paths = [path.parent for path in Path(folder).rglob("record.json") if path.parent.name != "retest"]
    with ThreadPoolExecutor() as pool:
        runs = list(pool.map(lambda path: read(path, path.relative_to(folder).as_posix()), sorted(paths)))
    alarms = drifts(folder)
    runs = [run._replace(drift=alarms.get(str(calibration_of(run).get("digest")))) for run in runs]
    return sorted(runs, key=lambda run: (run.row is None, run_key(run.row) if run.row else (), run.name))


def calibration_of(run: Run) -> dict:
    """What the record of a run says of its calibration, empty without."""
    found = run.record.get("calibration")
    return found if isinstance(found, dict) else {}


def drifts(folder: str | Path) -> dict[str, str]:
    """{digest of calibration scores: time of the alarm} of all monitors below a folder that have raised one, see `edge.monitor`."""
    found = {}
    for path in Path(folder).rglob("monitor.json"):
        saved = read_json(path) or {}
        test, digest = saved.get("test"), str(saved.get("calibration"))
        if isinstance(test, dict) and isinstance(test.get("alarm"), dict):
            found[digest] = min(str(test["alarm"].get("time")), found.get(digest, "~"))
    return found


def read(folder: Path, name: str) -> Run:
    """A run folder; its status is "unreadable" where its record or metrics are damaged."""
    record, metrics, row = read_record(folder) or {"status": FINISHED}, read_json(folder / "metrics.json") or {}, None
    if record["status"] == FINISHED:
        try:
            found = row_from(record, metrics, folder)
            seconds, images = found["test_seconds"], metrics.get("images")
            machine = filter(None, (found["cpu"] or "unknown processor", f"{found['cores']} cores", found["gpu"]))
            row = {**found, "image_seconds": seconds / images if seconds and images else None, "machine": ", ".join(machine)}
        except DAMAGED as error:
            record |= {"status": "unreadable", "error": f"record.json or metrics.json is damaged ({type(error).__name__}: {error})"}
    try:
        config = (folder / "config.yaml").read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        config = ""
    return Run(folder, name, record, metrics, row, read_scores(folder / "scores.csv"), config)


def read_scores(path: Path) -> Scores | None:
    """A run's scores.csv; None if it cannot be read or has no score."""
    try:
        with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
            rows = [row for row in csv.DictReader(file) if not math.isnan(float(row["score"]))]
        images = [ScoredImage(row["path"], row["defect"] or "unknown") for row in rows]
        label, score = np.array([int(row["label"]) for row in rows]), np.array([float(row["score"]) for row in rows])
        p_value = np.array([float(row.get("p_value") or "nan") for row in rows])
        return Scores(images, label, score, float(rows[0]["threshold"]) if rows[0]["threshold"] else None, p_value)
    except (OSError, ValueError, KeyError, TypeError, IndexError, csv.Error):
        return None


def drawn(run: Run) -> list[str]:
    """The pictures of a run that are inside its folder."""
    names = run.record.get("pictures")
    names = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    return [name for name in names if not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts and "\\" not in name]
