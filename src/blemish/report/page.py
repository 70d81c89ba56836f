"""One HTML page of many runs that needs neither server nor network: what they reached, what it cost, and where they disagree.

The page is page.html with page.css, page.js and the data in it. Nothing a run folder says is ever read as HTML or script.
"""

import base64
import csv
import hashlib
import io
import json
import math
import os
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from scipy.stats import rankdata

from blemish.draw import choose, file_names, simplified
from blemish.edge.checks import check_number, check_whole
from blemish.edge.errors import InputError
from blemish.files import plain, read_json, write_text
from blemish.metrics.metrics import ImageMetrics
from blemish.report.tables import pooled
from blemish.run.record import FINISHED, METRICS, PLACE, SETTING, now, read_record
from blemish.types import ANOMALOUS, NORMAL

GROUP = (*PLACE, "protocol")  # what settings must share to be ranked together
COSTS = ("fit_seconds", "test_seconds", "image_seconds", "peak_memory_mb")
CURVES = ("image_roc", "pixel_roc", "pixel_pro", "image_pr", "pixel_pr")
CURVE_POINTS, CURVE_TOLERANCE, CURVE_UNITS = 80, 0.002, 1000  # a curve on the page: vertices, their accuracy, and units they are told in
LISTS = ("disputed", "worst", "best")
UNREADABLE = "unreadable"
QUALITY = {"input": 70, "truth": 50, "map": 50, "overlay": 62, "strip": 70}  # of WebP
STRIP_PX = 720  # width of a strip that cannot be taken apart


class Scores(NamedTuple):
    """scores.csv of a run, N images."""

    key: list[str]
    label: np.ndarray  # (N,) int
    score: np.ndarray  # (N,) float64
    threshold: float | None
    defect: list[str]


class Run(NamedTuple):
    """A run folder, whatever became of it."""

    folder: Path
    name: str  # of the folder, relative to the one that was searched
    record: dict
    metrics: dict
    scores: Scores | None
    config: str


def write(runs: str | Path, output: str | Path, max_mb: float, images: int, picture_px: int) -> int:
    """Write the page of every run below `runs` to `output`; returns how many runs it tells of.

    images: shown in each list of a category's gallery, at `picture_px` px a side; those that would make the page larger than `max_mb`
    megabytes are left out, the last of each list first, and the page says so. InputError if there is no run.
    """
    check_number("", "(0, inf)", max_mb=max_mb)
    check_whole("", 0, images=images)
    check_whole("", 16, picture_px=picture_px)
    found = scan(runs)
    if not found:
        raise InputError(f"runs={runs}: no run below this folder; expected the run folders that tools/train.py leaves")
    data = contents(found)
    data["folder"] = str(runs)
    room = max_mb * 1e6 - len(page(data))
    data |= pictures(data.pop("items"), found, images, picture_px, room)
    write_text(output, page(data))
    return len(found)


def scan(folder: str | Path) -> list[Run]:
    """Every run below a folder, sorted by what was run and when; tests of a finished run that were made again do not count."""
    paths = [path.parent for path in Path(folder).rglob("record.json") if path.parent.name != "retest"]
    with ThreadPoolExecutor() as pool:
        runs = list(pool.map(lambda path: read(path, path.relative_to(folder).as_posix()), sorted(paths)))
    return sorted(runs, key=lambda run: [str(run.record.get(name)) for name in (*SETTING, "seed", "started")] + [run.name])


def read(folder: Path, name: str) -> Run:
    """A run folder, with the status "unreadable" where record or metrics cannot be read."""
    record = read_record(folder) or {"status": UNREADABLE, "error": "record.json cannot be read"}
    metrics = read_json(folder / "metrics.json")
    if record["status"] == FINISHED and metrics is None:
        record |= {"status": UNREADABLE, "error": "metrics.json cannot be read"}
    try:
        config = (folder / "config.yaml").read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        config = ""
    return Run(folder, name, record, metrics or {}, read_scores(folder / "scores.csv"), config)


def read_scores(path: Path) -> Scores | None:
    """A run's scores.csv; None if it cannot be read or holds no score."""
    try:
        with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
            rows = [row for row in csv.DictReader(file) if not math.isnan(float(row["score"]))]
        if not rows:
            return None
        threshold = rows[0].get("threshold")
        return Scores(
            [row["path"] for row in rows],
            np.array([int(row["label"]) for row in rows]),
            np.array([float(row["score"]) for row in rows]),
            float(threshold) if threshold else None,
            [row["defect"] or "unknown" for row in rows],  # a row may be damaged
        )
    except (OSError, ValueError, KeyError, TypeError, csv.Error):
        return None


