"""An export in two precisions: the backbone in 8-bit integers, and in float32 for images whose score is near the threshold."""

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from blemish.edge.errors import InputError
from blemish.edge.runtime import EXACT
from blemish.features.engine import quiet

SEEN = 200  # training images whose values set the ranges of the integers
STEPS = 127  # of a weight's magnitude
MOST = 256  # calibration images that are scored in both precisions
ROOM = 1.5  # the integers' range by that of the training images: images with defects have larger values, which must not be cut
CUT = 2.0  # the same of a channel under a Clip, whose own range is smaller than the tensor's
SHARE = 0.4  # of all multiplications, those of the first convolutions that stay in float32
TIED = ("Add", "Relu", "Clip", "MaxPool")  # one factor for a channel of their inputs and outputs


class Band(NamedTuple):
    """How far scores in integers are from those in float32; one within `width` of the threshold is computed again in float32.

    The difference of one more image like the `images` is larger with a probability of at most `risk`. Of `tested` images `flips` are
    decided otherwise than by float32, and the share `twice` is scored twice.
    """

    width: float
    images: int
    risk: float
    tested: int | None = None
    flips: int | None = None
    twice: float | None = None

    def __str__(self) -> str:
        found = f"int8: {self.flips} of {self.tested} decisions flipped, {100 * self.twice:.0f} % scored twice"
        risk = f"at most {100 * self.risk:.2g} % of images like the {self.images} normal ones are farther from float32"
        return f"{found}, those within {self.width:.3g} of the threshold; {risk}"


def band_of(integer: Sequence[float], exact: Sequence[float], threshold: float) -> Band:
    """The band from the scores of the same calibration images in both precisions.

    Differences grow with the score, so that one of a score below the threshold counts in proportion as at the threshold. Of n + 1
    exchangeable images each is as likely to have the largest: the risk is 1 / (n + 1).
    """
    integer, exact = np.asarray(integer), np.asarray(exact)
    differences = np.abs(integer - exact)
    if not np.isfinite(differences).all():
        raise InputError("precision=int8: scores of calibration images are not finite; expected precision=float32")
    if threshold > 0 and exact.min() > 0:
        differences = differences * np.maximum(threshold / exact, 1)
    return Band(float(differences.max()), len(differences), 1 / (len(differences) + 1))


class Channels(NamedTuple):
    """The values of each channel (C,) of a tensor inside a graph, over all images, and the cells of its grid."""

    low: np.ndarray
    high: np.ndarray
    mean: np.ndarray
    cells: int


def quantised(proto: Any, arrays: Iterable[np.ndarray]) -> Any:
    """The graph with its convolutions in integers: activations unsigned, weights signed with a scale for each channel.

    The first convolutions stay in float32: their errors pass through all others. `arrays` are inputs (1, …).
    """
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantType
    from onnxruntime.quantization.calibrate import TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
    from onnxruntime.quantization.quant_utils import load_model_with_shape_infer

    arrays = list(arrays)
    proto = equalised(proto, channels_of(proto, arrays))
    channels = channels_of(proto, arrays)
    nodes = in_integers(proto, channels)
    if not nodes:
        return proto
    proto = rounded(proto, channels, nodes)
    ranges = {name: (np.float32(ROOM * one.low.min()), np.float32(ROOM * one.high.max())) for name, one in channels.items()}
    for node in proto.graph.node:
        if node.op_type in ("Relu", "Clip"):  # the quantiser drops them: the range of the integers does what they do
            least, most = bounds(node, weights_of(proto))
            low, high = ranges[node.output[0]]
            ranges[node.output[0]] = np.float32(max(low, least)), np.float32(min(high, most))
    with tempfile.TemporaryDirectory() as folder, quiet():
        onnx.save(proto, path := Path(folder) / "float32.onnx")
        ranges = TensorsData(CalibrationMethod.MinMax, ranges)
        types = (QuantType.QInt8, QuantType.QUInt8)
        quantizer = QDQQuantizer(load_model_with_shape_infer(path), True, False, *types, ranges, nodes, [], ["Conv", *TIED], {})
        quantizer.quantize_model()
        quantizer.model.topological_sort()
        return quantizer.model.model


