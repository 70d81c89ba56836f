"""A run as one file that needs no blemish: ONNX, torch's exported program or OpenVINO, checked against the run on real images."""

import io
import json
from collections.abc import Callable, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blemish.deploy.parity import Parity, arrays_of, certified, chosen, compare
from blemish.deploy.quantize import MOST, SEEN, joined, quantised
from blemish.detector import Detector
from blemish.edge.checks import check_choice, check_number, check_size, check_switch, check_whole
from blemish.edge.errors import InputError
from blemish.edge.geometry import GREY, middle, strips_of
from blemish.edge.reading import file_digest
from blemish.edge.runtime import EXACT, FORMAT, KEY, NO_SEAL, Model, Run, openvino_core, packed, seal, to_input
from blemish.features.engine import onnx_of, quiet
from blemish.features.extractor import Features
from blemish.files import atomic_write, remove_stale, replacing
from blemish.run.checkpoint import load, newest_run
from blemish.run.progress import steps
from blemish.run.record import check_archive, read_record
from blemish.run.results import Preprocessing, Rule, preprocessing_of

ENDINGS = {"onnx": ".onnx", "torch_export": ".pt2", "openvino": ".xml"}
NEEDS = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("onnx", "onnxscript", "openvino"), "torch_export": ()}
NAMES = (["image"], ["score", "map"])  # of inputs and outputs, the map where there is one
FOLDED = 2**20  # values of a constant that may be larger than what it is computed from


class ExportModule(nn.Module):
    """A detector with its preprocessing: images to (score (B,), map (B, H, W)), or to (score,) alone.

    input=float: (B, 3, H, W) float32 in [0, 1]. input=uint8: (B, H, W, 3) uint8; with `source` (H, W) they have that size and are resized
    in here, by the integers that torch resizes bytes with. part=backbone ends with the maps of the backbone, part=score begins with them.
    """

    def __init__(
        self,
        model: Detector,
        size: Sequence,
        input: str,
        source: Sequence | None,
        preprocessing: Preprocessing,
        maps: bool,
        part: str = "full",
    ):
        super().__init__()
        geometry, self.part = preprocessing.geometry, part
        self.model, self.size, self.is_bytes, self.maps, self.crop = model, tuple(size), input == "uint8", maps, geometry.crop
        self.steps, self.padding = [], []
        if source and geometry.size:
            resized, padded = geometry.resized(*source), geometry.padded(*source)
            for axis, length, pixels in ((3, source[1], resized[1]), (2, source[0], resized[0])):
                if length != pixels:
                    bits, strips = strips_of(length, pixels, exact=True)
                    self.steps.append((axis, bits, [(of, torch.from_numpy(weights)) for _, of, weights in strips]))
            rows, columns = middle(padded, resized)
            self.padding = [columns.start, padded[1] - columns.stop, rows.start, padded[0] - rows.stop]

    def forward(self, x: Tensor | list[Tensor]) -> Sequence[Tensor]:
        if self.part == "backbone":
            return list(self.model.features(self.unit(x)))
        score, map = self.model.score(x, self.size) if self.part == "score" else self.model(self.unit(x))
        return (score, map) if self.maps and map is not None else (score,)

    def unit(self, image: Tensor) -> Tensor:
        """Images as the method takes them, (B, 3, h, w) float32 in [0, 1]."""
        if not self.is_bytes:
            return image
        x = image.permute(0, 3, 1, 2).to(torch.float64 if self.steps else torch.float32)  # a float32 cannot hold the integers
        for axis, bits, strips in self.steps:
            parts = [x[..., of] @ weights.T if axis == 3 else weights @ x[..., of, :] for of, weights in strips]
            x = ((torch.cat(parts, axis) + 2 ** (bits - 1)) * 2.0**-bits).floor().clamp(0, 255)
        if any(self.padding):
            x = F.pad(x, self.padding, value=float(GREY))
        if self.crop and x.shape[-2:] != self.size:
            rows, columns = middle(tuple(x.shape[-2:]), self.size)
            x = x[..., rows, columns]
        return x.float() / 255


class Program(Model):
    """A `torch_export` file, run by torch."""

    def load(self, path: Path, threads: int | None) -> tuple[str, Run]:
        extra = {f"{KEY}.json": ""}
        check_archive(path)
        program = torch.export.load(path, extra_files=extra).module()
        return extra[f"{KEY}.json"], lambda batch: [value.numpy() for value in program(torch.from_numpy(batch))]


