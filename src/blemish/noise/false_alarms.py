"""The number of false alarms of discs on Gaussian noise, and the list of detections."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from scipy.fft import next_fast_len
from torch import Tensor

# name, largest log10 NFA of a detection of this strength, RGB; only colours and names depend on it
STRENGTHS = (
    ("weak", -2.0, (1.0, 1.0, 1.0)),
    ("mild", -2.72, (0.0, 1.0, 1.0)),
    ("strong", -7.39, (0.0, 0.9, 0.0)),
    ("extremely salient", -20.1, (1.0, 0.55, 0.0)),
)
TAIL = (0.05, 0.005)  # shares of the deviations between which their tail is measured


class Alarms(NamedTuple):
    """At every pixel the least likely of all tests that cover it."""

    log10_nfa: Tensor  # (B, H, W) float32
    radius: Tensor  # (B, H, W) int64 radius of that disc, in pixels of the image; 0 for none
    scale: Tensor  # (B, H, W) int64 pyramid level of that disc, 0 the finest


class Detection(NamedTuple):
    """A connected component of NFA ≤ ε; radius, scale and log10_nfa are those of its least likely pixel."""

    x1: int  # box in pixels of the image, half-open
    y1: int
    x2: int
    y2: int
    area: int  # pixels of the component
    radius: int
    scale: int
    log10_nfa: float


def number_of_tests(channels: int, radii: int, height: int, width: int, scales: int, bound: str = "tests") -> float:
    """C·R·H·W for one scale, and 4/3 of it for a pyramid, which has Σ 4^−s as many pixels: ε bounds the mean number of false tests.

    A false test of scale s is 4^s pixels of the full-resolution map: with bound `map` the factor is the number of scales, and ε bounds the
    mean number of those pixels as well.
    """
    pyramid = scales if bound == "map" else 4 / 3
    return channels * radii * height * width * (pyramid if scales > 1 else 1.0)


def disc(radius: int, device: torch.device) -> Tensor:
    """(2ρ+1, 2ρ+1) pixels no farther than ρ from the middle one, with sum 1."""
    k = torch.arange(-radius, radius + 1, device=device)
    inside = (k[:, None] ** 2 + k**2 <= radius**2).double()
    return inside / inside.sum()


def filter_discs(x: Tensor, radii: tuple[int, ...], margin: int) -> list[Tensor]:
    """(..., H, W) filtered with each disc by FFT, with `margin` zeros before the image is wrapped; the shape stays."""
    h, w = x.shape[-2:]
    size = (next_fast_len(h + margin, True), next_fast_len(w + margin, True)) if margin else (h, w)
    spectrum = torch.fft.rfft2(x, s=size)
    filtered = []
    for radius in radii:
        k = torch.arange(-radius, radius + 1, device=x.device)
        rows, cols = torch.broadcast_tensors((k % size[0])[:, None], k % size[1])
        # an image smaller than the disc wraps it more than once
        kernel = x.new_zeros(size).index_put((rows, cols), disc(radius, x.device).to(x.dtype), accumulate=True)
        filtered.append(torch.fft.irfft2(spectrum * torch.fft.rfft2(kernel), s=size)[..., :h, :w])
    return filtered


def log10_tail(t: Tensor, sides: int = 2) -> Tensor:
    """log10 P(|N| ≥ t), or with one side log10 P(N ≥ t), of a standard normal N; finite however small the probability."""
    return (torch.special.log_ndtr(-t) + math.log(sides)) / math.log(10)


def tail_line(t: Tensor, sides: int = 2) -> tuple[Tensor, Tensor]:
    """Slope and intercept (B, C, 1, 1) of log(−log P) over log t for deviations t (B, C, H, W): a Weibull law of each channel's tail.

    With one side it is the law of the half above 0, and P their share of that half. By least squares on the quantiles of TAIL (slope 1 for
    Laplace, nearly 2 for Gauss). What lies beyond them has no part in the law by which it is judged.
    """
    ordered = t.flatten(2).sort(2, descending=True).values  # (B, C, P)
    count = ordered.shape[2]
    shares = [math.exp(math.log(TAIL[0]) + step / 19 * math.log(TAIL[1] / TAIL[0])) for step in range(20)]
    ranks = [max(1, round(share * count)) for share in shares]
    y = t.new_tensor([math.log(-math.log((rank - 0.5) / count * 2 / sides)) for rank in ranks])  # (20,)
    x = ordered[..., [rank - 1 for rank in ranks]].clamp_min(1e-30).log()  # (B, C, 20)
    middle = x.mean(2, keepdim=True)
    slope = ((x - middle) * y).sum(2, keepdim=True) / (x - middle).square().sum(2, keepdim=True).clamp_min(1e-12)  # (B, C, 1)
    return slope[..., None], (y.mean() - slope * middle)[..., None]


def log10_weibull_tail(t: Tensor, slope: Tensor, intercept: Tensor, sides: int = 2) -> Tensor:
    """log10 P(T ≥ t) of a law by `tail_line`; with one side at most log10 ½, at 0 and below."""
    return (math.log(sides / 2) - (intercept + slope * t.clamp_min(1e-30).log()).exp()) / math.log(10)


class Law(NamedTuple):
    """How the statistics of discs of one radius vary where there is no anomaly: (B, C, 1, 1) by image and channel, or B = 1 for all.

    T are the tests of a disc: the means of the C channels, or K sums of squares, and then none of means.
    """

    variance: Tensor  # (B, C, 1, 1) of the mean over a complete disc
    level: Tensor  # (B, K, 1, 1) mean of the sums of squares of a complete disc
    freedom: Tensor  # (B, K, 1, 1) degrees of freedom of the χ² law that has their mean and variance
    slope: Tensor | None  # (B, T, 1, 1) of `tail_line`; None for Gauss and χ²
    intercept: Tensor | None


def sums_of_squares(mean: Tensor, energy: Tensor, variance: Tensor) -> Tensor:
    """(B, K, H, W): the energies, after the means' Σ_c m²/σ_c² if both are tested."""
    parts = [(mean.square() / variance.clamp_min(1e-30)).sum(1, keepdim=True)] if mean.shape[1] else []
    return torch.cat([*parts, energy], 1)


