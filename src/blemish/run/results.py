"""Score images of any size with a fitted detector, decide on them, and keep maps in each image's own pixels."""

import bisect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from blemish.data.images import check_not_all_ignored, ignore_mask, prepare, to_image
from blemish.data.ranges import fit_ranges
from blemish.data.roi import Roi
from blemish.data.tiles import bytes_of
from blemish.detector import Detector, OnePassDetector
from blemish.draw import Scale
from blemish.edge.calibration import SPLIT, by_hand, conformal_threshold
from blemish.edge.errors import InputError, named
from blemish.edge.geometry import Geometry
from blemish.edge.outputs import images_at as images_at  # for those who predict
from blemish.edge.outputs import output_names as output_names
from blemish.edge.reading import read
from blemish.edge.selection import adjusted
from blemish.noise.false_alarms import Detection, detections
from blemish.ops.maps import apply_ignore_mask
from blemish.products import Products
from blemish.run.tiling import MapOnDisk, Preprocessing, score_image
from blemish.types import ProductPrediction

RECOGNISED = ("product", "product_p_value", "unknown_product")  # columns of tables of several products


class ImageResult(NamedTuple):
    """The result of one image; the map is in the image's own pixels."""

    path: Path | None  # None of an array
    image: np.ndarray  # (H, W, 3) uint8, as the detector's window shows it
    score: float
    map: np.ndarray | MapOnDisk | None  # (H, W) float32
    inside: np.ndarray | None = None  # ROI (H, W) bool, None for the full image
    detections: list[Detection] | None = None  # of a method that lists them itself
    product: str | None = None  # of a detector of several, with the p-value of the image's being one of them
    product_p_value: float | None = None


def preprocessing_of(saved: DictConfig, roi: str | None = None, root: str | Path | None = None) -> Preprocessing:
    """Return the preprocessing of a run from its config, with another ROI, or with images below another root.

    A run on data that are tiles cuts images into such tiles.
    """
    data, roi = saved.data, roi or saved.data.get("roi")
    window = {dtype: tuple(ends) for dtype, ends in data.window.items()} if hasattr(data.window, "items") else {}
    geometry = Geometry(data.image_size, data.crop, data.resize)
    tile, overlap = saved.tiling, saved.overlap
    if data.get("unit") == "tile" and data.crop is None:  # the tiles of GDXray
        tile, overlap = data.tile, data.tile - (data.stride or data.tile)
    return Preprocessing(geometry, window, tile, overlap, None if roi is None else Roi(roi, root or data.root))


