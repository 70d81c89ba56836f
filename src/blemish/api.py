"""`AnomalyDetector`: training, test and prediction from Python, without a config or a run folder."""

import contextlib
import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, overload

import numpy as np
from lightning.pytorch.utilities.seed import isolate_rng
from PIL.Image import Image as Picture
from torch import Tensor

from blemish.data.arrays import ASSUMED, ArrayData, Image, array_of, check_of, gather
from blemish.data.roi import Roi
from blemish.detector import Detector, TrainedDetector
from blemish.draw import Scale
from blemish.edge.calibration import SPLIT, Threshold
from blemish.edge.checks import check_number
from blemish.edge.errors import InputError
from blemish.edge.monitor import unusual
from blemish.edge.result import Result
from blemish.edge.selection import Step, certificate
from blemish.products import Products
from blemish.run.auto import AUTO, FEW, choose
from blemish.run.calibrate import calibrated_fit
from blemish.run.checkpoint import build_detector, contents, device_of, load, save_whole, saved_scale
from blemish.run.config import DictConfig, check_config, module_of
from blemish.run.evaluate import Calibrate
from blemish.run.options import configured
from blemish.run.predict import anomalous, write
from blemish.run.products import fit_product
from blemish.run.results import (
    RECOGNISED,
    ImageResult,
    Preprocessing,
    Rule,
    fit_to_folder,
    images_at,
    output_names,
    predict,
    preprocessing_of,
    recognised,
)
from blemish.run.train import build_model, expected_warnings, trainer_of

log = logging.getLogger(__name__)

Images = str | os.PathLike[str] | np.ndarray | Tensor | Picture  # an image, or a folder or batch of them


