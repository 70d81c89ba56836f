"""Callbacks of a run: scores of the calibration images, and metrics, rows and pictures of the test."""

import contextlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.distributed import all_gather_object, gather_object

from blemish import draw
from blemish.curves import draw_curves, simplified
from blemish.data.images import to_image
from blemish.data.manifest import Sample, parse_tile
from blemish.data.module import ImageData
from blemish.data.tiles import bytes_of
from blemish.edge.boxes import boxes_of
from blemish.edge.calibration import Threshold
from blemish.edge.monitor import digest_of_scores
from blemish.edge.reading import SOFTWARE, is_result
from blemish.files import atomic_write, picture_info, write_text
from blemish.metrics.image import IMAGE_METRICS, POOLED, ImageMetrics
from blemish.metrics.pixel import PIXEL_METRICS, PixelMetrics
from blemish.ops.maps import peaks
from blemish.run.results import RECOGNISED, Rule, first, recognised, scale_of
from blemish.run.tiling import ImageCallback, to_bytes
from blemish.run.timing import StageTimes
from blemish.types import ANOMALOUS, IGNORED, NORMAL, UNKNOWN, Batch, Prediction, ProductPrediction

log = logging.getLogger(__name__)

SCORES = ("path", "label", "score", "threshold", "decision", "p_value", "defect")  # columns of scores.csv
PRODUCTS = ("true_product", *RECOGNISED)  # and of several products
METRICS = (*IMAGE_METRICS, *PIXEL_METRICS)
DECISIONS = ("image_f1", "image_recall", "image_false_alarm_rate")
RECOGNITION = ("recognised", "unknown_rate")  # of several products: shares of all images, and of the normal ones
ORACLES = ("image_f1_max_threshold", "pixel_f1_max_threshold")  # thresholds chosen with the truth
CURVE_POINTS = 200  # of each curve in curves.json, at most
PEAKS = 10  # of the maps of calibration images, for as many levels at most
REGION_STEPS, REGIONS = 16, 30  # thresholds of the regions of a picture, and regions at each, at most

Reconstruct = Callable[[Tensor], Tensor] | None


class Calibrate(ImageCallback):
    """Collect the score and the ends of the map of every image of `trainer.predict`, for every process."""

    values = torch.empty(0, 2)  # (n, 2) float32 score and largest map value; an image-level method has its score in both columns
    peaks = torch.empty(0, PEAKS)  # (n, PEAKS) the highest local maxima of the map
    low: float | None = None  # median of the smallest map values

    def on_predict_start(self, trainer, module) -> None:
        self.rows: dict[str, Tensor] = {}

    def on_predict_batch_end(self, trainer, module, outputs: Prediction, batch: Batch, index: int, loader: int = 0) -> None:
        self.add_batch(trainer, trainer.predict_dataloaders, module, outputs, batch)

    def add(self, trainer, prediction: Prediction, batch: Batch, reconstruct: Reconstruct) -> None:
        score, map = prediction
        low, high = (torch.full_like(score, torch.nan), score) if map is None else (map.amin((1, 2)), map.amax((1, 2)))  # (B,)
        top = score.new_full((len(score), PEAKS), -torch.inf) if map is None else peaks(map, PEAKS)
        rows = torch.cat([torch.stack([score, high, low], 1), top], 1)  # (B, 3 + PEAKS)
        self.rows.update(zip(batch.path, rows.detach().float().cpu(), strict=True))

    def on_predict_end(self, trainer, module) -> None:
        parts = [self.rows] * trainer.world_size
        if trainer.world_size > 1:
            all_gather_object(parts, self.rows)
        rows = {key: row for part in parts for key, row in part.items()}
        values = torch.stack([rows[key] for key in sorted(rows)]) if rows else torch.empty(0, 3 + PEAKS)
        self.values, lows, self.peaks = values[:, :2], values[:, 2].double(), values[:, 3:]
        self.low = float(np.median(lows)) if len(lows) and not lows.isnan().any() else None


class ScoredImage(NamedTuple):
    """The result of a test image that metrics and plots need."""

    label: int
    defect: str
    score: float
    low: float  # smallest and largest value of its map, NaN without a map
    high: float
    product: str | None = None  # that it is found to show, of several
    product_p_value: float | None = None


class Picture(NamedTuple):
    """An image that will be drawn, without the padding of a letterbox."""

    image: np.ndarray  # (H, W, 3) uint8
    mask: np.ndarray  # (H, W) uint8
    map: np.ndarray | None  # (H, W) float16 from 0 at ScoredImage.low to 1 at ScoredImage.high: raw values may leave the range of float16
    reconstruction: np.ndarray | None  # (H, W, 3) uint8


