"""The command `blemish`: every tool under one name, from any folder, with the configs of the installed package."""

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from blemish.edge.errors import InputError

# Each function below is a command: its name is that of its tool and its yaml, its docstring is its line of help.
# It imports what it needs when it is called: help and errors need no torch.


def train(cfg: Any) -> Any:
    """fit, test and record one detector, with -m several: blemish train model=padim data=mvtec"""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from blemish.run import sweep
    from blemish.run.terminal import report
    from blemish.run.train import train

    if HydraConfig.get().mode == RunMode.MULTIRUN:
        return sweep.cell(cfg)
    return report(train(cfg), cfg.run_dir)


def test(cfg: Any) -> None:
    """load a run and test it again: blemish test run=results/runs/…"""
    from blemish.run.terminal import report
    from blemish.run.test import test

    report(test(cfg), cfg.output)


def predict(cfg: Any) -> None:
    """score images with a run: blemish predict run=results/runs/… input=FILE|FOLDER output=FOLDER"""
    from blemish.run.predict import predict

    done = predict(cfg)
    for line in done.summary:
        say(line)
    for path, reason in done.failed[:20]:
        say(f"not scored: {path}: {reason}", sys.stderr)
    if done.failed:
        say(f"{len(done.failed)} images could not be scored: {done.output / 'failed.csv'}", sys.stderr)
        sys.exit(1)


def watch(cfg: Any) -> None:
    """score what arrives: blemish watch model=RUN|EXPORT input=FOLDER|CAMERA|RTSP|VIDEO output=FOLDER"""
    import logging
    from dataclasses import fields

    from blemish.edge.watch import Settings, exported, watch

    for handler in logging.getLogger().handlers:
        if getattr(handler, "stream", None) is sys.stdout:
            handler.setStream(sys.stderr)  # standard output is for the lines of stdout=true
    settings = Settings(**{field.name: cfg[field.name] for field in fields(Settings)})
    is_export = cfg.run.endswith((".onnx", ".xml"))
    scorer = exported(cfg.run, cfg.threads) if is_export else scorer_of_run(cfg.run, cfg.device)
    sys.exit(watch(scorer, settings, say, lambda text: say(text, sys.stderr)))


def data(cfg: Any) -> None:
    """check a data set, or draw defects on one: blemish data check|synthesize data=mvtec data.root=FOLDER"""
    from blemish.data import check, synthetic
    from blemish.edge.checks import check_choice, check_number
    from blemish.files import replacing
    from blemish.run.config import build, products_of

    check_number("", "(0, 1]", share=cfg.share)
    check_number("", "(0, 1]", also=(None,), each=True, sides=cfg.sides)
    if cfg.sides is not None and (len(cfg.sides) != 2 or cfg.sides[0] > cfg.sides[1]):
        refuse(f"sides={list(cfg.sides)}: expected [from, to]")
    check_choice("", ACTIONS, action=cfg.action)
    if names := products_of(cfg):
        refuse(f"data.category=[{','.join(names)}]: one product at a time; expected one of them")
    images = build(cfg.data)
    if cfg.action == "check":
        with replacing(output := cfg.output or "manifest.csv"):
            status = check.report(images, output)
        sys.exit(status)
    images.setup()
    output = cfg.output or "synthetic"
    say(f"{synthetic.write(images, output, cfg.share, cfg.seed, cfg.sides)} images drawn on: {output}")


def export(cfg: Any) -> None:
    """write a run as one file without blemish: blemish export run=results/runs/… format=onnx|torch_export|openvino"""
    from blemish.deploy.export import export_run

    path, parity = export_run(cfg)
    say(f"{path}: {parity}")


def bench(cfg: Any) -> None:
    """time a run by stage and engine: blemish bench run=results/runs/…"""
    from rich.console import Console

    from blemish.deploy import bench

    rows, rates = bench.bench_run(cfg)
    Console(soft_wrap=True).print(bench.table(rows))
    say("images a second:")
    for line in bench.best(rates):
        say(line)


def table(cfg: Any) -> None:
    """collect finished runs into a table: blemish table runs=results/runs"""
    from rich.console import Console

    from blemish.files import replacing
    from blemish.report.formats import show
    from blemish.report.tables import RUN, write

    with replacing(cfg.output, cfg.markdown, cfg.latex, choose="output=, markdown= or latex=FILE", header=",".join(RUN)):
        runs, grids = write(
            cfg.runs, cfg.output, cfg.readme, cfg.markdown, cfg.latex, cfg.by, cfg.metric, cfg.published, cfg.docs, cfg.pages
        )
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    for grid in grids:
        show(console, grid, bold=cfg.by == "category")
    files = ", ".join(filter(None, (cfg.output, cfg.readme, cfg.docs, cfg.pages, cfg.markdown, cfg.latex)))
    say(f"{runs} run{'s' * (runs != 1)} in {cfg.runs}" + (f", written to {files}" if files else ""))


