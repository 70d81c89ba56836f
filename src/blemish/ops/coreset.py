"""The rows of a memory bank that cover all others best: greedy k-center (Gonzalez 1985), as PatchCore thins its bank."""

from typing import NamedTuple

import torch
from torch import Generator, Tensor

from blemish.edge.errors import InputError
from blemish.ops.neighbours import distances, nearest, product_dtype, rounding

POOL = 2048  # candidates among which centres are chosen between two refreshes
LIVE = 0.98  # rows nearer to a centre than this share of the covering radius wait, stale, until the radius has come down to them
SHORT = 16  # centres whose minimum is looked at before each of them
TILE = 2**20  # approximate distances held at a time: large enough for the matrix product, small enough for the cache


class Coreset(NamedTuple):
    """Centres in the order of choice, so that the first n of them are the coreset of size n."""

    indices: Tensor  # (n,) int64, distinct
    radius: Tensor  # (n,) covering radius after each centre: the largest distance of any row to its nearest centre


@torch.no_grad()
def farthest_first(bank: Tensor, count: int, start: int | Generator | Tensor) -> Coreset:
    """Greedy k-center of bank (M, D), `count` ≤ M: each centre is the farthest row (L2) from the earlier ones, ties by index.

    The result is that of the plain algorithm, which looks at every row for every centre; distances are compared in float64.
    `start` is the first centre, draws it, or holds earlier centres (G, D) to continue from. InputError if a value is not finite.
    """
    if isinstance(start, Generator):
        start = int(torch.randint(len(bank), (1,), generator=start, device=start.device))
    with torch.autocast(bank.device.type, enabled=False):
        search = _Search(bank if bank.dtype == torch.float64 else bank.float(), count)
        if isinstance(start, Tensor):
            search.continue_from(start.to(bank))
        else:
            search.take(start, torch.inf)
            search.distance[start] = -1  # never chosen twice
        return search.finish()


