"""PaDiM: a Gaussian at every position of the feature grid (Defard, Setkov, Loesch, Audigier 2020, arXiv 2011.08785)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from blemish.detector import COUNT, POSITIVE, Maps, OnePassDetector, Stages
from blemish.edge.calibration import FULL
from blemish.edge.errors import InputError
from blemish.features.extractor import Features
from blemish.ops import gaussian
from blemish.ops.accumulators import RowBuffer, RunningCovariance
from blemish.ops.maps import align, check_blur, smooth_upsample
from blemish.types import Prediction


class PaDiM(OnePassDetector):
    """Anomaly = Mahalanobis distance of a position's embedding to that position's normal embeddings (paper, eq. 2).

    The embedding is `n_features` channels, drawn once from `seed`, of the concatenated stages (section III-A), the coarse ones resized by
    `align`: the paper repeats their cells (`nearest`). Of several `draws`, each with its own Gaussians, the distance is the mean. Σ gets
    `epsilon`·I (eq. 1); the map is upsampled and blurred by `sigma` pixels, and the image's score is its maximum.
    """

    left_out = FULL

    def __init__(
        self,
        backbone: str,
        stages: Stages,
        weights: str,
        n_features: int,
        draws: int,
        epsilon: float,
        sigma: float,
        align: str,
        score: str | float,
        seed: int,
    ):
        super().__init__()
        self.save_hyperparameters()
        self.set_score(score)
        self.check_arguments(n_features=COUNT, draws=COUNT, epsilon=POSITIVE, sigma=check_blur, align=("bilinear", "nearest"))
        self.backbone = Features(backbone, stages, weights, seed)
        channels, generator = self.backbone.channels, torch.Generator().manual_seed(seed)
        order = torch.stack([torch.randperm(sum(channels), generator=generator) for _ in range(draws)])
        self.register_buffer("drawn", order[:, :n_features].sort(1).values)  # (R, d)
        self.first = [sum(channels[:s]) for s in range(len(channels))]  # a stage's first channel in the concatenation
        stage_of = torch.arange(len(channels)).repeat_interleave(torch.tensor(channels))[self.drawn]  # (R, d)
        self.counts = [row.bincount(minlength=len(channels)).tolist() for row in stage_of]  # drawn channels of each stage
        # of R·P positions: (R·P, d), then either (R·P, d, d), or (N, R·P, d) and (R·P, N, N)
        self.add_buffers("mean", "cholesky", "woodbury", "lower")
        self.epsilon, self.sigma, self.align = epsilon, sigma, align

    def embed(self, maps: Maps) -> Tensor:
        """The channels of each draw at every position of the finest grid, (B, R·P, d)."""
        draws = zip(self.drawn, self.counts, strict=True)
        parts = [self.embed_draw(maps, drawn.split(counts)) for drawn, counts in draws]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def embed_draw(self, maps: Maps, drawn: Sequence[Tensor]) -> Tensor:
        """The channels that a draw takes of each stage, (B, P, d)."""
        parts = []
        for stage, first, channels in zip(maps, self.first, drawn, strict=True):
            # it costs less to draw before resizing
            if len(channels) or not parts:  # the first stage sets the grid even if no channel of it was drawn
                chosen = stage.index_select(1, channels - first).float()
                # the channels of a position are then contiguous, as batched products over positions need them
                parts.append(chosen.contiguous(memory_format=torch.channels_last))
        return align(parts, self.align).flatten(2).mT.contiguous()

    def new_state(self, images: int) -> RowBuffer | RunningCovariance:
        # both forms are exact: use the smaller of N·P·d samples and P·d·d second moments
        return RowBuffer(images) if images <= self.drawn.shape[1] else RunningCovariance()

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
        return self._prediction(self._distance(maps), maps, size)

    def leave_one_out(self, maps: Maps, size: tuple[int, int], rows: Sequence[int]) -> Prediction:
        if len(self.cholesky):
            squared = gaussian.left_out_cholesky(self._distance(maps), int(self.fitted))
        else:
            squared = gaussian.left_out_woodbury(self.lower, torch.tensor(rows, device=self.device), self.epsilon)  # (R·P, B)
        return self._prediction(squared.sqrt(), maps, size)

    def _distance(self, maps: Maps) -> Tensor:
        grid, draws = maps[0].shape[-2:], len(self.drawn)
        if len(self.mean) != draws * grid.numel():
            fitted = len(self.mean) // draws
            raise InputError(f"image_size: PaDiM was fitted to {fitted} positions and now gets {grid.numel()}; keep the image size")
        x = self.embed(maps).transpose(0, 1)  # (R·P, B, d)
        if len(self.cholesky):
            return gaussian.mahalanobis_cholesky(x, self.mean, self.cholesky)  # (R·P, B)
        return gaussian.mahalanobis_woodbury(x, self.mean, self.woodbury, self.epsilon)

    def _prediction(self, distance: Tensor, maps: Maps, size: tuple[int, int]) -> Prediction:
        distance = distance.unflatten(0, (len(self.drawn), -1)).mean(0)  # (P, B)
        return self.from_map(smooth_upsample(distance.T.unflatten(1, maps[0].shape[-2:]), size, self.sigma))  # (B, H, W)

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
