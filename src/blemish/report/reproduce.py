"""Run a paper's own protocol cell by cell and compare it with the published figures: what is missing, what differs, a verdict."""

import copy
import logging
import shlex
import sys
from collections import namedtuple
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from rich.console import Console

from blemish.edge.checks import LARGEST_SEED, check_number, check_whole
from blemish.edge.errors import InputError
from blemish.features.extractor import create
from blemish.files import Outputs, replacing, write_csv, write_text
from blemish.report import published as papers
from blemish.report.formats import Grid, markdown, show
from blemish.report.published import Figure, looked_up, margin, published, verdict
from blemish.report.tables import cited, config_of, machines, row_of, signed, spread
from blemish.run.config import build, module_of, plain
from blemish.run.record import METRICS
from blemish.run.sweep import train_apart

log = logging.getLogger(__name__)

# config keys by which a finished run is known to be that of another setting
IDENTITY = ("model", "backbone", "weights", "image_size", "crop", "resize", "data.roi", "protocol", "trainer.max_epochs", "epoch_size")
OWN = (
    "paper",
    "differs",
    "categories",
    "seeds",
    "image_sizes",
    "tolerance",
    "published",
    "output",
)  # keys that tools/train.py does not have
NOT_RUN, PARTLY = "not run", "needs all categories"


class Cell(NamedTuple):
    """One run of a reproduction."""

    category: str | None
    seed: int
    folder: Path
    cfg: Any  # its complete config
    plain: dict  # the same, resolved


# a line of comparison.csv: our figure (None without a run) and the published one (None without a table); deviation: over the seeds
Line = namedtuple("Line", "metric category seeds ours deviation paper difference margin verdict table differs")


def scan(cfg: Any) -> None:
    """InputError where the images of a config are missing."""
    build(cfg.data).scan()


def reproduce(cfg: Any, name: str, typed: Sequence[str], train: Callable = train_apart, scan: Callable = scan) -> int:
    """Run the cells that can be run, compare all that are finished, write comparison.csv and comparison.md; returns the exit status.

    A cell that fails is reported and the others go on. name: of the composition. typed: the overrides of the command line.
    """
    for text in typed:
        key = text.lstrip("+~").partition("=")[0]
        if wanted := {"seed": "seeds=[…]", "data.category": "categories=[…]", "run_dir": "output=FOLDER"}.get(key):
            raise InputError(f"{text}: a reproduction has several; expected {wanted}")
    values = plain(cfg)
    sizes, categories = values["image_sizes"] or {}, values["categories"] or []
    if not isinstance(sizes, dict) or not isinstance(categories, list):
        raise InputError(f"image_sizes={sizes}, categories={categories}: expected a side by category, and a list of categories")
    check_whole("", 0, LARGEST_SEED, each=True, seeds=values["seeds"])
    check_whole("image_sizes", 8, also=(None,), **sizes)
    check_number("", "[0, inf)", tolerance=cfg.tolerance)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    tables, output = papers.read(cfg.published), Path(cfg.output or f"results/reproduce/{name}")
    comparison = [output / "comparison.csv", output / "comparison.md"]
    Outputs().check(comparison)  # before days of training
    cells = cells_of(cfg, typed, tables, output)
    show_settings(console, cells[0], tables)
    todo = [cell for cell in cells if not finished(cell)]
    images, weights = missing(todo, scan)
    lacking = [cell for cell in todo if weights or cell.category in images]
    if images:
        console.print(f"missing: the images of {', '.join(str(c or 'all') for c in images)}: {next(iter(images.values()))}")
    if weights:
        console.print(f"missing: {weights}")
    if lacking:
        console.print("where they are, run:", *commands(name, typed, lacking, output), sep="\n  ")
    ready, failed = [cell for cell in todo if cell not in lacking], []
    for i, cell in enumerate(ready):
        console.print(f"{cell.folder} ({i + 1} of {len(ready)})")
        try:
            train(cell.cfg)
        except Exception as error:
            failed.append(f"{cell.folder}: {type(error).__name__}: {error}")
            log.warning("failed: %s", failed[-1].splitlines()[0])
    rows = {(cell.category, cell.seed): row for cell in cells if (row := row_of(cell.folder))}
    with replacing(*comparison, choose="output=FOLDER"):
        write_results(console, comparison, compared(cells, rows, tables, cfg.tolerance), list(rows.values()), name, cfg.tolerance)
    for text in failed:
        console.print(f"failed: {text}")
    return 0 if rows and not failed else 1


