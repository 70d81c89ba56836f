"""Outputs beside the user's own files, files that cannot be scored, and thresholds set by hand, as `predict` has them."""

import csv
import json
import logging
import os
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from omegaconf import DictConfig
from PIL import Image
from scipy.stats import false_discovery_control
from support import composed, tiny_run

from blemish.api import AnomalyDetector
from blemish.edge.calibration import Threshold
from blemish.edge.errors import InputError
from blemish.edge.monitor import unusual
from blemish.edge.reading import find_images, is_result
from blemish.edge.selection import false_alarm_bounds
from blemish.files import INDEX, LOCK, Outputs, picture_info, replacing, write_json
from blemish.run.checkpoint import newest_run, saved_scale
from blemish.run.config import build
from blemish.run.predict import COLUMNS, boxes_in_image, predict, write
from blemish.run.record import read_record
from blemish.run.results import ImageResult, Rule, output_names
from blemish.run.test import test as retest
from blemish.run.train import train

NOISE = ["model=noise_residual", "model.mode=calibrated", "model.channels=1"]


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "padim"
    train(tiny_run(tiny, folder, "model=padim", "save.pictures=1"))
    return folder


def by_run(finished) -> list[str]:
    return [f"run='{finished}'", "device=cpu"]


def told(source, output, *how: str):
    return predict(composed(*how, f"input='{source}'", f"output='{output}'", config="predict"))


def rows_of(path) -> list[dict]:
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        return list(csv.DictReader(file))


def contents(folder) -> dict:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def images(tmp_path, tiny):
    """A folder with two images."""
    for name in ("000.png", "001.png"):
        (tmp_path / "in").mkdir(exist_ok=True)
        shutil.copy(tiny / "square" / name, tmp_path / "in" / name)
    return tmp_path / "in"


# ---- the user's own files


@pytest.mark.parametrize("name", ["001_mask.png", "001_overlay.png", "001_map.png", "scores.csv", "failed.csv", "results.jsonl"])
@pytest.mark.parametrize("how", ["run", "noise", "api"])
def test_a_file_of_the_users_stays_as_it_is(how, name, finished, images):
    (images / name).write_bytes((images / "000.png").read_bytes())
    before = contents(images)
    with pytest.raises(InputError, match=rf"in/{name}: .*output="):
        if how == "api":
            AnomalyDetector.load(finished, device="cpu").test(images, images)
        else:
            told(images, images, *(NOISE if how == "noise" else by_run(finished)))
    assert contents(images) == before, "and nothing was scored"


@pytest.mark.parametrize("kind", ["link", "dangling", "folder", "edited", "replaced", "table"])
def test_what_only_looks_like_an_output_stays(kind, finished, images, tmp_path):
    out = tmp_path / "out"
    told(images, out, *by_run(finished))
    mask = out / "000_mask.png"
    if kind == "edited":  # with the entry that says whose it is
        array = np.array(Image.open(mask))
        Image.fromarray(255 - array).save(mask, pnginfo=picture_info())
        assert is_result(mask)
    elif kind == "table":
        with (out / "scores.csv").open("a") as file:
            file.write("a note\n")
    else:
        mask.unlink()
        if kind == "folder":
            mask.mkdir()
        elif kind == "replaced":
            shutil.copy(images / "000.png", mask)
        else:
            mask.symlink_to(images / "000.png" if kind == "link" else tmp_path / "nothing")
    before = contents(tmp_path)
    with pytest.raises(InputError, match=r"scores\.csv" if kind == "table" else "000_mask"):
        told(images, out, *by_run(finished))
    assert contents(tmp_path) == before


@pytest.mark.parametrize("how", ["run", "noise"])
def test_again_into_the_same_folder_scores_the_same_images(how, finished, images):
    how = NOISE if how == "noise" else by_run(finished)
    for _ in range(3):
        assert len(told(images, images, *how).rows) == 2
    assert not (images / LOCK).exists()
    with pytest.raises(InputError, match="000_overlay"):
        told(images / "000_overlay.png", images, *how)
    moved = images.parent / "moved" / "deep"
    moved.mkdir(parents=True)
    for path in images.glob("*_*.png"):
        path.rename(moved / f"renamed {path.name}")
    shutil.copy(images / "000.png", moved)
    assert len(told(moved.parent, moved.parent / "out", *how).rows) == 1, "wherever they were moved to"


