"""The most similar patches elsewhere in the image, for each of its patches: an exact search, and a fast one with trees.

Patches are numbered in raster order of their top-left corners: patch y·w + x of the (h, w) = (H − p + 1, W − p + 1) grid. Distances are
mean squared differences over all p²·C values (the paper's msd). Offsets within `box`, (−8, 8) along both axes, are excluded: a patch
never meets itself or its surroundings. All shapes follow from the image's shape, so nothing waits for the device.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

GROUPS = 64  # a leaf's distances are reduced to the least of each of 64 groups before the n best are picked
FAR = 2**31 - 1


class Neighbours(NamedTuple):
    """The n nearest patches of each of Q patches, nearest first."""

    index: Tensor  # (Q, n) int64 patch numbers; 0 where there is no neighbour
    distance: Tensor  # (Q, n) float32 msd; inf where there is no neighbour


def grid(height: int, width: int, patch: int) -> tuple[int, int]:
    """How many patches fit along each axis."""
    return height - patch + 1, width - patch + 1


def enough(height: int, width: int, patch: int, neighbors: int, exclusion: int) -> bool:
    """Whether the patch in the middle, the worst placed, has `neighbors` patches outside its exclusion box."""
    h, w = grid(height, width, patch)
    barred = [min(cells // 2, exclusion) + min(cells - 1 - cells // 2, exclusion) + 1 for cells in (h, w)]
    return min(h, w) >= 1 and h * w - barred[0] * barred[1] >= neighbors


def leaf_size(box: tuple[int, int]) -> int:
    """Smallest leaf of a search tree: at most two thirds of it lie in the exclusion box, which leaves enough groups for the n best."""
    return max(256, 3 * (box[1] - box[0] + 1) ** 2 // 2)


def workspace(device: torch.device) -> int:
    """Numbers a temporary may hold; on a CPU what fits its cache, where the allocator also keeps the pages."""
    return 2**21 if device.type == "cpu" else 2**26


def vectors(image: Tensor, patch: int) -> Tensor:
    """(C, H, W) -> all patches (h·w, C·p²)."""
    return F.unfold(image[None], patch)[0].T.contiguous()


def vectors_at(image: Tensor, index: Tensor, patch: int) -> Tensor:
    """(C, H, W) and patch numbers (...,) -> those patches (..., C·p²), without a table of all."""
    c, width = image.shape[0], image.shape[2]
    w = width - patch + 1
    corner = torch.div(index, w, rounding_mode="floor") * width + index % w
    side = torch.arange(patch, device=image.device)
    inside = (side[:, None] * width + side).flatten()  # (p²,)
    pixels = (corner[..., None] + inside).flatten()
    found = image.flatten(1).index_select(1, pixels).view(c, *index.shape, patch * patch)  # (C, ..., p²)
    return found.movedim(0, -2).flatten(-2)


def boxed(own: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], box: tuple[int, int]) -> Tensor:
    """Whether patches at `other` (y, x) lie in the exclusion box of those at `own` (y, x), broadcast against each other."""
    # distances from the middle of the box, doubled
    y, x = ((2 * (there - here)).sub_(box[0] + box[1]).abs_().sub_(box[1] - box[0]) for here, there in zip(own, other, strict=True))
    return torch.maximum(y, x) <= 0


def place(index: Tensor, w: int) -> tuple[Tensor, Tensor]:
    """(y, x) of patch numbers, as short integers for cheap comparisons; enough for sides up to 16,383 px."""
    return torch.div(index, w, rounding_mode="floor").to(torch.int16), (index % w).to(torch.int16)


def exact(image: Tensor, query: Tensor, patch: int, neighbors: int, box: tuple[int, int]) -> Neighbours:
    """The exact neighbours of query patches (Q,) among all patches of the image (C, H, W), by tiled matrix products in bounded memory."""
    h, w = grid(*image.shape[1:], patch)
    centred = image - image.mean()  # |P|² + |Q|² − 2P·Q loses digits to a large mean
    rows = 1024
    cols = max(neighbors, workspace(image.device) // rows)
    parts = []
    for q in query.split(rows):
        a = vectors_at(centred, q, patch)  # (rows, D)
        best = torch.full((len(q), neighbors), math.inf, device=image.device)
        index = torch.zeros((len(q), neighbors), dtype=torch.int64, device=image.device)
        for start in range(0, h * w, cols):
            other = torch.arange(start, min(start + cols, h * w), device=image.device)
            b = vectors_at(centred, other, patch)  # (cols, D)
            d = torch.addmm(b.square().sum(1)[None] + a.square().sum(1)[:, None], a, b.T, alpha=-2)
            d = d.clamp_min_(0).masked_fill_(boxed(place(q[:, None], w), place(other, w), box), math.inf)
            d, where = torch.cat([best, d], 1).topk(neighbors, 1, largest=False)
            best, index = d, torch.cat([index, other.expand(len(q), -1)], 1).gather(1, where)
        # the differences themselves: the products were good enough to choose, not to weigh
        for i, d, x in zip(index.split(128), best.split(128), a.split(128), strict=True):
            msd = (vectors_at(centred, i, patch) - x[:, None]).square_().mean(-1)
            parts.append((i, msd.masked_fill(d.isinf(), math.inf)))
    return Neighbours(torch.cat([i for i, _ in parts]), torch.cat([d for _, d in parts]))


def trees(
    table: Tensor, shape: tuple[int, int], channels: int, neighbors: int, box: tuple[int, int], count: int, rounds: int, seed: int
) -> Neighbours:
    """An approximate search of all patches, a centred table (P, C·p²) on a grid of `shape` (h, w): random trees, then propagation.

    A tree halves the patches again and again at the median of a random direction of large variance, so that its leaves have one size;
    within a leaf each patch is compared with all others by a matrix product. Propagation then tries the neighbours of the adjacent
    patches, moved along.
    """
    p = math.isqrt(table.shape[1] // channels)
    size = len(table)
    norm = table.square().sum(1)
    keys = table @ low_frequencies(p, channels, table.device).to(table.dtype)  # (P, K)
    levels = max(0, math.floor(math.log2(size / leaf_size(box))))
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randn(count, max(levels, 1), keys.shape[1], generator=generator).to(table.device)
    found = [search_leaves(table, norm, shape[1], plant(keys, levels, s), neighbors, box) for s in starts]
    index, distance = merge(found, neighbors)
    del found
    for _ in range(rounds):
        index, distance = propagate(table, index, distance, shape, box)
    index = index.clamp_min(0).long()
    msd = distances(table, index) / table.shape[1]
    msd, order = msd.masked_fill(distance.isinf(), math.inf).sort(1)
    return Neighbours(index.gather(1, order), msd)


def low_frequencies(patch: int, channels: int, device: torch.device) -> Tensor:
    """The lowest cosines of a patch for each channel, as columns (C·p², K), which hold nearly all of a natural patch's energy."""
    side = torch.arange(patch, device=device)
    waves = torch.cos(math.pi * (side[:, None] + 0.5) * side / patch)
    waves = waves / waves.norm(dim=0)  # (p, p) pixel by frequency
    pairs = [(u, v) for u in range(patch) for v in range(patch) if u + v < min(5, patch)]
    flat = torch.stack([torch.outer(waves[:, u], waves[:, v]).flatten() for u, v in pairs], 1)  # (p², K/C)
    return torch.block_diag(*[flat] * channels)


