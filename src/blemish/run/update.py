"""Update a fitted one-pass detector with further training images."""

import logging
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import DataLoader

from blemish.data.manifest import Sample, read_manifest
from blemish.detector import Detector, OnePassDetector
from blemish.edge.errors import InputError
from blemish.run.checkpoint import load
from blemish.run.config import build, read_config

log = logging.getLogger(__name__)


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
    if wrong := [text for text, name in names.items() if name.partition(".")[0] in kept or name in ("data.roi", "data.window")]:
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
    data["resize"], data["roi"] = saved.resize, saved.data.roi
    cfg.data, cfg.batch_size = data, data.batch_size
    return model


def mark_fitted(samples: list[Sample], past: Path) -> list[Sample]:
    """The samples with those of a run's manifest in the part they had there: `fitted` where they were trained on, now or before.

    A file is known by its content, whatever its name and its folder. InputError if nothing is left to train on.
    """
    known = {(sample.digest, sample.tile): sample.split for sample in read_manifest(past / "manifest.csv")}
    roles = [known.get((sample.digest, sample.tile), sample.split) for sample in samples]
    seen = [(sample.digest, sample.tile) in known for sample in samples]
    if not any(role == "train" and not old for role, old in zip(roles, seen, strict=True)):
        raise InputError(f"update={past}: all {seen.count(True)} images here that could be trained on are known to it; expected new ones")
    return [
        sample._replace(split="fitted" if old and role == "train" else role) for sample, role, old in zip(samples, roles, seen, strict=True)
    ]


def calibration_of(past: Path, samples: list[Sample]) -> list[DataLoader]:
    """A loader of the calibration images of a run that are not among the samples; none, with a warning, where they are gone."""
    cfg = read_config(past)
    cfg.data.manifest = str(past / "manifest.csv")
    known = {(sample.digest, sample.tile) for sample in samples}
    data = build(cfg.data)
    data.tiled(cfg.tiling, cfg.overlap)
    try:
        data.samples = [s for s in data.listed() if s.split == "calibrate" and (s.digest, s.tile) not in known]
    except InputError as error:
        log.warning("the calibration images of %s cannot be read, the threshold comes from the new ones alone: %s", past, error)
        return []
    return [data.calibrate_dataloader()] if data.samples else []