def report(cfg: Any) -> None:
    """show runs on one page: blemish report runs=results/runs"""
    from blemish.files import replacing
    from blemish.report.page import write

    with replacing(cfg.output):
        runs = write(cfg.runs, cfg.output, cfg.max_mb, cfg.images, cfg.picture_px)
    say(f"{runs} run{'s' * (runs != 1)}: {cfg.output} ({Path(cfg.output).stat().st_size / 1e6:.1f} MB)")


def reproduce(cfg: Any) -> None:
    """run a paper's own protocol and compare with its tables: blemish reproduce paper=padim categories=[screw]"""
    from hydra.core.hydra_config import HydraConfig

    from blemish.report import reproduce
    from blemish.run import config

    name, typed = HydraConfig.get().runtime.choices.get("paper"), HydraConfig.get().overrides.task
    if not name:
        refuse(f"paper: none given; choose {', '.join(config.names('paper'))}")
    config.check_config(cfg)
    sys.exit(reproduce.reproduce(cfg, name, typed))


def scorer_of_run(run: str, device: str) -> Any:
    """Return the detector of a run, a saved one, or the newest run of a folder, for `watch`; InputError for anything else."""
    from blemish.api import AnomalyDetector
    from blemish.edge.reading import file_digest
    from blemish.edge.watch import Scorer
    from blemish.run.checkpoint import newest_run

    place = newest_run(Path(run).expanduser())
    detector, given = AnomalyDetector.load(place, device), []

    def images() -> Iterator[Any]:
        while True:
            yield given.pop()

    stream = detector.predict(images())  # a stream warns once of what may be in each image

    def predict(image: Any) -> Any:
        nonlocal stream
        given.append(image)
        try:
            return next(stream)
        except InputError:
            stream = detector.predict(images())
            raise

    return Scorer(predict, detector._rule.scores, file_digest(place if place.is_file() else place / "model.ckpt"))


COMMANDS = {work.__name__: work for work in (train, test, predict, watch, data, export, bench, table, report, reproduce)}
ACTIONS = ("check", "synthesize")  # the first word of `data`, which stands for action=WORD
# keys whose values are files or folders
PATHS = ("run_dir", "run", "runs", "input", "output", "resume", "update", "images", "weights", "data.root", "data.manifest", "store.root")
PATHS += ("data.roi", "roi", "monitor_file", "readme", "docs", "pages", "markdown", "latex", "data.masks", "webhook")
LISTS = ("data.category", "data.normal", "data.validation", "data.normal_test", "data.abnormal")  # and such names, or lists of them
ITEM = re.compile(r"""\s*("(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|[^,]*?)\s*(?:,|$)""")


def path_as_typed(override: str, several: bool) -> str:
    """Return the override of a path or name in quotes where Hydra would read something else, or nothing at all.

    A folder named 2024 is no number, and brackets, commas and quotes in a name are no list. With `several`, a sweep over paths is kept;
    of LISTS, a list of names is.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import QuotedString
    from hydra.errors import HydraException

    from blemish.run.config import quoted

    key, _, value = override.partition("=")
    name = key.lstrip("+").removeprefix("change.")
    if name not in PATHS + LISTS or not value:
        return override
    try:
        parsed = OverridesParser.create().parse_override(override)
        found = parsed.value()
        keep = several if parsed.is_sweep_override() else found is None or isinstance(found, str | QuotedString)
        keep = keep or (key == "resume" and isinstance(found, bool))
    except HydraException:
        keep, found = False, None
    if keep:
        return override
    if name in LISTS and value[0] + value[-1] == "[]" and (name != "data.category" or "," in value):  # [a] is a folder of that name
        return f"{key}=[{quoted_items(value[1:-1])}]"
    return f"{key}={quoted_items(value) if several and found is None else quoted(value)}"


def quoted_items(text: str) -> str:
    """Return names with commas between them, each in quotes."""
    from blemish.run.config import quoted

    items = [item for item in ITEM.findall(text) if item]
    return ",".join(item if item[0] in "'\"" and item[-1] == item[0] else quoted(item) for item in items)


def say(text: str, stream: Any = None) -> None:
    stream = stream or sys.stdout
    code = stream.encoding or "utf-8"
    stream.write(text.encode(code, "backslashreplace").decode(code) + "\n")  # a file's name may be no text
    stream.flush()


def shown(words: list[str]) -> str:
    """Return the words of a command as they are typed: `blemish train`, or `python tools/train.py`."""
    return " ".join(["python", *words] if words[0].endswith(".py") else [Path(words[0]).name, *words[1:]])


def refuse(problem: str) -> None:
    sys.stderr.write(f"error: {problem}\n")
    sys.exit(2)


@contextlib.contextmanager
def installed(name: str) -> Iterator[None]:
    """Refuse a command where a package that it imports is absent, as where blemish runs exports alone."""
    try:
        yield
    except ModuleNotFoundError as error:
        if str(error.name).startswith("blemish"):
            raise
        export = "an exported detector runs without: python -m blemish.edge MODEL IMAGES OUTPUT"
        refuse(f"{name}: needs {error.name}, not installed here; 'pip install blemish' brings what commands need, and {export}")


def main() -> None:
    """The command `blemish`: `sys.argv` is the command, a tool's name and Hydra's overrides."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        lines = [f"  {name:10}{work.__doc__}" for name, work in COMMANDS.items()]
        return say("\n".join(["usage: blemish COMMAND [KEY=VALUE …]", "", *lines, "", "blemish COMMAND --help lists a command's keys."]))
    if name == "--version":
        return say(f"blemish {version('blemish')}")
    if name == "-sc":
        return complete()
    if name not in COMMANDS:
        refuse(f"{name}: no command of blemish; choose {', '.join(COMMANDS)}")
    return call(name, sys.argv[:2], sys.argv[2:])


