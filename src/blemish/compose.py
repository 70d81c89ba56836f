"""Compose a config from Python as the command line does, and report overrides that do not fit."""

import logging
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, IntervalSweep, Override
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from blemish.checks import nearest, shown
from blemish.files import no_room
from blemish.records.record import stopped
from blemish.types import InputError

# a run's config may come from a stranger: it chooses among what the files of these groups call, and calls nothing else
ARGUMENTS = ("model", "data", "trainer", "logger")  # of what they call, which refuses those that it does not know
OPTIONAL = ("recipe", "sweep", "launch", "paper")  # groups of which none may be chosen


def configs() -> Path:
    """The folder of the yaml files: inside the package where it is installed, beside src/ in a checkout."""
    inside = Path(__file__).parent / "configs"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "configs"


def names(group: str) -> list[str]:
    """What there is to choose in a group: the methods for `model`."""
    return sorted(path.stem for path in (configs() / group).glob("*.yaml"))


def composed(*overrides: str, config: str = "train", hydra: bool = False) -> DictConfig:
    """The config that a tool gets from these overrides; an application of Hydra's around the caller is left as it was.

    InputError for a key or a group's file that does not exist. hydra: with Hydra's own part of the config.
    """
    overrides = settled(overrides, config)
    try:
        cfg = raw(overrides, config, hydra)
        if added := [one for one in parsed(overrides) if one.is_add() and not is_free(one, config)]:
            known = leaves(raw(choices_in(overrides), config))
            if strange := [one.key_or_group for one in added if one.key_or_group not in known]:
                raise InputError(unknown(strange[0], known))
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(explained(error, overrides, config)) from None
    return cfg


def raw(overrides: Sequence[str], config: str, hydra: bool = False) -> DictConfig:
    with initialize_config_dir(str(configs()), version_base="1.3"):
        return compose(config, overrides=list(overrides), return_hydra_config=hydra)


def parsed(overrides: Sequence[str]) -> list[Override]:
    """InputError for a text that is no override."""
    try:
        return OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise InputError(f"{line_of(error)}; expected KEY=VALUE, and quotes around a value with signs of Hydra's") from None


def is_group(override: Override) -> bool:
    return (configs() / override.key_or_group).is_dir()


def is_free(override: Override, config: str) -> bool:
    """Whether what an override adds with a + is known further on, or refused there."""
    if is_group(override):
        return config == "train"
    return override.key_or_group.split(".")[0] in {
        "train": (*ARGUMENTS, "hydra"),
        "reproduce": (*ARGUMENTS, "image_sizes", "hydra"),
        "test": ("change", "hydra"),
    }.get(config, ("hydra",))


def choices_in(overrides: Sequence[str]) -> list[str]:
    """The overrides that choose a file of a group."""
    return [one.input_line for one in parsed(overrides) if is_group(one) or one.key_or_group.startswith("hydra/")]


def settled(overrides: Sequence[str], config: str = "train") -> list[str]:
    """The overrides, with nothing chosen of a group for an empty or null one; InputError unless all groups' files exist.

    Values of a sweep are looked at too. A folder of configs that the overrides bring along is Hydra's to search.
    """
    found = parsed(overrides)
    if any(one.key_or_group == "hydra.searchpath" for one in found):
        return list(overrides)
    last = {one.get_key_element(): one for one in found}
    texts = []
    for one in found:
        group = one.key_or_group
        if not is_group(one) or one.is_delete():
            texts.append(one.input_line)
            continue
        value = one.value()
        several = one.is_sweep_override() or isinstance(value, list)
        values = list(getattr(value, "list", value)) if several and not isinstance(value, Glob) else [] if several else [value]
        if not several and value in (None, "") and (group in OPTIONAL or (group, config) == ("model", "predict")):
            texts += [f"~{group}"] if one is last[group] else []
            continue
        for name in values:
            name = getattr(name, "text", name)  # of one in quotes
            if str(name) not in names(group):
                raise InputError(no_choice(group, shown(name), names(group)))
        if one.package is not None:
            raise InputError(f"{one.input_line}: has no place of its own; expected {group}=NAME")
        if one is last[one.get_key_element()]:
            texts.append(one.input_line)
    return texts


