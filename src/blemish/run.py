"""One run from a composed config to a folder with its record, and the way back: the only file that knows Hydra's config."""

import contextlib
import ctypes
import logging
import re
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.utils import get_class, instantiate
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import Progress
from torch.utils.data import DataLoader

from blemish.backbone.features import Features
from blemish.backbone.store import Store, StoredData, check_store
from blemish.checks import LARGEST_SEED, check_choice, check_number, check_switch, check_whole
from blemish.compose import ARGUMENTS, configs, leaves, unknown
from blemish.data.module import DTYPE, ImageData, plain_window
from blemish.data.ranges import ValueCheck, fit_window
from blemish.data.regions import Region
from blemish.data.samples import Sample, read_manifest, write_manifest
from blemish.deploy.detect import COLUMNS, KINDS, detect
from blemish.deploy.export import view_of
from blemish.deploy.monitor import Monitor, unusual
from blemish.deploy.predict import (
    Failure,
    anomalous,
    check_outputs,
    finished,
    has_maps,
    images_at,
    outcome,
    output_names,
    places,
    thresholds,
    write,
    write_tables,
)
from blemish.deploy.predict import predict as apply
from blemish.deploy.tiling import whole
from blemish.detector import Detector, OnePassDetector, TrainedDetector
from blemish.edge.ranges import Range
from blemish.edge.reading import read
from blemish.files import atomic_write, fsync, locked, no_room, release, write_csv, write_json, write_text
from blemish.methods.noise_residual import NoiseResidual
from blemish.records.evaluate import SCORES, Calibrate, Evaluate
from blemish.records.progress import ProgressBar
from blemish.records.record import FINISHED, REGION, STATE, Record, check_archive, claim, read_record, truth_kind
from blemish.records.tables import decisions, summary
from blemish.records.timing import StageTimes
from blemish.scoring.calibration import finite, rate
from blemish.types import InputError

log = logging.getLogger(__name__)

ELSEWHERE = "choose another folder with output=FOLDER"
CHECKED = 2**30  # bytes of a checkpoint up to which its checksums are compared: a larger one is read from where it lies


def check_config(cfg: DictConfig) -> None:
    """InputError for a value of train.yaml, or of its trainer, that cannot be meant; those of data and model are their constructors'."""
    for name in ("save", "sweep", "store", "trainer"):
        if name in cfg and not OmegaConf.is_dict(cfg[name]):
            raise InputError(f"{name}={cfg[name]}: has values of its own, as configs/train.yaml lists them; expected {name}.KEY=VALUE")
    check_whole("", 0, LARGEST_SEED, seed=cfg.seed)
    check_number("", "(0, 1)", alpha=cfg.alpha)
    check_whole("", 0, pixel_limit=cfg.pixel_limit)
    check_whole("save", -1, pictures=cfg.save.pictures)
    check_switch("save", **{key: cfg.save[key] for key in cfg.save if key != "pictures"})
    check_switch("", overwrite=cfg.get("overwrite", False))
    check_choice("", (None, "synthetic"), objective=cfg.get("objective"))
    if cfg.get("sweep"):
        check_number("sweep", "(0, inf)", also=(None,), minutes=cfg.sweep.minutes)
        check_whole("sweep", 1, also=(None,), threads=cfg.sweep.threads)
    if cfg.get("store"):
        check_switch("store", **{key: cfg.store[key] for key in ("enabled", "images") if key in cfg.store})
        if cfg.store.enabled:
            check_store(cfg.store.dtype, cfg.store.max_gb)
    check_whole("trainer", 1, max_epochs=cfg.trainer.max_epochs)
    check_whole("trainer", 1, accumulate_grad_batches=cfg.trainer.get("accumulate_grad_batches", 1))
    check_number("trainer", "(0, inf)", also=(None,), gradient_clip_val=cfg.trainer.get("gradient_clip_val"))
    check_switch("trainer", enable_progress_bar=cfg.trainer.get("enable_progress_bar", True))
    if "seed" in cfg.model:
        check_whole("model", 0, LARGEST_SEED, seed=cfg.model.seed)


