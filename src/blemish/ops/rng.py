"""Named random streams, which do not depend on what was drawn elsewhere."""

import contextlib
from collections.abc import Iterator

import numpy as np
import torch


def stream(*numbers: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator for these non-negative numbers alone: the seed, then for instance a step and a process."""
    return torch.Generator(device).manual_seed(int(np.random.SeedSequence([len(numbers), *numbers]).generate_state(1, np.uint64)[0] >> 1))


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """A block in which layers draw their first weights from `seed`; torch's global CPU stream is restored afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