class _Search:
    """Farthest-first in which most distances are stale.

    Distances to the nearest centre only fall, so a distance that ignores the latest centres is an upper bound. The largest is
    therefore the true maximum as soon as it is up to date, and most rows need not be looked at for most centres:
    `_refresh` brings the farthest rows up to date, for all new centres in one matrix product; `_choose` takes centres from the
    farthest of these for as long as the best of them is at least the bound of every other row.
    """

    def __init__(self, bank: Tensor, count: int) -> None:
        self.bank, self.count = bank, count
        # The matrix product only tells which pairs can matter; differences decide where its rounding leaves doubt.
        self.rows = (bank - bank.mean(0)).to(product_dtype(bank))  # (M, D)
        self.norm = self.rows.norm(dim=1)  # (M,)
        if not self.norm.square().isfinite().all():
            raise InputError("bank: NaN, infinity or values whose squares overflow, a coreset needs finite features")
        self.distance = bank.new_full((len(bank),), torch.inf, dtype=torch.float64)  # (M,) to the nearest of the first `seen` centres
        self.seen = torch.zeros(len(bank), dtype=torch.int64, device=bank.device)  # (M,)
        self.indices = torch.empty(count + 1, dtype=torch.int64, device=bank.device)  # one more: its distance is the last radius
        self.radius = self.distance.new_zeros(count + 1)
        self.found = 0

    def continue_from(self, centres: Tensor) -> None:
        index = nearest(self.bank, centres, 1)[1][:, 0]
        parts = zip(self.distance.split(TILE), self.bank.split(TILE), index.split(TILE), strict=True)
        for distance, rows, at in parts:
            distance.copy_(distances(rows.double(), centres[at, None].double())[:, 0])

    def finish(self) -> Coreset:
        while self.found <= self.count:
            farthest = self.distance.max()
            if farthest <= 0:  # the rest are copies of centres, or nothing
                rest = (self.distance == 0).nonzero()[: self.count - self.found, 0]
                self.indices[self.found : self.found + len(rest)] = rest
                break
            live = (self.distance >= LIVE * farthest).nonzero()[:, 0]
            stale = live[self.seen[live] < self.found]
            if len(stale):
                self._refresh(stale)
            else:
                self._choose(live)
        return Coreset(self.indices[: self.count], self.radius[1:].to(self.bank.dtype))

    def take(self, index: int, radius: float) -> None:
        self.indices[self.found], self.radius[self.found] = index, radius
        self.found += 1

    def _refresh(self, stale: Tensor) -> None:
        stale = stale[self.seen[stale].argsort()]
        first, done = self.seen[stale].tolist(), 0
        while done < len(stale):
            new = self.indices[first[done] : self.found]  # all that any row of the tile has not seen
            short = SHORT if len(new) >= 2 * SHORT else 1
            new = torch.cat([new, new[-1:].expand(-len(new) % short)])  # the last one again, until all groups have `short`
            row = stale[done : done + max(1, TILE // max(len(new), self.bank.shape[1]))]
            done += len(row)
            norm, other = self.norm[row], self.norm[new]
            square = torch.addmm(other.square(), self.rows[row], self.rows[new].T, alpha=-2)  # (m, n) without ‖row‖²
            slack = rounding(norm, other.max(), self.bank.shape[1])  # (m,)
            parts = square.unflatten(1, (short, -1))
            least = parts.amin(1)  # (m, n / short)
            # A centre matters if it may be nearer than those seen before, and may be the nearest of the new ones.
            limit = torch.minimum(self.distance[row].square().to(norm.dtype) - norm.square() + slack, least.amin(1) + 2 * slack)
            at, part = (least <= limit[:, None]).nonzero().unbind(1)
            pair, place = (parts[at, :, part] <= limit[at, None]).nonzero().unbind(1)
            at, centre = row[at[pair]], new[place * least.shape[1] + part[pair]]
            step = max(1, TILE // self.bank.shape[1])
            for i, j in zip(at.split(step), centre.split(step), strict=True):
                exact = distances(self.bank[i].double(), self.bank[j, None].double())[:, 0]
                self.distance.scatter_reduce_(0, i, exact, "amin")
        self.seen[stale] = self.found

    def _choose(self, live: Tensor) -> None:
        pool = live
        if len(live) > POOL:
            distance = self.distance[live]
            least = distance.topk(POOL).values[-1]
            above = live[distance > least]
            # Of equals the lowest indices, so that a tie between pool and outside cannot exclude the lowest index for ever.
            pool = torch.cat([above, live[distance == least][: POOL - len(above)]]).sort().values
        outside = self.distance.index_fill(0, pool, -1)
        bound, tied = float(outside.max()), int(outside.argmax())
        rows, distance = self.bank[pool].double(), self.distance[pool]
        while self.found <= self.count:
            best, at = distance.max(0)  # the first of equals
            best, index = float(best), int(pool[at])
            if best <= 0 or best < bound or (best == bound and tied < index):
                break
            self.take(index, best)
            distance = torch.minimum(distance, distances(rows[at], rows))
            distance[at] = -1
        self.distance[pool], self.seen[pool] = distance, self.found


def project(bank: Tensor, dim: int, generator: Generator) -> Tensor:
    """Sparse random projection (M, dim) of bank (M, D) that preserves distances in expectation (Li, Hastie, Church 2006).

    Entries are ±√(√D / dim), each sign with probability 1 / (2√D), else 0. A bank of no more than `dim` dimensions is returned as it is.
    """
    dims = bank.shape[1]
    if dim >= dims:
        return bank
    draw = torch.rand(dims, dim, generator=generator, device=generator.device, dtype=torch.float64)
    half = 0.5 / dims**0.5
    sign = (draw < half).double() - (draw >= 1 - half).double()  # (D, dim)
    with torch.autocast(bank.device.type, enabled=False):
        return bank @ (sign * (dims**0.5 / dim) ** 0.5).to(bank)
