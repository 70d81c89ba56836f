"""Hydra configs: composing them from overrides, checking their values, reading those of runs, building what they describe."""

import contextlib
import inspect
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from functools import cache
from itertools import chain, count
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, IntervalSweep, Override, Quote, QuotedString
from hydra.errors import HydraException, InstantiationException, MissingConfigException
from hydra.types import RunMode
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from blemish.edge.calibration import PROMISES, SPLIT
from blemish.edge.checks import LARGEST_SEED, check_choice, check_number, check_switch, check_whole, nearest
from blemish.edge.errors import InputError
from blemish.files import no_room
from blemish.run.help import configs, groups, names, no_choice
from blemish.run.record import ROI, STATE, is_interruption

# a run's config may come from a stranger: in these groups it may call what their files call, and nothing anywhere else
ARGUMENTS = ("model", "data", "trainer", "logger")  # what is called there checks its own arguments
EXTENSIBLE = (*ARGUMENTS, "image_sizes", "change")  # keys that take a further +KEY.NAME=VALUE
OPTIONAL = ("recipe", "sweep", "launch", "paper")  # groups in which nothing needs to be chosen
PREPROCESSING = ("image_size", "crop", "resize", "window")  # keys of a run's data that predictions need
TILE_SIZES = {"image_size": "${data.tile}", "crop": "null"}  # with data.unit=tile


def composed(*overrides: str, config: str = "train", hydra: bool = False) -> DictConfig:
    """Return the config that a tool composes from these overrides, with Hydra's own node if `hydra`.

    A surrounding Hydra application is left as it is. InputError for a key or a choice that does not exist.
    """
    overrides = resolve_groups(overrides, config)
    added = any(override.is_add() or override.is_force_add() for override in parse(overrides))
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
    outer, GlobalHydra.instance().hydra = GlobalHydra.instance().hydra, None
    try:
        with initialize_config_dir(str(configs()), version_base="1.3"):
            return compose(config, overrides=list(overrides), return_hydra_config=hydra)
    finally:
        GlobalHydra.instance().hydra = outer


def parse(overrides: Sequence[str]) -> list[Override]:
    parser, found = OverridesParser.create(), []
    for text in overrides:
        try:
            found.append(parser.parse_override(text))
        except HydraException:
            raise InputError(f"{text}: expected KEY=VALUE, with quotes around a value that has special characters") from None
    return found


def quoted(text: str) -> str:
    """Return a value in quotes, as Hydra's grammar reads it."""
    return QuotedString(text, Quote.single).with_quotes()


def is_group(override: Override) -> bool:
    return (configs() / override.key_or_group).is_dir()


def resolve_groups(overrides: Sequence[str], config: str) -> list[str]:
    """Return the overrides with an empty choice of an optional group, `recipe=null`, as Hydra takes it: `~recipe`.

    data.unit=tile sets image_size to the side of the tiles, and no crop, unless these are chosen. InputError for a group that this config
    does not have, or that needs a choice, and for the removal of any other key.
    """
    texts, own = {}, groups(config)
    for number, override in enumerate(parse(overrides)):
        group, empty = override.key_or_group, override.value() in (None, "")
        optional = group in OPTIONAL or (group, config) == ("model", "predict")
        if is_group(override) and group not in own and (group, config) != ("paper", "train"):
            raise InputError(unknown(group, [*keys_of(compose_plainly([], config)), *own], config))
        if empty and is_group(override) and not optional:
            raise InputError(no_choice(group, "null", names(group)))
        if override.is_delete() and not optional and not group.startswith((*(f"{part}." for part in ARGUMENTS), "hydra")):
            raise InputError(f"~{group}: cannot be removed; expected {group}=VALUE")
        texts[override.get_key_element() if optional else number] = f"~{group}" if empty and optional else override.input_line
    values = {override.key_or_group: override.value() for override in parse(overrides)}
    if values.get("data.unit") == "tile" and config in ("train", "data") and not values.keys() & {"update", "data.image_size"}:
        texts = {key: f"{key}={value}" for key, value in TILE_SIZES.items() if key not in values} | texts
    return list(texts.values())


