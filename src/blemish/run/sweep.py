"""A sweep: each cell of a multirun in a process and a folder of its own, with a time limit, and the list of how all of them ended."""

import contextlib
import hashlib
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

import hydra
from hydra.core.override_parser.types import Glob
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from threadpoolctl import threadpool_limits

from blemish.data.synthetic import write as synthesize
from blemish.edge.errors import InputError
from blemish.files import is_locked, read_json, write_csv
from blemish.run import auto
from blemish.run.config import (
    build,
    check_config,
    command_line,
    composed,
    configs,
    first_values,
    module_of,
    parse,
    plain,
    quoted,
    resolve_groups,
    run_cli,
)
from blemish.run.record import FINISHED, STATE, finish_for, read_record
from blemish.run.terminal import report
from blemish.run.train import train

COMMAND = "BLEMISH_COMMAND"  # environment variable: how a cell, and the processes that it starts in turn, are called
CELLS = "cells.txt"  # the folders of a sweep's cells, one per line
GRACE = 30  # seconds that a cell has to write its record after it was asked to stop
IGNORED = ("sweep", "launch", "resume", "overwrite", "logger", "workers", "objective", "store", "save")  # keys that make no other cell
FIRST = ("model", "recipe", "data", "data.category")  # in a cell's name
CONTINUED = ("trainer", "logger", "workers", "save")  # keys that a resumed training takes

screen = Console(stderr=True, soft_wrap=True, highlight=False)


class Cell(NamedTuple):
    """How a cell of a sweep ended."""

    name: str
    status: str  # finished, failed, timed out, interrupted or running
    seconds: float | None
    image_auroc: float | None
    error: str


def launch(main: Callable[[], object], command: Sequence[str]) -> None:
    """Call the Hydra `main` of a multirun, list its cells at the end, and exit with 1 unless all have finished.

    command: the words before the overrides, as ["tools/train.py"].
    """
    os.environ[COMMAND] = json.dumps([os.path.abspath(command[0]), *command[1:]])  # noqa: PTH100
    more, folder = run_cli(lambda _: pinned([text for text in sys.argv[1:] if not text.startswith("-")]), None)
    sys.argv += more
    try:
        main()
    finally:
        found = cells(folder)
        if found:
            list_cells(found, folder)
    if not found or any(cell.status != FINISHED for cell in found):
        sys.exit(1)


def pinned(texts: Sequence[str]) -> tuple[list[str], Path]:
    """Return overrides that fix a sweep's name, and its globs over categories, for all cells, and the folder of the sweep."""
    params = composed(*first_values(texts), hydra=True).hydra.sweeper.get("params") or {}
    texts = resolve_groups([f"{key}={value}" for key, value in params.items()] + list(texts), "train")
    cfg = composed(*first_values(texts))
    check_config(cfg)
    if cfg.resume not in (None, False, True):
        raise InputError(f"resume={cfg.resume}: expected resume=true and the sweep.name of the interrupted sweep")
    name = str(cfg.sweep.name or time.strftime("%Y%m%d-%H%M%S"))
    if not re.fullmatch(r"[\w.+-]+", name):
        raise InputError(f"sweep.name={name}: expected letters, digits, dots, dashes")
    cfg.sweep.name = name
    more = [f"sweep.name={name}"]
    swept = {override.key_or_group: override for override in parse(texts)}
    glob = swept.get("data.category")
    if glob and isinstance(glob.value(), Glob):
        pattern = f"data.category={glob.get_value_element_as_str()}"
        if "data" in swept and swept["data"].is_sweep_override():
            raise InputError(f"{pattern}: several data sets; expected one sweep for each")
        found = build(cfg.data, category=None).categories()
        chosen = glob.value().filter(found)
        if not chosen:
            raise InputError(f"{pattern}: none of {', '.join(found) or 'no folders'}")
        more.append("data.category=" + ",".join(map(quoted, chosen)))
    return more, Path(cfg.sweep.dir)


