"""Tables hold what runs recorded, pooled over seeds, and nothing else."""

import csv
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from rich.console import Console
from support import CONFIGS, tiny_run

from blemish.edge.errors import InputError
from blemish.report import formats, tables
from blemish.run.record import METRICS
from blemish.run.train import train


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    metrics = [train(tiny_run(tiny, folder / str(seed), f"seed={seed}")) for seed in (0, 1)]
    (folder / "failed").mkdir()
    (folder / "failed" / "record.json").write_text('{"status": "failed"}')
    return folder, metrics


def recorded(folder: Path, method: str, category: str, seed: int, value: float, **metadata) -> None:
    """A folder as a run with this metadata leaves it."""
    folder.mkdir(parents=True)
    config = {"backbone": "resnet18", "weights": "pretrained", "image_size": 256, "crop": 224, "protocol": "paper"}
    setting = {"method": method, "dataset": "mvtec", "category": category, "unit": "image", **config, "seed": seed}
    machine = {"cpu": "Tester 3000", "cores_usable": 4, "packages": {"torch": "9.9"}, "git": None, "gpus": []}
    record = {"status": "finished", **setting, "manifest_digest": "d", "started": f"{seed}", "environment": machine}
    record |= {"peak_memory_mb": {"host": 100 + seed, "gpu": None}, **metadata}
    metrics = {**dict.fromkeys(METRICS, value), "fit_seconds": 10 * seed, "test_seconds": 5}
    (folder / "record.json").write_text(json.dumps(record))
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "config.yaml").write_text(yaml.dump(config))


def change_metrics(folder: Path, **values) -> None:
    metrics = json.loads((folder / "metrics.json").read_text())
    (folder / "metrics.json").write_text(json.dumps(metrics | values))


def contents(path: Path) -> list[dict]:
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.fixture
def several(tmp_path):
    """Two methods: padim on two categories with two seeds, spade on one with one; and four runs that must not count."""
    values = {("padim", "a|b", 0): 0.9, ("padim", "a|b", 1): 0.8, ("padim", "wood", 0): 0.7, ("padim", "wood", 1): 0.7}
    for (method, category, seed), value in {**values, ("spade", "wood", 0): 0.75}.items():
        recorded(tmp_path / f"{method}-{category[0]}-{seed}", method, category, seed, value)
    recorded(tmp_path / "failed", "spade", "a|b", 0, 0.99, status="failed")
    recorded(tmp_path / "running", "spade", "a|b", 1, 0.99, status="running")
    recorded(tmp_path / "torn", "spade", "a|b", 2, 0.99)
    (tmp_path / "torn" / "metrics.json").write_text('{"image_auroc": 0.9')
    recorded(tmp_path / "padim-a-0" / "retest", "spade", "a|b", 3, 0.99)
    return tmp_path


def test_real_runs_make_a_csv_and_the_text_between_the_markers(runs, tmp_path):
    folder, metrics = runs
    rows = tables.collect(folder)
    assert [row["seed"] for row in rows] == [0, 1]
    assert [row["image_auroc"] for row in rows] == [m["image_auroc"] for m in metrics]
    (group,) = tables.pooled(rows)
    assert (group["seeds"], group["runs"]) == ([0, 1], rows)
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- runs: begin -->\nstale\n<!-- runs: end -->\nafter\n")
    assert tables.write(folder, tmp_path / "measured.csv", readme)[0] == 2
    text = readme.read_text()
    assert re.fullmatch(r"before\n.*after\n", text, re.DOTALL)
    assert "stale" not in text
    assert f"{np.mean([m['pixel_auroc'] for m in metrics]):.3f} ±" in text
    assert [float(row["aupro"]) for row in contents(tmp_path / "measured.csv")] == [m["aupro"] for m in metrics]
    readme.write_text("no markers")
    with pytest.raises(InputError, match="runs: begin"):
        tables.write(folder, tmp_path / "measured.csv", readme)


def test_decisions_are_shown_where_a_run_made_some(several, tmp_path):
    (_, without), with_ = tables.write(several, None, None), several / "padim-w-0"
    change_metrics(with_, image_recall=0.75, image_false_alarm_rate=0.05)
    _, (grid,) = tables.write(several, tmp_path / "m.csv", None)
    assert [name for name in grid.columns if name not in without[0].columns] == ["found", "false alarms"]
    assert ["0.750", "0.050"] in [row[grid.columns.index("found") :][:2] for row in tables.write(with_, None, None)[1][0].rows]
    assert {row["image_recall"] for row in contents(tmp_path / "m.csv")} == {"", "0.75"}


