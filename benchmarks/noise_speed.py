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
REFERENCE = {"128×192, grey": 2.58, "82×121, RGB": 1.73, "164×241, RGB": 10.04}  # CPU seconds of the authors' program, four scales


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
    levels = [x for x in pyramid(image[None], 4) if patches.enough(*x.shape[2:], 8, 16, 8)]
    noise = [torch.randn(x.shape, generator=torch.Generator().manual_seed(0)) for x in levels]
    tests = number_of_tests(channels, len(RADII), height, width, 4)
    a = torch.randn(2000, 2000)
    return {
        "image": f"{height}×{width}, {'RGB' if channels == 3 else 'grey'}",
        "one_core_s": one_core(lambda: background.model(image[None], **MODEL, search="trees")),
        "all_scales_one_core_s": one_core(lambda: [background.model(x, **MODEL, search="trees") for x in levels]),
        "model_s": best(lambda: background.model(image[None], **MODEL, search="trees"), repeats),
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
    """The fast search, and the authors' program with its first seed, against the exact search; the recall is that of every second patch."""
    rows = []
    for name in ("brick", "coffee"):
        with np.load(folder / f"model_{name}.npz") as z:
            image, theirs = (torch.tensor(z[key]).movedim(2, 0).contiguous() for key in ("image", "model_cpp_seed1"))
            w = z["cpp_nn_x"].shape[1]
            index = torch.tensor(z["cpp_nn_y"].astype(np.int64) * w + z["cpp_nn_x"]).view(-1, 16)
        shape = patches.grid(*image.shape[1:], 8)
        table = patches.vectors(image[None], 8)
        exact = patches.exact(table, table, 16, shape, BOX)
        model, fast = (background.model(image[None], **MODEL, search=search)[0] for search in ("exact", "trees"))
        found, _ = patches.within((image - image.mean((1, 2), keepdim=True))[None], 8, 16, BOX, MODEL["seed"])
        title = f"{name}, 128×128 {'RGB' if len(image) == 3 else 'grey'}"
        rows.append({"image": title, "search": "trees", "recall": recall(found, exact.index[::2]), **errors(image, fast, model)})
        rows.append({"image": title, "search": "reference program", "recall": recall(index, exact.index), **errors(image, theirs, model)})
    return rows


def tables(result: dict) -> tuple[str, str]:
    search = ["| image | search | recall | rms | largest | correlation of the residuals |", "|---|---|--:|--:|--:|--:|"]
    search += [
        f"| {r['image']} | {r['search']} | {r['recall']:.3f} | {r['rms']:.3f} | {r['largest']:.1f} | {r['correlation']:.5f} |"
        for r in result["nearness"]
    ]
    heads = (
        "image | finest scale, CPU time of one core | all scales, CPU time of one core | reference program, all scales | finest scale "
        "| gaussianisation | NFA, all scales | peak memory so far | 2000² product"
    )
    speed = [f"| {heads} |", "|---|--:|--:|--:|--:|--:|--:|--:|--:|"]
    speed += [
        f"| {r['image']} | {r['one_core_s']:.2f} s | {r['all_scales_one_core_s']:.2f} s | {REFERENCE.get(r['image'], '–')} "
        f"| {r['model_s']:.2f} s | {r['gaussianise_s']:.2f} s | {r['nfa_s']:.2f} s | {r['peak_mib']} MiB | {r['product_s']:.3f} s |"
        for r in result["timing"]
    ]
    return "\n".join(search), "\n".join([*speed, "", f"Measured on {result['machine']}."])


def main() -> None:
    folder = os.environ.get("BLEMISH_NOISE_ORACLES")
    result = {"machine": f"{torch.get_num_threads()} cores of an {platform.machine().replace('_', '-')} server"}
    with torch.inference_mode():
        sizes = ((128, 192, 1), (82, 121, 3), (164, 241, 3), (320, 480, 1), (320, 480, 3), (512, 512, 1), (2048, 2048, 1))
        result["timing"] = [timing(*size, 2 if size[0] < 512 else 1) for size in sizes]
        result["nearness"] = nearness_on_oracles(Path(folder)) if folder else []
    keep(result, ROOT / "results" / "noise_speed.json")
    search, speed = tables(result)
    put(DOC, "search", search)
    put(DOC, "speed", speed)


if __name__ == "__main__":
    main()
