"""The background model, which redraws every patch from its most similar patches elsewhere, and the channels that are modelled."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from blemish.noise import patches
from blemish.noise.patches import Neighbours

TREES = 4
ROUNDS = 2  # of propagation after the trees


def signed_root(features: Tensor) -> Tensor:
    """f/√|f|: tames the heavy tails of network features."""
    return features.sign() * features.abs().sqrt()


def whiten(features: Tensor, channels: int) -> Tensor:
    """The largest principal components (B, min(channels, ⌊c/2⌋), H, W) of each image's features (B, c, H, W), with variance one.

    Components beyond the rank of the features are zero, so that the shape does not depend on the data.
    """
    b, c, h, w = features.shape
    k = min(channels, c // 2)
    x = features.flatten(2).double()
    x = x - x.mean(2, keepdim=True)
    values, axes = torch.linalg.eigh(x @ x.mT / (h * w - 1))  # ascending
    values, axes = values[:, -k:], axes[:, :, -k:]
    present = values > 1e-10 * values[:, -1:].clamp_min(1e-30)
    scale = torch.where(present, values.clamp_min(1e-30).rsqrt(), 0)
    return ((axes * scale[:, None]).mT @ x).view(b, k, h, w).to(features.dtype)


def weights(distance: Tensor, h: float | Tensor) -> Tensor:
    """exp(−msd/h²) of each patch's neighbours (Q, n), normalised to 1; all equal where all underflow."""
    raw = torch.exp(-distance / h**2)
    total = raw.sum(1, keepdim=True)
    return torch.where(total > 0, raw / total.clamp_min(torch.finfo(raw.dtype).tiny), 1 / distance.shape[1])


def nearest_distance(image: Tensor, patch: int, box: tuple[int, int]) -> Tensor:
    """The image's own scale for h: median over some 500 patches, evenly spread in raster order, of the rms distance to the nearest."""
    h, w = patches.grid(*image.shape[1:], patch)
    query = torch.arange(0, h * w, max(1, h * w // 500), device=image.device)
    nearest = patches.exact(image, query, patch, 1, box).distance[:, 0]
    return nearest.median().sqrt().clamp_min(1e-6)


def model(
    image: Tensor, patch: int, neighbors: int, h: float, relative: bool, box: tuple[int, int], search: str, tile: int, seed: int
) -> Tensor:
    """The background (C, H, W) of one image: at every pixel the mean of the estimates of all patches that cover it.

    h is in the image's units, or if `relative` a multiple of the image's `nearest_distance`; box is the range of excluded offsets. `exact`
    searches the full image; `trees` is fast and searches, in an image with a side above `tile`, windows of that side that share patch − 1
    pixels, so that memory is bounded. Either finds n neighbours only where `patches.enough` holds.
    """
    h = h * nearest_distance(image, patch, box) if relative else h
    total, cover = torch.zeros_like(image), torch.zeros_like(image[:1])
    for top, left, view in windows(image, tile if search == "trees" else max(image.shape), patch - 1):
        width = view.shape[2]
        for row, estimate in estimates(view, patch, neighbors, h, box, search, seed):
            rows = len(estimate) // (width - patch + 1) + patch - 1  # the pixel rows that this band of patches covers
            part = (slice(None), slice(top + row, top + row + rows), slice(left, left + width))
            total[part] += F.fold(estimate.T, (rows, width), patch)
            cover[part] += F.fold(torch.ones_like(estimate[:, : patch * patch]).T, (rows, width), patch)
    return total / cover


def windows(image: Tensor, side: int, shared: int) -> list[tuple[int, int, Tensor]]:
    """(top, left, view) of evenly spread views of at most `side` pixels a side that share at least `shared` pixels."""

    def starts(size: int) -> list[int]:
        if size <= side:
            return [0]
        count = -(-(size - shared) // (side - shared))
        return [round(k * (size - side) / (count - 1)) for k in range(count)]

    height, width = image.shape[1:]
    return [(y, x, image[:, y : y + side, x : x + side]) for y in starts(height) for x in starts(width)]


def estimates(
    image: Tensor, patch: int, neighbors: int, h: float | Tensor, box: tuple[int, int], search: str, seed: int
) -> Iterator[tuple[int, Tensor]]:
    """Bands of patch estimates Σ_k w_k Q_k, each as (first row of the patch grid, estimates (rows·w, C·p²))."""
    shape = patches.grid(*image.shape[1:], patch)
    size, w = shape[0] * shape[1], shape[1]
    rows = max(1, patches.workspace(image.device) // (w * image.shape[0] * patch**2))
    if search == "trees" and size >= 8 * patches.leaf_size(box):
        middle = image.mean()
        table = patches.vectors(image - middle, patch)  # (P, C·p²)
        found = patches.trees(table, shape, image.shape[0], neighbors, box, TREES, ROUNDS, seed)
        for start in range(0, size, rows * w):
            band = slice(start, start + rows * w)
            mix = weights(found.distance[band], h)
            yield start // w, F.embedding_bag(found.index[band], table, per_sample_weights=mix, mode="sum") + middle
    else:
        for start in range(0, size, rows * w):
            query = torch.arange(start, min(start + rows * w, size), device=image.device)
            yield start // w, redraw(image, patches.exact(image, query, patch, neighbors, box), patch, h)


def redraw(image: Tensor, found: Neighbours, patch: int, h: float | Tensor) -> Tensor:
    """The estimates (Q, C·p²) of patches from their neighbours, without a table of all patches."""
    rows = max(1, patches.workspace(image.device) // (found.index.shape[1] * image.shape[0] * patch**2))
    mix = weights(found.distance, h)  # (Q, n)
    pieces = zip(found.index.split(rows), mix.split(rows), strict=True)
    return torch.cat([(patches.vectors_at(image, i, patch) * m[..., None]).sum(1) for i, m in pieces])


def residual(
    image: Tensor, patch: int, neighbors: int, h: float, relative: bool, box: tuple[int, int], search: str, tile: int, seed: int
) -> Tensor:
    """u − model (B, C, H, W), image by image; exactly 0 within float32 rounding, which is all that a perfectly periodic image leaves."""
    r = torch.stack([u - model(u, patch, neighbors, h, relative, box, search, tile, seed) for u in image])
    return torch.where(r.abs() > 1e-5 * image.abs().amax((1, 2, 3), keepdim=True), r, 0)
