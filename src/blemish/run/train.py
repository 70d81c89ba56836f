"""One run from a composed config to a folder with its record, and the way back: the only file that knows Hydra's config."""

import contextlib
import ctypes
import logging
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import DataLoader

from blemish.data.manifest import write_manifest
from blemish.data.module import ImageData
from blemish.detector import Detector, OnePassDetector, TrainedDetector
from blemish.edge.errors import InputError
from blemish.edge.ranges import Range
from blemish.features.cache import Store, StoredData
from blemish.features.extractor import Features
from blemish.files import atomic_write, no_room, release, write_csv, write_json, write_text
from blemish.run.checkpoint import Streamed, device_of, portable_config, save_checkpoint
from blemish.run.config import build, check_config, default_folder, module_of
from blemish.run.evaluate import SCORES, Calibrate, Evaluate
from blemish.run.progress import ProgressBar
from blemish.run.record import ROI, STATE, Record, lock_run_folder, truth_kind
from blemish.run.resume import resume_callbacks, resume_config, state_in
from blemish.run.tiling import stitch_callbacks
from blemish.run.timing import StageTimes
from blemish.run.update import calibration_of, load_for_update, mark_fitted

log = logging.getLogger(__name__)


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
    with run_context(folder, cfg, overwrite=cfg.overwrite, keep=[STATE, ROI, "manifest.csv"] if resumed else []) as record:
        times, calibrate, evaluate = build_callbacks(cfg)
        trainer = trainer_of(cfg, [times, *stitch_callbacks(data, calibrate, evaluate), *resume_callbacks(cfg, model, folder)])
        if trainer.gradient_clip_val is not None and not model.automatic_optimization:
            raise InputError(f"trainer.gradient_clip_val={trainer.gradient_clip_val}: this method steps by itself; use {model.clipped_by}")
        set_up(cfg, data, past, model.ranges if past else {})
        model.ranges, values, roi = data.ranges, data.values, data.roi
        data.process, data.processes = trainer.global_rank, trainer.world_size
        save_split(cfg, folder, data)
        record.note(metadata(cfg, data, model))
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
            save_checkpoint(trainer, model, folder / "model.ckpt", portable_config(cfg, roi))
        if trainer.is_global_zero:
            (folder / STATE).unlink(missing_ok=True)
        # of a training that was resumed only the last part was seen
        metrics = measured(trainer, model, data, evaluate, times, None if resumed else fitted - started)
        values.report()
        write_results(folder, cfg, evaluate, metrics, record, trainer)
        record.finish({"seconds": times.total(), "store": data.metadata() if isinstance(data, StoredData) else None})
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
        data.samples = mark_fitted(data.listed(), past)
    data.setup()
    if isinstance(data.window, dict) and data.window:
        cfg.data.window = {dtype: list(ends) for dtype, ends in data.window.items()}
    return data


def build_callbacks(cfg: DictConfig) -> tuple[StageTimes, Calibrate, Evaluate]:
    """The callbacks of a run: the clock first, so that it also sees what the others cost."""
    times = StageTimes(Features)
    return times, Calibrate(), Evaluate(cfg.save.pictures, cfg.pixel_limit, cfg.alpha, times)


def trainer_of(cfg: DictConfig, callbacks: list) -> Trainer:
    """Lightning's trainer without validation and sanity checks; the fitted model is saved once, by `save_checkpoint`."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # notes on devices, advertisements; importing lightning sets INFO
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
            "calibration": evaluate.calibration_metadata(),
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
    if data.roi and not data.roi.folder:  # the run stays whole where the mask is gone
        with atomic_write(folder / ROI) as temporary:
            data.roi.save(temporary)
    save_config(cfg, folder)


@rank_zero_only
def save_config(cfg: DictConfig, folder: Path) -> None:
    write_text(folder / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))


def metadata(cfg: DictConfig, data: ImageData, model: Detector) -> dict:
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
        "roi": data.roi.digest() if data.roi else None,
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
    lock_run_folder(folder, overwrite, keep)
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
