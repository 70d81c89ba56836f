"""Tables of finished runs, made from their records alone: for the terminal, as CSV, Markdown and LaTeX."""

import csv
import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, median, stdev

import yaml

from blemish.edge.checks import check_choice
from blemish.edge.errors import InputError
from blemish.files import write_csv, write_text
from blemish.report.formats import Grid, between, latex, markdown
from blemish.report.published import Figure, published, read
from blemish.run.record import FINISHED, METRICS, PLACE, SETTING, read_record

log = logging.getLogger(__name__)

DECISIONS = {"image_recall": "found", "image_false_alarm_rate": "false alarms"}  # shares at the run's own threshold, if it has one
COSTS = {"fit_seconds": "fit s", "test_seconds": "test s", "peak_memory_mb": "MB"}
IDENTITY = (*SETTING, "seed", "started", "manifest_digest")  # columns that tell two runs apart
FIGURES = (*METRICS, *DECISIONS, *COSTS)
RUN = (*SETTING, "seed", "steps", "batch", *FIGURES, "cpu", "cores", "gpu", "torch", "git", "manifest_digest", "started")
PAPER = ("paper", "difference", "paper_table", "paper_differs")  # further columns where published figures are wanted
NUMBERS = ("epochs", "epoch_size", "steps", "batch", "image_size", "crop", "tiling", "seed", "cores", *FIGURES)  # not text
DAMAGED = (OSError, ValueError, KeyError, TypeError, AttributeError)  # raised for records and metrics that no run has left


# ---- rows: one dict per run


def collect(folder: str | Path) -> list[dict]:
    """A dict with the keys RUN and `folder` for each finished run below `folder`, sorted; InputError if there is none."""
    folders = [path.parent for path in Path(folder).rglob("record.json") if path.parent.name != "retest"]
    rows = [row for path in sorted(folders) if (row := row_of(path))]
    if not rows:
        found = "no finished run below this folder" if Path(folder).is_dir() else "no such folder"
        raise InputError(f"runs={folder}: {found}; expected run folders of tools/train.py, or a CSV of tools/table.py")
    return sorted(rows, key=run_key)


def run_key(row: Mapping) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in IDENTITY)


def row_of(folder: Path) -> dict | None:
    """The run in a folder as a row; None if it is not finished, or with a warning if its files are damaged."""
    record = read_record(folder)
    if not (folder / "record.json").exists() or (record and record["status"] != FINISHED):
        return None
    try:
        return row_from(record, json.loads((folder / "metrics.json").read_text(encoding="utf-8")), folder)
    except DAMAGED as error:
        log.warning("%s: left out, its record.json or metrics.json is damaged (%s: %s)", folder, type(error).__name__, error)
        return None


def row_from(record: Mapping, metrics: Mapping, folder: Path) -> dict:
    """A row from a finished run's record and metrics; one of DAMAGED where they do not have what a table needs."""
    machine, git, memory = record["environment"], record["environment"]["git"] or {}, record["peak_memory_mb"]
    row = {
        **{name: record.get(name) for name in SETTING},
        "seed": int(record["seed"]),
        "steps": record.get("steps"),
        "batch": record.get("batch"),
        **{name: metrics[name] for name in (*METRICS, "fit_seconds", "test_seconds")},
        **{name: metrics.get(name) for name in DECISIONS},
        "peak_memory_mb": memory["host"],
        "cpu": machine["cpu"],
        "cores": machine["cores_usable"],
        "gpu": ", ".join(machine["gpus"]) if memory.get("gpu") else None,
        "torch": machine["packages"]["torch"],
        "git": git.get("commit", "")[:12] + ("+" if git.get("dirty") else ""),
        "manifest_digest": record["manifest_digest"],
        "started": record["started"],
        "folder": folder,
    }
    by_run([row], METRICS[0])  # raises for values that no table can print
    return row


