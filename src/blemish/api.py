"""`AnomalyDetector`: training, test and prediction from Python, with neither config nor run folder."""

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities.seed import isolate_rng
from scipy import ndimage

from blemish.data.arrays import ASSUMED, ArrayData, Image, array_of, check_of, images_of, window_of
from blemish.data.roi import Roi
from blemish.detector import Detector, OnePassDetector, TrainedDetector
from blemish.edge.calibration import Threshold, p_values
from blemish.edge.checks import check_number, check_switch, check_whole, nearest
from blemish.edge.errors import InputError
from blemish.edge.geometry import Geometry
from blemish.features.weights import BUNDLED
from blemish.run.checkpoint import Streamed, device_of, load, portable_config
from blemish.run.config import DictConfig, build, check_config, class_of, composed, module_of, names, plain
from blemish.run.evaluate import Calibrate
from blemish.run.monitor import unusual
from blemish.run.results import Failure, ImageResult, Preprocessing, anomalous, images_at, output_names, predict, thresholds, write
from blemish.run.tiling import stitch_callbacks
from blemish.run.train import calibrated, expected_warnings, trainer_of

log = logging.getLogger(__name__)

# as train.yaml has them
SETTINGS = ("backbone", "weights", "image_size", "crop", "resize", "tiling", "overlap", "batch_size", "epoch_size")
SETTINGS += ("workers", "seed", "alpha")
OTHERS = ("recipe", "epochs", "calibration", "value_range", "device", "progress")


class Result(NamedTuple):
    """What is said of one image, in its own pixels."""

    score: float  # larger is more anomalous
    p_value: float | None  # share of held-out normal images that score at least as high; None without any
    decision: bool | None  # anomalous? True for at most a share alpha of normal images; None without a threshold
    map: np.ndarray | None  # (H, W) float32; None for a method that judges whole images
    boxes: list[tuple[int, int, int, int]]  # (x, y, w, h) of what is above the map's threshold, the most anomalous first
    path: Path | None = None  # of a file


