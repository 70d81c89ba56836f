"""Exact nearest neighbours in L2, in bounded memory."""

import logging
import timeit
from functools import cache

import torch
from torch import Tensor

from blemish.edge.errors import InputError

logging.getLogger("faiss").setLevel(logging.WARNING)  # at import it lists what it tried to load
try:
    import faiss
except ImportError:
    faiss = None

QUERIES = 1024  # searched at once
TILE = 2**22  # distances, or feature values, held at a time
LARGE = 2**28  # products of two numbers in a search, from which it is worth finding the quicker library
ROW = 32  # distances whose minimum is found at once
SPARES = (1, 8)  # candidates beyond k whose distance is computed by differences: at first, and where these leave doubt


def distances(left: Tensor, right: Tensor) -> Tensor:
    """L2 distances (…, m) of each left (…, D) to its right (…, m, D) by differences: 0 for equal rows, whatever the other pairs."""
    return pairwise(left.unsqueeze(-2), right).squeeze(-2)


def pairwise(left: Tensor, right: Tensor) -> Tensor:
    """L2 distances (…, n, m) of left (…, n, D) and right (…, m, D) by differences."""
    if torch.compiler.is_exporting():
        return (left[..., :, None, :] - right[..., None, :, :]).square().sum(-1).sqrt()
    return torch.cdist(left, right, compute_mode="donot_use_mm_for_euclid_dist")


def product_dtype(*tensors: Tensor) -> torch.dtype:
    """The cheapest dtype in which a matrix product rounds as its mantissa says: TF32 and bfloat16 products, if switched on, do not."""
    try:
        coarse = torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # set through the newer switches of each backend, which have no summary
        coarse = True
    return torch.float64 if coarse or any(x.dtype == torch.float64 for x in tensors) else torch.float32


def rounding(norm: Tensor, largest: Tensor | float, dims: int) -> Tensor:
    """Bound on the error of ‖q‖² + ‖m‖² − 2 q·m, given ‖q‖ and the largest ‖m‖, of vectors that were rounded themselves."""
    return (dims + 16) * torch.finfo(norm.dtype).eps / 2 * (norm + largest).square()


