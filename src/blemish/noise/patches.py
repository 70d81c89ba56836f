"""The most similar patches for each patch of some images, elsewhere in the same image or in reference images.

Patches are numbered in raster order of their top-left corners, image after image: patch (i·h + y)·w + x of the (h, w) = (H − p + 1,
W − p + 1) grids. Distances are mean squared differences over all p²·C values (the paper's msd). Within an image offsets inside `box`,
(−8, 8) along both axes, are excluded: a patch never meets itself or its surroundings. All shapes follow from those of the images, so
nothing waits for the device.

`exact` is the definition. The fast search is for every STEP-th patch of grids whose sides are one more than a multiple of STEP, so that
patches (y, x) with y + x divisible by STEP, a lattice of diagonals, are redrawn. It compares KEYS principal components of the patches
instead of all values: random trees whose leaves have one size, then the neighbours of four patches of the lattice near by, moved along.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

STEP = 3  # of the patches that the fast search redraws
NEARBY = ((-1, 1), (1, -1), (1, 2), (-1, -2))  # rows and columns between patches of the lattice
KEYS = 40  # numbers of a patch that the fast search compares
SAMPLE = 4000  # patches that principal components are computed of
SPLIT = 8  # the first of them, of which trees take their directions
TREES = 4  # of references
WINDOW_TREES = 2  # of each of several windows of an image, with smaller leaves, in place of STEP
ROUNDS = 1  # of propagation after the trees
GROUPS = 64  # a leaf's distances are reduced to the least of each of 64 groups before the n best are picked
KEEP = 12  # of a tree
LEAF = 64  # of the trees of reference images
FAR = 2**31 - 1


class Neighbours(NamedTuple):
    """The n nearest patches of each of Q patches, nearest first."""

    index: Tensor  # (Q, n) int64 patch numbers; 0 where there is no neighbour
    distance: Tensor  # (Q, n) float32 msd; inf where there is no neighbour


class Index(NamedTuple):
    """The patches of reference images, ready to be searched."""

    axes: Tensor  # (1, C·p², K) principal axes
    keys: Tensor  # (M, K)
    leaves: Tensor  # (T, 2^levels, L) int32 patch numbers
    directions: Tensor  # (T, 2^levels − 1, S) of every inner node, in breadth-first order
    limits: Tensor  # (T, 2^levels − 1) a patch whose product with the direction is larger goes to the second child


def grid(height: int, width: int, patch: int) -> tuple[int, int]:
    """How many patches fit along each axis."""
    return height - patch + 1, width - patch + 1


def enough(height: int, width: int, patch: int, neighbors: int, exclusion: int) -> bool:
    """Whether the patch in the middle, the worst placed, has `neighbors` patches outside its exclusion box."""
    h, w = grid(height, width, patch)
    barred = [min(cells // 2, exclusion) + min(cells - 1 - cells // 2, exclusion) + 1 for cells in (h, w)]
    return min(h, w) >= 1 and h * w - barred[0] * barred[1] >= neighbors


def leaf_size(box: tuple[int, int]) -> int:
    """Smallest leaf of a tree, eight times the patches of a lattice in an exclusion box."""
    return max(320, 8 * (box[1] - box[0] + 1) ** 2 // STEP)


def workspace(device: torch.device) -> int:
    """Numbers a temporary may hold; on a CPU what fits its cache, where the allocator also keeps the pages."""
    return 2**18 if device.type == "cpu" else 2**26


def vectors(images: Tensor, patch: int) -> Tensor:
    """(B, C, H, W) -> all patches (B·h·w, C·p²)."""
    views = images.unfold(2, patch, 1).unfold(3, patch, 1).permute(0, 2, 3, 1, 4, 5)  # (B, h, w, C, p, p)
    return views.reshape(-1, images.shape[1] * patch**2)


def boxed(own: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], box: tuple[int, int]) -> Tensor:
    """Whether patches at `other` (y, x) lie in the exclusion box of those at `own` (y, x), broadcast against each other."""
    # distances from the middle of the box, doubled
    y, x = ((2 * there - (2 * here + (box[0] + box[1]))).abs_() for here, there in zip(own, other, strict=True))
    return torch.maximum(y, x, out=y) <= box[1] - box[0]


def place(index: Tensor, h: int, w: int) -> tuple[Tensor, Tensor]:
    """(y, x) of patch numbers, as short integers for cheap comparisons; enough for sides up to 16,383 px."""
    return (torch.div(index, w, rounding_mode="floor") % h).to(torch.int16), (index % w).to(torch.int16)


def exact(
    query: Tensor, bank: Tensor, neighbors: int, shape: tuple[int, int] | None = None, box: tuple[int, int] = (0, 0), step: int = 1
) -> Neighbours:
    """The exact neighbours of patches (Q, D) among patches (M, D), by tiled matrix products in bounded memory.

    With `shape`, the grid (h, w) of one image, the queries are every `step`-th of its patches and the bank all of them.
    """
    middle = bank.mean(0)  # |P|² + |Q|² − 2P·Q loses digits to a large mean
    bank, query = bank - middle, query - middle
    rows, cols = 512, max(neighbors, 4 * workspace(bank.device) // 512)
    parts = []
    for first in range(0, len(query), rows):
        a = query[first : first + rows]
        own = step * torch.arange(first, first + len(a), device=bank.device)
        best = torch.full((len(a), neighbors), math.inf, device=bank.device)
        index = torch.zeros((len(a), neighbors), dtype=torch.int64, device=bank.device)
        for begin in range(0, len(bank), cols):
            b = bank[begin : begin + cols]
            other = torch.arange(begin, begin + len(b), device=bank.device)
            d = torch.addmm(b.square().sum(1)[None] + a.square().sum(1)[:, None], a, b.T, alpha=-2).clamp_min_(0)
            if shape is not None:
                d = d.masked_fill_(boxed(place(own[:, None], *shape), place(other, *shape), box), math.inf)
            d, where = torch.cat([best, d], 1).topk(neighbors, 1, largest=False)
            best, index = d, torch.cat([index, other.expand(len(a), -1)], 1).gather(1, where)
        # the differences themselves: the products were good enough to choose, not to weigh
        msd = distances(bank, a, index) / bank.shape[1]
        parts.append((index, msd.masked_fill(best.isinf(), math.inf)))
    return Neighbours(torch.cat([i for i, _ in parts]), torch.cat([d for _, d in parts]))


def principal_axes(images: Tensor, patch: int, seed: int) -> Tensor:
    """(B, C, H, W) -> the axes (B, C·p², K) of the largest variances of every image's patches, largest first, from SAMPLE drawn ones."""
    h, w = grid(*images.shape[2:], patch)
    number = torch.arange(h * w)
    if h * w > SAMPLE:  # a raster would see one phase of a periodic texture
        number = torch.randint(h * w, (SAMPLE,), generator=torch.Generator().manual_seed(seed))
    corner = torch.div(number, w, rounding_mode="floor") * images.shape[3] + number % w  # (n,)
    inside = torch.arange(patch)[:, None] * images.shape[3] + torch.arange(patch)
    pixels = (inside.flatten()[:, None] + corner).to(images.device)  # (p², n)
    x = images.flatten(2)[:, :, pixels].flatten(1, 2)  # (B, C·p², n)
    x = x - x.mean(2, keepdim=True)
    return torch.linalg.eigh(x @ x.mT).eigenvectors[:, :, -KEYS:].flip(2)


