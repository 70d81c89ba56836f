"""One detector for several products: each as if it were alone, one threshold for each, and images of none of them."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from support import tiny_run

from blemish.api import AnomalyDetector
from blemish.data.manifest import read_manifest
from blemish.edge.errors import InputError
from blemish.files import read_json
from blemish.products import Gallery
from blemish.run.checkpoint import load
from blemish.run.config import composed
from blemish.run.predict import predict
from blemish.run.record import read_record
from blemish.run.terminal import decisions
from blemish.run.train import train

PADIM = ["model=padim", "model.n_features=20", "alpha=0.2"]
CHANGES = {
    "brick": lambda pixels: pixels,
    "dark": lambda pixels: pixels // 4,
    "wave": lambda pixels: pixels // 8 * 3 + np.arange(64) % 8 * 18,
}


@pytest.fixture(scope="module")
def several(tiny, tmp_path_factory):
    """`tiny` as three products that differ in brightness and texture, each in a folder."""
    root = tmp_path_factory.mktemp("several")
    for name, change in CHANGES.items():
        shutil.copytree(tiny, root / name)
        for path in (root / name).glob("*/*.png"):
            if path.parent.name != "masks":
                Image.fromarray(change(np.array(Image.open(path))).astype(np.uint8)).save(path)
    return root


@pytest.fixture(scope="module")
def run(several, tmp_path_factory):
    """A run of all three."""
    folder = tmp_path_factory.mktemp("run") / "three"
    train(tiny_run(several, folder, *PADIM, "data.category=[wave,brick,dark]"))
    return folder


def test_each_product_is_as_if_it_were_alone(several, run, tmp_path):
    metrics, model = read_json(run / "metrics.json"), load(run, "cpu")[1]
    assert model.names == ["brick", "dark", "wave"] and metrics["images"] == 36
    name, found = "dark", metrics["products"]["dark"]
    alone = train(tiny_run(several, tmp_path / name, *PADIM, f"data.category={name}"))
    own = load(tmp_path / name, "cpu")[1].state_dict()
    for key, value in model.part(name).state_dict().items():
        assert torch.equal(value, own[key]), key
    for key in ("image_auroc", "pixel_auroc", "image_recall", "image_false_alarm_rate"):
        assert found[key] == pytest.approx(alone[key])
    assert read_record(run)["calibration"]["products"][name]["value"] == read_record(tmp_path / name)["calibration"]["value"]
    assert all(one["recognised"] == 1 for one in metrics["products"].values())
    assert metrics["image_auroc"] == pytest.approx(np.mean([one["image_auroc"] for one in metrics["products"].values()]))


def test_tables_name_the_product(run):
    rows = list(csv.DictReader((run / "scores.csv").read_text().splitlines()))
    assert {row["true_product"] for row in rows} == {row["product"] for row in rows} == set(CHANGES)
    assert len({row["threshold"] for row in rows}) == 3 and all(float(row["product_p_value"]) <= 1 for row in rows)
    assert {sample.product for sample in read_manifest(run / "manifest.csv")} == set(CHANGES)
    record = read_record(run)
    assert record["category"] == "brick+dark+wave"
    lines = decisions(read_json(run / "metrics.json"), record["calibration"])
    assert any(line.startswith("dark: found") for line in lines) and any("recognised 12 of 12" in line for line in lines)


def test_a_removed_product_leaves_nothing_and_an_added_one_is_as_from_the_start(several, run, tmp_path):
    train(tiny_run(several, tmp_path / "two", *PADIM, "data.category=[brick,wave]"))
    for name, options in (("removed", [f"update='{run}'", "data.category=[brick,wave]"]), ("added", [f"update='{tmp_path / 'two'}'"])):
        options += ["data.category=[brick,dark,wave]"] * (name == "added")
        train(tiny_run(several, tmp_path / name, *PADIM[2:], "data=folder", *options))
    for name, other in (("removed", tmp_path / "two"), ("added", run)):
        found, expected = (load(place, "cpu")[1].state_dict() for place in (tmp_path / name, other))
        assert found.keys() == expected.keys()
        assert all(torch.equal(value, expected[key]) for key, value in found.items())
        assert (tmp_path / name / "scores.csv").read_text() == (other / "scores.csv").read_text()


def test_predictions_name_the_product_or_none(several, run, tmp_path):
    (tmp_path / "new").mkdir()
    for name in CHANGES:
        shutil.copy(several / name / "square" / "000.png", tmp_path / "new" / f"{name}.png")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    Image.fromarray(noise).save(tmp_path / "new" / "zebra.png")
    cfg = [f"run='{run}'", f"input='{tmp_path / 'new'}'", f"output='{tmp_path / 'out'}'", "device=cpu"]
    found = predict(composed(*cfg, config="predict"))
    lines = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [line["product"] for line in lines[:3]] == list(CHANGES) and all(line["decision"] for line in lines[:3])
    assert lines[3]["unknown_product"] and lines[3]["product_p_value"] == pytest.approx(1 / 25)
    assert len({line["threshold"] for line in lines[:3]}) == 3
    assert any(line.startswith("unknown product:") for line in found.summary)
    rows = list(csv.DictReader((tmp_path / "out" / "scores.csv").read_text().splitlines()))
    assert [row["product"] for row in rows[:3]] == list(CHANGES)
    predict(composed(*cfg[:2], f"output='{tmp_path / 'fdr'}'", "device=cpu", "fdr=0.4", config="predict"))
    chosen = [json.loads(line) for line in (tmp_path / "fdr" / "results.jsonl").read_text().splitlines()]
    assert [line["decision"] for line in chosen] == [line["adjusted"] <= 0.4 for line in chosen]
    with pytest.raises(InputError, match="monitor=on"):
        predict(composed(*cfg[:2], f"output='{tmp_path / 'm'}'", "device=cpu", "monitor=on", config="predict"))
    with pytest.raises(InputError, match="threshold"):
        predict(composed(*cfg[:2], f"output='{tmp_path / 'm'}'", "device=cpu", "threshold=3", config="predict"))


def test_from_python(several, tmp_path):
    detector = AnomalyDetector("padim", backbone="test_resnet", weights="random", image_size=64, n_features=20, alpha=0.2, device="cpu")
    detector.train({name: several / name / "normal" for name in ("dark", "brick")})
    before = {key: value.clone() for key, value in detector.model.state_dict().items()}
    detector.add("wave", several / "wave" / "normal")
    results = detector.predict([several / name / "square" / "001.png" for name in CHANGES])
    assert [one.product for one in results] == list(CHANGES) and results[0].to_dict()["product"] == "brick"
    assert [one.threshold for one in results] == [detector.thresholds[name].value for name in CHANGES]
    detector.save(tmp_path / "three.ckpt")
    again = AnomalyDetector.load(tmp_path / "three.ckpt", device="cpu")
    assert again.products == ["brick", "dark", "wave"] and again.predict(several / "dark" / "square" / "001.png").product == "dark"
    assert len(again.certificate(again.predict(several / "dark" / "square"))) > 0
    with pytest.raises(InputError, match="one at a time"):
        again.certificate(results)
    again.remove("wave")
    after = again.model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(value, after[key]) for key, value in before.items())
    with pytest.raises(InputError, match="thresholds"):
        again.threshold  # noqa: B018


@pytest.mark.parametrize(("options", "says"), [
    (["model=padim", "tiling=32", "overlap=8"], "tiling=32"),
    (["model=vae"], "VAE"),
])  # fmt: skip
def test_what_tells_no_products_apart_is_refused(options, says, several, tmp_path):
    with pytest.raises(InputError, match=says):
        train(tiny_run(several, tmp_path / "run", *options, "data.category=[brick,dark]"))


def test_products_of_several_data_sets(several, tmp_path):
    folders = "data.normal_test=normal_test data.abnormal=[square] data.masks=masks data.calibration=0.2"
    of = ", ".join(f"{name}: 'data=folder data.root={several / name} {folders}'" for name in ("brick", "dark"))
    options = [option for option in tiny_run_options(several, tmp_path / "run") if not option.startswith("data")]
    metrics = train(composed(*options, *PADIM, "data=products", f"data.of={{{of}}}"))
    assert metrics["recognised"] == 1 and read_record(tmp_path / "run")["category"] == "brick+dark"
    assert load(tmp_path / "run", "cpu")[1].names == ["brick", "dark"]


def tiny_run_options(root, run_dir):
    from support import tiny_overrides

    return [*tiny_overrides(root), f"run_dir='{run_dir}'"]


def test_the_p_value_of_a_known_product_is_valid():
    """P(p ≤ α) ≤ α over draws of the gallery and one more image, and below α only by the steps of 1 / (n + 1)."""
    generator, n, alpha = torch.Generator().manual_seed(0), 19, 0.1
    found = []
    for _ in range(1500):
        rows, gallery = torch.randn(n + 1, 6, generator=generator), Gallery()
        gallery.fit(rows[:n])
        found.append(float(gallery.compare(rows[n:])[1]) <= alpha)
    assert 0.05 < np.mean(found) < alpha + 2.6 * (alpha * (1 - alpha) / 1500) ** 0.5
