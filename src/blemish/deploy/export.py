"""A run as one file that needs no blemish: ONNX, torch's exported program or OpenVINO, checked against the run on real images."""

import io
import json
from collections.abc import Callable, Iterable, Sequence
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
from blemish.edge.checks import check_choice, check_number, check_size, check_switch, check_whole
from blemish.edge.errors import InputError
from blemish.edge.geometry import GREY, middle, strips_of
from blemish.edge.reading import file_digest, read
from blemish.edge.runtime import FORMAT, KEY, NO_SEAL, Model, Run, openvino_core, packed, seal
from blemish.features.engine import onnx_of, quiet
from blemish.files import atomic_write, remove_stale, replacing
from blemish.run.checkpoint import load, newest_run
from blemish.run.config import build
from blemish.run.record import check_archive, read_record
from blemish.run.results import Preprocessing, Rule, images_at, preprocessing_of
from blemish.run.tiling import TOGETHER, score_image
from blemish.types import UNKNOWN, Prediction

ENDINGS = {"onnx": ".onnx", "torch_export": ".pt2", "openvino": ".xml"}
NEEDS = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("onnx", "onnxscript", "openvino"), "torch_export": ()}
NAMES = (["image"], ["score", "map"])  # of inputs and outputs, the map where there is one
FOLDED = 2**20  # values of a constant that may be larger than what it is computed from


class Parity(NamedTuple):
    """How far an export is from its run on the same images."""

    images: int
    score_difference: float  # the largest
    score_scale: float  # what it is measured by, see `spread`
    map_difference: float | None  # the largest of any pixel; None without maps
    map_scale: float | None
    flipped: int  # decisions that are not the run's

    def holds(self, tolerance: float, map_tolerance: float, flips: int) -> bool:
        """Whether no difference is above its share of its scale, and no more decisions than `flips` differ."""
        close = self.score_difference <= tolerance * self.score_scale and self.flipped <= flips
        return close and (self.map_difference is None or self.map_difference <= map_tolerance * self.map_scale)

    def __str__(self) -> str:
        found = [("a score", self.score_difference, self.score_scale), ("a map's pixel", self.map_difference, self.map_scale)]
        shares = [f"of {name} {d:.3g}, {d / scale:.2g} of a spread of {scale:.3g}" for name, d, scale in found if d is not None]
        return f"{self.images} images: largest difference {'; '.join(shares)}; {self.flipped} decisions flipped"


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
    images = chosen(cfg.images, run, saved.data, cfg.n)
    limits = {key: cfg[key] for key in ("tolerance", "map_tolerance", "flips")}
    weights = path.with_suffix(".bin") if cfg.format == "openvino" else None
    remove_stale(path.parent)
    with replacing(path, weights), atomic_write(path) as temporary:
        module = ExportModule(model, size, cfg.input, cfg.source, preprocessing, cfg.maps)
        program, batch = traced(module, example(cfg.input, cfg.source or size))
        metadata = metadata_of_run(cfg, saved, model, preprocessing) | {"size": size, "batch": batch}
        try:
            write = WRITERS[cfg.format](program, temporary, cfg.opset)
            write(metadata)
            parity = compare(model, preprocessing, (Program if cfg.format == "torch_export" else Model)(temporary), images)
            if not parity.holds(**limits):
                allowed = ", ".join(f"{name}={value}" for name, value in limits.items())
                raise InputError(f"{path}: not kept, it differs from its run ({parity}); expected {allowed}, each a share of its spread")
            write({**metadata, "parity": {**parity._asdict(), **limits}})
            if weights:  # before the .xml that needs them
                temporary.with_suffix(".bin").replace(weights)
        finally:
            temporary.with_suffix(".bin").unlink(missing_ok=True)
    return path, parity


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
    if absent := [name for name in NEEDS[cfg.format] if not find_spec(name)]:
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


def to_onnx(program: torch.export.ExportedProgram, path: Path, opset: int) -> Callable[[dict], None]:
    """A function that writes the program as ONNX with the metadata it is given."""
    import onnx

    proto = onnx_of(program, opset, NAMES)

    def write(metadata: dict) -> None:
        onnx.helper.set_model_props(proto, {KEY: json.dumps(metadata)})
        onnx.save(proto, path)
        set_seal(path)

    return write


