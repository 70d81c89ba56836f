"""A report of many runs as one HTML page that needs neither server nor network: accuracy, costs, curves and a gallery.

The page is page.html with page.css, page.js and the data in it. Nothing from a run folder is ever interpreted as HTML or script.
"""

import base64
import csv
import hashlib
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from statistics import fmean, median, stdev
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from scipy.stats import rankdata

from blemish.curves import simplified
from blemish.draw import choose, file_names
from blemish.edge.calibration import CONFIDENCE, SPLIT
from blemish.edge.checks import check_number, check_whole
from blemish.edge.errors import InputError
from blemish.edge.selection import certificate
from blemish.files import plain, read_json, write_text
from blemish.metrics.image import ImageMetrics
from blemish.report.tables import DAMAGED, averages, pooled, row_from, run_key
from blemish.run.record import FINISHED, METRICS, PLACE, SETTING, now, read_record
from blemish.types import ANOMALOUS, NORMAL, UNKNOWN

GROUP = (*PLACE, "protocol")  # settings are ranked together only where these are equal
COSTS = ("fit_seconds", "test_seconds", "image_seconds", "peak_memory_mb")
CURVES = ("image_roc", "pixel_roc", "pixel_pro", "image_pr", "pixel_pr")
CURVE_POINTS, CURVE_TOLERANCE, CURVE_UNITS = 80, 0.002, 1000  # of a curve: most vertices, their accuracy, integer units of its axes
CERTIFIED = 200  # thresholds of a run's slider, at most
LISTS = ("disputed", "worst", "best")
QUALITY = {"input": 70, "truth": 50, "map": 50, "overlay": 62, "strip": 70}  # of WebP
STRIP_PX = 720  # width of a strip whose panels are not known


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


# ---- reading


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


def scan(folder: str | Path) -> list[Run]:
    """All runs below a folder, sorted by setting and start; repeated tests of a run do not count."""
    paths = [path.parent for path in Path(folder).rglob("record.json") if path.parent.name != "retest"]
    with ThreadPoolExecutor() as pool:
        runs = list(pool.map(lambda path: read(path, path.relative_to(folder).as_posix()), sorted(paths)))
    return sorted(runs, key=lambda run: (run.row is None, run_key(run.row) if run.row else (), run.name))


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


# ---- figures and curves


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
    data = {"made": now(), "figures": METRICS, "costs": COSTS, "setting": SETTING, "groups": list(groups.values()), "settings": settings}
    return data | {"means": means, "notes": notes, "lines": list(lines), "runs": described}, galleries


def summary(parts: Sequence[Mapping]) -> dict:
    """A row of the leaderboard from groups of `pooled`, a single one or one for each category.

    Its values are [mean, standard deviation] over the seeds that all parts have, or [median, None] of a cost; None where one is missing.
    """
    values = {}
    for name in (*METRICS, *COSTS):
        seeds = averages(parts, name)
        center = (median if name in COSTS else fmean)(seeds) if seeds else None
        values[name] = [center, stdev(seeds) if name in METRICS and len(seeds) > 1 else None]
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
    held = run.record.get("calibration")
    if not (isinstance(held, dict) and held.get("promise") == SPLIT and isinstance(held.get("n"), int) and run.scores):
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
    return {"confidence": CONFIDENCE, "images": len(scores.score), "n": held["n"], "steps": rows}


# ---- galleries


def places(score: np.ndarray, label: np.ndarray) -> np.ndarray:
    """For each image (N,) the share of the images of the other kind that it is ranked correctly against, ties by half; NaN without any.

    For an anomalous image, the share of the normal ones with a lower score; for a normal image, that of the anomalous ones with a higher.
    The mean over all anomalous images, or over all normal ones, is the AUROC.
    """
    place = np.full(len(score), np.nan)
    for own, other, sign in ((ANOMALOUS, NORMAL, 1), (NORMAL, ANOMALOUS, -1)):
        mine, others = sign * score[label == own], np.sort(sign * score[label == other])
        if len(others):
            place[label == own] = (np.searchsorted(others, mine, "left") + np.searchsorted(others, mine, "right")) / (2 * len(others))
    return place


