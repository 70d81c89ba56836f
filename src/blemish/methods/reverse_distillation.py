"""Reverse distillation: a decoder trained to restore a teacher's features from one embedding (Deng and Li 2022, arXiv 2201.10703)."""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import timm
import torch
import torch.nn.functional as F
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn

from blemish.detector import POSITIVE, Maps, TrainedDetector, number
from blemish.edge.checks import check_stages, check_text
from blemish.edge.errors import InputError
from blemish.features.extractor import Features, stage_indices
from blemish.ops.maps import check_blur, smooth_upsample
from blemish.ops.rng import seeded
from blemish.types import Batch, Prediction


class ReverseDistillation(TrainedDetector):
    """Anomaly = 1 - cosine of the teacher's features and those that a decoder restores from a one-class embedding of them.

    The map is the sum over the stages (paper, eq. 1 and 4), upsampled and blurred by `sigma` pixels, and the image's score is its maximum.
    `loss` is `flattened`, one cosine per image and stage over channels and positions, or `position`, the mean of the map (eq. 2).
    """

    quick = ("trainer.max_epochs=40", "model.learning_rate=0.02", "model.stages=[1]", "model.loss=position", "batch_size=6")
    needs_images = False

    def __init__(
        self,
        backbone: str,
        stages: Sequence[int],
        weights: str,
        loss: str,
        sigma: float,
        learning_rate: float,
        betas: Sequence[float],
        score: str | float,
        seed: int,
    ):
        super().__init__()
        self.save_hyperparameters()
        self.set_score(score)
        self.check_arguments(loss=("flattened", "position"), stages=check_stages, sigma=check_blur, learning_rate=POSITIVE)
        self.check_arguments(betas=number("[0, 1)", each=True), backbone=partial(check_text, ""))
        self.flattened, self.sigma = loss == "flattened", sigma
        shapes, beyond = shapes_of(backbone, stages)
        self.backbone = Features(backbone, stages, weights, seed)
        probe = self.backbone(torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
        signed = [bool((m < 0).any()) for m in probe]
        with seeded(seed):
            self.embedding = Embedding(shapes, beyond).to(memory_format=torch.channels_last)
            self.decoder = Decoder(shapes, beyond, signed).to(memory_format=torch.channels_last)

    def restored(self, maps: Maps) -> list[Tensor]:
        """The decoder's restoration of the teacher's maps, of the same shapes, in float32."""
        return [m.float() for m in self.decoder(self.embedding(maps), [m.shape[-2:] for m in maps])]

    def loss(self, batch: Batch) -> Tensor:
        taught = [m.float() for m in self.maps(batch)]
        if len(taught[-1]) == 1 and max(taught[-1].shape[-2:]) <= 2:
            raise InputError("image_size: one image of this size in a batch gives BatchNorm a single value; use a larger image_size")
        pairs = zip(taught, self.restored(taught), strict=True)
        # eq. 2 averages the cosines of the positions, the official code takes one over the flattened maps
        return sum(cosine_distance(*((t.flatten(1), r.flatten(1)) if self.flattened else (t, r))).mean() for t, r in pairs)

    def score(self, maps: Maps, size: tuple[int, int]) -> Prediction:
        taught = [m.float() for m in maps]
        # half-pixel centres as everywhere here; the official code aligns the corners
        stages = [smooth_upsample(cosine_distance(t, r), size, self.sigma) for t, r in zip(taught, self.restored(taught), strict=True)]
        map = sum(stages)  # (B, H, W)
        return self.from_map(map)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        parameters = [*self.embedding.parameters(), *self.decoder.parameters()]
        return torch.optim.Adam(parameters, self.hparams.learning_rate, tuple(self.hparams.betas))


def cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """1 - cosine along the second dimension, from 0 to 2: (B, D) to (B,), (B, C, h, w) to (B, h, w)."""
    return 1 - F.cosine_similarity(a, b, dim=1)


class Shape(NamedTuple):
    """The structure of a stage: channels, number of residual blocks, channels inside a bottleneck block or None for plain blocks."""

    width: int
    blocks: int
    hidden: int | None


def shapes_of(backbone: str, stages: Sequence[int]) -> tuple[list[Shape], Shape]:
    """The shapes of a backbone's stages, and that of the next one, which is the last one's twice as wide if the network ends there.

    A network other than a ResNet gets two plain residual blocks a stage. InputError unless each stage halves the grid of the one before.
    """
    chosen = stage_indices(backbone, list(stages))
    with torch.device("meta"):
        net = timm.create_model(backbone, features_only=True, pretrained=False)
    info, parts = net.feature_info.info, dict(net.named_children())

    def shape(stage: dict) -> Shape:
        layers = parts.get(stage["module"].replace(".", "_"))
        if not isinstance(layers, nn.Sequential) or not isinstance(layers[0], BasicBlock | Bottleneck):
            return Shape(stage["num_chs"], 2, None)
        return Shape(stage["num_chs"], len(layers), layers[0].conv2.out_channels if isinstance(layers[0], Bottleneck) else None)

    strides = [info[i]["reduction"] for i in chosen]
    if strides != [strides[0] << i for i in range(len(strides))]:
        raise InputError(f"model.stages={list(stages)}: {backbone} has strides {strides} there; expected each twice the one before")
    shapes = [shape(info[i]) for i in chosen]
    after = [shape(stage) for stage in info if stage["reduction"] == 2 * strides[-1]]
    last = shapes[-1]
    return shapes, after[-1] if after else Shape(2 * last.width, last.blocks, last.hidden and 2 * last.hidden)


class Embedding(nn.Module):
    """Multi-scale fusion and one-class bottleneck embedding (paper, section 3.3): all stages on the last grid, then one more stage."""

    def __init__(self, shapes: list[Shape], beyond: Shape):
        super().__init__()
        widths = [shape.width for shape in shapes]
        self.descents = nn.ModuleList()  # of every stage but the last, a strided convolution for each stage below
        for s in range(len(widths) - 1):
            steps = (nn.Sequential(*normed(conv(a, b, 3, "down")), nn.ReLU(inplace=True)) for a, b in pairwise(widths[s:]))
            self.descents.append(nn.Sequential(*steps))
        self.bottleneck = residual_stage(widths[-1] * len(widths), beyond, "down", activated=True)
        self.apply(start)

    def forward(self, maps: Maps) -> Tensor:
        """Maps (B, C_s, h_s, w_s) to (B, C, ⌈h/2⌉, ⌈w/2⌉) with h and w of the last."""
        size = maps[-1].shape[-2:]
        fused = [fit(descent(m), size) for descent, m in zip(self.descents, maps[:-1], strict=True)]
        return self.bottleneck(torch.cat([*fused, maps[-1]], dim=1))


class Decoder(nn.Module):
    """The backbone upside down: the stages in reverse, each opened by a transposed convolution (paper, section 3.1)."""

    def __init__(self, shapes: list[Shape], beyond: Shape, signed: list[bool]):
        super().__init__()
        self.ascents = nn.ModuleList()  # the deepest first
        into = beyond.width
        # the official code gives its deepest stage as many blocks as the backbone's first has, and so on; a mirror would turn that round
        counts = [shape.blocks for shape in shapes]
        for shape, blocks, negative in zip(reversed(shapes), counts, reversed(signed), strict=True):
            # a ReLU at the end cannot restore negative features; those of a ResNet have none
            self.ascents.append(residual_stage(into, shape._replace(blocks=blocks), "up", activated=not negative))
            into = shape.width
        self.apply(start)

    def forward(self, embedded: Tensor, sizes: list[tuple[int, int]]) -> list[Tensor]:
        """Maps (B, C_s, h_s, w_s) of these sizes from the embedding, in the order of the backbone."""
        maps = []
        for ascent, size in zip(self.ascents, reversed(sizes), strict=True):
            embedded = fit(ascent(embedded), size)
            maps.append(embedded)
        return maps[::-1]


class Residual(nn.Module):
    """A ResNet's block that keeps, halves (`down`) or doubles (`up`) the grid; with `hidden` channels it is a bottleneck block."""

    def __init__(self, into: int, width: int, hidden: int | None, resize: str, activated: bool):
        super().__init__()
        relu = nn.ReLU(inplace=True)
        if hidden is None:
            layers = [conv(into, width, 3, resize), conv(width, width, 3)]
        else:
            layers = [conv(into, hidden, 1), conv(hidden, hidden, 3, resize), conv(hidden, width, 1)]
        self.path = nn.Sequential(*[part for layer in layers for part in (*normed(layer), relu)][:-1])
        same = resize == "keep" and into == width
        self.shortcut = nn.Identity() if same else nn.Sequential(*normed(conv(into, width, 1, resize)))
        self.activation = relu if activated else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.path(x) + self.shortcut(x))


