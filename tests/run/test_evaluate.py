import csv
import json
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score
from torch.utils.data import DataLoader

from blemish import draw
from blemish.curves import simplified
from blemish.data.manifest import Sample
from blemish.draw import choose, file_names
from blemish.edge.errors import InputError
from blemish.files import write_csv, write_json
from blemish.run.evaluate import METRICS, SCORES, Calibrate, Evaluate, ScoredImage, box_inside
from blemish.run.results import Rule
from blemish.run.timing import StageTimes
from blemish.types import IGNORED, NO_TRUTH, NORMAL, Batch, Prediction

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),  # the toy's images are made in no time
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning"),  # lightning 2.6 on torch 2.14
]
SIZE = 32
MANY = 10**9


def samples_of(good, hole, unknown):
    """Test samples of three kinds, and calibration samples, with one pixel in four defective in the images of holes."""
    rows = [Sample(f"test/good/{i:03}.png", "test", 0, "good") for i in range(good)]
    rows += [Sample(f"test/hole/{i:03}.png", "test", 1, "hole", mask="m.png") for i in range(hole)]
    rows += [Sample(f"test/unknown/{i:03}.png", "test", -1, "unknown") for i in range(unknown)]
    return rows + [Sample(f"train/{i:03}.png", "calibrate", 0, "good") for i in range(21)]