def strips_of(run: Run) -> dict[str, str]:
    """{key: picture} of the images that a run drew; empty where its pictures are not those that its scores lead to."""
    names, images = drawn(run), run.scores.images if run.scores else []
    kept = choose(images, len(names))
    expected = file_names({key: defect for key, defect in images if key in kept})
    same = [PurePosixPath(name).name for name in names] == list(expected.values())
    return dict(zip(expected, names, strict=True)) if same else {}


def gallery(group: int, settings: Sequence[dict], runs: Sequence[Run]) -> dict:
    """The images that at least half of a group's settings with pictures drew, their results, and their order in each of LISTS."""
    results: dict[str, dict[int, list]] = {}  # key → setting → (place, rank, score, threshold, run) by seed
    strips: dict[str, dict[int, tuple[int, str]]] = {}  # key → setting → (run, picture) of the first seed that has one
    kinds: dict[str, tuple[int, str]] = {}
    for setting in settings:
        for number in setting["runs"]:
            if (scores := runs[number].scores) is None:
                continue
            place = places(scores.score, scores.label)
            rank = rankdata(np.where(scores.label == NORMAL, -1, 1) * scores.score) / len(place)  # breaks ties
            columns = zip(scores.images, scores.label.tolist(), place.tolist(), rank.tolist(), scores.score.tolist(), strict=True)
            for image, label, *result in columns:
                kinds.setdefault(image.key, (label, image.defect))
                if not math.isnan(result[0]):
                    results.setdefault(image.key, {}).setdefault(setting["id"], []).append((*result, scores.threshold, number))
            for key, name in strips_of(runs[number]).items():
                strips.setdefault(key, {}).setdefault(setting["id"], (number, name))
    drawing = {setting for of in strips.values() for setting in of}
    shown = [key for key, of in strips.items() if 2 * len(of) >= len(drawing) and key in results]
    ranks = {key: np.array([np.mean([seed[:2] for seed in of], axis=0) for of in results[key].values()]) for key in shown}  # (S, 2)
    mean, spread = {key: of.mean(0) for key, of in ranks.items()}, {key: float(of[:, 0].std()) for key, of in ranks.items()}
    lists = {
        "disputed": sorted((key for key in shown if spread[key] > 0), key=lambda key: (-spread[key], key)),
        "worst": sorted(shown, key=lambda key: (*mean[key], key)),
        "best": sorted(shown, key=lambda key: (*-mean[key], key)),
    }
    images = {
        key: {
            "key": key,
            "label": kinds[key][0],
            "defect": kinds[key][1],
            "mean": round(float(mean[key][0]), 4),
            "spread": round(spread[key], 4),
            "cells": {id: cell_of(seeds, strips[key].get(id), runs) for id, seeds in results[key].items()},
        }
        for key in shown
    }
    counts = {"group": group, "tested": len(results), "drawn": len(shown), "drawing": len(drawing)}
    return {**counts, "lists": lists, "images": images, "strips": strips}


def cell_of(seeds: Sequence[tuple], strip: tuple[int, str] | None, runs: Sequence[Run]) -> dict:
    """A setting's result on an image: its mean place over the seeds, and the score of the run whose map is shown."""
    *_, score, threshold, number = next((seed for seed in seeds if strip and seed[-1] == strip[0]), seeds[0])
    return {
        "place": round(fmean(seed[0] for seed in seeds), 4),
        "score": float(f"{score:.5g}"),
        "threshold": None if threshold is None else float(f"{threshold:.5g}"),
        "alarm": None if threshold is None else score > threshold,
        "seed": runs[number].record["seed"],
    }


