"""Tables hold what runs recorded, pooled over seeds, and nothing else."""

import csv

import pytest
from support import tiny_run

from blemish.records.tables import collect, pooled, spread, write
from blemish.run import train
from blemish.types import InputError


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    metrics = [train(tiny_run(tiny, folder / str(seed), f"seed={seed}", "save.pictures=0")) for seed in (0, 1)]
    (folder / "failed").mkdir()
    (folder / "failed" / "record.json").write_text('{"status": "failed"}')
    return folder, metrics


def test_one_row_per_run_and_one_per_setting(runs):
    rows = collect(runs[0])
    assert [row["seed"] for row in rows] == [0, 1]
    assert [row["image_auroc"] for row in rows] == [m["image_auroc"] for m in runs[1]]
    (row,) = pooled(rows)
    assert row["seeds"] == [0, 1]
    assert len(row["runs"]) == 2


def test_writes_csv_and_between_the_markers(runs, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- runs: begin -->\nstale\n<!-- runs: end -->\nafter\n")
    assert write(runs[0], tmp_path / "measured.csv", readme) == 2
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "stale" not in text
    mean = sum(m["pixel_auroc"] for m in runs[1]) / 2
    assert f"{mean:.3f} ±" in text
    with (tmp_path / "measured.csv").open() as file:
        assert [float(row["aupro"]) for row in csv.DictReader(file)] == [m["aupro"] for m in runs[1]]
    readme.write_text("no markers")
    with pytest.raises(InputError, match="runs: begin"):
        write(runs[0], tmp_path / "measured.csv", readme)


def test_nothing_measured_is_an_error(tmp_path):
    with pytest.raises(InputError, match="no finished run"):
        collect(tmp_path)


def test_spread():
    assert spread([0.5]) == "0.500"
    assert spread([0.4, 0.6]) == "0.500 ± 0.141"
    assert spread([0.4, None]) == "–"