def cells_of(cfg: Any, typed: Sequence[str], tables: Sequence[Mapping], output: Path) -> list[Cell]:
    """Each category with each seed, with the config of its run; an image_size on the command line is that of all."""
    sizes = {} if any(text.startswith("image_size=") for text in typed) else cfg.image_sizes or {}
    cells = []
    for category in cfg.categories or all_categories(tables, module_of(cfg.data)) or [cfg.data.category]:
        for seed in cfg.seeds:
            folder, own = output / f"{category or 'all'}-s{seed}", copy.deepcopy(cfg)
            own.data.category, own.seed, own.image_size, own.run_dir = category, seed, sizes.get(category, cfg.image_size), str(folder)
            cells.append(Cell(category, seed, folder, own, plain(own)))
    return cells


def show_settings(console: Console, cell: Cell, tables: Sequence[Mapping]) -> None:
    """Print each setting that the published tables state beside that of a cell, and what else the method's page says of its paper."""
    run = {"method": module_of(cell.cfg.model), "dataset": module_of(cell.cfg.data), "category": cell.category, "config": cell.plain}
    figures = {figure.source: figure for metric in papers.METRICS if (figure := published(tables, run, metric))}
    for source, figure in figures.items():
        lines = papers.settings_compared(cell.plain, figure.table.get("setting") or {}, cell.category)
        answer = {True: "same", False: "differs", None: "not recorded"}
        rows = [[key, answer[same], str(wanted), str(have)] for key, wanted, have, same in lines]
        notes = [f"Its source says: {figure.table.get('notes') or 'nothing else'}"]
        show(console, Grid(f"settings beside {source}", ["setting", "verdict", "published", "ours"], 4, rows, set(), notes), bold=False)
    page = papers.known_differences(run["method"])
    for name, *cells in page[1:]:
        parts = [f"{heading}: {text}" for heading, text in zip(page[0][1:], cells, strict=False) if text]
        console.print(f"differs, {name}: {'; '.join(parts)}")


def all_categories(tables: Sequence[Mapping], data: str) -> list[str]:
    """The categories of a data set that the published tables have."""
    return sorted({name for table in tables if table.get("data") == data for name in table.get("per_category", {})})


def finished(cell: Cell) -> bool:
    """Whether a cell's folder has its finished run; InputError if it has one of another setting."""
    if row_of(cell.folder) is None:
        return False
    found = config_of(cell.folder)
    for key in IDENTITY:
        if (value := looked_up(found, key)) != looked_up(cell.plain, key):
            raise InputError(f"{cell.folder}: holds a finished run with {key}={value}; choose another folder with output=FOLDER")
    return True


def missing(cells: Sequence[Cell], scan: Callable) -> tuple[dict[str | None, str], str | None]:
    """Why cells cannot be run: {category: reason} for those without images, and the reason for all if there are no weights."""
    images = {}
    for cell in {cell.category: cell for cell in cells}.values():
        try:
            scan(cell.cfg)
        except InputError as error:
            images[cell.category] = str(error).splitlines()[0]
    model = cells[0].plain["model"] if cells else {}
    return images, missing_weights(model["backbone"], model["weights"]) if "backbone" in model else None


def missing_weights(backbone: str, weights: str) -> str | None:
    """Why a backbone's weights cannot be loaded, None where they can; timm downloads its own into its cache."""
    if weights == "random":
        return None
    try:
        create(backbone, [], weights, seed=0, named=True)
    except InputError as error:
        return str(error).splitlines()[0]
    return None


def commands(name: str, typed: Sequence[str], cells: Sequence[Cell], output: Path) -> list[str]:
    """The sweeps that run cells, one for each image size, and the command that then compares them."""
    kept = [text for text in typed if text.lstrip("+~").partition("=")[0] not in (*OWN, "data.root", "image_size", "resume")]
    root = next((text for text in typed if text.startswith("data.root=")), f"data.root=/path/to/{module_of(cells[0].cfg.data)}")
    lines = []
    for size in dict.fromkeys(cell.plain["image_size"] for cell in cells):
        group = [cell for cell in cells if cell.plain["image_size"] == size]
        categories = dict.fromkeys(cell.category for cell in group)
        folder = "all" if None in categories else "${data.category}"
        sweep = [f"+paper={name}", f"image_size={size}", f"seed={','.join(str(s) for s in dict.fromkeys(c.seed for c in group))}"]
        sweep += [] if None in categories else [f"data.category={','.join(categories)}"]
        sweep += [f"run_dir={output}/{folder}-s${{seed}}", "resume=true", "save.checkpoint=false", *kept, root]
        lines.append(shlex.join([*program("train"), "-m", *sweep]))
    return [*lines, shlex.join([*program("reproduce"), *(text for text in typed if text != root), root])]


