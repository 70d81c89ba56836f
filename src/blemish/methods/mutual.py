"""Mutual scoring of unlabelled images: a normal patch has a match in most of the others (MuSc, Li et al. 2024, arXiv 2401.16753)."""

from collections.abc import Iterator, Sequence
from functools import partial
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from blemish.detector import Maps, OnePassDetector, Stages
from blemish.edge.checks import check_number, check_whole
from blemish.edge.errors import InputError
from blemish.features.extractor import Features
from blemish.ops.accumulators import RowBuffer
from blemish.ops.maps import check_blur, smooth_upsample, top_mean
from blemish.types import Prediction

VALUES = 2**20  # distances held at a time: as many as stay in a processor's cache until their smallest are found
MATCHES = 2**28  # of patches with other images, that are held at a time (1 GiB)
COMPARED = 4096  # values of an image by which it is known again


class Mutual(OnePassDetector):
    """Anomaly = mean over the `share` of other images with the nearest matches of a patch's distance to its best match (paper, eq. 4).

    The images of the fit are those that a patch is compared with; an image among them is not compared with itself. Distances are taken for
    each stage and each of `neighborhoods`, the side of the square of cells that a patch is the mean of, scaled to length 1, and averaged.

    rescore: numbers k; the score of an image becomes the mean over them of `weighted` means of its own score and those of its k − 1 nearest
    images of the fit. [1] keeps it; with others scores are those of maps at the first stage's resolution.
    """

    min_images = 2
    quick = ("model.stages=[3]", "model.rescore=[1]")

    def __init__(
        self,
        backbone: str,
        stages: Stages,
        weights: str,
        neighborhoods: Sequence[int],
        share: float,
        sigma: float,
        score: str | float,
        rescore: Sequence[int],
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
        self.check_arguments(rescore=partial(check_whole, "model", 1, each=True))
        self.rescore, self.area = tuple(rescore) if max(rescore) > 1 else (), self.map_share
        self.known: tuple[Tensor, list[Tensor]] | None = None  # a bank, and what `among` found of it
        if self.rescore:
            self.map_share = None  # the score is not the map's alone
        # (N, ΣC·h·w): the maps of all images, stage by stage; to rescore, their means (N, ΣC) of length 1, and their scores (N,)
        self.add_buffers("bank", "means", "scores")

    def new_state(self, images: int) -> RowBuffer:
        return RowBuffer(images)

    def collect(self, maps: Maps) -> Tensor:
        self.shapes = [stage.shape[1:] for stage in maps]
        return torch.cat([stage.flatten(1) for stage in maps], dim=1).float()  # (B, ΣC·h·w)

    def fit(self, state: RowBuffer) -> None:
        self.bank = state.compute()
        if self.rescore:
            self.means = mean_of(self.parts(self.shapes))
            self.scores = self.score_cells(self.among(self.shapes))

    def restore(self, state: RowBuffer) -> None:
        state.update(self.bank)

    def score(self, maps: Maps, size: tuple[int, int]) -> Prediction:
        cells, itself = self.compare(maps)
        map = torch.stack([smooth_upsample(one, size, self.sigma) for one in cells]).mean(0)  # (B, H, W)
        if not self.rescore:
            return self.from_map(map)
        near = (mean_of(maps) @ self.means.T).masked_fill(itself, -1)  # (B, N) cosines
        return Prediction(weighted(self.score_cells(cells), near, self.scores, self.rescore), map)

    def parts(self, shapes: Sequence[torch.Size]) -> list[Tensor]:
        """The maps (N, C, h, w) of the bank, by the shapes (C, h, w) of the stages."""
        parts = self.bank.split([prod(shape) for shape in shapes], dim=1)
        return [part.unflatten(1, shape) for part, shape in zip(parts, shapes, strict=True)]

    def compare(self, maps: Maps) -> tuple[list[Tensor], Tensor]:
        """Scores (B, h, w) of the cells of maps (B, C, h, w), of each stage and neighbourhood, and who is itself in the bank (B, N)."""
        rows, shapes = torch.cat([stage.flatten(1) for stage in maps], dim=1).float(), [stage.shape[1:] for stage in maps]
        if rows.shape[1] != self.bank.shape[1]:
            raise InputError(f"image_size: fitted to {self.bank.shape[1]} values an image, this one has {rows.shape[1]}; keep the size")
        itself = self.find(rows)
        if self._trainer and self.trainer.testing and itself.any(1).all():  # a folder whose images score each other
            place = itself.int().argmax(1)
            return [cells[place] for cells in self.among(shapes)], itself
        counts = self.counts(itself)
        found = []
        for stage, bank in zip(maps, self.parts(shapes), strict=True):
            for side in self.neighborhoods:
                distance = matches(patches_of(stage, side), patches_of(bank, side))  # (B, P, N)
                found.append(lowest_mean(distance, itself, counts, self.share).unflatten(1, stage.shape[2:]))
        return found, itself

    def among(self, shapes: Sequence[torch.Size]) -> list[Tensor]:
        """What `compare` finds for all images of the bank (N, h, w), each two of which are compared once."""
        if self.known is None or self.known[0] is not self.bank:
            itself, found = torch.cat([self.find(some) for some in self.bank.split(8)]), []
            counts = self.counts(itself)
            for bank in self.parts(shapes):
                for side in self.neighborhoods:
                    rows = [
                        lowest_mean(distance, itself[block], counts[block], self.share)
                        for block, distance in mutual_matches(patches_of(bank, side))
                    ]
                    found.append(torch.cat(rows).unflatten(1, bank.shape[2:]))
            self.known = self.bank, found
        return self.known[1]

    def find(self, rows: Tensor) -> Tensor:
        """Which images of the bank are the same as those of rows (B, ΣC·h·w): (B, N)."""
        some = slice(None, None, max(rows.shape[1] // COMPARED, 1))
        near = 1e-4 * self.bank[:, some].abs().amax()
        return torch.stack([(self.bank[:, some] - row).abs().amax(1) <= near for row in rows[:, some]])

    def counts(self, itself: Tensor) -> Tensor:
        """The numbers (B,) of images whose matches are averaged."""
        return (self.share * (self.bank.shape[0] - itself.sum(1))).long().clamp_min(1)

    def score_cells(self, cells: list[Tensor]) -> Tensor:
        """Scores (B,) of images by the scores of their cells (B, h, w) before they are brought to the pixels."""
        return top_mean(torch.stack([smooth_upsample(one, cells[0].shape[1:], 0.0) for one in cells]).mean(0), self.area)


def mean_of(maps: Maps) -> Tensor:
    """Means (B, ΣC) of maps over their cells, of length 1."""
    return F.normalize(torch.cat([stage.float().mean((2, 3)) for stage in maps], 1))


def weighted(score: Tensor, near: Tensor, scores: Tensor, counts: Sequence[int]) -> Tensor:
    """Scores (B,) re-scored by those (N,) of images with cosines `near` (B, N): the mean over k of `counts` of weighted means.

    Each is over the image itself, with the weight 1, and its k − 1 nearest, with their cosines as weights, as the official code has it.
    """
    most = min(max(counts) - 1, near.shape[1])
    weights, index = near.topk(most)  # (B, k − 1)
    weights = torch.cat((torch.ones_like(score)[:, None], weights), 1)
    values = torch.cat((score[:, None], scores[index]), 1)
    return torch.stack([(weights[:, :k] * values[:, :k]).sum(1) / weights[:, :k].sum(1) for k in counts]).mean(0)


def patches_of(maps: Tensor, side: int) -> Tensor:
    """Patches (B, P, C) of maps (B, C, h, w): the means of squares of `side` cells, cut at the border, each of length 1."""
    means = F.avg_pool2d(maps.float(), side, 1, side // 2, count_include_pad=False).flatten(2)
    return F.normalize(means).mT.contiguous()


def factor(patches: Tensor) -> Tensor:
    """Right factors (…, Q, C + 2) of patches y (…, Q, C): y, 1 and ‖y‖²; with −2x, ‖x‖² and 1 one product gives squared distances."""
    return torch.cat([patches, torch.ones_like(patches[..., :1]), patches.square().sum(-1, keepdim=True)], -1)


def squares(rows: Tensor, others: Tensor) -> Tensor:
    """Squared distances (P, n, Q) of patches to those of other images, both as factors (P, C + 2) and (n, Q, C + 2)."""
    left = torch.cat([-2 * rows[:, :-2], rows[:, -1:], rows[:, -2:-1]], 1)  # (P, C + 2)
    return (left @ others.flatten(0, 1).T).unflatten(1, others.shape[:2])


def step_of(patches: Tensor, others: Tensor) -> int:
    """How many of the other images (N, Q, C) an image of patches (B, P, C) is compared with at a time."""
    return max(VALUES // (patches.shape[1] * others.shape[1]), 1)


def matches(patches: Tensor, others: Tensor) -> Tensor:
    """Distance (B, P, N) of each patch (B, P, C) to its nearest patch of each other image (N, Q, C)."""
    chunks = factor(others).split(step_of(patches, others))
    found = [torch.cat([squares(rows, chunk).amin(2) for chunk in chunks], 1) for rows in factor(patches)]
    return torch.stack(found).clamp_min(0).sqrt()


def mutual_matches(patches: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield `matches` (b, P, N) of patches (N, P, C) with themselves by blocks of b images, b · P · N at most MATCHES.

    Within a block the distances of two images serve both of them.
    """
    (count, cells, _), factors = patches.shape, factor(patches)
    step, size = step_of(patches, patches), max(MATCHES // (count * cells), 1)
    for start in range(0, count, size):
        stop = min(start + size, count)
        found = patches.new_zeros(stop - start, cells, count)
        for i in range(start, stop):
            for left, right in ((0, start), (i + 1, stop), (stop, count)):
                for first in range(left, right, step):
                    some = slice(first, min(first + step, right))
                    distance = squares(factors[i], factors[some])  # (P, n, P)
                    found[i - start, :, some] = distance.amin(2)
                    if start <= first < stop:
                        found[some.start - start : some.stop - start, :, i] = distance.amin(0)
        yield slice(start, stop), found.clamp_min_(0).sqrt_()


def lowest_mean(distance: Tensor, itself: Tensor, counts: Tensor, share: float) -> Tensor:
    """Mean (B, P) of the `counts` (B,) smallest of distances (B, P, N), those to the image itself (B, N) left out.

    share: of the N, so that no count is larger.
    """
    most = max(int(share * distance.shape[2]), 1)
    ordered = distance.masked_fill(itself[:, None], torch.inf).topk(most, 2, largest=False).values
    kept = torch.arange(most, device=distance.device) < counts[:, None, None]  # (B, 1, most)
    return ordered.masked_fill(~kept, 0).sum(2) / counts[:, None]
