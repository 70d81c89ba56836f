"""The docs agree with the project: links, commands, settings and figures, and the example of a new method."""

import inspect
import re
import shlex
import shutil
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Sweep
from support import CONFIGS, bricks, fitted

from blemish.report.tables import pooled, read_rows, spread, write

ROOT = CONFIGS.parent
DOCS = ROOT / "docs"
MEASURED = ROOT / "results" / "measured.csv"
PAGES = sorted([ROOT / "README.md", *DOCS.rglob("*.md")])
METHODS = sorted(path.stem for path in (CONFIGS / "model").glob("*.yaml"))
OF_A_METHOD = ["Picture", "How it works", "When to choose it", "Differences from the paper", "Settings", "Run"]
IN_THE_EXAMPLE = {"zscore"}  # the method that docs/adding_a_method.md makes


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@cache
def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str = r"\w*") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@cache
def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ +(.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: Path) -> list[str]:
    """The targets of a page's links and pictures inside the project."""
    found = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", prose(page)))
    return [link for link in found if not re.match(r"[a-z]+:", link)]


def rows(text: str) -> list[list[str]]:
    """The cells of all table lines except the rules below headings."""
    lines = [line.strip() for line in text.splitlines() if line.startswith("|") and not re.fullmatch(r"[|\s:-]+", line)]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def section(page: Path, title: str) -> str:
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)[1]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links(page):
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name(page)}: {link} leads nowhere"
        assert target.is_relative_to(ROOT), f"{name(page)}: {link} leads out of the project"
        assert not anchor or anchor in anchors(target), f"{name(page)}: {link}, but there is only {sorted(anchors(target))}"


def test_the_indexes_have_every_page():
    listed = {(DOCS / link.partition("#")[0]).resolve() for link in links(DOCS / "index.md")}
    assert set(DOCS.rglob("*.md")) - {DOCS / "index.md"} <= listed
    of_methods = {(DOCS / "methods" / link.partition("#")[0]).resolve() for link in links(DOCS / "methods" / "index.md")}
    assert {DOCS / "methods" / f"{method}.md" for method in METHODS} <= of_methods


@pytest.mark.parametrize("method", METHODS)
def test_a_page_of_a_method(method):
    page = DOCS / "methods" / f"{method}.md"
    assert re.findall(r"^## (.+)$", prose(page), re.MULTILINE) == OF_A_METHOD
    (picture,) = blocks(page, "mermaid")
    node = r'\w+(\["[^";]+"\])?'  # a quoted label can hold nearly anything
    assert all(re.fullmatch(rf"flowchart LR|  {node}( --> {node})*", line) for line in picture.splitlines())
    assert "$$" in prose(page)
    commands = list(map(shlex.split, command_lines(page)))
    assert any(f"model={method}" in parts for parts in commands)
    assert f"src/blemish/methods/{method}.py" in prose(page)
    for group, option in (("recipe", f"recipe={method}"), ("paper", f"paper={method}")):
        assert any(option in parts for parts in commands) == (CONFIGS / group / f"{method}.yaml").is_file()
    published = ROOT / "results" / "paper" / f"{method}.yaml"
    assert (f"../../results/paper/{method}.yaml" in links(page)) == published.is_file()


@pytest.mark.parametrize("method", METHODS)
def test_the_settings_of_a_method(method):
    recipe = yaml.safe_load((CONFIGS / "model" / f"{method}.yaml").read_text(encoding="utf-8"))
    listed = {cells[0].strip("`"): cells[1].strip("`") for cells in rows(section(DOCS / "methods" / f"{method}.md", "Settings"))[1:]}
    for key, default in listed.items():
        value = recipe
        for part in key.split("."):
            assert part in value, f"{key}: not in configs/model/{method}.yaml"
            value = value[part]
        assert yaml.safe_load(default) == value, f"{key}: {default} listed, {value} in the yaml"
    own = {f"model.{key}" for key, value in recipe["model"].items() if not str(value).startswith("${") and key != "_target_"}
    assert own <= listed.keys()


def command_lines(page: Path) -> Iterator[str]:
    """The calls of tools in a page's code blocks and text, without comments, continued lines joined."""
    for block in blocks(page):
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith("python tools/"):
                yield re.sub(r"\s#\s.*|\s#$", "", line)
    yield from re.findall(r"`(python tools/[^`]+)`", prose(page))