def channels_of(proto: Any, arrays: Sequence[np.ndarray]) -> dict[str, Channels]:
    """The channels of the tensors (1, C, h, w) that convolutions and TIED operations take and make."""
    import onnx
    import onnxruntime

    weights, open_ = weights_of(proto), copy_of(proto)
    names = {name for node in proto.graph.node if node.op_type in ("Conv", *TIED) for name in (*node.input[:2], node.output[0])}
    names = sorted(names - {*weights, "image", ""})
    del open_.graph.output[:]
    open_.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
    session = onnxruntime.InferenceSession(open_.SerializeToString(), providers=["CPUExecutionProvider"])
    found: dict[str, Channels] = {}
    for array in arrays:
        for name, value in zip(names, session.run(names, {"image": array}), strict=True):
            if value.ndim == 4:
                one = Channels(*(f(value, (0, 2, 3)) for f in (np.min, np.max, np.mean)), value[0, 0].size)
                low, high, mean, cells = found.get(name, one._replace(mean=0 * one.mean))
                found[name] = Channels(np.minimum(low, one.low), np.maximum(high, one.high), mean + one.mean / len(arrays), cells)
    return found


def in_integers(proto: Any, channels: dict[str, Channels]) -> list[str]:
    """The names of the nodes after the first convolution, and after as many as have no more than SHARE of the multiplications."""
    weights, nodes = weights_of(proto), proto.graph.node
    costs = [weights[n.input[1]].size * channels[n.output[0]].cells if n.op_type == "Conv" and n.input[1] in weights else 0 for n in nodes]
    done, convs = np.cumsum(costs), [i for i, cost in enumerate(costs) if cost]
    first = next((i for i in convs[1:] if done[i] > SHARE * done[-1]), len(nodes))
    known = {*channels, *weights, ""}
    return [n.name for n in nodes[first:] if n.op_type in ("Conv", *TIED) and known.issuperset((*n.input, *n.output))]


def equalised(proto: Any, channels: dict[str, Channels]) -> Any:
    """A graph with the same outputs whose channels have about the same range within a tensor, as one scale holds the integers of all.

    A factor goes from the weights before a tensor to those after it, as in Nagel et al. 2019 for equal ranges of the weights. Before a
    Clip, channels are enlarged that stay below its bound, which then is at least CUT times their range.
    """
    from onnx import helper, numpy_helper

    proto = copy_of(proto)
    weights, nodes = weights_of(proto), list(proto.graph.node)
    maker, users = {name: node for node in nodes for name in node.output}, {}
    for node in nodes:
        for name in node.input:
            users.setdefault(name, []).append(node)
    groups = {name: {name} for name in channels}  # the same set for all tensors that TIED operations join
    for node in nodes:
        if node.op_type in TIED:
            joint = set().union(*(groups.get(name, {name}) for name in (*node.input[: 1 + (node.op_type == "Add")], *node.output)))
            groups |= dict.fromkeys(joint, joint)
    scaled = {}
    for group in {id(group): group for group in groups.values()}.values():
        makers, readers = [maker.get(name) for name in group], [node for name in group for node in users.get(name, [])]
        convs = [node for node in makers + readers if node is not None and node.op_type == "Conv"]
        if not all(node is not None and node.op_type in ("Conv", *TIED) for node in makers + readers) or any(
            name not in weights or len(users[name]) > 1 for node in convs for name in node.input[1:]
        ):
            continue
        cuts = [bounds(node, weights) for node in makers if node.op_type == "Clip"]
        if not all(0 < top < np.inf and least in (0, -top) for least, top in cuts):
            continue
        ends = [name for name in group if not any(node.op_type in ("Relu", "Clip") for node in users.get(name, []))]
        spans = np.max([np.maximum(abs(channels[name].low), abs(channels[name].high)) for name in ends], 0).clip(1e-6)
        factor = (np.minimum(CUT * spans / min(top for _, top in cuts), 1) if cuts else spans / spans.max()).astype(np.float32)  # (C,)
        for node in makers:
            if node.op_type == "Conv":
                for name in node.input[1:]:
                    weights[name] = weights[name] / factor.reshape(-1, *[1] * (weights[name].ndim - 1))
        for node in readers:
            if node.op_type == "Conv":
                weight, name = weights[node.input[1]], node.input[1]
                weights[name] = weight * per_input(node, factor, len(weight)).reshape(*weight.shape[:2], 1, 1)
        scaled |= {value.name: factor for value in proto.graph.output if value.name in group}
    for tensor in proto.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(weights[tensor.name], tensor.name))
    for name, factor in scaled.items():
        for node in nodes:
            for names in (node.input, node.output):
                names[:] = [f"{name}.equal" if one == name else one for one in names]
        proto.graph.initializer.append(numpy_helper.from_array(factor.reshape(-1, 1, 1), f"{name}.factor"))
        proto.graph.node.append(helper.make_node("Mul", [f"{name}.equal", f"{name}.factor"], [name], name=f"{name}.scaled"))
    return proto


