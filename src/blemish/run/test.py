"""Test a finished run again."""

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from blemish.edge.errors import InputError
from blemish.run.checkpoint import device_of, load, newest_run
from blemish.run.config import ARGUMENTS, check_config, keys_of, renaming, unknown
from blemish.run.record import read_record
from blemish.run.train import Run, described, run_context


@renaming(rf"(?<![\w.])(?=({'|'.join(ARGUMENTS)})\.\w+=)", "+change.")
def test(cfg: DictConfig) -> dict:
    """Test a finished run again on its own manifest, write the results to `cfg.output`, and return the metrics.

    `cfg.run` becomes the run that is taken from a folder of runs, `cfg.output` the folder of the results. `cfg.change` overrides the run's
    config, for instance data.root where the images have moved.
    """
    cfg.run = str(newest_run(cfg.run))
    run = Path(cfg.run)
    device_of(cfg.device)
    saved, model = load(run, cfg.device)
    for key in keys_of(cfg.change):
        if key.split(".")[0] not in ARGUMENTS and key not in keys_of(saved):
            raise InputError(f"change.{unknown(key, keys_of(saved), 'the run')}")
    saved = OmegaConf.merge(saved, cfg.change)
    cfg.output = cfg.output or str(run / "retest")
    folder = Path(cfg.output)
    if folder.resolve() == run.resolve() or (folder / "model.ckpt").exists():
        raise InputError(f"output={folder}: holds the model of a run, which would be lost; choose another folder")
    saved.data.manifest, saved.run_dir, saved.logger = str(run / "manifest.csv"), str(folder), None
    if cfg.device != "auto":
        saved.trainer.accelerator = cfg.device
    check_config(saved)
    images = described(saved)
    again = read_record(folder) is not None  # only an earlier test's files are replaced
    with run_context(folder, saved, again, key="output") as record:
        return Run(saved, record, images, model).test(None)
