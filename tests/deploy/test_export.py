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
from PIL import Image
from support import METHODS, batch, bricks, composed, fitted, quick, slow, tiny_overrides, tiny_run

from blemish.data.images import prepare, to_image
from blemish.deploy import export
from blemish.deploy.export import ENDINGS, NEEDS, ExportModule, Program, export_run
from blemish.deploy.parity import Parity, spread
from blemish.detector import OnePassDetector, TrainedDetector
from blemish.edge import runtime
from blemish.edge.calibration import conformal_threshold, p_values
from blemish.edge.errors import InputError
from blemish.edge.geometry import Geometry
from blemish.edge.reading import read
from blemish.edge.runtime import Model
from blemish.ops import gaussian
from blemish.run.checkpoint import load
from blemish.run.config import build
from blemish.run.results import Preprocessing, predict, preprocessing_of
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
    """The export of a run in the format of the output's ending."""
    format = next((name for name, ending in ENDINGS.items() if ending == output.suffix), "onnx")
    return export_run(composed(f"run='{run}'", f"output='{output}'", f"format={format}", *overrides, config="export"))


def opened(path: Path) -> Model:
    return Program(path) if path.suffix == ".pt2" else Model(path, threads=1)


@pytest.fixture(scope="module")
def exports(run, tmp_path_factory):
    """The run's export in a format, made when it is first asked for: (file, parity)."""

    @cache
    def made(format: str) -> tuple[Path, Parity]:
        needs(*NEEDS[format])
        return exported(run, tmp_path_factory.mktemp(format) / f"model{ENDINGS[format]}")

    return made


@pytest.fixture(scope="module")
def onnx(exports) -> Path:
    return exports("onnx")[0]


@pytest.fixture(scope="module")
def pictures(tiny) -> list[Path]:
    return sorted((tiny / "square").glob("*.png")) + sorted((tiny / "normal_test").glob("*.png"))


@torch.no_grad()
def made(method: str, *overrides: str):
    """A method fitted to eight images, or with no step of its optimiser taken, and the side of its images."""
    cfg = composed(*tiny_overrides(Path("nowhere")), *quick(method), f"model={method}", *overrides)
    model, side = build(cfg.model), cfg.image_size or 64
    pictures = scaled(bricks(8, seed=0), side)
    if isinstance(model, OnePassDetector):
        if method == "self_similarity":
            model.validation = 0.5
        fitted(model, pictures, batch=4)
    elif isinstance(model, TrainedDetector):
        model.before_training([batch(pictures)])
        model.eval().after_training([batch(pictures)])
    return model.eval(), side


