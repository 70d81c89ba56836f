"""recipe=auto: what is chosen for which data, on the command line, in a cell of a sweep, and from Python."""

import logging

import numpy as np
import pytest
from support import tiny_overrides

from blemish.api import AnomalyDetector
from blemish.run import auto
from blemish.run.help import names


@pytest.mark.parametrize(
    ("normal", "defects", "unlabelled", "recipe"),
    [
        (0, 0, False, "mutual"),
        (50, 0, True, "mutual"),
        (1, 0, False, "subspace"),
        (auto.FEW, 0, False, "subspace"),
        (auto.FEW + 1, 0, False, "patchcore"),
        (auto.FEW + 1, 10, False, "patchcore"),
        (auto.BESIDE, auto.LABELLED - 1, False, "patchcore"),
        (auto.BESIDE, auto.LABELLED, False, "supersimplenet"),
        (auto.BESIDE, auto.LABELLED, True, "mutual"),
    ],
)
def test_the_choice_and_its_reason(normal, defects, unlabelled, recipe):
    chosen, reason = auto.choose(normal, defects, unlabelled)
    assert chosen == recipe
    assert chosen in names("recipe")
    assert unlabelled or not normal or f"{normal} normal images" in reason


@pytest.mark.parametrize(
    ("more", "recipe"),
    [((), "patchcore"), (("data.shots=1",), "subspace"), (("protocol=unlabelled",), "mutual")],
)
def test_overrides_name_the_recipe_that_was_chosen_for_the_data(tiny, more, recipe, capsys):
    data = [override for override in tiny_overrides(tiny) if override.startswith("data")]
    found = auto.resolve([*data, "recipe=auto", *more])
    assert found == [*data, f"recipe={recipe}", *more]
    assert f"recipe={recipe}: " in capsys.readouterr().err


def test_labelled_defects_count_by_their_masks(tiny, monkeypatch):
    monkeypatch.setattr(auto, "LABELLED", 3)
    monkeypatch.setattr(auto, "BESIDE", 2)
    data = [override for override in tiny_overrides(tiny) if override.startswith("data")]
    for more, recipe in (
        (["data.defects=3"], "supersimplenet"),
        (["data.defects=2"], "patchcore"),
        (["data.defects=3", "data.masks=null"], "patchcore"),
    ):
        assert f"recipe={recipe}" in auto.resolve([*data, "recipe=auto", *more])


def test_another_recipe_stays():
    assert auto.resolve(["recipe=padim", "seed=1"]) == ["recipe=padim", "seed=1"]


def test_a_detector_chooses_when_it_is_trained(caplog):
    detector = AnomalyDetector("auto", image_size=64, device="cpu", alpha=0.1)
    pictures = list(np.random.default_rng(0).integers(0, 256, (2, 64, 64), np.uint8))
    detector.alpha = 0.2
    with caplog.at_level(logging.INFO):
        detector.train(pictures)
    assert detector.method == "patchcore"
    assert detector.alpha == 0.2
    assert "2 normal images" in caplog.text
    assert np.isfinite(detector.predict(pictures[0]).score)
