"""The manifest: every image of a data set with its split and truth, as rows of a CSV that reproduces a run."""

import csv
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from blemish.edge.errors import InputError
from blemish.files import write_csv
from blemish.types import ANOMALOUS, NORMAL, UNKNOWN

SPLITS = ("train", "fitted", "calibrate", "test", "unlabelled", "skipped")  # fitted: trained on by the run that this one updates
TEXT = {"encoding": "utf-8", "errors": "surrogateescape"}  # surrogates stand for the bytes of a file name that is not UTF-8
REQUIRED = ("path", "split", "label", "defect")  # the other columns of a manifest may be absent


class Sample(NamedTuple):
    """One row of the manifest: an image, or a tile of one."""

    path: str  # relative to the root, POSIX separators
    split: str  # one of SPLITS
    label: int  # NORMAL, ANOMALOUS or UNKNOWN
    defect: str  # defect type; "good" for normal images, "unknown" without a label
    mask: str = ""  # relative path of the mask file, of the size of the whole image; "" if there is none
    boxes: str = ""  # "x1 y1 x2 y2;…" in pixels of the whole image, half-open; rasterised when there is no mask file
    tile: str = ""  # "x,y,w,h" in pixels: the sample is this tile of the image; "" the whole image
    digest: str = ""  # 16 hex digits of the blake2b of the image file's content

    @property
    def key(self) -> str:
        """What tells this sample from all others, and what Batch.path carries."""
        return f"{self.path}#{self.tile}" if self.tile else self.path


COLUMNS = ", ".join(Sample._fields)


def parse_boxes(text: str) -> list[tuple[int, int, int, int]]:
    """ "x1 y1 x2 y2;…" as (x1, y1, x2, y2) per box, half-open pixels; InputError if a box is malformed or empty."""
    boxes = []
    for part in filter(None, (part.strip() for part in text.split(";"))):
        try:
            x1, y1, x2, y2 = (int(number) for number in part.split())
        except ValueError:
            raise InputError(f"boxes {text!r}: expected whole numbers 'x1 y1 x2 y2;…'") from None
        if not (0 <= x1 < x2 and 0 <= y1 < y2):
            raise InputError(f"boxes {text!r}: expected 0 ≤ x1 < x2 and 0 ≤ y1 < y2, found {part!r}")
        boxes.append((x1, y1, x2, y2))
    return boxes


def parse_tile(text: str) -> tuple[int, int, int, int] | None:
    """ "x,y,w,h" as four pixel counts, None for the whole image; InputError if malformed or empty."""
    if not text:
        return None
    try:
        x, y, w, h = (int(number) for number in text.split(","))
    except ValueError:
        raise InputError(f"tile {text!r}: expected whole numbers 'x,y,w,h'") from None
    if min(x, y) < 0 or min(w, h) < 1:
        raise InputError(f"tile {text!r}: expected x, y ≥ 0 and w, h ≥ 1")
    return x, y, w, h


def read_manifest(path: str | Path) -> list[Sample]:
    """The samples of a manifest CSV in the order of its rows; InputError names the file and the line of what cannot be used."""
    path = Path(path)
    try:
        with path.open(newline="", **TEXT | {"encoding": "utf-8-sig"}) as file:  # a spreadsheet may have put a byte order mark
            reader = csv.DictReader(file, strict=True)
            found = reader.fieldnames or []
            rows = [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"manifest {path}: cannot be read ({error}); expected a CSV in UTF-8 with the columns {COLUMNS}") from error
    if absent := [column for column in REQUIRED if column not in found]:
        raise InputError(f"manifest {path}: no column {', '.join(absent)}; found {', '.join(found) or 'nothing'}, expected {COLUMNS}")
    if not rows:
        raise InputError(f"manifest {path}: no rows; expected one row per image")
    samples, seen = [], {}
    for line, row in rows:
        try:
            sample = _sample(row)
        except InputError as error:
            raise InputError(f"manifest {path}, line {line}: {error}") from None
        if sample.key in seen:
            raise InputError(f"manifest {path}, line {line}: {sample.key} is on line {seen[sample.key]} too; expected it once")
        seen[sample.key] = line
        samples.append(sample)
    return samples


def _sample(row: dict) -> Sample:
    if None in row or None in row.values():
        raise InputError("more or fewer fields than the header has")
    fields = {name: row[name] for name in Sample._fields if name in row}
    if fields["split"] not in SPLITS:
        raise InputError(f"split {fields['split']!r}: expected one of {', '.join(SPLITS)}")
    if fields["label"] not in {str(label) for label in (NORMAL, ANOMALOUS, UNKNOWN)}:
        raise InputError(f"label {fields['label']!r}: expected {NORMAL} (normal), {ANOMALOUS} (anomalous) or {UNKNOWN} (unknown)")
    for name in ("path", "mask"):
        relative = PurePosixPath(fields.get(name, ""))
        if relative.is_absolute() or ".." in relative.parts or (name == "path" and not fields["path"]):
            raise InputError(f"{name} {fields[name]!r}: expected a path relative to data.root and inside it")
    parse_boxes(fields.get("boxes", ""))
    parse_tile(fields.get("tile", ""))
    return Sample(**{**fields, "label": int(fields["label"])})


def write_manifest(path: str | Path, samples: Iterable[Sample]) -> None:
    """Write the manifest CSV with every column of Sample; InputError if it cannot be written."""
    write_csv(path, Sample._fields, samples)


def manifest_digest(samples: Iterable[Sample]) -> str:
    """16 hex digits that stand for all rows, whatever their order: same images, splits and truth, same digest."""
    text = json.dumps(sorted(samples), ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
