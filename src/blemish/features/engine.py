"""The frozen backbone by ONNX Runtime: its graph is made once, compared with torch on real images, and kept in the cache folder."""

import contextlib
import hashlib
import json
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from torch import Tensor, nn

from blemish.edge.errors import InputError
from blemish.files import atomic_write

FORMAT = 1  # to be raised whenever the graphs change
NEEDS = ("onnx", "onnxscript", "onnxruntime")
OPSET = 20
CHUNK_BYTES = 2**23  # of the largest output of a layer: one image of 256 px is as fast as several, and small tiles go together
COMPARED = 8  # images that a new graph is compared on
TOLERANCE = 1e-3  # largest difference of a map's value, in standard deviations of the map
KEY = "blemish.milliseconds"  # metadata of a graph: what an image took by torch and by the graph when it was made
LARGEST = 2**31 - 2**20  # bytes of constants: what a protobuf may hold, less its graph

log = logging.getLogger(__name__)


class Graph(NamedTuple):
    """A graph that makes the maps (B, h, w, C) of images, and what it takes."""

    session: Any
    milliseconds: dict[str, float]  # of an image by each engine, when it was made
    chunk: int  # images at a time

    def __call__(self, image: Tensor) -> list[Tensor]:
        """Maps (B, C, h, w), channels last in memory, of images (B, 3, H, W); each of torch's threads takes other images."""
        image = image.contiguous()
        maps = [torch.empty(len(image), *output.shape[1:]) for output in self.session.get_outputs()]
        starts = range(0, len(image), self.chunk)
        with ThreadPoolExecutor(max(1, min(torch.get_num_threads(), len(starts)))) as pool:
            list(pool.map(lambda start: self._run(*(x[start : start + self.chunk] for x in (image, *maps))), starts))
        return [stage.movedim(-1, 1) for stage in maps]

    def _run(self, image: Tensor, *maps: Tensor) -> None:
        binding, names = self.session.io_binding(), [output.name for output in self.session.get_outputs()]
        binding.bind_input("image", "cpu", 0, np.float32, image.shape, image.data_ptr())
        for name, stage in zip(names, maps, strict=True):
            binding.bind_output(name, "cpu", 0, np.float32, stage.shape, stage.data_ptr())
        self.session.run_with_iobinding(binding)


class ChannelsLast(nn.Module):
    """The maps (B, h, w, C) of a backbone."""

    def __init__(self, features: nn.Module):
        super().__init__()
        self.features = features

    def forward(self, image: Tensor) -> list[Tensor]:
        return [stage.movedim(1, -1) for stage in self.features.maps(image)]


def graph_for(features: nn.Module, image: Tensor, asked: bool) -> Graph | None:
    """The graph of a frozen `Features` for images of the size of `image` (B, 3, H, W), from the cache folder or made and put there.

    None, with a warning, where it cannot be made or its maps are not torch's; unless it was asked for, also where ONNX Runtime is not
    installed or was slower than torch when the graph was made.
    """
    if absent := [name for name in NEEDS if not find_spec(name)]:
        if asked:
            log.warning("engine=onnxruntime: needs %s, torch is used; pip install 'blemish[export]'", ", ".join(absent))
        return None
    path, graph = place_of(features, image), None
    with contextlib.suppress(Exception):  # absent, damaged, or of no use to this version of the engine
        graph = opened(path, features)
    try:
        if graph is None or not difference(features, graph, image[:1]) <= TOLERANCE:
            log.info("engine: the graph of %s for ONNX Runtime is made, once, and kept in %s", features.backbone, path.parent)
            graph = make(path, features, image[:COMPARED])
    except Exception as error:  # the exporter and the engine have errors of many kinds
        log.warning("engine: torch, as %s has no graph: %s", features.backbone, str(error).partition("\n")[0][:300])
        return None
    if not asked and graph.milliseconds["onnxruntime"] > graph.milliseconds["torch"]:
        return None
    return graph