def export_run(cfg: Any) -> tuple[Path, Parity]:
    """Export a run folder as configured by configs/export.yaml; returns the file and how far it is from the run.

    InputError where the method has no such export or the file differs from the run by more than the config allows; nothing is left then.
    """
    check_choice("", ENDINGS, format=cfg.format)
    check_choice("", ("float32", "int8"), precision=cfg.precision)
    check_choice("", ("uint8", "float"), input=cfg.input)
    check_size(source=cfg.source, size=cfg.size)
    check_switch("", maps=cfg.maps)
    check_whole("", 1, n=cfg.n, opset=cfg.opset)
    check_number("", "[0, inf)", tolerance=cfg.tolerance, map_tolerance=cfg.map_tolerance)
    check_whole("", 0, flips=cfg.flips)
    run = newest_run(cfg.run)
    cfg.run = str(run)
    saved, model = load(run, "cpu")
    preprocessing = preprocessing_of(saved)
    path = Path(cfg.output) if cfg.output else (run.parent if run.is_file() else run) / "export" / f"model{ENDINGS[cfg.format]}"
    size = checked_size(cfg, preprocessing, path)
    check_exportable(model, cfg.maps)
    integers = cfg.precision == "int8"
    if integers:
        check_integers(cfg, run, model)
    images = chosen(cfg.images, run, saved.data, cfg.n)
    limits = {key: cfg[key] for key in ("tolerance", "map_tolerance", "flips")}
    weights = path.with_suffix(".bin") if cfg.format == "openvino" else None
    remove_stale(path.parent)
    with replacing(path, weights), atomic_write(path) as temporary, steps("graph", "file", "comparison") as step:
        step("graph")
        metadata = metadata_of_run(cfg, saved, model, preprocessing) | {"size": size}
        options = (model, size, cfg.input, cfg.source, preprocessing, cfg.maps)
        if integers:
            seen = arrays_of(chosen(None, run, saved.data, SEEN, "train"), preprocessing)
            graph, metadata["batch"] = two_precisions(options, cfg, [to_input(array, metadata) for array in seen])
        else:
            graph, metadata["batch"] = traced(ExportModule(*options), example(cfg.input, cfg.source or size))
        try:
            step("file")
            write = WRITERS[cfg.format](graph, temporary, cfg.opset)
            write(metadata)
            step("comparison")
            other = (Program if cfg.format == "torch_export" else Model)(temporary)
            other.exact = integers
            parity = compare(model, preprocessing, other, images)
            if not parity.holds(**limits):
                allowed = ", ".join(f"{name}={value}" for name, value in limits.items())
                raise InputError(f"{path}: not kept, it differs from its run ({parity}); expected {allowed}, each a share of its spread")
            if integers:
                held_out = chosen(None, run, saved.data, MOST, "calibrate") or chosen(None, run, saved.data, MOST, "train")
                parity = parity._replace(band=certified(other, held_out, images))
                if parity.band.flips > cfg.flips:
                    raise InputError(f"{path}: not kept, {parity.band}; expected flips={cfg.flips}, or precision=float32")
            *figures, (_, band) = parity._asdict().items()
            write({**metadata, "parity": {**dict(figures), **limits}, "band": band and band._asdict()})
            if weights:  # before the .xml that needs them
                temporary.with_suffix(".bin").replace(weights)
        finally:
            temporary.with_suffix(".bin").unlink(missing_ok=True)
    return path, parity


def check_integers(cfg: Any, run: Path, model: Detector) -> None:
    """InputError where nothing can be computed in integers, or nothing says how far that is from float32."""
    if cfg.format == "torch_export":
        raise InputError("precision=int8, format=torch_export: expected format=onnx or openvino")
    if run.is_file() or not len(model.calibration):
        raise InputError(f"precision=int8, run={run}: expected the folder of a run with calibration images (protocol=clean)")
    if not splits(model):
        raise InputError(f"precision=int8: {type(model).__name__} is not a backbone and a score of its maps; expected precision=float32")


def splits(model: Detector) -> bool:
    """Whether a method is `score` of the maps of its backbone and nothing else."""
    return isinstance(getattr(model, "backbone", None), Features) and type(model).forward is Detector.forward


def two_precisions(options: tuple, cfg: Any, seen: list) -> tuple[Any, int | None]:
    """The graph in both precisions as ONNX's ModelProto, and its batch size; `seen` are inputs for the ranges of the integers."""
    inputs, modules = (
        example(cfg.input, cfg.source or options[1]),
        [ExportModule(*options, part=part).eval() for part in ("backbone", "score")],
    )
    with torch.no_grad():
        maps = modules[0](inputs)
    programs, batches = zip(*(traced(*one) for one in zip(modules, (inputs, maps), strict=True)), strict=True)
    between = [f"map_{i}" for i in range(len(maps))]
    backbone, score = (onnx_of(*one) for one in zip(programs, [cfg.opset] * 2, ((NAMES[0], between), (between, NAMES[1])), strict=True))
    return joined(backbone, quantised(backbone, [array[None] for array in seen]), score), 1 if 1 in batches else None


