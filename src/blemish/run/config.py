"""Compose a config from Python as the command line does, and report overrides that do not fit."""

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, IntervalSweep, Override
from hydra.errors import HydraException, InstantiationException, MissingConfigException
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from blemish.edge.checks import LARGEST_SEED, check_choice, check_number, check_switch, check_whole, nearest, shown
from blemish.edge.errors import InputError
from blemish.files import no_room
from blemish.run.record import ROI, stopped

# a run's config may come from a stranger: it chooses among what the files of these groups call, and calls nothing else
ARGUMENTS = ("model", "data", "trainer", "logger")  # of what they call, which refuses those that it does not know
OPTIONAL = ("recipe", "sweep", "launch", "paper")  # groups of which none may be chosen


def configs() -> Path:
    """The folder of the yaml files: inside the package where it is installed, beside src/ in a checkout."""
    inside = Path(__file__).parents[1] / "configs"
    return inside if inside.is_dir() else Path(__file__).parents[3] / "configs"


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


def check_config(cfg: DictConfig) -> None:
    """InputError for a value of train.yaml, or of its trainer, that cannot be meant; those of data and model are their constructors'."""
    for name in ("save", "sweep", "store", "trainer"):
        if name in cfg and not OmegaConf.is_dict(cfg[name]):
            raise InputError(f"{name}={cfg[name]}: has values of its own, as configs/train.yaml lists them; expected {name}.KEY=VALUE")
    check_whole("", 0, LARGEST_SEED, seed=cfg.seed)
    check_number("", "(0, 1)", alpha=cfg.alpha)
    check_whole("", 0, pixel_limit=cfg.pixel_limit)
    check_whole("save", -1, pictures=cfg.save.pictures)
    check_switch("save", **{key: cfg.save[key] for key in cfg.save if key != "pictures"})
    check_switch("", overwrite=cfg.get("overwrite", False))
    check_choice("", (None, "synthetic"), objective=cfg.get("objective"))
    if cfg.get("sweep"):
        check_number("sweep", "(0, inf)", also=(None,), minutes=cfg.sweep.minutes)
        check_whole("sweep", 1, also=(None,), threads=cfg.sweep.threads)
    if cfg.get("store"):
        check_switch("store", **{key: cfg.store[key] for key in ("enabled", "images") if key in cfg.store})
        if cfg.store.enabled:
            check_choice("store", ("float16", "float32"), dtype=cfg.store.dtype)
            check_number("store", "(0, inf)", also=(None,), max_gb=cfg.store.max_gb)
    check_whole("trainer", 1, max_epochs=cfg.trainer.max_epochs)
    check_whole("trainer", 1, accumulate_grad_batches=cfg.trainer.get("accumulate_grad_batches", 1))
    check_number("trainer", "(0, inf)", also=(None,), gradient_clip_val=cfg.trainer.get("gradient_clip_val"))
    check_switch("trainer", enable_progress_bar=cfg.trainer.get("enable_progress_bar", True))
    if "seed" in cfg.model:
        check_whole("model", 0, LARGEST_SEED, seed=cfg.model.seed)


def read_config(run: Path) -> DictConfig:
    """The config of a run folder; InputError if it is none, or calls what no config of blemish calls."""
    cfg = config_of(run / "config.yaml")
    if OmegaConf.select(cfg, "data.roi") and (run / ROI).is_file():
        cfg.data.roi = str(run / ROI)
    return cfg


def config_of(path: Path, text: str | None = None) -> DictConfig:
    """The config in a file, or the `text` of one that lies in a checkpoint; InputError as `read_config`."""
    try:
        cfg = OmegaConf.load(path) if text is None else OmegaConf.create(text)
        str(cfg.model._target_)
    except Exception as error:
        raise InputError(f"{path}: not the config of a run ({type(error).__name__}: {error})") from error
    for place, name in targets(OmegaConf.to_container(cfg)):
        if name not in known_targets(place):
            choices = ", ".join(known_targets(place)) or "nothing"
            raise InputError(f"{path}: {place}._target_={name}; a run's config may call there {choices}")
    return cfg


@cache
def known_targets(place: str) -> list[str]:
    """What the files of a config group call."""
    files = sorted((configs() / place).glob("*.yaml")) if place in ARGUMENTS else []
    found = [re.findall(r"^\s*_target_: *(\S+)", file.read_text(encoding="utf-8"), re.MULTILINE) for file in files]
    return sorted({name for names in found for name in names} - {"null"})


def targets(node: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """(place, `_target_`) of everything in a config that Hydra would call, at any depth."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        if key == "_target_" and value is not None:
            yield place, str(value)
        yield from targets(value, f"{place}.{key}".lstrip("."))


def default_folder(cfg: DictConfig) -> Path:
    """results/runs/<model>/<dataset>/<category>/<seed>-<time>, with a number behind it if that exists."""
    category = str(cfg.data.get("category") or "all").replace("/", "-")
    stem = f"{cfg.seed}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    place = Path("results/runs") / module_of(cfg.model) / module_of(cfg.data) / category
    names = [stem] + [f"{stem}-{n}" for n in range(2, 1000)]
    return next(place / name for name in names if not (place / name).exists())


def class_of(part: DictConfig) -> type:
    """The class that a part of the config calls."""
    return get_class(part._target_)


def module_of(part: DictConfig) -> str:
    """The file that holds a part's class: `padim` for blemish.methods.padim.PaDiM, which is also the name of its yaml."""
    return part._target_.split(".")[-2]


def build(part: DictConfig, **more: Any) -> Any:
    """The object a part of the config describes, of plain values; an InputError in its constructor comes out as it is."""
    try:
        return instantiate(part, _convert_="all", **more)
    except InstantiationException as error:
        cause = error.__cause__
        while cause is not None and not isinstance(cause, InputError):
            cause = cause.__cause__
        if cause is not None:
            raise cause from None
        place = re.search(r"full_key: (\S+)", str(error))
        raise InputError(f"{place[1] + ': ' if place else ''}{error.__cause__ or error}") from error
