"""A paper's own protocol run cell by cell, and ours beside the published figures: what is missing, what differs, a verdict."""

import contextlib
import copy
import logging
import os
import shlex
import socket
import statistics
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlparse

import huggingface_hub
import timm
import torch
from rich.console import Console

from blemish.edge.checks import LARGEST_SEED, check_number, check_whole
from blemish.edge.errors import InputError
from blemish.features.weights import BUNDLED
from blemish.files import Outputs, replacing, write_csv, write_text
from blemish.report.published import Figure, looked_up, margin, published, read, verdict
from blemish.report.tables import Grid, config_of, machines, markdown, row_of, show, signed, spread

log = logging.getLogger(__name__)

METRICS = ("image_auroc", "pixel_auroc", "aupro")
# keys of a config that make another run, so that a finished one with other values is not taken for this one
IDENTITY = ("model", "backbone", "weights", "image_size", "crop", "resize", "data.roi", "protocol", "trainer.max_epochs", "epoch_size")
OWN = ("paper", "categories", "seeds", "image_sizes", "tolerance", "published", "output")  # keys that tools/train.py does not have
NOT_RUN, PARTLY = "not run", "needs all categories"


class Cell(NamedTuple):
    """One run of a reproduction."""

    category: str | None
    seed: int
    folder: Path
    cfg: Any  # its whole config
    plain: dict  # the same, resolved


class Line(NamedTuple):
    """Ours and a published figure."""

    metric: str
    category: str
    seeds: str
    ours: float | None
    deviation: float | None  # over the seeds
    paper: float | None
    difference: float | None
    margin: float | None
    verdict: str
    table: str
    differs: str


def reproduce(cfg: Any, name: str, typed: Sequence[str], plain: Callable, scan: Callable, train: Callable) -> int:
    """Run the cells that can be run, compare all that are finished, write comparison.csv and comparison.md; returns the exit status.

    cfg: the composed config. name: of the composition. typed: the overrides of the command line. plain(cfg) -> dict, resolved;
    scan(cfg) raises InputError where images are missing; train(cfg) runs a cell. A cell that fails is noted and the others go on.
    """
    for text in typed:
        key = text.lstrip("+~").partition("=")[0]
        if wrong := {"seed": "seeds=[…]", "data.category": "categories=[…]", "run_dir": "output=FOLDER"}.get(key):
            raise InputError(f"{text}: a reproduction has several; expected {wrong}")
    check_whole("", 0, LARGEST_SEED, each=True, seeds=plain(cfg)["seeds"])
    sizes, categories = plain(cfg)["image_sizes"] or {}, plain(cfg)["categories"] or []
    if not isinstance(sizes, dict) or not isinstance(categories, list):
        raise InputError(f"image_sizes={sizes}, categories={categories}: expected a side by category, and a list of categories")
    check_whole("image_sizes", 8, also=(None,), **sizes)
    check_number("", "[0, inf)", tolerance=cfg.tolerance)
    console = Console(soft_wrap=True, highlight=False)
    tables, output = read(cfg.published), Path(cfg.output or f"results/reproduce/{name}")
    comparison = [output / "comparison.csv", output / "comparison.md"]
    Outputs().check(comparison)  # before days of training
    cells = cells_of(cfg, typed, tables, output, plain)
    todo = [cell for cell in cells if not finished(cell)]
    absent = missing(todo, scan)
    lacking = [cell for cell in todo if "weights" in absent or cell.category in absent.get("images", {})]
    if lacking:
        tell_missing(console, absent, commands(name, typed, lacking, output))
    gone = {cell.folder for cell in lacking}
    failed = run(console, [cell for cell in todo if cell.folder not in gone], train)
    rows = {(cell.category, cell.seed): row for cell in cells if (row := row_of(cell.folder))}
    with replacing(*comparison, choose="output=FOLDER"):
        write_results(console, output, compared(cells, rows, tables, cfg.tolerance), list(rows.values()), name, cfg.tolerance)
    for text in failed:
        console.print(f"failed: {text}", markup=False)
    return 0 if rows and not failed else 1


def run(console: Console, cells: Sequence[Cell], train: Callable) -> list[str]:
    """Run cells one after the other; returns what became of those that failed."""
    failed = []
    for i, cell in enumerate(cells):
        console.print(f"{cell.folder} ({i + 1} of {len(cells)})", markup=False)
        try:
            train(cell.cfg)
        except Exception as error:
            failed.append(f"{cell.folder}: {type(error).__name__}: {error}")
            log.warning("failed: %s", failed[-1].splitlines()[0])
    return failed


