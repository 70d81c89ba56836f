"""Autoencoder with a squared error or SSIM as its loss (Bergmann, Löwe, Fauser, Sattlegger, Steger 2019, arXiv 1807.02011)."""

from functools import partial

import torch
from torch import Tensor

from blemish.detector import COUNT, NOT_NEGATIVE, POSITIVE, TrainedDetector, integer
from blemish.edge.errors import InputError
from blemish.ops.conv import Decoder, Encoder, input_side
from blemish.ops.losses import dissimilarity, squared_error
from blemish.ops.maps import blur, check_blur
from blemish.ops.rng import seeded
from blemish.types import Batch, Prediction


class ConvAutoencoder(TrainedDetector):
    """Encoder, decoder and optimiser of Bergmann et al., which Autoencoder, VAE and LAKE share."""

    quick = ("trainer.max_epochs=15", "model.learning_rate=0.002")

    def build(self, outputs: int) -> None:
        """Make the networks from the saved hyperparameters, with `outputs` numbers of the encoder for each of the `latent` values."""
        self.check_arguments(latent=COUNT, learning_rate=POSITIVE, weight_decay=NOT_NEGATIVE)
        side, latent = input_side(self.hparams.image_size, self.hparams.crop), self.hparams.latent
        with seeded(self.hparams.seed):
            self.encoder, self.decoder = Encoder(side, outputs * latent), Decoder(side, latent)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.hparams.learning_rate, weight_decay=self.hparams.weight_decay)


class Autoencoder(ConvAutoencoder):
    """Anomaly = what a code of `latent` values, learned on normal images, cannot reproduce of a pixel.

    loss=l2: squared error (paper, eq. 1); ssim: 1 − SSIM over `window`×`window` pixels (eq. 8 and 9). The map is the loss before it is
    averaged over the pixels, blurred by a Gaussian of `sigma` pixels, which the paper does without. The image's score is by
    default the map's maximum, as MVTec AD's authors rank images (Bergmann et al. 2021, IJCV 129, section 5); the paper scores pixels only.
    """

    def __init__(
        self,
        image_size: int | None,
        crop: int | None,
        latent: int,
        loss: str,
        window: int,
        score: str | float,
        learning_rate: float,
        weight_decay: float,
        seed: int,
        sigma: float,
    ):
        super().__init__()
        self.save_hyperparameters()
        self.set_score(score)
        errors = {"l2": squared_error, "ssim": partial(dissimilarity, window=window)}
        self.check_arguments(loss=tuple(errors), window=integer(1, 31), sigma=check_blur)
        if window % 2 == 0:
            raise InputError(f"model.window={window}: expected an odd number of pixels")
        self.error, self.sigma = errors[loss], sigma
        self.build(outputs=1)

    def reconstruct(self, image: Tensor) -> Tensor:
        """The reconstruction of images (B, 3, H, W), in [0, 1]."""
        return self.decoder(self.encoder(image))

    def loss(self, batch: Batch) -> Tensor:
        # the paper sums over the pixels; the mean has the same minima and is comparable between image sizes
        return self.error(batch.image, self.reconstruct(batch.image)).mean()

    def forward(self, image: Tensor) -> Prediction:
        map = blur(self.error(image, self.reconstruct(image)), self.sigma)  # (B, H, W)
        return self.from_map(map)
