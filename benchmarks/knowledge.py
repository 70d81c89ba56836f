"""What methods make of what is known: image AUROC and AUPRO against the number of normal images, labelled defects and contamination.

    python tools/train.py -m sweep=knowledge data=mtd sweep.name=knowledge-mtd
    python benchmarks/knowledge.py results/runs/sweeps/knowledge-mtd … [--csv FILE.csv] [--figure FILE.svg] [--page FILE.md]

Pools the seeds of every finished run below the folders and writes their mean, least and number to the CSV, whose other rows are kept, and
draws a row of curves for each data set in it. The right-most points are all normal images, then with labelled defects that the test no
longer has. A page gets the means as tables, between its marks `known` and `contamination`.
"""

import argparse
import csv
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from blemish.files import write_csv
from blemish.report.formats import between
from blemish.report.tables import collect, place, pooled

ROOT = Path(__file__).parents[1]
METRICS = {"image_auroc": "image AUROC", "aupro": "AUPRO"}
COLUMNS = ("dataset", "method", "known", "seeds", *(f"{metric}_{part}" for metric in METRICS for part in ("mean", "min")), "seconds")
KNOWN = ("unlabelled", *(str(2**i) for i in range(5)), "all", "+1", "+3", "+10")
CONTAMINATION = ("all", "5 %", "10 %", "20 %")


def known_of(group: Mapping) -> str:
    """One of KNOWN or CONTAMINATION, or the words of the record for any other training."""
    if group["protocol"] == "unlabelled":
        return "unlabelled"
    text = group["knowledge"] or "all"
    forms = ((r"(\d+) shots", r"\1"), (r"(\d+) defects", r"+\1"))
    if share := re.fullmatch(r"(\S+) contaminated", text):
        return f"{100 * float(share[1]):.3g} %"
    return next((match.expand(form) for pattern, form in forms if (match := re.fullmatch(pattern, text))), text)


def rows_of(folders: Sequence[Path]) -> list[dict]:
    """A row of COLUMNS for every setting and number of seeds."""
    rows = []
    for group in pooled([row for folder in folders for row in collect(folder)]):
        row = {"dataset": place(group), "method": group["method"], "known": known_of(group), "seeds": len(group["seeds"])}
        for metric in METRICS:
            values = [run[metric] for run in group["runs"] if run[metric] is not None]
            row |= {f"{metric}_mean": values and sum(values) / len(values), f"{metric}_min": values and min(values)}
        row["seconds"] = max(run["fit_seconds"] + run["test_seconds"] for run in group["runs"])
        rows.append(row)
    return rows


def write(rows: Sequence[Mapping], path: Path) -> list[dict]:
    """Write rows to a CSV, in place of those of the same data, method and knowledge, and return all that it then has, sorted."""
    order = {known: i for i, known in enumerate((*KNOWN, *CONTAMINATION[1:]))}
    every = {}
    if path.exists():
        with path.open(encoding="utf-8", newline="") as file:
            every = {tuple(row[name] for name in COLUMNS[:3]): row for row in csv.DictReader(file)}
        every = {key: row | {name: float(row[name]) if row[name] else None for name in COLUMNS[3:]} for key, row in every.items()}
    every |= {tuple(row[name] for name in COLUMNS[:3]): row for row in rows}
    every = sorted(every.values(), key=lambda row: (row["dataset"], row["method"], order.get(row["known"], len(order))))
    shown = [[f"{value:.6g}" if isinstance(value, float) else value or "" for value in row.values()] for row in every]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_csv(path, COLUMNS, shown)
    return every


def table(rows: Sequence[Mapping], columns: Sequence[str]) -> str:
    """Mean image AUROC of each data set and method, a column for each of what is known, in Markdown."""
    lines, found = ["| set | method | " + " | ".join(columns) + " |", "| --- | --- |" + " ---: |" * len(columns)], {}
    for row in rows:
        found.setdefault((row["dataset"], row["method"]), {})[row["known"]] = row
    for (dataset, method), of in found.items():
        if any(known in of for known in columns if known != "all"):
            cells = [f"{of[known]['image_auroc_mean']:.3f}" if known in of else "–" for known in columns]
            lines.append(f"| {dataset} | `{method}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(rows: Sequence[Mapping], path: Path) -> None:
    """A row of panels for each data set, two for each metric: against what is known, and against contamination."""
    sets, methods = (sorted({row[name] for row in rows}) for name in ("dataset", "method"))
    figure = Figure(figsize=(12, 0.6 + 2.4 * len(sets)), layout="constrained")
    widths = [len(KNOWN), len(CONTAMINATION)] * len(METRICS)
    axes = figure.subplots(len(sets), len(widths), squeeze=False, sharey="row", width_ratios=widths)
    for line, name in zip(axes, sets, strict=True):
        line[0].set_ylabel(name)
        for column, axis in enumerate(line):
            (metric, title), ticks = list(METRICS.items())[column // 2], (KNOWN, CONTAMINATION)[column % 2]
            axis.set_title(title, fontsize="medium")
            axis.set_xticks(range(len(ticks)), ["unlab." if tick == "unlabelled" else tick for tick in ticks], fontsize="x-small")
            axis.set_xlim(-0.5, len(ticks) - 0.5)
            axis.set_xlabel(("normal images, and labelled defects", "contamination")[column % 2], fontsize="small")
            axis.grid(alpha=0.3)
            for method in methods:
                found = {row["known"]: row for row in rows if (row["dataset"], row["method"]) == (name, method)}
                points = [(i, found[tick]) for i, tick in enumerate(ticks) if tick in found and found[tick][f"{metric}_mean"]]
                x, mean, least = [i for i, _ in points], *([row[f"{metric}_{part}"] for _, row in points] for part in ("mean", "min"))
                color = f"C{methods.index(method)}"
                apart = int(bool(points) and ticks[x[0]] == "unlabelled")  # fitted to other images: no line leads on from it
                axis.plot(x[:apart], mean[:apart], marker="o", ms=3, color=color)
                axis.plot(x[apart:], mean[apart:], marker="o", ms=3, lw=1, color=color, label=method)
                several = [i for i, value in enumerate(mean) if least[i] < value]  # points of more than one seed
                axis.vlines(*([values[i] for i in several] for values in (x, least, mean)), color=color, lw=0.6)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=len(methods), fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context({"svg.hashsalt": "blemish", "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweeps", type=Path, nargs="+", help="folders of runs")
    parser.add_argument("--csv", type=Path, default=ROOT / "results/knowledge.csv")
    parser.add_argument("--figure", type=Path, default=ROOT / "docs/images/knowledge.svg")
    parser.add_argument("--page", type=Path)
    args = parser.parse_args()
    rows = write(rows_of(args.sweeps), args.csv)
    draw(rows, args.figure)
    if args.page:
        between(args.page, "known", table(rows, KNOWN))
        between(args.page, "contamination", table(rows, CONTAMINATION))


if __name__ == "__main__":
    main()
