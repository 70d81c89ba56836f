"""A fitted detector in a file: written atomically, loaded without unpickling."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO
from omegaconf import DictConfig, ListConfig, OmegaConf

from blemish.data.roi import Roi
from blemish.detector import Detector, TrainedDetector
from blemish.draw import Scale
from blemish.edge.checks import check_choice, check_number
from blemish.edge.errors import InputError
from blemish.features.extractor import ENGINES, Features
from blemish.files import atomic_write, fsync
from blemish.products import Products
from blemish.run.config import build, class_of, config_of, plain, products_of, read_config
from blemish.run.record import FINISHED, RECORD, check_archive, read_record

log = logging.getLogger(__name__)

CHECKED = 2**30  # bytes up to which a checkpoint's checksums are compared; a larger one is only mapped


def load(run: Path, device: str = "auto") -> tuple[DictConfig, Detector]:
    """Return config and fitted detector, in eval mode, of a run folder or of one file with both; InputError for anything else.

    Such a file is a run's model.ckpt or from `AnomalyDetector.save`. Nothing is unpickled.
    """
    config, checkpoint = (run, run) if run.is_file() else (run / "config.yaml", run / "model.ckpt")
    for path in (config, checkpoint):
        if not path.is_file():
            record = read_record(run) or {}
            status = f"; its record says {record['status']!r}" if record else ""
            raise InputError(f"run={run}: no {path.name} there{status}; expected the folder of a finished run, or a saved detector")
    cfg = None if config == checkpoint else read_config(run)
    try:
        saved = contents(checkpoint)
        state, made = saved["state_dict"], dict(saved.get("hyper_parameters", {}))
        text, mask = saved["config"], saved["roi"]
    except Exception as error:
        raise incomplete(checkpoint, error) from error
    if cfg is None:
        cfg = config_of(checkpoint, text)
        if mask is not None:
            cfg._set_flag("allow_objects", True)
            cfg.data.roi = mask.numpy()
    model_config = plain(cfg.model)
    for key in sorted(made.keys() & model_config.keys() - {"weights"}):
        if made[key] != model_config[key]:
            raise InputError(f"{config}: model.{key}={model_config[key]}, but {checkpoint.name} was made with {made[key]}")
    if "weights" in cfg.model:
        cfg.model.weights = "checkpoint"
    try:
        model = build_detector(cfg)
    except InputError as error:
        raise InputError(f"{config}: {error}") from None
    try:
        model.load_state_dict(state)
    except Exception as error:
        raise incomplete(checkpoint, error) from error
    return cfg, model.eval().to(device_of(device))


def build_detector(cfg: DictConfig, one: bool = False) -> Detector:
    """Return the method of a config before a fit, for each of several products unless for `one`; its engine runs frozen networks.

    With several backbones it is the `ensemble` of its class.
    """
    names, backbone = () if one else products_of(cfg), cfg.model.get("backbone")
    if isinstance(backbone, ListConfig):
        ensemble = class_of(cfg.model).ensemble
        if names or len(backbone) < 2 or ensemble is None:
            raise InputError(f"backbone={list(backbone)}: expected one name; several are an ensemble of model=patchcore, of one product")
        model = ensemble([build(cfg.model, backbone=name) for name in backbone])
    else:
        model = Products({name: build(cfg.model) for name in names}) if names else build(cfg.model)
    engine = cfg.engine
    check_choice("", ENGINES, engine=engine)
    if engine == "auto" and cfg.get("weights") == "random":
        engine = "torch"  # a graph of weights that are drawn for a run seldom pays
    for part in model.modules():
        if isinstance(part, Features):
            part.engine = engine
    return model


def saved_scale(run: Path, cfg: DictConfig) -> Scale | None:
    """Return the scale of pictures that was found when a run or a saved detector was made; None if there is none."""
    folder = run if run.is_dir() else run.parent if run.name == "model.ckpt" else None
    record = folder and read_record(folder)
    scale = (record or {}).get("scale") or plain(cfg).get("scale")
    if scale is not None:
        check_number("", "(-inf, inf)", each=True, scale=scale)
    return tuple(scale) if scale else None


def newest_run(place: str | Path) -> Path:
    """Return a run, or the newest finished one, with its model, in a folder of runs, and log which; anything else as it is."""
    place = Path(place)
    if any((place / name).exists() for name in ("config.yaml", RECORD)):
        return place
    records = {path.parent: read_record(path.parent) or {} for path in place.rglob(RECORD) if (path.parent / "model.ckpt").is_file()}
    finished = {folder: str(record.get("ended")) for folder, record in records.items() if record.get("status") == FINISHED}
    if not finished:
        return place
    run = max(finished, key=lambda folder: (finished[folder], folder.as_posix()))
    log.info("run=%s: the newest of %d finished run%s in %s", run, len(finished), "s" * (len(finished) != 1), place)
    return run


def incomplete(checkpoint: Path, error: Exception) -> InputError:
    return InputError(f"{checkpoint}: not a complete checkpoint ({type(error).__name__}: {error})")


def contents(checkpoint: Path) -> dict:
    """Return the content of a checkpoint, tensors mapped from the file, without unpickling; any error if it is not complete."""
    if checkpoint.stat().st_size <= CHECKED:
        check_archive(checkpoint)
    return torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)


def device_of(name: str) -> torch.device:
    """Return the fastest device for `auto`, else the one of that name; InputError if it is not available."""
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise InputError(f"device={name}: expected auto, cpu, gpu or mps")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        return torch.empty(0, device={"gpu": "cuda"}.get(name, name)).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device={name}: not available here; choose auto, cpu, gpu or mps ({error})") from error


def portable_config(cfg: DictConfig, roi: Roi | None, **more: Any) -> dict:
    """Return what makes a checkpoint independent of other files: its config, with `more` keys, and the one mask of all images."""
    mask = None if roi is None or roi.folder else torch.from_numpy(roi.mask)
    return {"config": OmegaConf.to_yaml(OmegaConf.create(plain(cfg) | more)), "roi": mask}


class Streamed(TorchCheckpointIO):
    """Checkpoints written atomically, with `more` entries, and without copies of the tensors.

    Lightning's own copies the checkpoint in memory first, galleries on disk included, and then through the system's folder for temporary
    files, where a kill leaves half of it.
    """

    more: Mapping[str, Any] = {}

    def save_checkpoint(self, checkpoint: dict, path: str | Path, storage_options: Any = None) -> None:
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            torch.save({**checkpoint, **self.more}, file)
            fsync(file)


def save_whole(cfg: DictConfig, model: Detector, roi: Roi | None, path: Path, **more: Any) -> None:
    """Write a fitted detector with its config, and `more` keys of it, without a trainer."""
    state = {key: value.detach().cpu() for key, value in model.state_dict().items()}
    made = dict((model.parts[0] if isinstance(model, Products) else model).hparams)
    Streamed().save_checkpoint({"state_dict": state, "hyper_parameters": made, **portable_config(cfg, roi, **more)}, path)


def save_checkpoint(trainer: Trainer, model: Detector, path: Path, more: Mapping[str, Any]) -> None:
    """Write a model's checkpoint with `more` entries; all processes of a training take part."""
    trainer.strategy.connect(model)
    trainer.strategy.checkpoint_io.more = more
    trainer.save_checkpoint(path, weights_only=not isinstance(model, TrainedDetector))
