"""Published figures: the tables in results/paper, the one that a run compares with, how its setting differs, and a verdict."""

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from blemish.edge.checks import check_choice
from blemish.edge.errors import InputError

# where a table was read: in the paper, in a work that quotes it, in the authors' repository, in somebody else's measurement
ORIGINS = ("paper", "paper_via_secondary", "official_code", "reimplementation")
METRICS = ("image_auroc", "pixel_auroc", "aupro", "f1")
FILE = {"paper": str, "name": str, "tables": list}
TABLE = {"variant": str, "dataset": str, "metric": str, "origin": str, "own": bool, "source": str}
ROOTS = (Path(), Path(__file__).parents[1], Path(__file__).parents[3])  # working directory, installed package, checkout
DIFFERENCES = "## Differences from the paper"  # heading in a method's page
UNSTATED = "the source states no setting"
AS_PUBLISHED, ABOVE, BELOW, OTHER_SETTING, NOTHING = "as published", "above", "below", "not the paper's setting", "no published figure"


class Figure(NamedTuple):
    """A published figure, its table, and the differences of a run's setting from that of the table."""

    value: float
    table: Mapping
    differs: list[str]

    @property
    def source(self) -> str:
        return "{name}, {variant}, {source} ({origin})".format_map(self.table)

    @property
    def note(self) -> str:
        return f"{self.source}. Ours: {'; '.join(self.differs) or 'the same setting'}."


def read(folder: str | Path) -> list[dict]:
    """All tables of the yaml files in a folder, each with its file's `paper`, `name` and `method`; InputError names what is malformed.

    A relative folder is looked up in the working directory, then in the installed package, then in the checkout.
    """
    paths = next((found for root in ROOTS if (found := sorted((root / folder).glob("*.yaml")))), [])
    if not paths:
        raise InputError(f"published={folder}: no *.yaml there; expected a folder with a yaml file for each paper")
    return [table for path in paths for table in read_file(path)]


def read_file(path: Path) -> list[dict]:
    try:
        page = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path}: not a yaml file ({error})") from error
    _check(f"{path}", page, FILE)
    for i, table in enumerate(page["tables"]):
        place = f"{path}: tables[{i}]"
        _check(place, table, TABLE)
        check_choice(place, ORIGINS, origin=table["origin"])
        check_choice(place, METRICS, metric=table["metric"])
    return [{**{key: page.get(key) for key in ("paper", "name", "method")}, **table} for table in page["tables"]]


def _check(place: str, found: Any, wanted: Mapping[str, type]) -> None:
    for key, kind in wanted.items():
        if not isinstance(found, Mapping) or not isinstance(found.get(key), kind):
            raise InputError(f"{place}: {key} is missing or no {kind.__name__}")


def published(tables: Iterable[Mapping], run: Mapping, metric: str) -> Figure | None:
    """The figure that a run compares with, None if there is none.

    run: `method`, `dataset`, `category` (None for the mean) and `config`, the run's config. Of the tables with this metric and category,
    the method's own paper comes before works that quote it, and these before other people's measurements; then comes the nearest setting:
    the fewest differences, less the number of settings that the table states, so that stating little is no advantage.
    """

    def rank(figure: Figure) -> tuple:
        table, setting = figure.table, figure.table.get("setting", {})
        measured_by_others = table["origin"] == "reimplementation"
        return not table["own"], measured_by_others, not setting, 2 * len(figure.differs) - len(setting), ORIGINS.index(table["origin"])

    category, found = run["category"], []
    for table in tables:
        value = table.get("mean") if category is None else table.get("per_category", {}).get(category)
        if value is not None and (table.get("method"), table.get("data"), table["metric"]) == (run["method"], run["dataset"], metric):
            found.append(Figure(value, table, differences(run["config"], table.get("setting"), category)))
    return min(found, key=rank, default=None)


def differences(config: Mapping, setting: Mapping | None, category: str | None) -> list[str]:
    """The differences of a run's config from a table's setting, {dotted key: value or {category: value}}, as short texts."""
    if not setting:
        return [UNSTATED]
    compared = list(settings_compared(config, setting, category))
    texts = [f"{key.rpartition('.')[2]} {have} for {wanted}" for key, wanted, have, same in compared if same is False]
    if unknown := [key.rpartition(".")[2] for key, _, _, same in compared if same is None]:
        texts.append(f"{', '.join(unknown)} not recorded")
    if "backbone" in setting and config.get("weights") == "random":
        texts.append("weights random for trained ones")
    if config.get("protocol", "paper") != "paper":
        texts.append(f"protocol {config['protocol']}, which trains on fewer images")
    return texts


def known_differences(method: str) -> list[list[str]]:
    """The table of differences from the paper in a method's page, docs/methods/METHOD.md: its rows, the first of them the heading."""
    pages = (root / "docs" / "methods" / f"{method}.md" for root in ROOTS)
    text = next((page.read_text(encoding="utf-8") for page in pages if page.is_file()), "")
    lines = text.partition(DIFFERENCES)[2].partition("\n## ")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines if line.startswith("|")]
    return [row for row in rows if not set("".join(row)) <= set("-:| ")]


def settings_compared(config: Mapping, setting: Mapping, category: str | None) -> Iterator[tuple[str, Any, Any, bool | None]]:
    """Yield (key, the table's value, the config's, whether they are the same; None where the config does not record it)."""
    for key, wanted in setting.items():
        if isinstance(wanted, Mapping):
            if category is None:
                continue
            wanted = wanted.get(category)
        have, recorded = looked_up(config, key), key.partition(".")[0] in config
        # the name of a backbone without a tag states the architecture but not the weights
        untagged = key == "backbone" and "." not in str(wanted)
        yield key, wanted, have, (str(have).partition(".")[0] == wanted if untagged else have == wanted) if recorded else None


def looked_up(config: Mapping, key: str) -> Any:
    """The value at a dotted key, None where there is none."""
    value: Any = config
    for name in key.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def margin(ours: Sequence[float], tolerance: float) -> float:
    """tolerance + 2 standard errors of the mean of `ours` over the seeds; a single seed has no standard error."""
    return tolerance + (2 * statistics.stdev(ours) / math.sqrt(len(ours)) if len(ours) > 1 else 0)


def verdict(ours: Sequence[float], figure: Figure | None, tolerance: float) -> str:
    """Our mean over the seeds compared with a published figure; judged only where the setting is the table's."""
    if figure is None:
        return NOTHING
    if figure.differs:
        return OTHER_SETTING
    gap = statistics.mean(ours) - figure.value
    if abs(gap) <= margin(ours, tolerance) + 1e-9:  # decimal figures have inexact differences
        return AS_PUBLISHED
    return ABOVE if gap > 0 else BELOW
