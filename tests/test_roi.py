"""ROI and letterbox from the training to the prediction: pixels outside the ROI have no part in any result."""

import csv
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score
from support import composed, slow, tiny_run

from blemish import AnomalyDetector
from blemish.deploy.export import export_run
from blemish.edge import runtime
from blemish.edge.errors import InputError
from blemish.edge.reading import read
from blemish.run.checkpoint import load
from blemish.run.predict import predict
from blemish.run.record import read_record
from blemish.run.test import test as retest
from blemish.run.train import described, set_up, train
from blemish.types import ANOMALOUS

TINY = {"backbone": "test_resnet", "weights": "random", "image_size": 64, "crop": None, "batch_size": 8, "device": "cpu", "progress": False}
SEEN = np.zeros((64, 64), bool)
SEEN[4:60, 4:40] = True


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


@pytest.fixture(scope="module")
def roi(tmp_path_factory):
    return save(tmp_path_factory.mktemp("roi") / "mask.png", SEEN.astype(np.uint8) * 255)


@pytest.fixture(scope="module")
def elsewhere(tiny, tmp_path_factory):
    """The same images with noise outside the ROI."""
    root, rng = tmp_path_factory.mktemp("elsewhere") / "data", np.random.default_rng(1)
    shutil.copytree(tiny, root)
    for folder in ("normal", "normal_test", "square"):
        for path in (root / folder).glob("*.png"):
            image = read(path)
            save(path, np.where(SEEN, image, rng.integers(0, 256, image.shape, dtype=np.uint8)))
    return root


def scores(path, column="score"):
    with path.open() as file:
        return {row["path"].rpartition("/")[2]: row[column] for row in csv.DictReader(file)}


def options(roi, *more):
    return ["model=padim", "crop=null", f"data.roi='{roi}'", *more]


