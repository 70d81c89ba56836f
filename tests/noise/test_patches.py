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
    table = patches.vectors(image, patch).double()
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
    found = patches.exact(image, torch.arange(len(msd)), patch, 16, box)
    expected = msd.topk(16, 1, largest=False).values.float()
    atol = 0.05 if mean else 1e-3
    torch.testing.assert_close(found.distance, expected, rtol=1e-4, atol=atol)  # equal up to exchanges among near ties
    torch.testing.assert_close(msd.gather(1, found.index).float(), found.distance, rtol=1e-5, atol=atol)
    assert not inside.gather(1, found.index).any()
    assert torch.equal(patches.vectors_at(image, found.index[:5], patch), patches.vectors(image, patch)[found.index[:5]])


def test_trees_find_nearly_all_and_nothing_forbidden():
    image = texture(96, 110, 3)
    h, w = patches.grid(96, 110, 8)
    exact = patches.exact(image, torch.arange(h * w), 8, 16, BOX)
    found = patches.trees(patches.vectors(image - image.mean(), 8), (h, w), 3, 16, BOX, 6, 2, 0)
    recall = (found.index[:, :, None] == exact.index[:, None]).any(1).float().mean()
    assert recall > 0.95
    own = torch.arange(h * w)[:, None]
    assert torch.maximum((found.index // w - own // w).abs(), (found.index % w - own % w).abs()).min() > 8
    assert (found.index.sort(1).values.diff(dim=1) > 0).all()  # none counted twice
    assert (found.distance.diff(dim=1) >= 0).all()
    table = patches.vectors(image, 8)
    direct = (table[found.index[::50]] - table[::50, None]).square().mean(2)
    torch.testing.assert_close(found.distance[::50], direct, rtol=1e-5, atol=1e-3)


def test_trees_have_neighbours_even_where_all_patches_are_equal():
    image = torch.full((1, 90, 90), 7.0)
    image[0, 40, 40] = 9
    found = patches.trees(patches.vectors(image, 8), (83, 83), 1, 16, BOX, 2, 1, 0)
    assert found.distance.isfinite().all()


def test_a_tree_holds_every_patch_once_in_leaves_of_one_size():
    generator = torch.Generator().manual_seed(0)
    keys, starts = torch.randn(5003, 6, generator=generator), torch.randn(3, 6, generator=generator)
    leaves = patches.plant(keys, 3, starts)
    assert leaves.shape == (8, 626)
    assert leaves.flatten().sort().values.tolist() == list(range(5003)) + [5003] * 5
    assert (leaves == 5003).sum(1).max() == 1


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
