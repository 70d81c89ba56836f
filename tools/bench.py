"""How long a run takes for an image, stage by stage and engine by engine: python tools/bench.py run=results/runs/… [batch=8] [threads=2]"""

import hydra
from omegaconf import DictConfig

from blemish.cli import bench


@hydra.main(config_path="../configs", config_name="bench", version_base="1.3")
def main(cfg: DictConfig) -> None:
    bench(cfg)


if __name__ == "__main__":
    main()