def check_overrides(overrides: Sequence[str], config: str, several: bool) -> list[str]:
    """Return the overrides as Hydra takes them.

    InputError where they do not compose: in a sweep over `several`, with any choice of a group.
    """
    if not several:
        for override in parse(overrides):
            if override.is_sweep_override():
                value = override.input_line.partition("=")[2]
                raise InputError(f"{override.input_line}: several values; -m sweeps over them, [{value}] is a list, quotes make one text")
        composed(*overrides, config=config)
        return resolve_groups(overrides, config)
    cfg = composed(*first_values(overrides), config=config, hydra=True)
    params = [f"{key}={value}" for key, value in (cfg.hydra.sweeper.get("params") or {}).items()]
    texts = list({override.key_or_group: override.input_line for override in parse([*params, *overrides])}.values())
    for number, override in enumerate(parse(texts)):
        if is_group(override) and override.is_sweep_override():
            for choice in choices_of(override):
                chosen = f"{override.get_key_element()}={choice}"
                try:
                    composed(*first_values([*texts[:number], chosen, *texts[number + 1 :]]), config=config)
                except InputError as error:
                    raise InputError(f"{chosen}: {error}") from None
    return resolve_groups(overrides, config)


def choices_of(override: Override) -> list[str]:
    """Return the choices of a group in a sweep; InputError for one that does not exist, or where a pattern has none."""
    value, known = override.value(), names(override.key_or_group)
    if not isinstance(value, Glob):
        found = [str(getattr(one, "text", one)) for one in value.list] if isinstance(value, ChoiceSweep) else []
        if unknown := [choice for choice in found if choice not in known]:
            raise InputError(no_choice(override.key_or_group, unknown[0], known))
    elif not (found := value.filter(known)):
        raise InputError(f"{override.input_line}: matches none of {', '.join(known)}")
    return found


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
        if is_group(override) or key.startswith("hydra") or (takes_more and (override.is_add() or override.is_force_add())):
            continue
        if not any(f"{other}.".startswith(f"{key}.") for other in known):
            raise InputError(unknown(key, [*known, *groups(config)], config) + (f" (+{key}=VALUE adds it)" if takes_more else ""))


def keys_of(cfg: Any, place: str = "") -> list[str]:
    """Return the keys of all values in a config, as overrides have them."""
    items = cfg.items_ex(resolve=False) if OmegaConf.is_dict(cfg) and not cfg._is_none() else ()
    return [key for name, value in items for own in [f"{place}{name}"] for key in (keys_of(value, f"{own}.") or [own])]


def unknown(key: str, known: Sequence[str], config: str) -> str:
    """Return the message for a key that a tool does not have, with the most similar of its own."""
    known = [other for other in known if not other.endswith("_target_")]
    same = [other for other in known if other.rpartition(".")[2] == key]
    near = f"did you mean {same[0]!r}?" if same else nearest(key, known).rstrip() or "--help lists them"
    return f"{key}: no such key of {config}; {near}"


def reason_of(error: Exception) -> str:
    """Return one line on why overrides do not compose."""
    if isinstance(error, MissingConfigException) and error.options:
        group, _, name = error.missing_cfg_file.rpartition("/")
        if group.startswith("hydra/"):
            return no_choice(group, name, error.options)
        group, _, name = error.missing_cfg_file.partition("/")
        return no_choice(group, name, names(group))
    return "; ".join(line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith("See https"))


def command_line() -> list[tuple[str, str]]:
    """Return (key, override) of everything on the command line of this Hydra job; empty outside of Hydra."""
    texts = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    return [(text.lstrip("+~").partition("=")[0], text) for text in texts]


def plain(cfg: DictConfig) -> dict[str, Any]:
    """Return the config as dicts, lists, numbers and strings, with interpolations resolved."""
    return OmegaConf.to_container(cfg, resolve=True)


def run_cli(work: Callable[[DictConfig], Any], cfg: DictConfig, command: str = "blemish train") -> Any:
    """Do the work of a tool; bad input and a full disk end it with one message and status 2, Ctrl-C with status 130.

    command: the words before the overrides, as they are typed.
    """
    try:
        return work(cfg)
    except BaseException as error:
        if is_interruption(error):
            if os.environ.get("LOCAL_RANK", "0") == "0":  # the first process of a training on several devices
                Console(stderr=True, soft_wrap=True, highlight=False).print(f"stopped{how_to_resume(cfg, command)}", markup=False)
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


