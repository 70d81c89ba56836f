"""Tiles of large images: seams, image coordinates, runs, and memory."""

import shutil
import subprocess
import sys
import tracemalloc
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage
from support import DATA, composed, quick, tiny_run
from torch.nn import functional as F

from blemish.api import AnomalyDetector
from blemish.data.arrays import ArrayData
from blemish.data.dataset import MIXED, TileBatches, Tiles, batches_by_image
from blemish.data.manifest import Sample
from blemish.data.ranges import ValueCheck
from blemish.data.samplers import Shuffled, shuffle_tiles
from blemish.data.tiles import bytes_of, largest_blocks, mean_blocks, reduction, tiles_of
from blemish.detector import Detector
from blemish.edge.errors import InputError
from blemish.edge.geometry import Blend, Geometry, grid, mirrored, ramp
from blemish.edge.reading import read, size_of
from blemish.run import config, test
from blemish.run.checkpoint import load
from blemish.run.predict import predict
from blemish.run.results import Preprocessing
from blemish.run.results import predict as apply
from blemish.run.tiling import ImageCallback, reconstruct_tiles, score_image
from blemish.run.train import described, set_up, train
from blemish.types import Batch, Prediction


class Local(Detector):
    """|image − ½| averaged over `side`² pixels: a map that nothing farther away can change."""

    def __init__(self, side: int = 1):
        super().__init__()
        self.side = side

    def forward(self, image):
        map = F.avg_pool2d((image.mean(1, keepdim=True) - 0.5).abs(), self.side, 1, self.side // 2, count_include_pad=False)[:, 0]
        return Prediction(map.amax((1, 2)), map)


def grey(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(100, 156, (height, width)).astype(np.uint8)


def plain_blend(maps: dict, height: int, width: int, tile: int, overlap: int) -> np.ndarray:
    """The weighted mean by its definition, in float64."""
    top, total = np.zeros((height, width)), np.zeros((height, width))
    for (x, y), map in maps.items():
        h, w = min(tile, height), min(tile, width)
        across = [min(1, (min(j, w - 1 - j) + 1) / (overlap + 1)) for j in range(w)]
        down = [min(1, (min(i, h - 1 - i) + 1) / (overlap + 1)) for i in range(h)]
        weight = np.array([[a * b for b in across] for a in down])
        top[y : y + h, x : x + w] += weight * map[:h, :w]
        total[y : y + h, x : x + w] += weight
    return top / total


def blended(maps: dict, height: int, width: int, tile: int, overlap: int) -> np.ndarray:
    rows = []
    blend = Blend(height, width, tile, overlap, lambda band: rows.append(band.copy()))
    for (x, y), map in maps.items():
        blend.add(map, x, y)
    return np.concatenate(rows)


@settings(max_examples=40, deadline=None)
@given(st.integers(3, 40), st.integers(3, 40), st.integers(4, 16), st.data())
def test_blend_is_the_weighted_mean_in_image_coordinates(height, width, tile, data):
    overlap = data.draw(st.integers(0, tile - 1))
    rng = np.random.default_rng(height * width)
    maps = {(x, y): rng.normal(size=(tile, tile)).astype(np.float32) for x, y, _, _ in grid(width, height, tile, overlap)}
    found = blended(maps, height, width, tile, overlap)
    assert found.shape == (height, width)
    np.testing.assert_allclose(found, plain_blend(maps, height, width, tile, overlap), atol=1e-5)
    constant = {place: np.full((tile, tile), 0.1234567, np.float32) for place in maps}
    assert (blended(constant, height, width, tile, overlap) == np.float32(0.1234567)).all()  # to the last bit


def test_ramp_falls_linearly_within_the_overlap():
    np.testing.assert_allclose(ramp(10, 3), [0.25, 0.5, 0.75, 1, 1, 1, 1, 0.75, 0.5, 0.25])
    assert (ramp(5, 0) == 1).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(8, 200), st.integers(8, 200), st.integers(8, 64), st.data())
def test_grid_covers_every_pixel_and_stays_inside(width, height, tile, data):
    overlap = data.draw(st.integers(0, tile - 1))
    cover, ends = np.zeros((height, width), int), {}
    for x, y, w, h in grid(width, height, tile, overlap):
        assert (w, h) == (min(tile, width), min(tile, height)) and x + w <= width and y + h <= height
        cover[y : y + h, x : x + w] += 1
        ends.setdefault(y, []).append((x, x + w))
    assert (cover > 0).all()
    for row in ends.values():
        assert row == sorted(row) and all(before[1] - after[0] >= overlap for before, after in pairwise(row))


@pytest.mark.parametrize("size", [(70, 90), (64, 64), (20, 130), (17, 23), (200, 65)])
@pytest.mark.parametrize("overlap", [0, 16, 40])
def test_a_pixelwise_map_by_tiles_is_the_map_of_the_whole(size, overlap, tmp_path):
    array = grey(*size)
    score, map = score_image(Local(), array, Preprocessing(Geometry(), {}, 64, overlap), 3, tmp_path)
    expected = np.abs(array / np.float32(255) - np.float32(0.5))
    np.testing.assert_allclose(map[:], expected, atol=1e-6)
    assert score == pytest.approx(expected.max(), abs=1e-6)
    assert not list(tmp_path.iterdir())  # what was kept on disk has no name


def test_a_local_map_by_tiles_is_that_of_the_whole_away_from_seams(tmp_path):
    side, tile, overlap, array = 5, 64, 16, grey(150, 210)
    _, map = score_image(Local(side), array, Preprocessing(Geometry(), {}, tile, overlap), 4, tmp_path)
    whole = Local(side)(torch.from_numpy(array / np.float32(255))[None, None].expand(1, 3, -1, -1)).map[0].numpy()
    seam = np.zeros(array.shape, bool)  # pixels within reach of an end of a tile that is no end of the image
    for x, y, w, h in grid(210, 150, tile, overlap):
        for begin, length, full, axis in ((x, w, 210, 1), (y, h, 150, 0)):
            ends = np.zeros(full, bool)
            ends[begin : begin + side // 2] |= begin > 0
            ends[begin + length - side // 2 : begin + length] |= begin + length < full
            seam |= ends[None] if axis else ends[:, None]
    assert 0.1 < seam.mean() < 0.5
    np.testing.assert_allclose(map[:][~seam], whole[~seam], atol=1e-6)
    assert np.abs(map[:] - whole)[seam].max() < 0.02  # the weights are small there


@pytest.mark.parametrize("side", [1, 7])
@pytest.mark.parametrize("network", [None, 32])
def test_a_defect_across_a_seam_is_one_component(side, network, tmp_path):
    array = grey(200, 300)
    array[40:150, 60:70] = array[100:110, 60:280] = 255  # an L over many tiles of 64
    _, map = score_image(Local(side), array, Preprocessing(Geometry(network), {}, 64, 16), 8, tmp_path)
    truth = array == 255
    label, count = ndimage.label(map[:] > 0.3, structure=np.ones((3, 3)))
    assert count == 1
    both, either = (truth & (label > 0)).sum(), (truth | (label > 0)).sum()
    assert both / either > (0.95 if (side, network) == (1, None) else 0.6)


class Collect(ImageCallback):
    def __init__(self):
        self.images = []

    def add(self, trainer, prediction, batch, reconstruct):
        self.images.append((prediction, batch))


@pytest.mark.parametrize(("width", "height", "side"), [(150, 90, 1), (4500, 130, 3), (70, 2100, 2)])
def test_images_from_batches_of_tiles_keep_every_peak(width, height, side, tmp_path):
    images = {name: grey(height, width, seed) for seed, name in enumerate("ab")}
    samples = [Sample(name, "test", label, "good") for label, name in enumerate("ab")]
    source = SimpleNamespace(size=lambda path: (width, height))
    tiles = Tiles(samples, tmp_path, {}, Geometry(None), None, ValueCheck({}, {}), source, tile=64, overlap=16, fit=False)
    tiles.truth = {name: (array > 150).astype(np.uint8) for name, array in images.items()}.get
    collect, loader = Collect(), SimpleNamespace(dataset=TileBatches(tiles, 5))
    for name, array in images.items():
        places = grid(width, height, 64, 16)
        while some := list(islice(places, 5)):
            parts = [mirrored(array[y : y + h, x : x + w], 64) / np.float32(255) for x, y, w, h in some]
            outputs = Local()(torch.from_numpy(np.stack(parts))[:, None].expand(-1, 3, -1, -1))
            keys = [f"{name}#{','.join(map(str, place))}" for place in some]
            collect.add_batch(None, loader, SimpleNamespace(reconstruct=None), outputs, Batch(None, None, None, keys))
    assert [batch.path for _, batch in collect.images] == [["a"], ["b"]] and [int(batch.label) for _, batch in collect.images] == [0, 1]
    for (prediction, batch), name in zip(collect.images, "ab", strict=True):
        whole = np.abs(images[name] / np.float32(255) - np.float32(0.5))
        np.testing.assert_allclose(prediction.map[0], largest_blocks(whole, side), atol=1e-6)
        np.testing.assert_array_equal(batch.mask[0], largest_blocks(tiles.truth(name), side))
        assert prediction.map.shape == batch.mask.shape == (1, *batch.image.shape[-2:])
        assert float(prediction.map.amax()) == pytest.approx(float(whole.max()), abs=1e-6)
        assert float(prediction.score) == pytest.approx(float(whole.max()), abs=1e-6)


class Again(torch.nn.Module):
    """Reconstructs every image as it is, but for what `darker` takes from it."""

    darker, device = 0.0, torch.device("cpu")

    def reconstruct(self, image: torch.Tensor) -> torch.Tensor:
        return image - self.darker


@pytest.mark.parametrize(("height", "width", "tile", "overlap"), [(70, 101, 32, 8), (64, 64, 32, 0), (20, 50, 32, 31), (9, 12, 32, 4)])
def test_reconstructions_of_tiles_make_that_of_the_image(height, width, tile, overlap):
    image = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0))
    model, preprocessing = Again(), Preprocessing(Geometry(), {}, tile, overlap)
    again = reconstruct_tiles(model, image, preprocessing)
    torch.testing.assert_close(again, image, atol=0.5 / 255 + 1e-6, rtol=0)
    model.darker = 0.25
    torch.testing.assert_close(reconstruct_tiles(model, image, preprocessing), again - 0.25, atol=1e-6, rtol=0)
    flat = torch.full((1, 3, height, width), 0.4)
    torch.testing.assert_close(
        reconstruct_tiles(Again(), flat, preprocessing._replace(geometry=Geometry(tile // 2))), flat, atol=1e-6, rtol=0
    )


def test_a_small_image_is_one_tile_continued_by_its_mirror_image():
    array = np.arange(12).reshape(3, 4)
    continued = mirrored(array, 10)
    assert continued.shape == (10, 10)
    np.testing.assert_array_equal(continued[:3, :8], np.concatenate([array, array[:, ::-1]], 1))
    np.testing.assert_array_equal(continued[3:6], continued[2::-1][:3])
    assert mirrored(array, 3) is not None and mirrored(np.zeros((5, 6, 3)), 4).shape == (5, 6, 3)
    assert list(grid(20, 9, 64, 8)) == [(0, 0, 20, 9)]


def test_tiles_are_samples():
    tiles = tiles_of(Sample("a.png", "test", 0, "good"), (100, 64), 64, 16)
    assert [tile.key for tile in tiles] == ["a.png#0,0,64,64", "a.png#36,0,64,64"]
    with pytest.raises(InputError, match="is a tile already"):
        tiles_of(tiles[0], (100, 64), 32, 0)


def test_order_and_batches():
    counts, pixels = [3, 5, 1, 4], [100] * 4
    order = Shuffled(13, 1, draw=partial(shuffle_tiles, counts, pixels, MIXED))
    first, second = list(order), list(order)
    assert sorted(first) == sorted(second) == list(range(13)) == sorted(set(first)) and first != second
    order.set_epoch(0)
    assert list(order) == first and len(order) == 13
    apart = shuffle_tiles(counts, [2**40] * 4, MIXED, torch.Generator().manual_seed(1))  # images too large to be mixed
    image = np.repeat(range(4), counts)[apart]
    assert (np.diff(image) != 0).sum() == 3
    assert batches_by_image(counts, 2) == [[0, 1], [2], [3, 4], [5, 6], [7], [8], [9, 10], [11, 12]]


@pytest.mark.parametrize(("tile", "overlap"), [(4, 0), (64, 64), (64, -1), ("512", 64), (64.5, 0), (True, 0)])
def test_refuses_what_cannot_be_tiled(tile, overlap):
    with pytest.raises(InputError, match="tiling=|overlap="):
        ArrayData(train=[], val=[], **DATA).set_loading(tile, overlap, None)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp"])
def test_sizes_from_headers(orientation, suffix, tmp_path):
    image = Image.fromarray(np.stack([grey(24, 40)] * 3, -1))
    exif = image.getexif()
    exif[274] = orientation
    image.save(tmp_path / f"a{suffix}", exif=exif)
    height, width = read(tmp_path / f"a{suffix}").shape[:2]
    assert size_of(tmp_path / f"a{suffix}") == (width, height)


def test_sizes_of_other_files(tmp_path):
    modes = {"a.png": "L", "b.png": "I;16", "c.png": "1", "d.bmp": "L", "e.tif": "I;16", "f.pgm": "L", "g.gif": "P"}
    for name, mode in modes.items():
        Image.new(mode, (31, 17)).save(tmp_path / name)
        assert size_of(tmp_path / name) == (31, 17)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    with pytest.raises(InputError, match=r"broken\.png"):
        size_of(tmp_path / "broken.png")


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 50), st.integers(1, 50), st.integers(1, 9), st.booleans())
def test_blocks(height, width, side, colour):
    array = np.random.default_rng(height + 99 * width).integers(0, 256, (height, width, 3) if colour else (height, width)).astype(np.uint8)
    blocks = [[array[y : y + side, x : x + side] for x in range(0, width, side)] for y in range(0, height, side)]
    mean = np.array([[block.astype(float).mean((0, 1)) for block in row] for row in blocks])
    assert np.abs(mean_blocks(array, side) - mean).max() <= 0.5 + 1e-9
    np.testing.assert_array_equal(largest_blocks(array, side), [[block.max((0, 1)) for block in row] for row in blocks])
    assert max(mean.shape[:2]) <= 50 and reduction((20000, 12000)) == 10 and reduction((2048, 9)) == 1 == reduction((4096, 1), 4096)


def test_deep_images_are_shown_by_their_window():
    deep = np.linspace(0, 1000, 600).reshape(20, 30).astype(np.float32)
    shown = bytes_of(deep, {"float32": (200.0, 800.0)})
    assert shown.shape == (20, 30, 3) and shown.dtype == np.uint8
    np.testing.assert_array_equal(shown[..., 1], (((deep - 200) / 600).clip(0, 1) * 255).round().astype(np.uint8))
    colour = np.zeros((9, 9, 3), np.uint8)
    assert bytes_of(colour, {}) is colour


# --- whole runs -----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """Noise of 200 × 264 px and three images with a bright square over a seam of tiles of 96."""
    root = tmp_path_factory.mktemp("large")
    for folder, count in (("normal", 12), ("normal_test", 3), ("square", 3)):
        for i in range(count):
            array, mask = np.stack([grey(200, 264, seed=hash((len(folder), i)) % 1000)] * 3, -1), np.zeros((200, 264), np.uint8)
            if folder == "square":
                array[60 + 10 * i : 90 + 10 * i, 70:100], mask[60 + 10 * i : 90 + 10 * i, 70:100] = 255, 255
                (root / "masks" / folder).mkdir(parents=True, exist_ok=True)
                Image.fromarray(mask).save(root / "masks" / folder / f"{i}.png")
            (root / folder).mkdir(exist_ok=True)
            Image.fromarray(array).save(root / folder / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def run(large, tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("runs") / "padim"
    return folder, train(tiny_run(large, folder, "model=padim", "crop=null", "image_size=48", "tiling=96", "overlap=24"))


def test_a_run_on_tiles_has_results_of_images(run, large):
    folder, metrics = run
    rows = (folder / "scores.csv").read_text().splitlines()[1:]
    assert [row.split(",")[0] for row in rows] == [f"{kind}/{i}.png" for kind in ("normal_test", "square") for i in range(3)]
    assert metrics["images"] == 6 and metrics["image_auroc"] == 1.0 and metrics["pixel_auroc"] > 0.98 and metrics["aupro"] > 0.9
    assert "#" not in (folder / "manifest.csv").read_text()
    state = torch.load(folder / "model.ckpt", weights_only=True)["state_dict"]
    assert state["calibration"].shape == (3, 2) and state["fitted"] == 9 * 12  # tiles of nine images


def test_prediction_and_retest_give_the_runs_scores(run, large, tmp_path):
    folder, metrics = run
    again = test.test(composed(f"run='{folder}'", f"output='{tmp_path / 'again'}'", config="test"))
    assert all(again[key] == metrics[key] for key in metrics if not key.endswith("seconds"))
    cfg = composed(f"run='{folder}'", f"input='{large / 'square'}'", f"output='{tmp_path / 'out'}'", "device=cpu", config="predict")
    assert len(predict(cfg).rows) == 3
    scores = [row.split(",")[1] for row in (tmp_path / "out" / "scores.csv").read_text().splitlines()[1:]]
    assert scores == [row.split(",")[2] for row in (folder / "scores.csv").read_text().splitlines() if row.startswith("square")]
    for i in range(3):
        mask, truth = read(tmp_path / "out" / f"{i}_mask.png"), read(large / "masks" / "square" / f"{i}.png")
        assert mask.shape == truth.shape == read(tmp_path / "out" / f"{i}_map.png").shape
        label, _ = ndimage.label(mask, structure=np.ones((3, 3)))
        hit = set(np.unique(label[truth > 0])) - {0}
        assert len(hit) == 1 and ((label == hit.pop()) & (truth > 0)).sum() > 0.9 * (truth > 0).sum()
    assert not [
        path for path in (tmp_path / "out").iterdir() if path.suffix not in (".png", ".csv", ".json", ".jsonl") and path.name != ".blemish"
    ]


def test_calibration_is_by_image(run, large):
    """The run's calibration score of an image is the largest of its tiles', as prediction has it."""
    folder, _ = run
    _, model = load(folder, "cpu")
    held = [line.split(",")[0] for line in (folder / "manifest.csv").read_text().splitlines() if ",calibrate," in line]
    found = list(apply(model, [large / path for path in held], Preprocessing(Geometry(48), {}, 96, 24), 5))
    torch.testing.assert_close(model.calibration[:, 0], torch.tensor([one.score for one in found]), rtol=1e-5, atol=1e-6)
    peaks = torch.tensor([float(one.map[:].max()) for one in found])
    torch.testing.assert_close(model.calibration[:, 1], peaks, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model", ["dfm", "stfpm"])
def test_other_kinds_of_methods_take_tiles(model, large, tmp_path):
    options = ["crop=null", "image_size=64", "tiling=128", "overlap=32", "save.pictures=2"]
    metrics = train(tiny_run(large, tmp_path / "run", f"model={model}", *options, "trainer.max_epochs=1"))
    assert metrics["images"] == 6 and np.isfinite(metrics["image_auroc"])
    cfg = composed(
        f"run='{tmp_path / 'run'}'", f"input='{large / 'square'}'", f"output='{tmp_path / 'out'}'", "device=cpu", config="predict"
    )
    assert len(predict(cfg).rows) == 3


def test_from_python(large, tmp_path):
    images = [path if i % 2 else read(path) for i, path in enumerate(sorted((large / "normal").iterdir()))]
    options = {"backbone": "test_resnet", "weights": "random", "image_size": 48, "tiling": 96, "overlap": 24, "device": "cpu"}
    detector = AnomalyDetector("padim", crop=None, progress=False, batch_size=5, **options).train(images)
    detector.save(tmp_path / "detector.ckpt")
    source = large / "square" / "1.png"
    found = detector.predict(read(source))
    again = AnomalyDetector.load(tmp_path / "detector.ckpt", device="cpu").predict(source)
    assert found.score == again.score and found.map.shape == (200, 264) and found.decision
    x, y, w, h = found.boxes[0]
    assert x <= 70 and y <= 70 and x + w >= 100 and y + h >= 100
    normal = detector.predict(large / "normal_test" / "0.png")
    assert normal.score < found.score and detector.model.calibration.shape == (3, 2)
    assert detector.test(large / "square", tmp_path / "out")[1].score == found.score and (tmp_path / "out" / "1_mask.png").is_file()
    with pytest.raises(InputError, match="overlap=96"):
        AnomalyDetector("padim", tiling=96, overlap=96)


def test_an_update_keeps_the_tiles(run, large, tmp_path):
    folder, _ = run
    (tmp_path / "more" / "normal").mkdir(parents=True)
    for i in range(6):
        Image.fromarray(grey(120, 130, seed=50 + i)).save(tmp_path / "more" / "normal" / f"{i}.png")
    shutil.copytree(large / "normal_test", tmp_path / "more" / "normal_test")
    shutil.copytree(large / "square", tmp_path / "more" / "square")
    options = ["data.abnormal=[square]", "data.masks=null", "logger=none", "trainer=cpu", "trainer.enable_progress_bar=false"]
    places = [f"data.root='{tmp_path / 'more'}'", f"update='{folder}'", f"run_dir='{tmp_path / 'run'}'"]
    train(composed("data=folder", "data.normal_test=normal_test", *places, *options))
    state = torch.load(tmp_path / "run" / "model.ckpt", weights_only=True)["state_dict"]
    assert state["calibration"].shape == (3 + 1, 2) and state["fitted"] == 9 * 12 + 5 * 4
    with pytest.raises(InputError, match="tiling=96"):
        saved = config.read_config(folder)
        data = set_up(saved, described(saved))
        data.processes = 2
        data.test_dataloader()


@pytest.mark.slow
def test_a_method_without_a_backbone_takes_tiles_in_a_sweep_with_a_store(large, tmp_path):
    options = ["crop=null", "image_size=32", "tiling=96", "store=on", f"store.root='{tmp_path / 'store'}'", *quick("ganomaly")]
    train(tiny_run(large, tmp_path / "run", "model=ganomaly", *options, "trainer.max_epochs=1", "save.pictures=2"))
    assert not (tmp_path / "store").exists()
    train(tiny_run(large, tmp_path / "other", "model=dfkde", "crop=null", "image_size=32", "tiling=96", "save.pictures=2"))
    widths = [{read(path).shape[1] for path in (tmp_path / run / "images").iterdir()} for run in ("run", "other")]
    assert min(widths[0]) > 1.15 * max(widths[1]), "a panel more, of the reconstruction"


def test_what_tiles_do_not_go_with(large, tmp_path):
    with pytest.raises(InputError, match="store=off"):
        train(tiny_run(large, tmp_path / "run", "model=padim", "crop=null", "tiling=96", "store=on", f"store.root='{tmp_path / 'store'}'"))
    with pytest.raises(InputError, match="overlap=96"):
        train(tiny_run(large, tmp_path / "run2", "model=padim", "tiling=96", "overlap=96"))


# --- memory ---------------------------------------------------------------------------------------------------------------------------


def test_memory_grows_with_a_row_of_tiles_not_with_the_image(tmp_path):
    peaks = []
    for height in (1000, 4000):
        array = np.broadcast_to(np.uint8(128), (height, 1500))
        tracemalloc.start()
        score_image(Local(), array, Preprocessing(Geometry(64), {}, 256, 32), 4, tmp_path)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0] and peaks[1] < 8 * 256 * 1500 * 4  # bytes; the map of the larger image has 24 million


MEASURED = """
import resource, sys
from pathlib import Path
import torch
from blemish.data.ranges import ValueCheck
from blemish.detector import Detector
from blemish.edge.geometry import Blend, Geometry, grid, mirrored, ramp
from blemish.types import Prediction
class Local(Detector):
    def forward(self, image):
        map = (image - 0.5).abs().mean(1)
        return Prediction(map.amax((1, 2)), map)
from blemish.run.predict import write
from blemish.run.results import Preprocessing, Rule, output_names, predict
path, out = Path(sys.argv[1]), Path(sys.argv[2])
def run(path):
    found = predict(Local(), [path], Preprocessing(Geometry(), {}, 512, 64), 4, out)
    write(found, Rule(torch.tensor([[0.1, 0.1]] * 20), 0.05), output_names([path], path.parent), out, None)
out.mkdir()
run(path.with_name("small.png"))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(path)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read as Linux gives it")
def test_predicting_a_large_image_takes_bounded_memory(tmp_path):
    """6,000 × 4,000 px: decoding takes what it takes (4 + 3 bytes a pixel of colour), and no float of the whole image is added."""
    array = np.full((4000, 6000, 3), 128, np.uint8)
    array[1000:1100, 500:5500] = 250
    Image.fromarray(array).save(tmp_path / "large.png", compress_level=1)
    Image.fromarray(array[:700, :700]).save(tmp_path / "small.png")
    command = [sys.executable, "-c", MEASURED, str(tmp_path / "large.png"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 12 * array.shape[0] * array.shape[1], done.stdout
    assert ndimage.label(read(tmp_path / "out" / "large_mask.png"))[1] == 1
    assert read(tmp_path / "out" / "large_overlay.png").shape == (2000, 3000, 3)
