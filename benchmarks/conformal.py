"""What the bounds on false alarms hold, over 1,000 draws of normal images: python benchmarks/conformal.py [--methods padim …]

Methods that score a bag for each image take longer: --methods dfm dfkdm subspace --draws 100

The maps of all images are computed once, and what every fit needs of them: products of all embeddings for PaDiM's Gaussians, distances
between all images for PatchCore's complete bank. A draw fits a method to n random normal images, either to all of them (`full`) or without
19 that are held out (`split`), and counts alarms among other normal images and the defects. Writes results/conformal.json, and from it the
tables of docs/calibration.md and the figure docs/decisions.svg; `--root` is the folder with mtd, gdxray and cookie. Minutes on one core.
"""

import argparse
import json
import math
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from conformal_page import ALPHA, CALIBRATION, FILE, HELD_OUT, SHOWN, write_page
from torch import Tensor

from blemish.detector import OnePassDetector
from blemish.edge.calibration import FULL, conformal_threshold, p_values
from blemish.edge.selection import adjusted, false_alarm_bounds
from blemish.files import write_json
from blemish.ops import gaussian
from blemish.run.config import build, composed
from blemish.run.train import described

SIDE = 96  # px of the images
CONFIDENCE, FDR = 0.95, 0.1
SETS = {  # overrides, and the numbers of normal images of a draw
    "magnetic tiles": (["data=mtd", "data.root={root}/mtd"], (19, 40, 80)),
    "C0047": (["data=gdxray", "data.root={root}/gdxray", "data.category=C0047"], (19, 40)),
    "cookie": (["data=mvtec", "data.root={root}", "data.category=cookie"], (19, 30)),
}
BACKBONE = ["backbone=tf_efficientnet_lite0", "weights=bundled", "model.stages=[2,3]"]
METHODS = {
    "padim": [*BACKBONE, "model.n_features=152"],
    "patchcore": [*BACKBONE, "model.embedding=concatenate", "model.coreset=none", "model.reweight=false"],
    "dfm": [*BACKBONE, "model.pool=4"],
    "dfkdm": [*BACKBONE, "model.stages=[4]"],
    "subspace": BACKBONE,
}
MOST = (500, 150)  # normal and anomalous images of a set, and
MOST_TESTED = (200, 100)  # of those that a draw is tested on, at most
MIXTURES, FOLDER = (0.01, 0.05, 0.2), 200  # shares of defects in a folder of so many images
REFITS = 20  # one draw of so many also compares other ways of leaving images out


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
    """The maps of the images, at most MOST of either kind, normal ones in the order of their names."""
    data = described(cfg)
    data.setup()
    parts, labels, names = [], [], []
    for split in ("train", "test"):
        for batch in data.loader(split):
            parts.append(model.features(batch.image))
            labels += batch.label.tolist()
            names += batch.path
    order = sorted(range(len(names)), key=lambda i: (labels[i], names[i]))
    counts = [labels.count(0), labels.count(1)]
    chosen, first = [], 0
    for count, most in zip(counts, MOST, strict=True):
        places = range(count) if count <= most else np.sort(np.random.default_rng(0).permutation(count)[:most])
        chosen += [order[first + i] for i in places]
        first += count
    stages = [torch.cat(stage)[chosen] for stage in zip(*parts, strict=True)]
    return Maps(stages, *(min(pair) for pair in zip(counts, MOST, strict=True)))


