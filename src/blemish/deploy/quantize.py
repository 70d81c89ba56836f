"""An export in two precisions: the backbone in 8-bit integers, and in float32 for images whose score is near the threshold."""

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from blemish.edge.errors import InputError
from blemish.edge.runtime import EXACT
from blemish.features.engine import quiet

SEEN = 48  # training images whose values set the ranges of the integers
STEPS = 127  # of a weight's magnitude
MOST = 256  # calibration images that are scored in both precisions


class Band(NamedTuple):
    """How far scores in integers are from those in float32; one from `low` to `high` above the threshold is computed again in float32.

    The difference of one more image like the `images` lies outside with a probability of at most `risk`. Of `tested` images `flips` are
    decided otherwise than by float32, and the share `twice` is scored twice.
    """

    low: float
    high: float
    images: int
    risk: float
    tested: int | None = None
    flips: int | None = None
    twice: float | None = None

    def __str__(self) -> str:
        found = f"int8: {self.flips} of {self.tested} decisions flipped, {100 * self.twice:.0f} % scored twice"
        risk = f"at most {100 * self.risk:.2g} % of images like the {self.images} normal ones are outside"
        return f"{found}, those from {self.low:+.3g} to {self.high:+.3g} of the threshold; {risk}"


def band_of(integer: Sequence[float], exact: Sequence[float]) -> Band:
    """The band from the scores of the same calibration images in both precisions.

    Of n + 1 exchangeable differences each is as likely to be the largest or the smallest: the risk is 2 / (n + 1).
    """
    differences = np.asarray(integer) - np.asarray(exact)
    if not np.isfinite(differences).all():
        raise InputError("precision=int8: scores of calibration images are not finite; expected precision=float32")
    return Band(float(differences.min()), float(differences.max()), len(differences), min(1.0, 2 / (len(differences) + 1)))


def quantised(proto: Any, arrays: Iterable[np.ndarray]) -> Any:
    """The graph with its convolutions in integers: activations unsigned, weights signed with a scale for each channel.

    What comes before the first convolution, and that one, stay in float32: they cost little and err most. `arrays` are inputs (1, …).
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.rest = iter(arrays)

        def get_next(self) -> dict | None:
            array = next(self.rest, None)
            return None if array is None else {"image": array}

    arrays, nodes = list(arrays), proto.graph.node
    first = next((i for i, node in enumerate(nodes) if node.op_type == "Conv"), -1)
    kept = [node.name for node in nodes[: first + 1]]
    with tempfile.TemporaryDirectory() as folder, quiet():
        files = [Path(folder) / name for name in ("float32.onnx", "int8.onnx")]
        onnx.save(rounded(proto, arrays, kept), files[0])
        types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
        quantize_static(*files, Reader(), quant_format=QuantFormat.QDQ, per_channel=True, nodes_to_exclude=kept, **types)
        return onnx.load(files[1])


def rounded(proto: Any, arrays: Sequence[np.ndarray], kept: Sequence[str]) -> Any:
    """A copy of the graph whose weights are rounded as integers hold them, with the mean error taken out of the biases.

    Where the input is constant, as on a plain background, the error of a channel is: its sum over a kernel times the input. The sums are
    kept by rounding some weights the other way, the rest is subtracted at the mean input (bias correction of Nagel, van Baalen,
    Blankevoort, Welling 2019, arXiv 1906.04721).
    """
    import onnx
    from onnx import numpy_helper

    proto = type(proto).FromString(proto.SerializeToString())
    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    convs = [node for node in proto.graph.node if node.op_type == "Conv" and node.name not in kept and node.input[1] in tensors]
    means = mean_channels(proto, [node.input[0] for node in convs], arrays) if convs else {}
    for node in convs:
        weight = numpy_helper.to_array(tensors[node.input[1]])
        near = to_steps(weight)
        groups = next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)
        mean = means[node.input[0]].reshape(groups, -1).repeat(len(weight) // groups, axis=0)  # (O, C / groups)
        error = ((near - weight).reshape(*weight.shape[:2], -1).sum(2) * mean).sum(1)  # (O,)
        if len(node.input) < 3:  # the exporter drops a bias of zeros
            node.input.append(f"{node.input[1]}.bias")
            tensors[node.input[2]] = proto.graph.initializer.add()
            tensors[node.input[2]].CopyFrom(numpy_helper.from_array(np.zeros(len(weight), np.float32)))
        bias = numpy_helper.to_array(tensors[node.input[2]])
        for name, value in zip(node.input[1:], (near, bias - error), strict=True):
            tensors[name].CopyFrom(numpy_helper.from_array(value.astype(np.float32), name))
    onnx.checker.check_model(proto)
    return proto


def to_steps(weight: np.ndarray) -> np.ndarray:
    """Weights (O, C, …) as multiples of 1 / STEPS of their channel's largest, of which each kernel has nearly its own sum."""
    scale = np.abs(weight).reshape(len(weight), -1).max(1).clip(1e-12).reshape(-1, *[1] * (weight.ndim - 1)) / STEPS
    exact = (weight / scale).reshape(*weight.shape[:2], -1)  # (O, C, K)
    steps = exact.round()
    missing = (exact - steps).sum(2, keepdims=True).round()  # (O, C, 1)
    rank = (-(exact - steps) * np.sign(missing)).argsort(2).argsort(2)  # those first that were rounded away most
    steps = (steps + (rank < np.abs(missing)) * np.sign(missing)).clip(-STEPS, STEPS)
    return steps.reshape(weight.shape) * scale


