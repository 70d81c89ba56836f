"""Score images with a finished run, or with a model that needs no fit."""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import Progress

from blemish.data.module import DTYPE, plain_window
from blemish.data.ranges import ValueCheck, fit_window
from blemish.data.roi import Roi
from blemish.edge.checks import LARGEST_SEED, check_choice, check_number, check_whole
from blemish.edge.errors import InputError
from blemish.edge.reading import read
from blemish.files import locked
from blemish.methods.noise_residual import NoiseResidual
from blemish.run.checkpoint import device_of, load
from blemish.run.config import build, module_of
from blemish.run.detections import COLUMNS, KINDS, detect
from blemish.run.monitor import Monitor, unusual
from blemish.run.record import read_record
from blemish.run.results import (
    Failure,
    anomalous,
    check_outputs,
    finished,
    has_maps,
    images_at,
    outcome,
    output_names,
    places,
    preprocessing_of,
    thresholds,
    write,
    write_tables,
)
from blemish.run.results import predict as apply

log = logging.getLogger(__name__)

ELSEWHERE = "choose another folder with output=FOLDER"


class Predicted(NamedTuple):
    """What there is to tell of a prediction."""

    rows: list[tuple]  # of scores.csv
    failed: list[Failure]  # of failed.csv
    said: list[str]  # lines for a person
    output: Path


def predict(cfg: DictConfig) -> Predicted:
    """Score the image or folder `cfg.input` by a run, or by a model that needs none, and write what is found under `cfg.output`.

    InputError where no image can be scored; those that cannot are told, and do not keep the others from it.
    """
    check_thresholds(cfg)
    device_of(cfg.device)
    check_choice("", ("on", "off", True, False), monitor=cfg.monitor)  # YAML takes a bare on for true
    check_number("", "(0, 1)", monitor_rate=cfg.monitor_rate)
    check_whole("", 0, LARGEST_SEED, seed=cfg.seed)
    paths, output = images_at(cfg.input), Path(cfg.output)
    root = paths[0].parent if Path(cfg.input).expanduser().is_file() else Path(cfg.input).expanduser()
    if cfg.run is None:
        return predict_untrained(cfg, paths, root, output)
    run = Path(cfg.run)
    saved, model = load(run, cfg.device)
    preprocessing, named = preprocessing_of(saved, cfg.get("roi"), root), named_window(cfg)
    preprocessing = preprocessing._replace(window=preprocessing.window | named)
    values = ValueCheck(model.ranges, preprocessing.window, "window", named=named)
    if cfg.alpha is not None and not len(model.calibration):
        raise InputError(f"alpha={cfg.alpha}: the run has no calibration images, as with protocol=paper; expected threshold=NUMBER instead")
    scale, hand = (read_record(run) or {}).get("scale"), saved.get("by_hand") or {}
    if cfg.threshold is None and cfg.alpha is None:
        cfg.threshold = hand.get("threshold")
    if cfg.map_threshold is None:
        cfg.map_threshold = hand.get("map_threshold")
    failed: list[Failure] = []
    found = apply(model, paths, preprocessing, saved.batch_size, output, values.loading(read, preprocessing.inside), failed)
    found = followed(found, "predicting", len(paths), failed)
    alpha = saved.alpha if cfg.alpha is None else cfg.alpha
    threshold, level = thresholds(model.calibration, alpha, model.map_threshold, cfg.threshold, cfg.map_threshold)
    names = output_names(paths, root)
    with locked(output, ELSEWHERE):
        monitor = monitor_of(cfg, output, model.calibration[:, 0].tolist(), saved.seed)
        rows = write(found, names, output, model.calibration, threshold, level, scale, failed, monitor)
    values.report()
    said = outcome(rows, threshold, output, names)
    if cfg.map_threshold is not None:
        said.insert(
            1, f"masks: map above {level:.6g}, set by hand" if has_maps(rows) else f"map_threshold={level:.6g}: this method has no map"
        )
    if monitor.on:
        log.log(logging.INFO if monitor.alarm is None else logging.WARNING, monitor.explain())
    elif warning := unusual(anomalous(rows), len(rows), threshold):
        log.warning(warning)
    return Predicted(rows, failed, said, output)