def deviations(mean: Tensor, energy: Tensor | None, law: Law) -> Tensor:
    """What is tested at discs with means (B, C, H, W) and energies (B, 1, H, W) as standard normal deviations t (B, T, H, W).

    Means alone have two sides, t ≥ 0. A sum of squares is χ² with `freedom` degrees of freedom, whose cube root is nearly normal (Wilson
    and Hilferty) with a heavier far tail: it has one side, and t < 0 where the residual is weaker than usual.
    """
    if energy is None:
        return mean.abs() / law.variance.sqrt().clamp_min(1e-30)
    spread = 2 / (9 * law.freedom)
    root = (sums_of_squares(mean, energy, law.variance) / law.level.clamp_min(1e-30)).clamp_min(0) ** (1 / 3)
    return (root - 1 + spread) / spread.sqrt()


def law_of(mean: Tensor, energy: Tensor | None, share: Tensor, measured: bool) -> Law:
    """The law of every image from its own discs, of which `share` (1, 1, H, W) lies inside the image."""
    part = share.mean()
    variance = mean.square().mean((2, 3), keepdim=True) / part
    level = freedom = variance[:, :0]
    if energy is not None:
        sums = sums_of_squares(mean, energy, variance)
        level = sums.mean((2, 3), keepdim=True) / part
        freedom = 2 * level.square() / ((sums - level * share).square().mean((2, 3), keepdim=True) / part).clamp_min(1e-30)
        freedom = freedom.clamp_min(2 / 9)  # below it the cube root of nothing at all would be above its mean
    law = Law(variance, level, freedom, None, None)
    return Law(*law[:3], *tail_line(deviations(mean, energy, law), sides_of(energy))) if measured else law


