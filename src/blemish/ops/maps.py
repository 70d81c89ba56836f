"""Feature maps brought to one grid, and anomaly maps to the image: linear and separable, hence matrix products."""

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from blemish.edge import geometry
from blemish.edge.checks import check_number
from blemish.types import Prediction

TOP = 0.01  # share of a map that `score: top` averages
MOST = 1000  # largest σ of a blur in pixels; its kernel has eight times as many


def align(maps: Sequence[Tensor], mode: str = "bilinear") -> Tensor:
    """Stages (B, C_s, h_s, w_s) resized to the first one's grid and concatenated: (B, ΣC_s, h, w)."""
    size = maps[0].shape[-2:]
    resized = [m if m.shape[-2:] == size else F.interpolate(m, size, mode=mode) for m in maps]
    return torch.cat(resized, dim=1)


def smooth_upsample(map: Tensor, size: tuple[int, int], sigma: float) -> Tensor:
    """Bilinear upsampling of (B, h, w) to size (H, W), then a Gaussian blur of `sigma` pixels cut at 4σ with reflected borders.

    Rows and columns are independent in both steps, so that the result is A·map·Bᵀ with A (H, h) and B (W, w).
    """
    rows = upsample_blur_matrix(map.shape[-2], size[0], sigma).to(map)  # (H, h)
    columns = upsample_blur_matrix(map.shape[-1], size[1], sigma).to(map)  # (W, w)
    return rows @ map @ columns.mT  # (B, H, W)


def blur(map: Tensor, sigma: float) -> Tensor:
    """A map (B, H, W) after a Gaussian blur of `sigma` pixels, as `smooth_upsample` does it; σ = 0 leaves it as it is."""
    return smooth_upsample(map, tuple(map.shape[-2:]), sigma) if sigma else map


def top_mean(map: Tensor, share: float) -> Tensor:
    """Score (B,) of maps (B, …): the mean of the largest values, which are a `share` of the map, but at least one of them."""
    values = map.flatten(1)
    count = max(1, int(share * values.shape[1]))
    if count in (1, values.shape[1]):
        return values.amax(1) if count == 1 else values.mean(1)
    return values.topk(count).values.mean(1)


def peaks(map: Tensor, count: int) -> Tensor:
    """The highest local maxima (B, count) of maps (B, H, W), highest first, −∞ where there are fewer.

    A map has at most as many 8-connected regions above a value as local maxima above it.
    """
    top = F.max_pool2d(map[:, None], 3, 1, 1)[:, 0]
    found = torch.where(map == top, map, -torch.inf).flatten(1).topk(min(count, map[0].numel())).values
    return F.pad(found, (0, count - found.shape[1]), value=-torch.inf)


@lru_cache(maxsize=64)
def upsample_blur_matrix(cells: int, pixels: int, sigma: float) -> Tensor:
    """The (pixels, cells) float64 matrix of 1-D bilinear resizing (half-pixel centres), then the blur; none with σ = 0."""
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
        index = (torch.arange(pixels)[:, None] + offset.long()).remainder(2 * pixels)  # (pixels, 2·radius+1)
        index = torch.minimum(index, 2 * pixels - 1 - index)  # … 1 0 | 0 1 2 …, as scipy's `reflect`
        blur = torch.zeros(pixels, pixels, dtype=torch.float64).scatter_add_(1, index, kernel.expand(pixels, -1))
        return blur @ up


def check_blur(sigma: float) -> None:
    """InputError unless sigma can be that of a blur; for methods to call before they train."""
    check_number("model", f"[0, {MOST}]", sigma=sigma)


def starts(length: int, tile: int, stride: int) -> Tensor:
    """First pixels of tiles that cover `length` pixels; the last tile ends with them, a longer tile is cut."""
    return torch.tensor(geometry.starts(length, tile, stride))


def paint(tiles: Tensor, size: tuple[int, int], tile: int, stride: int) -> Tensor:
    """Each pixel's mean, (B, H, W), of the scores (B, h, w) of the tiles that cover it."""
    covers = []
    for length in size:
        offset = torch.arange(length, device=tiles.device)[:, None] - starts(length, tile, stride).to(tiles.device)  # (length, h)
        cover = ((offset >= 0) & (offset < tile)).to(tiles.dtype)
        covers.append(cover / cover.sum(1, keepdim=True))
    return covers[0] @ tiles @ covers[1].T


def joined(predictions: Sequence[Prediction]) -> Prediction:
    """The predictions of several batches as one."""
    score, map = zip(*predictions, strict=True)
    return Prediction(torch.cat(score), None if map[0] is None else torch.cat(map))


def apply_ignore_mask(prediction: Prediction, ignore_mask: Tensor | None, share: float | None) -> Prediction:
    """Apply an ignore mask (B, H, W) to a prediction; None leaves it as it is.

    Ignored pixels take the least map value of the others. The score of an image, or a tile, that is ignored completely is −∞; otherwise a
    score of the map's `share` (`Detector.map_share`) becomes that of the other pixels.
    """
    score, map = prediction
    if ignore_mask is None:
        return prediction
    if map is not None and share is not None:
        parts = [pixels[~ignored] for pixels, ignored in zip(map, ignore_mask, strict=True)]
        score = torch.cat([top_mean(part[None], share) if len(part) else score[:1] for part in parts])
    score = score.masked_fill(ignore_mask.all(2).all(1), -torch.inf)
    if map is None:
        return Prediction(score)
    least = map.masked_fill(ignore_mask, torch.inf).amin((1, 2)).clamp_max(map.amax((1, 2)))  # (B,)
    return Prediction(score, torch.where(ignore_mask, least[:, None, None], map))
