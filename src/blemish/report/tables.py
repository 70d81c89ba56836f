"""Tables of finished runs, made from their records alone: for the terminal, as CSV, Markdown and LaTeX."""

import csv
import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, median, stdev
from typing import NamedTuple

import yaml
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from blemish.edge.checks import check_choice
from blemish.edge.errors import InputError
from blemish.files import write_csv, write_text
from blemish.report.published import Figure, published, read
from blemish.run.record import FINISHED, METRICS, PLACE, SETTING, read_record

log = logging.getLogger(__name__)

COSTS = {"fit_seconds": "fit s", "test_seconds": "test s", "peak_memory_mb": "MB"}
IDENTITY = (*SETTING, "seed", "started", "manifest_digest")  # columns that tell two runs apart
RUN = (*SETTING, "seed", "steps", "batch", *METRICS, *COSTS, "cpu", "cores", "gpu", "torch", "git", "manifest_digest", "started")
PAPER = ("paper", "difference", "paper_table", "paper_differs")  # further columns where published figures are wanted
NUMBERS = ("epochs", "epoch_size", "steps", "batch", "image_size", "crop", "tiling", "seed", "cores", *METRICS, *COSTS)  # not text
DAMAGED = (OSError, ValueError, KeyError, TypeError, AttributeError)  # raised for records and metrics that no run has left


class Grid(NamedTuple):
    """A table as text."""

    title: str
    columns: list[str]
    words: int  # the columns at the left that hold words; the others hold numbers
    rows: list[list[str]]
    best: set[tuple[int, int]]  # (row, column) of the cells to highlight
    notes: list[str]  # the first without a number, the others cited in cells as [1], [2], …


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
    size = f"{group['image_size']}" + (f" → {group['crop']}" if group["crop"] else "")
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
    columns = ["method", "data", "backbone", "px", "protocol", "seeds", *(name.replace("_", " ") for name in METRICS), *COSTS.values()]
    cells, notes, best = [], [], set()
    for group in groups:
        (method, *how), runs = label(group), group["runs"]
        row = [method, place(group), *how, ",".join(map(str, group["seeds"]))]
        cells.append(row + [spread([run[name] for run in runs]) for name in METRICS] + costs(runs))
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
    parts = {
        "One pass over the training images, or none": [row for row in rows if row["epochs"] is None],
        "Trained, not cut": [row for row in rows if row["epochs"] is not None and row["variant"] != "cut"],
        "Trained, cut to minutes on a CPU": [row for row in rows if row["epochs"] is not None and row["variant"] == "cut"],
    }
    return [by_run(part, "image_auroc")._replace(title=title) for title, part in parts.items() if part]


def highlights(rows: Sequence[Mapping], count: int = 6) -> Grid:
    """The `count` rows with the highest image AUROC, one for each method and data set; those without pixel metrics come last."""
    ranked = sorted(pooled(rows), key=lambda group: (ranking(group, "pixel_auroc") == -math.inf, -ranking(group, "image_auroc")))
    best: dict[tuple[str, str], list[dict]] = {}
    for group in ranked:
        best.setdefault((group["method"], place(group)), group["runs"])
    chosen = [run for runs in list(best.values())[:count] for run in runs]
    grid = by_run(chosen, "image_auroc")
    columns = [grid.columns.index(name) for name in ("method", "data", "backbone", "image auroc", "pixel auroc", "aupro", "fit s")]
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


# ---- formats


def show(console: Console, grid: Grid, bold: bool) -> None:
    """Print a grid and its notes; words that all rows share are printed above it, columns without any value are left out.

    Text wraps between words to fit the console, never inside a word: on a very narrow console the lines are longer.
    """
    cells = {j: [row[j] for row in grid.rows] for j in range(len(grid.columns))}
    same = {j: column[0] for j, column in cells.items() if len(column) > 1 and len(set(column)) == 1}
    shared = {j: text for j, text in same.items() if 0 < j < grid.words or text == "–"}
    above = [grid.title, *(f"{grid.columns[j]}: {text}" for j, text in shared.items() if text != "–")]
    kept = {
        j: [grid.columns[j].replace(" ", "\n", 1), *(cell.replace(" ± 0", "\n±") for cell in column)]
        for j, column in cells.items()
        if j not in shared
    }
    widths = {j: max(len(line) for cell in column for line in cell.split("\n")) for j, column in kept.items()}
    least = {j: max(len(word) for cell in kept[j] for word in cell.split()) if j < grid.words else widths[j] for j in kept}
    gaps = 2 * (len(kept) - 1)
    while sum(widths.values()) + gaps > console.width and widths != least:
        widths[max(kept, key=lambda j: widths[j] - least[j])] -= 1
    table = Table(box=SIMPLE, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), width=sum(widths.values()) + gaps)
    for j, (name, *_) in kept.items():
        table.add_column(Text(name), justify="left" if j < grid.words else "right", width=widths[j])
    for i in range(len(grid.rows)):
        table.add_row(*(Text(column[i + 1], style="bold" if bold and (i, j) in grid.best else "") for j, column in kept.items()))
    if any(above):
        console.print(Text(" · ".join(filter(None, above))))
    console.print(table, crop=False)
    console.print(Text("\n".join(numbered(grid.notes, str))))


