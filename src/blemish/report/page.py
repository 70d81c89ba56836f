"""A report of many runs as one HTML page that needs neither server nor network: accuracy, costs, curves and a gallery.

The page is page.html with page.css, page.js and the data in it. Nothing from a run folder is ever interpreted as HTML or script.
"""

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median, stdev

import numpy as np

from blemish.curves import simplified
from blemish.edge.calibration import CONFIDENCE, SPLIT
from blemish.edge.checks import check_number, check_whole
from blemish.edge.errors import InputError
from blemish.edge.selection import certificate
from blemish.files import plain, read_json, write_text
from blemish.metrics.image import ImageMetrics
from blemish.report.gallery import gallery, pictures
from blemish.report.runs import Run, calibration_of, drawn, scan
from blemish.report.tables import DECISIONS, averages, pooled
from blemish.run.record import METRICS, PLACE, SETTING, now
from blemish.types import NORMAL, UNKNOWN

GROUP = (*PLACE, "protocol")  # settings are ranked together only where these are equal
COSTS = ("fit_seconds", "test_seconds", "image_seconds", "peak_memory_mb")
CURVES = ("image_roc", "pixel_roc", "pixel_pro", "image_pr", "pixel_pr")
CURVE_POINTS, CURVE_TOLERANCE, CURVE_UNITS = 80, 0.002, 1000  # of a curve: most vertices, their accuracy, integer units of its axes
CERTIFIED = 200  # thresholds of a run's slider, at most


def write(runs: str | Path, output: str | Path, max_mb: float, images: int, picture_px: int) -> int:
    """Write the page of all runs below `runs` to `output`; returns their number. InputError if there is none.

    images: the length of each list of a gallery. picture_px: the longer side of a picture. max_mb: the size of the page in megabytes; it
    states how many pictures were left out to keep to it, the last of each list first.
    """
    check_number("", "(0, inf)", max_mb=max_mb)
    check_whole("", 0, images=images)
    check_whole("", 16, picture_px=picture_px)
    found = scan(runs)
    if not found:
        raise InputError(f"runs={runs}: no run below this folder; expected run folders of tools/train.py")
    data, galleries = contents(found)
    data["folder"] = str(runs)
    data |= pictures(galleries, found, images, picture_px, max_mb * 1e6 - len(html(data)))
    write_text(output, html(data))
    return len(found)


def contents(runs: Sequence[Run]) -> tuple[dict, list[dict]]:
    """The data of the page without pictures, and a gallery for each group of settings that are ranked together."""
    pools = pooled(run.row | {"index": index} for index, run in enumerate(runs) if run.row)
    settings, groups, lines = [], {}, {}
    for pool in pools:
        group = groups.setdefault(tuple(pool[name] for name in GROUP), {"id": len(groups), **{name: pool[name] for name in GROUP}})
        group.setdefault("settings", []).append(len(settings))
        numbers = [run["index"] for run in pool["runs"]]
        settings.append(summary([pool]) | {"id": len(settings), "group": group["id"], "runs": numbers})
    galleries = []
    for group in groups.values():
        own = [settings[id] for id in group["settings"]]
        tested = [runs[number] for setting in own for number in setting["runs"]]
        group["test_sets"] = len({frozenset(image.key for image in run.scores.images) for run in tested if run.scores})
        group["truths"] = sorted({str(run.record.get("truth")) for run in tested})
        galleries.append(gallery(group["id"], own, runs))
    for run in runs:
        for line in run.config.splitlines():
            lines.setdefault(line, len(lines))
    described = [
        {
            "name": run.name,
            "record": {**run.record, "pictures": len(drawn(run))},
            "metrics": run.metrics,
            "config": [lines[line] for line in run.config.splitlines()],
            "curves": curves_of(run),
            "certificate": certificate_of(run),
        }
        for run in runs
    ]
    means, notes = over_categories(pools)
    decided = [name for name in DECISIONS if any(setting["values"][name][0] is not None for setting in settings)]
    data = {"made": now(), "figures": METRICS, "decisions": decided, "costs": COSTS, "setting": SETTING}
    data |= {"groups": list(groups.values()), "settings": settings}
    return data | {"means": means, "notes": notes, "lines": list(lines), "runs": described}, galleries