def train(cfg: DictConfig) -> dict:
    """Fit if the method needs it, calibrate, save, test and record; returns what metrics.json holds. `cfg.run_dir` gets the folder.

    With `update`, the folder of a run, its model takes in the training images that it has not seen, and nothing is fitted again.
    With `resume`, the folder of a run that was stopped, that run goes on from its last epoch, with its own config and split.
    """
    if resumed := Path(cfg.resume) if cfg.get("resume") else None:
        cfg.run_dir = str(resumed)  # for the caller, who tells where it is
        cfg = resume_config(cfg, resumed)
    check_config(cfg)
    past = Path(cfg["update"]) if cfg.get("update") else None  # cfg.update is a method of every mapping
    model = load_for_update(cfg, past) if past else None
    data = described(cfg)
    try:
        model = model or build(cfg.model)  # first, so that a wrong value costs neither a reading nor a folder's content
    except InputError as error:
        if str(error).startswith("weights=") and isinstance(cfg.model.weights, str):
            data.setup()  # where the images are missing as well, they are told first
        raise
    folder = Path(cfg.run_dir) if cfg.run_dir else default_folder(cfg)
    if past and folder.resolve() == past.resolve():
        raise InputError(f"run_dir={folder}: is the run to be updated, which would be lost; choose another folder")
    cfg.run_dir = str(folder)
    with run_context(folder, cfg, overwrite=cfg.overwrite, keep=[STATE, REGION, "manifest.csv"] if resumed else []) as record:
        times, calibrate, evaluate = build_callbacks(cfg)
        trainer = trainer_of(cfg, [times, *whole(data, calibrate, evaluate), *resume_callbacks(cfg, model, folder)])
        if trainer.gradient_clip_val is not None and not model.automatic_optimization:
            raise InputError(f"trainer.gradient_clip_val={trainer.gradient_clip_val}: this method steps by itself; use {model.clipped_by}")
        set_up(cfg, data, past, model.ranges if past else {})
        model.ranges, values, region = data.ranges, data.values, data.region
        data.process, data.processes = trainer.global_rank, trainer.world_size
        save_split(cfg, folder, data)
        record.note(facts(cfg, data, model))
        data = stored(cfg, data, model, trainer, times)
        model.expects_calibration = any(sample.split == "calibrate" for sample in data.samples)
        started = time.perf_counter()
        if past:
            model.update(trainer, data)
        elif isinstance(model, OnePassDetector | TrainedDetector):
            trainer.fit(model, datamodule=data, ckpt_path=state_in(folder) if resumed else None, weights_only=True)
        fitted = time.perf_counter()
        loaders = [data.calibrate_dataloader()] if model.expects_calibration else []
        if past and cfg.protocol == "clean":
            loaders += calibration_of(past, data.samples)
        calibrated(trainer, model, calibrate, loaders)
        if cfg.save.checkpoint:
            save_checkpoint(trainer, model, folder / "model.ckpt", portable_config(cfg, region))
        if trainer.is_global_zero:
            (folder / STATE).unlink(missing_ok=True)
        # of a training that was resumed only the last part was seen
        metrics = measured(trainer, model, data, evaluate, times, None if resumed else fitted - started)
        values.report()
        write_results(folder, cfg, evaluate, metrics, record, trainer)
        record.finish({"seconds": times.total(), "store": data.facts() if isinstance(data, StoredData) else None})
    return metrics


def calibrated(trainer: Trainer, model: Detector, calibrate: Calibrate, loaders: Sequence[DataLoader]) -> None:
    """Give a fitted method the scores of held-out normal images, which its thresholds come from."""
    if not loaders:
        return
    model.to(trainer.strategy.root_device).eval()
    with torch.no_grad():
        model.calibrate(trainer.strategy.batch_to_device(batch) for loader in loaders for batch in loader)
    found = []
    for loader in loaders:
        trainer.predict(model, dataloaders=loader, return_predictions=False)
        found.append(calibrate.values)
    model.calibration = torch.cat(found).to(model.device)