class Evaluate(ImageCallback):
    """Metrics, rows and pictures of one `trainer.test`, held by the process of rank 0 after it.

    Images without a label get a score but count in no metric.

    Args:
        pictures: number of images to draw, spread evenly over the defect types; −1 for all.
        limit: pixels up to which pixel metrics are exact.
        alpha: bound on false alarms of the threshold, which comes from `module.calibration`.
        times: charged with the time spent here.
        product: of several, the one that all tested images show.
    """

    def __init__(self, pictures: int, limit: int, alpha: float, times: StageTimes | None, product: str | None = None):
        self.pictures, self.limit, self.alpha, self.times, self.product = pictures, limit, alpha, times, product

    def on_test_start(self, trainer, module) -> None:
        samples = [sample for sample in trainer.datamodule.samples if sample.split == "test"]
        self.keys = [sample.key for sample in samples]
        images = {sample.path: sample._replace(tile="") for sample in sorted(samples, key=lambda sample: sample.label)}  # of tiles too
        chosen = draw.choose((images[path] for path in dict.fromkeys(sample.path for sample in samples)), self.pictures)
        self.wanted = {sample.key for sample in samples if sample.path in chosen}
        self.image, self.pixel = ImageMetrics(), PixelMetrics(self.limit)
        self.tested: dict[str, ScoredImage] = {}
        self.kept: dict[str, Picture] = {}
        self.joined: dict[str, ScoredImage] = {}  # images put together from tiles
        own = {"promise": module.promise, "region_levels": module.region_levels.tolist()}
        self.rule = Rule(module.calibration, self.alpha, module.map_threshold, **own)
        if self.product is not None:
            self.rule, self.names = Rule.of(module, self.alpha, {}), module.names

    def on_test_batch_end(self, trainer, module, outputs: Prediction, batch: Batch, index: int, loader: int = 0) -> None:
        self.add_batch(trainer, trainer.test_dataloaders, module, outputs, batch)

    def add(self, trainer, prediction: Prediction, batch: Batch, reconstruct: Reconstruct) -> None:
        with self.times.stage("metrics") if self.times else contextlib.nullcontext():
            score, label, mask = (tensor.detach().cpu() for tensor in (prediction.score.float(), batch.label, batch.mask))
            map = None if prediction.map is None else prediction.map.detach().float().cpu()  # (B, H, W)
            defects = [trainer.datamodule.sample(key).defect for key in batch.path]
            self.image.update(score, label, defects)
            low = high = torch.full_like(score, torch.nan)
            if map is not None:
                low, high = map.amin((1, 2)), map.amax((1, 2))  # (B,)
                known = (label != UNKNOWN).nonzero().flatten().tolist()
                self.pixel.update(map[known], mask[known], [defects[i] for i in known])
            rows = zip(label.tolist(), defects, score.tolist(), low.tolist(), high.tolist(), strict=True)
            found = [()] * len(score)
            if isinstance(prediction, ProductPrediction):
                found = zip((self.names[place] for place in prediction.product.tolist()), prediction.p_value.tolist(), strict=True)
            self.tested |= {key: ScoredImage(*row, *more) for key, row, more in zip(batch.path, rows, found, strict=True)}
            for i, key in enumerate(batch.path):
                if key in self.wanted:
                    # cached maps and tiles come without pixels
                    image = batch.image[i].detach() if batch.image.shape[1] else trainer.datamodule.image(key)
                    again = None if reconstruct is None else to_bytes(reconstruct(image[None])[0])
                    unit = None if map is None else ((map[i] - low[i]) / (high[i] - low[i]).clamp_min(1e-30)).half().numpy()
                    box = ... if trainer.datamodule.sample(key).tile else box_inside(mask[i])
                    self.kept[key] = Picture(*(one if one is None else one[box] for one in (to_bytes(image), mask[i].numpy(), unit, again)))

    def on_test_end(self, trainer, module) -> None:
        own, first = (self.image, self.pixel, self.tested, self.kept), trainer.global_rank == 0
        parts = [own] if first else []
        if trainer.world_size > 1:
            parts = [None] * trainer.world_size if first else None
            gather_object(own, parts, dst=0)
        if not first:
            parts, self.image, self.pixel = [], ImageMetrics(), PixelMetrics(self.limit)
        for image, pixel, _, _ in parts[1:]:
            self.image.merge(image)
            self.pixel.merge(pixel)
        self.kept = {key: picture for *_, kept in parts for key, picture in kept.items()}
        tested = {key: one for _, _, part, _ in parts for key, one in part.items()}
        self.tested = {key: tested[key] for key in self.keys if key in tested}  # in the manifest's order
        data = getattr(trainer.datamodule, "data", trainer.datamodule)  # of a store
        tiles = [sample for sample in map(data.sample, self.kept) if sample.tile]
        for path in {sample.path: None for sample in tiles}:
            self._put_together(data, path, [sample for sample in tiles if sample.path == path])
        with self.times.stage("metrics") if self.times else contextlib.nullcontext():
            self.tables = self.image.compute(), self.pixel.compute(), self.pixel.bounds()

    def _put_together(self, data: ImageData, path: str, tiles: Sequence[Sample]) -> None:
        """Replace the pictures of tiles by one of their image, whose pixels are IGNORED where no tile was tested."""
        images, parts = data.images(list(tiles)), [self.tested[tile.key] for tile in tiles]
        image = bytes_of(images.source(data.root / path), data.window)  # (H, W, 3)
        size = image.shape[:2]
        map, mask = np.full(size, -np.inf, np.float32), np.full(size, IGNORED, np.uint8)
        for tile, one in zip(tiles, parts, strict=True):
            (x, y, w, h), own = parse_tile(tile.tile), self.kept.pop(tile.key).map
            spot = slice(y, y + h), slice(x, x + w)
            mask[spot] = images.mask(tile, size)
            if own is not None:
                values = torch.from_numpy(one.low + own.astype(np.float32) * (one.high - one.low))
                map[spot] = np.maximum(map[spot], to_image(values, h, w, data.geometry).numpy())
        worst = max(parts, key=lambda one: (one.label, one.score))
        score, low, high = max(one.score for one in parts), min(one.low for one in parts), max(one.high for one in parts)
        unit = None if np.isnan(high) else ((np.maximum(map, low) - low) / max(high - low, 1e-30)).astype(np.float16)
        self.joined[path] = worst._replace(score=score, low=low, high=high)
        self.kept[path] = Picture(image, mask, unit, None)

    columns = SCORES

    @property
    def own(self) -> Rule:
        """The rule of the product that all tested images show."""
        return self.rule.at(self.product)

    @property
    def threshold(self) -> Threshold:
        return self.own.threshold

    @property
    def thresholds(self) -> dict[str, Threshold]:
        return {"": self.threshold}

    @property
    def scores(self) -> list[tuple]:
        """Rows of scores.csv, see SCORES, in the manifest's order; decision 1 anomalous, 0 normal, None without a threshold."""
        rule = self.rule
        return [(key, one.label, one.score, *rule.at(one.product).columns(one.score), one.defect) for key, one in self.tested.items()]

    @property
    def recognised(self) -> list[tuple]:
        """Of several products, RECOGNISED for each of the rows of `scores`."""
        return [recognised(one.product, one.product_p_value, self.alpha) for one in self.tested.values()]

    def recognition(self) -> dict[str, float | None]:
        """RECOGNITION: how many images are found to show their product, and how many normal ones an unknown one."""
        right = [one.product == self.product for one in self.tested.values()]
        unknown = [one.product_p_value <= self.alpha for one in self.tested.values() if one.label == NORMAL]
        return {"recognised": float(np.mean(right)), "unknown_rate": float(np.mean(unknown)) if unknown else None}

    def metrics(self, fit_seconds: float | None, test_seconds: float | None) -> dict:
        """The content of metrics.json: pooled metrics at the top, those of each defect type under "defects"; None for an undefined one."""
        image, pixel, bounds = self.tables
        names = METRICS + ORACLES
        rows = {row: {name: (image.get(row, {}) | pixel.get(row, {})).get(name) for name in names} for row in sorted(image | pixel)}
        labels = Counter(one.label for one in self.tested.values())
        images = Counter(one.defect for one in self.tested.values() if one.label != UNKNOWN)
        return {
            **rows.pop(POOLED),
            **self.decisions(),
            "fit_seconds": fit_seconds,
            "test_seconds": test_seconds,
            "images": len(self.tested),
            "images_normal": labels[NORMAL],
            "images_anomalous": labels[ANOMALOUS],
            "images_unknown": labels[UNKNOWN],
            "defects": {row: {"images": images[row], **values} for row, values in rows.items()},
            # how far pixel metrics may be from exact: 0 unless there were more pixels than the limit
            "pixel_bounds": bounds[POOLED],
        }

    def decisions(self) -> dict[str, float | None]:
        """F1, recall and false alarm rate of the decisions, which no test image had a part in."""
        known = [one for one in self.tested.values() if one.label != UNKNOWN]
        pairs = [(one.label == ANOMALOUS, self.rule.at(one.product).decide(one.score)) for one in known]
        hits, misses, alarms, quiet = map(pairs.count, ((True, True), (True, False), (False, True), (False, False)))
        return {
            "image_f1": 2 * hits / (2 * hits + misses + alarms) if hits + misses else None,
            "image_recall": hits / (hits + misses) if hits + misses else None,
            "image_false_alarm_rate": alarms / (alarms + quiet) if alarms + quiet else None,
        }  # DECISIONS

    def calibration_metadata(self) -> dict:
        """The part of a record on thresholds."""
        threshold = self.threshold
        more = {"reachable": threshold.reachable, "conditional": threshold.conditional}  # the latter with edge.calibration.CONFIDENCE
        more |= {"map_value": self.own.level if self.scale else None, "explanation": threshold.explain()}
        more |= {"region_levels": self.own.region_levels, "digest": digest_of_scores(self.own.scores)}
        return threshold._asdict() | more

    @property
    def scale(self) -> draw.Scale | None:
        """The scale of all pictures of the run, None without maps.

        The colours go from the median of the images' smallest values to the 95 % quantile of their largest ones, so that one odd image does
        not darken the others. Normal images end where calibration images do. Without these, as with protocol=paper, it is the quantile
        1 − alpha of the largest values of normal test images, or else the median of all: training images will not do, as a fit may know
        them by heart. No decision depends on it.
        """
        lows, highs = np.array([(one.low, one.high) for one in self.tested.values()]).reshape(-1, 2).T
        if not np.isfinite(highs).any():
            return None
        normal = highs[[one.label == NORMAL for one in self.tested.values()]]
        end = np.quantile(normal, 1 - self.alpha, method="lower") if len(normal) else np.median(highs)
        return scale_of(np.median(lows), first(self.own.normal, end), np.quantile(highs, 0.95, method="lower"))

    def draw(self, folder: str | Path, curves: str | Path | None) -> list[Path]:
        """Write a strip of each image to draw into `folder`, and the curves to a file; returns the paths of the pictures.

        The lines of the curves are beside them as JSON, with at most CURVE_POINTS points each.
        """
        files, screen = [], Console(stderr=True)
        names = draw.file_names({key: one.defect for key, one in (self.tested | self.joined).items() if key in self.kept})
        for key, name in track(names.items(), "drawing", console=screen, transient=True, disable=not screen.is_terminal):
            path = Path(folder) / name
            if path.exists() and not is_result(path):
                log.warning("%s: not drawn, as blemish did not write the picture that is there", path)
                continue
            strip = self._strip(key)
            with atomic_write(path) as temporary:
                strip.save(temporary, compress_level=1, pnginfo=picture_info(strip.info["Panels"], strip.info.get("Regions")))
            files.append(path)
        if curves and self.tested:
            lines = {"image": self.image.curves(), "pixel": self.pixel.curves()}
            score, label = (np.array([getattr(one, name) for one in self.tested.values()]) for name in ("score", "label"))
            figure = draw_curves(lines["image"], lines["pixel"], self.metrics(None, None), score, label, self.threshold.value)
            with atomic_write(curves) as temporary:
                figure.savefig(temporary, metadata={"Software": SOFTWARE})
            files.append(Path(curves))
            few = {
                kind: {name: simplified(line, CURVE_POINTS).round(6).tolist() for name, line in of.items()} for kind, of in lines.items()
            }
            write_text(files[-1].with_suffix(".json"), json.dumps(few) + "\n")
        return files

    def _strip(self, key: str) -> Image.Image:
        one, picture, scale = (self.tested | self.joined)[key], self.kept[key], self.scale
        map = picture.map
        if map is not None:
            map = one.low + map.astype(np.float64) * (one.high - one.low)
            map = np.where(picture.mask == IGNORED, -np.inf, map)  # no contour, no colour
        mask = None if one.label == UNKNOWN else picture.mask
        title = draw.caption(key, one.defect, one.label, one.score, self.threshold.value)
        strip = draw.strip(picture.image, mask, map, scale, self.own.level if scale else None, title, picture.reconstruction)
        if map is not None and self.own.region_levels:
            strip.info["Regions"] = json.dumps(region_steps(map, min(self.own.region_levels[-1], first(self.own.level, np.inf))))
        return strip


def region_steps(map: np.ndarray, least: float) -> list[tuple[float, list[tuple[int, ...]]]]:
    """(threshold, boxes) of a map (H, W) from its largest value down to `least`: the REGIONS strongest, in thousandths of its sides."""
    most, (height, width) = map.max(initial=-np.inf, where=np.isfinite(map)), map.shape
    if not most > least:
        return []
    steps = []
    for level in np.linspace(most, least, REGION_STEPS + 1)[1:]:
        boxes = [np.round(1000 * np.array([x / width, y / height, w / width, h / height])) for x, y, w, h in boxes_of(map, level)]
        steps.append((float(f"{level:.5g}"), [tuple(box.astype(int).tolist()) for box in boxes[:REGIONS]]))
    return steps


def box_inside(mask: Tensor) -> tuple[slice, slice]:
    """Return the rows and columns of a mask (H, W) from the first to the last that is not IGNORED throughout."""
    inside = mask != IGNORED
    spans = [inside.any(axis).nonzero().flatten().tolist() or [0, -1] for axis in (1, 0)]
    return slice(spans[0][0], spans[0][-1] + 1), slice(spans[1][0], spans[1][-1] + 1)
