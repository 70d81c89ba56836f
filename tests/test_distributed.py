"""Two processes that see half of the images each fit what one process fits that sees them all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_worker import IMAGES, scores
from support import images, methods_of

from blemish.detector import OnePassDetector

WORKER = Path(__file__).with_name("distributed_worker.py")
METHODS = methods_of(OnePassDetector)


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("gloo")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [[sys.executable, str(WORKER), str(rank), "2", str(folder), *METHODS] for rank in (0, 1)]
    processes = [subprocess.Popen(c, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for c in command]
    errors = [process.communicate(timeout=600)[1] for process in processes]
    assert all(process.returncode == 0 for process in processes), errors
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.parametrize("name", METHODS)
def test_two_processes_fit_what_one_fits(name, together):
    assert together[0][name] == pytest.approx(together[1][name], rel=1e-6)
    order = torch.cat([torch.arange(IMAGES)[0::2], torch.arange(IMAGES)[1::2]])  # as the two processes' images are put together
    if name == "self_similarity":  # puts its rows in the order before the images were dealt out
        order = torch.arange(IMAGES)
    assert together[0][name] == pytest.approx(scores(name, images(IMAGES, 0)[order]), rel=1e-3)
