"""Speed and memory of every method on a CUDA device: python benchmarks/gpu.py [METHOD…]

With each method's own settings but weights drawn at random, on `textures` at 256 px: training images a second (of trained methods what
each further epoch adds, of one-pass methods the whole fit; a fit before that loads kernels and does not count), milliseconds to score an
image alone and in a batch of 32, which starts on the device, and the most memory that torch held. Then milliseconds of the noise detector
on a photograph of several sizes. Writes results/performance/gpu.json, where the rows of methods that are not named stay, and
docs/performance.md.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import skimage.data
import torch
from rich.console import Console

from blemish.detector import TrainedDetector
from blemish.files import write_json
from blemish.report.tables import between
from blemish.run.checkpoint import load
from blemish.run.config import build, composed, names
from blemish.run.record import environment
from blemish.run.train import train

ROOT = Path(__file__).parents[1]
FIXED = ["weights=random", "data=textures", "protocol=paper", "image_size=256", "trainer=gpu", "trainer.enable_progress_bar=false"]
FIXED += ["logger=none", "save.pictures=0", "save.curves=false", "save.state=false"]
EPOCH = 64  # images of an epoch of a trained method
EPOCHS = (2, 6)  # of the fits compared: after two epochs the images are kept in memory
SHORT = {"cflow": 16}  # whose steps see 256 vectors each
BATCH = 32
SIDES = (256, 512, 1024, 2048)  # of the noise detector's photographs, pixels


def milliseconds(work: Callable[[], object], repeats: int = 5) -> float:
    """Median time of work on the device, after two calls that do not count."""
    times = []
    for _ in range(repeats + 2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[2:])


@torch.inference_mode()
def measure(method: str, folder: Path) -> dict:
    """One row of the table."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    seconds, epoch = {}, SHORT.get(method, EPOCH)
    trained = isinstance(build(composed(f"model={method}", *FIXED).model), TrainedDetector)
    runs = [1, *EPOCHS] if trained else [1, 1]
    for number, epochs in enumerate(runs):
        more = [f"trainer.max_epochs={epochs}", f"epoch_size={epoch}"] if trained else []
        with torch.inference_mode(False):
            cfg = composed(f"model={method}", *FIXED, *more, f"run_dir='{folder}/{method}-{number}'")
            seconds[epochs] = train(cfg)["fit_seconds"]
    data = build(cfg.data)
    data.setup()
    model = load(Path(cfg.run_dir), "gpu")[1]
    image = torch.cat([batch.image for batch in data.train_dataloader()])[:BATCH].cuda()
    images = sum(sample.split == "train" for sample in data.samples)
    few, many = EPOCHS
    rate = (many - few) * epoch / (seconds[many] - seconds[few]) if trained else images / seconds[1] if seconds[1] else None
    return {
        "method": method,
        "training images/s": None if method == "noise_residual" else rate,
        "alone, ms": milliseconds(lambda: model(image[:1])),
        f"in {BATCH}, ms": milliseconds(lambda: model(image)) / BATCH,
        "MB": torch.cuda.max_memory_allocated() / 2**20,
    }


@torch.inference_mode()
def noise(side: int, folder: Path) -> dict:
    """Milliseconds and MB of the noise detector on a square photograph."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    model = build(composed("model=noise_residual").model).eval().cuda()
    photo = np.tile(skimage.data.astronaut(), (-(-side // 512), -(-side // 512), 1))[:side, :side]
    image = torch.from_numpy(photo.copy()).permute(2, 0, 1)[None].float().div(255).cuda()
    return {"side": side, "ms": milliseconds(lambda: model(image), 3), "MB": torch.cuda.max_memory_allocated() / 2**20}


def cell(value: object) -> str:
    return value if isinstance(value, str) else "–" if value is None else f"{value:.0f}" if value > 20 else f"{value:.1f}"


def table(rows: list[dict]) -> list[str]:
    lines = ["| " + " | ".join(rows[0]) + " |", "| --- |" + " ---: |" * (len(rows[0]) - 1)]
    return lines + ["| " + " | ".join(map(cell, row.values())) + " |" for row in rows]


def page(result: dict) -> str:
    rows = [{"noise_residual on": f"{row['side']}×{row['side']} px", "ms": row["ms"], "MB": row["MB"]} for row in result["noise"]]
    machine = result["environment"]
    where = f"{machine['gpus'][0]}, {machine['cores']} cores, torch {machine['packages']['torch']}."
    tables = [line for part in (result["rows"], rows) if part for line in [*table(part), ""]]
    return "\n".join([*tables, where]) + "\n"


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/gpu.py: no CUDA device here")
    every = names("model")
    chosen = sys.argv[1:] or every
    if unknown := set(chosen) - set(every):
        raise SystemExit(f"{', '.join(sorted(unknown))}: no such method; choose from {', '.join(every)}")
    path = ROOT / "results" / "performance" / "gpu.json"
    known = json.loads(path.read_text()) if path.is_file() else {"rows": [], "noise": []}
    by_name, photos = {row["method"]: row for row in known["rows"]}, {row["side"]: row for row in known["noise"]}
    work = [(by_name, method, measure) for method in chosen] + [(photos, side, noise) for side in SIDES]
    with tempfile.TemporaryDirectory() as scratch:
        for rows, name, what in work:
            rows[name] = what(name, Path(scratch))
            Console().print({column: cell(value) for column, value in rows[name].items()})
            lists = {"rows": [by_name[name] for name in every if name in by_name], "noise": [photos[side] for side in sorted(photos)]}
            write_json(path, result := {**lists, "environment": environment()})
            between(ROOT / "docs" / "performance.md", "gpu", page(result))


if __name__ == "__main__":
    main()
