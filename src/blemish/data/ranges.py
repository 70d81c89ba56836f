"""The range of values of the training images, and warnings about images with others: a dtype does not say how many bits a camera has."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
from torch.utils.data import get_worker_info

from blemish.edge.errors import InputError
from blemish.edge.ranges import Range, doubt, largest, range_of
from blemish.edge.reading import dtype_of, read

QUANTILES = (0.0005, 0.9995)
OF_BYTES = 20  # 8-bit training images that are read for their values
DEPTHS = (1, 2**8 - 1, 2**10 - 1, 2**12 - 1, 2**14 - 1, 2**16 - 1)  # white of floats and of cameras

log = logging.getLogger(__name__)


def fit_ranges(
    images: Iterable[Path | np.ndarray], load: Callable[[Path], np.ndarray] = read, most: int = 200, of_bytes: int = OF_BYTES
) -> dict[str, Range]:
    """The values of images by dtype, as `load` gives them: the range of all but the outermost 0.05 % on either side, see `Range`.

    At most `most` images of a dtype are read, `of_bytes` of uint8, evenly spaced in the order given; only dtypes that occur get an entry.
    Where the two quantiles coincide the extremes take their place, and one above them for a constant.
    """
    found: dict[str, list] = {}
    for image in images:
        found.setdefault(image.dtype.name if isinstance(image, np.ndarray) else dtype_of(image), []).append(image)
    ranges = {}
    for dtype, members in sorted(found.items()):
        count = of_bytes if dtype == "uint8" else most
        chosen = [members[i] for i in np.unique(np.linspace(0, len(members) - 1, count).round().astype(int))]
        if not chosen:
            continue
        tops: list[float] = []
        lo, hi = (_quantiles16 if dtype == "uint16" else _quantiles)(_noting_tops(map(load, chosen), tops))
        ranges[dtype] = Range(lo, hi if hi > lo else lo + 1.0, min(tops))
    return ranges


def fit_window(paths: Iterable[Path], load: Callable[[Path], np.ndarray] = read, most: int = 200) -> dict[str, tuple[float, float]]:
    """The window of deep images that their ranges make, see `fit_ranges`; uint8 has none."""
    return window_in(fit_ranges(paths, load, most, of_bytes=0))


def window_in(ranges: Mapping[str, Range]) -> dict[str, tuple[float, float]]:
    """The ends of what the ranges have for deep images."""
    return {dtype: (lo, hi) for dtype, (lo, hi, _) in ranges.items() if dtype != "uint8"}


def _noting_tops(arrays: Iterable[np.ndarray], tops: list[float]) -> Iterator[np.ndarray]:
    for array in arrays:
        tops.append(largest(array))
        yield array


def _quantiles16(arrays: Iterable[np.ndarray]) -> tuple[float, float]:
    counts = sum(np.bincount(array.ravel(), minlength=65536) for array in arrays)
    share = counts.cumsum() / counts.sum()
    lo, hi = (int(np.searchsorted(share, q)) for q in QUANTILES)
    if lo == hi:
        lo, hi = np.flatnonzero(counts)[[0, -1]]
    return float(lo), float(hi)


def _quantiles(arrays: Iterable[np.ndarray], each: int = 100_000) -> tuple[float, float]:
    """As `_quantiles16` with at most `each` values of an image, drawn at random."""
    rng = np.random.default_rng(0)
    values = np.concatenate([a.ravel() if a.size <= each else rng.choice(a.ravel(), each, shuffle=False) for a in arrays])
    lo, hi = np.quantile(values, QUANTILES, method="inverted_cdf")
    if lo == hi:
        lo, hi = values.min(), values.max()
    return float(lo), float(hi)


class ValueCheck:
    """Compares images with the training images: InputError for a dtype that these did not have, a warning for another range of values.

    ranges: of the training images; without any no dtype is refused. window: (lo, hi) of dtypes that are not refused. key: of the setting
    that would name one, "" where there is none. assumed: (lo, hi) of dtypes that are accepted with a warning. named: dtypes whose window
    was given in place of the training's. Warnings are collected, one for all images, until `report`.
    """

    def __init__(
        self,
        ranges: Mapping[str, Range],
        window: Mapping[str, tuple[float, float]],
        key: str = "data.window",
        assumed: Mapping[str, tuple[float, float]] | None = None,
        named: Iterable[str] = (),
    ):
        self.ranges, self.window, self.key, self.assumed = dict(ranges), dict(window), key, dict(assumed or {})
        self.named = set(named)
        self.checked: set[str] = set()
        self.new: dict[str, str] = {}  # the first image of a dtype that is assumed
        self.doubts: dict[str, str] = {}  # what is wrong, by image

    def __call__(self, image: object, array: np.ndarray, roi: Callable[[], np.ndarray | None] = lambda: None) -> None:
        """Check an image, once for each path; `roi` gives the roi of interest, (H, W) bool, None for all of it."""
        name, dtype = str(image), array.dtype.name
        expected = self.expected(dtype)
        if name in self.checked or (expected is None and not self.ranges):
            return
        if expected is None:
            named = f"{self.key}={suggestion(array)} for what is black and white in {dtype}, " if self.key else ""
            raise InputError(
                f"{name}: {dtype} with values from {array.min():g} to {array.max():g}, but training had {self.trained()} alone; expected "
                f"images converted to what training had, {named}or a detector trained on {dtype} too"
            )
        self.checked.add(name)
        if dtype not in self.ranges and dtype not in self.window:
            self.new.setdefault(dtype, name)
        inside = roi()
        if found := self.doubt(array if inside is None else array[inside]):
            self.doubts[name] = f"{dtype}, {found}"
            if get_worker_info() is not None:  # what a process collects is lost with it
                self.report()

    def expected(self, dtype: str) -> Range | None:
        """The values that training had of a dtype, else what its window has room for; None where there is neither."""
        if dtype in self.ranges and dtype not in self.named:
            return self.ranges[dtype]
        ends = self.window.get(dtype) or self.assumed.get(dtype)
        return range_of(*ends) if ends else None

    def doubt(self, array: np.ndarray) -> str:
        """How values do not fit those of the training or the window, "" where they do."""
        dtype = array.dtype.name
        lo, hi, _ = expected = self.expected(dtype)
        trained = dtype in self.ranges and dtype not in self.named
        if found := doubt(array, expected):
            return f"{found}, {'training had' if trained else 'the window is'} {lo:g} to {hi:g}"
        lo, hi = self.window.get(dtype, (lo, hi))
        found = trained and doubt(array, Range(lo, hi, lo))
        return f"{found}, the window is {lo:g} to {hi:g}" if found else ""

    def loading(self, read: Callable, roi: Callable[..., np.ndarray | None] | None = None) -> Callable:
        """`read` that checks what it returns; `roi(path, height, width)` is an image's roi of interest."""

        def load(image: Path | np.ndarray) -> np.ndarray:
            array, path = read(image), image if isinstance(image, Path) else None
            name = path or f"image {len(self.checked)}"
            self(name, array, lambda: roi(path, *array.shape[:2]) if roi else None)
            return array

        return load

    def trained(self) -> str:
        """The dtypes and values that training had, in words."""
        return " and ".join(f"{dtype} from {lo:g} to {hi:g}" for dtype, (lo, hi, _) in self.ranges.items())

    def report(self) -> None:
        """Warn of what was found since the last report."""
        named = f"{self.key}={'(lo, hi)' if self.assumed else '[lo,hi]'}"
        for dtype, name in self.new.items():
            lo, hi = self.assumed[dtype]
            log.warning(
                "%s: %s, but training had %s alone; %g is taken for black and %g for white. If they are not, give %s, convert such images "
                "as those of the training were, or train on them",
                *(name, dtype, self.trained(), lo, hi, named),
            )
        if self.doubts:
            log.warning(
                "%d of %d images have values that hardly fit the detector: their scores mean little. The first is %s: %s. If exposure or "
                "bit alignment changed, convert them%s or train on such images",
                *(len(self.doubts), len(self.checked), *next(iter(self.doubts.items()))),
                f", give {named} for what is black and white in them," if self.key else "",
            )
        self.new, self.doubts = {}, {}


def suggestion(array: np.ndarray) -> str:
    """A window of one dtype as it is typed: all that the bits of its camera may hold."""
    if array.dtype == np.uint8:
        return "'{uint8: [0, 255]}'"
    lo, hi = float(array.min()), float(array.max())
    return f"[{min(lo, 0):g},{next((depth for depth in DEPTHS if hi <= depth), hi):.10g}]"
