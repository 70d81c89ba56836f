"""Exported detectors at work with numpy and onnxruntime: no torch, so that the folder of this file may travel by itself.

    model = Model("model.onnx")
    for result in model.predict(["part.png", array]):
        result.score, result.p_value, result.decision, result.map

Files are read by `reading`, which needs Pillow, and for TIFF tifffile; arrays need neither. `.xml` files are run by openvino.
"""

import base64
import bisect
import hashlib
import json
import re
import warnings
import zlib
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

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
    nearest,
    to_image,
    to_network,
)
from .ranges import Range, doubt, range_of

KEY = "blemish"  # of the metadata among a file's metadata
FORMAT = "blemish artefact 3"
SEAL, NO_SEAL = re.compile(rb"blake2b-([0-9a-f]{32})"), "blake2b-" + 32 * "0"  # among the metadata, and before it is known
SUFFIXES = {".onnx": "onnxruntime", ".xml": "openvino"}

Run = Callable[..., Sequence[np.ndarray]]


class Result(NamedTuple):
    """The result of one image."""

    score: float  # larger is more anomalous
    p_value: float | None  # (1 + normal images held out that score at least as high) / (1 + all of them); None without any
    decision: bool | None  # anomalous: score > threshold; None without a threshold
    map: np.ndarray | None  # (h, w) float32 in the pixels of the network's input, or by tiles in the image's own; None without one


class Model:
    """An exported detector; `metadata` is what was written into it: method, threshold, calibration, preprocessing, parity and the like.

    `threads` is how many the engine may use, all of the machine's if None. InputError for a file that is no artefact of blemish.
    """

    def __init__(self, path: str | Path, threads: int | None = None):
        self.metadata, self.run = opened(Path(path), threads)
        if self.metadata.get("format") != FORMAT:
            raise InputError(f"{path}: format {self.metadata.get('format')!r}; expected {FORMAT!r}, export the run again with this version")
        self.threshold, self.calibration = self.metadata["threshold"], sorted(self.metadata["calibration"])

    def predict(self, images: Any, batch_size: int = 1) -> list[Result]:
        """Results of one image or of many, in their order.

        An image is a file, or an array (H, W) or (H, W, 3) of uint8, uint16 or float32 in the file's own units, of any size unless
        `source` of the metadata fixes it. InputError for what cannot be used.
        """
        if isinstance(images, str | Path) or (isinstance(images, np.ndarray) and images.ndim < 4):
            images = [images]
        size = batch_size if self.metadata["batch"] is None else self.metadata["batch"]
        found: list[Result] = []
        waiting: list[tuple[np.ndarray, np.ndarray | None]] = []
        for image in images:
            array = pixels(image)
            with named(image):
                check_values(array, self.metadata)
                if self.metadata["tiling"]:
                    found.append(self.by_tiles(array, size))
                    continue
                waiting.append((prepared(array, self.metadata), self.ignore_mask(*array.shape[:2])))
            if len(waiting) == size:
                found += self._scored(waiting)
                waiting = []
        return found + (self._scored(waiting) if waiting else [])

    def _scored(self, waiting: list[tuple[np.ndarray, np.ndarray | None]]) -> list[Result]:
        images, ignore_mask = zip(*waiting, strict=True)
        return self.score(np.stack(images), ignore_mask)

    def prepare(self, image: Any) -> np.ndarray:
        """What the graph takes of one image, see `prepared`."""
        array = pixels(image)
        check_values(array, self.metadata)
        return prepared(array, self.metadata)

    def ignore_mask(self, height: int, width: int) -> np.ndarray | None:
        """What `ignore_mask_in_network` says of an image (height, width); InputError if nothing of it is looked at."""
        ignore_mask = ignore_mask_in_network(height, width, geometry_of(self.metadata), inside_of(height, width, self.metadata))
        if ignore_mask is not None and ignore_mask.all():
            raise InputError(f"an image of {width}×{height} pixels: nothing of it is inside the roi of this detector")
        return ignore_mask

    def score(self, batch: np.ndarray, ignore_mask: Sequence[np.ndarray | None] | None = None) -> list[Result]:
        """Results of images that `prepare` made, (B, …), with what `ignore_mask` says of each."""
        scores, *maps = self.run(batch)
        found = [(float(score), maps[0][i] if maps else None) for i, score in enumerate(scores)]
        return [
            self.judged(*apply_ignore_mask(score, map, where))
            for (score, map), where in zip(found, ignore_mask or [None] * len(found), strict=True)
        ]

    def by_tiles(self, image: np.ndarray, batch_size: int) -> Result:
        """The result of one image from its tiles, so many at a time: their largest score, their maps blended in the image's own pixels."""
        side, overlap, geometry = self.metadata["tiling"]["side"], self.metadata["tiling"]["overlap"], geometry_of(self.metadata)
        check_shape(image)
        height, width = image.shape[:2]
        inside = inside_of(height, width, self.metadata)
        image = image if inside is None else fill_masked(image, inside, self.metadata["window"])
        best, rows, blend = -np.inf, [], Blend(height, width, side, overlap, lambda band: rows.append(band.copy()))
        places = list(grid(width, height, side, overlap))
        for begin in range(0, len(places), batch_size):
            some = places[begin : begin + batch_size]
            parts = [(slice(y, y + h), slice(x, x + w)) for x, y, w, h in some]
            scores, *maps = self.run(np.stack([given(mirrored(image[part], side), self.metadata) for part in parts]))
            for i, (x, y, _, _) in enumerate(some):
                ignore_mask = None if inside is None else mask_to_network(~mirrored(inside[parts[i]], side), geometry, True)
                score, map = apply_ignore_mask(float(scores[i]), maps[0][i] if maps else None, ignore_mask)
                best = max(best, score)
                if map is not None:
                    blend.add(to_image(map, side, side, geometry), x, y)
        if inside is not None and best == -np.inf:
            raise InputError(f"an image of {width}×{height} pixels: nothing of it is inside the roi of this detector")
        map = np.concatenate(rows) if rows else None
        return self.judged(best, map if map is None or inside is None else np.where(inside, map, map[inside].min()))

    def judged(self, score: float, map: np.ndarray | None) -> Result:
        decision = None if self.threshold is None else score > self.threshold
        count = len(self.calibration)
        p = (1 + count - bisect.bisect_left(self.calibration, score)) / (count + 1) if count else None
        return Result(score, p, decision, map)

    def own_pixels(self, map: np.ndarray, height: int, width: int) -> np.ndarray:
        """A map in the pixels of its image, (height, width): what was not looked at takes the least value of the rest."""
        if self.metadata["tiling"]:
            return map
        own, inside = to_image(map, height, width, geometry_of(self.metadata)), inside_of(height, width, self.metadata)
        return own if inside is None else np.where(inside, own, own[inside].min())