def contents(runs: Sequence[Run]) -> dict:
    """What the page shows, without pictures: settings pooled over their seeds, groups of them that compare, every run, gallery items."""
    rows = [row_of(index, run) for index, run in enumerate(runs) if run.record["status"] == FINISHED]
    settings = [setting_of(of) for of in pooled(rows)]
    for index, setting in enumerate(settings):
        setting["id"] = index
    groups: dict[tuple, list[dict]] = {}
    for setting in settings:
        groups.setdefault(tuple(setting[name] for name in GROUP), []).append(setting)
    described = [group_of(index, of, runs) for index, of in enumerate(groups.values())]
    whole, notes = means(settings)
    for setting in settings:
        del setting["by_seed"]
    lines: dict[str, int] = {}
    for run in runs:
        for line in run.config.splitlines():
            lines.setdefault(line, len(lines))
    return {
        "made": now(),
        "figures": METRICS,
        "costs": COSTS,
        "setting": SETTING,
        "groups": described,
        "settings": settings,
        "means": whole,
        "notes": notes,
        "lines": list(lines),
        "runs": [
            {
                "name": run.name,
                "record": {**run.record, "pictures": len(_names(run))},
                "metrics": run.metrics,
                "config": [lines[line] for line in run.config.splitlines()],
                "curves": curves_of(run),
            }
            for run in runs
        ],
        "items": [items_of(index, of, runs) for index, of in enumerate(groups.values())],
    }


def row_of(index: int, run: Run) -> dict:
    """What `pooled` needs of a finished run, its costs, its machine, and which of the runs it is."""
    count = _number(run.metrics.get("images"))
    test = _number(run.metrics.get("test_seconds"))
    memory, seed = run.record.get("peak_memory_mb"), run.record.get("seed")
    return {
        **{name: _scalar(run.record.get(name)) for name in SETTING},
        "seed": seed if isinstance(seed, int) else -1,
        **{name: _number(run.metrics.get(name)) for name in (*METRICS, "fit_seconds", "test_seconds")},
        "image_seconds": test / count if test is not None and count else None,
        "peak_memory_mb": _number(memory.get("host")) if isinstance(memory, dict) else None,
        "machine": machine_of(run.record),
        "index": index,
    }


def machine_of(record: Mapping) -> str:
    """Processor and usable cores of a run, and its accelerators if it held memory on one, in words."""
    machine, memory = record.get("environment"), record.get("peak_memory_mb")
    machine = machine if isinstance(machine, dict) else {}
    gpus = machine.get("gpus") if isinstance(memory, dict) and memory.get("gpu") and isinstance(machine.get("gpus"), list) else []
    parts = [str(machine.get("cpu") or "unknown processor"), f"{machine.get('cores_usable', '?')} cores"]
    return ", ".join(parts + [f"{count} × {name}" for name, count in Counter(map(str, gpus)).items()])


def _number(value: Any) -> float | None:
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good else None


def _scalar(value: Any) -> Any:
    return value if value is None or isinstance(value, str | int | float) else json.dumps(value)


def setting_of(group: Mapping) -> dict:
    """A row of the leaderboard: mean and standard deviation over the seeds of every figure, medians of the costs."""
    runs = group["runs"]
    values = {name: spread([run[name] for run in runs]) for name in METRICS}
    return {
        **{name: group[name] for name in SETTING},
        "seeds": [run["seed"] for run in runs],
        "runs": [run["index"] for run in runs],
        "machines": sorted({run["machine"] for run in runs}),
        "values": values | {name: middle([run[name] for run in runs]) for name in COSTS},
        "by_seed": {run["seed"]: [run[name] for name in (*METRICS, *COSTS)] for run in runs},
    }


def spread(values: Sequence[float | None]) -> list[float | None]:
    """[mean, standard deviation]; no mean where a value is missing, no deviation of a single one."""
    if not values or any(value is None for value in values):
        return [None, None]
    return [statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None]


def middle(values: Sequence[float | None]) -> list[float | None]:
    """[median, None] in the form of `spread`."""
    return [None if not values or any(value is None for value in values) else statistics.median(values), None]