def test_a_csv_keeps_the_rows_of_runs_that_are_gone(several, tmp_path):
    output, page = tmp_path / "m.csv", tmp_path / "m.md"
    tables.write(several, output, None)
    before = contents(output)
    shutil.rmtree(several / "padim-w-0")
    recorded(several / "new", "dfm", "wood", 0, 0.6)
    found, grids = tables.write(several, output, None, page)
    assert found == 5
    after = contents(output)
    assert all(row in after for row in before)
    assert [row["method"] for row in after] == ["dfm", *(row["method"] for row in before)]
    assert [row[5] for row in grids[0].rows if row[:2] == ["padim", "mvtec wood"]] == ["0,1"]
    text = output.read_bytes()
    for runs in (several, output):
        tables.write(runs, output, None)
        assert output.read_bytes() == text, "no row twice, and no value other"
    change_metrics(several / "new", aupro=0.1)
    tables.write(several, output, None)
    assert [row["aupro"] for row in contents(output) if row["method"] == "dfm"] == ["0.1"], "what the folder says now counts"


def test_a_csv_is_as_good_as_the_folder(several, tmp_path):
    tables.write(several, tmp_path / "m.csv", None, tmp_path / "runs.md", by="category")
    assert tables.read_rows(tmp_path / "m.csv") == [
        {**row, "folder": None, "git": None} for row in tables.collect(several)
    ]  # without a commit
    tables.write(tmp_path / "m.csv", None, None, tmp_path / "csv.md", by="category")
    assert (tmp_path / "csv.md").read_text() == (tmp_path / "runs.md").read_text()
    pages = tmp_path / "of_runs.md", tmp_path / "of_csv.md"
    for source, page in zip((several, tmp_path / "m.csv"), pages, strict=True):
        page.write_text("<!-- runs: begin -->\n<!-- runs: end -->\n")
        tables.write(source, tmp_path / "n.csv", None, docs=page)
        assert "| padim | mvtec a\\|b |" in page.read_text()
    assert pages[0].read_text() == pages[1].read_text()


def test_the_page_of_a_method_gets_its_own_figures(several, tmp_path):
    page = tmp_path / "padim.md"  # spade has no page
    page.write_text("before\n<!-- runs: begin -->\nstale\n<!-- runs: end -->\nafter\n")
    tables.write(several, tmp_path / "m.csv", None, pages=tmp_path)
    before, head, _, row, after = page.read_text().replace("<!-- runs: begin -->\n", "").replace("<!-- runs: end -->\n", "").splitlines()
    assert (before, after) == ("before", "after")
    assert head == "| settings | px | mvtec a\\|b | mvtec wood |"
    assert row == "| own settings (paper) | 256 → 224 | 0.850 ± 0.071 / 0.850 ± 0.071 | 0.700 ± 0.000 / 0.700 ± 0.000 |"


def test_the_page_of_a_method_tells_backbones_apart(several):
    rows = [row for row in tables.collect(several) if row["method"] == "padim"]
    grid = tables.by_data([*rows, *({**row, "backbone": "a+b"} for row in rows)])
    assert [row[0].partition(", ")[2] for row in grid.rows] == ["a+b (pretrained) (paper)", "resnet18 (pretrained) (paper)"]


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", "\0", "{header}\n{row},one too many\n", "{header}\nx\n", "{header}\n{wrong}\n"])
def test_another_file_is_not_replaced(text, several, tmp_path):
    output = tmp_path / "m.csv"
    tables.write(several, output, None)
    header, row, *_ = output.read_text().splitlines()
    text = text.format(header=header, row=row, wrong=row.replace("0.9", "much"))
    output.write_text(text)
    with pytest.raises(InputError, match=re.escape(str(output))):
        tables.write(several, output, None)
    assert output.read_text() == text