def opened(path: Path, threads: int | None) -> tuple[dict, Run]:
    """The metadata in a file, and what runs its graph."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected an export of blemish ({', '.join(SUFFIXES)})")
    if path.suffix not in SUFFIXES:
        raise InputError(f"{path}: expected a file that ends with {' or '.join(SUFFIXES)}")
    intact(path)
    try:
        text, run = (by_onnxruntime if path.suffix == ".onnx" else by_openvino)(path, threads)
    except ImportError as error:
        raise InputError(f"{path}: needs {SUFFIXES[path.suffix]} ({error}); pip install {SUFFIXES[path.suffix]}") from error
    except Exception as error:  # each engine has errors of its own for a file it cannot read
        raise InputError(f"{path}: cannot be opened ({type(error).__name__}: {str(error)[:300]}); expected an export of blemish") from error
    return metadata_of(text, path), run


def seal(path: Path) -> tuple[int | None, str, str]:
    """Where in an export its seal is (None without one), what it says, and what it should say: the digest of all bytes but its own.

    An .xml file's .bin is part of it.
    """
    files = [path, path.with_suffix(".bin")] if path.suffix == ".xml" else [path]
    content, *others = (file.read_bytes() for file in files)
    found = SEAL.search(content)
    first, last = found.span(1) if found else (0, 0)
    digest = hashlib.blake2b(digest_size=16)
    for part in (memoryview(content)[:first], memoryview(content)[last:], *others):
        digest.update(part)
    return (first, found[1].decode(), digest.hexdigest()) if found else (None, "", digest.hexdigest())


def intact(path: Path) -> None:
    """InputError unless the bytes of an export are those that were written: of others, engines make a crash, or a score that is wrong."""
    try:
        place, written, expected = seal(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error}); expected an export of blemish") from error
    if place is None:
        raise InputError(f"{path}: bears no seal of blemish; expected a file made by `blemish export` of this version, and whole")
    if written != expected:
        raise InputError(f"{path}: damaged, its bytes are not those that were exported; copy the file anew or export the run again")


def metadata_of(text: str | None, path: Path) -> dict:
    """The metadata in the text that an export left; InputError if it is none."""
    try:
        metadata = json.loads(text or "")
        if isinstance(metadata, dict) and "format" in metadata:
            return metadata
    except json.JSONDecodeError:
        pass
    raise InputError(f"{path}: says nothing of blemish in its metadata; expected a file made by `blemish export`")


def by_onnxruntime(path: Path, threads: int | None) -> tuple[str | None, Run]:
    """The text under KEY in an ONNX file, and what runs it: arrays in, arrays out."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    return session.get_modelmeta().custom_metadata_map.get(KEY), lambda *given: session.run(None, dict(zip(names, given, strict=True)))


@cache
def openvino_core() -> Any:
    """The one Core of this process, kept until its end.

    Each Core sets a stack for signals on its thread and puts back the one that it found: of two of which the first goes first, the second
    puts back one that is gone, and the next signal, such as that of a child that ended, kills the process (inside with openvino 2026.4).
    """
    import openvino

    return openvino.Core()