class AnomalyDetector:
    """A method by its name, with the settings of its recipe but for `options`; see docs/python.md.

    Options are backbone, weights, image_size, crop, resize, tiling, overlap, batch_size, workers, seed, alpha (bound on false alarms),
    recipe (False: the paper's settings), epochs (of a method that trains), epoch_size (images that one draws; None: each once),
    calibration (share held out), value_range ((lo, hi) of deep images), device, progress, and every constructor argument of the method.
    Without `backbone` and `weights` the bundled ones are taken, which need no network. `roi` is a mask, a file or an array (H, W) or
    (H, W, C), white where images are looked at, see `data.masks.interpret`.
    Images are files, folders, arrays, or lists of these: uint8 counts to 255, uint16 to 65535 and floats to 1, whatever values occur.
    InputError for an option, a value or an image that cannot be used.
    """

    def __init__(self, method: str = "self_similarity", *, roi: str | Path | np.ndarray | None = None, **options: Any):
        self._begin(configured(method, options), options.get("device", "auto"), one_mask(roi))
        if "epochs" in options and not isinstance(self.model, TrainedDetector):
            raise InputError(f"epochs={options['epochs']}: {method} looks at every image once, or not at all; leave epochs out")

    def _begin(self, cfg: DictConfig, device: str, roi: Roi | None, model: Detector | None = None) -> None:
        self.cfg, self.device, self.roi, self.low = cfg, device_of(device), roi, None
        self._by_hand: dict[str, float | None] = {}
        self.model = (model or self._built()).eval().to(self.device)
        self.ready = model is not None or not isinstance(self.model, OnePassDetector | TrainedDetector)

    def _built(self) -> Detector:
        return build(plain(self.cfg)["model"], _recursive_=False)

    @property
    def method(self) -> str:
        return module_of(self.cfg.model)

    @property
    def threshold(self) -> Threshold:
        """Of scores, from the held-out normal images; its `explain()` says what it promises.

        A number that is assigned takes its place, without a promise, until None is assigned, `alpha` is, or it is trained anew.
        """
        return self._thresholds()[0]

    @threshold.setter
    def threshold(self, value: float | None) -> None:
        self._set_by_hand("threshold", value)

    @property
    def map_threshold(self) -> float | None:
        """Of maps: the method's own, else from the largest map values of the held-out normal images; None without any.

        A number that is assigned takes its place until None is, or it is trained anew.
        """
        return self._thresholds()[1]

    @map_threshold.setter
    def map_threshold(self, value: float | None) -> None:
        self._set_by_hand("map_threshold", value)

    @property
    def alpha(self) -> float:
        """The bound on false alarms that the threshold comes from; assigned, it gives a threshold that was set by hand up."""
        return self.cfg.alpha

    @alpha.setter
    def alpha(self, value: float) -> None:
        check_number("", "(0, 1)", alpha=value)
        self.cfg.alpha = float(value)
        self._by_hand.pop("threshold", None)

    def _set_by_hand(self, name: str, value: float | None) -> None:
        self._check_ready(name)
        check_number("", "(-inf, inf)", also=(None,), **{name: value})
        self._by_hand[name] = None if value is None else float(value)

    def _thresholds(self) -> tuple[Threshold, float | None]:
        return thresholds(self.model.calibration, self.cfg.alpha, self.model.map_threshold, **self._by_hand)

    def train(self, train: Any, val: Any = None) -> "AnomalyDetector":
        """Fit to normal images, anew each time, with thresholds from those in `val`, else from a share of `train`; returns itself."""
        normal, held_out = gather(train)[0], [] if val is None else gather(val)[0]
        model = self._built()
        fits = isinstance(model, OnePassDetector | TrainedDetector)
        data = given(self.cfg, normal if fits else [], held_out if fits else normal + held_out, self.roi)
        if fits and data.count("train") < model.min_images:
            raise InputError(
                f"train: {self.method} compares whole images and takes {model.min_images} at least; found {len(normal)}, of which "
                f"{data.count('calibrate')} held out for the threshold"
            )
        data.setup()
        data.check("calibrate")
        model.ranges = data.ranges
        calibrate, lowest = Calibrate(), Lowest()
        with expected_warnings(), quiet(), isolate_rng():
            trainer = trainer_of(self.cfg, [*stitch_callbacks(data, calibrate, lowest)])
            model.expects_calibration = data.count("calibrate") > 0
            if fits:
                trainer.fit(model, datamodule=data)
            calibrated(trainer, model, calibrate, [data.calibrate_dataloader()] if model.expects_calibration else [])
        data.values.report()
        self.model, self.ready, self.low, self._by_hand = model.eval().to(self.device), True, lowest.value, {}
        log.log(logging.INFO if self.threshold.reachable else logging.WARNING, self.threshold.explain())
        return self

    def predict(self, images: Any) -> Result | list[Result]:
        """The Result of one file or array; of a folder (its paths sorted, at any depth), a batch or a list their list."""
        found, several = gather(images)
        results = [self._result(one) for one in self._found(found)]
        return results if several else results[0]

    def test(self, folder: str | Path, output: str | Path) -> list[Result]:
        """Write `<name>_overlay.png`, `_mask.png`, `_map.png` (16 bit) of every image of a folder, or of one file, and scores.csv.

        Pictures need a map and masks a threshold. The results come without their maps, which may be more than the memory holds. Images
        that cannot be used are listed in failed.csv, with a warning, and have no result; InputError where that is all of them, and where
        an output would replace a file that blemish did not write.
        """
        folder, output = Path(folder).expanduser(), Path(output).expanduser()
        paths, results, failed = images_at(folder), [], []

        def noted() -> Iterator[ImageResult]:
            for found in self._found(paths, failed):
                results.append(self._result(found)._replace(map=None))
                yield found

        names = output_names(paths, folder.parent if folder.is_file() else folder)
        rows = write(noted(), names, output, self.model.calibration, *self._thresholds(), self._scale(), failed)
        for path, reason in failed:
            log.warning("not scored: %s: %s", path, reason)
        if warning := unusual(anomalous(rows), len(rows), self.threshold):
            log.warning(warning)
        return results

    def save(self, path: str | Path) -> None:
        """One file with all weights and settings, whole or absent, which every tool takes as `run=FILE`."""
        self._check_ready("save")
        path = Path(path).expanduser()
        if path.suffix == ".safetensors":  # torch.load goes by this ending to another format
            raise InputError(f"{path}: not of that format; choose another ending, for instance {path.stem}.ckpt")
        if path.exists() and not is_detector(path):
            raise InputError(f"{path}: is there already and no file of AnomalyDetector.save; move it away, or choose another place")
        state = {key: value.detach().cpu() for key, value in self.model.state_dict().items()}
        more = portable_config(self.cfg, self.roi, low=self.low, by_hand=self._by_hand)
        Streamed().save_checkpoint({"state_dict": state, "hyper_parameters": dict(self.model.hparams), **more}, path)

    @classmethod
    def load(cls, path: str | Path, device: str = "auto") -> "AnomalyDetector":
        """What `save` wrote, or the detector of a run's folder; no code of either is run. InputError for anything else."""
        path = Path(path).expanduser()
        cfg, model = load(path, device)
        try:
            detector = cls.__new__(cls)
            own = configured(module_of(cfg.model), {**options_of(cfg), "recipe": False})
            detector._begin(own, device, one_mask(cfg.data.roi), model)
            detector.low = None if cfg.get("low") is None else float(cfg.low)
            for name, value in (cfg.get("by_hand") or {}).items():
                if name not in ("threshold", "map_threshold"):
                    raise InputError(f"by_hand: {name}; expected threshold or map_threshold")
                detector._set_by_hand(name, value)
        except (InputError, ValueError, TypeError) as error:
            raise InputError(f"{path}: {error}") from error
        return detector

    def _check_ready(self, what: str) -> None:
        if not self.ready:
            raise InputError(
                f"{what}: {self.method} has not been fitted to normal images yet; call train(...) first, or AnomalyDetector.load(path)"
            )

    def _scale(self) -> tuple[float, float] | None:
        """Map values at the ends of the overlays' colours, with the threshold in their middle; None leaves it to each image."""
        low = self.low if self.model.map_floor is None else self.model.map_floor
        return None if low is None or self.map_threshold is None else (low, 2 * self.map_threshold - low)

    def _found(self, images: Sequence[Image], failed: list[Failure] | None = None) -> Iterator[ImageResult]:
        """What the method says of images, read a batch at a time; those that cannot be used are added to `failed`, None to raise."""
        self._check_ready("predict")
        window = window_in(self.cfg)
        geometry = Geometry(self.cfg.image_size, self.cfg.crop, self.cfg.resize)
        preprocessing = Preprocessing(geometry, window, self.cfg.tiling, self.cfg.overlap, self.roi)
        values = check_of(self.model.ranges, window)
        load = values.loading(partial(array_of, window=window), preprocessing.inside)

        def found() -> Iterator[ImageResult]:
            yield from predict(self.model, images, preprocessing, self.cfg.batch_size, load=load, failed=failed)
            values.report()

        return found()

    def _result(self, found: ImageResult) -> Result:
        threshold, level = self._thresholds()
        p = decision = None
        if threshold.n:
            p = float(p_values(found.score, self.model.calibration[:, 0].cpu()))
        if threshold.value is not None:
            decision = found.score > threshold.value
        elif self.model.decides_by_map:
            decision = found.score > level
        map = None if found.map is None else np.asarray(found.map[:])
        shown = map if map is None or found.inside is None else np.where(found.inside, map, -np.inf)
        return Result(found.score, p, decision, map, [] if map is None or level is None else boxes_of(shown, level), found.path)


