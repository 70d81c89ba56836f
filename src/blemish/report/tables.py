"""Tables made from what runs recorded: never a number that no run has measured."""

import csv
import json
import logging
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
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

CUT = "cut"  # the variant of recipes whose training is shortened
COSTS = ("fit_seconds", "test_seconds", "peak_memory_mb")
RUN = (*SETTING, "seed", *METRICS, *COSTS, "cpu", "cores", "gpu", "torch", "git", "manifest_digest", "started")
PAPER = ("paper", "difference", "paper_table", "paper_differs")  # further columns where published figures are wanted
COST_NAMES = ["fit s", "test s", "MB"]
LAYOUTS = ("run", "category")
NUMBERS = ("epochs", "epoch_size", "image_size", "crop", "tiling", "seed", "cores", *METRICS, *COSTS)  # columns of RUN; the others are text


class Grid(NamedTuple):
    """A table as text, whatever it is written in."""

    title: str
    columns: list[str]
    words: int  # columns at the left that hold words; the others hold numbers
    rows: list[list[str]]
    best: set[tuple[int, int]]  # cells (row, column) to be marked
    notes: list[str]


def collect(folder: str | Path) -> list[dict]:
    """One dict with the keys RUN and `folder` per finished run below `folder`, sorted; InputError if there is none."""
    rows = [row for path in sorted(Path(folder).rglob("record.json")) if path.parent.name != "retest" and (row := row_of(path.parent))]
    if not rows:
        found = "no finished run below this folder" if Path(folder).is_dir() else "no such folder"
        raise InputError(f"runs={folder}: {found}; expected the run folders that tools/train.py leaves, or a CSV of tools/table.py")
    return in_order(rows)


def in_order(rows: Iterable[dict]) -> list[dict]:
    return sorted(rows, key=lambda row: [str(row[name]) for name in (*SETTING, "seed", "started")])


def read_rows(path: str | Path) -> list[dict]:
    """The rows of a CSV that `write` has made, as `collect` gives them, with no folder; InputError for any other file."""
    try:
        with Path(path).open(encoding="utf-8", errors="surrogateescape", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            if missing := [name for name in RUN if name not in (reader.fieldnames or ())]:
                raise InputError(f"{path}: column {missing[0]!r} is missing; expected a CSV of tools/table.py, or another file")
            rows = list(reader)
            if any(None in row or None in row.values() for row in rows):
                raise ValueError("a row has more or fewer cells than the first")
            return [{**{name: read_cell(name, text) for name, text in row.items()}, "folder": None} for row in rows]
    except (OSError, ValueError, TypeError, csv.Error) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: cannot be read as a CSV of tools/table.py ({type(error).__name__}: {error})") from error


def read_cell(name: str, text: str) -> str | int | float | None:
    """The value that `write_csv` has written as text; ValueError for a number that is none."""
    if text == "" or name not in NUMBERS:
        return text or None
    value = json.loads(text)
    if not isinstance(value, int | float):
        raise ValueError(f"{name} is {text!r}")
    return value


def run_key(row: Mapping) -> tuple[str, ...]:
    """What tells two runs apart, as text."""
    return tuple("" if row[name] is None else str(row[name]) for name in (*SETTING, "seed", "manifest_digest", "started"))


def merged(rows: Sequence[dict], output: str | Path | None) -> list[dict]:
    """The rows with those that `output` has of other runs, so that writing it loses none."""
    if not output or not Path(output).exists():
        return list(rows)
    fresh = {run_key(row) for row in rows}
    stay = [row for row in read_rows(output) if run_key(row) not in fresh]
    if stay:
        log.info("%s: the %d rows of other runs stay", output, len(stay))
    return in_order([*rows, *stay])


def row_of(folder: Path) -> dict | None:
    """What a run's folder says of it, None for one that is not finished or whose files cannot be read."""
    record = read_record(folder)
    if record is None:
        log.warning("%s: left out, its record.json cannot be read", folder)
    if not record or record["status"] != FINISHED:
        return None
    try:
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        row = row_from(record, metrics, folder)
        label(*pooled([row]))  # what a table will say of it
        return row
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s: left out, its record.json or metrics.json is damaged (%s: %s)", folder, type(error).__name__, error)
        return None


def row_from(record: Mapping, metrics: Mapping, folder: Path) -> dict:
    figures = {name: metrics[name] for name in (*METRICS, "fit_seconds", "test_seconds")}
    if wrong := [name for name, value in figures.items() if value is not None and not isinstance(value, int | float)]:
        raise ValueError(f"{wrong[0]} is {figures[wrong[0]]!r}")
    if not isinstance(record["seed"], int):
        raise ValueError(f"seed is {record['seed']!r}")
    machine, git, memory = record["environment"], record["environment"]["git"] or {}, record["peak_memory_mb"]
    return {
        **{name: record.get(name) for name in (*SETTING, "seed")},
        **figures,
        "peak_memory_mb": memory["host"],
        "cpu": machine["cpu"],
        "cores": machine["cores_usable"],
        "torch": machine["packages"]["torch"],
        "git": git.get("commit", "")[:12] + ("+" if git.get("dirty") else ""),
        "manifest_digest": record["manifest_digest"],
        "started": record["started"],
        "gpu": ", ".join(machine["gpus"]) if memory.get("gpu") else None,
        "folder": folder,
    }


def config_of(folder: Path) -> dict:
    """The resolved config of a run as plain values; {} where it cannot be read."""
    try:
        return yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")) or {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}


def pooled(rows: Iterable[Mapping], setting: Sequence[str] = SETTING) -> list[dict]:
    """Runs that differ in the seed alone as one row: {figure: values}; of two runs of one seed the later counts."""
    groups: dict[tuple, dict] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in setting), {})[row["seed"]] = row
    return [
        {**dict(zip(setting, values, strict=True)), "seeds": sorted(by_seed), "runs": list(by_seed.values())}
        for values, by_seed in groups.items()
    ]