def place_of(features: nn.Module, image: Tensor) -> Path:
    """The file of a graph, named by all it depends on."""
    root = Path(os.environ.get("BLEMISH_CACHE", "~/.cache/blemish")).expanduser() / "graphs"
    stages, (height, width) = "-".join(map(str, features.stages)), image.shape[-2:]
    origin = [FORMAT, timm.__version__, features.digest(), features.mean.tolist(), features.std.tolist(), features.stages]
    digest = hashlib.blake2b(json.dumps(origin).encode(), digest_size=8).hexdigest()
    return root / f"{features.backbone}-{stages}-{width}x{height}-{digest}.onnx".replace("/", "_")


def make(path: Path, features: nn.Module, image: Tensor) -> Graph:
    """Write a graph that has been compared with torch on images; InputError if their maps differ."""
    import onnx

    example = image[:1].expand(2, -1, -1, -1).contiguous()
    with torch.inference_mode(False), torch.no_grad(), quiet():
        program = torch.export.export(
            ChannelsLast(features).eval(), (example.clone(),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), strict=False
        )
        proto = onnx_of(program, OPSET, (["image"], None))
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        onnx.helper.set_model_props(proto, {KEY: json.dumps({"torch": 1.0, "onnxruntime": 0.0})})
        onnx.save(proto, temporary)
        graph = opened(temporary, features)
        far = difference(features, graph, image)
        if not far <= TOLERANCE:
            raise InputError(f"its maps are {far:.2g} standard deviations from torch's")
        runs = {"torch": features.by_torch, "onnxruntime": graph}
        found = {name: min(clocked(run, image) for _ in range(3)) for name, run in runs.items()}
        onnx.helper.set_model_props(proto, {KEY: json.dumps(found)})
        onnx.save(proto, temporary)
    return graph._replace(milliseconds=found)


def opened(path: Path, features: nn.Module) -> Graph:
    """A graph from its file, run by one thread for each call: calls run side by side, which waits less than sharing one."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    height, width = session.get_inputs()[0].shape[-2:]
    chunk = max(1, int(CHUNK_BYTES / (features.pixel_bytes * height * width)))
    return Graph(session, json.loads(session.get_modelmeta().custom_metadata_map[KEY]), chunk)


def difference(features: nn.Module, graph: Graph, image: Tensor) -> float:
    """The largest difference of any map of images from torch's, in standard deviations of that map; NaN where a value is not finite."""
    pairs = zip(graph(image), features.by_torch(image), strict=True)
    return float(torch.stack([(one - other).abs().max() / other.std().clamp_min(1e-12) for one, other in pairs]).max())


def clocked(run: Callable[[Tensor], Any], image: Tensor) -> float:
    """Milliseconds an image."""
    started = time.perf_counter()
    run(image)
    return 1e3 * (time.perf_counter() - started) / len(image)


def onnx_of(program: torch.export.ExportedProgram, opset: int, names: tuple[Sequence[str] | None, Sequence[str] | None]) -> Any:
    """The program as ONNX's ModelProto; InputError if that cannot hold it."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    values = [value for value in [*program.state_dict.values(), *program.constants.values()] if isinstance(value, Tensor)]
    size = sum(value.numel() * value.element_size() for value in values)
    if size > LARGEST:
        raise InputError(f"{size / 2**30:.1f} GiB of constants, an ONNX file holds 2; use format=torch_export or a smaller image_size")
    inputs, outputs = names
    with quiet():
        exported = torch.onnx.export(program, dynamo=True, opset_version=opset, verbose=False, input_names=inputs, output_names=outputs)
    ClearMetadataAndDocStringPass()(exported.model)  # every node's lines of source, with the paths of this machine
    return exported.model_proto


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide what tracing and the ONNX exporter log and warn of torch's own code."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=DeprecationWarning)  # of torch 2.14 and onnxscript 0.7 in their own code
            warnings.filterwarnings("ignore", message="No complete tensor found in the group")  # buffers that are empty share one address
            yield
    finally:
        logging.disable(level)
