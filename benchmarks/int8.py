"""What 8-bit integers save an export, and what they change: python benchmarks/int8.py RUN… [threads=1]

Each run is exported with precision=int8. One image at a time goes through its graph by integers and by float32 in turn, and decisions are
counted on up to 200 test images. Writes results/performance/int8.json, where runs of other data keep their rows, and docs/performance.md.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.console import Console

from blemish.deploy.export import export_run
from blemish.deploy.parity import arrays_of, chosen
from blemish.edge.runtime import EXACT, Model, to_input
from blemish.files import write_json
from blemish.report.formats import between
from blemish.run.checkpoint import load
from blemish.run.config import composed
from blemish.run.record import environment, read_record
from blemish.run.results import preprocessing_of

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "results" / "performance" / "int8.json"
CALLS = 60


def latency(path: Path, run: Path, threads: int) -> dict[str, float]:
    """Median processor and wall milliseconds of an image's score in both precisions, which take turns."""
    model, saved = Model(path, threads), load(run, "cpu")[0]
    arrays = arrays_of(chosen(None, run, saved.data, 8), preprocessing_of(saved))
    inputs, found = [to_input(array, model.metadata)[None] for array in arrays], {"float32": [], "int8": []}
    for turn in range(CALLS + 5):
        for name, times in found.items():
            wall, cpu = time.perf_counter(), time.process_time()
            model.run(inputs[turn % len(inputs)], **{EXACT: np.array(name == "float32")})
            times.append((1e3 * (time.process_time() - cpu), 1e3 * (time.perf_counter() - wall)))
    pairs = [
        (f"{name}_{kind}_ms", [one[i] for one in times[5:]]) for name, times in found.items() for i, kind in enumerate(("cpu", "wall"))
    ]
    return {name: statistics.median(times) for name, times in pairs}


def measured(run: Path, threads: int) -> tuple[str, dict]:
    record = read_record(run)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        options = [f"run='{run}'", f"output='{path}'", "precision=int8", "n=200", "flips=1000000"]
        parity = export_run(composed(*options, config="export"))[1]
        rows = len(getattr(load(run, "cpu")[1], "bank", ()))
        row = {
            "method": record["method"] + (f", {rows} rows" if rows else ""),
            "data": " ".join(filter(None, (record["dataset"], record["category"]))),
        }
        row |= {"threads": threads, **latency(path, run, threads), **parity.band._asdict(), "MB": path.stat().st_size / 1e6}
    return f"{row['method']} {row['data']} {threads}", row


def page(rows: dict) -> str:
    names = ("method", "data", "threads", "float32, ms", "int8, ms", "ratio", "images held out", "risk", "tested", "flips", "scored twice")
    lines = [f"| {' | '.join(names)} |", "| --- | --- |" + " ---: |" * (len(names) - 2)]
    for _, row in sorted(rows.items()):
        slow, fast = row["float32_wall_ms"], row["int8_wall_ms"]
        cells = [row["method"], row["data"], row["threads"], f"{slow:.1f}", f"{fast:.1f}", f"{fast / slow:.2f}", row["images"]]
        cells += [f"{100 * row['risk']:.1f} %", row["tested"], row["flips"], f"{100 * row['twice']:.0f} %"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    threads = next((int(text.partition("=")[2]) for text in sys.argv[1:] if text.startswith("threads=")), 1)
    for run in [Path(text) for text in sys.argv[1:] if not text.startswith("threads=")]:
        name, row = measured(run, threads)
        rows = (json.loads(KEPT.read_text())["rows"] if KEPT.is_file() else {}) | {name: row}
        write_json(KEPT, {"rows": rows, "environment": environment()})
        between(ROOT / "docs" / "performance.md", "int8", page(rows))
        Console().print(row)


if __name__ == "__main__":
    main()
