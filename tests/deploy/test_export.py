"""Exports against their runs, and the runtime without torch."""

import csv
import json
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st
from PIL import Image
from support import METHODS, batch, bricks, composed, fitted, quick, slow, tiny_overrides, tiny_run

from blemish.data.images import prepare, to_image, to_network, to_unit
from blemish.deploy import export
from blemish.deploy.export import ENDINGS, NEEDS, Parity, export_run, spread
from blemish.detector import OnePassDetector, TrainedDetector
from blemish.edge import geometry as edge
from blemish.edge import runtime
from blemish.edge.calibration import conformal_threshold, p_values
from blemish.edge.errors import InputError
from blemish.edge.geometry import Geometry
from blemish.edge.reading import read
from blemish.ops import gaussian
from blemish.run.checkpoint import load
from blemish.run.config import build
from blemish.run.results import Preprocessing, predict
from blemish.run.train import train


def needs(*names: str) -> None:
    for name in names:
        pytest.importorskip(name, reason=f"no {name} here: pip install blemish[export]")


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory) -> Path:
    """A PaDiM fitted to images of 64 px."""
    folder = tmp_path_factory.mktemp("run") / "padim"
    train(tiny_run(tiny, folder, "model=padim"))
    return folder


def exported(run: Path, output: Path, *overrides: str) -> tuple[Path, Parity]:
    return export_run(composed(f"run='{run}'", f"output='{output}'", *overrides, config="export"), load, build)


@pytest.fixture(scope="module")
def exports(run, tmp_path_factory):
    """The run's export in a format, made when it is first asked for: (file, parity)."""

    @cache
    def made(format: str) -> tuple[Path, Parity]:
        needs(*NEEDS[format])
        return exported(run, tmp_path_factory.mktemp(format) / f"model{ENDINGS[format]}", f"format={format}")

    return made


@pytest.fixture(scope="module")
def onnx(exports) -> Path:
    return exports("onnx")[0]


@pytest.fixture(scope="module")
def pictures(tiny) -> list[Path]:
    return sorted((tiny / "square").glob("*.png")) + sorted((tiny / "normal_test").glob("*.png"))


@torch.no_grad()
def made(method: str, *overrides: str):
    """A method that has seen eight images and took no step of an optimiser, and the side of its images."""
    cfg = composed(*tiny_overrides(Path("nowhere")), *quick(method), f"model={method}", *overrides)
    model, side = build(cfg.model), cfg.image_size or 64
    pictures = bricks(8, seed=0) if side == 64 else bricks(8, seed=0).repeat(1, 1, 2, 2)
    if isinstance(model, OnePassDetector):
        if method == "self_similarity":
            model.validation = 0.5
        fitted(model, pictures, batch=4)
    elif isinstance(model, TrainedDetector):
        model.before_training([batch(pictures)])
        model.eval().after_training([batch(pictures)])
    return model.eval(), side


@pytest.mark.parametrize("method", [m for m in METHODS if m != "noise_residual"])
@torch.no_grad()
def test_the_score_of_a_graph_is_that_of_its_method(method, monkeypatch):
    model, side = made(method)
    image = bricks(3, seed=1) if side == 64 else bricks(3, seed=1).repeat(1, 1, 2, 2)
    image[0, :, 8:20, 8:20] = 1
    maps = method != "spade"
    expected = model(image)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    found = model(image)
    torch.testing.assert_close(found.score, expected.score, rtol=1e-4, atol=1e-5)
    if maps and expected.map is not None:
        torch.testing.assert_close(found.map, expected.map, rtol=1e-3, atol=1e-5)
    assert (found.map is None) == (expected.map is None or not maps)


