"""Published figures: the files hold what their sources print, a run finds the right one, and a verdict keeps to its rule."""

import statistics
from collections import Counter

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from support import CONFIGS

from blemish.data.mvtec import CATEGORIES, OBJECTS, TEXTURES
from blemish.edge.errors import InputError
from blemish.report import published as papers
from blemish.report.published import ABOVE, AS_PUBLISHED, BELOW, Figure, differences, published, read, verdict

FOLDER = CONFIGS.parent / "results" / "paper"
COUNTS = {
    "autoencoder": 4, "cavga": 1, "cflow": 14, "dfkde": 5, "dfm": 12, "dfr": 2, "differnet": 2, "ganomaly": 5, "nearest_neighbour": 1,
    "padim": 38, "patch_svdd": 3, "patchcore": 107, "reverse_distillation": 31, "riad": 3, "spade": 16, "stfpm": 22,
    "uninformed_students": 1, "vae": 4,
}  # fmt: skip
FROM_PAPER = {"dataset": "mvtec", "metric": "image_auroc", "origin": "paper", "own": True, "source": "x", "data": "mvtec", "method": "m"}


@pytest.fixture(scope="module")
def tables():
    return read(FOLDER)


def unit(*values: float) -> float:
    """The last place that these values are printed to."""
    return 10.0 ** -max(len(f"{value:.6f}".rstrip("0").partition(".")[2]) for value in values)


def test_no_table_is_lost(tables):
    assert Counter(table["paper"] for table in tables) == COUNTS
    assert sum(COUNTS.values()) == 271
    assert sum("per_category" in table for table in tables) == 154


def test_figures_are_shares_of_known_categories(tables):
    for table in tables:
        cells = table.get("per_category", {})
        values = [*cells.values(), *(table[key] for key in table if "mean" in key)]
        assert set(cells) <= set(CATEGORIES), table["source"]
        assert values, table["source"]
        assert all(isinstance(value, float) and 0 <= value <= 1 for value in values), table["source"]


def test_means_follow_from_the_cells_or_the_table_says_that_they_do_not(tables):
    wrong = []
    for table in tables:
        cells = table.get("per_category")
        if not cells:
            assert "mean_computed" not in table
            assert "mean" in table
            continue
        mean = statistics.mean(cells.values())
        assert table["mean_computed"] == pytest.approx(mean, abs=5.1e-5)
        # each cell is off by at most half its last place, the mean by half of its own
        within = unit(*cells.values()) / 2 + max(unit(*cells.values()), unit(table.get("mean", 0.001))) / 2 + 1e-9
        if "mean" in table and abs(table["mean"] - mean) > within:
            wrong.append(table["variant"])
            assert any("does not follow from the printed cells" in text for text in table["contradictions"])
        for key, part in (("textures_mean", TEXTURES), ("objects_mean", OBJECTS)):
            if key in table:
                assert table[key] == pytest.approx(statistics.mean(cells[name] for name in part), abs=0.011)
    assert len(wrong) == 2