def spread(values: Sequence[float | None], digits: int = 3) -> str:
    """Mean, and behind ± the standard deviation over the seeds when there are several."""
    if not values or any(value is None for value in values):
        return "–"
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def signed(value: float) -> str:
    """A difference with its sign, a minus as long as the plus."""
    return f"{round(value, 3) + 0.0:+.3f}".replace("-", "−")


def figure_of(tables: Sequence[Mapping], group: Mapping, metric: str) -> Figure | None:
    """The published figure beside a row of runs, by the config of the last of them."""
    folder = group["runs"][-1]["folder"]
    config = config_of(folder) if folder else {name: group[name] for name in ("backbone", "weights", "image_size", "crop", "protocol")}
    return published(tables, {**{name: group[name] for name in ("method", "dataset", "category")}, "config": config}, metric)


def label(group: Mapping) -> list[str]:
    """Method, backbone, size and protocol of a row, as a reader wants them."""
    epochs = group["epochs"] and f"{group['epochs']} epoch{'s' * (group['epochs'] > 1)}"
    epochs = f"{epochs} of {group['epoch_size']} {'tiles' if group['tiling'] else 'images'}" if epochs and group["epoch_size"] else epochs
    method = ", ".join(filter(None, (group["method"], group["variant"], epochs)))
    backbone = f"{group['backbone']} ({Path(group['weights']).name})" if group["backbone"] else "–"
    size = f"{group['image_size']}" + (f" → {group['crop']}" if group["crop"] else "")
    how = (size, group["tiling"] and f"tiles of {group['tiling']}", group["resize"], "roi" * bool(group["roi"]))
    return [method, backbone, ", ".join(filter(None, how)), str(group["protocol"])]


def costs(runs: Sequence[Mapping]) -> list[str]:
    """The median of each of COSTS, a dash where a run has none."""
    return ["–" if any(r[name] is None for r in runs) else f"{statistics.median(r[name] for r in runs):.0f}" for name in COSTS]


def machines(rows: Iterable[Mapping]) -> str:
    """On what runs were measured, in one sentence."""
    found = sorted({", ".join(filter(None, (f"{r['cpu']}, {r['cores']} cores", r.get("gpu"), f"torch {r['torch']}"))) for r in rows})
    return f"Measured on {'; '.join(found)}."


def place(group: Mapping) -> str:
    """The data of a row in words."""
    return " ".join(str(part) for part in (group["dataset"], group["category"]) if part) + (" tiles" if group["unit"] == "tile" else "")


def mean_figure(group: Mapping, metric: str) -> float:
    """The mean over the seeds, which ranks the rows; −∞ where a run has none."""
    values = [run[metric] for run in group["runs"]]
    return -math.inf if None in values else statistics.mean(values)


