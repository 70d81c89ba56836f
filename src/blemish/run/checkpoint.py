"""A fitted detector in a file: written whole or not at all, loaded without unpickling."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO
from omegaconf import DictConfig, OmegaConf

from blemish.data.roi import Roi
from blemish.detector import Detector, TrainedDetector
from blemish.edge.errors import InputError
from blemish.files import atomic_write, fsync
from blemish.run.config import build, config_of, read_config
from blemish.run.record import check_archive, read_record

CHECKED = 2**30  # bytes of a checkpoint up to which its checksums are compared: a larger one is read from where it lies


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
        text, mask = saved["config"], saved["roi"]
    except Exception as error:
        raise InputError(f"{checkpoint}: not a whole checkpoint of {target} ({type(error).__name__}: {error})") from error
    if cfg is None:
        cfg = config_of(checkpoint, text)
        if mask is not None:
            cfg._set_flag("allow_objects", True)
            cfg.data.roi = mask.numpy()
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


def portable_config(cfg: DictConfig, roi: Roi | None, **more: Any) -> dict:
    """What a checkpoint holds beside Lightning's, to need no other file: its config with `more` keys, and the one mask of its images."""
    mask = None if roi is None or roi.folder else torch.from_numpy(roi.mask)
    values = OmegaConf.to_container(cfg, resolve=True) | more
    return {"config": OmegaConf.to_yaml(OmegaConf.create(values)), "roi": mask}


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
