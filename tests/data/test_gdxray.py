"""GDXray: boxes and masks become labels, tiles and splits; real series where there are some."""

from collections import Counter

import numpy as np
import pytest
from PIL import Image
from support import DATA, composed, save

from blemish.data.gdxray import Defect, GDXray, Row, frame_range, held_share, read_boxes
from blemish.data.manifest import parse_boxes, parse_tile
from blemish.edge.errors import InputError
from blemish.edge.geometry import grid
from blemish.run.predict import predict
from blemish.run.train import train

OWN = {"unit": "image", "tile": 16, "stride": None, "min_cover": 0.25, "train_share": 0.7, "train_frames": None}
OWN |= {**DATA, "image_size": None, "batch_size": 1, "protocol": "paper"}


def row(*numbers):
    return "   " + "   ".join(f"{number:.7e}" for number in numbers)


@pytest.fixture
def root(tmp_path):
    """C0001, 40×56 px: 10 frames, boxes in 2 and 5; C0003 without annotation; W0001 with masks in W0002."""
    for series, count in (("C0001", 10), ("C0003", 4)):
        for i in range(1, count + 1):
            save(tmp_path / f"Castings/{series}/{series}_{i:04}.png", np.full((40, 56), 100 + i, np.uint8))
    folder = tmp_path / "Castings/C0001"
    rows = [row(2, 5, 12, 17, 24), row(5, 30, 33, 1, 4), "", "\t" + row(5, 50, 57, 0, 10).strip().replace("   ", "\t")]
    (folder / "ground_truth.txt").write_text("\n".join(rows) + "\n\n")
    for stray in ("ground_truth.txt;", "C0001_readme.txt", "BoundingBox.mat", "C0001_01.png", "C0001_0001.bmp", "C0003_0009.png"):
        (folder / stray).write_text("not an image of the series")
    for i in range(1, 4):
        mask = np.zeros((32, 64), np.uint8)
        mask[i : i + 3, 2:60] = 255
        save(tmp_path / f"Welds/W0001/W0001_{i:04}.png", np.full((32, 64), 80, np.uint8))
        save(tmp_path / f"Welds/W0002/W0002_{i:04}.png", mask)
    return tmp_path


def data_of(root, category="C0001", **changes):
    return GDXray(**{"root": root, "category": category, **OWN, **changes})


def prepared(*args, **changes):
    data = data_of(*args, **changes)
    data.setup()
    return data


def loaded(data, split="test"):
    return {batch.path[0]: batch for batch in data.loader(split)}


def test_boxes_are_one_based_and_inclusive_and_become_masks(root):
    boxes = {2: [Row(1, (4, 16, 12, 24))], 5: [Row(2, (29, 0, 33, 4)), Row(4, (49, -1, 57, 10))]}
    assert read_boxes(root / "Castings/C0001/ground_truth.txt") == boxes
    data = prepared(root)
    counts = Counter((s.split, s.label, s.defect) for s in data.samples)
    assert counts == {("train", 0, "good"): 6, ("test", 0, "good"): 2, ("test", 1, "defect"): 2}
    assert data.sample("Castings/C0001/C0001_0005.png").boxes == "29 0 33 4;49 0 56 10"
    expected = np.zeros((40, 56), np.uint8)
    expected[0:4, 29:33] = expected[0:10, 49:56] = 1
    assert np.array_equal(loaded(data)["Castings/C0001/C0001_0005.png"].mask[0], expected)


def test_the_split_is_the_seeds_and_each_series_its_own(root):
    def train(*args, **changes):
        return {s.path for s in data_of(root, *args, **changes).scan() if s.split == "train"}

    assert train() == train() != train(seed=1)
    assert train() == train("C0003+C0001") == train("C0001+C0001")
    assert train(train_frames="3-7") == {f"Castings/C0001/C0001_{i:04}.png" for i in (3, 4, 6, 7)}


