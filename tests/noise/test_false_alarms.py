import math

import numpy as np
import pytest
import skimage.data
import torch
from scipy import ndimage, stats
from support import slow

from blemish.noise import background
from blemish.noise import false_alarms as fa
from blemish.noise.gaussianise import gaussianise
from blemish.noise.pyramid import grow, mirrored, pyramid


@pytest.mark.parametrize("name", ["white", "disk", "five", "odd", "disk_fullres", "strong"])
def test_oracle_original_mode(oracle, name):
    z = oracle(f"nfa_{name}")
    noise = z["residual"][None]
    told = torch.from_numpy(z["log10_p_unit"]) > -38
    for tests, nfa, radius in ((1.0, "log10_p_unit", "radius_unit"), (float(z["M"] * z["N"]), "log10_nfa", "radius")):
        ours, which = fa.original_false_alarms(noise, (2, 4), tests)
        torch.testing.assert_close(ours[0][told], torch.from_numpy(z[nfa])[told], rtol=0, atol=1e-4)
        assert torch.equal(which[0][told].float(), torch.from_numpy(z[radius])[told])


@pytest.mark.parametrize("name", ["brick", "coffee"])
def test_oracle_chain(oracle, name):
    z = oracle(f"chain_{name}")
    ours, which = fa.original_false_alarms(z["gaussianised"][None], (2, 4), float(z["M"] * z["N"]))
    torch.testing.assert_close(ours[0], torch.from_numpy(z["log10_nfa"]), rtol=0, atol=1e-4)
    assert torch.equal(which[0].float(), torch.from_numpy(z["radius"]))


def weibull(t, sides):
    """log10 of the tail of a Weibull law, fitted to the largest 5 % to 0.5 % of t by scipy's regression on the plot of its name.

    With one side it is the law of the values above 0, which are a half of all.
    """
    values = np.sort(t.ravel())[::-1]
    ranks = np.maximum(1, np.round(np.geomspace(0.05, 0.005, 20) * len(values)).astype(int))
    line = stats.linregress(np.log(np.maximum(values[ranks - 1], 1e-30)), np.log(-np.log((ranks - 0.5) / len(values) * 2 / sides)))
    shape, scale = line.slope, np.exp(-line.intercept / line.slope)
    return (np.log(sides / 2) + stats.weibull_min.logsf(t, shape, scale=scale)) / np.log(10)