def numbered(notes: Sequence[str], escape: Callable[[str], str]) -> list[str]:
    return [f"[{i}] " * (i > 0) + escape(note) for i, note in enumerate(notes)]


def markdown(grid: Grid, bold: bool) -> str:
    """A grid as a Markdown table with its notes."""
    lines = [f"**{in_markdown(grid.title)}**\n"] if grid.title else []
    lines.append("| " + " | ".join(map(in_markdown, grid.columns)) + " |")
    lines.append("|" + " --- |" * grid.words + " ---: |" * (len(grid.columns) - grid.words))
    for i, row in enumerate(grid.rows):
        cells = [in_markdown(cell) for cell in row]
        lines.append("| " + " | ".join(f"**{cell}**" if bold and (i, j) in grid.best else cell for j, cell in enumerate(cells)) + " |")
    return "\n".join(lines) + "\n\n" + "\n\n".join(numbered(grid.notes, in_markdown)) + "\n"


def in_markdown(text: str) -> str:
    """Text that Markdown prints as it is, on one line of a table."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return "".join("\\" + sign if sign in "\\`*|" else sign for sign in text)


TEX = {sign: "\\" + sign for sign in "&%$#_{}"} | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
TEX |= {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "±": r"$\pm$", "→": r"$\to$", "−": "$-$", "×": r"$\times$"}
TEX |= {"–": "--", "≤": r"$\le$", "[": "{[}", "]": "{]}"}  # a bare bracket at the start of a row is an option of the line break


def in_latex(text: str) -> str:
    """Text that LaTeX prints as it is."""
    return "".join(TEX.get(sign, sign) for sign in " ".join(text.split()))


def latex(grid: Grid) -> str:
    """A grid as a table environment that needs the packages booktabs and graphicx; the best cells in bold, the notes below."""
    form = "l" * grid.words + "r" * (len(grid.columns) - grid.words)
    lines = [r"\begin{table}", r"  \centering"]
    lines += [rf"  \caption{{{in_latex(grid.title)}}}"] if grid.title else []
    lines += [r"  \resizebox{\linewidth}{!}{%", rf"  \begin{{tabular}}{{{form}}}", r"    \toprule"]
    lines += ["    " + " & ".join(map(in_latex, grid.columns)) + r" \\", r"    \midrule"]
    for i, row in enumerate(grid.rows):
        cells = [rf"\textbf{{{in_latex(cell)}}}" if (i, j) in grid.best else in_latex(cell) for j, cell in enumerate(row)]
        lines.append("    " + " & ".join(cells) + r" \\")
    lines += [r"    \bottomrule", r"  \end{tabular}}", r"  \par\footnotesize"]
    lines += [f"  {note}\\par" for note in numbered(grid.notes, in_latex)]
    return "\n".join([*lines, r"\end{table}"]) + "\n"


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
) -> tuple[int, list[Grid]]:
    """Collect runs and write the files that are given; returns the number of runs and their tables.

    Rows of other runs in an existing `output` are kept and are part of every table; so `readme` and `docs`, whose rows may be of runs
    that are gone, need a CSV: InputError without.
    """
    check_choice("", ("run", "category"), by=by)
    check_choice("", METRICS, metric=metric)
    listed = Path(folder).is_file()
    if (readme or docs) and not (output or listed):
        raise InputError(f"{readme or docs}: its rows may be of runs whose folders are gone; add output=FILE.csv, which keeps its rows")
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


def between(page: str | Path, name: str, text: str) -> None:
    """Put a text between the markers <!-- name: begin --> and <!-- name: end --> of a page; InputError if it has not one of each."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    old = Path(page).read_text(encoding="utf-8")
    if old.count(begin) != 1 or old.count(end) != 1:
        raise InputError(f"{page}: expected one line {begin} and one {end}, around the text to replace")
    head, tail = old.split(begin)[0], old.split(end)[1]
    write_text(page, f"{head}{begin}\n{text}{end}{tail}")