def residual_stage(into: int, shape: Shape, resize: str, activated: bool) -> nn.Sequential:
    """A stage whose first block resizes; `activated`: a ReLU ends it."""
    last = shape.blocks - 1
    blocks = [
        Residual(into if i == 0 else shape.width, shape.width, shape.hidden, resize if i == 0 else "keep", activated or i < last)
        for i in range(shape.blocks)
    ]
    return nn.Sequential(*blocks)


def conv(into: int, out: int, kernel: int, resize: str = "keep") -> nn.Module:
    """A convolution that keeps or halves the grid, or a transposed one of 2×2 cells that doubles it."""
    if resize == "up":
        return nn.ConvTranspose2d(into, out, 2, stride=2, bias=False)
    return nn.Conv2d(into, out, kernel, stride=2 if resize == "down" else 1, padding=kernel // 2, bias=False)


def normed(layer: nn.Module) -> tuple[nn.Module, nn.Module]:
    return layer, nn.BatchNorm2d(layer.out_channels)


def start(layer: nn.Module) -> None:
    """He's weights, as in ResNet; transposed convolutions keep torch's, as in the official code."""
    if isinstance(layer, nn.Conv2d):
        nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")


def fit(map: Tensor, size: tuple[int, int]) -> Tensor:
    """A map cropped, or padded with zeros, at its right and lower ends: odd grids do not return to their size."""
    h, w = size
    return map if map.shape[-2:] == size else F.pad(map, (0, w - map.shape[-1], 0, h - map.shape[-2]))
