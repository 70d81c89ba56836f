"""DFKDE: a Gaussian kernel density of the image's deep feature, reduced by PCA."""

import torch
from torch import Tensor

from blemish.detector import COUNT, Maps, OnePassDetector, RowBuffer, Stages, number
from blemish.features.extractor import Features
from blemish.ops import kde, pca
from blemish.types import Prediction

RESOLUTION = 1e-6  # of a feature's norm: float32 networks differ by so much from batch to batch


class VectorDensity:
    """The part of a Detector that scores vectors by −log density on at most `components` principal components, in float64.

    `density` kde is a Gaussian kernel density whose kernel has the shape of the covariance, by the rule `bandwidth` (scott, silverman or a
    factor); gaussian is the multivariate Gaussian of mean and covariance, which is diagonal on the principal components.
    """

    def add_density(self, components: int, density: str, bandwidth: str | float) -> None:
        self.check_arguments(components=COUNT, bandwidth=number("(0, inf)", also=("scott", "silverman")))
        self.components, self.density, self.bandwidth = components, density, bandwidth
        self.add_buffers("mean", "axes", "variance")  # (D,), (k, D), (k,)
        self.add_buffers("length", "points", "factor", "centre")  # (), (N, k), (k, k), (k,): empty for a Gaussian

    @property
    def space(self) -> pca.PCA:
        return pca.PCA(self.mean, self.axes, self.variance)

    def fit_density(self, rows: Tensor, scaled: bool = False) -> None:
        """Fit to vectors (N, D); `scaled` divides their coordinates by the largest norm among them before the kernel density."""
        self.mean, self.axes, self.variance = principal(rows, self.components)
        if self.density == "kde":
            coordinates = pca.transform(self.space, rows)  # (N, k)
            self.length = coordinates.norm(dim=1).amax() if scaled else coordinates.new_ones(())
            self.points, self.factor, self.centre = kde.fit(coordinates / self.length, self.bandwidth)

    def negative_log_density(self, rows: Tensor) -> Tensor:
        """−log density (B,) of vectors (B, D), float32."""
        if self.density == "gaussian":
            return pca.negative_log_likelihood(self.space, rows).float()
        coordinates = pca.transform(self.space, rows) / self.length  # (B, k)
        return -kde.log_density(kde.KDE(self.points, self.factor, self.centre), coordinates).float()


class DFKDE(VectorDensity, OnePassDetector):
    """Anomaly = −log density of the feature: global average pool, `components` principal components, unit largest norm, Gaussian KDE.

    Where the training images span fewer directions than `components`, there are as many components as directions.
    """

    min_images = 2

    def __init__(self, backbone: str, stages: Stages, weights: str, components: int, bandwidth: str | float, seed: int):
        super().__init__()
        self.save_hyperparameters()
        self.add_density(components, "kde", bandwidth)
        self.add_buffers("rows")  # (N, D) the features, for an update
        self.backbone = Features(backbone, stages, weights, seed)

    def collect(self, maps: Maps) -> Tensor:
        """The global average pool of all stages, (B, D)."""
        return torch.cat([stage.mean((2, 3)) for stage in maps], 1)

    def fit(self, state: RowBuffer) -> None:
        self.rows = state.compute()
        self.fit_density(self.rows, scaled=True)

    def restore(self, state: RowBuffer) -> None:
        state.update(self.rows)

    def score(self, maps: Maps, size: tuple[int, int]) -> Prediction:
        return Prediction(self.negative_log_density(self.collect(maps)))


def principal(rows: Tensor, components: int) -> pca.PCA:
    """PCA in float64 of vectors (N, D) with at most `components` directions: those in which they vary by more than float32 noise.

    Otherwise copies of one image, in batches of different size, would span directions of rounding only, and any new image be far off.
    """
    rows = rows.double()
    mean, axes, variance = pca.fit(rows, components)
    count = max(1, int((variance > RESOLUTION**2 * rows.square().sum(1).mean()).sum()))
    return pca.PCA(mean, axes[:count], variance[:count])