def row_of(sample):
    random = np.random.default_rng(list(sample.key.encode()))
    image = torch.tensor(random.random((3, SIZE, SIZE)), dtype=torch.float32)
    mask = torch.zeros(SIZE, SIZE, dtype=torch.uint8)
    if sample.label == 1:
        mask[: SIZE // 2, : SIZE // 2] = 1
        image[:, : SIZE // 2, : SIZE // 2] += 0.3
    if sample.label == -1:
        mask[:] = NO_TRUTH
    return image.clamp(0, 1), sample.label, mask, sample.key


def collate(rows):
    image, label, mask, key = zip(*rows, strict=True)
    return Batch(torch.stack(image), torch.tensor(label), torch.stack(mask), list(key))


class Data(pl.LightningDataModule):
    def __init__(self, samples):
        super().__init__()
        self.samples = samples

    def sample(self, key):
        return next(sample for sample in self.samples if sample.key == key)

    def loader(self, split):
        rows = [row_of(s) for s in self.samples if s.split == split]
        share = rows[self.trainer.global_rank :: self.trainer.world_size]  # each image once, as `ImageData` deals them
        return DataLoader(share, batch_size=4, collate_fn=collate)

    def test_dataloader(self):
        return self.loader("test")

    def predict_dataloader(self):
        return self.loader("calibrate")


class Brightness(pl.LightningModule):
    """The brighter the more anomalous; `factor` stretches the values, `maps` can be left out."""

    map_threshold, promise, region_levels = None, "split", torch.empty(0)

    reconstruct = None

    def __init__(self, factor=1.0, maps=True):
        super().__init__()
        self.register_buffer("calibration", torch.empty(0, 2))
        self.weight = torch.nn.Parameter(torch.zeros(()))  # DDP wants one
        self.factor, self.maps = factor, maps

    def forward(self, image):
        map = image.mean(1) * self.factor - self.factor / 2
        return Prediction(map.flatten(1).mean(1), map if self.maps else None)

    def test_step(self, batch, index):
        return self(batch.image)

    predict_step = test_step


def trainer_of(*callbacks, **options):
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
    }
    return pl.Trainer(**{"accelerator": "cpu", "devices": 1, "callbacks": list(callbacks), **quiet, **options})


def evaluated(samples, model, pictures=0, limit=MANY, calibrate=True):
    data = Data(samples)
    if calibrate:
        values = Calibrate()
        trainer_of(values).predict(model, data, return_predictions=False)
        model.calibration = values.values
    times = StageTimes(torch.nn.Identity)
    evaluate = Evaluate(pictures, limit, 0.1, times)
    trainer_of(evaluate, times).test(model, data, verbose=False)
    assert times.total()["metrics"] > 0
    return evaluate


def size_of(path):
    with Image.open(path) as image:
        return image.size


def direct(samples, model, split):
    """Scores, labels, maps and masks of a split without a trainer."""
    batch = collate([row_of(s) for s in samples if s.split == split])
    with torch.no_grad():
        prediction = model(batch.image)
    return prediction.score.numpy(), batch.label.numpy(), prediction.map.numpy(), batch.mask.numpy()


def test_calibrate_collects_score_and_peak_of_every_image():
    samples, model = samples_of(2, 2, 0), Brightness()
    values = Calibrate()
    trainer_of(values).predict(model, Data(samples), return_predictions=False)
    score, _, map, _ = direct(samples, model, "calibrate")
    np.testing.assert_allclose(values.values.numpy(), np.stack([score, map.max((1, 2))], 1), rtol=1e-6)
    model.maps = False
    trainer_of(values).predict(model, Data(samples), return_predictions=False)
    np.testing.assert_allclose(values.values.numpy(), np.stack([score, score], 1), rtol=1e-6)


def test_ignored_pixels_are_in_no_picture(tmp_path):
    images, masks = torch.rand(2, 3, SIZE, SIZE), torch.zeros(2, SIZE, SIZE, dtype=torch.uint8)
    masks[:, :6] = masks[:, 20:] = masks[1, :, :9] = IGNORED
    batch = Batch(images, torch.tensor([0, 1]), masks, ["a.png", "b.png"])
    loader = SimpleNamespace(dataset=None)
    model, trainer = Brightness(), SimpleNamespace(world_size=1, global_rank=0, test_dataloaders=loader)
    samples = [Sample("a.png", "test", 0, "good"), Sample("b.png", "test", 1, "hole")]
    evaluate = Evaluate(-1, MANY, 0.1, None)
    trainer.datamodule = Data(samples)
    evaluate.on_test_start(trainer, model)
    evaluate.on_test_batch_end(trainer, model, model(images), batch, 0)
    for key, shape in (("a.png", (14, SIZE)), ("b.png", (14, SIZE - 9))):
        picture = evaluate.kept[key]
        assert picture.image.shape == (*shape, 3) and picture.mask.shape == picture.map.shape == shape
        assert (picture.mask == 0).all()
    assert len(evaluate.draw(tmp_path, None)) == 2
    everything = box_inside(torch.zeros(4, 5, dtype=torch.uint8))
    assert everything == (slice(0, 4), slice(0, 5)) and box_inside(torch.full((4, 5), IGNORED))[0] == slice(0, 0)


def test_figures_are_those_of_sklearn():
    samples, model = samples_of(9, 13, 3), Brightness()
    metrics = evaluated(samples, model).metrics(1.5, 2.5)
    score, label, map, mask = direct(samples, model, "test")
    known = label >= 0
    assert metrics["image_auroc"] == pytest.approx(roc_auc_score(label[known], score[known]), abs=1e-12)
    assert metrics["image_ap"] == pytest.approx(average_precision_score(label[known], score[known]), abs=1e-12)
    truth, values = mask[known].ravel(), map[known].ravel()
    assert metrics["pixel_auroc"] == pytest.approx(roc_auc_score(truth, values), abs=1e-9)
    assert metrics["pixel_ap"] == pytest.approx(average_precision_score(truth, values), abs=1e-9)
    assert 0 < metrics["aupro"] < 1
    assert (metrics["fit_seconds"], metrics["test_seconds"]) == (1.5, 2.5)
    assert [metrics[name] for name in ("images", "images_normal", "images_anomalous", "images_unknown")] == [25, 9, 13, 3]
    assert {row: (of["images"], of["image_auroc"]) for row, of in metrics["defects"].items()} == {"hole": (13, metrics["image_auroc"])}
    assert set(metrics["pixel_bounds"].values()) == {0.0}


def test_score_rows_have_decision_and_p_value_from_the_calibration(tmp_path):
    samples, model = samples_of(6, 7, 2), Brightness()
    evaluate = evaluated(samples, model)
    calibration = np.sort(direct(samples, model, "calibrate")[0])
    score, label, _, _ = direct(samples, model, "test")
    threshold = calibration[int(np.ceil(22 * 0.9)) - 1]
    write_csv(tmp_path / "scores.csv", SCORES, evaluate.scores)
    with (tmp_path / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == [s.key for s in samples if s.split == "test"]
    assert [int(row["label"]) for row in rows] == label.tolist()
    np.testing.assert_array_equal([float(row["score"]) for row in rows], score.astype(float))
    assert {float(row["threshold"]) for row in rows} == {float(threshold)}
    assert [int(row["decision"]) for row in rows] == (score > threshold).astype(int).tolist()
    expected = [(1 + (calibration >= value).sum()) / 22 for value in score]
    np.testing.assert_allclose([float(row["p_value"]) for row in rows], expected)
    assert [row["defect"] for row in rows] == [s.defect for s in samples if s.split == "test"]
    metadata = json.loads(json.dumps(evaluate.calibration_metadata()))
    assert metadata["value"] == float(threshold) and metadata["reachable"] and "21 normal" in metadata["explanation"]


def test_a_score_at_the_threshold_is_normal():
    evaluate = evaluated(samples_of(10, 10, 0), Brightness())
    scores = torch.tensor([row[2] for row in evaluate.scores])
    evaluate.rule = Rule(torch.stack([scores, scores], 1), 0.1)
    rows = evaluate.scores
    assert sum(row[2] == row[3] for row in rows) == 1
    assert all(row[4] == (row[2] > row[3]) == (row[5] <= 0.1) for row in rows)


def test_without_calibration_nothing_is_decided():
    evaluate = evaluated(samples_of(3, 3, 0), Brightness(), calibrate=False)
    assert all(threshold is decision is p is None for _, _, _, threshold, decision, p, _ in evaluate.scores)
    assert evaluate.calibration_metadata()["value"] is None
    assert evaluate.metrics(None, None)["image_auroc"] > 0.9


def test_an_image_level_method_has_no_pixel_figures(tmp_path):
    evaluate = evaluated(samples_of(3, 3, 0), Brightness(maps=False), pictures=-1)
    metrics = evaluate.metrics(0.0, 0.0)
    assert metrics["image_auroc"] > 0.9
    assert [metrics[name] for name in METRICS if "image" not in name] == [None] * 4
    assert evaluate.scale is None
    assert len(evaluate.draw(tmp_path, tmp_path / "curves.png")) == 7


@pytest.mark.parametrize(("good", "hole", "unknown"), [(4, 0, 0), (0, 4, 0), (0, 0, 4)])
def test_a_class_that_is_absent_leaves_figures_empty(tmp_path, good, hole, unknown):
    evaluate = evaluated(samples_of(good, hole, unknown), Brightness(), pictures=-1)
    metrics = evaluate.metrics(0.0, 0.0)
    assert metrics["image_auroc"] is None
    assert metrics["images"] == 4
    assert hole or metrics["pixel_auroc"] is metrics["aupro"] is None
    assert len(evaluate.draw(tmp_path, tmp_path / "curves.png")) == 5


def test_a_second_test_starts_anew():
    data, model = Data(samples_of(5, 5, 0)), Brightness()
    evaluate = Evaluate(2, MANY, 0.1, None)
    trainer = trainer_of(evaluate)
    first = [trainer.test(model, data, verbose=False), evaluate.metrics(0.0, 0.0), evaluate.scores][1:]
    second = [trainer.test(model, data, verbose=False), evaluate.metrics(0.0, 0.0), evaluate.scores][1:]
    assert first == second


@pytest.mark.parametrize("factor", [1e9, 1.0, 1e-9])
def test_every_strip_of_a_run_has_one_scale_and_the_maps_values(tmp_path, monkeypatch, factor):
    seen = []
    strip = draw.strip
    monkeypatch.setattr(draw, "strip", lambda *arguments: seen.append(arguments) or strip(*arguments))
    samples, model = samples_of(6, 7, 2), Brightness(factor)
    evaluate = evaluated(samples, model, pictures=-1)
    files = evaluate.draw(tmp_path / "images", None)
    _, label, maps, masks = direct(samples, model, "test")
    assert len(files) == len(seen) == 15
    assert {arguments[3] for arguments in seen} == {evaluate.scale}
    assert {arguments[4] for arguments in seen} == {evaluate.rule.level}
    low, normal, high = evaluate.scale
    assert maps.min() <= low < evaluate.rule.level == normal < high <= maps.max()
    for (image, mask, map, *_), sample, one, truth, known in zip(seen, samples, maps, masks, label, strict=False):
        np.testing.assert_allclose(map, one, atol=(one.max() - one.min()) / 1024)
        np.testing.assert_allclose(image / 255, row_of(sample)[0].permute(1, 2, 0), atol=0.5 / 255 + 1e-6)
        assert mask is None if known < 0 else (mask == truth).all()
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == sorted(path.name for path in files)
    assert len({size_of(path) for path in files}) == 1


def test_normal_images_end_where_those_of_the_test_do_without_calibration():
    evaluate = evaluated(samples_of(20, 6, 3), Brightness(), calibrate=False)
    highs = sorted(one.high for one in evaluate.tested.values() if one.label == NORMAL)
    low, normal, high = evaluate.scale
    assert low < normal == highs[17] < high  # alpha 0.1
    evaluate.tested = {key: one for key, one in evaluate.tested.items() if one.label != NORMAL}
    assert evaluate.scale[1] == np.median([one.high for one in evaluate.tested.values()])


@pytest.mark.parametrize(("level", "expected"), [(None, (1, 4, 9)), (3.0, (1, 3, 9)), (20.0, (1, 20, 39)), (0.5, (0.5, 0.5, 9))])
def test_a_level_is_where_normal_images_end(level, expected):
    rule = Rule(torch.empty(0, 2), 0.1, chosen={"map_threshold": level})
    assert rule.scale([1.0, 4.0, 9.0]) == expected
    assert rule.scale(None) == (None if level is None else (0, level, 2 * level))


def test_one_odd_image_does_not_darken_the_rest():
    samples = samples_of(20, 20, 0)
    evaluate = evaluated(samples, Brightness())
    before = evaluate.scale
    key = samples[0].key
    evaluate.tested[key] = evaluate.tested[key]._replace(low=-1e6, high=1e6)
    after = evaluate.scale
    assert np.ptp(after) < 1.5 * np.ptp(before)


def test_pixels_beyond_the_limit_are_bounded():
    samples, model = samples_of(9, 9, 0), Brightness()
    exact, coarse = (evaluated(samples, model, limit=limit).metrics(0.0, 0.0) for limit in (MANY, 2000))
    for name in ("pixel_auroc", "pixel_ap", "aupro"):
        assert abs(exact[name] - coarse[name]) <= coarse["pixel_bounds"][name] + 1e-12


def test_a_score_that_is_no_number_stops_the_test():
    class Broken(Brightness):
        def forward(self, image):
            return super().forward(image)._replace(score=torch.full((len(image),), torch.nan))

    with pytest.raises(InputError, match="NaN"):
        evaluated(samples_of(2, 2, 0), Broken(), calibrate=False)


class Writes(Evaluate):
    """Writes from inside the test: what a forked process learns dies with it."""

    def __init__(self, folder):
        super().__init__(4, MANY, 0.1, None)
        self.folder = folder

    def on_test_end(self, trainer, module):
        super().on_test_end(trainer, module)
        if trainer.global_rank == 0:
            write_json(self.folder / "metrics.json", self.metrics(0.0, 0.0))
            write_csv(self.folder / "scores.csv", SCORES, self.scores)
            write_json(self.folder / "scale.json", self.scale)
            self.draw(self.folder / "images", None)
        else:
            assert not self.tested and not self.kept


class Keeps(Calibrate):
    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def on_predict_end(self, trainer, module):
        super().on_predict_end(trainer, module)
        write_json(self.folder / f"{trainer.world_size}-{trainer.global_rank}.json", self.values)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="ddp_fork needs a process without CUDA")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # the children run no other thread's code
def test_two_processes_give_what_one_gives(tmp_path):
    samples = samples_of(6, 6, 1)  # shares of 7 and 6
    for processes, folder in ((1, tmp_path / "one"), (2, tmp_path / "two")):
        options = {"devices": processes} | ({"strategy": "ddp_fork"} if processes > 1 else {})
        model = Brightness()
        trainer_of(Keeps(tmp_path), **options).predict(model, Data(samples), return_predictions=False)
        model.calibration = torch.tensor(json.loads((tmp_path / f"{processes}-0.json").read_text()))
        trainer_of(Writes(folder), **options).test(model, Data(samples), verbose=False)
    assert (tmp_path / "1-0.json").read_text() == (tmp_path / "2-0.json").read_text() == (tmp_path / "2-1.json").read_text()
    files = [path.relative_to(tmp_path / "one") for path in sorted((tmp_path / "one").rglob("*.*"))]
    assert len(files) == 7
    assert files == [path.relative_to(tmp_path / "two") for path in sorted((tmp_path / "two").rglob("*.*"))]
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file


def test_chosen_pictures_are_spread_evenly():
    samples = [Sample(f"{d}/{i}", "test", 0, d) for d, n in (("good", 40), ("a", 3), ("b", 20)) for i in range(n)]
    assert choose(samples, 0) == set()
    assert choose(samples, -1) == choose(samples, 1000) == {s.key for s in samples}
    for pictures in range(1, 63):
        chosen = choose(samples, pictures)
        assert len(chosen) == pictures
        counts = {d: sum(key.startswith(d) for key in chosen) for d in ("good", "a", "b")}
        full = {"good": 40, "a": 3, "b": 20}
        assert max(counts.values()) - min(n for d, n in counts.items() if n < full[d]) <= 1
    assert choose(samples, 1) == {"good/20"}
    assert choose(samples, 6) == {"good/10", "good/30", "a/0", "a/2", "b/5", "b/15"}


def test_file_names_are_safe_readable_and_unique():
    keys = {
        "test/hole/003.png": "hole",
        "other/hole/003.bmp": "hole",
        "OTHER/HOLE/003.png": "HOLE",
        "a/x.png#0,0,64,64": "scratch",
        "a/x.png#64,0,64,64": "scratch",
        "größe/大きさ.png": "éraflure",
        "e/..": "../..",
        'q/a:b*c?"<>|.png': "CON/x",
        f"{'n' * 300}.png": "long",
        f"{'n' * 301}.png": "long",
        "x/bad\udce9name.png": "a\nb",
        "x/hole_003-2.png": "hole",
    }
    names = file_names(keys)
    assert names["test/hole/003.png"] == "hole_003.png"
    assert names["a/x.png#64,0,64,64"] == "scratch_x_64-0-64-64.png"
    assert names["größe/大きさ.png"] == "éraflure_大きさ.png"
    assert len({name.casefold() for name in names.values()}) == len(keys)
    for name in names.values():
        assert name == Path(name).name and len(name.encode()) <= 200 and name[0] != "." and not set(name) & set('\\/:*?"<>|\n')


def test_the_numbers_behind_the_curves_are_written(tmp_path):
    samples, model = samples_of(40, 40, 3), Brightness()
    evaluate = evaluated(samples, model)
    file = tmp_path / "ordner ü" / "curves.png"
    assert evaluate.draw(tmp_path, file) == [file] and size_of(file)[0] > 800
    lines = json.loads(file.with_suffix(".json").read_text())
    assert {kind: list(of) for kind, of in lines.items()} == {"image": ["roc", "pr"], "pixel": ["roc", "pr", "pro"]}
    assert all(2 <= len(line) <= 200 for of in lines.values() for line in of.values())
    score, label, map, mask = direct(samples, model, "test")
    known = label >= 0
    for kind, truth, found in (("image", label[known], score[known]), ("pixel", mask[known].ravel(), map[known].ravel())):
        x, y = np.array(lines[kind]["roc"]).T
        assert abs(np.trapezoid(y, x) - roc_auc_score(truth, found)) < 1e-3
    x, y = np.array(lines["pixel"]["pro"]).T
    assert x[-1] == pytest.approx(0.3)
    assert abs(np.trapezoid(y, x) / 0.3 - evaluate.metrics(None, None)["aupro"]) < 1e-3
    evaluated(samples_of(3, 0, 0), model).draw(tmp_path, tmp_path / "curves.png")
    assert json.loads((tmp_path / "curves.json").read_text())["image"] == {"roc": [], "pr": []}


@pytest.mark.parametrize("kind", ["arc", "stairs", "walk", "flat"])
def test_a_simplified_line_looks_the_same(kind):
    random, x = np.random.default_rng(0), np.linspace(0, 1, 1000)
    stairs = np.repeat(np.sort(random.random((60, 2)), axis=0), 2, axis=0).ravel()[1:-1].reshape(-1, 2)
    walk = np.abs(np.cumsum(random.normal(size=1000)))
    line = {"arc": np.c_[x, x**0.2], "stairs": stairs, "walk": np.c_[x, walk / walk.max()], "flat": np.c_[x, 0 * x]}[kind]
    few = simplified(line, 200)
    assert len(few) <= 200
    np.testing.assert_array_equal(few[[0, -1]], line[[0, -1]])
    assert set(map(tuple, few)) <= set(map(tuple, line))
    # the distance of every vertex left out from the nearest side, by brute force
    start, side = few[:-1], np.diff(few, axis=0)
    offset = line[:, None] - start
    along = ((offset * side).sum(-1) / (side**2).sum(-1).clip(1e-30)).clip(0, 1)
    gap = np.linalg.norm(offset - along[..., None] * side, axis=-1).min(1)
    assert gap.max() < (0.03 if kind == "walk" else 0.0006)
    assert len(simplified(line, 5)) <= 5


def test_decisions_are_counted_at_the_calibrated_threshold():
    evaluate = Evaluate(0, 1000, 0.5, None)
    evaluate.rule = Rule(torch.tensor([[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]]), 0.5)  # the second of three
    scores = {"a": (1, 3.0), "b": (1, 0.5), "c": (0, 1.5), "d": (0, 0.2), "e": (0, 1.0), "f": (-1, 9.0)}
    evaluate.tested = {key: ScoredImage(label, "good", score, 0.0, 0.0) for key, (label, score) in scores.items()}
    assert evaluate.threshold.value == 1.0
    assert evaluate.decisions() == {"image_f1": 2 / 4, "image_recall": 1 / 2, "image_false_alarm_rate": 1 / 3}
    evaluate.rule = Rule(torch.empty(0, 2), 0.5)
    assert set(evaluate.decisions().values()) == {None}
