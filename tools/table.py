"""Collect finished runs into a table: python tools/table.py runs=results/runs [output=results/measured.csv] [readme=README.md]"""

import hydra
from omegaconf import DictConfig

from blemish.records.tables import write
from blemish.run import guarded


@hydra.main(config_path="../configs", config_name="table", version_base="1.3")
def main(cfg: DictConfig) -> None:
    print(f"{guarded(lambda c: write(c.runs, c.output, c.readme), cfg)} runs: {cfg.output}")


if __name__ == "__main__":
    main()
