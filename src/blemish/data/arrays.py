"""Normal images that are given by hand, as files or arrays, in place of a data set on disk."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from blemish.data.dataset import Recent, Tiles, threaded
from blemish.data.images import ignore_mask, prepare
from blemish.data.manifest import Sample
from blemish.data.module import ImageData, plain_window
from blemish.data.ranges import ValueCheck, fit_ranges
from blemish.data.roi import Roi
from blemish.edge.errors import InputError
from blemish.edge.geometry import UINT16, Geometry
from blemish.edge.ranges import Range
from blemish.edge.reading import SMALLEST, read, size_of
from blemish.types import IGNORED, NORMAL

UNIT = (0.0, 1.0)  # the range of floats where none is given
ASSUMED = {"uint8": (0.0, 255.0), "uint16": UINT16, "float32": UNIT}
Image = Path | np.ndarray  # (H, W) or (H, W, 3), uint8, uint16 or float32
KINDS = (
    "numpy (H, W), (H, W, 3) or (B, H, W, 3), or torch (H, W), (3, H, W) or (B, 3, H, W), with 1 in place of 3 for grey, "
    "of uint8, uint16 or floats in [0, 1]"
)


class ArrayData(ImageData):
    """Training images and, where there are any in `val`, those for the threshold; else a share `calibration` of the former is held out.

    The other arguments are those of `ImageData`; `window` has (lo, hi) for "uint16" and "float32", `roi` is a mask (H, W). InputError
    for a file that is in both.
    """

    name, published, layout = "given", "", ""

    def __init__(
        self,
        train: Sequence[Image],
        val: Sequence[Image],
        image_size: int | None,
        crop: int | None,
        batch_size: int,
        workers: int,
        seed: int,
        calibration: float,
        window: Mapping[str, tuple[float, float]],
        resize: str = "stretch",
        roi: np.ndarray | None = None,
    ):
        super().__init__(".", None, image_size, crop, batch_size, workers, seed, "clean", calibration, "dtype", "stop", None, resize, roi)
        both = {one.resolve() for one in train if isinstance(one, Path)} & {one.resolve() for one in val if isinstance(one, Path)}
        if both:
            raise InputError(f"{min(both)}: to be trained on and in val; expected it in one of them")
        self.window = dict(window)
        splits = ["train"] * len(train) + ["calibrate"] * len(val)
        self.given = {f"{i:08}": image for i, image in enumerate([*train, *val])}  # by keys that keep their order
        self.samples = self._held_out([Sample(key, split, NORMAL, "good") for key, split in zip(self.given, splits, strict=True)])

    def setup(self, stage: str | None = None) -> None:
        """Look at the values of the training images, or of those for the threshold where nothing is fitted."""
        if not self.ranges:
            split = "train" if self.count("train") else "calibrate"
            load = self._looked_at if self.roi else partial(array_of, window=self.window)
            self.ranges = fit_ranges([self.given[sample.path] for sample in self.samples if sample.split == split], load)
            self.values = check_of(self.ranges, self.window)

    def _looked_at(self, image: Image) -> np.ndarray:
        array = array_of(image, self.window)
        return array[self.roi.inside(None, *array.shape[:2])]

    def count(self, split: str) -> int:
        return sum(sample.split == split for sample in self.samples)

    def check(self, split: str) -> None:
        """Read the images of a split, so that one that cannot be used is told now; InputError names it."""
        rows = self.images([sample for sample in self.samples if sample.split == split])
        threaded(lambda index: rows[index][1], range(len(rows)))

    def images(self, samples: list[Sample]) -> "Rows":
        rows = [(sample.key, self.given[sample.path]) for sample in samples]
        return Rows(rows, self.window, self.geometry, self.roi, self.values)

    def tiles(self, samples: list[Sample], fit: bool = False) -> Tiles:
        images = {sample.path: self.given[sample.path] for sample in samples}
        sizes = {key: size_of(one) if isinstance(one, Path) else one.shape[1::-1] for key, one in images.items()}
        tiles = Tiles(samples, sizes, self.tile, self.overlap, self.root, self.window, self.geometry.side, self.roi, fit)
        tiles.recent, tiles.values = RecentGiven(tiles.recent, images, self.window), self.values
        return tiles


class RecentGiven(Recent):
    """What `Recent` does for files, with given images in place of the files of a root."""

    def __init__(self, like: Recent, images: dict[str, Image], window: dict):
        super().__init__(like.most, like.fewest)
        self.images, self.window = images, window

    def read(self, path: Path) -> np.ndarray:
        image = self.images[path.name]
        return array_of(super().read(image) if isinstance(image, Path) else image, self.window)

    def __getstate__(self) -> dict:
        return {"like": Recent(self.most, self.fewest), "images": self.images, "window": self.window}


class Rows(Dataset):
    """Rows as `module.Images` has them, of normal images without a mask."""

    def __init__(
        self, images: list[tuple[str, Image]], window: dict, geometry: Geometry, roi: Roi | None, values: ValueCheck | None = None
    ):
        self.images, self.window, self.geometry, self.roi = images, window, geometry, roi
        self.values = values or ValueCheck({}, {})

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int, Tensor, str]:
        key, given = self.images[index]
        array = array_of(given, self.window)
        inside = self.roi and self.roi.inside(None, *array.shape[:2])
        self.values(given if isinstance(given, Path) else f"image {int(key)}", array, lambda: inside)
        image, where = prepare(array, self.window, self.geometry, inside), ignore_mask(*array.shape[:2], self.geometry, inside)
        mask = torch.zeros(image.shape[1:], dtype=torch.uint8)
        return image, NORMAL, mask if where is None else mask.masked_fill_(where, IGNORED), key

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, int, Tensor, str]]:
        return threaded(self.__getitem__, indices)


def window_of(value_range: object) -> dict[str, tuple[float, float]]:
    """(lo, hi) by dtype: the dtype's own, or what `value_range` says as [lo, hi] or {"uint16": [lo, hi]}; InputError for other things."""
    if value_range == "auto":
        raise InputError('value_range="auto": a range is never taken from the values inside; expected (lo, hi) or {"uint16": (lo, hi)}')
    try:
        given = plain_window("dtype" if value_range is None else value_range)
    except InputError as error:
        raise InputError(str(error).replace("data.window", "value_range").replace("auto, dtype", "None")) from None
    return {"uint16": UINT16, "float32": UNIT} | (given if isinstance(given, dict) else {})