def scaled(pictures: torch.Tensor, side: int) -> torch.Tensor:
    return pictures.repeat(1, 1, side // 64, side // 64)


SETTINGS = [
    (
        "padim",
        "model.n_features=3",
        "model.draws=2",
        "model.align=bilinear",
    ),  # more images than channels: the triangular form, of fewer than BLOCKS rows
    ("padim", "model.n_features=7"),
    ("patchcore", "model.embedding=concatenate", "model.num_neighbors=3"),
    ("patchcore", "model.embed_dim=16", "model.reweight=false"),
    ("patchcore", "model.embedding=mean", "model.embed_dim=15", "model.reweight=3", "model.coreset_ratio=0.002"),  # a bank of two rows
    ("dfkdm", "model.density=gaussian"),
    ("lake", "model.density=gaussian"),
    ("dfm", "model.score=nll"),
]


@pytest.mark.parametrize("setting", [*((m,) for m in METHODS if m != "noise_residual"), *SETTINGS], ids=" ".join)
@torch.no_grad()
def test_the_score_of_a_graph_is_that_of_its_method(setting, monkeypatch):
    model, side = made(*setting)
    image = scaled(bricks(3, seed=1), side)
    image[0, :, 8:20, 8:20] = 1
    expected = model(image)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    found = model(image)
    torch.testing.assert_close(found.score, expected.score, rtol=1e-4, atol=1e-5)
    if setting[0] != "spade":
        assert (found.map is None) == (expected.map is None)
        if found.map is not None:
            torch.testing.assert_close(found.map, expected.map, rtol=1e-3, atol=1e-5)
    if setting[0] == "padim" and setting[1:]:
        assert len(model.cholesky) == 64 * 4 * len(model.drawn) and gaussian.BLOCKS == 4


def module_of(model, side: int, maps: bool) -> ExportModule:
    return ExportModule(model, (side, side), "uint8", None, Preprocessing(Geometry(side), {}), maps)


def test_what_cannot_be_a_graph_says_why():
    with pytest.raises(InputError, match="noise_residual cannot be exported"):
        export.check_exportable(build(composed("model=noise_residual").model), maps=False)
    with pytest.raises(InputError, match="maps=false"):
        export.check_exportable(made("spade")[0], maps=True)


@pytest.mark.parametrize("format", ["onnx", *(slow(name) for name in ENDINGS if name != "onnx")])
def test_an_export_says_what_its_run_says(run, exports, format):
    path, parity = exports(format)
    assert parity.images == 12 and parity.flipped == 0
    assert parity.score_difference <= 1e-4 * parity.score_scale and parity.map_difference <= 1e-3 * parity.map_scale
    assert sorted(p.suffix for p in path.parent.glob("[!.]*")) == ([".bin", ".xml"] if format == "openvino" else [ENDINGS[format]])
    metadata = opened(path).metadata
    assert metadata["parity"] | {"band": None} == {**parity._asdict(), "tolerance": 0.01, "map_tolerance": 0.05, "flips": 0}
    assert metadata["method"] == "padim"
    for own in (Path(export.__file__).parent, Path(torch.__file__).parent):  # an export travels: nothing of this machine is in it
        assert not any(str(own).encode() in file.read_bytes() for file in path.parent.iterdir())
    calibration = load(run, "cpu")[1].calibration[:, 0]
    assert metadata["threshold"] == conformal_threshold(calibration, 0.05).value
    assert metadata["calibration"] == sorted(calibration.double().tolist())


ALONE = """
import importlib.abc, json, runpy, sys
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in ("torch", "torchvision", "lightning", "timm", "omegaconf", "hydra", "scipy", "matplotlib", "blemish"):
            raise ImportError(f"{name} is not there")
sys.meta_path.insert(0, Blocked())
sys.path.insert(0, sys.argv[1])
from edge.runtime import Model
model = Model(sys.argv[2], threads=1)
found = model.predict(sys.argv[3:])
print(json.dumps([[r.score, r.p_value, r.decision, r.map.shape] for r in found]))
sys.argv = ["edge", sys.argv[2], sys.argv[3], sys.argv[1] + "/out"]
runpy.run_module("edge", run_name="__main__", alter_sys=True)
"""


def test_the_runtime_gives_the_scores_of_the_run_without_torch(run, onnx, tiny, tmp_path):
    shutil.copytree(Path(runtime.__file__).parent, tmp_path / "edge")
    with (run / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    command = [sys.executable, "-c", ALONE, tmp_path, onnx, *(tiny / row["path"] for row in rows)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    calibration = load(run, "cpu")[1].calibration[:, 0]
    for row, (score, p, decision, shape) in zip(rows, json.loads(done.stdout.splitlines()[0]), strict=True):
        assert score == pytest.approx(float(row["score"]), rel=1e-5)
        assert (decision, p, shape) == (bool(int(row["decision"])), p_values(score, calibration), [64, 64])
    assert len(list((tmp_path / "out").glob("*_overlay.png"))) == 1 and "SciPy" in done.stderr


def test_batches_and_single_arrays(onnx, pictures):
    model = opened(onnx)
    one_by_one, together = model.predict(pictures), model.predict(pictures, batch_size=5)
    assert len(one_by_one) == len(pictures)
    for a, b in zip(one_by_one, together, strict=True):
        assert a.score == pytest.approx(b.score, rel=1e-5)
        assert (a.p_value, a.decision, a.path) == (b.p_value, b.decision, b.path)
    (single,) = model.predict(np.array(Image.open(pictures[0])))
    assert single.score == one_by_one[0].score
    assert model.predict([]) == []
    for score in [*model.calibration, model.threshold, model.threshold + 1e-9, -1e9, 1e9]:
        result = model.result(score, None)
        assert (result.p_value, result.decision) == (p_values(score, model.calibration), score > model.threshold)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:images of other values")  # noise: no photograph of the training
def test_scores_are_the_same_without_maps_from_floats_and_from_the_camera(run, onnx, tmp_path):
    arrays = [np.random.default_rng(i).integers(0, 256, (90, 70, 3), dtype=np.uint8) for i in range(3)]
    expected = [result.score for result in opened(onnx).predict(arrays)]
    found = opened(exported(run, tmp_path / "m.onnx", "maps=false", "input=float")[0]).predict(arrays)
    assert [r.score for r in found] == pytest.approx(expected, rel=1e-5)
    assert [r.map for r in found] == [None] * 3
    folder = tmp_path / "frames"
    folder.mkdir()
    for i, array in enumerate(arrays):
        Image.fromarray(array).save(folder / f"{i}.png")
    camera = opened(exported(run, tmp_path / "c.onnx", "source=[90,70]", f"images='{folder}'")[0])
    assert camera.metadata["parity"]["images"] == 3
    assert camera.run(np.stack(arrays))[0] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(InputError, match=r"\[90, 70\]"):
        camera.predict(np.zeros((64, 64, 3), np.uint8))


@pytest.mark.parametrize("suffix", [".pt2", slow(".onnx")])
def test_a_crop_and_deep_images(tiny, tmp_path, suffix):
    needs(*(NEEDS["onnx"] if suffix == ".onnx" else ()))
    folder, geometry = tmp_path / "run", Geometry(64, 48)
    train(tiny_run(tiny, folder, "model=padim", "crop=48", "data.window=[10,60000]"))
    saved, model = load(folder, "cpu")
    path, parity = exported(folder, tmp_path / f"m{suffix}", "input=float")
    assert parity.map_difference <= 1e-3 * parity.map_scale
    deep = np.random.default_rng(0).integers(0, 65536, (80, 100)).astype(np.uint16)
    preprocessing = preprocessing_of(saved)
    with torch.inference_mode():
        score, map = model(prepare(deep, preprocessing.window, geometry)[None])
    other = opened(path)
    (found,) = other.predict(deep)
    assert found.score == pytest.approx(float(score), rel=1e-4)
    np.testing.assert_allclose(found.map, to_image(map[0], 80, 100, geometry).numpy(), rtol=1e-3, atol=1e-4)
    with pytest.raises(InputError, match="float64"):
        other.predict(deep.astype(np.float64))
    Image.fromarray(deep).save(tmp_path / "deep.png")
    colour = np.random.default_rng(1).integers(0, 65536, (80, 100, 3)).astype(np.uint16)
    tifffile.imwrite(tmp_path / "colour.tif", colour, photometric="rgb")
    expected = list(predict(model, [tmp_path / "deep.png", tmp_path / "colour.tif"], preprocessing, 2))
    found = other.predict([tmp_path / "deep.png", str(tmp_path / "colour.tif")])
    assert [result.score for result in found] == pytest.approx([one.score for one in expected], rel=1e-4)
    assert other.predict(colour)[0].score == found[1].score
    with pytest.raises(InputError, match="input=float for deep images"):
        exported(folder, tmp_path / "n.pt2", f"images='{tmp_path}/deep.png'")


@pytest.fixture(scope="module")
def tiled(tiny, tmp_path_factory):
    """Runs that score images by tiles of 40 px, made when they are first asked for: without a ROI, and looking at a half."""
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


@pytest.mark.parametrize(
    ("roi", "input", "suffix"),
    [(True, "uint8", ".pt2"), slow(True, "float", ".onnx"), slow(False, "uint8", ".onnx"), slow(False, "float", ".onnx")],
)
def test_an_export_of_a_run_by_tiles_cuts_them(tiled, tmp_path, roi, input, suffix):
    """Images of many sizes, of which one is smaller than a tile, against `predict`."""
    needs(*(NEEDS["onnx"] if suffix == ".onnx" else ()))
    folder = tiled(roi)
    path, parity = exported(folder, tmp_path / f"m{suffix}", f"input={input}")
    assert parity.images > 8 and parity.score_difference <= 1e-4 * parity.score_scale
    assert parity.map_difference <= 1e-3 * parity.map_scale
    saved, model = load(folder, "cpu")
    other = opened(path)
    assert other.metadata["tiling"] == {"side": 40, "overlap": 12}
    rng = np.random.default_rng(0)
    arrays = [rng.integers(80, 190, size, dtype=np.uint8) for size in [(64, 64), (30, 70), (25, 31, 3), (100, 41)]]
    expected = list(predict(model, arrays, preprocessing_of(saved), 3, tmp_path, load=lambda array: array))
    for batch_size in (1, 7):
        found = other.predict(arrays, batch_size)
        assert [result.score for result in found] == pytest.approx([one.score for one in expected], rel=1e-4)
        for result, one, array in zip(found, expected, arrays, strict=True):
            np.testing.assert_allclose(result.map, one.map[:], rtol=1e-3, atol=1e-4)
            assert result.map.shape == array.shape[:2] and result.map.dtype == np.float32
            assert result.score == pytest.approx(result.map.max(), rel=0.5)
    if roi:
        inside = np.zeros((64, 64), bool)
        inside[2, 5] = True  # row 2 of a tile of 40 px is under no centre of its 32
        other.metadata["roi"] = runtime.packed(inside)
        with pytest.raises(InputError, match="ROI"):
            other.predict(np.full((64, 64), 128, np.uint8))
        with pytest.raises(InputError, match=r"an array of shape \(0, 5\)"):
            other.predict(np.zeros((0, 5), np.uint8))


@pytest.mark.slow
def test_an_export_by_tiles_without_maps(tiled, tmp_path):
    path, _ = exported(tiled(False), tmp_path / "m.pt2", "maps=false")
    full, _ = exported(tiled(False), tmp_path / "w.pt2")
    array = np.random.default_rng(1).integers(0, 256, (90, 70), dtype=np.uint8)
    (found,) = opened(path).predict([array])
    assert found.map is None and found.score == pytest.approx(opened(full).predict([array])[0].score, rel=1e-5)
    with pytest.raises(InputError, match="^maps=false: "):
        exported(tiled(True), tmp_path / "r.pt2", "maps=false")
    with pytest.raises(InputError, match="leave both out"):
        exported(tiled(False), tmp_path / "s.pt2", "source=[64,64]")


def test_an_export_that_differs_is_not_kept(run, tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"m\.pt2: not kept"):
        exported(run, tmp_path / "m.pt2", "tolerance=0", "map_tolerance=0")
    assert list(tmp_path.iterdir()) == []
    # the check goes through files
    monkeypatch.setattr(runtime, "pixels", lambda image: read(image)[::-1] if isinstance(image, Path) else image)
    with pytest.raises(InputError, match=r"m\.pt2: not kept"):
        exported(run, tmp_path / "m.pt2")


def names_of(path: Path) -> list[list[str]]:
    """The names of inputs and outputs by OpenVINO, which reads both formats; a value may have several."""
    graph = runtime.openvino_core().read_model(path)
    return [sorted(value.get_names()) for value in [*graph.inputs, *graph.outputs]]


@pytest.mark.slow
@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("noise_residual", "padim")])
def test_every_graph_has_the_same_names(method, tmp_path):
    needs(*NEEDS["openvino"])
    (model, side), maps = made(method), method != "spade"
    program, _ = export.traced(module_of(model, side, maps), export.example("uint8", (side, side)))
    (tmp_path / "m.onnx").write_bytes(export.onnx_of(program, 20, export.NAMES).SerializeToString())
    with torch.no_grad():
        mapped = maps and model(torch.rand(1, 3, side, side)).map is not None
    assert names_of(tmp_path / "m.onnx") == [["image"], ["score"], ["map"]][: 3 if mapped else 2]


@pytest.mark.slow
def test_both_kinds_of_files_have_the_same_names(exports):
    needs(*NEEDS["onnx"], *NEEDS["openvino"])
    assert names_of(exports("onnx")[0]) == names_of(exports("openvino")[0]) == [["image"], ["score"], ["map"]]


def test_limits():
    parity = Parity(images=5, score_difference=0.02, score_scale=1.0, map_difference=0.03, map_scale=0.5, flipped=1)
    assert parity.holds(0.02, 0.06, 1)
    assert not any(parity.holds(*limits) for limits in [(0.019, 0.06, 1), (0.02, 0.059, 1), (0.02, 0.06, 0)])
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
        (["input=float", "source=[64,64]"], "input=uint8"),
        (["source=[64]"], r"source=\[64\]: expected"),
        (["format=openvino"], "expected a name that ends with .xml"),
        (["images=nowhere"], "images=nowhere: no such file or folder"),
        (["size=[64,64]"], "leave size out"),
    ],
)
def test_options_that_do_not_fit(run, tmp_path, overrides, message):
    with pytest.raises(InputError, match=message):
        exported(run, tmp_path / "m.onnx", *overrides)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("geometry", [Geometry(None, 48), Geometry(40, 48)])
