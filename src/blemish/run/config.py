"""Hydra configs: composing them from overrides, checking their values, reading those of runs, building what they describe."""

import contextlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from functools import cache
from itertools import chain, count
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, IntervalSweep, Override
from hydra.errors import HydraException, InstantiationException, MissingConfigException
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from blemish.edge.checks import LARGEST_SEED, check_choice, check_number, check_switch, check_whole, nearest
from blemish.edge.errors import InputError
from blemish.files import no_room
from blemish.run.record import ROI, is_interruption

# a run's config may come from a stranger: in these groups it may call what their files call, and nothing anywhere else
ARGUMENTS = ("model", "data", "trainer", "logger")  # what is called there checks its own arguments
EXTENSIBLE = (*ARGUMENTS, "image_sizes", "change")  # keys that take a further +KEY.NAME=VALUE
OPTIONAL = ("recipe", "sweep", "launch", "paper")  # groups in which nothing needs to be chosen


def configs() -> Path:
    """Return the folder of the yaml files: inside an installed package, beside src/ in a checkout."""
    inside = Path(__file__).parents[1] / "configs"
    return inside if inside.is_dir() else Path(__file__).parents[3] / "configs"


def names(group: str) -> list[str]:
    """Return the choices of a config group, for instance all methods for `model`."""
    return sorted(path.stem for path in (configs() / group).glob("*.yaml"))


def composed(*overrides: str, config: str = "train", hydra: bool = False) -> DictConfig:
    """Return the config that a tool composes from these overrides, with Hydra's own node if `hydra`.

    A surrounding Hydra application is left as it is. InputError for a key or a choice that does not exist.
    """
    overrides = resolve_groups(overrides, config)
    added = any(override.is_add() for override in parse(overrides))
    try:
        cfg = compose_plainly(overrides, config, hydra)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        with contextlib.suppress(HydraException):
            check_keys(overrides, config)
        raise InputError(reason_of(error)) from None
    if added:
        check_keys(overrides, config)
    return cfg


def compose_plainly(overrides: Sequence[str], config: str, hydra: bool = False) -> DictConfig:
    with initialize_config_dir(str(configs()), version_base="1.3"):
        return compose(config, overrides=list(overrides), return_hydra_config=hydra)


def parse(overrides: Sequence[str]) -> list[Override]:
    try:
        return OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise InputError(f"{reason_of(error)}; expected KEY=VALUE, with quotes around a value that has special characters") from None


def is_group(override: Override) -> bool:
    return (configs() / override.key_or_group).is_dir()


def resolve_groups(overrides: Sequence[str], config: str) -> list[str]:
    """Return the overrides with an empty choice of an optional group, `recipe=null`, as Hydra takes it: `~recipe`."""
    texts = {}
    for number, override in enumerate(parse(overrides)):
        group, empty = override.key_or_group, override.value() in (None, "") and not override.is_delete()
        optional = group in OPTIONAL or (group, config) == ("model", "predict")
        if empty and is_group(override) and not optional:
            raise InputError(no_choice(group, "null", names(group)))
        texts[override.get_key_element() if optional else number] = f"~{group}" if empty and optional else override.input_line
    return list(texts.values())


def check_overrides(overrides: Sequence[str], config: str, several: bool) -> list[str]:
    """Return the overrides as Hydra takes them; InputError where they do not compose, or a sweep over `several` has an unknown choice."""
    for override in parse(overrides):
        if several and is_group(override) and isinstance(override.value(), ChoiceSweep):
            for choice in (str(getattr(one, "text", one)) for one in override.value().list):
                if choice not in (choices := names(override.key_or_group)):
                    raise InputError(no_choice(override.key_or_group, choice, choices))
    composed(*(first_values(overrides) if several else overrides), config=config)
    return resolve_groups(overrides, config)


def first_values(overrides: Sequence[str]) -> list[str]:
    """Return the overrides with the first value of each sweep, so that one config can be composed, and without globs."""
    texts = []
    for override in parse(overrides):
        key, value = override.get_key_element(), override.value()
        if not override.is_sweep_override():
            texts.append(override.input_line)
        elif isinstance(value, IntervalSweep):
            texts.append(f"{key}={value.start}")
        elif override.is_discrete_sweep() and not isinstance(value, Glob):
            texts.append(f"{key}={next(iter(override.sweep_string_iterator()))}")
    return texts


def check_keys(overrides: Sequence[str], config: str) -> None:
    """Raise InputError for the first override of a key that does not exist and that nothing takes."""
    found = parse(overrides)
    base = compose_plainly([one.input_line for one in found if is_group(one) or one.key_or_group.startswith("hydra/")], config)
    known = keys_of(base)
    for override in found:
        key = override.key_or_group
        takes_more = key.partition(".")[0] in EXTENSIBLE and key.partition(".")[0] in base
        if is_group(override) or key.startswith("hydra") or (override.is_add() and takes_more):
            continue
        if not any(f"{other}.".startswith(f"{key}.") for other in known):
            groups = [path.name for path in configs().iterdir() if path.is_dir()]
            raise InputError(unknown(key, [*known, *groups]) + (f" (+{key}=VALUE adds it)" if takes_more else ""))