def by_run(rows: Sequence[Mapping], metric: str, tables: Sequence[Mapping] = ()) -> Grid:
    """A row per setting and category with all figures, those on the same data by `metric`, the best first.

    With published tables each has the published figure of `metric`, our difference, and its setting.
    """
    groups, at = sorted(pooled(rows), key=lambda group: (place(group), -mean_figure(group, metric))), METRICS.index(metric)
    columns = ["method", "data", "backbone", "px", "protocol", "seeds", *(name.replace("_", " ") for name in METRICS), *COST_NAMES]
    lines, notes = [], []
    for group in groups:
        (method, *rest), runs = label(group), group["runs"]
        lines.append([method, place(group), *rest, ",".join(str(seed) for seed in group["seeds"])])
        lines[-1] += [spread([run[name] for run in runs]) for name in METRICS] + costs(runs)
    best = marked(groups, lines, range(6, 6 + len(METRICS)))
    if tables:
        columns += [f"published {columns[6 + at]}", "difference"]
        for group, line in zip(groups, lines, strict=True):
            line += beside(group, metric, figure_of(tables, group, metric), notes)
    return Grid(
        "", columns, 6, lines, best, [f"{machines(rows)} Seconds and peak memory: medians over the seeds, of the whole process.", *notes]
    )


def by_effort(rows: Sequence[Mapping]) -> list[Grid]:
    """The tables of `by_run` apart for methods that are not trained, for complete trainings, and for those that are cut short."""
    parts = {
        "One pass over the training images, or none": [row for row in rows if row["epochs"] is None],
        "Trained, not cut": [row for row in rows if row["epochs"] is not None and row["variant"] != CUT],
        "Trained, cut to minutes on a CPU": [row for row in rows if row["epochs"] is not None and row["variant"] == CUT],
    }
    return [by_run(part, "image_auroc")._replace(title=title) for title, part in parts.items() if part]


def highlights(rows: Sequence[Mapping], count: int = 6) -> Grid:
    """The `count` rows of highest image AUROC, the best of each method on the same data; those without pixel metrics come last."""
    ranked = sorted(pooled(rows), key=lambda group: (mean_figure(group, "pixel_auroc") == -math.inf, -mean_figure(group, "image_auroc")))
    best: dict[tuple[str, str], list[dict]] = {}
    for group in ranked:
        best.setdefault((group["method"], place(group)), group["runs"])
    chosen = [run for runs in list(best.values())[:count] for run in runs]
    grid = by_run(chosen, "image_auroc")
    columns = [grid.columns.index(name) for name in ("method", "data", "backbone", "image auroc", "pixel auroc", "aupro", "fit s")]
    notes = [f"{machines(chosen)} Seconds: medians over the seeds, of the whole process."]
    return Grid("", [grid.columns[i] for i in columns], 3, [[row[i] for i in columns] for row in grid.rows], set(), notes)


def beside(group: Mapping, metric: str, figure: Figure | None, notes: list[str]) -> list[str]:
    """A published figure and our difference from it; what it is and in what its setting differs becomes a note with a number."""
    ours = [run[metric] for run in group["runs"]]
    if figure is None or None in ours:
        return ["–", "–"]
    text = explained(figure)
    if text not in notes:
        notes.append(text)
    return [f"{figure.value:.3f} [{notes.index(text) + 1}]", signed(statistics.mean(ours) - figure.value)]


def explained(figure: Figure) -> str:
    """Which table a published figure stands in, and what the run beside it has otherwise."""
    differs = "; ".join(figure.differs) or "the same setting"
    return f"{figure.table['name']}, {figure.table['variant']}, {figure.table['source']} ({figure.table['origin']}). Ours: {differs}."


def marked(groups: Sequence[Mapping], lines: Sequence[Sequence[str]], columns: Iterable[int]) -> set[tuple[int, int]]:
    """The best cells of each column among the rows on the same data, ties as printed; none where a row stands alone."""
    best = set()
    for column in columns:
        for data in {place(group) for group in groups}:
            among = [i for i, group in enumerate(groups) if place(group) == data and lines[i][column] != "–"]
            best |= best_of(lines, among, column)
    return best


def best_of(lines: Sequence[Sequence[str]], among: Sequence[int], column: int) -> set[tuple[int, int]]:
    """The cells of a column with the largest figure among several rows."""
    values = {i: float(lines[i][column].split(" ")[0]) for i in among}
    return {(i, column) for i in among if len(among) > 1 and values[i] == max(values.values())}


