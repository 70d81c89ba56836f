"""Score images with an exported detector: `python -m blemish.edge model.onnx images/ output/`, with no more than the runtime needs."""

import argparse
import csv
import io
import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from .errors import InputError

TABLES = ("scores.csv", "results.jsonl", "failed.csv")
COLUMNS = ("path", "score", "threshold", "decision", "p_value")
TOGETHER = 8  # tiles at a time


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 0, 1 if some images could not be scored, 2 if nothing could be done, 130 after Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["watch"]:
        return guarded(watch, arguments[1:])
    parser = argparse.ArgumentParser(prog=f"python -m {__package__}", description="Score images with an exported detector.")
    parser.epilog = f"`python -m {__package__} watch --help`: score images as they arrive."
    parser.add_argument("model", type=Path, help="export of a run, .onnx or .xml")
    parser.add_argument("images", type=Path, help="an image, or a folder that is searched at any depth")
    parser.add_argument("output", type=Path, help=f"folder for <name>_overlay.png of each image, {', '.join(TABLES)}")
    parser.add_argument("--threads", type=int, help="of the engine; all of the machine by default")
    parser.add_argument("--no-overlays", action="store_true", help="write the tables alone")
    return guarded(score, parser.parse_args(arguments))


def guarded(work: Callable[[Any], int], options: Any) -> int:
    """The exit status of a work; what it cannot use ends it with a line and 2."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: say(f"warning: {message}", sys.stderr)
            return work(options)
    except ImportError as error:  # of numpy or Pillow; the runtime names others itself
        say(f"error: {error.name} is not here; pip install numpy pillow onnxruntime", sys.stderr)
    except InputError as error:
        say(f"error: {error}", sys.stderr)
    except KeyboardInterrupt:
        return 130
    return 2


def watch(arguments: list[str]) -> int:
    """Score images as they arrive; the options are those of configs/watch.yaml."""
    from .watch import Settings, exported, watch

    parser = argparse.ArgumentParser(prog=f"python -m {__package__} watch", description="Score images as they arrive; see docs/watch.md.")
    parser.add_argument("model", type=Path, help="export of a run, .onnx or .xml")
    parser.add_argument("input", help="a folder that is searched at any depth, a camera's number or device, rtsp://…, or a video")
    parser.add_argument("output", help="folder of watch.jsonl, monitor.json and alarms/")
    parser.add_argument("--threads", type=int, help="of the engine; all of the machine by default")
    for field in fields(Settings)[2:]:
        option, value = f"--{field.name.replace('_', '-')}", field.default
        if isinstance(value, bool):
            parser.add_argument(option, action=argparse.BooleanOptionalAction, default=value)
        else:
            parser.add_argument(option, type=str if value is None else type(value), default=value, help=f"default {value}")
    options = vars(parser.parse_args(arguments))
    scorer = exported(options.pop("model"), options.pop("threads"))
    return watch(scorer, Settings(**options), say, lambda text: say(text, sys.stderr))


def score(options: argparse.Namespace) -> int:
    """Score the images and write overlays as they come and the tables at the end, also after an interruption."""
    from .outputs import Outputs, encoded, images_at, output_names
    from .runtime import Model

    model, source, output = Model(options.model, options.threads), options.images.expanduser(), options.output.expanduser()
    paths, outputs, lines, failed = images_at(source), Outputs(), [], []
    names = output_names(paths, source if source.is_dir() else source.parent)
    overlays = {} if options.no_overlays else {path: output / f"{name}_overlay.png" for path, name in names.items()}
    outputs.check([*(output / name for name in TABLES), *overlays.values()], "another output folder")
    try:
        for path in paths:
            try:
                (result,) = model.predict(path, TOGETHER)
            except InputError as error:
                failed.append((str(path), str(error).removeprefix(f"{path}: ")))
                continue
            lines.append(result.to_dict() | {"files": []})
            if path in overlays:
                outputs.write(overlays[path], encoded(result.overlay()))
                lines[-1]["files"].append(overlays[path].relative_to(output).as_posix())
    finally:
        scores, results, failures = (output / name for name in TABLES)
        failures.unlink(missing_ok=True)
        if failed:
            outputs.write(failures, table(("path", "reason"), failed))
        if lines:
            outputs.write(scores, table(COLUMNS, [[cell(line[name]) for name in COLUMNS] for line in lines]))
            outputs.write(results, text_of("".join(json.dumps(line) + "\n" for line in lines)))
    for path, reason in failed[:20]:
        say(f"not scored: {path}: {reason}", sys.stderr)
    if not lines:
        raise InputError(f"{source}: none of {len(failed)} images could be scored, see {failures}")
    decided = f"{sum(map(bool, (line['decision'] for line in lines)))} of {len(lines)} anomalous"
    say(f"{decided if model.threshold is not None else f'{len(lines)} images scored, no threshold'}: {scores}")
    if any(line["boxes"] is None for line in lines) and model.metadata["map_threshold"] is not None:
        say("no boxes, which need SciPy: pip install scipy", sys.stderr)
    return 1 if failed else 0


def table(header: tuple, rows: list) -> bytes:
    file = io.StringIO(newline="")
    csv.writer(file, lineterminator="\n").writerows([header, *rows])
    return text_of(file.getvalue())


def cell(value: object) -> object:
    return int(value) if isinstance(value, bool) else value


def text_of(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")  # surrogates stand for bytes of a file's name that are not UTF-8


def say(text: str, stream: object = None) -> None:
    stream = stream or sys.stdout
    code = stream.encoding or "utf-8"
    stream.write(text.encode(code, "backslashreplace").decode(code) + "\n")
    stream.flush()


if __name__ == "__main__":
    sys.exit(main())