def group_of(index: int, settings: Sequence[dict], runs: Sequence[Run]) -> dict:
    """What a group of settings shares, and in what their tests differ all the same."""
    chosen = [runs[number] for setting in settings for number in setting["runs"]]
    tested = {hashlib.sha256("\0".join(sorted(run.scores.key)).encode(errors="surrogateescape")).digest() for run in chosen if run.scores}
    for setting in settings:
        setting["group"] = index
    return {
        "id": index,
        **{name: settings[0][name] for name in GROUP},
        "settings": [setting["id"] for setting in settings],
        "test_sets": len(tested),
        "truths": sorted({str(run.record.get("truth")) for run in chosen}),
    }


def means(settings: Sequence[dict]) -> tuple[list[dict], list[dict]]:
    """Rows of settings that were run on every category of their data set, averaged over these; and a note on those that were not.

    The deviation is that of the averages over the seeds that every category has.
    """
    rows, notes = [], []
    sets: dict[tuple, dict[tuple, dict]] = {}
    for setting in settings:
        method = tuple(setting[name] for name in SETTING if name not in GROUP)
        sets.setdefault(tuple(setting[name] for name in GROUP if name != "category"), {}).setdefault(method, {})[setting["category"]] = (
            setting
        )
    for shared, methods in sets.items():
        categories = {category for of in methods.values() for category in of}
        if len(categories) < 2:
            continue
        whole = [list(of.values()) for of in methods.values() if len(of) == len(categories)]
        rows += [mean_of(parts) for parts in whole]
        of = dict(zip([name for name in GROUP if name != "category"], shared, strict=True))
        notes.append({**of, "categories": len(categories), "full_pass": len(whole), "partial": len(methods) - len(whole)})
    return rows, notes


def mean_of(parts: Sequence[dict]) -> dict:
    """One row from the rows of a setting on several categories."""
    seeds = [seed for seed in parts[0]["by_seed"] if all(seed in part["by_seed"] for part in parts)]
    values = {}
    for column, name in enumerate((*METRICS, *COSTS)):
        single = [[part["by_seed"][seed][column] for part in parts] for seed in seeds]
        averages = [None if any(value is None for value in of) else statistics.fmean(of) for of in single]
        values[name] = spread(averages) if name in METRICS else middle(averages)
    return {
        **{name: parts[0][name] for name in SETTING},
        "category": None,
        "parts": [part["id"] for part in parts],
        "seeds": seeds,
        "machines": sorted({machine for part in parts for machine in part["machines"]}),
        "values": values,
    }


def curves_of(run: Run) -> dict[str, list[int]]:
    """x, y, x, y … of each curve there is, in units of 1 / CURVE_UNITS; of images alone where there is no curves.json."""
    known = read_json(run.folder / "curves.json")
    if known is None and run.scores is not None and run.record["status"] == FINISHED:
        image = ImageMetrics()
        image.update(np.asarray(run.scores.score, np.float32), np.asarray(run.scores.label), run.scores.defect)
        known = {"image": image.curves()}
    lines = {}
    for name in CURVES:
        kind, _, curve = name.partition("_")
        try:
            line = np.array(known[kind][curve], dtype=np.float64)
        except (TypeError, KeyError, ValueError):
            continue
        if line.ndim == 2 and line.shape[1] == 2 and len(line) and np.isfinite(line).all():
            few = simplified(line, CURVE_POINTS, CURVE_TOLERANCE)
            lines[name] = (few * CURVE_UNITS).round().astype(int).ravel().tolist()
    return lines


def places(score: np.ndarray, label: np.ndarray) -> np.ndarray:
    """For each image (N,) the share of the images of the other kind that are on the right side of it, ties by half; NaN without any.

    Of an anomalous image, the share of the normal ones with a lower score; of a normal image, that of the anomalous ones with a higher.
    The mean over all anomalous images, or over all normal ones, is the AUROC.
    """
    place = np.full(len(score), np.nan)
    for own, other, sign in ((ANOMALOUS, NORMAL, 1), (NORMAL, ANOMALOUS, -1)):
        mine, others = sign * score[label == own], np.sort(sign * score[label == other])
        if len(others):
            place[label == own] = (np.searchsorted(others, mine, "left") + np.searchsorted(others, mine, "right")) / (2 * len(others))
    return place


