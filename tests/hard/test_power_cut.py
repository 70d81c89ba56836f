"""Power cuts: fifty kills in the middle of runs with store and checkpoints, after which the next run gives the same numbers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

METHODS = {
    "padim": [20, ["model.n_features=20"]],
    "autoencoder": [15, ["trainer.max_epochs=3", "model.latent=16"]],  # the store has its images
    "stfpm": [15, ["trainer.max_epochs=3"]],
}


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork, which is how the runs to be killed are made")
def test_the_run_after_a_power_cut_gives_the_same_numbers(tiny, tmp_path):
    script = Path(__file__).with_name("power_cut.py")
    command = [sys.executable, str(script), str(tiny), str(tmp_path), json.dumps(METHODS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    kinds = {kind: sum(one[kind] for one in told.values()) for kind in ("moment", "write", "resumed")}
    assert kinds["moment"] + kinds["write"] >= 50
    assert min(kinds.values()) > 3, "at moments of the clock, while files were written, and in trainings that were resumed"
