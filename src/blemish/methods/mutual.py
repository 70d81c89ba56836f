"""Mutual scoring of unlabelled images: a normal patch has a match in most of the others (MuSc, Li et al. 2024, arXiv 2401.16753)."""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from blemish.detector import Maps, OnePassDetector, RowBuffer, Stages
from blemish.edge.checks import check_number, check_whole
from blemish.edge.errors import InputError
from blemish.features.extractor import Features
from blemish.ops.maps import check_blur, smooth_upsample
from blemish.types import Prediction

VALUES = 2**20  # distances held at a time: as many as stay in a processor's cache until their smallest are found


class Mutual(OnePassDetector):
    """Anomaly = mean over the `share` of other images with the nearest matches of a patch's distance to its best match (paper, eq. 4).

    The images of the fit are those that a patch is compared with; an image among them is not compared with itself. Distances are taken for
    each stage and each of `neighborhoods`, the side of the square of cells that a patch is the mean of, and averaged.
    """

    min_images = 2
    quick = ("model.stages=[2]",)

    def __init__(
        self,
        backbone: str,
        stages: Stages,
        weights: str,
        neighborhoods: Sequence[int],
        share: float,
        sigma: float,
        score: str | float,
        seed: int,
    ):
        super().__init__()
        self.save_hyperparameters()
        self.set_score(score)
        odd = partial(check_whole, "model", 1, each=True)
        self.check_arguments(neighborhoods=odd, share=partial(check_number, "model", "(0, 1]"), sigma=check_blur)
        if even := [side for side in neighborhoods if side % 2 == 0]:
            raise InputError(f"model.neighborhoods={list(neighborhoods)}: {even[0]} is even; expected odd sides such as 1, 3 or 5")
        self.backbone = Features(backbone, stages, weights, seed)
        self.neighborhoods, self.share, self.sigma = tuple(neighborhoods), share, sigma
        self.add_buffers("bank")  # (N, ΣC·h·w): the maps of all images, stage by stage

    def new_state(self, images: int) -> RowBuffer:
        return RowBuffer(images)

    def collect(self, maps: Maps) -> Tensor:
        return torch.cat([stage.flatten(1) for stage in maps], dim=1).float()  # (B, ΣC·h·w)

    def fit(self, state: RowBuffer) -> None:
        self.bank = state.compute()

    def restore(self, state: RowBuffer) -> None:
        state.update(self.bank)

    def score(self, maps: Maps, size: tuple[int, int]) -> Prediction:
        rows = torch.cat([stage.flatten(1) for stage in maps], dim=1).float()
        if rows.shape[1] != self.bank.shape[1]:
            raise InputError(f"image_size: fitted to {self.bank.shape[1]} values an image, this one has {rows.shape[1]}; keep the size")
        near = 1e-4 * self.bank.abs().amax()
        itself = torch.stack([(self.bank - row).abs().amax(1) <= near for row in rows])  # (B, N)
        counts = (self.share * (self.bank.shape[0] - itself.sum(1))).long().clamp_min(1)  # (B,) images whose matches are averaged
        parts = self.bank.split([stage[0].numel() for stage in maps], dim=1)
        found = []
        for stage, bank in zip(maps, parts, strict=True):
            for side in self.neighborhoods:
                distance = matches(patches_of(stage, side), patches_of(bank.unflatten(1, stage.shape[1:]), side))  # (B, P, N)
                cells = lowest_mean(distance, itself, counts).unflatten(1, stage.shape[2:])  # (B, h, w)
                found.append(smooth_upsample(cells, size, self.sigma))
        map = torch.stack(found).mean(0)  # (B, H, W)
        return self.from_map(map)


def patches_of(maps: Tensor, side: int) -> Tensor:
    """Patches (B, P, C) of maps (B, C, h, w): the means of squares of `side` cells, cut at the border."""
    return F.avg_pool2d(maps.float(), side, 1, side // 2, count_include_pad=False).flatten(2).mT.contiguous()


def matches(patches: Tensor, others: Tensor) -> Tensor:
    """Distance (B, P, N) of each patch (B, P, C) to its nearest patch of each other image (N, P, C)."""
    chunks = others.split(max(VALUES // (patches.shape[1] * others.shape[1]), 1))
    squares = others.square().sum(2).split(len(chunks[0]))
    found = []
    for rows in patches:  # (P, C)
        parts = []
        for chunk, square in zip(chunks, squares, strict=True):
            distance = torch.addmm(square.flatten()[None], rows, chunk.flatten(0, 1).T, alpha=-2)  # (P, n·P), less the squares of the rows
            parts.append(distance.unflatten(1, chunk.shape[:2]).amin(2))  # (P, n)
        found.append(torch.cat(parts, dim=1) + rows.square().sum(1, keepdim=True))
    return torch.stack(found).clamp_min(0).sqrt()


def lowest_mean(distance: Tensor, itself: Tensor, counts: Tensor) -> Tensor:
    """Mean (B, P) of the `counts` (B,) smallest of distances (B, P, N), those to the image itself (B, N) left out."""
    ordered = distance.masked_fill(itself[:, None], torch.inf).sort(2).values
    kept = torch.arange(distance.shape[2], device=distance.device) < counts[:, None, None]  # (B, 1, N)
    return ordered.masked_fill(~kept, 0).sum(2) / counts[:, None]
