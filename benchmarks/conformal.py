"""What the bounds on false alarms hold, over many draws of normal images: python benchmarks/conformal.py [--draws 1000] [--methods padim …]

The maps of all images are computed once. A draw fits a method to n random normal images, either to all of them (`full` or `cross`) or
without 19 that are held out (`split`), and counts alarms among other normal images and the defects. Writes results/conformal.json, and
from it the tables of docs/decisions.md and the figure docs/decisions.svg; `--root` is the folder with mtd, gdxray and cookie.
"""

import argparse
import json
import math
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
import torch
from scipy.stats import beta
from torch import Tensor

from blemish.detector import OnePassDetector
from blemish.edge.calibration import conformal_threshold, p_values, rank
from blemish.edge.selection import adjusted, false_alarm_bounds
from blemish.files import write_json
from blemish.run.config import build, composed
from blemish.run.train import described

ROOT = Path(__file__).parents[1]
FILE, DOC, FIGURE = ROOT / "results" / "conformal.json", ROOT / "docs" / "decisions.md", ROOT / "docs" / "decisions.svg"
SIDE = 96  # px of the images
ALPHA, HELD_OUT, CONFIDENCE, FDR = 0.05, 19, 0.95, 0.1
SETS = {  # overrides, and the numbers of normal images of a draw
    "magnetic tiles": (["data=mtd", "data.root={root}/mtd"], (19, 40, 80)),
    "C0047": (["data=gdxray", "data.root={root}/gdxray", "data.category=C0047"], (19, 40)),
    "cookie": (["data=mvtec", "data.root={root}", "data.category=cookie"], (19, 30)),
}
METHODS = {
    "padim": ["backbone=tf_efficientnet_lite0", "weights=bundled", "model.stages=[2,3]", "model.n_features=152"],
    "patchcore": ["backbone=tf_efficientnet_lite0", "weights=bundled", "model.stages=[2,3]", "model.coreset_ratio=0.1"],
    "dfm": ["backbone=tf_efficientnet_lite0", "weights=bundled", "model.stages=[3]", "model.pool=2"],
}
MOST_TESTED = (200, 100)  # normal and anomalous images that a draw is tested on, at most
MIXTURES, FOLDER, CALIBRATION = (0.01, 0.05, 0.2), 200, 100  # shares of defects in a folder of so many images


class Maps(NamedTuple):
    """The maps (N, C, h, w) of each stage of all images, normal images first."""

    stages: list[Tensor]
    normal: int
    anomalous: int


def config(method: str, data: Sequence[str], root: str):
    data = [text.format(root=root) for text in data]
    return composed(f"model={method}", "logger=none", "protocol=paper", f"image_size={SIDE}", *METHODS[method], *data)


@torch.inference_mode()
def maps_of(cfg, model: OnePassDetector) -> Maps:
    """The maps of all images, normal ones in the order of their names."""
    data = described(cfg)
    data.setup()
    parts, labels, names = [], [], []
    for split in ("train", "test"):
        for batch in data.loader(split):
            parts.append(model.features(batch.image))
            labels += batch.label.tolist()
            names += batch.path
    order = sorted(range(len(names)), key=lambda i: (labels[i], names[i]))
    stages = [torch.cat(stage)[order] for stage in zip(*parts, strict=True)]
    return Maps(stages, labels.count(0), labels.count(1))


def fit(model: OnePassDetector, maps: Maps, rows: np.ndarray) -> OnePassDetector:
    """Fit a model again."""
    state = model.new_state(len(rows))
    state.update(model.collect([stage[rows] for stage in maps.stages]))
    model.fit(state)
    model.fitted.fill_(len(rows))
    return model