def keys_of(cfg: Any, place: str = "") -> list[str]:
    """Return the keys of all values in a config, as overrides have them."""
    items = cfg.items_ex(resolve=False) if OmegaConf.is_dict(cfg) and not cfg._is_none() else ()
    return [key for name, value in items for own in [f"{place}{name}"] for key in (keys_of(value, f"{own}.") or [own])]


def unknown(key: str, known: Sequence[str]) -> str:
    """Return the message for a key that does not exist, with the most similar known key."""
    same = [other for other in known if other.rpartition(".")[2] == key]
    return f"{key}: no such key; {f'did you mean {same[0]!r}?' if same else nearest(key, known)}".rstrip("; ")


def no_choice(group: str, name: str, choices: Sequence[str]) -> str:
    where = "not installed, or misspelt" if group.startswith("hydra/") else f"no such file of configs/{group}"
    return f"{group}={name}: {where}; {nearest(name, choices)}choose {', '.join(choices)}"


def reason_of(error: Exception) -> str:
    """Return one line on why overrides do not compose."""
    if isinstance(error, MissingConfigException) and error.options:
        group, _, name = error.missing_cfg_file.rpartition("/")
        return no_choice(group, name, error.options)
    return "; ".join(line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith("See https"))


def command_line() -> list[tuple[str, str]]:
    """Return (key, override) of everything on the command line of this Hydra job; empty outside of Hydra."""
    texts = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    return [(text.lstrip("+~").partition("=")[0], text) for text in texts]


def plain(cfg: DictConfig) -> dict[str, Any]:
    """Return the config as dicts, lists, numbers and strings, with interpolations resolved."""
    return OmegaConf.to_container(cfg, resolve=True)


def run_cli(work: Callable[[DictConfig], Any], cfg: DictConfig) -> Any:
    """Do the work of a tool; bad input and a full disk end it with one message and status 2, Ctrl-C with status 130."""
    try:
        return work(cfg)
    except BaseException as error:
        if is_interruption(error):
            sys.exit(130)
        if isinstance(error, InputError | OmegaConfBaseException):  # the second for a value that a config lacks
            problem = error
        elif not (problem := no_room(error, ".")):
            raise
        Console(stderr=True, soft_wrap=True, highlight=False).print(f"error: {problem}", markup=False)
        sys.exit(2)


@contextlib.contextmanager
def renaming(keys: str, by: str) -> Iterator[None]:
    """Raise an InputError of the block with its keys as the command takes them: matches of the regular expression are replaced."""
    try:
        yield
    except InputError as error:
        raise InputError(re.sub(keys, by, str(error))) from error


def check_config(cfg: DictConfig) -> None:
    """Raise InputError for an impossible value of train.yaml or the trainer; data and model check their own in their constructors."""
    for name in ("save", "sweep", "store", "trainer"):
        if name in cfg and not OmegaConf.is_dict(cfg[name]):
            raise InputError(f"{name}={cfg[name]}: expected {name}.KEY=VALUE, see configs/train.yaml")
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
    """Return the config of a run folder, with the mask that lies there; InputError as `config_of`."""
    cfg = config_of(run / "config.yaml")
    if OmegaConf.select(cfg, "data.roi") and (run / ROI).is_file():
        cfg.data.roi = str(run / ROI)
    return cfg


def config_of(path: Path, text: str | None = None) -> DictConfig:
    """Return the config in a file, or in a `text` from a checkpoint; InputError if it is none, or calls what no file of configs/ calls."""
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
    """Return what the files of a config group call."""
    files = sorted((configs() / place).glob("*.yaml")) if place in ARGUMENTS else []
    found = [re.findall(r"^\s*_target_: *(\S+)", file.read_text(encoding="utf-8"), re.MULTILINE) for file in files]
    return sorted({name for names in found for name in names} - {"null"})


def targets(node: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """Yield (place, `_target_`) of everything in a config that Hydra would call, at any depth."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        if key == "_target_" and value is not None:
            yield place, str(value)
        yield from targets(value, f"{place}.{key}".lstrip("."))


def default_folder(cfg: DictConfig) -> Path:
    """Return results/runs/<model>/<dataset>/<category>/<seed>-<time>, with a number appended if that exists."""
    category = str(cfg.data.get("category") or "all").replace("/", "-")
    place = Path("results/runs") / module_of(cfg.model) / module_of(cfg.data) / category
    stem = f"{cfg.seed}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    names = chain([stem], (f"{stem}-{number}" for number in count(2)))
    return next(place / name for name in names if not (place / name).exists())


def class_of(part: DictConfig) -> type:
    """Return the class that a part of the config calls."""
    return get_class(part._target_)


def module_of(part: DictConfig) -> str:
    """Return the module of a part's class, which is also the name of its yaml: `padim` for blemish.methods.padim.PaDiM."""
    return part._target_.split(".")[-2]


def build(part: DictConfig, **more: Any) -> Any:
    """Build the object that a part of the config describes, from plain values; an InputError of its constructor is raised as it is."""
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
