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

METHODS = methods_of(OnePassDetector)


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("gloo")
    options = {"env": {**os.environ, "OMP_NUM_THREADS": "1"}, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    worker = [sys.executable, str(Path(__file__).with_name("distributed_worker.py"))]
    processes = [subprocess.Popen([*worker, str(rank), "2", str(folder), *METHODS], **options) for rank in (0, 1)]
    errors = [process.communicate(timeout=600)[1] for process in processes]
    assert all(process.returncode == 0 for process in processes), errors
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.parametrize("name", METHODS)
def test_two_processes_fit_what_one_fits(name, together):
    assert together[0][name] == pytest.approx(together[1][name], rel=1e-6)
    # the order in which the two processes' images are put together; self_similarity restores the first one
    order = torch.arange(IMAGES) if name == "self_similarity" else torch.cat([torch.arange(0, IMAGES, 2), torch.arange(1, IMAGES, 2)])
    assert together[0][name] == pytest.approx(scores(name, images(IMAGES, 0)[order]), rel=1e-3)
