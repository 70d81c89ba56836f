"""The callbacks of a run: scores of calibration images before, figures, rows and pictures of the test."""

import contextlib
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from lightning import Callback
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.distributed import all_gather_object, gather_object

from blemish import draw
from blemish.data.manifest import Sample
from blemish.draw import choose, file_names, simplified
from blemish.edge.calibration import Threshold, conformal_threshold, p_values
from blemish.edge.reading import SOFTWARE, is_result
from blemish.files import atomic_write, picture_info, write_text
from blemish.metrics.image import IMAGE_METRICS, POOLED, ImageMetrics
from blemish.metrics.pixel import PIXEL_METRICS, PixelMetrics
from blemish.run.timing import StageTimes
from blemish.types import ANOMALOUS, IGNORED, NORMAL, UNKNOWN, Batch, Prediction

log = logging.getLogger(__name__)

SCORES = ("path", "label", "score", "threshold", "decision", "p_value", "defect")  # columns of scores.csv
METRICS = (*IMAGE_METRICS, *PIXEL_METRICS)
CURVE_POINTS = 200  # of each curve in curves.json, at most
ORACLES = ("image_f1_max_threshold", "pixel_f1_max_threshold")  # thresholds that the truth was looked at for


class Calibrate(Callback):
    """Collects score and largest map value of every image of `trainer.predict`; `values` is there on every process afterwards."""

    def __init__(self) -> None:
        self.values = torch.empty(0, 2)  # (n, 2) float32; an image-level method's score stands in both columns
        self.tested: dict[str, Tensor] = {}

    def on_predict_start(self, trainer, module) -> None:
        self.tested = {}

    def on_predict_batch_end(self, trainer, module, outputs: Prediction, batch: Batch, index: int, loader: int = 0) -> None:
        peak = outputs.score if outputs.map is None else outputs.map.amax((1, 2))  # (B,)
        pairs = torch.stack([outputs.score, peak], 1).detach().float().cpu()  # (B, 2)
        self.tested.update(zip(batch.path, pairs, strict=True))

    def on_predict_end(self, trainer, module) -> None:
        parts = [self.tested]
        if trainer.world_size > 1:
            parts = [None] * trainer.world_size
            all_gather_object(parts, self.tested)
        one = {key: found for part in parts for key, found in part.items()}
        self.values = torch.stack([one[key] for key in sorted(one)]) if one else torch.empty(0, 2)
        self.tested = {}


class ScoredImage(NamedTuple):
    """What is remembered of every tested image."""

    label: int
    score: float
    low: float  # ends of its map, NaN without a map
    high: float


class Picture(NamedTuple):
    """What is kept of an image that will be drawn."""

    image: np.ndarray  # (H, W, 3) uint8
    mask: np.ndarray  # (H, W) uint8
    map: np.ndarray | None  # (H, W) float16 from 0 at ScoredImage.low to 1 at ScoredImage.high: raw values may leave the range of float16
    reconstruction: np.ndarray | None  # (H, W, 3) uint8, of methods that make one


