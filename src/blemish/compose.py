"""A config composed by Python as the command line would, for those who have no config."""

from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from blemish.run import configs


def names(group: str) -> list[str]:
    """What there is to choose in a group: the methods for `model`."""
    return sorted(path.stem for path in (configs() / group).glob("*.yaml"))


def composed(*overrides: str, config: str = "train") -> DictConfig:
    """The config that a tool gets from these overrides; an application of Hydra's around the caller is left as it was."""
    with initialize_config_dir(str(configs()), version_base="1.3"):
        return compose(config, overrides=list(overrides))


def plain(cfg: DictConfig) -> dict[str, Any]:
    """The config as dicts, lists, numbers and strings, without interpolations."""
    return OmegaConf.to_container(cfg, resolve=True)
