"""Images with other values than the training images: what is refused, and what is warned about once."""

import numpy as np
import pytest
from PIL import Image
from support import composed, save, tiny_run

from blemish.data.ranges import ValueCheck, fit_ranges
from blemish.edge.errors import InputError
from blemish.edge.ranges import Range, range_of
from blemish.run.predict import predict
from blemish.run.train import train

RNG = np.random.default_rng(0)
GREY = RNG.integers(20, 240, (64, 64), dtype=np.uint8)
DEEP = GREY.astype(np.uint16) * 16  # 12 of 16 bits, at the right


def warnings_of(check: ValueCheck, *images: np.ndarray, caplog) -> list[str]:
    caplog.clear()
    for number, image in enumerate(images):
        check(f"{number}.png", image)
    check.report()
    check.report()
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("shift", [4, 16, 1 / 4, 1 / 16])
@pytest.mark.parametrize("background", [0, 0.9])
def test_a_shift_of_bits_is_one_warning(shift, background, caplog):
    normal = [np.where(RNG.random((64, 64)) < background, 60000, RNG.integers(8000, 16000, (64, 64))).astype(np.uint16) for _ in range(8)]
    ranges = fit_ranges(normal, load=lambda image: image)
    assert not warnings_of(ValueCheck(ranges, {}), *normal, caplog=caplog)
    shifted = [np.clip(image * shift, 0, 65535).astype(np.uint16) for image in normal]
    if shift > 1 and background:  # white stays white
        return
    (warning,) = warnings_of(ValueCheck(ranges, {"uint16": (0, 65535)}), normal[0], *shifted, caplog=caplog)
    assert "8 of 9 images" in warning and "1.png" in warning and "data.window=[lo,hi]" in warning


@pytest.mark.parametrize(
    ("image", "way"),
    [(DEEP, "data.window=[0,4095]"), (DEEP * 16, "data.window=[0,65535]"), (GREY / np.float32(255), "data.window=[0,1]")],
)
def test_a_dtype_that_training_did_not_have_is_refused(image, way):
    ranges = fit_ranges([GREY], load=lambda image: image)
    with pytest.raises(InputError) as error:
        ValueCheck(ranges, {})("a.png", image)
    for part in ("a.png", image.dtype.name, "uint8", way):
        assert part in str(error.value)
    with pytest.raises(InputError, match=r"\{uint8: \[0, 255\]\}"):
        ValueCheck(fit_ranges([DEEP], load=lambda image: image), {})("a.png", GREY)


def test_a_dtype_with_a_window_is_compared_with_it(caplog):
    ranges = {"uint8": Range(20, 240, 200)}
    assert not warnings_of(ValueCheck(ranges, {"uint16": (0, 4095)}), DEEP, DEEP, caplog=caplog)
    assert "hardly a value" in warnings_of(ValueCheck(ranges, {"uint16": (0, 65535)}), DEEP, caplog=caplog)[0]
    assert "above 1000" in warnings_of(ValueCheck(ranges, {"uint16": (0, 1000)}), DEEP, caplog=caplog)[0]
    assert not warnings_of(ValueCheck({}, {"uint16": (0, 65535)}), GREY, caplog=caplog)  # nothing is known of bytes
    clipped = ValueCheck({"uint16": Range(320, 3840, 3800)}, {"uint16": (0, 10)})
    assert "window is 0 to 10" in warnings_of(clipped, DEEP, caplog=caplog)[0]


def test_without_training_bytes_need_no_window_and_others_are_said_once(caplog):
    assert not warnings_of(ValueCheck({}, {}, "value_range", {"uint8": (0, 255)}), GREY, caplog=caplog)
    (warning,) = warnings_of(ValueCheck({}, {}, "value_range", {"uint16": (0, 65535)}), DEEP * 16, DEEP * 16, caplog=caplog)
    assert warning.startswith("0.png: uint16; 0 is taken for black and 65535 for white")


def test_defects_and_gradual_change_bring_no_warning(caplog):
    check = ValueCheck({"uint16": Range(320, 3840, 3800)}, {})
    hole, glare = DEEP.copy(), DEEP.copy()
    hole[:30], glare[:30] = 0, 4095
    assert not warnings_of(check, hole, glare, DEEP // 2, caplog=caplog)


def test_only_the_roi_counts(caplog):
    check, inside = ValueCheck({"uint16": Range(320, 3840, 3800)}, {}), np.zeros((64, 64), bool)
    inside[:8] = True
    image = np.where(inside, DEEP, 65535).astype(np.uint16)
    check("a", image, lambda: inside)
    check.report()
    assert not caplog.records
    assert warnings_of(check, image, caplog=caplog)
    assert range_of(0, 10) == (0, 10, 3)


def predicted(run, images, output, *more):
    return predict(composed(f"run='{run}'", f"input='{images}'", f"output='{output}'", "device=cpu", *more, config="predict"))


def scores(folder) -> list[float]:
    return [float(line.split(",")[1]) for line in (folder / "scores.csv").read_text().splitlines()[1:]]


def doubts(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if "hardly fit" in record.getMessage()]


def test_predictions_and_their_ways_out(tiny, tmp_path, caplog):
    """A run on bytes and one on the same in 12 bits, which are given 12 bits at the right and at the left of 16."""
    for name, factor in (("right", 16), ("left", 256)):
        for path in sorted(path for part in ("normal", "normal_test", "square") for path in (tiny / part).glob("*.png")):
            save(tmp_path / name / path.relative_to(tiny), np.array(Image.open(path)).astype(np.uint16) * factor)
    quick = ("model=padim", "save.pictures=0", "save.curves=false")
    train(tiny_run(tiny, tmp_path / "run8", *quick))
    train(tiny_run(tmp_path / "right", tmp_path / "run16", *quick, "data.masks=null"))
    assert not doubts(caplog)

    right, left, out = tmp_path / "right/square", tmp_path / "left/square", tmp_path / "out"
    predicted(tmp_path / "run8", tiny / "square", out)
    expected = scores(out)
    for images, window in ((right, "window=[0,4080]"), (left, "window=dtype"), (left, "window={uint16: [0, 65280]}")):
        assert len(predicted(tmp_path / "run8", images, out, window).rows) == 6
        assert scores(out) == pytest.approx(expected, rel=0.02)
    with pytest.raises(InputError, match="window=auto"):
        predicted(tmp_path / "run8", right, out, "window=auto")

    predicted(tmp_path / "run16", right, out)
    expected = scores(out)
    assert not doubts(caplog)
    predicted(tmp_path / "run16", left, out)
    (warning,) = doubts(caplog)
    assert "6 of 6" in warning and "000.png" in warning and "window=[lo,hi]" in warning
    lo, hi = (16 * end for end in fit_ranges(sorted((tmp_path / "right/normal").glob("*.png")))["uint16"][:2])
    caplog.clear()
    predicted(tmp_path / "run16", left, out, f"window=[{lo},{hi}]")
    assert scores(out) == pytest.approx(expected, rel=0.05)
    assert not doubts(caplog)
