"""The command `blemish`: every tool under one name, from any folder, with the configs of the installed package."""

import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

# a tool imports what it needs when it is called: help and errors of the command need no torch


class Command(NamedTuple):
    """What a name of the command line stands for."""

    line: str  # of help
    config: str  # the yaml in configs/ that its overrides are of
    work: Callable[[Any], Any]  # what is done with the composed config
    actions: tuple[str, ...] = ()  # what its first word may be, which is then action=<word>


def train(cfg: Any) -> Any:
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from blemish.run import sweep
    from blemish.run.terminal import report
    from blemish.run.train import train

    if HydraConfig.get().mode == RunMode.MULTIRUN:
        return sweep.cell(cfg)
    return report(train(cfg), cfg.run_dir)


def test(cfg: Any) -> None:
    from blemish.run.terminal import report
    from blemish.run.test import test

    report(test(cfg), cfg.output or f"{cfg.run}/retest")


def predict(cfg: Any) -> None:
    from blemish.run.predict import predict

    done = predict(cfg)
    for line in done.said:
        say(line)
    for path, reason in done.failed[:20]:
        say(f"not scored: {path}: {reason}", sys.stderr)
    if done.failed:
        say(f"{len(done.failed)} images could not be scored: {done.output / 'failed.csv'}", sys.stderr)
        sys.exit(1)


def data(cfg: Any) -> None:
    from blemish.data import check, synthetic
    from blemish.edge.checks import check_choice, check_number
    from blemish.files import replacing
    from blemish.run import config

    check_number("", "(0, 1]", share=cfg.share)
    check_choice("", COMMANDS["data"].actions, action=cfg.action)
    images = config.build(cfg.data)
    if cfg.action == "check":
        with replacing(output := cfg.output or "manifest.csv"):
            found = check.report(images, output)
        sys.exit(found)
    images.setup()
    say(f"{synthetic.write(images, cfg.output or 'synthetic', cfg.share, cfg.seed)} images drawn on: {cfg.output or 'synthetic'}")


def table(cfg: Any) -> None:
    from rich.console import Console

    from blemish.files import replacing
    from blemish.report.tables import RUN, show, write

    with replacing(cfg.output, cfg.markdown, cfg.latex, choose="output=, markdown= or latex=FILE", header=",".join(RUN)):
        written = write(cfg.runs, cfg.output, cfg.readme, cfg.markdown, cfg.latex, cfg.by, cfg.metric, cfg.published, cfg.docs)
    runs, grids = written
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    for grid in grids:
        show(console, grid, bold=cfg.by == "category")
    files = ", ".join(filter(None, (cfg.output, cfg.readme, cfg.docs, cfg.markdown, cfg.latex)))
    say(f"{runs} run{'s' * (runs != 1)} in {cfg.runs}" + (f", written to {files}" if files else ""))


def report(cfg: Any) -> None:
    from blemish.files import replacing
    from blemish.report.page import write

    with replacing(cfg.output):
        runs = write(cfg.runs, cfg.output, cfg.max_mb, cfg.images, cfg.picture_px)
    say(f"{runs} runs: {cfg.output} ({Path(cfg.output).stat().st_size / 1e6:.1f} MB)")


def reproduce(cfg: Any) -> None:
    from hydra.core.hydra_config import HydraConfig

    from blemish.report import reproduce
    from blemish.run import config, sweep
    from blemish.run import config as compose

    name, typed = HydraConfig.get().runtime.choices.get("paper"), HydraConfig.get().overrides.task
    if not name:
        refuse(f"paper: none given; choose {', '.join(compose.names('paper'))}")
    config.check_config(cfg)
    sys.exit(reproduce.reproduce(cfg, name, typed, compose.plain, scan=lambda c: config.build(c.data).scan(), train=sweep.train_apart))


def export(cfg: Any) -> None:
    from blemish.deploy.export import export_run
    from blemish.run import checkpoint, config

    path, parity = export_run(cfg, checkpoint.load, config.build)
    say(f"{path}: {parity}")


def bench(cfg: Any) -> None:
    from rich.console import Console

    from blemish.deploy import bench
    from blemish.run import checkpoint, config

    Console(soft_wrap=True).print(bench.table(bench.bench_run(cfg, checkpoint.load, config.build)))


COMMANDS = {
    "train": Command("fit, test and record one detector, with -m several: blemish train model=padim data=mvtec", "train", train),
    "test": Command("load a run and test it again: blemish test run=results/runs/…", "test", test),
    "predict": Command("score images with a run: blemish predict run=results/runs/… input=FILE|FOLDER output=FOLDER", "predict", predict),
    "data": Command(
        "look at a data set, or draw defects on one: blemish data check|synthesize data=mvtec data.root=FOLDER",
        "data",
        data,
        ("check", "synthesize"),
    ),
    "export": Command(
        "write a run as one file without blemish: blemish export run=results/runs/… format=onnx|torch_export|openvino",
        "export",
        export,
    ),
    "bench": Command("time a run by stage and engine: blemish bench run=results/runs/…", "bench", bench),
    "table": Command("collect finished runs into a table: blemish table runs=results/runs", "table", table),
    "report": Command("show runs on one page: blemish report runs=results/runs", "report", report),
    "reproduce": Command(
        "run a paper's own protocol and compare with its tables: blemish reproduce paper=padim categories=[screw]",
        "reproduce",
        reproduce,
    ),
}