def check_thresholds(cfg: DictConfig) -> None:
    """InputError for thresholds set by hand that are none, or do not go together."""
    given = [key for key in ("threshold", "alpha", "map_threshold") if cfg[key] is not None]
    for key in given:
        check_number("", "(0, 1)" if key == "alpha" else "(-inf, inf)", **{key: cfg[key]})
    if {"threshold", "alpha"} <= set(given):
        raise InputError(
            f"threshold={cfg.threshold} and alpha={cfg.alpha}: expected one of them, as alpha is what the threshold comes from"
        )
    if given and cfg.run is None:
        raise InputError(
            f"{given[0]}={cfg[given[0]]}: without a run the threshold is that of noise_residual, NFA ≤ model.epsilon; expected "
            "model.epsilon=NUMBER, or run=FOLDER"
        )


def named_window(cfg: DictConfig) -> dict[str, tuple[float, float]]:
    """The window that is given by hand for a prediction, (lo, hi) by dtype; InputError for what is none."""
    try:
        given = {} if cfg.get("window") is None else plain_window(OmegaConf.to_container(cfg)["window"])
    except InputError as error:
        raise InputError(str(error).removeprefix("data.")) from None
    if given == "auto":
        raise InputError("window=auto: is what a prediction does without it; expected [lo, hi], {uint16: [lo, hi]} or dtype")
    return DTYPE if given == "dtype" else given


def monitor_of(cfg: DictConfig, output: Path, calibration: Sequence[float], seed: int) -> Monitor:
    """What is remembered of the stream of images that this prediction goes on with."""
    path = Path(cfg.monitor_file).expanduser() if cfg.monitor_file else output / "monitor.json"
    return Monitor(path, cfg.monitor in ("on", True), cfg.monitor_rate, calibration, seed)


def predict_untrained(cfg: DictConfig, paths: list[Path], root: Path, output: Path) -> Predicted:
    """Detections in each image by itself; deep images are shown by a window fitted to the input."""
    if "model" not in cfg:
        raise InputError("run: none given; expected run=<folder of a finished run>, or model=noise_residual, which needs none")
    model = build(cfg.model)
    if not isinstance(model, NoiseResidual):
        raise InputError(f"model={module_of(cfg.model)}: has to be fitted first; expected run=<folder of its run>, or model=noise_residual")
    model = model.eval().to(device_of(cfg.device))
    roi = Roi(cfg.roi, root) if cfg.roi else None
    names, failed = output_names(paths, root), []
    window = fit_window(path for path in paths if is_sound(path)) | named_window(cfg)
    values = ValueCheck({}, window, "window")
    with locked(output, ELSEWHERE):
        monitor, outputs = monitor_of(cfg, output, [], cfg.seed), check_outputs(output, names, KINDS)
        found = detect(model, paths, window, names, output, roi, values.loading(read), failed, outputs)

        def finish(rows: list[tuple], whole: bool) -> None:
            write_tables(output, COLUMNS, rows, failed, outputs)
            if whole:
                monitor.take([row[1] for row in rows])
                monitor.save()

        rows = finished(followed(found, "detecting", len(paths), failed), finish, failed)
    values.report()
    count = sum(bool(row[COLUMNS.index("detections")]) for row in rows)
    law = f"NFA ≤ model.epsilon={model.epsilon:g}, the false detections expected in an image of noise"
    return Predicted(rows, failed, [f"{count} of {len(rows)} with detections ({law})", *places(rows, output, names)], output)


def followed(found: Iterator, what: str, total: int, failed: Sequence[Failure]) -> Iterator:
    """What is found, with a bar on the screen that counts what has failed as done."""
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total)
        for count, one in enumerate(found, 1):
            yield one
            bar.update(task, completed=count + len(failed))
        bar.update(task, completed=total)


def is_sound(path: Path) -> bool:
    """Whether an image can be read."""
    with contextlib.suppress(InputError):
        return read(path) is not None
    return False
