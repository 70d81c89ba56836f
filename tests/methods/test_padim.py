"""PaDiM against its paper written plainly, and the choice between its two exact forms."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from support import images, make, remembered

from blemish.ops import gaussian
from blemish.ops.accumulators import RowBuffer, RunningCovariance

EPSILON = 0.01


def padim(**changes):
    return make("padim", **{"n_features": 20, "epsilon": EPSILON, **changes})


@torch.no_grad()
def fitted(model, pictures, batch=5):
    state = remembered(model, pictures, batch)
    model.fit(state)
    return model, state


def plain_padim(model, train, test):
    """The paper's steps one position after the other, in float64 with numpy's covariance and inverse."""

    def embedding(pictures):
        maps = model.features(pictures)
        resized = [F.interpolate(m, maps[0].shape[-2:], mode=model.align) for m in maps]
        return torch.cat(resized, 1)[:, model.drawn[0]].double().numpy()  # (B, d, h, w)

    x, q = embedding(train), embedding(test)
    distance = np.zeros((len(q), *q.shape[2:]))
    for i in range(q.shape[2]):
        for j in range(q.shape[3]):
            inverse = np.linalg.inv(np.cov(x[:, :, i, j].T) + EPSILON * np.eye(x.shape[1]))
            delta = q[:, :, i, j] - x[:, :, i, j].mean(0)
            distance[:, i, j] = np.sqrt(np.einsum("bd,de,be->b", delta, inverse, delta))
    up = F.interpolate(torch.from_numpy(distance)[:, None], test.shape[-2:], mode="bilinear", align_corners=False)[:, 0].numpy()
    return np.stack([gaussian_filter(m, 4.0, mode="reflect", truncate=4) for m in up])


@pytest.mark.parametrize("align", ["bilinear", "nearest"])
@pytest.mark.parametrize(("n", "form"), [(12, RowBuffer), (20, RowBuffer), (21, RunningCovariance), (60, RunningCovariance)])
def test_is_the_paper_in_either_form(n, form, align):
    model, state = fitted(padim(align=align), images(n))
    assert isinstance(state, form)
    expected = plain_padim(model, images(n), images(3, seed=1))
    score, map = model(images(3, seed=1))
    np.testing.assert_allclose(map, expected, rtol=5e-3)
    np.testing.assert_allclose(score, expected.max((1, 2)), rtol=5e-3)


@torch.no_grad()
def test_both_forms_give_the_same_numbers():
    """The same 15 images through either form, each of which is exact for any N."""
    by_bank, _ = fitted(padim(), images(15))
    by_moments, state = padim(), RunningCovariance()
    state.update(by_moments.collect(by_moments.features(images(15))))
    by_moments.fit(state)
    assert len(by_bank.woodbury)
    assert len(by_moments.cholesky)
    torch.testing.assert_close(by_bank(images(3, seed=1)).map, by_moments(images(3, seed=1)).map, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("n", [6, 20, 50])
def test_never_holds_more_than_the_smaller_form(n):
    model, state = fitted(padim(), images(n), batch=2)
    positions, d = 16 * 16, 20
    held = sum(state.numel() for state in (model.woodbury, model.cholesky))
    assert held == positions * d * min(n, d)
    assert sum(getattr(state, name).numel() for name in state._defaults) <= held + positions * d + 1


def test_all_channels_if_fewer_than_asked():
    model = padim(n_features=10_000)
    assert model.drawn.shape == (1, sum(model.backbone.channels))


@pytest.mark.parametrize("n", [12, 30])
def test_the_distance_of_several_draws_is_their_mean(n):
    """Each draw is a PaDiM of its own, found again by its channels."""
    several, _ = fitted(padim(draws=3), images(n))
    assert len({tuple(drawn) for drawn in several.drawn.tolist()}) == 3
    assert torch.equal(several.drawn[0], padim().drawn[0])
    maps = []
    for drawn, counts in zip(several.drawn, several.counts, strict=True):
        one = padim()
        one.drawn, one.counts = drawn[None], [counts]
        maps.append(fitted(one, images(n))[0](images(3, seed=1)).map)
    score, map = several(images(3, seed=1))
    torch.testing.assert_close(map, torch.stack(maps).mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(score, map.amax((1, 2)))


@pytest.mark.parametrize(("n", "name", "side"), [(30, "cholesky", 20), (15, "lower", 15)])
def test_a_checkpoint_holds_the_triangle_of_a_factor_alone(n, name, side):
    model, _ = fitted(padim(), images(n))
    state, again = model.state_dict(), padim()
    assert getattr(model, name).shape[1:] == (side, side)
    assert state[name].shape[1:] == (side * (side + 1) // 2,)
    for _ in range(2):  # also where there is one
        again.load_state_dict(state)
        assert torch.equal(getattr(again, name), getattr(model, name))


@torch.no_grad()
@pytest.mark.parametrize("n", [8, 21])
def test_no_image_in_place_of_one_left_out_makes_it_more_anomalous(n):
    """Brute force: for each of some images a fit to the others and one more, normal or far off."""
    model, _ = fitted(padim(), pictures := images(n))
    model.fitted.fill_(n)
    far = [images(1, seed=2), torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)), torch.zeros(1, 3, 64, 64)]
    for i in (0, n - 1):
        maps = model.features(pictures[i : i + 1])
        bound = model.leave_one_out(maps, (64, 64), [i])
        others = torch.cat([pictures[:i], pictures[i + 1 :]])
        for more in far:
            found = fitted(padim(), torch.cat([others, more]))[0](pictures[i : i + 1])
            assert (found.map <= bound.map * (1 + 1e-3)).all() and found.score <= bound.score * (1 + 1e-3)
        least = others.mean(0, keepdim=True)  # near the mean of the others: hardly changes the distance, so the bound is not loose
        assert fitted(padim(), torch.cat([others, least]))[0](pictures[i : i + 1]).score > 0.8 * bound.score


@pytest.mark.parametrize(("n", "d"), [(3, 5), (6, 20), (30, 20), (40, 4)])
def test_the_bound_of_a_distance_is_that_of_the_worst_sample(n, d):
    rows = torch.randn(n, 2, d, generator=torch.Generator().manual_seed(n))  # (N, P, d)
    if n <= d:
        _, _, lower = gaussian.woodbury_factor(rows.clone(), EPSILON)
        bound = gaussian.left_out_woodbury(lower, torch.arange(n), EPSILON)  # (P, N)
    else:
        mean, scatter = torch.zeros(2, d), torch.zeros(2, d, d)
        gaussian.merge_moments(0, mean, scatter, rows.transpose(0, 1))
        factor = gaussian.cholesky_factor(scatter, n, EPSILON)
        bound = gaussian.left_out_cholesky(gaussian.mahalanobis_cholesky(rows.transpose(0, 1), mean, factor), n)
    x = rows.double().numpy()
    for p in range(2):
        for i in range(n):
            others = np.delete(x[:, p], i, 0)
            y = x[i, p] - others.mean(0)
            scatter = (others - others.mean(0)).T @ (others - others.mean(0)) + EPSILON * (n - 1) * np.eye(d)
            distance = y @ np.linalg.solve(scatter, y)
            worst = others.mean(0) - y / ((n - 1) * distance)  # yᵀAz = -1/m
            for more, reached in ((worst, 1.0), (others.mean(0) + 100 * y, 0.0), (others.mean(0), 0.0)):
                bag = np.vstack([others, more])
                found = (x[i, p] - bag.mean(0)) @ np.linalg.solve(np.cov(bag.T) + EPSILON * np.eye(d), x[i, p] - bag.mean(0))
                assert found <= float(bound[p, i]) * (1 + 1e-3)
                assert found >= reached * float(bound[p, i]) * (1 - 1e-3)


def test_false_alarms_of_a_fit_to_all_images_are_bounded():
    """Vectors instead of images: 19 of them, none held out, promise 5 %."""
    n, d, generator, alarms, draws = 19, 6, torch.Generator().manual_seed(0), 0, 40
    for _ in range(draws):
        rows = torch.randn(n, 100, d, generator=generator).exp()  # a hundred positions are as many draws
        new = torch.randn(1, 100, d, generator=generator).exp()
        mean, scatter = torch.zeros(100, d), torch.zeros(100, d, d)
        gaussian.merge_moments(0, mean, scatter, rows.transpose(0, 1))
        factor = gaussian.cholesky_factor(scatter, n, EPSILON)
        known = gaussian.left_out_cholesky(gaussian.mahalanobis_cholesky(rows.transpose(0, 1), mean, factor), n).sqrt()  # (P, N)
        alarms += int((gaussian.mahalanobis_cholesky(new.transpose(0, 1), mean, factor)[:, 0] > known.amax(1)).sum())
    assert alarms / (100 * draws) == pytest.approx(0.05, abs=4 * (0.05 * 0.95 / (100 * draws)) ** 0.5)