def plant(keys: Tensor, levels: int, starts: Tensor) -> Tensor:
    """Patches (P, K) sorted into a tree's leaves (2^levels, L) of one size; the number P fills the vacant places.

    starts (levels, K) are random directions, which one step of the power method turns towards each node's large variances.
    """
    size = len(keys)
    length = -(-size // 2**levels)
    empty = length * 2**levels - size
    order = torch.cat([torch.arange(size, device=keys.device), torch.full((empty,), size, device=keys.device)])[None]
    keys = torch.cat([keys, keys.new_zeros(1, keys.shape[1])])
    for start in starts[:levels]:
        x = keys[order]  # (nodes, places, K)
        x = x - x.mean(1, keepdim=True)
        direction = ((x @ start)[:, None] @ x)[:, 0]  # (nodes, K)
        height = (x @ direction[:, :, None])[..., 0]
        # vacant places go to both sides in turn, or the last leaf would have nothing else
        vacant = order == size
        height = torch.where(vacant, torch.where(vacant.cumsum(1) % 2 == 0, math.inf, -math.inf), height)
        order = order.gather(1, height.argsort(1)).view(2 * len(order), -1)
    return order


def search_leaves(table: Tensor, norm: Tensor, w: int, leaves: Tensor, keep: int, box: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The `keep` nearest patches within each patch's leaf: patch numbers (P, keep) and squared distances (P, keep), −1 and inf for none.

    Distance and column share one int32 (positive floats are ordered as integers), so that a minimum over a group includes its place. Of
    two among the n best in one group the worse is lost, but this is a hundred times cheaper than a full sort, and other trees find it.
    """
    size, length = len(table), leaves.shape[1]
    low = 2 ** (length - 1).bit_length() - 1
    column = torch.arange(length, device=table.device, dtype=torch.int32)
    spare = -length % GROUPS
    index = torch.empty(size + 1, keep, dtype=torch.int32, device=table.device)
    distance = torch.empty(size + 1, keep, device=table.device)
    for part in leaves.split(max(1, workspace(table.device) // length**2)):
        member = part.clamp_max(size - 1)
        x, n = table[member], norm[member]
        d = torch.baddbmm(n[:, None] + n[:, :, None], x, x.mT, alpha=-2).clamp_min_(0)  # (leaves, L, L)
        y, x = place(member, w)
        barred = boxed((y[:, :, None], x[:, :, None]), (y[:, None], x[:, None]), box) | (part == size)[:, None]
        key = (d.view(torch.int32) & ~low).bitwise_or_(column).masked_fill_(barred, FAR)
        key = F.pad(key, (0, spare), value=FAR).unflatten(2, (-1, GROUPS)).amin(2)
        key = key.topk(min(keep, GROUPS), 2, largest=False).values  # (leaves, L, keep)
        where = (key & low).clamp_max_(length - 1).long()
        there = member[:, None].expand(-1, length, -1).gather(2, where).masked_fill_(key == FAR, -1)
        index[part.flatten()] = there.flatten(0, 1).int()
        distance[part.flatten()] = (key & ~low).view(torch.float32).masked_fill_(key == FAR, math.inf).flatten(0, 1)
    return index[:size], distance[:size]


def merge(found: list[tuple[Tensor, Tensor]], keep: int) -> tuple[Tensor, Tensor]:
    """The `keep` nearest of several lists (Q, M_i) of candidates and distances, each number once; −1 and inf where there are fewer."""
    rows = max(1, workspace(found[0][0].device) // sum(i.shape[1] for i, _ in found))
    parts = []
    for start in range(0, len(found[0][0]), rows):
        index, order = torch.cat([i[start : start + rows] for i, _ in found], 1).sort(1)
        distance = torch.cat([d[start : start + rows] for _, d in found], 1).gather(1, order)
        again = F.pad(index[:, 1:] == index[:, :-1], (1, 0))
        index, distance = index.masked_fill_(again, -1), distance.masked_fill_(again, math.inf)
        distance, order = distance.topk(keep, 1, largest=False)
        parts.append((index.gather(1, order), distance))
    return torch.cat([i for i, _ in parts]), torch.cat([d for _, d in parts])


def distances(table: Tensor, index: Tensor) -> Tensor:
    """Squared distances (P, M) of each patch of the table (P, D) to the patches index (P, M)."""
    rows = max(1, workspace(table.device) // (index.shape[1] * table.shape[1]))
    parts = [
        table.index_select(0, i.flatten()).view(*i.shape, -1).sub_(own[:, None]).square_().sum(-1)
        for i, own in zip(index.split(rows), table.split(rows), strict=True)
    ]
    return torch.cat(parts)


def propagate(table: Tensor, index: Tensor, distance: Tensor, shape: tuple[int, int], box: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """One round: the four best of each of the four adjacent patches, moved along, compete with the neighbours found so far."""
    h, w = shape
    device = index.device
    y = torch.arange(h, device=device, dtype=index.dtype)[:, None, None]
    x = torch.arange(w, device=device, dtype=index.dtype)[None, :, None]
    best = index[:, :4].view(h, w, -1)
    moved = []
    for dy, dx in ((0, 1), (0, -1), (1, 0), (-1, 0)):
        from_y, from_x = (y + dy).clamp(0, h - 1), (x + dx).clamp(0, w - 1)
        there = best[from_y[:, 0], from_x[..., 0]]  # (h, w, 4)
        to_y = (torch.div(there, w, rounding_mode="floor") + y - from_y).clamp(0, h - 1)
        to_x = (there % w + x - from_x).clamp(0, w - 1)
        moved.append(torch.where(boxed((y, x), (to_y, to_x), box), -1, to_y * w + to_x).flatten(0, 1))
    candidate = torch.cat(moved, 1)  # (P, 16)
    reach = distances(table, candidate.clamp_min(0)).masked_fill_(candidate < 0, math.inf)
    return merge([(index, distance), (candidate, reach)], index.shape[1])
