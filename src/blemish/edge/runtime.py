"""Exported detectors at work with numpy and onnxruntime or openvino: no torch, and nothing outside the folder of this file.

    model = Model("model.onnx")
    for result in model.predict(["part.png", array]):
        result.score, result.p_value, result.decision, result.map, result.boxes

Files are read by `reading`, which needs Pillow, and for TIFF tifffile; arrays need neither. Boxes need SciPy.
"""

import base64
import hashlib
import json
import re
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cache, lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, overload

import numpy as np

from .calibration import p_values
from .errors import InputError, named
from .geometry import (
    Blend,
    Geometry,
    apply_ignore_mask,
    fill_masked,
    grid,
    ignore_mask_in_network,
    mask_to_network,
    mirrored,
    resize_nearest,
    to_image,
    to_network,
)
from .ranges import Range, doubt, range_of
from .result import Result

KEY = "blemish"  # of the metadata among a file's own metadata
EXACT = "float32"  # the input of a graph in two precisions that chooses this one
FORMAT = "blemish artefact 5"
SEAL, NO_SEAL = re.compile(rb"blake2b-([0-9a-f]{32})"), "blake2b-" + 32 * "0"  # in the metadata, and before it is known
ENGINES = {".onnx": "onnxruntime", ".xml": "openvino"}
OUTSIDE = "nothing of the image is inside the ROI of this detector; expected an image that has a part of it"

Run = Callable[..., Sequence[np.ndarray]]


