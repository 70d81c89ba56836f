"""LAKE: layer-constrained variational autoencoder with a density of its codes (Lv et al. 2020, Knowledge-Based Systems 196, 105753)."""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from blemish.detector import RowBuffer, TrainedDetector
from blemish.edge.checks import check_choice, check_number, check_whole
from blemish.methods.dfkde import principal
from blemish.ops import kde, pca
from blemish.ops.conv import Decoder, Encoder, input_side
from blemish.ops.losses import gaussian_kl, relative_distance, sampled
from blemish.ops.rng import seeded
from blemish.types import Batch, Prediction

RESOLUTION = 1e-5  # of the vectors' root mean square: what float32 networks leave undecided from batch to batch


class LAKE(TrainedDetector):
    """Anomaly = −log density of a vector: the posterior's mean and how far matching layers of encoder and decoder agree.

    Training minimises ‖x − x̂‖² + `layer_weight`·Σ_l ‖h_l − ĥ_l‖² + `kl_weight`·KL, with the weights 1 in the paper; h_l and ĥ_l are
    the convolutions' outputs in the encoder and what goes into their counterparts in the decoder. The vector holds the mean, and of the
    image and every layer the relative Euclidean distance and the cosine similarity. It is standardised on the training images and
    reduced to at most `components` principal components (paper: neither), so that few images have a density: `density` kde, by the
    rule `bandwidth`, or gaussian.
    """

    quick = ("trainer.max_epochs=10", "model.learning_rate=0.002")
    min_images = 2

    def __init__(
        self,
        image_size: int | None,
        crop: int | None,
        latent: int,
        layer_weight: float,
        kl_weight: float,
        density: str,
        components: int,
        bandwidth: str | float,
        learning_rate: float,
        weight_decay: float,
        seed: int,
    ):
        super().__init__()
        self.save_hyperparameters()
        check_choice("model", ("kde", "gaussian"), density=density)
        check_whole("model", 1, latent=latent, components=components)
        check_number("model", "[0, inf)", layer_weight=layer_weight, kl_weight=kl_weight, weight_decay=weight_decay)
        check_number("model", "(0, inf)", learning_rate=learning_rate)
        check_number("model", "(0, inf)", also=("scott", "silverman"), bandwidth=bandwidth)
        self.layer_weight, self.kl_weight = layer_weight, kl_weight
        self.density, self.components, self.bandwidth = density, components, bandwidth
        side = input_side(image_size, crop)
        with seeded(seed):
            self.encoder, self.decoder = Encoder(side, 2 * latent), Decoder(side, latent)
        for name in ("offset", "scale"):  # (D,): float64, as all that follows
            self.register_buffer(name, torch.empty(0))
        for name in ("mean", "axes", "variance"):  # (D,), (k, D), (k,)
            self.register_buffer(name, torch.empty(0))
        for name in ("points", "factor", "centre"):  # (N, k), (k, k), (k,): empty for a gaussian
            self.register_buffer(name, torch.empty(0))

    @property
    def space(self) -> pca.PCA:
        return pca.PCA(self.mean, self.axes, self.variance)

    def encode(self, image: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """The image and all layers' outputs, mean and log variance (B, d) of the posterior."""
        outputs = self.encoder.layers(image)
        mean, log_variance = self.encoder.code(outputs[-1]).float().chunk(2, 1)
        return [image] + outputs, mean, log_variance

    def reconstruct(self, image: Tensor) -> Tensor:
        """What the posterior's mean keeps of images (B, 3, H, W), in [0, 1]."""
        return self.decoder(self.encode(image)[1])

    def loss(self, batch: Batch) -> Tensor:
        layers, mean, log_variance = self.encode(batch.image)
        others = self.decoder.layers(sampled(mean, log_variance, self.generator()))
        errors = [F.mse_loss(a.float(), b.float(), reduction="sum") for a, b in zip(layers, others, strict=True)]
        total = errors[0] + self.layer_weight * sum(errors[1:]) + self.kl_weight * gaussian_kl(mean, log_variance).sum()
        return total / batch.image.numel()  # paper: the sum, which has the same minima

    def vectors(self, image: Tensor) -> Tensor:
        """What the density is made of, (B, D) with D = d + 2·(1 + layers)."""
        layers, mean, _ = self.encode(image)
        return torch.cat([mean, agreement(layers, self.decoder.layers(mean))], 1)

    def after_training(self, batches: Iterable[Batch]) -> None:
        rows = torch.cat([self.vectors(batch.image) for batch in batches])
        state = RowBuffer(len(rows)).to(rows.device)
        state.update(rows)
        state.gather()
        rows = state.compute().double()  # (N, D)
        self.offset = rows.mean(0)
        # a value that never varies, as of a code the prior took over, would otherwise count by its rounding
        self.scale = (rows - self.offset).square().mean(0).sqrt().clamp_min(RESOLUTION * rows.square().mean().sqrt())
        rows = self.standardised(rows)
        self.mean, self.axes, self.variance = principal(rows, self.components)
        if self.density == "kde":
            self.points, self.factor, self.centre = kde.fit(pca.transform(self.space, rows), self.bandwidth)

    def standardised(self, rows: Tensor) -> Tensor:
        return (rows.double() - self.offset) / self.scale

    def forward(self, image: Tensor) -> Prediction:
        rows = self.standardised(self.vectors(image))  # (B, D)
        if self.density == "gaussian":
            return Prediction(pca.negative_log_likelihood(self.space, rows).float())
        return Prediction(-kde.log_density(kde.KDE(self.points, self.factor, self.centre), pca.transform(self.space, rows)).float())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.hparams.learning_rate, weight_decay=self.hparams.weight_decay)


def agreement(layers: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    """Relative Euclidean distances, then cosine similarities of the L pairs (B, …), each image's values as one vector: (B, 2L).

    The authors' program compares the image with its reconstruction only.
    """
    pairs = [(a.float().flatten(1), b.float().flatten(1)) for a, b in zip(layers, others, strict=True)]
    return torch.stack([relative_distance(a, b) for a, b in pairs] + [F.cosine_similarity(a, b) for a, b in pairs], 1)
