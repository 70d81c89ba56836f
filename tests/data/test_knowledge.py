"""Few shots, labelled defects and contamination: which samples move, and that none of them is tested."""

from collections import Counter

import pytest

from blemish.data.knowledge import describe, limit
from blemish.data.manifest import Sample
from blemish.edge.errors import InputError

SAMPLES = [Sample(f"n{i:02}", "train", 0, "good") for i in range(20)] + [Sample(f"t{i}", "test", 0, "good") for i in range(4)]
SAMPLES += [Sample(f"{kind}{i}", "test", 1, kind, mask=f"m{i}") for kind in ("crack", "hole") for i in range(5)]


def counts(samples):
    return dict(Counter((sample.split, sample.label) for sample in samples))


def of(samples, *splits):
    return {sample.key for sample in samples if sample.split in splits}


def test_nothing_asked_for_changes_nothing():
    assert limit(SAMPLES, None, 0, 0.0, 0) == SAMPLES
    assert describe(None, 0, 0.0) is describe(None, [], 0) is None


def test_shots_are_drawn_by_the_seed_and_the_others_are_listed():
    four, five = (limit(SAMPLES, k, 0, 0.0, 0) for k in (4, 5))
    assert counts(four) == {("train", 0): 4, ("skipped", 0): 16, ("test", 0): 4, ("test", 1): 10}
    assert of(four, "train") < of(five, "train")
    assert of(four, "train") != of(limit(SAMPLES, 4, 0, 0.0, 1), "train")
    assert describe(4, 0, 0.0) == "4 shots"


def test_labelled_defects_leave_the_test_with_their_masks():
    three = limit(SAMPLES, None, 3, 0.0, 0)
    assert counts(three) == {("train", 0): 20, ("defects", 1): 3, ("test", 0): 4, ("test", 1): 7}
    assert all(sample.mask for sample in three if sample.split == "defects")
    assert of(limit(SAMPLES, None, 1, 0.0, 0), "defects") < of(three, "defects")
    kind = limit(SAMPLES, None, ["hole"], 0.0, 0)
    assert of(kind, "defects") == {f"hole{i}" for i in range(5)}
    assert describe(None, 3, 0.0) == "3 defects"
    assert describe(None, ["crack", "hole"], 0.0) == "crack+hole defects"


@pytest.mark.parametrize(("share", "count"), [(0.05, 1), (0.1, 2), (0.2, 5)])
def test_contamination_is_a_share_of_the_training_images_without_label_and_mask(share, count):
    found = limit(SAMPLES, None, 0, share, 0)
    hidden = [sample for sample in found if sample.split == "train" and sample.label != 0]
    assert len(hidden) == count == round(share * (20 + count))
    assert all((sample.label, sample.mask) == (-1, "") for sample in hidden)
    assert counts(found)["test", 1] == 10 - count


def test_what_a_run_lists_is_drawn_again_as_it_is():
    once = limit(SAMPLES, 8, 2, 0.2, 0)
    assert counts(once) == {("train", 0): 8, ("train", -1): 2, ("skipped", 0): 12, ("defects", 1): 2, ("test", 0): 4, ("test", 1): 6}
    assert limit(once, 8, 2, 0.2, 0) == once


def test_the_other_tiles_of_a_defect_are_not_tested():
    tiles = [Sample("a", "train", 0, "good"), *(Sample(f"d{i}", "test", y, "x", tile=f"{8 * y},0,8,8") for i in range(3) for y in (0, 1))]
    found = limit(tiles, None, 1, 0.0, 0)
    assert counts(found) == {("train", 0): 1, ("defects", 1): 1, ("skipped", 0): 1, ("test", 0): 2, ("test", 1): 2}


@pytest.mark.parametrize(
    ("settings", "key"),
    [((21, 0, 0.0), "shots"), ((None, 10, 0.0), "defects"), ((None, ["hull"], 0.0), "defects.*hole"), ((None, 0, 0.5), "contamination")],
)
def test_more_than_there_is(settings, key):
    with pytest.raises(InputError, match=rf"data\.{key}"):
        limit(SAMPLES, *settings, 0)