class Lowest(Callback):
    """The median of the smallest map values of the images of `trainer.predict`, None without any."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_predict_batch_end(self, trainer, module, outputs, batch, index: int, loader: int = 0) -> None:
        self.values += [] if outputs.map is None else outputs.map.amin((1, 2)).tolist()

    @property
    def value(self) -> float | None:
        return float(np.median(self.values)) if self.values else None


def configured(method: str, options: Mapping[str, Any]) -> DictConfig:
    """The config of a method, from its recipe or with recipe=False the paper's, changed by the options; InputError for unknown ones."""
    if method not in names("model"):
        raise InputError(f"method={method!r}: {near(method, names('model'))}")
    recipe = options.get("recipe", True)
    check_switch("", recipe=recipe)
    bundled = "backbone" not in options and "weights" not in options
    chosen = method if recipe and method in names("recipe") else "bundled" if bundled else None
    cfg = composed(f"model={method}", "logger=none", "data=folder", *([f"recipe={chosen}"] if chosen else []))
    own = [name for name in cfg.model if name not in ("_target_", *SETTINGS)]
    for name in options:
        if name not in (*SETTINGS, *OTHERS, *own):
            raise InputError(f"{name}: no option of {method}; {near(name, [*SETTINGS, *OTHERS, *own])}")
    values = {name: vetted(name, value) for name, value in options.items()}
    if "backbone" in values and "weights" not in values:
        values["weights"] = "bundled" if values["backbone"] in BUNDLED else "pretrained"
    if not issubclass(class_of(cfg.model), OnePassDetector | TrainedDetector):
        cfg.image_size, cfg.batch_size = None, 1  # a fit needs one size; without one, every image keeps its own
    for name, value in values.items():
        if name in SETTINGS:
            cfg[name] = value
        elif name in own:
            cfg.model[name] = value
    cfg.data.root, cfg.data.window = ".", {dtype: list(ends) for dtype, ends in window_of(values.get("value_range")).items()}
    cfg.data.calibration = values.get("calibration", cfg.data.calibration)
    cfg.trainer.max_epochs = values.get("epochs", cfg.trainer.max_epochs)
    cfg.trainer.enable_progress_bar = values.get("progress", True)
    check_switch("", progress=cfg.trainer.enable_progress_bar)
    device = device_of(values.get("device", "auto"))
    cfg.trainer.accelerator = {"cuda": "gpu"}.get(device.type, device.type)
    cfg.trainer.devices = 1 if device.index is None or device.type == "cpu" else [device.index]
    check_whole("", 1, epochs=cfg.trainer.max_epochs)
    check_config(cfg)
    given(cfg, [], [])
    return cfg


