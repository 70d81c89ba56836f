"""Images as they arrive: files of a folder that is polled, each when it is complete; frames of a camera, a stream or a video."""

import errno
import os
import stat
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any, NamedTuple

import numpy as np

from .errors import InputError
from .reading import ENDINGS, digest_of, is_result

BATCH = 256  # files that are taken at a time, the oldest first; the others wait where they are
SOON = 0.1  # seconds before a file that could not be read is read again, then as long as it has been tried already
REOPEN = (1, 30)  # seconds before a lost camera is opened again, doubled up to the second


class Clock:
    """The time of day, and a time that never jumps; replaced where time is simulated."""

    wall, now, sleep = staticmethod(time.time), staticmethod(time.monotonic), staticmethod(time.sleep)


class Item(NamedTuple):
    """An image that has arrived."""

    id: str  # 16 hex digits: of a file's name, size and time of change, of a video's and the frame's number, or of a time
    image: Path | np.ndarray
    name: str
    frame: int | None = None


class Arrivals:
    """What a source of images shows of itself."""

    waiting = 0  # images that have arrived and are not scored yet
    dropped = 0  # frames of a camera that newer ones have replaced, files that were removed before they were scored
    lost: str | None = None  # why nothing arrives
    finished = False

    def take(self) -> list[Item]:
        """The images to score now, none if none has arrived."""
        raise NotImplementedError

    def done(self, item: Item) -> None:
        """An image is in the log."""

    def again(self, item: Item) -> bool:
        """Whether an image that could not be read will be taken once more, as it may be incomplete."""
        return False

    def changed(self, item: Item) -> bool:
        """Whether an image has changed since it was taken: it is taken again, as another image."""
        return False

    def id_of(self, path: str) -> str:
        """The id of a file of this source as it is now, "" for no file of it; OSError if it is gone."""
        return ""

    def close(self) -> None:
        """End threads and devices."""


class File:
    """A file that is not in the log, as it was seen last."""

    def __init__(self, signature: tuple[int, int], now: float):
        self.signature, self.since, self.due = signature, now, now
        self.failed: float | None = None  # when it could not be read first


class Folder(Arrivals):
    """Image files at any depth of a folder, each once for its name, size and time of change, in the order of these times.

    A file is taken when it has not changed for `settle` seconds. One that cannot be read may be incomplete: it is taken again for
    `patience` seconds, or as long as the folder cannot be read.
    """

    def __init__(self, folder: Path, seen: Callable[[str], bool], clock: Clock, settle: float, patience: float, once: bool = False):
        self.folder, self.seen, self.clock, self.settle, self.patience, self.once = folder, seen, clock, settle, patience, once
        self.files: dict[str, File | tuple[int, int]] = {}  # by path: those in the log as their signatures alone

    def take(self) -> list[Item]:
        try:
            found = dict(listed(self.folder))
        except OSError as error:
            self.lost = f"{self.folder}: {error.strerror or error}"
            return []
        self.lost, now, files = None, self.clock.now(), {}
        for path, signature in found.items():
            old = self.files.get(path)
            if old == signature or (isinstance(old, File) and old.signature == signature):
                files[path] = old
            else:
                known = self.seen(self.id_of(path, signature)) or (path.lower().endswith(".png") and is_result(Path(path)))
                files[path] = signature if known else File(signature, now)
        self.files = files
        new = [(path, file) for path, file in files.items() if isinstance(file, File)]
        self.waiting, self.finished = len(new), self.once and not new
        ready = [(file.signature[1], path) for path, file in new if now - file.since >= self.settle and now >= file.due]
        return [Item(self.id_of(path, files[path].signature), Path(path), path) for _, path in sorted(ready)[:BATCH]]

    def id_of(self, path: str, signature: tuple[int, int] | None = None) -> str:
        """The id of a file, as it is now without a signature."""
        signature = signature or signed(path)
        return digest_of(os.fsencode(f"{os.path.relpath(path, self.folder)}\0{signature[0]}\0{signature[1]}"))

    def done(self, item: Item) -> None:
        self.files[item.name] = self.files[item.name].signature
        self.waiting -= 1

    def changed(self, item: Item) -> bool:
        with suppress(OSError):  # gone, but it has been read
            return signed(item.name) != self.files[item.name].signature
        return False

    def again(self, item: Item) -> bool:
        file, now = self.files[item.name], self.clock.now()
        try:
            found = signed(item.name)
        except OSError:  # gone, or the folder is, which the next look at it tells
            self.dropped += 1
            del self.files[item.name]
            return True
        file.failed = now if file.failed is None else file.failed
        file.due = now + max(now - file.failed, SOON)
        return now - file.failed < self.patience or found != file.signature