@pytest.mark.parametrize(
    ("method", "overrides"),
    [
        (
            "padim",
            ["model.n_features=3", "model.align=nearest"],
        ),  # more images than channels: the triangular form, of fewer than BLOCKS rows
        ("padim", ["model.n_features=7"]),
        ("patchcore", ["model.embed_dim=null"]),
        ("patchcore", ["model.embed_dim=16", "model.reweight=false"]),
        ("patchcore", ["model.embed_dim=16", "model.reweight=3", "model.coreset_ratio=0.002"]),  # a bank of two rows
        ("dfkdm", ["model.density=gaussian"]),
        ("lake", ["model.density=gaussian"]),
        ("dfm", ["model.score=nll"]),
    ],
)
@torch.no_grad()
def test_graphs_of_other_settings(method, overrides, monkeypatch):
    model, _ = made(method, *overrides)
    image = bricks(2, seed=1)
    expected = model(image)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    found = model(image)
    torch.testing.assert_close(found.score, expected.score, rtol=1e-4, atol=1e-5)
    if method == "padim":
        assert len(model.cholesky) == 64 * 4
        assert gaussian.BLOCKS == 4


def test_what_cannot_be_a_graph_says_why():
    with pytest.raises(InputError, match="no fixed graph.*padim or patchcore"):
        export.check_exportable(build(composed("model=noise_residual").model), maps=False)
    with pytest.raises(InputError, match="maps=false"):
        export.check_exportable(made("spade")[0], maps=True)


@pytest.mark.parametrize("format", ["onnx", *(slow(name) for name in ENDINGS if name != "onnx")])
def test_an_export_says_what_its_run_says(run, exports, format):
    path, parity = exports(format)
    assert parity.images == 12
    assert parity.score_difference <= 1e-4 * parity.score_scale
    assert parity.map_difference <= 1e-3 * parity.map_scale
    assert parity.flipped == 0
    assert sorted(p.suffix for p in path.parent.glob("[!.]*")) == ([".bin", ".xml"] if format == "openvino" else [ENDINGS[format]])
    if format != "torch_export":
        metadata = runtime.Model(path, threads=1).metadata
    else:
        extra = {"blemish.json": ""}
        torch.export.load(path, extra_files=extra)
        metadata = json.loads(extra["blemish.json"])
    assert metadata["parity"] == {**parity._asdict(), "tolerance": 0.01, "map_tolerance": 0.05, "flips": 0}
    assert metadata["method"] == "padim"
    for own in (Path(export.__file__).parent, Path(torch.__file__).parent):  # an artefact travels: nothing of this machine in it
        assert not any(str(own).encode() in file.read_bytes() for file in path.parent.iterdir())
    model = load(run, "cpu")[1]
    assert metadata["threshold"] == conformal_threshold(model.calibration[:, 0], 0.05).value
    assert metadata["calibration"] == sorted(model.calibration[:, 0].double().tolist())


ALONE = """
import importlib.abc, json, sys
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in ("torch", "torchvision", "lightning", "timm", "omegaconf", "hydra", "blemish"):
            raise ImportError(f"{name} is not there")
sys.meta_path.insert(0, Blocked())
sys.path.insert(0, sys.argv[1])
from edge.runtime import Model
model = Model(sys.argv[2], threads=1)
found = model.predict(sys.argv[3:])
print(json.dumps([[r.score, r.p_value, r.decision, r.map.shape] for r in found]))
"""


