"""What is in a data set: counts, masks, sizes and bit depths by split and defect type, and every file that is not in order."""

import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from blemish.data.module import ImageData, binary, threaded
from blemish.data.samples import SPLITS, Sample, write_manifest
from blemish.edge.reading import read
from blemish.types import NORMAL, InputError


class Row(NamedTuple):
    """The images of one split and one defect type; a tile counts as an image."""

    split: str
    defect: str
    images: int
    masks: int  # with a mask file or boxes
    missing: int  # not normal, and neither
    empty: list[str]  # mask files without an anomalous pixel
    wrong: list[str]  # mask files of another size than their image
    unreadable: list[str]  # images and masks, each with the reason
    sizes: str  # width×height, distinct ones or the range
    kinds: str  # dtype, and grey or colour

    @property
    def faulty(self) -> bool:
        return bool(self.wrong or self.unreadable)


class _Look(NamedTuple):
    size: tuple[int, int] | None = None  # width, height
    kind: str = ""
    empty: str = ""
    wrong: str = ""
    unreadable: tuple[str, ...] = ()


def check(data: ImageData) -> list[Row]:
    """Read every image and mask of the data set once; rows in the order of the splits, defect types by name.

    Nothing but the absence of the data set itself is an InputError: what is wrong with a file is in the rows. Sets
    `data.samples`, the manifest, where `data.setup` has not done so.
    """
    data.samples = data.samples or data.listed()
    by_files = {(sample.path, sample.mask): sample for sample in data.samples}  # tiles share their image
    looks = dict(zip(by_files, threaded(lambda sample: _look(data, sample), list(by_files.values()), "reading every image"), strict=True))
    groups = defaultdict(list)
    for sample in data.samples:
        groups[SPLITS.index(sample.split), sample.defect].append(sample)
    return [_row(members, [looks[files] for files in {(s.path, s.mask): None for s in members}]) for _, members in sorted(groups.items())]


def _look(data: ImageData, sample: Sample) -> _Look:
    unreadable, image, mask = [], None, None
    try:
        image = read(data.root / sample.path)
    except InputError as error:
        unreadable.append(str(error))
    try:
        mask = read(data.root / sample.mask) if sample.mask else None
    except InputError as error:
        unreadable.append(str(error))
    size = None if image is None else (image.shape[1], image.shape[0])
    kind = "" if image is None else f"{image.dtype.name} {'grey' if image.ndim == 2 else 'colour'}"
    empty = sample.mask if mask is not None and not binary(mask).any() else ""
    wrong = ""
    if image is not None and mask is not None and image.shape[:2] != mask.shape[:2]:
        wrong = f"{data.root / sample.mask}: {mask.shape[1]}×{mask.shape[0]} pixels, its image {size[0]}×{size[1]}"
    return _Look(size, kind, empty, wrong, tuple(unreadable))


def _row(members: list[Sample], looks: list[_Look]) -> Row:
    return Row(
        split=members[0].split,
        defect=members[0].defect,
        images=len(members),
        masks=sum(bool(sample.mask or sample.boxes) for sample in members),
        missing=sum(sample.label != NORMAL and not (sample.mask or sample.boxes) for sample in members),
        empty=[look.empty for look in looks if look.empty],
        wrong=[look.wrong for look in looks if look.wrong],
        unreadable=[reason for look in looks for reason in look.unreadable],
        sizes=_sizes([look.size for look in looks if look.size]),
        kinds=", ".join(f"{kind} {count}" for kind, count in sorted(Counter(look.kind for look in looks if look.kind).items())),
    )


def _sizes(sizes: list[tuple[int, int]], most: int = 3) -> str:
    distinct = sorted(set(sizes))
    if len(distinct) <= most:
        return ", ".join(f"{width}×{height}" for width, height in distinct)
    low, high = (tuple(pick(side) for side in zip(*distinct, strict=True)) for pick in (min, max))
    return f"{low[0]}–{high[0]} × {low[1]}–{high[1]}"


def table(rows: Iterable[Row]) -> Table:
    """The rows for the terminal, counts where a row has lists."""
    made = Table(box=SIMPLE, pad_edge=False)
    for name in ("split", "defect", "images", "masks", "no mask", "empty", "wrong size", "unreadable"):
        made.add_column(name, no_wrap=True)
    for name in ("sizes", "kinds"):
        made.add_column(name, overflow="fold")
    for row in rows:
        cells = [len(cell) if isinstance(cell, list) else cell for cell in row]
        made.add_row(*(escape(str(cell)) for cell in cells), style="red" if row.faulty else None)
    return made


def report(data: ImageData, output: str) -> int:
    """Show the table and every faulty file, write the manifest to `output`; 1 if files cannot be read or masks are of a wrong size."""
    data.prepare_data()
    rows = check(data)
    console = Console(soft_wrap=True) if sys.stdout.isatty() else Console(width=160, soft_wrap=True)
    console.print(table(rows), soft_wrap=False)
    for line in (line for row in rows for line in row.unreadable + row.wrong + [f"{mask}: no anomalous pixel" for mask in row.empty]):
        console.print(line, markup=False, highlight=False)
    write_manifest(output, data.samples)
    console.print(f"{len(data.samples)} rows in {output}", markup=False, highlight=False)
    return int(any(row.faulty for row in rows))
