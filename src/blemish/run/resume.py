"""Resume a training that was stopped."""

from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import DictConfig, OmegaConf

from blemish.detector import Detector, TrainedDetector
from blemish.edge.errors import InputError
from blemish.run.checkpoint import contents
from blemish.run.config import read_config
from blemish.run.record import FINISHED, STATE, read_record


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


def resume_callbacks(cfg: DictConfig, model: Detector, folder: Path) -> list[ModelCheckpoint]:
    """What keeps the state of a training after every epoch, for `resume`; nothing for methods that do not train."""
    if not (isinstance(model, TrainedDetector) and cfg.save.state):
        return []
    return [ModelCheckpoint(folder, Path(STATE).stem, save_on_train_epoch_end=True, enable_version_counter=False)]