def project(images: Tensor, axes: Tensor, patch: int) -> Tensor:
    """(B, C, H, W) -> the numbers (B·h·w, K) of all patches along their image's axes (B, C·p², K), or those of all (1, C·p², K)."""
    b, c = images.shape[:2]
    groups = len(axes)
    kernel = axes.mT.reshape(-1, c, patch, patch)
    return (
        F.conv2d(images.reshape(b // groups, groups * c, *images.shape[2:]), kernel, groups=groups)
        .reshape(b, axes.shape[2], -1)
        .mT.flatten(0, 1)
        .contiguous()  # rows together in memory
    )


def within(images: Tensor, patch: int, neighbors: int, box: tuple[int, int], seed: int, trees: int = STEP) -> tuple[Tensor, Tensor]:
    """A fast search of images (B, C, H, W) for the patches of the lattice: index and distance (B·Q, n) of keys.

    The leaves of each of up to STEP trees have queries and candidates, which are the patches of one of the STEP lattices, and each query
    is compared with all candidates by a matrix product. −1 and inf where there is no neighbour.
    """
    shape = grid(*images.shape[2:], patch)
    size = shape[0] * shape[1]
    keys = project(images, principal_axes(images, patch, seed), patch)
    first = size * torch.arange(len(images), device=images.device)[:, None]
    lattices = [first + torch.arange(start, size, STEP, device=images.device) for start in range(STEP)]  # (B, Q), (B, Q − 1), …
    leaves, ways = STEP * lattices[0].shape[1] // (trees * leaf_size(box)), []
    while leaves > 1:
        ways.append(4 if leaves > 7 else 2 if leaves > 3 else leaves)
        leaves //= ways[-1]
    found = []
    for tree, candidates in enumerate(lattices[:trees]):
        queries, candidates, *_ = plant(keys, random_starts(tree, len(ways), seed, keys), ways, lattices[0], candidates)
        found.append(search_leaves(keys, queries, candidates, shape, lattices[0].numel(), KEEP, box))
    index, distance = merge(found, neighbors, distinct=True)
    for _ in range(ROUNDS):
        own = keys[::STEP] if len(images) == 1 else keys[lattices[0].flatten()]
        index, distance = propagate(own, keys, index, distance, shape, shape, box)
    return index, distance


def build(images: Tensor, patch: int, seed: int) -> Index:
    """The index of all patches of reference images (N, C, H, W)."""
    axes = principal_axes(images.movedim(0, 1).flatten(1, 2)[None], patch, seed)
    keys = project(images, axes, patch)
    levels = max(0, math.floor(math.log2(len(keys) / LEAF)))
    every = torch.arange(len(keys), device=keys.device)[None]
    trees = [plant(keys, random_starts(tree, levels, seed, keys), [2] * levels, every) for tree in range(TREES)]
    leaves, directions, limits = (torch.stack([tree[part] for tree in trees]) for part in (0, 2, 3))
    return Index(axes, keys, leaves.int(), directions, limits)


def among(images: Tensor, index: Index, shape: tuple[int, int], patch: int, neighbors: int) -> tuple[Tensor, Tensor]:
    """A fast search of an index, of references with grids of `shape`, for the patches of the lattice of images: as `within`."""
    own = grid(*images.shape[2:], patch)
    keys = project(images, index.axes, patch).unflatten(0, (len(images), -1))[:, ::STEP].flatten(0, 1)  # (B·Q, K)
    found = []
    for leaves, directions, limits in zip(*index[2:], strict=True):
        node = torch.zeros(len(keys), dtype=torch.int64, device=keys.device)
        for _ in range(int(math.log2(len(leaves)))):
            height = (directions[node] * keys[:, :SPLIT]).sum(1)
            node = 2 * node + 1 + (height > limits[node])
        candidate = leaves[node - len(limits)]  # (B·Q, L)
        distance, order = distances(index.keys, keys, candidate).topk(min(neighbors, candidate.shape[1]), 1, largest=False)
        found.append((candidate.gather(1, order), distance))
    best, distance = merge(found, neighbors)
    for _ in range(ROUNDS):
        best, distance = propagate(keys, index.keys, best, distance, own, shape, None)
    return best, distance


def random_starts(tree: int, levels: int, seed: int, keys: Tensor) -> Tensor:
    """Random directions (levels, S), one for each level of a tree."""
    return torch.randn(levels, min(SPLIT, keys.shape[1]), generator=torch.Generator().manual_seed(TREES * seed + tree)).to(keys)


def plant(
    keys: Tensor, starts: Tensor, ways: list[int], queries: Tensor, candidates: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Sort patches into a tree: the leaves (B·L, P) of queries (B, Q), and of candidates, for each of B images with L = Πways.

    A node is divided at the quantiles along a random direction, which one step of the power method turns towards its large variances; the
    candidates at their own. To fill leaves of one size some queries come twice, and −1 stands among the candidates. Also directions and
    medians of all nodes (B = 1).
    """
    leaves = math.prod(ways)
    queries = torch.cat([queries, queries[:, : -queries.shape[1] % leaves]], 1)
    if candidates is not None:
        candidates = F.pad(candidates, (0, -candidates.shape[1] % leaves), value=-1)
    keys = keys[:, :SPLIT].contiguous()
    directions, limits = [], []
    for start, children in zip(starts, ways, strict=True):
        x = rows_of(keys, queries)  # (nodes, places, S)
        centred = x - x.mean(1, keepdim=True)
        direction = ((centred @ start)[:, None] @ centred)[:, 0]  # (nodes, S)
        height, order = (x @ direction[:, :, None])[..., 0].sort(1)
        queries = queries.gather(1, order).view(children * len(queries), -1)
        directions.append(direction)
        limits.append(height[:, height.shape[1] // 2 - 1])
        if candidates is not None:
            order = (rows_of(keys, candidates.clamp_min(0)) @ direction[:, :, None])[..., 0].argsort(1)
            candidates = candidates.gather(1, order).view(children * len(candidates), -1)
    directions = torch.cat(directions) if len(starts) else keys.new_empty(0, keys.shape[1])
    return queries, candidates, directions, torch.cat(limits) if len(starts) else keys.new_empty(0)


def rows_of(table: Tensor, index: Tensor) -> Tensor:
    """Rows (…, D) of a table (M, D); on a CPU several times as fast as table[index]."""
    return table.index_select(0, index.flatten()).unflatten(0, index.shape)


def search_leaves(
    keys: Tensor, queries: Tensor, candidates: Tensor, shape: tuple[int, int], count: int, keep: int, box: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """The `keep` nearest candidates in the leaf of each of `count` patches of the lattice: index and distance (count, keep), −1 for none.

    Distance and column share one int32 (positive floats are ordered as integers), so that a minimum over a group includes its place. Of
    two among the n best in one group the worse is lost, but this is a hundred times cheaper than a full sort, and other trees find it.
    """
    size, length = shape[0] * shape[1], candidates.shape[1]
    keep = min(keep, GROUPS)
    low = 2 ** (length - 1).bit_length() - 1
    column = torch.arange(length, device=keys.device, dtype=torch.int32)
    index = torch.empty(count, keep, dtype=torch.int32, device=keys.device)
    distance = torch.empty(count, keep, device=keys.device)
    leaves = min(len(queries), max(1, workspace(keys.device) // (queries.shape[1] * length)))
    buffer = keys.new_empty(leaves, queries.shape[1], length)  # a CPU's allocator would give such a temporary back at every turn
    for q, c in zip(queries.split(leaves), candidates.split(leaves), strict=True):
        own, other = rows_of(keys, q), rows_of(keys, c.clamp_min(0))
        norms = other.square().sum(2).masked_fill_(c < 0, math.inf)
        d = torch.add(own.square().sum(2)[:, :, None], norms[:, None], out=buffer[: len(q)])
        d.baddbmm_(own, other.mT, alpha=-2)  # (leaves, Q, L)
        y, x = place(c, *shape)
        own = place(q, *shape)
        barred = boxed((own[0][:, :, None], own[1][:, :, None]), (y[:, None], x[:, None]), box)
        key = d.view(torch.int32).bitwise_and_(~low).bitwise_or_(column).masked_fill_(barred, FAR)
        key = F.pad(key, (0, -length % GROUPS), value=FAR).unflatten(2, (-1, GROUPS)).amin(2)
        key = key.topk(keep, 2, largest=False).values  # (leaves, Q, keep)
        where = (key & low).clamp_max_(length - 1).long()
        there = c[:, None].expand(-1, q.shape[1], -1).gather(2, where).masked_fill_(key == FAR, -1)
        row = (torch.div(q, size, rounding_mode="floor") * -(-size // STEP) + q % size // STEP).flatten()
        index[row] = there.flatten(0, 1).int()
        distance[row] = (key & ~low).view(torch.float32).clamp_min_(0).masked_fill_(key == FAR, math.inf).flatten(0, 1)
    return index, distance


def merge(found: list[tuple[Tensor, Tensor]], keep: int, distinct: bool = False) -> tuple[Tensor, Tensor]:
    """The `keep` nearest of several lists (Q, M_i) of candidates and distances, each number once; −1 and inf where there are fewer.

    distinct: no number comes twice, so that none is looked for.
    """
    rows = max(1, workspace(found[0][0].device) // sum(i.shape[1] for i, _ in found))
    parts = []
    for start in range(0, len(found[0][0]), rows):
        index, distance = (torch.cat([part[start : start + rows] for part in parts_of], 1) for parts_of in zip(*found, strict=True))
        if not distinct:
            index, order = index.sort(1)
            distance = distance.gather(1, order)
            again = F.pad(index[:, 1:] == index[:, :-1], (1, 0))
            index, distance = index.masked_fill_(again, -1), distance.masked_fill_(again, math.inf)
        distance, order = distance.topk(keep, 1, largest=False)
        parts.append((index.gather(1, order), distance))
    return torch.cat([i for i, _ in parts]), torch.cat([d for _, d in parts])


def distances(bank: Tensor, query: Tensor, index: Tensor) -> Tensor:
    """Squared distances (Q, n) of patches (Q, D) to the patches `index` (Q, n) of a bank (M, D)."""
    rows = max(1, min(len(index), workspace(bank.device) // (index.shape[1] * bank.shape[1])))
    found = bank.new_empty(index.shape)
    buffer = bank.new_empty(rows * index.shape[1], bank.shape[1])  # as in `search_leaves`
    for i, own, out in zip(index.split(rows), query.split(rows), found.split(rows), strict=True):
        part = torch.index_select(bank, 0, i.flatten(), out=buffer[: i.numel()]).view(*i.shape, -1)
        torch.sum(part.sub_(own[:, None]).square_(), -1, out=out)
    return found


def propagate(
    query: Tensor,
    bank: Tensor,
    index: Tensor,
    distance: Tensor,
    own: tuple[int, int],
    shape: tuple[int, int],
    box: tuple[int, int] | None,
) -> tuple[Tensor, Tensor]:
    """One round: the four best of four patches of the lattice near by, moved along, compete with the neighbours (B·Q, n) found so far.

    Queries are the lattices of grids `own`; the bank has grids of `shape`, and `box` excludes offsets if they are the same.
    """
    h, w = own
    images = len(index) // -(-h * w // STEP)
    number = torch.arange(0, h * w, STEP, device=index.device, dtype=index.dtype)
    y, x = torch.div(number, w, rounding_mode="floor"), number % w  # (Q,)
    best = index[:, :4].unflatten(0, (images, -1))  # (B, Q, 4)
    moved = []
    for dy, dx in NEARBY:
        from_y, from_x = y + dy, x + dx
        inside = (from_y >= 0) & (from_y < h) & (from_x >= 0) & (from_x < w)
        there = best[:, torch.where(inside, torch.div(from_y * w + from_x, STEP, rounding_mode="floor"), 0).long()]  # (B, Q, 4)
        to_y, to_x = torch.div(there, shape[1], rounding_mode="floor") % shape[0] - dy, there % shape[1] - dx
        valid = inside[:, None] & (there >= 0) & (to_y >= 0) & (to_y < shape[0]) & (to_x >= 0) & (to_x < shape[1])
        if box is not None:
            valid &= ~boxed((y[:, None], x[:, None]), (to_y, to_x), box)
        moved.append(torch.where(valid, there - dy * shape[1] - dx, -1))
    candidate = torch.cat(moved, 2).flatten(0, 1)  # (B·Q, 16)
    reach = distances(bank, query, candidate.clamp_min(0)).masked_fill_(candidate < 0, math.inf)
    return merge([(index, distance), (candidate, reach)], index.shape[1])