def pictures(galleries: Sequence[dict], runs: Sequence[Run], images: int, side: int, room: float) -> dict:
    """{"galleries", "media", "left_out"}: the lists cut to `images` each and to what fits into `room` bytes, and their pictures."""
    order = {}  # the first of every list comes before the second of any
    for rank in range(images):
        for name in LISTS:
            for of in galleries:
                order |= {(of["group"], key): of for key in of["lists"][name][rank : rank + 1]}
    media, unread = {}, 0
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda entry: panels_of(order[entry]["strips"][entry[1]], runs, side), order)
        for (entry, of), (panels, failed) in zip(order.items(), found, strict=True):
            fresh = {digest: uri for part in panels.values() for digest, uri in part.values() if digest not in media}
            room -= sum(map(len, fresh.values())) + 24 * len(fresh) + 500 + 250 * len(panels)  # with the texts of the image
            unread += failed
            if room < 0:
                pool.shutdown(cancel_futures=True)
                break
            if panels:
                media |= fresh
                digests = {id: {name: digest for name, (digest, _) in part.items()} for id, part in panels.items()}
                of["images"][entry[1]]["panels"] = digests
    shown = []
    for of in galleries:
        lists = {name: [key for key in keys[:images] if "panels" in of["images"][key]] for name, keys in of["lists"].items()}
        keys = list(dict.fromkeys(key for part in lists.values() for key in part))
        lists = {name: [keys.index(key) for key in part] for name, part in lists.items()}
        counts = {name: of[name] for name in ("group", "tested", "drawn", "drawing")}
        shown.append({**counts, "lists": lists, "images": [of["images"][key] for key in keys]})
    absent = len(order) - sum(len(of["images"]) for of in shown)
    return {"galleries": shown, "media": media, "left_out": {"images": absent, "of": len(order), "unread": unread}}


def panels_of(strips: Mapping, runs: Sequence[Run], side: int) -> tuple[dict[Any, dict[str, tuple[str, str]]], int]:
    """({setting: {panel: (digest, data URI)}}, number of unreadable strips) of an image; input and truth are given once, as "image"."""
    panels: dict[Any, dict[str, tuple[str, str]]] = {}
    failed = 0
    for setting, (number, name) in strips.items():
        try:
            with Image.open(runs[number].folder / name) as file:
                strip, boxes = file.convert("RGB"), panel_boxes(file)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            failed += 1
            continue
        if not boxes:
            panels[setting] = {"strip": encoded(strip, STRIP_PX, QUALITY["strip"])}
            continue
        shared = {} if "image" in panels else {"input": "input", "truth": "ground truth"}
        for panel, title in {**shared, "map": "map", "overlay": "overlay"}.items():
            if title in boxes:
                picture = encoded(strip.crop(boxes[title]), side, QUALITY[panel])
                panels.setdefault("image" if panel in shared else setting, {})[panel] = picture
    return panels, failed


def encoded(picture: Image.Image, side: int, quality: int) -> tuple[str, str]:
    """(short digest, data URI) of a picture as WebP, reduced to `side` px at its longer side."""
    picture.thumbnail((side, side), Image.Resampling.BOX)
    file = io.BytesIO()
    picture.save(file, "webp", quality=quality, method=2)
    content = file.getvalue()
    return hashlib.sha256(content).hexdigest()[:12], "data:image/webp;base64," + base64.b64encode(content).decode()


def panel_boxes(strip: Image.Image) -> dict[str, tuple[int, int, int, int]] | None:
    """The boxes (left, top, right, bottom) in px that a strip states for its panels, by title; None without valid ones."""
    try:
        boxes = json.loads(strip.info["Panels"])
        inside = all(0 <= box[0] < box[2] <= strip.width and 0 <= box[1] < box[3] <= strip.height for box in boxes.values())
        return boxes if inside else None
    except (KeyError, ValueError, TypeError, IndexError, AttributeError):
        return None


def html(data: Mapping) -> str:
    """Return the HTML page; its content security policy allows this script alone and loads nothing."""
    markup, style, script = (Path(__file__).with_name(f"page.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js"))
    # inside a script element only < could end it; JSON may have it as an escape
    text = json.dumps(plain(data), separators=(",", ":")).replace("<", "\\u003c")
    parts = {"STYLE": style, "SCRIPT": script, "STYLE_HASH": _hash(style), "SCRIPT_HASH": _hash(script), "DATA": text}
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], markup)


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
