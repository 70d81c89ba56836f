"""Collect finished runs into a table: python tools/table.py runs=results/runs [readme=README.md] [by=category] [latex=FILE]"""

import hydra
from omegaconf import DictConfig

from blemish.records.tables import write
from blemish.run import guarded


def work(c: DictConfig) -> int:
    return write(c.runs, c.output, c.readme, c.markdown, c.latex, c.by, c.metric, c.published)


@hydra.main(config_path="../configs", config_name="table", version_base="1.3")
def main(cfg: DictConfig) -> None:
    files = filter(None, (cfg.output, cfg.readme, cfg.markdown, cfg.latex))
    print(f"{guarded(work, cfg)} runs: {', '.join(files)}")


if __name__ == "__main__":
    main()
