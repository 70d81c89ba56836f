"""The record of a run: its folder, the machine it ran on, and its life from start to end."""

import contextlib
import importlib.metadata
import json
import logging
import os
import platform
import shlex
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path

import psutil

from blemish.edge.errors import InputError
from blemish.files import CHOOSE, lock, plain, read_json, release, remove_stale, write_json

try:
    import resource
except ImportError:  # Windows
    resource = None

log = logging.getLogger(__name__)

RECORD = "record.json"
STATE = "last.ckpt"  # state of an unfinished training
ROI = "roi.png"  # the one mask of all images
FILES = ("config.yaml", "model.ckpt", STATE, ROI, "metrics.json", "scores.csv", "manifest.csv", "curves.png", "curves.json", RECORD)
FINISHED = "finished"
METRICS = ("image_auroc", "image_ap", "image_f1_max", "pixel_auroc", "pixel_ap", "aupro")  # of metrics.json, shown by tables and pages
PLACE = ("dataset", "category", "unit")  # the fields of SETTING that name the data
# the identity of a run: what tells two rows of a table apart; runs that differ in the seed alone share a row
SETTING = (
    "method",
    "variant",  # a name for settings that are not the method's own, as a recipe gives it
    "epochs",  # None for a method that does not train
    "epoch_size",  # images or tiles per epoch; None for each once
    "dataset",
    "category",
    "unit",  # image, or tile where large images were cut
    "backbone",
    "weights",
    "image_size",
    "crop",
    "tiling",  # side of the tiles that images are cut into, None for full images
    "resize",  # letterbox, None where images are stretched
    "roi",  # digest of the mask or masks
    "protocol",
    "knowledge",  # few normal images, labelled defects or contamination, None for all normal images
)
# what a record holds beside its status, times, error, command and environment; None until noted
FIELDS = (
    *SETTING,
    "seed",
    "steps",  # of the optimiser, None for a method that does not train
    "batch",  # images or tiles per step
    "weights_digest",
    "engine",  # what made the maps of the backbone, with its version
    "manifest_digest",
    "truth",  # what the pixel metrics are measured against, see `truth_kind`
    "counts",  # images by split and label
    "calibration",  # the threshold: alpha, number of images, value, explanation
    "bound_kind",  # what the method's own bound on false alarms rests on; None without one
    "store",  # the feature cache: its folder, images read and computed, bytes
    "seconds",  # wall time by stage, see `StageTimes.total`
    "scale",  # map values of the pictures: where the colours begin, where normal images end, where the colours end
    "pictures",  # relative to the run folder
)
PACKAGES = ("blemish", "torch", "torchvision", "lightning", "torchmetrics", "timm", "kornia", "numpy", "scipy", "scikit-learn")
PACKAGES += ("scikit-image", "pillow", "hydra-core", "omegaconf", "faiss-cpu", "faiss-gpu-cu12", "safetensors")


def check_archive(path: Path) -> None:
    """Raise ValueError, or zipfile's error, for a damaged file of torch's: torch itself compares no checksums."""
    with zipfile.ZipFile(path) as archive:
        if damaged := archive.testzip():
            raise ValueError(f"{damaged} inside is damaged")


def environment() -> dict:
    """Return the software and hardware this process runs on; None for what the system does not tell."""
    import torch

    return {
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "cores_usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "ram_mb": psutil.virtual_memory().total >> 20,
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
        "git": git_state(Path(__file__).parent) or _installed_commit(),
        "date": now(),
    }


def now() -> str:
    """Return the time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def _cpu() -> str | None:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.lower().startswith(("model name", "hardware")):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or None


def git_state(folder: Path) -> dict | None:
    """Return {"commit", "dirty"} of the checkout that tracks the Python files of `folder`, None without git or such a checkout.

    dirty: sources, configs or tools differ from the commit.
    """
    # a wheel installed inside somebody's checkout is not part of it: its files must be tracked
    if _git(folder, "ls-files", "--error-unmatch", "*.py") is None:
        return None
    commit = _git(folder, "rev-parse", "HEAD")
    changes = _git(folder, "status", "--porcelain", "--", ":/src", ":/configs", ":/tools")
    return None if commit is None or changes is None else {"commit": commit, "dirty": bool(changes)}


def _git(folder: Path, *arguments: str) -> str | None:
    # inside a git hook these variables point at another repository
    variables = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    command = ["git", "-C", str(folder), *arguments]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=20, env=variables, check=True)
        return done.stdout.strip()
    return None


def _installed_commit() -> dict | None:
    """Return the commit that pip noted for a package installed from a repository's address."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError, ValueError, AttributeError):
        noted = json.loads(importlib.metadata.distribution("blemish").read_text("direct_url.json") or "{}")
        if commit := noted.get("vcs_info", {}).get("commit_id"):
            return {"commit": commit, "dirty": False}
    return None


def peak_memory_mb() -> dict:
    """Return the largest memory of this process so far, MB: "host" (resident) and "gpu" (allocated by torch on the fullest device)."""
    import torch

    host = gpu = None
    if resource:
        unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, kilobytes elsewhere
        host = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20, 1)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        gpu = round(max(torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count())) / 2**20, 1)
    return {"host": host, "gpu": gpu}


