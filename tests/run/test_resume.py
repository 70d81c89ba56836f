"""A training that was killed goes on to the weights of one that was not; one that diverges says so."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support import composed, tiny_overrides, tiny_run

from blemish.edge.errors import InputError
from blemish.run.checkpoint import load
from blemish.run.train import train

ROOT = Path(__file__).parents[2]
# gradient descent on images, on stored maps with a schedule, and with two optimisers
METHODS = {
    "autoencoder": ["model.learning_rate=0.002", "epoch_size=19"],  # neither all images nor full batches
    "cflow": ["model.stages=[1,2]", "model.blocks=2"],
    "ganomaly": ["model.channels=4"],
}
DEVICES = ["cpu", pytest.param("gpu", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))]


def overrides(tiny: Path, run_dir: Path, method: str, device: str) -> list[str]:
    # on a GPU cuDNN's quickest algorithms add in an order of their own
    exact = ["+trainer.deterministic=true"] if device == "gpu" else []
    options = [f"trainer={device}", "trainer.enable_progress_bar=false", *exact, "trainer.max_epochs=8", f"run_dir='{run_dir}'"]
    return [*tiny_overrides(tiny), f"model={method}", *METHODS[method], *options]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "model.ckpt", weights_only=True)["state_dict"]


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", METHODS)
def test_a_killed_training_resumes_to_the_same_weights(method, device, tiny, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(composed(*overrides(tiny, whole, method, device)))
    command = [sys.executable, str(ROOT / "tools" / "train.py"), *overrides(tiny, cut, method, device)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}  # sums are rounded alike then
    for _ in range(5):  # on a busy machine the training may end before it is killed
        shutil.rmtree(cut, ignore_errors=True)
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.time() + 300
        while not (cut / "last.ckpt").exists() and process.poll() is None and time.time() < deadline:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        epochs = torch.load(cut / "last.ckpt", weights_only=True)["epoch"] + 1 if (cut / "last.ckpt").exists() else 0
        if 1 <= epochs < 8:
            break
    assert 1 <= epochs < 8
    assert not (cut / "model.ckpt").exists()
    cfg = composed(f"resume='{cut}'")
    train(cfg)
    assert cfg.run_dir == str(cut)  # what the tool prints
    assert not (cut / "last.ckpt").exists()
    expected, found = weights(whole), weights(cut)
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    names = ("image_auroc", "image_ap", "image_f1_max")
    first, second = (json.loads((run / "metrics.json").read_text()) for run in (whole, cut))
    assert [first[name] for name in names] == [second[name] for name in names]


def test_a_finished_run_and_a_missing_one_are_refused(tiny, tmp_path):
    cfg = tiny_run(tiny, tmp_path / "run", "model=autoencoder", "trainer.max_epochs=1")
    train(cfg)
    for folder, words in ((tmp_path / "run", "is finished"), (tmp_path / "none", "no config.yaml there")):
        with pytest.raises(InputError, match=words):
            train(tiny_run(tiny, tmp_path / "other", "model=autoencoder", f"resume='{folder}'"))


@pytest.mark.parametrize("method", ["autoencoder", "ganomaly"])
def test_a_loss_that_is_no_number_stops_the_run(method, tiny, tmp_path):
    cfg = tiny_run(tiny, tmp_path / "run", f"model={method}", "model.learning_rate=1e30", "trainer.max_epochs=3")
    with pytest.raises(InputError, match=r"epoch \d, step \d.*model\.learning_rate") as error:
        train(cfg)
    assert json.loads((tmp_path / "run" / "record.json").read_text())["status"] == "failed"
    assert not (tmp_path / "run" / "model.ckpt").exists()
    advice = re.findall(r"[a-z_.]+=[\w-]+", str(error.value))  # can be followed as it stands
    assert len(advice) == 2
    train(tiny_run(tiny, tmp_path / "again", f"model={method}", "model.learning_rate=1e-5", *advice))


def test_clipping_that_a_method_does_itself_is_refused_elsewhere(tiny, tmp_path):
    with pytest.raises(InputError, match=r"trainer\.gradient_clip_val=0\.5.*model\.clip"):
        train(tiny_run(tiny, tmp_path / "run", "model=ganomaly", "trainer.gradient_clip_val=0.5"))


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_precision_and_clipping_by_config(precision, tiny, tmp_path):
    options = [f"trainer.precision={precision}", "trainer.gradient_clip_val=0.5", "trainer.max_epochs=2"]
    metrics = train(tiny_run(tiny, tmp_path / "run", "model=autoencoder", *options))
    assert metrics["image_auroc"] is not None
    with torch.inference_mode():
        assert load(tmp_path / "run", "cpu")[1](torch.rand(1, 3, 64, 64)).score.isfinite().all()
