"""The yaml files of configs/ read as text, for help and errors that do not wait for Hydra: their names, groups, keys and comments."""

import argparse
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from blemish.edge.checks import nearest
from blemish.edge.errors import InputError

LINE = re.compile(r"(?P<indent> *)(?P<key>[\w.]+):(?: +(?P<value>[^# ].*?))??(?: +# *(?P<comment>.*))?")
DEFAULT = re.compile(r" *- (?P<override>override )?/?(?P<group>[\w/]+)(?:: *(?P<choice>\S+))?(?: +#.*)?")


class File(NamedTuple):
    """A yaml file: its head comment, {key: (value, comment)}, the files it is based on, and the choices it makes in groups."""

    about: str
    keys: dict[str, tuple[str, str]]
    bases: list[str]
    choices: dict[str, str | None]


def configs() -> Path:
    """Return the folder of the yaml files: inside an installed package, beside src/ in a checkout."""
    inside = Path(__file__).parents[1] / "configs"
    return inside if inside.is_dir() else Path(__file__).parents[3] / "configs"


def names(group: str) -> list[str]:
    """Return the choices of a config group, for instance all methods for `model`."""
    return sorted(path.stem for path in (configs() / group).glob("*.yaml"))


def no_choice(group: str, name: str, choices: Sequence[str]) -> str:
    where = "not installed, or misspelt" if group.startswith("hydra/") else f"no such file of configs/{group}"
    return f"{group}={name}: {where}; {nearest(name, choices)}choose {', '.join(choices)}"


def read(name: str) -> File:
    """Return what the file configs/NAME.yaml says, without Hydra's own settings."""
    text = (configs() / f"{name}.yaml").read_text(encoding="utf-8")
    package = [] if "# @package _global_" in text else name.split("/")[:-1]
    about, keys, bases, choices, place = [], {}, [], {}, [(-1, part) for part in package]
    for line in text.splitlines():
        comment = line.strip().removeprefix("#").strip()
        if line.startswith("#") and not (keys or place[len(package) :]):
            about += [comment] * (not comment.startswith("@package"))
        elif line.lstrip().startswith("#"):
            if line.startswith(" ") and keys:  # goes on
                last = next(reversed(keys))
                keys[last] = (keys[last][0], f"{keys[last][1]} {comment}")
        elif place and place[-1][1] == "defaults" and (found := DEFAULT.fullmatch(line)):
            if found["choice"]:
                choices[found["group"]] = None if found["choice"] == "null" else found["choice"].strip('"')
            elif found["group"] != "_self_":
                bases.append(found["group"])
        elif found := LINE.fullmatch(line):
            while place[len(package) :] and place[-1][0] >= len(found["indent"]):
                place.pop()
            place.append((len(found["indent"]), found["key"]))
            key = ".".join(part for _, part in place)
            if found["key"] == "defaults":
                bases += [f"{'/'.join(package)}/{one}" for one in re.findall(r"\w+", found["value"] or "")]
            elif found["key"] != "_target_" and place[len(package)][1] != "hydra" and (found["value"] or found["comment"]):
                keys[key] = (found["value"] or "", found["comment"] or "")
    return File(" ".join(about), keys, bases, {group: one for group, one in choices.items() if not group.startswith("hydra/")})


def groups(config: str) -> dict[str, str | None]:
    """Return the choice in each group of a command's config."""
    file = read(config)
    return {group: choice for base in file.bases for group, choice in groups(base).items()} | file.choices


def composed_keys(files: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Return the keys of files of which later ones win, each with its last value and comment."""
    keys = {}
    for name in files:
        file = read(name)
        for key, (value, comment) in (composed_keys(file.bases) | file.keys).items():
            keys[key] = (value, comment or keys.get(key, ("", ""))[1])
    return keys


def sections(config: str, overrides: Sequence[str]) -> dict[str, dict[str, tuple[str, str]]]:
    """Return the keys of a command, {"": those of its own, group: those of the choice there}, for the choices made by overrides."""
    choices = groups(config)
    typed = {group: choice for group, _, choice in (text.lstrip("+").partition("=") for text in overrides) if group in choices}
    for group, choice in typed.items():
        if choice not in (*names(group), "null", ""):
            raise InputError(no_choice(group, choice, names(group)))
    chosen = {group: choice for group, choice in (choices | typed).items() if choice not in (None, "null", "")}
    for group, choice in list(chosen.items()):
        chosen |= read(f"{group}/{choice}").choices | {group: typed[group] for group in typed if group in chosen}
    keys = composed_keys([config, *(f"{group}/{chosen[group]}" for group in choices if group in chosen)])
    found = {"": {group: (chosen.get(group, "null"), " | ".join(names(group))) for group in choices}} | {group: {} for group in choices}
    for key, row in keys.items():
        group = key.partition(".")[0]
        found[group if group in choices else ""][key] = row
    return found


def page(command: str, about: str, config: str, overrides: Sequence[str]) -> str:
    """Return the help of a command: every key with its default and the comment in its file."""
    more = "-m runs one job for each of several values, KEY=A,B; --cfg job prints the config; --hydra-help lists Hydra's own options."
    parser = argparse.ArgumentParser(usage=f"{command} [KEY=VALUE …]", description=about, epilog=more, add_help=False)
    parser.formatter_class = lambda prog: argparse.HelpFormatter(prog, max_help_position=30)
    for group, keys in sections(config, overrides).items():
        rows = parser.add_argument_group(group or "keys")
        for key, (value, comment) in keys.items():
            rows.add_argument(f"{key}={value}", help=comment.replace("%", "%%"))
    return parser.format_help()
