"""The quick tests in Python's development mode, where every warning is an error, unclosed files among them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
QUICK = [
    "ops",
    "data/test_images.py",
    "data/test_samples.py",
    "data/test_folder.py",
    "data/test_module.py",
    "records/test_record.py",
    "test_rooms.py",
]


@pytest.mark.slow
def test_no_warning_of_ours():
    command = [sys.executable, "-X", "dev", "-W", "error", "-m", "pytest", "-p", "no:cacheprovider", *[f"tests/{name}" for name in QUICK]]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "BLEMISH_"))}
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    assert "Exception ignored" not in done.stderr