class Model:
    """An exported detector; `metadata` is what was written into the file: method, threshold, calibration, preprocessing, parity and so on.

    `threads` for the engine, all of the machine if None. Of an export in two precisions the backbone is run in integers, and images whose
    score is near the threshold are scored again in float32; `exact` set to True: all are, and once. `twice` counts those scored again.
    InputError for a file that is damaged or no export of blemish.
    """

    exact = False
    twice = 0

    def __init__(self, path: str | Path, threads: int | None = None):
        try:
            text, self.run = self.load(Path(path), threads)
        except InputError:
            raise
        except Exception as error:  # each engine has errors of its own for a file it cannot read
            needs = f"; pip install {ENGINES.get(Path(path).suffix)}" if isinstance(error, ImportError) else ""
            raise InputError(f"{path}: cannot be opened ({type(error).__name__}: {str(error)[:300]}){needs}") from error
        self.metadata = metadata_of(text, path)
        self.threshold, self.calibration = self.metadata["threshold"], self.metadata["calibration"]

    def load(self, path: Path, threads: int | None) -> tuple[str | None, Run]:
        """The text of the metadata in a file, and the function that runs its graph."""
        check_file(path)
        return (by_onnxruntime if path.suffix == ".onnx" else by_openvino)(path, threads)

    @overload
    def predict(self, images: Iterator[Any], batch_size: int = 1, maps: bool = True) -> Iterator[Result]: ...
    @overload
    def predict(self, images: Any, batch_size: int = 1, maps: bool = True) -> list[Result]: ...
    def predict(self, images: Any, batch_size: int = 1, maps: bool = True) -> Any:
        """Results of one image or of several, in their order; from an iterator, such as a camera's frames, by an iterator.

        An image is a file, a picture of Pillow, or an array (H, W), (H, W, 3) or (H, W, 4) of uint8, uint16 or float32 in the file's own
        units, of any size unless `source` of the metadata fixes it. maps: False saves the time to bring maps to the images' own pixels.
        InputError for what cannot be used.
        """
        if isinstance(images, str | Path) or hasattr(images, "convert") or (isinstance(images, np.ndarray) and images.ndim < 4):
            images = [images]
        results = self._results(images, batch_size, maps)
        return results if isinstance(images, Iterator) else list(results)

    def _results(self, images: Any, batch_size: int, maps: bool) -> Iterator[Result]:
        for image, array, score, map in self.scored(images, batch_size):
            height, width = array.shape[:2]
            own = self.own_pixels(map, height, width) if maps and map is not None else None
            yield self.result(score, own, Path(image) if isinstance(image, str | Path) else None, array)

    def scored(self, images: Any, batch_size: int) -> Iterator[tuple[Any, np.ndarray, float, np.ndarray | None]]:
        """Each image with its array, score and map: (h, w) in the pixels of the network's input, by tiles in the image's own."""
        size, images = self.metadata["batch"] or batch_size, iter(images)
        while chosen := list(islice(images, 1 if self.metadata["tiling"] else size)):
            arrays = [pixels(image) for image in chosen]
            if self.metadata["tiling"]:
                with named(chosen[0]):
                    found = [self._by_tiles(arrays[0], size)]
            else:
                found = self._scored(*zip(*map(self._prepared, chosen, arrays), strict=True))
            yield from ((*one, *scores) for *one, scores in zip(chosen, arrays, found, strict=True))

    def _prepared(self, image: Any, array: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """The array of an image as the graph takes it, and the ignored pixels of that."""
        with named(image):
            check_values(array, self.metadata)
            inside = inside_of(*array.shape[:2], self.metadata)
            ignore_mask = ignore_mask_in_network(*array.shape[:2], geometry_of(self.metadata), inside)
            if ignore_mask is not None and ignore_mask.all():
                raise InputError(OUTSIDE)
            return to_input(fill_masked(array, inside, self.metadata["window"]), self.metadata), ignore_mask

    def _scored(self, batch: Sequence[np.ndarray], ignore_masks: Sequence[np.ndarray | None]) -> list[tuple[float, np.ndarray | None]]:
        band, threshold = self.metadata["band"], self.threshold
        found = self._run(batch, ignore_masks, self.exact)
        if self.exact or not band or threshold is None:
            return found
        near = [i for i, (score, _) in enumerate(found) if abs(score - threshold) <= band["width"]]
        if near:
            self.twice += len(near)
            for i, one in zip(near, self._run([batch[i] for i in near], [ignore_masks[i] for i in near], True), strict=True):
                found[i] = one
        return found

    def _run(self, batch: Sequence[np.ndarray], ignore_masks: Sequence, exact: bool) -> list[tuple[float, np.ndarray | None]]:
        scores, *maps = self.run(np.stack(batch), **({EXACT: np.array(True)} if exact else {}))
        rows = zip(map(float, scores), maps[0] if maps else [None] * len(scores), ignore_masks, strict=True)
        return [apply_ignore_mask(*row, self.metadata["map_share"]) for row in rows]

    def _by_tiles(self, array: np.ndarray, batch_size: int) -> tuple[float, np.ndarray | None]:
        """Score and map of an image from its tiles: their largest score, and their maps blended in the image's own pixels."""
        (height, width), geometry = array.shape[:2], geometry_of(self.metadata)
        side, overlap = self.metadata["tiling"]["side"], self.metadata["tiling"]["overlap"]
        check_values(array, self.metadata)
        inside = inside_of(height, width, self.metadata)
        array = fill_masked(array, inside, self.metadata["window"])
        best, rows, blend = -np.inf, [], Blend(height, width, side, overlap, lambda band: rows.append(band.copy()))
        tiles = iter(grid(width, height, side, overlap))
        while chunk := list(islice(tiles, batch_size)):
            batch = [to_input(mirrored(array[y : y + h, x : x + w], side), self.metadata) for x, y, w, h in chunk]
            seen = [None if inside is None else mirrored(inside[y : y + h, x : x + w], side) for x, y, w, h in chunk]
            ignore_masks = [None if one is None else mask_to_network(~one, geometry, True) for one in seen]
            for (x, y, _, _), (score, found) in zip(chunk, self._scored(batch, ignore_masks), strict=True):
                best = max(best, score)
                if found is not None:
                    blend.add(to_image(found, side, side, geometry), x, y)
        if inside is not None and best == -np.inf:
            raise InputError(OUTSIDE)
        return best, filled(np.concatenate(rows), inside) if rows else None

    def result(self, score: float, map: np.ndarray | None, path: Path | None = None, array: np.ndarray | None = None) -> Result:
        """The result of a score and a map in the pixels of an image, with its p-value and decision."""
        p = float(p_values(score, self.calibration)) if self.calibration else None
        decision, level = None if self.threshold is None else score > self.threshold, self.metadata["map_threshold"]
        image, inside = (None, None) if array is None else (shown(array, self.metadata), inside_of(*array.shape[:2], self.metadata))
        return Result(score, p, decision, map, path, image, self.threshold, level, inside=inside)

    def own_pixels(self, map: np.ndarray, height: int, width: int) -> np.ndarray:
        """A map in the pixels of its image, (height, width); outside the ROI it has its minimum inside."""
        if self.metadata["tiling"]:
            return map
        return filled(to_image(map, height, width, geometry_of(self.metadata)), inside_of(height, width, self.metadata))


def check_file(path: Path) -> None:
    """InputError unless the bytes of an export are those that were written: engines may crash on others, or compute wrong scores."""
    if path.suffix not in ENGINES:
        raise InputError(f"{path}: expected a file that ends with {' or '.join(ENGINES)}")
    try:
        _, written, digest = seal(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error}); expected an export of blemish") from error
    if written != digest:
        raise InputError(f"{path}: damaged, or no export of this version of blemish; copy the file again, or export the run again")


