"""DFKDE: a Gaussian kernel density of the image's deep feature, reduced by PCA."""

from collections.abc import Sequence

import torch
from torch import Tensor

from blemish.detector import Maps, OnePassDetector, RowBuffer
from blemish.edge.checks import check_number, check_whole
from blemish.features.extractor import Features
from blemish.ops import kde, pca
from blemish.types import Prediction

RESOLUTION = 1e-6  # of a feature's norm: what float32 networks leave undecided from batch to batch


class DFKDE(OnePassDetector):
    """Anomaly = −log density of the feature: global average pool, `components` principal components, unit largest norm, Gaussian KDE.

    The density's kernel has the shape of the covariance, by the rule `bandwidth` (scott, silverman or a factor). Where the training
    images span fewer directions than `components`, there are as many components as directions.
    """

    min_images = 2

    def __init__(self, backbone: str, stages: Sequence[int | str], weights: str, components: int, bandwidth: str | float, seed: int):
        super().__init__()
        self.save_hyperparameters()
        check_whole("model", 1, components=components)
        check_number("model", "(0, inf)", also=("scott", "silverman"), bandwidth=bandwidth)
        self.backbone = Features(backbone, stages, weights, seed)
        self.components, self.bandwidth = components, bandwidth
        for name in ("mean", "axes", "variance", "length"):  # (D,), (k, D), (k,), (): float64, as all that follows
            self.register_buffer(name, torch.empty(0))
        for name in ("points", "factor", "centre", "rows"):  # (N, k), (k, k), (k,), and the features (N, D) for an update
            self.register_buffer(name, torch.empty(0))

    @property
    def space(self) -> pca.PCA:
        return pca.PCA(self.mean, self.axes, self.variance)

    def embed(self, maps: Maps) -> Tensor:
        """The global average pool of all stages, (B, D)."""
        return torch.cat([stage.mean((2, 3)) for stage in maps], 1)

    def new_state(self, images: int) -> RowBuffer:
        return RowBuffer(images)

    def collect(self, maps: Maps) -> Tensor:
        return self.embed(maps)

    def fit(self, state: RowBuffer) -> None:
        rows = self.rows = state.compute()  # (N, D)
        self.mean, self.axes, self.variance = principal(rows, self.components)
        coordinates = pca.transform(self.space, rows)  # (N, k)
        self.length = coordinates.norm(dim=1).amax()
        self.points, self.factor, self.centre = kde.fit(coordinates / self.length, self.bandwidth)

    def restore(self, state: RowBuffer) -> None:
        state.update(self.rows)

    def score(self, maps: Maps, size: tuple[int, int]) -> Prediction:
        coordinates = pca.transform(self.space, self.embed(maps)) / self.length  # (B, k)
        return Prediction(-kde.log_density(kde.KDE(self.points, self.factor, self.centre), coordinates).float())


def principal(rows: Tensor, components: int) -> pca.PCA:
    """PCA in float64 of features (N, D) with at most `components` directions: those in which they vary by more than float32 noise.

    Copies of one image, in batches of different size, would otherwise span directions of rounding only, and any new image be far off.
    """
    rows = rows.double()
    mean, axes, variance = pca.fit(rows, components)
    count = max(1, int((variance > RESOLUTION**2 * rows.square().sum(1).mean()).sum()))
    return pca.PCA(mean, axes[:count], variance[:count])