def firsts(overrides: Sequence[str]) -> list[str]:
    """The overrides with the first of the values that each sweeps over, so that one config can be composed; later ones win."""
    texts = {}
    for override in parsed(overrides):
        key, value = override.get_key_element(), override.value()
        if not override.is_sweep_override():
            texts[key] = override.input_line
        elif isinstance(value, IntervalSweep):
            texts[key] = f"{key}={value.start}"
        elif override.is_discrete_sweep() and not isinstance(value, Glob):
            texts[key] = f"{key}={next(iter(override.sweep_string_iterator()))}"
    return list(texts.values())


def leaves(cfg: Any, place: str = "") -> list[str]:
    """The keys of all that is in a config, as overrides have them."""
    items = cfg.items_ex(resolve=False) if OmegaConf.is_dict(cfg) and not cfg._is_none() else ()
    return [key for name, value in items for own in [f"{place}{name}"] for key in (leaves(value, f"{own}.") or [own])]


def unknown(key: str, known: Sequence[str]) -> str:
    """Return the message for a key that does not exist, with the nearest known key."""
    same = [other for other in known if other.rpartition(".")[2] == key]
    if key in known:
        return f"{key}: cannot be set to that; expected a value of its kind"
    return f"{key}: no such key; {f'did you mean {same[0]!r}?' if same else nearest(key, known)}".rstrip("; ")


def explained(error: Exception, overrides: Sequence[str], config: str) -> str:
    """One line on why overrides do not compose."""
    if isinstance(error, MissingConfigException) and error.options:
        group, _, name = error.missing_cfg_file.rpartition("/")
        return no_choice(group, name, error.options)
    text = str(error)
    if "To append to your default list" in text and (found := re.match(r"Could not override '([^'\n]+)'", text)):
        return f"{found[1]}: {config} has no such choice" + (f"; +{found[1]}=NAME adds it" if config == "train" else "")
    if found := re.match(r"Multiple values for (\S+)\.", text):
        return f"+{found[1]}: is chosen already; expected {found[1]}=NAME"
    if found := re.match(r"Could not (?:override|delete from config\.) '([^'\n]+)'", text):
        if config == "test" and found[1].startswith("change."):
            return f"{found[1]}: a change of the run's config is added; expected +{found[1]}=VALUE"
        return unknown(found[1], [*leaves(raw(choices_in(overrides), config)), *(OPTIONAL if config == "train" else ())])
    return line_of(error)


def line_of(error: Exception) -> str:
    return "; ".join(line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith("See https"))


def no_choice(group: str, name: str, choices: Sequence[str]) -> str:
    where = "not installed, or misspelt" if group.startswith("hydra/") else f"no such file of configs/{group}"
    return f"{group}={name}: {where}; {nearest(name, choices)}choose {', '.join(choices)}"


def plain(cfg: DictConfig) -> dict[str, Any]:
    """The config as dicts, lists, numbers and strings, without interpolations."""
    return OmegaConf.to_container(cfg, resolve=True)


def run_cli(work: Callable[[DictConfig], Any], cfg: DictConfig) -> Any:
    """Do the work of a tool: bad input ends it with one clear message and status 2, Ctrl-C with status 130."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # notes on devices and advertisements are not ours to repeat
    try:
        return work(cfg)
    except (InputError, OmegaConfBaseException, OSError) as error:  # the second for a value that a config lacks
        if stopped(error):
            sys.exit(130)
        if isinstance(error, OSError) and not (error := no_room(error, ".")):
            raise
        Console(stderr=True, soft_wrap=True, highlight=False).print(f"error: {error}", markup=False)
        sys.exit(2)
    except SystemExit as error:
        sys.exit(130 if stopped(error) else error.code)
    except BaseException as error:
        if stopped(error):
            sys.exit(130)
        raise
