"""Seconds and memory of every one-pass method, and what the store saves a sweep: python benchmarks/one_pass.py [OVERRIDES…]

Each method fits and tests in a process of its own, three times: without the store, with one that is empty when the sweep begins, and with
a filled one. Default overrides: data=mvtec data.category=screw recipe=bundled. SPADE matches each stage by itself, as all stages together
take eight times as long; self_similarity is run on tiles of 64 px without overlap, as its own geometry runs the network on fifty times the
pixels. Writes results/performance/one_pass.json and docs/performance.md.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from blemish.files import write_json
from blemish.report.formats import between
from blemish.run.record import environment, read_record
from blemish.run.timing import STAGES

ROOT = Path(__file__).parents[1]
METHODS = {
    "padim": [],
    "patchcore": [],
    "spade": ["model.matching=per_stage"],
    "dfm": [],
    "dfkde": [],
    "dfkdm": [],
    "self_similarity": ["image_size=256", "batch_size=8", "model.tile=64", "model.stride=64", "model.tile_input=64"],
}
FIXED = ["protocol=paper", "trainer=cpu", "trainer.enable_progress_bar=false", "logger=none", "save.pictures=0", "save.curves=false"]
SWEEPS = {"off": [], "on, empty at first": ["store=on"], "on, filled": ["store=on"]}


def once(method: str, overrides: list[str], folder: Path) -> dict:
    """Seconds by stage, fit and test seconds, and peak memory of one run."""
    run_dir = f"run_dir='{folder}'"
    command = [sys.executable, str(ROOT / "tools" / "train.py"), f"model={method}", *FIXED, *overrides, *METHODS[method], run_dir]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics, record = json.loads((folder / "metrics.json").read_text()), read_record(folder)
    total = metrics["fit_seconds"] + metrics["test_seconds"]
    return {"method": method, **record["seconds"], "total": total, "MB": record["peak_memory_mb"]["host"], "AUROC": metrics["image_auroc"]}


def page(result: dict) -> str:
    names = ["method", *STAGES, "total", "MB"]
    lines = ["| " + " | ".join([*names, *(f"total, store {sweep}" for sweep in list(SWEEPS)[1:])]) + " |"]
    lines.append("| --- |" + " ---: |" * (len(names) + len(SWEEPS) - 2))
    for off, *on in zip(*result["sweeps"].values(), strict=True):
        cells = [off["method"], *(f"{off[name]:.1f}" for name in names[1:-1]), f"{off['MB']:.0f}", *(f"{row['total']:.1f}" for row in on)]
        lines.append("| " + " | ".join(cells) + " |")
    sums = {name: sum(row["total"] for row in rows) for name, rows in result["sweeps"].items()}
    first = sums["off"]
    lines.append(
        f"| all | | | | | | {first:.1f} | | " + " | ".join(f"{s:.1f} ({first / s:.1f}× less)" for s in list(sums.values())[1:]) + " |"
    )
    machine = result["environment"]
    where = f"{machine['cpu']}, {machine['cores']} cores, torch {machine['packages']['torch']}"
    return "\n".join(lines) + f"\n\n`{' '.join(result['overrides'])}`; {where}. Seconds of fit and test, without the start of Python.\n"


def main() -> None:
    overrides = sys.argv[1:] or ["data=mvtec", "data.category=screw", "recipe=bundled"]
    sweeps = {}
    table = Table(title=" ".join(overrides))
    for name in ("store", "method", *STAGES, "total", "MB", "AUROC"):
        table.add_column(name, justify="right")
    with tempfile.TemporaryDirectory() as scratch:
        for number, (sweep, options) in enumerate(SWEEPS.items()):
            options = [*options, f"store.root='{scratch}/store'"] if options else []
            sweeps[sweep] = [once(method, [*overrides, *options], Path(scratch, f"{number}-{method}")) for method in METHODS]
            for row in sweeps[sweep]:
                table.add_row(
                    sweep,
                    *(
                        f"{value:.3f}" if name == "AUROC" else str(value) if name == "method" else f"{value:.1f}"
                        for name, value in row.items()
                    ),
                )
    Console().print(table)
    result = {"overrides": overrides, "sweeps": sweeps, "environment": environment()}
    write_json(ROOT / "results" / "performance" / "one_pass.json", result)
    between(ROOT / "docs" / "performance.md", "one pass", page(result))


if __name__ == "__main__":
    main()
