"""The convolutional encoder and decoder of Bergmann et al. 2019 (arXiv 1807.02011, table 1), for images of other sides as well."""

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from blemish.edge.errors import InputError

SLOPE = 0.2  # of the leaky ReLU
LAYERS = ((32, 4, 2), (32, 4, 2), (32, 3, 1), (64, 4, 2), (64, 3, 1), (128, 4, 2), (64, 3, 1), (32, 3, 1))  # (channels, kernel, stride)
MULTIPLE = 16  # the product of the strides
GRID = 8  # side of the last layer for the paper's images of 128 px


def input_side(image_size: int | None, crop: int | None) -> int:
    """Side in pixels of the network's square input; InputError unless it is a multiple of 16."""
    name, side = ("crop", crop) if crop is not None else ("image_size", image_size)
    if not isinstance(side, int) or side < MULTIPLE or side % MULTIPLE:
        raise InputError(f"{name}={side}: this network needs an image_size (or crop) that is a multiple of {MULTIPLE}")
    return side


def check_side(image: Tensor, side: int) -> None:
    """InputError unless images (B, 3, H, W) are squares of this side."""
    if tuple(image.shape[-2:]) != (side, side):
        raise InputError(f"image_size: the network expects {side}×{side} pixels, not {tuple(image.shape[-2:])}; keep the size")


def layers(side: int) -> tuple[list[tuple[int, int, int]], int]:
    """(channels, kernel, stride) of each convolution, and the side of the last one's grid.

    The paper's, behind further halvings while the grid is above 8×8; MVTec AD's authors have one for images of 256 px.
    """
    grid, halvings = side // MULTIPLE, 0
    while grid > GRID and grid % 2 == 0:
        grid, halvings = grid // 2, halvings + 1
    return [LAYERS[0]] * halvings + list(LAYERS), grid


class Encoder(nn.Module):
    """Images (B, 3, side, side) → code (B, size); weights come from torch's global stream."""

    def __init__(self, side: int, size: int):
        super().__init__()
        self.side = side
        table, grid = layers(side)
        widths = [3] + [channels for channels, _, _ in table]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(i, o, kernel, stride, padding=1) for (i, o), (_, kernel, stride) in zip(pairwise(widths), table, strict=True)
        )
        self.last = nn.Linear(widths[-1] * grid**2, size)  # the paper's convolution with the whole grid as its kernel
        initialise(self)

    def layers(self, image: Tensor) -> list[Tensor]:
        """Outputs of the convolutions, (B, C_l, h_l, w_l) each; InputError for images of another side."""
        check_side(image, self.side)
        x = image.contiguous(memory_format=torch.channels_last)
        outputs = []
        for convolution in self.convolutions:
            x = nn.functional.leaky_relu(convolution(x), SLOPE)
            outputs.append(x)
        return outputs

    def code(self, last: Tensor) -> Tensor:
        """Code (B, size) from the last convolution's output."""
        return self.last(last.flatten(1))

    def forward(self, image: Tensor) -> Tensor:
        return self.code(self.layers(image)[-1])


class Decoder(nn.Module):
    """Code (B, size) → images (B, 3, side, side) in [0, 1]: the encoder's layers transposed, in reverse order."""

    def __init__(self, side: int, size: int):
        super().__init__()
        table, grid = layers(side)
        widths = [3] + [channels for channels, _, _ in table]
        self.shape = (widths[-1], grid, grid)
        self.first = nn.Linear(size, math.prod(self.shape))
        self.convolutions = nn.ModuleList(
            nn.ConvTranspose2d(o, i, kernel, stride, padding=1)
            for (i, o), (_, kernel, stride) in reversed(list(zip(pairwise(widths), table, strict=True)))
        )
        initialise(self)

    def layers(self, code: Tensor) -> list[Tensor]:
        """The image (B, 3, side, side), and the inputs of the convolutions, shaped and ordered as the encoder's outputs."""
        x = nn.functional.leaky_relu(self.first(code), SLOPE).unflatten(1, self.shape)
        x = x.contiguous(memory_format=torch.channels_last)
        inputs = []
        for convolution in self.convolutions:
            inputs.append(x)
            x = nn.functional.leaky_relu(convolution(x), SLOPE) if len(inputs) < len(self.convolutions) else convolution(x)
        # the paper's output is linear; in float, as a sigmoid in half precision could not tell neighbouring grey levels apart
        return [x.float().sigmoid()] + inputs[::-1]

    def forward(self, code: Tensor) -> Tensor:
        return self.layers(code)[0]


@torch.no_grad()
def initialise(network: nn.Module) -> None:
    """He's initialisation for leaky ReLUs: without it the signal vanishes in eighteen layers before they learn."""
    for part in network.modules():
        if isinstance(part, nn.ConvTranspose2d):  # spreads each input over stride² as many outputs
            inputs = part.weight[:, 0].numel() / math.prod(part.stride)
        elif isinstance(part, nn.Linear | nn.Conv2d):
            inputs = part.weight[0].numel()
        else:
            continue
        part.weight.normal_(0, math.sqrt(2 / (1 + SLOPE**2) / inputs))
        part.bias.zero_()
    network.to(memory_format=torch.channels_last)