def standings(score: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Rank of each image (N,) among all, in (0, 1], the more anomalous the higher; of normal images the other way round. Breaks ties."""
    return rankdata(np.where(label == NORMAL, -1, 1) * score) / len(score) if len(score) else score


def _names(run: Run) -> list[str]:
    """The pictures a run drew that lie inside its folder."""
    names = run.record.get("pictures")
    names = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    return [name for name in names if not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts and "\\" not in name]


class _Tested(NamedTuple):
    key: str
    defect: str


def strips_of(run: Run) -> dict[str, str]:
    """{key: name of its strip} of the images a run drew; where file names cannot be told apart, without those."""
    drawn = _names(run)
    if run.scores is None or not drawn:
        return {}
    tested = list(map(_Tested, run.scores.key, run.scores.defect))
    kept = choose(tested, len(drawn))
    names = file_names({key: defect for key, defect in tested if key in kept})
    if [PurePosixPath(name).name for name in drawn] != list(names.values()):
        # other pictures than this version chooses: only names that no second image could have
        alone = [file_names({key: defect})[key] for key, defect in tested]
        times = Counter(alone)
        names = {key: name for (key, _), name in zip(tested, alone, strict=True) if times[name] == 1}
    listed = {PurePosixPath(name).name: name for name in drawn}
    return {key: listed[name] for key, name in names.items() if name in listed}


def items_of(index: int, settings: Sequence[dict], runs: Sequence[Run]) -> dict:
    """The images that at least half of a group's settings with pictures drew: their order in each of LISTS, what was said of each."""
    place: dict[str, dict[int, list]] = {}  # key → setting → (place, standing, score, threshold, run) by seed
    strips: dict[str, dict[int, tuple[int, str]]] = {}  # key → setting → (run, file), of the first seed that has one
    kinds: dict[str, tuple[int, str]] = {}
    for setting in settings:
        for number in setting["runs"]:
            scores = runs[number].scores
            if scores is None:
                continue
            columns = places(scores.score, scores.label), standings(scores.score, scores.label), scores.score, scores.label
            for key, defect, where, standing, score, label in zip(scores.key, scores.defect, *columns, strict=True):
                kinds.setdefault(key, (int(label), defect))
                if not math.isnan(where):
                    place.setdefault(key, {}).setdefault(setting["id"], []).append((where, standing, score, scores.threshold, number))
            for key, name in strips_of(runs[number]).items():
                strips.setdefault(key, {}).setdefault(setting["id"], (number, name))
    drawing = {setting for of in strips.values() for setting in of}
    shown = [key for key, of in strips.items() if 2 * len(of) >= len(drawing) and key in place]
    mean = {key: np.mean([np.mean([seed[:2] for seed in of], axis=0) for of in place[key].values()], axis=0) for key in shown}
    spreads = {key: float(np.std([np.mean([seed[0] for seed in of]) for of in place[key].values()])) for key in shown}
    lists = {
        "disputed": sorted((key for key in shown if spreads[key] > 0), key=lambda key: (-spreads[key], key)),
        "worst": sorted(shown, key=lambda key: (*mean[key], key)),
        "best": sorted(shown, key=lambda key: (*-mean[key], key)),
    }
    images = {
        key: {
            "key": key,
            "label": kinds[key][0],
            "defect": kinds[key][1],
            "mean": round(float(mean[key][0]), 4),
            "spread": round(spreads[key], 4),
            "strips": strips[key],
            "cells": {id: cell_of(of, strips[key].get(id), runs) for id, of in place[key].items()},
        }
        for key in shown
    }
    return {"group": index, "tested": len(place), "drawn": len(shown), "drawing": len(drawing), "lists": lists, "images": images}


def cell_of(seeds: Sequence[tuple], strip: tuple[int, str] | None, runs: Sequence[Run]) -> dict:
    """What one setting says of one image: its place over the seeds, and score and threshold of the run whose map is shown."""
    number = strip[0] if strip else seeds[0][-1]
    _, _, score, threshold, _ = next((seed for seed in seeds if seed[-1] == number), seeds[0])
    return {
        "place": round(float(np.mean([seed[0] for seed in seeds])), 4),
        "score": float(f"{score:.5g}"),
        "threshold": None if threshold is None else float(f"{threshold:.5g}"),
        "alarm": None if threshold is None else bool(score > threshold),
        "seed": runs[number].record.get("seed"),
    }


def pictures(items: Sequence[dict], runs: Sequence[Run], images: int, side: int, room: float) -> dict:
    """{"galleries", "media", "left_out"}: the lists cut to `images` each and to what fits into `room` bytes, and their pictures."""
    order, galleries, media, taken = [], [], {}, {}
    for rank in range(images):
        for name in LISTS:
            for item in items:
                if rank < len(item["lists"][name]) and (entry := (item["group"], item["lists"][name][rank])) not in taken:
                    taken[entry] = False
                    order.append((item, item["lists"][name][rank]))
    unread, full = 0, False
    step = 4 * (os.cpu_count() or 1)
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(order), step):
            part = order[start : start + step]
            for (item, key), found in zip(part, pool.map(lambda of: panels_for(of[0]["images"][of[1]], runs, side), part), strict=True):
                panels, failed = found
                fresh = {digest: uri for of in panels.values() for digest, uri in of.values() if digest not in media}
                size = sum(map(len, fresh.values())) + 24 * len(fresh) + 500 + 250 * len(panels)  # with what is said of them
                full = full or size > room
                unread += failed
                if full or not panels:
                    continue
                room -= size
                media |= fresh
                taken[item["group"], key] = True
                item["images"][key]["panels"] = {id: {name: digest for name, (digest, _) in of.items()} for id, of in panels.items()}
            if full:
                break
    for item in items:
        lists = {name: [key for key in item["lists"][name][:images] if taken.get((item["group"], key))] for name in LISTS}
        shown = list(dict.fromkeys(key for of in lists.values() for key in of))
        place = {key: index for index, key in enumerate(shown)}
        galleries.append(
            {
                **{name: item[name] for name in ("group", "tested", "drawn", "drawing")},
                "lists": {name: [place[key] for key in of] for name, of in lists.items()},
                "images": [{name: value for name, value in item["images"][key].items() if name != "strips"} for key in shown],
            }
        )
    fitted = sum(taken.values())
    return {"galleries": galleries, "media": media, "left_out": {"images": len(taken) - fitted, "of": len(taken), "unread": unread}}