@cache
def one_of(override: str) -> str | None:
    """The override with the first value of a sweep; None for a range, a Hydra option, or a placeholder."""
    if re.fullmatch(r"…|--?\w+|\[.*\]|[\w.]+=…", override):
        return None
    parsed = OverridesParser.create().parse_override(override.replace("…", "x"))
    if not parsed.is_sweep_override():
        return override.replace("…", "x")
    value = parsed.value()
    if not isinstance(value, Sweep) or not hasattr(value, "list"):
        return None
    return f"{parsed.input_line.partition('=')[0]}={value.list[0]}"


COMMANDS = sorted({(command, name(page)) for page in PAGES for command in command_lines(page)})


def test_commands_are_found():
    assert len(COMMANDS) > 60


@pytest.mark.parametrize("tool", sorted({command.split()[1] for command, _ in COMMANDS} - {"tools/X.py"}))
def test_commands_compose(tool):
    assert (ROOT / tool).is_file()
    config = Path(tool).stem
    together = defaultdict(dict)  # the commands on a method's page choose the same groups, so one composition takes the overrides of all
    for command, page in COMMANDS:
        parts = shlex.split(command)[2:]
        if command.split()[1] != tool or any(f"model={method}" in parts for method in IN_THE_EXAMPLE):
            continue
        if config == "data":
            assert parts.pop(0) in ("check", "synthesize"), f"{page}: {command}"
        key = (page, "" if page.startswith("docs/methods/") else command)
        together[key] |= {override.partition("=")[0]: override for override in map(one_of, parts) if override}
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        for (page, command), overrides in together.items():
            try:
                compose(config, list(overrides.values()))
            except Exception as error:
                raise AssertionError(f"{page}: {command}\n{error}") from error


def test_the_tables_are_what_was_measured(tmp_path):
    pages = [ROOT / "README.md", DOCS / "results.md", *(DOCS / "methods").glob("*.md")]
    copies = [Path(shutil.copy(page, tmp_path)) for page in pages]
    write(MEASURED, tmp_path / "m.csv", copies[0], docs=copies[1], pages=tmp_path)
    for page, copy in zip(pages, copies, strict=True):
        assert copy.read_bytes() == page.read_bytes(), f"{name(page)}: python tools/table.py makes another table"


def test_the_readme_fits_on_a_screen():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 85
    pictures = [ROOT / link for link in links(ROOT / "README.md") if link.startswith("docs/images/")]
    assert len(pictures) == 1
    assert pictures[0].stat().st_size <= 300_000


def test_the_figures_of_the_index():
    table = rows(section(DOCS / "methods" / "index.md", "The table"))
    assert table[0][-2:] == ["screw, own settings", "screw, recipe"]
    figures = defaultdict(set)  # (method, whether it is a recipe) → image and pixel AUROC as printed, mean over the seeds
    for group in pooled(row for row in read_rows(MEASURED) if row["category"] == "screw"):
        means = (spread([run[key] for run in group["runs"]]).partition(" ")[0] for key in ("image_auroc", "pixel_auroc"))
        figures[group["method"], group["variant"] is not None].add(tuple(means))
    for cells in table[1:]:
        method = re.match(r"\[`(\w+)`\]", cells[0])[1]
        for recipe, cell in enumerate(cells[-2:]):
            if cell != "–":
                assert tuple(cell.split(" / ")) in figures[method, bool(recipe)], f"{method}: {cell}"


@pytest.mark.filterwarnings("ignore:.*`self.log")
def test_the_example_of_a_method_works():
    page = DOCS / "adding_a_method.md"
    (code,), (recipe,) = blocks(page, "python"), blocks(page, "yaml")
    target = yaml.safe_load(recipe)["model"]
    place = target.pop("_target_").rpartition(".")
    assert place[0].rpartition(".")[2] in IN_THE_EXAMPLE
    space = {"__name__": place[0]}
    exec(compile(code, str(page), "exec"), space)
    arguments = target | {"backbone": "test_resnet", "weights": "random", "seed": 0}
    assert arguments.keys() == inspect.signature(space[place[2]]).parameters.keys()
    model = fitted(space[place[2]](**arguments), bricks(16, seed=1))
    good, bad = bricks(4, seed=2), bricks(4, seed=2)
    bad[:, :, 20:36, 20:36] = 1.0
    assert (model(bad).score > model(good).score).all()
    assert (model(bad).map[:, 24:32, 24:32].mean((1, 2)) > model(good).map[:, 24:32, 24:32].mean((1, 2))).all()
