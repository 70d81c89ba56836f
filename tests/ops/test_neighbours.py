import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import coarse_products

from blemish.edge.errors import InputError
from blemish.ops import neighbours

BOTH = pytest.mark.parametrize("library", ["faiss", "torch"])


@pytest.fixture
def _library(library, monkeypatch):
    if library == "faiss" and neighbours.faiss is None:
        pytest.skip("faiss is not installed")
    monkeypatch.setattr(neighbours, "LARGE", 0)
    monkeypatch.setattr(neighbours, "faiss_is_quicker", lambda: library == "faiss")


def brute_force(query: torch.Tensor, bank: torch.Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    q, m = query.double().numpy(), bank.double().numpy()
    distance = np.stack([np.sqrt(((m - row) ** 2).sum(1)) for row in q])
    index = np.argsort(distance, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(distance, index, 1), index


def assert_nearest(query: torch.Tensor, bank: torch.Tensor, k: int) -> None:
    distance, index = neighbours.nearest(query, bank, k)
    expected, where = brute_force(query, bank, k)
    assert (index.numpy() == where).all()
    assert np.allclose(distance, expected, rtol=1e-6, atol=0)


def cloud(count: int, dims: int, seed: int) -> torch.Tensor:
    return torch.randn(count, dims, generator=torch.Generator().manual_seed(seed))


@BOTH
@pytest.mark.usefixtures("_library")
@pytest.mark.parametrize("k", [1, 3, 9, 50])
@pytest.mark.parametrize(("queries", "rows", "dims"), [(3, 60, 5), (200, 900, 152), (40, 500, 1024)])
def test_agrees_with_brute_force(k, queries, rows, dims):
    q, m = cloud(queries, dims, 0), cloud(rows, dims, 1)
    distance, index = neighbours.nearest(q, m, k)
    expected, where = brute_force(q, m, k)
    assert (index.numpy() == where).mean() > 0.99  # some distances agree to the last bits of a float32
    assert np.allclose((q[:, None].double() - m[index].double()).norm(dim=-1), expected, rtol=1e-6, atol=0)
    assert np.allclose(distance, expected, rtol=1e-6, atol=0)


@BOTH
@pytest.mark.usefixtures("_library")
@pytest.mark.parametrize("apart", [0, 1e3])  # two distant clusters defeat the centring
def test_cancellation_far_from_the_origin(apart):
    q, m = 3000 + 0.01 * cloud(50, 64, 0), 3000 + 0.01 * cloud(400, 64, 1)
    m[200:] += apart
    m[7] = q[3]
    assert_nearest(q, m, 4)


@BOTH
@pytest.mark.usefixtures("_library")
@pytest.mark.parametrize("copies", [2, 40])  # fewer and more than the spare candidates
@pytest.mark.parametrize("away", [0, 0.1])
def test_copies_go_to_the_lowest_index(copies, away):
    m = cloud(30, 16, 0).repeat(copies, 1)
    assert_nearest(m[:30] + away, m, 5)


@BOTH
@pytest.mark.usefixtures("_library")
def test_tiles_do_not_change_the_answer(monkeypatch):
    q, m = cloud(60, 24, 0), cloud(700, 24, 1)
    m[600:] = m[:100]
    whole = neighbours.nearest(q, m, 5)
    monkeypatch.setattr(neighbours, "TILE", 3000)
    assert all(map(torch.equal, whole, neighbours.nearest(q, m, 5)))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 30), st.integers(1, 4), st.integers(0, 10**6))
def test_ties_on_a_lattice(queries, rows, dims, seed):
    g = torch.Generator().manual_seed(seed)
    q, m = (torch.randint(0, 3, (n, dims), generator=g).float() for n in (queries, rows))
    assert_nearest(q, m, 1 + seed % rows)


def test_coarse_products_do_not_reach_the_answer():
    q, m = cloud(30, 32, 0), cloud(300, 32, 1)
    expected = neighbours.nearest(q, m, 3)
    with coarse_products():
        found = neighbours.nearest(q, m, 3)
    assert all(map(torch.equal, found, expected))


def test_the_newer_switches_of_precision_are_understood(monkeypatch):
    def refuse():
        raise RuntimeError("mix of the legacy and new APIs")

    monkeypatch.setattr(torch, "get_float32_matmul_precision", refuse)
    assert neighbours.product_dtype(torch.zeros(1)) == torch.float64


def test_dtypes_and_gradients():
    q, m = cloud(5, 8, 0), cloud(20, 8, 1)
    assert neighbours.nearest(q.half(), m.half(), 1)[0].dtype == torch.float32
    distance, _ = neighbours.nearest(q.double() + 1e-9, m.double(), 20)
    assert distance.dtype == torch.float64
    assert np.allclose(distance, brute_force(q.double() + 1e-9, m.double(), 20)[0], rtol=1e-12)
    assert not neighbours.nearest(q.requires_grad_(), m, 1)[0].requires_grad
    assert neighbours.nearest(q[:0], m, 2)[0].shape == (0, 2)
    assert neighbours.nearest(q.T[:, :5].contiguous().T, m, 2)[1].shape == (5, 2)


def test_nan_in_a_query_stays_in_its_row():
    q = cloud(4, 8, 0)
    q[1, 2] = torch.nan
    distance, _ = neighbours.nearest(q, cloud(20, 8, 1), 2)
    assert distance[1].isnan().all()
    assert distance[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("k", [0, 4])
def test_refuses_a_number_of_neighbours(k):
    with pytest.raises(InputError, match="k: "):
        neighbours.nearest(torch.zeros(2, 4), torch.zeros(3, 4), k)


@pytest.mark.parametrize("rows", [1, 31, 32, 70])
def test_the_nearest_row_in_a_graph(rows, monkeypatch):
    """Rows that fill up the last short row are never nearest."""
    generator = torch.Generator().manual_seed(rows)
    query, bank = torch.randn(40, 6, generator=generator) + 5, torch.randn(rows, 6, generator=generator)
    exact, index = brute_force(query, bank, 1)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    found = neighbours.nearest(query, bank, 1)
    np.testing.assert_array_equal(found[1].numpy(), index)
    np.testing.assert_allclose(found[0].numpy(), exact, rtol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 9])
@pytest.mark.parametrize("columns", [9, 31, 64, 577, 1024])
def test_smallest_values_and_their_places(count, columns):
    values = torch.randint(0, 50, (40, columns), generator=torch.Generator().manual_seed(columns)).float()  # with many equal ones
    value, index = neighbours.smallest(values, count)
    assert torch.equal(value.sort(1).values, values.sort(1).values[:, :count])
    assert torch.equal(values.gather(1, index), value)
    assert all(len(set(row)) == count for row in index.tolist())
