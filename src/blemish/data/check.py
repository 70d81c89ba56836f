"""What is in a data set: counts, masks, sizes and bit depths by split and defect type, and every file with a problem."""

import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from blemish.data import contradictions
from blemish.data.dataset import threaded
from blemish.data.manifest import SPLITS, Sample, write_manifest
from blemish.data.masks import Marked, interpret
from blemish.data.module import ImageData
from blemish.edge.errors import InputError
from blemish.edge.reading import read
from blemish.types import NORMAL

MOST = 0.9  # of an image, or of its border: no defect marks more
PROBLEMS = ("empty", "odd", "wrong size", "unreadable")


class Mask(NamedTuple):
    """What is known of a mask without its pixels."""

    share: float  # of the pixels that are marked
    border: float  # of the pixels at the image's border that are marked
    levels: tuple[float, ...]
    kind: str
    alpha: bool


def check(data: ImageData) -> list[dict[str, Any]]:
    """Read every image and mask once; returns a row for each split and defect type, in their order, a tile counting as an image.

    A row has split, defect, images, masks (images with a mask file or boxes), "no mask" (images that are not normal, with neither), marked
    (share of an image that a mask marks: median and range), levels (of the masks, and how they are read), lists of files that are empty
    (mark nothing), odd (mark nearly all of an image, or its border), of "wrong size", and unreadable, with the reason, sizes, and kinds
    (dtype, and grey or colour). InputError only if the data set itself is missing. Sets data.samples if they are not set.
    """
    data.samples = data.samples or data.listed()
    by_files = {(sample.path, sample.mask): sample for sample in data.samples}  # tiles share their image
    found = dict(zip(by_files, threaded(lambda one: _inspect(data, one), list(by_files.values()), "reading every image"), strict=True))
    groups = defaultdict(list)
    for sample in data.samples:
        groups[SPLITS.index(sample.split), sample.defect].append(sample)
    return [_row(members, [found[files] for files in {(s.path, s.mask): None for s in members}]) for _, members in sorted(groups.items())]


def _inspect(data: ImageData, sample: Sample) -> dict[str, list]:
    """What there is to list of a sample's files."""
    found: dict[str, list] = defaultdict(list)
    try:
        image = read(data.root / sample.path)
        found["sizes"] = [image.shape[1::-1]]
        found["kinds"] = [f"{image.dtype.name} {'grey' if image.ndim == 2 else 'colour'}"]
    except InputError as error:
        found["unreadable"].append(str(error))
    try:
        marked = interpret(read(data.root / sample.mask, labels=True)) if sample.mask else None
    except InputError as error:
        found["unreadable"].append(str(error))
        return found
    if marked is not None:
        mask, size = _mask(marked), marked.mask.shape[::-1]
        found["masks"] = [mask]
        if not mask.share and sample.label != NORMAL:
            found["empty"] = [sample.mask]
        if (inverted := mask.share > 0.5 and mask.border > MOST) or mask.share > MOST:
            found["odd"] = [f"{sample.mask}: marks {mask.share:.0%} of the image{' and its border, as if inverted' * inverted}"]
        if found["sizes"] not in ([], [size]):
            found["wrong size"] = [f"{data.root / sample.mask}: {_sizes([size])} pixels, its image {_sizes(found['sizes'])}"]
    return found


def _mask(marked: Marked) -> Mask:
    mask = marked.mask
    border = np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
    return Mask(float(mask.mean()), float(border.mean()), marked.levels, marked.kind, marked.alpha)


def _row(members: list[Sample], found: list[dict[str, list]]) -> dict[str, Any]:
    together = {name: [item for one in found for item in one[name]] for name in ("masks", "sizes", "kinds", *PROBLEMS)}
    unmarked = [sample for sample in members if not (sample.mask or sample.boxes)]
    return {
        "split": members[0].split,
        "defect": members[0].defect,
        "images": len(members),
        "masks": len(members) - len(unmarked),
        "no mask": sum(sample.label != NORMAL for sample in unmarked),
        "marked": _shares([mask.share for mask in together["masks"]]),
        "levels": _levels(together["masks"]),
        **{name: together[name] for name in PROBLEMS},
        "sizes": _sizes(together["sizes"]),
        "kinds": ", ".join(f"{kind} {count}" for kind, count in sorted(Counter(together["kinds"]).items())),
    }


