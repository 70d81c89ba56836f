"""DFM: deep features that normal ones do not explain.

Ahuja, Ndiour, Kalyanpur, Tickoo 2019, arXiv 1909.11786 (likelihood); Ndiour, Ahuja, Tickoo 2020, arXiv 2012.04250 (subspace, and the
feature reconstruction error).
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from sklearn.mixture import GaussianMixture
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from blemish.detector import COUNT, SHARE_OR_COUNT, Maps, Stages
from blemish.edge.errors import InputError
from blemish.features.extractor import Features
from blemish.methods.vectors import VectorDetector
from blemish.ops import bag, kmeans, pca
from blemish.ops.accumulators import RowBuffer
from blemish.ops.gaussian import left_out_cholesky
from blemish.ops.maps import align, smooth_upsample
from blemish.ops.rng import stream
from blemish.types import Prediction

NARROWEST = 1e-3  # added to the variances of a mixture, where those of all training images are 1


class DFM(VectorDetector):
    """Anomaly = what the principal components of the pooled and flattened feature map, `keep` of their variance, do not explain.

    score=fre: the norm of the residual that the components do not reconstruct, and as map its norm over the channels of each cell.
    score=nll: −log likelihood in the components' space, no map. `pool` cells a side are averaged into one. The papers have a subspace and a
    Gaussian, or a mixture, for each class; without labels `groups` are found: by k-means, each with a subspace of its own, the nearest of
    which counts (fre), or as a mixture of so many Gaussians, diagonal on the components (nll).
    """

    quick = ("model.pool=1",)

    def __init__(
        self,
        backbone: str,
        stages: Stages,
        weights: str,
        pool: int,
        keep: int | float,
        groups: int,
        score: str | float,
        seed: int,
    ):
        super().__init__()
        self.save_hyperparameters()
        self.set_score(score, "fre", "nll")
        self.check_arguments(pool=COUNT, keep=SHARE_OR_COUNT, groups=COUNT)
        self.backbone = Features(backbone, stages, weights, seed)
        self.pool, self.share, self.groups, self.likelihood, self.seed = pool, keep, groups, score == "nll", seed
        self.add_buffers("mean", "axes")  # (G, D), (G, k, D) with rows of zeros where a group has fewer components
        self.add_buffers("variance", "shares", "means", "variances")  # of nll, where G = 1: (k,), and of M Gaussians (M,), (M, k), (M, k)

    @property
    def is_plain(self) -> bool:
        return self.likelihood and self.groups == 1 and self.axes.numel() > 0 and self.axes.shape[1] == self.axes.shape[2]

    def leave_one_out(self, maps: Maps, size: tuple[int, int], rows: Sequence[int]) -> Prediction:
        if not self.is_plain:
            return super().leave_one_out(maps, size, rows)
        z = (self.collect(maps).to(self.mean) - self.mean[0]) @ self.axes[0].T / self.variance.sqrt()
        squared = z.square().sum(1)  # (B,)
        return Prediction(self.score(maps, size).score + 0.5 * (left_out_cholesky(squared.sqrt(), len(self.rows)) - squared))

    @property
    def scores_bag(self) -> bool:
        return self.groups == 1

    def bag_scores(self, rows: Tensor, fold: Tensor, maps: Maps) -> Tensor:
        grid, found = self.embed(maps).shape[1:], rows.new_empty(len(rows), dtype=torch.float64)
        for fit in bag.fit_others(rows, fold):
            kept = int(pca.kept(fit.variance, self.share))
            if self.likelihood:
                variance = fit.variance[:kept]
                z = fit.left[:, :kept] / variance.sqrt()  # (m, k)
                score = negative_log_likelihood(z, *mixture(z, 1, self.seed)) + 0.5 * variance.log().sum()
            else:
                cells = bag.residuals(rows, fit, kept).view(-1, *grid).norm(dim=1)  # (m, h, w)
                score = self.from_map(cells, cells.flatten(1).norm(dim=1)).score  # of cells: upsampled maps take longer than the fits
            found[fit.inside] = score.double()
        return found

    def embed(self, maps: Maps) -> Tensor:
        """All stages on the first one's grid, averaged over squares of `pool` cells: (B, C, h, w)."""
        joined = align(maps)
        # equal to average pooling where `pool` divides the grid; elsewhere no border is lost and the map stays in place
        return F.adaptive_avg_pool2d(joined, [max(round(side / self.pool), 1) for side in joined.shape[2:]])

    def collect(self, maps: Maps) -> Tensor:
        return self.embed(maps).flatten(1)  # (B, D)

    def fit(self, state: RowBuffer) -> None:
        self.rows, parts = state.compute(), [state.compute()]
        if self.groups > 1 and not self.likelihood:
            labels = kmeans.fit(self.rows, min(self.groups, len(self.rows)), stream(self.seed)).labels
            parts = [self.rows[labels == group] for group in labels.unique()]
        spaces = [subspace(part, self.share) for part in parts] if len(parts) > 1 else [pca.fit(self.rows, self.share)]
        self.mean, self.axes = torch.stack([s.mean for s in spaces]), pad_sequence([s.components for s in spaces], batch_first=True)
        if self.likelihood:
            self.variance = spaces[0].variance
            z = pca.transform(spaces[0], self.rows, whiten=True)  # (N, k)
            self.shares, self.means, self.variances = mixture(z, min(self.groups, len(z)), self.seed)

    def score(self, maps: Maps, size: tuple[int, int]) -> Prediction:
        x = self.embed(maps)  # (B, C, h, w)
        rows = x.flatten(1).to(self.mean)  # (B, D)
        if rows.shape[1] != self.mean.shape[1]:
            fitted = self.mean.shape[1]
            raise InputError(f"image_size: DFM was fitted to {fitted} values an image and now gets {rows.shape[1]}; keep the size")
        if self.likelihood:
            z = (rows - self.mean[0]) @ self.axes[0].T / self.variance.sqrt()  # (B, k)
            found = Prediction(negative_log_likelihood(z, self.shares, self.means, self.variances) + 0.5 * self.variance.log().sum())
        else:
            found = self._from_residual(nearest_residual(rows, self.mean, self.axes).view(x.shape), size)
        return self.in_bag(found, x.flatten(1), maps)

    def _from_residual(self, residual: Tensor, size: tuple[int, int]) -> Prediction:
        cells = residual.norm(dim=1)  # (B, h, w)
        return self.from_map(smooth_upsample(cells, size, sigma=0.0), cells.flatten(1).norm(dim=1))  # (B, H, W)


