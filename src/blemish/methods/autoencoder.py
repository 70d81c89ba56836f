"""Autoencoder with a squared error or SSIM as its loss (Bergmann, Löwe, Fauser, Sattlegger, Steger 2019, arXiv 1807.02011)."""

from functools import partial

import torch
from torch import Tensor

from blemish.detector import TrainedDetector
from blemish.edge.checks import check_choice, check_number, check_whole
from blemish.edge.errors import InputError
from blemish.ops.conv import Decoder, Encoder, input_side
from blemish.ops.losses import dissimilarity, squared_error
from blemish.ops.maps import blur, check_blur
from blemish.ops.rng import seeded
from blemish.types import Batch, Prediction


class Autoencoder(TrainedDetector):
    """Anomaly = what a code of `latent` values, learned on normal images, cannot reproduce of a pixel.

    loss=l2: squared error (paper, eq. 1); ssim: 1 − SSIM over `window`×`window` pixels (eq. 8 and 9). The map is the loss before it is
    averaged over the pixels, blurred by a Gaussian of `sigma` pixels, which the paper does without. The image's score is the `score` of
    its map: max, as MVTec AD's authors rank images (Bergmann et al. 2021, IJCV 129, section 5), or mean; the paper scores pixels only.
    """

    quick = ("trainer.max_epochs=15", "model.learning_rate=0.002")

    def __init__(
        self,
        image_size: int | None,
        crop: int | None,
        latent: int,
        loss: str,
        window: int,
        score: str,
        learning_rate: float,
        weight_decay: float,
        seed: int,
        sigma: float,
    ):
        super().__init__()
        self.save_hyperparameters()
        errors = {"l2": squared_error, "ssim": partial(dissimilarity, window=window)}
        check_choice("model", errors, loss=loss)
        check_whole("model", 1, 31, window=window)
        if window % 2 == 0:
            raise InputError(f"model.window={window}: expected an odd number of pixels")
        check_choice("model", ("max", "mean"), score=score)
        check_whole("model", 1, latent=latent)
        check_number("model", "(0, inf)", learning_rate=learning_rate)
        check_number("model", "[0, inf)", weight_decay=weight_decay)
        check_blur(sigma)
        self.error, self.sigma, self.ranking = errors[loss], sigma, score
        side = input_side(image_size, crop)
        with seeded(seed):
            self.encoder, self.decoder = Encoder(side, latent), Decoder(side, latent)

    def reconstruct(self, image: Tensor) -> Tensor:
        """What the code keeps of images (B, 3, H, W), in [0, 1]."""
        return self.decoder(self.encoder(image))

    def loss(self, batch: Batch) -> Tensor:
        # the paper sums over the pixels; the mean has the same minima and reads the same for all image sizes
        return self.error(batch.image, self.reconstruct(batch.image)).mean()

    def forward(self, image: Tensor) -> Prediction:
        map = blur(self.error(image, self.reconstruct(image)), self.sigma)  # (B, H, W)
        return Prediction(map.amax((1, 2)) if self.ranking == "max" else map.mean((1, 2)), map)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.hparams.learning_rate, weight_decay=self.hparams.weight_decay)
