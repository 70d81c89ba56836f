"""Test a finished run again."""

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from blemish.edge.errors import InputError
from blemish.features.cache import StoredData
from blemish.run.checkpoint import device_of, load
from blemish.run.config import ARGUMENTS, check_config, leaves, unknown
from blemish.run.record import read_record
from blemish.run.tiling import stitch_callbacks
from blemish.run.train import (
    build_callbacks,
    described,
    measured,
    metadata,
    run_context,
    save_config,
    set_up,
    stored,
    trainer_of,
    write_results,
)


def test(cfg: DictConfig) -> dict:
    """Load a finished run, test it again on its own manifest, write the results to `cfg.output`; returns the metrics.

    The run's config may be overridden under `cfg.change`, for instance data.root where the images have moved.
    """
    run = Path(cfg.run)
    device_of(cfg.device)
    saved, model = load(run, cfg.device)
    for key in leaves(cfg.change):
        if key.split(".")[0] not in ARGUMENTS and key not in leaves(saved):
            raise InputError(f"change.{unknown(key, leaves(saved))}")
    saved = OmegaConf.merge(saved, cfg.change)
    saved.data.manifest = str(run / "manifest.csv")
    if cfg.device != "auto":
        saved.trainer.accelerator = cfg.device
    folder = Path(cfg.output) if cfg.output else run / "retest"
    if folder.resolve() == run.resolve():
        raise InputError(f"output={folder}: is the run itself, which would be lost; choose another folder")
    if (folder / "model.ckpt").exists():
        raise InputError(f"output={folder}: holds the model of a run, which would be lost; choose another folder")
    saved.run_dir = str(folder)
    check_config(saved)
    data = described(saved)
    with run_context(folder, saved, overwrite=read_record(folder) is not None) as record:  # what no test wrote is left
        times, _, evaluate = build_callbacks(saved)
        saved.logger = None
        trainer = trainer_of(saved, [times, *stitch_callbacks(data, evaluate)])
        set_up(saved, data, ranges=model.ranges)
        values = data.values
        data.process, data.processes = trainer.global_rank, trainer.world_size
        save_config(saved, folder)
        record.note(metadata(saved, data, model))
        data = stored(saved, data, model, trainer, times)
        metrics = measured(trainer, model, data, evaluate, times, None)
        values.report()
        write_results(folder, saved, evaluate, metrics, record, trainer)
        record.finish({"seconds": times.total(), "store": data.metadata() if isinstance(data, StoredData) else None})
    return metrics
