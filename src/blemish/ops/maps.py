"""Feature maps made comparable, and anomaly maps brought to the image: both are linear and separable, so both are matrix products."""

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from blemish.edge import geometry
from blemish.edge.checks import check_number

MOST = 1000  # pixels of a blur: none of use is wider, and its kernel has eight times as many


def align(maps: Sequence[Tensor], mode: str = "bilinear") -> Tensor:
    """Stages (B, C_s, h_s, w_s) resized to the first one's grid and concatenated: (B, ΣC_s, h, w)."""
    size = maps[0].shape[-2:]
    resized = [m if m.shape[-2:] == size else F.interpolate(m, size, mode=mode) for m in maps]
    return torch.cat(resized, dim=1)


def smooth_upsample(map: Tensor, size: tuple[int, int], sigma: float) -> Tensor:
    """Bilinear upsampling of (B, h, w) to size (H, W), then a Gaussian blur of `sigma` pixels cut at 4σ with reflected borders.

    Rows and columns are independent in both steps, so the whole is A·map·Bᵀ with A (H, h) and B (W, w).
    """
    rows = upsample_blur_matrix(map.shape[-2], size[0], sigma).to(map)  # (H, h)
    columns = upsample_blur_matrix(map.shape[-1], size[1], sigma).to(map)  # (W, w)
    return rows @ map @ columns.mT  # (B, H, W)


def blur(map: Tensor, sigma: float) -> Tensor:
    """A map (B, H, W) after a Gaussian blur of `sigma` pixels, as `smooth_upsample` does it; σ = 0 leaves it as it is."""
    return smooth_upsample(map, tuple(map.shape[-2:]), sigma) if sigma else map


@lru_cache(maxsize=64)
def upsample_blur_matrix(cells: int, pixels: int, sigma: float) -> Tensor:
    """The (pixels, cells) matrix of 1-D bilinear resizing (half-pixel centres) then the blur, in float64; σ = 0 leaves it out."""
    check_blur(sigma)
    with torch.inference_mode(False):
        eye = torch.eye(cells, dtype=torch.float64)[None]  # (1, cells, cells)
        up = F.interpolate(eye, pixels, mode="linear", align_corners=False)[0].T  # (pixels, cells)
        if sigma == 0:
            return up
        radius = int(4 * sigma + 0.5)
        offset = torch.arange(-radius, radius + 1, dtype=torch.float64)
        kernel = torch.exp(-0.5 * (offset / sigma) ** 2)
        kernel /= kernel.sum()
        index = reflect(torch.arange(pixels)[:, None] + offset.long(), pixels)  # (pixels, 2·radius+1)
        blur = torch.zeros(pixels, pixels, dtype=torch.float64).scatter_add_(1, index, kernel.expand(pixels, -1))
        return blur @ up


def check_blur(sigma: float) -> None:
    """InputError for a blur that is none; methods that train ask before they do."""
    check_number("model", f"[0, {MOST}]", sigma=sigma)


def reflect(index: Tensor, length: int) -> Tensor:
    """Indices folded back into [0, length) with the border sample repeated (… 1 0 | 0 1 2 …), as scipy's `reflect`."""
    folded = index.remainder(2 * length)
    return torch.where(folded < length, folded, 2 * length - 1 - folded)


def starts(length: int, tile: int, stride: int) -> Tensor:
    """First pixels of tiles that cover `length` pixels; the last tile is flush with the end, a tile longer than it is cut."""
    return torch.tensor(geometry.starts(length, tile, stride))


def paint(tiles: Tensor, size: tuple[int, int], tile: int, stride: int) -> Tensor:
    """The mean over the tiles on each pixel, (B, H, W), of the scores (B, h, w) of tiles."""
    covers = []
    for length in size:
        offset = torch.arange(length, device=tiles.device)[:, None] - starts(length, tile, stride).to(tiles.device)  # (length, h)
        cover = ((offset >= 0) & (offset < tile)).to(tiles.dtype)
        covers.append(cover / cover.sum(1, keepdim=True))
    # the tiles are a grid, so the mean over both axes is a mean over one of means over the other
    return covers[0] @ tiles @ covers[1].T
