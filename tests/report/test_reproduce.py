"""A paper's protocol composes, runs cell by cell, and says what is missing, what differs and what it means."""

import csv
import shlex
import shutil
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import timm
import torch
from omegaconf import OmegaConf
from report.test_tables import change_metrics, recorded
from support import CONFIGS, composed

from blemish.edge.errors import InputError
from blemish.features.extractor import stage_indices
from blemish.report.published import known_differences, published, read
from blemish.report.reproduce import cells_of, commands, missing_weights, reproduce
from blemish.run.config import build, module_of, plain
from blemish.run.train import train

PAPERS = sorted(path.stem for path in (CONFIGS / "paper").glob("*.yaml"))
TABLES = read(CONFIGS.parent / "results" / "paper")


@cache
def paper(name: str):
    return composed(f"paper={name}", config="reproduce")


def test_every_method_with_published_figures_has_a_composition():
    methods = {table["method"] for table in TABLES if table["method"]}
    assert {module_of(paper(name).model) for name in PAPERS} == methods


def test_settings_are_printed_beside_the_published_before_anything_runs(tmp_path, capsys):
    typed = ["categories=[bottle]", "model.epsilon=0.5", f"output={tmp_path}"]
    reproduce(composed("paper=padim", *typed, config="reproduce"), "padim", typed)
    said = capsys.readouterr().out
    assert said.index("model.epsilon     differs") < said.index("missing: ")
    assert "differs, draws of channels: paper: one; here: one" in said


@pytest.mark.parametrize("name", sorted({module_of(paper(name).model) for name in PAPERS}))
def test_the_page_of_a_method_says_what_differs_from_its_paper(name):
    heading, *rows = known_differences(name)
    assert heading[-1] == "here" and len(rows) > 1 and all(len(row) == len(heading) for row in rows)


@pytest.mark.parametrize("name", PAPERS)
def test_composition(name):
    cfg = paper(name)
    assert (CONFIGS.parent / "results" / "paper" / f"{cfg.paper}.yaml").is_file()
    assert cfg.protocol == "paper"
    assert not cfg.save.checkpoint  # forty-five models would fill a disk
    config = plain(cfg)
    assert config["data"]["protocol"] == "paper"
    build(cfg.data)
    # the setting of the table it is compared with, unless the source states none or ours is another network
    screw = {**config, "image_size": cfg.image_sizes.get("screw", cfg.image_size)}
    run = {"method": module_of(cfg.model), "dataset": module_of(cfg.data), "config": screw}
    asked = [(metric, category) for metric in ("pixel_auroc", "image_auroc") for category in ("screw", None)]
    figures = [figure for metric, c in asked if (figure := published(TABLES, {**run, "category": c}, metric))]
    assert figures
    if name == "ganomaly":
        assert all("states no setting" in text for figure in figures for text in figure.differs)
    elif name == "vae":
        assert figures[0].differs == ["encoder None for resnet18"]
    else:
        own = [figure for figure in figures if figure.table["own"]] or figures[:1]
        if name == "padim_resnet18":
            own = [figure for figure in own if figure.table["metric"] == "pixel_auroc"]  # no image AUROC of it was published
        assert [figure.differs for figure in own] == [[]] * len(own)
    # the same through tools/train.py, as the printed commands say it
    sweep = plain(composed(f"+paper={name}", f"image_size={cfg.image_size}"))
    assert all(sweep[key] == config[key] for key in ("model", "backbone", "weights", "image_size", "crop", "protocol"))
    if "backbone" in cfg.model:
        assert timm.is_model(cfg.backbone)
        stages = list(cfg.model.stages)
        if isinstance(stages[0], str):
            with torch.device("meta"):
                assert set(stages) <= {name for name, _ in timm.create_model(cfg.backbone).named_modules()}
        else:
            stage_indices(cfg.backbone, stages)