@pytest.fixture(scope="module")
def run(tiny, roi, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "padim"
    return folder, train(tiny_run(tiny, folder, *options(roi)))


def predicted(run, source, output, *more):
    predict(composed(f"run='{run}'", f"input='{source}'", f"output='{output}'", "device=cpu", *more, config="predict"))
    return scores(output / "scores.csv"), {path.name: read(path) for path in sorted(output.rglob("*.png")) if "overlay" not in path.name}


def equal(one, other):
    return one[0] == other[0] and one[1].keys() == other[1].keys() and all(np.array_equal(one[1][name], other[1][name]) for name in one[1])


def figures(metrics):
    return {name: value for name, value in metrics.items() if not name.endswith("_seconds")}


@pytest.mark.parametrize(
    "more", [("tiling=48", "overlap=16", "image_size=32", "save.pictures=2"), ("model=patchcore",), ("model=dfm", "model.pool=1")]
)
def test_pixels_outside_change_nothing(tiny, elsewhere, roi, tmp_path, more):
    rows = []
    for name, root in (("one", tiny), ("other", elsewhere)):
        metrics, table = train(tiny_run(root, tmp_path / name, *options(roi, *more))), tmp_path / name / "scores.csv"
        found = predicted(tmp_path / name, root / "square", tmp_path / f"{name}-out")
        assert equal(found, predicted(tmp_path / name, tiny / "square", tmp_path / f"{name}-across"))
        rows.append((figures(metrics), scores(table), scores(table, "decision"), found))
    (*one, found), (*other, again) = rows
    assert one == other and equal(found, again)
    for name, map in found[1].items():
        if name.endswith("_map.png"):
            assert (map[~SEEN] == 0).all() and map[SEEN].min() == 0 and map.max() == 65535
        else:
            assert (map[~SEEN] == 0).all()


def marked(brick, y, x):
    image = brick.copy()
    image[y : y + 11, x : x + 11] = 255
    return image


def test_a_defect_counts_inside_alone(run, tiny, tmp_path):
    normal = read(tiny / "normal_test" / "000.png")
    for name, image in {"inside": marked(normal, 20, 12), "outside": marked(normal, 20, 50), "normal": normal}.items():
        save(tmp_path / "in" / f"{name}.png", image)
    found, pictures = predicted(run[0], tmp_path / "in", tmp_path / "out")
    assert found["outside.png"] == found["normal.png"] and float(found["inside.png"]) > 1.2 * float(found["normal.png"])
    assert scores(tmp_path / "out" / "scores.csv", "decision")["inside.png"] == "1"
    assert np.array_equal(pictures["outside_mask.png"], pictures["normal_mask.png"]) and pictures["inside_mask.png"][21:30, 13:22].all()


def test_figures_are_those_of_the_pixels_inside(run, tiny):
    saved, model = load(run[0], "cpu")
    data = set_up(saved, described(saved))
    score, label, values, truth = [], [], [], []
    with torch.inference_mode():
        for batch in data.test_dataloader():
            found = model.test_step(batch, 0)
            raw = model(batch.image)
            assert torch.equal(found.score, raw.map[:, SEEN].amax(1))
            score, label = score + found.score.tolist(), label + batch.label.tolist()
            values.append(raw.map.numpy()[:, SEEN])
            truth += [
                read(tiny / sample.mask)[SEEN] > 0 if (sample := data.sample(key)).mask else np.zeros(SEEN.sum(), bool)
                for key in batch.path
            ]
    values, truth = np.concatenate(values).ravel(), np.concatenate(truth)
    metrics = run[1]
    assert metrics["image_auroc"] == pytest.approx(roc_auc_score(label, score))
    assert metrics["image_ap"] == pytest.approx(average_precision_score(label, score))
    assert metrics["pixel_auroc"] == pytest.approx(roc_auc_score(truth, values))
    assert metrics["pixel_ap"] == pytest.approx(average_precision_score(truth, values))
    assert label.count(ANOMALOUS) == 6  # also of images whose defects are all outside


def test_the_roi_belongs_to_the_run(run, tiny, roi, tmp_path):
    folder, metrics = run
    assert np.array_equal(read(folder / "roi.png") > 0, SEEN) and read_record(folder)["roi"]
    alone = tmp_path / "moved"
    shutil.copytree(folder, alone)
    config = (alone / "config.yaml").read_text()
    (alone / "config.yaml").write_text(config.replace(str(roi), str(tmp_path / "gone.png")))
    found = predicted(folder, tiny / "square", tmp_path / "here")
    assert equal(found, predicted(alone, tiny / "square", tmp_path / "there"))
    again = retest(composed(f"run='{alone}'", f"output='{tmp_path / 'again'}'", config="test"))
    assert figures(again) == figures(metrics)
    assert AnomalyDetector.load(alone, device="cpu").predict(tiny / "square" / "000.png").score == pytest.approx(float(found[0]["000.png"]))
    everything = save(tmp_path / "all.png", np.full((8, 8), 255, np.uint8))
    other = predicted(folder, tiny / "square", tmp_path / "all", f"roi='{everything}'")
    assert other[0] != found[0] and any(map[~SEEN].any() for name, map in other[1].items() if name.endswith("_map.png"))


def test_a_folder_of_masks(tiny, roi, run, tmp_path):
    for folder in ("normal", "normal_test", "square"):
        for path in (tiny / folder).glob("*.png"):
            save(tmp_path / "regions" / folder / path.name, SEEN.astype(np.uint8) * 255)
    folder = tmp_path / "run"
    metrics = train(tiny_run(tiny, folder, *options(tmp_path / "regions")))
    assert figures(metrics) == figures(run[1]) and not (folder / "roi.png").exists()
    assert scores(folder / "scores.csv") == scores(run[0] / "scores.csv")
    found = predicted(folder, tiny / "square", tmp_path / "out", f"roi='{tmp_path / 'regions' / 'square'}'")
    assert equal(found, predicted(run[0], tiny / "square", tmp_path / "one"))
    with pytest.raises(InputError, match=r"000\.png: no mask of its ROI; expected .*regions.000\.png"):
        predicted(folder, tiny / "square", tmp_path / "none")
    with pytest.raises(InputError, match="a mask for each image, which no export holds"):
        export_run(composed(f"run='{folder}'", f"output='{tmp_path / 'model.onnx'}'", config="export"))
    with pytest.raises(InputError, match="expected one mask for all images"):
        AnomalyDetector.load(folder, device="cpu")


def test_the_roi_from_python(tiny, roi, tmp_path):
    found = []
    for source in (roi, SEEN, SEEN.astype(np.uint8)):
        detector = AnomalyDetector("padim", recipe=False, roi=source, **TINY).train(tiny / "normal")
        found.append(detector.predict(tiny / "square"))
    detector.save(tmp_path / "saved")
    found.append(AnomalyDetector.load(tmp_path / "saved", device="cpu").predict(tiny / "square"))
    for results in found[1:]:
        assert [(a.score, a.decision, a.boxes) for a in results] == [(a.score, a.decision, a.boxes) for a in found[0]]
        assert all(np.array_equal(a.map, b.map) for a, b in zip(results, found[0], strict=True))
    for result in found[0]:
        assert (result.map[~SEEN] == result.map[SEEN].min()).all()
        assert all(x >= 4 and y >= 4 and x + w <= 40 and y + h <= 60 for x, y, w, h in result.boxes)
    with pytest.raises(InputError, match="without a white pixel"):
        AnomalyDetector("padim", roi=np.zeros((9, 9)))


def test_an_update_keeps_roi_and_resize(tiny, run, roi, tmp_path):
    more = tmp_path / "more"
    shutil.copytree(tiny, more)
    for path in (more / "normal").glob("*.png"):
        save(path, read(path)[::-1].copy())
    boxed = tmp_path / "boxed"
    train(tiny_run(tiny, boxed, *options(roi, "resize=letterbox")))
    train(tiny_run(more, tmp_path / "updated", "model=padim", "crop=null", f"update='{boxed}'"))
    saved, model = load(tmp_path / "updated", "cpu")
    assert saved.resize == saved.data.resize == "letterbox"
    assert np.array_equal(read(tmp_path / "updated" / "roi.png") > 0, SEEN)
    assert model.fitted == 36
    train(tiny_run(tiny, boxed, "model=padim", "crop=null", "overwrite=true"))
    assert not (boxed / "roi.png").exists() and read_record(boxed)["roi"] is None


# ---- shapes ----


@pytest.fixture(scope="module")
def shapes(tiny, tmp_path_factory):
    """A folder of wide, high and square images; a square of white in each."""
    root, rng = tmp_path_factory.mktemp("shapes"), np.random.default_rng(0)
    brick = np.concatenate([np.concatenate([read(tiny / "normal" / f"{4 * i + j:03}.png") for j in range(4)], 1) for i in range(4)])
    for i, (height, width) in enumerate([(60, 180), (180, 60), (120, 120), (70, 100), (37, 91)] * 2):
        y, x = rng.integers(0, 256 - np.array([height, width]) + 1)
        image = brick[y : y + height, x : x + width].copy()
        save(root / "normal" / f"{i}.png", image)
        save(root / "normal_test" / f"{i}.png", image[::-1, ::-1].copy())
        (y, x), side = rng.integers(4, np.array([height, width]) - 20), min(height, width) // 5
        mask = np.zeros(image.shape, np.uint8)
        mask[y : y + side, x : x + side] = image[y : y + side, x : x + side] = 255
        save(root / "square" / f"{i}.png", image)
        save(root / "masks" / f"{i}.png", mask)
    return root


@pytest.fixture(scope="module")
def boxed(shapes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("boxed") / "run"
    return folder, train(tiny_run(shapes, folder, "model=patchcore", "crop=null", "resize=letterbox", "save.pictures=-1"))


def test_a_letterboxed_run(boxed, shapes, tmp_path):
    folder, metrics = boxed
    saved, model = load(folder, "cpu")
    values, truth = [], []
    with torch.inference_mode():
        for batch in set_up(saved, described(saved)).test_dataloader():
            map, inside = model(batch.image).map, batch.mask < 2
            values.append(map[inside])
            truth.append(batch.mask[inside])
    assert metrics["pixel_auroc"] == pytest.approx(roc_auc_score(torch.cat(truth), torch.cat(values)))
    found, pictures = predicted(folder, shapes / "square", tmp_path / "out")
    assert len(found) == 10
    for i in range(10):
        assert pictures[f"{i}_map.png"].shape == pictures[f"{i}_mask.png"].shape == read(shapes / "square" / f"{i}.png").shape
    own = scores(folder / "scores.csv")  # of images of one name the last: those of square
    assert {name: float(value) for name, value in found.items()} == pytest.approx({name: float(own[name]) for name in found}, rel=1e-5)
    strips = {path.name: read(path).shape for path in (folder / "images").glob("square_*.png")}
    assert len(strips) == 10  # in the shapes of their images
    assert strips["square_0.png"][0] < 0.7 * strips["square_2.png"][0] and strips["square_1.png"][1] < strips["square_2.png"][1]


@pytest.fixture(scope="module")
def both(shapes, roi, tmp_path_factory):
    """A run with roi and letterbox."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason=f"no {name} here: pip install blemish[export]")
    folder = tmp_path_factory.mktemp("both") / "run"
    train(tiny_run(shapes, folder, *options(roi, "resize=letterbox")))
    return folder


def test_an_export_without_the_map_is_refused(both, shapes, tmp_path):
    more = ["format=torch_export", "maps=false", f"images='{shapes / 'square'}'"]
    with pytest.raises(InputError, match="maps=false: the score is that of the map"):
        export_run(composed(f"run='{both}'", f"output='{tmp_path / 'm.pt2'}'", *more, config="export"))


@pytest.mark.parametrize("more", [("input=uint8",), slow(("input=float",)), slow(("source=[37,91]",))])
def test_exports_hold_roi_and_letterbox(both, shapes, tmp_path, more):
    run, source = both, tmp_path / "images"
    for path in (shapes / "square").glob("*.png"):
        if "source" not in more[0] or read(path).shape == (37, 91):
            save(source / path.name, read(path))
    more = (*more, f"images='{source}'")
    path, parity = export_run(composed(f"run='{run}'", f"output='{tmp_path / 'model.onnx'}'", *more, config="export"))
    assert parity.flipped == 0
    found, _ = predicted(run, source, tmp_path / "out")
    model = runtime.Model(path, threads=1)
    detector = AnomalyDetector.load(run, device="cpu")
    for image in sorted(source.glob("*.png")):
        array = read(image)
        (result,) = model.predict([array])
        assert result.score == pytest.approx(float(found[image.name]), rel=1e-4)
        expected = detector.predict(array)
        told, expected_told = result.to_dict(), expected.to_dict()
        assert all(told[key] == expected_told[key] for key in ("decision", "p_value", "threshold")) and told.keys() == expected_told.keys()
        assert result.map_threshold == expected.map_threshold
        np.testing.assert_allclose(result.map, expected.map, rtol=2e-3, atol=2e-3)
