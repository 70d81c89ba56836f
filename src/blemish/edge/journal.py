"""A log of JSON lines that is its own journal: each image once, whatever ends the process and whenever."""

import errno
import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any

from .errors import InputError

LOG, INDEX = "watch.jsonl", ".watch.db"
HEAD = b'{"id": "'  # of every line


class Journal:
    """The log in a folder, and an index of the ids in it that takes no memory and is made again from the log where it lacks or lags.

    A line is what says that an image is done, so that a kill cannot come between the two. An incomplete last line, after a kill or a power
    cut, is removed and its image is scored again. One process at a time; InputError for a second one, and for a file that is not a log.
    """

    def __init__(self, folder: Path):
        self.path, self.lock, self.lags = folder / LOG, Lock(), False
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o644)
            try:
                self._open(folder / INDEX)
            except sqlite3.OperationalError:
                raise
            except sqlite3.DatabaseError:  # damaged
                self.index.close()
                for path in (folder / INDEX, folder / f"{INDEX}-journal"):
                    path.unlink(missing_ok=True)
                self._open(folder / INDEX)
        except (OSError, sqlite3.Error) as error:
            if "locked" in str(error):
                raise InputError(f"output={folder}: another process watches into this folder; choose another, or end it") from None
            raise InputError(f"output={folder}: cannot be written to ({getattr(error, 'strerror', None) or error})") from error
        try:
            self._recover()
        except BaseException:
            self.close()
            raise

    def _open(self, path: Path) -> None:
        self.index = sqlite3.connect(path, timeout=0, isolation_level=None, check_same_thread=False)
        self.index.execute("PRAGMA locking_mode=EXCLUSIVE")  # from the first statement that writes until the end of the process
        self.index.execute("BEGIN EXCLUSIVE")
        self.index.execute("CREATE TABLE IF NOT EXISTS seen (id INTEGER PRIMARY KEY)")
        self.index.execute("CREATE TABLE IF NOT EXISTS state (name TEXT PRIMARY KEY, value INTEGER)")
        if self.index.execute("PRAGMA quick_check(1)").fetchone() != ("ok",):
            raise sqlite3.DatabaseError(path)

    def _recover(self) -> None:
        good = self.get("size") or 0
        good = good if good <= self.size else 0  # the log was moved away, or cut
        for line, end in self.lines(good):
            self._note(line["id"])
            good = end
        with self.path.open("rb") as file:
            file.seek(good)
            rest = file.read(2**20)
        torn = b"\0" in rest or (HEAD.startswith(rest[: len(HEAD)]) and b"\n" not in rest)  # a power cut may leave zeros
        if rest and not torn:
            raise InputError(f"{self.path}: not a line of this log at byte {good}; move the file away, or choose another output")
        if rest:
            os.ftruncate(self.file, good)
        self.sync()

    @property
    def size(self) -> int:
        """Bytes of the log."""
        return os.fstat(self.file).st_size

    def lines(self, begin: int = 0) -> Iterator[tuple[dict, int]]:
        """The complete lines from a position on, each with the position of its end."""
        with self.path.open("rb") as file:
            file.seek(begin)
            for raw in iter(file.readline, b""):
                if not raw.endswith(b"\n"):
                    return  # it is being written, or was never finished
                begin += len(raw)
                if raw.startswith(HEAD) and raw.endswith(b"}\n"):
                    yield json.loads(raw), begin

    def __contains__(self, id: str) -> bool:
        with self.lock:
            return self.index.execute("SELECT 1 FROM seen WHERE id = ?", (number(id),)).fetchone() is not None

    def append(self, line: dict[str, Any]) -> None:
        """Write a line; OSError where it cannot be written, with the log as it was."""
        data = (json.dumps(line) + "\n").encode("ascii")
        with self.lock:
            before = self.size
            try:
                if os.write(self.file, data) < len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            except OSError:
                with suppress(OSError):
                    os.ftruncate(self.file, before)
                raise
            self._note(line["id"])

    def _note(self, id: str) -> None:
        try:
            self.index.execute("INSERT OR IGNORE INTO seen VALUES (?)", (number(id),))
        except sqlite3.OperationalError:  # a full disk; what the index lacks, the next start takes from the log
            self.lags = True

    def get(self, name: str) -> int | None:
        with self.lock:
            found = self.index.execute("SELECT value FROM state WHERE name = ?", (name,)).fetchone()
        return found and found[0]

    def sync(self, **state: int) -> None:
        """Bring log, index and the values by name to the disk, the log first: the index may lag behind it, but never be ahead."""
        with self.lock:
            os.fsync(self.file)
            try:
                values = state if self.lags else state | {"size": self.size}
                self.index.executemany("INSERT OR REPLACE INTO state VALUES (?, ?)", values.items())
                self.index.execute("COMMIT")
            except sqlite3.OperationalError:
                self.lags = self.lags or not self.index.in_transaction  # it took back what it had not committed
            if not self.index.in_transaction:
                self.index.execute("BEGIN EXCLUSIVE")

    def close(self) -> None:
        with self.lock:
            self.index.close()
            os.close(self.file)


def number(id: str) -> int:
    """The 64 bits of an id of 16 hex digits, as the integers of a database have them."""
    return int.from_bytes(bytes.fromhex(id), signed=True)
