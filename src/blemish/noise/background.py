"""The background model, which redraws every patch from its most similar patches elsewhere, and the channels that are modelled."""

import torch
import torch.nn.functional as F
from torch import Tensor

from blemish.noise import patches
from blemish.noise.patches import Index, Neighbours


def signed_root(features: Tensor) -> Tensor:
    """f/√|f|: tames the heavy tails of network features."""
    return features.sign() * features.abs().sqrt()


def whitening(features: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """Mean (B, c, 1) and axes (B, c, k) of the k = min(channels, ⌊c/2⌋) largest components of features (B, c, P), scaled to variance one.

    Components beyond the rank of the features are zero, so that the shape does not depend on the data.
    """
    c, size = features.shape[1:]
    k = min(channels, c // 2)
    x = features.double()
    mean = x.mean(2, keepdim=True)
    x = x - mean
    values, axes = torch.linalg.eigh(x @ x.mT / (size - 1))  # ascending
    values, axes = values[:, -k:], axes[:, :, -k:]
    present = values > 1e-10 * values[:, -1:].clamp_min(1e-30)
    return mean, axes * torch.where(present, values.clamp_min(1e-30).rsqrt(), 0)[:, None]


def whiten(features: Tensor, mean: Tensor, axes: Tensor) -> Tensor:
    """Features (B, c, H, W) as components (B, k, H, W) by `whitening`."""
    x = axes.mT @ (features.flatten(2).double() - mean)
    return x.unflatten(2, features.shape[2:]).to(features.dtype)


def weights(distance: Tensor, h: float, relative: bool = False) -> Tensor:
    """exp(−msd/h²) of each patch's neighbours (B, Q, n), normalised to 1; all equal where all underflow.

    If `relative`, h is a multiple of the image's own scale: the median over its patches of the rms distance to the nearest.
    """
    width = h * distance[:, :, 0].sqrt().median(1).values.clamp_min(1e-6)[:, None, None] if relative else h
    raw = torch.exp(-distance / width**2)
    total = raw.sum(2, keepdim=True)
    return torch.where(total > 0, raw / total.clamp_min(torch.finfo(raw.dtype).tiny), 1 / distance.shape[2])


def model(
    images: Tensor,
    patch: int,
    neighbors: int,
    h: float,
    relative: bool,
    box: tuple[int, int],
    search: str,
    tile: int,
    seed: int,
    bank: Tensor | None = None,
    index: Index | None = None,
) -> Tensor:
    """The background (B, C, H, W) of images: at every pixel the mean of the estimates of the patches that cover it.

    Patches are redrawn from the same image, outside the range `box` of offsets, or from reference images `bank` (N, C, H', W') with their
    `index`. h is in the image's units, or see `weights`. `exact` compares all patches. `trees` redraws every third one, on diagonals
    (of small images from its exact neighbours), and searches an image with a side above `tile` in windows of one size that share patch − 1
    pixels, so that memory is bounded. Either
    finds n neighbours only where `patches.enough` holds.
    """
    height, width = images.shape[2:]
    fast = search == "trees"
    if fast:  # grids with the sides that a lattice with all four corners needs
        images = F.pad(images, (0, (patch - width) % patches.STEP, 0, (patch - height) % patches.STEP), mode="replicate")
    views, corners = windows(images, tile if fast and bank is None else max(images.shape[2:]), patch - 1)  # (B·n, C, h, w)
    shape = patches.grid(*views.shape[2:], patch)
    fast = fast and min(shape) > patches.STEP
    step = patches.STEP if fast else 1
    trees = fast and (index is not None or shape[0] * shape[1] >= patches.STEP * patches.leaf_size(box))
    count = patches.STEP if len(views) == len(images) else patches.WINDOW_TREES
    total, cover = torch.zeros_like(images), torch.zeros_like(images[:, :1])
    chunk = max(1, 8 * patches.workspace(images.device) // (views[0].numel() * patch**2))
    for start in range(0, len(views), chunk):
        part = views[start : start + chunk]
        middle = part.mean((2, 3), keepdim=True)
        table = patches.vectors(part - middle, patch) if bank is None else patches.vectors(part, patch)
        source = table if bank is None else patches.vectors(bank, patch)
        query = table.unflatten(0, (len(part), -1))[:, ::step].flatten(0, 1)
        if trees:
            if bank is None:
                where, _ = patches.within(part - middle, patch, neighbors, box, seed, count)
            else:
                where, _ = patches.among(part, index, patches.grid(*bank.shape[2:], patch), patch, neighbors)
            found = by_distance(source, query, where)
        elif bank is None:
            found = exact(query, source, shape, neighbors, box, len(part), step)
        else:
            found = patches.exact(query, source, neighbors)
        mix = weights(found.distance.unflatten(0, (len(part), -1)), h, relative).flatten(0, 1)
        estimate = F.embedding_bag(found.index, source, per_sample_weights=mix, mode="sum").unflatten(0, (len(part), -1))
        drawn, often = spread(estimate, shape, patch, fast)
        drawn = drawn + middle * often if bank is None else drawn
        for number, (top, left) in enumerate(corners[start : start + chunk]):
            image = (start + number) // (len(corners) // len(images))
            at = (image, slice(None), slice(top, top + part.shape[2]), slice(left, left + part.shape[3]))
            total[at] += drawn[number]
            cover[at] += often[0]
    return (total / cover)[:, :, :height, :width]


def exact(
    query: Tensor, source: Tensor, shape: tuple[int, int], neighbors: int, box: tuple[int, int], images: int, step: int
) -> Neighbours:
    """`patches.exact` of every `step`-th patch of a batch in its own image, with patch numbers of the batch."""
    size = shape[0] * shape[1]
    pairs = zip(query.split(len(query) // images), source.split(size), strict=True)
    found = [patches.exact(q, s, neighbors, shape, box, step) for q, s in pairs]
    return Neighbours(torch.cat([f.index + i * size for i, f in enumerate(found)]), torch.cat([f.distance for f in found]))


def by_distance(source: Tensor, query: Tensor, index: Tensor) -> Neighbours:
    """Neighbours (Q, n), −1 for none, with their mean squared differences, nearest first."""
    msd = patches.distances(source, query, index.clamp_min(0)) / source.shape[1]
    msd, order = msd.masked_fill(index < 0, torch.inf).sort(1)
    return Neighbours(index.clamp_min(0).long().gather(1, order), msd)


def spread(estimate: Tensor, shape: tuple[int, int], patch: int, lattice: bool) -> tuple[Tensor, Tensor]:
    """Sums (B, C, H, W) of the patch estimates (B, Q, C·p²) over each pixel, and how many (1, 1, H, W) they are.

    Of all patches of a grid (h, w), or of the `lattice` of those with y + x divisible by STEP.
    """
    h, w = shape
    size = (h + patch - 1, w + patch - 1)
    count = torch.ones_like(estimate[:1, :, : patch**2])
    if not lattice:
        return F.fold(estimate.mT, size, patch), F.fold(count.mT, size, patch)
    step = patches.STEP

    def rows(x: Tensor) -> Tensor:
        # of each `step` rows the first has one patch more than the others, and the grid ends with such a row
        few = w // step
        x = F.pad(x, (0, 0, 0, w - few - 1)).unflatten(1, (-1, w))  # (B, (h − 1)/step + 1, w, C·p²)
        total = F.fold(x[:, :, : few + 1].flatten(1, 2).mT, size, patch, stride=step)
        for row in range(1, step):
            some = x[:, :-1, row * few + 1 : (row + 1) * few + 1].flatten(1, 2).mT
            total[:, :, row : row - step, step - row : -row] += F.fold(some, (size[0] - step, size[1] - step), patch, stride=step)
        return total

    return rows(estimate), rows(count)


def windows(images: Tensor, side: int, shared: int) -> tuple[Tensor, list[tuple[int, int]]]:
    """Views (B·n, C, h, w) of one size, of at most `side` pixels a side that share at least `shared`, and the corner (y, x) of each."""

    def starts(size: int) -> tuple[list[int], int]:
        count = -(-(size - shared) // (side - shared))
        length = -(-(size + (count - 1) * shared) // count)
        length += (size - length) % patches.STEP  # as `model` needs the sides of grids
        return [0] if count == 1 else [round(k * (size - length) / (count - 1)) for k in range(count)], length

    (tops, height), (lefts, width) = (starts(size) for size in images.shape[2:])
    corners = [(y, x) for y in tops for x in lefts]
    views = torch.stack([images[:, :, y : y + height, x : x + width] for y, x in corners], 1).flatten(0, 1)
    return views, corners * len(images)


def residual(images: Tensor, **settings) -> Tensor:
    """u − `model` (B, C, H, W); exactly 0 within float32 rounding, which is all that a perfectly periodic image leaves."""
    r = images - model(images, **settings)
    return torch.where(r.abs() > 1e-5 * images.abs().amax((1, 2, 3), keepdim=True), r, 0)
