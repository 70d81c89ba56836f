"""Which files are blemish's own: pictures that say so themselves, and, in each folder it wrote to, an index of what it may replace."""

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from PIL.PngImagePlugin import PngInfo

from blemish.edge.reading import SOFTWARE, file_digest
from blemish.types import InputError

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