def test_again_after_a_stop_in_between(finished, images, tmp_path, monkeypatch):
    note, count = Outputs.note, []

    def noted(self, path, content=None):
        note(self, path, content)
        count.append(path)
        if len(count) == 3:
            raise KeyboardInterrupt  # listed, and without its name yet

    monkeypatch.setattr(Outputs, "note", noted)
    with pytest.raises(KeyboardInterrupt):
        told(images, tmp_path / "out", *by_run(finished))
    monkeypatch.undo()
    assert len(told(images, tmp_path / "out", *by_run(finished)).rows) == 2


def test_pictures_of_runs_and_predictions_are_no_images(finished, images, tiny, tmp_path, caplog):
    shutil.copytree(finished, images / "run")
    assert find_images(images / "run", results=True), "curves and strips"
    assert len(told(images, tmp_path / "out", *by_run(finished)).rows) == 2
    shutil.copytree(tiny, tmp_path / "data")
    told(tmp_path / "data" / "normal", tmp_path / "data" / "normal" / "out", *by_run(finished))
    data = build(tiny_run(tmp_path / "data", tmp_path / "run").data)
    assert sum(sample.path.startswith("normal/") for sample in data.scan()) == 24
    assert "72 pictures" in caplog.text
    AnomalyDetector.load(finished, device="cpu").predict(tmp_path / "data" / "normal")


def test_a_test_and_a_run_leave_the_users_files(finished, tiny, tmp_path):
    (tmp_path / "scores.csv").write_text("mine")
    with pytest.raises(InputError, match=r"scores\.csv"):
        retest(composed(f"run='{finished}'", f"output='{tmp_path}'", "device=cpu", config="test"))
    assert (tmp_path / "scores.csv").read_text() == "mine"
    shutil.copytree(finished, tmp_path / "other")
    with pytest.raises(InputError, match="other: holds the model"):
        retest(composed(f"run='{finished}'", f"output='{tmp_path / 'other'}'", "device=cpu", config="test"))
    picture = next((finished / "images").iterdir()).name
    (tmp_path / "mine" / "images").mkdir(parents=True)
    mine = shutil.copy(tiny / "square" / "000.png", tmp_path / "mine" / "images" / picture)
    train(tiny_run(tiny, tmp_path / "mine", "save.pictures=1"))
    assert mine.read_bytes() == (tiny / "square" / "000.png").read_bytes()


def test_replacing(tmp_path):
    path = tmp_path / "table.csv"
    for text in ("one", "two"):
        with replacing(path, None):
            path.write_text(text)
    path.write_text("mine")
    with pytest.raises(InputError, match=r"table\.csv.*output=FILE"), replacing(path):
        raise AssertionError
    (tmp_path / INDEX).unlink()
    path.write_text("a,b\n1,2\n")
    with replacing(path, header="a,b"):  # as of a checkout
        path.write_text("a,b\n3,4\n")


# ---- the run, and hints


