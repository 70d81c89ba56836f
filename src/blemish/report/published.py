"""Published figures beside measured ones: which table a run compares with, in what its setting differs, a verdict by a stated tolerance."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from blemish.edge.errors import InputError

# where a table was read: in the paper, in a work that quotes it, in the authors' repository, in somebody else's measurement
ORIGINS = ("paper", "paper_via_secondary", "official_code", "reimplementation")
METRICS = ("image_auroc", "pixel_auroc", "aupro", "f1")
FILE = {"paper": str, "name": str, "tables": list}
TABLE = {"variant": str, "dataset": str, "metric": str, "origin": str, "own": bool, "source": str}
UNSTATED = "the source states no setting"
AS_PUBLISHED, ABOVE, BELOW, OTHER_SETTING, NOTHING = "as published", "above", "below", "not the paper's setting", "no published figure"


class Figure(NamedTuple):
    """A published figure, the table it stands in, and what a run has otherwise than that table."""

    value: float
    table: Mapping
    differs: list[str]


def read(folder: str | Path) -> list[dict]:
    """Every table of the yaml files in a folder, with its file's `paper`, `name` and `method`; InputError names what is malformed.

    A relative folder is looked for here, then inside the installed package, then in the checkout that it runs from.
    """
    roots = (Path(), Path(__file__).parents[1], Path(__file__).parents[3])
    paths = next((found for root in roots if (found := sorted((root / folder).glob("*.yaml")))), [])
    if not paths:
        raise InputError(f"published={folder}: no *.yaml there; expected a folder of published tables, one file a paper")
    return [table for path in paths for table in read_file(path)]


def read_file(path: Path) -> list[dict]:
    try:
        page = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path}: not a yaml file ({error})") from error
    _check(path, page, FILE)
    for i, table in enumerate(page["tables"]):
        _check(f"{path}: tables[{i}]", table, TABLE)
        for key, choices in (("origin", ORIGINS), ("metric", METRICS)):
            if table[key] not in choices:
                raise InputError(f"{path}: tables[{i}].{key}={table[key]}: expected one of {', '.join(choices)}")
    return [{**{key: page.get(key) for key in ("paper", "name", "method")}, **table} for table in page["tables"]]


def _check(place: Any, found: Any, wanted: Mapping[str, type]) -> None:
    for key, kind in wanted.items():
        if not isinstance(found, Mapping) or not isinstance(found.get(key), kind):
            raise InputError(f"{place}: {key} is missing or no {kind.__name__}")


def value_of(table: Mapping, category: str | None) -> float | None:
    """What a table prints for a category, or as its mean for None."""
    return table.get("mean") if category is None else table.get("per_category", {}).get(category)


def published(tables: Iterable[Mapping], run: Mapping, metric: str) -> Figure | None:
    """The figure that a run compares with, None if there is none.

    run: `method`, `dataset`, `category` (None for the mean) and `config`, the run's config. Of the tables that print the metric for that
    category the method's own paper goes before those that quote it, these before other people's measurements; then the nearest setting:
    the one with the fewest differences after what agrees is taken off, so that saying little is no advantage.
    """

    def rank(figure: Figure) -> tuple:
        table, setting = figure.table, figure.table.get("setting", {})
        measured_by_others = table["origin"] == "reimplementation"
        return not table["own"], measured_by_others, not setting, 2 * len(figure.differs) - len(setting), ORIGINS.index(table["origin"])

    found = []
    for table in tables:
        value = value_of(table, run["category"])
        if value is not None and (table.get("method"), table.get("data"), table["metric"]) == (run["method"], run["dataset"], metric):
            found.append(Figure(value, table, differences(run["config"], table.get("setting"), run["category"])))
    return min(found, key=rank, default=None)


def differences(config: Mapping, setting: Mapping | None, category: str | None) -> list[str]:
    """What a run's config has otherwise than a table's setting, {dotted key: value or {category: value}}, as short texts."""
    if not setting:
        return [UNSTATED]
    texts, unknown = [], []
    chosen = {key: value.get(category) if isinstance(value, Mapping) else value for key, value in setting.items()}
    for key, wanted in chosen.items():
        if isinstance(setting[key], Mapping) and category is None:
            continue
        if key.partition(".")[0] not in config:
            unknown.append(key.rpartition(".")[2])
            continue
        have = looked_up(config, key)
        # a name without its tag says the architecture and not which training
        same = str(have).partition(".")[0] == wanted if key == "backbone" and "." not in str(wanted) else have == wanted
        if not same:
            texts.append(f"{key.rpartition('.')[2]} {have} for {wanted}")
    if unknown:
        texts.append(f"{', '.join(unknown)} not recorded")
    if "backbone" in setting and config.get("weights") == "random":
        texts.append("weights random for trained ones")
    if config.get("protocol", "paper") != "paper":
        texts.append(f"protocol {config['protocol']}, which trains on fewer images")
    return texts


def looked_up(config: Mapping, key: str) -> Any:
    """The value at a dotted key, None where there is none."""
    value: Any = config
    for name in key.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def margin(ours: Sequence[float], tolerance: float) -> float:
    """tolerance + 2 standard errors of the mean of `ours` over the seeds, which one seed alone does not give."""
    return tolerance + (2 * statistics.stdev(ours) / math.sqrt(len(ours)) if len(ours) > 1 else 0)


def verdict(ours: Sequence[float], figure: Figure | None, tolerance: float) -> str:
    """How our mean over the seeds stands to a published figure; a judgement only where the setting is the table's."""
    if figure is None:
        return NOTHING
    if figure.differs:
        return OTHER_SETTING
    gap = statistics.mean(ours) - figure.value
    if abs(gap) <= margin(ours, tolerance) + 1e-9:  # the figures are decimal, their difference is not
        return AS_PUBLISHED
    return ABOVE if gap > 0 else BELOW
