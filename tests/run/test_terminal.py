"""What a person reads while a run goes on and at its end."""

from types import SimpleNamespace

import pytest
from scipy.stats import betabinom

from blemish.edge.calibration import chance_of_alarms
from blemish.run.progress import ProgressBar, Speed, steps
from blemish.run.terminal import decisions

CALIBRATION = {"value": 1.5, "alpha": 0.05, "requested": 0.05, "n": 99, "reachable": True}


def metrics(found: int, defective: int, alarms: int, normal: int) -> dict:
    rates = {"image_recall": found / defective if defective else None, "image_false_alarm_rate": alarms / normal if normal else None}
    return {"images_anomalous": defective, "images_normal": normal, **rates}


@pytest.mark.parametrize(
    ("counts", "more", "line"),
    [
        ((20, 20, 1, 18), {}, "found 20 of 20 defective, false alarms 1 of 18 (bound 5 %)"),
        ((29, 49, 0, 0), {}, "found 29 of 49 defective"),
        ((0, 0, 2, 41), {}, "false alarms 2 of 41 (bound 5 %)"),
        ((3, 3, 1, 9), {"n": 9, "alpha": 0.1, "reachable": False}, "(bound 10 %, 9 images cannot promise 5 %)"),
        ((0, 3, 0, 3), {"value": None}, "protocol=clean"),
    ],
)
def test_decisions(counts, more, line):
    (found,) = decisions(metrics(*counts), CALIBRATION | more)
    assert line in found


def test_too_many_false_alarms_are_warned_of():
    assert len(decisions(metrics(3, 3, 3, 20), CALIBRATION)) == 1
    _, warning = decisions(metrics(3, 3, 12, 20), CALIBRATION)
    assert warning.startswith("warning:")


@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.2])
@pytest.mark.parametrize("n", [5, 19, 300])
def test_chance_of_alarms_is_beta_binomial(alpha, n):
    above = n - min(-int(-(n + 1) * (1 - alpha) // 1), n)  # calibration scores above the threshold
    for alarms, normal in ((0, 7), (1, 7), (3, 40), (40, 40)):
        expected = betabinom.sf(alarms - 1, normal, above + 1, n - above)
        assert chance_of_alarms(alarms, normal, alpha, n) == pytest.approx(expected, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize(("epochs", "text"), [(1, "fitting"), (30, "epoch 3 of 30"), (-1, "epoch 3"), (None, "epoch 3")])
def test_the_bar_counts_epochs_from_one_and_only_where_there_are_several(epochs, text):
    bar = ProgressBar()
    bar._trainer = SimpleNamespace(max_epochs=epochs)
    assert bar._get_train_description(2) == text


def test_the_bar_shows_no_version_and_no_speed_before_it_is_known():
    bar, trainer = ProgressBar(), SimpleNamespace(loggers=[SimpleNamespace(version=7)], progress_bar_metrics={"loss": 0.5})
    assert bar.get_metrics(trainer, None) == {"loss": 0.5}
    assert str(Speed().render(SimpleNamespace(speed=None))) == ""
    assert str(Speed().render(SimpleNamespace(speed=2.5))) == "2.5 batches/s"


@pytest.mark.parametrize("visible", [True, False])
def test_steps_are_shown_or_logged(visible, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(ProgressBar, "is_visible", staticmethod(lambda: visible))
    with steps("graph", "file") as step:
        step("graph")
        step("file")
    assert [record.message for record in caplog.records] == ([] if visible else ["graph …", "file …"])