def cell(cfg: DictConfig) -> float | None:
    """Run one cell of a multirun and return its objective; None without one, or for a cell that failed.

    With resume=true a finished cell is left as it is, and a stopped training is continued. RuntimeError for a failed cell if there is an
    objective, as the search has to know. Methods in `sweep.without` are left out, and where the cell of seed 0 took longer than
    `sweep.repeat_seconds`, other seeds.
    """
    overrides = [text for key, text in command_line() if key not in ("resume", "objective")]
    root = Path(cfg.sweep.dir)
    folder = Path(cfg.run_dir) if cfg.run_dir else root / cell_name(overrides)
    if (method := module_of(cfg.model)) in cfg.sweep.without:
        screen.print(f"{folder.name}: left out, sweep.without has {method}", markup=False)
        return None
    if cfg.seed and (limit := cfg.sweep.repeat_seconds) is not None:
        first = cell_of(root / cell_name(["seed=0" if root_of(text) == "seed" else text for text in overrides]))
        if first.status != FINISHED or first.seconds > limit:
            screen.print(f"{folder.name}: left out, with seed 0 it took {first.seconds or math.inf:.0f} s or failed", markup=False)
            return None
    root.mkdir(parents=True, exist_ok=True)
    with (root / CELLS).open("a", encoding="utf-8") as file:  # short enough to be written in one piece
        file.write(os.path.relpath(folder, root) + "\n")
    # a search may propose what it has tried
    known = bool(cfg.resume or cfg.objective) and (read_record(folder) or {}).get("status") == FINISHED
    if not known:
        run(cfg, folder, overrides)
    one = cell_of(folder)
    ending = "finished before" if known else one.status + ("" if one.seconds is None else f" in {one.seconds:.0f} s")
    auroc = "" if one.image_auroc is None else f", image AUROC {one.image_auroc:.4f}"
    error = f": {one.error.splitlines()[0]} ({folder / 'log.txt'})" if one.error else ""
    screen.print(f"{one.name}: {ending}{auroc}{error}", markup=False)
    if not cfg.objective:
        return None
    if one.status != FINISHED:
        raise RuntimeError(f"{folder}: {one.error}")
    metrics = read_json(folder / "metrics.json")
    values = [metrics[name] for name in ("image_auroc", "aupro") if metrics[name] is not None]  # no AUPRO without a map
    return sum(values) / len(values)


def run(cfg: DictConfig, folder: Path, overrides: list[str]) -> None:
    """Run a cell as its own command line would."""
    try:
        if cfg.objective:
            overrides = [text for text in overrides if root_of(text) not in ("data", "protocol")] + synthetic_data(cfg)
    except Exception as error:
        finish_for(folder, "failed", f"{type(error).__name__}: {error}")
        return
    if cfg.resume and (folder / STATE).is_file():
        overrides = [text for text in overrides if root_of(text) in CONTINUED] + [f"resume={quoted(str(folder))}"]
    else:
        overrides = [*overrides, f"run_dir={quoted(str(folder))}"]
    apart(folder, as_command, (json.loads(os.environ[COMMAND]), overrides), cfg.sweep.minutes, cfg.sweep.threads)


def root_of(override: str) -> str:
    return override.partition("=")[0].partition(".")[0]


def apart(folder: Path, work: Callable[..., None], arguments: tuple, minutes: float | None, threads: int | None) -> None:
    """Do work(*arguments), a run into `folder`, in a process of its own, stopped after `minutes`; its record tells how it ended."""
    started, before = time.monotonic(), read_record(folder)
    folder.mkdir(parents=True, exist_ok=True)
    methods = multiprocessing.get_all_start_methods()
    method = "forkserver" if "forkserver" in methods else "spawn"
    if multiprocessing.get_start_method() not in methods:  # joblib's workers have one that their children do not know
        multiprocessing.set_start_method(method, force=True)
    context = multiprocessing.get_context(method)
    context.set_forkserver_preload(["blemish.run.sweep"])  # or every cell would wait some seconds for its imports
    process = context.Process(target=enter, args=(work, arguments, str(folder / "log.txt"), threads))
    process.start()
    try:
        process.join(60 * minutes if minutes else None)
    finally:
        if late := process.is_alive():
            stop(process)
    if is_locked(folder):
        return  # by another run, which writes its record
    if late:
        finish_for(folder, "timed out", f"over its limit of sweep.minutes={minutes:g}", time.monotonic() - started)
    elif (record := read_record(folder)) == before or record["status"] == "running":  # it could not write how it ended
        finish_for(folder, "failed", f"exit code {process.exitcode}; {last_line(folder / 'log.txt')}", time.monotonic() - started)


def train_apart(cfg: DictConfig) -> None:
    """Run a composed config in a process of its own; RuntimeError with what its record says of a failure."""
    folder = Path(cfg.run_dir)
    apart(folder, as_config, (plain(cfg),), cfg.sweep.minutes, cfg.sweep.threads)
    record = read_record(folder) or {}
    if record.get("status") != FINISHED:
        raise RuntimeError((record.get("error") or {}).get("message") or f"{folder}: {record.get('status')}")


