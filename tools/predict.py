"""Score images with a run: python tools/predict.py run=results/runs/… input=FILE|FOLDER output=FOLDER"""

import hydra
from omegaconf import DictConfig

from blemish.run import guarded, predict


@hydra.main(config_path="../configs", config_name="predict", version_base="1.3")
def main(cfg: DictConfig) -> None:
    print(f"{guarded(predict, cfg)} images scored: {cfg.output}/scores.csv")


if __name__ == "__main__":
    main()