def read_rows(path: str | Path) -> list[dict]:
    """The rows of a CSV that `write` has made, with `folder` None; InputError for any other file."""
    try:
        with Path(path).open(encoding="utf-8", errors="surrogateescape", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            if missing := [name for name in RUN if name not in (reader.fieldnames or ())]:
                raise ValueError(f"column {missing[0]!r} is missing")
            rows = list(reader)
        if any(None in row or None in row.values() for row in rows):
            raise ValueError("a row has more or fewer cells than the first")
        for row in rows:
            row |= {name: int(row[name]) if row[name].isdecimal() else float(row[name]) for name in NUMBERS if row[name]}
        return [{**{name: value if value != "" else None for name, value in row.items()}, "folder": None} for row in rows]
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{path}: not a CSV of tools/table.py ({error}); choose another file") from error


def config_of(folder: Path) -> dict:
    """The resolved config of a run as plain values; {} where it cannot be read."""
    try:
        return yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")) or {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}


def pooled(rows: Iterable[Mapping]) -> list[dict]:
    """Groups of runs that differ only in the seed: their SETTING, `seeds` and `runs`; of two runs with one seed the later counts."""
    groups: dict[tuple, dict] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in SETTING), {})[row["seed"]] = row
    return [
        {**dict(zip(SETTING, values, strict=True)), "seeds": sorted(by_seed), "runs": list(by_seed.values())}
        for values, by_seed in groups.items()
    ]


# ---- cells


def spread(values: Sequence[float | None]) -> str:
    """mean ± standard deviation over the seeds; a single value has no deviation."""
    if not values or None in values:
        return "–"
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def signed(value: float) -> str:
    """A difference with its sign, the minus as wide as the plus."""
    return f"{round(value, 3) + 0.0:+.3f}".replace("-", "−")


def label(group: Mapping) -> list[str]:
    """Method, with the steps of its training × images per step, backbone, pixels and protocol of a group."""
    trainings = sorted({(run["steps"], run["batch"]) for run in group["runs"] if run["steps"]})
    steps = ", ".join(f"{steps:,} × {batch}" for steps, batch in trainings)
    method = ", ".join(filter(None, (group["method"], group["variant"], steps)))
    backbone = f"{group['backbone']} ({Path(group['weights']).name})" if group["backbone"] else "–"
    size = f"{group['image_size'] or 'as they are'}" + (f" → {group['crop']}" if group["crop"] else "")
    pixels = (size, group["tiling"] and f"tiles of {group['tiling']}", group["resize"], "roi" * bool(group["roi"]))
    protocol = ", ".join(filter(None, (str(group["protocol"]), group["knowledge"])))
    return [method, backbone, ", ".join(filter(None, pixels)), protocol]


def place(group: Mapping) -> str:
    """The data of a group in words."""
    return " ".join(str(part) for part in (group["dataset"], group["category"]) if part) + (" tiles" if group["unit"] == "tile" else "")


def costs(runs: Sequence[Mapping]) -> list[str]:
    """The median of each of COSTS, a dash where a run has none."""
    return ["–" if any(r[name] is None for r in runs) else f"{median(r[name] for r in runs):.0f}" for name in COSTS]


def machines(rows: Iterable[Mapping]) -> str:
    """A sentence with the hardware and the version of torch of all runs."""
    found = sorted({", ".join(filter(None, (f"{r['cpu']}, {r['cores']} cores", r.get("gpu"), f"torch {r['torch']}"))) for r in rows})
    return f"Measured on {'; '.join(found)}."


def cited(text: str, notes: list[str]) -> str:
    """The number of a note in brackets; a new one is added to the notes."""
    if text not in notes:
        notes.append(text)
    return f"[{notes.index(text) + 1}]"


def figure_of(tables: Sequence[Mapping], group: Mapping, metric: str) -> Figure | None:
    """The published figure that a group compares with, by the config of its last run."""
    folder = group["runs"][-1]["folder"]
    config = config_of(folder) if folder else {name: group[name] for name in ("backbone", "weights", "image_size", "crop", "protocol")}
    return published(tables, {**{name: group[name] for name in ("method", "dataset", "category")}, "config": config}, metric)


