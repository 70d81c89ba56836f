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

# fitted: trained on by the run that this one updates; defects: labelled ones to train on
SPLITS = ("train", "fitted", "defects", "calibrate", "test", "unlabelled", "skipped")
GOOD = "good"  # the defect type of normal images
RESERVED = (GOOD, "all", "pooled")  # rows of tables of metrics, which no defect type can be
REQUIRED = ("path", "split", "label", "defect")  # columns that a manifest must have


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
    product: str = ""  # of several, see `data.products`

    @property
    def key(self) -> str:
        """Unique in a manifest; Batch.path holds keys."""
        return f"{self.path}#{self.tile}" if self.tile else self.path


def with_defect(sample: Sample) -> Sample:
    """The sample with a defect type that tables can show: that of normal images is GOOD, and no other is RESERVED."""
    if sample.label == NORMAL:
        return sample._replace(defect=GOOD)
    return sample._replace(defect=f"{sample.defect} (defect)") if sample.defect in RESERVED else sample


COLUMNS = ", ".join(Sample._fields)


def parse_boxes(text: str) -> list[tuple[int, int, int, int]]:
    """The boxes (x1, y1, x2, y2) in "x1 y1 x2 y2;…", half-open pixels; InputError if one is malformed or empty."""
    boxes = [_four(part, None, f"boxes {text!r}: expected whole numbers 'x1 y1 x2 y2;…'") for part in text.split(";") if part.strip()]
    for x1, y1, x2, y2 in boxes:
        if not (0 <= x1 < x2 and 0 <= y1 < y2):
            raise InputError(f"boxes {text!r}: expected 0 ≤ x1 < x2 and 0 ≤ y1 < y2")
    return boxes


def parse_tile(text: str) -> tuple[int, int, int, int] | None:
    """The tile (x, y, w, h) in "x,y,w,h", None for the whole image; InputError if it is malformed or empty."""
    if not text:
        return None
    x, y, w, h = _four(text, ",", f"tile {text!r}: expected whole numbers 'x,y,w,h'")
    if min(x, y) < 0 or min(w, h) < 1:
        raise InputError(f"tile {text!r}: expected x, y ≥ 0 and w, h ≥ 1")
    return x, y, w, h


def _four(text: str, separator: str | None, message: str) -> tuple[int, int, int, int]:
    try:
        a, b, c, d = map(int, text.split(separator))
    except ValueError:
        raise InputError(message) from None
    return a, b, c, d


def read_manifest(path: str | Path) -> list[Sample]:
    """The samples of a manifest CSV; InputError names the file and the line of what cannot be used."""
    path = Path(path)
    try:
        # utf-8-sig: a spreadsheet may have written a byte order mark; surrogates stand for file names that are not UTF-8
        with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            reader = csv.DictReader(file, strict=True)
            rows = [(reader.line_num, row) for row in reader]
            found = reader.fieldnames or []
    except (OSError, csv.Error) as error:
        raise InputError(f"manifest {path}: cannot be read ({error}); expected a CSV in UTF-8 with the columns {COLUMNS}") from error
    if absent := [column for column in REQUIRED if column not in found]:
        raise InputError(f"manifest {path}: no column {', '.join(absent)}; found {', '.join(found) or 'nothing'}, expected {COLUMNS}")
    if not rows:
        raise InputError(f"manifest {path}: no rows; expected one row per image")
    samples, lines = [], {}
    for line, row in rows:
        try:
            samples.append(_sample(row))
            if (first := lines.setdefault(samples[-1].key, line)) != line:
                raise InputError(f"{samples[-1].key} is on line {first} too; expected it once")
        except InputError as error:
            raise InputError(f"manifest {path}, line {line}: {error}") from None
    return samples


def lines_of(path: Path) -> dict[str, int]:
    """The line of each sample's key in a manifest."""
    return {sample.key: line for line, sample in enumerate(read_manifest(path), 2)}


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
    """Write a manifest CSV; InputError if it cannot be written."""
    samples = list(samples)
    columns = Sample._fields if any(sample.product for sample in samples) else Sample._fields[:-1]
    write_csv(path, columns, (sample[: len(columns)] for sample in samples))


def manifest_digest(samples: Iterable[Sample]) -> str:
    """16 hex digits that identify images, splits and truth, independent of the order of the rows."""
    text = json.dumps(sorted(sample if sample.product else sample[:-1] for sample in samples), ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