def summary(parts: Sequence[Mapping]) -> dict:
    """A row of the leaderboard from groups of `pooled`, a single one or one for each category.

    Its values are [mean, standard deviation] over the seeds that all parts have, or [median, None] of a cost; None where one is missing.
    """
    values = {}
    for name in (*METRICS, *DECISIONS, *COSTS):
        seeds = averages(parts, name)
        center = (median if name in COSTS else fmean)(seeds) if seeds else None
        values[name] = [center, stdev(seeds) if name not in COSTS and len(seeds) > 1 else None]
    return {
        **{name: parts[0][name] for name in SETTING},
        "seeds": [seed for seed in parts[0]["seeds"] if all(seed in part["seeds"] for part in parts)],
        "machines": sorted({run["machine"] for part in parts for run in part["runs"]}),
        "values": values,
    }


def over_categories(pools: Sequence[Mapping]) -> tuple[list[dict], list[dict]]:
    """Rows of settings that were run on all categories of a data set, averaged over these, and how many were and were not."""
    sets: dict[tuple, dict[tuple, dict]] = {}  # data set, unit and protocol → method and its setting → category → group
    for pool in pools:
        methods = sets.setdefault(tuple(pool[name] for name in GROUP if name != "category"), {})
        methods.setdefault(tuple(pool[name] for name in SETTING if name not in GROUP), {})[pool["category"]] = pool
    rows, notes = [], []
    for shared, methods in sets.items():
        categories = {category for of in methods.values() for category in of}
        full = [list(of.values()) for of in methods.values() if len(of) == len(categories)]
        if len(categories) > 1:
            rows += [summary(parts) | {"category": None, "parts": True} for parts in full]
            named = dict(zip((name for name in GROUP if name != "category"), shared, strict=True))
            notes.append({**named, "categories": len(categories), "full_pass": len(full), "partial": len(methods) - len(full)})
    return rows, notes


def curves_of(run: Run) -> dict[str, list[int]]:
    """x, y, x, y … of each curve in units of 1 / CURVE_UNITS; without a curves.json those of the image scores."""
    known = read_json(run.folder / "curves.json")
    if known is None and run.scores and run.row:
        image = ImageMetrics()
        image.update(run.scores.score.astype(np.float32), run.scores.label, [image.defect for image in run.scores.images])
        known = {"image": image.curves()}
    lines = {}
    for name in CURVES:
        kind, _, curve = name.partition("_")
        try:
            line = np.array(known[kind][curve], dtype=np.float64)
        except (TypeError, KeyError, ValueError):
            continue
        if line.ndim == 2 and line.shape[1] == 2 and len(line) and np.isfinite(line).all():
            lines[name] = (simplified(line, CURVE_POINTS, CURVE_TOLERANCE) * CURVE_UNITS).round().astype(int).ravel().tolist()
    return lines


def certificate_of(run: Run) -> dict | None:
    """[score, alarms, bound on the normal ones, normal ones or None] of at most CERTIFIED thresholds of a run, the highest first.

    None where no bound is proven: without held-out images, or for scores that do not match them.
    """
    held = calibration_of(run)
    if not (held.get("promise") == SPLIT and isinstance(held.get("n"), int) and run.scores):
        return None
    scores = run.scores
    try:
        steps = certificate(scores.score, scores.p_value, held["n"])
    except InputError:
        return None
    chosen = sorted({round(i) for i in np.linspace(0, len(steps) - 1, CERTIFIED)}) if len(steps) > CERTIFIED else range(len(steps))
    known = not (scores.label == UNKNOWN).any()
    false = [int((scores.score[scores.label == NORMAL] >= step.score).sum()) if known else None for step in steps]
    rows = [[float(f"{steps[i].score:.5g}"), steps[i].alarms, steps[i].false_at_most, false[i]] for i in chosen]
    return {"confidence": CONFIDENCE, "images": len(scores.score), "n": held["n"], "steps": rows, "drift": run.drift}


def html(data: Mapping) -> str:
    """Return the HTML page; its content security policy allows this script alone and loads nothing."""
    markup, style, script = (Path(__file__).with_name(f"page.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js"))
    # inside a script element only < could end it; JSON may have it as an escape
    text = json.dumps(plain(data), separators=(",", ":")).replace("<", "\\u003c")
    parts = {"STYLE": style, "SCRIPT": script, "STYLE_HASH": _hash(style), "SCRIPT_HASH": _hash(script), "DATA": text}
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], markup)


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