def best_of(rows: Sequence[Sequence[str]], among: Sequence[int], columns: Iterable[int]) -> set[tuple[int, int]]:
    """The cells with the largest value of each column among some of the rows; none where fewer than two have a value."""
    best = set()
    for column in columns:
        values = {i: float(rows[i][column].split(" ")[0]) for i in among if rows[i][column] != "–"}
        best |= {(i, column) for i, value in values.items() if len(values) > 1 and value == max(values.values())}
    return best


# ---- layouts


def ranking(group: Mapping, metric: str) -> float:
    """The mean over the seeds; −∞ where a run has no value."""
    values = [run[metric] for run in group["runs"]]
    return -math.inf if None in values else mean(values)


def by_run(rows: Sequence[Mapping], metric: str, tables: Sequence[Mapping] = ()) -> Grid:
    """A row with all figures for each setting and category; on the same data the best by `metric` comes first.

    With published tables, each row also has the published figure of `metric` and our difference from it.
    """
    groups = sorted(pooled(rows), key=lambda group: (place(group), -ranking(group, metric)))
    decided = [name for name in DECISIONS if any(row[name] is not None for row in rows)]
    columns = ["method", "data", "backbone", "px", "protocol", "seeds", *(name.replace("_", " ") for name in METRICS)]
    columns += [*(DECISIONS[name] for name in decided), *COSTS.values()]
    cells, notes, best = [], [], set()
    for group in groups:
        (method, *how), runs = label(group), group["runs"]
        row = [method, place(group), *how, ",".join(map(str, group["seeds"]))]
        cells.append(row + [spread([run[name] for run in runs]) for name in (*METRICS, *decided)] + costs(runs))
    for data in {place(group) for group in groups}:
        best |= best_of(cells, [i for i, group in enumerate(groups) if place(group) == data], range(6, 6 + len(METRICS)))
    if tables:
        columns += [f"published {metric.replace('_', ' ')}", "difference"]
        for group, row in zip(groups, cells, strict=True):
            figure, ours = figure_of(tables, group, metric), ranking(group, metric)
            known = figure and ours > -math.inf
            row += [f"{figure.value:.3f} {cited(figure.note, notes)}", signed(ours - figure.value)] if known else ["–", "–"]
    legend = f"{machines(rows)} Seconds and peak memory: medians over the seeds, of the whole process."
    return Grid("", columns, 6, cells, best, [legend, *notes])


def by_effort(rows: Sequence[Mapping]) -> list[Grid]:
    """Separate tables of `by_run` for methods without training, complete trainings, and trainings that were cut short."""
    parts = {"One pass over the training images, or none": [], "Trained, not cut": [], "Trained, cut to minutes on a CPU": []}
    without, trained, cut = parts.values()
    for row in rows:
        if row["epochs"] is None or row["variant"] == "untrained":
            without.append(row)
        elif row["variant"] == "cut":
            cut.append(row)
        else:
            trained.append(row)
    return [by_run(part, "image_auroc")._replace(title=title) for title, part in parts.items() if part]


def highlights(rows: Sequence[Mapping]) -> Grid:
    """For each data set the setting with the highest image AUROC, of those with a map if there is one."""
    best: dict[str, list[dict]] = {}
    for group in sorted(pooled(rows), key=lambda group: (ranking(group, "pixel_auroc") == -math.inf, -ranking(group, "image_auroc"))):
        best.setdefault(place(group), group["runs"])
    chosen = [run for runs in best.values() for run in runs]
    grid = by_run(chosen, "image_auroc")
    columns = [grid.columns.index(name) for name in ("data", "method", "backbone", "image auroc", "pixel auroc", "aupro", "fit s")]
    notes = [f"{machines(chosen)} Seconds: medians over the seeds, of the whole process."]
    return Grid("", [grid.columns[i] for i in columns], 3, [[row[i] for i in columns] for row in grid.rows], set(), notes)


