"""One run from a composed config to its folder: fit, calibrate, save, test and record."""

import contextlib
import ctypes
import logging
import math
import shutil
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, ListConfig, OmegaConf

from blemish.data.augment import Augment
from blemish.data.manifest import write_manifest
from blemish.data.module import ImageData
from blemish.detector import Detector, TrainedDetector
from blemish.edge.calibration import SPLIT
from blemish.edge.errors import InputError
from blemish.edge.ranges import Range
from blemish.features.cache import Store, StoredData
from blemish.features.extractor import Features
from blemish.files import atomic_write, no_room, release, write_csv, write_json, write_text
from blemish.products import Products
from blemish.run.calibrate import calibrated, check_calibrate, cross_calibrated, expect_calibration
from blemish.run.checkpoint import Streamed, build_detector, device_of, portable_config, save_checkpoint, save_whole
from blemish.run.config import build, check_config, default_folder, module_of, plain, products_of
from blemish.run.evaluate import Calibrate, Evaluate
from blemish.run.products import TestedProducts, fit_product, product_data, renew
from blemish.run.progress import ProgressBar
from blemish.run.record import ROI, STATE, Record, is_first_process, lock_run_folder, truth_kind
from blemish.run.results import Rule, fit_to_folder, preprocessing_of
from blemish.run.resume import resume_callbacks, resume_config, state_in
from blemish.run.timing import StageTimes
from blemish.run.update import calibration_of, load_for_update, mark_fitted

log = logging.getLogger(__name__)

EXPECTED_WARNINGS = (
    "does not have many workers",  # batches are decoded by threads of this process, see data.module
    r"module\(s\) in eval mode at the start of training",  # the frozen backbone
    r"isinstance\(treespec, LeafSpec\)` is deprecated",  # lightning 2.6 on torch 2.14
    "The number of training batches.*smaller than the logging interval",  # small data sets
    "Checkpoint directory.*exists and is not empty",  # the state of a training lies beside the other files of its run
    "Experiment logs directory.*exists and is not empty",  # logs of an earlier run in this folder are overwritten
)


def train(cfg: DictConfig) -> dict:
    """Fit if the method needs it, calibrate, save, test and record; return the content of metrics.json and set `cfg.run_dir`.

    With `update`, the model of that run is updated with the new training images instead of a fit. With `resume`, that run continues
    after its last epoch, with its own config and split.
    """
    resumed = Path(cfg.resume) if cfg.get("resume") else None
    if resumed:
        cfg.run_dir = str(resumed)
        cfg = resume_config(cfg, resumed)
    check_config(cfg)
    past = Path(cfg["update"]) if cfg.get("update") else None  # cfg.update is a method of every mapping
    model = load_for_update(cfg, past) if past else None
    images = described(cfg)
    try:
        model = model or build_model(cfg)
    except InputError as error:
        if str(error).startswith("weights=") and isinstance(cfg.model.weights, str):
            images.setup()  # where the images are missing too, say so first
        raise
    if (clip := cfg.trainer.get("gradient_clip_val")) is not None and not model.automatic_optimization:
        raise InputError(f"trainer.gradient_clip_val={clip}: this method steps by itself; use {model.clipped_by}")
    folder = Path(cfg.run_dir) if cfg.run_dir else default_folder(cfg)
    if past and folder.resolve() == past.resolve():
        raise InputError(f"run_dir={folder}: is the run to be updated, which would be lost; choose another folder")
    cfg.run_dir = str(folder)
    if products_of(cfg):
        return train_products(cfg, model, images, past)
    with run_context(folder, cfg, cfg.overwrite, [STATE, ROI, "manifest.csv"] if resumed else []) as record:
        run = Run(cfg, record, images, model, past, resume_callbacks(cfg, model, folder))
        check_calibrate(cfg, model, images, run.trainer)
        if not (past or images.tile):
            model.check_images(len(images.samples_of("train")), len(images.samples_of("calibrate")))
        if not model.learns_defects and (count := sum(sample.split == "defects" for sample in images.samples)):
            log.warning(
                "data.defects: %s does not learn from labels; %d defects are neither trained on nor tested", module_of(cfg.model), count
            )
        record.started = True
        save_split(folder, images)
        expect_calibration(cfg, model, images)
        started = time.perf_counter()
        if past:
            model.update(run.trainer, run.data)
        elif model.reference_folder:
            fit_to_folder(model, preprocessing_of(cfg))
        elif model.needs_fit:
            run.trainer.fit(model, datamodule=run.data, ckpt_path=state_in(folder) if resumed else None, weights_only=True)
        if isinstance(model, TrainedDetector):
            record.note(steps_of(run.trainer, images))
        fit_seconds = None if resumed else time.perf_counter() - started  # of a resumed training only the last part was seen
        loaders = [run.data.calibrate_dataloader()] if model.expects_calibration else []
        if past and cfg.protocol == "clean":
            loaders += calibration_of(past, images.samples)
        if cfg.calibrate == SPLIT:
            calibrated(run.trainer, model, run.calibrate, loaders)
        else:
            cross_calibrated(cfg, run.trainer, model, run.calibrate, images, trainer_of, run.stored)
        if cfg.save.checkpoint:
            scale = Rule.of(model, cfg.alpha, {}).scale(
                (run.calibrate.low, None, -math.inf)
            )  # without the test images that record.json has
            save_checkpoint(run.trainer, model, folder / "model.ckpt", portable_config(cfg, images.roi, scale=scale))
        if run.trainer.is_global_zero:
            (folder / STATE).unlink(missing_ok=True)
        return run.test(fit_seconds)