class Gaussians:
    """PaDiM from the products (N, N, P) of all images' embeddings: a fit takes the part of its images."""

    def __init__(self, model: OnePassDetector, maps: Maps):
        self.model, self.grid = model, [maps.stages[0][:1]]
        x = model.embed(maps.stages).transpose(0, 1).contiguous()  # (P, N, d)
        x -= x.mean(1, keepdim=True)
        self.products, self.norms = (x @ x.mT).permute(1, 2, 0).contiguous(), x.square().sum(2)  # (N, N, P), (P, N)

    def _between(self, rows: np.ndarray, others: np.ndarray) -> Tensor:
        """The products (P, n, T) of the embeddings of images and others."""
        return self.products[rows[:, None], others].movedim(2, 0).contiguous()

    def _fit(self, rows: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        own = self._between(rows, rows)
        mean = own.mean(1)  # (P, n)
        level = mean.mean(1, keepdim=True)  # (P, 1)
        centred = own - mean[:, :, None] - mean[:, None] + level[:, :, None]
        centred.diagonal(dim1=1, dim2=2).add_(self.model.epsilon * (len(rows) - 1))
        return mean, level, torch.linalg.cholesky(centred)

    def score(self, rows: np.ndarray, tested: np.ndarray) -> np.ndarray:
        """Scores of images by a fit to the images `rows`."""
        mean, level, lower = self._fit(rows)
        across = self._between(rows, tested)  # (P, n, T)
        norm = self.norms[:, tested] - 2 * across.mean(1) + level  # (P, T)
        across = across - across.mean(1, keepdim=True) - mean[:, :, None] + level[:, :, None]
        explained = torch.linalg.solve_triangular(lower, across, upper=False).square().sum(1)
        return self._scores((norm - explained).div(self.model.epsilon).clamp_min(0))

    compared = score

    def left_out(self, rows: np.ndarray) -> np.ndarray:
        """The scores of the images of a fit as `OnePassDetector.leave_one_out` has them."""
        return self._scores(gaussian.left_out_woodbury(self._fit(rows)[2], torch.arange(len(rows)), self.model.epsilon))

    def _scores(self, squared: Tensor) -> np.ndarray:
        return self.model._prediction(squared.sqrt(), self.grid, (SIDE, SIDE)).score.double().numpy()


class Neighbours:
    """PatchCore with a complete bank, from the squared distance of each patch to the nearest of each image (N, N, P)."""

    def __init__(self, model: OnePassDetector, maps: Maps):
        x = model.collect(maps.stages)  # (N, P, D)
        norm, every = x.square().sum(2), x.flatten(0, 1).T.contiguous()
        self.squared = x.new_empty(len(x), len(x), x.shape[1])
        for i, one in enumerate(x):
            self.squared[i] = ((norm - 2 * (one @ every).view(len(one), len(x), -1)).amin(2) + norm[i][:, None]).T

    def score(self, rows: np.ndarray, tested: np.ndarray) -> np.ndarray:
        return self._scores(self.squared[tested[:, None], rows].amin(1))

    compared = score

    def left_out(self, rows: np.ndarray) -> np.ndarray:
        own = self.squared[rows[:, None], rows]  # (n, n, P)
        own.diagonal(dim1=0, dim2=1).fill_(math.inf)
        return self._scores(own.amin(1))

    def _scores(self, squared: Tensor) -> np.ndarray:
        return squared.amax(1).clamp_min(0).sqrt().double().numpy()


class Bags:
    """A method itself: with `calibrate=full` each image is scored with the images of the fit in one bag."""

    def __init__(self, model: OnePassDetector, maps: Maps):
        model.expects_bag = True
        self.model, self.stages, self.rows = model, maps.stages, model.collect(maps.stages)

    def score(self, rows: np.ndarray, tested: np.ndarray, calibration: Sequence[float] = ()) -> np.ndarray:
        state = self.model.new_state(len(rows))
        state.update(self.rows[rows])
        self.model.fit(state)
        self.model.set_calibration(torch.tensor(calibration, dtype=torch.float32)[:, None].expand(-1, 2), FULL)
        return self.model.score([stage[tested] for stage in self.stages], (SIDE, SIDE)).score.double().numpy()

    def compared(self, rows: np.ndarray, tested: np.ndarray) -> np.ndarray:
        return self.score(rows, tested, self.left_out(rows))

    def left_out(self, rows: np.ndarray) -> np.ndarray:
        grid = [stage[:1] for stage in self.stages]
        return self.model.bag_scores(self.rows[rows], torch.arange(len(rows)), grid).float().double().numpy()


class Subspaces(Bags):
    """Bags of a method of all patches of an image."""

    def left_out(self, rows: np.ndarray) -> np.ndarray:
        self.score(rows, rows[:0])
        return self.model.leave_one_out([stage[rows] for stage in self.stages], (SIDE, SIDE), rows).score.double().numpy()


Fits = Gaussians | Neighbours | Bags
KINDS = {"padim": Gaussians, "patchcore": Neighbours, "dfm": Bags, "dfkdm": Bags, "subspace": Subspaces}


@torch.inference_mode()
def checked(model: OnePassDetector, maps: Maps, fits: Fits, n: int) -> dict:
    """Seconds of the method's own fit to n images and of its calibration; its scores must be those of `fits`."""
    rows, tested, size = np.arange(n), np.arange(n, len(maps.stages[0]))[-50:], (SIDE, SIDE)
    started = time.perf_counter()
    state = model.new_state(n)
    state.update(model.collect([stage[rows] for stage in maps.stages]))
    model.fit(state)
    model.fitted.fill_(n)
    fit = time.perf_counter() - started
    left = model.leave_one_out([stage[rows] for stage in maps.stages], size, rows.tolist()).score.double().numpy()
    seconds = {"fit": fit, "calibration": time.perf_counter() - started - fit}
    np.testing.assert_allclose(fits.left_out(rows), left, rtol=2e-3)
    np.testing.assert_allclose(
        fits.score(rows, tested), model.score([stage[tested] for stage in maps.stages], size).score.numpy(), rtol=2e-3
    )
    return seconds


Draw = tuple[np.ndarray, np.ndarray, np.ndarray]  # scores of calibration images, of other normal images and of defects


@torch.inference_mode()
def draws(fits: Fits, maps: Maps, n: int, count: int) -> dict[str, list[Draw]]:
    """`count` draws of n images by way of calibration; of every REFITS-th also by refits without each image, and in five folds."""
    found: dict[str, list[Draw]] = {}
    for seed in range(count):
        rng = np.random.default_rng([seed, n])
        order = rng.permutation(maps.normal)
        rows, normal = order[:n], order[n : n + MOST_TESTED[0]]
        defects = maps.normal + rng.permutation(maps.anomalous)[: MOST_TESTED[1]]
        tested = np.concatenate([normal, defects])
        scores = np.split(fits.compared(rows, tested), [len(normal)])
        found.setdefault("full", []).append((fits.left_out(rows), *scores))
        if n > HELD_OUT + 2:
            split = fits.score(rows[HELD_OUT:], np.concatenate([rows[:HELD_OUT], tested]))
            found.setdefault("split", []).append(tuple(np.split(split, [HELD_OUT, HELD_OUT + len(normal)])))
        if isinstance(fits, Gaussians) and n == 40 and seed % REFITS == 0:
            for way, parts in (("refits without each", np.split(rows, n)), ("five folds", np.array_split(rows, 5))):
                left = np.concatenate([fits.score(np.setdiff1d(rows, part), part) for part in parts])
                found.setdefault(way, []).append((left, *scores))
    return found


def decided(found: Sequence[Draw]) -> np.ndarray:
    """Shares (draws, 2) of the other normal images and of the defects that are called anomalous."""
    values = [conformal_threshold(calibration, ALPHA).value for calibration, *_ in found]
    return np.array([[(part > value).mean() for part in parts] for value, (_, *parts) in zip(values, found, strict=True)])


def rates(found: Sequence[Draw]) -> dict:
    """Means over the draws with 95 % intervals, and deviations, of false alarms and of defects found."""
    pairs = decided(found)
    mean, deviation = pairs.mean(0), pairs.std(0, ddof=1)
    half = 1.96 * deviation / math.sqrt(len(pairs))
    names = ("false_alarms", "found")
    return {name: {"mean": mean[i], "half": half[i], "deviation": deviation[i]} for i, name in enumerate(names)} | {
        "bound": conformal_threshold(found[0][0], ALPHA).alpha,
        "draws": len(pairs),
    }


def ratios(full: Sequence[Draw], split: Sequence[Draw]) -> dict[str, list[float]]:
    """Deviation of `full` over that of `split` for false alarms and defects found: [ratio, ends of its 95 % bootstrap interval]."""
    pairs = np.stack([decided(full), decided(split)])  # (2, draws, 2)
    rng = np.random.default_rng(0)
    some = pairs[:, rng.integers(pairs.shape[1], size=(500, pairs.shape[1]))].std(2)  # (2, 500, 2)
    ends = np.quantile(some[0] / some[1], (0.025, 0.975), axis=0)
    ratio = pairs[0].std(0) / pairs[1].std(0)
    return {name: [ratio[i], *ends[:, i]] for i, name in enumerate(("false_alarms", "found"))}


def folders(found: Sequence[Draw], share: float, size: int) -> dict:
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
def mixtures(fits: Fits, maps: Maps, count: int) -> list[dict]:
    """Folders resampled from the scores of one detector, for p-values of held-out images."""
    order = np.random.default_rng(0).permutation(maps.normal)
    fitted, rest = order[: maps.normal // 3], order[maps.normal // 3 :]
    normal, defects = np.split(fits.score(fitted, np.concatenate([rest, maps.normal + np.arange(maps.anomalous)])), [len(rest)])
    found = []
    for seed in range(count):
        normal = np.random.default_rng(seed).permutation(normal)
        found.append((normal[:CALIBRATION], normal[CALIBRATION:], defects))
    return [{"share": share, **folders(found, share, FOLDER)} for share in MIXTURES]


@torch.inference_mode()
def sequence(fits: Fits, maps: Maps, n: int, count: int) -> dict:
    """The bounds where the n normal images are frames of a rotation in a row, held-out ones among them at random or in a row, too.

    A folder holds the other normal frames and a share of defects.
    """
    found: dict[str, list[Draw]] = {}
    defects = maps.normal + np.arange(maps.anomalous)
    for seed in range(count):
        rng = np.random.default_rng(seed)
        turned = np.roll(np.arange(maps.normal), -rng.integers(maps.normal))
        mixed = np.concatenate([rng.permutation(turned[:n]), turned[n:]])
        for name, order in (("in a row", turned), ("in a row, held out at random", mixed), ("at random", rng.permutation(turned))):
            tested = np.concatenate([order[n:], defects])
            scores = np.split(fits.compared(order[:n], tested), [maps.normal - n])
            found.setdefault(f"full, {name}", []).append((fits.left_out(order[:n]), *scores))
            split = fits.score(order[HELD_OUT:n], np.concatenate([order[:HELD_OUT], tested]))
            found.setdefault(f"split, {name}", []).append(tuple(np.split(split, [HELD_OUT, HELD_OUT + maps.normal - n])))
    del found["full, in a row, held out at random"]  # nothing is held out
    size = maps.normal - n
    return {key: {"false_alarms": rates(one)["false_alarms"], "folders": folders(one, MIXTURES[-1], size)} for key, one in found.items()}


def measured(method: str, name: str, count: int, root: str) -> dict:
    overrides, numbers = SETS[name]
    cfg = config(method, overrides, root)
    model = build(cfg.model).eval()
    maps = maps_of(cfg, model)
    with torch.inference_mode():
        fits = KINDS[method](model, maps)
    result = {"normal": maps.normal, "anomalous": maps.anomalous, "seconds": checked(model, maps, fits, numbers[-1]), "draws": {}}
    for n in numbers:
        found = draws(fits, maps, n, count)
        entry = result["draws"][n] = {way: rates(one) for way, one in found.items()}
        for way in ("full", "split"):
            if way in found:
                size = min(FOLDER, len(found[way][0][1]))
                entry[way]["folders"] = [{"share": share, **folders(found[way], share, size)} for share in MIXTURES]
                if n == SHOWN:
                    entry[way]["quantiles"] = np.quantile(decided(found[way])[:, 0], np.linspace(0, 1, 101)).round(4).tolist()
        if "split" in found:
            entry["full"]["ratios"] = ratios(found["full"], found["split"])
        print(method, name, n, {k: (v["false_alarms"], v["found"], v["bound"], v.get("ratios")) for k, v in entry.items()}, flush=True)
    if name == "magnetic tiles":
        result["mixtures"] = mixtures(fits, maps, count)
    if name == "C0047" and not isinstance(fits, Bags):
        result["sequence"] = sequence(fits, maps, 40, count)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--methods", nargs="*", default=["padim", "patchcore"], choices=METHODS)
    parser.add_argument("--sets", nargs="*", default=list(SETS))
    parser.add_argument("--root", default="data")
    options = parser.parse_args()
    for method in options.methods:
        for name in options.sets:
            result = measured(method, name, options.draws, options.root)
            results = json.loads(FILE.read_text()) if FILE.is_file() else {}  # with those of other methods
            write_json(FILE, results | {f"{method}, {name}": result})
    write_page()


if __name__ == "__main__":
    main()
