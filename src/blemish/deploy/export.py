"""A run as one file that needs no blemish: ONNX, torch's exported program or OpenVINO, checked against the run on real images."""

import contextlib
import errno
import io
import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blemish.data.dataset import cut
from blemish.data.images import ignore_mask, prepare
from blemish.data.manifest import Sample, read_manifest
from blemish.detector import Detector, apply_ignore_mask
from blemish.edge import runtime
from blemish.edge.calibration import conformal_threshold
from blemish.edge.checks import check_choice, check_number, check_size, check_switch, check_whole
from blemish.edge.errors import InputError
from blemish.edge.geometry import GREY, Geometry, middle, strips_of
from blemish.edge.reading import file_digest, read
from blemish.edge.runtime import FORMAT, KEY, NO_SEAL, Model, metadata_of, seal
from blemish.features.extractor import Features
from blemish.files import no_room, remove_stale, replacing
from blemish.run.record import check_archive, read_record
from blemish.run.results import Preprocessing, images_at, preprocessing_of
from blemish.run.tiling import TOGETHER, score_image
from blemish.types import UNKNOWN, Prediction

log = logging.getLogger(__name__)

ENDINGS = {"onnx": ".onnx", "torch_export": ".pt2", "openvino": ".xml"}
NEEDS = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("onnx", "onnxscript", "openvino"), "torch_export": ()}
NAMES = (["image"], ["score", "map"])  # of what goes in and comes out, the map where there is one
FOLDED = 2**20  # values of a constant that may be larger than what it is computed from
LARGEST = 2**31 - 2**20  # bytes of constants: what a protobuf may hold, less its graph


class Parity(NamedTuple):
    """How far an artefact is from its run on the same images."""

    images: int
    score_difference: float  # the largest
    score_scale: float  # what it is measured by, see `spread`
    map_difference: float | None  # the largest of any pixel; None without maps
    map_scale: float | None
    flipped: int  # decisions that are not the run's

    def holds(self, tolerance: float, map_tolerance: float, flips: int) -> bool:
        """Whether no difference is above its share of its scale, and no more decisions than `flips` differ."""
        near = self.score_difference <= tolerance * self.score_scale and self.flipped <= flips
        return near and (self.map_difference is None or self.map_difference <= map_tolerance * self.map_scale)

    def __str__(self) -> str:
        def share(difference: float, scale: float) -> str:
            return f"{difference:.3g}, {difference / scale:.2g} of a spread of {scale:.3g}"

        text = f"{self.images} images: largest score difference {share(self.score_difference, self.score_scale)}; "
        if self.map_difference is not None:
            text += f"of a map's pixel {share(self.map_difference, self.map_scale)}; "
        return text + f"{self.flipped} decisions flipped"