def options_of(cfg: DictConfig) -> dict[str, Any]:
    """Every option of a detector with its value, so that `configured` gives its config again."""
    values = plain(cfg)
    window = values["data"]["window"]
    more = {"epochs": values["trainer"]["max_epochs"], "calibration": values["data"]["calibration"]}
    own = {name: value for name, value in values["model"].items() if name not in ("_target_", *SETTINGS)}
    more["value_range"] = window if isinstance(window, dict) else None
    return {name: values[name] for name in SETTINGS if name in values} | more | own


def is_detector(path: Path) -> bool:
    """Whether a file is of AnomalyDetector.save, or a run's checkpoint."""
    with contextlib.suppress(Exception):
        return "config" in torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return False


def window_in(cfg: DictConfig) -> dict[str, tuple[float, float]]:
    window = cfg.data.window if hasattr(cfg.data.window, "items") else {}  # a run on bytes alone has none
    return {dtype: ASSUMED[dtype] for dtype in ("uint16", "float32")} | {dtype: tuple(ends) for dtype, ends in window.items()}


def given(cfg: DictConfig, train: Sequence[Image], val: Sequence[Image], roi: Roi | None = None) -> ArrayData:
    """The data module of a detector's config; InputError for a setting that no data can be read by."""
    settings = {name: cfg[name] for name in ("image_size", "crop", "resize", "batch_size", "workers", "seed")}
    own = {"calibration": cfg.data.calibration, "window": window_in(cfg), "roi": roi and roi.mask}
    data = ArrayData(train=train, val=val, **settings, **own)
    data.set_loading(cfg.tiling, cfg.overlap, cfg.get("epoch_size"))
    return data


def one_mask(roi: str | Path | np.ndarray | None) -> Roi | None:
    """A roi of one mask for all images; InputError for a folder of them."""
    found = None if roi is None else Roi(roi)
    if found and found.folder:
        raise InputError(f"roi={roi}: a folder; expected one mask for all images, a file or an array")
    return found


def gather(images: Any) -> tuple[list[Image], bool]:
    """The images of a file, a folder, an array, a batch or a list of these, and whether there may be several; InputError for none."""
    if isinstance(images, str | os.PathLike):
        return images_at(images), Path(images).expanduser().is_dir()
    if not isinstance(images, list | tuple):
        return images_of(images)
    if not images:
        raise InputError("an empty list; expected at least one image")
    return [image for one in images for image in gather(one)[0]], True


def vetted(name: str, value: Any) -> Any:
    """An option's value as a config holds it; InputError for what could be more than a value."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, list | tuple):
        return [vetted(name, item) for item in value]
    if isinstance(value, Mapping) and not any(str(key).startswith("_") for key in value):
        # JSON has made text of numbers
        return {int(key) if str(key).isdigit() else vetted(name, key): vetted(name, item) for key, item in value.items()}
    if value is None or isinstance(value, bool | int | float) or (isinstance(value, str) and "${" not in value):
        return value
    raise InputError(f"{name}={value!r}: expected a number, a text, None, or a list or dict of these")


def near(name: str, allowed: Sequence[str]) -> str:
    return f"{nearest(name, allowed)}Allowed: {', '.join(allowed)}"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Lightning's notes on devices and its advertisements are left out."""
    logger = logging.getLogger("lightning.pytorch")
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(before)


def boxes_of(map: np.ndarray, level: float) -> list[tuple[int, int, int, int]]:
    """(x, y, w, h) of every part of a map (H, W) above a level, corners connect, the part with the largest value first."""
    label, _ = ndimage.label(map > level, structure=np.ones((3, 3)))
    found = []
    for number, (y, x) in enumerate(ndimage.find_objects(label), 1):
        peak = map[y, x].max(where=label[y, x] == number, initial=-np.inf)
        found.append((peak, (x.start, y.start, x.stop - x.start, y.stop - y.start)))
    return [box for _, box in sorted(found, key=lambda one: -one[0])]
