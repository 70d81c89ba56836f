"""The pyramid of an image's halvings, and the way back from a coarse map to the image's pixels."""

import torch
import torch.nn.functional as F
from torch import Tensor

SIGMA = 1.39  # the blur before every halving
HALF_WIDTH = 6  # its taps are cut at 4σ


def mirror(size: int, margin: int, device: torch.device) -> Tensor:
    """Indices (size + 2·margin,) of a half-sample symmetric border of any width."""
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
    """(..., h, w) of a pyramid level -> (..., height, width): each pixel takes the nearest of the points (2^level·i, 2^level·j)."""
    for dim, size in ((-2, height), (-1, width)):
        at = (torch.arange(size, device=coarse.device) + 2**level // 2) // 2**level
        coarse = coarse.index_select(dim, at.clamp_max(coarse.shape[dim] - 1))
    return coarse


def from_cells(cells: Tensor, height: int, width: int) -> Tensor:
    """(..., h, w) cells of a network's grid -> (..., height, width): each pixel takes the cell that contains it."""
    for dim, size in ((-2, height), (-1, width)):
        cells = cells.index_select(dim, torch.arange(size, device=cells.device) * cells.shape[dim] // size)
    return cells