def by_category(rows: Sequence[Mapping], metric: str, tables: Sequence[Mapping] = ()) -> list[Grid]:
    """For each data set a matrix, methods × categories, of one metric; with published tables their rows and our differences below ours.

    The mean of a row is over the categories that it has, whose number is given; the best mean is marked among rows with all categories.
    """
    sets: dict[tuple[str, str], list[Mapping]] = {}
    for row in rows:
        if row[metric] is not None:
            sets.setdefault((row["dataset"], row["unit"] or "image"), []).append(row)
    if not sets:
        raise InputError(f"metric={metric}: no run has it; expected one of {', '.join(METRICS)} that the runs' methods and data give")
    title = metric.replace("_", " ")
    return [
        matrix(part, f"{title}, {dataset}{' tiles' * (unit == 'tile')}", metric, tables) for (dataset, unit), part in sorted(sets.items())
    ]


def matrix(rows: Sequence[Mapping], title: str, metric: str, tables: Sequence[Mapping]) -> Grid:
    methods: dict[tuple, dict] = {}  # how a method was run → category → group
    for group in pooled(rows):
        methods.setdefault(tuple(group[name] for name in SETTING if name not in PLACE), {})[group["category"]] = group
    categories = sorted({row["category"] for row in rows}, key=str)
    columns = [
        "method",
        "backbone",
        "px",
        "protocol",
        "seeds",
        *(str(c or "all") for c in categories),
        "mean (categories)",
        *COSTS.values(),
    ]
    cells, ours, notes = [], [], []
    for groups in methods.values():
        values = {c: [run[metric] for run in group["runs"]] for c, group in groups.items()}
        seeds = {tuple(group["seeds"]) for group in groups.values()}
        shown = ",".join(map(str, sorted(set().union(*seeds)))) + " (not everywhere)" * (len(seeds) > 1)
        runs = [run for group in groups.values() for run in group["runs"]]
        row = [*label({**next(iter(groups.values())), "runs": runs}), shown, *(spread(values.get(c, [])) for c in categories)]
        row += [f"{spread(averages(groups.values(), metric))} ({len(groups)})"]
        ours.append(len(cells))
        cells.append(row + costs(runs))
        if tables:
            cells += published_rows({c: figure_of(tables, group, metric) for c, group in groups.items()}, values, categories, notes)
    end = 5 + len(categories)
    best = best_of(cells, ours, range(5, end)) | best_of(cells, [i for i in ours if "–" not in cells[i][5:end]], [end])
    legend = f"{machines(rows)} Seconds and peak memory: medians over categories and seeds, of the whole process."
    return Grid(title, columns, 5, cells, best, [legend, *notes])


def by_data(rows: Sequence[Mapping]) -> Grid:
    """Image AUROC / pixel AUROC of the settings of one method on each data set, for its page."""
    found: dict[tuple[str, str], dict[str, str]] = {}  # how it was run → data → figures
    several = len({row["backbone"] for row in rows}) > 1
    for group in pooled(rows):
        method, backbone, pixels, protocol = label(group)
        name = (method.partition(", ")[2] or "own settings") + (f", {backbone}" if several else "")
        shown = [spread([run[metric] for run in group["runs"]]) for metric in ("image_auroc", "pixel_auroc")]
        found.setdefault((f"{name} ({protocol})", pixels), {})[place(group)] = " / ".join(shown).removesuffix(" / –")
    places = sorted({data for figures in found.values() for data in figures})
    cells = [[*setting, *(figures.get(data, "–") for data in places)] for setting, figures in sorted(found.items())]
    return Grid("", ["settings", "px", *places], 2, cells, set(), [])


def averages(groups: Iterable[Mapping], name: str) -> list[float]:
    """The mean over the categories for each seed that all have, or of their means where they share none; [] where a value is missing."""
    by_seed = [{run["seed"]: run[name] for run in group["runs"]} for group in groups]
    if any(None in values.values() for values in by_seed):
        return []
    seeds = sorted(set.intersection(*map(set, by_seed)))
    return [mean(values[seed] for values in by_seed) for seed in seeds] or [mean(mean(values.values()) for values in by_seed)]