def listed(folder: Path) -> Iterator[tuple[str, tuple[int, int]]]:
    """(path, `signed`) of every file below a folder that may be an image; hidden ones are left out, links followed once.

    OSError if the folder itself cannot be read.
    """
    os.scandir(folder).close()
    walked = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        folders[:] = [] if real in walked else [name for name in folders if name[0] != "."]
        for name in names if real not in walked else ():
            path = os.path.join(place, name)  # noqa: PTH118 (a Path takes ten times as long)
            if name[0] != "." and name.lower().endswith(ENDINGS):
                with suppress(OSError):  # gone, or a link to nowhere
                    yield path, signed(path)
        walked.add(real)


def signed(path: str) -> tuple[int, int]:
    """(bytes, time of change in ns) of a file; OSError for anything else."""
    found = os.stat(path)  # noqa: PTH116
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "not a file", path)
    return found.st_size, found.st_mtime_ns


class Video(Arrivals):
    """All frames of a video file; those in the log are passed over."""

    def __init__(self, path: Path, seen: Callable[[str], bool]):
        found = path.stat()
        self.path, self.seen, self.frame = path, seen, 0
        self.base = f"{path.name}\0{found.st_size}\0{found.st_mtime_ns}"
        self.capture = opened(str(path))
        if not self.capture.isOpened():
            raise InputError(
                f"input={path}: no folder, and no video that OpenCV can open; expected a folder, a camera's number, rtsp://… or a video"
            )

    def take(self) -> list[Item]:
        while True:
            self.frame += 1
            id = digest_of(os.fsencode(f"{self.base}\0{self.frame}"))
            if not self.seen(id):
                break
            if not self.capture.grab():
                self.finished = True
                return []
        there, image = self.capture.read()
        self.finished = not there
        return [Item(id, rgb(image), str(self.path), self.frame)] if there else []

    def close(self) -> None:
        self.capture.release()


class Camera(Arrivals):
    """Frames of a camera or a stream, in a thread of its own: the newest `queue` wait to be scored, older ones are dropped and counted.

    A camera that is lost is opened again and again.
    """

    def __init__(self, address: int | str, queue: int, clock: Clock, open: Callable[[int | str], Any] | None = None):
        self.address, self.clock, self.open = address, clock, open or opened
        self.frames: deque[Item] = deque(maxlen=queue)
        self.stop, self.thread = Event(), Thread(target=self._read, name="camera", daemon=True)
        self.capture = self.open(address)
        if not self.capture.isOpened():
            raise InputError(f"input={without_password(address)}: cannot be opened; is the camera there, and free?")
        self.thread.start()

    def _read(self) -> None:
        pause, number = REOPEN[0], 0
        while not self.stop.is_set():
            there, image = self.capture.read()
            if there:
                self.lost, pause, number = None, REOPEN[0], number + 1
                self.dropped += len(self.frames) == self.frames.maxlen
                item = Item(f"{int(self.clock.wall() * 1e9) & 2**64 - 1:016x}", rgb(image), without_password(self.address), number)
                self.frames.append(item)
                continue
            self.lost = f"{without_password(self.address)}: no frame, opened again and again"
            self.capture.release()
            self.stop.wait(pause)
            pause = min(2 * pause, REOPEN[1])
            self.capture = self.open(self.address)
        self.capture.release()

    @property
    def waiting(self) -> int:
        return len(self.frames)

    def take(self) -> list[Item]:
        try:
            return [self.frames.popleft()]
        except IndexError:
            return []

    def close(self) -> None:
        self.stop.set()
        self.thread.join(5)


def opened(address: int | str) -> Any:
    """OpenCV's capture of a camera's number, an address or a file; InputError where OpenCV is absent."""
    try:
        import cv2
    except ImportError:
        raise InputError(
            f"input={without_password(address)}: read with OpenCV, which is not here (pip install opencv-python-headless)"
        ) from None
    return cv2.VideoCapture(address)


def rgb(image: np.ndarray) -> np.ndarray:
    """OpenCV's blue, green, red (H, W, 3) as red, green, blue."""
    return image if image is None or image.ndim == 2 else np.ascontiguousarray(image[..., ::-1])


def without_password(address: int | str) -> str:
    """An address as it may be shown: rtsp://user:password@host/… without the user."""
    scheme, mark, rest = str(address).partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}{mark}{host.rpartition('@')[2]}{slash}{path}"


def arrivals(source: str, seen: Callable[[str], bool], clock: Clock, settle: float, patience: float, queue: int, once: bool) -> Arrivals:
    """The images of a folder, a camera by its number or device, a stream by its address, or a video; InputError for anything else."""
    path = Path(source).expanduser()
    if path.is_dir():
        return Folder(path, seen, clock, settle, patience, once)
    if source.isdigit() or "://" in source or path.is_char_device():
        return Camera(int(source) if source.isdigit() else source, queue, clock)
    if path.is_file() and not source.lower().endswith(ENDINGS):
        return Video(path, seen)
    raise InputError(
        f"input={source}: {'an image' if path.is_file() else 'not there'}; expected a folder, a camera's number, rtsp://… or a video"
    )
