"""Time, memory and nearness to the exact search of the noise detector's patch search.

BLEMISH_NOISE_ORACLES=folder python benchmarks/noise_speed.py writes results/noise_speed.json, and from it two tables of
docs/noise_residual.md. Times are the best of two, beside the time of a fixed matrix product that tells how busy the machine was.
"""

import os
import platform
import resource
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import skimage.data
import torch
from false_alarms import DOC, RADII, ROOT, keep, put
from torch import Tensor

from blemish.noise import background, patches
from blemish.noise.false_alarms import false_alarms, number_of_tests
from blemish.noise.gaussianise import gaussianise
from blemish.noise.pyramid import pyramid

BOX = (-8, 8)
MODEL = {"patch": 8, "neighbors": 16, "h": 10.0, "relative": False, "box": BOX, "tile": 512, "seed": 0}


def photograph(height: int, width: int, channels: int) -> Tensor:
    """A coffee cup (C, H, W) in [0, 255], mirrored as often as it takes."""
    cup = np.pad(skimage.data.coffee(), ((0, max(0, height - 400)), (0, max(0, width - 600)), (0, 0)), mode="symmetric")[:height, :width]
    image = torch.tensor(np.ascontiguousarray(cup)).movedim(2, 0).float()
    return image if channels == 3 else image.mean(0, keepdim=True)


def best(work: Callable[[], object], repeats: int = 3) -> float:
    """Seconds of the fastest of some runs."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def one_core(work: Callable[[], object]) -> float:
    """CPU seconds on one thread, which other work on the machine hardly changes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    start = time.process_time()
    work()
    seconds = time.process_time() - start
    torch.set_num_threads(threads)
    return seconds


def timing(height: int, width: int, channels: int, repeats: int = 2) -> dict:
    """Seconds of the model of the finest scale, of all scales, and of what follows them."""
    image = photograph(height, width, channels)
    levels = pyramid(image[None], 4)
    noise = [torch.randn(x.shape, generator=torch.Generator().manual_seed(0)) for x in levels]
    tests = number_of_tests(channels, len(RADII), height, width, 4)
    a = torch.randn(2000, 2000)
    return {
        "image": f"{height}×{width}, {'RGB' if channels == 3 else 'grey'}",
        "one_core_s": one_core(lambda: background.model(image, **MODEL, search="trees")),
        "model_s": best(lambda: background.model(image, **MODEL, search="trees"), repeats),
        "all_scales_s": best(lambda: [background.model(x[0], **MODEL, search="trees") for x in levels], repeats),
        "gaussianise_s": best(lambda: [gaussianise(x) for x in noise]),
        "nfa_s": best(lambda: [false_alarms(x, RADII, tests) for x in noise]),
        "product_s": best(lambda: a @ a),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def recall(found: Tensor, exact: Tensor) -> float:
    """Share of the exact neighbours (Q, n) that are among those found (Q, n)."""
    return (found[:, :, None] == exact[:, None]).any(1).float().mean().item()


def errors(image: Tensor, model: Tensor, exact: Tensor) -> dict:
    error = model - exact
    pair = torch.stack([(image - model).flatten(), (image - exact).flatten()])
    return {
        "rms": error.square().mean().sqrt().item(),
        "largest": error.abs().max().item(),
        "correlation": torch.corrcoef(pair)[0, 1].item(),
    }


def nearness_on_oracles(folder: Path) -> list[dict]:
    """Trees, and the authors' program with its first seed, against the exact search."""
    rows = []
    for name in ("brick", "coffee"):
        with np.load(folder / f"model_{name}.npz") as z:
            image, theirs = (torch.tensor(z[key]).movedim(2, 0).contiguous() for key in ("image", "model_cpp_seed1"))
            w = z["cpp_nn_x"].shape[1]
            index = torch.tensor(z["cpp_nn_y"].astype(np.int64) * w + z["cpp_nn_x"]).view(-1, 16)
        shape = patches.grid(*image.shape[1:], 8)
        exact = patches.exact(image, torch.arange(shape[0] * shape[1]), 8, 16, BOX)
        model = background.model(image, **MODEL, search="exact")
        trees = patches.trees(
            patches.vectors(image - image.mean(), 8), shape, image.shape[0], 16, BOX, background.TREES, background.ROUNDS, MODEL["seed"]
        )
        title = f"{name}, 128×128 {'RGB' if len(image) == 3 else 'grey'}"
        fast = background.model(image, **MODEL, search="trees")
        rows.append({"image": title, "search": "trees", "recall": recall(trees.index, exact.index), **errors(image, fast, model)})
        rows.append({"image": title, "search": "reference program", "recall": recall(index, exact.index), **errors(image, theirs, model)})
    return rows


def nearness_at_size(channels: int) -> dict:
    """Trees against the exact search for 2,000 patches of a 320×480 image; rms and largest error are those of the patch estimates."""
    image = photograph(320, 480, channels)
    shape = patches.grid(320, 480, 8)
    query = torch.randperm(shape[0] * shape[1], generator=torch.Generator().manual_seed(0))[:2000]
    exact = patches.exact(image, query, 8, 16, BOX)
    trees = patches.trees(
        patches.vectors(image - image.mean(), 8), shape, channels, 16, BOX, background.TREES, background.ROUNDS, MODEL["seed"]
    )
    found = patches.Neighbours(trees.index[query], trees.distance[query])
    estimates = [background.redraw(image, n, 8, MODEL["h"]) for n in (found, exact)]
    measured = errors(patches.vectors_at(image, query, 8), *estimates)
    title = f"photograph, 320×480 {'RGB' if channels == 3 else 'grey'}, 2,000 patches"
    return {"image": title, "search": "trees", "recall": recall(found.index, exact.index), **measured}


def tables(result: dict) -> tuple[str, str]:
    search = ["| image | search | recall | rms | largest | correlation of the residuals |", "|---|---|--:|--:|--:|--:|"]
    search += [
        f"| {r['image']} | {r['search']} | {r['recall']:.3f} | {r['rms']:.3f} | {r['largest']:.1f} | {r['correlation']:.5f} |"
        for r in result["nearness"]
    ]
    heads = (
        "image | model, finest scale, CPU time of one core | model, finest scale | model, all scales | gaussianisation | NFA, all scales "
        "| peak memory so far | 2000² product"
    )
    speed = [f"| {heads} |", "|---|--:|--:|--:|--:|--:|--:|--:|"]
    speed += [
        f"| {r['image']} | {r['one_core_s']:.1f} s | {r['model_s']:.2f} s | {r['all_scales_s']:.2f} s | {r['gaussianise_s']:.2f} s "
        f"| {r['nfa_s']:.2f} s | {r['peak_mib']} MiB | {r['product_s']:.3f} s |"
        for r in result["timing"]
    ]
    return "\n".join(search), "\n".join([*speed, "", f"Measured on {result['machine']}."])


def main() -> None:
    folder = os.environ.get("BLEMISH_NOISE_ORACLES")
    result = {"machine": f"{torch.get_num_threads()} cores of an {platform.machine().replace('_', '-')} server"}
    with torch.inference_mode():
        result["timing"] = [timing(320, 480, 1), timing(320, 480, 3), timing(640, 960, 1, 1)]
        result["nearness"] = nearness_on_oracles(Path(folder)) if folder else []
        result["nearness"] += [nearness_at_size(1), nearness_at_size(3)]
    keep(result, ROOT / "results" / "noise_speed.json")
    search, speed = tables(result)
    put(DOC, "search", search)
    put(DOC, "speed", speed)


if __name__ == "__main__":
    main()