def nearest_residual(rows: Tensor, mean: Tensor, axes: Tensor) -> Tensor:
    """x − μ − AᵀA(x − μ) of rows (B, D), the shortest (B, D) over affine subspaces with means (G, D) and orthonormal axes (G, k, D)."""
    centred = rows - mean[:, None]  # (G, B, D)
    residual = centred - (centred @ axes.mT) @ axes  # (G, B, D)
    best = residual.norm(dim=2).argmin(0)  # (B,)
    return residual.gather(0, best[None, :, None].expand(1, -1, residual.shape[2]))[0]


def subspace(rows: Tensor, keep: int | float) -> pca.PCA:
    """`pca.fit` of one group of rows (n, D), which may be a point: a single image, or copies of one."""
    if (rows == rows[0]).all():
        return pca.PCA(rows[0], rows[:0], rows.new_empty(0))
    return pca.fit(rows, keep)


def mixture(z: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Shares (M,), means (M, k) and variances (M, k) of M = `count` Gaussians of diagonal covariance for whitened rows (N, k), by EM.

    One Gaussian has the mean 0 and the variances 1 of whitened rows.
    """
    if count == 1:
        return z.new_ones(1), z.new_zeros(1, z.shape[1]), z.new_ones(1, z.shape[1])
    fitted = GaussianMixture(count, covariance_type="diag", reg_covar=NARROWEST, n_init=3, random_state=seed).fit(z.double().cpu().numpy())
    return tuple(torch.from_numpy(part).to(z) for part in (fitted.weights_, fitted.means_, fitted.covariances_))


def negative_log_likelihood(z: Tensor, shares: Tensor, means: Tensor, variances: Tensor) -> Tensor:
    """−log Σ_m share_m N(z; mean_m, diag(variance_m)) in nats, (B,), of rows (B, k)."""
    energy = ((z[:, None] - means).square() / variances).sum(2) + variances.log().sum(1)  # (B, M)
    return 0.5 * z.shape[1] * math.log(2 * math.pi) - (shares.log() - 0.5 * energy).logsumexp(1)
