"""Update a fitted one-pass detector with further training images."""

import logging
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from torch.utils.data import DataLoader

from blemish.data.manifest import Sample, read_manifest
from blemish.detector import Detector, OnePassDetector
from blemish.edge.errors import InputError
from blemish.products import Products
from blemish.run.checkpoint import load
from blemish.run.config import build, command_line, products_of, read_config

log = logging.getLogger(__name__)

FIXED = ("model", "backbone", "weights", "image_size", "crop", "seed", "tiling", "overlap", "resize")  # keys that the old run decides
FIXED_DATA = ("image_size", "crop", "window", "seed", "resize", "roi")  # of its data


def load_for_update(cfg: DictConfig, past: Path) -> Detector:
    """Return the fitted model of the run to be updated, and set in `cfg` what that run decides: its data too, where none are chosen."""
    saved, model = load(past)
    if not isinstance(model, OnePassDetector | Products):
        raise InputError(f"update={past}: {type(model).__name__} does not fit in a single pass; expected the run of a one-pass method")
    typed = command_line() or [("data", "data=")]  # from Python, cfg.data is chosen
    fixed = (*FIXED, "recipe")
    if wrong := [text for key, text in typed if key.partition(".")[0] in fixed or key in ("data.roi", "data.window")]:
        raise InputError(f"{' '.join(wrong)}: fixed by the run that is updated; expected overrides of data, trainer, run_dir, alpha …")
    data = cfg.data
    if not any(text.startswith("data=") for _, text in typed):
        data = saved.data
        for key in (key for key, _ in typed if key.startswith("data.")):
            OmegaConf.update(saved, key, OmegaConf.select(cfg, key), merge=False)
    OmegaConf.set_struct(cfg, False)
    for key in FIXED:
        cfg[key] = saved[key]
    for key in FIXED_DATA:
        data[key] = saved.data.get(key)
    cfg.data, cfg.batch_size = data, data.batch_size
    if bool(products_of(cfg)) != isinstance(model, Products):
        found = f"the products {', '.join(model.names)}" if isinstance(model, Products) else "one product"
        raise InputError(f"update={past}: a run of {found}; expected data.category=[…] for several, and only then")
    return model


def mark_fitted(samples: list[Sample], past: Path) -> list[Sample]:
    """Return the samples with the splits they had in a run, `fitted` where that run was fitted to them, now or before.

    A file is known by its content, not its path. InputError if no new one is left to train on.
    """
    known = {(sample.digest, sample.tile): sample.split for sample in read_manifest(past / "manifest.csv")}
    marked, new = [], 0
    for sample in samples:
        split = known.get((sample.digest, sample.tile))
        new += split is None and sample.split == "train"
        marked.append(sample._replace(split={None: sample.split, "train": "fitted"}.get(split, split)))
    if not new:
        raise InputError(f"update={past}: no new image to train on among {len(samples)}; expected images that the run was not fitted to")
    return marked


def calibration_of(past: Path, samples: list[Sample]) -> list[DataLoader]:
    """Return a loader of a run's calibration images that are not among the samples; none, with a warning, where they are gone."""
    cfg = read_config(past)
    cfg.data.manifest = str(past / "manifest.csv")
    known = {(sample.digest, sample.tile) for sample in samples}
    data = build(cfg.data)
    data.set_loading(cfg.tiling, cfg.overlap, None)
    try:
        data.samples = [s for s in data.listed() if s.split == "calibrate" and (s.digest, s.tile) not in known]
    except InputError as error:
        log.warning("the calibration images of %s cannot be read, the threshold comes from the new ones alone: %s", past, error)
        return []
    return [data.calibrate_dataloader()] if data.samples else []
