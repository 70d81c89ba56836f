"""What one-pass methods remember of their training images: all rows, or their moments; batch by batch, and of all processes together."""

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

from blemish.ops.gaussian import merge_moments


def distributed() -> bool:
    """Whether this process is one of a group."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


class RowBuffer(Metric):
    """Rows (count, …) of all batches, in one allocation of `capacity` rows that is never copied to grow."""

    full_state_update = False

    def __init__(self, capacity: int):
        super().__init__(sync_on_compute=False, compute_with_cache=False)  # `gather` is called once
        self.capacity = capacity
        self.add_state("rows", torch.empty(0), dist_reduce_fx="cat")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, rows: Tensor) -> None:
        if self.count == 0:
            self.rows = rows.new_empty(self.capacity, *rows.shape[1:])
        begin = int(self.count)
        self.rows[begin : begin + len(rows)] = rows
        self.count += len(rows)

    def gather(self) -> None:
        """Give every process the rows of all."""
        if distributed():
            self.rows = torch.cat(gather_all_tensors(self.compute()))
            self.count = torch.full_like(self.count, len(self.rows))

    def compute(self) -> Tensor:
        return self.rows[: int(self.count)]


class RunningCovariance(Metric):
    """Count, mean (P, d) and scatter Σ(x-μ)(x-μ)ᵀ (P, d, d) of the samples (n, P, d) of all batches.

    pooled: samples (…, d) of one distribution, P = 1.
    """

    full_state_update = False

    def __init__(self, pooled: bool = False):
        super().__init__(sync_on_compute=False, compute_with_cache=False)
        self.pooled = pooled
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("mean", torch.empty(0), dist_reduce_fx=None)
        self.add_state("scatter", torch.empty(0), dist_reduce_fx=None)

    def update(self, samples: Tensor) -> None:
        samples = samples.flatten(0, -2)[:, None] if self.pooled else samples  # of any number of axes
        if self.count == 0:
            positions, dim = samples.shape[1:]
            self.mean, self.scatter = samples.new_zeros(positions, dim), samples.new_zeros(positions, dim, dim)
        self.count += merge_moments(int(self.count), self.mean, self.scatter, samples.transpose(0, 1)) - self.count

    def restore(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        """Start from moments that were computed earlier."""
        self.count, self.mean, self.scatter = torch.full_like(self.count, count), mean.clone(), scatter

    def gather(self) -> None:
        """Give every process the moments of all (Chan's formula for two sets)."""
        if distributed():
            counts, means = gather_all_tensors(self.count), gather_all_tensors(self.mean)
            total = sum(counts)
            mean = sum(m * (n / total) for m, n in zip(means, counts, strict=True))
            delta = self.mean - mean
            self.scatter += self.count * delta[:, :, None] * delta[:, None, :]
            torch.distributed.all_reduce(self.scatter)
            self.mean, self.count = mean, total

    def compute(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.count, self.mean, self.scatter