@pytest.mark.parametrize("stride", [5, 16])
def test_tiles_by_the_definition(root, stride):
    """Every tile is judged anew from the boxes of its frame."""
    by_key = {s.key: s for s in data_of(root, unit="tile", stride=stride, train_frames="1-4").scan()}
    for frame in range(1, 11):
        boxes = {2: [(4, 16, 12, 24)], 5: [(29, 0, 33, 4), (49, 0, 56, 10)]}.get(frame, [])
        for x, y, _, _ in grid(56, 40, 16, 16 - stride):
            held = [max(min(x2, x + 16) - max(x1, x), 0) * max(min(y2, y + 16) - max(y1, y), 0) for x1, y1, x2, y2 in boxes]
            most = [(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in boxes]
            sample = by_key.pop(f"Castings/C0001/C0001_{frame:04}.png#{x},{y},16,16", None)
            if not any(held):
                assert (sample.label, sample.split, sample.boxes) == (0, "train" if frame <= 4 else "test", "")
            elif frame <= 4 or all(h < 0.25 * m for h, m in zip(held, most, strict=True)):
                assert sample is None
            else:
                assert (sample.label, sample.split) == (1, "test")
                assert len(parse_boxes(sample.boxes)) == sum(h > 0 for h in held)
    assert not by_key


@pytest.mark.parametrize(("category", "min_cover"), [("C0001", 0.0), ("W0001", 0.25), ("C0001+W0001", 1.0)])
def test_normal_tiles_have_no_anomalous_pixel_and_no_frame_is_on_both_sides(root, category, min_cover):
    data = prepared(root, category, unit="tile", stride=7, min_cover=min_cover, protocol="clean")
    for split in ("train", "calibrate", "test"):
        for key, batch in loaded(data, split).items():
            assert batch.image.shape[2:] == batch.mask.shape[1:] == (16, 16)
            assert int(batch.mask.any()) == int(batch.label) == data.sample(key).label
    sides = {split: {s.path for s in data.samples if s.split == split} for split in ("train", "calibrate", "test")}
    assert not sides["train"] & sides["test"] and not sides["calibrate"] & (sides["test"] | sides["train"])
    assert all(s.label == 0 for s in data.samples if s.split != "test")


@pytest.mark.parametrize(("x", "y", "share"), [(0, 0, 0.36), (10, 10, 1), (20, 0, 0)])
def test_the_share_of_a_defect_in_a_tile(x, y, share):
    small = Defect((10, 10, 20, 20), np.ones((10, 10), bool))
    assert held_share(small, (x, y, 16, 16)) == pytest.approx(share)


def test_the_share_of_large_and_hollow_defects():
    large = Defect((0, 0, 100, 64), np.ones((64, 100), bool))
    assert held_share(large, (40, 20, 16, 16)) == 1  # all of a tile inside a defect, though 4 % of it
    ring = Defect((0, 0, 30, 30), np.pad(np.zeros((20, 20), bool), 5, constant_values=True))
    assert held_share(ring, (8, 8, 10, 10)) == 0  # in its box, on none of its pixels


def test_welds_have_the_masks_of_the_other_series(root):
    data = data_of(root, "W0001", unit="tile", train_frames="1-1")
    assert all(s.mask == s.path.replace("W0001", "W0002") for s in data.scan() if s.label == 1)
    assert Counter(s.split for s in data.scan()) == {"train": 4, "test": 16}  # the crack crosses the upper row of each frame
    with pytest.raises(InputError, match=r"no train image; .*data\.unit=tile"):
        prepared(root, "W0001")
    for category in ("W0002", "C0001+W0002"):
        with pytest.raises(InputError, match=r"W0002 .*data\.category=W0001"):
            prepared(root, category)
    (root / "Welds/W0002/W0002_0002.png").unlink()
    with pytest.raises(InputError, match=r"W0002_0002\.png: no such file; .*W0001_0002\.png"):
        prepared(root, "W0001", unit="tile")


@pytest.mark.parametrize("unit", ["image", "tile"])
def test_a_series_without_annotation_is_never_normal(root, unit):
    alone = data_of(root, "C0003", unit=unit)
    assert {(s.split, s.label, s.defect) for s in alone.scan()} == {("unlabelled", -1, "unknown")}
    with pytest.raises(InputError, match=r"no train image; .*C0003\+<series>"):
        alone.setup()
    joined = prepared(root, "C0003+C0001", unit=unit)
    assert {s.split for s in joined.samples if "C0003" in s.path} == {"unlabelled"}
    assert len(joined.loader("unlabelled")) == len(alone.scan()) == (4 if unit == "image" else 4 * 12)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 2 3 4", "line 3: '1 2 3 4'; expected five"),
        ("1 2 3 4 5 6", "line 3"),
        ("1 2 x 4 5", "line 3"),
        ("1,2,3,4,5", "line 3"),
        ("1 2 nan 4 5", "line 3.*finite"),
        ("1.5 2 3 4 5", "line 3.*whole"),
        ("1 9 8 4 5", "line 3: '1 9 8 4 5': .*x1 ≤ x2"),
        ("1 57 60 4 5", "line 3: .*57…60 × 4…5 .*56×40 pixels of C0001_0001.png"),
        ("11 2 3 4 5", "line 3: image 11 .*1 to 10"),
        ("\udcff\udcfe", "line 3"),
    ],
)
def test_a_row_that_cannot_be_used_is_named_with_its_line(root, text, message):
    path = root / "Castings/C0001/ground_truth.txt"
    path.write_bytes(b"2 5 12 17 24\n\n" + text.encode(errors="surrogateescape") + b"\n")
    with pytest.raises(InputError, match=f"ground_truth.txt, {message}"):
        prepared(root)


def test_an_empty_ground_truth_does_not_make_everything_normal(root):
    (root / "Castings/C0001/ground_truth.txt").write_text("\n")
    with pytest.raises(InputError, match=r"ground_truth\.txt: no box"):
        prepared(root)


