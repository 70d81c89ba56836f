"""A sweep: each cell of a multirun in a process, a folder and a time limit of its own, and the list of how all of them ended."""

import contextlib
import hashlib
import json
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
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Glob, Quote, QuotedString
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from threadpoolctl import threadpool_limits

from blemish.data.synthetic import write as synthesize
from blemish.edge.errors import InputError
from blemish.files import is_locked, read_json, write_csv
from blemish.run.config import build, check_config, composed, configs, firsts, parsed, run_cli, settled
from blemish.run.record import FINISHED, STATE, finish_for, read_record
from blemish.run.terminal import report
from blemish.run.train import train

COMMAND = "BLEMISH_COMMAND"  # what a cell's process is started as, for it and for the processes that it starts in turn
CELLS = "cells.txt"  # the folders of a sweep's cells, a line each
GRACE = 30  # seconds a cell gets to write its record once it was told to stop
APART = ("sweep", "launch", "resume", "overwrite", "logger", "workers", "objective", "store", "save")  # keys that do not make another cell
FIRST = ("model", "recipe", "data", "data.category")  # of a cell's name


class Cell(NamedTuple):
    """How a cell of a sweep ended."""

    name: str
    status: str  # finished, failed, timed out, interrupted or running
    seconds: float | None
    image_auroc: float | None
    error: str


def launch(main: Callable[[], object], command: Sequence[str]) -> None:
    """Do what a Hydra `main` does; for a multirun expand globs over categories, list the cells at the end, and exit with 1 if one failed.

    command: the arguments before the overrides, as ["tools/train.py"].
    """
    arguments = sys.argv[1:]
    if not {"-m", "--multirun"} & set(arguments) or {"--help", "-h", "--cfg", "-c"} & set(arguments):
        main()
        return
    os.environ[COMMAND] = json.dumps([os.path.abspath(command[0]), *command[1:]])  # noqa: PTH100
    more, folder = run_cli(lambda _: pinned(arguments), None)
    sys.argv += more
    try:
        main()
    finally:
        found = cells(folder)
        if found:
            tell(found, folder)
    if not found or any(cell.status != FINISHED for cell in found):
        sys.exit(1)


def pinned(arguments: Sequence[str]) -> tuple[list[str], Path]:
    """Overrides that fix a sweep's name and its globs over categories for all cells, and the folder of the sweep."""
    texts = [text for text in arguments if not text.startswith("-")]
    params = composed(*firsts(texts), hydra=True).hydra.sweeper.get("params") or {}
    texts = settled([f"{key}={value}" for key, value in params.items()] + texts)
    overrides, cfg = parsed(texts), composed(*firsts(texts))
    check_config(cfg)
    if cfg.resume not in (None, False, True):
        raise InputError(f"resume={cfg.resume}: of a sweep it is true or false; expected resume=true, with the sweep.name of before")
    name = str(cfg.sweep.name or time.strftime("%Y%m%d-%H%M%S"))
    if not re.fullmatch(r"[\w.+-]+", name):
        raise InputError(f"sweep.name={name}: expected letters, digits, dots, dashes")
    cfg.sweep.name = name
    swept = {override.key_or_group: override for override in overrides}
    more = [f"sweep.name={name}"]
    glob = swept.get("data.category")
    if glob and isinstance(glob.value(), Glob):
        if "data" in swept and swept["data"].is_sweep_override():
            raise InputError(f"data.category={glob.get_value_element_as_str()}: with several data sets; expected one sweep for each")
        found = build(cfg.data, category=None).categories()
        chosen = glob.value().filter(found)
        if not chosen:
            raise InputError(f"data.category={glob.get_value_element_as_str()}: none of {', '.join(found) or 'no folders'}")
        more.append("data.category=" + ",".join(quoted(one) for one in chosen))
    return more, Path(cfg.sweep.dir)


def quoted(text: str) -> str:
    """A value as Hydra's grammar reads it, whatever signs it has."""
    return QuotedString(text, Quote.single).with_quotes()