def cells_of(cfg: Any, typed: Sequence[str], tables: Sequence[Mapping], output: Path, plain: Callable) -> list[Cell]:
    """Each category with each seed, with the config of its run; an image_size of the command line holds for all."""
    sizes = {} if any(text.startswith("image_size=") for text in typed) else cfg.image_sizes or {}
    cells = []
    for category in cfg.categories or all_categories(tables, part_of(cfg.data), cfg.data.category):
        for seed in cfg.seeds:
            mine = copy.deepcopy(cfg)
            mine.data.category, mine.seed, mine.image_size = category, seed, sizes.get(category, cfg.image_size)
            folder = output / f"{category or 'all'}-s{seed}"
            mine.run_dir = str(folder)
            cells.append(Cell(category, seed, folder, mine, plain(mine)))
    return cells


def part_of(part: Mapping) -> str:
    """The file that holds a part's class, by which published tables and records name it."""
    return part["_target_"].split(".")[-2]


def all_categories(tables: Sequence[Mapping], data: str, category: str | None) -> list[str | None]:
    """The categories of a data set that published tables know; the config's own where they know none."""
    return sorted({name for table in tables if table.get("data") == data for name in table.get("per_category", {})}) or [category]


def finished(cell: Cell) -> bool:
    """Whether a cell's folder holds its finished run; InputError if it holds one of another setting."""
    if row_of(cell.folder) is None:
        return False
    found = config_of(cell.folder)
    for key in IDENTITY:
        if looked_up(found, key) != looked_up(cell.plain, key):
            raise InputError(
                f"{cell.folder}: holds a finished run with {key}={looked_up(found, key)}; choose another folder with output=FOLDER"
            )
    return True


def missing(cells: Sequence[Cell], scan: Callable) -> dict:
    """What keeps cells from being run: {"images": {category: reason}, "weights": reason}, without what is there."""
    images = {}
    for cell in {cell.category: cell for cell in cells}.values():
        try:
            scan(cell.cfg)
        except InputError as error:
            images[cell.category] = str(error).splitlines()[0]
    model = cells[0].plain["model"] if cells else {}
    weights = missing_weights(model["backbone"], model["weights"]) if "backbone" in model else None
    return {**({"images": images} if images else {}), **({"weights": weights} if weights else {})}


def missing_weights(backbone: str, weights: str) -> str | None:
    """Why a backbone's weights cannot be had here, None where they can; asks no server for more than a connection."""
    if weights == "bundled":
        return None if backbone in BUNDLED else f"weights=bundled has no {backbone}; it has {', '.join(BUNDLED)}"
    if weights not in ("pretrained", "random"):
        return None if Path(weights).expanduser().is_file() else f"weights={weights}: no such file"
    config = None
    with contextlib.suppress(RuntimeError):  # an unknown backbone is the run's to report
        config = timm.get_pretrained_cfg(backbone)
    if weights == "random" or config is None or cached(config):
        return None
    host = urlparse(huggingface_hub.constants.ENDPOINT if config.hf_hub_id else config.url).hostname
    if reachable(host):
        return None
    return f"weights=pretrained: {backbone} is not in timm's cache, and the server it is downloaded from cannot be reached"


def cached(config: Any) -> bool:
    """Whether timm has already downloaded the weights of a pretrained config."""
    if not config.hf_hub_id:
        return bool(config.url) and (Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(config.url).path).name).is_file()
    names = filter(None, (config.hf_hub_filename, "model.safetensors", "pytorch_model.bin"))
    return any(isinstance(huggingface_hub.try_to_load_from_cache(config.hf_hub_id, name), str) for name in names)


def reachable(host: str | None) -> bool:
    """Whether a server answers within seconds; behind a proxy nothing is said without asking it, so yes."""
    if huggingface_hub.constants.HF_HUB_OFFLINE or not host:
        return False
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    answered = []

    def ask() -> None:
        with contextlib.suppress(OSError):
            socket.create_connection((host, 443), timeout=3).close()
            answered.append(True)

    asking = threading.Thread(target=ask, daemon=True)  # looking up a name has no time limit of its own
    asking.start()
    asking.join(5)
    return bool(answered)


def tell_missing(console: Console, absent: Mapping, commands: Sequence[str]) -> None:
    """Say what is missing, and the commands that run it where it is."""
    if images := absent.get("images"):
        names = ", ".join(str(category or "all") for category in images)
        console.print(f"missing: the images of {names}: {next(iter(images.values()))}", markup=False)
    if "weights" in absent:
        console.print(f"missing: {absent['weights']}", markup=False)
    console.print("where they are, run:", markup=False)
    for command in commands:
        console.print(f"  {command}", markup=False)


def commands(name: str, typed: Sequence[str], cells: Sequence[Cell], output: Path) -> list[str]:
    """The sweeps that run cells, one for every image size, and the command that then compares them."""
    kept = [text for text in typed if text.lstrip("+~").partition("=")[0] not in (*OWN, "data.root", "image_size", "resume")]
    root = next((text for text in typed if text.startswith("data.root=")), f"data.root=/path/to/{part_of(cells[0].plain['data'])}")
    lines = []
    for size in dict.fromkeys(cell.plain["image_size"] for cell in cells):
        group = [cell for cell in cells if cell.plain["image_size"] == size]
        categories = dict.fromkeys(cell.category for cell in group)
        folder = "${data.category}" if None not in categories else "all"
        sweep = [f"+paper={name}", f"image_size={size}", f"seed={','.join(str(s) for s in dict.fromkeys(c.seed for c in group))}"]
        sweep += [] if None in categories else [f"data.category={','.join(categories)}"]
        sweep += [f"run_dir={output}/{folder}-s${{seed}}", "resume=true", "save.checkpoint=false", *kept, root]
        lines.append(shlex.join([*program("train"), "-m", *sweep]))
    again = [text for text in typed if text != root]
    return [*lines, shlex.join([*program("reproduce"), *again, root])]


