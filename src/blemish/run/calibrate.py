"""Give a fitted detector the scores of normal images that its thresholds come from: held out, or left out one by one or in folds."""

import copy
import logging
from collections.abc import Callable, Sequence

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, Trainer
from omegaconf import DictConfig
from torch.utils.data import DataLoader

from blemish.data.manifest import Sample
from blemish.data.module import ImageData
from blemish.detector import Detector, OnePassDetector
from blemish.edge.calibration import CROSS, FULL, SPLIT
from blemish.edge.errors import InputError
from blemish.ops.bag import BAG
from blemish.run.checkpoint import build_detector
from blemish.run.evaluate import Calibrate
from blemish.run.results import fit_to_folder, preprocessing_of

log = logging.getLogger(__name__)

FOLDS = 5  # fits for a method whose images cannot be left out one by one

Data = ImageData | LightningDataModule  # the images, or what is stored of them


def check_calibrate(cfg: DictConfig, model: Detector, images: ImageData, trainer: Trainer) -> None:
    """InputError for a `calibrate` that the method, its images or the processes do not allow."""
    if cfg.calibrate == SPLIT:
        return
    if trainer.world_size > 1:
        raise InputError(f"calibrate={cfg.calibrate}: found {trainer.world_size} processes; expected trainer.devices=1, or calibrate=split")
    if cfg.calibrate == FULL and model.fits_training_images and not leaves_out(model, images):
        name = f"{type(model).__name__}{'' if images.tile is None else ' on tiles'}"
        raise InputError(f"calibrate=full: there is no proof for {name}; expected cross, without a proof, or split")


def expect_calibration(cfg: DictConfig, model: Detector, images: ImageData) -> None:
    """Tell a model before its fit how it will be calibrated."""
    model.expects_calibration = any(sample.split == "calibrate" for sample in images.samples)
    model.expects_bag = cfg.calibrate == FULL


def check_full(model: Detector, images: ImageData) -> None:
    """InputError for a fitted model unless no further image raises the scores of its training images, or all can be scored with one."""
    if model.left_out == FULL and leaves_out(model, images):
        return
    name, count = type(model).__name__, len(images.samples_of("train"))
    if not model.scores_bag:
        raise InputError(
            f"calibrate=full: there is no proof for {name} with these settings: a new image may raise the scores of others, and further "
            "fits with it would take too long; expected split, or cross, without a proof"
        )
    if count > BAG:
        raise InputError(
            f"calibrate=full: {name} is fitted anew for each new image, with {count} training images; expected at most {BAG}, or split"
        )
    if model.map_share is not None and (images.roi is not None or images.geometry.resize == "letterbox"):
        raise InputError(f"calibrate=full: {name} scores full maps, without data.roi or data.resize=letterbox; expected those, or split")


def leaves_out(model: Detector, images: ImageData) -> bool:
    """Return whether the images of a fit can be left out one by one, which for parts of images would not do."""
    by_image = images.tile is None and not any(sample.tile for sample in images.samples)
    return isinstance(model, OnePassDetector) and model.left_out is not None and by_image


def calibrated_fit(
    cfg: DictConfig,
    trainer: Trainer,
    model: Detector,
    calibrate: Calibrate,
    images: ImageData,
    trainer_of: Callable[[DictConfig, list], Trainer],
    stored: Callable[[ImageData, Detector], Data],
) -> None:
    """Fit a model to its images if it needs that, and calibrate it as the config says; `stored` gives what a trainer is given of them."""
    check_calibrate(cfg, model, images, trainer)
    model.ranges = images.ranges
    expect_calibration(cfg, model, images)
    data = stored(images, model)
    if model.reference_folder:
        fit_to_folder(model, preprocessing_of(cfg)._replace(roi=images.roi))
    elif model.needs_fit:
        trainer.fit(model, datamodule=data)
    if cfg.calibrate == SPLIT or not model.fits_training_images:
        calibrated(trainer, model, calibrate, [data.loader("calibrate")] if model.expects_calibration else [])
    else:
        cross_calibrated(cfg, trainer, model, calibrate, images, trainer_of, stored)


def calibrated(trainer: Trainer, model: Detector, calibrate: Calibrate, loaders: Sequence[DataLoader]) -> None:
    """Calibrate a fitted model with held-out normal images."""
    if not loaders:
        return
    model.to(trainer.strategy.root_device).eval()
    with torch.no_grad():
        model.calibrate(trainer.strategy.batch_to_device(batch) for loader in loaders for batch in loader)
    found = []
    for loader in loaders:
        trainer.predict(model, dataloaders=loader, return_predictions=False)
        found.append((calibrate.values, calibrate.peaks))
    values, peaks = map(torch.cat, zip(*found, strict=True))
    model.set_calibration(values, peaks=peaks)


def cross_calibrated(
    cfg: DictConfig,
    trainer: Trainer,
    model: Detector,
    calibrate: Calibrate,
    images: ImageData,
    trainer_of: Callable[[DictConfig, list], Trainer],
    stored: Callable[[ImageData, Detector], Data],
) -> None:
    """Calibrate a fitted model with the images that it was fitted to, each scored as if it had not been.

    Where the method can, each is left out by itself; otherwise FOLDS further fits score the images that they have not seen. InputError
    where `calibrate=full` asks for a proof that the method with its settings and so many images does not have.
    """
    if not model.fits_training_images:  # its scores never depend on other images
        calibrated(trainer, model, calibrate, [stored(images, model).loader("train")])
        return
    count = len({sample.path for sample in images.samples_of("train")})
    if count < 2:
        raise InputError(f"calibrate={cfg.calibrate}: found {count} training image; expected 2 or more, each is scored without itself")
    if cfg.calibrate == FULL:
        check_full(model, images)
    if leaves_out(model, images):
        model.to(trainer.strategy.root_device).eval()
        model.leaving_out = True
        try:
            trainer.predict(model, dataloaders=stored(images, model).loader("train"), return_predictions=False)
        finally:
            model.leaving_out = False
        model.set_calibration(calibrate.values, FULL if cfg.calibrate == FULL else model.left_out)
        return
    found, parts = [], folds(images.samples, min(FOLDS, count), cfg.seed)
    cfg = copy.deepcopy(cfg)
    cfg.logger = None
    for number, samples in enumerate(parts, 1):
        log.info("calibrate=cross: fit %d of %d, each without a part of the images", number, len(parts))
        part, other, seen = copy.copy(images), build_detector(cfg, one=True), Calibrate()
        part.samples, other.ranges, other.expects_calibration = samples, model.ranges, True
        trainer, data = trainer_of(cfg, [seen]), stored(part, other)
        trainer.fit(other, datamodule=data)
        calibrated(trainer, other, seen, [data.loader("calibrate")])
        found.append(other.calibration)
    calibrate.low = seen.low
    model.set_calibration(torch.cat(found), CROSS)


def folds(samples: Sequence[Sample], count: int, seed: int) -> list[list[Sample]]:
    """Return the samples `count` times, with another part of the training images as split "calibrate" each time."""
    paths = sorted({sample.path for sample in samples if sample.split == "train"})
    parts = np.array_split(np.random.default_rng(seed).permutation(len(paths)), count)
    held = [{paths[i] for i in part} for part in parts]
    return [[s._replace(split="calibrate") if s.split == "train" and s.path in out else s for s in samples] for out in held]
