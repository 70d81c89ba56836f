"""Load a run and test it again: python tools/test.py run=results/runs/…"""

import hydra
from omegaconf import DictConfig

from blemish.run import guarded, report, test


@hydra.main(config_path="../configs", config_name="test", version_base="1.3")
def main(cfg: DictConfig) -> None:
    report(guarded(test, cfg), cfg.output or f"{cfg.run}/retest")


if __name__ == "__main__":
    main()
