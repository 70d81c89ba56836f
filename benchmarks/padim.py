"""What PaDiM costs above its floor, in one process: python benchmarks/padim.py data=mvtec data.category=screw recipe=bundled [repeats=3]

The floor of the fit is decoding the training images and an eager forward of the same images through timm's own network. Prints the
medians as a table and writes them to results/performance/padim.json and docs/performance.md.
"""

import logging
import statistics
import sys
import time
from pathlib import Path

import timm
import torch
from hydra import compose, initialize_config_dir
from rich.console import Console
from rich.table import Table

from blemish.files import write_json
from blemish.report.tables import between
from blemish.run.config import build
from blemish.run.record import environment
from blemish.run.train import build_callbacks, described, expected_warnings, set_up, trainer_of

ROOT = Path(__file__).parents[1]


def seconds(work) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def eager_floor(cfg, data) -> tuple[float, float]:
    """Seconds of decoding all training images, and of timm's network on them as it comes."""
    net = timm.create_model(cfg.backbone, features_only=True, out_indices=tuple(cfg.model.stages)).eval()
    decode = forward = 0.0
    batches = iter(data.train_dataloader())
    while True:
        started = time.perf_counter()
        batch = next(batches, None)
        decode += time.perf_counter() - started
        if batch is None:
            return decode, forward
        with torch.no_grad():
            forward += seconds(lambda image=batch.image: net(image))


def once(cfg, data) -> dict[str, float]:
    decode, forward = eager_floor(cfg, data)
    model = build(cfg.model)
    times, _, evaluate = build_callbacks(cfg)
    trainer = trainer_of(cfg, [times, evaluate])
    fit = seconds(lambda: trainer.fit(model, datamodule=data))
    before = times.total()
    trainer.test(model, datamodule=data, verbose=False)
    metrics = seconds(lambda: evaluate.metrics(None, None))
    after = times.total()
    scored = sum(after[stage] - before[stage] for stage in ("score", "metrics")) + metrics
    return {
        "decode": decode,
        "eager_forward": forward,
        "fit": fit,
        "fit_over_floor": fit / (decode + forward),
        "folded_forward": before["features"],
        "after_the_maps": scored,
    }


def page(result: dict) -> str:
    median, machine = result["median"], result["environment"]
    lines = ["| " + " | ".join(name.replace("_", " ") for name in median) + " |", "|" + " ---: |" * len(median)]
    lines.append("| " + " | ".join(f"{value:.2f}" for value in median.values()) + " |")
    where = f"{machine['cpu']}, {machine['torch_threads']} threads, torch {machine['packages']['torch']}"
    images = f"{result['images']['train']} training and {result['images']['test']} test images"
    return "\n".join(lines) + f"\n\n`{' '.join(result['overrides'])}`, {images}; {where}; medians of {len(result['runs'])}.\n"


def main() -> None:
    overrides = sys.argv[1:] or ["data=mvtec", "data.category=screw", "recipe=bundled"]
    repeats = next((int(o.split("=")[1]) for o in overrides if o.startswith("repeats=")), 3)
    overrides = [o for o in overrides if not o.startswith("repeats=")]
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        fixed = ["model=padim", "protocol=paper", "trainer=cpu", "trainer.enable_progress_bar=false", "logger=none", "save.pictures=0"]
        cfg = compose("train", overrides=[*fixed, *overrides])
    with expected_warnings():
        data = set_up(cfg, described(cfg))
        runs = [once(cfg, data) for _ in range(repeats)]
    median = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    counts = {split: sum(sample.split == split for sample in data.samples) for split in ("train", "test")}
    table = Table(title=f"PaDiM, {counts['train']} training and {counts['test']} test images, {torch.get_num_threads()} threads, seconds")
    for name in median:
        table.add_column(name.replace("_", "\n"), justify="right")
    for run in [*runs, median]:
        table.add_row(*(f"{value:.2f}" for value in run.values()), style="bold" if run is median else "")
    Console().print(table)
    result = {"overrides": overrides, "images": counts, "median": median, "runs": runs, "environment": environment()}
    write_json(ROOT / "results" / "performance" / "padim.json", result)
    between(ROOT / "docs" / "performance.md", "padim", page(result))


if __name__ == "__main__":
    main()
