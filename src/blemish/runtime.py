"""Exported detectors at work with numpy and onnxruntime: no torch, and nothing else of blemish, so that this file may travel by itself.

    model = Model("model.onnx")
    for result in model.predict(["part.png", array]):
        result.score, result.p_value, result.decision, result.map

Files are read with Pillow, which arrays do not need; `.xml` files are run by openvino.
"""

import base64
import bisect
import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

KEY = "blemish"  # of the facts among a file's metadata
FORMAT = "blemish artefact 3"
SEAL, NO_SEAL = re.compile(rb"blake2b-([0-9a-f]{32})"), "blake2b-" + 32 * "0"  # among the facts, and before it is known
STRIP = 16  # rows or columns resized by one product: few enough that it has few zeros
GREY = 128  # of 255: what is painted where nothing is looked at, and what lies beside an image in a letterbox
RESIZES = ("stretch", "letterbox")
SUFFIXES = {".onnx": "onnxruntime", ".xml": "openvino"}

Run = Callable[..., Sequence[np.ndarray]]


class InputError(ValueError):
    """Something the user gave cannot be used: the message names the path or key and what would do."""


class Geometry(NamedTuple):
    """How an image comes to a network's input: resized to a square of `size` pixels, of which the centre crop×crop is kept.

    None leaves either out. resize: "stretch" makes both sides `size`; "letterbox" the longer one, and the image lies in the middle of a
    grey square.
    """

    size: int | None = None
    crop: int | None = None
    resize: str = "stretch"

    @property
    def side(self) -> int | None:
        """Of the network's input; None for images of their own sizes."""
        return self.crop or self.size

    def inner(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of the image itself after resizing, to the nearest pixel."""
        if self.size is None:
            return height, width
        if self.resize == "stretch":
            return self.size, self.size
        longest = max(height, width)
        high, wide = (max(1, (2 * side * self.size + longest) // (2 * longest)) for side in (height, width))
        return high, wide

    def outer(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of that with what lies beside it, before the crop."""
        return (height, width) if self.size is None else (self.size, self.size)


class Result(NamedTuple):
    """What is said of one image."""

    score: float  # larger is more anomalous
    p_value: float | None  # (1 + normal images held out that score at least as high) / (1 + all of them); None without any
    decision: bool | None  # anomalous: score > threshold; None without a threshold
    map: np.ndarray | None  # (h, w) float32 in the pixels of the network's input, or by tiles in the image's own; None without one


class Model:
    """An exported detector; `facts` is what was written into it: method, threshold, calibration, preprocessing, parity and the like.

    `threads` is how many the engine may use, all of the machine's if None. InputError for a file that is no artefact of blemish.
    """

    def __init__(self, path: str | Path, threads: int | None = None):
        self.facts, self.run = opened(Path(path), threads)
        if self.facts.get("format") != FORMAT:
            raise InputError(f"{path}: format {self.facts.get('format')!r}; expected {FORMAT!r}, export the run again with this version")
        self.threshold, self.calibration = self.facts["threshold"], sorted(self.facts["calibration"])

    def predict(self, images: Any, batch_size: int = 1) -> list[Result]:
        """Results of one image or of many, in their order.

        An image is a file, or an array (H, W) or (H, W, 3) of uint8, uint16 or float32 in the file's own units, of any size unless
        `source` of the facts fixes it. InputError for what cannot be used.
        """
        if isinstance(images, str | Path) or (isinstance(images, np.ndarray) and images.ndim < 4):
            images = [images]
        size = batch_size if self.facts["batch"] is None else self.facts["batch"]
        if self.facts["tiling"]:
            return [self.by_tiles(read(image) if isinstance(image, str | Path) else np.asarray(image), size) for image in images]
        found: list[Result] = []
        waiting: list[tuple[np.ndarray, np.ndarray | None]] = []
        for image in images:
            array = read(image) if isinstance(image, str | Path) else np.asarray(image)
            waiting.append((self.prepare(array), self.hidden(*array.shape[:2])))
            if len(waiting) == size:
                found += self._scored(waiting)
                waiting = []
        return found + (self._scored(waiting) if waiting else [])

    def _scored(self, waiting: list[tuple[np.ndarray, np.ndarray | None]]) -> list[Result]:
        images, hidden = zip(*waiting, strict=True)
        return self.score(np.stack(images), hidden)

    def prepare(self, image: Any) -> np.ndarray:
        """What the graph takes of one image, see `prepared`."""
        return prepared(read(image) if isinstance(image, str | Path) else np.asarray(image), self.facts)

    def hidden(self, height: int, width: int) -> np.ndarray | None:
        """What `unseen` says of an image (height, width); InputError if nothing of it is looked at."""
        hidden = unseen(height, width, geometry_of(self.facts), seen_in(height, width, self.facts))
        if hidden is not None and hidden.all():
            raise InputError(f"an image of {width}×{height} pixels: nothing of it is inside the region of this detector")
        return hidden

    def score(self, batch: np.ndarray, hidden: Sequence[np.ndarray | None] | None = None) -> list[Result]:
        """Results of images that `prepare` made, (B, …), with what `hidden` says of each."""
        scores, *maps = self.run(batch)
        found = [(float(score), maps[0][i] if maps else None) for i, score in enumerate(scores)]
        return [self.judged(*within(score, map, where)) for (score, map), where in zip(found, hidden or [None] * len(found), strict=True)]

    def by_tiles(self, image: np.ndarray, batch_size: int) -> Result:
        """The result of one image from its tiles, so many at a time: their largest score, their maps blended in the image's own pixels."""
        side, overlap, geometry = self.facts["tiling"]["side"], self.facts["tiling"]["overlap"], geometry_of(self.facts)
        check_shape(image)
        height, width = image.shape[:2]
        seen = seen_in(height, width, self.facts)
        image = image if seen is None else painted(image, seen, self.facts["window"])
        best, rows, blend = -np.inf, [], Blend(height, width, side, overlap, lambda band: rows.append(band.copy()))
        places = list(grid(width, height, side, overlap))
        for begin in range(0, len(places), batch_size):
            some = places[begin : begin + batch_size]
            parts = [(slice(y, y + h), slice(x, x + w)) for x, y, w, h in some]
            scores, *maps = self.run(np.stack([given(mirrored(image[part], side), self.facts) for part in parts]))
            for i, (x, y, _, _) in enumerate(some):
                hidden = None if seen is None else place_mask(~mirrored(seen[parts[i]], side), geometry, True)
                score, map = within(float(scores[i]), maps[0][i] if maps else None, hidden)
                best = max(best, score)
                if map is not None:
                    blend.add(enlarged(map, side, side, geometry), x, y)
        if seen is not None and best == -np.inf:
            raise InputError(f"an image of {width}×{height} pixels: nothing of it is inside the region of this detector")
        map = np.concatenate(rows) if rows else None
        return self.judged(best, map if map is None or seen is None else np.where(seen, map, map[seen].min()))

    def judged(self, score: float, map: np.ndarray | None) -> Result:
        decision = None if self.threshold is None else score > self.threshold
        count = len(self.calibration)
        p = (1 + count - bisect.bisect_left(self.calibration, score)) / (count + 1) if count else None
        return Result(score, p, decision, map)

    def own_pixels(self, map: np.ndarray, height: int, width: int) -> np.ndarray:
        """A map in the pixels of its image, (height, width): what was not looked at takes the least value of the rest."""
        if self.facts["tiling"]:
            return map
        own, seen = enlarged(map, height, width, geometry_of(self.facts)), seen_in(height, width, self.facts)
        return own if seen is None else np.where(seen, own, own[seen].min())


def opened(path: Path, threads: int | None) -> tuple[dict, Run]:
    """The facts in a file, and what runs its graph."""
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
    return facts_of(text, path), run


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


def facts_of(text: str | None, path: Path) -> dict:
    """The facts in the text that an export left; InputError if it is none."""
    try:
        facts = json.loads(text or "")
        if isinstance(facts, dict) and "format" in facts:
            return facts
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
    puts back one that is gone, and the next signal, such as that of a child that ended, kills the process (seen with openvino 2026.4).
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
    text = model.get_rt_info([KEY, "facts"]).value if model.has_rt_info([KEY, "facts"]) else None
    return text, lambda *given: [np.array(value) for value in compiled(list(given)).values()]


def read(path: str | Path) -> np.ndarray:
    """An image file by Pillow, upright: uint8, or uint16 of a grey file of 16 bits, (H, W) or (H, W, 3).

    InputError for a file that is no image, or of which Pillow would keep a part of the bits only: hand over an array then.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise InputError(f"{path}: files are read with Pillow, which is not here (pip install pillow); or hand over an array") from error
    try:
        with Image.open(path) as file:
            frames = 1 if file.format == "MPO" else getattr(file, "n_frames", 1)
            deep = Path(path).read_bytes()[24] == 16 if file.format == "PNG" else file.mode in ("I", "F")
            image = ImageOps.exif_transpose(file)
        mode = image.mode
        if frames > 1 or (deep and not mode.startswith("I;16")):
            raise InputError(f"{path}: {frames} frames of mode {mode}; expected one image of 8 bits, or grey of 16: hand over an array")
        if mode.startswith("I;16"):
            return np.array(image).astype(np.uint16)
        if mode in ("P", "PA"):  # the short way takes no notice of transparency
            image = image.convert("RGBA")
        return np.array(image.convert("L" if mode in ("1", "L", "LA", "La") else "RGB"))
    except InputError:
        raise
    except Exception as error:  # decoders raise whatever they like
        raise InputError(f"{path}: cannot be read ({error}); expected an image file") from error


def prepared(array: np.ndarray, facts: dict) -> np.ndarray:
    """An image as a graph takes it: (h, w, 3) uint8 or (3, h, w) float32 in [0, 1], as the facts say under `input`."""
    check_shape(array)
    seen = seen_in(*array.shape[:2], facts)
    return given(array if seen is None else painted(array, seen, facts["window"]), facts)


def check_shape(array: np.ndarray) -> None:
    """InputError unless this may be an image."""
    if array.ndim not in (2, 3) or array.shape[2:] not in ((), (3,)) or not array.size:
        raise InputError(f"an array of shape {array.shape}; expected grey (H, W) or colour (H, W, 3)")


def given(array: np.ndarray, facts: dict) -> np.ndarray:
    """An image, or a tile of one, as a graph takes it, wherever it is looked at."""
    if facts["source"]:
        if array.dtype != np.uint8 or list(array.shape[:2]) != facts["source"]:
            raise InputError(f"an image {array.dtype} {array.shape[:2]}; this export takes uint8 of (H, W) = {facts['source']} alone")
        return coloured(array)
    placed = place(array, facts["window"], geometry_of(facts))  # uint8, or float32 in [0, 1]
    if list(placed.shape[:2]) != facts["size"]:
        raise InputError(f"an image of (H, W) = {placed.shape[:2]}; this export takes {facts['size']} alone")
    if facts["input"] == "uint8":
        if placed.dtype != np.uint8:
            raise InputError(f"an image of {array.dtype}; this export takes uint8, export with input=float for deep images")
        return coloured(placed)
    unit = placed / np.float32(255) if placed.dtype == np.uint8 else placed
    return np.ascontiguousarray(coloured(unit).transpose(2, 0, 1))


def coloured(array: np.ndarray) -> np.ndarray:
    """(h, w, 3) of (h, w) or (h, w, 3)."""
    return np.ascontiguousarray(array if array.ndim == 3 else np.repeat(array[..., None], 3, axis=2))


def place(array: np.ndarray, window: dict, geometry: Geometry) -> np.ndarray:
    """An image as its geometry brings it to the network: uint8 as uint8, deeper ones as float32 in [0, 1] by their window.

    uint8 is equal to what torch's antialiased bilinear resizing of bytes gives, and so to what the detector was fitted to.
    """
    if array.dtype != np.uint8:
        ranges = {"uint16": (0.0, 65535.0), **window}
        if array.dtype.name not in ranges:
            raise InputError(f"an image of {array.dtype}; this detector takes {', '.join(sorted({'uint8', *ranges}))}")
        lo, hi = ranges[array.dtype.name]
        array = ((array.astype(np.float32) - np.float32(lo)) / np.float32(hi - lo)).clip(0, 1)
    inner, outer, crop = geometry.inner(*array.shape[:2]), geometry.outer(*array.shape[:2]), geometry.crop
    if array.shape[:2] != inner:
        for axis in (1, 0):
            array = resized(array, axis, inner[axis])
        array = array.clip(0, 1) if array.dtype != np.uint8 else array
    if inner != outer:
        array = beside(array, outer, GREY if array.dtype == np.uint8 else GREY / 255)
    if crop is not None:
        height, width = outer
        if crop > min(outer):
            raise InputError(f"an image of {width}×{height} pixels; expected at least {crop}×{crop}, the crop of this detector")
        array = array[middle(outer, (crop, crop))]
    return array


def middle(outer: tuple[int, int], inner: tuple[int, int]) -> tuple[slice, slice]:
    """The rows and columns of the centre of an array."""
    first = [(whole - part) // 2 for whole, part in zip(outer, inner, strict=True)]
    return slice(first[0], first[0] + inner[0]), slice(first[1], first[1] + inner[1])


def beside(array: np.ndarray, outer: tuple[int, int], value: float) -> np.ndarray:
    """An array (h, w, …) in the middle of a larger one that is filled with a value."""
    whole = np.full((*outer, *array.shape[2:]), value, array.dtype)
    whole[middle(outer, array.shape[:2])] = array
    return whole


def nearest(length: int, pixels: int) -> np.ndarray:
    """For each of so many output pixels the input pixel under its centre, ⌊(i + ½)·length/pixels⌋."""
    return (2 * np.arange(pixels) + 1) * length // (2 * pixels)


def place_mask(mask: np.ndarray, geometry: Geometry, fill: int | bool) -> np.ndarray:
    """A mask (H, W) to where `place` puts its image, by the nearest pixel so that no value is made up; `fill` lies beside it."""
    inner, outer = geometry.inner(*mask.shape), geometry.outer(*mask.shape)
    if mask.shape != inner:
        mask = mask[np.ix_(nearest(mask.shape[0], inner[0]), nearest(mask.shape[1], inner[1]))]
    mask = mask if inner == outer else beside(mask, outer, fill)
    return mask if geometry.crop is None else mask[middle(outer, (geometry.crop, geometry.crop))]


def painted(array: np.ndarray, seen: np.ndarray, window: Mapping) -> np.ndarray:
    """An image (H, W) or (H, W, 3) with the same grey of its window wherever it is not seen, (H, W) bool."""
    if array.dtype == np.uint8:
        grey = GREY
    else:
        lo, hi = {"uint16": (0.0, 65535.0), **window}.get(array.dtype.name, (0.0, 0.0))  # what has no range is refused later
        grey = lo + (hi - lo) * GREY / 255
    grey = array.dtype.type(round(grey) if array.dtype.kind == "u" else grey)
    return np.where(seen if array.ndim == 2 else seen[..., None], array, grey)


def unseen(height: int, width: int, geometry: Geometry, seen: np.ndarray | None) -> np.ndarray | None:
    """Where in the network's input (h, w) of an image (height, width) nothing is looked at: beside it, and where it is not `seen`.

    None where all is.
    """
    if seen is None and geometry.inner(height, width) == geometry.outer(height, width):
        return None
    return place_mask(np.zeros((height, width), bool) if seen is None else ~seen, geometry, True)


def within(score: float, map: np.ndarray | None, hidden: np.ndarray | None) -> tuple[float, np.ndarray | None]:
    """Score and map (h, w) of what is not hidden, whose least value the rest takes; a score that is the map's largest value is theirs."""
    if hidden is not None and hidden.all():  # as a tile may be
        return -np.inf, map if map is None else np.full_like(map, map.max())
    if map is None or hidden is None:
        return score, map
    shown = map[~hidden]
    return float(shown.max()) if score == float(map.max()) else score, np.where(hidden, shown.min(), map)


def geometry_of(facts: dict) -> Geometry:
    return Geometry(facts["image_size"], facts["crop"], facts.get("resize", "stretch"))


def seen_in(height: int, width: int, facts: dict) -> np.ndarray | None:
    """Which pixels of an image (height, width) are looked at, by the region in the facts; None for all."""
    region = facts.get("region")
    if region is None:
        return None
    mask = unpacked(region["bits"], region["height"], region["width"])
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


def enlarged(map: np.ndarray, height: int, width: int, geometry: Geometry) -> np.ndarray:
    """A map of an image that `place` brought to the network, (height, width) float32: outside the crop it has its minimum."""
    inner, outer = geometry.inner(height, width), geometry.outer(height, width)
    if geometry.crop:
        map = beside(np.asarray(map, np.float32), outer, map.min())
    map = map if inner == outer else map[middle(outer, inner)]
    return resized(resized(map, 1, width), 0, height)


def starts(length: int, tile: int, stride: int) -> list[int]:
    """First pixels of tiles that cover `length` pixels; the last tile is flush with the end, a tile longer than it is cut."""
    last = max(length - tile, 0)
    return [*range(0, last, stride), last]


def grid(width: int, height: int, tile: int, overlap: int) -> Iterator[tuple[int, int, int, int]]:
    """(x, y, w, h) of the tiles of an image, row by row: the last ones are flush with its ends, a side below `tile` is one tile's."""
    for y in starts(height, tile, tile - overlap):
        for x in starts(width, tile, tile - overlap):
            yield x, y, min(tile, width), min(tile, height)


def mirrored(array: np.ndarray, tile: int) -> np.ndarray:
    """An array (H, W, …) continued to the right and below by its mirror image, as often as needed, where a side is below `tile`."""
    more = [(0, max(0, tile - side)) for side in array.shape[:2]]
    return np.pad(array, more + [(0, 0)] * (array.ndim - 2), mode="symmetric") if any(after for _, after in more) else array


def ramp(length: int, overlap: int) -> np.ndarray:
    """Weights (length,) of a tile's pixels along one axis: 1, falling linearly towards either end within the overlap."""
    inwards = np.minimum(np.arange(length), np.arange(length)[::-1]) + 1.0
    return np.minimum(inwards / (overlap + 1), 1).astype(np.float32)


class Blend:
    """The weighted mean of tiles' maps, which `add` takes row by row from the left; finished rows (n, width) go to `emit` in order.

    A pixel's weight in a tile is the product of `ramp` along both axes. Means are updated tile by tile, m ← m + (new − m)·w / Σw, so that
    where all tiles agree the result is what they say to the last bit.
    """

    def __init__(self, height: int, width: int, tile: int, overlap: int, emit: Callable[[np.ndarray], None]):
        self.height, self.width, self.emit = height, width, emit
        self.high, self.wide = min(tile, height), min(tile, width)  # of every tile
        self.down, self.across = ramp(self.high, overlap), ramp(self.wide, overlap)
        self.strip, self.strip_weight = np.zeros((self.high, width), np.float32), np.zeros(width, np.float32)
        self.open, self.open_weight = np.zeros((self.high, width), np.float32), np.zeros(self.high, np.float32)
        self.top = 0  # the image's row that is the first of `open`

    def add(self, map: np.ndarray, x: int, y: int) -> None:
        """A tile's map, at least (high, wide), whose pixel (0, 0) is the image's (y, x)."""
        columns = slice(x, x + self.wide)
        self.strip_weight[columns] += self.across
        share = self.across / self.strip_weight[columns]  # (wide,)
        part = self.strip[:, columns]
        part += (map[: self.high, : self.wide] - part) * share
        if x + self.wide == self.width:
            self._row_done(y)

    def _row_done(self, y: int) -> None:
        """Blend a whole row of tiles, which are a grid, so that the mean over both axes is a mean over one of means over the other."""
        self._move_to(y)
        self.open_weight += self.down
        self.open += (self.strip - self.open) * (self.down / self.open_weight)[:, None]
        self.strip[:], self.strip_weight[:] = 0, 0
        if y + self.high == self.height:
            self.emit(self.open)

    def _move_to(self, y: int) -> None:
        done = y - self.top
        if done:
            self.emit(self.open[:done])
            for rows in (self.open, self.open_weight):
                rows[:-done], rows[-done:] = rows[done:].copy(), 0
            self.top = y


def resized(array: np.ndarray, axis: int, pixels: int) -> np.ndarray:
    """(H, W) or (H, W, 3), uint8 or float32, with one axis resized to so many pixels: bilinear, antialiased, half-pixel centres."""
    if array.shape[axis] == pixels:
        return array
    bits, strips = (exact_strips if array.dtype == np.uint8 else strips_of)(array.shape[axis], pixels)
    channels = array.shape[2] if axis == 1 and array.ndim == 3 else 1
    # (rows, columns·channels), of which the one or the other is resized
    flat = array.reshape(len(array), -1)
    kind = np.float64 if array.dtype == np.uint8 else np.float32
    out = np.empty((pixels, flat.shape[1]) if axis == 0 else (len(flat), pixels * channels), kind)
    for start, stop, first, weights in strips:
        last = first + weights.shape[1]
        if axis == 0:
            np.matmul(weights, flat[first:last].astype(kind), out=out[start:stop])
        else:
            apart = np.kron(weights, np.eye(channels, dtype=kind)) if channels > 1 else weights
            part = flat[:, first * channels : last * channels].astype(kind)
            out[:, start * channels : stop * channels] = part @ apart.T
    if array.dtype == np.uint8:
        out += 2 ** (bits - 1)
        out *= 2.0**-bits  # whole numbers far below 2⁵³ until here: nothing was rounded
        np.clip(np.floor(out, out=out), 0, 255, out=out)
    shape = list(array.shape)
    shape[axis] = pixels
    return out.astype(array.dtype).reshape(shape)


def weights_of(length: int, pixels: int) -> tuple[np.ndarray, np.ndarray]:
    """First input pixel (pixels,) and weights (pixels, taps) of every output pixel: triangles of the width of the coarser grid's step."""
    scale = length / pixels
    support = max(scale, 1.0)
    centre = scale * (np.arange(pixels) + 0.5)
    first = np.maximum((centre - support + 0.5).astype(np.int64), 0)
    last = np.minimum((centre + support + 0.5).astype(np.int64), length)
    reach = np.arange(int((last - first).max()))
    # in torch's order of operations: a weight that rounds the other way is a grey level in some image
    distance = np.abs((reach + (first - centre)[:, None] + 0.5) * (1 / support))
    weights = np.where(reach < (last - first)[:, None], np.maximum(0, 1 - distance), 0)
    return first, weights / weights.cumsum(1)[:, -1:]


@lru_cache(maxsize=16)
def strips_of(length: int, pixels: int) -> tuple[int, list[tuple[int, int, int, np.ndarray]]]:
    """0, and the resizing of so many output pixels at a time as (start, stop, first input pixel, weights (stop - start, n))."""
    return 0, _strips(*weights_of(length, pixels), length)


@lru_cache(maxsize=16)
def exact_strips(length: int, pixels: int) -> tuple[int, list[tuple[int, int, int, np.ndarray]]]:
    """As `strips_of` with whole numbers for weights, and by how many bits they are too large: 16-bit arithmetic, as torch has for bytes."""
    first, weights = weights_of(length, pixels)
    bits = next(b for b in range(23) if b == 22 or int(0.5 + weights.max() * 2 ** (b + 1)) >= 2**15)
    return bits, _strips(first, np.floor(0.5 + weights * 2**bits), length, np.float64)


def _strips(first: np.ndarray, weights: np.ndarray, length: int, kind: type = np.float32) -> list[tuple[int, int, int, np.ndarray]]:
    strips = []
    for start in range(0, len(first), STRIP):
        rows = range(start, min(start + STRIP, len(first)))
        low = int(first[start])
        high = min(int(first[rows[-1]]) + weights.shape[1], length)
        block = np.zeros((len(rows), high - low), kind)
        for i, row in enumerate(rows):
            taps = min(weights.shape[1], high - int(first[row]))
            block[i, first[row] - low : first[row] - low + taps] = weights[row, :taps]
        strips.append((start, rows[-1] + 1, low, block))
    return strips
