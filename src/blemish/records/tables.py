"""Tables made from what runs recorded: never a number that no run has measured."""

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rich.table import Table

from blemish.records.record import FINISHED, read_record, write_csv, write_text
from blemish.types import InputError

FIGURES = ("image_auroc", "image_ap", "image_f1_max", "pixel_auroc", "pixel_ap", "aupro")
# what tells two rows of a table apart; runs that differ in the seed alone share a row
SETTING = ("method", "variant", "epochs", "dataset", "category", "unit", "backbone", "weights", "image_size", "crop", "protocol")
COSTS = ("fit_seconds", "test_seconds", "peak_memory_mb")
RUN = (*SETTING, "seed", *FIGURES, *COSTS, "cpu", "cores", "torch", "git", "manifest_digest", "started")


def summary(metrics: Mapping) -> Table:
    """metrics.json for the terminal: a row per defect type and one for all; image_f1_max is at the best threshold in hindsight."""
    table = Table(title="test metrics", caption="f1_max: at the threshold that is best in hindsight", caption_justify="right")
    table.add_column("defect")
    table.add_column("images", justify="right")
    for name in FIGURES:
        table.add_column(name.replace("_", "\n", 1), justify="right")
    rows = {**{name: row for name, row in metrics["defects"].items() if name != "good"}, "all": metrics}
    for name, row in rows.items():
        cells = ["–" if row[column] is None else f"{row[column]:.4f}" for column in FIGURES]
        table.add_row(name, str(row["images"]), *cells, style="bold" if name == "all" else "")
    return table


def collect(folder: str | Path) -> list[dict]:
    """One dict with the keys RUN per finished run below `folder`, sorted; InputError if there is none."""
    rows = []
    for path in sorted(Path(folder).rglob("record.json")):
        record = read_record(path.parent)
        if not record or record["status"] != FINISHED or path.parent.name == "retest":
            continue
        metrics = json.loads((path.parent / "metrics.json").read_text(encoding="utf-8"))
        machine, git = record["environment"], record["environment"]["git"] or {}
        rows.append(
            {
                **{name: record.get(name) for name in (*SETTING, "seed")},  # earlier versions recorded less
                **{name: metrics[name] for name in (*FIGURES, "fit_seconds", "test_seconds")},
                "peak_memory_mb": record["peak_memory_mb"]["host"],
                "cpu": machine["cpu"],
                "cores": machine["cores_usable"],
                "torch": machine["packages"]["torch"],
                "git": git.get("commit", "")[:12] + ("+" if git.get("dirty") else ""),
                "manifest_digest": record["manifest_digest"],
                "started": record["started"],
            }
        )
    if not rows:
        raise InputError(f"runs={folder}: no finished run below this folder; expected the run folders that tools/train.py leaves")
    return sorted(rows, key=lambda row: [str(row[name]) for name in (*SETTING, "seed", "started")])


def pooled(rows: Iterable[Mapping]) -> list[dict]:
    """Runs that differ in the seed alone as one row: {figure: values}; of two runs of one seed the later counts."""
    groups: dict[tuple, dict] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in SETTING), {})[row["seed"]] = row
    return [
        {**dict(zip(SETTING, setting, strict=True)), "seeds": sorted(by_seed), "runs": list(by_seed.values())}
        for setting, by_seed in groups.items()
    ]


def spread(values: Sequence[float | None], digits: int = 3) -> str:
    """Mean, and behind ± the standard deviation over the seeds when there are several."""
    if any(value is None for value in values):
        return "–"
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def markdown(rows: Iterable[Mapping]) -> str:
    """The pooled runs as a Markdown table, and a line on where they were measured."""
    figures = [name.replace("_", " ") for name in FIGURES]
    columns = ["method", "data", "backbone", "px", "protocol", "seeds", *figures, "fit s", "test s", "MB"]
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * 6 + " ---: |" * (len(columns) - 6)]
    rows = list(rows)
    for group in pooled(rows):
        runs = group["runs"]
        data = " ".join(str(part) for part in (group["dataset"], group["category"]) if part) + (" tiles" if group["unit"] == "tile" else "")
        size = f"{group['image_size']}" + (f" → {group['crop']}" if group["crop"] else "")
        backbone = f"{group['backbone']} ({Path(group['weights']).name})" if group["backbone"] else "–"
        seeds = ",".join(str(seed) for seed in group["seeds"])
        epochs = group["epochs"] and f"{group['epochs']} epoch{'s' * (group['epochs'] > 1)}"
        cells = [", ".join(filter(None, (group["method"], group["variant"], epochs))), data, backbone, size, group["protocol"], seeds]
        cells += [spread([run[name] for run in runs]) for name in FIGURES]
        cells += ["–" if runs[0][name] is None else f"{statistics.median(run[name] for run in runs):.0f}" for name in COSTS]
        lines.append("| " + " | ".join(cells) + " |")
    machines = sorted({f"{row['cpu']}, {row['cores']} cores, torch {row['torch']}" for row in rows})
    costs = "Seconds and peak memory: medians over the seeds, of the whole process."
    return "\n".join(lines) + f"\n\nMeasured on {'; '.join(machines)}. {costs}\n"


def write(folder: str | Path, output: str | Path, readme: str | Path | None) -> int:
    """Write every run below `folder` to `output` (.csv) and their table between the markers of `readme`; returns how many runs."""
    rows = collect(folder)
    write_csv(output, RUN, [[row[name] for name in RUN] for row in rows])
    if readme:
        between(readme, "runs", markdown(rows))
    return len(rows)


def between(page: str | Path, name: str, text: str) -> None:
    """Put a text between the markers <!-- name: begin --> and <!-- name: end --> of a page; InputError if it has not one of each."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    old = Path(page).read_text(encoding="utf-8")
    if old.count(begin) != 1 or old.count(end) != 1:
        raise InputError(f"{page}: expected one line {begin} and one {end}, with what is replaced between them")
    head, tail = old.split(begin)[0], old.split(end)[1]
    write_text(page, f"{head}{begin}\n{text}{end}{tail}")