def test_a_folder_of_runs_gives_its_newest_finished_one(finished, images, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    for name, changes in {"old": {"ended": "2020"}, "new": {"ended": "2021"}, "broken": {"ended": "2022", "status": "failed"}}.items():
        shutil.copytree(finished, tmp_path / "runs" / "deep" / name)
        write_json(tmp_path / "runs" / "deep" / name / "record.json", read_record(finished) | changes)
    assert newest_run(finished) == finished and newest_run(images) == images
    assert len(told(images, tmp_path / "out", f"run='{tmp_path / 'runs'}'", "device=cpu").rows) == 2
    assert f"run={tmp_path / 'runs' / 'deep' / 'new'}: the newest of 2" in caplog.text
    retest(composed(f"run='{tmp_path / 'runs'}'", "device=cpu", config="test"))
    assert (tmp_path / "runs" / "deep" / "new" / "retest" / "metrics.json").is_file()


def test_hints_name_the_keys_of_the_command(finished, images, tmp_path):
    cfg = composed(f"run='{finished}'", "+change.data.root=/gone", f"output='{tmp_path / 'again'}'", "device=cpu", config="test")
    with pytest.raises(InputError, match=r"\+change\.data\.root=") as error:
        retest(cfg)
    assert not re.search(r"(?<!change\.)data\.\w+=", str(error.value))
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(InputError, match=r"file.*output=FOLDER"):
        told(images, tmp_path / "file" / "out", *by_run(finished))
    with pytest.raises(InputError, match="^roi=/gone: "):
        told(images, tmp_path / "out", *by_run(finished), "roi=/gone")


# ---- names


def test_names_of_outputs_meet_nowhere_and_fit(tmp_path):
    long = ["é" * 124 + ".png", "n" * 250 + ".png", "n" * 249 + "o.png", "n" * 250 + ".jpg"]
    paths = [tmp_path / name for name in ["a.png", "a.jpg", "a_png.bmp", "B.png", "sub/b.png", "sub/B.png", "sub/B.PNG", *long]]
    names = output_names(paths, tmp_path)
    assert len({str(name).casefold() for name in names.values()}) == len(paths)
    assert all(len(os.fsencode(f"{name.name}_detections.json")) <= 255 for name in names.values())
    assert names == output_names(paths, tmp_path) and names[paths[3]].as_posix() == "B"
    assert all(name.parent == path.relative_to(tmp_path).parent for path, name in names.items())


# ---- files that cannot be scored


def spoil(folder, whole: bytes) -> list[str]:
    """Bad files of every kind in a folder, by name."""
    (folder / "zero.png").write_bytes(b"")
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "text.png").write_text("text")
    (folder / "dangling.png").symlink_to(folder / "nothing")
    (folder / "folder.png").mkdir()  # no image, whatever it is called
    frames = [Image.new("L", (64, 64), grey) for grey in (10, 200)]
    frames[0].save(folder / "frames.gif", save_all=True, append_images=frames[1:])
    Image.new("L", (4, 4)).save(folder / "tiny.png")
    return ["cut.png", "dangling.png", "frames.gif", "text.png", "tiny.png", "zero.png"]


@pytest.mark.parametrize("how", ["run", "noise"])
def test_bad_files_do_not_cost_the_others(how, finished, images, tmp_path):
    how = NOISE if how == "noise" else by_run(finished)
    good = {row[0]: row[1] for row in told(images, tmp_path / "good", *how).rows}
    names = ["000.png", "001.png", "n" * 248 + ".png"]
    if sys.platform == "linux":
        names.append(os.fsdecode(b"caf\xe9.png"))
    for name in names[2:]:
        shutil.copy(images / "000.png", images / name)
    bad = spoil(images, (images / "000.png").read_bytes())
    done = told(images, tmp_path / "out", *how)
    rows = rows_of(tmp_path / "out" / "scores.csv")
    assert sorted(row["path"] for row in rows) == sorted(str(images / name) for name in names)
    for row in rows:
        if row["path"] in good:
            assert float(row["score"]) == pytest.approx(good[row["path"]], rel=1e-5)
    failed = rows_of(tmp_path / "out" / "failed.csv")
    assert [row["path"] for row in failed] == [str(images / name) for name in bad] == [str(path) for path, _ in done.failed]
    assert all(row["reason"] and not row["reason"].startswith(str(images)) for row in failed)
    for name in bad:
        (images / name).unlink()
    told(images, tmp_path / "out", *how)
    assert not (tmp_path / "out" / "failed.csv").exists()