def panels_for(image: Mapping, runs: Sequence[Run], side: int) -> tuple[dict[Any, dict[str, tuple[str, str]]], int]:
    """({setting: {panel: (digest, data URI)}}, how many strips could not be read); input and truth stand under "image", once."""
    panels: dict[Any, dict[str, tuple[str, str]]] = {}
    failed = 0
    for setting, (number, name) in image["strips"].items():
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
        for panel, drawn in {**shared, "map": "map", "overlay": "overlay"}.items():
            if drawn in boxes:
                to = "image" if panel in shared else setting
                panels.setdefault(to, {})[panel] = encoded(strip.crop(boxes[drawn]), side, QUALITY[panel])
    return panels, failed


def encoded(picture: Image.Image, side: int, quality: int) -> tuple[str, str]:
    """(short digest, data URI) of a picture as WebP, reduced to `side` px at its longer side."""
    picture.thumbnail((side, side), Image.Resampling.BOX)
    file = io.BytesIO()
    picture.save(file, "webp", quality=quality, method=2)
    content = file.getvalue()
    return hashlib.sha256(content).hexdigest()[:12], "data:image/webp;base64," + base64.b64encode(content).decode()


def panel_boxes(strip: Image.Image) -> dict[str, tuple[int, int, int, int]] | None:
    """Where a strip says that its panels are, {"input", "ground truth", …} as (left, top, right, bottom) px; None where it does not."""
    try:
        boxes = json.loads(strip.info["Panels"])
        inside = all(0 <= box[0] < box[2] <= strip.width and 0 <= box[1] < box[3] <= strip.height for box in boxes.values())
        return boxes if inside else None
    except (KeyError, ValueError, TypeError, IndexError, AttributeError):
        return None


def page(data: Mapping) -> str:
    """The HTML page. The browser is told to run this very script and to load nothing."""
    here = Path(__file__).parent
    markup, style, script = ((here / f"page.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js"))
    # inside a script element only < could end it; in JSON it may be told as an escape
    text = json.dumps(plain(data), separators=(",", ":")).replace("<", "\\u003c")
    parts = {"STYLE": style, "SCRIPT": script, "STYLE_HASH": _hash(style), "SCRIPT_HASH": _hash(script), "DATA": text}
    return "".join(_filled(markup, parts))


def _filled(markup: str, parts: Mapping[str, str]) -> Iterator[str]:
    """The template with {{NAME}} replaced; what is put in is not searched again."""
    pieces: Iterable[str] = markup.split("{{")
    for index, piece in enumerate(pieces):
        name, end, rest = piece.partition("}}")
        yield piece if index == 0 else parts[name] + rest if end else "{{" + piece


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