def _sizes(sizes: list[tuple[int, int]], most: int = 3) -> str:
    distinct = sorted(set(sizes))
    if len(distinct) <= most:
        return ", ".join(f"{width}×{height}" for width, height in distinct)
    widths, heights = zip(*distinct, strict=True)
    return f"{min(widths)}–{max(widths)} × {min(heights)}–{max(heights)}"


def _shares(shares: Sequence[float]) -> str:
    if not shares:
        return ""
    low, middle, high = (f"{100 * share:.2g}" if share < 0.995 else "100" for share in (min(shares), np.median(shares), max(shares)))
    return f"{middle} %" if low == high else f"{middle} % ({low}–{high})"


def _levels(masks: Sequence[Mask], most: int = 8) -> str:
    """The levels of the masks of each kind together, and how many masks are of it."""
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


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows for the terminal, with counts in place of lists; those that make the exit status 1 are red."""
    made = Table(box=SIMPLE, pad_edge=False)
    for name in rows[0] if rows else ():
        made.add_column(name, **({"overflow": "fold"} if name in ("levels", "sizes", "kinds") else {"no_wrap": True}))
    for row in rows:
        cells = [len(cell) if isinstance(cell, list) else cell for cell in row.values()]
        made.add_row(*(escape(str(cell)) for cell in cells), style="red" if is_faulty(row) else None)
    return made


def is_faulty(row: dict[str, Any]) -> bool:
    return bool(row["wrong size"] or row["unreadable"])


def report(data: ImageData, output: str) -> int:
    """Print the table and every file with a problem, and write the manifest to `output`.

    Returns the exit status: 1 if files cannot be read, masks have a wrong size, images have no ROI, or labels cannot be true.
    """
    data.prepare_data()
    rows = check(data)
    console = Console(soft_wrap=True) if sys.stdout.isatty() else Console(width=160, soft_wrap=True)
    console.print(table(rows), soft_wrap=False)
    rois, without = roi_lines(data)
    lines = [line for row in rows for line in row["unreadable"] + row["wrong size"] + row["odd"]]
    lines += [f"{mask}: no anomalous pixel" for row in rows for mask in row["empty"]]
    wrong, twice = contradiction_lines(data)
    write_manifest(output, data.samples)
    for line in [*lines, *without, *rois, *wrong, *twice, f"{len(data.samples)} rows in {output}"]:
        console.print(line, markup=False, highlight=False)
    return int(any(map(is_faulty, rows)) or bool(without or wrong))


def contradiction_lines(data: ImageData) -> tuple[list[str], list[str]]:
    """Lines about rows that no detector is to be trained with, and about files of the same content; lines are those of the manifest."""
    named = {sample.key: f"{sample.key} (line {line})" for line, sample in enumerate(data.samples, 2)}
    wrong, same = contradictions.find(data.samples, data.root, data.split_of("train"))
    texts = [", ".join(f"{named[one.key]} in {one.split}" for one in group) for group in same]
    return [f"{named[one.key]}: {reason}" for one, reason in wrong], [f"{text}: the same content" for text in texts]


def roi_lines(data: ImageData) -> tuple[list[str], list[str]]:
    """Lines about the masks of data.roi, and about images without one."""
    if data.roi is None:
        return [], []
    masks: dict[Path, Mask] = {}
    without = []
    for path in {sample.path: None for sample in data.samples}:
        try:
            file = data.roi.file(data.root / path)
            masks[file] = masks.get(file) or _mask(interpret(read(file, labels=True)))
        except InputError as error:
            without.append(str(error))
    without += [f"{file}: no pixel is in the ROI" for file, mask in masks.items() if not mask.share]
    lines = [f"{file}: all pixels are in the ROI" for file, mask in masks.items() if mask.share == 1]
    if masks:
        share, levels = _shares([mask.share for mask in masks.values()]), _levels(list(masks.values()))
        lines.append(f"data.roi={data.roi.name}: {share} of the pixels are in the ROI; levels {levels}")
    return lines, without