def mean_channels(proto: Any, names: Sequence[str], arrays: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """The mean of each channel (C,) of tensors (B, C, …) inside a graph."""
    import onnx
    import onnxruntime

    names = sorted(set(names))
    open_ = type(proto).FromString(proto.SerializeToString())
    del open_.graph.output[:]
    open_.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
    session = onnxruntime.InferenceSession(open_.SerializeToString(), providers=["CPUExecutionProvider"])
    found = [[value.mean(axis=(0, *range(2, value.ndim))) for value in session.run(names, {"image": array})] for array in arrays]
    return {name: np.mean(values, axis=0) for name, values in zip(names, zip(*found, strict=True), strict=True)}


def joined(exact: Any, integer: Any, score: Any) -> Any:
    """One graph of a backbone in both precisions and the score of its maps.

    Its input EXACT, false unless it is given, chooses the backbone in float32.
    """
    from onnx import TensorProto, helper

    branches = [branch(proto, prefix) for proto, prefix in ((exact, "float32."), (integer, "int8."))]
    maps = [value.name for value in score.graph.input]
    node = helper.make_node("If", [EXACT], maps, name=EXACT, then_branch=branches[0], else_branch=branches[1])
    switch = helper.make_tensor(EXACT, TensorProto.BOOL, [], [False])
    inputs = [*exact.graph.input, helper.make_tensor_value_info(EXACT, TensorProto.BOOL, [])]
    graph = helper.make_graph(
        [node, *score.graph.node],
        "two precisions",
        inputs,
        score.graph.output,
        [switch, *score.graph.initializer],
        value_info=score.graph.value_info,
    )
    opsets = {one.domain: one for proto in (exact, integer, score) for one in proto.opset_import}
    functions = {(one.domain, one.name): one for proto in (exact, integer, score) for one in proto.functions}
    return helper.make_model(graph, opset_imports=list(opsets.values()), functions=list(functions.values()), ir_version=exact.ir_version)


def branch(proto: Any, prefix: str) -> Any:
    """The graph of a model as a branch that takes its input from the graph around it."""
    from onnx import compose

    graph = compose.add_prefix(proto, prefix).graph
    for node in graph.node:
        for i, name in enumerate(node.input):
            if name == f"{prefix}image":
                node.input[i] = "image"
    del graph.input[:]
    return graph