def published_rows(figures: Mapping, ours: Mapping, categories: Sequence[str | None], notes: list[str]) -> list[list[str]]:
    """A row for each table that the figures are from, and one with our differences from them; none without any figure."""
    rows = []
    figures = {c: figure for c, figure in figures.items() if figure}
    for note in dict.fromkeys(figure.note for figure in figures.values()):
        here = {c: figure.value for c, figure in figures.items() if figure.note == note}
        table = next(figure.table for figure in figures.values() if figure.note == note)
        words = [f"published {cited(note, notes)}", str(table.get("backbone", "–")), str(table.get("image_size", "–")), "–", "–"]
        rows.append([*words, *(f"{here[c]:.3f}" if c in here else "–" for c in categories), f"{mean(here.values()):.3f} ({len(here)})"])
    if rows:
        gaps = {c: mean(ours[c]) - figure.value for c, figure in figures.items()}
        row = ["difference", "–", "–", "–", "–", *(signed(gaps[c]) if c in gaps else "–" for c in categories)]
        rows.append([*row, f"{signed(mean(gaps.values()))} ({len(gaps)})"])
    return [row + ["–"] * len(COSTS) for row in rows]


# ---- files


def write(
    folder: str | Path,  # of run folders; or a CSV of them
    output: str | Path | None,  # CSV of all runs
    readme: str | Path | None,  # Markdown file that gets `highlights` between its markers
    page: str | Path | None = None,  # file for the table in Markdown
    tex: str | Path | None = None,  # file for the table in LaTeX
    by: str = "run",  # or "category"
    metric: str = "image_auroc",  # of a matrix, and of the comparison with published figures
    papers: str | Path | None = None,  # folder of the published tables to compare with; the CSV then has the columns PAPER
    docs: str | Path | None = None,  # Markdown file that gets the tables of `by_effort` between its markers
    pages: str | Path | None = None,  # folder whose page of each method that has runs gets `by_data` between its markers
) -> tuple[int, list[Grid]]:
    """Collect runs and write the files that are given; returns the number of runs and their tables.

    Rows of other runs in an existing `output` are kept and are part of every table; so `readme`, `docs` and `pages`, whose rows may be of
    runs that are gone, need a CSV: InputError without.
    """
    check_choice("", ("run", "category"), by=by)
    check_choice("", METRICS, metric=metric)
    listed = Path(folder).is_file()
    if (shown := readme or docs or pages) and not (output or listed):
        raise InputError(f"{shown}: its rows may be of runs whose folders are gone; add output=FILE.csv, which keeps its rows")
    found, tables = read_rows(folder) if listed else collect(folder), read(papers) if papers else []
    rows = {run_key(row): row for row in (read_rows(output) if output and Path(output).exists() else [])}
    rows = [row for _, row in sorted({**rows, **{run_key(row): row for row in found}}.items())]
    grids = by_category(rows, metric, tables) if by == "category" else [by_run(rows, metric, tables)]
    if output:
        rows = [{**row, **paper_columns(row, tables, metric)} for row in rows] if tables else rows
        columns = RUN + PAPER * any(name in row for row in rows for name in PAPER)
        write_csv(output, columns, [[row.get(name) for name in columns] for row in rows])
    if readme:
        between(readme, "runs", markdown(highlights(rows), bold=False))
    if docs:
        between(docs, "runs", "\n".join(markdown(grid, bold=True) for grid in by_effort(rows)))
    for method in sorted({row["method"] for row in rows}) if pages else ():
        if (own := Path(pages, f"{method}.md")).is_file():
            between(own, "runs", markdown(by_data([row for row in rows if row["method"] == method]), bold=False).rstrip() + "\n")
    if page:
        write_text(page, "\n".join(markdown(grid, bold=by == "category") for grid in grids))
    if tex:
        write_text(tex, "\n".join(map(latex, grids)))
    return len(found), grids


def paper_columns(row: Mapping, tables: Sequence[Mapping], metric: str) -> dict:
    """The columns PAPER of a run."""
    figure = figure_of(tables, {**row, "runs": [row]}, metric)
    if figure is None or row[metric] is None:
        return dict.fromkeys(PAPER)
    name = "{paper}: {variant} ({origin})".format_map(figure.table)
    return dict(zip(PAPER, (figure.value, row[metric] - figure.value, name, "; ".join(figure.differs)), strict=True))
