"""Damaged image files by the thousand: each is an image or an error that names it; no crash, no hang, no warning, bounded memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("resource", reason="memory is measured by getrusage")


@pytest.mark.slow
def test_thousands_of_damaged_files(tmp_path):
    command = [sys.executable, "-X", "faulthandler", str(Path(__file__).with_name("fuzz.py")), str(tmp_path), "4000", "0"]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout)
    assert sum(told["ends"].values()) == 4000
    assert min(told["ends"].get(end, 0) for end in ("image", "error")) > 400, "neither all refused nor all accepted"
    assert told["slowest"][0] < 60
    assert told["mb"] < 1500, f"{told['mb']} MB for files of a few kB"
