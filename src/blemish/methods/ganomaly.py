"""GANomaly: an encoder-decoder-encoder trained against a discriminator (Akcay, Atapour-Abarghouei, Breckon 2018, arXiv 1805.06725)."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blemish.detector import COUNT, NOT_NEGATIVE, POSITIVE, TrainedDetector, number
from blemish.ops.conv import check_side, input_side
from blemish.ops.rng import seeded, stream
from blemish.types import Batch, Prediction

COLLAPSED = 1e-5  # a discriminator's loss below which the authors draw its weights anew


class GANomaly(TrainedDetector):
    """Anomaly = mean squared difference of an image's code z and the code ẑ of its reconstruction x̂.

    Generator: `w_adv`·‖f(x) − f(x̂)‖² + `w_con`·|x − x̂| + `w_enc`·‖z − ẑ‖² (paper, eq. 1 to 4, each a mean over all values), f the last
    features of the discriminator, which is trained by cross-entropy. The networks are DCGAN's: `channels` after the first halving, twice as
    many after each further one up to `max_channels`. `clip` bounds the norm of each network's gradient.
    """

    quick = ("trainer.max_epochs=30", "model.channels=8")
    clipped_by = "model.clip"

    def __init__(
        self,
        image_size: int | None,
        crop: int | None,
        latent: int,
        channels: int,
        max_channels: int,
        w_adv: float,
        w_con: float,
        w_enc: float,
        learning_rate: float,
        beta1: float,
        clip: float | None,
        seed: int,
    ):
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.check_arguments(latent=COUNT, channels=COUNT, max_channels=COUNT, w_adv=NOT_NEGATIVE, w_con=NOT_NEGATIVE, w_enc=NOT_NEGATIVE)
        self.check_arguments(learning_rate=POSITIVE, beta1=number("[0, 1)"), clip=number("(0, inf)", also=(None,)))
        self.w_adv, self.w_con, self.w_enc, self.clip = w_adv, w_con, w_enc, clip
        self.side = input_side(image_size, crop)
        widths, grid = pyramid(self.side, channels, max_channels)
        with seeded(seed):
            self.networks = nn.ModuleDict({"generator": Generator(widths, grid, latent), "discriminator": Discriminator(widths, grid)})
        draw_weights(self.networks, torch.Generator().manual_seed(seed))
        self.to(memory_format=torch.channels_last)

    def generate(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Image and reconstruction (B, 3, H, W) in [−1, 1], their codes (B, d)."""
        x = self.scaled(image)
        code, fake = self.networks["generator"](x)
        return x, fake, code.flatten(1), self.networks["generator"].again(fake).flatten(1)

    def scaled(self, image: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [−1, 1]."""
        check_side(image, self.side)
        return (2 * image - 1).contiguous(memory_format=torch.channels_last)

    def reconstruct(self, image: Tensor) -> Tensor:
        """The generator's reconstruction of images (B, 3, H, W), in [0, 1]."""
        return (self.generate(image)[1] + 1) / 2

    def forward(self, image: Tensor) -> Prediction:
        # The authors' program has the squared difference where the paper (eq. 5) has the absolute one; it then scales the scores of a test
        # set to [0, 1] and normalises by the statistics of each test batch, which would make a score depend on its neighbours.
        _, _, code, again = self.generate(image)
        return Prediction((code - again).square().mean(1))

    def adversarial_loss(self, real_features: Tensor, fake_features: Tensor) -> Tensor:
        return self.w_adv * F.mse_loss(fake_features.float(), real_features.float())

    def content_loss(self, x: Tensor, fake: Tensor, code: Tensor, again: Tensor) -> Tensor:
        return self.w_con * F.l1_loss(fake.float(), x) + self.w_enc * F.mse_loss(again.float(), code.float())

    def training_step(self, batch: Batch, index: int) -> None:
        batch = self.augmented(batch)
        generator, discriminator = self.networks["generator"], self.networks["discriminator"]
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        # Both networks learn from the discriminator's weights of before the step, so that one pass over x and one over x̂ serve both.
        # Gradients reach x̂ and z through one network at a time, whose graph is freed before the next one's is made: memory never holds
        # those of discriminator and second encoder together.
        share = self.share(batch)
        with self.apart():
            x = self.scaled(batch.image)
            logits, real_features = discriminator(x)
            real_loss = 0.5 * share * F.binary_cross_entropy_with_logits(logits, torch.ones_like(logits))
            self.manual_backward(real_loss)
            code, fake = generator(x)
            leaf_code, leaf_fake = (output.detach().requires_grad_() for output in (code, fake))
            logits, fake_features = discriminator(leaf_fake)
            fake_loss = 0.5 * share * F.binary_cross_entropy_with_logits(logits, torch.zeros_like(logits))
            self.manual_backward(fake_loss, inputs=list(discriminator.parameters()), retain_graph=True)
            adversarial = self.adversarial_loss(real_features.detach(), fake_features)
            self.manual_backward(share * adversarial, inputs=[leaf_fake])
            content = self.content_loss(x, leaf_fake, leaf_code, generator.again(leaf_fake))
            self.manual_backward(share * content)
            self.watch((adversarial + content).detach(), batch)
            torch.autograd.backward([code, fake], [leaf_code.grad, leaf_fake.grad])
        self.average(self.networks.parameters())
        for optimizer in optimizers:
            if self.clip is not None:
                self.clip_gradients(optimizer, self.clip, "norm")
            optimizer.step()
        if self.summed(float((real_loss + fake_loss).detach())) < COLLAPSED * self.processes:
            # the same in every process
            draw_weights(discriminator, stream(self.hparams.seed, self.trainer.fit_loop.total_batch_idx, 0, device=self.device))

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        rates = {"lr": self.hparams.learning_rate, "betas": (self.hparams.beta1, 0.999)}
        return [torch.optim.Adam(network.parameters(), **rates) for network in self.networks.values()]


class Generator(nn.Module):
    """x (B, 3, H, W) → code z (B, d, 1, 1) and reconstruction x̂ in [−1, 1]; `again` encodes x̂."""

    def __init__(self, widths: list[int], grid: int, latent: int):
        super().__init__()
        self.encoder = nn.Sequential(*halvings(widths), nn.Conv2d(widths[-1], latent, grid, bias=False))
        opening = nn.ConvTranspose2d(latent, widths[-1], grid, bias=False), nn.BatchNorm2d(widths[-1]), nn.ReLU(inplace=True)
        doublings = []
        for before, after in pairwise(widths[::-1]):
            doublings += [nn.ConvTranspose2d(before, after, 4, 2, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
        self.decoder = nn.Sequential(*opening, *doublings, nn.ConvTranspose2d(widths[0], 3, 4, 2, 1, bias=False), nn.Tanh())
        self.again = nn.Sequential(*halvings(widths), nn.Conv2d(widths[-1], latent, grid, bias=False))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        code = self.encoder(x)
        return code, self.decoder(code)


class Discriminator(nn.Module):
    """x (B, 3, H, W) → logit (B,) of being an image, and the features (B, C, h, w) it is computed from."""

    def __init__(self, widths: list[int], grid: int):
        super().__init__()
        self.features = nn.Sequential(*halvings(widths))
        self.classifier = nn.Conv2d(widths[-1], 1, grid, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(x)
        return self.classifier(features).flatten().float(), features


def pyramid(side: int, channels: int, most: int) -> tuple[list[int], int]:
    """Channels after every halving, and the side of the last grid: 4, or the odd number that a side of 48, 80, … px ends with."""
    widths, grid = [channels], side // 2
    while grid > 4 and grid % 2 == 0:
        # the authors, at 32 px, end with 4·channels; doubling on would end with 2048 at 256 px: 180 million weights
        widths.append(min(2 * widths[-1], most))
        grid //= 2
    return widths, grid


def halvings(widths: list[int]) -> list[nn.Module]:
    """DCGAN's encoder up to the last grid: convolutions of stride 2, the first without normalisation."""
    parts = [nn.Conv2d(3, widths[0], 4, 2, 1, bias=False), nn.LeakyReLU(0.2, inplace=True)]
    for before, after in pairwise(widths):
        parts += [nn.Conv2d(before, after, 4, 2, 1, bias=False), nn.BatchNorm2d(after), nn.LeakyReLU(0.2, inplace=True)]
    return parts


@torch.no_grad()
def draw_weights(network: nn.Module, generator: torch.Generator) -> None:
    """DCGAN's first weights: N(0, 0.02²) for convolutions, N(1, 0.02²) and 0 for normalisations."""
    for part in network.modules():
        if isinstance(part, nn.Conv2d | nn.ConvTranspose2d):
            part.weight.normal_(0, 0.02, generator=generator)
        elif isinstance(part, nn.BatchNorm2d):
            part.weight.normal_(1, 0.02, generator=generator)
            part.bias.zero_()
