"""The files written for images: what they are called, and which files in their place are the user's and stay."""

import contextlib
import io
import os
import re
import shutil
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from .errors import InputError
from .reading import SOFTWARE, digest_of, file_digest, find_images, is_result

INDEX = ".blemish"  # in an output folder: a line of digest and name for each file that was written there
STALE = 86400  # seconds after which an unfinished file is removed from a folder that several processes may write to
UNFINISHED = re.compile(r"\.\d+-[0-9a-f]{8}(\.\w+)?")  # names of files that are being written
LONGEST = 255 - len("_detections.json")  # bytes of an output's name before its ending


def picture_info(panels: str = "", regions: str | None = None) -> PngInfo:
    """PNG metadata that marks a picture as a result, for `is_result`; of a strip the positions of its panels, and the map's regions."""
    info = PngInfo()
    info.add_text("Software", SOFTWARE)
    if panels:
        info.add_text("Panels", panels)
    if regions:
        info.add_text("Regions", regions)
    return info


def encoded(picture: Image.Image | np.ndarray, result: bool = True) -> bytes:
    """A picture, or an array of grey values or colours, as a PNG that is marked as a result unless it is none."""
    file = io.BytesIO()
    (Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture).save(file, "PNG", pnginfo=picture_info() if result else None)
    return file.getvalue()


def write_whole(path: Path, data: bytes, before: Callable[[Path], None] | None = None) -> None:
    """Write a file, complete or not at all; `before` it is renamed to its path, it is elsewhere. InputError where it cannot be written."""
    temporary = path.with_name(f".{os.getpid()}-{os.urandom(4).hex()}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # a power cut after the renaming does not leave a name without content
        if before:
            before(temporary)
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error}); choose another folder") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def remove_stale(folder: Path, age: float = STALE) -> None:
    """Remove unfinished files of killed processes that are older than `age` seconds; younger ones may be another process's."""
    with contextlib.suppress(OSError):
        for path in list(folder.iterdir()):
            if UNFINISHED.fullmatch(path.name) and path.lstat().st_mtime <= time.time() - age:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


class Outputs:
    """Guard against replacing the user's files: only a file that is byte for byte as blemish wrote it may be replaced.

    The index of a folder lists what was written there; a file that it does not list is the user's.
    """

    def __init__(self) -> None:
        self.known: dict[Path, set[str]] = {}  # digests by folder

    def check(self, paths: Iterable[str | Path], choose: str = "output=FOLDER") -> None:
        """Raise InputError where a path holds a file of the user's; `choose`: the option that chooses another place."""
        foreign = [str(path) for path in map(Path, paths) if os.path.lexists(path) and not self._is_own(path)]
        if foreign:
            more = f" and {len(foreign) - 5} more" if len(foreign) > 5 else ""
            raise InputError(f"{', '.join(foreign[:5])}{more}: exists and is not as blemish wrote it; move it away, or choose {choose}")

    def note(self, path: str | Path, content: str | Path | None = None) -> None:
        """List a file as written to `path`; before it is renamed to that path, its `content` is elsewhere."""
        path = Path(path)
        digest, known = file_digest(Path(content or path)), self._known(path.parent)
        if digest not in known:
            known.add(digest)
            name = path.name.encode("utf-8", "surrogateescape").replace(b"\n", b" ")
            with (path.parent / INDEX).open("ab") as file:
                file.write(f"\n{digest} ".encode() + name)  # the line break first: the last line may have been cut short

    def write(self, path: Path, data: bytes) -> None:
        """Write a file, complete or not at all; InputError where it would replace one of the user's or cannot be written."""

        def checked(temporary: Path) -> None:
            self.check([path])
            self.note(path, temporary)

        write_whole(path, data, checked)

    def _is_own(self, path: Path) -> bool:
        with contextlib.suppress(OSError):
            known = self._known(path.parent)
            return bool(known) and path.is_file() and not path.is_symlink() and file_digest(path) in known
        return False

    def _known(self, folder: Path) -> set[str]:
        if folder not in self.known:
            self.known[folder] = set()
            with contextlib.suppress(OSError):
                lines = (folder / INDEX).read_bytes().splitlines()
                self.known[folder] = {line.split()[0].decode("ascii", "replace") for line in lines if line.strip()}
        return self.known[folder]


def images_at(path: str | Path) -> list[Path]:
    """Return an image itself, or every image below a folder; InputError if there is none, or it is a picture that blemish wrote."""
    path = Path(path).expanduser()
    if path.is_file():
        if is_result(path):
            raise InputError(f"input={path}: a picture that blemish wrote; expected an image")
        return [path]
    images = find_images(path) if path.is_dir() else []
    if not images:
        raise InputError(f"input={path}: {'no image in this folder' if path.is_dir() else 'no such file or folder'}")
    return images


def output_names(paths: Sequence[Path], root: Path) -> dict[Path, Path]:
    """Name the outputs of each image, relative to the output folder: its path below `root`, without its suffix unless two would be equal.

    A name that is too long for a file system, or still equals another where case does not count, ends with a digest of the path.
    """
    bare = {path: path.relative_to(root).with_suffix("") for path in paths}
    full = {path: name.with_name(path.name.replace(".", "_")) for path, name in bare.items()}
    names = {path: name if one else full[path] for path, name, one in _unique(bare)}
    for path, name, one in list(_unique(names)):
        end = f"-{digest_of(os.fsencode(path.relative_to(root)))}"
        if not one or len(os.fsencode(name.name)) > LONGEST:
            stem = name.name
            while len(os.fsencode(stem + end)) > LONGEST:
                stem = stem[:-1]
            names[path] = name.with_name(stem + end)
    return names


def _unique(names: Mapping[Path, Path]) -> Iterator[tuple[Path, Path, bool]]:
    """Yield path, name, and whether no other name equals it where case does not count."""
    folded = {path: unicodedata.normalize("NFC", str(name)).casefold() for path, name in names.items()}
    counts = Counter(folded.values())
    for path, name in names.items():
        yield path, name, counts[folded[path]] == 1