@pytest.fixture(scope="module")
def mvtec(tiny, tmp_path_factory) -> Path:
    """The tiny images in MVTec AD's layout, as its category screw."""
    root = tmp_path_factory.mktemp("mvtec")
    for old, new in (("normal", "train/good"), ("normal_test", "test/good"), ("square", "test/square"), ("masks", "ground_truth/square")):
        shutil.copytree(tiny / old, root / "screw" / new)
    for mask in sorted((root / "screw" / "ground_truth" / "square").iterdir()):
        mask.rename(mask.with_name(f"{mask.stem}_mask.png"))
    return root


def quick(root: Path, output: Path, *more: str) -> list[str]:
    """Overrides of a reproduction that takes seconds."""
    small = ["backbone=test_resnet", "weights=random", "image_size=64", "crop=null", "trainer=cpu", "trainer.enable_progress_bar=false"]
    small.append("save.curves=false")
    return ["paper=padim_resnet18", "logger=none", *small, f"data.root='{root}'", f"output='{output}'", *more]


def run(typed: list[str], **calls) -> int:
    return reproduce(composed(*typed, config="reproduce"), "padim_resnet18", typed, **{"train": train, **calls})


def finished_run(cfg, **figures) -> None:
    """Leave a finished run of a config with these figures."""
    recorded(Path(cfg.run_dir), "padim", cfg.data.category, cfg.seed, None)
    change_metrics(Path(cfg.run_dir), **figures)
    (Path(cfg.run_dir) / "config.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True))


def lines_of(output: Path) -> dict:
    with (output / "comparison.csv").open() as file:
        return {(row["metric"], row["category"]): row for row in csv.DictReader(file)}


def test_runs_what_can_be_run_and_says_what_is_missing(mvtec, tmp_path, capsys):
    typed = quick(mvtec, tmp_path, "categories=[bottle,screw]", "seeds=[0,1]")
    assert run(typed) == 0
    printed = capsys.readouterr().out
    assert "missing: the images of bottle" in printed
    command = next(line.strip() for line in printed.splitlines() if "tools/train.py" in line)
    again = next(line.strip() for line in printed.splitlines() if "tools/reproduce.py" in line)
    assert shlex.split(command)[:3] == ["python", "tools/train.py", "-m"]
    overrides = shlex.split(command)[3:]
    assert {"+paper=padim_resnet18", "seed=0,1", "data.category=bottle", f"data.root='{mvtec}'"} <= set(overrides)
    first = plain(composed(*(text.split(",")[0] for text in overrides)))
    assert first["run_dir"] == f"{tmp_path}/bottle-s0"
    assert shlex.split(again)[2:] == [*(text for text in typed if not text.startswith("data.root")), f"data.root='{mvtec}'"]
    lines = lines_of(tmp_path)
    row = lines["aupro", "screw"]
    assert row["seeds"] == "0,1"
    assert float(row["paper"]) == 0.913
    assert float(row["difference"]) == pytest.approx(float(row["ours"]) - 0.913)
    assert row["verdict"] == "not the paper's setting"
    assert "backbone test_resnet for resnet18.tv_in1k" in row["differs"]
    assert lines["aupro", "bottle"]["verdict"] == "not run"
    assert lines["aupro", "mean"]["verdict"] == "needs all categories"
    page = (tmp_path / "comparison.md").read_text()
    assert "2 standard errors" in page
    assert "torch" in page.splitlines()[-1]

    # what is finished is not run again
    def never(cfg):
        raise AssertionError

    assert run(typed, train=never) == 0
    assert lines_of(tmp_path)["aupro", "screw"] == row
    # and is not taken for a run of another setting
    with pytest.raises(InputError, match=r"screw-s0: holds a finished run with model=.*output=FOLDER"):
        run([*typed, "model.n_features=20"], train=never)


def test_a_cell_that_fails_does_not_end_the_others(mvtec, tmp_path, capsys):
    asked = []

    def fails_once(cfg):
        asked.append(cfg.seed)
        if cfg.seed == 0:
            raise RuntimeError("out of luck")
        finished_run(cfg, image_auroc=0.5)

    assert run(quick(mvtec, tmp_path, "categories=[screw]", "seeds=[0,1]"), train=fails_once) == 1
    assert asked == [0, 1]
    assert "screw-s0: RuntimeError: out of luck" in capsys.readouterr().out
    assert lines_of(tmp_path)["image_auroc", "screw"]["seeds"] == "1"


def test_verdicts_and_the_mean_over_all_categories(tmp_path, monkeypatch):
    """Cells that have the paper's own figures, scattered over the seeds, but for two categories."""
    monkeypatch.setattr("blemish.report.reproduce.missing_weights", lambda backbone, weights: None)
    (table,) = (t for t in TABLES if t["variant"] == "R18-Rd100" and t["metric"] == "pixel_auroc" and t.get("data") == "mvtec")

    def train(cfg):
        moved = {"tile": 0.05, "wood": -0.05}.get(cfg.data.category, 0) + 0.001 * (cfg.seed - 1)
        finished_run(cfg, pixel_auroc=table["per_category"][cfg.data.category] + moved)

    assert run(["paper=padim_resnet18", f"output='{tmp_path}'"], train=train, scan=lambda c: None) == 0
    lines = lines_of(tmp_path)
    verdicts = {category: row["verdict"] for (metric, category), row in lines.items() if metric == "pixel_auroc"}
    assert (verdicts.pop("tile"), verdicts.pop("wood")) == ("above", "below")
    assert set(verdicts.values()) == {"as published"}
    assert len(verdicts) == 14
    mean = lines["pixel_auroc", "mean"]
    assert mean["seeds"] == "0,1,2"
    assert float(mean["ours"]) == pytest.approx(table["mean_computed"], abs=1e-4)
    assert float(mean["deviation"]) == pytest.approx(0.001)
    assert float(mean["margin"]) == pytest.approx(0.01 + 2 * 0.001 / 3**0.5)
    assert lines["aupro", "mean"]["verdict"] == "needs all categories"  # these cells have none


def test_wrong_words_name_the_right_ones(tmp_path):
    for text, right in (("seed=1", "seeds="), ("data.category=screw", "categories="), ("run_dir=x", "output=")):
        with pytest.raises(InputError, match=right):
            run(["paper=padim_resnet18", f"output='{tmp_path}'", text])
    with pytest.raises(InputError, match="seeds="):
        run(["paper=padim_resnet18", f"output='{tmp_path}'", "seeds=[]"])


def test_sizes_by_category(monkeypatch):
    cfg = composed("paper=cflow", "categories=[screw,cable,transistor]", config="reproduce")
    cells = cells_of(cfg, [], TABLES, Path("out"))
    assert [cell.plain["data"]["image_size"] for cell in cells] == [512, 256, 128]
    monkeypatch.setattr(sys, "argv", ["/usr/bin/blemish", "reproduce"])
    commanded = [shlex.split(command) for command in commands("cflow", [], cells, Path("out"))]
    assert [command[:2] for command in commanded] == [["blemish", "train"]] * 3 + [["blemish", "reproduce"]]
    assert [command[4] for command in commanded[:3]] == ["image_size=512", "image_size=256", "image_size=128"]
    assert {cell.plain["image_size"] for cell in cells_of(cfg, ["image_size=256"], TABLES, Path("out"))} == {256}


def test_weights_that_cannot_be_loaded(monkeypatch, tmp_path):
    def refused(*arguments, **options):
        raise OSError

    assert missing_weights("resnet18", "random") is None
    assert missing_weights("tf_efficientnet_lite0", "bundled") is None
    assert "tf_efficientnet_lite1" in missing_weights("resnet18", "bundled")
    assert "no such file" in missing_weights("resnet18", str(tmp_path / "w.pth"))
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    monkeypatch.setattr(timm, "create_model", refused)
    assert "weights=pretrained: resnet18.tv_in1k" in missing_weights("resnet18.tv_in1k", "pretrained")


@pytest.mark.slow
def test_no_paper_names_the_choices():
    tool = CONFIGS.parent / "tools" / "reproduce.py"
    done = subprocess.run([sys.executable, tool], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert all(name in done.stderr for name in PAPERS)