def by_category(rows: Sequence[Mapping], metric: str, tables: Sequence[Mapping] = ()) -> list[Grid]:
    """For each data set a matrix, methods × categories, of one metric; with published tables their rows and our differences below ours.

    The mean of a row is over the categories it has, whose number stands behind it; the best mean is marked among rows that have all.
    """
    grids = []
    for dataset, unit in sorted({(row["dataset"], row["unit"] or "image") for row in rows}):
        part = [row for row in rows if (row["dataset"], row["unit"] or "image") == (dataset, unit) and row[metric] is not None]
        if part:
            grids.append(matrix(part, f"{metric.replace('_', ' ')}, {dataset}{' tiles' * (unit == 'tile')}", metric, tables))
    if not grids:
        raise InputError(f"metric={metric}: no run has it; expected one of {', '.join(METRICS)} that the runs' methods and data give")
    return grids


def matrix(rows: Sequence[Mapping], title: str, metric: str, tables: Sequence[Mapping]) -> Grid:
    how = [name for name in SETTING if name not in PLACE]
    categories = sorted({row["category"] for row in rows}, key=str)
    columns = ["method", "backbone", "px", "protocol", "seeds", *(str(c or "all") for c in categories), "mean (categories)", *COST_NAMES]
    lines, ours, notes = [], [], []
    for key in dict.fromkeys(tuple(row[name] for name in how) for row in rows):
        mine = [row for row in rows if tuple(row[name] for name in how) == key]
        groups = {group["category"]: group for group in pooled(mine)}
        values = {c: [run[metric] for run in group["runs"]] for c, group in groups.items()}
        seeds = {tuple(group["seeds"]) for group in groups.values()}
        shown = ",".join(str(seed) for seed in sorted(set().union(*seeds))) + " (not everywhere)" * (len(seeds) > 1)
        ours.append(len(lines))
        lines.append([*label(mine[0]), shown, *(spread(values.get(c, [])) for c in categories)])
        lines[-1] += [
            f"{spread(averages(groups, metric))} ({len(groups)})",
            *costs([run for group in groups.values() for run in group["runs"]]),
        ]
        figures = {c: figure_of(tables, group, metric) for c, group in groups.items()} if tables else {}
        lines += published_lines(figures, values, categories, notes)
    best = set()
    for column in range(5, 6 + len(categories)):
        among = [i for i in ours if lines[i][column] != "–" and (column < 5 + len(categories) or "–" not in lines[i][5:column])]
        best |= best_of(lines, among, column)
    legend = f"{machines(rows)} Seconds and peak memory: medians over categories and seeds, of the whole process."
    return Grid(title, columns, 5, lines, best, [legend, *notes])


def averages(groups: Mapping[str, Mapping], metric: str) -> list[float]:
    """The mean over the categories for each seed that all of them have, or of their means where they share none."""
    shared = set.intersection(*(set(group["seeds"]) for group in groups.values()))
    if not shared:
        return [statistics.mean(statistics.mean(run[metric] for run in group["runs"]) for group in groups.values())]
    return [
        statistics.mean(next(run[metric] for run in g["runs"] if run["seed"] == seed) for g in groups.values()) for seed in sorted(shared)
    ]


def published_lines(figures: Mapping, values: Mapping, categories: Sequence[str | None], notes: list[str]) -> list[list[str]]:
    """A row for every table that the figures stand in, and one of our differences from them; none without any figure."""
    lines, gaps = [], ["–"] * len(categories)
    texts = dict.fromkeys(explained(figure) for figure in figures.values() if figure)
    for text in texts:
        here = {c: figure for c, figure in figures.items() if figure and explained(figure) == text}
        table = next(iter(here.values())).table
        if text not in notes:
            notes.append(text)
        words = [f"published [{notes.index(text) + 1}]", str(table.get("backbone", "–")), str(table.get("image_size", "–")), "–", "–"]
        lines.append(
            words + [f"{here[c].value:.3f}" if c in here else "–" for c in categories] + [mean_of([f.value for f in here.values()])]
        )
        lines[-1] += ["–"] * len(COSTS)
        for i, c in enumerate(categories):
            gaps[i] = signed(statistics.mean(values[c]) - here[c].value) if c in here else gaps[i]
    if lines:
        mean = statistics.mean(statistics.mean(values[c]) - figure.value for c, figure in figures.items() if figure)
        count = sum(figure is not None for figure in figures.values())
        lines.append(["difference", "–", "–", "–", "–", *gaps, f"{signed(mean)} ({count})", *["–"] * len(COSTS)])
    return lines