def test_a_readme_needs_the_rows_that_it_has(several, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(text := "<!-- runs: begin -->\nrows\n<!-- runs: end -->")
    with pytest.raises(InputError, match="output="):
        tables.write(several, None, readme)
    assert readme.read_text() == text


@pytest.mark.parametrize("by", ["run", "category"])
@pytest.mark.parametrize("width", [40, 120, 160])
def test_the_terminal_shows_all_of_it(several, by, width):
    recorded(several / "long", "reverse_distillation", "wood", 0, 0.5, epochs=200, variant="a name of many words", aupro=None)
    console = Console(width=width, file=io.StringIO(), highlight=False)
    for grid in tables.write(several, None, None, by=by)[1]:
        formats.show(console, grid, by == "category")
        printed = console.file.getvalue()
        assert "…" not in printed
        assert "reverse_distillation," in printed
        assert "protocol: paper" in " ".join(printed.split()), "what all rows share is printed above"
        assert width < 120 or max(map(len, printed.splitlines())) <= width
        for row in grid.rows:
            for cell in row[grid.words :]:
                assert cell.partition(" ± ")[0] in printed


@pytest.fixture
def efforts(tmp_path):
    """On one category: methods without training, trained in full and cut, each with a worse run before a better one."""
    for name, (method, value, metadata) in {
        "a": ("dfkde", 0.2, {}),
        "b": ("padim", 0.5, {}),
        "c": ("padim", 0.6, {"variant": "recipe"}),
        "d": ("lake", 0.04, {"variant": "cut", "epochs": 4, "steps": 4, "batch": 8}),
        "e": ("vae", 0.3, {"variant": "cut", "epochs": 4, "steps": 4, "batch": 8}),
        "f": ("vae", 0.4, {"epochs": 200, "steps": 2000, "batch": 32}),
        "g": ("riad", 0.1, {"epochs": 300, "steps": 3000, "batch": 1}),
        "u": ("patch_svdd", 0.15, {"variant": "untrained", "epochs": 1, "steps": 1, "batch": 16}),
    }.items():
        recorded(tmp_path / name, method, "wood", 0, value, **metadata)
    change_metrics(tmp_path / "a", pixel_auroc=None, pixel_ap=None, aupro=None)
    return tables.collect(tmp_path)


def test_rows_by_effort_have_the_best_first(efforts):
    names = [[row[0] for row in grid.rows] for grid in tables.by_effort(efforts)]
    assert names == [
        ["padim, recipe", "padim", "dfkde", "patch_svdd, untrained, 1 × 16"],
        ["vae, 2,000 × 32", "riad, 3,000 × 1"],
        ["vae, cut, 4 × 8", "lake, cut, 4 × 8"],
    ]
    assert all(grid.title for grid in tables.by_effort(efforts))


def test_highlights_are_the_best_of_each_data_set(efforts, tmp_path):
    recorded(tmp_path / "h", "spade", "tile", 0, 0.3)
    recorded(tmp_path / "i", "dfkde", "tile", 0, 0.9)
    change_metrics(tmp_path / "i", pixel_auroc=None, pixel_ap=None, aupro=None)
    recorded(tmp_path / "j", "dfkdm", "grid", 0, 0.2)
    change_metrics(tmp_path / "j", pixel_auroc=None, pixel_ap=None, aupro=None)
    grid = tables.highlights(tables.collect(tmp_path))
    assert [row[1] for row in grid.rows] == ["dfkdm", "spade", "padim, recipe"]  # by data set; with a map where any has one
    assert grid.columns == ["data", "method", "backbone", "image auroc", "pixel auroc", "aupro", "fit s"]
    assert grid.rows[2][3:] == ["0.600", "0.600", "0.600", "0"]


SIZES = {"256 → 224": {}, "256 → 224, tiles of 512": {"tiling": 512}, "256 → 224, letterbox, roi": {"resize": "letterbox", "roi": "d"}}
STEPS = {
    "padim": {"epochs": 4},
    "padim, 5,000 × 9": {"epochs": 5, "steps": 5000, "batch": 9},
    "padim, 8 × 2": {"epochs": 6, "steps": 8, "batch": 2},
}


@pytest.mark.parametrize(("column", "settings"), [(2, SIZES), (0, STEPS)])
def test_settings_make_rows_of_their_own(tmp_path, column, settings):
    for number, metadata in enumerate(settings.values()):
        recorded(tmp_path / f"{number}", "padim", "wood", 0, 0.5 + number / 10, **metadata)
    groups = tables.pooled(tables.collect(tmp_path))
    assert {tables.label(group)[column]: group["runs"][0]["aupro"] for group in groups} == dict(zip(settings, (0.5, 0.6, 0.7), strict=True))


def test_nothing_measured_is_an_error(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError, match=f"runs={folder}"):
            tables.collect(folder)


def test_only_finished_runs_count(several, caplog):
    assert len(tables.collect(several)) == 5
    assert "torn: left out" in caplog.text
    assert "0.99" not in formats.markdown(tables.by_category(tables.collect(several), "image_auroc")[0], bold=True)


def test_matrix_of_methods_and_categories(several):
    (grid,) = tables.by_category(tables.collect(several), "aupro")
    assert grid.columns[5:8] == ["a|b", "wood", "mean (categories)"]
    assert [row[0] for row in grid.rows] == ["padim", "spade"]
    per_seed = np.array([[0.9, 0.7], [0.8, 0.7]]).mean(axis=1)
    deviation = np.std([0.9, 0.8], ddof=1)
    assert grid.rows[0][5:8] == [f"0.850 ± {deviation:.3f}", "0.700 ± 0.000", f"{per_seed.mean():.3f} ± {per_seed.std(ddof=1):.3f} (2)"]
    assert grid.rows[1][5:8] == ["–", "0.750", "0.750 (1)"]
    assert grid.rows[0][8:] == ["5", "5", "100"]  # medians of the cost over seeds and categories
    assert grid.best == {(1, 6)}  # alone in a|b, and spade's mean is over fewer categories
    assert "Tester 3000, 4 cores, torch 9.9" in grid.notes[0]
    text = formats.markdown(grid, bold=True)
    assert "| a\\|b |" in text
    assert "**0.750**" in text
    assert {line.replace("\\|", "").count("|") for line in text.splitlines() if line.startswith("|")} == {12}


def test_a_category_without_a_seed_is_said(several):
    shutil.rmtree(several / "padim-w-1")
    (grid,) = tables.by_category(tables.collect(several), "aupro")
    assert grid.rows[0][4:8] == ["0,1 (not everywhere)", f"0.850 ± {np.std([0.9, 0.8], ddof=1):.3f}", "0.700", "0.800 (2)"]


def test_published_figures_stand_below_with_the_difference(several, tmp_path):
    table = {"variant": "v_1", "dataset": "MVTec AD", "data": "mvtec", "metric": "image_auroc", "origin": "paper", "own": True}
    table |= {"source": "Table 1", "backbone": "resnet18", "setting": {"backbone": "resnet18", "crop": None}}
    table |= {"per_category": {"wood": 0.72}, "mean": 0.72}
    (several / "paper").mkdir()
    (several / "paper" / "padim.yaml").write_text(yaml.dump({"paper": "padim", "name": "PaDiM", "method": "padim", "tables": [table]}))
    tables.write(several, tmp_path / "m.csv", None, tmp_path / "m.md", tmp_path / "m.tex", "category", "image_auroc", several / "paper")
    text = (tmp_path / "m.md").read_text()
    assert "| published [1] | resnet18 | – | – | – | – | 0.720 | 0.720 (1) |" in text
    assert "| difference | – | – | – | – | – | −0.020 | −0.020 (1) |" in text
    assert "[1] PaDiM, v_1, Table 1 (paper). Ours: crop 224 for None." in text
    found = [(row["method"], row["category"], row["paper"], row["paper_differs"]) for row in contents(tmp_path / "m.csv")]
    assert ("padim", "wood", "0.72", "crop 224 for None") in found
    assert ("spade", "wood", "", "") in found
    tables.write(several, tmp_path / "m.csv", None, tmp_path / "m.md", None, "run", "image_auroc", several / "paper")
    assert "| 0.720 [1] | −0.020 |" in (tmp_path / "m.md").read_text()
    tables.write(several, tmp_path / "m.csv", None, tmp_path / "m.md", None, "run", "aupro", several / "paper")
    assert "[1]" not in (tmp_path / "m.md").read_text()


@pytest.mark.slow
def test_tool(several, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    tool = [sys.executable, CONFIGS.parent / "tools" / "table.py", f"runs={several}"]

    def printed(*options):
        return subprocess.run([*tool, *options], cwd=tmp_path / "elsewhere", capture_output=True, text=True, check=True).stdout.splitlines()

    lines = printed()
    assert any("padim" in line for line in lines)
    assert lines[-1] == f"5 runs in {several}"
    assert not list((tmp_path / "elsewhere").iterdir()), "nothing is written unasked"
    first, *lines, last = printed("output=m.csv", "by=category", "metric=aupro", "markdown=m.md", "latex=m.tex", "published=results/paper")
    assert last == f"5 runs in {several}, written to m.csv, m.md, m.tex"
    assert "torn: left out" in first
    assert any("published [1]" in line for line in lines)
    page = (tmp_path / "elsewhere" / "m.md").read_text()
    assert "| published [1] | resnet18 | 256 -> crop 224 | – | – | – | 0.903 |" in page  # R18-Rd100, wood
    assert "PaDiM, R18-Rd100, Defard et al. 2020" in page
    assert r"\textbf{0.750}" in (tmp_path / "elsewhere" / "m.tex").read_text()


def test_wrong_choices_name_the_right_ones(several, tmp_path):
    with pytest.raises(InputError, match="by=method: expected run or category"):
        tables.write(several, tmp_path / "m.csv", None, by="method")
    with pytest.raises(InputError, match="metric=auroc: expected .*image_auroc"):
        tables.write(several, tmp_path / "m.csv", None, metric="auroc")


def test_by_run_marks_the_best_on_the_same_data(several):
    grid = tables.by_run(tables.collect(several), "image_auroc")
    assert grid.best == {(1, column) for column in range(6, 12)}  # spade on wood, where padim is as well, and worse
    assert "**" not in formats.markdown(grid, bold=False)


NASTY = "[a&b] 50% $x$ #1 _u_ {c} ~t ^h \\n <i> |p| ± → – −"


def test_latex_is_escaped_and_whole():
    grid = formats.Grid(NASTY, ["m_1", "100%"], 1, [[NASTY, "1"], ["b", "2"]], {(1, 1)}, ["note & more", "second"])
    text = formats.latex(grid)
    for name in ("table", "tabular"):
        assert text.count(rf"\begin{{{name}}}") == text.count(rf"\end{{{name}}}") == 1
    assert r"\begin{tabular}{lr}" in text
    assert [text.count(rule) for rule in (r"\toprule", r"\midrule", r"\bottomrule")] == [1, 1, 1]
    assert r"\textbf{2}" in text
    assert r"note \& more" in text
    assert "[1] second" in text
    body = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert [len(re.findall(r"(?<!\\)&", line)) for line in body] == [1, 1, 1]
    bare = formats.in_latex(NASTY)
    for sign in "&%$#_{}":
        assert f"\\{sign}" in bare
    # nothing that LaTeX reads as a command is left but what was put there
    assert not re.search(r"(?<!\\)[%#_&]", bare)
    assert bare.isascii()
    assert not set("<>|") & set(bare)
    depth = np.cumsum([{"{": 1, "}": -1}.get(sign, 0) for sign in re.sub(r"\\[{}]", "", text)])
    assert depth.min() >= 0
    assert depth[-1] == 0


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="no pdflatex")
def test_latex_compiles(several, tmp_path):
    grid = tables.by_category(tables.collect(several), "aupro")[0]._replace(title=NASTY)
    page = "\\documentclass{article}\\usepackage{booktabs,graphicx}\\begin{document}\n" + formats.latex(grid) + "\\end{document}\n"
    (tmp_path / "t.tex").write_text(page)
    subprocess.run(["pdflatex", "-halt-on-error", "-interaction=nonstopmode", "t.tex"], cwd=tmp_path, check=True, capture_output=True)


def test_markdown_cells_stay_in_their_column():
    assert formats.in_markdown("a|b <i>*x*</i>\nnext `c`") == "a\\|b &lt;i>\\*x\\*&lt;/i> next \\`c\\`"
    assert formats.in_markdown("wide_resnet50_2 (256 → 224)") == "wide_resnet50_2 (256 → 224)"


def test_cells():
    assert [tables.spread(values) for values in ([0.5], [0.4, 0.6], [0.4, None], [])] == ["0.500", "0.500 ± 0.141", "–", "–"]
    assert [tables.signed(value) for value in (0.0123, -0.0123, -0.0001)] == ["+0.012", "−0.012", "+0.000"]
