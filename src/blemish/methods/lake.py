"""LAKE: layer-constrained variational autoencoder with a density of its codes (Lv et al. 2020, Knowledge-Based Systems 196, 105753)."""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from blemish.detector import NOT_NEGATIVE
from blemish.methods.autoencoder import ConvAutoencoder
from blemish.methods.dfkde import VectorDensity
from blemish.ops.losses import gaussian_kl, relative_distance, sampled
from blemish.types import Batch, Prediction

RESOLUTION = 1e-5  # of the vectors' root mean square: float32 networks differ by so much from batch to batch


class LAKE(VectorDensity, ConvAutoencoder):
    """Anomaly = −log density of a vector: the posterior's mean, and how far matching layers of encoder and decoder agree.

    Training minimises ‖x − x̂‖² + `layer_weight`·Σ_l ‖h_l − ĥ_l‖² + `kl_weight`·KL, with weights of 1 in the paper; h_l and ĥ_l are
    the outputs of the encoder's convolutions and the inputs of their counterparts in the decoder. The vector holds the mean, and of the
    image and every layer the relative Euclidean distance and the cosine similarity. It is standardised on the training images and
    reduced to at most `components` principal components (paper: neither), so that few images have a density.
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
        self.check_arguments(density=("kde", "gaussian"), layer_weight=NOT_NEGATIVE, kl_weight=NOT_NEGATIVE)
        self.layer_weight, self.kl_weight = layer_weight, kl_weight
        self.build(outputs=2)
        self.add_buffers("offset", "scale")  # (D,) float64
        self.add_density(components, density, bandwidth)

    def encode(self, image: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """The image and all layers' outputs, mean and log variance (B, d) of the posterior."""
        outputs = self.encoder.layers(image)
        mean, log_variance = self.encoder.code(outputs[-1]).float().chunk(2, 1)
        return [image, *outputs], mean, log_variance

    def reconstruct(self, image: Tensor) -> Tensor:
        """The reconstruction of images (B, 3, H, W) from the posterior's mean, in [0, 1]."""
        return self.decoder(self.encode(image)[1])

    def loss(self, batch: Batch) -> Tensor:
        layers, mean, log_variance = self.encode(batch.image)
        others = self.decoder.layers(sampled(mean, log_variance, self.generator()))
        errors = [F.mse_loss(a.float(), b.float(), reduction="sum") for a, b in zip(layers, others, strict=True)]
        total = errors[0] + self.layer_weight * sum(errors[1:]) + self.kl_weight * gaussian_kl(mean, log_variance).sum()
        return total / batch.image.numel()  # paper: the sum, which has the same minima

    def vectors(self, image: Tensor) -> Tensor:
        """The vectors whose density is the score, (B, D) with D = d + 2·(1 + layers)."""
        layers, mean, _ = self.encode(image)
        return torch.cat([mean, agreement(layers, self.decoder.layers(mean))], 1)

    def after_training(self, batches: Iterable[Batch]) -> None:
        rows = torch.cat([self.vectors(batch.image) for batch in batches]).double()  # (N, D)
        self.offset = rows.mean(0)
        # a value that never varies, as of a code that follows the prior, would otherwise count by its rounding
        self.scale = (rows - self.offset).square().mean(0).sqrt().clamp_min(RESOLUTION * rows.square().mean().sqrt())
        self.fit_density((rows - self.offset) / self.scale)

    def forward(self, image: Tensor) -> Prediction:
        return Prediction(self.negative_log_density((self.vectors(image).double() - self.offset) / self.scale))


def agreement(layers: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    """Relative Euclidean distances, then cosine similarities of the L pairs (B, …), each image's values as one vector: (B, 2L).

    The authors' program compares the image with its reconstruction only.
    """
    pairs = [(a.float().flatten(1), b.float().flatten(1)) for a, b in zip(layers, others, strict=True)]
    return torch.stack([relative_distance(a, b) for a, b in pairs] + [F.cosine_similarity(a, b) for a, b in pairs], 1)