# keys whose values are files or folders
PATHS = ("run_dir", "run", "runs", "input", "output", "resume", "update", "images", "weights", "data.root", "data.manifest", "store.root")
PATHS += ("change.data.root", "data.roi", "change.data.roi", "roi", "monitor_file", "readme", "docs", "markdown", "latex")


def path_as_typed(override: str, several: bool) -> str:
    """The override with its value in quotes where it is a path that Hydra would take for something else, or for nothing at all.

    A folder named 2024 is no number, and brackets, commas and quotes in a name are no lists. With `several`, values of a sweep are left.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import Quote, QuotedString
    from hydra.errors import HydraException

    key, _, value = override.partition("=")
    if key.lstrip("+") not in PATHS or not value:
        return override
    try:
        parsed = OverridesParser.create().parse_override(override)
        found = parsed.value()
        kept = several if parsed.is_sweep_override() else found is None or isinstance(found, str | QuotedString)
        kept = kept or (key == "resume" and isinstance(found, bool))
    except HydraException:
        kept = False
    return override if kept else f"{key}={QuotedString(value, Quote.single).with_quotes()}"


def say(text: str, stream: Any = None) -> None:
    stream = stream or sys.stdout
    code = stream.encoding or "utf-8"
    stream.write(text.encode(code, "backslashreplace").decode(code) + "\n")  # a file's name may be no text


def usage() -> str:
    lines = [f"  {name:10}{command.line}" for name, command in COMMANDS.items()]
    return "\n".join(["usage: blemish COMMAND [KEY=VALUE …]", "", *lines, "", "blemish COMMAND --help lists the keys of a command."])


def refuse(problem: str) -> None:
    sys.stderr.write(f"error: {problem}\n")
    sys.exit(2)


def main() -> None:
    """The command `blemish`: `sys.argv` is the command, a tool's name and Hydra's overrides."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        return say(usage())
    if name == "--version":
        return say(f"blemish {version('blemish')}")
    if name not in COMMANDS:
        refuse(f"{name}: no command of blemish; choose {', '.join(COMMANDS)}")
    return call(name, sys.argv[:2], sys.argv[2:])


def tool(name: str) -> None:
    """The file tools/NAME.py: `sys.argv` is that file and Hydra's overrides."""
    call(name, sys.argv[:1], sys.argv[1:])


def vetted(overrides: list[str], config: str, several: bool) -> list[str]:
    """The overrides as Hydra may have them; InputError where a group or a key is misspelt, which Hydra would tell at length."""
    from blemish.run.config import composed, firsts, settled

    flags = [text for text in overrides if text.startswith("-")]
    overrides = settled([text for text in overrides if not text.startswith("-")], config)
    composed(*(firsts(overrides) if several else overrides), config=config)
    return [*flags, *overrides]


def call(name: str, words: list[str], overrides: list[str]) -> None:
    """Let Hydra read the overrides and do the tool's work with the config that it composes, once for each job of a sweep.

    words: what stands before the overrides on the command line.
    """
    import hydra

    from blemish.run.config import configs, run_cli

    command, whole = COMMANDS[name], list(sys.argv)
    if command.actions and not set(overrides) & {"--help", "-h", "--hydra-help", "--info", "--cfg", "-c"}:
        if not overrides or overrides[0] not in command.actions:
            found = overrides[0] if overrides else "nothing"
            refuse(f"{name}: found {found}; choose {' or '.join(command.actions)}, before all KEY=VALUE")
        overrides = [f"action={overrides[0]}", *overrides[1:]]

    def task(cfg: Any) -> Any:
        sys.argv = whole  # a record tells how it was called, and further processes of a training are called so too
        return run_cli(command.work, cfg)

    task.__module__ = f"blemish {name}"  # where Hydra looks for the name of the job, which its help shows
    main = hydra.main(str(configs()), command.config, version_base="1.3")(task)
    several = bool({"-m", "--multirun"} & set(overrides))
    overrides = [path_as_typed(text, several) for text in overrides]
    if all(text in ("-m", "--multirun") for text in overrides if text.startswith("-")):  # the other flags are Hydra's alone
        overrides = run_cli(lambda _: vetted(overrides, command.config, several), None)
    sys.argv = [words[0], *overrides]
    if name == "train" and several:
        from blemish.run.sweep import launch

        launch(main, words)
    else:
        main()
