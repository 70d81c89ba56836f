"""PaDiM: a Gaussian at every position of the feature grid (Defard, Setkov, Loesch, Audigier 2020, arXiv 2011.08785)."""

import torch
from torch import Tensor

from blemish.detector import COUNT, POSITIVE, Maps, OnePassDetector, RowBuffer, RunningCovariance, Stages
from blemish.edge.errors import InputError
from blemish.features.extractor import Features
from blemish.ops import gaussian
from blemish.ops.maps import align, check_blur, smooth_upsample
from blemish.types import Prediction


class PaDiM(OnePassDetector):
    """Anomaly = Mahalanobis distance of a position's embedding to that position's normal embeddings (paper, eq. 2).

    The embedding is `n_features` channels, drawn once from `seed`, of the concatenated stages (section III-A), the coarse ones resized by
    `align`: the paper repeats their cells (`nearest`). Σ gets `epsilon`·I (eq. 1); the map is upsampled and blurred by `sigma` pixels, and
    the image's score is its maximum.
    """

    def __init__(
        self,
        backbone: str,
        stages: Stages,
        weights: str,
        n_features: int,
        epsilon: float,
        sigma: float,
        align: str,
        score: str | float,
        seed: int,
    ):
        super().__init__()
        self.save_hyperparameters()
        self.set_score(score)
        self.check_arguments(n_features=COUNT, epsilon=POSITIVE, sigma=check_blur, align=("bilinear", "nearest"))
        self.backbone = Features(backbone, stages, weights, seed)
        channels = self.backbone.channels
        order = torch.randperm(sum(channels), generator=torch.Generator().manual_seed(seed))
        self.register_buffer("drawn", order[:n_features].sort().values)  # (d,)
        self.first = [sum(channels[:s]) for s in range(len(channels))]  # a stage's first channel in the concatenation
        stage_of = torch.arange(len(channels)).repeat_interleave(torch.tensor(channels))[self.drawn]
        self.counts = stage_of.bincount(minlength=len(channels)).tolist()  # drawn channels of each stage
        self.add_buffers("mean", "cholesky", "woodbury", "lower")  # (P, d), then either (P, d, d), or (N, P, d) and (P, N, N)
        self.epsilon, self.sigma, self.align = epsilon, sigma, align

    def embed(self, maps: Maps) -> Tensor:
        """The drawn channels of all stages at every position of the finest grid, (B, P, d)."""
        parts = []
        for stage, first, drawn in zip(maps, self.first, self.drawn.split(self.counts), strict=True):
            # it costs less to draw before resizing
            if len(drawn) or not parts:  # the first stage sets the grid even if no channel of it was drawn
                parts.append(stage.index_select(1, drawn - first).float())
        # the channels of a position contiguous: batched products would copy position by position otherwise
        return align(parts, self.align).flatten(2).transpose(1, 2).contiguous()  # (B, P, d)

    def new_state(self, images: int) -> RowBuffer | RunningCovariance:
        # both forms are exact: use the smaller of N·P·d samples and P·d·d second moments
        return RowBuffer(images) if images <= len(self.drawn) else RunningCovariance()

    def collect(self, maps: Maps) -> Tensor:
        return self.embed(maps)

    def fit(self, state: RowBuffer | RunningCovariance) -> None:
        if isinstance(state, RowBuffer):
            self.mean, self.woodbury, self.lower = gaussian.woodbury_factor(state.compute(), self.epsilon)
        else:
            count, self.mean, scatter = state.compute()
            self.cholesky = gaussian.cholesky_factor(scatter, int(count), self.epsilon)
            self.woodbury, self.lower = self.mean[:0], self.mean[:0]

    def restore(self, state: RowBuffer | RunningCovariance) -> None:
        if len(self.cholesky):
            state.restore(int(self.fitted), self.mean, gaussian.scatter_of(self.cholesky, int(self.fitted), self.epsilon))
        else:
            state.update(gaussian.samples_of(self.mean, self.woodbury, self.lower))

    def score(self, maps: Maps, size: tuple[int, int]) -> Prediction:
        grid = maps[0].shape[-2:]
        if len(self.mean) != grid.numel():
            raise InputError(f"image_size: PaDiM was fitted to {len(self.mean)} positions and now gets {grid.numel()}; keep the image size")
        x = self.embed(maps).transpose(0, 1)  # (P, B, d)
        if len(self.cholesky):
            distance = gaussian.mahalanobis_cholesky(x, self.mean, self.cholesky)
        else:
            distance = gaussian.mahalanobis_woodbury(x, self.mean, self.woodbury, self.epsilon)  # (P, B)
        map = smooth_upsample(distance.T.unflatten(1, grid), size, self.sigma)  # (B, H, W)
        return self.from_map(map)

    # a checkpoint holds only the lower triangles: the factors are zero above
    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in ("cholesky", "lower"):
            if len(factor := getattr(self, name)):
                destination[prefix + name] = gaussian.pack_triangle(factor)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for name in ("cholesky", "lower"):
            if (packed := state_dict.get(prefix + name)) is not None and len(packed):
                state_dict[prefix + name] = gaussian.unpack_triangle(packed)
        super()._load_from_state_dict(state_dict, prefix, *args)
