"""The result of one image, for detectors and exports alike: pictures, JSON and files."""

import builtins
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib import pyplot
from PIL import Image

from blemish.edge.errors import InputError
from blemish.edge.reading import is_result, read
from blemish.edge.result import Result, overlay

GREY = np.random.default_rng(0).integers(90, 110, (60, 200), dtype=np.uint8)
MAP = np.zeros((60, 200), np.float32)
MAP[30:50, 20:60], MAP[32:40, 100:110] = 9, 6
RESULT = Result(9.0, 0.05, True, MAP, Path("line 1/part.png"), GREY, 7.0, 5.0)


def without(monkeypatch, *absent: str) -> None:
    """Let imports of these libraries fail."""
    real = builtins.__import__

    def guarded(name, *args, **kwargs):
        if name.partition(".")[0] in absent:
            raise ModuleNotFoundError(f"no module named {name!r}")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", guarded)


def test_says_it_in_a_line():
    assert repr(RESULT) == "Result(line 1/part.png, anomalous, score=9, p_value=0.05, map=60×200)"
    assert repr(Result(1.0, None, None, None)) == "Result(no threshold, score=1)"


def test_boxes_leave_out_what_is_outside_the_roi():
    assert RESULT.boxes == [(20, 30, 40, 20), (100, 32, 10, 8)]
    inside = np.zeros(MAP.shape, bool)
    inside[:, 90:] = True
    assert replace(RESULT, inside=inside).boxes == [(100, 32, 10, 8)]
    assert replace(RESULT, map_threshold=None).boxes == replace(RESULT, map=None).boxes == []
    bare = RESULT.without_map()
    assert bare.map is None and bare.to_dict() == RESULT.to_dict()
    with pytest.raises(InputError, match="overlay: "):
        bare.overlay()


@pytest.mark.parametrize("colour", [False, True])
@pytest.mark.parametrize("low", [None, 1.0])
def test_an_overlay_tints_what_is_above_the_level_alone(colour, low):
    image = np.stack([GREY] * 3, -1) if colour else GREY
    before = image.copy()
    picture = np.asarray(overlay(image, MAP, low, 5.0, "anomalous"))
    assert np.array_equal(image, before) and picture.shape == (60, 200, 3)
    changed = (picture != np.stack([GREY] * 3, -1)).any(-1)
    assert changed[MAP > 5].all()
    away = np.ones(MAP.shape, bool)
    away[:20], away[28:52, 18:62], away[30:42, 98:112] = False, False, False  # text, tints and their outlines
    assert not changed[away].any()
    strong, weak = picture[40, 40].astype(int), picture[36, 105].astype(int)
    assert strong[0] - strong[1] > weak[0] - weak[1] > 0  # the redder the more anomalous
    calm = np.asarray(overlay(image, MAP, low, None, ""))
    assert np.array_equal(calm[20:], np.stack([GREY] * 3, -1)[20:])
    assert np.array_equal(np.asarray(overlay(image, None, None, None, ""))[20:], calm[20:])
    assert overlay(image[:9, :9], MAP[:9, :9], low, 5.0, "a text that is wider than its picture").size == (9, 9)


def test_a_plot_has_image_overlay_and_map():
    axes = RESULT.plot()
    assert [ax.get_title() for ax in axes] == ["image", "overlay", "map"]
    pyplot.close(axes[0].figure)
    axes = replace(RESULT, map=None).plot()
    assert len(axes) == 2
    pyplot.close(axes[0].figure)


def test_saves_what_can_be_read_again(tmp_path):
    inside = np.ones(MAP.shape, bool)
    inside[:, 90:] = False
    result = replace(RESULT, inside=inside)
    paths = result.save(tmp_path / "out")
    assert [path.name for path in paths] == ["part_overlay.png", "part_map.png", "part_mask.png", "part.json"]
    assert all(is_result(path) for path in paths[:3])
    told = json.loads(paths[3].read_text())
    assert told == {**result.to_dict(), "map_min": 0.0, "map_max": 9.0, "files": [path.name for path in paths[:3]]}
    np.testing.assert_allclose(read(paths[1]) / 65535 * 9, MAP, atol=1e-3)
    assert np.array_equal(read(paths[2]) > 0, (MAP > 5) & inside)
    assert result.save(tmp_path / "out") == paths  # its own may be replaced
    with pytest.raises(InputError, match=r"part\.json: the result of line 1"):
        replace(result, path=Path("line 2/part.png")).save(tmp_path / "out")
    with pytest.raises(InputError, match="name="):
        replace(result, path=None).save(tmp_path / "out")
    assert len(replace(result, path=None, map=None).save(tmp_path / "out", name="frame")) == 2


def test_the_users_files_stay(tmp_path):
    Image.new("L", (9, 9)).save(tmp_path / "part_mask.png")
    with pytest.raises(InputError, match=r"part_mask\.png"):
        RESULT.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["part_mask.png"]


def test_what_is_not_installed_is_named(monkeypatch):
    without(monkeypatch, "scipy", "matplotlib")
    bare = replace(RESULT)
    with pytest.raises(InputError, match="pip install scipy"):
        bare.boxes  # noqa: B018
    assert bare.to_dict()["boxes"] is None
    with pytest.raises(InputError, match="pip install matplotlib"):
        bare.plot()


def test_regions_above_any_threshold_and_how_many_are_false_at_most():
    bounded = replace(RESULT, region_levels=(8.0, 5.5))
    assert [bounded.regions(threshold) for threshold in (10.0, 8.0, 5.5, 4.0)] == [(0, 0), (1, 0), (2, 1), (2, None)]
    assert RESULT.regions(5.5) == (2, None), "nothing is proven without held-out images"
    with pytest.raises(InputError, match="map"):
        replace(bounded, map=None).regions(5.5)


def test_names_the_product():
    named = replace(RESULT, product="screw", product_p_value=0.5, unknown_product=False)
    assert "screw, anomalous" in repr(named) and named.to_dict()["product"] == "screw" and "product" not in RESULT.to_dict()
    assert "unknown product" in repr(replace(named, unknown_product=True))
