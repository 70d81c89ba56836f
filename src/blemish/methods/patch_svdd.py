"""Patch SVDD: patches unlike all normal ones in an embedding learned from where patches lie (Yi, Yoon 2020, arXiv 2006.16067)."""

import logging
from collections.abc import Iterable, Mapping
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blemish.detector import COUNT, NOT_NEGATIVE, TrainedDetector
from blemish.edge.errors import InputError
from blemish.ops.maps import paint, starts
from blemish.ops.neighbours import nearest
from blemish.ops.rng import seeded
from blemish.types import Batch, Prediction

SIZES = (64, 32)  # sides of the patches, pixels
STEP = 2  # stride of the small encoder, pixels
WIDTHS = (32, 64, 128, 128, 64, 32, 32)  # of the small encoder's convolutions before the last
SLOPE = 0.1  # of the leaky rectifiers
JITTER = 0.02  # deviation of the noise and of the shift of each colour channel, so that colours do not give a place away
COLLAPSED = 1e-4  # deviation of all codes, of values in [−1, 1]; those of an untrained network have ten times as much
OFFSETS = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0)]

log = logging.getLogger(__name__)


class PatchSVDD(TrainedDetector):
    """Anomaly = distance of a patch to the nearest normal patch; a pixel's is the product of the means over its patches of two sizes.

    Encoders for patches of 64 and 32 px, the large one built on the small one, are trained by `weight` × the distance of patches that
    nearly coincide + cross-entropy of the direction, one of 8, in which a second patch lies; `pairs` of each are drawn from every image
    a step. `strides` {64: s, 32: s} are those of inference, multiples of 2.
    """

    quick = ("trainer.max_epochs=2", "model.learning_rate=0.001", "model.dim=16", "model.pairs=1", "image_size=128")

    def __init__(
        self,
        dim: int,
        weight: float,
        pairs: int,
        strides: Mapping[int, int],
        learning_rate: float,
        score: str | float,
        seed: int,
    ):
        super().__init__()
        self.save_hyperparameters()
        self.set_score(score)
        self.check_arguments(dim=COUNT, pairs=COUNT, weight=NOT_NEGATIVE, learning_rate=NOT_NEGATIVE)
        strides = {int(size): stride for size, stride in strides.items()} if isinstance(strides, Mapping) else strides
        complete = isinstance(strides, dict) and set(strides) == set(SIZES)
        if not complete or any(stride not in range(STEP, size + 1, STEP) for size, stride in strides.items()):
            raise InputError(f"model.strides={strides}: expected {{64: s, 32: s}} with multiples of {STEP} up to the patch's side")
        self.weight, self.pairs, self.strides = weight, pairs, strides
        with seeded(seed):
            self.small = small_encoder(dim)
            # of the four quarters of a large patch
            self.large = nn.Sequential(nn.Conv2d(dim, 128, 2, stride=2), nn.LeakyReLU(SLOPE), nn.Conv2d(128, dim, 1), nn.Tanh())
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

    def embed(self, patches: Tensor) -> Tensor:
        """Embeddings (n, D) in [−1, 1] of patches (n, 3, size, size) less their mean.

        A large patch is cut into its quarters first: the small encoder on all of it would take twice as many multiplications.
        """
        if patches.shape[-1] == 32:
            return self.small(patches).flatten(1)
        quarters = patches.unflatten(3, (2, 32)).unflatten(2, (2, 32)).movedim((2, 4), (1, 2)).flatten(0, 2)  # (4n, 3, 32, 32)
        return self.large(self.small(quarters).view(len(patches), 2, 2, -1).movedim(3, 1)).flatten(1)

    def loss(self, batch: Batch) -> Tensor:
        generator = self.generator()
        x = batch.image - self.mean
        if min(x.shape[-2:]) < 2 * SIZES[0]:
            raise InputError(f"image_size: {tuple(x.shape[-2:])}; Patch SVDD compares patches that lie 64 px apart: expected 128 or more")
        owner = torch.arange(len(x), device=x.device).repeat(self.pairs)  # (n,)
        total = 0
        for size in SIZES:
            first, near, second, far, direction = draw_corners(x.shape[-2:], size, len(owner), generator)
            patches = torch.cat([cut(x, owner, corner, size) for corner in (first, near, second, far)])  # (4n, 3, size, size)
            coincident, apart = patches.chunk(2)
            shift = torch.randn(len(apart), 3, 1, 1, generator=generator, device=x.device)
            noise = torch.randn(apart.shape, generator=generator, device=x.device)
            codes = self.embed(torch.cat([coincident, apart + JITTER * (shift + noise)])).chunk(4)  # (n, D) each
            close = (codes[0] - codes[1]).norm(dim=1).mean()
            guess = self.compass[str(size)](codes[3] - codes[2])  # (n, 8)
            total = total + self.weight * close + F.cross_entropy(guess, direction)
        return total

    def patches(self, image: Tensor) -> list[Tensor]:
        """Embeddings (B, h, w, D) of the patches of 64, then of 32 px that cover images (B, 3, H, W), at the stride of inference."""
        if min(image.shape[-2:]) < SIZES[0]:
            raise InputError(f"image_size: {tuple(image.shape[-2:])}; Patch SVDD needs 64 px or more")
        small, found = self.small(image - self.mean), []  # (B, D, h, w) of all patches of 32 px, 2 px apart
        for size in SIZES:
            # the last patch is flush with the border as far as the encoder's own stride allows
            corners = [starts(side - (side - size) % STEP, size, self.strides[size]) // STEP for side in image.shape[-2:]]
            quarters = torch.arange(size // 32) * (32 // STEP)
            rows, columns = ((corner[:, None] + quarters).flatten().to(image.device) for corner in corners)
            codes = small[:, :, rows[:, None], columns]
            found.append((codes if size == 32 else self.large(codes)).movedim(1, -1))
        return found

    def after_training(self, batches: Iterable[Batch]) -> None:
        codes = [[part.flatten(0, 2) for part in self.patches(batch.image)] for batch in batches]
        for size, parts in zip(SIZES, zip(*codes, strict=True), strict=True):
            bank = torch.cat(parts)  # (M, D)
            setattr(self, f"bank{size}", bank)
            if len(bank) > 1 and (deviation := float(bank.std(0).norm())) < COLLAPSED:
                message = "model.weight=%g: all patches of %d px have nearly one code (deviation %.1e); choose a smaller weight"
                log.warning(message, self.weight, size, deviation)

    def forward(self, image: Tensor) -> Prediction:
        map = 1
        for size, codes in zip(SIZES, self.patches(image), strict=True):  # (B, h, w, D)
            distance, _ = nearest(codes.flatten(0, 2), getattr(self, f"bank{size}"), 1)
            map = map * paint(distance.view(codes.shape[:3]), tuple(image.shape[-2:]), size, self.strides[size])  # (B, H, W)
        return self.from_map(map)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam([weight for weight in self.parameters() if weight.requires_grad], lr=self.hparams.learning_rate)


def small_encoder(dim: int) -> nn.Sequential:
    """The eight 3×3 convolutions over 32 px of the official deep encoder, without padding.

    Only the first has a stride, 2, so that the output on a full image equals that on each patch. It sees 31 of the 32 px.
    """
    parts = []
    for stride, (inputs, outputs) in zip([2] + [1] * 7, pairwise([3, *WIDTHS, dim]), strict=True):
        parts += [nn.Conv2d(inputs, outputs, 3, stride), nn.LeakyReLU(SLOPE)]
    return nn.Sequential(*parts[:-1], nn.Tanh())


def direction_classifier(dim: int) -> nn.Sequential:
    """Logits (n, 8) of the direction from the difference (n, D) of two patches.

    As in the official code, the weights of the last layer stay as drawn, those that leave each of its inputs with a norm of 1.
    """
    last = nn.Linear(128, len(OFFSETS))
    last.weight = nn.Parameter(F.normalize(last.weight.detach(), dim=0), requires_grad=False)
    return nn.Sequential(nn.Linear(dim, 128), nn.LeakyReLU(SLOPE), nn.Linear(128, 128), nn.LeakyReLU(SLOPE), last)


def draw_corners(image: tuple[int, int], size: int, count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Corners (n, 2) of a patch and a near one, of a patch and a far one, all within the image, and the direction (n,) of the far one.

    The near patch is shifted by up to size/32 px, not by 0; the far one by 3/4 of the size and less than 1/4 more, in its direction.
    Both are then moved back to the image's border, as in the official code.
    """
    device, span = generator.device, torch.tensor([side - size for side in image], device=generator.device)

    def integers(low: int, high: int) -> Tensor:
        return torch.randint(low, high, (count, 2), generator=generator, device=device)

    def corners() -> Tensor:
        return (torch.rand(count, 2, generator=generator, device=device) * (span + 1)).long()

    first, second, most = corners(), corners(), size // 32
    # one of the (2·most + 1)² shifts, the middle one left out
    shift = torch.randint((2 * most + 1) ** 2 - 1, (count,), generator=generator, device=device)
    shift = shift + (shift >= 2 * most * (most + 1))
    near = first + torch.stack([shift // (2 * most + 1), shift % (2 * most + 1)], 1) - most
    direction = torch.randint(len(OFFSETS), (count,), generator=generator, device=device)
    far = second + torch.tensor(OFFSETS, device=device)[direction] * (3 * size // 4 + integers(0, size // 4))
    near, far = (torch.minimum(corner.clamp_min(0), span) for corner in (near, far))
    return first, near, second, far, direction


def cut(x: Tensor, owner: Tensor, corner: Tensor, size: int) -> Tensor:
    """Patches (n, 3, size, size) at `corner` (n, 2) of the images x[owner], of x (B, 3, H, W) and `owner` (n,)."""
    reach = torch.arange(size, device=x.device)
    rows, columns = corner[:, 0, None] + reach, corner[:, 1, None] + reach  # (n, size)
    return x[owner[:, None, None], :, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)
