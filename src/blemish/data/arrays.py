"""Normal images given as files or arrays, in place of a data set on disk."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL.Image import Image as Picture
from torch import Tensor

from blemish.data.dataset import threaded
from blemish.data.manifest import Sample
from blemish.data.module import ImageData, plain_window
from blemish.data.ranges import ValueCheck, fit_ranges
from blemish.edge.errors import InputError
from blemish.edge.geometry import UINT16
from blemish.edge.outputs import images_at
from blemish.edge.ranges import Range
from blemish.edge.reading import SMALLEST, array_of_picture, read, size_of
from blemish.types import NORMAL

UNIT = (0.0, 1.0)  # the range of floats where none is given
ASSUMED = {"uint8": (0.0, 255.0), "uint16": UINT16, "float32": UNIT}
Image = Path | np.ndarray  # (H, W) or (H, W, 3), uint8, uint16 or float32
Window = Mapping[str, tuple[float, float]]  # (lo, hi) by dtype
KINDS = (
    "numpy (H, W), (H, W, 3) or (B, H, W, 3), or torch (H, W), (3, H, W) or (B, 3, H, W), with 1 in place of 3 for grey or 4 for alpha, "
    "of uint8, uint16 or floats in [0, 1], or a picture of Pillow"
)


class Given(NamedTuple):
    """The source of pixels that `dataset.Files` is for a data set on disk; a key is the name of its path."""

    images: dict[str, Image]
    window: Window

    def __call__(self, path: Path) -> np.ndarray:
        return array_of(self.images[path.name], self.window)

    def size(self, path: Path) -> tuple[int, int]:
        image = self.images[path.name]
        return size_of(image) if isinstance(image, Path) else image.shape[1::-1]

    def name(self, path: Path) -> str:
        image = self.images[path.name]
        return str(image) if isinstance(image, Path) else f"image {int(path.name)}"


@dataclass(kw_only=True, eq=False, repr=False)
class ArrayData(ImageData):
    """Normal images to train on and, in `val`, to calibrate with; without `val` a share `calibration` of the former is held out.

    The window is (lo, hi) by dtype, the ROI a mask (H, W). InputError for a file in both.
    """

    name, published, layout = "given", "", ""

    root: str = "."
    category: None = None
    protocol: str = "clean"
    on_error: str = "stop"
    train: Sequence[Image]
    val: Sequence[Image]

    def __post_init__(self) -> None:
        super().__post_init__()
        train, val = ({one.resolve() for one in images if isinstance(one, Path)} for images in (self.train, self.val))
        if both := train & val:
            raise InputError(f"{min(both)}: in both train and val; expected it in one of them")
        splits = ["train"] * len(self.train) + ["calibrate"] * len(self.val)
        images = {f"{i:08}": image for i, image in enumerate([*self.train, *self.val])}  # keys that sort in the order given
        self.source = Given(images, self.window)
        self.samples = self._held_out([Sample(key, split, NORMAL, "good") for key, split in zip(images, splits, strict=True)])

    def setup(self, stage: str | None = None) -> None:
        """Fit the ranges of values to the training images, or to those for calibration if there are no others."""
        if not self.ranges:
            split = "train" if self.count("train") else "calibrate"
            images = [self.source.images[sample.path] for sample in self.samples if sample.split == split]
            self.ranges = fit_ranges(images, partial(self.values_in_roi, load=partial(array_of, window=self.window)))
            self.values = check_of(self.ranges, self.window)

    def count(self, split: str) -> int:
        return sum(sample.split == split for sample in self.samples)

    def check(self, split: str) -> None:
        """Decode the images of a split once, so that an unusable one is an InputError now."""
        rows = self.images([sample for sample in self.samples if sample.split == split])
        threaded(lambda index: rows[index][1], range(len(rows)))


def window_of(value_range: object) -> dict[str, tuple[float, float]]:
    """(lo, hi) by dtype: that of the dtype, replaced by a `value_range` (lo, hi) or {"uint16": (lo, hi)}; InputError for anything else."""
    if value_range == "auto":
        raise InputError('value_range="auto": ranges are not fitted here; expected (lo, hi) or {"uint16": (lo, hi)}')
    try:
        window = plain_window("dtype" if value_range is None else value_range)
    except InputError as error:
        raise InputError(str(error).replace("data.window", "value_range").replace("auto, dtype", "None")) from None
    return {"uint16": UINT16, "float32": UNIT} | (window if isinstance(window, dict) else {})


def check_of(ranges: Mapping[str, Range], window: Window) -> ValueCheck:
    """A ValueCheck that accepts dtypes that training did not have, at their full range, with a warning unless the window names them."""
    named = {dtype: ends for dtype, ends in window.items() if ends != ASSUMED[dtype]}
    return ValueCheck(ranges, named, "value_range", ASSUMED)


def array_of(image: Image, window: Window) -> np.ndarray:
    """The pixels of a file or array; InputError for floats outside [0, 1] unless the window sets their range."""
    array = read(image) if isinstance(image, Path) else image
    if array.dtype == np.float32 and window["float32"] == UNIT and not (array.min() >= 0 and array.max() <= 1):
        name = f"{image}" if isinstance(image, Path) else f"an array {array.shape}"
        found = f"floats from {array.min():.6g} to {array.max():.6g}"
        raise InputError(f"{name}: {found}; expected [0, 1], or value_range=(lo, hi), the values of black and white")
    return array


def images_of(array: object) -> tuple[list[np.ndarray], bool]:
    """The images (H, W) or (H, W, 3), uint8, uint16 or float32, in an array, tensor or picture of Pillow, and whether it is a batch.

    Alpha is dropped, as of files. InputError for a shape or dtype that is not in KINDS, for values that are not finite, and for images with
    sides below 8 pixels.
    """
    if isinstance(array, Picture):
        array = array_of_picture(array)
    if isinstance(array, Tensor):
        array = array.detach().cpu()
        array = array.float() if array.is_floating_point() else array
        array = (array.movedim(-3, -1) if array.ndim > 2 else array).numpy()
        kind = "a tensor, channels moved to the end,"
    elif isinstance(array, np.ndarray):
        kind = "an array"
    else:
        raise InputError(f"{type(array).__name__}: not an image; expected a path, {KINDS}, or a list of these")
    found = f"{kind} of {array.dtype.name} {array.shape}"
    is_shape = array.ndim in (2, 3, 4) and (array.ndim == 2 or array.shape[-1] in (1, 3, 4)) and 0 not in array.shape
    if not is_shape or not (array.dtype.name in ("uint8", "uint16") or array.dtype.kind == "f"):
        raise InputError(f"{found}: not an image; expected {KINDS}")
    is_batch, is_grey = array.ndim == 4, array.ndim > 2 and array.shape[-1] == 1
    array = array[..., 0] if is_grey else array[..., :3] if array.ndim > 2 else array
    if min(array.shape[is_batch : is_batch + 2]) < SMALLEST:
        raise InputError(f"{found}: expected at least {SMALLEST}×{SMALLEST} pixels")
    dtype = array.dtype.newbyteorder("=") if array.dtype.kind == "u" else np.float32
    with np.errstate(over="ignore"):  # a double beyond float32 becomes infinite
        array = np.require(array, dtype, ["C", "W"])  # as torch needs it
    if array.dtype == np.float32 and not np.isfinite(array).all():
        raise InputError(f"{found}: {np.count_nonzero(~np.isfinite(array))} values are NaN or infinite; expected finite values")
    return list(array) if is_batch else [array], is_batch


def gather(images: Any) -> tuple[list[Image], bool]:
    """Return the images of a file, a folder, an array, a batch or a list of these, and whether there may be several."""
    if isinstance(images, str | os.PathLike):
        return images_at(images), Path(images).expanduser().is_dir()
    if isinstance(images, np.ndarray | Tensor) or not isinstance(images, Iterable):
        return images_of(images)
    found = [image for one in images for image in gather(one)[0]]
    if not found:
        raise InputError(f"an empty {type(images).__name__}; expected at least one image")
    return found, True
