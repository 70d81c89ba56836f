"""The order in which images and tiles are drawn, and each process's share of it."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Sampler

from blemish.edge.errors import InputError
from blemish.ops.rng import stream


def shuffled(items: Sequence, seed: int) -> list:
    """The items in a seeded random order, for splits that a data set does not define."""
    # a stream of its own: the hold-out for calibration draws from the plain seed
    return [items[i] for i in np.random.default_rng([seed, 1]).permutation(len(items))]


def seeded_share(items: Sequence, share: float, seed: int) -> list:
    """A random share of the items, at least one."""
    return shuffled(items, seed)[: max(1, round(share * len(items)))]


def shuffle_tiles(counts: Sequence[int], pixels: Sequence[int], most: int, generator: torch.Generator) -> list[int]:
    """A random order of tiles in which only tiles of a few images are mixed, as many images as have `most` pixels together.

    counts, pixels: of each image; the tiles of an image are consecutive rows.
    """
    rows = np.split(np.arange(sum(counts)), np.cumsum(counts)[:-1])  # of each image
    groups, held = [[]], 0
    for image in torch.randperm(len(counts), generator=generator).tolist():
        if groups[-1] and held + pixels[image] > most:
            groups.append([])
            held = 0
        groups[-1].append(rows[image])
        held += pixels[image]
    mixed = [np.concatenate(group) for group in groups if group]
    return [int(row) for group in mixed for row in group[torch.randperm(len(group), generator=generator).numpy()]]


class Shuffled(Sampler):
    """A random order of rows for each epoch that depends on seed and epoch alone, so that a resumed training continues it.

    epoch_size: rows of an epoch, None for every row once. Fewer than all rows are the first of the epoch's order; more are taken from all
    orders laid end to end, so that no row comes more than once more often than another. draw: returns an order of the rows given a
    generator, by default any permutation.
    """

    def __init__(self, rows: int, seed: int, epoch_size: int | None = None, draw: Callable[[torch.Generator], list[int]] | None = None):
        self.rows, self.seed, self.epoch_size, self.draw = rows, seed, epoch_size, draw
        self.epoch, self.complete = 0, False

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch; iterating by hand advances the epoch as well."""
        self.epoch = epoch

    @contextlib.contextmanager
    def full_pass(self) -> Iterator[None]:
        """In the block an epoch is every row once."""
        self.complete = True
        try:
            yield
        finally:
            self.complete = False

    def __len__(self) -> int:
        return self.rows if self.complete or self.epoch_size is None else self.epoch_size

    def __iter__(self) -> Iterator[int]:
        if self.complete and self.epoch_size is not None:
            yield from self.order(0)
            return
        left = len(self)
        order, first = divmod(self.epoch * left, self.rows) if left > self.rows else (self.epoch, 0)
        self.epoch += 1
        while left:
            part = self.order(order)[first : first + left]
            yield from part
            order, first, left = order + 1, 0, left - len(part)

    def order(self, epoch: int) -> list[int]:
        generator = stream(self.seed, epoch)
        return self.draw(generator) if self.draw else torch.randperm(self.rows, generator=generator).tolist()


class ShardedBatchSampler(Sampler):
    """One process's share of every batch: together the processes see the batches of a single process, each image once.

    A last batch with fewer images than processes joins the one before. Raises InputError if there are fewer images than processes.
    """

    def __init__(self, sampler: Shuffled, batch_size: int, process: int, processes: int):
        if len(sampler) < processes or batch_size < processes:
            found = f"{len(sampler)} images in batches of {batch_size} for {processes} processes"
            raise InputError(f"trainer.devices: {found}; expected an image of every batch for each")
        self.sampler, self.process, self.processes = sampler, process, processes
        self.starts = list(range(0, len(sampler), batch_size))  # of the batches of all processes
        if len(sampler) - self.starts[-1] < processes:
            self.starts.pop()

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[list[int]]:
        order = list(self.sampler)
        for start, end in zip(self.starts, [*self.starts[1:], len(order)], strict=True):
            yield order[start:end][self.process :: self.processes]