def test_the_runtime_gives_the_scores_of_the_run_without_torch(run, onnx, tiny, tmp_path):
    shutil.copytree(Path(runtime.__file__).parent, tmp_path / "edge")
    with (run / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    done = subprocess.run(
        [sys.executable, "-c", ALONE, tmp_path, onnx, *(tiny / row["path"] for row in rows)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    calibration = load(run, "cpu")[1].calibration[:, 0]
    for row, (score, p, decision, shape) in zip(rows, found, strict=True):
        assert score == pytest.approx(float(row["score"]), rel=1e-5)
        assert decision == bool(int(row["decision"]))
        assert p == float(p_values(torch.tensor([score]), calibration))
        assert shape == [64, 64]


def test_batches_and_single_arrays(onnx, pictures):
    model = runtime.Model(onnx, threads=1)
    one_by_one, together = model.predict(pictures), model.predict(pictures, batch_size=5)
    assert len(one_by_one) == len(pictures)
    for a, b in zip(one_by_one, together, strict=True):
        assert a.score == pytest.approx(b.score, rel=1e-5)
        assert a[1:3] == b[1:3]
    (single,) = model.predict(np.array(Image.open(pictures[0])))
    assert single.score == one_by_one[0].score
    assert model.predict([]) == []


def test_judgement_is_that_of_the_calibration(onnx):
    model = runtime.Model(onnx, threads=1)
    for score in [*model.calibration, model.threshold, model.threshold + 1e-9, -1e9, 1e9]:
        result = model.judged(score, None)
        assert result.p_value == float(p_values(torch.tensor([score], dtype=torch.float64), torch.tensor(model.calibration)))
        assert result.decision == (score > model.threshold)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:images of other values")  # noise: no photograph of the training
def test_scores_are_the_same_without_maps_from_floats_and_from_the_camera(run, onnx, tmp_path):
    arrays = [np.random.default_rng(i).integers(0, 256, (90, 70, 3), dtype=np.uint8) for i in range(3)]
    expected = runtime.Model(onnx, threads=1).predict(arrays)
    found = runtime.Model(exported(run, tmp_path / "m.onnx", "maps=false", "input=float")[0], threads=1).predict(arrays)
    assert [r.score for r in found] == pytest.approx([r.score for r in expected], rel=1e-5)
    assert [r.map for r in found] == [None] * 3
    folder = tmp_path / "frames"
    folder.mkdir()
    for i, array in enumerate(arrays):
        Image.fromarray(array).save(folder / f"{i}.png")
    camera = runtime.Model(exported(run, tmp_path / "c.onnx", "source=[90,70]", f"images='{folder}'")[0], threads=1)
    assert camera.metadata["parity"]["images"] == 3
    assert camera.run(np.stack(arrays))[0] == pytest.approx([r.score for r in expected], rel=1e-5)
    with pytest.raises(InputError, match=r"\[90, 70\] alone"):
        camera.predict(np.zeros((64, 64, 3), np.uint8))


def test_a_crop_and_deep_images(tiny, tmp_path):
    needs("onnx", "onnxscript", "onnxruntime")
    folder = tmp_path / "run"
    train(tiny_run(tiny, folder, "model=padim", "crop=48", "data.window=[10,60000]"))
    saved, model = load(folder, "cpu")
    path, parity = exported(folder, tmp_path / "m.onnx", "input=float")
    assert parity.map_difference <= 1e-3 * parity.map_scale
    deep = np.random.default_rng(0).integers(0, 65536, (80, 100)).astype(np.uint16)
    window = {dtype: tuple(ends) for dtype, ends in saved.data.window.items()}
    with torch.inference_mode():
        score, map = model(prepare(deep, window, Geometry(64, 48))[None])
    other = runtime.Model(path, threads=1)
    (found,) = other.predict(deep)
    assert found.score == pytest.approx(float(score), rel=1e-4)
    own = other.own_pixels(found.map, 80, 100)
    np.testing.assert_allclose(own, to_image(map[0], 80, 100, Geometry(64, 48)).numpy(), rtol=1e-3, atol=1e-4)
    with pytest.raises(InputError, match="float64"):
        other.predict(deep.astype(np.float64))
    Image.fromarray(deep).save(tmp_path / "deep.png")
    colour = np.random.default_rng(1).integers(0, 65536, (80, 100, 3)).astype(np.uint16)
    tifffile.imwrite(tmp_path / "colour.tif", colour, photometric="rgb")
    expected = list(predict(model, [tmp_path / "deep.png", tmp_path / "colour.tif"], export.preprocessing_of(saved), 2))
    found = other.predict([tmp_path / "deep.png", str(tmp_path / "colour.tif")])
    assert [result.score for result in found] == pytest.approx([one.score for one in expected], rel=1e-4)
    assert other.predict(colour)[0].score == found[1].score
    with pytest.raises(InputError, match="input=float for deep images"):
        exported(folder, tmp_path / "m.pt2", "format=torch_export", f"images='{tmp_path}/deep.png'")


@pytest.fixture(scope="module")
def by_tiles(tiny, tmp_path_factory):
    """Runs that score images by tiles of 40 px, made when they are first asked for: without a roi, and looking at a half."""
    root = tmp_path_factory.mktemp("tiles")
    half = np.zeros((64, 64), np.uint8)
    half[:, :30] = 255
    Image.fromarray(half).save(root / "half.png")

    @cache
    def made(roi: bool) -> Path:
        options = ["tiling=40", "overlap=12", "image_size=32", "crop=null"]
        more = [f"data.roi='{root / 'half.png'}'"] if roi else []
        train(tiny_run(tiny, root / f"{roi}", "model=padim", *options, *more))
        return root / f"{roi}"

    return made


@pytest.mark.parametrize("roi", [slow(False), True])
@pytest.mark.parametrize("input", ["uint8", slow("float")])
def test_an_export_of_a_run_by_tiles_cuts_them(by_tiles, tiny, tmp_path, roi, input):
    """Images of many sizes, of which one is smaller than a tile, against `predict`."""
    needs("onnx", "onnxscript", "onnxruntime")
    folder = by_tiles(roi)
    path, parity = exported(folder, tmp_path / "m.onnx", f"input={input}")
    assert parity.images > 8 and parity.score_difference <= 1e-4 * parity.score_scale
    assert parity.map_difference <= 1e-3 * parity.map_scale
    saved, model = load(folder, "cpu")
    other = runtime.Model(path, threads=1)
    assert other.metadata["tiling"] == {"side": 40, "overlap": 12}
    rng = np.random.default_rng(0)
    arrays = [rng.integers(80, 190, size, dtype=np.uint8) for size in [(64, 64), (30, 70), (25, 31, 3), (100, 41)]]
    expected = list(predict(model, arrays, export.preprocessing_of(saved), 3, tmp_path, load=lambda array: array))
    for batch_size in (1, 7):
        found = other.predict(arrays, batch_size)
        assert [result.score for result in found] == pytest.approx([one.score for one in expected], rel=1e-4)
        for result, one, array in zip(found, expected, arrays, strict=True):
            np.testing.assert_allclose(result.map, one.map[:], rtol=1e-3, atol=1e-4)
            assert result.map.shape == array.shape[:2] and result.map.dtype == np.float32
            assert other.own_pixels(result.map, *array.shape[:2]) is result.map
            assert result.score == pytest.approx(result.map.max(), rel=0.5)


@pytest.mark.slow
def test_an_export_by_tiles_without_maps(by_tiles, tmp_path):
    path, _ = exported(by_tiles(False), tmp_path / "m.pt2", "format=torch_export", "maps=false")
    whole, _ = exported(by_tiles(False), tmp_path / "w.pt2", "format=torch_export")
    array = np.random.default_rng(1).integers(0, 256, (90, 70), dtype=np.uint8)
    ((score, _, _, map),) = export.Program(path).predict([array])
    assert map is None and score == pytest.approx(export.Program(whole).predict([array])[0].score, rel=1e-5)
    with pytest.raises(InputError, match="maps=false: the score is the largest value of the map"):
        exported(by_tiles(True), tmp_path / "r.pt2", "format=torch_export", "maps=false")
    with pytest.raises(InputError, match="by its tiles, of 40 pixels; leave both out"):
        exported(by_tiles(False), tmp_path / "s.pt2", "format=torch_export", "source=[64,64]")


def test_an_export_by_tiles_of_which_nothing_is_seen(by_tiles, tmp_path):
    path, _ = exported(by_tiles(True), tmp_path / "m.pt2", "format=torch_export")
    other = export.Program(path)
    inside = np.zeros((64, 64), bool)
    inside[2, 5] = True  # row 2 of a tile of 40 px is under no centre of its 32
    other.metadata["roi"] = runtime.packed(inside)
    with pytest.raises(InputError, match="nothing of it is inside the roi"):
        other.predict(np.full((64, 64), 128, np.uint8))
    with pytest.raises(InputError, match=r"an array of shape \(0, 5\)"):
        other.predict(np.zeros((0, 5), np.uint8))


def test_an_export_that_differs_is_not_kept(run, tmp_path):
    with pytest.raises(InputError, match="not kept, as it differs from its run"):
        exported(run, tmp_path / "m.pt2", "format=torch_export", "tolerance=0", "map_tolerance=0")
    assert list(tmp_path.iterdir()) == []


def test_the_check_goes_through_files(run, tmp_path, monkeypatch):
    monkeypatch.setattr(runtime, "pixels", lambda image: read(image)[::-1] if isinstance(image, Path) else image)
    with pytest.raises(InputError, match="not kept, as it differs from its run"):
        exported(run, tmp_path / "m.pt2", "format=torch_export")


@pytest.mark.slow
def test_the_names_of_what_goes_in_and_comes_out(exports):
    needs(*NEEDS["onnx"], *NEEDS["openvino"])
    assert names_of(exports("onnx")[0]) == names_of(exports("openvino")[0]) == [["image"], ["score"], ["map"]]


def names_of(path: Path) -> list[list[str]]:
    """By OpenVINO, which reads both; a value may have several."""
    graph = runtime.openvino_core().read_model(path)
    return [sorted(value.get_names()) for value in [*graph.inputs, *graph.outputs]]


@pytest.mark.slow
@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("noise_residual", "padim")])
def test_every_graph_has_the_same_names(method, tmp_path):
    needs(*NEEDS["openvino"])
    (model, side), maps = made(method), method != "spade"
    graph = export.ExportModule(model, (side, side), "uint8", None, Preprocessing(Geometry(side), {}), maps)
    program, _ = export.traced(graph, export.example("uint8", (side, side)))
    export.to_onnx(program, tmp_path / "m.onnx", 20)
    with torch.no_grad():
        mapped = maps and model(torch.rand(1, 3, side, side)).map is not None
    assert names_of(tmp_path / "m.onnx") == [["image"], ["score"], ["map"]][: 3 if mapped else 2]


def test_limits():
    parity = Parity(images=5, score_difference=0.02, score_scale=1.0, map_difference=0.03, map_scale=0.5, flipped=1)
    assert parity.holds(0.02, 0.06, 1)
    assert not parity.holds(0.019, 0.06, 1)
    assert not parity.holds(0.02, 0.059, 1)
    assert not parity.holds(0.02, 0.06, 0)
    assert parity._replace(map_difference=None, map_scale=None).holds(0.02, 0, 1)
    assert not parity._replace(score_difference=float("nan")).holds(1, 1, 1)
    assert spread([1.0, 3.0], [7.0, 9.5]) == pytest.approx(2**0.5)
    assert spread([1.0], [7.0, 9.0]) == spread([1.0, 1.0], [7.0, 9.0]) == pytest.approx(2**0.5)
    assert spread([], [-4.0, -4.0]) == 4.0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["format=tflite"], "format=tflite: expected"),
        (["input=jpeg"], "input=jpeg: expected uint8"),
        (["input=float", "source=[64,64]"], "together with input=uint8"),
        (["format=openvino"], "expected a name that ends with .xml"),
        (["images=nowhere"], "images=nowhere: no such file or folder"),
        (["size=[64,64]"], "leave size out"),
    ],
)
def test_options_that_do_not_fit(run, tmp_path, overrides, message):
    with pytest.raises(InputError, match=message):
        exported(run, tmp_path / "m.onnx", *overrides)
    assert list(tmp_path.iterdir()) == []


