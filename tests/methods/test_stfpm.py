"""STFPM against its equations written plainly, and its student."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support import batch, images, make
from torch import nn

from blemish.features.extractor import create
from blemish.methods.stfpm import matching_error


def plain_errors(model, pictures):
    """Eq. 1 position by position in float64, from the two networks called by hand."""
    x = (pictures - 0.5) / 0.5  # the test network's own normalisation
    with torch.no_grad():
        teacher, student = create("test_resnet", [1, 2, 3], "random", 0, named=False)(x), model.student(x)
    found = []
    for t, s in zip(teacher, student, strict=True):
        t, s = (m.permute(0, 2, 3, 1).double().numpy() for m in (t, s))  # (B, h, w, C)
        error = np.zeros(t.shape[:3])
        for at in np.ndindex(error.shape):
            error[at] = 0.5 * np.sum((t[at] / np.linalg.norm(t[at]) - s[at] / np.linalg.norm(s[at])) ** 2)
        found.append(error)
    return found


@pytest.mark.parametrize("training", [True, False])
def test_loss_is_the_papers(training):
    model = make("stfpm").train(training)
    expected = sum(error.mean((1, 2)).mean() for error in plain_errors(model, images(4)))  # eq. 2, eq. 3, mean over the batch
    assert model.loss(batch(images(4))).item() == pytest.approx(expected, rel=1e-4)


@torch.no_grad()
def test_map_is_the_product_of_the_upsampled_stages():
    model, pictures = make("stfpm").eval(), images(3, seed=1)
    expected = 1
    for error in plain_errors(model, pictures):
        expected = expected * F.interpolate(torch.from_numpy(error)[:, None], (64, 64), mode="bilinear", align_corners=False)[:, 0]
    score, map = model(pictures)
    np.testing.assert_allclose(map, expected, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(score, expected.amax((1, 2)), rtol=1e-3)


@given(st.integers(0, 2**31), st.floats(0.01, 100), st.floats(0.01, 100))
@settings(max_examples=30)
def test_error_knows_directions_only(seed, a, b):
    t, s = torch.randn(2, 2, 5, 3, 4, generator=torch.Generator().manual_seed(seed))
    error = matching_error(t, s)
    torch.testing.assert_close(matching_error(a * t, b * s), error, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(error, 1 - F.cosine_similarity(t, s, dim=1), rtol=1e-4, atol=1e-6)
    assert matching_error(t, 3 * t).abs().max() < 1e-12
    torch.testing.assert_close(matching_error(t, -t), torch.full((2, 3, 4), 2.0))


@pytest.mark.parametrize("backbone", ["test_resnet", "resnet18", "tf_efficientnet_lite0"])
def test_student_is_the_teachers_network_with_weights_of_its_own(backbone):
    model = make("stfpm", backbone=backbone)
    assert all(parameter.requires_grad for parameter in model.student.parameters())
    assert any(isinstance(part, nn.BatchNorm2d) for part in model.student.modules())
    taught, learnt = model.features(images(2)), model.student(images(2))
    assert [m.shape for m in taught] == [m.shape for m in learnt]
    errors = model.errors(images(2), taught)
    assert all(error.min() > 0 for error in errors)  # nowhere the same network by accident
    sum(error.mean() for error in errors).backward()
    assert all(parameter.grad is not None for parameter in model.student.parameters())
    assert not any(m.requires_grad for m in taught)
