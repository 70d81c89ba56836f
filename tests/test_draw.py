"""Pictures of a run: colours, contours, strips and curves."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from PIL import Image

from blemish import curves, draw
from blemish.types import NO_TRUTH

SCALE = (0.0, 3.0, 10.0)


def scene(height=64, width=64):
    """A grey picture, a map with a disc of value 8 around its middle on 1, and the disc as truth."""
    y, x = np.mgrid[:height, :width]
    disc = np.hypot(y - height / 2, x - width / 2) < min(height, width) / 5
    image = np.full((height, width, 3), 128, np.uint8)
    return image, disc.astype(np.uint8), np.where(disc, 8.0, 1.0).astype(np.float32)


def count(picture, ink):
    return (np.asarray(picture.convert("RGB")) == ink).all(-1).sum()


def test_colours_follow_the_scale_and_grow_in_lightness():
    ramp = np.linspace(-5, 15, 401)[None]
    colours = draw.colour(ramp, SCALE)[0].astype(float)
    assert (colours[ramp[0] <= 0] == draw.COLOURS[0]).all()
    assert (colours[ramp[0] >= 10] == draw.COLOURS[255]).all()
    lightness = colours @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(lightness) > -1).all()
    middle = draw.colour(np.array([[5.0]]), SCALE)[0, 0]
    assert np.abs(middle.astype(int) - draw.COLOURS[128]).max() <= 3


@pytest.mark.parametrize("scale", [(0.0, 0.0, 0.0), (-1e30, 0.0, 1e30), (1e-30, 1.5e-30, 2e-30), (-3.0, -2.5, -2.0)])
def test_any_scale_and_values_that_are_no_numbers(scale):
    values = np.array([[np.nan, np.inf, -np.inf, scale[0], scale[-1], 0.0]])
    unit = draw.to_scale(values, scale)
    assert np.isfinite(unit).all()
    assert unit[0, :4].tolist() == [1, 1, 0, 0]
    assert unit[0, 4] == (scale[0] != scale[-1])


def test_overlay_colours_what_is_above_normal_and_outlines_what_is_above_the_threshold():
    image, mask, values = scene()
    assert (np.asarray(draw.overlay(image, np.full_like(values, SCALE[1]), SCALE, None)) == image).all()
    assert (np.asarray(draw.overlay(image, values, None, None)) == image).all()
    without = draw.overlay(image, values, SCALE, None)
    assert ((np.asarray(without) != image).any(-1) == (mask == 1)).all()
    assert count(without, draw.ALARM) == count(without, draw.TRUTH) == 0
    assert (np.asarray(draw.overlay(image, values, SCALE, 20.0)) == np.asarray(without)).all()
    y, x = np.nonzero((np.asarray(draw.overlay(image, values, SCALE, 4.0, None, (256, 256))) == draw.ALARM).all(-1))
    radius = np.hypot(y + 0.5 - 128, x + 0.5 - 128) / 4
    assert len(y) > 100
    assert np.abs(radius - 64 / 5).max() < 2
    assert count(draw.overlay(image, values, SCALE, 4.0, mask, (256, 256)), draw.ALARM) > 100


@pytest.mark.parametrize("size", [(64, 64), (90, 48), (4000, 3000), (3000, 30), (20, 20)])
@pytest.mark.parametrize("decision", [True, False, None])
def test_verdict_and_score_are_written_beside_the_defect(size, decision):
    above = np.zeros(size[::-1], bool)
    plain = Image.new("RGB", size, "gray")
    top, bottom = plain.copy(), plain.copy()
    draw.stamp(top, -1234.5678, decision, above)
    above[: len(above) // 8 + 1] = True
    draw.stamp(bottom, -1234.5678, decision, above)
    if size == (20, 20):
        assert top == bottom == plain  # no room for letters
        return
    paper = draw.VERDICTS[decision][1]
    boxes = [np.argwhere((np.asarray(picture) == paper).all(-1)) for picture in (top, bottom)]
    assert boxes[0].min(0).tolist() == [0, 0] and boxes[1].max(0)[0] == size[1] - 1
    assert np.ptp(boxes[0], axis=0).tolist() == np.ptp(boxes[1], axis=0).tolist()
    assert np.ptp(boxes[0], axis=0)[0] >= 10 and np.ptp(boxes[0], axis=0)[1] < size[0]
    assert (np.asarray(top)[np.asarray(top) != np.asarray(plain)] > 200).any()  # letters


def test_the_truth_is_dashed_and_the_alarm_solid():
    image, mask, values = scene()
    counts = []
    for level, truth, ink in ((4.0, None, draw.ALARM), (None, mask, draw.TRUTH)):
        picture = np.asarray(draw.overlay(image, values, SCALE, level, truth, (512, 512))).astype(int)
        line = (np.abs(picture - ink) < 60).all(-1)
        angle = np.round(np.degrees(np.arctan2(*(np.argwhere(line) - 255.5).T)))
        counts.append(len(set(angle.tolist()) - {-180.0}))
    assert counts[0] == 360
    assert 100 < counts[1] < 300


def test_a_region_at_the_edge_is_closed():
    image, _, values = scene()
    values[:] = 0
    values[:20, :20] = 9
    picture = np.asarray(draw.overlay(image, values, SCALE, 4.0, None, (256, 256)))
    line = (picture == draw.ALARM).all(-1)
    assert line[:3, 20:60].any()
    assert line[20:60, :3].any()


def test_dashes_cover_half_of_the_line():
    turn = np.linspace(0, 2 * np.pi, 400)
    circle = 50 * np.stack([np.cos(turn), np.sin(turn)], 1)
    lengths = [np.hypot(*np.diff(piece, axis=0).T).sum() for piece in draw.dashes(circle, 5.0)]
    assert sum(lengths) == pytest.approx(np.pi * 50, rel=0.03)
    assert max(lengths) <= 5.001


@pytest.mark.parametrize("shape", [(8, 8), (100, 128), (256, 256), (300, 40), (40, 300), (1024, 700), (3000, 30)])
@pytest.mark.parametrize("kind", ["all", "no map", "no truth"])
def test_a_strip_for_every_size(shape, kind):
    image, mask, values = scene(*shape)
    if kind == "no truth":
        mask = np.full_like(mask, NO_TRUTH)
    arguments = (None, None, None) if kind == "no map" else (values, SCALE, 4.0)
    picture = draw.strip(image, mask, *arguments, "a.png\nscore 1")
    width, height = draw.panel_size(*shape)
    assert max(width, height) <= draw.PANEL_MOST
    assert max(shape) > draw.PANEL_MOST or (width % shape[1], height % shape[0]) == (0, 0)
    assert picture.width >= 4 * width
    assert picture.height > height
    pixels = np.asarray(picture)
    for edge in (pixels[:8], pixels[-8:], pixels[:, :8], pixels[:, -8:]):
        assert (edge == 255).all()  # nothing runs out of the margins


def test_the_panels_show_what_was_given():
    image, mask, values = scene(256, 256)
    image[:] = (200, 100, 50)
    mask[:10] = NO_TRUTH
    picture = np.asarray(draw.strip(image, mask, values, SCALE, None, "a.png"))
    top = picture.shape[0] - draw.MARGIN - 256
    lefts = [draw.MARGIN + index * (256 + draw.GAP) for index in range(3)]
    first, second, third = (picture[top : top + 256, left : left + 256] for left in lefts)
    assert (first == image).all()
    assert (second[mask == 1] == 255).all()
    assert (second[mask == 0] == 20).all()
    assert (second[mask == NO_TRUTH] == 128).all()
    assert (third == draw.colour(values, SCALE)).all()
    again = draw.strip(image, mask, values, SCALE, None, "a.png", image // 2)
    assert (np.asarray(again)[top:, lefts[1] : lefts[1] + 256][:256] == image // 2).all()


def test_the_colour_bar_names_its_ends_and_the_threshold():
    assert [text for _, text in draw.bar_numbers((-0.5, 0.0, 12345.678), 1e-7)] == ["−0.5", "1e−07", "1.235e+04"]
    assert len(draw.bar_numbers(SCALE, None)) == len(draw.bar_numbers(SCALE, 11.0)) == 2


@pytest.mark.parametrize(
    ("label", "score", "threshold", "words"),
    [
        (0, 1.0, 2.0, "good (normal) · score 1 · threshold 2 · decision normal · ✓ right"),
        (0, 3.0, 2.0, "good (normal) · score 3 · threshold 2 · decision anomalous · ✗ wrong (false alarm)"),
        (1, 2.0, 2.0, "good (anomalous) · score 2 · threshold 2 · decision normal · ✗ wrong (missed)"),
        (1, -3.0, None, "good (anomalous) · score −3 · no threshold"),
        (-1, 3.0, 2.0, "good (truth unknown) · score 3 · threshold 2 · decision anomalous"),
    ],
)
def test_captions(label, score, threshold, words):
    assert draw.caption("a/b.png", "good", label, score, threshold) == f"a/b.png\n{words}"


@given(st.text(max_size=200), st.integers(20, 400))
@settings(max_examples=50, deadline=None)
def test_titles_fit_and_keep_both_ends(text, width):
    face = draw.font(13)
    words = draw.elided(text, face, width)
    assert face.getlength(words) <= width
    assert "\n" not in words
    words = draw.elided("beginning/" + "x" * 300 + "/end.png", face, 300)
    assert re.fullmatch("beginning/x+…x+/end.png", words)


@given(
    npst.arrays(np.float32, (16, 16), elements=st.floats(-(2.0**100), 2.0**100, width=32) | st.just(np.nan) | st.just(np.inf)),
    st.floats(-1e30, 1e30),
)
@settings(max_examples=30, deadline=None)
def test_no_map_breaks_a_strip(values, threshold):
    image = np.zeros((16, 16, 3), np.uint8)
    picture = draw.strip(image, None, values, (-1.0, 0.0, 1.0), threshold, "größe/大きさ \udce9.png\n✓")
    assert isinstance(picture, Image.Image)


POINTS = {
    "roc": np.array([[0, 0], [0, 1], [1, 1.0]]),
    "pr": np.array([[0, 1], [1, 1.0]]),
    "pro": np.array([[0, 0], [0.1, 0.9], [0.3, 1.0]]),
}
NOTHING = {name: np.empty((0, 2)) for name in POINTS}


@pytest.mark.parametrize(("pixel", "panels"), [(POINTS, 4), (NOTHING, 3)])
def test_curves_have_a_panel_each_and_legends_with_values(tmp_path, pixel, panels):
    figures = {"image_auroc": 0.98765, "image_ap": 0.5, "pixel_auroc": 0.25, "pixel_ap": 0.125, "aupro": 0.75}
    score, label = np.array([1.0, 2.0, 3.0, 4.0]), np.array([0, 0, 1, -1])
    figure = curves.draw_curves(POINTS, pixel, figures, score, label, 2.5)
    assert len(figure.axes) == panels
    words = " ".join(text.get_text() for axes in figure.axes for text in axes.get_legend().get_texts())
    for part in ("AUROC 0.9877", "AP 0.5000", "normal (2)", "anomalous (1)", "unknown (1)", "threshold 2.5"):
        assert part in words
    assert ("AUPRO 0.7500" in words) == (panels == 4)
    figure.savefig(tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    "score", [np.array([1.0]), np.full(5, -3.0), np.array([1e-9, 1.0, 1e9]), np.array([-1e30, 1e30]), np.array([1e8, 1e8 + 1e-7])]
)
def test_curves_of_odd_scores(tmp_path, score):
    figure = curves.draw_curves(NOTHING, NOTHING, {}, score, np.zeros(len(score), int), None)
    figure.savefig(tmp_path / "curves.png")
    assert (np.diff(curves.bins(score)) > 0).all()
    assert curves.bins(score)[0] <= score.min() <= score.max() <= curves.bins(score)[-1]
