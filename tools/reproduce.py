"""Run a paper's own protocol and compare with its tables: python tools/reproduce.py paper=padim [categories=[screw]] [data.root=…]"""

import sys
from functools import partial

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from blemish.records.reproduce import reproduce
from blemish.run import build, configs, guarded, train


@hydra.main(config_path="../configs", config_name="reproduce", version_base="1.3")
def main(cfg: DictConfig) -> None:
    name, typed = HydraConfig.get().runtime.choices.paper, HydraConfig.get().overrides.task
    if not name:
        sys.exit(f"{__doc__}\npaper=…: one of {', '.join(sorted(path.stem for path in configs().glob('paper/*.yaml')))}")
    plain = partial(OmegaConf.to_container, resolve=True)
    sys.exit(guarded(lambda c: reproduce(c, name, typed, plain, scan=lambda c: build(c.data).scan(), train=train), cfg))


if __name__ == "__main__":
    main()
