"""SubspaceAD: normal patches span a subspace, anomalies leave it (Lendering, Akdag, Bondarev 2026, arXiv 2602.23013)."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from kornia.geometry.transform import rotate
from torch import Tensor

from blemish.detector import SHARE_OR_COUNT, Maps, Stages
from blemish.edge.calibration import CROSS
from blemish.edge.checks import check_whole
from blemish.features.extractor import Features
from blemish.methods.vectors import BagDetector
from blemish.ops.accumulators import RowBuffer, RunningCovariance
from blemish.ops.bag import BAG
from blemish.ops.gaussian import merge_moments, pack_triangle, unpack_triangle
from blemish.ops.maps import align, check_blur, joined, smooth_upsample
from blemish.types import Batch, Prediction

CELLS = 20_480  # of all training images in a bag: where their maps have more, they are averaged, so that its time is bounded


class Halves(NamedTuple):
    """What is known of the halves of a bag before its new image is; cells are about the mean of all patches of the training images."""

    count: int  # cells of the training images in the half of the new one
    mean: Tensor  # (1, D) of them
    scatter: Tensor  # (1, D, D)
    other: Tensor  # (D, m·P) cells of the other half
    fit: tuple[Tensor, Tensor]  # mean (D,) and residual (D − k, D) of that half
    scores: Tensor  # (N − m,) by it, of the training images in the half of the new one


class Subspace(BagDetector):
    """Anomaly = squared distance ‖R(x − μ)‖² of a patch from the principal subspace of all normal patches (paper, eq. 6).

    R holds the axes that principal components with a share `keep` of the variance leave out. A training image also counts as rotated by
    `rotations` angles.
    """

    quick = ("model.score=max",)
    fold_counts = (2, 2)

    def __init__(
        self, backbone: str, stages: Stages, weights: str, keep: float, rotations: int, sigma: float, score: str | float, seed: int
    ):
        super().__init__()
        self.save_hyperparameters()
        self.set_score(score)
        self.check_arguments(keep=SHARE_OR_COUNT, rotations=partial(check_whole, "model", 0), sigma=check_blur)
        self.backbone = Features(backbone, stages, weights, seed)
        self.keep, self.rotations, self.sigma = keep, rotations, sigma
        self.needs_images, self.halves = rotations > 0, None
        self.add_buffers("mean", "residual", "scatter")  # (D,), (D − k, D), and for an update the triangle of Σ(x − μ)(x − μ)ᵀ
        self.register_buffer("patches", torch.zeros((), dtype=torch.long))

    def new_state(self, images: int) -> RowBuffer | RunningCovariance:
        return RowBuffer(images) if self.expects_bag and self.scores_bag and images <= BAG else RunningCovariance(pooled=True)

    def collect(self, maps: Maps) -> Tensor:
        return align(maps).permute(0, 2, 3, 1).float()  # (B, h, w, D)

    def training_step(self, batch: Batch, index: int) -> Tensor:
        for turn in range(1, self.rotations + 1):
            angle = torch.full((len(batch.image),), 360 * turn / (self.rotations + 1), device=self.device)
            super().training_step(batch._replace(image=rotate(batch.image, angle, padding_mode="reflection"), maps=None), index)
        return super().training_step(batch, index)

    def fit(self, state: RowBuffer | RunningCovariance) -> None:
        if isinstance(state, RowBuffer):
            self.rows = coarse(state.compute(), len(state.compute()))
            count, mean, scatter = moments(state.compute())
        else:
            self.rows = self.rows[:0]
            count, mean, scatter = state.compute()  # (1, D), (1, D, D)
        self.mean, self.residual = mean[0], self._left(scatter[0].double()).to(mean)
        self.scatter = pack_triangle(scatter)
        self.patches.fill_(int(count))

    def _left(self, scatter: Tensor) -> Tensor:
        """The axes (D − k, D) that the principal components of a scatter (D, D) leave out."""
        variance, axes = torch.linalg.eigh(scatter)  # ascending
        if isinstance(self.keep, int):
            left = max(len(variance) - self.keep, 1)
        else:  # the largest number of axes whose variance is at most the share left out, but always one
            left = max(int((variance.clamp_min(0).cumsum(0) <= (1 - self.keep) * variance.clamp_min(0).sum()).sum()), 1)
        return axes[:, :left].T.contiguous()

    @property
    def left_out(self) -> str | None:
        return None if self.rotations else CROSS  # a rotated copy is among the others

    def leave_one_out(self, maps: Maps, size: tuple[int, int], rows: Sequence[int]) -> Prediction:
        """Chan's formula backwards: the moments of all patches without those of an image."""
        lower, mean, found = unpack_triangle(self.scatter)[0].double(), self.mean.double(), []
        for b in range(len(rows)):
            one = [stage[b : b + 1] for stage in maps]
            x = align(one).float()  # (1, D, h, w)
            own = x[0].flatten(1).T.double()  # (P, D)
            rest = int(self.patches) - len(own)
            delta = (own.mean(0) - mean) * int(self.patches) / rest  # from the mean of the others
            away = own - own.mean(0)
            scatter = lower + lower.tril(-1).mT - away.T @ away - rest * len(own) / int(self.patches) * torch.outer(delta, delta)
            found.append(self._score(x, size, (own.mean(0) - delta).to(self.mean), self._left(scatter).to(self.mean)))
        return joined(found)

    @property
    def scores_bag(self) -> bool:
        return self.rotations == 0

    def bag(self, row: Tensor, maps: Maps) -> Tensor:
        if self.halves is None or self.halves[0] is not self.rows:
            self.halves = self.rows, self._halves(self.folds(len(self.rows) + 1))
        known, row = self.halves[1], coarse(row[None], len(self.rows)) - self.mean  # (1, P, D)
        mean, scatter = known.mean.clone(), known.scatter.clone()
        merge_moments(known.count, mean, scatter, row)
        others = self._cells(known.other, row.shape[1], mean[0], self._left(scatter[0]))
        return torch.cat([known.scores, others, self._cells(row[0].T, row.shape[1], *known.fit)])

    def _halves(self, fold: Tensor) -> Halves:
        beside, cells = (fold[:-1] == fold[-1]).to(self.rows.device), self.rows.shape[1]
        own, other = self.rows[beside] - self.mean, self.rows[~beside] - self.mean
        (count, mean, scatter), (_, center, lower) = moments(own), moments(other)
        fit = center[0], self._left(lower[0])
        return Halves(count, mean, scatter, columns(other), fit, self._cells(columns(own), cells, *fit))

    def _cells(self, cells: Tensor, count: int, mean: Tensor, residual: Tensor) -> Tensor:
        """Scores (N,) of images from the squared distances of their cells (D, N · `count`)."""
        along = torch.addmm(-residual @ mean[:, None], residual, cells)  # (D − k, N·P)
        return self.from_map(along.square_().sum(0).view(-1, count)).score

    def restore(self, state: RunningCovariance) -> None:
        lower = unpack_triangle(self.scatter)
        state.restore(int(self.patches), self.mean[None], lower + lower.tril(-1).mT)

    def score(self, maps: Maps, size: tuple[int, int]) -> Prediction:
        x = align(maps).float()  # (B, D, h, w)
        return self.in_bag(self._score(x, size, self.mean, self.residual), x.movedim(1, 3), maps)

    def _score(self, x: Tensor, size: tuple[int, int], mean: Tensor, residual: Tensor) -> Prediction:
        along = F.conv2d(x - mean[:, None, None], residual[:, :, None, None])  # (B, D − k, h, w)
        map = smooth_upsample(along.square().sum(1), size, self.sigma)  # (B, H, W)
        return self.from_map(map)


def coarse(x: Tensor, images: int) -> Tensor:
    """Features (N, h, w, D) averaged to a grid of which `images` have at most CELLS cells: (N, P, D)."""
    most = max(int((CELLS / images) ** 0.5), 1)
    if max(x.shape[1:3]) <= most:
        return x.flatten(1, 2)
    cells = F.adaptive_avg_pool2d(x.movedim(3, 1), [min(side, most) for side in x.shape[1:3]])  # (N, D, h', w')
    return cells.flatten(2).mT.contiguous()


def columns(rows: Tensor) -> Tensor:
    """Cells (N, P, D) transposed to (D, N·P): multiplying them by a few axes is faster in this layout."""
    return rows.flatten(0, 1).T.contiguous()


def moments(rows: Tensor) -> tuple[int, Tensor, Tensor]:
    """Count, mean (1, D) and scatter (1, D, D) of all cells of images (N, …, D), which may be none."""
    cells = rows.flatten(0, -2)[None]  # (1, N·P, D)
    mean, scatter = cells.new_zeros(1, cells.shape[2]), cells.new_zeros(1, cells.shape[2], cells.shape[2])
    return (merge_moments(0, mean, scatter, cells) if len(rows) else 0), mean, scatter