def test_a_source_smaller_than_the_crop(geometry, tmp_path):
    cfg = composed("run=none", "format=torch_export", "source=[40,44]", config="export")
    with pytest.raises(InputError, match=r"source=\[40, 44\].*crop of 48"):
        export.checked_size(cfg, Preprocessing(geometry, {}), tmp_path / "m.pt2")


def test_a_file_that_would_be_too_large_is_refused(run, tmp_path, monkeypatch):
    needs("onnx", "onnxscript", "onnxruntime")
    monkeypatch.setattr("blemish.features.engine.LARGEST", 10**5)
    with pytest.raises(InputError, match="use format=torch_export"):
        exported(run, tmp_path / "m.onnx")


def test_foreign_files(tmp_path, pictures):
    onnx = pytest.importorskip("onnx", reason="no onnx here: pip install blemish[export]")
    needs("onnxruntime")
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy"]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Abs", ["x"], ["y"])], "g", values[:1], values[1:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=8)
    onnx.save(model, tmp_path / "foreign.onnx")
    (tmp_path / "text.onnx").write_text("no graph")
    for path in (tmp_path / "foreign.onnx", tmp_path / "text.onnx", tmp_path / "absent.onnx", pictures[0]):
        with pytest.raises(InputError, match=path.name):
            Model(path)
    for metadata in ("other", json.dumps({"format": "blemish artefact 9"})):
        onnx.helper.set_model_props(model, {runtime.KEY: metadata, "seal": runtime.NO_SEAL})
        onnx.save(model, tmp_path / "sealed.onnx")
        export.set_seal(tmp_path / "sealed.onnx")
        with pytest.raises(InputError, match=r"sealed\.onnx: no metadata"):
            Model(tmp_path / "sealed.onnx")


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
