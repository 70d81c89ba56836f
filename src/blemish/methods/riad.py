"""RIAD: what cannot be inpainted from its surroundings (Zavrtanik, Kristan, Skočaj 2021, Pattern Recognition 112, 107706)."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from blemish.detector import COUNT, NOT_NEGATIVE, POSITIVE, TrainedDetector, integer
from blemish.edge.errors import InputError
from blemish.ops.losses import dissimilarity
from blemish.ops.rng import seeded, stream
from blemish.types import Batch, Prediction

WINDOW = 11  # side of SSIM's window, pixels
FLAT = 0.0026  # c of the similarity, for images in [0, 1]
HALVINGS = 4  # of the U-Net
LARGE = 2**24  # values of a set's finest feature map above which a training computes features again rather than hold them


class RIAD(TrainedDetector):
    """Anomaly = gradient dissimilarity of an image and its inpainting, averaged over the sides of the masked cells.

    The image's cells of k×k pixels are assigned at random to `sets` disjoint masks; a U-Net fills in each set from the others, and the
    inpainted cells are put together. `cells` are the k; training draws one a step. Loss: squared error + 1 − MSGMS + 1 − SSIM, with MSGMS
    the similarity on `scales` scales. The map is 1 − MSGMS after a mean filter of `smooth`×`smooth` pixels, the score its maximum.
    """

    quick = ("trainer.max_epochs=10", "batch_size=4", "model.learning_rate=0.005", "model.channels=8", "model.smooth=11")

    def __init__(
        self,
        channels: int,
        cells: Sequence[int],
        sets: int,
        smooth: int,
        learning_rate: float,
        weight_decay: float,
        milestones: Sequence[int],
        score: str | float,
        seed: int,
        scales: int,
    ):
        super().__init__()
        self.save_hyperparameters()
        self.set_score(score)
        self.check_arguments(channels=COUNT, smooth=COUNT, scales=COUNT, cells=integer(1, each=True), learning_rate=POSITIVE)
        self.check_arguments(weight_decay=NOT_NEGATIVE, sets=integer(2))  # with one set the image would be masked completely
        integer(1, each=True)(milestones=milestones or [1])
        if smooth % 2 == 0:
            raise InputError(f"model.smooth={smooth}: expected an odd number of pixels")
        self.cells, self.sets, self.scales, self.smooth = list(cells), sets, scales, smooth
        with seeded(seed):
            self.net = UNet(channels).to(memory_format=torch.channels_last)

    def inpaint(self, image: Tensor, cell: int, masks: Callable[..., Tensor]) -> Tensor:
        """Images (B, 3, H, W) with every pixel filled in from others; `masks(size, cell, sets)` as `draw_masks`."""
        multiple = max(2**HALVINGS, cell)
        if any(side % multiple for side in image.shape[-2:]):
            raise InputError(f"image_size: sides {tuple(image.shape[-2:])}; RIAD with cells of {cell} px needs multiples of {multiple}")
        masks = masks(tuple(image.shape[-2:]), cell, self.sets)[:, None, None].to(image.device)  # (n, 1, 1, H, W), 1 where hidden
        hidden = (2 * image - 1) * (1 - masks)  # (n, B, 3, H, W) in [−1, 1], hidden cells are mid-grey
        if self.training:  # each set by itself, whose statistics BatchNorm takes
            return torch.stack([self.fill(part) * mask for part, mask in zip(hidden, masks, strict=True)]).sum(0)
        return (self.net(channels_last(hidden.flatten(0, 1))).unflatten(0, (self.sets, -1)) * masks).sum(0)

    def fill(self, hidden: Tensor) -> Tensor:
        """The network's images (B, 3, H, W) of a set; of LARGE features only the result is held until the backward pass."""
        hidden = channels_last(hidden)
        if len(hidden) * hidden[0, 0].numel() * self.hparams.channels <= LARGE:
            return self.net(hidden)
        again = partial(frozen_statistics, self.net)
        return checkpoint(self.net, hidden, use_reentrant=False, preserve_rng_state=False, context_fn=lambda: (nullcontext(), again()))

    def loss(self, batch: Batch) -> Tensor:
        generator = self.generator()
        pick = int(torch.randint(len(self.cells), (1,), generator=generator, device=generator.device))
        again = self.inpaint(batch.image, self.cells[pick], partial(draw_masks, generator=generator))
        gradient = sum(1 - level.mean() for level in similarities(batch.image, again, self.scales)) / self.scales
        return F.mse_loss(again, batch.image) + gradient + dissimilarity(batch.image, again, WINDOW).mean()

    def inpaintings(self, image: Tensor) -> list[Tensor]:
        """One inpainting for each k, with masks that are the same for every image and on every device."""
        return [self.inpaint(image, cell, partial(fixed_masks, seed=self.hparams.seed)) for cell in self.cells]

    def reconstruct(self, image: Tensor) -> Tensor:
        """The mean of the inpaintings (B, 3, H, W), in [0, 1]."""
        return torch.stack(self.inpaintings(image)).mean(0)

    def forward(self, image: Tensor) -> Prediction:
        return self.compare(image, self.inpaintings(image))

    def compare(self, image: Tensor, inpaintings: Sequence[Tensor]) -> Prediction:
        map = torch.stack([1 - similarity(image, again, self.scales) for again in inpaintings]).mean(0)  # (B, H, W)
        # zeros beside the image, as at its border the errors of normal images are largest
        map = F.avg_pool2d(map[:, None], self.smooth, stride=1, padding=self.smooth // 2)[:, 0]
        return self.from_map(map)

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.hparams.learning_rate, weight_decay=self.hparams.weight_decay)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.MultiStepLR(optimizer, list(self.hparams.milestones), 0.1)}