def train_products(cfg: DictConfig, model: Products, images: ImageData, past: Path | None) -> dict:
    """`train` for several products: fit a detector for each that the run to be updated does not have, and test them together."""
    with run_context(Path(cfg.run_dir), cfg, cfg.overwrite) as record:
        missing = renew(cfg, model, past, images) if past else model.names
        model.ranges = {}  # of other products, too
        run = Run(cfg, record, images, model)
        if run.trainer.world_size > 1:
            raise InputError(f"trainer.devices: found {run.trainer.world_size} processes; expected 1 for several products")
        record.started, started = True, time.perf_counter()
        save_split(Path(cfg.run_dir), images)
        for name in missing:
            log.info("%s: product %d of %d", name, model.names.index(name) + 1, len(model.names))
            fit_product(cfg, model, name, images.of(name), run.timed_trainer, run.stored)
        model.join_ranges()
        if cfg.save.checkpoint:
            save_whole(cfg, model, images.roi, Path(cfg.run_dir) / "model.ckpt")
        return run.test(time.perf_counter() - started)


class Run:
    """A run whose data are split and recorded, ready to be fitted and tested: `data` is what the trainer is given.

    model: fitted or not. past: the run to update. more: further callbacks.
    """

    def __init__(
        self, cfg: DictConfig, record: Record, images: ImageData, model: Detector, past: Path | None = None, more: Sequence[Callback] = ()
    ):
        self.cfg, self.record, self.images, self.model = cfg, record, images, model
        self.times, self.calibrate, self.evaluate = build_callbacks(cfg)
        if isinstance(model, Products):
            self.evaluate = TestedProducts(cfg, model, images, self.times)
        tested = [] if isinstance(model, Products) else [self.evaluate]
        self.trainer = trainer_of(cfg, [self.times, self.calibrate, *tested, *more])
        set_up(cfg, images, past, model.ranges)
        model.ranges = images.ranges
        images.process, images.processes = self.trainer.global_rank, self.trainer.world_size
        save_config(cfg)  # again, now that it holds what was fitted to the training images
        record.note(metadata(cfg, images, model))
        self.data = self.stored(images, model)

    def stored(self, images: ImageData, model: Detector) -> ImageData | StoredData:
        """Return what the trainer is given for a model: images, or what is stored of them."""
        return stored(self.cfg, images, model, self.trainer, self.times)

    def timed_trainer(self, cfg: DictConfig, callbacks: list) -> Trainer:
        """Return a trainer of a part of the run, on the run's clock."""
        return trainer_of(cfg, [self.times, *callbacks])

    def test(self, fit_seconds: float | None) -> dict:
        """Test the fitted model, write and record the results, and return the metrics, whose computation counts as test time."""
        self.record.started, started = True, time.perf_counter()
        if isinstance(self.evaluate, TestedProducts):
            self.evaluate.run(self.timed_trainer, self.stored)
        else:
            self.trainer.test(self.model, datamodule=self.data, verbose=False)
        with self.times.stage("metrics"):
            self.evaluate.metrics(fit_seconds, None)
        metrics = self.evaluate.metrics(fit_seconds, time.perf_counter() - started)
        self.images.values.report()
        if self.trainer.is_global_zero:
            self._write_results(metrics)
        store = self.data.metadata() if isinstance(self.data, StoredData) else None
        self.record.finish({"seconds": self.times.total(), "store": store, **network_metadata(self.model)})
        return metrics

    def _write_results(self, metrics: dict) -> None:
        """Write metrics.json, scores.csv, pictures and curves, and hand them to the loggers."""
        cfg, folder, evaluate = self.cfg, Path(self.cfg.run_dir), self.evaluate
        write_json(folder / "metrics.json", metrics)
        for name, threshold in evaluate.thresholds.items():
            if threshold.n:
                log.log(logging.INFO if threshold.reachable else logging.WARNING, f"{name}: {threshold.explain()}".removeprefix(": "))
        if self.model.bound_kind:
            log.info("model.epsilon: %s", self.model.bound_kind)
        if cfg.save.scores:
            write_csv(folder / "scores.csv", evaluate.columns, evaluate.scores)
        files = evaluate.draw(folder / "images", folder / "curves.png" if cfg.save.curves else None)
        pictures = [file for file in files if file.parent != folder]
        names = [file.relative_to(folder).as_posix() for file in pictures]
        found = {"calibration": evaluate.calibration_metadata(), "bound_kind": self.model.bound_kind}
        self.record.note(found | {"scale": evaluate.scale, "pictures": names})
        numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
        for logger in self.trainer.loggers:
            logger.log_hyperparams(plain(cfg))
            logger.log_metrics(numbers, step=self.trainer.global_step)
            for key, group in (("curves", [file for file in files if file.parent == folder]), ("images", pictures)):
                if group and hasattr(logger, "log_image"):
                    logger.log_image(key=key, images=[str(file) for file in group])
            logger.finalize("success")
            if isinstance(logger, WandbLogger):
                logger.experiment.finish()  # or the next run of a sweep would be logged to this one


