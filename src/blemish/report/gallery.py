"""The pictures of the page: which test images to show of each group of settings, and their panels cut from the strips of the runs."""

import base64
import hashlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath
from statistics import fmean
from typing import Any

import numpy as np
from PIL import Image
from scipy.stats import rankdata

from blemish.draw import choose, file_names
from blemish.edge.selection import regions_at_most
from blemish.report.runs import Run, calibration_of, drawn
from blemish.types import ANOMALOUS, NORMAL

LISTS = ("disputed", "worst", "best")
QUALITY = {"input": 70, "truth": 50, "map": 50, "overlay": 62, "strip": 70}  # of WebP
STRIP_PX = 720  # width of a strip whose panels are not known


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
        for (entry, of), (panels, regions, failed) in zip(order.items(), found, strict=True):
            fresh = {digest: uri for part in panels.values() for digest, uri in part.values() if digest not in media}
            room -= sum(map(len, fresh.values())) + 24 * len(fresh) + 500 + 250 * len(panels) + len(json.dumps(regions))  # with its texts
            unread += failed
            if room < 0:
                pool.shutdown(cancel_futures=True)
                break
            if panels:
                media |= fresh
                digests = {id: {name: digest for name, (digest, _) in part.items()} for id, part in panels.items()}
                of["images"][entry[1]] |= {"panels": digests, "regions": regions}
    shown = []
    for of in galleries:
        lists = {name: [key for key in keys[:images] if "panels" in of["images"][key]] for name, keys in of["lists"].items()}
        keys = list(dict.fromkeys(key for part in lists.values() for key in part))
        lists = {name: [keys.index(key) for key in part] for name, part in lists.items()}
        counts = {name: of[name] for name in ("group", "tested", "drawn", "drawing")}
        shown.append({**counts, "lists": lists, "images": [of["images"][key] for key in keys]})
    absent = len(order) - sum(len(of["images"]) for of in shown)
    return {"galleries": shown, "media": media, "left_out": {"images": absent, "of": len(order), "unread": unread}}


def panels_of(strips: Mapping, runs: Sequence[Run], side: int) -> tuple[dict[Any, dict[str, tuple[str, str]]], dict[int, dict], int]:
    """({setting: {panel: (digest, data URI)}}, {setting: regions}, number of unreadable strips) of an image.

    Input and truth are given once, as "image". Regions are those of `regions_of`.
    """
    panels: dict[Any, dict[str, tuple[str, str]]] = {}
    regions, failed = {}, 0
    for setting, (number, name) in strips.items():
        try:
            with Image.open(runs[number].folder / name) as file:
                strip, boxes = file.convert("RGB"), panel_boxes(file)
                found = regions_of(file, runs[number])
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            failed += 1
            continue
        if not boxes:
            panels[setting] = {"strip": encoded(strip, STRIP_PX, QUALITY["strip"])}
            continue
        regions |= {setting: found} if found else {}
        shared = {} if "image" in panels else {"input": "input", "truth": "ground truth"}
        for panel, title in {**shared, "map": "map", "overlay": "overlay"}.items():
            if title in boxes:
                picture = encoded(strip.crop(boxes[title]), side, QUALITY[panel])
                panels.setdefault("image" if panel in shared else setting, {})[panel] = picture
    return panels, regions, failed


def regions_of(strip: Image.Image, run: Run) -> dict | None:
    """{"steps": [threshold, false at most or None, boxes], "drift"} that a strip and the record of its run state of a map; None without.

    boxes: (x, y, w, h) in thousandths of the panel. drift: when a monitor raised an alarm, see `Run`.
    """
    levels = calibration_of(run).get("region_levels")
    try:
        steps = [
            [float(threshold), regions_at_most(levels, threshold), [[int(side) for side in box] for box in boxes]]
            for threshold, boxes in json.loads(strip.info["Regions"])
        ]
        return {"steps": steps, "drift": run.drift} if steps and all(len(box) == 4 for *_, boxes in steps for box in boxes) else None
    except (KeyError, ValueError, TypeError):
        return None


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