class Rule:
    """The threshold of scores, the level of maps, and p-values, from the scores and largest map values of calibration images (n, 2).

    `threshold.value` and `level` are None where there is nothing to take them from. A method's own level, and in `chosen` a "threshold" and
    a "map_threshold" set by hand, take the place of the calibrated ones. `source` is "calibration", "by hand", "method", "fdr" or None.
    """

    def __init__(
        self,
        calibration: Tensor,
        alpha: float,
        own_level: float | None = None,
        chosen: Mapping[str, float] | None = None,
        promise: str = SPLIT,
        region_levels: Sequence[float] = (),
    ):
        scores, peaks = calibration.detach().cpu().T if len(calibration) else torch.empty(2, 0)
        threshold, level = ((chosen or {}).get(name) for name in ("threshold", "map_threshold"))
        self.threshold = conformal_threshold(scores, alpha, promise) if threshold is None else by_hand(threshold, scores, promise)
        calibrated = conformal_threshold(peaks, alpha).value
        self.level = first(level, own_level, calibrated)
        self.normal = first(level, calibrated)  # map value above which pictures are coloured
        self.scores = sorted(scores.double().tolist())
        self.source = "by hand" if threshold is not None else "calibration" if self.scores else None
        self.bound_kind: str | None = None  # what the method's own bound rests on
        self.fdr, self.alpha, self.region_levels = None, alpha, list(region_levels) if self.scores and promise == SPLIT else []
        self.products: dict[str, Rule] = {}  # of a detector of several, in place of all the above

    def at(self, product: str | None) -> "Rule":
        """Return the rule for images of a product, of a detector of several."""
        return self.products.get(product, self)

    @property
    def calibrated(self) -> bool:
        return bool(self.scores) or any(rule.scores for rule in self.products.values())

    @classmethod
    def of(cls, model: Detector, alpha: float, chosen: Mapping[str, float]) -> "Rule":
        """Return the rule of a fitted detector; one that needs no calibration decides by its own level without it."""
        rule = cls(model.calibration, alpha, model.map_threshold, chosen, model.promise, model.region_levels.tolist())
        if model.decides_by_map and rule.source is None:
            rule.threshold, rule.source, rule.bound_kind = by_hand(model.map_threshold, torch.empty(0)), "method", model.bound_kind
        if isinstance(model, Products):
            if "threshold" in chosen or "map_threshold" in chosen:
                raise InputError("threshold: each of several products has a scale of its own; expected alpha=NUMBER")
            rule.products = {name: cls.of(part, alpha, {}) for name, part in zip(model.names, model.parts, strict=True)}
        return rule

    def select_by(self, fdr: float) -> None:
        """Decide by the p-values of all images together, see `selected`: before, there is no threshold."""
        for rule in (self, *self.products.values()):
            rule.fdr, rule.source, rule.threshold = fdr, "fdr", rule.threshold._replace(value=None)

    def selected(self, p_values: Sequence[float]) -> tuple[np.ndarray, float]:
        """Return which of the images (m,) are anomalous with an expected share of false alarms of at most `fdr`, and their largest p."""
        chosen = adjusted(p_values) <= self.fdr
        return chosen, max(np.asarray(p_values)[chosen], default=0.0)

    def quantile(self, p_value: float) -> float | None:
        """Return the threshold above which p-values are at most `p_value`, None where none are."""
        above = math.floor(p_value * (len(self.scores) + 1) + 1e-9)  # p-values are multiples of 1 / (n + 1)
        return self.scores[len(self.scores) - above] if 0 < above <= len(self.scores) else None

    def scale(self, found: Scale | None) -> Scale | None:
        """Return the scale of pictures from the one that a run found: normal images end where calibration images do, if there are some."""
        low, normal, high = found or (None, None, -math.inf)
        return scale_of(low, first(self.normal, normal, self.level), high)

    def decide(self, score: float) -> bool | None:
        """Return whether an image is anomalous, None without a threshold."""
        return None if self.threshold.value is None else score > self.threshold.value

    def p_value(self, score: float) -> float | None:
        """Return (1 + #{calibration scores ≥ score}) / (n + 1), None without calibration images."""
        n = len(self.scores)
        return (1 + n - bisect.bisect_left(self.scores, score)) / (n + 1) if n else None

    def columns(self, score: float) -> tuple[float | None, int | None, float | None]:
        """Return threshold, decision (1 anomalous, 0 normal) and p-value as tables have them, None for what there is not."""
        decision = self.decide(score)
        return self.threshold.value, None if decision is None else int(decision), self.p_value(score)


def recognised(product: str | None, p_value: float | None, alpha: float) -> tuple:
    """Return RECOGNISED of an image: its product, the p-value of its being one of the products, and 1 where that is at most alpha."""
    return product, p_value, None if p_value is None else int(p_value <= alpha)


def first(*values: float | None) -> float | None:
    """Return the first value that is not None."""
    return next((value for value in values if value is not None), None)


def scale_of(low: float | None, normal: float | None, high: float = -math.inf) -> Scale | None:
    """Return the scale of pictures from map values: the least, the largest of normal images, which None leaves without one, and of all.

    Without the least, maps are taken to begin at zero. Where the largest of all is not above that of normal images, the colours end as
    far above it as they begin below.
    """
    if normal is None:
        return None
    low = normal - abs(normal) if low is None else min(low, normal)
    return float(low), float(normal), float(high if high > normal else 2 * normal - low)


