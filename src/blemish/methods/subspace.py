"""SubspaceAD: normal patches span a subspace, anomalies leave it (Lendering, Akdag, Bondarev 2026, arXiv 2602.23013)."""

from collections.abc import Sequence
from functools import partial

import torch
from kornia.geometry.transform import rotate
from torch import Tensor

from blemish.detector import SHARE_OR_COUNT, Maps, OnePassDetector, Stages
from blemish.edge.calibration import CROSS
from blemish.edge.checks import check_whole
from blemish.features.extractor import Features
from blemish.ops.accumulators import RunningCovariance
from blemish.ops.gaussian import pack_triangle, unpack_triangle
from blemish.ops.maps import align, check_blur, joined, smooth_upsample
from blemish.types import Batch, Prediction


class Subspace(OnePassDetector):
    """Anomaly = squared distance ‖R(x − μ)‖² of a patch from the principal subspace of all normal patches (paper, eq. 6).

    R holds the axes that principal components with a share `keep` of the variance leave out. A training image also counts as rotated by
    `rotations` angles.
    """

    quick = ("model.score=max",)

    def __init__(
        self, backbone: str, stages: Stages, weights: str, keep: float, rotations: int, sigma: float, score: str | float, seed: int
    ):
        super().__init__()
        self.save_hyperparameters()
        self.set_score(score)
        self.check_arguments(keep=SHARE_OR_COUNT, rotations=partial(check_whole, "model", 0), sigma=check_blur)
        self.backbone = Features(backbone, stages, weights, seed)
        self.keep, self.rotations, self.sigma = keep, rotations, sigma
        self.needs_images = rotations > 0
        self.add_buffers("mean", "residual", "scatter")  # (D,), (D − k, D), and for an update the triangle of Σ(x − μ)(x − μ)ᵀ
        self.register_buffer("patches", torch.zeros((), dtype=torch.long))

    def new_state(self, images: int) -> RunningCovariance:
        return RunningCovariance()

    def collect(self, maps: Maps) -> Tensor:
        return align(maps).permute(0, 2, 3, 1).flatten(0, 2)[:, None].float()  # (B·h·w, 1, D)

    def training_step(self, batch: Batch, index: int) -> Tensor:
        for turn in range(1, self.rotations + 1):
            angle = torch.full((len(batch.image),), 360 * turn / (self.rotations + 1), device=self.device)
            super().training_step(batch._replace(image=rotate(batch.image, angle, padding_mode="reflection"), maps=None), index)
        return super().training_step(batch, index)

    def fit(self, state: RunningCovariance) -> None:
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
            own = self.collect(one)[:, 0].double()  # (P, D)
            rest = int(self.patches) - len(own)
            delta = (own.mean(0) - mean) * int(self.patches) / rest  # from the mean of the others
            away = own - own.mean(0)
            scatter = lower + lower.tril(-1).mT - away.T @ away - rest * len(own) / int(self.patches) * torch.outer(delta, delta)
            found.append(self._score(one, size, (own.mean(0) - delta).to(self.mean), self._left(scatter).to(self.mean)))
        return joined(found)

    def restore(self, state: RunningCovariance) -> None:
        lower = unpack_triangle(self.scatter)
        state.restore(int(self.patches), self.mean[None], lower + lower.tril(-1).mT)

    def score(self, maps: Maps, size: tuple[int, int]) -> Prediction:
        return self._score(maps, size, self.mean, self.residual)

    def _score(self, maps: Maps, size: tuple[int, int], mean: Tensor, residual: Tensor) -> Prediction:
        x = align(maps).float()  # (B, D, h, w)
        along = torch.nn.functional.conv2d(x - mean[:, None, None], residual[:, :, None, None])  # (B, D − k, h, w)
        map = smooth_upsample(along.square().sum(1), size, self.sigma)  # (B, H, W)
        return self.from_map(map)
