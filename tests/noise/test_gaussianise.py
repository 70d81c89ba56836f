import math

import numpy as np
import pytest
import torch
from scipy import stats

from blemish.noise.gaussianise import gaussianise, laplace_to_normal


@pytest.mark.parametrize("name", ["gaussianise_synthetic", "chain_brick", "chain_coffee"])
def test_oracle(oracle, name):
    z = oracle(name)
    torch.testing.assert_close(gaussianise(z["residual"][None])[0], z["gaussianised"], rtol=0, atol=1e-5)


def by_definition(r):
    """SPEC with scipy, one channel."""
    used = r[r != 0]
    best = (math.inf, None)
    for law, unit in ((stats.laplace, math.sqrt(0.5)), (stats.norm, 1.0)):
        for alpha in np.arange(5, 15) / 10:
            x = np.sign(used) * np.abs(used) ** alpha
            scale = unit * x.std()
            histogram = np.histogram(law.cdf(x / scale), bins=20, range=(0, 1))[0]
            score = ((np.cumsum(histogram) / len(used) - np.arange(1, 21) / 20) ** 2).sum()
            if score < best[0]:
                best = (score, (law, alpha, scale))
    law, alpha, scale = best[1]
    x = np.sign(r) * np.abs(r) ** alpha / scale
    if law is stats.norm:
        return x
    return np.where(x < 0, stats.norm.ppf(law.cdf(x)), -stats.norm.ppf(law.sf(x)))


@pytest.mark.parametrize("draw", ["normal", "laplace", "uniform", "skewed", "half zero"])
def test_definition_on_other_laws(draw):
    rng = np.random.default_rng(3)
    size = (2, 2, 40, 50)
    r = {
        "normal": lambda: rng.normal(0, 3, size),
        "laplace": lambda: rng.laplace(0, 9, size),
        "uniform": lambda: rng.uniform(-1, 1, size),
        "skewed": lambda: rng.gamma(2, 2, size) - 3,
        "half zero": lambda: rng.standard_t(3, size) * rng.integers(0, 2, size),
    }[draw]()
    for ours, image in zip(gaussianise(torch.tensor(r)).numpy(), r, strict=True):
        for channel, residual in zip(ours, image, strict=True):
            np.testing.assert_allclose(channel, by_definition(residual), atol=1e-8)


def test_empty_and_constant_channels_stay_finite():
    r = torch.zeros(1, 3, 16, 16)
    r[0, 1] = 5
    r[0, 2, 3, 3] = 5
    g = gaussianise(r)
    assert g.isfinite().all()
    assert g[0, 0].abs().max() == 0


def test_the_strongest_residual_is_not_lost():
    r = torch.randn(1, 1, 800, 800, generator=torch.Generator().manual_seed(0)).double() ** 3 * 1e-3
    r[0, 0, 400, 400] = 1e12
    g = gaussianise(r)
    assert g.argmax() == 400 * 800 + 400


def test_tails_keep_their_digits():
    x = torch.tensor([-600.0, -40.0, -3.0, 0.0, 3.0, 40.0, 600.0], dtype=torch.float64)
    y = laplace_to_normal(x)
    assert torch.equal(y, -y.flip(0))
    back = torch.special.log_ndtr(-y[4:]) + math.log(2)
    torch.testing.assert_close(back, -x[4:], rtol=1e-9, atol=1e-9)