def sides_of(energy: Tensor | None) -> int:
    """Means alone are tested on both sides, sums of squares above."""
    return 2 if energy is None else 1


def statistics(noise: Tensor, radii: tuple[int, ...], margin: int, statistic: str) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
    """For each radius the means over discs (B, C, H, W), their energies Σ_c r² (B, 1, H, W), and the discs' share inside (1, 1, H, W).

    statistic: `mean` leaves the energies out (None), `energy` the means (no channels), `both` neither.
    """
    x = noise[:, :, margin : noise.shape[2] - margin, margin : noise.shape[3] - margin].double()
    reach = max(radii)
    discs = [filter_discs(x, radii, reach), filter_discs(torch.ones_like(x[:1, :1]), radii, reach)]
    squares = filter_discs(x.square().sum(1, keepdim=True), radii, reach) if statistic != "mean" else [None] * len(radii)
    means = discs[0] if statistic != "energy" else [x[:, :0]] * len(radii)
    yield from zip(means, squares, discs[1], strict=True)


def tests_of(statistic: str, channels: int) -> int:
    """How many tests there are at a disc: the mean of every channel; the energy; or the energy and Σ_c m²/σ_c² of all means."""
    return {"mean": channels, "energy": 1, "both": 2}[statistic]


def false_alarms(
    noise: Tensor,
    radii: tuple[int, ...],
    tests: float,
    margin: int = 0,
    measured: bool = False,
    statistic: str = "mean",
    laws: Sequence[Law] | None = None,
) -> tuple[Tensor, Tensor]:
    """log10 NFA (B, H, W) float32 and radius (B, H, W) int64 of residuals (B, C, H, W) that are noise where there is no anomaly.

    NFA = tests · P(N ≥ t), with |N| for means, t the deviation of what `statistic` tests at a disc; the least over discs and their tests. A
    disc's `Law` comes from the image itself unless given for every radius. Outside the image the residual is zero, and the law is that of a
    complete disc: a disc that leaves the image is compared with more noise than it contains, so the border can lose a detection but not add
    a false one (reflecting the residual would, as means vary more there). `margin` pixels at every side are not tested.

    With `measured` the probability is the larger of that and of `log10_weibull_tail`: residuals of a texture are dependent, and their
    means have heavier tails than Gauss. Alarms can only become fewer.
    """
    lowest, which = None, None
    for number, (radius, parts) in enumerate(zip(radii, statistics(noise, radii, margin, statistic), strict=True)):
        law = laws[number] if laws is not None else law_of(*parts, measured)
        t, n = deviations(*parts[:2], law), sides_of(parts[1])
        p = log10_tail(t, n) if law.slope is None else torch.maximum(log10_tail(t, n), log10_weibull_tail(t, law.slope, law.intercept, n))
        p = p.amin(1)
        which = torch.full_like(p, radius, dtype=torch.int64) if which is None else torch.where(p < lowest, radius, which)
        lowest = p if lowest is None else torch.minimum(lowest, p)
    return F.pad(lowest, (margin,) * 4).float() + math.log10(tests), F.pad(which, (margin,) * 4)


