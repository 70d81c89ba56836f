"""trainer=ddp as a user starts it: two processes give what one gives."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import CONFIGS, DRAWN, composed, quick, tiny_overrides, tiny_run

from blemish.data.samplers import ShardedBatchSampler, Shuffled
from blemish.edge.errors import InputError
from blemish.run.test import test as retest
from blemish.run.train import train

# one of each base: nothing to fit, one pass, and training, here without randomness of its own; 24 images, of which 6 are held out
METHODS = {
    "noise_residual": ["model.neighbors=4", "model.scales=1", "model.mode=calibrated"],
    "padim": [],
    "autoencoder": ["trainer.max_epochs=2", "model.learning_rate=0.001", "batch_size=9", "epoch_size=32"],
}

ONE = ["+change.trainer.devices=1", "+change.trainer.strategy=auto"]
needs_processes = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")


def train_in_two(folder: Path, tiny: Path, *options: str) -> str:
    """What a training in two processes prints."""
    two = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.enable_progress_bar=false", f"run_dir='{folder}'"]
    command = [sys.executable, str(CONFIGS.parent / "tools" / "train.py"), *tiny_overrides(tiny), *two, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return done.stdout


def scores(folder: Path) -> dict[str, tuple[float, ...]]:
    with (folder / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {row["path"]: (float(row["score"]), float(row["threshold"]), float(row["p_value"])) for row in rows}


@pytest.mark.slow
@needs_processes
@pytest.mark.parametrize("name", METHODS)
def test_two_processes_give_what_one_gives(name, tiny, tmp_path):
    options = [f"model={name}", *METHODS[name], *DRAWN]
    train(tiny_run(tiny, tmp_path / "one", *options))
    place = tmp_path / "two processes"
    assert train_in_two(place, tiny, *options).count("run folder") == 1
    one, two = scores(tmp_path / "one"), scores(place)
    assert list(one) == list(two)
    for key in one:
        assert two[key] == pytest.approx(one[key], rel=2e-4)
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in (tmp_path / "one", place)]
    for figure in ("image_auroc", "pixel_auroc", "aupro", "images", "image_false_alarm_rate"):
        assert metrics[0][figure] == pytest.approx(metrics[1][figure], abs=2e-3), figure
    assert {path.name for path in place.iterdir()} == {path.name for path in (tmp_path / "one").iterdir()}


@pytest.mark.slow
@needs_processes
@pytest.mark.parametrize("name", ["cflow", "ganomaly", "stfpm"])
def test_the_processes_have_one_model(name, tiny, tmp_path):
    """Also with steps of a part of the parameters, several backward passes, and BatchNorm, the saved model gives both processes' scores."""
    steps = [option for option in quick(name) if not option.startswith("trainer.max_epochs")]
    train_in_two(tmp_path / "run", tiny, f"model={name}", *steps, "trainer.max_epochs=2", "batch_size=7")
    again = composed(f"run='{tmp_path / 'run'}'", f"output='{tmp_path / 'again'}'", "device=cpu", *ONE, config="test")
    retest(again)
    expected, found = scores(tmp_path / "run"), scores(tmp_path / "again")
    assert list(found) == list(expected)
    for key in expected:
        assert found[key] == pytest.approx(expected[key], rel=2e-4)


@pytest.mark.parametrize(("count", "size", "processes"), [(10, 4, 2), (9, 4, 2), (9, 4, 3), (4, 4, 4), (101, 8, 3)])
def test_every_image_goes_to_one_process(count, size, processes):
    samplers = [Shuffled(count, 5) for _ in range(processes)]
    shares = [list(ShardedBatchSampler(sampler, size, i, processes)) for i, sampler in enumerate(samplers)]
    assert len({len(share) for share in shares}) == 1, "processes wait for each other at every batch"
    together = [sorted(index for share in shares for index in share[b]) for b in range(len(shares[0]))]
    assert sorted(index for batch in together for index in batch) == list(range(count))
    alone = list(Shuffled(count, 5))
    whole = [sorted(alone[i : i + size]) for i in range(0, count, size)]
    rest = count % size or size
    assert together == (whole if rest >= processes else [*whole[:-2], sorted(whole[-2] + whole[-1])])
    assert [list(share) for share in shares] != [
        list(ShardedBatchSampler(sampler, size, i, processes)) for i, sampler in enumerate(samplers)
    ], "epochs differ"


def test_too_many_processes():
    with pytest.raises(InputError, match=r"trainer\.devices: 3 images in batches of 8 for 4 processes"):
        ShardedBatchSampler(Shuffled(3, 0), 8, 0, 4)