def to_openvino(program: torch.export.ExportedProgram, path: Path, opset: int) -> Callable[[dict], None]:
    """The same by way of ONNX as OpenVINO's .xml and .bin, with all 32 bits."""
    import openvino

    model = openvino_core().read_model(onnx_of(program, opset, NAMES).SerializeToString())

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


@torch.inference_mode()
def compare(model: Detector, preprocessing: Preprocessing, other: Model, images: Iterable[tuple[Path, Sample]]) -> Parity:
    """Scores, maps and decisions of the run, from its own preprocessing of each image, against those of the export from its file.

    Of a sample that is a part of a file the export is given the pixels.
    """
    scores, peaks, differences, map_differences, flipped = [], [], [], [], 0
    for path, sample in images:
        array = loaded(path, sample)
        score, map = score_of_run(model, preprocessing, array, other.metadata["maps"])
        ((*_, found, found_map),) = other.scored([array if sample.tile else path], TOGETHER)
        scores.append(score)
        differences.append(abs(found - score))
        flipped += other.threshold is not None and (score > other.threshold) != (found > other.threshold)
        if found_map is not None:
            peaks.append(float(map.max()))
            map_differences.append(float(np.abs(found_map - map).max()))
    if not np.isfinite(differences + map_differences).all():
        differences = [float("inf")]
    calibration = model.calibration.cpu().double().numpy()
    maps = (max(map_differences), spread(calibration[:, 1], peaks)) if map_differences else (None, None)
    return Parity(len(scores), max(differences), spread(calibration[:, 0], scores), *maps, int(flipped))


def score_of_run(model: Detector, preprocessing: Preprocessing, array: np.ndarray, maps: bool) -> tuple[float, np.ndarray | None]:
    """Score and map of an image by the run: (h, w) in the pixels of the network's input, or by tiles in the image's own.

    InputError where an export without `maps` could not have the score.
    """
    geometry, window, tile, *_ = preprocessing
    inside = preprocessing.inside(None, *array.shape[:2])
    if tile:
        score, map = score_image(model, array, preprocessing, TOGETHER, None, inside)
        map, by_map = None if map is None else map[:], map is not None and inside is not None
    else:
        found = model(prepare(array, window, geometry, inside)[None])
        ignored = ignore_mask(*array.shape[:2], geometry, inside)
        by_map = found.map is not None and ignored is not None and model.map_share is not None
        score, map = found if ignored is None else apply_ignore_mask(Prediction(*found), ignored[None], model.map_share)
        score, map = float(score), None if map is None else map[0].numpy()
    if by_map and not maps:
        raise InputError("maps=false: the score is that of the map inside the ROI or the letterbox; expected maps=true")
    return score, map


def spread(normal: Sequence[float], shown: Sequence[float]) -> float:
    """The standard deviation of the scores of held-out normal images; if there are none or all are equal, of the images compared, and
    if these are equal too, their magnitude."""
    for values in (np.asarray(normal), np.asarray(shown)):
        if len(values) > 1 and values.std(ddof=1) > 1e-6 * np.abs(values).max():
            return float(values.std(ddof=1))
    return float(np.abs(shown).max()) or 1.0


def chosen(folder: str | None, run: Path, data: Any, n: int) -> list[tuple[Path, Sample]]:
    """At most n images, evenly spaced in their order: of a folder, or those that a run was tested on, with their rows of its manifest.

    `data` is the config of the run's data, which knows where they are.
    """
    if not folder:
        module = build(data)
        module.prepare_data()  # drawn images are drawn again where they are gone
        found = [(module.root / sample.path, sample) for sample in read_manifest(run / "manifest.csv") if sample.split == "test"]
    elif not Path(folder).expanduser().exists():
        raise InputError(f"images={folder}: no such file or folder")
    else:
        found = [(path, Sample(path.name, "test", UNKNOWN, "unknown")) for path in images_at(folder)]
    if not found:
        raise InputError(f"images={folder}: no images; expected images=FOLDER where the run was not tested")
    return [found[i] for i in np.unique(np.linspace(0, len(found) - 1, min(n, len(found))).round().astype(int))]


def loaded(path: Path, sample: Sample) -> np.ndarray:
    """The decoded image, or the tile of it that the sample is."""
    try:
        return cut(path.parent, sample, read(path))
    except InputError as error:
        raise InputError(f"{error}; images come from the run's own test: where they have moved, give images=FOLDER") from None