def test(cfg: DictConfig) -> dict:
    """Load a finished run, test it again on its own manifest, write the results to `cfg.output`; returns the metrics.

    The run's config may be overridden under `cfg.change`, for instance data.root where the images have moved.
    """
    run = Path(cfg.run)
    device_of(cfg.device)
    saved, model = load(run, cfg.device)
    for key in leaves(cfg.change):
        if key.split(".")[0] not in ARGUMENTS and key not in leaves(saved):
            raise InputError(f"change.{unknown(key, leaves(saved))}")
    saved = OmegaConf.merge(saved, cfg.change)
    saved.data.manifest = str(run / "manifest.csv")
    if cfg.device != "auto":
        saved.trainer.accelerator = cfg.device
    folder = Path(cfg.output) if cfg.output else run / "retest"
    if folder.resolve() == run.resolve():
        raise InputError(f"output={folder}: is the run itself, which would be lost; choose another folder")
    if (folder / "model.ckpt").exists():
        raise InputError(f"output={folder}: holds the model of a run, which would be lost; choose another folder")
    saved.run_dir = str(folder)
    check_config(saved)
    data = described(saved)
    with run_context(folder, saved, overwrite=read_record(folder) is not None) as record:  # what no test wrote is left
        times, _, evaluate = build_callbacks(saved)
        saved.logger = None
        trainer = trainer_of(saved, [times, *whole(data, evaluate)])
        set_up(saved, data, ranges=model.ranges)
        values = data.values
        data.process, data.processes = trainer.global_rank, trainer.world_size
        save_config(saved, folder)
        record.note(facts(saved, data, model))
        data = stored(saved, data, model, trainer, times)
        metrics = measured(trainer, model, data, evaluate, times, None)
        values.report()
        write_results(folder, saved, evaluate, metrics, record, trainer)
        record.finish({"seconds": times.total(), "store": data.facts() if isinstance(data, StoredData) else None})
    return metrics


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
    view, named = view_of(saved, cfg.get("region"), root), named_window(cfg)
    view = view._replace(window=view.window | named)
    values = ValueCheck(model.ranges, view.window, "window", named=named)
    if cfg.alpha is not None and not len(model.calibration):
        raise InputError(f"alpha={cfg.alpha}: the run has no calibration images, as with protocol=paper; expected threshold=NUMBER instead")
    scale, hand = (read_record(run) or {}).get("scale"), saved.get("by_hand") or {}
    if cfg.threshold is None and cfg.alpha is None:
        cfg.threshold = hand.get("threshold")
    if cfg.map_threshold is None:
        cfg.map_threshold = hand.get("map_threshold")
    failed: list[Failure] = []
    found = apply(model, paths, view, saved.batch_size, output, values.loading(read, view.seen), failed)
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
        (rate if key == "alpha" else finite)(key, cfg[key])
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
    region = Region(cfg.region, root) if cfg.region else None
    names, failed = output_names(paths, root), []
    window = fit_window(path for path in paths if is_sound(path)) | named_window(cfg)
    values = ValueCheck({}, window, "window")
    with locked(output, ELSEWHERE):
        monitor, outputs = monitor_of(cfg, output, [], cfg.seed), check_outputs(output, names, KINDS)
        found = detect(model, paths, window, names, output, region, values.loading(read), failed, outputs)

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


def load(run: Path, device: str = "auto") -> tuple[DictConfig, Detector]:
    """The config and the fitted detector of a run folder, or of a file with both, in eval mode; nothing is unpickled.

    Such files are a run's model.ckpt and what `AnomalyDetector.save` writes. InputError names what is missing.
    """
    config, checkpoint = (run, run) if run.is_file() else (run / "config.yaml", run / "model.ckpt")
    for path in (config, checkpoint):
        if not path.is_file():
            record = read_record(run) or {}
            status = f"; its record says {record['status']!r}" if record else ""
            raise InputError(f"run={run}: no {path.name} there{status}; expected the folder of a finished run, or a saved detector")
    cfg = None if config == checkpoint else read_config(run)
    target = "a detector" if cfg is None else str(cfg.model._target_)
    try:
        saved = contents(checkpoint)
        state, made = saved["state_dict"], dict(saved.get("hyper_parameters", {}))
        text, mask = saved["config"], saved["region"]
    except Exception as error:
        raise InputError(f"{checkpoint}: not a whole checkpoint of {target} ({type(error).__name__}: {error})") from error
    if cfg is None:
        cfg = config_of(checkpoint, text)
        if mask is not None:
            cfg._set_flag("allow_objects", True)
            cfg.data.region = mask.numpy()
    said = OmegaConf.to_container(cfg.model, resolve=True)
    for key in sorted(made.keys() & said.keys() - {"weights"}):
        if made[key] != said[key]:
            raise InputError(f"{config}: model.{key}={said[key]}, but {checkpoint.name} was made with {made[key]}; expected what it says")
    if "weights" in cfg.model:
        cfg.model.weights = "checkpoint"
    try:
        model = build(cfg.model)
    except InputError as error:
        raise InputError(f"{config}: {error}") from None
    try:
        model.load_state_dict(state)
    except Exception as error:
        raise InputError(f"{checkpoint}: not a whole checkpoint of {target} ({type(error).__name__}: {error})") from error
    return cfg, model.eval().to(device_of(device))