def test_a_source_smaller_than_the_crop(tmp_path):
    for geometry in (Geometry(None, 48), Geometry(40, 48)):
        with pytest.raises(InputError, match=r"source=\[40, 44\].*crop of 48"):
            export.check("torch_export", "uint8", [40, 44], Preprocessing(geometry, {}), tmp_path / "m.pt2")


def test_a_file_that_would_be_too_large_is_refused(run, tmp_path, monkeypatch):
    needs("onnx", "onnxscript", "onnxruntime")
    monkeypatch.setattr(export, "LARGEST", 10**5)
    with pytest.raises(InputError, match="use format=torch_export"):
        exported(run, tmp_path / "m.onnx")


def test_foreign_files(tmp_path, pictures):
    onnx = pytest.importorskip("onnx", reason="no onnx here: pip install blemish[export]")
    needs("onnxruntime")
    given = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy"]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Abs", ["x"], ["y"])], "g", given[:1], given[1:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=8)
    onnx.save(model, tmp_path / "foreign.onnx")
    (tmp_path / "text.onnx").write_text("no graph")
    messages = {
        tmp_path / "foreign.onnx": "no seal of blemish",
        tmp_path / "text.onnx": "no seal of blemish",
        tmp_path / "absent.onnx": "no such file",
        pictures[0]: "ends with .onnx or .xml",
    }
    for path, message in messages.items():
        with pytest.raises(InputError, match=message):
            runtime.Model(path)
    later = json.dumps({"format": "blemish artefact 9"})
    for metadata, message in {"other": "says nothing of blemish", later: "export the run again"}.items():
        onnx.helper.set_model_props(model, {runtime.KEY: metadata, "seal": runtime.NO_SEAL})
        onnx.save(model, tmp_path / "sealed.onnx")
        export.set_seal(tmp_path / "sealed.onnx")
        with pytest.raises(InputError, match=message):
            runtime.Model(tmp_path / "sealed.onnx")


