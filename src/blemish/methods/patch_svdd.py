"""Patch SVDD: patches unlike all normal ones in an embedding learned from where patches lie (Yi, Yoon 2020, arXiv 2006.16067)."""

import logging
from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blemish.detector import COUNT, NOT_NEGATIVE, POSITIVE, TrainedDetector
from blemish.edge.errors import InputError
from blemish.ops.maps import paint, starts
from blemish.ops.neighbours import nearest
from blemish.ops.rng import seeded
from blemish.types import Batch, Prediction

SIZES = (64, 32)  # sides of the patches, pixels
STEP = 4  # stride of the small encoder, pixels
SLOPE = 0.1  # of the leaky rectifiers
JITTER = 0.02  # deviation of the noise and of the shift of each colour channel, so that colours do not give a place away
COLLAPSED = 1e-4  # deviation of all codes, of values in [−1, 1]; those of an untrained network have ten times as much
OFFSETS = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0)]

log = logging.getLogger(__name__)


class PatchSVDD(TrainedDetector):
    """Anomaly = distance of a patch to the nearest normal patch; a pixel's is the product of the means over its patches of two sizes.

    Encoders for patches of 64 and 32 px, the large one built on the small one, are trained by `weight` × the distance of patches that
    nearly coincide + cross-entropy of the direction, one of 8, in which a second patch lies; `pairs` of each are drawn from every image
    a step. `strides` {64: s, 32: s} are those of inference, multiples of 4.
    """

    quick = ("trainer.max_epochs=10", "model.learning_rate=0.002", "model.dim=16", "image_size=128")

    def __init__(
        self,
        dim: int,
        weight: float,
        pairs: int,
        strides: Mapping[int, int],
        learning_rate: float,
        weight_decay: float,
        score: str | float,
        seed: int,
    ):
        super().__init__()
        self.save_hyperparameters()
        self.set_score(score)
        self.check_arguments(dim=COUNT, pairs=COUNT, weight=NOT_NEGATIVE, weight_decay=NOT_NEGATIVE, learning_rate=POSITIVE)
        strides = {int(size): stride for size, stride in strides.items()} if isinstance(strides, Mapping) else strides
        complete = isinstance(strides, dict) and set(strides) == set(SIZES)
        if not complete or any(stride not in range(STEP, size + 1, STEP) for size, stride in strides.items()):
            raise InputError(f"model.strides={strides}: expected {{64: s, 32: s}} with multiples of {STEP} up to the patch's side")
        self.weight, self.pairs, self.strides = weight, pairs, strides
        with seeded(seed):
            self.small = small_encoder(dim)
            # the four quarters of a large patch lie 32 px, so many cells of the small encoder, apart
            self.large = nn.Sequential(
                nn.Conv2d(dim, 2 * dim, 2, dilation=32 // STEP), nn.LeakyReLU(SLOPE), nn.Conv2d(2 * dim, dim, 1), nn.Tanh()
            )
            self.compass = nn.ModuleDict({str(size): direction_classifier(dim) for size in SIZES})
        self.add_buffers(*(f"bank{size}" for size in SIZES))  # (M, D) patches of all training images
        self.register_buffer("mean", torch.zeros(1, 3, 1, 1))

    def before_training(self, batches: Iterable[Batch]) -> None:
        count = total = 0
        for batch in batches:
            total = total + batch.image.double().sum((0, 2, 3))
            count += batch.image[:, 0].numel()
        # The official code subtracts a mean for every pixel. Neither divides by the deviation: slow changes of the light, which also tell
        # directions, would fill the range of tanh and leave no room for anything much darker.
        self.mean.copy_((total / count).view(1, 3, 1, 1))

    def embed(self, x: Tensor, size: int) -> Tensor:
        """Embeddings (B, D, h, w) in [−1, 1] of the patches of `size` px at every 4th pixel of images (B, 3, H, W) less their mean."""
        x = self.small(x)
        return x if size == 32 else self.large(x)

    def loss(self, batch: Batch) -> Tensor:
        generator = self.generator()
        x = batch.image - self.mean
        if min(x.shape[-2:]) < 2 * SIZES[0]:
            raise InputError(f"image_size: {tuple(x.shape[-2:])}; Patch SVDD compares patches that lie 64 px apart: expected 128 or more")
        total = 0
        for size in SIZES:
            first, near, far, direction = draw_corners(x.shape[-2:], size, len(x) * self.pairs, generator)
            owner = torch.arange(len(x), device=x.device).repeat(self.pairs)
            patches = torch.cat([cut(x, owner, corner, size) for corner in (first, near)])
            codes = self.embed(patches, size).flatten(1)  # (2n, D)
            close = (codes[: len(owner)] - codes[len(owner) :]).norm(dim=1).mean()
            pairs = torch.cat([cut(x, owner, corner, size) for corner in (first, far)])
            shift = torch.randn(len(pairs), 3, 1, 1, generator=generator, device=x.device)
            noise = torch.randn(pairs.shape, generator=generator, device=x.device)
            codes = self.embed(pairs + JITTER * (shift + noise), size).flatten(1)
            guess = self.compass[str(size)](codes[len(owner) :] - codes[: len(owner)])  # (n, 8)
            total = total + self.weight * close + F.cross_entropy(guess, direction)
        return total

    def patches(self, image: Tensor, size: int) -> Tensor:
        """Embeddings (B, h, w, D) of patches that cover images (B, 3, H, W), at the stride of inference."""
        if min(image.shape[-2:]) < SIZES[0]:
            raise InputError(f"image_size: {tuple(image.shape[-2:])}; Patch SVDD needs 64 px or more")
        dense = self.embed(image - self.mean, size)
        stride = self.strides[size]
        # the last patch is flush with the border as far as the encoder's own stride allows
        rows, columns = (starts(side - (side - size) % STEP, size, stride).to(image.device) // STEP for side in image.shape[-2:])
        return dense[:, :, rows[:, None], columns].movedim(1, -1)

    def after_training(self, batches: Iterable[Batch]) -> None:
        codes = [[self.patches(batch.image, size).flatten(0, 2) for size in SIZES] for batch in batches]
        for size, parts in zip(SIZES, zip(*codes, strict=True), strict=True):
            bank = torch.cat(parts)  # (M, D)
            setattr(self, f"bank{size}", bank)
            if len(bank) > 1 and (deviation := float(bank.std(0).norm())) < COLLAPSED:
                message = "model.weight=%g: all patches of %d px have nearly one code (deviation %.1e); choose a smaller weight"
                log.warning(message, self.weight, size, deviation)

    def forward(self, image: Tensor) -> Prediction:
        map = 1
        for size in SIZES:
            codes = self.patches(image, size)  # (B, h, w, D)
            distance, _ = nearest(codes.flatten(0, 2), getattr(self, f"bank{size}"), 1)
            map = map * paint(distance.view(codes.shape[:3]), tuple(image.shape[-2:]), size, self.strides[size])  # (B, H, W)
        return self.from_map(map)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.hparams.learning_rate, weight_decay=self.hparams.weight_decay)


def small_encoder(dim: int) -> nn.Sequential:
    """Convolutions over 32 px at a stride of 4 without padding, whose output on a full image equals that on each patch.

    Deviates from the official encoder, of the same number of layers, whose strides do not line up from patch to patch.
    """
    widths = [(3, dim // 2, 4, 2), (dim // 2, dim, 3, 2), (dim, 2 * dim, 3, 1), (2 * dim, 2 * dim, 3, 1), (2 * dim, dim, 3, 1)]
    parts = []
    for inputs, outputs, kernel, stride in widths:
        parts += [nn.Conv2d(inputs, outputs, kernel, stride), nn.LeakyReLU(SLOPE)]
    return nn.Sequential(*parts[:-1], nn.Tanh())


def direction_classifier(dim: int) -> nn.Sequential:
    """Logits (n, 8) of the direction from the difference (n, D) of two patches."""
    return nn.Sequential(nn.Linear(dim, 128), nn.LeakyReLU(SLOPE), nn.Linear(128, 128), nn.LeakyReLU(SLOPE), nn.Linear(128, len(OFFSETS)))


def draw_corners(image: tuple[int, int], size: int, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Corners (n, 2) of a patch, of a near one and of a far one, all within the image, and the direction (n,) of the far one.

    The near patch is shifted by up to size/32 px, not by 0; the far one by 3/4 of the size and up to 1/4 more, in its direction.
    """
    device, span = generator.device, torch.tensor([side - size for side in image], device=generator.device)

    def integers(low: int, high: int) -> Tensor:
        return torch.randint(low, high, (count, 2), generator=generator, device=device)

    direction = torch.randint(len(OFFSETS), (count,), generator=generator, device=device)
    way = torch.tensor(OFFSETS, device=device)[direction] * (3 * size // 4 + integers(0, size // 4 + 1))  # (n, 2)
    # the first patch anywhere, provided that the far one stays inside
    low, high = (-way).clamp_min(0), torch.minimum(span, span - way)
    first = low + (torch.rand(count, 2, generator=generator, device=device) * (high - low + 1)).long()
    most = size // 32
    shift = integers(-most, most + 1)
    shift[(shift == 0).all(1), 0] = 1
    near = first + shift
    near = torch.where((near < 0) | (near > span), first - shift, near)  # mirrored back inside
    return first, near, first + way, direction


def cut(x: Tensor, owner: Tensor, corner: Tensor, size: int) -> Tensor:
    """Patches (n, 3, size, size) at `corner` (n, 2) of the images x[owner], of x (B, 3, H, W) and `owner` (n,)."""
    reach = torch.arange(size, device=x.device)
    rows, columns = corner[:, 0, None] + reach, corner[:, 1, None] + reach  # (n, size)
    return x[owner[:, None, None], :, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)
