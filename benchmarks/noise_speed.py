"""Time, kernels and nearness to the exact search of the noise detector's patch search.

BLEMISH_NOISE_ORACLES=folder python benchmarks/noise_speed.py [--before FOLDER] writes results/noise_speed.json, and from it three tables of
docs/noise_residual.md. FOLDER has an earlier version of the project, whose search is timed in turn with this one: `git archive 31a4a17`
is the last with a search of every patch. Times are CPU seconds of one thread, which other work on the machine changes least; the smallest
of three runs of small images.
"""

import argparse
import inspect
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import skimage.data
import torch
from false_alarms import DOC, ROOT, keep, put
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from blemish.noise import background, patches
from blemish.noise.pyramid import pyramid

BOX = (-8, 8)
MODEL = {"patch": 8, "neighbors": 16, "h": 10.0, "relative": False, "box": BOX, "tile": 512, "seed": 0}
# what the authors' program took over what the version 31a4a17 took, CPU seconds on one core of one kind, four scales
REFERENCE = {(128, 192, 1): 2.58 / 1.12, (82, 121, 3): 1.73 / 0.55, (164, 241, 3): 10.04 / 2.94}
NEAREST = {1: (128, 192, 1), 3: (164, 241, 3)}  # whose ratio stands for larger images
SIZES = (*REFERENCE, (320, 480, 1), (320, 480, 3), (512, 512, 1), (2048, 2048, 1))


def photograph(height: int, width: int, channels: int) -> Tensor:
    """A coffee cup (C, H, W) in [0, 255], mirrored as often as it takes."""
    cup = np.pad(skimage.data.coffee(), ((0, max(0, height - 400)), (0, max(0, width - 600)), (0, 0)), mode="symmetric")[:height, :width]
    image = torch.tensor(np.ascontiguousarray(cup)).movedim(2, 0).float()
    return image if channels == 3 else image.mean(0, keepdim=True)


def levels_of(image: Tensor, scales: int = 4) -> list[Tensor]:
    """The levels (B, C, h, w) of images (B, C, H, W) that have room for patches."""
    return [x for x in pyramid(image, scales) if patches.enough(*x.shape[2:], 8, 16, 8)]


def redraw(image: Tensor) -> None:
    """The model of images (B, C, H, W), also by versions that take one at a time."""
    together = "images" in inspect.signature(background.model).parameters
    for x in [image] if together else image:
        background.model(x, **MODEL, search="trees")


def one_core(work: Callable[[], object]) -> float:
    """CPU seconds on one thread."""
    torch.set_num_threads(1)
    start = time.process_time()
    work()
    return time.process_time() - start


def timed(levels: Path, repeats: int) -> None:
    """Print the CPU seconds of each level in a file, and the kernels of one and of four images, of the version on the path."""
    with torch.inference_mode():
        images = torch.load(levels)
        redraw(images[0][..., :100, :100])
        seconds = [min(one_core(lambda x=x: redraw(x)) for _ in range(repeats)) for x in images]
        print(*seconds, kernels(images, 1), kernels(images, 4))


class Kernels(TorchDispatchMode):
    """Counts operators that are no views."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        views = [value.alias_info is not None and not value.alias_info.is_write for value in func._schema.returns]
        self.count += not any(views) and "empty" not in func.name()
        return func(*args, **(kwargs or {}))


def kernels(levels: list[Tensor], images: int) -> int:
    """How many kernels the model of some images starts on a GPU, counted on tensors without data."""
    with FakeTensorMode(), Kernels() as counter:
        for x in levels:
            redraw(torch.empty(images, *x.shape[1:], device="cuda"))
    return counter.count


def timing(size: tuple[int, int, int], before: Path | None) -> dict:
    """CPU seconds of the finest scale and of all, and numbers of kernels, of this version and of the one in a folder."""
    row = {"image": f"{size[0]}×{size[1]}, {'RGB' if size[2] == 3 else 'grey'}"}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "levels.pt"
        torch.save(levels_of(photograph(*size)[None]), file)
        for name, root in (("now", ROOT), ("before", before)):
            if root is None or (name == "before" and size[0] > 320):
                continue
            found = subprocess.run(
                [sys.executable, __file__, "--levels", file, "--repeats", "3" if size in REFERENCE else "1"],
                env=os.environ | {"PYTHONPATH": str(Path(root) / "src"), "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                check=True,
                text=True,
            )
            *seconds, one, four = found.stdout.split()
            row[name] = {"finest_s": float(seconds[0]), "all_s": sum(map(float, seconds)), "kernels": [int(one), int(four)]}
    print(row, flush=True)
    return row


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
    """The fast search, and the authors' program with its first seed, against the exact search; the recall is of the patches redrawn."""
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
        redrawn = exact.index[:: patches.STEP]
        rows.append({"image": title, "search": "trees", "recall": recall(found, redrawn), **errors(image, fast, model)})
        rows.append({"image": title, "search": "reference program", "recall": recall(index, exact.index), **errors(image, theirs, model)})
    return rows


def tables(result: dict) -> tuple[str, str]:
    search = ["| image | search | recall | rms | largest | correlation of the residuals |", "|---|---|--:|--:|--:|--:|"]
    search += [
        f"| {r['image']} | {r['search']} | {r['recall']:.3f} | {r['rms']:.3f} | {r['largest']:.1f} | {r['correlation']:.5f} |"
        for r in result["nearness"]
    ]
    head = "image | finest scale | all scales | before, all scales | reference program over now | kernels for one / four images | before"
    speed = [f"| {head} |"]
    speed.append("|---|--:|--:|--:|--:|--:|--:|")
    for size, r in zip(SIZES, result["timing"], strict=True):
        now, before = r["now"], r.get("before")
        counts = [" / ".join(map(str, r[name]["kernels"])) if name in r else "–" for name in ("now", "before")]
        old = f"{before['all_s']:.2f} s" if before else "–"
        over = REFERENCE.get(size, REFERENCE[NEAREST[size[2]]])
        ratio = f"{'' if size in REFERENCE else '≈ '}{over * before['all_s'] / now['all_s']:.1f}" if before else "–"
        cells = (r["image"], f"{now['finest_s']:.2f} s", f"{now['all_s']:.2f} s", old, ratio, *counts)
        speed.append("| " + " | ".join(cells) + " |")
    small, large = (r["now"] for r in result["timing"][-2:])
    ratios = " and ".join(f"{large[key] / small[key]:.1f}" for key in ("finest_s", "all_s"))
    speed += ["", f"2048×2048 takes {ratios} times the CPU time of 512×512 (finest scale, all scales) for 16 times the pixels."]
    return "\n".join(search), "\n".join(speed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="folder of an earlier version")
    parser.add_argument("--levels", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--repeats", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.levels:
        timed(options.levels, options.repeats)
        return
    folder = os.environ.get("BLEMISH_NOISE_ORACLES")
    with torch.inference_mode():
        result = {"timing": [timing(size, options.before) for size in SIZES]}
        result["nearness"] = nearness_on_oracles(Path(folder)) if folder else []
    keep(result, ROOT / "results" / "noise_speed.json")
    search, speed = tables(result)
    put(DOC, "search", search)
    put(DOC, "speed", speed)


if __name__ == "__main__":
    main()
