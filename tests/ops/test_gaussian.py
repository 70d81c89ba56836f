"""The two forms of a Gaussian per position against numpy, and against each other."""

import numpy as np
import pytest
import torch

from blemish.ops.gaussian import cholesky_factor, mahalanobis_cholesky, mahalanobis_woodbury, merge_moments, woodbury_factor

EPSILON = 0.01


def samples(n, p, d, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(p, d, d, generator=generator)
    return 3 + torch.randn(p, n, d, generator=generator) @ mixing  # (P, N, d)


def by_definition(x, query):
    """Mahalanobis distances with numpy's covariance and inverse in float64, one position after the other."""
    out = []
    for xs, qs in zip(x.double().numpy(), query.double().numpy(), strict=True):
        inverse = np.linalg.inv(np.cov(xs.T) + EPSILON * np.eye(xs.shape[1]))
        out.append([np.sqrt((q - xs.mean(0)) @ inverse @ (q - xs.mean(0))) for q in qs])
    return np.array(out)


def moments(x, batch):
    p, _, d = x.shape
    count, mean, scatter = 0, x.new_zeros(p, d), x.new_zeros(p, d, d)
    for rows in x.split(batch, dim=1):
        count = merge_moments(count, mean, scatter, rows)
    return count, mean, scatter


@pytest.mark.parametrize(("n", "d"), [(5, 8), (8, 8), (30, 8), (300, 20)])
def test_both_forms_are_the_definition(n, d):
    x, query = samples(n, 7, d), samples(4, 7, d, seed=1)
    expected = by_definition(x, query)
    count, mean, scatter = moments(x.double(), 3)
    cholesky = mahalanobis_cholesky(query.double(), mean, cholesky_factor(scatter, count, EPSILON))
    mean, factor, _ = woodbury_factor(x.double().transpose(0, 1).clone(), EPSILON)
    woodbury = mahalanobis_woodbury(query.double(), mean, factor, EPSILON)
    np.testing.assert_allclose(cholesky, expected, rtol=1e-8)
    np.testing.assert_allclose(woodbury, expected, rtol=1e-7)


@pytest.mark.parametrize("n", [6, 24, 200])
def test_float32_is_near_float64(n):
    x, query = samples(n, 300, 24), samples(4, 300, 24, seed=1)  # more positions than one chunk
    expected = by_definition(x, query)
    count, mean, scatter = moments(x, 7)
    np.testing.assert_allclose(mahalanobis_cholesky(query, mean, cholesky_factor(scatter, count, EPSILON)), expected, rtol=2e-3)
    if n <= 24:
        mean, factor, _ = woodbury_factor(x.transpose(0, 1).clone(), EPSILON)
        np.testing.assert_allclose(mahalanobis_woodbury(query, mean, factor, EPSILON), expected, rtol=2e-3)


def test_moments_do_not_cancel_far_from_zero():
    x = samples(50, 2, 5) + 1e4
    count, _, scatter = moments(x, 8)
    expected = np.stack([np.cov(xs.T) for xs in x.double().numpy()])
    np.testing.assert_allclose(scatter / (count - 1), expected, rtol=1e-2, atol=1e-2 * np.abs(expected).max())


def test_one_sample_is_a_gaussian_of_width_epsilon():
    x = samples(1, 3, 4)
    mean, factor, _ = woodbury_factor(x.transpose(0, 1).clone(), EPSILON)
    distance = mahalanobis_woodbury(x + 1, mean, factor, EPSILON)
    torch.testing.assert_close(distance, torch.full((3, 1), (4 / EPSILON) ** 0.5))