def original_false_alarms(noise: Tensor, radii: tuple[int, ...], tests: float) -> tuple[Tensor, Tensor]:
    """`false_alarms` as in the authors' program, oddities included, to compare with its results.

    Circular discs, NFA clamped at 1, then the natural logarithm of C added to the log10 value; values displaced up and left by one pixel,
    two along an odd side; a border of the largest radius left at 0 with radius 0. The program itself passes tests = H·W.
    """
    _, c, height, width = noise.shape
    x = noise.double()
    lowest = torch.zeros_like(x[:, 0])
    which = torch.zeros_like(lowest, dtype=torch.int64)
    for radius, m in zip(radii, filter_discs(x, radii, 0), strict=True):
        sigma = m.square().mean((2, 3), keepdim=True).sqrt()
        nfa = (log10_tail(m.abs() / sigma.clamp_min(1e-30)) + math.log10(tests)).amin(1)
        which = torch.where(nfa < lowest, radius, which)
        lowest = torch.minimum(lowest, nfa)
    shift = (-1 - height % 2, -1 - width % 2)
    lowest, which = (a.roll(shift, (1, 2)) for a in (lowest + math.log(c), which))
    border = max(radii)
    y, x = torch.arange(height, device=noise.device)[:, None], torch.arange(width, device=noise.device)
    inner = (y >= border) & (y < height - border) & (x >= border) & (x < width - border)
    return torch.where(inner, lowest, 0).float(), torch.where(inner, which, 0)


def least(alarms: list[tuple[Tensor, Tensor]]) -> Alarms:
    """The strongest alarm of all scales, finest first, on the same pixels."""
    nfa, radius = (torch.stack(a) for a in zip(*alarms, strict=True))  # (S, B, H, W)
    lowest, scale = nfa.min(0)
    return Alarms(lowest, radius.gather(0, scale[None])[0], scale)


def detections(alarms: Alarms, epsilon: float) -> list[list[Detection]]:
    """For every image its connected components (8 neighbours) of NFA ≤ ε, strongest first. Runs on the host, after the forward."""
    found = []
    for nfa, radius, scale in zip(*(a.detach().cpu().numpy() for a in alarms), strict=True):
        label, _ = ndimage.label(nfa <= math.log10(epsilon), structure=np.ones((3, 3)))
        each = []
        for number, (y, x) in enumerate(ndimage.find_objects(label), 1):
            inside = label[y, x] == number
            peak = np.where(inside, nfa[y, x], np.inf).argmin()
            of_peak = (int(radius[y, x].flat[peak]), int(scale[y, x].flat[peak]), float(nfa[y, x].flat[peak]))
            each.append(Detection(x.start, y.start, x.stop, y.stop, int(inside.sum()), *of_peak))
        found.append(sorted(each, key=lambda d: d.log10_nfa))
    return found


def strength(log10_nfa: float) -> str:
    """The name in `STRENGTHS` for a detection, "none" above the weakest."""
    return next((name for name, limit, _ in reversed(STRENGTHS) if log10_nfa <= limit), "none")


def colours(log10_nfa: Tensor) -> tuple[Tensor, Tensor]:
    """(..., H, W) log10 NFA -> RGB (..., 3, H, W) in [0, 1] by strength, the least in red, and the mask (..., H, W) of coloured pixels."""
    rgb = torch.zeros(3, *log10_nfa.shape, device=log10_nfa.device)
    for _, limit, colour in STRENGTHS:
        value = torch.tensor(colour, device=log10_nfa.device).view(3, *[1] * log10_nfa.ndim)
        rgb = torch.where(log10_nfa <= limit, value, rgb)
    mask = log10_nfa <= STRENGTHS[0][1]
    least = mask & (log10_nfa == log10_nfa.amin((-2, -1), keepdim=True))
    rgb = torch.where(least, rgb.new_tensor([1.0, 0, 0]).view(3, *[1] * log10_nfa.ndim), rgb)
    return rgb.movedim(0, -3), mask


def overlay(image: Tensor, log10_nfa: Tensor, opacity: float = 0.6) -> Tensor:
    """Images (..., 3, H, W) in [0, 1] in grey, with their detections (log10 NFA (..., H, W)) in the colours of their strength."""
    rgb, mask = colours(log10_nfa)
    grey = image.mean(-3, keepdim=True).expand_as(image)
    return torch.where(mask.unsqueeze(-3), (1 - opacity) * grey + opacity * rgb, grey)
