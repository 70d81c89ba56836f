"""Fit, test and record one detector: python tools/train.py model=padim data=mvtec data.category=screw; with -m a sweep over several."""

import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from blemish.run import guarded, report, train
from blemish.sweep import cell, launch


@hydra.main(config_path="../configs", config_name="train", version_base="1.3")
def main(cfg: DictConfig) -> float | None:
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        return cell(cfg)
    return report(guarded(train, cfg), cfg.run_dir)


if __name__ == "__main__":
    launch(main, sys.argv[:1])