def test_choices_and_options(root):
    for args, changes, message in (
        (("C001",), {}, r"no category 'C001'; did you mean 'C0001'\? found C0001, C0003, W0001"),
        ((None,), {}, r"data\.category=null: .* found C0001, C0003, W0001"),
        ((), {"root": root / "nowhere"}, r"nowhere: no such folder\ngdxray expects"),
        ((), {"unit": "tiles"}, "data.unit=tiles"),
        ((), {"stride": 17}, "data.stride=17"),
        ((), {"min_cover": 1.5}, "data.min_cover=1.5"),
        ((), {"train_share": 0}, "data.train_share=0"),
        ((), {"train_frames": "48"}, "data.train_frames=48"),
        ((), {"train_frames": "9-8"}, "data.train_frames=9-8"),
        ((), {"unit": "tile", "tile": 48}, r"C0001_0001\.png: 56×40 pixels; .*data\.tile=48"),
        ((), {"unit": "tile", "train_frames": "90-99"}, r"90-99; .*data\.train_frames"),
    ):
        with pytest.raises(InputError, match=message):
            prepared(root, *args, **changes) if "root" not in changes else prepared(**changes)
    assert frame_range("1-48") == (1, 48) and frame_range(None) is None


@pytest.mark.parametrize("unit", ["image", "tile"])
def test_an_unreadable_image_stops_or_is_skipped(root, unit):
    bad = root / "Castings/C0001/C0001_0002.png"
    bad.write_bytes(b"no image")
    with pytest.raises(InputError, match=r"C0001_0002\.png"):
        prepared(root, unit=unit)
    assert list(prepared(root, unit=unit, on_error="skip").skipped) == ["Castings/C0001/C0001_0002.png"]


@pytest.mark.parametrize("content", [b"no image", (Image.new("L", (64, 31)))])
def test_an_unfit_mask_makes_nothing_normal(root, content):
    path = root / "Welds/W0002/W0002_0003.png"
    path.write_bytes(content) if isinstance(content, bytes) else content.save(path)
    with pytest.raises(InputError, match=r"W0002_0003\.png"):
        prepared(root, "W0001", unit="tile")
    data = prepared(root, "W0001", unit="tile", on_error="skip")
    assert [s.split for s in data.samples if "0003" in s.path] == ["skipped"]


def test_tiles_are_put_together_to_the_radiograph_in_pictures_and_predictions(root, tmp_path):
    generator = np.random.default_rng(0)
    for path in sorted(root.glob("Castings/C0001/C0001_0???.png")):
        save(path, generator.integers(100, 140, (40, 56), np.uint8))
    data = ["data=gdxray", f"data.root='{root}'", "data.category=C0001", "data.unit=tile", "data.tile=16", "data.train_frames=6-10"]
    quick = ["model=padim", "backbone=test_resnet", "weights=random", "trainer=cpu", "trainer.enable_progress_bar=false", "logger=none"]
    cfg = composed(*data, *quick, f"run_dir='{tmp_path}/run'", "save.pictures=-1", "save.curves=false")
    train(cfg)
    pictures = {path.name for path in (tmp_path / "run/images").iterdir()}
    assert pictures == {f"{'defect' if i in (2, 5) else 'good'}_C0001_{i:04}.png" for i in range(1, 6)} and cfg.image_size == 16
    whole = root / "Castings/C0001/C0001_0002.png"
    predict(composed(f"run='{tmp_path}/run'", f"input='{whole}'", f"output='{tmp_path}/out'", config="predict"))
    with Image.open(tmp_path / "out/C0001_0002_map.png") as image:
        assert image.size == (56, 40)


ANNOTATED = {"C0001": (72, 72), "C0002": (60, 90), "C0008": (22, 37), "C0010": (16, 37), "C0019": (18, 37)}
ANNOTATED |= {"C0024": (17, 37), "C0029": (9, 37), "C0032": (11, 37), "C0045": (29, 66), "C0047": (12, 72)}


@pytest.mark.parametrize("series", [*ANNOTATED, "C0044", "C0046", "C0048"])
def test_real_series(real_data, series):
    root = real_data / "gdxray"
    if not (root / "Castings" / series).is_dir():
        pytest.skip(f"no gdxray/Castings/{series} in BLEMISH_DATA")
    found = data_of(root, series).scan()
    if series not in ANNOTATED:
        assert {s.split for s in found} == {"unlabelled"}
        return
    assert (sum(s.label for s in found), len(found)) == ANNOTATED[series]
    for s in found:
        with Image.open(root / s.path) as image:
            assert all(x2 <= image.width and y2 <= image.height for _, _, x2, y2 in parse_boxes(s.boxes))


def test_real_tiles(real_data):
    root = real_data / "gdxray"
    if not (root / "Castings/C0001").is_dir():
        pytest.skip("no gdxray/Castings/C0001 in BLEMISH_DATA")
    found = data_of(root, unit="tile", tile=96, train_frames="1-48").scan()
    assert len({s.path for s in found if s.split == "train"}) == 48
    assert len({s.path for s in found if s.split == "test"}) == 24
    by_frame = {s.path: parse_boxes(s.boxes) for s in data_of(root).scan()}
    for s in found:
        x, y, w, h = parse_tile(s.tile)
        touched = any(x1 < x + w and x < x2 and y1 < y + h and y < y2 for x1, y1, x2, y2 in by_frame[s.path])
        assert touched == (s.label == 1)
