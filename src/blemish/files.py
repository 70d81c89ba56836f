"""Files that are complete or absent, folders that one process at a time writes to, and files of the user's that nothing replaces."""

import contextlib
import csv
import errno
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

from blemish.edge.errors import InputError
from blemish.edge.outputs import INDEX as INDEX  # these four also for higher rooms
from blemish.edge.outputs import Outputs as Outputs
from blemish.edge.outputs import picture_info as picture_info
from blemish.edge.outputs import remove_stale as remove_stale

LOCK = ".lock"  # in a folder that a process writes to; the system releases it when the process ends, however it ends
CHOOSE = "choose another folder"
MIN_FREE = 2**16  # bytes: a disk with fewer free bytes counts as full

_locks: dict[Path, FileLock] = {}  # that this process holds, by folder


@contextlib.contextmanager
def replacing(*paths: str | Path | None, choose: str = "output=FILE", header: str | None = None) -> Iterator[None]:
    """Refuse to replace the user's files, and list what the block writes to the paths; None is left out.

    A file that begins with `header` needs no index: it may have come with a checkout.
    """
    outputs, chosen = Outputs(), [Path(path) for path in paths if path]
    outputs.check([path for path in chosen if not (header and _begins_with(path, header.encode()))], choose)
    try:
        yield
    finally:
        for path in filter(Path.is_file, chosen):
            with contextlib.suppress(OSError):
                outputs.note(path)


def _begins_with(path: Path, text: bytes) -> bool:
    with contextlib.suppress(OSError), path.open("rb") as file:
        return file.read(len(text)) == text
    return False


@contextlib.contextmanager
def atomic_write(path: str | Path, outputs: Outputs | None = None) -> Iterator[Path]:
    """Yield a temporary path with the suffix of `path`, renamed to it when the block succeeds and removed when it fails.

    With `outputs`, the user's files are not replaced and the new file is listed. Raises InputError for an OSError in the block, or what
    torch makes of one.
    """
    path = Path(path)
    temporary = path.with_name(f".{os.getpid()}-{os.urandom(4).hex()}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if outputs:
            outputs.check([path])
            outputs.note(path, temporary)
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        full = no_room(error, path.parent)
        if not (full or isinstance(error, OSError)):
            raise
        reason = os.strerror(errno.ENOSPC) if full else error.strerror or error
        raise InputError(f"{path.parent}: cannot write {path.name} there ({reason}); {CHOOSE}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def _text_file(path: str | Path, outputs: Outputs | None) -> Iterator[IO[str]]:
    # surrogates stand for the bytes of a file name that is not UTF-8
    with atomic_write(path, outputs) as temporary, temporary.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        yield file
        fsync(file)


def write_text(path: str | Path, text: str, outputs: Outputs | None = None) -> None:
    """Write UTF-8 text atomically."""
    with _text_file(path, outputs) as file:
        file.write(text)


def write_json(path: str | Path, value: Any, outputs: Outputs | None = None) -> None:
    """Write JSON atomically: keys in the order given, floats in full precision, infinities and NaN as null."""
    write_text(path, json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n", outputs)


def write_json_lines(path: str | Path, rows: Iterable[Any], outputs: Outputs | None = None) -> None:
    """Write a line of JSON for each row, atomically: as `write_json`, but in ASCII, as file names may hold bytes that are no text."""
    write_text(path, "".join(json.dumps(plain(row), allow_nan=False) + "\n" for row in rows), outputs)


def write_csv(path: str | Path, header: Iterable[str], rows: Iterable[Iterable], outputs: Outputs | None = None) -> None:
    """Write a CSV with a header row atomically: floats in full precision, None as an empty field."""
    with _text_file(path, outputs) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def read_json(path: str | Path) -> dict | None:
    """Return the object in a JSON file, None if there is none or it cannot be read."""
    with contextlib.suppress(OSError, ValueError):
        value = json.loads(Path(path).read_text(encoding="utf-8", errors="surrogateescape"))
        return value if isinstance(value, dict) else None
    return None


def plain(value: Any) -> Any:
    """Convert a value to what JSON can hold: tensors and arrays to lists, paths to text, infinities and NaN to None."""
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def fsync(file: IO) -> None:
    """Write an open file to the disk, so that a power cut after its renaming does not leave a name without content."""
    file.flush()
    os.fsync(file.fileno())


def no_room(error: BaseException, place: str | Path) -> InputError | None:
    """Return the InputError for an error that was caused by the full disk of `place`, None for any other error."""
    if not isinstance(error, OSError | RuntimeError):
        return None
    number = getattr(error, "errno", None)
    full = number in (errno.ENOSPC, errno.EDQUOT)
    with contextlib.suppress(OSError):  # writers of images and tensors do not pass the number on
        full = full or (number is None and shutil.disk_usage(place).free < MIN_FREE)
    where = getattr(error, "filename", None) or place
    return InputError(f"{where}: cannot be written ({os.strerror(errno.ENOSPC)}); free some space, or {CHOOSE}") if full else None


def lock(folder: Path, choose: str) -> None:
    """Make a folder and lock it until `release`; InputError, ending in how to `choose` another, if it is locked or cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        new = FileLock(folder / LOCK, timeout=0, thread_local=False)
        new.acquire()
    except Timeout:
        raise InputError(f"{folder}: another process is writing to this folder; {choose}, or wait for it to end") from None
    except OSError as error:
        raise InputError(f"{folder}: cannot be made or written to ({error.strerror or error}); {choose}") from error
    _locks[folder.resolve()] = new


def release(folder: str | Path) -> None:
    """Unlock a folder if this process holds its lock."""
    if held := _locks.pop(Path(folder).resolve(), None):
        with contextlib.suppress(OSError):  # Windows: the lock removes its file itself
            Path(held.lock_file).unlink()  # before the release: a process that has the old file open sees that it is gone
        held.release()


@contextlib.contextmanager
def locked(folder: str | Path, choose: str) -> Iterator[None]:
    """Hold the lock of a folder during the block, see `lock`."""
    lock(Path(folder), choose)
    try:
        yield
    finally:
        release(folder)


def is_locked(folder: str | Path) -> bool:
    """Return whether any process, this one included, holds the lock of a folder; removes the lock file of one that is gone."""
    if not (Path(folder) / LOCK).exists():
        return False
    try:
        with locked(folder, ""):
            return False
    except InputError:
        return True
