"""DFM: deep features that the principal components of normal ones do not explain (Ahuja et al. 2019, arXiv 1909.11786)."""

import torch.nn.functional as F
from torch import Tensor

from blemish.detector import COUNT, SHARE_OR_COUNT, Maps, OnePassDetector, RowBuffer, Stages
from blemish.edge.errors import InputError
from blemish.features.extractor import Features
from blemish.ops import pca
from blemish.ops.maps import align, smooth_upsample
from blemish.types import Prediction

FEWEST = 4  # cells a side that pooling leaves where the stage has them: a coarser map would locate nothing


class DFM(OnePassDetector):
    """PCA of the pooled and flattened feature map, `keep` of its variance; the normal images are the only class.

    score=fre: the norm of the residual that the components do not reconstruct, and as map its norm over the channels of each cell.
    score=nll: −log likelihood of the Gaussian in the components' space, no map. `pool` cells a side are averaged into one.
    """

    min_images = 2

    def __init__(self, backbone: str, stages: Stages, weights: str, pool: int, keep: float, score: str | float, seed: int):
        super().__init__()
        self.save_hyperparameters()
        self.set_score(score, "fre", "nll")
        self.check_arguments(pool=COUNT, keep=SHARE_OR_COUNT)
        self.backbone = Features(backbone, stages, weights, seed)
        self.pool, self.share, self.rule = pool, keep, score
        self.add_buffers("mean", "axes", "variance", "rows")  # (D,), (k, D), (k,), (N, D) for an update; D = C·h·w of the pooled map

    def embed(self, maps: Maps) -> Tensor:
        """All stages on the first one's grid, averaged over squares of `pool` cells: (B, C, h, w)."""
        joined = align(maps)
        # equal to average pooling where `pool` divides the grid; elsewhere no border is lost and the map stays in place
        return F.adaptive_avg_pool2d(joined, [max(round(side / self.pool), min(side, FEWEST)) for side in joined.shape[2:]])

    def collect(self, maps: Maps) -> Tensor:
        return self.embed(maps).flatten(1)  # (B, D)

    def fit(self, state: RowBuffer) -> None:
        self.rows = state.compute()
        self.mean, self.axes, self.variance = pca.fit(self.rows, self.share)

    def restore(self, state: RowBuffer) -> None:
        state.update(self.rows)

    def score(self, maps: Maps, size: tuple[int, int]) -> Prediction:
        x = self.embed(maps)  # (B, C, h, w)
        space, rows = pca.PCA(self.mean, self.axes, self.variance), x.flatten(1)  # (B, D)
        if rows.shape[1] != len(self.mean):
            raise InputError(f"image_size: DFM was fitted to {len(self.mean)} values an image and now gets {rows.shape[1]}; keep the size")
        if self.rule == "nll":
            return Prediction(pca.negative_log_likelihood(space, rows))
        residual = (rows - pca.inverse(space, pca.transform(space, rows))).view_as(x)  # (B, C, h, w)
        map = smooth_upsample(residual.norm(dim=1), size, sigma=0.0)  # (B, H, W)
        return self.from_map(map, residual.flatten(1).norm(dim=1))