def contents(checkpoint: Path) -> dict:
    """What a checkpoint holds, tensors mapped from the file; nothing is unpickled. An error of some kind where it is not whole."""
    if checkpoint.stat().st_size <= CHECKED:
        check_archive(checkpoint)
    return torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)


def read_config(run: Path) -> DictConfig:
    """The config of a run folder; InputError if it is none, or calls what no config of blemish calls."""
    cfg = config_of(run / "config.yaml")
    if OmegaConf.select(cfg, "data.region") and (run / REGION).is_file():
        cfg.data.region = str(run / REGION)
    return cfg


def config_of(path: Path, text: str | None = None) -> DictConfig:
    """The config in a file, or the `text` of one that lies in a checkpoint; InputError as `read_config`."""
    try:
        cfg = OmegaConf.load(path) if text is None else OmegaConf.create(text)
        str(cfg.model._target_)
    except Exception as error:
        raise InputError(f"{path}: not the config of a run ({type(error).__name__}: {error})") from error
    for place, name in targets(OmegaConf.to_container(cfg)):
        if name not in known_targets(place):
            choices = ", ".join(known_targets(place)) or "nothing"
            raise InputError(f"{path}: {place}._target_={name}; a run's config may call there {choices}")
    return cfg


@cache
def known_targets(place: str) -> list[str]:
    """What the files of a config group call."""
    files = sorted((configs() / place).glob("*.yaml")) if place in ARGUMENTS else []
    found = [re.findall(r"^\s*_target_: *(\S+)", file.read_text(encoding="utf-8"), re.MULTILINE) for file in files]
    return sorted({name for names in found for name in names} - {"null"})


