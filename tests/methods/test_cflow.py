"""CFlow: its fibre batches, loss, schedule and map against plain versions."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import batch, images, make, trained_by_lightning

from blemish.edge.errors import InputError
from blemish.methods.cflow import CFlow, learning_rate_factor
from blemish.ops.flow import ConditionalFlow, log_likelihood, positional_encoding


def cflow(fibre_batch=64) -> CFlow:
    return make("cflow", stages=[1, 2], blocks=2, condition=16, fibre_batch=fibre_batch, learning_rate=2e-3)


def full_encoding(dim: int, height: int, width: int) -> torch.Tensor:
    """(height·width, dim) plainly: the column's encoding, then the row's."""
    columns, rows = positional_encoding(dim // 2, width), positional_encoding(dim // 2, height)
    return torch.stack([torch.cat([columns[x], rows[y]]) for y in range(height) for x in range(width)])


def under(flow: ConditionalFlow, x: torch.Tensor, condition: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The flow of vectors (n, C) under conditions (n, condition), which are projected plainly."""
    projected = condition @ flow.weight_condition.mT + flow.bias_hidden[:, None]
    return flow(x, [projected], [torch.arange(len(condition))])


def test_fibre_batches_hold_every_position_once_with_its_own_place():
    model = cflow(fibre_batch=100)
    maps = model.features(images(3))
    found = list(model.fibre_batches(maps))
    for stage, map in enumerate(maps):
        parts = [(x, full_encoding(16, *map.shape[-2:])[places]) for s, x, places, _ in found if s == stage]
        assert len(parts) == len(map) * map[0, 0].numel() // 100
        assert all(100 <= len(x) < 200 for x, _ in parts)
        got = torch.cat([torch.cat(part, 1) for part in parts])
        encodings = full_encoding(16, *map.shape[-2:]).repeat(3, 1)
        expected = torch.cat([map.permute(0, 2, 3, 1).flatten(0, 2), encodings], 1)
        assert not torch.equal(got, expected)  # in another order
        assert {tuple(row) for row in got.tolist()} == {tuple(row) for row in expected.tolist()}
    assert [one.stage for one in found] == sorted(one.stage for one in found)


def test_loss_takes_the_fibre_batches_one_by_one():
    model, one = cflow(), batch(images(2))
    expected = []
    with torch.no_grad():
        for stage, x, places, (columns, rows) in model.fibre_batches(model.maps(one)):
            condition = full_encoding(16, len(rows), len(columns))[places]
            z, log_det = (part.double().numpy() for part in under(model.flows[stage], x, condition))
            channels = z.shape[1]
            log_p = -0.5 * (z**2).sum(1) - channels * 0.5 * np.log(2 * np.pi) + log_det
            expected.append(np.log1p(np.exp(-log_p / channels)).mean())
        got = [float(model.loss(one)) for _ in expected]
    assert not model.queue
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_a_step_in_parts_has_the_loss_and_gradient_of_one(monkeypatch):
    found = []
    for rows in (10**6, 30):
        monkeypatch.setattr("blemish.methods.cflow.ROWS", rows)
        model = cflow(fibre_batch=100)
        loss = model.loss(batch(images(2)))
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.flows[0].parameters())])
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-7)


def test_schedule_is_that_of_the_official_code():
    """25 meta epochs of 8 passes over 5 batches, as its nested loops set the rate."""
    t = 0
    for epoch in range(25):
        for sub in range(8):
            for i in range(5):
                rate = 1e-3 + (1 - 1e-3) * (1 + math.cos(math.pi * epoch / 25)) / 2
                if epoch < 2:
                    target = 1e-3 + (1 - 1e-3) * (1 + math.cos(math.pi * 2 / 25)) / 2
                    rate = 0.1 + (sub * 5 + i + epoch * 40) / 80 * (target - 0.1)
                assert learning_rate_factor((t + 1e-9) / 1000) == pytest.approx(rate, rel=1e-6)
                t += 1


def test_a_training_steps_once_per_fibre_batch_and_follows_the_schedule():
    model, rates, steps = cflow(), [], 0

    class Watched(CFlow):
        def optimizer_step(self, epoch, index, optimizer, closure):
            nonlocal steps
            rates.append(optimizer.param_groups[0]["lr"])
            super().optimizer_step(epoch, index, optimizer, closure)
            steps = int(next(iter(optimizer.state.values()))["step"])

    model.__class__ = Watched
    trained_by_lightning(model, images(16), epochs=3)
    assert steps == 6 * 8 * 16 * 16 // 64  # of the first stage's flow: 16×16 positions
    np.testing.assert_allclose(rates, [2e-3 * learning_rate_factor(t / 6) for t in range(6)])


def test_the_scale_is_the_likeliest_training_vector():
    model, train = cflow(), [batch(images(4)), batch(images(3, seed=1))]
    with torch.no_grad():
        model.after_training(train)
        logs = [model.likelihood(model.maps(part)) for part in train]
    expected = [max(float(part[stage].max()) for part in logs) for stage in range(2)]
    np.testing.assert_allclose(model.highest, expected)


@torch.no_grad()
def test_map_is_in_the_order_of_the_official_one():
    model = cflow().eval()
    model.after_training([batch(images(6))])
    score, map = model(images(2, seed=1))
    maps, total = model.features(images(2, seed=1)), 0
    for flow, map_s, top in zip(model.flows, maps, model.highest, strict=True):
        height, width = map_s.shape[-2:]
        x = map_s.permute(0, 2, 3, 1).flatten(1, 2)
        condition = full_encoding(16, height, width)
        logs = torch.stack([log_likelihood(*under(flow, one, condition)) for one in x]) / map_s.shape[1]
        relative = (logs.double() - top).exp().view(2, 1, height, width)
        total = total + F.interpolate(relative, (64, 64), mode="bilinear", align_corners=False)[:, 0]
    torch.testing.assert_close((-map.double()).exp(), total, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(score, map.amax((1, 2)))


@torch.no_grad()
def test_a_very_unlikely_image_has_a_finite_score():
    model = cflow().eval()
    model.highest += 1e4
    score, map = model(images(1))
    assert score.isfinite().all()
    assert map.isfinite().all()


def test_accumulated_gradients_are_refused():
    with pytest.raises(InputError, match="accumulate_grad_batches"):
        trained_by_lightning(cflow(), images(8), epochs=1, accumulate_grad_batches=2)
