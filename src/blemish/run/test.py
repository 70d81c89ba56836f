"""Test a finished run again."""

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from blemish.edge.errors import InputError
from blemish.run.checkpoint import device_of, load
from blemish.run.config import ARGUMENTS, check_config, keys_of, unknown
from blemish.run.record import read_record
from blemish.run.train import Run, described, run_context


def test(cfg: DictConfig) -> dict:
    """Test a finished run again on its own manifest, write the results to `cfg.output`, and return the metrics.

    `cfg.change` overrides the run's config, for instance data.root where the images have moved.
    """
    run = Path(cfg.run)
    device_of(cfg.device)
    saved, model = load(run, cfg.device)
    for key in keys_of(cfg.change):
        if key.split(".")[0] not in ARGUMENTS and key not in keys_of(saved):
            raise InputError(f"change.{unknown(key, keys_of(saved))}")
    saved = OmegaConf.merge(saved, cfg.change)
    folder = Path(cfg.output) if cfg.output else run / "retest"
    if folder.resolve() == run.resolve() or (folder / "model.ckpt").exists():
        raise InputError(f"output={folder}: holds the model of a run, which would be lost; choose another folder")
    saved.data.manifest, saved.run_dir, saved.logger = str(run / "manifest.csv"), str(folder), None
    if cfg.device != "auto":
        saved.trainer.accelerator = cfg.device
    check_config(saved)
    images = described(saved)
    with run_context(folder, saved, overwrite=read_record(folder) is not None) as record:  # only an earlier test's files are replaced
        return Run(saved, record, images, model).test(None)