def checked_size(cfg: Any, preprocessing: Preprocessing, path: Path) -> list[int]:
    """(height, width) of the images or tiles at the network; InputError for options that do not fit each other, the run or this machine."""
    geometry, source, size = preprocessing.geometry, cfg.source, cfg.size
    if preprocessing.tile and (size or source):
        raise InputError(f"size={size}, source={source}: this run scores tiles of {preprocessing.tile} pixels; leave both out")
    if size and geometry.side:
        raise InputError(f"size={size}: this run has image_size={geometry.size} and crop={geometry.crop}; leave size out")
    if preprocessing.roi and preprocessing.roi.folder:
        raise InputError(f"data.roi={preprocessing.roi.folder}: a mask for each image, which no export holds; use predict run=…")
    if source and cfg.input != "uint8":
        raise InputError(f"source={source}: expected [height,width] of all images together with input=uint8")
    if source and geometry.crop and geometry.crop > (geometry.size or min(source)):
        raise InputError(f"source={source}: smaller than the run's crop of {geometry.crop}")
    if path.suffix != ENDINGS[cfg.format]:
        raise InputError(f"output={path}: expected a name that ends with {ENDINGS[cfg.format]}")
    needs = {*NEEDS[cfg.format], *(NEEDS["onnx"] if cfg.precision == "int8" else ())}
    if absent := sorted(name for name in needs if not find_spec(name)):
        raise InputError(f"format={cfg.format}: needs {', '.join(absent)}, which are not here; pip install 'blemish[export]'")
    side = geometry.side or preprocessing.tile
    if not (side or size or source):
        raise InputError("size: this run takes images of any size, an export takes one; expected size=[height,width]")
    return [side, side] if side else list(size or source)


def metadata_of_run(cfg: Any, saved: Any, model: Detector, preprocessing: Preprocessing) -> dict:
    """The metadata that docs/export.md lists, except for size, batch and parity."""
    run, record = Path(cfg.run), read_record(Path(cfg.run)) or {}
    rule = Rule(model.calibration, saved.alpha, model.map_threshold)
    return {
        "format": FORMAT,
        "blemish": version("blemish"),
        "method": record.get("method") or type(model).__module__.rpartition(".")[2],
        "alpha": saved.alpha,
        "digests": {
            "checkpoint": file_digest(run if run.is_file() else run / "model.ckpt"),
            "weights": record.get("weights_digest"),
            "manifest": record.get("manifest_digest"),
        },
        "threshold": rule.threshold.value,
        "map_share": model.map_share,
        "map_threshold": rule.level if cfg.maps else None,
        "calibration": rule.scores,
        "input": cfg.input,
        "source": list(cfg.source) if cfg.source else None,
        **geometry_metadata(preprocessing),
        "tiling": {"side": preprocessing.tile, "overlap": preprocessing.overlap} if preprocessing.tile else None,
        "roi": packed(preprocessing.roi.mask) if preprocessing.roi else None,
        "ranges": model.ranges,
        "maps": cfg.maps,
        "band": None,
        "opset": cfg.opset if cfg.format != "torch_export" else None,
        "seal": NO_SEAL if cfg.format != "torch_export" else None,  # an archive has checksums of its own
        "exporter": f"torch {torch.__version__}" + (f", openvino {version('openvino')}" if cfg.format == "openvino" else ""),
    }


def geometry_metadata(preprocessing: Preprocessing) -> dict:
    """The part of the metadata that `runtime.to_input` resizes images by."""
    size, crop, resize = preprocessing.geometry
    window = {dtype: list(ends) for dtype, ends in preprocessing.window.items()}
    return {"image_size": size, "crop": crop, "resize": resize, "window": window}