def complete() -> None:
    """Shell completion by Hydra, for all commands: `-sc install=bash` prints what to evaluate, which asks by `-sc query=bash`."""
    line = re.match(r"(\s*\S+)\s+(\S+)(\s.*)", os.environ.get("COMP_LINE", ""))
    if not sys.argv[-1].startswith("query="):
        call("train", sys.argv[:1], sys.argv[1:])
    elif line and line[2] in COMMANDS:
        os.environ["COMP_LINE"] = line[1] + line[3]
        call(line[2], sys.argv[:1], sys.argv[1:])
    else:
        say(" ".join(COMMANDS))


def tool(name: str) -> None:
    """The file tools/NAME.py: `sys.argv` is that file and Hydra's overrides."""
    call(name, sys.argv[:1], sys.argv[1:])


def call(name: str, words: list[str], overrides: list[str]) -> None:
    """Compose the config from the overrides and do the work of a command, once for each job of a sweep; `words` precede the overrides."""
    with installed(name):
        from blemish.run import help

    if {"--help", "-h"} & set(overrides):
        try:
            say(help.page(shown(words), COMMANDS[name].__doc__, name, overrides))
        except InputError as error:
            refuse(str(error))
        return

    with installed(name):
        import hydra
        from hydra._internal.utils import get_args_parser

        from blemish.run import auto
        from blemish.run.config import check_overrides, configs, run_cli

    parser = get_args_parser()
    parser.error = lambda problem: refuse(f"{problem}; --hydra-help lists the options")
    parser.parse_intermixed_args(overrides)
    typed = list(sys.argv)
    flags = [text for text in overrides if text.startswith("-")]
    several, of_hydra = bool({"-m", "--multirun"} & set(flags)), set(flags) - {"-m", "--multirun"}
    if name == "data" and of_hydra and "COMP_LINE" in os.environ:
        os.environ["COMP_LINE"] = re.sub(rf" ({'|'.join(ACTIONS)})(?= )", "", os.environ["COMP_LINE"])
    if name == "data" and not of_hydra:
        if not overrides or overrides[0] not in ACTIONS:
            refuse(f"{name}: found {overrides[0] if overrides else 'nothing'}; choose {' or '.join(ACTIONS)}, before all KEY=VALUE")
        overrides = [f"action={overrides[0]}", *overrides[1:]]

    def task(cfg: Any) -> Any:
        sys.argv = typed  # for the record, and for further processes of a training
        with installed(name):
            return run_cli(COMMANDS[name], cfg, shown(words))

    task.__module__ = f"blemish {name}"  # the name of Hydra's jobs
    main = hydra.main(str(configs()), name, version_base="1.3")(task)
    if name == "watch":  # Hydra takes model= for the group
        overrides = [re.sub("^model=", "run=", text) for text in overrides]
    overrides = [path_as_typed(text, several) for text in overrides]
    if not of_hydra:  # else Hydra does something of its own
        keys = [text for text in overrides if text not in flags]
        found = run_cli(lambda _: check_overrides(keys, name, several), None)
        if name == "train" and not several:
            found = run_cli(lambda _: auto.resolve(found), None)
        overrides = [*flags, *found]
    sys.argv = [words[0], *overrides]
    if name == "train" and several and not of_hydra:
        from blemish.run.sweep import launch

        launch(main, words)
    else:
        main()
