"""Files that are complete or absent, and folders that one process at a time writes to."""

import contextlib
import csv
import errno
import json
import math
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout
from PIL.PngImagePlugin import PngInfo

from blemish.edge.errors import InputError
from blemish.edge.reading import SOFTWARE, file_digest

INDEX = ".blemish"  # in the folder of an output: a line of digest and name for each file that was written there


def picture_info(panels: str = "") -> PngInfo:
    """The PNG metadata of a picture that is a result, behind the header, where `is_result` looks; `panels`: where a strip has them."""
    info = PngInfo()
    info.add_text("Software", SOFTWARE)
    if panels:
        info.add_text("Panels", panels)
    return info


class Outputs:
    """What may be written where a person says: a file that is not there, or that is byte for byte what blemish wrote there before.

    `check` refuses the rest; `note` lists the content of a file that is about to get its name, so that a kill in between leaves no file
    that is not listed. A file in a folder without its index counts as the user's.
    """

    def __init__(self) -> None:
        self.known: dict[Path, set[str]] = {}  # digests by folder

    def check(self, paths: Iterable[str | Path], choose: str = "output=FOLDER") -> None:
        """InputError, with the files, where one of the paths holds what blemish did not write; `choose` is how to have another place."""
        foreign = [str(path) for path in map(Path, paths) if os.path.lexists(path) and not self._is_own(path)]
        if foreign:
            more = f" and {len(foreign) - 5} more" if len(foreign) > 5 else ""
            raise InputError(
                f"{', '.join(foreign[:5])}{more}: in the way of an output, and not as blemish wrote it; move it away, or "
                f"choose another place with {choose}"
            )

    def note(self, path: str | Path, content: str | Path | None = None) -> None:
        """List the file `content`, the path itself if None, as what blemish writes to `path`."""
        path = Path(path)
        digest, known = file_digest(Path(content or path)), self._known(path.parent)
        if digest not in known:
            known.add(digest)
            name = path.name.encode("utf-8", "surrogateescape").replace(b"\n", b" ")
            with (path.parent / INDEX).open("ab") as file:
                file.write(f"\n{digest} ".encode() + name)  # on a line of its own, also behind one that was cut short

    def _is_own(self, path: Path) -> bool:
        if path.is_symlink() or not path.is_file():
            return False
        known = self._known(path.parent)
        try:
            return bool(known) and file_digest(path) in known
        except OSError:
            return False

    def _known(self, folder: Path) -> set[str]:
        if folder not in self.known:
            self.known[folder] = set()
            with contextlib.suppress(OSError):
                lines = (folder / INDEX).read_bytes().splitlines()
                self.known[folder] = {line.split()[0].decode("ascii", "replace") for line in lines if line.strip()}
        return self.known[folder]


@contextlib.contextmanager
def replacing(*paths: str | Path | None, choose: str = "output=FILE", header: str | None = None) -> Iterator[None]:
    """Refuse paths that hold what blemish did not write, and list what the block writes there; None is left out.

    A file that begins with the `header`, which nobody writes by hand, needs no index: it may have come with a checkout.
    """
    outputs, chosen = Outputs(), [Path(path) for path in paths if path]
    outputs.check([path for path in chosen if not (header and _begins(path, header.encode()))], choose)
    before = {path: _stamp(path) for path in chosen}
    try:
        yield
    finally:
        for path in chosen:
            if path.is_file() and _stamp(path) != before[path]:
                with contextlib.suppress(OSError):
                    outputs.note(path)


def _begins(path: Path, text: bytes) -> bool:
    with contextlib.suppress(OSError), path.open("rb") as file:
        return file.read(len(text)) == text
    return False


def _stamp(path: Path) -> tuple[int, int] | None:
    """Tells a file from the one that is renamed to its place."""
    with contextlib.suppress(OSError):
        status = path.stat()
        return status.st_ino, status.st_mtime_ns
    return None


CHOOSE = "choose another folder with run_dir=PATH"
LOCK = ".lock"  # in a folder that a process writes to; the system drops the lock when the process ends, however it ends
ROOM = 2**16  # bytes: where fewer are free, a disk counts as full
STALE = 86400  # seconds after which an unfinished file is removed from a folder that several processes may write to
UNFINISHED = re.compile(r"\.\d+-[0-9a-f]{8}(\.\w+)?")  # names of files that are being written

_locks: dict[Path, FileLock] = {}  # that this process holds, by folder