def program(tool: str) -> list[str]:
    """How a tool is called where this process was called: by the command `blemish`, or as a file."""
    return ["blemish", tool] if Path(sys.argv[0]).stem == "blemish" else ["python", f"tools/{tool}.py"]


def compared(cells: Sequence[Cell], rows: Mapping, tables: Sequence[Mapping], tolerance: float) -> list[Line]:
    """A line for each published or measured metric and each category, and one for the mean over all categories where there are several."""
    lines, configs = [], {cell.category: cell.plain for cell in reversed(cells)}
    first = cells[0].plain
    run = {"method": module_of(cells[0].cfg.model), "dataset": module_of(cells[0].cfg.data)}
    known = all_categories(tables, run["dataset"])
    complete = known and set(known) <= set(configs)
    categories = list(dict.fromkeys(cell.category for cell in cells))
    for metric in (name for name in METRICS if name in papers.METRICS):
        ours = {c: {s: row[metric] for (of, s), row in rows.items() if of == c and row[metric] is not None} for c in categories}
        figures = {c: published(tables, {**run, "category": c, "config": configs[c]}, metric) for c in categories}
        if None not in categories:
            seeds = sorted(set.intersection(*map(set, ours.values()))) if complete else []
            ours["mean"] = {seed: mean(by_seed[seed] for by_seed in ours.values()) for seed in seeds}
            figures["mean"] = published(tables, {**run, "category": None, "config": first}, metric)
        if any(figures.values()) or any(ours.values()):
            lines += [line_of(metric, c, ours[c], figures[c], tolerance) for c in ours]
    return lines


def line_of(metric: str, category: str | None, ours: Mapping[int, float], figure: Figure | None, tolerance: float) -> Line:
    values, both = list(ours.values()), bool(ours and figure)
    return Line(
        metric,
        category or "all",
        ",".join(map(str, sorted(ours))),
        mean(values) if values else None,
        stdev(values) if len(values) > 1 else None,
        figure.value if figure else None,
        mean(values) - figure.value if both else None,
        margin(values, tolerance) if both else None,
        verdict(values, figure, tolerance) if values else PARTLY if category == "mean" else NOT_RUN,
        figure.source if figure else "",
        "; ".join(figure.differs) if figure else "",
    )


def write_results(console: Console, paths: Sequence[Path], lines: Sequence[Line], rows: Sequence[Mapping], name: str, tolerance: float):
    """Print the comparison and write it to `paths`, a CSV and a Markdown file."""
    write_csv(paths[0], Line._fields, lines)
    rule = (
        f"Verdict: as published where |ours − published| ≤ {tolerance:g} + 2 standard errors of our mean over the seeds (none with a "
        f"single seed); above or below otherwise; no judgement where our setting is not the table's.{'' if rows else ' Nothing was run.'}"
    )
    metrics = dict.fromkeys(line.metric for line in lines)
    grids = [grid_of(f"{name}: {metric.replace('_', ' ')}", [line for line in lines if line.metric == metric], rule) for metric in metrics]
    for grid in grids:
        show(console, grid, bold=False)
    text = "\n".join(markdown(grid, bold=False) for grid in grids)
    write_text(paths[1], text + (f"\n{machines(rows)}\n" if rows else ""))
    console.print(f"{len(rows)} finished runs: {', '.join(map(str, paths))}")


def grid_of(title: str, lines: Sequence[Line], rule: str) -> Grid:
    """The lines of one metric, with the published tables and the differences of our setting as notes."""
    notes, rows = [], []
    for line in lines:
        ours = spread([line.ours]) + (f" ± {line.deviation:.3f}" if line.deviation is not None else "")
        note = f"{line.table}. Ours: {line.differs or 'the same setting'}."
        paper = "–" if line.paper is None else f"{line.paper:.3f} {cited(note, notes)}"
        gap = "–" if line.difference is None else signed(line.difference)
        rows.append([line.category, line.verdict, line.seeds or "–", ours, paper, gap])
    return Grid(title, ["category", "verdict", "seeds", "ours", "published", "difference"], 3, rows, set(), [rule, *notes])
