"""`python -m blemish.edge`, with a graph in numpy: a pixel is the more anomalous the farther it is from mid-grey."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from blemish.edge.__main__ import main
from blemish.edge.reading import read
from blemish.edge.runtime import FORMAT, Model

GEOMETRY = {"image_size": 32, "crop": None, "resize": "stretch", "window": {}, "size": [32, 32], "source": None}
METADATA = {
    "format": FORMAT,
    "threshold": 50.0,
    "map_share": 0.0,
    "band": None,
    "map_threshold": 40.0,
    "calibration": [10.0, 20.0, 50.0],
    "batch": None,
    "tiling": None,
}
METADATA |= {**GEOMETRY, "input": "uint8", "ranges": {}, "roi": None}


@pytest.fixture
def model(monkeypatch, tmp_path) -> Path:
    """A file that `Model` takes for an export with METADATA."""

    def load(self, *_):
        return json.dumps(METADATA), lambda batch: [distance(batch).max((1, 2)), distance(batch)]

    monkeypatch.setattr(Model, "load", load)
    return tmp_path / "model.onnx"


def distance(batch: np.ndarray) -> np.ndarray:
    return np.abs(batch.astype(np.float32).mean(-1) - 128)


@pytest.fixture
def images(tmp_path) -> Path:
    folder = tmp_path / "images"
    (folder / "ä").mkdir(parents=True)
    calm = np.full((64, 96), 130, np.uint8)
    spot = calm.copy()
    spot[20:40, 30:60] = 255
    Image.fromarray(calm).save(folder / "ä" / "calm.png")
    Image.fromarray(spot).save(folder / "spot.png")
    Image.fromarray(spot).convert("RGB").save(folder / "spot.bmp")
    return folder


def rows(path: Path) -> list[dict]:
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))


def test_a_result_is_in_the_pixels_of_its_image(model, images):
    calm, spot = Model(model).predict([images / "ä" / "calm.png", Image.fromarray(read(images / "spot.png"))])
    assert (calm.decision, calm.p_value, calm.boxes, calm.path) == (False, 1.0, [], images / "ä" / "calm.png")
    assert (spot.decision, spot.p_value, spot.path, spot.map.shape) == (True, 0.25, None, (64, 96))
    ((x, y, w, h),) = spot.boxes
    assert abs(x - 30) <= 4 and abs(y - 20) <= 4 and abs(w - 30) <= 8 and abs(h - 20) <= 8
    overlay = np.asarray(spot.overlay())
    assert overlay.shape == (64, 96, 3) and tuple(overlay[30, 45]) != (255, 255, 255) and tuple(overlay[60, 90]) == (130, 130, 130)
    assert Model(model).predict(images / "spot.png", maps=False)[0].map is None


def test_frames_are_taken_one_by_one(model, images):
    taken = []

    def camera():
        while True:
            taken.append(1)
            yield np.full((64, 96, 4), 255, np.uint8)  # with alpha

    results = Model(model).predict(camera())
    assert next(results).decision and next(results).decision and len(taken) == 2


def test_writes_tables_and_overlays(model, images, tmp_path, capsys):
    output = tmp_path / "out"
    for _ in range(2):  # its own files are replaced
        assert main([str(model), str(images), str(output)]) == 0
    assert sorted(path.relative_to(output).as_posix() for path in output.rglob("[!.]*.*")) == [
        "results.jsonl",
        "scores.csv",
        "spot_bmp_overlay.png",
        "spot_png_overlay.png",
        "ä/calm_overlay.png",
    ]
    assert "2 of 3 anomalous" in capsys.readouterr().out
    table = rows(output / "scores.csv")
    lines = [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]
    assert [(row["decision"], row["p_value"]) for row in table] == [("1", "0.25"), ("1", "0.25"), ("0", "1.0")]
    for row, line in zip(table, lines, strict=True):
        assert list(line) == ["path", "score", "p_value", "decision", "threshold", "boxes", "files"]
        assert (row["path"], float(row["score"]), bool(int(row["decision"]))) == (line["path"], line["score"], line["decision"])
        assert read(output / line["files"][0]).shape == (64, 96, 3) and len(line["boxes"]) == line["decision"]
    assert main([str(model), str(images / "spot.png"), str(tmp_path / "one"), "--no-overlays"]) == 0
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == [".blemish", "results.jsonl", "scores.csv"]


def test_exit_status(model, images, tmp_path, capsys, monkeypatch):
    output = tmp_path / "out"
    (images / "bad.png").write_bytes(b"no image")
    assert main([str(model), str(images), str(output)]) == 1
    assert [row["path"] for row in rows(output / "failed.csv")] == [str(images / "bad.png")] and len(rows(output / "scores.csv")) == 3
    assert main([str(model), str(images / "bad.png"), str(output)]) == 2
    assert main([str(model), str(images / "spot.png"), str(output)]) == 0
    assert not (output / "failed.csv").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "spot_overlay.png").write_text("the user's")
    for wrong in ([model, images / "spot.png", tmp_path / "mine"], [model, tmp_path / "nowhere", output]):
        assert main([*map(str, wrong)]) == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")
    assert (tmp_path / "mine" / "spot_overlay.png").read_text() == "the user's"

    def interrupted(self, *_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Model, "predict", interrupted)
    assert main([str(model), str(images), str(output)]) == 130