def scores(model: OnePassDetector, maps: Maps, rows: np.ndarray, left_out: bool = False) -> np.ndarray:
    """Scores of images, or of the training images `rows`, in the order of the fit, each without itself."""
    found = []
    for begin in range(0, len(rows), 64):
        chosen = [stage[rows[begin : begin + 64]] for stage in maps.stages]
        places = range(begin, min(begin + 64, len(rows)))
        found.append((model.leave_one_out(chosen, (SIDE, SIDE), places) if left_out else model.score(chosen, (SIDE, SIDE))).score)
    return torch.cat(found).double().numpy()


def crossed(model: OnePassDetector, maps: Maps, rows: np.ndarray) -> np.ndarray:
    """Calibration scores of the images that a model was fitted to, as a run has them: each left out, or in folds, which fit it again."""
    if model.left_out:
        return scores(model, maps, rows, left_out=True)
    parts = np.array_split(rows, 5)
    return np.concatenate([scores(fit(model, maps, np.setdiff1d(rows, part)), maps, part) for part in parts])


@torch.inference_mode()
def draws(model: OnePassDetector, maps: Maps, n: int, count: int) -> Iterator[dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]]:
    """Calibration scores and those of other normal images and of defects, by way of calibration, for each draw of n images."""
    for seed in range(count):
        rng = np.random.default_rng([seed, n])
        order = rng.permutation(maps.normal)
        rows, normal = order[:n], order[n : n + MOST_TESTED[0]]
        defects = maps.normal + rng.permutation(maps.anomalous)[: MOST_TESTED[1]]
        fit(model, maps, rows)
        tested = scores(model, maps, normal), scores(model, maps, defects)
        result = {model.left_out or "cross": (crossed(model, maps, rows), *tested)}
        if n > HELD_OUT + 2:
            fit(model, maps, rows[HELD_OUT:])
            result["split"] = tuple(scores(model, maps, part) for part in (rows[:HELD_OUT], normal, defects))
        yield result


def rates(found: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> dict:
    """Means over the draws with 95 % intervals, and deviations, of false alarms and of defects found."""
    pairs = []
    for calibration, normal, defects in found:
        value = conformal_threshold(calibration, ALPHA).value
        pairs.append(((normal > value).mean(), (defects > value).mean()))
    pairs = np.array(pairs)  # (draws, 2)
    mean, deviation = pairs.mean(0), pairs.std(0, ddof=1)
    half = 1.96 * deviation / math.sqrt(len(pairs))
    names = ("false_alarms", "found")
    return {name: {"mean": mean[i], "half": half[i], "deviation": deviation[i]} for i, name in enumerate(names)} | {
        "bound": conformal_threshold(found[0][0], ALPHA).alpha,
        "draws": len(pairs),
        "quantiles": np.quantile(pairs[:, 0], np.linspace(0, 1, 101)).round(4).tolist(),  # of the false alarms
    }


def folders(found: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], share: float, size: int) -> dict:
    """Folders of `size` images with a share of defects: how often a bound at any threshold is too small, and the false discoveries."""
    wrong, proportion, bounds, real, hits = 0, [], [], [], []
    for seed, (calibration, normal, defects) in enumerate(found):
        rng = np.random.default_rng([seed, size])
        count = min(math.ceil(share * size), len(defects))
        ok = rng.permutation(normal)[: size - count]
        folder = np.concatenate([ok, rng.permutation(defects)[:count]])
        p = p_values(folder, calibration)
        bound, false = false_alarm_bounds(folder, p, len(calibration), CONFIDENCE), (ok >= folder[:, None]).sum(1)
        wrong += bool((false > bound).any())
        selected = adjusted(p) <= FDR
        proportion.append(selected[: len(ok)].sum() / max(selected.sum(), 1))
        hits.append(selected[len(ok) :].mean())
        alarm = p <= ALPHA
        bounds.append(bound[alarm].max(initial=0))
        real.append(alarm[: len(ok)].sum())
    return {
        "violations": wrong / len(found),
        "half": 1.96 * math.sqrt(max(wrong, 1) * (len(found) - min(wrong, len(found) - 1))) / len(found) ** 1.5,
        "fdr": float(np.mean(proportion)),
        "found": float(np.mean(hits)),
        "false_alarms": float(np.mean(real)),
        "bound": float(np.mean(bounds)),
    }


