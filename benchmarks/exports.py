"""Which method exports to which format, and how near to its run: python benchmarks/exports.py [METHOD…]

Each method is fitted for an epoch or two to one texture of 64 px (Patch SVDD 128) with timm's random test network, and its run exported by
`blemish export` to all formats. Writes results/performance/exports.json, where methods not named keep their rows, and docs/export.md.
"""

import json
import re
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from blemish.deploy.export import ENDINGS, export_run
from blemish.edge.errors import InputError
from blemish.files import write_json
from blemish.report.formats import between
from blemish.run.config import composed, names
from blemish.run.record import environment
from blemish.run.train import train

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "results" / "performance" / "exports.json"
SMALL = ["data=textures", "data.category=brick", "backbone=test_resnet", "weights=random", "batch_size=8", "epoch_size=null", "trainer=cpu"]
SILENT = ["logger=none", "trainer.enable_progress_bar=false", "save.pictures=0", "save.curves=false", "store=off", "save.state=false"]
MORE = {
    "ganomaly": ["model.channels=8"],
    "riad": ["model.channels=8", "model.smooth=5"],
    "patch_svdd": ["image_size=128", "model.dim=16"],
    "reverse_distillation": ["model.stages=[1,2]"],
    "cflow": ["model.blocks=4"],
}
MAPS = {"spade": "maps=false"}  # what goes without


def fitted(method: str, folder: Path) -> Path:
    run = folder / method
    overrides = [f"model={method}", *SMALL, *SILENT, "image_size=64", *MORE.get(method, [])]
    epochs = composed(*overrides).trainer.max_epochs
    train(composed(*overrides, f"trainer.max_epochs={min(epochs, 2)}", f"run_dir='{run}'"))
    return run


def tried(method: str, run: Path, format: str, *overrides: str) -> dict:
    """Difference of scores as a share of their spread, and whether the batch is free; or why there is no export."""
    path = run / f"model{ENDINGS[format]}"
    try:
        cfg = composed(f"run='{run}'", f"format={format}", f"output='{path}'", *overrides, config="export")
        _, parity = export_run(cfg)
    except InputError as error:
        return {"refused": str(error)}
    maps = None if parity.map_difference is None else parity.map_difference / parity.map_scale
    return {"score": parity.score_difference / parity.score_scale, "map": maps, "flipped": parity.flipped}


def measured(method: str, folder: Path) -> dict[str, dict]:
    run = fitted(method, folder)
    given = [MAPS[method]] if method in MAPS else []
    row = {format: tried(method, run, format, *given) for format in ENDINGS}
    if given:
        row["without"] = tried(method, run, "onnx")
    return row


def cell(found: dict) -> str:
    if "refused" in found:
        return "no"
    return f"{found['score']:.0e}" + ("" if found["map"] is None else f", {found['map']:.0e}")


def page(rows: dict) -> str:
    lines = [f"| method | {' | '.join(ENDINGS)} | |", "| --- |" + " ---: |" * len(ENDINGS) + " --- |"]
    for method, row in sorted(rows.items()):
        refused = next((row[name]["refused"] for name in [*ENDINGS, "without"] if "refused" in row.get(name, {})), "")
        why = re.sub(r"^\w+ cannot be exported( with its map)?: ", "", refused)
        note = f"`{MAPS[method]}` alone: {why}" if method in MAPS else why
        lines.append(f"| {method} | {' | '.join(cell(row[name]) for name in ENDINGS)} | {note} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    rows = json.loads(KEPT.read_text())["methods"] if KEPT.is_file() else {}
    with tempfile.TemporaryDirectory() as folder:
        for method in sys.argv[1:] or names("model"):
            rows[method] = measured(method, Path(folder))
            write_json(KEPT, {"environment": environment(), "methods": rows})
            between(ROOT / "docs" / "export.md", "exports", page(rows))
    table = Table("method", *ENDINGS)
    for method, row in sorted(rows.items()):
        table.add_row(method, *(cell(row[name]) for name in ENDINGS))
    Console().print(table)


if __name__ == "__main__":
    main()
