"""Full disks: the tests of `full_disk.py`, in a mount namespace of their own that goes with its process."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def namespace() -> list[str]:
    """The command before another that lets it mount: as root, else as root of a user namespace of its own; skips where neither goes."""
    if not shutil.which("unshare"):
        pytest.skip("no unshare here, by which a small disk is mounted")
    refused = ""
    for command in (["unshare", "--mount"], ["unshare", "--user", "--map-root-user", "--mount"]):
        trial = [*command, "sh", "-c", "mount -t tmpfs -o size=1m tmpfs /mnt"]
        done = subprocess.run(trial, capture_output=True, text=True)
        if done.returncode == 0:
            return command
        refused = done.stderr.strip()
    pytest.skip(f"no small disk can be mounted here ({refused})")


@pytest.mark.slow
def test_a_full_disk(tmp_path):
    options = ["-p", "no:cacheprovider", f"--rootdir={HERE.parents[1]}", f"--basetemp={tmp_path / 'inner'}", "--show-capture=no"]
    command = [*namespace(), sys.executable, "-m", "pytest", *options, str(HERE / "full_disk.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, cwd=HERE.parents[1])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    assert " passed" in done.stdout
