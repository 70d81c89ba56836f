"""Convolutional variational autoencoder (Kingma and Welling 2014, arXiv 1312.6114) that scores what it cannot reproduce."""

from torch import Tensor

from blemish.detector import NOT_NEGATIVE
from blemish.methods.autoencoder import ConvAutoencoder
from blemish.ops.losses import gaussian_kl, sampled, squared_error
from blemish.ops.maps import blur, check_blur
from blemish.types import Batch, Prediction


class VAE(ConvAutoencoder):
    """Anomaly = squared error of the reconstruction from the posterior's mean, pixel by pixel, with the autoencoder's layers.

    Training minimises the negative evidence lower bound ‖x − x̂‖² + `kl_weight`·KL(q(z|x) ‖ N(0, I)), x̂ decoded from a draw of q; for a
    Gaussian p(x|z) of variance σ², kl_weight is 2σ². All is divided by the number of values of an image, so that losses and scores are
    comparable between sizes. The image's score is that of its map, or the bound with the mean in place of a draw (score=elbo).
    The map is blurred by a Gaussian of `sigma` pixels.
    """

    def __init__(
        self,
        image_size: int | None,
        crop: int | None,
        latent: int,
        kl_weight: float,
        score: str | float,
        learning_rate: float,
        weight_decay: float,
        seed: int,
        sigma: float,
    ):
        super().__init__()
        self.save_hyperparameters()
        self.set_score(score, "elbo")
        self.check_arguments(kl_weight=NOT_NEGATIVE, sigma=check_blur)
        self.kl_weight, self.sigma = kl_weight, sigma
        self.build(outputs=2)

    def posterior(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of q(z|x), (B, d) each."""
        # float: half precision would be too coarse for the KL of the variances
        return self.encoder(image).float().chunk(2, 1)

    def reconstruct(self, image: Tensor) -> Tensor:
        """The reconstruction of images (B, 3, H, W) from the posterior's mean, in [0, 1]."""
        return self.decoder(self.posterior(image)[0])

    def bound(self, image: Tensor, map: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
        """The negative evidence lower bound (B,), divided by the number of values of an image."""
        return map.mean((1, 2)) + self.kl_weight * gaussian_kl(mean, log_variance) / image[0].numel()

    def loss(self, batch: Batch) -> Tensor:
        mean, log_variance = self.posterior(batch.image)
        drawn = self.decoder(sampled(mean, log_variance, self.generator()))
        return self.bound(batch.image, squared_error(batch.image, drawn), mean, log_variance).mean()

    def forward(self, image: Tensor) -> Prediction:
        mean, log_variance = self.posterior(image)
        error = squared_error(image, self.decoder(mean))  # (B, H, W)
        map = blur(error, self.sigma)
        return self.from_map(map, self.bound(image, error, mean, log_variance))