CHILDREN = """
import signal, subprocess, sys
from blemish.edge.runtime import Model
signal.signal(signal.SIGCHLD, lambda *_: None)  # as torch does for the processes of a loader
first = Model(sys.argv[1])
second = Model(sys.argv[1])
del first
del second
for _ in range(3):
    subprocess.run([sys.executable, "-c", ""], check=True)
print("alive")
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGCHLD")
def test_models_that_go_in_the_order_they_came_leave_the_process_whole(exports):
    done = subprocess.run([sys.executable, "-c", CHILDREN, str(exports("openvino")[0])], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr


@effort(max_examples=60)
@given(st.integers(8, 300), st.integers(8, 300), st.sampled_from([8, 33, 64, 130]), st.booleans(), st.integers(0, 2**32))
def test_bytes_are_placed_as_torch_does_it(height, width, size, colour, seed):
    shape = (height, width, 3) if colour else (height, width)
    array = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    tensor = torch.from_numpy(array).permute(2, 0, 1) if colour else torch.from_numpy(array)[None]
    crop = size // 2 if seed % 2 else None
    expected = to_network(tensor, Geometry(size, crop)).permute(1, 2, 0).numpy()
    assert np.array_equal(edge.place(array, {}, Geometry(size, crop)).reshape(expected.shape), expected)
    assert np.array_equal(
        edge.place(array, {}, Geometry(None, 8)), edge.place(array, {}, Geometry())[(height - 8) // 2 :, (width - 8) // 2 :][:8, :8]
    )


@effort(max_examples=30)
@given(st.integers(8, 200), st.integers(8, 200), st.sampled_from([8, 33, 130]), st.sampled_from(["uint16", "float32"]))
def test_deep_images_are_placed_as_torch_does_it(height, width, size, dtype):
    array = (np.random.default_rng(height).random((height, width)) * 60000).astype(dtype)
    window = {"uint16": (5.0, 50000.0), "float32": (-3.5, 40000.25)}
    expected = to_network(to_unit(array, window), Geometry(size))[0].numpy()
    np.testing.assert_allclose(edge.place(array, window, Geometry(size)), expected, atol=2e-5)
    map = np.random.default_rng(width).random((size, size), dtype=np.float32)
    np.testing.assert_allclose(
        edge.to_image(map, height, width, Geometry(size)), to_image(torch.from_numpy(map), height, width, Geometry(size)), atol=2e-5
    )
