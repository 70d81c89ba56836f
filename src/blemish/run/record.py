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

from blemish.edge.errors import InputError
from blemish.files import CHOOSE, lock, plain, read_json, release, remove_stale, write_json

try:
    import resource
except ImportError:  # Windows
    resource = None

log = logging.getLogger(__name__)

STATE = "last.ckpt"  # of a training that is not finished
ROI = "roi.png"  # white where the images of the run are looked at
FILES = (
    "config.yaml",
    "model.ckpt",
    STATE,
    ROI,
    "metrics.json",
    "scores.csv",
    "manifest.csv",
    "curves.png",
    "curves.json",
    "record.json",
)
RECORD = "record.json"
FINISHED = "finished"
# what tells two rows of a table apart; runs that differ in the seed alone share a row
SETTING = (
    "method",
    "variant",  # a name for settings that are not the method's own, as a recipe gives it
    "epochs",  # of a method that trains
    "epoch_size",  # images, or tiles, of an epoch; None for every one once
    "dataset",
    "category",
    "unit",  # image, or tile where large images were cut
    "backbone",
    "weights",
    "image_size",
    "crop",
    "tiling",  # side of the tiles that images were cut into, None for whole images
    "resize",  # letterbox, None where images are stretched
    "roi",  # digest of the mask, or masks, of what is looked at
    "protocol",
)
METRICS = ("image_auroc", "image_ap", "image_f1_max", "pixel_auroc", "pixel_ap", "aupro")  # in metrics.json, of tables and pages
PLACE = ("dataset", "category", "unit")  # the part of it that says where, and not how
# what a record holds beside its status, times, error, command and environment; None until noted
FIELDS = (
    *SETTING,
    "seed",
    "weights_digest",
    "manifest_digest",
    "truth",  # what the pixel metrics were measured against, as truth_kind says
    "counts",  # images by split and label
    "calibration",  # where the threshold comes from: alpha, images, value, and an explanation in words
    "store",  # where maps were kept, images whose maps were read and computed, bytes of the files in use
    "seconds",  # wall seconds by stage, as StageTimes.total() gives them
    "scale",  # map values at the two ends of the colours of the pictures
    "pictures",  # the pictures that were drawn, relative to the run folder
)
PACKAGES = (
    "blemish",
    "torch",
    "torchvision",
    "lightning",
    "torchmetrics",
    "timm",
    "kornia",
    "numpy",
    "scipy",
    "scikit-learn",
    "scikit-image",
    "pillow",
    "hydra-core",
    "omegaconf",
    "faiss-cpu",
    "faiss-gpu-cu12",
    "safetensors",
)


def check_archive(path: Path) -> None:
    """ValueError, or zipfile's error, for a file of torch's of which a part is not what was written: torch compares no checksums."""
    with zipfile.ZipFile(path) as archive:
        if damaged := archive.testzip():
            raise ValueError(f"{damaged} inside is damaged")


def environment() -> dict:
    """The software and hardware this process runs on; None where the system does not tell."""
    import torch

    return {
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "cores_usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "ram_mb": _ram_mb(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
        "git": git_state(Path(__file__).parent) or _installed_commit(),
        "date": now(),
    }


def now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> str | None:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.lower().startswith(("model name", "hardware")):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or None


def _ram_mb() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20
    except (AttributeError, OSError, ValueError):
        return None


def git_state(folder: Path) -> dict | None:
    """{"commit", "dirty"} of the checkout that tracks the Python files of `folder`; None without git or if none does.

    dirty: sources or configs differ from the commit, or there are some it does not have.
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
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=20, env=variables, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _installed_commit() -> dict | None:
    """The commit that pip noted for a package installed from a repository's address."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError, ValueError, AttributeError):
        noted = json.loads(importlib.metadata.distribution("blemish").read_text("direct_url.json") or "{}")
        if commit := noted.get("vcs_info", {}).get("commit_id"):
            return {"commit": commit, "dirty": False}
    return None


def peak_memory_mb() -> dict:
    """The largest memory this process has held, MB: "host" (resident) and "gpu" (allocated by torch, the fullest device)."""
    import torch

    host = gpu = None
    if resource is not None:
        unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, kilobytes elsewhere
        host = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20, 1)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        gpu = round(max(torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count())) / 2**20, 1)
    return {"host": host, "gpu": gpu}


def truth_kind(samples: Iterable) -> str:
    """What says which pixels are anomalous in the test images: "pixel masks", "boxes rasterised to masks", both or "none"."""
    tested = [sample for sample in samples if sample.split == "test"]
    kinds = []
    if any(sample.mask for sample in tested):
        kinds.append("pixel masks")
    if any(sample.boxes and not sample.mask for sample in tested):
        kinds.append("boxes rasterised to masks")
    return " and ".join(kinds) or "none"


def is_first_process() -> bool:
    from lightning.pytorch.utilities.rank_zero import rank_zero_only  # tools that only read records do not wait for lightning

    return rank_zero_only.rank == 0