@torch.no_grad()
def nearest(query: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k bank rows (M, D) nearest to each query (Q, D): distances (Q, k) ascending, and indices (Q, k) int64.

    Matrix products only propose a few candidates more than k; the distances are computed by differences. A query whose candidates
    cannot be proven complete within rounding is searched again with more of them, then in float64. Equal distances go to the
    lowest index; float64 input stays float64. InputError if k is not in 1…M.
    """
    if not 1 <= k <= len(bank):
        raise InputError(f"k: {k} neighbours of a bank of {len(bank)} rows, allowed are 1…{len(bank)}")
    dtype = torch.promote_types(torch.promote_types(query.dtype, bank.dtype), torch.float32)
    query, bank = query.to(dtype), bank.to(dtype)
    if torch.compiler.is_exporting():
        return _nearest_in_graph(query, bank, k)
    distance = query.new_empty(len(query), k)
    index = torch.empty(len(query), k, dtype=torch.int64, device=query.device)
    centre = bank.mean(0)  # distances do not change when both are centred, cancellation does
    with torch.autocast(query.device.type, enabled=False):
        for start in range(0, len(query), QUERIES):
            rows = slice(start, start + QUERIES)
            distance[rows], index[rows] = _search(query[rows], bank, centre, k)
    return distance, index


def _nearest_in_graph(query: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`nearest` by one product with the entire bank, in operations that exporters know."""
    centre = bank.mean(0)
    centred = bank - centre
    square, more = centred.square().sum(1), -len(bank) % ROW if k == 1 else 0
    if more:  # rows that are farther than all others
        centred, square = torch.nn.functional.pad(centred, (0, 0, 0, more)), torch.nn.functional.pad(square, (0, more), value=torch.inf)
    about = (query - centre) @ (-2 * centred.T) + square  # (Q, M) without ‖q‖²
    if k == 1:  # any of the rows that rounding cannot tell apart
        index = first_least(about)
        return distances(query, bank[index]), index
    index = about.topk(min(k + SPARES[-1], len(bank)), dim=1, largest=False).indices
    distance, order = distances(query, bank[index]).topk(k, dim=1, largest=False)
    return distance, index.gather(1, order)


def first_least(values: Tensor) -> Tensor:
    """The place (Q, 1) of the least of each row (Q, M), M a multiple of ROW.

    Minima of short rows come first: engines find a minimum several times as fast as its place.
    """
    rows = values.unflatten(1, (-1, ROW))  # (Q, m, ROW)
    row = rows.amin(2).argmin(1, keepdim=True)  # (Q, 1)
    within = rows.gather(1, row[:, :, None].expand(-1, -1, ROW))[:, 0].argmin(1, keepdim=True)  # (Q, 1)
    return row * ROW + within


def smallest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` smallest values of each row (Q, M), in any order, and their places: (Q, count).

    They are in the `count` short rows with the smallest minima, which are found several times as fast.
    """
    rows = values.shape[1] // ROW
    if rows < 2 * count:
        return values.topk(count, dim=1, largest=False)
    short, rest = values[:, : rows * ROW].unflatten(1, (rows, ROW)), values[:, rows * ROW :]
    row = short.amin(2).topk(count, dim=1, largest=False).indices  # (Q, count)
    value = torch.cat([short.gather(1, row[:, :, None].expand(-1, -1, ROW)).flatten(1), rest], 1)  # (Q, count · ROW + M % ROW)
    value, order = value.topk(count, dim=1, largest=False)
    within = row.gather(1, (order // ROW).clamp_max(count - 1)) * ROW + order % ROW
    return value, torch.where(order < count * ROW, within, order + (rows - count) * ROW)


def _search(query: Tensor, bank: Tensor, centre: Tensor, k: int, spares: tuple[int, ...] = SPARES) -> tuple[Tensor, Tensor]:
    approximate, candidates, slack = _propose(query, bank, centre, min(k + spares[0], len(bank)))
    candidates = candidates.sort(1).values  # so that the stable sort below gives ties to the lowest index
    step = max(1, TILE // (candidates.shape[1] * query.shape[1]))
    exact = torch.cat([distances(q, bank[c]) for q, c in zip(query.split(step), candidates.split(step), strict=True)])
    distance, order = exact.sort(dim=1, stable=True)
    distance, index = distance[:, :k], candidates.gather(1, order)[:, :k]
    if candidates.shape[1] < len(bank):
        doubtful = ~(distance[:, -1].square() < approximate.amax(1) - slack)  # a row left out may be as near; also true of NaN
        if doubtful.any():
            rest = query[doubtful], bank, centre, k
            distance[doubtful], index[doubtful] = _search(*rest, spares[1:]) if spares[1:] else _search_float64(*rest)
    return distance, index


def _propose(query: Tensor, bank: Tensor, centre: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `count` smallest squared distances (Q, count) within rounding, their indices, and the rounding error (Q,)."""
    on_cpu = query.device.type == "cpu" and query.dtype == torch.float32
    by_faiss = on_cpu and len(query) * bank.numel() >= LARGE and faiss_is_quicker()
    dtype = torch.float32 if by_faiss else product_dtype(query, bank)
    query = (query - centre).to(dtype).contiguous()
    norm = query.norm(dim=1)  # (Q,)
    largest = query.new_zeros(())
    best = query.new_empty(len(query), 0)
    index = torch.empty(len(query), 0, dtype=torch.int64, device=query.device)
    step = max(1, 4 * TILE // bank.shape[1] if by_faiss else TILE // max(len(query), bank.shape[1]))
    for start in range(0, len(bank), step):
        part = (bank[start : start + step] - centre).to(dtype).contiguous()  # (m, D)
        largest = torch.maximum(largest, part.norm(dim=1).max())
        here = min(count, len(part))
        if by_faiss:  # it needs no index here: `knn` searches the array itself, and the same tiles serve both
            value, where = (torch.from_numpy(x) for x in faiss.knn(query.numpy(), part.numpy(), here))
        else:
            square = torch.addmm(part.square().sum(1), query, part.T, alpha=-2)  # (Q, m) without ‖q‖²
            value, where = smallest(square, here)
            value = value + norm.square()[:, None]
        best, index = torch.cat([best, value], 1), torch.cat([index, where + start], 1)
        if best.shape[1] > count:
            best, order = best.topk(count, dim=1, largest=False)
            index = index.gather(1, order)
    return best, index, rounding(norm, largest, bank.shape[1])


@cache
def faiss_is_quicker() -> bool:
    """Whether faiss searches faster than torch on this processor, tried once for some milliseconds; both find the same rows.

    Their products come from different libraries, of which one may be several times as fast: with AVX-512 of an Intel Xeon torch's.
    """
    if faiss is None:
        return False
    rows = torch.rand(512, 256, generator=torch.Generator().manual_seed(0))
    searches = (lambda: faiss.knn(rows.numpy(), rows.numpy(), 2), lambda: smallest(rows @ rows.T, 2))
    by_faiss, by_torch = (min(timeit.repeat(search, number=1, repeat=5)) for search in searches)
    return by_faiss < by_torch


def _search_float64(given: Tensor, bank: Tensor, centre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Distances and indices (Q, k) by distances in float64, compared at float32's resolution, ties by index."""
    query, centre = given.double() - centre, centre.double()
    norm = query.norm(dim=1)  # (Q,)
    best = query.new_empty(len(query), 0, dtype=torch.float32)
    index = torch.empty(len(query), 0, dtype=torch.int64, device=query.device)
    step = max(1, TILE // max(len(query), bank.shape[1]))
    for start in range(0, len(bank), step):
        part = bank[start : start + step].double() - centre  # (m, D)
        square = torch.addmm(part.square().sum(1), query, part.T, alpha=-2) + norm.square()[:, None]  # (Q, m)
        equal = square <= rounding(norm, part.norm(dim=1).max(), bank.shape[1])[:, None]
        square = square.masked_fill(equal, 0).float()
        for _ in range(min(k, len(part))):
            value, where = square.min(1, keepdim=True)  # the first of equals
            best, index = torch.cat([best, value], 1), torch.cat([index, where + start], 1)
            square.scatter_(1, where, torch.inf)
        best, order = best.sort(dim=1, stable=True)
        best, index = best[:, :k], index.gather(1, order)[:, :k]
    step = max(1, TILE // (k * given.shape[1]))
    exact = torch.cat([distances(q, bank[i]) for q, i in zip(given.split(step), index.split(step), strict=True)])
    return exact, index
