"""Seconds and memory of an epoch of every trained method: python benchmarks/trained.py [METHOD…]

On 90 training images of screw at 256 px, with the options in METHODS: an epoch is what each further one adds to a fit of one, each fit
in a process of its own, and scoring is the test of 38 normal images; each fit runs REPEATS times, and the quickest counts. Methods with a
frozen teacher alone are measured with a filled store too. Writes results/performance/trained.json, where the rows
of methods that are not named stay, and docs/performance.md.
"""

import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from hydra import compose, initialize_config_dir
from rich.console import Console

from blemish.data.manifest import write_manifest
from blemish.files import write_json
from blemish.report.tables import between
from blemish.run.config import build
from blemish.run.record import environment, read_record

ROOT = Path(__file__).parents[1]
BUNDLED = ["backbone=tf_efficientnet_lite0", "weights=bundled"]
METHODS = {
    "stfpm": [*BUNDLED, "batch_size=8", "+trainer.accumulate_grad_batches=2"],
    "reverse_distillation": ["backbone=resnet18", "weights=random", "batch_size=16"],
    "cflow": BUNDLED,
    "dfr": BUNDLED,
    "dfr, vgg19": ["weights=random"],
    "autoencoder": [],
    "vae": [],
    "lake": [],
    "ganomaly": ["batch_size=16"],
    "riad": ["model.channels=16", "batch_size=8"],
    "patch_svdd": ["model.strides={64: 16, 32: 8}"],
}
STORED = ("stfpm", "reverse_distillation", "cflow", "dfr", "dfr, vgg19")
# epochs of the longer fit, else 3: many where one is short beside the rest of a fit
LONGER = {"dfr": 9, "patch_svdd": 9, "stfpm": 5, "dfr, vgg19": 2}
TRAIN, TEST = 90, 38
REPEATS = 2
FIXED = ["data=mvtec", "data.category=screw", "protocol=paper", "image_size=256", "trainer=cpu", "trainer.enable_progress_bar=false"]
FIXED += ["epoch_size=null", "logger=none", "save.pictures=0", "save.curves=false", "save.state=false", "save.checkpoint=false"]


def once(method: str, epochs: int, options: list[str], folder: Path) -> dict:
    """metrics.json and peak memory of one run."""
    command = [sys.executable, str(ROOT / "tools" / "train.py"), f"model={method.partition(',')[0]}", *FIXED, *METHODS[method], *options]
    command += [f"trainer.max_epochs={epochs}", f"run_dir='{folder}'"]
    before = spent()
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics, record = json.loads((folder / "metrics.json").read_text()), read_record(folder)
    return {
        "wall": metrics["fit_seconds"],
        "test": metrics["test_seconds"],
        "cpu": spent() - before,
        "MB": record["peak_memory_mb"]["host"],
    }


def spent() -> float:
    """Processor seconds of all processes that this one started and that ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def measure(method: str, manifest: Path, scratch: Path) -> dict:
    """Seconds of an epoch without and with a filled store, of the test, and peak memory."""
    machine = environment()
    row = {"method": method, "machine": f"{machine['cpu']}, {machine['cores']} cores, torch {machine['packages']['torch']}"}
    for name, options in {"epoch": [], "epoch, store": ["store=on", f"store.root='{scratch}/store'"]}.items():
        if options and method not in STORED:
            row |= {name: None, f"{name}, CPU": None}
            continue
        options = [*options, f"data.manifest='{manifest}'"]
        many, name_of_run = LONGER.get(method, 3), f"{method.replace(', ', '-')}-{len(options)}"
        if name == "epoch, store":
            once(method, 1, options, scratch / f"{name_of_run}-fill")
        one, more = ([], [])
        for repeat in range(REPEATS):
            for fits, epochs in ((one, 1), (more, many)):
                fits.append(once(method, epochs, options, scratch / f"{name_of_run}-{epochs}-{repeat}"))
        for column, key in ((name, "wall"), (f"{name}, CPU", "cpu")):
            row[column] = (min(fit[key] for fit in more) - min(fit[key] for fit in one)) / (many - 1)
        if name == "epoch":
            row |= {"score": min(fit["test"] for fit in one), "MB": max(fit["MB"] for fit in one + more)}
    return row


def cell(value: object) -> str:
    return value if isinstance(value, str) else "–" if value is None else f"{value:.0f}" if value > 100 else f"{value:.1f}"


def page(result: dict) -> str:
    names = ["method", "epoch", "epoch, CPU", "epoch, store", "epoch, store, CPU", "score", "MB"]
    lines = ["| " + " | ".join(names) + " |", "| --- |" + " ---: |" * (len(names) - 1)]
    lines += ["| " + " | ".join(cell(row[name]) for name in names) + " |" for row in result["rows"]]
    machines: dict[str, list[str]] = {}
    for row in result["rows"]:
        machines.setdefault(row["machine"], []).append(row["method"])
    usual = max(machines, key=lambda machine: len(machines[machine]))
    others = [f"; {', '.join(names)}: {machine}" for machine, names in machines.items() if machine != usual]
    return "\n".join(lines) + f"\n\nSeconds; {usual}{''.join(others)}.\n"


def main() -> None:
    chosen = sys.argv[1:] or list(METHODS)
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        data = build(compose("train", overrides=FIXED).data)
    data.setup()
    train = [sample for sample in data.samples if sample.split == "train"][:TRAIN]
    good = [sample for sample in data.samples if sample.split == "test" and sample.label == 0][:TEST]
    path = ROOT / "results" / "performance" / "trained.json"
    known = json.loads(path.read_text())["rows"] if path.is_file() else []
    by_name = {row["method"]: row for row in known}
    with tempfile.TemporaryDirectory() as scratch:
        manifest = Path(scratch, "manifest.csv")
        write_manifest(manifest, train + good)
        for method in chosen:
            by_name[method] = measure(method, manifest, Path(scratch))
            Console().print({name: cell(value) for name, value in by_name[method].items()})
            rows = [by_name[name] for name in METHODS if name in by_name]
            result = {"rows": rows, "options": METHODS, "environment": environment()}
            write_json(path, result)
            between(ROOT / "docs" / "performance.md", "trained", page(result))


if __name__ == "__main__":
    main()