@contextlib.contextmanager
def atomic_write(path: str | Path, outputs: Outputs | None = None) -> Iterator[Path]:
    """A temporary path of the same suffix beside `path`, renamed to it when the block ends well and removed when it does not.

    With `outputs` only what blemish wrote is replaced, and what it writes is listed.

    An OSError in the block, or what torch makes of one, becomes an InputError that names the file and how to choose another folder.
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
        why = os.strerror(errno.ENOSPC) if full else error.strerror or error
        raise InputError(f"{path.parent}: cannot write {path.name} there ({why}); {CHOOSE}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_text(path: str | Path, text: str, outputs: Outputs | None = None) -> None:
    """Write UTF-8 text in one step: a failed write leaves the old file as it was."""
    # surrogates stand for the bytes of a file name that is not UTF-8
    with atomic_write(path, outputs) as temporary, temporary.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        file.write(text)
        fsync(file)


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: numbers of numpy and torch as Python's, paths as text, numbers that are not finite as None."""
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
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_json(path: str | Path, value: Any, outputs: Outputs | None = None) -> None:
    """Write JSON in one step, keys in the order given, floats in full precision, infinities and NaN as null."""
    write_text(path, json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n", outputs)


def read_json(path: str | Path) -> dict | None:
    """The object that a JSON file holds; None where it cannot be read or holds another thing."""
    with contextlib.suppress(OSError, ValueError):
        value = json.loads(Path(path).read_text(encoding="utf-8", errors="surrogateescape"))
        return value if isinstance(value, dict) else None
    return None


def write_csv(path: str | Path, header: Iterable[str], rows: Iterable[Iterable], outputs: Outputs | None = None) -> None:
    """Write a CSV with a header row in one step; floats in full precision, None as an empty field."""
    with atomic_write(path, outputs) as temporary, temporary.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
        fsync(file)


def fsync(file: IO) -> None:
    """Write the content of an open file to the disk: its name must not survive a power cut that the content does not."""
    file.flush()
    os.fsync(file.fileno())


def remove_stale(folder: Path, age: float = STALE) -> None:
    """Remove unfinished files of killed processes from a folder; those younger than `age` seconds may be another process's."""
    with contextlib.suppress(OSError):
        for path in list(folder.iterdir()):
            if UNFINISHED.fullmatch(path.name) and path.lstat().st_mtime <= time.time() - age:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def no_room(error: BaseException, place: str | Path) -> InputError | None:
    """What to tell of an error that came of a full disk, None of any other; the disk of the folder `place` is looked at."""
    if not isinstance(error, OSError | RuntimeError):
        return None
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    with contextlib.suppress(OSError):  # writers of images and tensors do not pass the number on
        full = full or (getattr(error, "errno", None) is None and shutil.disk_usage(place).free < ROOM)
    where = getattr(error, "filename", None) or place
    return InputError(f"{where}: cannot be written ({os.strerror(errno.ENOSPC)}); make room, or {CHOOSE}") if full else None


def lock(folder: Path, choose: str) -> None:
    """Make the folder and lock it until `release`; InputError, with how to `choose` another, if a process holds its lock."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _locks[folder.resolve()] = _lock(folder)
    except Timeout:
        raise InputError(f"{folder}: another process is writing to this folder; {choose}, or wait for it to end") from None
    except OSError as error:
        raise InputError(f"{folder}: cannot be made or written to ({error.strerror or error}); {choose}") from error


def release(folder: str | Path) -> None:
    """Give a folder back, if this process holds its lock."""
    if held := _locks.pop(Path(folder).resolve(), None):
        with contextlib.suppress(OSError):  # Windows: the lock removes its file itself
            Path(held.lock_file).unlink()  # before the release: a process that has the old file open sees that it is gone
        held.release()


@contextlib.contextmanager
def locked(folder: str | Path, choose: str) -> Iterator[None]:
    """Hold the lock of a folder in a block, see `lock`."""
    lock(Path(folder), choose)
    try:
        yield
    finally:
        release(folder)


def is_locked(folder: str | Path) -> bool:
    """Whether a process, this one included, holds the lock of a folder; removes the lock file of a process that is gone."""
    if not (Path(folder) / LOCK).exists():
        return False
    try:
        lock(Path(folder), "")
    except InputError:
        return True
    release(folder)
    return False


def _lock(folder: Path) -> FileLock:
    made = FileLock(folder / LOCK, timeout=0, thread_local=False)
    made.acquire()
    return made
