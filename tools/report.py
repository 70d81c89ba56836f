"""Show runs on one page for the browser: python tools/report.py runs=results/runs [output=report.html] [max_mb=16]"""

from pathlib import Path

import hydra
from omegaconf import DictConfig

from blemish.records.report import write
from blemish.run import guarded


@hydra.main(config_path="../configs", config_name="report", version_base="1.3")
def main(cfg: DictConfig) -> None:
    runs = guarded(lambda c: write(c.runs, c.output, c.max_mb, c.images, c.picture_px), cfg)
    print(f"{runs} runs: {cfg.output} ({Path(cfg.output).stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
