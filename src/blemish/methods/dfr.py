"""DFR: regional features that an autoencoder cannot reconstruct are anomalous (Shi, Yang, Qi 2020, arXiv 2012.07122)."""

from collections.abc import Iterable
from functools import lru_cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blemish.detector import COUNT, POSITIVE, SHARE_OR_COUNT, Maps, Stages, TrainedDetector
from blemish.edge.errors import InputError
from blemish.features.extractor import Features
from blemish.ops.accumulators import RunningCovariance
from blemish.ops.maps import smooth_upsample, upsample_blur_matrix
from blemish.ops.pca import from_moments
from blemish.ops.rng import seeded
from blemish.types import Batch, Prediction

CODE = 2  # the linear layer that makes the code
TINY = 1e-6  # least norm of a feature that errors are relative to


class DFR(TrainedDetector):
    """Anomaly = L2 distance of a position's regional feature from its reconstruction by a narrow autoencoder of single positions.

    A regional feature is all stages' mean over a square of `region` pixels. `latent` is the width of the autoencoder's code, or the share
    of the training features' variance whose number of principal components it becomes. `relative` divides the distance by the feature's
    norm. The score is the map's maximum, as in the official code; the paper itself is about segmentation.
    """

    quick = ("trainer.max_epochs=20", "model.learning_rate=0.01")
    needs_images = False

    def __init__(
        self,
        backbone: str,
        stages: Stages,
        weights: str,
        region: int,
        latent: int | float,
        batch_norm: bool,
        relative: bool,
        learning_rate: float,
        score: str | float,
        seed: int,
    ):
        super().__init__()
        self.save_hyperparameters()
        self.set_score(score)
        self.check_arguments(region=COUNT, latent=SHARE_OR_COUNT, learning_rate=POSITIVE)
        self.check_arguments(batch_norm=(True, False), relative=(True, False))
        self.backbone = Features(backbone, stages, weights, seed)
        self.region, self.latent, self.relative = region, latent, relative
        self.autoencoder = nn.Sequential()  # filled by `before_training`

    def embed(self, maps: Maps, size: tuple[int, int]) -> Tensor:
        """Regional features of images of `size` (H, W): (B, P, ΣC), P the regions line by line."""
        return torch.cat([regional(map.float(), size, self.region) for map in maps], -1).flatten(1, 2)

    def embed_batch(self, batch: Batch) -> Tensor:
        return self.embed(self.maps(batch), tuple(batch.image.shape[-2:])).flatten(0, 1)  # (B·P, ΣC)

    def before_training(self, batches: Iterable[Batch]) -> None:
        self.build(self.count_components(batches) if isinstance(self.latent, float) else self.latent)

    def count_components(self, batches: Iterable[Batch]) -> int:
        """The number of principal components that hold `latent` of the variance; the official code counts them on ten images."""
        moments = RunningCovariance().to(self.device)
        for batch in batches:
            moments.update(self.embed_batch(batch)[:, None])  # (n, 1, D)
        count, mean, scatter = moments.compute()
        return len(from_moments(mean[0].double(), scatter[0].double() / (count - 1), self.latent).variance)

    def build(self, latent: int) -> None:
        """Make the autoencoder with a code of `latent` numbers."""
        with seeded(self.hparams.seed):
            self.autoencoder = autoencoder(sum(self.backbone.channels), latent, self.hparams.batch_norm).to(self.device)

    def loss(self, batch: Batch) -> Tensor:
        x = self.embed_batch(batch)
        return F.mse_loss(self.autoencoder(x), x)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.autoencoder.parameters(), self.hparams.learning_rate)

    def score(self, maps: Maps, size: tuple[int, int]) -> Prediction:
        if not len(self.autoencoder):
            raise InputError("DFR: not trained, the width of its autoencoder comes from the training images")
        x = self.embed(maps, size)  # (B, P, D)
        # the official code has the mean of the squares, which is in the same order at the regions' centres
        error = (self.autoencoder(x.flatten(0, 1)).view_as(x) - x).norm(dim=-1).float()  # (B, P)
        if self.relative:
            error = error / x.norm(dim=-1).clamp_min(TINY)
        map = smooth_upsample(error.unflatten(1, [cells(pixels, self.region) for pixels in size]), size, 0.0)  # (B, H, W)
        return self.from_map(map)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        saved = state_dict.get(f"{prefix}autoencoder.linear{CODE}.weight")
        if saved is not None and not len(self.autoencoder):
            self.build(len(saved))
        super()._load_from_state_dict(state_dict, prefix, *args)


def autoencoder(channels: int, latent: int, batch_norm: bool) -> nn.Sequential:
    """D → (D + 2k)/2 → 2k → k and back, of rows (N, D): 1×1 convolutions are linear layers of single positions."""
    widths = [channels, (channels + 2 * latent) // 2, 2 * latent, latent]
    widths += widths[-2::-1]  # (D, …, k, …, D)
    layers = nn.Sequential()
    for i, (before, after) in enumerate(pairwise(widths)):
        layers.add_module(f"linear{i}", nn.Linear(before, after))
        if i in (CODE, len(widths) - 2):
            continue  # neither the code nor the reconstruction is bounded below
        if batch_norm:
            layers.add_module(f"norm{i}", nn.BatchNorm1d(after))
        layers.add_module(f"relu{i}", nn.ReLU())
    return layers


def regional(map: Tensor, size: tuple[int, int], region: int) -> Tensor:
    """Means of a map (B, C, h, w), resized to (H, W), over squares of `region` pixels: (B, cells(H), cells(W), C).

    Both steps are linear and separable, so the resized map is never made. Resizing is bilinear with half-pixel centres, where the official
    code aligns corners.
    """
    rows = regional_matrix(map.shape[-2], size[0], region).to(map)  # (H', h)
    columns = regional_matrix(map.shape[-1], size[1], region).to(map)  # (W', w)
    last = map.movedim(1, -1)  # (B, h, w, C), as it is in memory
    return columns @ (rows @ last.flatten(2)).unflatten(-1, last.shape[2:])  # (B, H', W', C)


@lru_cache(maxsize=64)
def regional_matrix(length: int, pixels: int, region: int) -> Tensor:
    """The (cells(pixels, region), length) matrix of resizing to `pixels`, then the mean of each region, in float64."""
    with torch.inference_mode(False):
        up = upsample_blur_matrix(length, pixels, 0.0)  # (pixels, length)
        # as many regions as cover all pixels, of nearly equal size where `region` does not divide them
        return F.adaptive_avg_pool1d(up.T[None], cells(pixels, region))[0].T.contiguous()


def cells(pixels: int, region: int) -> int:
    return -(-pixels // region)