def seal(path: Path) -> tuple[int, str, str]:
    """(position of the seal in an export, the digest it holds, the digest of all other bytes, those of the .bin of an .xml included)."""
    content, *others = (file.read_bytes() for file in ([path, path.with_suffix(".bin")] if path.suffix == ".xml" else [path]))
    found = SEAL.search(content)
    first, last = found.span(1) if found else (0, 0)
    digest = hashlib.blake2b(digest_size=16)
    for part in (memoryview(content)[:first], memoryview(content)[last:], *others):
        digest.update(part)
    return first, content[first:last].decode(), digest.hexdigest()


def metadata_of(text: str | None, path: Path) -> dict:
    """The metadata in the text that an export holds; InputError if it is none, or of another version."""
    with suppress(ValueError, TypeError, KeyError):
        metadata = json.loads(text or "")
        if metadata["format"] == FORMAT:
            return metadata
    raise InputError(f"{path}: no metadata of a {FORMAT!r}; export the run again with this version of blemish")


def by_onnxruntime(path: Path, threads: int | None) -> tuple[str | None, Run]:
    """The text under KEY in an ONNX file, and the function that runs it: arrays in, arrays out."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads or 0, 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    text = session.get_modelmeta().custom_metadata_map.get(KEY)
    return text, lambda *inputs, **more: session.run(None, dict(zip(names, inputs, strict=True)) | more)


@cache
def openvino_core() -> Any:
    """The one Core of this process, kept until its end.

    Each Core sets a signal stack on its thread and later restores the one it found: if two end in the order they began, the second restores
    one that is gone, and the next signal, such as that of a child that ended, kills the process (openvino 2026.4).
    """
    import openvino

    return openvino.Core()


def by_openvino(path: Path, threads: int | None) -> tuple[str | None, Run]:
    """The same of an OpenVINO file, or of an ONNX file, which has no text there."""
    model = openvino_core().read_model(str(path))
    # without the hint, processors that have bfloat16 compute in it
    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32", **({"INFERENCE_NUM_THREADS": threads} if threads else {})}
    compiled = openvino_core().compile_model(model, "CPU", options)
    text = model.get_rt_info([KEY, "metadata"]).value if model.has_rt_info([KEY, "metadata"]) else None
    switch = [EXACT] if any(EXACT in value.names for value in model.inputs) else []  # ONNX has a value for it

    def run(*inputs: np.ndarray, **more: np.ndarray) -> list[np.ndarray]:
        given = [*inputs, *(more.get(name, np.array(False)) for name in switch)]
        return [np.array(value) for value in compiled(given).values()]

    return text, run


def pixels(image: Any) -> np.ndarray:
    """The array of a file or picture, or the array itself, without alpha; InputError unless it may be an image."""
    if not isinstance(image, str | Path) and not hasattr(image, "convert"):
        array = np.asarray(image)
        if array.ndim not in (2, 3) or array.shape[2:] not in ((), (3,), (4,)) or not array.size:
            raise InputError(f"an array of shape {array.shape}; expected grey (H, W) or colour (H, W, 3)")
        return array[..., :3] if array.ndim == 3 else array
    try:
        from .reading import array_of_picture, read
    except ImportError as error:
        raise InputError(f"{image}: files are read with Pillow, which is not here (pip install pillow); or hand over an array") from error
    return read(image) if isinstance(image, str | Path) else array_of_picture(image)


def check_values(array: np.ndarray, metadata: dict) -> None:
    """InputError for a dtype that neither training had nor the window names, and a warning for values that training did not have."""
    ranges, window, dtype = metadata["ranges"], metadata["window"], array.dtype.name
    if not ranges:
        return
    if dtype not in ranges and dtype not in window:
        raise InputError(
            f"an image of {dtype}, but training had only {', '.join(ranges)}; expected images converted as those were, or the export of a "
            f"run with data.window=[lo,hi] for {dtype}"
        )
    expected = Range(*ranges[dtype]) if dtype in ranges else range_of(*window[dtype])
    inside = inside_of(*array.shape[:2], metadata)
    if doubt(array if inside is None else array[inside], expected):
        warnings.warn(  # the same text each time, so that it is shown once
            f"images of other values than the {dtype} from {expected.lo:g} to {expected.hi:g} of the training: their scores mean little; "
            "convert them back, or train on such images",
            stacklevel=2,
        )


def to_input(array: np.ndarray, metadata: dict) -> np.ndarray:
    """An image or a tile as a graph takes it: (h, w, 3) uint8 or (3, h, w) float32 in [0, 1], see `input` of the metadata."""
    if metadata["source"]:
        if array.dtype != np.uint8 or list(array.shape[:2]) != metadata["source"]:
            raise InputError(f"an image {array.dtype} {array.shape[:2]}; expected uint8 of (H, W) = {metadata['source']}, as exported")
        return coloured(array)
    resized = to_network(array, metadata["window"], geometry_of(metadata))  # uint8, or float32 in [0, 1]
    if list(resized.shape[:2]) != metadata["size"]:
        raise InputError(f"an image of (H, W) = {resized.shape[:2]}; expected {metadata['size']}, as exported")
    if metadata["input"] == "uint8":
        if resized.dtype != np.uint8:
            raise InputError(f"an image of {array.dtype}; this export takes uint8, export with input=float for deep images")
        return coloured(resized)
    unit = resized / np.float32(255) if resized.dtype == np.uint8 else resized
    return np.ascontiguousarray(coloured(unit).transpose(2, 0, 1))


def shown(array: np.ndarray, metadata: dict) -> np.ndarray:
    """An image as uint8 of its own size, for display."""
    unit = to_network(array, metadata["window"], Geometry())
    return unit if unit.dtype == np.uint8 else (unit * 255).round().astype(np.uint8)


def coloured(array: np.ndarray) -> np.ndarray:
    """(h, w, 3) of (h, w) or (h, w, 3)."""
    return np.ascontiguousarray(array if array.ndim == 3 else np.repeat(array[..., None], 3, axis=2))


def geometry_of(metadata: dict) -> Geometry:
    return Geometry(metadata["image_size"], metadata["crop"], metadata["resize"])


def inside_of(height: int, width: int, metadata: dict) -> np.ndarray | None:
    """The pixels of an image (height, width) that are inside the ROI of the metadata; None for all."""
    roi = metadata.get("roi")
    return roi and resize_nearest(unpacked(roi["bits"], roi["height"], roi["width"]), height, width)


def filled(map: np.ndarray, inside: np.ndarray | None) -> np.ndarray:
    """A map (H, W) with its minimum `inside` the ROI everywhere outside."""
    return map if inside is None else np.where(inside, map, map[inside].min())


def packed(mask: np.ndarray) -> dict:
    """A mask (H, W) bool as JSON can hold it."""
    bits = base64.b64encode(zlib.compress(np.packbits(mask).tobytes(), 9)).decode("ascii")
    return {"height": mask.shape[0], "width": mask.shape[1], "bits": bits}


@lru_cache(maxsize=4)
def unpacked(bits: str, height: int, width: int) -> np.ndarray:
    """The mask (H, W) bool that was `packed`."""
    flat = np.frombuffer(zlib.decompress(base64.b64decode(bits)), np.uint8)
    return np.unpackbits(flat, count=height * width).reshape(height, width).astype(bool)