def how_to_resume(cfg: DictConfig | None, command: str) -> str:
    """Return what can be done with what an interrupted command has left; nothing for one that does not train."""
    if cfg is None or "run_dir" not in cfg:
        return ""
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        return f"; the same command with sweep.name={cfg.sweep.name} resume=true takes up what is not finished"
    if cfg.run_dir and (Path(cfg.run_dir) / STATE).is_file():
        return f"; to continue after its last epoch: {command} {shlex.quote(f'resume={cfg.run_dir}')}"
    if cfg.run_dir and (Path(cfg.run_dir) / "model.ckpt").is_file():
        return f" after the fit; the model is complete, for test and predict: {shlex.quote(f'run={cfg.run_dir}')}"
    return "; there is nothing to resume: the same command starts anew"


def check_config(cfg: DictConfig) -> None:
    """Raise InputError for an impossible value of train.yaml or the trainer; data and model check their own in their constructors."""
    for name in ("augment", "save", "sweep", "store", "trainer"):
        if name in cfg and not OmegaConf.is_dict(cfg[name]):
            raise InputError(f"{name}={cfg[name]}: expected {name}.KEY=VALUE, see configs/train.yaml")
    check_whole("", 0, LARGEST_SEED, seed=cfg.seed)
    check_number("", "(0, 1)", alpha=cfg.alpha)
    check_choice("", PROMISES, calibrate=cfg.calibrate)
    if cfg.calibrate != SPLIT and cfg.protocol != "clean":
        raise InputError(f"calibrate={cfg.calibrate}: only with protocol=clean; protocol={cfg.protocol} has no thresholds")
    if cfg.calibrate != SPLIT and cfg.get("update"):
        raise InputError(f"calibrate={cfg.calibrate}: an update needs new images that are held out; expected calibrate=split")
    check_whole("", 0, pixel_limit=cfg.pixel_limit)
    check_whole("save", -1, pictures=cfg.save.pictures)
    check_switch("save", **{key: cfg.save[key] for key in cfg.save if key != "pictures"})
    check_switch("", overwrite=cfg.get("overwrite", False))
    check_choice("", (None, "synthetic"), objective=cfg.get("objective"))
    if cfg.get("sweep"):
        check_number("sweep", "(0, inf)", also=(None,), minutes=cfg.sweep.minutes)
        check_whole("sweep", 1, also=(None,), threads=cfg.sweep.threads)
        without = cfg.sweep.get("without", [])
        for method in without if OmegaConf.is_list(without) else [without]:
            check_choice("sweep", names("model"), without=method)
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
        str(cfg.model._target_), [cfg.data[key] for key in PREPROCESSING]
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
    category = ("+".join(products_of(cfg)) or str(cfg.data.get("category") or "all")).replace("/", "-")
    place = Path("results/runs") / module_of(cfg.model) / module_of(cfg.data) / category
    stem = f"{cfg.seed}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    names = chain([stem], (f"{stem}-{number}" for number in count(2)))
    return next(place / name for name in names if not (place / name).exists())


def products_of(cfg: DictConfig) -> list[str]:
    """Return the products of a config of several, sorted, empty for one of a single product; InputError for a name that occurs twice."""
    names = cfg.data.get("of") or cfg.data.get("category")
    names = [] if isinstance(names, str | int | None) else sorted(map(str, names))
    if len(set(names)) < len(names):
        raise InputError(f"data.category={names}: expected each product once")
    return names


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
        if place and (name := re.search(r"unexpected keyword argument '(\w+)'", str(error.__cause__))):
            arguments = [f"{place[1]}.{one}" for one in inspect.signature(class_of(part)).parameters]
            raise InputError(unknown(f"{place[1]}.{name[1]}", arguments, class_of(part).__name__)) from error
        raise InputError(f"{place[1] + ': ' if place else ''}{error.__cause__ or error}") from error
