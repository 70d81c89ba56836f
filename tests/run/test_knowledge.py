"""sweep=knowledge: its points, and the table and figure that benchmarks/knowledge.py makes of runs."""

import csv
import importlib.util

import pytest
from support import CONFIGS, composed, tiny_run

from blemish.run.config import first_values, plain
from blemish.run.help import names
from blemish.run.record import read_record
from blemish.run.train import train

spec = importlib.util.spec_from_file_location("knowledge", CONFIGS.parent / "benchmarks" / "knowledge.py")
knowledge = importlib.util.module_from_spec(spec)
spec.loader.exec_module(knowledge)


def test_every_point_sets_what_it_is_named_after():
    cfg = composed("sweep=knowledge", hydra=True)
    params = cfg.hydra.sweeper.params
    assert set(params.known.split(",")) == set(cfg.points)
    for known in cfg.points:
        values = plain(composed(*first_values([f"recipe={params.recipe.split(',')[0]}", "sweep=knowledge", f"known={known}"])))
        data = values["data"]
        assert set(values["sweep"]["without"]) <= set(names("model"))
        expected = {"u": "unlabelled"}.get(known[0], "paper")
        assert values["protocol"] == data["protocol"] == expected
        shots, defects, share = data["shots"], data["defects"], data["contamination"]
        assert {"k": (int(known[1:] or 0) if known[0] == "k" else None, 0, 0)}.get(known[0], (shots, defects, share)) == (
            shots,
            defects,
            share,
        )
        if known[0] in "dc":
            assert (defects, round(100 * share)) == {"d": (int(known[1:]), 0), "c": (0, int(known[1:]))}[known[0]]


@pytest.mark.parametrize(
    ("protocol", "text", "known"),
    [
        ("unlabelled", None, "unlabelled"),
        ("paper", None, "all"),
        ("paper", "4 shots", "4"),
        ("paper", "10 defects", "+10"),
        ("clean", "0.05 contaminated", "5 %"),
        ("paper", "4 shots, 1 defects", "4 shots, 1 defects"),
    ],
)
def test_a_point_by_its_record(protocol, text, known):
    assert knowledge.known_of({"protocol": protocol, "knowledge": text}) == known


def test_runs_become_rows_and_curves(tiny, tmp_path):
    for seed in (0, 1):
        train(tiny_run(tiny, tmp_path / f"runs/{seed}", "model=subspace", "data.shots=2", "protocol=paper", f"seed={seed}"))
    rows = knowledge.rows_of([tmp_path / "runs"])
    assert [(row["method"], row["known"], row["seeds"]) for row in rows] == [("subspace", "2", 2)]
    assert rows[0]["image_auroc_min"] <= rows[0]["image_auroc_mean"] <= 1
    knowledge.draw(rows, tmp_path / "figure.svg")
    assert "subspace" in (tmp_path / "figure.svg").read_text()
    knowledge.write([{**rows[0], "known": "all"}, {**rows[0], "image_auroc_mean": 0.0}], tmp_path / "rows.csv")
    every = knowledge.write(rows, tmp_path / "rows.csv")
    assert [(row["known"], row["image_auroc_mean"] == rows[0]["image_auroc_mean"]) for row in every] == [("2", True), ("all", True)]
    with (tmp_path / "rows.csv").open() as file:
        assert [row["known"] for row in csv.DictReader(file)] == ["2", "all"]
    assert f"| {every[0]['dataset']} | `subspace` | – | – | {every[0]['image_auroc_mean']:.3f} |" in knowledge.table(every, knowledge.KNOWN)


@pytest.mark.slow
@pytest.mark.parametrize("method", names("model"))
def test_every_method_takes_few_images_defects_and_contamination(method, tiny, tmp_path):
    known = ("data.shots=12", "data.defects=1", "data.contamination=0.2")
    train(tiny_run(tiny, tmp_path / "run", f"model={method}", *known))
    record = read_record(tmp_path / "run")
    assert record["knowledge"] == "12 shots, 1 defects, 0.2 contaminated"
    with (tmp_path / "run" / "manifest.csv").open() as file:
        rows = [(row["split"], row["label"]) for row in csv.DictReader(file)]
    counts = {key: rows.count(key) for key in (("train", "-1"), ("defects", "1"), ("test", "1"), ("skipped", "0"))}
    assert list(counts.values()) == [3, 1, 2, 12]
