"""Streams that depend on their numbers alone."""

import torch
from torch import nn

from blemish.ops.rng import seeded, stream


def test_a_stream_is_known_by_its_numbers():
    draws = {numbers: torch.rand(4, generator=stream(*numbers)).tolist() for numbers in [(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 1, 0)]}
    assert torch.rand(4, generator=stream(0, 1)).tolist() == draws[0, 1]
    assert len({tuple(draw) for draw in draws.values()}) == len(draws)  # numpy alone takes trailing zeros for nothing


def test_layers_come_from_the_seed_and_the_global_stream_goes_on():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with seeded(1):
        first = nn.Linear(3, 3).weight
    with seeded(1):
        second = nn.Linear(3, 3).weight
    assert torch.equal(first, second)
    assert torch.equal(torch.rand(3), expected)
