"""The yaml files of configs/ read as text, for help and errors that do not wait for Hydra: their names, groups, keys and comments."""

import argparse
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import yaml

from blemish.edge.checks import nearest
from blemish.edge.errors import InputError

COMMENT = re.compile(r" *#(.*(?:\n +#.*)*)")  # behind a value, and on lines of its own below


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
    """Return the choices of a config group, for instance all methods for `model`; `_NAME.yaml` is the base of others.

    Those of a group's folders come last, as FOLDER/NAME.
    """
    found = [path.relative_to(configs() / group).with_suffix("").as_posix() for path in (configs() / group).rglob("[!_]*.yaml")]
    return sorted(found, key=lambda name: ("/" in name, name))


def no_choice(group: str, name: str, choices: Sequence[str]) -> str:
    where = "not installed, or misspelt" if group.startswith("hydra/") else f"no such file of configs/{group}"
    return f"{group}={name}: {where}; {nearest(name, choices)}choose {', '.join(choices)}"


@cache
def read(name: str) -> File:
    """Return what the file configs/NAME.yaml says, without Hydra's own settings; a key that ends in a dot has others below it."""
    text = (configs() / f"{name}.yaml").read_text(encoding="utf-8")
    about = [line[1:].strip() for line in takewhile(lambda line: line.startswith("#"), text.splitlines())]
    group = name.rpartition("/")[0]
    bases, choices = [], {}
    for one in (yaml.safe_load(text) or {}).get("defaults", []):
        if isinstance(one, str):
            base = one.partition("@")[0]
            bases += [base.lstrip("/") if base.startswith("/") else f"{group}/{base}".lstrip("/")] * (base != "_self_")
        else:
            choices |= {key.split()[-1].lstrip("/"): choice for key, choice in one.items() if "hydra/" not in key}
    place = "" if "@package _global_" in about or not group else f"{group.partition('/')[0]}."
    keys = dict(commented(yaml.compose(text, yaml.SafeLoader), text, place))
    return File(" ".join(line for line in about if not line.startswith("@package")), keys, bases, choices)


def commented(node: yaml.Node, text: str, place: str) -> Iterator[tuple[str, tuple[str, str]]]:
    """Yield (key, (value, comment)) of everything in a node of a yaml file's text."""
    for key_node, value in node.value:
        key, colon = f"{place}{key_node.value}", key_node.end_mark.index + 1
        below = isinstance(value, yaml.MappingNode) and not value.flow_style
        ends = (colon,) if below else (value.end_mark.index, colon)
        found = next((found[1] for end in ends if (found := COMMENT.match(text, end))), "")
        comment = " ".join(found.replace("#", " ").split())
        if key_node.value in ("defaults", "hydra", "_target_"):
            continue
        if below:
            yield from [(f"{key}.", ("", comment))] if comment else []
            yield from commented(value, text, f"{key}.")
        else:
            shown = value.value if isinstance(value, yaml.ScalarNode) else text[value.start_mark.index : value.end_mark.index]
            yield key, (" ".join(shown.split()), comment)


def groups(config: str) -> dict[str, str | None]:
    """Return the choice in each group of a command's config."""
    file = read(config)
    return {group: choice for base in file.bases for group, choice in groups(base).items()} | file.choices


def composed_keys(files: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Return the keys of files of which later ones win, each with its last value and comment."""
    keys = {}
    for name in files:
        file = read(name)
        for key, (value, comment) in [*composed_keys(file.bases).items(), *file.keys.items()]:
            keys[key] = (value, comment or keys.get(key, ("", ""))[1])
    return keys


def sections(config: str, overrides: Sequence[str]) -> dict[str, dict[str, tuple[str, str]]]:
    """Return the keys of a command by title, those of its own first, then those of the choice in each group, as overrides choose."""
    choices = groups(config)
    typed = {group: choice for group, _, choice in (text.lstrip("+").partition("=") for text in overrides) if group in choices}
    for group, choice in typed.items():
        if choice not in (*names(group), "null", ""):
            raise InputError(no_choice(group, choice, names(group)))
    chosen = choices | typed
    for group, choice in list(chosen.items()):
        if choice not in (None, "null", ""):
            chosen |= read(f"{group}/{choice}").choices | typed
    files = {group: f"{group}/{chosen[group]}" for group in choices if chosen[group] not in (None, "null", "")}
    titles = {group: f"{group}={chosen[group]}: {read(file).about}".rstrip(": ") for group, file in files.items()}
    found = {"keys": {group: (chosen[group] or "null", " | ".join(names(group))) for group in choices}}
    for key, row in composed_keys([config, *files.values()]).items():
        if key not in choices:
            found.setdefault(titles.get(key.partition(".")[0], "keys"), {})[key] = row
    return found


def page(command: str, about: str, config: str, overrides: Sequence[str]) -> str:
    """Return the help of a command: every key with its default and the comment in its file."""
    more = "-m runs a job for each of several values, KEY=A,B; --cfg job prints the config; --hydra-help lists the options of Hydra."
    parser = argparse.ArgumentParser(usage=f"{command} [KEY=VALUE …]", description=about, epilog=more, add_help=False)
    parser.formatter_class = lambda prog: argparse.HelpFormatter(prog, max_help_position=32)
    for title, keys in sections(config, overrides).items():
        title, _, text = title.partition(": ")
        same = [key for key, (value, _) in keys.items() if value == f"${{{key.rpartition('.')[2]}}}"]
        text = f"{text} (Set above: {', '.join(same)}.)" if same else text
        rows = parser.add_argument_group(title, text.replace("%", "%%") or None)
        for key, (value, comment) in keys.items():
            if key not in same:
                needed = "required; " if comment else "required"
                name, text = (f"{key}=", f"{needed}{comment}") if value == "???" else (f"{key}={value}", comment)
                rows.add_argument(f"{key}…" if key.endswith(".") else name, help=text.replace("%", "%%"))
    return parser.format_help()
