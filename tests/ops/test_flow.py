"""The flow against an integral and FrEIA; the encoding against plain loops."""

import importlib.util
import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from blemish.ops.flow import ConditionalFlow, log_likelihood, positional_encoding
from blemish.ops.rng import seeded


def flow(channels: int, condition: int = 8, blocks: int = 3, clamp: float = 1.9) -> ConditionalFlow:
    """One whose every parameter is far from its first value, in float64."""
    with seeded(channels):
        made = ConditionalFlow(channels, condition, blocks, clamp).double()
        for parameter in made.parameters():
            parameter.data += torch.randn_like(parameter)
        made.rotation = torch.linalg.qr(made.rotation)[0]  # orthogonal to all digits
    return made


def projected_by(net: ConditionalFlow, condition: torch.Tensor) -> torch.Tensor:
    """What conditions (N, condition) add to the hidden units of every block, plainly: (K, N, hidden)."""
    return condition @ net.weight_condition.mT + net.bias_hidden[:, None]


def under(net: ConditionalFlow, x: torch.Tensor, projected: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The flow of vectors (…, N, C), each under a condition of its own."""
    return net(x, [projected], [torch.arange(projected.shape[1])])


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_likelihood_is_a_density():
    """Its integral over the plane is 1, whatever the condition."""
    with seeded(0):
        net = ConditionalFlow(2, 4, 3, 1.9).double()
    net.stretch.data += 0.5
    net.offset.data += 0.3
    axis = torch.linspace(-9, 9, 361, dtype=torch.float64)
    x = torch.cartesian_prod(axis, axis)
    for seed in range(2):
        projected = projected_by(net, normal(1, 4, seed=seed).expand(len(x), 4))
        integral = log_likelihood(*under(net, x, projected)).exp().sum() * (axis[1] - axis[0]) ** 2
        assert integral.item() == pytest.approx(1, abs=1e-3)


def test_leading_dimensions_share_the_conditions():
    net, x, projected = flow(5), normal(3, 6, 5), projected_by(flow(5), normal(6, 8, seed=1))
    z, log_det = under(net, x, projected)
    for i in range(3):
        one = under(net, x[i], projected)
        torch.testing.assert_close((z[i], log_det[i]), one)


def test_rotations_are_orthogonal_and_uniform():
    with seeded(0):
        rotation = ConditionalFlow(3, 4, 4000, 1.9).rotation
    torch.testing.assert_close(rotation @ rotation.mT, torch.eye(3).expand_as(rotation), atol=1e-5, rtol=0)
    # every entry of a Haar matrix has mean 0 and variance 1/n
    assert rotation.mean(0).abs().max() < 0.05
    torch.testing.assert_close(rotation.square().mean(0), torch.full((3, 3), 1 / 3), atol=0.03, rtol=0)


def test_first_weights_are_those_of_linear_layers():
    with seeded(0):
        net = ConditionalFlow(40, 60, 8, 1.9)
    bounds = {"weight_kept": 80, "weight_condition": 80, "bias_hidden": 80, "weight_out": 160, "bias_out": 160}
    for name, fan_in in bounds.items():
        values = getattr(net, name).abs()
        assert values.max() <= 1 / math.sqrt(fan_in)
        assert values.mean().item() == pytest.approx(0.5 / math.sqrt(fan_in), rel=0.1)
    assert (0.1 * F.softplus(net.stretch, beta=0.5)).sub(1).abs().max() < 1e-5


@pytest.mark.skipif(importlib.util.find_spec("FrEIA") is None, reason="FrEIA is not installed")
@pytest.mark.parametrize("channels", [5, 24])
def test_it_is_a_chain_of_freias_blocks(channels):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # FrEIA 0.2 writes escapes that Python 3.12 warns of
        from FrEIA.modules import AllInOneBlock

    def subnet(inside: int, outside: int) -> nn.Module:
        return nn.Sequential(nn.Linear(inside, 2 * inside), nn.ReLU(), nn.Linear(2 * inside, outside))

    net, condition = flow(channels, blocks=3), normal(9, 8, seed=1)
    x = expected = normal(9, channels)
    total = torch.zeros(9, dtype=torch.float64)
    for k in range(3):
        settings = {"affine_clamping": 1.9, "global_affine_type": "SOFTPLUS", "permute_soft": True}
        block = AllInOneBlock([(channels,)], [(8,)], subnet_constructor=subnet, **settings).double()
        block.subnet[0].weight.data = torch.cat([net.weight_kept[k], net.weight_condition[k]], 1).detach()
        block.subnet[0].bias.data = net.bias_hidden[k].detach()
        block.subnet[2].weight.data, block.subnet[2].bias.data = net.weight_out[k].detach(), net.bias_out[k].detach()
        block.global_scale.data, block.global_offset.data = net.stretch[k : k + 1].detach(), net.offset[k : k + 1].detach()
        block.w_perm.data = net.rotation[k]
        (expected,), log_det = block((expected,), [condition])
        total = total + log_det
    z, log_det = under(net, x, projected_by(net, condition))
    torch.testing.assert_close(z, expected)
    torch.testing.assert_close(log_det, total)


@pytest.mark.parametrize(("left", "right"), [(4, 4), (2, 6)])
def test_places_are_projected_as_their_whole_conditions(left, right):
    net, columns, rows = flow(5), normal(7, left, seed=1), normal(3, right, seed=2)
    y, x = (torch.randint(length, (40,), generator=torch.Generator().manual_seed(0)) for length in (3, 7))
    of_columns, of_rows = net.project(columns, rows)
    found, expected = of_columns[:, x] + of_rows[:, y], projected_by(net, torch.cat([columns[x], rows[y]], 1))
    torch.testing.assert_close(found, expected)
    parameters, weights = (net.weight_condition, net.bias_hidden), normal(*found.shape, seed=3)
    ours, plain = (torch.autograd.grad((projected * weights).sum(), parameters) for projected in (found, expected))
    torch.testing.assert_close(ours, plain)
    vectors = normal(40, 5, seed=4)
    torch.testing.assert_close(net(vectors, (of_columns, of_rows), (x, y)), under(net, vectors, expected))


def test_positional_encoding():
    dim, length = 8, 5
    angles = [[x * 10000 ** (-2 * k / dim) for k in range(dim // 2)] for x in range(length)]
    expected = [[f(angle) for angle in row for f in (math.sin, math.cos)] for row in angles]
    np.testing.assert_allclose(positional_encoding(dim, length), expected, atol=1e-6)