class ExportModule(nn.Module):
    """Images as the artefact takes them to (score (B,), map (B, H, W)), or to (score,) alone.

    input=float: (B, 3, H, W) float32 in [0, 1]. input=uint8: (B, H, W, 3) uint8; with `source` (H, W) they have that size and are placed
    in here, by the whole numbers that torch resizes bytes with.
    """

    def __init__(
        self, model: Detector, size: tuple[int, int], input: str, source: Sequence[int] | None, preprocessing: Preprocessing, maps: bool
    ):
        super().__init__()
        check_exportable(model, maps)
        self.model, self.size, self.bytes, self.maps, self.crop = model, size, input == "uint8", maps, preprocessing.geometry.crop
        self.steps, self.padding = [], []
        if source and preprocessing.geometry.size:
            resized, padded = preprocessing.geometry.resized(*source), preprocessing.geometry.padded(*source)
            for axis, length, pixels in ((3, source[1], resized[1]), (2, source[0], resized[0])):
                if length != pixels:
                    self.steps.append((axis, *self.strips(axis, length, pixels)))
            rows, columns = middle(padded, resized)
            self.padding = [columns.start, padded[1] - columns.stop, rows.start, padded[0] - rows.stop]  # pixels of a letterbox

    def strips(self, axis: int, length: int, pixels: int) -> tuple[int, list[tuple[int, int, str]]]:
        bits, strips = strips_of(length, pixels, exact=True)
        for i, (_, _, weights) in enumerate(strips):
            self.register_buffer(f"weights{axis}_{i}", torch.from_numpy(weights.T.copy() if axis == 3 else weights))
        return bits, [(of.start, of.stop, f"weights{axis}_{i}") for i, (_, of, _) in enumerate(strips)]

    def placed(self, x: Tensor) -> Tensor:
        x = x.double() if self.steps else x  # the whole numbers do not fit a float32
        for axis, bits, strips in self.steps:
            parts = []
            for first, last, name in strips:
                part, weights = x.narrow(axis, first, last - first), getattr(self, name)
                parts.append(part @ weights if axis == 3 else weights @ part)
            x = ((torch.cat(parts, axis) + 2 ** (bits - 1)) * 2.0**-bits).floor().clamp(0, 255)
        if any(self.padding):
            x = F.pad(x, self.padding, value=float(GREY))
        if self.crop and tuple(x.shape[-2:]) != self.size:
            top, left = ((side - self.crop) // 2 for side in x.shape[-2:])
            x = x[..., top : top + self.crop, left : left + self.crop]
        return x.float() / 255

    def unit(self, image: Tensor) -> Tensor:
        """Images (B, 3, h, w) in [0, 1] as the method takes them."""
        return self.placed(image.permute(0, 3, 1, 2).float()) if self.bytes else image

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        score, map = self.model(self.unit(image))
        return (score, map) if self.maps and map is not None else (score,)


class Program(Model):
    """A `torch_export` artefact, run by torch."""

    def __init__(self, path: Path):
        extra = {f"{KEY}.json": ""}
        try:
            check_archive(path)
            program = torch.export.load(path, extra_files=extra).module()
        except Exception as error:  # of many kinds
            raise InputError(
                f"{path}: cannot be opened ({type(error).__name__}: {str(error)[:300]}); expected an export of blemish"
            ) from error
        self.metadata = metadata_of(extra[f"{KEY}.json"], path)
        self.threshold, self.calibration = self.metadata["threshold"], sorted(self.metadata["calibration"])
        self.run = lambda batch: [value.numpy() for value in program(torch.from_numpy(batch))]


def export_run(cfg: Any, load: Callable, build: Callable) -> tuple[Path, Parity]:
    """Export a run folder as configs/export.yaml says; returns the file and how far it is from the run.

    `load` gives the config and the method of `cfg.run`, `build` the data module of a config.
    """
    run = Path(cfg.run)
    check_choice("", ENDINGS, format=cfg.format)
    check_choice("", ("uint8", "float"), input=cfg.input)
    check_size(source=cfg.source, size=cfg.size)
    check_switch("", maps=cfg.maps)
    check_whole("", 1, n=cfg.n, opset=cfg.opset)
    check_number("", "[0, inf)", tolerance=cfg.tolerance, map_tolerance=cfg.map_tolerance)
    check_whole("", 0, flips=cfg.flips)
    saved, model = load(run, "cpu")
    preprocessing = preprocessing_of(saved)
    record = read_record(run) or {}
    metadata = {
        "method": record.get("method") or type(model).__module__.rpartition(".")[2],
        "alpha": saved.alpha,
        "digests": {
            "checkpoint": file_digest(run if run.is_file() else run / "model.ckpt"),
            "weights": record.get("weights_digest"),
            "manifest": record.get("manifest_digest"),
        },
    }
    path = Path(cfg.output) if cfg.output else (run.parent if run.is_file() else run) / "export" / f"model{ENDINGS.get(cfg.format, '')}"
    limits = {"tolerance": cfg.tolerance, "map_tolerance": cfg.map_tolerance, "flips": cfg.flips}
    source, size = (list(pair) if pair else None for pair in (cfg.source, cfg.size))
    images = (both(*image) for image in chosen(cfg.images, run, partial(build, saved.data), cfg.n))
    with replacing(path, path.with_suffix(".bin") if cfg.format == "openvino" else None):
        return export(model, preprocessing, metadata, images, path, cfg.format, cfg.input, source, size, cfg.maps, cfg.opset, limits)


def geometry_metadata(geometry: Geometry) -> dict:
    """As `runtime.geometry_of` reads them."""
    return {"image_size": geometry.size, "crop": geometry.crop, "resize": geometry.resize}


def export(
    model: Detector,
    preprocessing: Preprocessing,
    metadata: dict,
    images: Iterable[tuple[Path | np.ndarray, np.ndarray]],
    path: Path,
    format: str,
    input: str,
    source: list[int] | None,
    size: list[int] | None,
    maps: bool,
    opset: int,
    limits: Mapping[str, float],
) -> tuple[Path, Parity]:
    """Write a fitted detector as an artefact to `path`, compare the two on images, see `both`, and keep it if they agree.

    `metadata` is stored in it; see `ExportModule` for `input` and `source`, `Parity.holds` for what `limits` has.
    `size` (H, W) is that of the images of a run that has no
    image_size. InputError where the method has no such export or the artefact differs; nothing is left then.
    """
    side = preprocessing.geometry.side
    if preprocessing.tile and (size or source):
        raise InputError(
            f"size={size}, source={source}: this run scores an image by its tiles, of {preprocessing.tile} pixels; leave both out"
        )
    if size and side:
        raise InputError(
            f"size={size}: this run has image_size={preprocessing.geometry.size} and crop={preprocessing.geometry.crop}; leave size out"
        )
    if preprocessing.roi and preprocessing.roi.folder:
        raise InputError(f"data.roi={preprocessing.roi.folder}: a mask for each image, which no export holds; use predict run=…")
    check(format, input, source, preprocessing, path)
    side = side or preprocessing.tile
    size = [side, side] if side else size or source
    if not size:
        raise InputError("size: this run takes images of any size, an export of one alone; expected size=[height,width]")
    program, batch = traced(
        ExportModule(model.cpu().eval(), tuple(size), input, source, preprocessing, maps), example(input, source or size)
    )
    calibration = model.calibration[:, 0].double()
    threshold = conformal_threshold(calibration, metadata["alpha"]).value
    metadata = {
        "format": FORMAT,
        "blemish": version("blemish"),
        **metadata,
        "threshold": threshold,
        "map_threshold": map_threshold(model, metadata["alpha"]) if maps else None,
        "calibration": sorted(calibration.tolist()),
        "input": input,
        "source": source,
        "size": size,
        **geometry_metadata(preprocessing.geometry),
        "tiling": {"side": preprocessing.tile, "overlap": preprocessing.overlap} if preprocessing.tile else None,
        "roi": runtime.packed(preprocessing.roi.mask) if preprocessing.roi else None,
        "window": {dtype: list(ends) for dtype, ends in preprocessing.window.items()},
        "ranges": model.ranges,
        "maps": maps,
        "batch": batch,
        "opset": opset if format != "torch_export" else None,
        "seal": NO_SEAL if format != "torch_export" else None,  # an archive has sums of its own
        "exporter": f"torch {torch.__version__}" + (f", openvino {version('openvino')}" if format == "openvino" else ""),
    }
    with folder_aside(path) as (temporary, final):
        written = WRITERS[format](program, temporary / path.name, opset)
        written(metadata)
        parity = compare(model, preprocessing, (Program if format == "torch_export" else Model)(temporary / path.name), images)
        if not parity.holds(**limits):
            allowed = ", ".join(f"{name}={value}" for name, value in limits.items())
            raise InputError(f"{path}: not kept, as it differs from its run ({parity}); allowed are {allowed}, each a share of its spread")
        written({**metadata, "parity": {**parity._asdict(), **limits}})
        final()
    return path, parity


def example(input: str, size: Sequence[int]) -> Tensor:
    """Two images as a `ExportModule` takes them."""
    bytes = torch.randint(256, (2, *size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return bytes if input == "uint8" else bytes.permute(0, 3, 1, 2) / 255


def check(format: str, input: str, source: list[int] | None, preprocessing: Preprocessing, path: Path) -> None:
    """InputError for options that do not exist, do not fit each other, or need what is not installed."""
    if format not in ENDINGS:
        raise InputError(f"format={format}: expected {', '.join(ENDINGS)}")
    if input not in ("uint8", "float"):
        raise InputError(f"input={input}: expected uint8 (B, H, W, 3), or float (B, 3, H, W) in [0, 1]")
    if source and (input != "uint8" or len(source) != 2 or min(source) < 8):
        raise InputError(f"source={source}: expected [height,width] of all images, of 8 pixels or more, together with input=uint8")
    if source and preprocessing.geometry.crop and preprocessing.geometry.crop > (preprocessing.geometry.size or min(source)):
        raise InputError(f"source={source}: smaller than the run's crop of {preprocessing.geometry.crop}")
    if path.suffix != ENDINGS[format]:
        raise InputError(f"output={path}: expected a name that ends with {ENDINGS[format]}")
    if absent := [name for name in NEEDS[format] if not find_spec(name)]:
        raise InputError(f"format={format}: needs {', '.join(absent)}, which are not here; pip install 'blemish[export]'")


def map_threshold(model: Detector, alpha: float) -> float | None:
    """A method's own threshold of its maps, or the calibration's."""
    own = model.map_threshold
    return conformal_threshold(model.calibration[:, 1], alpha).value if own is None else own


def traced(graph: nn.Module, given: Any) -> tuple[torch.export.ExportedProgram, int | None]:
    """The graph of a `form` with a free batch size where it allows that (None), else for one image at a time (1).

    `given` is an example of its input, of two images: a tensor or a list of them. InputError for what is no graph.
    """
    graph.eval()
    free, one = {0: torch.export.Dim.DYNAMIC}, given[:1] if isinstance(given, Tensor) else [part[:1] for part in given]
    with torch.no_grad(), expected_warnings():
        graph(given)  # what is computed once and kept: traced first, it would keep tensors without values
        try:
            return program_of(graph, given, (free if isinstance(given, Tensor) else [free] * len(given),)), None
        except Exception as error:  # torch.export has errors of many kinds
            log.info("no free batch size: %s", str(error)[:200])
        try:
            return program_of(graph, one, None), 1
        except Exception as error:
            raise InputError(f"{type(graph.model).__name__} cannot be traced by torch.export: {str(error)[:500]}") from error


def program_of(graph: nn.Module, given: Any, dynamic: tuple | None) -> torch.export.ExportedProgram:
    """The program of a graph, with constants computed once, and without what is not used."""
    module = torch.export.export(graph, (given,), dynamic_shapes=dynamic, strict=False).module(check_guards=False)
    fold(module)
    return torch.export.export(torch.fx.GraphModule(module, module.graph), (given,), dynamic_shapes=dynamic, strict=False)


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


def splits(model: Detector) -> bool:
    """Whether a method is `score` of the maps of its backbone and nothing else."""
    return isinstance(getattr(model, "backbone", None), Features) and type(model).forward is Detector.forward


def check_exportable(model: Detector, maps: bool) -> None:
    """InputError for a method that has no export, or none with its map, with what to use instead."""
    name = type(model).__module__.rpartition(".")[2]
    if model.not_exportable:
        raise InputError(f"{name} cannot be exported: {model.not_exportable}")
    if maps and model.map_not_exportable:
        raise InputError(f"{name} cannot be exported with its map: {model.map_not_exportable}")


def to_onnx(
    program: torch.export.ExportedProgram, path: Path, opset: int, names: tuple[list[str], list[str]] | None = NAMES
) -> Callable[[dict], None]:
    """Write the program as ONNX with the names of its inputs and outputs; what is returned writes it anew with metadata."""
    import onnx

    values = [value for value in [*program.state_dict.values(), *program.constants.values()] if isinstance(value, Tensor)]
    size = sum(value.numel() * value.element_size() for value in values)
    if size > LARGEST:
        raise InputError(
            f"{size / 2**30:.1f} GiB of constants, of which an ONNX file holds 2; use format=torch_export or a smaller image_size"
        )
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    inputs, outputs = names or (None, None)
    with expected_warnings():
        exported = torch.onnx.export(program, dynamo=True, opset_version=opset, verbose=False, input_names=inputs, output_names=outputs)
    ClearMetadataAndDocStringPass()(exported.model)  # every node's lines of source, with the paths of this machine
    exported.save(path, external_data=False)

    def write(metadata: dict) -> None:
        proto = onnx.load(path)
        onnx.helper.set_model_props(proto, {KEY: json.dumps(metadata)})
        onnx.save(proto, path)
        set_seal(path)

    return write


def to_openvino(program: torch.export.ExportedProgram, path: Path, opset: int) -> Callable[[dict], None]:
    """Write the program, by way of ONNX, as OpenVINO's .xml and .bin with all bits."""
    import openvino

    between = path.with_suffix(".onnx")
    to_onnx(program, between, opset)
    converted = openvino.convert_model(between)
    between.unlink()

    def write(metadata: dict) -> None:
        converted.set_rt_info(json.dumps(metadata), [KEY, "metadata"])
        openvino.save_model(converted, path, compress_to_fp16=False)
        set_seal(path)

    return write


def set_seal(path: Path) -> None:
    """Put into the metadata of a written file the digest of its other bytes."""
    place, _, digest = seal(path)
    with path.open("r+b") as file:
        file.seek(place)
        file.write(digest.encode())


def to_torch(program: torch.export.ExportedProgram, path: Path, opset: int) -> Callable[[dict], None]:
    """Write the program as torch's own archive, with metadata beside it in `blemish.json`."""
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # lines of source, with the paths of this machine

    def write(metadata: dict) -> None:
        whole = io.BytesIO()  # on a full disk torch's own writer of files ends the process
        with expected_warnings():
            torch.export.save(program, whole, extra_files={f"{KEY}.json": json.dumps(metadata)})
        path.write_bytes(whole.getbuffer())

    return write


WRITERS = {"onnx": to_onnx, "openvino": to_openvino, "torch_export": to_torch}


@torch.inference_mode()
def compare(model: Detector, preprocessing: Preprocessing, other: Model, images: Iterable[tuple[Path | np.ndarray, np.ndarray]]) -> Parity:
    """Scores, maps and decisions of the run, from its own preprocessing of each image, against those of the artefact from its file."""
    scores, differences, map_differences, flipped, peaks = [], [], [], 0, []
    for image, array in images:
        score, map = of_run(model, preprocessing, array, other.metadata["maps"])
        (found,) = other.predict([image], TOGETHER)
        scores.append(score)
        differences.append(abs(found.score - score))
        flipped += other.threshold is not None and (score > other.threshold) != found.decision
        if found.map is not None:
            peaks.append(float(map.max()))
            map_differences.append(float(np.abs(found.map - map).max()))
    if not np.isfinite(differences + map_differences).all():
        differences = [float("inf")]
    calibration = model.calibration.cpu().double().numpy()
    maps = (max(map_differences), spread(calibration[:, 1], peaks)) if map_differences else (None, None)
    return Parity(len(scores), max(differences), spread(calibration[:, 0], scores), *maps, int(flipped))


def of_run(model: Detector, preprocessing: Preprocessing, array: np.ndarray, maps: bool) -> tuple[float, np.ndarray | None]:
    """Score and map of an image as the run has them: (h, w) in the pixels of the network's input, or by tiles in the image's own.

    InputError where an artefact without `maps` could not have the score.
    """
    size = array.shape[:2]
    impossible = "maps=false: the score is the largest value of the map where images are looked at; expected maps=true"
    inside = preprocessing.roi and preprocessing.roi.inside(None, *size)
    if preprocessing.tile is not None:
        score, map = score_image(
            model,
            array,
            preprocessing.window,
            preprocessing.geometry.side,
            preprocessing.tile,
            preprocessing.overlap,
            TOGETHER,
            None,
            inside,
        )
        if inside is not None and map is not None and not maps:
            raise InputError(impossible)
        return score, None if map is None else map[:]
    score, map = model(prepare(array, preprocessing.window, preprocessing.geometry, inside)[None])
    if (where := ignore_mask(*size, preprocessing.geometry, inside)) is not None:
        if map is not None and not maps and float(score) == float(map.max()):
            raise InputError(impossible)
        score, map = apply_ignore_mask(Prediction(score, map), where[None])
    return float(score), None if map is None else map[0].numpy()


def spread(normal: Sequence[float], shown: Sequence[float]) -> float:
    """The standard deviation of the scores of held-out normal images; where there are none or all are equal, of the images compared, and
    where these are equal too, their magnitude."""
    for values in (np.asarray(normal), np.asarray(shown)):
        if len(values) > 1 and values.std(ddof=1) > 1e-6 * np.abs(values).max():
            return float(values.std(ddof=1))
    return float(np.abs(shown).max()) or 1.0


def chosen(folder: str | None, run: Path, data: Callable, n: int) -> list[tuple[Path, Sample]]:
    """At most n images, evenly spaced in their order: of a folder, or those that a run was tested on, with their rows of its manifest.

    `data` makes the run's data module, which knows where they are.
    """
    if not folder:
        module = data()
        module.prepare_data()  # drawn images are drawn again where they are gone
        found = [(module.root / sample.path, sample) for sample in read_manifest(run / "manifest.csv") if sample.split == "test"]
    elif not Path(folder).expanduser().exists():
        raise InputError(f"images={folder}: no such file or folder")
    else:
        found = [(path, Sample(path.name, "test", UNKNOWN, "unknown")) for path in images_at(folder)]
    if not found or n < 1:
        raise InputError(f"images={folder}, n={n}: no images; expected n ≥ 1, and images=FOLDER where the run was not tested")
    return [found[i] for i in np.unique(np.linspace(0, len(found) - 1, min(n, len(found))).round().astype(int))]


def loaded(path: Path, sample: Sample) -> np.ndarray:
    """The decoded image, or the tile of it that the sample is."""
    try:
        return cut(path.parent, sample, read(path))
    except InputError as error:
        raise InputError(f"{error}; images come from the run's own test: where they have moved, give images=FOLDER") from None


def both(path: Path, sample: Sample) -> tuple[Path | np.ndarray, np.ndarray]:
    """An image for the artefact and for the run: its file, but the pixels of a sample that is a part of a file, and its pixels."""
    array = loaded(path, sample)
    return (array if sample.tile else path), array


@contextlib.contextmanager
def folder_aside(path: Path) -> Iterator[tuple[Path, Callable[[], None]]]:
    """A temporary folder beside a path, and what moves all its files there; the folder is gone at the end."""
    temporary = path.parent / f".{os.getpid()}-{os.urandom(4).hex()}"
    try:
        temporary.mkdir(parents=True)
        remove_stale(path.parent)

        def move() -> None:
            for file in sorted(temporary.iterdir()):  # .bin before the .xml that needs it
                file.replace(path.parent / file.name)

        yield temporary, move
    except (OSError, RuntimeError) as error:
        full = no_room(error, path.parent)
        if not (full or isinstance(error, OSError)):
            raise
        why = os.strerror(errno.ENOSPC) if full else error.strerror or error
        raise InputError(f"{path}: cannot be written ({why}); choose another place with output=PATH") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def expected_warnings() -> Iterator[None]:
    """Leave out what tracing and the ONNX exporter say of torch's own code."""
    loud = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loud]
    for logger in loud:
        logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)  # of torch 2.14 and onnxscript 0.7 in their own code
        warnings.filterwarnings("ignore", message="No complete tensor found in the group")  # buffers that are empty share one address
        yield
    for logger, level in zip(loud, levels, strict=True):
        logger.setLevel(level)