def targets(node: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """(place, `_target_`) of everything in a config that Hydra would call, at any depth."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        if key == "_target_" and value is not None:
            yield place, str(value)
        yield from targets(value, f"{place}.{key}".lstrip("."))


def device_of(name: str) -> torch.device:
    """`auto` as the fastest device there is, any other name as torch knows it; InputError for one that is not here."""
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise InputError(f"device={name}: expected auto, cpu, gpu or mps")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        return torch.empty(0, device={"gpu": "cuda"}.get(name, name)).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device={name}: not available here; choose auto, cpu, gpu or mps ({error})") from error


def default_folder(cfg: DictConfig) -> Path:
    """results/runs/<model>/<dataset>/<category>/<seed>-<time>, with a number behind it if that exists."""
    category = str(cfg.data.get("category") or "all").replace("/", "-")
    stem = f"{cfg.seed}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    place = Path("results/runs") / module_of(cfg.model) / module_of(cfg.data) / category
    names = [stem] + [f"{stem}-{n}" for n in range(2, 1000)]
    return next(place / name for name in names if not (place / name).exists())


def class_of(part: DictConfig) -> type:
    """The class that a part of the config calls."""
    return get_class(part._target_)


def module_of(part: DictConfig) -> str:
    """The file that holds a part's class: `padim` for blemish.methods.padim.PaDiM, which is also the name of its yaml."""
    return part._target_.split(".")[-2]


def build(part: DictConfig, **more: Any) -> Any:
    """The object a part of the config describes, of plain values; an InputError in its constructor comes out as it is."""
    try:
        return instantiate(part, _convert_="all", **more)
    except InstantiationException as error:
        cause = error.__cause__
        while cause is not None and not isinstance(cause, InputError):
            cause = cause.__cause__
        if cause is not None:
            raise cause from None
        place = re.search(r"full_key: (\S+)", str(error))
        raise InputError(f"{place[1] + ': ' if place else ''}{error.__cause__ or error}") from error


def resume_config(cfg: DictConfig, run: Path) -> DictConfig:
    """The config of a run that was stopped, with what the command line says of trainer, logger, workers and save."""
    if not (run / "config.yaml").is_file():
        raise InputError(f"resume={run}: no config.yaml there; expected the folder of a run")
    if (read_record(run) or {}).get("status") == FINISHED:
        raise InputError(f"resume={run}: that run is finished; expected one that was stopped")
    saved = read_config(run)
    for text in HydraConfig.get().overrides.task if HydraConfig.initialized() else []:
        key = text.partition("=")[0]
        if key.partition(".")[0] in ("trainer", "logger", "workers", "save"):
            OmegaConf.update(saved, key, OmegaConf.select(cfg, key))
        elif key != "resume":
            raise InputError(f"{text}: a resumed run keeps its own; expected overrides of trainer, logger, workers or save")
    saved.run_dir, saved.overwrite = str(run), False
    if (run / "manifest.csv").is_file():
        saved.data.manifest = str(run / "manifest.csv")
    return saved


def state_in(folder: Path) -> str | None:
    """The file with the state of a training that was stopped, None before its first epoch has ended; InputError for a damaged one."""
    path = folder / STATE
    if not path.is_file():
        return None
    try:
        contents(path)["loops"]
    except Exception as error:
        raise InputError(
            f"{path}: not the whole state of a training ({type(error).__name__}: {error}); remove it to begin this run anew"
        ) from error
    return str(path)


def load_for_update(cfg: DictConfig, past: Path) -> Detector:
    """The fitted model of a run that is to be updated; the config takes over what belongs to it, and its data where none are chosen."""
    saved, model = load(past)
    if not isinstance(model, OnePassDetector):
        raise InputError(
            f"update={past}: {type(model).__name__} learns nothing by one look at images; expected the run of a one-pass method"
        )
    keys = ("model", "backbone", "weights", "image_size", "crop", "seed")
    kept = (*keys, "resize", "tiling", "overlap", "recipe")
    chosen = HydraConfig.get().overrides.task if HydraConfig.initialized() else ["data="]
    names = {text: text.lstrip("+~").partition("=")[0] for text in chosen}
    if wrong := [text for text, name in names.items() if name.partition(".")[0] in kept or name in ("data.region", "data.window")]:
        raise InputError(
            f"{' '.join(wrong)}: an update keeps the run's own; expected overrides of data, trainer, run_dir, alpha and the like"
        )
    data = cfg.data if any(text.startswith("data=") for text in chosen) else saved.data
    for text in chosen:
        if text.startswith("data.") and data is saved.data:
            key = text.partition("=")[0]
            OmegaConf.update(saved, key, OmegaConf.select(cfg, key))
    OmegaConf.set_struct(cfg, False)
    for key in keys:
        cfg[key] = saved[key]
    for key in ("image_size", "crop", "window", "seed"):
        data[key] = saved.data[key]
    for key in ("tiling", "overlap", "resize"):
        cfg[key] = saved[key]
    data["resize"], data["region"] = saved.resize, saved.data.region
    cfg.data, cfg.batch_size = data, data.batch_size
    return model


def unseen(samples: list[Sample], past: Path) -> list[Sample]:
    """The samples with those of a run's manifest in the part they had there: `fitted` where they were trained on, now or before.

    A file is known by its content, whatever its name and its folder. InputError if nothing is left to train on.
    """
    known = {(sample.digest, sample.region): sample.split for sample in read_manifest(past / "manifest.csv")}
    roles = [known.get((sample.digest, sample.region), sample.split) for sample in samples]
    seen = [(sample.digest, sample.region) in known for sample in samples]
    if not any(role == "train" and not old for role, old in zip(roles, seen, strict=True)):
        raise InputError(f"update={past}: all {seen.count(True)} images here that could be trained on are known to it; expected new ones")
    return [
        sample._replace(split="fitted" if old and role == "train" else role) for sample, role, old in zip(samples, roles, seen, strict=True)
    ]


def calibration_of(past: Path, samples: list[Sample]) -> list[DataLoader]:
    """A loader of the calibration images of a run that are not among the samples; none, with a warning, where they are gone."""
    cfg = read_config(past)
    cfg.data.manifest = str(past / "manifest.csv")
    known = {(sample.digest, sample.region) for sample in samples}
    data = build(cfg.data)
    data.tiled(cfg.tiling, cfg.overlap)
    try:
        data.samples = [s for s in data.listed() if s.split == "calibrate" and (s.digest, s.region) not in known]
    except InputError as error:
        log.warning("the calibration images of %s cannot be read, the threshold comes from the new ones alone: %s", past, error)
        return []
    return [data.calibrate_dataloader()] if data.samples else []


def described(cfg: DictConfig) -> ImageData:
    """The data module of a config, before an image is read."""
    data = build(cfg.data)
    data.tiled(cfg.tiling, cfg.overlap)
    data.paced(cfg.epoch_size)
    return data


def set_up(cfg: DictConfig, data: ImageData, past: Path | None = None, ranges: Mapping[str, Range] | None = None) -> ImageData:
    """Set a data module up and return it, and write what it fitted to the training images back into the config.

    past: the run to update. ranges: the values of the images that a model was fitted to, where there is one.
    """
    side = data.geometry.side or data.tile
    if data.tile not in (None, side):
        log.info("tiles of %d px are resized to %d for the network; image_size=%d crop=null keeps their pixels", data.tile, side, data.tile)
    data.ranges = dict(ranges or {})
    if past:
        data.samples = unseen(data.listed(), past)
    data.setup()
    if isinstance(data.window, dict) and data.window:
        cfg.data.window = {dtype: list(ends) for dtype, ends in data.window.items()}
    return data


def build_callbacks(cfg: DictConfig) -> tuple[StageTimes, Calibrate, Evaluate]:
    """The callbacks of a run: the clock first, so that it also sees what the others cost."""
    times = StageTimes(Features)
    return times, Calibrate(), Evaluate(cfg.save.pictures, cfg.pixel_limit, cfg.alpha, times)


def resume_callbacks(cfg: DictConfig, model: Detector, folder: Path) -> list[ModelCheckpoint]:
    """What keeps the state of a training after every epoch, for `resume`; nothing for methods that do not train."""
    if not (isinstance(model, TrainedDetector) and cfg.save.state):
        return []
    return [ModelCheckpoint(folder, Path(STATE).stem, save_on_train_epoch_end=True, enable_version_counter=False)]


def trainer_of(cfg: DictConfig, callbacks: list) -> Trainer:
    """Lightning's trainer without validation and sanity checks; the fitted model is saved once, by `save_checkpoint`."""
    seed_everything(cfg.seed, workers=True, verbose=False)
    keep_pages()
    logger = build(cfg.logger) if cfg.get("logger") and cfg.logger.get("_target_") else False
    checkpoints = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    fixed = {"limit_val_batches": 0, "num_sanity_val_steps": 0, "enable_checkpointing": checkpoints, "enable_model_summary": False}
    fixed["use_distributed_sampler"] = False  # it repeats images to make shares of one size; the data module deals them out itself
    names = {"auto": "auto", "gpu": "gpu", "cuda": "gpu"}
    if cfg.trainer.get("sync_batchnorm") and device_of(names.get(cfg.trainer.accelerator, "cpu")).type != "cuda":
        fixed["sync_batchnorm"] = False  # torch has it for CUDA alone
    bar = [ProgressBar()] if cfg.trainer.enable_progress_bar and ProgressBar.is_visible() else []
    fixed |= {"enable_progress_bar": bool(bar), "callbacks": [*callbacks, *bar]}
    trainer = build(cfg.trainer, logger=logger, **fixed)
    trainer.strategy.checkpoint_io = Streamed()
    return trainer


def keep_pages() -> None:
    """Let glibc keep the memory that torch frees; elsewhere nothing happens.

    It would give the pages of every large tensor back at once, to have them cleared and mapped again a moment later: on a CPU that can
    be as much time as the arithmetic of a training.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 2**26)  # M_MMAP_THRESHOLD: tensors up to 64 MiB come from the heap; larger ones would leave holes in it
        libc.mallopt(-1, 2**29)  # M_TRIM_THRESHOLD: of which at most 512 MiB stay unused at the end


def stored(cfg: DictConfig, data: ImageData, model: Detector, trainer: Trainer, times: StageTimes) -> ImageData | StoredData:
    """The data as they are or, with store=on, with maps and images from the store in their batches as far as the method can use them."""
    if not cfg.store.enabled:
        return data
    if data.tile is not None:
        if getattr(model, "backbone", None) is None:
            return data  # nothing that a store would save: a sweep may turn it on for all its methods
        raise InputError(f"store=on with tiling={data.tile}: maps of tiles are not stored; expected store=off, or tiling=null")
    store = Store(cfg.store.root, cfg.store.dtype, cfg.store.max_gb)
    shown = trainer.progress_bar_callback is not None
    return StoredData(
        store, data, getattr(model, "backbone", None), model.inputs_for, cfg.store.images, trainer.strategy.root_device, times.stage, shown
    )


def measured(
    trainer: Trainer, model: Detector, data: ImageData | StoredData, evaluate: Evaluate, times: StageTimes, fit: float | None
) -> dict:
    """Test and compute the metrics; both count as test time."""
    started = time.perf_counter()
    trainer.test(model, datamodule=data, verbose=False)
    with times.stage("metrics"):
        evaluate.metrics(fit, None)
    return evaluate.metrics(fit, time.perf_counter() - started)


def write_results(folder: Path, cfg: DictConfig, evaluate: Evaluate, metrics: dict, record: Record, trainer: Trainer) -> None:
    """metrics.json, scores.csv, pictures and curves, by the process that holds them all."""
    if not trainer.is_global_zero:
        return
    write_json(folder / "metrics.json", metrics)
    if evaluate.threshold.n:
        log.log(logging.INFO if evaluate.threshold.reachable else logging.WARNING, evaluate.threshold.explain())
    if cfg.save.scores:
        write_csv(folder / "scores.csv", SCORES, evaluate.scores)
    files = evaluate.draw(folder / "images", folder / "curves.png" if cfg.save.curves else None)
    record.note(
        {
            "calibration": evaluate.calibration_facts(),
            "scale": evaluate.scale,
            "pictures": [file.relative_to(folder).as_posix() for file in files if file.parent != folder],
        }
    )
    log_results(trainer, cfg, folder, metrics, files)


def log_results(trainer: Trainer, cfg: DictConfig, folder: Path, metrics: dict, files: list[Path]) -> None:
    """Hand config, metrics and pictures to the loggers."""
    numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
    for logger in trainer.loggers:
        logger.log_hyperparams(OmegaConf.to_container(cfg, resolve=True))
        logger.log_metrics(numbers, step=trainer.global_step)
        if hasattr(logger, "log_image"):
            for name in ("curves", "images"):
                chosen = [str(file) for file in files if (file.stem if file.parent == folder else file.parent.name) == name]
                if chosen:
                    logger.log_image(key=name, images=chosen)
        logger.finalize("success")
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()  # or the next run of a sweep would go on writing into this one


@rank_zero_only
def save_split(cfg: DictConfig, folder: Path, data: ImageData) -> None:
    """The manifest, and the config once more, now that it holds what was fitted to the training images."""
    write_manifest(folder / "manifest.csv", data.samples)
    if data.region and not data.region.folder:  # the run stays whole where the mask is gone
        with atomic_write(folder / REGION) as temporary:
            data.region.save(temporary)
    save_config(cfg, folder)


@rank_zero_only
def save_config(cfg: DictConfig, folder: Path) -> None:
    write_text(folder / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))


def portable_config(cfg: DictConfig, region: Region | None, **more: Any) -> dict:
    """What a checkpoint holds beside Lightning's, to need no other file: its config with `more` keys, and the one mask of its images."""
    mask = None if region is None or region.folder else torch.from_numpy(region.mask)
    values = OmegaConf.to_container(cfg, resolve=True) | more
    return {"config": OmegaConf.to_yaml(OmegaConf.create(values)), "region": mask}


class Streamed(TorchCheckpointIO):
    """Writes a file that is whole or absent, tensors from where they are.

    Lightning's own copies the whole checkpoint in memory first, galleries on disk included, and then through the system's folder for
    temporary files, from where a kill leaves half of it. `more` is what a checkpoint holds beside Lightning's.
    """

    more: Mapping[str, Any] = {}

    def save_checkpoint(self, checkpoint: dict, path: str | Path, storage_options: Any = None) -> None:
        checkpoint = {**checkpoint, **self.more}
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            torch.save(checkpoint, file)
            fsync(file)


def save_checkpoint(trainer: Trainer, model: Detector, path: Path, more: Mapping[str, Any]) -> None:
    """A checkpoint that is whole or absent, made by all processes together."""
    trainer.strategy.connect(model)
    trainer.strategy.checkpoint_io.more = more
    trainer.save_checkpoint(path, weights_only=not isinstance(model, TrainedDetector))


def facts(cfg: DictConfig, data: ImageData, model: Detector) -> dict:
    """What a record says of a run before it begins."""
    features = next((part for part in model.modules() if isinstance(part, Features)), None)
    counts: dict[str, int] = {}
    for sample in data.samples:
        name = f"{sample.split}/{sample.defect}"
        counts[name] = counts.get(name, 0) + 1
    return {
        "method": module_of(cfg.model),
        "variant": cfg.get("variant"),
        "epochs": cfg.trainer.max_epochs if isinstance(model, TrainedDetector) else None,
        "epoch_size": data.epoch_size if isinstance(model, TrainedDetector) else None,
        "dataset": module_of(cfg.data),
        "category": cfg.data.get("category"),
        "seed": cfg.seed,
        "protocol": cfg.protocol,
        "image_size": cfg.data.image_size,
        "crop": cfg.data.crop,
        "tiling": data.tile,
        "resize": None if data.geometry.resize == "stretch" else data.geometry.resize,
        "region": data.region.digest() if data.region else None,
        "unit": cfg.data.get("unit", "image"),
        "backbone": cfg.get("backbone") if features else None,
        "weights": cfg.get("weights") if features else None,
        "weights_digest": features.digest() if features else None,
        "manifest_digest": data.digest,
        "truth": truth_kind(data.samples),
        "counts": dict(sorted(counts.items())),
    }


@contextlib.contextmanager
def run_context(folder: Path, cfg: DictConfig, overwrite: bool, keep: Sequence[str] = ()) -> Iterator[Record]:
    """A claimed run folder whose record tells how the block ended; files to `keep` are not cleared before."""
    claim(folder, overwrite, keep)
    record = None
    try:
        record = Record.start(folder, {})
        save_config(cfg, folder)
        with expected_warnings():
            yield record
    except BaseException as error:
        full = no_room(error, folder)
        if record:
            record.fail(full or error)
        if full:
            raise full from error
        raise
    finally:
        release(folder)


@contextlib.contextmanager
def expected_warnings() -> Iterator[None]:
    """Leave out what a run causes on purpose, one message at a time."""
    with warnings.catch_warnings():
        # batches are decoded by threads of this process, see data.module
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        # the frozen backbone stays in eval mode on purpose
        warnings.filterwarnings("ignore", message=".*module\\(s\\) in eval mode at the start of training.*")
        # lightning 2.6 on torch 2.14
        warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\)` is deprecated.*")
        # small data sets have fewer batches than the logging interval
        warnings.filterwarnings("ignore", message=".*The number of training batches.*smaller than the logging interval.*")
        # the state of a training lies beside the other files of its run
        warnings.filterwarnings("ignore", message=".*Checkpoint directory.*exists and is not empty.*")
        # logs of an earlier run in this folder are overwritten on purpose
        warnings.filterwarnings("ignore", message=".*Experiment logs directory.*exists and is not empty.*")
        yield


@rank_zero_only
def report(metrics: dict, folder: str) -> None:
    """Print the table of metrics, how the decisions came out, and where the rest is."""
    console = Console(soft_wrap=True, highlight=False)
    console.print(summary(metrics))
    calibration = (read_record(Path(folder)) or {}).get("calibration") or {}
    for line in decisions(metrics, calibration):
        console.print(line, markup=False)
    console.print(f"run folder: {folder}", markup=False)