def example(input: str, size: Sequence[int]) -> Tensor:
    """Two images as an `ExportModule` takes them."""
    pixels = torch.randint(256, (2, *size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return pixels if input == "uint8" else pixels.permute(0, 3, 1, 2) / 255


def check_exportable(model: Detector, maps: bool) -> None:
    """InputError for a method that has no export, or none with its map."""
    name = type(model).__module__.rpartition(".")[2]
    if model.not_exportable:
        raise InputError(f"{name} cannot be exported: {model.not_exportable}")
    if model.whole_bag:
        raise InputError(f"{name} with calibrate=full compares each image with fits to it; expected a run with calibrate=split")
    if maps and model.map_not_exportable:
        raise InputError(f"{name} cannot be exported with its map: {model.map_not_exportable}")


def traced(module: nn.Module, inputs: Tensor | list[Tensor]) -> tuple[torch.export.ExportedProgram, int | None]:
    """The program of a module with a free batch size where its graph allows that (None), else for one image at a time (1).

    `inputs` are an example for two images. InputError for what cannot be traced.
    """
    module.eval()
    free = {0: torch.export.Dim.DYNAMIC}
    shapes, one = (free, inputs[:1]) if isinstance(inputs, Tensor) else ([free] * len(inputs), [part[:1] for part in inputs])
    with torch.no_grad(), quiet():
        module(inputs)  # fills caches: during tracing they would be filled with tensors without values
        for batch, given, dynamic in ((None, inputs, (shapes,)), (1, one, None)):
            try:
                return program_of(module, given, dynamic), batch
            except Exception as error:  # torch.export has errors of many kinds
                problem = error
    raise InputError(f"{type(module.model).__name__} cannot be traced by torch.export: {str(problem)[:500]}") from problem


def program_of(module: nn.Module, inputs: Any, dynamic: tuple | None) -> torch.export.ExportedProgram:
    """The program of a module, with constants folded and unused nodes removed."""
    graph = torch.export.export(module, (inputs,), dynamic_shapes=dynamic, strict=False).module(check_guards=False)
    fold(graph)
    return torch.export.export(torch.fx.GraphModule(graph, graph.graph), (inputs,), dynamic_shapes=dynamic, strict=False)


def fold(module: torch.fx.GraphModule) -> None:
    """Replace what depends on no input by its value, unless that is large and larger than what it is computed from."""
    values: dict[torch.fx.Node, Any] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            values[node] = attrgetter(node.target)(module)
        elif node.op == "call_function" and all(source in values for source in node.all_input_nodes):
            args, kwargs = torch.fx.map_arg((node.args, node.kwargs), values.__getitem__)
            value = node.target(*args, **kwargs)
            sources = sum(values[source].numel() for source in node.all_input_nodes if isinstance(values[source], Tensor))
            if not isinstance(value, Tensor) or value.numel() <= max(FOLDED, sources):
                values[node] = value
    for node, value in values.items():
        if node.op == "call_function" and isinstance(value, Tensor) and not node.users.keys() <= values.keys():
            module.register_buffer(f"folded_{node.name}", value.clone(memory_format=torch.contiguous_format))
            with module.graph.inserting_before(node):
                node.replace_all_uses_with(module.graph.get_attr(f"folded_{node.name}"))
    module.graph.eliminate_dead_code()


def proto_of(program: Any, opset: int) -> Any:
    """The program as ONNX's ModelProto, which it may be already."""
    return onnx_of(program, opset, NAMES) if isinstance(program, torch.export.ExportedProgram) else program


def to_onnx(program: Any, path: Path, opset: int) -> Callable[[dict], None]:
    """A function that writes the program, or ONNX's ModelProto, as ONNX with the metadata it is given."""
    import onnx

    proto = proto_of(program, opset)

    def write(metadata: dict) -> None:
        onnx.helper.set_model_props(proto, {KEY: json.dumps(metadata)})
        onnx.save(proto, path)
        set_seal(path)

    return write


def to_openvino(program: Any, path: Path, opset: int) -> Callable[[dict], None]:
    """The same by way of ONNX as OpenVINO's .xml and .bin, with all 32 bits."""
    import openvino

    proto = proto_of(program, opset)
    for tensor in [tensor for tensor in proto.graph.initializer if tensor.name == EXACT]:
        proto.graph.initializer.remove(tensor)  # OpenVINO would take an input with a value for a constant
    model = openvino_core().read_model(proto.SerializeToString())

    def write(metadata: dict) -> None:
        model.set_rt_info(json.dumps(metadata), [KEY, "metadata"])
        openvino.save_model(model, path, compress_to_fp16=False)
        set_seal(path)

    return write


def to_torch(program: torch.export.ExportedProgram, path: Path, opset: int) -> Callable[[dict], None]:
    """The same as torch's own archive, with the metadata in its file `blemish.json`."""
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # lines of source, with the paths of this machine

    def write(metadata: dict) -> None:
        archive = io.BytesIO()  # on a full disk torch's own writer of files ends the process
        with quiet():
            torch.export.save(program, archive, extra_files={f"{KEY}.json": json.dumps(metadata)})
        path.write_bytes(archive.getbuffer())

    return write


WRITERS = {"onnx": to_onnx, "openvino": to_openvino, "torch_export": to_torch}


def set_seal(path: Path) -> None:
    """Write into the metadata of a file the digest of its other bytes."""
    place, _, digest = seal(path)
    with path.open("r+b") as file:
        file.seek(place)
        file.write(digest.encode())