@pytest.mark.parametrize("statistic", ["mean", "energy", "both"])
@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("size", [(40, 40), (33, 57), (12, 15)])
def test_definition(size, measured, statistic):
    noise = np.random.default_rng(1).normal(size=(2, 3, *size))
    ours, which = fa.false_alarms(torch.tensor(noise), (2, 4), 77.0, measured=measured, statistic=statistic)
    lowest, radius = np.full((2, *size), np.inf), np.zeros((2, *size))
    for r in (2, 4):
        k = np.arange(-r, r + 1)
        disc = (k[:, None] ** 2 + k**2 <= r * r).astype(float)
        share = ndimage.correlate(np.ones(size), disc, mode="constant") / disc.sum()
        m = np.stack([[ndimage.correlate(c, disc / disc.sum(), mode="constant") for c in image] for image in noise])
        sigma = np.sqrt((m**2).mean((2, 3), keepdims=True) / share.mean())
        t = np.abs(m) / sigma
        if statistic != "mean":
            e = np.stack([ndimage.correlate((image**2).sum(0), disc / disc.sum(), mode="constant") for image in noise])[:, None]
            e = np.concatenate([((m / sigma) ** 2).sum(1, keepdims=True), e], 1) if statistic == "both" else e
            level = e.mean((2, 3), keepdims=True) / share.mean()
            freedom = 2 * level**2 / (((e - level * share) ** 2).mean((2, 3), keepdims=True) / share.mean())
            t = ((e / level) ** (1 / 3) - 1 + 2 / (9 * freedom)) / np.sqrt(2 / (9 * freedom))
        sides = 2 if statistic == "mean" else 1
        p = (np.log(sides) + stats.norm.logsf(t)) / np.log(10)
        if measured:
            p = np.maximum(p, np.stack([[weibull(c, sides) for c in image] for image in t]))
        nfa = (np.log10(77) + p).min(1)
        radius = np.where(nfa < lowest, r, radius)
        lowest = np.minimum(lowest, nfa)
    np.testing.assert_allclose(ours.numpy(), lowest, atol=1e-5)
    assert (which.numpy() == radius).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_tail_is_finite_and_right_far_out(dtype):
    t = np.array([0, 0.5, 3, 14, 38, 200, 1e4])
    expected = (np.log(2) + stats.norm.logsf(t)) / np.log(10)
    np.testing.assert_allclose(fa.log10_tail(torch.tensor(t, dtype=dtype)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("corner", [(0, 0), (0, 59), (59, 0), (30, 59), (30, 30)])
def test_a_detection_lies_where_the_anomaly_is_and_not_across_the_border(corner):
    noise = torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(2))
    y, x = corner
    noise[0, 0, y : y + 5, x : x + 5] += 5
    nfa, _ = fa.false_alarms(noise, (2, 4), 64 * 64 * 2)
    peak_y, peak_x = divmod(int(nfa.argmin()), 64)
    assert nfa.min() < -4
    assert abs(peak_y - y - 2) <= 2
    assert abs(peak_x - x - 2) <= 2
    rows, cols = torch.nonzero(nfa[0] < -2, as_tuple=True)
    assert max((rows - y - 2).abs().max(), (cols - x - 2).abs().max()) <= 8
    for statistic, most in (("mean", 2), ("energy", math.log10(50)), ("both", math.log10(50))):
        nothing = fa.false_alarms(torch.zeros_like(noise), (2, 4), 100.0, statistic=statistic)[0]
        torch.testing.assert_close(nothing, torch.full_like(nothing, most))  # zeros are no alarm


def noise_of(kind: str, images: int, channels: int, generator: torch.Generator) -> torch.Tensor:
    x = torch.randn(images, channels, 64 + 4, 64 + 4, generator=generator)
    smooth = torch.nn.functional.avg_pool2d(x, 5, 1)
    return {"white": x[..., 2:-2, 2:-2], "low-pass": smooth, "high-pass": x[..., 2:-2, 2:-2] - smooth}[kind]


@pytest.mark.parametrize(
    ("kind", "channels", "scales", "bound"),
    [
        ("white", 1, 1, "tests"),
        ("white", 1, 3, "map"),
        ("low-pass", 3, 1, "tests"),
        ("high-pass", 5, 2, "tests"),
        slow("white", 5, 2, "tests"),
        slow("low-pass", 5, 2, "tests"),
        slow("high-pass", 1, 1, "tests"),
    ],
)
def test_noise_gives_no_more_false_alarms_than_promised(kind, channels, scales, bound):
    """Mean tests, or pixels of the map, with NFA ≤ ε over 200 images; the allowance is three standard errors of such clustered counts."""
    images = 200
    noise = noise_of(kind, images, channels, torch.Generator().manual_seed(5))
    tests = fa.number_of_tests(channels, 2, 64, 64, scales, bound)
    levels = [fa.false_alarms(x, (2, 4), tests, mirrored(s)) for s, x in enumerate(pyramid(noise, scales))]
    if bound == "map":
        levels = [fa.least([tuple(grow(a, 64, 64, s) for a in level) for s, level in enumerate(levels)])]
    for epsilon in (1.0, 0.1):
        count = sum((level[0] <= math.log10(epsilon)).sum((1, 2)).float() for level in levels)
        assert count.mean() <= epsilon + 3 * max(count.std().item(), epsilon**0.5) / images**0.5
        assert epsilon < 1 or count.mean() > 0.2  # and not by finding nothing at all


def test_measured_tails_tame_noise_of_uneven_strength_and_still_see_an_anomaly():
    """White noise four times as strong in a quarter of the image: its means are no Gauss, which σ alone takes for alarms."""
    x = torch.randn(20, 1, 128, 128, generator=torch.Generator().manual_seed(8))
    x[..., :64, :64] *= 4
    plain, measured = (fa.false_alarms(x, (2, 4), 2 * 128 * 128, measured=m)[0] for m in (False, True))
    assert (measured >= plain).all()
    assert (measured <= 0).sum() <= 20 < (plain <= 0).sum() / 10
    x[..., 90:93, 90:93] += 40
    found, _ = fa.false_alarms(x, (2, 4), 2 * 128 * 128, measured=True)
    assert (found[:, 91, 91] <= -2).all()


@pytest.mark.slow
def test_measured_tails_keep_the_bound_on_what_textures_leave():
    """Pixels with NFA ≤ ε in six crops of photographs without defects, of which the plain tails find ten times as many as promised."""
    crops = []
    for name in ("brick", "grass", "gravel"):
        image = torch.tensor(getattr(skimage.data, name)())[:128, :256].float()[None, None]
        settings = {"patch": 8, "neighbors": 16, "h": 10.0, "relative": False, "box": (-8, 8), "search": "trees", "tile": 512, "seed": 0}
        left = background.residual(image, **settings)  # (1, 1, 128, 256)
        crops += left.split(128, 3)
    noise = gaussianise(torch.cat(crops))
    plain, measured = (fa.false_alarms(noise, (2, 4), 2 * 128 * 128, measured=m)[0] for m in (False, True))
    assert (measured <= 0).sum() <= 6
    assert (plain <= 0).sum() > 60


def test_the_energy_has_the_law_of_chi_square():
    """Independent channels in a disc of 13 pixels: the degrees of freedom are found, and the cube root keeps the far tail's bound."""
    noise = torch.randn(1, 4, 256, 256, generator=torch.Generator().manual_seed(3))
    ((mean, energy, share),) = fa.statistics(noise, (2,), 0, "both")
    law = fa.law_of(mean, energy, share, measured=False)
    assert law.level.flatten().tolist() == pytest.approx([4, 4], rel=0.02)
    assert law.freedom.flatten().tolist() == pytest.approx([4, 4 * 13], rel=0.05)
    x = torch.tensor(stats.chi2(52).isf([1e-2, 1e-4, 1e-8, 1e-16, 1e-30]) * 4 / 52).view(1, 1, 1, -1)
    exact = fa.Law(law.variance[:, :0], torch.full((1, 1, 1, 1), 4.0), torch.full((1, 1, 1, 1), 52.0), None, None)
    p = fa.log10_tail(fa.deviations(x[:, :0], x, exact), 1)[0, 0, 0]
    assert (p >= torch.tensor([-2.0, -4, -8, -16, -30])).all()
    torch.testing.assert_close(p, torch.tensor([-2.0, -4, -8, -16, -30]).double(), rtol=0.15, atol=0.1)


def test_the_energy_sees_what_means_cannot():
    noise = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(4))
    y, x = torch.meshgrid(torch.arange(96), torch.arange(96), indexing="ij")
    patch = (y - 40).square() + (x - 50).square() <= 25
    noise = torch.where(patch, torch.where((y + x) % 2 == 0, 3.0, -3.0), noise)  # a fine pattern: its mean is zero
    mean, both = (fa.false_alarms(noise, (2, 4), 3 * 96 * 96, statistic=statistic)[0] for statistic in ("mean", "both"))
    assert both.min() < -3 < mean.min()
    assert patch.flatten()[both.argmin()]