def program(tool: str) -> list[str]:
    """How a tool is called where this process was called: by the command `blemish`, or as a file."""
    return ["blemish", tool] if Path(sys.argv[0]).stem == "blemish" else ["python", f"tools/{tool}.py"]


def compared(cells: Sequence[Cell], rows: Mapping, tables: Sequence[Mapping], tolerance: float) -> list[Line]:
    """A line for every metric that is published or measured, and every category, and last the mean where there are several."""
    lines = []
    configs = {cell.category: cell.plain for cell in reversed(cells)}
    first = next(iter(configs.values()))
    run = {"method": part_of(first["model"]), "dataset": part_of(first["data"])}
    every = all_categories(tables, run["dataset"], None)
    categories = list(dict.fromkeys(cell.category for cell in cells))
    for metric in METRICS:
        ours = {c: {s: row[metric] for (of, s), row in rows.items() if of == c and row[metric] is not None} for c in categories}
        figures = {c: published(tables, {**run, "category": c, "config": configs[c]}, metric) for c in categories}
        if None not in categories:
            seeds = sorted(set.intersection(*(set(by_seed) for by_seed in ours.values()))) if set(every) <= set(categories) else []
            ours["mean"] = {s: statistics.mean(by_seed[s] for c, by_seed in ours.items()) for s in seeds}
            figures["mean"] = published(tables, {**run, "category": None, "config": first}, metric)
        if any(figures.values()) or any(ours.values()):
            lines += [line_of(metric, c, ours[c], figures[c], tolerance) for c in ours]
    return lines


def line_of(metric: str, category: str | None, ours: Mapping[int, float], figure: Figure | None, tolerance: float) -> Line:
    values = list(ours.values())
    mean = statistics.mean(values) if values else None
    judged = verdict(values, figure, tolerance) if values else PARTLY if category == "mean" else NOT_RUN
    return Line(
        metric,
        category or "all",
        ",".join(str(seed) for seed in sorted(ours)),
        mean,
        statistics.stdev(values) if len(values) > 1 else None,
        figure.value if figure else None,
        mean - figure.value if values and figure else None,
        margin(values, tolerance) if values and figure else None,
        judged,
        f"{figure.table['variant']}, {figure.table['source']} ({figure.table['origin']})" if figure else "",
        "; ".join(figure.differs) if figure else "",
    )


def write_results(console: Console, output: Path, lines: Sequence[Line], rows: Sequence[Mapping], name: str, tolerance: float) -> None:
    """The comparison on the screen, as comparison.csv and as comparison.md."""
    write_csv(output / "comparison.csv", Line._fields, lines)
    rule = (
        f"Verdict: as published where |ours − published| ≤ {tolerance:g} + 2 standard errors of our mean over the seeds (of which one "
        "seed gives none); above or below otherwise; no judgement where our setting is not the table's."
    )
    texts = []
    for metric in dict.fromkeys(line.metric for line in lines):
        grid = grid_of(metric, name, [line for line in lines if line.metric == metric])
        grid = grid._replace(notes=[rule if rows else f"{rule} Nothing was run.", *grid.notes])
        texts.append(markdown(grid, bold=False))
        show(console, grid, bold=False)
    write_text(output / "comparison.md", "\n".join(texts) + (f"\n{machines(rows)}\n" if rows else ""))
    console.print(f"{len(rows)} finished runs: {output / 'comparison.csv'}, {output / 'comparison.md'}", markup=False)


def grid_of(metric: str, name: str, lines: Sequence[Line]) -> Grid:
    """The lines of one metric; the tables that they compare with, and what differs, as numbered notes."""
    notes, rows = [], []
    for line in lines:
        text = f"{line.table}. Ours: {line.differs or 'the same setting'}." if line.table else ""
        if text and text not in notes:
            notes.append(text)
        paper = "–" if line.paper is None else f"{line.paper:.3f} [{notes.index(text) + 1}]"
        ours = "–" if line.ours is None else spread([line.ours]) + (f" ± {line.deviation:.3f}" if line.deviation is not None else "")
        rows.append(
            [line.category, line.verdict, line.seeds or "–", ours, paper, "–" if line.difference is None else signed(line.difference)]
        )
    columns = ["category", "verdict", "seeds", "ours", "published", "difference"]
    return Grid(f"{name}: {metric.replace('_', ' ')}", columns, 3, rows, set(), notes)
