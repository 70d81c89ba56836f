"""What a detector is given to learn from: few normal images, labelled defects, or training images that are not all normal."""

from collections.abc import Sequence

from blemish.data.manifest import Sample
from blemish.data.samplers import shuffled
from blemish.edge.checks import check_number, check_whole, nearest
from blemish.edge.errors import InputError
from blemish.types import ANOMALOUS, NORMAL, UNKNOWN

Defects = int | Sequence[str]


def check(shots: int | None, defects: Defects, contamination: float) -> None:
    """InputError for values that cannot be used."""
    check_whole("data", 1, also=(None,), shots=shots)
    check_number("data", "[0, 1)", contamination=contamination)
    if not (isinstance(defects, list | tuple) and all(isinstance(name, str) for name in defects)):
        check_whole("data", 0, defects=defects)


def describe(shots: int | None, defects: Defects, contamination: float) -> str | None:
    """Words for what differs from all normal training images and nothing else; None if nothing does."""
    count = f"{defects or ''}" if isinstance(defects, int) else "+".join(defects)
    parts = (shots and f"{shots} shots", count and f"{count} defects", contamination and f"{contamination:.3g} contaminated")
    return ", ".join(filter(None, parts)) or None


def limit(samples: Sequence[Sample], shots: int | None, defects: Defects, contamination: float, seed: int) -> list[Sample]:
    """The samples with splits that leave to training what is known; those that a smaller number draws, a larger one draws too.

    shots: normal training images, the others are "skipped". defects: labelled defects of the test, a number of them or the types of all
    of them, which get the split "defects". contamination: share of the training images that defects of the test make up, without label and
    mask. What else a drawn image's file has in the test, as other tiles, is skipped. Samples that already are as asked stay so.
    """
    split = {}  # by key, of the samples that change
    normal = [sample for sample in samples if sample.split == "train" and sample.label == NORMAL]
    if shots is not None:
        if len(normal) < shots:
            raise InputError(f"data.shots={shots}: found {len(normal)} normal training images; expected at most as many")
        split |= {sample.key: "skipped" for sample in shuffled(normal, seed)[shots:]}
        normal = normal[:shots]
    tested = [sample for sample in samples if sample.split == "test" and sample.label == ANOMALOUS]
    order = shuffled(tested, seed)
    if isinstance(defects, int):
        chosen = taken(order, defects - sum(sample.split == "defects" for sample in samples), f"data.defects={defects}")
    else:
        kinds = sorted({sample.defect for sample in samples if sample.label == ANOMALOUS})
        if unknown := [name for name in defects if name not in kinds]:
            raise InputError(
                f"data.defects={list(defects)}: no defect {unknown[0]!r}; {nearest(unknown[0], kinds)}found {', '.join(kinds)}"
            )
        chosen = [sample for sample in order if sample.defect in defects]
    split |= {sample.key: "defects" for sample in chosen}
    order = [sample for sample in order if sample.key not in split]
    share = round(contamination / (1 - contamination) * len(normal)) - sum(s.split == "train" and s.label == UNKNOWN for s in samples)
    added = taken(order, share, f"data.contamination={contamination:g}")
    split |= {sample.key: "train" for sample in added}
    files = {sample.path for sample in (*chosen, *added)}
    hidden = {"label": UNKNOWN, "mask": "", "boxes": ""}
    found = []
    for sample in samples:
        now = split.get(sample.key, "skipped" if sample.split == "test" and sample.path in files else sample.split)
        found.append(sample._replace(split=now, **(hidden if (sample.split, now) == ("test", "train") else {})))
    return found


def taken(order: Sequence[Sample], count: int, key: str) -> Sequence[Sample]:
    """The first `count` defects; InputError where none would be left to test."""
    if count > 0 and count >= len(order):
        raise InputError(f"{key}: takes {count} of {len(order)} defects; expected fewer, so that some are tested")
    return order[: max(count, 0)]