@torch.inference_mode()
def predict(
    model: Detector,
    images: Iterable[Path | np.ndarray],
    preprocessing: Preprocessing,
    batch_size: int,
    folder: Path | None = None,
    load: Callable[[Path | np.ndarray], np.ndarray] = read,
    failed: list[tuple[Path, str]] | None = None,
    detect: bool = False,
) -> Iterator[ImageResult]:
    """Score images in their order, `batch_size` images or tiles at a time.

    Images that cannot be scored are added to `failed` with the reason; without it the first raises InputError. `load` reads an image. Maps
    made of tiles are on disk in `folder`, None for the system's temporary folder. Pixels outside the ROI have no part in a score, and take
    the least value of the map. detect: score by `Detector.alarms`, which also lists detections.
    """
    geometry, window, *_ = preprocessing

    def scored(chosen: Sequence[Path | np.ndarray]) -> Iterator[ImageResult]:
        arrays = [load(image) for image in chosen]
        insides = [preprocessing.inside(path_of(image), *array.shape[:2]) for image, array in zip(chosen, arrays, strict=True)]
        if detect:
            found = [alarms_of(model, arrays[0], insides[0], preprocessing)]
        elif preprocessing.tile:
            found = [score_image(model, arrays[0], preprocessing, batch_size, folder, insides[0])]
        else:
            found = forward(model, arrays, insides, preprocessing)
        if not all(math.isfinite(score) for score, *_ in found):
            raise InputError("its score is not finite")
        return (result(*one) for one in zip(chosen, arrays, insides, found, strict=True))  # score, map, and more of some methods

    def result(image: Path | np.ndarray, array: np.ndarray, inside: np.ndarray | None, found: tuple) -> ImageResult:
        score, map, *more = found
        if isinstance(map, Tensor):
            map = to_image(map, *array.shape[:2], geometry, inside).numpy()  # (H, W)
        more = {"detections": more[0]} if detect else dict(zip(("product", "product_p_value"), more, strict=False))
        return ImageResult(path_of(image), bytes_of(array, window), score, map, inside, **more)

    def attempt(chosen: Sequence[Path | np.ndarray]) -> Iterator[ImageResult]:
        try:
            with named(chosen[0]):
                results = scored(chosen)
        except InputError as error:
            if len(chosen) == 1 and failed is None:
                raise
            if len(chosen) == 1:
                failed.append((chosen[0], str(error).removeprefix(f"{chosen[0]}: ")))
            results = chain.from_iterable(attempt([image]) for image in chosen if len(chosen) > 1)
        yield from results

    size = batch_size if geometry.size and not preprocessing.tile else 1  # images of their own sizes do not stack
    images = iter(images)
    while chosen := list(islice(images, size)):
        yield from attempt(chosen)


@torch.no_grad()
def fit_to_folder(model: OnePassDetector, preprocessing: Preprocessing) -> None:
    """Fit a method to all images of its `reference_folder`; InputError if one cannot be used, or if images are cut into tiles."""
    folder = model.reference_folder
    if preprocessing.tile:
        raise InputError(f"model.references={folder}: not with images that are cut into tiles; expected a number")
    paths = images_at(folder)
    state = model.new_state(len(paths))
    for path in paths:
        with named(path):
            array = read(path)
            image = prepare(array, preprocessing.window, preprocessing.geometry, preprocessing.inside(path, *array.shape[:2]))
            state.update(model.collect(model.features(image[None].to(model.device))))
    model.fit(state)
    model.fitted.fill_(len(paths))
    model.ranges = model.ranges or fit_ranges(paths)


def forward(
    model: Detector, arrays: Sequence[np.ndarray], insides: Sequence[np.ndarray | None], preprocessing: Preprocessing
) -> list[tuple]:
    """Return the score and the map (h, w) in the network's pixels of each image of a batch, and for several products which and its p."""
    geometry, window, *_ = preprocessing
    pairs = list(zip(arrays, insides, strict=True))
    images = torch.stack([prepare(array, window, geometry, inside) for array, inside in pairs]).to(model.device)  # (B, 3, h, w)
    masks = [ignore_mask(*array.shape[:2], geometry, inside) for array, inside in pairs]
    none = torch.zeros(images.shape[2:], dtype=torch.bool)
    mask = None if all(one is None for one in masks) else torch.stack([none if one is None else one for one in masks]).to(model.device)
    found = model(images)
    score, map = apply_ignore_mask(found, mask, model.map_share)
    columns = [score.tolist(), [None] * len(score) if map is None else map.cpu()]
    if isinstance(found, ProductPrediction):
        columns += [[model.names[place] for place in found.product.tolist()], found.p_value.tolist()]
    return list(zip(*columns, strict=True))


def alarms_of(
    model: Detector, array: np.ndarray, inside: np.ndarray | None, preprocessing: Preprocessing
) -> tuple[float, np.ndarray, list[Detection]]:
    """Return −min log10 NFA of an image, the map −log10 NFA (H, W), and the detections.

    Pixels outside the ROI still serve as noise. Their NFA is the largest inside, and above ε; the tests are as many, so the bound holds.
    """
    alarms = model.alarms(prepare(array, preprocessing.window, preprocessing.geometry)[None].to(model.device))
    if inside is not None:
        check_not_all_ignored(~inside)
        where = torch.from_numpy(inside).to(model.device)
        rest = alarms.log10_nfa[:, where].amax().clamp_min(math.log10(model.epsilon) + 1)
        alarms = alarms._replace(log10_nfa=torch.where(where, alarms.log10_nfa, rest))
    map = -alarms.log10_nfa[0].cpu().numpy()
    return float(map.max()), map, *detections(alarms, model.epsilon)


def path_of(image: Path | np.ndarray) -> Path | None:
    return image if isinstance(image, Path) else None
