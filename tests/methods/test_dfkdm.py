"""DFKDM: the two densities against scipy, and the figure it reports on folders of scenes."""

import numpy as np
import pytest
import torch
from scipy.stats import gaussian_kde, multivariate_normal
from sklearn.decomposition import PCA
from sklearn.metrics import f1_score
from support import fitted, make, tiny_run

from blemish.detector import RowBuffer
from blemish.edge.calibration import FULL
from blemish.run.evaluate import SCORES
from blemish.run.train import train


def images(n, seed=0, side=64):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, 3, 1, 1, generator=generator) * torch.rand(n, 3, side, side, generator=generator)


def log_density(density, rows, queries):
    if density == "kde":
        return gaussian_kde(rows.T, "scott").logpdf(queries.T)
    return multivariate_normal(rows.mean(0), np.cov(rows.T)).logpdf(queries)


@pytest.mark.parametrize("density", ["kde", "gaussian"])
def test_is_the_density_of_the_components(density):
    model = fitted(make("dfkdm", components=6, density=density), images(40))
    x, q = (model.features(pictures)[0].double().mean((2, 3)).numpy() for pictures in (images(40), images(5, seed=1)))
    reduce = PCA(6, svd_solver="full").fit(x)
    expected = -log_density(density, reduce.transform(x), reduce.transform(q))
    score = model(images(5, seed=1)).score.double().numpy()
    # scaling all features by one length moves every log density by the same amount
    shift = len(model.variance) * float(model.length.log())
    np.testing.assert_allclose(score + shift, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("kinds", "expected"), [(1, "gaussian"), (2, "kde")])
def test_auto_takes_the_likelier_density(kinds, expected):
    """One cloud is a Gaussian; two far apart are none."""
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(60, 3, generator=g) + 20 * (torch.arange(60) % kinds)[:, None]
    model = make("dfkdm", components=3, density="auto")
    model.fit_density(rows)
    assert ("gaussian" if len(model.points) == 1 else "kde") == expected
    other = make("dfkdm", components=3, density=expected)
    other.fit_density(rows)
    assert torch.equal(model.negative_log_density(rows), other.negative_log_density(rows))


def test_folders_of_scenes_give_f1(tiny, tmp_path):
    """F1 at the best threshold in hindsight is in the metrics; at the threshold of the held-out images it follows from the rows."""
    metrics = train(tiny_run(tiny, tmp_path / "run", "model=dfkdm", "model.density=gaussian", "data.masks=null"))
    lines = [line.split(",") for line in (tmp_path / "run/scores.csv").read_text().splitlines()]
    label, decision = SCORES.index("label"), SCORES.index("decision")
    decided = f1_score([int(line[label]) for line in lines[1:]], [int(line[decision]) for line in lines[1:]])
    assert metrics["pixel_auroc"] is None
    assert decided <= metrics["image_f1_max"] <= 1
    assert decided > 0.5


@torch.no_grad()
@pytest.mark.parametrize(("method", "options"), [("dfkdm", {"density": "gaussian"}), ("dfm", {"score": "nll", "keep": 1.0})])
def test_no_image_in_place_of_one_left_out_is_farther_from_one_gaussian_than_the_bound(method, options):
    """Brute force: Mahalanobis distances of features to the others and one more, the worst one included (ops.gaussian)."""
    n, d, generator = 40, 12, torch.Generator().manual_seed(0)
    maps = [torch.randn(n, d, 1, 1, generator=generator).exp()]
    model, state = make(method, **options), RowBuffer(n)
    state.update(model.collect(maps))
    model.fit(state)
    assert model.left_out == FULL
    bound, own = (found.score.double().numpy() for found in (model.leave_one_out(maps, (8, 8), range(n)), model.score(maps, (8, 8))))
    x, rng = model.collect(maps).double().numpy(), np.random.default_rng(0)

    def squared(y, bag):
        return (y - bag.mean(0)) @ np.linalg.solve(np.cov(bag.T), y - bag.mean(0))

    for i in range(n):
        others = np.delete(x, i, 0)
        y, centred = x[i] - others.mean(0), others - others.mean(0)
        worst = others.mean(0) - y / ((n - 1) * (y @ np.linalg.solve(centred.T @ centred, y)))
        more = [worst, x[i], others.mean(0) + 100 * y, others.mean(0) - 100 * y, *rng.normal(x.mean(0), 3 * x.std(0), (20, d))]
        reached = [0.5 * squared(x[i], np.vstack([others, one])) for one in more]
        level = own[i] - 0.5 * squared(x[i], x)  # of the detector's scores, where that distance is 0
        assert reached[0] == max(reached) == pytest.approx(bound[i] - level, rel=2e-3)
