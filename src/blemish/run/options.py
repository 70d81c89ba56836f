"""The config of a method from the keyword options of `AnomalyDetector`."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from omegaconf import DictConfig

from blemish.data.arrays import window_of
from blemish.edge.checks import check_switch, nearest
from blemish.edge.errors import InputError
from blemish.features.weights import BUNDLED
from blemish.run.config import class_of, composed
from blemish.run.help import names

SETTINGS = ("backbone", "weights", "image_size", "crop", "resize", "tiling", "overlap", "batch_size", "epoch_size")
SETTINGS += ("workers", "seed", "alpha", "calibrate")  # keys of train.yaml
PLACES = {"epochs": "trainer.max_epochs", "calibration": "data.calibration", "progress": "trainer.enable_progress_bar"}
OTHERS = ("recipe", "value_range", "device", *PLACES)


def configured(method: str, options: Mapping[str, Any]) -> DictConfig:
    """Compose the config of a method from its recipe, or with recipe=False the paper's, and options; InputError for unknown ones."""
    if method not in names("model"):
        raise InputError(f"method={method!r}: {near(method, names('model'))}")
    check_switch("", recipe=options.get("recipe", True))
    recipe = method if options.get("recipe", True) and method in names("recipe") else "bundled"
    recipe = "null" if recipe == "bundled" and options.keys() & {"backbone", "weights"} else recipe
    cfg = composed(f"model={method}", "logger=none", "data=folder", f"recipe={recipe}")
    allowed = [*SETTINGS, *OTHERS, *(name for name in cfg.model if name not in ("_target_", *SETTINGS))]
    if unknown := [name for name in options if name not in allowed]:
        raise InputError(f"{unknown[0]}: no option of {method}; {near(unknown[0], allowed)}")
    values = {name: plain(name, value) for name, value in options.items()}
    if "backbone" in values and "weights" not in values:
        several = [values["backbone"]] if isinstance(values["backbone"], str) else values["backbone"]
        values["weights"] = "bundled" if set(several) <= set(BUNDLED) else "pretrained"
    if not class_of(cfg.model).needs_fit:
        cfg.image_size, cfg.batch_size = None, 1  # only a fit needs images of one size
    for name, value in values.items():
        if name in PLACES or name not in OTHERS:
            group, _, key = PLACES.get(name, f".{name}" if name in SETTINGS else f"model.{name}").rpartition(".")
            (cfg[group] if group else cfg)[key] = value
    cfg.data.root, cfg.data.window = ".", {dtype: list(ends) for dtype, ends in window_of(values.get("value_range")).items()}
    return cfg


def plain(name: str, value: Any) -> Any:
    """Return the value of an option as a config holds it; InputError for what could be more than a value."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, list | tuple):
        return [plain(name, item) for item in value]
    if isinstance(value, Mapping) and not any(str(key).startswith("_") for key in value):
        return {plain(name, key): plain(name, item) for key, item in value.items()}
    if value is None or isinstance(value, bool | int | float) or (isinstance(value, str) and "${" not in value):
        return value
    raise InputError(f"{name}={value!r}: expected a number, a text, None, or a list or dict of these")


def near(name: str, allowed: Sequence[str]) -> str:
    return f"{nearest(name, allowed)}Allowed: {', '.join(allowed)}"
