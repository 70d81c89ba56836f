"""RIAD: its similarity against a plain one, masks that are a partition, and pixels that are not seen."""

from functools import partial

import numpy as np
import pytest
import torch
from scipy import ndimage
from skimage.metrics import structural_similarity
from support import batch, images, make

from blemish.methods import riad
from blemish.methods.riad import draw_masks, gradient_magnitude, similarities, similarity


def model_of(**changes):
    return make("riad", **{"channels": 4, **changes})


def plain_gms(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Gradient magnitude similarity of two grey images with scipy's Prewitt filter."""

    def magnitude(x):
        return np.hypot(ndimage.prewitt(x, 0, mode="nearest") / 3, ndimage.prewitt(x, 1, mode="nearest") / 3)

    g, h = magnitude(a), magnitude(b)
    return (2 * g * h + 0.0026) / (g**2 + h**2 + 0.0026)


def test_similarity_is_that_of_scipy():
    image, other = images(2, 0).double(), images(2, 1).double()
    found = similarities(image, other, 4)
    for level in range(4):
        for i in range(2):
            a, b = (x[i].mean(0).numpy().reshape(64 >> level, 1 << level, 64 >> level, 1 << level).mean((1, 3)) for x in (image, other))
            np.testing.assert_allclose(found[level][i].numpy(), plain_gms(a, b), atol=1e-6)


def test_equal_images_are_similar_everywhere():
    image = images(2)
    torch.testing.assert_close(similarity(image, image, 4), torch.ones(2, 64, 64))
    assert similarity(image, 1 - image.flip(3), 4).min() < 0.9


def test_gradients_are_finite_on_a_flat_image():
    flat = torch.full((1, 1, 8, 8), 0.5, requires_grad=True)
    gradient_magnitude(flat[:, 0]).sum().backward()
    assert flat.grad.isfinite().all()


@pytest.mark.parametrize(("cell", "sets"), [(2, 3), (16, 3), (8, 2)])
def test_masks_are_a_partition_into_cells(cell, sets):
    masks = draw_masks((64, 48), cell, sets, torch.Generator().manual_seed(0))
    assert torch.equal(masks.sum(0), torch.ones(64, 48))
    cells = masks.unfold(1, cell, cell).unfold(2, cell, cell)
    assert ((cells.mean((-1, -2)) == 0) | (cells.mean((-1, -2)) == 1)).all()
    counts = cells[..., 0, 0].sum((1, 2))
    assert counts.max() - counts.min() <= 1


def test_no_pixel_sees_itself():
    model = model_of().eval()
    image = images(1).requires_grad_()
    again = model.inpaint(image, 8, partial(draw_masks, generator=torch.Generator().manual_seed(0)))
    masks = draw_masks((64, 64), 8, 3, torch.Generator().manual_seed(0))
    for mask in masks:
        (gradient,) = torch.autograd.grad((again * mask).sum(), image, retain_graph=True)
        assert gradient[0, :, mask.bool()].abs().max() == 0
        assert gradient.abs().max() > 0


def test_loss_is_its_three_parts():
    model = model_of(cells=[8]).train()
    seen = batch(images(2))
    loss = model.loss(seen)
    again = model.inpaint(seen.image, 8, partial(draw_masks, generator=rewound(model))).detach()
    gradient = np.mean([1 - float(level.mean()) for level in similarities(seen.image, again, 4)])
    pairs = zip(seen.image.flatten(0, 1).numpy(), again.flatten(0, 1).numpy(), strict=True)
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0, "win_size": 11}
    ssim = np.mean([structural_similarity(a.astype(float), b.astype(float), **options) for a, b in pairs])
    squared = float((again - seen.image).square().mean())
    assert float(loss.detach()) == pytest.approx(squared + gradient + 1 - ssim, abs=0.02)  # windows differ at the borders


def rewound(model) -> torch.Generator:
    """The step's generator as it is after the draw of k."""
    generator = model.generator()
    torch.randint(1, (1,), generator=generator)
    return generator


def test_no_device_of_its_own_draws_the_masks_of_inference():
    score, map = model_of().to("meta").eval()(images(2).to("meta"))  # which could not: the scores would differ from device to device
    assert (score.shape, map.shape) == ((2,), (2, 64, 64))


@torch.no_grad()
def test_the_map_is_a_mean_over_the_window_with_zeros_beside_the_image():
    model, image = model_of(cells=[2, 8], scales=2, smooth=5).eval(), images(2)
    found = model(image)
    raw = np.mean([[1 - similarity(image, again, 2).numpy()] for again in model.inpaintings(image)], (0, 1))
    np.testing.assert_allclose(found.map.numpy(), ndimage.uniform_filter(raw, (0, 5, 5), mode="constant"), atol=1e-6)
    torch.testing.assert_close(found.score, found.map.amax((1, 2)))


def test_features_that_are_computed_again_change_nothing(monkeypatch):
    """Loss, gradients and BatchNorm's statistics with and without checkpoints."""
    found, pictures = [], batch(images(2))
    for limit in (0, 2**24):
        monkeypatch.setattr(riad, "LARGE", limit)
        model = model_of().train()
        loss = model.loss(pictures)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters()), *(b for b in model.buffers() if b.is_floating_point())])
    for again, held in zip(*found, strict=True):
        torch.testing.assert_close(again, held)


def test_the_network_is_the_papers():
    """Channels and kernels of the known re-implementation, and a map of each scale."""
    net = model_of(channels=64).net
    kernels = {convolution.kernel_size for block in net.down for convolution in block if isinstance(convolution, torch.nn.Conv2d)}
    assert kernels == {(3, 3), (4, 4)}
    assert [block[0].out_channels for block in net.down] == [64, 128, 256, 512, 512]
    assert {up.kernel_size for up in net.up} == {(4, 4)}


def test_hidden_cells_are_mid_grey():
    model, seen = model_of().eval(), []
    model.net.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    with torch.no_grad():
        model.inpaint(images(1), 8, partial(draw_masks, generator=torch.Generator().manual_seed(0)))
    masks = draw_masks((64, 64), 8, 3, torch.Generator().manual_seed(0))[:, None]
    torch.testing.assert_close(seen[0], (2 * images(1) - 1) * (1 - masks))