class Evaluate(Callback):
    """Figures, rows and pictures of one `trainer.test`.

    pictures: how many images to draw, spread evenly over the defect types, −1 for all. limit: pixels kept for exact pixel metrics.
    alpha: the share of false alarms that the threshold from `module.calibration` is to keep. Images without a label get a score but
    enter no figure. After the test the process of rank 0 holds everything, each image once; the others hold nothing.
    """

    def __init__(self, pictures: int, limit: int, alpha: float, times: StageTimes | None):
        self.pictures, self.limit, self.alpha = pictures, limit, alpha
        self.times = times
        self._begin([])

    def _begin(self, samples: Sequence[Sample]) -> None:
        self.samples = {sample.key: sample for sample in samples}
        self.wanted = choose(samples, self.pictures)
        self.claimed: set[str] = set()  # keys that some process has counted
        self.image, self.pixel = ImageMetrics(), PixelMetrics(self.limit)
        self.tested: dict[str, ScoredImage] = {}
        self.kept: dict[str, Picture] = {}
        self.calibration = torch.empty(0, 2)
        self.level: float | None = None  # a method's own threshold of its maps
        self.computed = self.lines = None

    def on_test_start(self, trainer, module) -> None:
        self._begin([sample for sample in trainer.datamodule.samples if sample.split == "test"])
        self.calibration = module.calibration.detach().cpu()
        self.level = module.map_threshold

    def on_test_batch_end(self, trainer, module, outputs: Prediction, batch: Batch, index: int, loader: int = 0) -> None:
        with self.times.stage("metrics") if self.times else contextlib.nullcontext():
            rows = self._mine(trainer, batch.path)
            if rows:
                self._add(trainer, getattr(module, "reconstruct", None), outputs, batch, rows)

    def _mine(self, trainer, paths: list[str]) -> list[int]:
        """The rows of this batch that this process counts: a distributed sampler repeats images to give every process as many."""
        parts = [paths]
        if trainer.world_size > 1:
            parts = [None] * trainer.world_size
            all_gather_object(parts, paths)
        rows = []
        for rank, part in enumerate(parts):
            for row, key in enumerate(part):
                if key not in self.claimed:
                    self.claimed.add(key)
                    if rank == trainer.global_rank:
                        rows.append(row)
        return rows

    def _add(self, trainer, reconstruct: Callable[[Tensor], Tensor] | None, outputs: Prediction, batch: Batch, rows: list[int]) -> None:
        keys = [batch.path[row] for row in rows]
        score, label, mask = (tensor.detach()[rows].cpu() for tensor in (outputs.score.float(), batch.label, batch.mask))
        map = None if outputs.map is None else outputs.map.detach()[rows].float().cpu()  # (B, H, W)
        for key in keys:
            self.samples.setdefault(key, trainer.datamodule.sample(key))
        group = [self.samples[key].defect for key in keys]
        self.image.update(score, label, group)
        low = high = torch.full_like(score, torch.nan)
        if map is not None:
            low, high = map.amin((1, 2)), map.amax((1, 2))  # (B,)
            known = (label != UNKNOWN).nonzero().flatten().tolist()
            self.pixel.update(map[known], mask[known], [group[i] for i in known])
        self.tested |= {
            key: ScoredImage(*of) for key, *of in zip(keys, label.tolist(), score.tolist(), low.tolist(), high.tolist(), strict=True)
        }
        for i, (row, key) in enumerate(zip(rows, keys, strict=True)):
            if key in self.wanted:
                image = batch.image[row].detach() if batch.image.shape[1] else trainer.datamodule.image(key)  # stored maps bring no image
                again = None if reconstruct is None else bytes_of(reconstruct(image[None])[0])
                unit = None if map is None else ((map[i] - low[i]) / (high[i] - low[i]).clamp_min(1e-30)).half().numpy()
                box = looked_at(mask[i])  # without the grey beside an image in a letterbox
                parts = (None if part is None else part[box] for part in (bytes_of(image), mask[i].numpy(), unit, again))
                self.kept[key] = Picture(*parts)

    def on_test_end(self, trainer, module) -> None:
        if trainer.world_size > 1:
            parts = [None] * trainer.world_size if trainer.global_rank == 0 else None
            gather_object((self.image, self.pixel, self.tested, self.kept, self.samples), parts, dst=0)
            for image, pixel, one, kept, samples in (parts or [])[1:]:
                self.image.merge(image)
                self.pixel.merge(pixel)
                self.tested |= one
                self.kept |= kept
                self.samples |= samples
            if trainer.global_rank != 0:
                self._begin([])
        self.tested = {key: self.tested[key] for key in self.samples if key in self.tested}  # in the manifest's order

    @property
    def threshold(self) -> Threshold:
        """An image is anomalous if its score is above this; its value is None without calibration images."""
        return conformal_threshold(self.calibration[:, 0], self.alpha)

    @property
    def map_threshold(self) -> Threshold:
        """At most alpha of the normal images are expected to have any pixel above this."""
        return conformal_threshold(self.calibration[:, 1], self.alpha)

    @property
    def contour(self) -> float | None:
        """The map value that pictures draw a line at: the method's own threshold, else the calibrated one."""
        return self.map_threshold.value if self.level is None else self.level

    @property
    def scores(self) -> list[tuple]:
        """Rows of scores.csv, see SCORES, in the manifest's order; decision 1 anomalous, 0 normal, None without a threshold."""
        value = self.threshold.value
        score = torch.tensor([one.score for one in self.tested.values()], dtype=torch.float64)
        p = [None] * len(score) if value is None else p_values(score, self.calibration[:, 0]).tolist()
        return [
            (key, one.label, one.score, value, None if value is None else int(one.score > value), chance, self.samples[key].defect)
            for (key, one), chance in zip(self.tested.items(), p, strict=True)
        ]

    def metrics(self, fit_seconds: float | None, test_seconds: float | None) -> dict:
        """The content of metrics.json: pooled figures at the top, a row per defect type under "defects"; None where there is no figure."""
        image, pixel, bounds = self._tables()
        names = METRICS + ORACLES
        rows = {row: image.get(row, {}) | pixel.get(row, {}) for row in [POOLED, *sorted((image.keys() | pixel.keys()) - {POOLED})]}
        labels = [one.label for one in self.tested.values()]
        images = dict.fromkeys(rows, 0)
        for key, one in self.tested.items():
            if one.label != UNKNOWN:
                images[self.samples[key].defect] = images.get(self.samples[key].defect, 0) + 1
        return {
            **{name: rows[POOLED].get(name) for name in names},
            **self.decisions(),
            "fit_seconds": fit_seconds,
            "test_seconds": test_seconds,
            "images": len(labels),
            "images_normal": labels.count(NORMAL),
            "images_anomalous": labels.count(ANOMALOUS),
            "images_unknown": labels.count(UNKNOWN),
            "defects": {
                row: {"images": images[row], **{name: figures.get(name) for name in names}}
                for row, figures in rows.items()
                if row != POOLED
            },
            # how far the pixel figures may be from exact: 0 unless there were more pixels than the limit
            "pixel_bounds": {name: bounds[POOLED].get(name) for name in METRICS if name in bounds[POOLED]},
        }

    def decisions(self) -> dict[str, float | None]:
        """F1, recall and false alarm rate of the decisions at the calibrated threshold, which no test image had a part in."""
        value = self.threshold.value
        known = [(one.label == ANOMALOUS, one.score > value) for one in self.tested.values() if one.label != UNKNOWN and value is not None]
        hits, misses, alarms, quiet = (known.count(pair) for pair in ((True, True), (True, False), (False, True), (False, False)))
        return {
            "image_f1": 2 * hits / (2 * hits + misses + alarms) if hits + misses else None,
            "image_recall": hits / (hits + misses) if hits + misses else None,
            "image_false_alarm_rate": alarms / (alarms + quiet) if alarms + quiet else None,
        }

    def _tables(self) -> tuple[dict, dict, dict]:
        """Image figures, pixel figures and their bounds, computed once: every pixel of the test is sorted for them."""
        if self.computed is None:
            self.computed = self.image.compute(), self.pixel.compute(), self.pixel.bounds()
        return self.computed

    def curves(self) -> dict[str, dict[str, np.ndarray]]:
        """{"image": {"roc", "pr"}, "pixel": {"roc", "pr", "pro"}} of vertices (K, 2), computed once; K = 0 where there is no curve."""
        if self.lines is None:
            self.lines = {"image": self.image.curves(), "pixel": self.pixel.curves()}
        return self.lines

    def calibration_metadata(self) -> dict:
        """What a record says of the threshold."""
        threshold = self.threshold
        return {
            **threshold._asdict(),
            "reachable": threshold.reachable,
            "map_value": self.contour if self.has_maps else None,
            "explanation": threshold.explain(),
        }

    @property
    def has_maps(self) -> bool:
        return any(np.isfinite(one.high) for one in self.tested.values())

    @property
    def scale(self) -> tuple[float, float] | None:
        """Map values at the two ends of the colours of all pictures of this run; None without maps.

        From the median of the images' smallest values to what the largest values of all but 5 % of the images stay below, so that one
        odd image does not darken the rest; the map's threshold is always within.
        """
        if not self.has_maps:
            return None
        ends = np.array([(one.low, one.high) for one in self.tested.values()], dtype=np.float64)
        low, high = np.median(ends[:, 0]), np.quantile(ends[:, 1], 0.95, method="lower")
        marks = [low, high] if self.contour is None else [low, high, self.contour]
        return float(min(marks)), float(max(marks))

    def draw(self, folder: str | Path, curves: str | Path | None) -> list[Path]:
        """Write a strip per kept image into `folder` and the curves to the file `curves`, and say which pictures there are now.

        Beside `curves` the same name with .json holds its lines as `curves` gives them, at most CURVE_POINTS points each.
        """
        scale, value = self.scale, self.threshold.value
        contour = self.contour if scale else None
        files = []
        names = file_names({key: self.samples[key].defect for key in self.tested if key in self.kept})
        screen = Console(stderr=True)
        for key, name in track(names.items(), "drawing", console=screen, transient=True, disable=not screen.is_terminal):
            sample, one, picture = self.samples[key], self.tested[key], self.kept[key]
            map = None if picture.map is None else one.low + picture.map.astype(np.float64) * (one.high - one.low)
            map = None if map is None else np.where(picture.mask == IGNORED, -np.inf, map)  # no contour, no colour
            mask = None if one.label == UNKNOWN else picture.mask
            title = draw.caption(key, sample.defect, one.label, one.score, value)
            if (path := Path(folder) / name).exists() and not is_result(path):
                log.warning("%s: not drawn, as blemish did not write the picture that is there", path)
                continue
            files.append(path)
            strip = draw.strip(picture.image, mask, map, scale, contour, title, picture.reconstruction)
            with atomic_write(files[-1]) as temporary:
                strip.save(temporary, compress_level=1, pnginfo=picture_info(strip.info["Panels"]))
        if curves and self.tested:
            score, label = (np.array(column) for column in zip(*((one.score, one.label) for one in self.tested.values()), strict=True))
            lines = self.curves()
            figure = draw.curves(lines["image"], lines["pixel"], self.metrics(None, None), score, label, value)
            files.append(Path(curves))
            with atomic_write(curves) as temporary:
                figure.savefig(temporary, metadata={"Software": SOFTWARE})
            thinned = {
                kind: {name: simplified(line, CURVE_POINTS).round(6).tolist() for name, line in of.items()} for kind, of in lines.items()
            }
            write_text(Path(curves).with_suffix(".json"), json.dumps(thinned) + "\n")
        return files


def bytes_of(image: Tensor) -> np.ndarray:
    """An image (3, H, W) in [0, 1] as (H, W, 3) uint8."""
    return (image.detach().float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()


def looked_at(mask: Tensor) -> tuple[slice, slice]:
    """The rows and columns of a mask (H, W) that are not IGNORED throughout, from the first to the last."""
    one = mask != IGNORED
    spans = [one.any(axis).nonzero().flatten().tolist() or [0, -1] for axis in (1, 0)]
    return slice(spans[0][0], spans[0][-1] + 1), slice(spans[1][0], spans[1][-1] + 1)
