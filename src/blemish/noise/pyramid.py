"""Halving an image again and again, and bringing a coarse map back to the pixels it was made from."""

import torch
import torch.nn.functional as F
from torch import Tensor

SIGMA = 1.39  # the blur before every halving
HALF_WIDTH = 6  # its taps are cut at 4σ


def mirror(size: int, margin: int, device: torch.device) -> Tensor:
    """Indices (size + 2·margin,) of a half-sample symmetric border, mirrored again where the margin is wider than the image."""
    i = torch.arange(-margin, size + margin, device=device) % (2 * size)
    return torch.where(i < size, i, 2 * size - 1 - i)


def halve(image: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C, ⌈H/2⌉, ⌈W/2⌉): every second pixel of the Gaussian blur, starting at the first."""
    b, c, h, w = image.shape
    k = torch.arange(-HALF_WIDTH, HALF_WIDTH + 1, device=image.device, dtype=torch.float64)
    taps = torch.exp(-0.5 * (k / SIGMA) ** 2)
    taps = (taps / taps.sum()).to(image.dtype)
    rows, cols = mirror(h, HALF_WIDTH, image.device), mirror(w, HALF_WIDTH, image.device)
    x = image.flatten(0, 1)[:, None].index_select(2, rows).index_select(3, cols)  # (B·C, 1, H+12, W+12)
    x = F.conv2d(x, taps.view(1, 1, -1, 1), stride=(2, 1))
    x = F.conv2d(x, taps.view(1, 1, 1, -1), stride=(1, 2))
    return x.view(b, c, *x.shape[2:])


def pyramid(image: Tensor, scales: int) -> list[Tensor]:
    """The image (B, C, H, W) and its `scales` − 1 successive halvings, finest first; nothing is rounded."""
    levels = [image]
    for _ in range(scales - 1):
        levels.append(halve(levels[-1]))
    return levels


def mirrored(level: int) -> int:
    """Width in its own pixels of the border of a pyramid level into which the mirrored border was blurred."""
    border = 0
    for _ in range(level):
        border = -(-(border + HALF_WIDTH) // 2)
    return border


def grow(coarse: Tensor, height: int, width: int, level: int) -> Tensor:
    """(..., h, w) of pyramid level `level` -> (..., height, width): each pixel takes the coarse pixel whose centre is nearest.

    Coarse pixel (i, j) was sampled at (2^level·i, 2^level·j): it stands for the pixels around that point, not for a block beginning there.
    """

    def nearest(size: int, cells: int) -> Tensor:
        step = 2**level
        return torch.div(torch.arange(size, device=coarse.device) + step // 2, step, rounding_mode="floor").clamp_max(cells - 1)

    return coarse.index_select(-2, nearest(height, coarse.shape[-2])).index_select(-1, nearest(width, coarse.shape[-1]))


def from_cells(cells: Tensor, height: int, width: int) -> Tensor:
    """(..., h, w) cells of a network's grid -> (..., height, width): each pixel takes the cell it lies in."""
    (h, w), device = cells.shape[-2:], cells.device
    y = torch.div(torch.arange(height, device=device) * h, height, rounding_mode="floor")
    x = torch.div(torch.arange(width, device=device) * w, width, rounding_mode="floor")
    return cells.index_select(-2, y).index_select(-1, x)