@pytest.mark.parametrize("how", ["run", "noise", "api"])
def test_nothing_but_bad_files_is_an_error(how, finished, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "zero.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"zero\.png: .*empty"):
        if how == "api":
            AnomalyDetector.load(finished, device="cpu").test(tmp_path / "in", tmp_path / "out")
        else:
            told(tmp_path / "in", tmp_path / "out", *(NOISE if how == "noise" else by_run(finished)))
    assert len(rows_of(tmp_path / "out" / "failed.csv")) == 1


def test_an_image_without_a_roi_is_one_of_them(finished, images, tmp_path):
    (tmp_path / "regions").mkdir()
    Image.new("L", (64, 64), 255).save(tmp_path / "regions" / "000.png")
    done = told(images, tmp_path / "out", *by_run(finished), f"roi='{tmp_path / 'regions'}'")
    assert [path.name for path, _ in done.failed] == ["001.png"]


def test_api(finished, images, tmp_path, caplog):
    detector = AnomalyDetector.load(finished, device="cpu")
    spoil(images, (images / "000.png").read_bytes())
    assert [result.path.name for result in detector.test(images, tmp_path / "out")] == ["000.png", "001.png"]
    assert "zero.png" in caplog.text
    with pytest.raises(InputError, match=r"zero\.png"):
        detector.predict([images / "000.png", images / "zero.png"])


def test_what_was_scored_before_a_stop_is_kept(tmp_path):
    image = np.zeros((8, 8, 3), np.uint8)

    def found():
        yield ImageResult(tmp_path / "a.png", image, 1.0, torch.zeros(8, 8))
        raise KeyboardInterrupt

    calibration = torch.tensor([[0.5, 0.5]] * 20)
    names = {tmp_path / "a.png": tmp_path / "a"}
    with pytest.raises(KeyboardInterrupt):
        write(found(), Rule(calibration, 0.05), names, tmp_path, None)
    assert [row["score"] for row in rows_of(tmp_path / "scores.csv")] == ["1.0"]
    assert [line["score"] for line in lines_of(tmp_path / "results.jsonl")] == [1.0]


# ---- results for programs


def lines_of(path) -> list[dict]:
    def refuse(word):
        raise AssertionError(word)

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("how", ["run", "noise"])
def test_lines_hold_what_the_table_and_the_masks_hold(how, finished, images, tmp_path):
    Image.open(images / "000.png").resize((200, 90)).save(images / "größe.png")
    if sys.platform == "linux":
        shutil.copy(images / "000.png", images / os.fsdecode(b"caf\xe9.png"))
    out = tmp_path / "out"
    told(images, out, *(NOISE if how == "noise" else by_run(finished)))
    lines, rows = lines_of(out / "results.jsonl"), rows_of(out / "scores.csv")
    assert len(lines) == len(rows) == 3 + (sys.platform == "linux")
    for line, row in zip(lines, rows, strict=True):
        names = ["path", "score", "p_value", "decision", "threshold", "boxes", "files", "adjusted", "false_at_most"]
        assert list(line) == names and (line["adjusted"] is None) == (line["false_at_most"] is None) == (how == "noise")
        assert os.fsencode(line["path"]) == os.fsencode(row["path"])
        assert line["decision"] is (row["decision"] == "1")
        assert [str(line[key]) for key in ("score", "threshold")] == [row[key] for key in ("score", "threshold")]
        assert (line["p_value"] is None) == (how == "noise") == (row["p_value"] == "")
        assert all((out / name).is_file() for name in line["files"])
        mask = np.asarray(Image.open(next(out / name for name in line["files"] if name.endswith("_mask.png"))))
        assert mask.shape == np.asarray(Image.open(row["path"])).shape[:2]
        covered = np.zeros_like(mask)
        for x, y, w, h in line["boxes"]:
            assert mask[y : y + h, x : x + w].any(1).all() and mask[y : y + h, x : x + w].any(0).all()
            covered[y : y + h, x : x + w] = 255
        assert (covered >= mask).all() and (mask.any() == bool(line["boxes"]))


def test_a_box_of_blocks_lies_in_the_image():
    shown = np.zeros((4, 5))
    shown[0, 0], shown[3, 3:] = 2, 3
    assert boxes_in_image(shown, 1.0, 3, (11, 14)) == [(9, 9, 5, 2), (0, 0, 3, 3)]


def test_pictures_are_chosen(finished, images, tmp_path):
    for save, expected in (("[]", set()), ("[overlay]", {"overlay"}), ("[map,mask]", {"map", "mask"})):
        out = tmp_path / save
        done = told(images, out, *by_run(finished), f"save={save}")
        assert {path.stem.split("_")[1] for path in out.glob("*.png")} == expected
        assert all(len(line["files"]) == len(expected) and line["boxes"] for line in lines_of(out / "results.jsonl"))
        assert any("_overlay.png" in line for line in done.summary) == ("overlay" in expected)
    (images / "000_mask.png").write_bytes(b"mine")
    assert told(images / "000.png", images, *by_run(finished), "save=[map]").rows, "a name it does not need"


@pytest.mark.parametrize(
    ("save", "says"), [("[overlay,maks]", "did you mean 'mask'"), ("none", r"save=\[\]"), ("null", "a list of"), ("[1]", "a list of")]
)
def test_unknown_pictures_are_refused(save, says):
    with pytest.raises(InputError, match=f"^save=.*{says}") as error:
        told("/nowhere", "/nowhere/out", "run=/nowhere", f"save={save}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("protocol", ["clean", "paper"])
def test_an_overlay_of_a_normal_image_is_calm(protocol, finished, tiny, tmp_path):
    if protocol == "paper":
        train(tiny_run(tiny, tmp_path / "run", "model=padim", "protocol=paper"))
        finished = tmp_path / "run"
    low, normal, high = read_record(finished)["scale"]
    assert low < normal < high and saved_scale(finished / "model.ckpt", DictConfig({})) == (low, normal, high)
    coloured = {}
    for kind in ("normal_test", "square"):
        told(tiny / kind, tmp_path / kind, *by_run(finished))
        pictures = [np.asarray(Image.open(path).convert("RGB")) for path in sorted((tmp_path / kind).glob("*_overlay.png"))]
        originals = [np.asarray(Image.open(path).convert("RGB")) for path in sorted((tiny / kind).glob("*.png"))]
        changed = [(one != other).any(-1)[27:37] for one, other in zip(pictures, originals, strict=True)]  # no words there
        coloured[kind] = np.mean(changed)
    assert coloured["normal_test"] < 0.1 * coloured["square"]


# ---- thresholds


def test_thresholds_by_hand(finished, images, tmp_path):
    usual = told(images, tmp_path / "out", *by_run(finished))
    scores = [row[1] for row in usual.rows]
    assert {row["threshold_from"] for row in rows_of(tmp_path / "out" / "scores.csv")} == {"calibration"}
    middle = sum(scores) / 2
    done = told(images, tmp_path / "out", *by_run(finished), f"threshold={middle}", "map_threshold=1e9")
    rows = rows_of(tmp_path / "out" / "scores.csv")
    assert [int(row["decision"]) for row in rows] == [int(score > middle) for score in scores]
    assert {(float(row["threshold"]), row["threshold_from"]) for row in rows} == {(middle, "by hand")}
    assert not np.asarray(Image.open(tmp_path / "out" / "000_mask.png")).any()
    assert "set by hand" in done.summary[0] and "map above 1e+09" in done.summary[1]
    done = told(images, tmp_path / "out", *by_run(finished), "alpha=0.5")
    assert "50 %" in done.summary[0]
    done = told(images, tmp_path / "out", *by_run(finished), "alpha=0.01")
    assert "cannot be promised" in done.summary[1]


BAD = ["alpha=5", "alpha=-0.1", "alpha=many", "threshold=nan", "threshold=inf", "threshold=high", "threshold=[1]", "map_threshold=nan"]
BAD += [
    "fdr=0",
    "threshold=1 fdr=0.1",
    "alpha=0.1 fdr=0.1",
    "threshold=1 alpha=0.1",
    "monitor_rate=0",
    "monitor_rate=often",
    "monitor=perhaps",
]


@pytest.mark.parametrize("wrong", BAD)
def test_settings_that_are_none_are_refused_before_anything_is_read(wrong):
    with pytest.raises(InputError, match=f"^{wrong.partition('=')[0]}="):
        told("/nowhere", "/nowhere/out", "run=/nowhere", *wrong.split())


@pytest.mark.parametrize("key", ["threshold=1", "alpha=0.1", "fdr=0.1", "map_threshold=1"])
def test_the_noise_detector_has_epsilon(key):
    with pytest.raises(InputError, match=rf"{key}.*model\.epsilon"):
        told("/nowhere", "/nowhere/out", *NOISE, key)


def test_a_run_without_a_threshold(finished, images, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    state = torch.load(tmp_path / "run" / "model.ckpt", weights_only=True)
    state["state_dict"]["calibration"] = torch.empty(0, 2)
    torch.save(state, tmp_path / "run" / "model.ckpt")
    how = by_run(tmp_path / "run")
    assert "threshold=NUMBER" in told(images, tmp_path / "out", *how).summary[0]
    for key in ("alpha", "fdr"):
        with pytest.raises(InputError, match=rf"{key}=0\.1: the run has no calibration images"):
            told(images, tmp_path / "out", *how, f"{key}=0.1")
    told(images, tmp_path / "out", *how, "threshold=0")
    assert {(row["decision"], row["p_value"]) for row in rows_of(tmp_path / "out" / "scores.csv")} == {("1", "")}


def test_thresholds_in_python(finished, images, tmp_path):
    detector = AnomalyDetector.load(finished, device="cpu")
    usual, level = detector.threshold, detector.map_threshold
    scores = [result.score for result in detector.predict(images)]
    detector.threshold, detector.map_threshold = min(scores) - 1, 1e9
    assert detector.threshold.by_hand and "by hand" in detector.threshold.explain()
    assert all(result.decision and not result.boxes and result.p_value for result in detector.predict(images))
    detector.save(tmp_path / "x.ckpt")
    again = AnomalyDetector.load(tmp_path / "x.ckpt", device="cpu")
    assert again.threshold == detector.threshold and again.map_threshold == 1e9
    again.alpha = 0.5
    assert again.threshold.requested == 0.5 and again.map_threshold == 1e9
    detector.threshold = detector.map_threshold = None
    assert detector.threshold == usual and detector.map_threshold == level
    for name, value in (("threshold", float("nan")), ("threshold", "high"), ("map_threshold", True), ("alpha", 5), ("alpha", "x")):
        with pytest.raises(InputError, match=name):
            setattr(detector, name, value)
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(InputError, match="notes"):
        detector.save(tmp_path / "notes")


def test_a_folder_is_decided_on_together(finished, tiny, tmp_path):
    folder = tmp_path / "in"
    shutil.copytree(tiny / "normal_test", folder)
    for path in (tiny / "square").glob("*.png"):
        shutil.copy(path, folder / f"square_{path.name}")
    rows = told(folder, tmp_path / "usual", *by_run(finished)).rows
    p = np.array([row[COLUMNS.index("p_value")] for row in rows])
    expected, n = false_discovery_control(p), len(AnomalyDetector.load(finished, device="cpu").model.calibration)
    level, scores = float(np.median(expected)) + 1e-9, [row[1] for row in rows]
    done = told(folder, tmp_path / "out", *by_run(finished), f"fdr={level}")
    lines, table = lines_of(tmp_path / "out" / "results.jsonl"), rows_of(tmp_path / "out" / "scores.csv")
    np.testing.assert_allclose([line["adjusted"] for line in lines], expected)
    assert [line["false_at_most"] for line in lines] == false_alarm_bounds(scores, p, n).tolist()
    assert [line["decision"] for line in lines] == [row["decision"] == "1" for row in table] == (expected <= level).tolist()
    assert all(line["decision"] == (line["score"] > line["threshold"]) for line in lines)
    assert {row["threshold_from"] for row in table} == {"fdr"}
    assert "false alarms on average" in done.summary[0] and any("95 % confidence" in line for line in done.summary)
    told(folder, tmp_path / "out", *by_run(finished), "fdr=1e-6")
    assert {(line["decision"], line["threshold"]) for line in lines_of(tmp_path / "out" / "results.jsonl")} == {(False, None)}
    detector = AnomalyDetector.load(finished, device="cpu")
    steps = detector.certificate(detector.predict(folder))
    assert steps[-1].alarms == len(p) and [step.score for step in steps] == sorted(scores, reverse=True)
    assert dict(zip(scores, (line["false_at_most"] for line in lines), strict=True)) == {step.score: step.false_at_most for step in steps}


# ---- what is said


def test_a_share_that_normal_images_would_not_have():
    threshold = Threshold(1.0, 0.05, 0.05, 199)
    assert unusual(3, 20, threshold) is None and "20 of 20" in unusual(20, 20, threshold)
    assert unusual(1, 1, threshold) is None and unusual(0, 5, threshold) is None
    assert unusual(8, 8, Threshold(1.0, None, None, 199)) is None and unusual(8, 8, Threshold(None, 1.0, 0.05, 0)) is None
    generator = np.random.default_rng(0)
    alarms = 0
    for _ in range(400):  # the stated probability holds for few calibration images too
        calibration = torch.from_numpy(generator.normal(size=(19, 1)).repeat(2, 1))
        rule = Rule(calibration, 0.05).threshold
        alarms += unusual(int((generator.normal(size=30) > rule.value).sum()), 30, rule) is not None
    assert alarms <= 12


def test_the_share_is_warned_of(finished, tiny, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    done = told(tiny / "square", tmp_path / "out", *by_run(finished))
    assert done.summary[0].startswith("6 of 6 anomalous (threshold ")
    assert done.summary[-1] == f"6 images scored: {tmp_path / 'out' / 'scores.csv'}"
    assert any("_overlay.png" in line for line in done.summary)
    assert "6 of 6 images are called anomalous" in caplog.text