def cell(cfg: DictConfig) -> float | None:
    """Run one cell of a multirun and wait for its end; returns the objective, None without one or for a cell that failed.

    With resume=true a finished cell is left as it is, and one that was stopped in training goes on. RuntimeError for a failed cell if an
    objective is asked for, as the search has to know.
    """
    overrides = [text for text in HydraConfig.get().overrides.task if not text.lstrip("+").startswith(("resume=", "objective="))]
    folder = Path(cfg.run_dir) if cfg.run_dir else Path(cfg.sweep.dir) / cell_name(overrides)
    Path(cfg.sweep.dir).mkdir(parents=True, exist_ok=True)
    with (Path(cfg.sweep.dir) / CELLS).open("a", encoding="utf-8") as file:  # short enough to be written in one piece
        file.write(os.path.relpath(folder, cfg.sweep.dir) + "\n")
    # a search may propose what it has tried
    known = bool(cfg.resume or cfg.objective) and (read_record(folder) or {}).get("status") == FINISHED
    if not known:
        run(cfg, folder, overrides)
    record = read_record(folder) or {}
    say(folder, record, "finished before" if known else None)
    if not cfg.objective:
        return None
    if record.get("status") != FINISHED:
        raise RuntimeError(f"{folder}: {(record.get('error') or {}).get('message')}")
    return objective(json.loads((folder / "metrics.json").read_text(encoding="utf-8")))


def objective(metrics: dict) -> float:
    """What a search maximises: the mean of image AUROC and AUPRO, without the latter for a method that has no map."""
    known = [metrics[name] for name in ("image_auroc", "aupro") if metrics[name] is not None]
    return sum(known) / len(known)


def run(cfg: DictConfig, folder: Path, overrides: list[str]) -> None:
    """Run a cell, which its overrides say, as its own command line would."""
    try:
        if cfg.objective:
            own = [text for text in overrides if text.partition("=")[0].partition(".")[0] not in ("data", "protocol")]
            overrides = own + drawn_data(cfg)
    except Exception as error:
        finish_for(folder, "failed", f"{type(error).__name__}: {error}")
        return
    if cfg.resume and (folder / STATE).is_file():
        keys = tuple(f"{key}." for key in ("trainer", "logger", "save")) + ("trainer=", "logger=", "workers=")
        overrides = [text for text in overrides if text.startswith(keys)] + [f"resume={quoted(str(folder))}"]
    else:
        overrides = overrides + [f"run_dir={quoted(str(folder))}"]
    apart(folder, as_command, (json.loads(os.environ[COMMAND]), overrides), cfg.sweep.minutes, cfg.sweep.threads)


def apart(folder: Path, work: Callable[..., None], arguments: tuple, minutes: float | None, threads: int | None) -> None:
    """Do work(*arguments), a run into `folder`, in a process of its own, stopped after `minutes`; its record tells how it ended."""
    started, before = time.monotonic(), read_record(folder)
    folder.mkdir(parents=True, exist_ok=True)
    methods = multiprocessing.get_all_start_methods()
    method = "forkserver" if "forkserver" in methods else "spawn"
    if multiprocessing.get_start_method() not in methods:  # joblib's workers have one that their children do not know
        multiprocessing.set_start_method(method, force=True)
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(["blemish.run.sweep"])  # so that a cell does not wait for its imports
    with unguarded_main():
        process = context.Process(target=enter, args=(work, arguments, str(folder / "log.txt"), threads))
        process.start()
    try:
        process.join(60 * minutes if minutes else None)
        late = process.is_alive()
        if late:
            stop(process)
    except BaseException:
        stop(process)
        raise
    if is_locked(folder):
        return  # by a run of somebody else, who writes its record
    if late:
        finish_for(folder, "timed out", f"over its limit of sweep.minutes={minutes:g}", time.monotonic() - started)
    elif (record := read_record(folder)) == before or record["status"] == "running":  # it never came to write its end
        finish_for(folder, "failed", f"exit code {process.exitcode}; {tail(folder / 'log.txt')}", time.monotonic() - started)


def train_apart(cfg: DictConfig) -> None:
    """A run of a composed config in a process of its own; RuntimeError with what its record says of a failure."""
    folder = Path(cfg.run_dir)
    apart(folder, as_config, (OmegaConf.to_container(cfg, resolve=True),), cfg.sweep.minutes, cfg.sweep.threads)
    record = read_record(folder) or {}
    if record.get("status") != FINISHED:
        raise RuntimeError((record.get("error") or {}).get("message") or f"{folder}: {record.get('status')}")


@contextlib.contextmanager
def unguarded_main():
    """A new process would first run the file of this one's __main__ again, which it does not need."""
    main = sys.modules["__main__"]
    kept = {name: getattr(main, name) for name in ("__file__", "__spec__") if hasattr(main, name)}
    for name in kept:
        setattr(main, name, None)
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(main, name, value)


def enter(work: Callable[..., None], arguments: tuple, log: str, threads: int | None) -> None:
    """What a cell's process does, with all that it prints in a file."""
    os.setsid()  # so that it can be stopped with what it has started
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    threading.Thread(target=follow, daemon=True).start()
    with threadpool_limits(threads):
        work(*arguments)