def enter(work: Callable[..., None], arguments: tuple, log: str, threads: int | None) -> None:
    """Do a cell's work in its process, with all that it prints in a file."""
    os.setsid()  # so that it can be stopped with what it has started
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    threading.Thread(target=follow_parent, daemon=True).start()
    with threadpool_limits(threads):
        work(*arguments)


def as_command(command: list[str], overrides: list[str]) -> None:
    """Run one training as a command line would."""

    def single(cfg: DictConfig) -> None:
        sys.argv = [*command, *overrides]  # for the record, and for further processes of a training
        report(run_cli(train, cfg), cfg.run_dir)

    sys.argv = [command[0], *run_cli(lambda _: auto.resolve(overrides), None)]
    hydra.main(config_path=str(configs()), config_name="train", version_base="1.3")(single)()


def as_config(values: dict) -> None:
    report(run_cli(train, OmegaConf.create(values)), values["run_dir"])


def follow_parent() -> None:
    """End with the process that started this one, however that ended: first asked to, then by force, as in the middle of a long fit."""
    wait([multiprocessing.parent_process().sentinel])
    os.killpg(0, signal.SIGTERM)
    time.sleep(GRACE)
    os.killpg(0, signal.SIGKILL)


def stop(process: multiprocessing.Process) -> None:
    """End a process and all it has started: first by asking it to, then by force."""
    for sign, seconds in ((signal.SIGTERM, GRACE), (signal.SIGKILL, None)):
        if process.is_alive():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, sign)
            process.join(seconds)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def synthetic_data(cfg: DictConfig) -> list[str]:
    """Return overrides that replace the data by a set with drawn defects, made once per sweep from the training images.

    A search must not see the labels that its result is judged by.
    """
    data = build(cfg.data)
    data.setup()
    root = Path(cfg.sweep.dir).resolve() / "data" / data.digest
    if not root.is_dir():
        with contextlib.suppress(OSError):  # another cell was first
            synthesize(data, root, 0.3, cfg.seed)
    folders = ["data.category=null", "data.normal_test=normal_test", "data.abnormal=[defects]", "data.masks=masks"]
    return ["data=folder", f"data.root={quoted(str(root))}", *folders, "protocol=paper"]


def cell_name(overrides: Sequence[str]) -> str:
    """Return a readable folder name that no other cell has: the values and a digest of the overrides, in any order."""
    pairs = [text.lstrip("+~").partition("=")[::2] for text in overrides]
    own = sorted((FIRST.index(key) if key in FIRST else len(FIRST), key, value) for key, value in pairs if key.split(".")[0] not in IGNORED)
    words = [re.sub(r"[^\w.+-]+", "-", value).strip("-.") for _, _, value in own]
    digest = hashlib.blake2b("\n".join(f"{key}={value}" for _, key, value in own).encode(), digest_size=4).hexdigest()
    return "_".join(filter(None, words))[:80] + f"-{digest}"


def cells(folder: Path) -> list[Cell]:
    """Return how the cells that a sweep has begun ended, sorted by name."""
    with contextlib.suppress(FileNotFoundError):
        lines = set((folder / CELLS).read_text(encoding="utf-8").splitlines())
        return sorted(cell_of(folder / line) for line in lines)
    return []


def cell_of(folder: Path) -> Cell:
    record = read_record(folder) or {"status": "failed", "error": {"message": "no record"}}
    auroc = (read_json(folder / "metrics.json") or {}).get("image_auroc")
    error = (record.get("error") or {}).get("message") or ""
    return Cell(folder.name, record["status"], record.get("wall_seconds"), auroc, error.strip())


def last_line(log: Path) -> str:
    with contextlib.suppress(OSError):
        return log.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2].strip()
    return ""


def list_cells(found: Sequence[Cell], folder: Path) -> None:
    """Write cells.csv, and print how many cells ended in which way and what went wrong with those that did not finish."""
    write_csv(folder / "cells.csv", Cell._fields, found)
    statuses = [cell.status for cell in found]
    counts = ", ".join(f"{statuses.count(status)} {status}" for status in sorted(set(statuses)))
    screen.print(f"{folder}: {len(found)} cells, {counts}", markup=False)
    unfinished = [cell for cell in found if cell.status != FINISHED]
    if unfinished:
        table = Table("cell", "status", "error", title="not finished; resume=true takes them up again")
        for one in unfinished:
            table.add_row(one.name, one.status, one.error.partition("\n")[0])
        screen.print(table, markup=False)
