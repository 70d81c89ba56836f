"""DFKDE: a Gaussian kernel density of the image's deep feature, reduced by PCA."""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from blemish.detector import COUNT, Maps, Stages, number
from blemish.features.extractor import Features
from blemish.methods.vectors import VectorDetector
from blemish.ops import bag, pca
from blemish.ops.accumulators import RowBuffer
from blemish.ops.density import Density, Moments, gaussian, kernels, leave_one_out, log_density
from blemish.ops.gaussian import left_out_cholesky
from blemish.types import Prediction

RESOLUTION = 1e-6  # of a feature's norm: float32 networks differ by so much from batch to batch
FOR_CHOICE = 4096  # rows whose likelihoods choose a density

log = logging.getLogger(__name__)


class VectorDensity:
    """The part of a Detector that scores vectors by −log density on at most `components` principal components, in float64.

    `density` kde is a Gaussian kernel density whose kernel has the shape of the covariance, by the rule `bandwidth` (scott, silverman or a
    factor); gaussian is the multivariate Gaussian of mean and covariance; auto the one of the two with the larger leave-one-out likelihood
    of the training vectors. `scaling` of the coordinates: none, scale by the largest norm of the training vectors', norm by their own.
    """

    def add_density(self, components: int, density: str, bandwidth: str | float, scaling: str = "none") -> None:
        self.check_arguments(components=COUNT, bandwidth=number("(0, inf)", also=("scott", "silverman")))
        self.components, self.density, self.bandwidth, self.scaling = components, density, bandwidth, scaling
        self.add_buffers("mean", "axes", "variance", "length")  # (D,), (k, D), (k,), ()
        self.add_buffers("points", "factor", "centre")  # (N, k) or for a Gaussian (1, k), (k, k), (k,)

    def coordinates(self, rows: Tensor) -> Tensor:
        """Coordinates (B, k) of vectors (B, D)."""
        z = pca.transform(pca.PCA(self.mean, self.axes, self.variance), rows)
        return z / (z.norm(dim=1, keepdim=True).clamp_min(torch.finfo(z.dtype).tiny) if self.scaling == "norm" else self.length)

    def fit_density(self, rows: Tensor) -> None:
        """Fit to vectors (N, D)."""
        self.mean, self.axes, self.variance = principal(rows, self.components)
        self.length = self.mean.new_ones(())
        if self.scaling == "scale":
            self.length = self.coordinates(rows).norm(dim=1).amax()
        self.points, self.factor, self.centre = self.density_of(self.coordinates(rows))
        if self.density == "auto":
            log.info("density=auto: %s, the likelier for images left out", "kde" if len(self.points) > 1 else "gaussian")

    def density_of(self, z: Tensor, known: Moments | None = None) -> Density:
        """The density of coordinates (N, k); their moments, if `known`, are those of at most FOR_CHOICE rows."""
        density = self.density
        if density == "auto":
            some = z[:: -(-len(z) // FOR_CHOICE)]
            single, many = leave_one_out(some, None, self.bandwidth, known=known).mean(1).tolist()
            density = "kde" if many > single else "gaussian"
        return kernels(z, self.bandwidth, known) if density == "kde" else gaussian(z, known)

    def negative_log_density(self, rows: Tensor) -> Tensor:
        """−log density (B,) of vectors (B, D), float32."""
        return -log_density(Density(self.points, self.factor, self.centre), self.coordinates(rows)).float()


class DFKDE(VectorDensity, VectorDetector):
    """Anomaly = −log density of the feature: global average pool, `components` principal components, Gaussian KDE.

    scaling=scale divides the coordinates by the largest norm among the training images, which moves all scores by one constant; norm
    divides those of each image by its own. Where the training images span fewer directions than `components`, there are as many
    components as directions.
    """

    def __init__(self, backbone: str, stages: Stages, weights: str, components: int, bandwidth: str | float, scaling: str, seed: int):
        super().__init__()
        self.save_hyperparameters()
        self.check_arguments(scaling=("scale", "norm"))
        self.add_density(components, "kde", bandwidth, scaling)
        self.backbone = Features(backbone, stages, weights, seed)

    @property
    def is_plain(self) -> bool:
        return self.density == "gaussian" and self.scaling != "norm" and len(self.axes) == self.mean.numel() > 0

    def leave_one_out(self, maps: Maps, size: tuple[int, int], rows: Sequence[int]) -> Prediction:
        if not self.is_plain:
            return super().leave_one_out(maps, size, rows)
        x = self.collect(maps)
        z = self.coordinates(x) - self.centre
        squared = torch.linalg.solve_triangular(self.factor, z.T, upper=False).square().sum(0)  # (B,)
        return Prediction(self.negative_log_density(x) + 0.5 * (left_out_cholesky(squared.sqrt(), len(self.rows)) - squared).float())

    @property
    def scores_bag(self) -> bool:
        return self.scaling != "norm"

    def bag_scores(self, rows: Tensor, fold: Tensor, maps: Maps) -> Tensor:
        square, found = rows.double().square().sum(1), rows.new_empty(len(rows), dtype=torch.float64)
        for fit in bag.fit_others(rows, fold):
            if not fit.variance.any():
                found[fit.inside] = torch.inf  # equal vectors have no density
                continue
            dims = min(self.components, int(resolved(fit.variance, square[fit.outside].mean())))
            left, others = fit.left[:, :dims], fit.others[:, :dims]  # (m, k), (n, k)
            length = others.norm(dim=1).amax() if self.scaling == "scale" else 1
            known = others.new_zeros(dims), (fit.variance[:dims].sqrt() / length).diag()
            found[fit.inside] = -log_density(self.density_of(others / length, known), left / length)
        return found

    def collect(self, maps: Maps) -> Tensor:
        """The global average pool of all stages, (B, D)."""
        return torch.cat([stage.mean((2, 3)) for stage in maps], 1)

    def fit(self, state: RowBuffer) -> None:
        self.rows = state.compute()
        self.fit_density(self.rows)

    def score(self, maps: Maps, size: tuple[int, int]) -> Prediction:
        rows = self.collect(maps)
        return self.in_bag(Prediction(self.negative_log_density(rows)), rows, maps)


def principal(rows: Tensor, components: int) -> pca.PCA:
    """PCA in float64 of vectors (N, D) with at most `components` directions: those in which they vary by more than float32 noise.

    Otherwise copies of one image, in batches of different size, would span directions of rounding only, and any new image be far off.
    """
    rows = rows.double()
    mean, axes, variance = pca.fit(rows, components)
    count = int(resolved(variance, rows.square().sum(1).mean()))
    return pca.PCA(mean, axes[:count], variance[:count])


def resolved(variance: Tensor, square: Tensor) -> Tensor:
    """How many (…), at least one, of the variances (…, k) are above RESOLUTION, for vectors of the mean squared norm `square` (…)."""
    return (variance > RESOLUTION**2 * square[..., None]).sum(-1).clamp_min(1)
