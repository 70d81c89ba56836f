"""A run of several products: their images, the fit of a detector for each that the run to be updated does not have, and their test."""

import copy
import logging
import math
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

from lightning.pytorch import LightningDataModule, Trainer
from omegaconf import DictConfig

from blemish.data.manifest import Sample, read_manifest
from blemish.data.module import ImageData
from blemish.data.products import ProductData
from blemish.detector import Detector
from blemish.edge.calibration import Threshold
from blemish.edge.errors import InputError
from blemish.files import write_text
from blemish.products import Products, global_features
from blemish.run.calibrate import calibrated_fit
from blemish.run.checkpoint import build_detector
from blemish.run.config import build, composed, plain, products_of
from blemish.run.evaluate import DECISIONS, METRICS, ORACLES, PRODUCTS, RECOGNITION, SCORES, Calibrate, Evaluate

log = logging.getLogger(__name__)

ALL_PARTS = ("image_size", "crop", "resize", "batch_size", "workers", "seed", "protocol", "window", "on_error")  # the same for each
TRAINED = ("train", "calibrate")  # splits that a product's detector depends on

TrainerOf = Callable[[DictConfig, list], Trainer]
Stored = Callable[[ImageData, Detector], ImageData | LightningDataModule]  # the images, or what is stored of them


def product_data(cfg: DictConfig, **more: str) -> ProductData:
    """Return the images of a config of several products: categories of one data set, or data sets of their own in `data.of`.

    `more` replaces settings that all have in common.
    """
    if cfg.tiling:
        raise InputError(f"tiling={cfg.tiling}: products are recognised from whole images; expected tiling=null, or one product")
    shared = {name: plain(cfg.data)[name] for name in ALL_PARTS} | more
    if of := cfg.data.get("of"):
        parts = {name: build(composed("logger=none", *shlex.split(of[name])).data, **shared) for name in products_of(cfg)}
    else:
        parts = {name: build(cfg.data, category=name, **shared) for name in products_of(cfg)}
    root = None if of and not cfg.data.root else cfg.data.root
    settings = {"category": None, "root": root, "calibration": cfg.data.calibration, "roi": cfg.data.roi, "manifest": cfg.data.manifest}
    return ProductData(parts=parts, **settings, **shared)


def renew(cfg: DictConfig, model: Products, folder: Path, images: ProductData) -> list[str]:
    """Give the model of the run in `folder` the products of a config, and return those that have to be fitted.

    The others stay as they are; InputError where the images that they were fitted to have changed.
    """
    images.samples = images.listed()
    known, names = read_manifest(folder / "manifest.csv"), products_of(cfg)
    kept, gone, new = [n for n in model.names if n in names], set(model.names) - set(names), [n for n in names if n not in model.names]
    for name in kept:
        before, now = (trained_on(samples, name) for samples in (known, images.samples))
        if before != now:
            changed = f"{len(before - now)} gone, {len(now - before)} new"
            raise InputError(f"update={folder}: the normal images of {name} have changed since its fit ({changed}); expected the same ones")
    for name in new:
        model.add(name, build_detector(cfg, one=True))
    for name in gone:
        model.remove(name)
    log.info("products: %s kept, %s removed, %s to be fitted", *(", ".join(sorted(some)) or "none" for some in (kept, gone, new)))
    return new


def trained_on(samples: Sequence[Sample], product: str) -> set[tuple[str, str, str]]:
    """What identifies the images that a product's detector depends on."""
    return {(one.digest, one.tile, one.split) for one in samples if one.product == product and one.split in TRAINED}


def fit_product(cfg: DictConfig, model: Products, name: str, images: ImageData, trainer_of: TrainerOf, stored: Stored) -> None:
    """Fit and calibrate the detector of a product on its images, and its gallery on all normal ones of them."""
    cfg = copy.deepcopy(cfg)
    cfg.logger = None
    with model.fitting(name) as (part, gallery):
        calibrate = Calibrate()
        trainer = trainer_of(cfg, [calibrate])
        part.check_images(len(images.samples_of("train")), sum(sample.split == "calibrate" for sample in images.samples))
        calibrated_fit(cfg, trainer, part, calibrate, images, trainer_of, stored)
        data, splits = stored(images, part), {sample.split for sample in images.samples}
        part.to(trainer.strategy.root_device).eval()
        loaders = [data.loader(split) for split in TRAINED if split in splits]
        gallery.fit(
            global_features(part, (trainer.strategy.batch_to_device(batch) for loader in loaders for batch in loader)).to(part.device)
        )


class TestedProducts:
    """The tests of the products of a run, each on its own images among all of which the detector has to find their product."""

    __test__ = False  # for pytest

    def __init__(self, cfg: DictConfig, model: Products, images: ProductData, times):
        count = cfg.save.pictures if cfg.save.pictures < 0 else math.ceil(cfg.save.pictures / len(model.names))
        self.evaluates = {name: Evaluate(count, cfg.pixel_limit, cfg.alpha, times, name) for name in model.names}
        self.cfg, self.model, self.images = cfg, model, images

    columns, scale = SCORES + PRODUCTS, None

    @property
    def thresholds(self) -> dict[str, Threshold]:
        return {name: one.threshold for name, one in self.evaluates.items()}

    def run(self, trainer_of: TrainerOf, stored: Stored) -> None:
        cfg = copy.deepcopy(self.cfg)
        cfg.logger = None
        for name, evaluate in self.evaluates.items():
            trainer_of(cfg, [evaluate]).test(self.model, datamodule=stored(self.images.of(name), self.model), verbose=False)

    def metrics(self, fit_seconds: float | None, test_seconds: float | None) -> dict:
        """The content of metrics.json: figures are means over the products, whose own are under "products", and counts are sums."""
        parts = {name: one.metrics(None, None) | one.recognition() for name, one in self.evaluates.items()}
        every = list(parts.values())
        found = {name: mean_of([part[name] for part in every]) for name in (*METRICS, *DECISIONS, *RECOGNITION)}
        counts = {name: sum(part[name] for part in every) for name in every[0] if name.split("_")[0] == "images"}
        bounds = {key: max(part["pixel_bounds"][key] or 0.0 for part in every) for key in every[0]["pixel_bounds"]}
        rows = {f"{name}: {defect}": row for name, part in parts.items() for defect, row in part["defects"].items()}
        found |= dict.fromkeys(ORACLES) | {"fit_seconds": fit_seconds, "test_seconds": test_seconds} | counts
        return found | {"defects": rows, "pixel_bounds": bounds, "products": parts}

    @property
    def scores(self) -> list[tuple]:
        """Rows of scores.csv, see `evaluate.SCORES` and `evaluate.PRODUCTS`."""
        pairs = ((name, row, more) for name, one in self.evaluates.items() for row, more in zip(one.scores, one.recognised, strict=True))
        return [(*row, name, *more) for name, row, more in pairs]

    def calibration_metadata(self) -> dict:
        """The part of a record on thresholds: that of each product."""
        return {"value": None, "products": {name: one.calibration_metadata() for name, one in self.evaluates.items()}}

    def draw(self, folder: Path, curves: Path | None) -> list[Path]:
        """Write strips of the images to draw into a folder for each product; returns their paths. There are no curves of all products."""
        if curves:
            write_text(curves.with_suffix(".json"), "{}\n")
        return [file for name, one in self.evaluates.items() for file in one.draw(folder / name.replace("/", "-"), None)]


def mean_of(values: Sequence[float | None]) -> float | None:
    """The mean of numbers, None where one is missing."""
    return None if None in values else fmean(values)