class AnomalyDetector:
    """A method by its name, with the settings of its recipe unless `options` change them; see docs/python.md.

    Images are files, folders, arrays, tensors, pictures of Pillow, or several of these in a list or an iterator; the dtype, not the values,
    says what is white: 255 of uint8, 65535 of uint16, 1 of floats. InputError for an option, a value or an image that cannot be used.

    Args:
        method: as in configs/model, or "auto": `train` chooses it by the number of images, and logs which and why.
        roi: mask as a file or an array (H, W) or (H, W, C), white inside the ROI, see `data.masks.interpret`.
        options: SETTINGS of train.yaml; recipe (False: the paper's settings); epochs of a method that trains; calibration (share held out);
            value_range ((lo, hi) of deep images); device; progress; every constructor argument of the method. Without `backbone` and
            `weights` the bundled ones are used, which need no network.
    """

    def __init__(self, method: str = "self_similarity", *, roi: str | Path | np.ndarray | None = None, **options: Any):
        self._auto = dict(options) if method == AUTO else None  # what `train` chooses a method with
        method = choose(FEW + 1, 0)[0] if method == AUTO else method
        self._begin(configured(method, options), options.get("device", "auto"), one_mask(roi))
        if "epochs" in options and not isinstance(self.model, TrainedDetector):
            raise InputError(f"epochs={options['epochs']}: {method} fits in a single pass or not at all; leave epochs out")

    def _begin(self, cfg: DictConfig, device: str, roi: Roi | None, model: Detector | None = None) -> None:
        self.cfg, self.roi, self.device = cfg, roi, device_of(device)
        cfg.trainer.accelerator = {"cuda": "gpu"}.get(self.device.type, self.device.type)
        cfg.trainer.devices = 1 if self.device.index is None or self.device.type == "cpu" else [self.device.index]
        check_config(cfg)
        self._data([], [])
        self.model = (model or build_detector(cfg)).eval().to(self.device)
        self.ready = model is not None or not self.model.needs_fit
        self.scale: Scale | None = None  # of the colours of overlays, from held-out images
        self._by_hand: dict[str, float] = {}

    def __repr__(self) -> str:
        if not self.ready:
            return f"AnomalyDetector({self.method}, not fitted, {self.device})"
        if self.products:
            return f"AnomalyDetector({self.method}, products {', '.join(self.products)}, {self.device})"
        value, promise = self.threshold.value, "by hand" if self.threshold.by_hand else f"alpha={self.threshold.alpha:.3g}"
        decides = "no threshold" if value is None else f"threshold={value:.4g} ({promise})"
        return f"AnomalyDetector({self.method}, {decides}, {self.device})"

    @property
    def method(self) -> str:
        return module_of(self.cfg.model)

    @property
    def threshold(self) -> Threshold:
        """The threshold of scores; its `explain()` describes what it promises. InputError for several products, see `thresholds`.

        An assigned number replaces it, without a promise, until None or `alpha` is assigned, or the detector is trained.
        """
        if self.products:
            raise InputError("threshold: each product has its own; expected thresholds")
        return self._rule.threshold

    @property
    def products(self) -> list[str]:
        """The products of a detector of several, sorted."""
        return list(self.model.names) if isinstance(self.model, Products) else []

    @property
    def thresholds(self) -> dict[str, Threshold]:
        """The threshold of each product of a detector of several."""
        return {name: rule.threshold for name, rule in self._rule.products.items()}

    @threshold.setter
    def threshold(self, value: float | None) -> None:
        self._set_by_hand("threshold", value)

    @property
    def map_threshold(self) -> float | None:
        """The threshold of maps, the method's own or from held-out images; assigned like `threshold`."""
        return self._rule.level

    @map_threshold.setter
    def map_threshold(self, value: float | None) -> None:
        self._set_by_hand("map_threshold", value)

    @property
    def alpha(self) -> float:
        """The bound on false alarms; assigning it replaces a threshold set by hand."""
        return self.cfg.alpha

    @alpha.setter
    def alpha(self, value: float) -> None:
        check_number("", "(0, 1)", alpha=value)
        self.cfg.alpha = float(value)
        self._by_hand.pop("threshold", None)

    def _set_by_hand(self, name: str, value: float | None) -> None:
        self._check_ready(name)
        check_number("", "(-inf, inf)", also=(None,), **{name: value})
        self._by_hand.pop(name, None)
        self._by_hand |= {} if value is None else {name: float(value)}

    @property
    def _rule(self) -> Rule:
        return Rule.of(self.model, self.cfg.alpha, self._by_hand)

    @property
    def _low(self) -> float | None:
        return None if self.scale is None else self.scale[0]

    def train(self, train: Images | Iterable[Any] | Mapping[str, Any], val: Any = None) -> "AnomalyDetector":
        """Fit to normal images, from scratch, with thresholds from those in `val` or from a share of `train`; returns itself.

        With calibrate="full" or "cross" both are fitted to, and all give the thresholds. Images of several products, which `predict` then
        tells apart, are given as {product: images}, and so are those in `val`.
        """
        if isinstance(train, Mapping):
            self._auto, self.cfg.data.category = None, sorted(train)
            self.model, self.ready, self.scale, self._by_hand = build_model(self.cfg), True, None, {}
            return [self.add(name, train[name], (val or {}).get(name)) for name in sorted(train)][-1]
        normal, held_out = gather(train)[0], [] if val is None else gather(val)[0]
        if self._auto is not None:
            method, reason = choose(len(normal) + len(held_out), 0)
            log.info("%s: %s", method, reason)
            alpha = self.alpha
            self._begin(configured(method, self._auto), str(self.device), self.roi)
            self.alpha = alpha
        model = build_model(self.cfg)
        data = self._data(normal, held_out) if model.fits_training_images else self._data([], normal + held_out)
        model.check_images(data.count("train"), data.count("calibrate"))
        calibrate = Calibrate()
        with self._fitting(data):
            calibrated_fit(self.cfg, trainer_of(self.cfg, [calibrate]), model, calibrate, data, trainer_of, as_they_are)
        self.model, self.ready, self._by_hand = model.eval().to(self.device), True, {}
        self.scale = self._rule.scale((calibrate.low, None, -math.inf))
        log.log(logging.INFO if self.threshold.reachable else logging.WARNING, self.threshold.explain())
        return self

    def add(self, product: str, train: Images | Iterable[Any], val: Images | Iterable[Any] | None = None) -> "AnomalyDetector":
        """Add a product to a detector of several, or replace it, fitted as by `train`; the others stay as they are."""
        self._check_ready("add")
        if not isinstance(self.model, Products):
            raise InputError(f"add: a detector of one product; expected train({{{product!r}: images, …}})")
        data = self._data(gather(train)[0], [] if val is None else gather(val)[0])
        self.model.add(product, build_detector(self.cfg, one=True))
        with self._fitting(data):
            fit_product(self.cfg, self.model, product, data, trainer_of, as_they_are)
        self.model, self.cfg.data.category = self.model.eval().to(self.device), self.products
        log.info("%s: %s", product, self.thresholds[product].explain())
        return self

    def remove(self, product: str) -> "AnomalyDetector":
        """Remove a product from a detector of several, which then is as if it had never been added."""
        if not isinstance(self.model, Products):
            raise InputError(f"remove: {product} of a detector of one product")
        self.model.remove(product)
        self.cfg.data.category = self.products
        return self

    @contextlib.contextmanager
    def _fitting(self, data: ArrayData) -> Iterator[None]:
        data.setup()
        data.check("calibrate")
        with expected_warnings(), quiet(), isolate_rng():
            yield
        data.values.report()

    @overload
    def predict(self, images: Picture) -> Result: ...
    @overload
    def predict(self, images: Iterator[Any]) -> Iterator[Result]: ...
    @overload
    def predict(self, images: list[Any] | tuple[Any, ...]) -> list[Result]: ...
    @overload
    def predict(self, images: Images) -> Result | list[Result]: ...
    def predict(self, images: Any) -> Any:
        """Return the Result of one image, or the list of those of a folder (searched at any depth, sorted), a batch or a list.

        An iterator, such as a generator of a camera's frames, is read one image at a time, and the results come from an iterator.
        """
        self._check_ready("predict")
        if isinstance(images, Iterator):
            return self._stream(images)
        (images, several), rule = gather(images), self._rule
        results = [self._result(one, rule) for one in self._predict(images)]
        return results if several else results[0]

    def test(self, folder: str | Path, output: str | Path) -> list[Result]:
        """Write `<name>_overlay.png`, `_mask.png`, `_map.png` (16 bit) of every image of a folder, or of one file, and scores.csv.

        The results come without their maps, which may be more than the memory holds. Images that cannot be used have no result, and are
        listed in failed.csv with a warning; InputError where none can be used, and where an output would replace a file that blemish did
        not write.
        """
        folder, output = Path(folder).expanduser(), Path(output).expanduser()
        paths, results, failed, rule = images_at(folder), [], [], self._rule

        def noted() -> Iterator[ImageResult]:
            for one in self._predict(paths, failed):
                results.append(self._result(one, rule).without_map())
                yield one

        names = output_names(paths, folder.parent if folder.is_file() else folder)
        rows = write(noted(), rule, names, output, self.scale, failed)
        for path, reason in failed:
            log.warning("not scored: %s: %s", path, reason)
        if warning := unusual(anomalous(rows), len(rows), rule.threshold):
            log.warning(warning)
        return results

    def certificate(self, results: Sequence[Result]) -> list[Step]:
        """For every threshold the alarms among the results of a folder and an upper bound on the false ones, valid for all at once.

        The highest score comes first. InputError unless the detector has been calibrated with held-out images.
        """
        self._check_ready("certificate")
        rule = self._rule.at(next((one.product for one in results), None))
        if len({one.product for one in results}) > 1:
            raise InputError("certificate: results of several products; expected those of one at a time")
        if not rule.scores or rule.threshold.promise != SPLIT:
            raise InputError("certificate: proven for held-out images alone; train with calibrate='split', or val=...")
        return certificate([one.score for one in results], [one.p_value for one in results], len(rule.scores))

    def save(self, path: str | Path) -> None:
        """Write weights and settings to one file, complete or absent, which every tool accepts as `run=FILE`."""
        self._check_ready("save")
        path = Path(path).expanduser()
        if path.suffix == ".safetensors":  # torch.load would read another format
            raise InputError(f"{path}: not of that format; choose another suffix, for instance {path.stem}.ckpt")
        if path.exists() and not is_detector(path):
            raise InputError(f"{path}: exists and is not a saved detector; move it away, or choose another place")
        save_whole(self.cfg, self.model, self.roi, path, scale=self.scale, by_hand=self._by_hand)

    @classmethod
    def load(cls, path: str | Path, device: str = "auto") -> "AnomalyDetector":
        """Load what `save` wrote, or the detector of a run folder; no code of either is run. InputError for anything else."""
        path = Path(path).expanduser()
        cfg, model = load(path, device)
        detector = cls.__new__(cls)
        detector._auto = None
        try:
            roi, cfg.data.roi, cfg.logger = one_mask(cfg.data.roi), None, None
            if "weights" in cfg.model:
                cfg.model.weights = cfg.weights
            detector._begin(cfg, device, roi, model)
            detector.scale = saved_scale(path, cfg)
            for name, value in (cfg.get("by_hand") or {}).items():
                if name not in ("threshold", "map_threshold"):
                    raise InputError(f"by_hand: {name}; expected threshold or map_threshold")
                detector._set_by_hand(name, value)
        except (InputError, ValueError, TypeError) as error:
            raise InputError(f"{path}: {error}") from error
        return detector

    def _check_ready(self, what: str) -> None:
        if not self.ready and self.model.reference_folder:
            fit_to_folder(self.model, self._preprocessing)
            self.ready = True
        if not self.ready:
            raise InputError(f"{what}: {self.method} has not been fitted; call train(...) first, or AnomalyDetector.load(path)")

    def _data(self, train: Sequence[Image], val: Sequence[Image]) -> ArrayData:
        cfg, data = self.cfg, self.cfg.data
        settings = {name: data[name] for name in ("image_size", "crop", "resize", "batch_size", "workers", "seed", "calibration")}
        if self.cfg.calibrate != SPLIT and train:
            settings["protocol"] = "paper"  # nothing is held out
        module = ArrayData(train=train, val=val, window=self._window, roi=self.roi and self.roi.mask, **settings)
        module.set_loading(cfg.tiling, cfg.overlap, cfg.epoch_size)
        return module

    @property
    def _window(self) -> dict[str, tuple[float, float]]:
        window = self.cfg.data.window
        window = window if hasattr(window, "items") else {}  # "auto" of a run on bytes alone
        return {dtype: ASSUMED[dtype] for dtype in ("uint16", "float32")} | {dtype: tuple(ends) for dtype, ends in window.items()}

    @property
    def _preprocessing(self) -> Preprocessing:
        return preprocessing_of(self.cfg)._replace(window=self._window, roi=self.roi)

    def _predict(
        self, images: Iterable[Image], failed: list[tuple[Path, str]] | None = None, endless: bool = False
    ) -> Iterator[ImageResult]:
        """Score images; those that cannot be used are added to `failed`, or raise InputError without it.

        endless: read one at a time, warn of values at the first image that has them, and remember none.
        """
        self._check_ready("predict")
        preprocessing = self._preprocessing
        values = check_of(self.model.ranges, self._window)
        reader = values.loading(partial(array_of, window=self._window), preprocessing.inside)
        size = 1 if endless and not preprocessing.tile else self.cfg.data.batch_size  # by tiles, it is a number of tiles
        warned = False
        for one in predict(self.model, images, preprocessing, size, load=reader, failed=failed):
            if endless and (values.new or values.doubts) and not warned:
                values.report()
                warned = True
            if endless:
                values.checked, values.new, values.doubts = set(), {}, {}
            yield one
        values.report()

    def _stream(self, images: Iterator[Any]) -> Iterator[Result]:
        rule, images = self._rule, chain.from_iterable(gather(one)[0] for one in images)
        for one in self._predict(images, endless=True):
            yield self._result(one, rule)

    def _result(self, one: ImageResult, rule: Rule) -> Result:
        score, map, every, rule = one.score, None if one.map is None else one.map[:], rule, rule.at(one.product)
        levels = {
            "region_levels": tuple(rule.region_levels),
            "threshold": rule.threshold.value,
            "map_threshold": rule.level,
            "low": self._low,
        }
        if every.products:
            levels |= dict(zip(RECOGNISED, recognised(one.product, one.product_p_value, every.alpha), strict=True))
        return Result(score, rule.p_value(score), rule.decide(score), map, one.path, one.image, inside=one.inside, **levels)


def as_they_are(images: ArrayData, model: Detector) -> ArrayData:
    """What a trainer is given of images that nothing is stored of."""
    return images


def is_detector(path: Path) -> bool:
    """Whether a file is a saved detector, or the checkpoint of a run."""
    with contextlib.suppress(Exception):
        return "config" in contents(path)
    return False


def one_mask(roi: str | Path | np.ndarray | None) -> Roi | None:
    """Return a ROI of one mask for all images; InputError for a folder of masks."""
    found = None if roi is None else Roi(roi)
    if found and found.folder:
        raise InputError(f"roi={roi}: a folder; expected one mask for all images, a file or an array")
    return found


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Leave out Lightning's notes on devices."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