def test_settings_are_keys_of_the_methods_recipe(tables):
    ours_have_none = {"model.encoder", "model.patch", "data.unit"}
    for table in tables:
        recipe = table["method"] and CONFIGS / "model" / f"{table['method']}.yaml"
        if recipe:
            config = yaml.safe_load(recipe.read_text())
            for key in table.get("setting", {}):
                first, *rest = key.split(".")
                assert key in ours_have_none or (rest[0] in config[first] if rest else first in config), (table["source"], key)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (None, "no"),
        ("a: [", "p.yaml"),
        ({"origin": "rumour"}, r"p.yaml: tables\[0\].origin=rumour"),
        ({"metric": "auroc"}, r"p.yaml: tables\[0\].metric=auroc"),
        ({"source": None}, r"p.yaml: tables\[0\]: source"),
    ],
)
def test_malformed_files_are_named(tmp_path, text, named):
    if isinstance(text, dict):
        text = yaml.dump({"paper": "p", "name": "P", "tables": [{**FROM_PAPER, "variant": "v", **text}]})
    if text:
        (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(InputError, match=named):
        read(tmp_path)


def test_the_papers_own_figure_goes_before_a_nearer_setting_of_others():
    config = {"backbone": "b", "image_size": 256}
    run = {"method": "m", "dataset": "mvtec", "category": "screw", "config": config}
    own = {**FROM_PAPER, "setting": {"backbone": "a"}, "per_category": {"screw": 0.9}, "mean": 0.95}
    near = {**FROM_PAPER, "own": False, "origin": "reimplementation", "setting": config, "per_category": {"screw": 0.8, "wood": 0.7}}
    assert published([near, own], run, "image_auroc").value == 0.9
    assert published([near, own], {**run, "category": "wood"}, "image_auroc").value == 0.7  # which the paper does not print
    assert published([near, own], {**run, "category": None}, "image_auroc").value == 0.95
    assert published([near, own], run, "aupro") is None
    assert published([near, own], {**run, "method": "n"}, "image_auroc") is None
    assert published([near, own], {**run, "dataset": "mtd"}, "image_auroc") is None
    other = {**own, "setting": config, "per_category": {"screw": 0.91}}
    assert published([own, other], run, "image_auroc").value == 0.91  # of two of its own the one of this setting
    vague = {**near, "setting": {"backbone": "a"}, "per_category": {"screw": 0.1}}
    exact = {**near, "setting": {"backbone": "a", "image_size": 256}}
    assert published([vague, exact], run, "image_auroc").value == 0.8  # saying little is no advantage


def test_real_tables_are_found(tables):
    config = {"backbone": "wide_resnet50_2.tv_in1k", "weights": "pretrained", "image_size": 256, "crop": 224, "protocol": "paper"}
    run = {"method": "patchcore", "dataset": "mvtec", "category": "screw"}
    for ratio, value in ((0.25, 0.981), (0.1, 0.97), (0.01, 0.964)):
        model = {"coreset_ratio": ratio, "stages": [2, 3]}
        figure = published(tables, {**run, "config": {**config, "model": model}}, "image_auroc")
        assert (figure.value, figure.differs) == (value, [])
    bundled = {**config, "backbone": "tf_efficientnet_lite0", "crop": None, "model": model}
    assert published(tables, {**run, "config": bundled}, "image_auroc").differs == [
        "backbone tf_efficientnet_lite0 for wide_resnet50_2.tv_in1k",
        "crop None for 224",
    ]
    assert published(tables, {"method": "patchcore", "dataset": "mtd", "category": None, "config": config}, "image_auroc").value == 0.979


def test_differences():
    config = {"backbone": "resnet18.a1_in1k", "weights": "pretrained", "image_size": 256, "model": {"stages": [1, 2]}, "protocol": "paper"}
    assert differences(config, {"backbone": "resnet18", "image_size": 256, "model.stages": [1, 2]}, "screw") == []
    assert differences(config, {"backbone": "resnet18.tv_in1k"}, "screw") == ["backbone resnet18.a1_in1k for resnet18.tv_in1k"]
    assert differences(config, {"model.stages": [2, 3], "model.absent.deeper": 1}, None) == [
        "stages [1, 2] for [2, 3]",
        "deeper None for 1",
    ]
    assert differences(config, {"image_size": {"screw": 512, "cable": 256}}, "screw") == ["image_size 256 for 512"]
    assert differences(config, {"image_size": {"screw": 512, "cable": 256}}, "cable") == []
    assert differences(config, {"image_size": {"screw": 512}}, None) == []
    assert differences(config, {"trainer.max_epochs": 3, "batch_size": 8}, None) == ["max_epochs, batch_size not recorded"]
    assert differences(config, None, None) == [papers.UNSTATED]
    assert differences({**config, "weights": "random"}, {"backbone": "resnet18"}, None) == ["weights random for trained ones"]
    assert differences({**config, "protocol": "clean"}, {"image_size": 256}, None) == ["protocol clean, which trains on fewer images"]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=5), st.floats(0, 1), st.floats(0.001, 0.1))
def test_verdict_keeps_to_its_rule(ours, paper, tolerance):
    figure = Figure(paper, {}, [])
    error = np.std(ours, ddof=1) / np.sqrt(len(ours)) if len(ours) > 1 else 0.0
    assert papers.margin(ours, tolerance) == pytest.approx(tolerance + 2 * error)
    gap, within = np.mean(ours) - paper, tolerance + 2 * error
    if abs(abs(gap) - within) > 1e-8:
        assert verdict(ours, figure, tolerance) == (AS_PUBLISHED if abs(gap) < within else ABOVE if gap > 0 else BELOW)
    assert verdict(ours, figure._replace(differs=["crop None for 224"]), tolerance) == papers.OTHER_SETTING
    assert verdict(ours, None, tolerance) == papers.NOTHING
    # the edge of the tolerance counts as published
    assert verdict([0.97], Figure(0.98, {}, []), 0.01) == AS_PUBLISHED
    assert verdict([0.9699], Figure(0.98, {}, []), 0.01) == BELOW
