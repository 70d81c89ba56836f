"""Value ranges of the training images, and warnings about images with others: a dtype does not tell how many bits a camera has."""

import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
from torch.utils.data import get_worker_info

from blemish.edge.errors import InputError
from blemish.edge.ranges import Range, doubt, largest, range_of
from blemish.edge.reading import dtype_of, read

QUANTILES = (0.0005, 0.9995)
MOST_BYTES = 20  # 8-bit images that are read for their values
SAMPLED = 100_000  # values taken of a float image
WHITES = (1, 2**8 - 1, 2**10 - 1, 2**12 - 1, 2**14 - 1, 2**16 - 1)  # of floats and of cameras
Window = Mapping[str, tuple[float, float]]  # (lo, hi) by dtype

log = logging.getLogger(__name__)


def fit_ranges(
    images: Iterable[Path | np.ndarray], load: Callable[[Path], np.ndarray] = read, most: int = 200, most_bytes: int = MOST_BYTES
) -> dict[str, Range]:
    """The ranges of the values of images, by dtype, each without the outermost 0.05 % on either side.

    At most `most` images of a dtype are loaded, `most_bytes` of uint8, evenly spaced. Where the two quantiles coincide, the range is that
    of all values; a constant has one of width 1.
    """
    found: dict[str, list] = {}
    for image in images:
        found.setdefault(image.dtype.name if isinstance(image, np.ndarray) else dtype_of(image), []).append(image)
    ranges = {}
    for dtype, members in sorted(found.items()):
        places = np.unique(np.linspace(0, len(members) - 1, most_bytes if dtype == "uint8" else most).round().astype(int))
        rng, tops, values, counts = np.random.default_rng(0), [], [], np.zeros(65536, np.int64)
        for array in (load(members[place]) for place in places):
            tops.append(largest(array))
            if dtype == "uint16":
                counts += np.bincount(array.ravel(), minlength=65536)
            else:
                values.append(array.ravel() if array.size <= SAMPLED else rng.choice(array.ravel(), SAMPLED, shuffle=False))
        if tops:
            ranges[dtype] = Range(*(_ends(np.arange(65536), counts) if dtype == "uint16" else _ends(np.concatenate(values))), min(tops))
    return ranges


def _ends(values: np.ndarray, counts: np.ndarray | None = None) -> tuple[float, float]:
    lo, hi = np.quantile(values, QUANTILES, weights=counts, method="inverted_cdf")
    if lo == hi:
        values = values if counts is None else values[counts > 0]
        lo, hi = values.min(), values.max()
    return float(lo), float(hi if hi > lo else lo + 1)


def fit_window(paths: Iterable[Path], most: int = 200) -> dict[str, tuple[float, float]]:
    """The window of 16-bit and float images that their ranges make, see `fit_ranges`."""
    return window_in(fit_ranges(paths, most=most, most_bytes=0))


def window_in(ranges: Mapping[str, Range]) -> dict[str, tuple[float, float]]:
    return {dtype: (lo, hi) for dtype, (lo, hi, _) in ranges.items() if dtype != "uint8"}