def rounded(proto: Any, channels: dict[str, Channels], names: Sequence[str]) -> Any:
    """A copy of the graph whose weights in nodes `names` are rounded as integers hold them, their mean error taken out of the biases.

    Where the input is constant, as on a plain background, the error of a channel is: its sum over a kernel times the input. The sums are
    kept by rounding some weights the other way, the rest is subtracted at the mean input (bias correction of Nagel, van Baalen,
    Blankevoort, Welling 2019, arXiv 1906.04721).
    """
    import onnx
    from onnx import numpy_helper

    proto = copy_of(proto)
    tensors, weights = {tensor.name: tensor for tensor in proto.graph.initializer}, weights_of(proto)
    for node in [node for node in proto.graph.node if node.op_type == "Conv" and node.name in names]:
        weight = weights[node.input[1]]
        near = to_steps(weight)
        mean = per_input(node, channels[node.input[0]].mean, len(weight))
        error = ((near - weight).reshape(*weight.shape[:2], -1).sum(2) * mean).sum(1)  # (O,)
        if len(node.input) < 3:  # the exporter drops a bias of zeros
            node.input.append(f"{node.input[1]}.bias")
            tensors[node.input[2]], weights[node.input[2]] = proto.graph.initializer.add(), np.zeros(len(weight))
        for name, value in zip(node.input[1:], (near, weights[node.input[2]] - error), strict=True):
            tensors[name].CopyFrom(numpy_helper.from_array(value.astype(np.float32), name))
    onnx.checker.check_model(proto)
    return proto


def copy_of(proto: Any) -> Any:
    return type(proto).FromString(proto.SerializeToString())


def weights_of(proto: Any) -> dict[str, np.ndarray]:
    """The constants of a graph by their names."""
    from onnx import numpy_helper

    return {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}


def bounds(node: Any, weights: dict[str, np.ndarray]) -> tuple[float, float]:
    """The least and the largest value that a Relu or Clip lets pass."""
    if node.op_type == "Relu":
        return 0.0, np.inf
    low, high = [*node.input[1:], "", ""][:2]
    return float(weights[low]) if low else -np.inf, float(weights[high]) if high else np.inf


def per_input(node: Any, values: np.ndarray, channels: int) -> np.ndarray:
    """Values (C,) of a convolution's input channels as its weight (O, C / groups, …) takes them, (O, C / groups)."""
    groups = next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)
    return values.reshape(groups, -1).repeat(channels // groups, axis=0)


def to_steps(weight: np.ndarray) -> np.ndarray:
    """Weights (O, C, …) as multiples of 1 / STEPS of their channel's largest, of which each kernel has nearly its own sum."""
    scale = np.abs(weight).reshape(len(weight), -1).max(1).clip(1e-12).reshape(-1, *[1] * (weight.ndim - 1)) / STEPS
    exact = (weight / scale).reshape(*weight.shape[:2], -1)  # (O, C, K)
    steps = exact.round()
    missing = (exact - steps).sum(2, keepdims=True).round()  # (O, C, 1)
    rank = (-(exact - steps) * np.sign(missing)).argsort(2).argsort(2)  # those first that were rounded away most
    steps = (steps + (rank < np.abs(missing)) * np.sign(missing)).clip(-STEPS, STEPS)
    return steps.reshape(weight.shape) * scale


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