def as_command(command: list[str], overrides: list[str]) -> None:
    """A run as a command line would do it."""

    def single(cfg: DictConfig) -> None:
        sys.argv = [*command, *overrides]  # what the record tells, and what further processes of a training are started as
        report(run_cli(train, cfg), cfg.run_dir)

    sys.argv = [command[0], *overrides]
    hydra.main(config_path=str(configs()), config_name="train", version_base="1.3")(single)()


def as_config(values: dict) -> None:
    """A run of a config that is composed."""
    report(run_cli(train, OmegaConf.create(values)), values["run_dir"])


def follow() -> None:
    """End with the process that started this one, however that ended."""
    wait([multiprocessing.parent_process().sentinel])
    os.killpg(0, signal.SIGTERM)


def stop(process: multiprocessing.Process) -> None:
    """End a process and all it has started: first asked to, then made to."""
    for sign, seconds in ((signal.SIGTERM, GRACE), (signal.SIGKILL, None)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        process.join(seconds)
        if not process.is_alive():
            break
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def drawn_data(cfg: DictConfig) -> list[str]:
    """Overrides that put a sweep's synthetic set, made once of the training images of its data, in the place of the data.

    A search must not see the labels that its result is judged by.
    """
    data = build(cfg.data)
    data.setup()
    root = Path(cfg.sweep.dir).resolve() / "data" / data.digest
    if not root.is_dir():
        with contextlib.suppress(OSError):  # a cell beside this one was first
            synthesize(data, root, 0.3, cfg.seed)
    fixed = {"data.root": quoted(str(root)), "data.category": "null", "data.normal_test": "normal_test", "data.abnormal": "[defects]"}
    fixed |= {"data.masks": "masks", "data": "folder", "protocol": "paper"}
    return [f"{key}={value}" for key, value in fixed.items()]


def cell_name(overrides: Sequence[str]) -> str:
    """A folder name that a person can read and that no other cell has: the overrides' values and a digest, in whatever order they came."""
    pairs = [text.lstrip("+~").partition("=")[::2] for text in overrides]
    own = sorted(
        (FIRST.index(key) if key in FIRST else len(FIRST), key, value) for key, value in pairs if key.partition(".")[0] not in APART
    )
    words = [re.sub(r"[^\w.+-]+", "-", value).strip("-.") for _, _, value in own]
    digest = hashlib.blake2b("\n".join(f"{key}={value}" for _, key, value in own).encode(), digest_size=4).hexdigest()
    return "_".join(filter(None, words))[:80] + f"-{digest}"


def cells(folder: Path) -> list[Cell]:
    """How the cells that a sweep has begun ended, by name."""
    with contextlib.suppress(FileNotFoundError):
        lines = set((folder / CELLS).read_text(encoding="utf-8").splitlines())
        return sorted(cell_of(folder / line, read_record(folder / line)) for line in lines)
    return []


def cell_of(folder: Path, record: dict | None) -> Cell:
    record = record or {"status": "failed", "error": {"message": "no record"}}
    auroc = (read_json(folder / "metrics.json") or {}).get("image_auroc")
    error = (record.get("error") or {}).get("message") or ""
    return Cell(folder.name, record["status"], record.get("wall_seconds"), auroc, error.strip())


def say(folder: Path, record: dict, instead: str | None) -> None:
    """One line on a cell that ended."""
    one = cell_of(folder, record)
    cost = "" if one.seconds is None else f" in {one.seconds:.0f} s"
    figure = "" if one.image_auroc is None else f", image AUROC {one.image_auroc:.4f}"
    error = f": {one.error.splitlines()[0]} ({folder / 'log.txt'})" if one.error else ""
    Console(stderr=True, soft_wrap=True, highlight=False).print(f"{one.name}: {instead or one.status + cost}{figure}{error}", markup=False)


def tail(log: Path) -> str:
    """The last line of a log that says something."""
    with contextlib.suppress(OSError):
        lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        return lines[-1] if lines else ""
    return ""


def tell(found: Sequence[Cell], folder: Path) -> None:
    """cells.csv and, on the screen, how many cells ended in which way and what went wrong with those that did not finish."""
    write_csv(folder / "cells.csv", Cell._fields, found)
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    counts = {status: [cell.status for cell in found].count(status) for status in sorted({cell.status for cell in found})}
    console.print(f"{folder}: {len(found)} cells, " + ", ".join(f"{n} {status}" for status, n in counts.items()), markup=False)
    wrong = [cell for cell in found if cell.status != FINISHED]
    if wrong:
        table = Table("cell", "status", "error", title="not finished; resume=true takes them up again")
        for one in wrong:
            table.add_row(one.name, one.status, one.error.splitlines()[0] if one.error else "")
        console.print(table, markup=False)
