import math

import pytest
import skimage.data
import torch

from blemish.noise import patches

BOX = (-8, 8)


def texture(height: int, width: int, channels: int) -> torch.Tensor:
    image = torch.tensor(skimage.data.coffee()[100 : 100 + height, 100 : 100 + width].copy()).movedim(2, 0).float()
    return image[:channels].contiguous()


def by_definition(image, patch, neighbors, box):
    """Distances (P, P) with inf inside the box, by subtraction in float64."""
    table = patches.vectors(image[None], patch).double()
    msd = torch.stack([(table - row).square().mean(1) for row in table])
    h, w = patches.grid(*image.shape[1:], patch)
    y, x = torch.arange(h * w) // w, torch.arange(h * w) % w
    dy, dx = y[None] - y[:, None], x[None] - x[:, None]
    inside = (dy >= box[0]) & (dy <= box[1]) & (dx >= box[0]) & (dx <= box[1])
    return msd.masked_fill(inside, math.inf), inside


@pytest.mark.parametrize(
    ("size", "channels", "patch", "box", "mean"),
    [((32, 40), 1, 8, (-8, 8), 0), ((36, 33), 3, 8, (-8, 7), 0), ((26, 31), 3, 4, (-4, 4), 0), ((40, 40), 1, 8, (-8, 8), 60000)],
)
def test_exact_is_the_definition(size, channels, patch, box, mean):
    image = texture(*size, channels) + mean
    msd, inside = by_definition(image, patch, 16, box)
    table = patches.vectors(image[None], patch)
    found = patches.exact(table, table, 16, patches.grid(*size, patch), box)
    expected = msd.topk(16, 1, largest=False).values.float()
    atol = 0.05 if mean else 1e-3
    torch.testing.assert_close(found.distance, expected, rtol=1e-4, atol=atol)  # equal up to exchanges among near ties
    torch.testing.assert_close(msd.gather(1, found.index).float(), found.distance, rtol=1e-5, atol=atol)
    assert not inside.gather(1, found.index).any()


def test_the_fast_search_finds_most_and_nothing_forbidden():
    images = torch.stack([texture(98, 110, 3), texture(110, 98, 3).mT])
    shape, size = patches.grid(98, 110, 8), 91 * 103
    assert shape == (91, 103)
    index, _ = patches.within(images - images.mean((2, 3), keepdim=True), 8, 16, BOX, 0)
    redrawn = torch.arange(0, size, 3)
    assert index.shape == (2 * len(redrawn), 16)
    for found, image, first in zip(index.split(len(redrawn)), images, (0, size), strict=True):
        found = found - first
        assert found.min() >= 0
        assert found.max() < size
        table = patches.vectors(image[None], 8)
        exact = patches.exact(table, table, 16, shape, BOX)
        assert (found[:, :, None] == exact.index[::3][:, None]).any(1).float().mean() > 0.55
        y, x = (found // 103 - redrawn[:, None] // 103).abs(), (found % 103 - redrawn[:, None] % 103).abs()
        assert torch.maximum(y, x).min() > 8
        assert (found.sort(1).values.diff(dim=1) > 0).all()  # none counted twice


def test_the_fast_search_of_references_finds_most():
    bank = torch.stack([texture(64, 71, 3), texture(64, 71, 3).flip(2)])
    query = (texture(50, 74, 3) * 0.9)[None]
    index = patches.build(bank, 8, 0)
    assert all(set(leaves.flatten().tolist()) == set(range(2 * 57 * 64)) for leaves in index.leaves)
    found, _ = patches.among(query, index, (57, 64), 8, 16)
    table = patches.vectors(query, 8)[::3]
    exact = patches.exact(table, patches.vectors(bank, 8), 16)
    assert found.shape == exact.index.shape
    assert (found[:, :, None] == exact.index[:, None]).any(1).float().mean() > 0.6
    again, distance = patches.among(bank[:1, :, :62], index, (57, 64), 8, 1)
    assert (distance < 1e-2).float().mean() > 0.99  # a patch of the bank is its own nearest
    assert again.shape[1] == 1


def test_neighbours_even_where_all_patches_are_equal():
    image = torch.full((1, 1, 92, 92), 7.0)
    image[0, 0, 40, 40] = 9
    index, distance = patches.within(image, 8, 16, BOX, 0)
    assert index.min() >= 0
    assert distance.isfinite().all()


def test_keys_are_the_principal_components():
    images = torch.stack([texture(30, 33, 3), texture(33, 30, 3).mT])
    axes = patches.principal_axes(images, 4, 0)
    assert axes.shape == (2, 48, 40)
    table = patches.vectors(images, 4).view(2, -1, 48)
    torch.testing.assert_close(patches.project(images, axes, 4).view(2, -1, 40), table @ axes, rtol=1e-4, atol=1e-2)
    variance = torch.linalg.eigvalsh(torch.stack([t.T.double().cov() for t in table]))
    torch.testing.assert_close((table @ axes).double().var(1), variance.flip(1)[:, :40], rtol=1e-3, atol=1e-2)


def test_components_of_a_sample_see_every_phase_of_a_period():
    """Stripes one pixel wide, twelve apart: patches at multiples of some stride would all be alike."""
    image = torch.zeros(1, 1, 300, 300)
    image[..., ::12] = 1
    axes, table = patches.principal_axes(image, 4, 0)[0], patches.vectors(image, 4)
    total = (table - table.mean(0)).square().sum(1).mean()
    kept = ((table - table.mean(0)) @ axes[:, :4]).square().sum(1).mean()
    assert kept > 0.999 * total


def test_a_tree_holds_every_patch_in_leaves_of_one_size():
    generator = torch.Generator().manual_seed(0)
    keys, starts = torch.randn(5003, 6, generator=generator), torch.randn(2, 6, generator=generator)
    queries, candidates, *_ = patches.plant(keys, starts, [4, 2], torch.arange(0, 5003, 2)[None], torch.arange(1, 5003, 2)[None])
    assert (queries.shape, candidates.shape) == ((8, 313), (8, 313))
    assert queries.unique().tolist() == list(range(0, 5003, 2))
    assert candidates[candidates >= 0].sort().values.tolist() == list(range(1, 5003, 2))  # each once
    spread = torch.stack([keys[leaf].var(0).sum() for leaf in queries])
    assert spread.mean() < 0.9 * keys.var(0).sum()


def test_merge_keeps_the_nearest_of_each_number():
    index, distance = torch.tensor([[3, 1, 3, -1, 2]]), torch.tensor([[5.0, 2.0, 5.0, math.inf, 9.0]])
    merged = patches.merge([(index[:, :2], distance[:, :2]), (index[:, 2:], distance[:, 2:])], 4)
    assert merged[0].tolist() == [[1, 3, 2, -1]]
    assert merged[1].tolist() == [[2, 5, 9, math.inf]]


@pytest.mark.parametrize(("height", "width"), [(8, 8), (16, 200), (24, 24), (25, 25), (26, 25), (32, 32), (17, 60), (40, 12)])
def test_enough_counts_the_worst_placed_patch(height, width):
    h, w = patches.grid(height, width, 8)
    y, x = torch.arange(h * w) // w, torch.arange(h * w) % w
    free = ((y[:, None] - y).abs() > 8) | ((x[:, None] - x).abs() > 8)
    assert patches.enough(height, width, 8, 16, 8) == bool(free.sum(1).min() >= 16)