class ValueCheck:
    """Compare images with the training images: InputError for a dtype that these did not have, a warning for other values.

    ranges: of the training images; if empty, no dtype is refused. window: (lo, hi) of dtypes that are accepted. key: of the setting that
    would add a dtype, "" if there is none. assumed: (lo, hi) of dtypes that are accepted with a warning. named: dtypes whose window
    replaces that of the training. Warnings are collected until `report`, which gives one for all images.
    """

    def __init__(
        self,
        ranges: Mapping[str, Range],
        window: Window,
        key: str = "data.window",
        assumed: Window | None = None,
        named: Iterable[str] = (),
    ):
        self.ranges = {dtype: found for dtype, found in ranges.items() if dtype not in set(named)}
        self.trained = " and ".join(f"{dtype} from {lo:g} to {hi:g}" for dtype, (lo, hi, _) in ranges.items())
        self.window, self.key, self.assumed = dict(window), key, dict(assumed or {})
        self.expected = {dtype: range_of(*ends) for dtype, ends in {**self.assumed, **self.window}.items()} | self.ranges
        self.checked: set[str] = set()
        self.new: dict[str, str] = {}  # the first image of an assumed dtype
        self.doubts: dict[str, str] = {}  # by image

    def __call__(self, image: object, array: np.ndarray, roi: Callable[[], np.ndarray | None] = lambda: None) -> None:
        """Check an image, once for each path; `roi` returns its region of interest (H, W) bool, None for all of it."""
        name, dtype = str(image), array.dtype.name
        if name in self.checked or (dtype not in self.expected and not self.trained):
            return
        if dtype not in self.expected:
            setting = f"{self.key}={suggestion(array)} for what is black and white in {dtype}, " if self.key else ""
            raise InputError(
                f"{name}: {dtype} with values from {array.min():g} to {array.max():g}, but training had {self.trained} alone; expected "
                f"images converted to that, {setting}or a detector trained on {dtype} too"
            )
        self.checked.add(name)
        if dtype not in self.ranges and dtype not in self.window and (self.trained or dtype != "uint8"):
            self.new.setdefault(dtype, name)
        inside = roi()
        if found := self.doubt(array if inside is None else array[inside]):
            self.doubts[name] = f"{dtype}, {found}"
            if get_worker_info() is not None:  # what a worker process collects would be lost with it
                self.report()

    def doubt(self, array: np.ndarray) -> str:
        """How values differ from those of the training or the window; "" if they do not."""
        dtype = array.dtype.name
        lo, hi, _ = expected = self.expected[dtype]
        if found := doubt(array, expected):
            return f"{found}, {'training had' if dtype in self.ranges else 'the window is'} {lo:g} to {hi:g}"
        lo, hi = self.window.get(dtype, (lo, hi))
        found = dtype in self.ranges and doubt(array, Range(lo, hi, lo))
        return f"{found}, the window is {lo:g} to {hi:g}" if found else ""

    def loading(self, read: Callable, roi: Callable[..., np.ndarray | None] | None = None) -> Callable:
        """A `read` that checks what it returns; `roi(path, height, width)` returns an image's region of interest."""

        def load(image: Path | np.ndarray) -> np.ndarray:
            array, path = read(image), image if isinstance(image, Path) else None
            name = path or f"image {len(self.checked)}"
            self(name, array, lambda: roi(path, *array.shape[:2]) if roi else None)
            return array

        return load

    def report(self) -> None:
        """Log what was found since the last report."""
        setting = f"{self.key}={'(lo, hi)' if self.assumed else '[lo,hi]'}"
        for dtype, name in self.new.items():
            lo, hi = self.assumed[dtype]
            log.warning(
                "%s: %s%s; %g is taken for black and %g for white. If they are not, give %s, convert such images, or train on them",
                *(name, dtype, f", but training had {self.trained} alone" if self.trained else "", lo, hi, setting),
            )
        if self.doubts:
            log.warning(
                "%d of %d images have values that hardly fit the detector: their scores mean little. The first is %s: %s. If exposure or "
                "bit alignment changed, convert them%s or train on such images",
                *(len(self.doubts), len(self.checked), *next(iter(self.doubts.items()))),
                f", give {setting} for what is black and white in them," if self.key else "",
            )
        self.new, self.doubts = {}, {}


def suggestion(array: np.ndarray) -> str:
    """A window for images of this dtype, as it is typed: all values that the bits of the camera can hold."""
    if array.dtype == np.uint8:
        return "'{uint8: [0, 255]}'"
    lo, hi = float(array.min()), float(array.max())
    return f"[{min(lo, 0):g},{next((white for white in WHITES if hi <= white), hi):.10g}]"