def by_openvino(path: Path, threads: int | None) -> tuple[str | None, Run]:
    """The same of an OpenVINO file, or of an ONNX file, which has no text there."""
    core = openvino_core()
    model = core.read_model(str(path))
    # without the hint, processors that have bfloat16 compute in it
    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32", **({"INFERENCE_NUM_THREADS": threads} if threads else {})}
    compiled = core.compile_model(model, "CPU", options)
    text = model.get_rt_info([KEY, "metadata"]).value if model.has_rt_info([KEY, "metadata"]) else None
    return text, lambda *given: [np.array(value) for value in compiled(list(given)).values()]


def pixels(image: str | Path | np.ndarray) -> np.ndarray:
    """The array of a file, or the array itself."""
    if not isinstance(image, str | Path):
        return np.asarray(image)
    try:
        from .reading import read
    except ImportError as error:
        raise InputError(f"{image}: files are read with Pillow, which is not here (pip install pillow); or hand over an array") from error
    return read(image)


def prepared(array: np.ndarray, metadata: dict) -> np.ndarray:
    """An image as a graph takes it: (h, w, 3) uint8 or (3, h, w) float32 in [0, 1], as the metadata say under `input`."""
    check_shape(array)
    inside = inside_of(*array.shape[:2], metadata)
    return given(array if inside is None else fill_masked(array, inside, metadata["window"]), metadata)


def check_values(array: np.ndarray, metadata: dict) -> None:
    """InputError for a dtype that neither training had nor the window names, and a warning for values that training did not have."""
    ranges, window, dtype = metadata.get("ranges") or {}, metadata["window"], array.dtype.name
    if not ranges or array.ndim not in (2, 3):
        return
    if dtype not in ranges and dtype not in window:
        raise InputError(
            f"an image of {dtype}, but training had {', '.join(ranges)} alone; expected images converted as those were, or the export of a "
            f"run with data.window=[lo,hi] for {dtype}"
        )
    expected = Range(*ranges[dtype]) if dtype in ranges else range_of(*window[dtype])
    inside = inside_of(*array.shape[:2], metadata)
    if doubt(array if inside is None else array[inside], expected):
        warnings.warn(  # the same text each time: told once
            f"images of other values than the {dtype} from {expected.lo:g} to {expected.hi:g} of the training: their scores mean little; "
            "convert them back, or train on such images",
            stacklevel=4,
        )


def check_shape(array: np.ndarray) -> None:
    """InputError unless this may be an image."""
    if array.ndim not in (2, 3) or array.shape[2:] not in ((), (3,)) or not array.size:
        raise InputError(f"an array of shape {array.shape}; expected grey (H, W) or colour (H, W, 3)")


def given(array: np.ndarray, metadata: dict) -> np.ndarray:
    """An image, or a tile of one, as a graph takes it, wherever it is looked at."""
    if metadata["source"]:
        if array.dtype != np.uint8 or list(array.shape[:2]) != metadata["source"]:
            raise InputError(f"an image {array.dtype} {array.shape[:2]}; this export takes uint8 of (H, W) = {metadata['source']} alone")
        return coloured(array)
    placed = to_network(array, metadata["window"], geometry_of(metadata))  # uint8, or float32 in [0, 1]
    if list(placed.shape[:2]) != metadata["size"]:
        raise InputError(f"an image of (H, W) = {placed.shape[:2]}; this export takes {metadata['size']} alone")
    if metadata["input"] == "uint8":
        if placed.dtype != np.uint8:
            raise InputError(f"an image of {array.dtype}; this export takes uint8, export with input=float for deep images")
        return coloured(placed)
    unit = placed / np.float32(255) if placed.dtype == np.uint8 else placed
    return np.ascontiguousarray(coloured(unit).transpose(2, 0, 1))


def coloured(array: np.ndarray) -> np.ndarray:
    """(h, w, 3) of (h, w) or (h, w, 3)."""
    return np.ascontiguousarray(array if array.ndim == 3 else np.repeat(array[..., None], 3, axis=2))


def geometry_of(metadata: dict) -> Geometry:
    return Geometry(metadata["image_size"], metadata["crop"], metadata.get("resize", "stretch"))


def inside_of(height: int, width: int, metadata: dict) -> np.ndarray | None:
    """Which pixels of an image (height, width) are looked at, by the roi in the metadata; None for all."""
    roi = metadata.get("roi")
    if roi is None:
        return None
    mask = unpacked(roi["bits"], roi["height"], roi["width"])
    return mask[np.ix_(nearest(len(mask), height), nearest(mask.shape[1], width))]


def packed(mask: np.ndarray) -> dict:
    """A mask (H, W) bool as JSON can hold it."""
    bits = base64.b64encode(zlib.compress(np.packbits(mask).tobytes(), 9)).decode("ascii")
    return {"height": mask.shape[0], "width": mask.shape[1], "bits": bits}


@lru_cache(maxsize=4)
def unpacked(bits: str, height: int, width: int) -> np.ndarray:
    """The mask (H, W) bool that was packed."""
    flat = np.frombuffer(zlib.decompress(base64.b64decode(bits)), np.uint8)
    return np.unpackbits(flat, count=height * width).reshape(height, width).astype(bool)
