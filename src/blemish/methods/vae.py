"""Convolutional variational autoencoder (Kingma and Welling 2014, arXiv 1312.6114) that scores what it cannot reproduce."""

import torch
from torch import Tensor

from blemish.detector import TrainedDetector
from blemish.edge.checks import check_choice, check_number, check_whole
from blemish.ops.conv import Decoder, Encoder, input_side
from blemish.ops.losses import gaussian_kl, sampled, squared_error
from blemish.ops.maps import blur, check_blur
from blemish.ops.rng import seeded
from blemish.types import Batch, Prediction


class VAE(TrainedDetector):
    """Anomaly = squared error of the reconstruction from the posterior's mean, pixel by pixel, with the autoencoder's layers.

    Training minimises the negative evidence lower bound ‖x − x̂‖² + `kl_weight`·KL(q(z|x) ‖ N(0, I)), x̂ decoded from a draw of q; for a
    Gaussian p(x|z) of variance σ², kl_weight is 2σ². All is divided by the number of values of an image, so that losses and scores read
    the same for all sizes. The image's score is the map's largest value (score=reconstruction), or the bound with the mean in place of
    a draw (score=elbo). The map is blurred by a Gaussian of `sigma` pixels.
    """

    quick = ("trainer.max_epochs=15", "model.learning_rate=0.002")

    def __init__(
        self,
        image_size: int | None,
        crop: int | None,
        latent: int,
        kl_weight: float,
        score: str,
        learning_rate: float,
        weight_decay: float,
        seed: int,
        sigma: float,
    ):
        super().__init__()
        self.save_hyperparameters()
        check_choice("model", ("reconstruction", "elbo"), score=score)
        check_whole("model", 1, latent=latent)
        check_number("model", "[0, inf)", kl_weight=kl_weight, weight_decay=weight_decay)
        check_number("model", "(0, inf)", learning_rate=learning_rate)
        check_blur(sigma)
        self.kl_weight, self.sigma, self.ranking = kl_weight, sigma, score
        side = input_side(image_size, crop)
        with seeded(seed):
            self.encoder, self.decoder = Encoder(side, 2 * latent), Decoder(side, latent)

    def posterior(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of q(z|x), (B, d) each."""
        # float: in half precision the variances would lose what the KL compares
        return self.encoder(image).float().chunk(2, 1)

    def reconstruct(self, image: Tensor) -> Tensor:
        """What the posterior's mean keeps of images (B, 3, H, W), in [0, 1]."""
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
        score = map.amax((1, 2)) if self.ranking == "reconstruction" else self.bound(image, error, mean, log_variance)
        return Prediction(score, map)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.hparams.learning_rate, weight_decay=self.hparams.weight_decay)
