"""Contradictions that a manifest shows: one image in two places, and labels that the split or the mask denies."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from blemish.data.dataset import cut, threaded
from blemish.data.manifest import SPLITS, Sample
from blemish.data.masks import read_mask
from blemish.edge.errors import InputError
from blemish.types import ANOMALOUS, NORMAL

LEARNT = ("train", "fitted", "calibrate")  # splits that have normal images alone


class Contradictions(NamedTuple):
    """What `find` found."""

    wrong: list[tuple[Sample, str]]  # rows that no detector is to be trained with, and why
    same: list[list[Sample]]  # files of the same content, a row of each

    @property
    def counts(self) -> str:
        """How many files have the content of others, by their splits."""
        found = Counter(" and ".join(sorted({one.split for one in group}, key=SPLITS.index)) for group in self.same for _ in group)
        return ", ".join(f"{count} in {splits}" for splits, count in sorted(found.items()))


def find(samples: Sequence[Sample], root: Path, train: str = "train") -> Contradictions:
    """The contradictions among samples with digests; `train` is the split that is trained on. Reads the masks of normal images."""
    learnt = [one for one in samples if one.label == ANOMALOUS and one.split in LEARNT]
    wrong = [(one, f"label {ANOMALOUS} in split {one.split}; expected split test") for one in learnt]
    odd = [one for one in samples if one.split == "defects" and one.label != ANOMALOUS]
    wrong += [(one, f"label {one.label} in split defects; expected label {ANOMALOUS}") for one in odd]
    masked = [one for one in samples if one.label == NORMAL and (one.mask or one.boxes) and one.split != "skipped"]
    marks = threaded(lambda one: _marks(one, root), masked)
    filled = [one for one, some in zip(masked, marks, strict=True) if some]
    wrong += [(one, f"label {NORMAL}, but {one.mask or 'boxes'} marks pixels; expected label {ANOMALOUS}, or no mask") for one in filled]
    by_content = defaultdict(dict)
    for one in samples:
        if one.digest and one.split != "skipped":
            by_content[one.digest].setdefault(one.path, one)
    trained = {one.path: one for one in samples if one.split == train}
    contents = {one.digest or one.path for one in trained.values()}
    if len(trained) > 1 == len(contents):
        wrong.append((min(trained.values()), f"all {len(trained)} images of split {train} have the same content; expected different ones"))
    return Contradictions(wrong, [list(paths.values()) for paths in by_content.values() if len(paths) > 1])


def _marks(sample: Sample, root: Path) -> bool:
    """Whether the mask or boxes of a sample mark a pixel of its tile; one that cannot be read is reported where it is used."""
    try:
        return bool(sample.boxes) if not sample.mask else bool(cut(root, sample, read_mask(root / sample.mask)).any())
    except InputError:
        return False
