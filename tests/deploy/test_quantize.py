"""Exports in two precisions: what is rounded stays near, what is decided is what float32 decides."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import composed, tiny_run

from blemish.deploy.export import export_run
from blemish.deploy.quantize import CUT, STEPS, Band, band_of, channels_of, equalised, in_integers, quantised, rounded, to_steps
from blemish.edge.errors import InputError
from blemish.edge.runtime import EXACT, Model
from blemish.run.train import train

onnx = pytest.importorskip("onnx", reason="no onnx here: pip install blemish[export]")
onnxruntime = pytest.importorskip("onnxruntime", reason="no onnxruntime here: pip install blemish[export]")


def graph_of(convs: list[tuple[np.ndarray, np.ndarray, int]]):
    """A chain of convolutions, each followed by a ReLU, as ModelProto."""
    nodes, tensors = [], []
    for i, (weight, bias, groups) in enumerate(convs):
        tensors += [onnx.numpy_helper.from_array(value, f"{name}{i}") for name, value in (("w", weight), ("b", bias))]
        pads = [weight.shape[2] // 2] * 4
        before = "image" if i == 0 else f"y{i - 1}"
        nodes.append(onnx.helper.make_node("Conv", [before, f"w{i}", f"b{i}"], [f"x{i}"], name=f"conv{i}", group=groups, pads=pads))
        nodes.append(onnx.helper.make_node("Relu", [f"x{i}"], [f"y{i}"], name=f"relu{i}"))
    ends = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["b", None, None, None]) for name in ("image", nodes[-1].output[0])
    ]
    ends[0].type.tensor_type.shape.dim[1].dim_value = convs[0][0].shape[1]
    graph = onnx.helper.make_graph(nodes, "chain", ends[:1], ends[1:], tensors)
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=8)


def output(proto, x: np.ndarray) -> np.ndarray:
    return outputs(proto, x)[0]


def outputs(proto, x: np.ndarray) -> list[np.ndarray]:
    return onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"image": x})


@pytest.fixture(scope="module")
def chain():
    """A pointwise convolution, a depthwise one and a pointwise one, and images that are dark, nearly constant and far from 0."""
    rng = np.random.default_rng(0)
    shapes = [(8, 3, 1, 1, 1), (8, 1, 3, 3, 8), (6, 8, 1, 1, 1)]
    convs = [(rng.normal(size=shape[:4]).astype(np.float32), rng.normal(size=shape[0]).astype(np.float32), shape[4]) for shape in shapes]
    return graph_of(convs), [(5 + 0.3 * rng.normal(size=(1, 3, 16, 16))).astype(np.float32) for _ in range(12)]


def test_steps_keep_the_sums_of_kernels():
    rng = np.random.default_rng(1)
    weight = rng.normal(size=(5, 4, 3, 3)) * rng.uniform(0.01, 10, (5, 1, 1, 1))
    near = to_steps(weight)
    step = np.abs(weight).max((1, 2, 3)) / STEPS
    whole = near / step[:, None, None, None]
    np.testing.assert_allclose(whole, whole.round(), atol=1e-9)
    assert np.abs(whole).max() == pytest.approx(STEPS)
    assert (np.abs(near - weight) <= step[:, None, None, None] * (1 + 1e-9)).all()
    assert (np.abs((near - weight).sum((2, 3))) <= step[:, None] * (0.5 + 1e-9)).all()
    assert (to_steps(np.zeros((2, 1, 3, 3))) == 0).all()


def test_biases_take_the_mean_error_of_the_weights(chain):
    proto, images = chain
    plain = rounded(proto, channels_of(proto, images), ["conv1", "conv2"])
    error = np.mean([output(plain, x) - output(proto, x) for x in images], (0, 1, 3, 4))
    naive = type(proto).FromString(proto.SerializeToString())
    for tensor in naive.graph.initializer:
        if tensor.name in ("w1", "w2"):
            weight = onnx.numpy_helper.to_array(tensor)
            step = np.abs(weight).max((1, 2, 3), keepdims=True) / STEPS
            tensor.CopyFrom(onnx.numpy_helper.from_array(((weight / step).round() * step).astype(np.float32), tensor.name))
    alone = np.mean([output(naive, x) - output(proto, x) for x in images], (0, 1, 3, 4))
    assert np.abs(error).max() < 0.3 * np.abs(alone).max()


def test_equal_ranges_change_no_output():
    """Through ReLU6, a residual sum, a depthwise convolution and an output that another convolution takes too."""
    rng = np.random.default_rng(2)
    spread = 10.0 ** rng.uniform(-2, 0, 8)
    weights = {
        "a": rng.normal(size=(8, 3, 1, 1)) * spread[:, None, None, None],
        "b": rng.normal(size=(8, 1, 3, 3)) * spread[:, None, None, None],
        "c": rng.normal(size=(8, 8, 1, 1)) * spread[:, None, None, None],
        "d": rng.normal(size=(4, 8, 1, 1)),
    }
    tensors = [onnx.numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()]
    tensors += [onnx.numpy_helper.from_array(np.float32(value), name) for name, value in (("zero", 0), ("six", 6))]
    make = onnx.helper.make_node
    nodes = [
        make("Conv", ["image", "a"], ["x"], name="conv_a"),
        make("Conv", ["x", "b"], ["y"], name="conv_b", group=8, pads=[1] * 4),
        make("Clip", ["y", "zero", "six"], ["z"], name="clip"),
        make("Conv", ["z", "c"], ["u"], name="conv_c"),
        make("Add", ["u", "x"], ["sum"], name="add"),
        make("Conv", ["sum", "d"], ["end"], name="conv_d"),
    ]
    ends = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, c, 8, 8]) for name, c in (("image", 3), ("sum", 8), ("end", 4))
    ]
    graph = onnx.helper.make_graph(nodes, "residual", ends[:1], ends[1:], tensors)
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=8)
    images = [rng.normal(size=(1, 3, 8, 8)).astype(np.float32) for _ in range(6)]
    before = channels_of(proto, images)
    equal = equalised(proto, before)
    after = channels_of(equal, images)
    for x in images:
        for found, exact in zip(outputs(equal, x), outputs(proto, x), strict=True):
            np.testing.assert_allclose(found, exact, rtol=1e-4, atol=1e-5)
    spans = np.maximum(-after["sum.equal"].low, after["sum.equal"].high)
    widest = np.max([np.maximum(-after[name].low, after[name].high) for name in ("sum.equal", "u", "x")], 0)
    np.testing.assert_allclose(widest, widest[0], rtol=1e-4)
    assert (spans <= widest * (1 + 1e-6)).all()
    assert (before["z"].high < 6 / CUT).all()
    np.testing.assert_allclose(after["z"].high, 6 / CUT, rtol=1e-4)


def test_the_first_convolutions_stay_in_float32_by_their_share(chain):
    proto, images = chain  # 24, 72 and 48 multiplications a cell
    channels = channels_of(proto, images)
    assert in_integers(proto, channels) == ["conv1", "relu1", "conv2", "relu2"]
    coarse = {name: one._replace(cells=1) if name[0] in "xy" and name[1] in "12" else one for name, one in channels.items()}
    assert in_integers(proto, coarse) == ["conv1", "relu1", "conv2", "relu2"]  # 98 % are the first's, which always stays
    most = {name: one._replace(cells=9 * one.cells) if name in ("x2", "y2") else one for name, one in channels.items()}
    assert in_integers(proto, most) == ["conv2", "relu2"]


def test_integers_are_near_and_the_first_convolution_is_none(chain):
    proto, images = chain
    found = quantised(proto, images)
    kinds = {node.name: node for node in found.graph.node}
    assert kinds["conv0"].input[1] == "w0" and kinds["conv1"].input[1] != "w1"
    for x in images[:3]:
        exact = output(proto, x)
        assert np.abs(output(found, x) - exact).max() < 0.05 * (exact.max() - exact.min())


def test_the_band():
    assert band_of([1.0, 2.5, 3.0], [1.5, 2.0, 3.0], 1.0)[:3] == (0.5, 3, 0.25)
    assert band_of([1.0], [1.0], 1.0).risk == 0.5
    assert band_of([1.1, 3.0], [1.0, 3.1], 4.0).width == pytest.approx(0.4)  # 10 % of a score of 1
    assert band_of([1.1, -3.0], [1.0, -3.2], 4.0).width == pytest.approx(0.2)  # of negative scores there is no share
    with pytest.raises(InputError, match="precision=int8"):
        band_of([float("nan")], [1.0], 1.0)
    shown = str(Band(0.2, 19, 0.05, 20, 1, 0.25))
    assert "1 of 20" in shown and "25 %" in shown and "5 %" in shown


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "subspace"
    train(tiny_run(tiny, folder, "model=subspace", "model.score=max", "model.stages=[1,2]"))
    return folder


@pytest.fixture(scope="module")
def exports(run, tmp_path_factory):
    """File and parity of both formats."""
    folder, options = tmp_path_factory.mktemp("int8"), ("precision=int8", "flips=12")
    formats = {"onnx": "onnx", "openvino": "xml"}
    return {
        name: export_run(composed(f"run='{run}'", f"output='{folder}/model.{end}'", f"format={name}", *options, config="export"))
        for name, end in formats.items()
    }


@pytest.mark.parametrize("format", ["onnx", "openvino"])
def test_an_export_decides_as_float32(exports, format, tiny):
    path, parity = exports[format]
    model = Model(path, threads=1)
    assert parity.flipped == 0 and parity.score_difference <= 1e-3 * parity.score_scale  # of its float32 from the run
    band = model.metadata["band"]
    assert band == parity.band._asdict() and band["images"] == 6 and band["risk"] == pytest.approx(1 / 7)
    files = sorted((tiny / "normal_test").glob("*.png")) + sorted((tiny / "square").glob("*.png"))
    integer = [result.score for result in model.predict(files, batch_size=5)]
    model.exact = True
    exact = [result.score for result in model.predict(files, batch_size=5)]
    assert model.twice == band["twice"] * 12 and integer != exact
    assert sum((a > model.threshold) != (b > model.threshold) for a, b in zip(integer, exact, strict=True)) == band["flips"]
    model.exact, model.twice, model.threshold = False, 0, integer[3] - band["width"] / 2  # this image is near now
    again = [result.score for result in model.predict(files, batch_size=5)]
    assert again[3] == pytest.approx(exact[3], rel=1e-6) and model.twice >= 1
    near = [abs(score - model.threshold) <= band["width"] for score in integer]
    for new, old, other, twice in zip(again, integer, exact, near, strict=True):
        if abs(abs(old - model.threshold) - band["width"]) > 1e-6:
            assert new == pytest.approx(other if twice else old, rel=1e-6)


def test_both_engines_find_the_same_scores(exports, tiny):
    files = sorted((tiny / "normal_test").glob("*.png"))
    for exact in (False, True):
        scores = []
        for path, _ in exports.values():
            model = Model(path, threads=1)
            model.exact, model.threshold = exact, None
            scores.append([result.score for result in model.predict(files, batch_size=4)])
        np.testing.assert_allclose(*scores, rtol=1e-4 if exact else 2e-2)


def test_others_who_read_onnx_get_integers_and_may_ask_for_float32(exports, tiny):
    session = onnxruntime.InferenceSession(str(exports["onnx"][0]), providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_inputs()] == ["image"]
    assert [value.name for value in session.get_overridable_initializers()] == [EXACT]
    x = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in sorted((tiny / "normal_test").glob("*.png"))[:2]])
    integer, exact = (session.run(["score"], {"image": x} | more)[0] for more in ({}, {EXACT: np.array(True)}))
    assert integer.shape == exact.shape == (2,) and (integer != exact).all()
    assert np.abs(integer - exact).max() < 0.5 * exact.max()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["precision=int4"], "precision=int4: expected"),
        (["precision=int8", "format=torch_export"], "format=torch_export: expected format=onnx or openvino"),
    ],
)
def test_what_has_no_integers_says_why(run, overrides, message):
    with pytest.raises(InputError, match=message):
        export_run(composed(f"run='{run}'", *overrides, config="export"))


def test_a_run_without_a_threshold_or_a_backbone_is_refused(run, tiny, tmp_path, monkeypatch):
    train(tiny_run(tiny, tmp_path / "paper", "model=subspace", "protocol=paper"))
    with pytest.raises(InputError, match="protocol=clean"):
        export_run(composed(f"run='{tmp_path}/paper'", "precision=int8", config="export"))
    monkeypatch.setattr("blemish.deploy.export.splits", lambda model: False)
    with pytest.raises(InputError, match="Subspace is not a backbone and a score"):
        export_run(composed(f"run='{run}'", "precision=int8", config="export"))


def test_more_flips_than_allowed_leave_no_file(run, tmp_path, monkeypatch):
    monkeypatch.setattr("blemish.deploy.export.certified", lambda *_: Band(1, 5, 0.2, tested=12, flips=3, twice=0.0))
    with pytest.raises(InputError, match=r"3 of 12 decisions flipped.*flips=0"):
        export_run(composed(f"run='{run}'", f"output='{tmp_path}/m.onnx'", "precision=int8", config="export"))
    assert not list(tmp_path.glob("*"))