def truth_kind(samples: Iterable) -> str:
    """Return what marks the anomalous pixels of the test images: "pixel masks", "boxes rasterised to masks", both or "none"."""
    tested = [sample for sample in samples if sample.split == "test"]
    masks = any(sample.mask for sample in tested)
    boxes = any(sample.boxes and not sample.mask for sample in tested)
    return " and ".join(["pixel masks"] * masks + ["boxes rasterised to masks"] * boxes) or "none"


def is_first_process() -> bool:
    from lightning.pytorch.utilities.rank_zero import rank_zero_only  # tools that only read records do not wait for lightning

    return rank_zero_only.rank == 0


def lock_run_folder(run_dir: str | Path, overwrite: bool, keep: Iterable[str] = (), key: str = "run_dir") -> None:
    """Make and lock the folder of a run until `release`, and remove what an earlier run left there, except the files to `keep`.

    Only the process of rank 0 does so. Files that a run does not write are never touched. InputError if the folder cannot be written,
    is locked, or, without `overwrite`, holds a finished run or files of unknown origin. `key` is the option that chooses the folder.
    """
    if not is_first_process():
        return
    folder = Path(run_dir)
    choose = f"{CHOOSE} with {key}=PATH"
    lock(folder, choose)
    try:
        _clear(folder, overwrite, set(keep), f"replace them with overwrite=true, or {choose}" if key == "run_dir" else choose)
    except BaseException:
        release(folder)
        raise


def read_record(run_dir: str | Path) -> dict | None:
    """Return the record of a run folder; None if there is none that can be read."""
    record = read_json(Path(run_dir) / RECORD)
    return record if record and "status" in record else None


def _clear(folder: Path, overwrite: bool, keep: set[str], choose: str) -> None:
    record = read_record(folder)
    found = [name for name in FILES if name not in keep and (folder / name).exists()]
    if record and record["status"] == FINISHED and not overwrite:
        run = f"{record.get('method')}, {record.get('started')}"
        raise InputError(f"{folder}: holds a finished run ({run}); {choose}")
    if found and not record and not overwrite:
        raise InputError(f"{folder}: holds {', '.join(found)} but no record of a run; {choose}")
    pictures = [name for name in (record or {}).get("pictures") or [] if not Path(name).is_absolute() and ".." not in Path(name).parts]
    if record:  # kept until the next record replaces it: after a kill, the other files are still known to be a run's
        found = [name for name in found if name != RECORD]
        write_json(folder / RECORD, record | {"status": "interrupted", "error": None})
    for name in pictures + found:
        (folder / name).unlink(missing_ok=True)
    for place in (folder, folder / "images"):
        remove_stale(place, age=0)


def finish_for(run_dir: str | Path, status: str, message: str, seconds: float | None = None) -> None:
    """Write into a run's record how it ended, for a process that could not do so itself."""
    known = read_record(run_dir) or Record(run_dir, {}).content
    error = {"type": status, "message": message, "time": now()}
    known |= {"status": status, "ended": now(), "wall_seconds": seconds, "error": error, "peak_memory_mb": None}
    write_json(Path(run_dir) / RECORD, known)


def is_interruption(error: BaseException | None) -> bool:
    """Return whether an error is or was caused by an interruption, which Lightning and OmegaConf turn into errors of their own."""
    visited = set()  # an error that is raised again from what it caused closes a circle
    while error is not None and id(error) not in visited:
        if isinstance(error, KeyboardInterrupt) or type(error).__name__ == "SIGTERMException":  # Lightning's
            return True
        visited.add(id(error))
        error = error.__cause__ or error.__context__
    return False


class Record:
    """The life of one run in record.json: "running", then "finished", "failed" or "interrupted".

    Rank 0 writes the file atomically at every step. A killed run stays "running" with nobody holding its lock.
    `metadata` are the FIELDS that are known at the start.
    """

    def __init__(self, run_dir: str | Path, metadata: Mapping):
        self.path = Path(run_dir) / RECORD
        self.started = False  # whether the run has come so far that its folder is kept if it fails
        self.clock = time.perf_counter()
        self.content = {"status": "running", "started": now(), "ended": None, "wall_seconds": None, "error": None, **dict.fromkeys(FIELDS)}
        self.content |= {"peak_memory_mb": None, "command": shlex.join(sys.argv), "environment": environment()}
        self.note(metadata)

    def note(self, metadata: Mapping) -> None:
        """Add metadata, each one of FIELDS, and write the record."""
        if unknown := metadata.keys() - set(FIELDS):
            raise ValueError(f"a record has no {', '.join(sorted(unknown))}; it has {', '.join(FIELDS)}")
        self.content |= plain(metadata)
        if is_first_process():
            write_json(self.path, self.content)

    def finish(self, metadata: Mapping) -> None:
        """Note that the run has finished, with the last metadata."""
        self._end(FINISHED, None)
        self.note(metadata)

    def fail(self, error: BaseException) -> None:
        """Note that the run ended with an error or an interruption."""
        if is_interruption(error):
            self._end("interrupted", {"type": "KeyboardInterrupt", "message": "stopped by the user or the system", "time": now()})
        else:
            self._end("failed", {"type": type(error).__name__, "message": str(error), "time": now()})
        try:
            self.note({})
        except InputError as unwritten:
            log.warning("%s", unwritten)  # the error that ended the run is the one to be raised

    def _end(self, status: str, error: dict | None) -> None:
        self.content |= {"status": status, "ended": now(), "wall_seconds": time.perf_counter() - self.clock, "error": error}
        self.content["peak_memory_mb"] = peak_memory_mb()