def test_a_given_law_takes_the_place_of_the_images_own():
    normal = torch.randn(4, 2, 64, 64, generator=torch.Generator().manual_seed(5))
    laws = [fa.law_of(m[:1], e[:1], share, measured=True) for m, e, share in fa.statistics(normal, (2, 4), 0, "both")]
    given = fa.false_alarms(normal[:1], (2, 4), 100.0, statistic="both", laws=laws)[0]
    torch.testing.assert_close(given, fa.false_alarms(normal[:1], (2, 4), 100.0, measured=True, statistic="both")[0])
    assert fa.false_alarms(3 * normal[:1], (2, 4), 100.0, statistic="both", laws=laws)[0].min() < given.min() - 3  # all of it is too strong


def test_detections_are_components():
    nfa = torch.zeros(2, 8, 10)
    nfa[0, 1:3, 2:5], nfa[0, 1, 3] = -3.0, -9.0
    nfa[0, 3, 5] = -2.5  # touches by a corner
    nfa[0, 7, 9] = -30.0
    radius, scale = torch.full((2, 8, 10), 2), torch.zeros(2, 8, 10, dtype=torch.int64)
    radius[0, 1, 3], scale[0, 1, 3] = 4, 1
    first, second = fa.detections(fa.Alarms(nfa, radius, scale), 1e-2)
    assert second == []
    assert first == [fa.Detection(9, 7, 10, 8, 1, 2, 0, -30.0), fa.Detection(2, 1, 6, 4, 7, 4, 1, -9.0)]


def test_colours_follow_strength():
    names = [fa.strength(v) for v in (0.0, -1.99, -2.0, -3.0, -8.5, -400.0)]
    assert names == ["none", "none", "weak", "mild", "strong", "extremely salient"]
    nfa = torch.tensor([[0.0, -2.0, -3.0, -8.5, -400.0, -401.0]])
    rgb, mask = fa.colours(nfa)
    assert mask.tolist() == [[False, True, True, True, True, True]]
    assert [tuple(c.tolist()) for c in rgb[:, 0, 1:5].T] == [pytest.approx(colour) for _, _, colour in fa.STRENGTHS]
    assert rgb[:, 0, 5].tolist() == [1, 0, 0]
    over = fa.overlay(torch.full((3, 1, 6), 0.5), nfa)
    assert over[:, 0, 0].tolist() == [0.5] * 3
    assert over.shape == (3, 1, 6)
