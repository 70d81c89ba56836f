"""What is in a data set: counts, masks, sizes and bit depths by split and defect type, and every file that is not in order."""

import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from blemish.data.dataset import threaded
from blemish.data.manifest import SPLITS, Sample, write_manifest
from blemish.data.masks import Marked, interpret
from blemish.data.module import ImageData
from blemish.edge.errors import InputError
from blemish.edge.reading import read
from blemish.types import NORMAL

MOST = 0.9  # of an image: a defect has less


class Row(NamedTuple):
    """The images of one split and one defect type; a tile counts as an image."""

    split: str
    defect: str
    images: int
    masks: int  # with a mask file or boxes
    missing: int  # not normal, and neither
    marked: str  # share of an image that a mask marks, the median and the range
    levels: str  # of the masks, and how they are interpret
    empty: list[str]  # mask files without an anomalous pixel
    odd: list[str]  # mask files that mark nearly all of an image, or its border, each with the share
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
    mask: "_Mask | None" = None
    empty: str = ""
    odd: str = ""
    wrong: str = ""
    unreadable: tuple[str, ...] = ()


class _Mask(NamedTuple):
    share: float  # of the pixels that are marked
    border: float  # of those at the image's border
    levels: tuple[float, ...]
    kind: str
    alpha: bool


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
        mask = interpret(read(data.root / sample.mask, labels=True)) if sample.mask else None
    except InputError as error:
        unreadable.append(str(error))
    size = None if image is None else (image.shape[1], image.shape[0])
    kind = "" if image is None else f"{image.dtype.name} {'grey' if image.ndim == 2 else 'colour'}"
    if mask is None:
        return _Look(size, kind, unreadable=tuple(unreadable))
    found, (height, width) = _measured(mask), mask.mask.shape
    wrong = (
        f"{data.root / sample.mask}: {width}×{height} pixels, its image {size[0]}×{size[1]}" if size not in (None, (width, height)) else ""
    )
    inverted = found.share > 0.5 and found.border > MOST
    odd = (
        f"{sample.mask}: {found.share:.0%} of the image is marked{' and its border, as if inverted' * inverted}; expected the defect alone"
    )
    suspicious = found.share > MOST or inverted
    return _Look(size, kind, found, sample.mask if not found.share else "", odd if suspicious else "", wrong, tuple(unreadable))


def _measured(marked: Marked) -> _Mask:
    mask = marked.mask
    border = np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
    return _Mask(float(mask.mean()), float(border.mean()), marked.levels, marked.kind, marked.alpha)


def _row(members: list[Sample], looks: list[_Look]) -> Row:
    return Row(
        split=members[0].split,
        defect=members[0].defect,
        images=len(members),
        masks=sum(bool(sample.mask or sample.boxes) for sample in members),
        missing=sum(sample.label != NORMAL and not (sample.mask or sample.boxes) for sample in members),
        marked=_shares([look.mask.share for look in looks if look.mask]),
        levels=_levels([look.mask for look in looks if look.mask]),
        empty=[look.empty for look in looks if look.empty],
        odd=[look.odd for look in looks if look.odd],
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


def _shares(shares: Sequence[float]) -> str:
    if not shares:
        return ""
    low, middle, high = (f"{100 * share:.2g}" if share < 0.995 else "100" for share in (min(shares), np.median(shares), max(shares)))
    return f"{middle} %" if low == high else f"{middle} % ({low}–{high})"


def _levels(masks: Sequence[_Mask], most: int = 8) -> str:
    """The levels that masks of each kind have together, and how many masks there are of it."""
    kinds = defaultdict(list)
    for mask in masks:
        kinds[mask.alpha, mask.kind].append(mask)
    texts = []
    for (alpha, kind), members in sorted(kinds.items()):
        levels = sorted({level for mask in members for level in mask.levels})
        short = len(levels) <= most and kind != "soft"
        text = " ".join(f"{level:g}" for level in levels) if short else f"{levels[0]:g}–{levels[-1]:g}"
        texts.append(f"{'alpha ' * alpha}{text}{f' {kind}' * (kind != 'plain')} ×{len(members)}")
    return ", ".join(texts)


def table(rows: Iterable[Row]) -> Table:
    """The rows for the terminal, counts where a row has lists."""
    made = Table(box=SIMPLE, pad_edge=False)
    names = "split,defect,images,masks,no mask,marked,levels,empty,odd,wrong size,unreadable,sizes,kinds"  # of Row's fields
    for name in names.split(","):
        made.add_column(name, **({"overflow": "fold"} if name in ("levels", "sizes", "kinds") else {"no_wrap": True}))
    for row in rows:
        cells = [len(cell) if isinstance(cell, list) else cell for cell in row]
        made.add_row(*(escape(str(cell)) for cell in cells), style="red" if row.faulty else None)
    return made


def report(data: ImageData, output: str) -> int:
    """Show the table and every faulty or odd file, write the manifest to `output`.

    1 if files cannot be read, masks are of a wrong size, or images have no roi.
    """
    data.prepare_data()
    rows = check(data)
    console = Console(soft_wrap=True) if sys.stdout.isatty() else Console(width=160, soft_wrap=True)
    console.print(table(rows), soft_wrap=False)
    regions, without = roi_of(data)
    empty = [f"{mask}: no anomalous pixel" for row in rows for mask in row.empty]
    faults = [line for row in rows for line in row.unreadable + row.wrong + row.odd] + empty
    for line in [*faults, *without, *regions]:
        console.print(line, markup=False, highlight=False)
    write_manifest(output, data.samples)
    console.print(f"{len(data.samples)} rows in {output}", markup=False, highlight=False)
    return int(any(row.faulty for row in rows) or bool(without))


def roi_of(data: ImageData) -> tuple[list[str], list[str]]:
    """What the masks of data.roi mark, in words, and why images have none."""
    if data.roi is None:
        return [], []
    masks: dict[Path, _Mask] = {}
    without = []
    for path in {sample.path: None for sample in data.samples}:
        try:
            file = data.roi.file(data.root / path)
            masks[file] = masks.get(file) or _measured(interpret(read(file, labels=True)))
        except InputError as error:
            without.append(str(error))
    without += [f"{file}: no pixel is looked at" for file, mask in masks.items() if not mask.share]
    marked = [f"{file}: all pixels are looked at" for file, mask in masks.items() if mask.share == 1]
    if masks:
        shares, levels = _shares([mask.share for mask in masks.values()]), _levels(list(masks.values()))
        marked.append(f"data.roi={data.roi.name}: {shares} of the pixels are looked at; levels {levels}")
    return marked, without
