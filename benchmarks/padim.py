"""What PaDiM costs above its floor, in one process: python benchmarks/padim.py data=mvtec data.category=screw recipe=bundled [repeats=3]

The floor of the fit is decoding the training images and an eager forward of the same images through timm's own network. Prints the
medians, of turns with each way to run the backbone, and writes them to results/performance/padim.json and docs/performance.md.
"""

import logging
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import timm
import torch
from hydra import compose, initialize_config_dir
from rich.console import Console

from blemish.features import extractor
from blemish.files import write_json
from blemish.report.tables import between
from blemish.run import timing
from blemish.run.checkpoint import build_detector
from blemish.run.record import environment
from blemish.run.train import build_callbacks, described, expected_warnings, set_up, trainer_of

ROOT = Path(__file__).parents[1]


WAYS = {"torch, whole batches": ("torch", 2**60), "torch": ("torch", extractor.CHUNK_BYTES), "onnxruntime": ("onnxruntime", 0)}


def seconds(work) -> float:
    """Processor seconds of all threads, which a busy machine changes least."""
    started = time.process_time()
    work()
    return time.process_time() - started


def eager_floor(cfg, data) -> tuple[float, float]:
    """Seconds of decoding all training images, and of timm's network on them as it comes."""
    net = timm.create_model(cfg.backbone, features_only=True, out_indices=tuple(cfg.model.stages)).eval()
    decode = forward = 0.0
    batches = iter(data.train_dataloader())
    while True:
        started = time.process_time()
        batch = next(batches, None)
        decode += time.process_time() - started
        if batch is None:
            return decode, forward
        with torch.no_grad():
            forward += seconds(lambda image=batch.image: net(image))


def once(cfg, data, floor: float, way: str) -> dict[str, float]:
    cfg.engine, extractor.CHUNK_BYTES = WAYS[way]
    model = build_detector(cfg)
    times, _, evaluate = build_callbacks(cfg)
    trainer = trainer_of(cfg, [times, evaluate])
    fit = seconds(lambda: trainer.fit(model, datamodule=data))
    before = times.total()
    trainer.test(model, datamodule=data, verbose=False)
    metrics = seconds(lambda: evaluate.metrics(None, None))
    after = times.total()
    scored = sum(after[stage] - before[stage] for stage in ("score", "metrics")) + metrics
    count = sum(sample.split == "train" for sample in data.samples)
    return {
        "fit": fit,
        "fit_over_floor": fit / floor,
        **{f"{stage} of fit": before[stage] for stage in ("decode", "features", "fit")},
        "features, ms an image": 1e3 * before["features"] / count,
        "after_the_maps": scored,
    }


def page(result: dict) -> str:
    rows, machine = result["median"], result["environment"]
    names = list(next(iter(rows.values())))
    lines = ["| backbone by | " + " | ".join(name.replace("_", " ") for name in names) + " |", "| --- |" + " ---: |" * len(names)]
    lines += [f"| {way} | " + " | ".join(f"{value:.2f}" for value in row.values()) + " |" for way, row in rows.items()]
    where = f"{machine['cpu']}, {machine['torch_threads']} threads, torch {machine['packages']['torch']}"
    images = f"{result['images']['train']} training and {result['images']['test']} test images"
    floor = "floor: decode {decode:.2f}, eager forward {eager_forward:.2f}".format(**result["floor"])
    return "\n".join(lines) + f"\n\n`{' '.join(result['overrides'])}`, {images}; {floor}; {where}; medians of {len(result['runs'])}.\n"


def main() -> None:
    overrides = sys.argv[1:] or ["data=mvtec", "data.category=screw", "recipe=bundled"]
    repeats = next((int(o.split("=")[1]) for o in overrides if o.startswith("repeats=")), 3)
    overrides = [o for o in overrides if not o.startswith("repeats=")]
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    timing.time = SimpleNamespace(perf_counter=time.process_time)  # the stages too are charged with processor seconds
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        fixed = ["model=padim", "protocol=paper", "trainer=cpu", "trainer.enable_progress_bar=false", "logger=none", "save.pictures=0"]
        cfg = compose("train", overrides=[*fixed, *overrides])
    runs = []
    with expected_warnings():
        data = set_up(cfg, described(cfg))
        once(cfg, data, 1, "onnxruntime")  # makes the graph, where there is none, and warms up
        for _ in range(repeats):
            decode, forward = eager_floor(cfg, data)
            runs.append(
                {"floor": {"decode": decode, "eager_forward": forward}, **{way: once(cfg, data, decode + forward, way) for way in WAYS}}
            )
    median = {way: {name: statistics.median(run[way][name] for run in runs) for name in runs[0][way]} for way in runs[0]}
    counts = {split: sum(sample.split == split for sample in data.samples) for split in ("train", "test")}
    shown = [one for one in overrides if not one.startswith("data.root=")]
    result = {
        "overrides": shown,
        "images": counts,
        "floor": median.pop("floor"),
        "median": median,
        "runs": runs,
        "environment": environment(),
    }
    write_json(ROOT / "results" / "performance" / "padim.json", result)
    between(ROOT / "docs" / "performance.md", "padim", page(result))
    Console(soft_wrap=True).print(page(result), markup=False)


if __name__ == "__main__":
    main()
