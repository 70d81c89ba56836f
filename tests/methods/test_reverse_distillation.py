"""Reverse distillation against its equations written plainly, and its networks against the paper's."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from support import images, make

from blemish.edge.errors import InputError
from blemish.methods.reverse_distillation import Decoder, Embedding, Shape, shapes_of
from blemish.types import Batch


def reverse(**changes):
    return make("reverse_distillation", **changes)


def batch(maps):
    n = len(maps[0])
    return Batch(torch.empty(n, 0, 64, 64), torch.zeros(n, dtype=torch.long), torch.zeros(n, 64, 64, dtype=torch.uint8), [""] * n, maps)


def cosine(a, b):
    return np.sum(a * b) / (np.linalg.norm(a) * np.linalg.norm(b))


def both(model, pictures):
    """Teacher's and decoder's maps as float64 arrays (B, C, h, w)."""
    with torch.no_grad():
        taught = model.features(pictures)
        return [[m.double().numpy() for m in maps] for maps in (taught, model.restored(taught))]


def plain_maps(model, pictures):
    """Eq. 1 position by position."""
    found = []
    for t, r in zip(*both(model, pictures), strict=True):
        distance = np.zeros((len(t), *t.shape[2:]))
        for b, i, j in np.ndindex(distance.shape):
            distance[b, i, j] = 1 - cosine(t[b, :, i, j], r[b, :, i, j])
        found.append(distance)
    return found


def test_position_loss_is_the_papers():
    model = reverse(loss="position").eval()
    expected = sum(distance.mean() for distance in plain_maps(model, images(3)))  # eq. 2
    assert model.loss(batch(model.features(images(3)))).item() == pytest.approx(expected, rel=1e-4)


def test_flattened_loss_takes_one_cosine_a_stage():
    model = reverse().eval()
    expected = sum(
        np.mean([1 - cosine(t[b].ravel(), r[b].ravel()) for b in range(3)]) for t, r in zip(*both(model, images(3)), strict=True)
    )
    assert model.loss(batch(model.features(images(3)))).item() == pytest.approx(expected, rel=1e-4)


@torch.no_grad()
def test_map_is_the_blurred_sum_of_the_upsampled_stages():
    model, pictures = reverse().eval(), images(2, seed=1)
    up = [F.interpolate(torch.from_numpy(m)[:, None], (64, 64), mode="bilinear", align_corners=False) for m in plain_maps(model, pictures)]
    expected = np.stack([gaussian_filter(m, 4.0, mode="reflect", truncate=4) for m in sum(up)[:, 0].numpy()])
    score, map = model(pictures)
    np.testing.assert_allclose(map, expected, rtol=1e-3)
    np.testing.assert_allclose(score, expected.max((1, 2)), rtol=1e-3)


# weights of conv k×k from a to b, and the 2·b of its BatchNorm
def weights(k, a, b):
    return k * k * a * b + 2 * b


def test_networks_are_the_papers_for_resnet18():
    """Counted layer by layer from the description: two blocks a stage, 64, 128, 256 and 512 channels."""
    model = reverse(backbone="resnet18")
    fusion = weights(3, 64, 128) + 2 * weights(3, 128, 256)
    bottleneck = weights(3, 768, 512) + 3 * weights(3, 512, 512) + weights(1, 768, 512)
    decoder = sum(2 * weights(2, a, b) + 3 * weights(3, b, b) for a, b in ((512, 256), (256, 128), (128, 64)))
    assert sum(p.numel() for p in model.embedding.parameters()) == fusion + bottleneck
    assert sum(p.numel() for p in model.decoder.parameters()) == decoder


def test_networks_are_the_papers_for_wide_resnet50():
    shapes, beyond = shapes_of("wide_resnet50_2", [1, 2, 3])
    assert shapes == [Shape(256, 3, 128), Shape(512, 4, 256), Shape(1024, 6, 512)]
    assert beyond == Shape(2048, 3, 1024)  # the official code calls its embedding with width_per_group=128
    fusion = weights(3, 256, 512) + 2 * weights(3, 512, 1024)
    inside = weights(3, 1024, 1024) + weights(1, 1024, 2048)
    bottleneck = weights(1, 3072, 1024) + inside + weights(1, 3072, 2048) + 2 * (weights(1, 2048, 1024) + inside)
    assert fusion + bottleneck == 58_885_120  # counted in the official code, without the layers that it does not use
    decoder = 0
    for blocks, into, hidden, width in ((3, 2048, 512, 1024), (4, 1024, 256, 512), (6, 512, 128, 256)):
        first = weights(1, into, hidden) + weights(2, hidden, hidden) + weights(1, hidden, width) + weights(2, into, width)
        decoder += first + (blocks - 1) * (weights(1, width, hidden) + weights(3, hidden, hidden) + weights(1, hidden, width))
    with torch.device("meta"):
        embedding, mirror = Embedding(shapes, beyond), Decoder(shapes, beyond, [False] * 3)
    assert sum(p.numel() for p in embedding.parameters()) == fusion + bottleneck
    assert sum(p.numel() for p in mirror.parameters()) == decoder


@pytest.mark.parametrize("backbone", ["test_resnet", "resnet18", "tf_efficientnet_lite0", "mobilenetv3_small_050", "convnext_atto"])
def test_decoder_gives_the_maps_of_any_network(backbone):
    model = reverse(backbone=backbone)
    maps = model.features(images(2))
    restored = model.restored(maps)
    assert [m.shape for m in restored] == [m.shape for m in maps]
    for taught, learnt in zip(maps, restored, strict=True):
        assert bool((learnt < 0).any()) == bool((taught < 0).any())  # a ReLU where the network has one
    model.loss(batch(maps)).backward()
    learning = [*model.embedding.parameters(), *model.decoder.parameters()]
    assert all(p.grad is not None for p in learning)
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in learning}


@torch.no_grad()
def test_odd_grids_of_a_network_that_rounds_down():
    model = reverse(backbone="convnext_atto").eval()
    for size in ((65, 97), (33, 40)):
        assert model(torch.rand(1, 3, *size)).map.shape == (1, *size)


@pytest.mark.parametrize("stages", [[2, 3], [1, 2], [3]])
def test_fewer_stages(stages):
    model = reverse(stages=stages)
    assert model(images(2)).map.shape == (2, 64, 64)
    assert len(model.embedding.descents) == len(stages) - 1


def test_a_network_that_ends_at_the_last_stage():
    assert shapes_of("resnet50", [3, 4])[1] == Shape(4096, 3, 1024)
    shapes, beyond = shapes_of("test_resnet", [3, 4])
    assert shapes == [Shape(192, 1, 48), Shape(96, 1, None)]
    assert beyond == Shape(192, 1, None)


def test_a_single_value_for_batchnorm_is_refused():
    model = reverse()
    with pytest.raises(InputError, match="image_size"):
        model.loss(batch(model.features(images(1, side=32))))
    model.loss(batch(model.features(images(2, side=32))))