def check_of(ranges: Mapping[str, Range], window: Mapping[str, tuple[float, float]]) -> ValueCheck:
    """What compares images with those of a training by the rule that their dtype says what is black and white, unless the window does."""
    named = {dtype: ends for dtype, ends in window.items() if ends != ASSUMED[dtype]}
    return ValueCheck(ranges, named, "value_range", ASSUMED)


def array_of(image: Image, window: Mapping[str, tuple[float, float]]) -> np.ndarray:
    """The pixels of a file or array; InputError for floats beyond [0, 1] where the window says no more than that."""
    array = read(image) if isinstance(image, Path) else image
    if array.dtype == np.float32 and window["float32"] == UNIT and not (array.min() >= 0 and array.max() <= 1):
        name = f"{image}" if isinstance(image, Path) else f"an array {array.shape}"
        raise InputError(
            f"{name}: floats from {array.min():.6g} to {array.max():.6g}; expected [0, 1], or value_range=(lo, hi), what is black and white"
        )
    return array


def images_of(array: object) -> tuple[list[np.ndarray], bool]:
    """The images (H, W) or (H, W, 3), uint8, uint16 or float32, of an array or tensor, and whether it is a batch.

    InputError for a shape or dtype that KINDS does not have, for NaN and infinite values, and for less than 8 pixels a side.
    """
    if isinstance(array, Tensor):
        array = array.detach().cpu()
        array = array.float() if array.is_floating_point() else array
        array = (array.movedim(-3, -1) if array.ndim > 2 else array).numpy()
        shape = "a tensor, channels moved to the end,"
    elif isinstance(array, np.ndarray):
        shape = "an array"
    else:
        raise InputError(f"{type(array).__name__}: not an image; expected a path, {KINDS}, or a list of these")
    found = f"{shape} of {array.dtype.name} {array.shape}"
    if array.ndim not in (2, 3, 4) or (array.ndim > 2 and array.shape[-1] not in (1, 3)) or 0 in array.shape:
        raise InputError(f"{found}: not an image; expected {KINDS}")
    if array.dtype.name not in ("uint8", "uint16") and array.dtype.kind != "f":
        raise InputError(f"{found}: not an image; expected {KINDS}")
    several, grey = array.ndim == 4, array.ndim > 2 and array.shape[-1] == 1
    array = array[..., 0] if grey else array
    if min(array.shape[several : several + 2]) < SMALLEST:
        raise InputError(f"{found}: expected at least {SMALLEST}×{SMALLEST} pixels")
    dtype = array.dtype.newbyteorder("=") if array.dtype.kind == "u" else np.float32
    with np.errstate(over="ignore"):  # a double beyond float32 becomes infinite
        array = np.require(array, dtype, ["C", "W"])  # as torch wants it
    if array.dtype == np.float32 and not np.isfinite(array).all():
        raise InputError(f"{found}: {np.count_nonzero(~np.isfinite(array))} values are NaN or infinite; expected finite values")
    return list(array) if several else [array], several