def mean_of(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.3f} ({len(values)})"


def show(console: Console, grid: Grid, bold: bool) -> None:
    """Print a grid: words that all rows share stand above it, columns without any number are left out, the notes are below.

    Words wrap between words to fit the console; a narrower one than that takes lines that are longer than it.
    """
    shared = []
    if len(grid.rows) > 1:
        cells = [{row[j] for row in grid.rows} for j in range(len(grid.columns))]
        shared = [j for j, found in enumerate(cells) if len(found) == 1 and (0 < j < grid.words or found == {"–"})]
    above = [grid.title, *(f"{grid.columns[j]}: {grid.rows[0][j]}" for j in shared if grid.rows[0][j] != "–")]
    kept = [j for j in range(len(grid.columns)) if j not in shared]
    rows = [[row[j].replace(" ± 0", "\n±") for j in kept] for row in grid.rows]
    columns = list(zip([grid.columns[j].replace(" ", "\n", 1) for j in kept], *rows, strict=True))
    widths = [max(len(line) for text in column for line in text.split("\n")) for column in columns]
    least = [
        max((len(word) for text in column for word in text.split()), default=0) if j < grid.words else width
        for j, column, width in zip(kept, columns, widths, strict=True)
    ]
    while sum(widths) + 2 * (len(kept) - 1) > console.width and widths != least:
        widest = max(range(len(kept)), key=lambda at: widths[at] - least[at])
        widths[widest] -= 1
    table = Table(box=SIMPLE, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for j, (name, *_), width in zip(kept, columns, widths, strict=True):
        table.add_column(Text(name), justify="left" if j < grid.words else "right", width=width)
    for i, row in enumerate(rows):
        styles = ("bold" if bold and (i, j) in grid.best else "" for j in kept)
        table.add_row(*(Text(text, style=style) for text, style in zip(row, styles, strict=True)))
    if any(above):
        console.print(Text(" · ".join(filter(None, above))))
    width, console.width = console.width, max(console.width, sum(widths) + 2 * (len(kept) - 1))
    console.print(table)
    console.width = width
    console.print(Text("\n".join(noted(grid, str))))


def markdown(grid: Grid, bold: bool) -> str:
    """A grid as a Markdown table with its notes; numbered ones as the cells cite them."""
    lines = [f"**{in_markdown(grid.title)}**\n"] if grid.title else []
    lines.append("| " + " | ".join(in_markdown(name) for name in grid.columns) + " |")
    lines.append("|" + " --- |" * grid.words + " ---: |" * (len(grid.columns) - grid.words))
    for i, row in enumerate(grid.rows):
        cells = [in_markdown(cell) for cell in row]
        lines.append("| " + " | ".join(f"**{cell}**" if bold and (i, j) in grid.best else cell for j, cell in enumerate(cells)) + " |")
    return "\n".join(lines) + "\n\n" + "".join(f"{note}\n\n" for note in noted(grid, in_markdown))[:-1]


def noted(grid: Grid, written) -> list[str]:
    """The notes, all but the first with their numbers."""
    return [written(note) if i == 0 else f"[{i}] {written(note)}" for i, note in enumerate(grid.notes)]


def in_markdown(text: str) -> str:
    """Text that Markdown shows as it is, on one line of a table."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return "".join("\\" + sign if sign in "\\`*|" else sign for sign in text)


TEX = {
    "\\": r"\textbackslash{}",
    **{sign: "\\" + sign for sign in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "[": "{[}",  # at the start of a row it would be an option of the line break
    "]": "{]}",
    "±": r"$\pm$",
    "→": r"$\to$",
    "−": "$-$",
    "×": r"$\times$",
    "–": "--",
    "≤": r"$\le$",
}


def in_latex(text: str) -> str:
    """Text that LaTeX sets as it is."""
    return "".join(TEX.get(sign, sign) for sign in " ".join(text.split()))


def latex(grid: Grid) -> str:
    """A grid as a table environment that needs the packages booktabs and graphicx; the best in bold, the notes below."""
    form = "l" * grid.words + "r" * (len(grid.columns) - grid.words)
    lines = [r"\begin{table}", r"  \centering"]
    lines += [rf"  \caption{{{in_latex(grid.title)}}}"] if grid.title else []
    lines += [r"  \resizebox{\linewidth}{!}{%", rf"  \begin{{tabular}}{{{form}}}", r"    \toprule"]
    lines += ["    " + " & ".join(in_latex(name) for name in grid.columns) + r" \\", r"    \midrule"]
    for i, row in enumerate(grid.rows):
        cells = [rf"\textbf{{{in_latex(cell)}}}" if (i, j) in grid.best else in_latex(cell) for j, cell in enumerate(row)]
        lines.append("    " + " & ".join(cells) + r" \\")
    lines += [r"    \bottomrule", r"  \end{tabular}}", r"  \par\footnotesize"]
    lines += [f"  {note}\\par" for note in noted(grid, in_latex)]
    return "\n".join([*lines, r"\end{table}"]) + "\n"


def grids_of(rows: Sequence[Mapping], by: str, metric: str, tables: Sequence[Mapping]) -> list[Grid]:
    """The runs in one of LAYOUTS."""
    return by_category(rows, metric, tables) if by == "category" else [by_run(rows, metric, tables)]


def write(
    folder: str | Path,
    output: str | Path | None,
    readme: str | Path | None,
    page: str | Path | None = None,
    tex: str | Path | None = None,
    by: str = "run",
    metric: str = "image_auroc",
    papers: str | Path | None = None,
    docs: str | Path | None = None,
) -> tuple[int, list[Grid]]:
    """Collect the runs below `folder`, or in that CSV, and write the files that are wanted; returns how many runs, and their table.

    output: a CSV of all runs, which keeps the rows that it has of others; they are in every table then. readme, docs: pages of
    Markdown that get the six rows of `highlights`, and all rows as `by_effort` groups them, between their markers; InputError without a
    CSV, as what stands there may be of runs whose folders are gone. page, tex: the table as a file of Markdown, of LaTeX. by: one of
    LAYOUTS. metric: the one of a matrix, and the one that is set beside published figures where `papers`, the folder of the published
    tables, is given; the CSV then has the columns PAPER as well.
    """
    check_choice("", LAYOUTS, by=by)
    check_choice("", METRICS, metric=metric)
    listed = Path(folder).is_file()
    if (page_of_rows := readme or docs) and not (output or listed):
        raise InputError(f"{page_of_rows}: the rows there may be of runs that are gone; add output=FILE.csv, which keeps the rows it has")
    found, tables = read_rows(folder) if listed else collect(folder), read(papers) if papers else []
    rows = merged(found, output)
    grids = grids_of(rows, by, metric, tables)
    if output:
        columns = RUN + (PAPER if tables or any(name in row for row in rows for name in PAPER) else ())
        if tables:
            rows = [{**row, **dict(zip(PAPER, paper_columns(row, tables, metric), strict=True))} for row in rows]
        write_csv(output, columns, [[row.get(name) for name in columns] for row in rows])
    text = "\n".join(markdown(grid, bold=by == "category") for grid in grids)
    if readme:
        between(readme, "runs", markdown(highlights(rows), bold=False))
    if docs:
        between(docs, "runs", "\n".join(markdown(grid, bold=True) for grid in by_effort(rows)))
    if page:
        write_text(page, text)
    if tex:
        write_text(tex, "\n".join(latex(grid) for grid in grids))
    return len(found), grids


def paper_columns(row: Mapping, tables: Sequence[Mapping], metric: str) -> list:
    """The columns PAPER of one run."""
    figure = figure_of(tables, {**row, "runs": [row]}, metric)
    if figure is None or row[metric] is None:
        return [None] * len(PAPER)
    name = f"{figure.table['paper']}: {figure.table['variant']} ({figure.table['origin']})"
    return [figure.value, row[metric] - figure.value, name, "; ".join(figure.differs)]


def between(page: str | Path, name: str, text: str) -> None:
    """Put a text between the markers <!-- name: begin --> and <!-- name: end --> of a page; InputError if it has not one of each."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    old = Path(page).read_text(encoding="utf-8")
    if old.count(begin) != 1 or old.count(end) != 1:
        raise InputError(f"{page}: expected one line {begin} and one {end}, with what is replaced between them")
    head, tail = old.split(begin)[0], old.split(end)[1]
    write_text(page, f"{head}{begin}\n{text}{end}{tail}")
