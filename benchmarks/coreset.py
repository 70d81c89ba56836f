"""How long the coreset takes, and how well it covers: `python benchmarks/coreset.py [--bank features.pt]`.

The bank is a tensor (M, D) saved with torch.save; without one, features of PatchCore's size and structure are drawn: a smooth field over
each image's grid, in directions of falling variance, as neighbouring patches of aligned images of one product give. The plain algorithm
is timed over its first centres, at its constant cost a centre. A matrix product of the bank with the centres is the yardstick, since
machines differ: it is what a single assignment of all rows to all centres costs.
"""

import argparse
import resource
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from blemish.ops import coreset


def drawn(images: int, side: int, dims: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    shared = torch.randn(1, dims, side // 4, side // 4, generator=g)
    own = torch.randn(images, dims, side // 2, side // 2, generator=g)
    field = 2 * F.interpolate(shared, (side, side), mode="bilinear") + F.interpolate(own, (side, side), mode="bilinear")
    scale = torch.arange(1, dims + 1) ** -0.5
    mix = torch.linalg.qr(torch.randn(dims, dims, generator=g))[0]
    return field.permute(0, 2, 3, 1).reshape(-1, dims) * scale @ mix


def timed(work: Callable[[], object]) -> tuple[object, float, float]:
    """What `work` gives, with its wall and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    return result, time.perf_counter() - wall, time.process_time() - cpu


def plain(bank: Tensor, count: int, start: int) -> list[int]:
    """Greedy k-center as written in textbooks: every row for every centre, in float32 as usual."""
    square, index, chosen = bank.square().sum(1), start, []
    nearest = torch.full_like(square, torch.inf)
    for _ in range(count):
        chosen.append(index)
        nearest = torch.minimum(nearest, square + square[index] - 2 * bank @ bank[index])
        index = int(nearest.argmax())
    return chosen


def product(bank: Tensor, count: int) -> None:
    centres = bank[:: max(1, len(bank) // count)][:count].T.contiguous()
    for tile in bank.split(4096):
        tile @ centres


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bank", type=Path, help="features (M, D); drawn if absent")
    parser.add_argument("--dim", type=int, default=128, help="dimensions of the projection")
    parser.add_argument("--ratio", type=float, default=0.01, help="share of the bank to keep")
    parser.add_argument("--plain", type=int, default=30, help="centres of the plain algorithm to time")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    features = torch.load(args.bank, weights_only=True) if args.bank else drawn(320, 32, 152, args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    count = round(args.ratio * len(features))
    bank, *projection = timed(lambda: coreset.project(features, args.dim, generator))
    _, *multiplied = timed(lambda: product(bank, count))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    chosen, *lazy = timed(lambda: coreset.farthest_first(bank, count, 0))
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    first = min(args.plain, count)
    reference, *slow = timed(lambda: plain(bank, first, 0))

    print(f"bank {tuple(features.shape)}, projected to {bank.shape[1]}, {count} centres, {torch.get_num_threads()} threads")
    print(f"{'':34}{'wall s':>9}{'CPU s':>9}{'of a product':>14}")
    rows = [("projection", projection), ("matrix product bank × centres", multiplied), ("farthest first", lazy)]
    rows.append((f"plain, {first} centres × {count / first:.0f}", [x * count / first for x in slow]))
    for name, (wall, cpu) in rows:
        print(f"{name:34}{wall:9.2f}{cpu:9.2f}{cpu / multiplied[1]:14.2f}")
    print(f"further peak memory {memory:.0f} MiB for a bank of {bank.nbytes / 2**20:.0f} MiB")
    print(f"first {first} centres as the plain algorithm's: {reference == chosen.indices[:first].tolist()}")
    steps = sorted({1, count // 100, count // 10, count // 2, count} - {0})
    print("covering radius after " + ", ".join(f"{n}: {chosen.radius[n - 1]:.4g}" for n in steps))


if __name__ == "__main__":
    main()
