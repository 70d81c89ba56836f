"""Resume a training that was stopped."""

from pathlib import Path

from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import DictConfig, OmegaConf

from blemish.detector import Detector, TrainedDetector
from blemish.edge.errors import InputError
from blemish.run.checkpoint import contents
from blemish.run.config import command_line, read_config
from blemish.run.record import FINISHED, STATE, read_record


def resume_config(cfg: DictConfig, run: Path) -> DictConfig:
    """Return the config of a stopped run, with what the command line sets of trainer, logger, workers and save."""
    if not (run / "config.yaml").is_file():
        raise InputError(f"resume={run}: no config.yaml there; expected the folder of a run")
    if (read_record(run) or {}).get("status") == FINISHED:
        raise InputError(f"resume={run}: that run is finished; expected one that was stopped")
    saved = read_config(run)
    for key, text in command_line():
        if key.partition(".")[0] in ("trainer", "logger", "workers", "save"):
            OmegaConf.update(saved, key, OmegaConf.select(cfg, key))
        elif key != "resume":
            raise InputError(f"{text}: fixed by the run that is resumed; expected overrides of trainer, logger, workers or save")
    saved.run_dir, saved.overwrite = str(run), False
    if (run / "manifest.csv").is_file():
        saved.data.manifest = str(run / "manifest.csv")
    return saved


def state_in(folder: Path) -> str | None:
    """Return the file with the state of a stopped training, None before its first epoch has ended; InputError for a damaged one."""
    path = folder / STATE
    if not path.is_file():
        return None
    try:
        contents(path)["loops"]
    except Exception as error:
        text = f"{path}: not the complete state of a training ({type(error).__name__}: {error}); remove it to start anew"
        raise InputError(text) from error
    return str(path)


def resume_callbacks(cfg: DictConfig, model: Detector, folder: Path) -> list[ModelCheckpoint]:
    """Return what saves the state of a training after every epoch; nothing for methods that do not train."""
    if not (isinstance(model, TrainedDetector) and cfg.save.state):
        return []
    return [ModelCheckpoint(folder, Path(STATE).stem, save_on_train_epoch_end=True, enable_version_counter=False)]