def lock_run_folder(run_dir: str | Path, overwrite: bool, keep: Iterable[str] = ()) -> None:
    """Lock the folder for this process until `release`: make it, lock it, and clear what an earlier run left, but the FILES in `keep`.

    InputError if it cannot be written, another living process holds it, or, without `overwrite`, if it holds a finished run
    or files that no run of blemish left. Files a run does not write are never touched. Only the process of rank 0 claims.
    """
    if not is_first_process():
        return
    folder = Path(run_dir)
    lock(folder, CHOOSE)
    try:
        _clear(folder, overwrite, set(keep))
    except BaseException:
        release(folder)
        raise


def read_record(run_dir: str | Path) -> dict | None:
    """The record of a run folder; None if there is none that can be read."""
    record = read_json(Path(run_dir) / RECORD)
    return record if record and "status" in record else None


def _clear(folder: Path, overwrite: bool, keep: set[str]) -> None:
    record = read_record(folder)
    found = [name for name in FILES if name not in keep and (folder / name).exists()]
    if record and record["status"] == FINISHED and not overwrite:
        raise InputError(
            f"{folder}: holds a finished run ({record.get('method')}, {record.get('started')}); say overwrite=true, or {CHOOSE}"
        )
    if found and not record and not overwrite:
        raise InputError(f"{folder}: holds {', '.join(found)} but no record of a run; say overwrite=true, or {CHOOSE}")
    # only what a run wrote: the folder may hold other things of its owner
    pictures = [name for name in (record or {}).get("pictures") or [] if not Path(name).is_absolute() and ".." not in Path(name).parts]
    if record:  # it stays until the next one takes its place: what a kill leaves here is then still known to be a run's
        write_json(folder / RECORD, record | {"status": "interrupted", "error": None})
    for name in pictures + [name for name in found if name != RECORD or not record]:
        (folder / name).unlink(missing_ok=True)
    for place in (folder, folder / "images"):
        remove_stale(place, age=0)


def finish_for(run_dir: str | Path, status: str, message: str, seconds: float | None = None) -> None:
    """Tell in a run's record how it ended, for a process that could not do so itself."""
    known = read_record(run_dir) or Record(run_dir, {}).content
    error = {"type": status, "message": message, "time": now()}
    known |= {"status": status, "ended": now(), "wall_seconds": seconds, "error": error, "peak_memory_mb": None}
    write_json(Path(run_dir) / "record.json", known)


def stopped(error: BaseException | None) -> bool:
    """Whether an error is an interruption, or came of one: Lightning turns Ctrl-C into SystemExit, OmegaConf into errors of its own."""
    seen = set()  # an error that is raised again from what it caused closes a circle
    while error is not None and id(error) not in seen:
        if isinstance(error, KeyboardInterrupt) or type(error).__name__ == "SIGTERMException":  # Lightning's
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


class Record:
    """The life of one run as record.json tells it: "running", then "finished", "failed" or "interrupted".

    The file is written whole at every step, by rank 0 alone. A killed run stays "running", with nobody alive behind its lock.
    """

    def __init__(self, run_dir: str | Path, metadata: Mapping):
        self.path = Path(run_dir) / "record.json"
        self.clock = time.perf_counter()
        self.content = {"status": "running", "started": now(), "ended": None, "wall_seconds": None, "error": None, **dict.fromkeys(FIELDS)}
        self.content |= {"peak_memory_mb": None, "command": shlex.join(sys.argv), "environment": environment()}
        self.note(metadata)

    @classmethod
    def start(cls, run_dir: str | Path, metadata: Mapping) -> "Record":
        """Write the record of a run that begins; `metadata` are those of FIELDS that are known already."""
        return cls(run_dir, metadata)

    def note(self, metadata: Mapping) -> None:
        """Add metadata, each one of FIELDS, and write the record."""
        if unknown := [name for name in metadata if name not in FIELDS]:
            raise ValueError(f"a record has no {', '.join(unknown)}; it has {', '.join(FIELDS)}")
        self.content |= plain(metadata)
        self._write()

    def finish(self, metadata: Mapping) -> None:
        """The run came to its end: add the last metadata."""
        self._end(FINISHED, None)
        self.note(metadata)

    def fail(self, error: BaseException) -> None:
        """The run ended with this error; an interruption in disguise is told as one."""
        if stopped(error):
            self.interrupt()
        else:
            self._end("failed", {"type": type(error).__name__, "message": str(error), "time": now()})
            self._write_if_possible()

    def interrupt(self) -> None:
        """The run was stopped from outside."""
        self._end("interrupted", {"type": "KeyboardInterrupt", "message": "stopped by the user or the system", "time": now()})
        self._write_if_possible()

    def _end(self, status: str, error: dict | None) -> None:
        self.content |= {"status": status, "ended": now(), "wall_seconds": time.perf_counter() - self.clock, "error": error}
        self.content["peak_memory_mb"] = peak_memory_mb()

    def _write(self) -> None:
        if is_first_process():
            write_json(self.path, self.content)

    def _write_if_possible(self) -> None:
        try:
            self._write()
        except InputError as error:
            log.warning("%s", error)  # the error that ended the run is the one to be raised
