"""Self-similarity: tiles unlike every word of a dictionary of normal tiles (Napoletano, Piccoli, Schettini, Sensors 2018, 18(1):209)."""

import itertools
import math
from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from blemish.detector import COUNT, Maps, OnePassDetector, Stages, integer, number
from blemish.edge.checks import check_number
from blemish.edge.errors import InputError
from blemish.features.tiles import TileFeatures
from blemish.ops import kmeans, pca
from blemish.ops.accumulators import RowBuffer, distributed
from blemish.ops.maps import paint
from blemish.ops.neighbours import pairwise
from blemish.ops.rng import stream
from blemish.types import Batch, Prediction

MOST = 2**24  # pixels of held-out images used for the threshold


class SelfSimilarity(OnePassDetector):
    """Anomaly = mean distance of a tile to its `neighbors` nearest words; a pixel's is the mean of its tiles', an image's the largest.

    Tiles of `tile` pixels at `stride` are resized to `tile_input`; their pooled features, divided by their sum of magnitudes (normalize=l1)
    or as they are, on the principal components that hold `variance` and standardised, are clustered by k-means into `words`. The buffer
    `threshold` is for maps, from the pixels of validation images by threshold = {mode: cdf | zscore | fixed, value}: for it the share
    `validation` of the training images is left out of the dictionary. `most_tiles` bounds the tiles kept of the training images for
    either purpose. Images may have any size.
    """

    quick = ("model.normalize=none",)  # a random network's features hardly differ but in magnitude

    def __init__(
        self,
        backbone: str,
        stages: Stages,
        weights: str,
        tile: int,
        stride: int,
        tile_input: int,
        normalize: str,
        variance: float,
        words: int,
        restarts: int,
        neighbors: int,
        threshold: Mapping[str, str | float],
        validation: float,
        most_tiles: int,
        score: str | float,
        seed: int,
    ):
        super().__init__()
        self.save_hyperparameters()
        self.set_score(score)
        self.check_arguments(tile=COUNT, tile_input=COUNT, words=COUNT, restarts=COUNT, most_tiles=COUNT)
        self.check_arguments(stride=integer(1, tile), neighbors=integer(1, words), variance=number("(0, 1]"), validation=number("[0, 1)"))
        self.check_arguments(normalize=("l1", "none"))
        check_rule(threshold)
        self.backbone = TileFeatures(backbone, stages, weights, seed, tile, stride, tile_input)
        self.tile, self.stride, self.normalize = tile, stride, normalize
        self.share, self.count, self.restarts, self.neighbors = float(variance), words, restarts, neighbors
        self.rule, self.validation, self.most_tiles, self.seed = dict(threshold), validation, most_tiles, seed
        self.add_buffers("mean", "axes", "variance", "words", "threshold")  # (D,), (k, D), (k,), (words, k), ()

    @property
    def map_threshold(self) -> float | None:
        """Map values above this are anomalous; None before the fit."""
        return float(self.threshold) if self.threshold.numel() else None

    def new_state(self, images: int) -> RowBuffer:
        # validation images are the first that the loader draws; a single image serves both purposes
        validation = 0.0 if self.expects_calibration else self.validation
        self.images = images
        self.validating = 0 if self.rule["mode"] == "fixed" else max(1, round(validation * images))
        self.held_out = 0 if validation == 0 else min(self.validating, images - 1)
        self.each = max(1, self.most_tiles // (images - self.held_out))  # tiles of an image for the dictionary
        self.room = max(1, self.most_tiles // max(1, self.validating))  # and for the threshold
        rank, step = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if distributed() else (0, 1)
        self.numbers = itertools.count(rank, step)  # of this process's images in the order that is shared out to all
        return RowBuffer(self.each * images + self.room * self.validating)

    def collect(self, maps: Maps) -> Tensor:
        """Tiles of each image, (n, 2 + D): the image's number, its grid's width for validation or 0 for the dictionary, the feature."""
        return torch.cat([self.collect_image(grid, next(self.numbers)) for grid in self.described(maps)])

    def collect_image(self, grid: Tensor, number: int) -> Tensor:
        """`collect` for one image (D, h, w), whose draw depends on its number alone, whichever process has it."""
        parts = [grid.new_empty(0, 2 + len(grid))]
        if number < self.validating:
            width = min(grid.shape[2], self.room)
            parts.append(labelled(grid[:, : self.room // width, :width], number, width))  # all of it, or what there is room for
        if self.held_out <= number < self.images:  # further ones are repeats that give every process as many
            drawn = torch.randperm(grid[0].numel(), generator=stream(self.seed, number))[: self.each].to(grid.device)
            parts.append(labelled(grid.flatten(1)[:, drawn], number, 0))
        return torch.cat(parts)

    def fit(self, state: RowBuffer) -> None:
        rows = state.compute()
        rows = rows[rows[:, 0].argsort(stable=True)]  # the order that one process would have seen
        number, width, tiles = rows[:, 0], rows[:, 1], rows[:, 2:]
        normal = tiles[width == 0]  # (N, D)
        self.mean, self.axes, self.variance = pca.fit(normal, self.share)
        x = pca.transform(self.space, normal, whiten=True)  # (N, k)
        self.words = kmeans.fit(x, min(self.count, len(x)), stream(self.seed), self.restarts).centres
        maps = []
        for image in number[width > 0].unique():
            which = (number == image) & (width > 0)
            grid = tiles[which].T.unflatten(1, (-1, int(width[which][0])))  # (D, h, w)
            # the image's own size is not known: assume that no tile was moved to be flush with the border
            size = tuple(self.tile + self.stride * (side - 1) for side in grid.shape[1:])
            maps.append(self.map_of(grid[None], size)[0])
        self.threshold = self.mean.new_tensor(threshold_of(torch.cat([self.mean[:0], *(map.flatten() for map in maps)]), **self.rule))

    def calibrate(self, batches: Iterable[Batch]) -> None:
        """Set the threshold from the pixels of images that are not in the dictionary, thinned to at most MOST on a process."""
        step, maps = 1, []
        for batch in batches:
            map = self.test_step(batch, 0).map
            map = map if batch.ignore_mask is None else map.masked_fill(batch.ignore_mask, torch.nan)
            maps += [one[::step, ::step].clone() for one in map]
            while sum(map.numel() for map in maps) > MOST:
                step, maps = 2 * step, [map[::2, ::2].clone() for map in maps]
        pixels = torch.cat([self.mean[:0], *(map[~map.isnan()] for map in maps)])
        state = RowBuffer(len(pixels)).to(pixels.device)
        state.update(pixels)
        state.gather()
        self.threshold = self.mean.new_tensor(threshold_of(state.compute(), **self.rule))

    @property
    def space(self) -> pca.PCA:
        return pca.PCA(self.mean, self.axes, self.variance)

    def score(self, maps: Maps, size: tuple[int, int]) -> Prediction:
        return self.from_map(self.map_of(self.described(maps), size))

    def described(self, maps: Maps) -> Tensor:
        """The features of all tiles (B, D, h, w)."""
        return F.normalize(maps[0].float(), p=1, dim=1) if self.normalize == "l1" else maps[0]

    def map_of(self, features: Tensor, size: tuple[int, int]) -> Tensor:
        """Map (B, H, W) of images of `size` from the features of their tiles (B, D, h, w)."""
        x = pca.transform(self.space, features.movedim(1, -1), whiten=True)  # (B, h, w, k)
        distance = pairwise(x.flatten(0, 2), self.words)  # (B·h·w, words)
        nearest = distance.topk(min(self.neighbors, len(self.words)), largest=False).values.mean(1).view(x.shape[:3])  # (B, h, w)
        return paint(nearest, size, self.tile, self.stride)


def labelled(tiles: Tensor, number: int, width: int) -> Tensor:
    """Tiles (D, …) as rows (n, 2 + D) behind their image's number and grid width."""
    rows = tiles.flatten(1).T
    return torch.cat([rows.new_tensor([number, width]).expand(len(rows), 2), rows], 1)


def threshold_of(values: Tensor, mode: str, value: float) -> float:
    """cdf: the smallest of the values that a share `value` of them does not exceed; zscore: mean plus `value` standard deviations."""
    if mode == "cdf":
        return float(values.kthvalue(max(1, math.ceil(round(value * len(values), 6)))).values)
    return float(value if mode == "fixed" else values.mean() + value * values.std())


def check_rule(threshold: Mapping[str, str | float]) -> None:
    """InputError unless threshold is {mode, value} with a known mode and a value in its range."""
    if not isinstance(threshold, Mapping) or set(threshold) != {"mode", "value"} or threshold["mode"] not in ("cdf", "zscore", "fixed"):
        raise InputError(f"model.threshold={threshold}: expected mode (cdf, zscore or fixed) and value")
    check_number("model.threshold", "(0, 1]" if threshold["mode"] == "cdf" else "(-inf, inf)", value=threshold["value"])