@torch.inference_mode()
def mixtures(model: OnePassDetector, maps: Maps, count: int) -> list[dict]:
    """Folders resampled from the scores of one detector, for p-values of held-out images."""
    order = np.random.default_rng(0).permutation(maps.normal)
    fitted, rest = order[: maps.normal // 3], order[maps.normal // 3 :]
    fit(model, maps, fitted)
    normal, defects = scores(model, maps, rest), scores(model, maps, maps.normal + np.arange(maps.anomalous))
    found = []
    for seed in range(count):
        normal = np.random.default_rng(seed).permutation(normal)
        found.append((normal[:CALIBRATION], normal[CALIBRATION:], defects))
    return [{"share": share, **folders(found, share, FOLDER)} for share in MIXTURES]


@torch.inference_mode()
def sequence(model: OnePassDetector, maps: Maps, n: int) -> dict:
    """False alarms, by way of calibration, where the n normal images are frames of a rotation in a row, and where drawn at random."""
    rates = {}
    for start in range(maps.normal):
        random = np.random.default_rng(start)
        for name, order in (("in a row", np.roll(np.arange(maps.normal), -start)), ("at random", random.permutation(maps.normal))):
            rows, others = random.permutation(order[:n]), order[n:]  # which of them are held out is random in either case
            tested = scores(fit(model, maps, rows), maps, others)
            found = {model.left_out or "cross": (tested, crossed(model, maps, rows))}
            fit(model, maps, rows[HELD_OUT:])
            found["split"] = scores(model, maps, others), scores(model, maps, rows[:HELD_OUT])
            for way, (tested, calibration) in found.items():
                rate = (tested > conformal_threshold(calibration, ALPHA).value).mean()
                rates.setdefault(way, {}).setdefault(name, []).append(rate)
    return {way: {name: float(np.mean(of)) for name, of in names.items()} for way, names in rates.items()}


@torch.inference_mode()
def timed(model: OnePassDetector, maps: Maps, n: int) -> dict:
    """Seconds of the fit, and of the calibration, for n images."""
    rows, result = np.arange(n), {}
    started = time.perf_counter()
    fit(model, maps, rows)
    result["fit"] = time.perf_counter() - started
    started = time.perf_counter()
    crossed(model, maps, rows)
    return result | {"calibration": time.perf_counter() - started}


def measured(method: str, name: str, count: int, root: str) -> dict:
    overrides, numbers = SETS[name]
    cfg = config(method, overrides, root)
    model = build(cfg.model).eval()
    maps = maps_of(cfg, model)
    result = {"normal": maps.normal, "anomalous": maps.anomalous, "draws": {}}
    for n in numbers:
        found = list(draws(model, maps, n, count))
        result["draws"][n] = {kind: rates([one[kind] for one in found]) for kind in found[0]}
        for kind, entry in result["draws"][n].items():
            size = min(FOLDER, len(found[0][kind][1]))
            entry["folders"] = [{"share": share, **folders([one[kind] for one in found], share, size)} for share in MIXTURES]
        print(method, name, n, {k: (v["false_alarms"], v["found"], v["bound"]) for k, v in result["draws"][n].items()}, flush=True)
    result["seconds"] = timed(model, maps, numbers[-1])
    if name == "magnetic tiles":
        result["mixtures"] = mixtures(model, maps, count)
    if name == "C0047":
        result["sequence"] = sequence(model, maps, 40)
    return result


def tables(results: dict) -> dict[str, str]:
    """The tables of the page, by the name of their marks."""
    lines = ["| method, images | n | way | bound | false alarms | deviation | defects found | deviation |", "|" + " --- |" * 8]
    for key, result in results.items():
        for n, ways in result["draws"].items():
            for way, one in ways.items():
                alarms, found = one["false_alarms"], one["found"]
                cells = f"{100 * one['bound']:.3g} % | {alarms['mean']:.3f} ± {alarms['half']:.3f} | {alarms['deviation']:.3f}"
                cells += f" | {found['mean']:.3f} ± {found['half']:.3f} | {found['deviation']:.3f}"
                lines.append(f"| {key} | {n} | `{way}` | {cells} |")
    few = [
        "| p-values | defects | bound too small somewhere | false of the alarms at 5 % | their bound | FDR at `fdr=0.1` |",
        "|" + " --- |" * 6,
    ]
    for key, result in results.items():
        few += [folder_line(f"{key}, {CALIBRATION} held out", one) for one in result.get("mixtures", [])]
        for n, ways in result["draws"].items():
            if key.endswith("magnetic tiles"):
                few += [folder_line(f"{key}, `{way}` of {n}", one) for way in ways if way != "split" for one in ways[way]["folders"]]
    rows = ["| method | way | frames in a row | frames at random |", "| --- | --- | --- | --- |"]
    for key, result in results.items():
        for way, rate in result.get("sequence", {}).items():
            rows.append(f"| {key} | `{way}` | {rate['in a row']:.3f} | {rate['at random']:.3f} |")
    return {"draws": "\n".join(lines), "folders": "\n".join(few), "sequence": "\n".join(rows)}


def folder_line(name: str, one: dict) -> str:
    cells = f"{one['violations']:.3f} ± {one['half']:.3f} | {one['false_alarms']:.1f} | {one['bound']:.1f} | {one['fdr']:.3f}"
    return f"| {name} | {100 * one['share']:.0f} % | {cells} |"


def figure(results: dict) -> None:
    """Write the distribution of the false alarm rate over the draws of 80 images: its law for held-out scores, and what was measured."""
    mpl.use("Agg")
    mpl.rcParams |= {"svg.hashsalt": "blemish", "svg.fonttype": "none", "font.size": 9}
    from matplotlib import pyplot

    found = results.get("padim, magnetic tiles", {}).get("draws", {})
    found = found.get("80", {})
    fig, ax = pyplot.subplots(figsize=(6, 2.6), layout="constrained")
    x = np.linspace(0, 0.2, 200)
    for way, n, color in (("split", HELD_OUT, "tab:orange"), ("full", 80, "tab:blue")):
        k = rank(n, ALPHA)
        ax.plot(x, beta.cdf(x, n + 1 - k, k), color=color, label=f"calibrate={way}: {n} of 80 images calibrate")
        if way in found:
            ax.plot(found[way]["quantiles"], np.linspace(0, 1, 101), drawstyle="steps-post", color=color, lw=0.8, ls=":", label="measured")
    ax.axvline(ALPHA, color="black", lw=0.8, label="α")
    ax.set(xlabel="share of other normal images that are called anomalous", ylabel="share of draws", xlim=(0, 0.2), ylim=(0, 1))
    ax.legend(frameon=False, loc="lower right")
    fig.savefig(FIGURE, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--sets", nargs="*", default=list(SETS))
    parser.add_argument("--root", default="data")
    options = parser.parse_args()
    for method in options.methods:
        for name in options.sets:
            result = measured(method, name, options.draws, options.root)
            results = json.loads(FILE.read_text()) if FILE.is_file() else {}  # with those of other methods
            write_json(FILE, results | {f"{method}, {name}": result})
    results = json.loads(FILE.read_text())
    text = DOC.read_text()
    for name, table in tables(results).items():
        text = re.sub(
            rf"(<!-- {name} -->\n).*?(<!-- end -->)", lambda found, table=table: f"{found[1]}{table}\n{found[2]}", text, flags=re.S
        )
    DOC.write_text(text)
    figure(results)


if __name__ == "__main__":
    main()
