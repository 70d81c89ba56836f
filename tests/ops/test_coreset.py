import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.random_projection import SparseRandomProjection
from support import coarse_products

from blemish.edge.errors import InputError
from blemish.ops import coreset


def plain(bank: torch.Tensor, count: int, start: int) -> tuple[list[int], list[float]]:
    """The definition: look at every row for every centre."""
    rows = bank.double().numpy()
    nearest, chosen, radius = np.full(len(rows), np.inf), [], []
    free = np.ones(len(rows), bool)
    for _ in range(count):
        chosen.append(start)
        free[start] = False
        nearest = np.minimum(nearest, ((rows - rows[start]) ** 2).sum(1))
        start = int(np.where(free, nearest, -1).argmax())
        radius.append(float(np.sqrt(nearest.max())))
    return chosen, radius


def synthetic(kind: str) -> torch.Tensor:
    g = torch.Generator().manual_seed(3)
    if kind == "cloud":  # all distances nearly equal: nothing can be put off
        return torch.randn(3000, 64, generator=g)
    if kind == "clusters":
        return torch.randn(20, 16, generator=g)[torch.randint(0, 20, (4000,), generator=g)] * 10 + 0.1 * torch.randn(4000, 16, generator=g)
    if kind == "copies":
        return torch.randn(150, 8, generator=g)[torch.randint(0, 150, (3000,), generator=g)]
    if kind == "offset":
        return 5000 + torch.randn(2000, 32, generator=g)
    if kind == "lattice":
        return torch.randint(0, 2, (4000, 9), generator=g).float()
    return 1e-3 * torch.randn(2000, 32, generator=g) + 1e3 * torch.randint(0, 2, (2000, 1), generator=g)  # "apart"


@pytest.fixture(params=[(2048, 2**20), (7, 500)], ids=["as shipped", "tiny pool and tiles"])
def _limits(request, monkeypatch):
    monkeypatch.setattr(coreset, "POOL", request.param[0])
    monkeypatch.setattr(coreset, "TILE", request.param[1])


def assert_plain(bank: torch.Tensor, count: int, start: int | torch.Generator):
    found = coreset.farthest_first(bank, count, start)
    chosen, radius = plain(bank, count, int(found.indices[0]))
    assert found.indices.tolist() == chosen
    assert np.allclose(found.radius, radius, rtol=1e-6, atol=0)


@pytest.mark.usefixtures("_limits")
@pytest.mark.parametrize("kind", ["cloud", "clusters", "copies", "offset", "lattice", "apart"])
def test_equals_the_plain_algorithm(kind):
    assert_plain(synthetic(kind), 200, torch.Generator().manual_seed(0))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 3), st.integers(0, 10**6))
def test_ties_go_to_the_lowest_index(rows, dims, seed):
    g = torch.Generator().manual_seed(seed)
    assert_plain(torch.randint(0, 3, (rows, dims), generator=g).float(), rows, seed % rows)


def test_earlier_centres_are_continued_from():
    bank = synthetic("clusters")
    all_at_once = coreset.farthest_first(bank, 60, 0)
    rest = coreset.farthest_first(bank, 35, bank[all_at_once.indices[:25]])
    assert torch.equal(rest.indices, all_at_once.indices[25:])
    assert torch.equal(rest.radius, all_at_once.radius[25:])


def test_coarse_products_do_not_reach_the_choice():
    bank = synthetic("cloud")
    expected = coreset.farthest_first(bank, 50, 0)
    with coarse_products():
        assert torch.equal(coreset.farthest_first(bank, 50, 0).indices, expected.indices)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
def test_refuses_values_without_a_distance(value):
    bank = torch.randn(10, 2, generator=torch.Generator().manual_seed(0))
    bank[4, 1] = value
    with pytest.raises(InputError, match="finite"):
        coreset.farthest_first(bank, 3, 0)


def test_projection_is_as_sparse_as_scikit_learns():
    reference = SparseRandomProjection(50, random_state=0).fit(np.zeros((1, 900)))
    matrix = coreset.project(torch.eye(900), 50, torch.Generator().manual_seed(0))
    values = matrix.unique()
    assert np.allclose(values, np.unique(reference.components_.toarray()))
    assert (matrix != 0).float().mean().item() == pytest.approx(reference.density_, rel=0.05)
    assert (matrix > 0).sum().item() == pytest.approx((matrix < 0).sum().item(), rel=0.1)
    few = torch.zeros(5, 8)
    assert coreset.project(few, 8, torch.Generator()) is few