def draw_masks(size: Sequence[int], cell: int, sets: int, generator: torch.Generator) -> Tensor:
    """Random masks (sets, H, W) of zeros and ones: every cell of `cell`×`cell` pixels is in exactly one."""
    grid = [side // cell for side in size]
    order = torch.randperm(grid[0] * grid[1], generator=generator, device=generator.device)
    owner = (order % sets).view(grid).repeat_interleave(cell, 0).repeat_interleave(cell, 1)  # (H, W)
    return F.one_hot(owner, sets).movedim(-1, 0).float()


@lru_cache(maxsize=8)
def fixed_masks(size: tuple[int, int], cell: int, sets: int, seed: int) -> Tensor:
    """The masks of every test image."""
    with torch.inference_mode(False):
        return draw_masks(size, cell, sets, stream(seed, cell))


def similarity(image: Tensor, other: Tensor, scales: int) -> Tensor:
    """Multi-scale gradient magnitude similarity (B, H, W) of images (B, C, H, W): the mean over the scales, resized."""
    levels = [F.interpolate(level[:, None], image.shape[-2:], mode="bilinear")[:, 0] for level in similarities(image, other, scales)]
    return torch.stack(levels).mean(0)


def similarities(image: Tensor, other: Tensor, scales: int) -> list[Tensor]:
    """Gradient magnitude similarity (B, h, w) of images (B, C, H, W) on each scale, half as large as the one before."""
    grey = torch.stack([image.mean(1), other.mean(1)])  # (2, B, H, W): of the channels' mean, which the paper leaves open
    levels = []
    for level in range(scales):
        if level:
            grey = F.avg_pool2d(grey, 2)
        first, second = gradient_magnitude(grey)
        levels.append((2 * first * second + FLAT) / (first.square() + second.square() + FLAT))
    return levels


def gradient_magnitude(grey: Tensor) -> Tensor:
    """Length of the Prewitt gradient (…, h, w), thirds as weights, borders repeated."""
    x = F.pad(grey, [1] * 4, mode="replicate")
    across, down = x[..., 2:] - x[..., :-2], x[..., 2:, :] - x[..., :-2, :]
    dx = (across[..., :-2, :] + across[..., 1:-1, :] + across[..., 2:, :]) / 3
    dy = (down[..., :-2] + down[..., 1:-1] + down[..., 2:]) / 3
    # the root has no derivative where the image is flat
    return (dx.square() + dy.square() + 1e-12).sqrt()


class UNet(nn.Module):
    """Images (B, 3, H, W) to images in [0, 1], with a skip at each of HALVINGS scales; `channels` on the finest, at most 8 times as many.

    The sigmoid keeps inpainted pixels within the values of images: in [−1, 1] it is the tanh of half its argument.
    """

    def __init__(self, channels: int):
        super().__init__()
        widths = [channels * min(2**level, 8) for level in range(HALVINGS + 1)]
        inputs, strides = [3, *widths], [1] + [2] * HALVINGS
        self.down = nn.ModuleList(pair(inputs[level], widths[level], strides[level]) for level in range(HALVINGS + 1))
        self.up = nn.ModuleList(nn.ConvTranspose2d(widths[i + 1], widths[i], 4, stride=2, padding=1) for i in range(HALVINGS))
        self.join = nn.ModuleList(pair(2 * widths[i], widths[i], 1) for i in range(HALVINGS))
        self.last = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for block in self.down:
            x = block(x)
            skips.append(x)
        for level in reversed(range(HALVINGS)):
            x = self.join[level](torch.cat([skips[level], self.up[level](x)], 1))
        return self.last(x).float().sigmoid()


def pair(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """Two convolutions with BatchNorm and ReLU, of 3×3 pixels; the first has a stride, and 4×4 pixels where that is 2."""
    parts = []
    for width, step in ((inputs, stride), (outputs, 1)):
        parts += [nn.Conv2d(width, outputs, 2 + step, step, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*parts)


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


@contextmanager
def frozen_statistics(network: nn.Module) -> Iterator[None]:
    """A block in which BatchNorm layers leave their running statistics as they are, as of a batch that they have seen already."""
    layers = [part for part in network.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = 0.0
    try:
        yield
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
