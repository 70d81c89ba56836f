"""Fit, test and record one detector: python tools/train.py model=padim data=mvtec data.category=screw"""

import hydra
from omegaconf import DictConfig

from blemish.run import guarded, report, train


@hydra.main(config_path="../configs", config_name="train", version_base="1.3")
def main(cfg: DictConfig) -> None:
    report(guarded(train, cfg), cfg.run_dir)


if __name__ == "__main__":
    main()
