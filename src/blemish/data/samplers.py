"""The order in which images and tiles are drawn, and the share of each process."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import numpy as np
import torch
from torch.utils.data import Sampler

from blemish.data.tiles import MIXED
from blemish.edge.errors import InputError
from blemish.ops.rng import stream


def shuffled(items: Sequence, seed: int) -> list:
    """The items in the seeded order in which a data set without an official split draws one."""
    # a stream of its own: the hold-out for calibration draws from the plain seed
    return [items[i] for i in np.random.default_rng([seed, 1]).permutation(len(items))]


class Shuffled(Sampler):
    """An order of `count` rows drawn anew each epoch from seed and epoch alone, so that a resumed training sees what it would have seen."""

    def __init__(self, count: int, seed: int):
        self.count, self.seed, self.epoch = count, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch; who iterates by hand gets one epoch after the other."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(self.count, generator=stream(self.seed, self.epoch))
        self.epoch += 1
        return iter(order.tolist())


class ShuffledTiles(Sampler):
    """An order of tiles drawn anew each epoch from seed and epoch: images at random, and among as many as stay decoded their tiles.

    `counts` and `pixels` are those of each image, whose tiles follow one another.
    """

    def __init__(self, counts: Sequence[int], pixels: Sequence[int], seed: int):
        self.counts, self.pixels, self.seed, self.epoch = counts, pixels, seed, 0
        self.first = np.cumsum([0, *counts])

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch; who iterates by hand gets one epoch after the other."""
        self.epoch = epoch

    def __len__(self) -> int:
        return int(self.first[-1])

    def __iter__(self) -> Iterator[int]:
        generator = stream(self.seed, self.epoch)
        self.epoch += 1
        group, held = [], 0
        for image in torch.randperm(len(self.counts), generator=generator).tolist():
            if group and held + self.pixels[image] > MIXED:
                yield from self._mixed(group, generator)
                group, held = [], 0
            group.append(image)
            held += self.pixels[image]
        yield from self._mixed(group, generator)

    def _mixed(self, images: list[int], generator: torch.Generator) -> list[int]:
        rows = np.concatenate([np.arange(self.first[i], self.first[i + 1]) for i in images])
        return rows[torch.randperm(len(rows), generator=generator).numpy()].tolist()


def by_image(counts: Iterable[int], batch_size: int) -> list[list[int]]:
    """Batches of rows in their order, none of which holds tiles of two images; `counts` are those of each image's tiles."""
    batches, first = [], 0
    for count in counts:
        batches += [list(range(begin, min(begin + batch_size, first + count))) for begin in range(first, first + count, batch_size)]
        first += count
    return batches


class FixedLengthSampler(Sampler):
    """`count` rows an epoch, of a sampler that draws an order of all rows for each epoch.

    Fewer than all are the first of that epoch's order. More are the next ones of all orders laid end to end, so that rows come equally
    often, but for one time. A resumed training sees what it would have seen. Inside `full_pass` an epoch is every row once.
    """

    def __init__(self, sampler: Shuffled | ShuffledTiles, count: int):
        self.sampler, self.count, self.epoch, self.all = sampler, count, 0, False

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    @contextlib.contextmanager
    def full_pass(self) -> Iterator[None]:
        self.all = True
        try:
            yield
        finally:
            self.all = False

    def __len__(self) -> int:
        return len(self.sampler) if self.all else self.count

    def __iter__(self) -> Iterator[int]:
        if self.all:
            self.sampler.set_epoch(0)
            yield from self.sampler
            return
        rows = len(self.sampler)
        order, seen = divmod(self.epoch * self.count, rows) if self.count > rows else (self.epoch, 0)
        self.epoch += 1
        left = self.count
        while left:
            self.sampler.set_epoch(order)
            part = list(islice(self.sampler, seen, seen + left))
            yield from part
            order, seen, left = order + 1, 0, left - len(part)


class ShardedBatchSampler(Sampler):
    """One process's share of every batch, so that all processes together see the batches that one alone would see, each image once.

    A last batch of fewer images than processes joins the one before. InputError if there are fewer images than processes.
    """

    def __init__(self, sampler: Shuffled | FixedLengthSampler, batch_size: int, process: int, processes: int):
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
