import pytest
import torch
from sklearn.cluster import KMeans as Reference
from sklearn.datasets import make_blobs

from blemish.ops import kmeans


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def data(kind: str) -> torch.Tensor:
    if kind == "blobs":
        return torch.from_numpy(make_blobs(800, 6, centers=10, cluster_std=1.5, random_state=0)[0]).float()
    if kind == "cloud":
        return torch.randn(1000, 20, generator=seeded())
    if kind == "uneven":
        return torch.cat([torch.randn(n, 3, generator=seeded(n)) * 0.2 + 3 * n for n in (1, 2, 5, 50, 900)])
    return torch.rand(600, 2, generator=seeded()) + 1000  # far from the origin


@pytest.mark.parametrize("kind", ["blobs", "cloud", "uneven", "far"])
@pytest.mark.parametrize("k", [1, 4, 10])
def test_inertia_as_low_as_scikit_learn(kind, k):
    x = data(kind)
    reference = min(Reference(k, n_init=10, random_state=seed).fit(x.double().numpy()).inertia_ for seed in range(3))
    found = kmeans.fit(x, k, seeded())
    assert float(found.inertia) <= 1.01 * reference
    distance = torch.cdist(x.double(), found.centres.double())
    assert float(distance.square().amin(1).sum()) == pytest.approx(float(found.inertia), rel=1e-4)
    assert (distance.argmin(1) == found.labels).float().mean() > 0.99


def test_same_seed_same_words():
    x = data("cloud")
    first, second, other = (kmeans.fit(x, 10, seeded(s), restarts=1) for s in (5, 5, 6))
    assert torch.equal(first.centres, second.centres)
    assert not torch.equal(first.centres, other.centres)
    before = torch.get_rng_state()
    kmeans.fit(x, 3, seeded())
    assert torch.equal(torch.get_rng_state(), before)  # the global stream is left alone


def test_tiles_do_not_change_the_clusters(monkeypatch):
    x = data("blobs")
    whole = kmeans.fit(x, 10, seeded())
    monkeypatch.setattr(kmeans, "TILE", 1000)
    assert torch.equal(kmeans.fit(x, 10, seeded()).labels, whole.labels)


def test_copies_and_few_rows():
    x = torch.randn(4, 3, generator=seeded()).repeat(5, 1)  # four distinct rows
    found = kmeans.fit(x, 7, seeded())
    assert found.centres.isfinite().all()
    assert float(found.inertia) < 1e-10
    each = kmeans.fit(x[:4], 4, seeded())
    assert sorted(each.labels.tolist()) == [0, 1, 2, 3]


def test_empty_cluster_moves_to_the_row_served_worst():
    x = torch.tensor([[0.0], [1.0], [10.0]], dtype=torch.float64)
    found = kmeans._lloyd(x, x.square()[:, 0], torch.tensor([[0.0], [99.0]], dtype=torch.float64), steps=20, tolerance=0)
    assert found.centres.flatten().tolist() == [0.5, 10]


def test_tight_clusters_far_apart():
    x = torch.cat([1e-2 * torch.randn(100, 4, generator=seeded(i)) + c for i, c in enumerate((-1e4, 1e4, 1e4 + 0.2))]).double()
    assert kmeans.fit(x, 3, seeded()).labels.unique_consecutive().numel() == 3