def build_model(cfg: DictConfig) -> Detector:
    """Return the method of a config, ready to be fitted; InputError for an augmentation of images that are looked at once."""
    model, augment = build_detector(cfg), Augment(**cfg.augment)
    for part in model.parts if isinstance(model, Products) else [model]:
        if augment and not isinstance(part, TrainedDetector):
            raise InputError(
                f"augment={cfg.augment}: {module_of(cfg.model)} is not trained by steps; expected rotate=0 flip=false crop=null"
            )
        part.augment = augment or None
    return model


def described(cfg: DictConfig) -> ImageData:
    """Return the data module of a config, before an image is read; nothing is held out unless `calibrate` is split."""
    more = {} if cfg.calibrate == SPLIT else {"protocol": "paper"}
    data = product_data(cfg, **more) if products_of(cfg) else build(cfg.data, **more)
    data.set_loading(cfg.tiling, cfg.overlap, cfg.epoch_size)
    return data


def set_up(cfg: DictConfig, data: ImageData, past: Path | None = None, ranges: Mapping[str, Range] | None = None) -> ImageData:
    """Set a data module up and return it, and write the window fitted to the training images into the config.

    past: the run to update. ranges: the values of the images that a model was fitted to, by dtype.
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
    """Return the callbacks of a run; the clock comes first, so that it also sees what the others cost."""
    times = StageTimes(Features)
    return times, Calibrate(), Evaluate(cfg.save.pictures, cfg.pixel_limit, cfg.alpha, times)


def trainer_of(cfg: DictConfig, callbacks: list) -> Trainer:
    """Return Lightning's trainer without validation and sanity checks; the fitted model is saved once, by `save_checkpoint`."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # notes on devices, advertisements; importing lightning sets INFO
    seed_everything(cfg.seed, workers=True, verbose=False)
    keep_pages()
    bar = [ProgressBar()] if cfg.trainer.enable_progress_bar and ProgressBar.is_visible() else []
    fixed = {
        "logger": build(cfg.logger) if cfg.get("logger") and cfg.logger.get("_target_") else False,
        "callbacks": [*callbacks, *bar],
        "enable_progress_bar": bool(bar),
        "limit_val_batches": 0,
        "num_sanity_val_steps": 0,
        "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        "enable_model_summary": False,
        "use_distributed_sampler": False,  # it repeats images to make shares of one size; the data module deals each image once
    }
    name = {"auto": "auto", "gpu": "gpu", "cuda": "gpu"}.get(cfg.trainer.accelerator, "cpu")
    if cfg.trainer.get("sync_batchnorm") and device_of(name).type != "cuda":
        fixed["sync_batchnorm"] = False  # torch has it for CUDA alone
    trainer = build(cfg.trainer, **fixed)
    trainer.strategy.checkpoint_io = Streamed()
    return trainer


def keep_pages() -> None:
    """Let glibc keep the memory that torch frees, where there is glibc.

    It would return the pages of every large tensor at once, to have them cleared and mapped again a moment later: on a CPU that can take
    as much time as the arithmetic of a training.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 2**26)  # M_MMAP_THRESHOLD: tensors up to 64 MiB come from the heap; larger ones would leave holes in it
        libc.mallopt(-1, 2**29)  # M_TRIM_THRESHOLD: at most 512 MiB stay unused at the end of the heap


def stored(cfg: DictConfig, data: ImageData, model: Detector, trainer: Trainer, times: StageTimes) -> ImageData | StoredData:
    """Return the data or, with store=on, their stored maps and images as far as the method can use them."""
    backbone = getattr(model, "backbone", None)
    if not cfg.store.enabled or (data.tile is not None and backbone is None):
        return data  # without a backbone a store would save nothing: a sweep may turn it on for all its methods
    if data.tile is not None:
        raise InputError(f"store=on with tiling={data.tile}: maps of tiles are not stored; expected store=off, or tiling=null")
    store = Store(cfg.store.root, cfg.store.dtype, cfg.store.max_gb)
    shown = trainer.progress_bar_callback is not None
    return StoredData(store, data, backbone, model.inputs_for, cfg.store.images, trainer.strategy.root_device, times.stage, shown)


@rank_zero_only
def save_split(folder: Path, data: ImageData) -> None:
    """Write the manifest and the one mask of all images, so that the run does not depend on the mask's file."""
    write_manifest(folder / "manifest.csv", data.samples)
    if data.roi and not data.roi.folder:
        with atomic_write(folder / ROI) as temporary:
            data.roi.save(temporary)


@rank_zero_only
def save_config(cfg: DictConfig) -> None:
    write_text(Path(cfg.run_dir) / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))


def network_metadata(model: Detector) -> dict[str, str | None]:
    """Return what a record says of the frozen backbone of a method, or of those of an ensemble; nothing of a method without one."""
    found = [part.metadata() for part in model.modules() if isinstance(part, Features)]
    return {key: "+".join(dict.fromkeys(one[key] for one in found if one[key])) or None for key in (found[0] if found else ())}


def metadata(cfg: DictConfig, data: ImageData, model: Detector) -> dict:
    """Return the FIELDS of a record that are known before the fit."""
    network = network_metadata(model)
    backbone = cfg.get("backbone") if network else None
    trains = isinstance(model.parts[0] if isinstance(model, Products) else model, TrainedDetector)
    counts = Counter(f"{sample.split}/{sample.defect}" for sample in data.samples)
    return {
        "method": module_of(cfg.model),
        "variant": cfg.get("variant"),
        "epochs": cfg.trainer.max_epochs if trains else None,
        "epoch_size": data.epoch_size if trains else None,
        "dataset": module_of(cfg.data),
        "category": "+".join(products_of(cfg)) or cfg.data.get("category"),
        "seed": cfg.seed,
        "protocol": cfg.protocol,
        "knowledge": data.knowledge,
        "image_size": cfg.data.image_size,
        "crop": cfg.data.crop,
        "tiling": data.tile,
        "resize": None if data.geometry.resize == "stretch" else data.geometry.resize,
        "roi": data.roi.digest() if data.roi else None,
        "unit": cfg.data.get("unit", "image"),
        "backbone": "+".join(backbone) if isinstance(backbone, ListConfig) else backbone,
        "weights": cfg.get("weights") if network else None,
        **network,
        "manifest_digest": data.digest,
        "truth": truth_kind(data.samples),
        "counts": dict(sorted(counts.items())),
    }


def steps_of(trainer: Trainer, data: ImageData) -> dict[str, int]:
    """Return the number of steps that a finished training took, and of images or tiles per step."""
    batches, together = trainer.fit_loop.epoch_loop.batch_progress.total.completed, trainer.accumulate_grad_batches
    return {"steps": math.ceil(batches / together), "batch": data.batch_size * together * trainer.world_size}


@contextlib.contextmanager
def run_context(folder: Path, cfg: DictConfig, overwrite: bool, keep: Sequence[str] = (), key: str = "run_dir") -> Iterator[Record]:
    """Lock a run folder, chosen by `key`, during the block, and record how the block ended; files to `keep` are not cleared before.

    A folder that was not there before goes again, with those above it, where the run fails before it has started.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()] if is_first_process() else []
    lock_run_folder(folder, overwrite, keep, key)
    record = None
    try:
        record = Record(folder, {})
        save_config(cfg)
        with expected_warnings():
            yield record
    except BaseException as error:
        full = no_room(error, folder)
        if made and not (record and record.started):
            shutil.rmtree(folder, ignore_errors=True)
            for path in made[1:]:
                with contextlib.suppress(OSError):  # another run is there by now
                    path.rmdir()
        elif record:
            record.fail(full or error)
        if full:
            raise full from error
        raise
    finally:
        release(folder)


@contextlib.contextmanager
def expected_warnings() -> Iterator[None]:
    """Ignore the warnings that a run causes on purpose."""
    with warnings.catch_warnings():
        for message in EXPECTED_WARNINGS:
            warnings.filterwarnings("ignore", message=f".*{message}.*")
        yield
