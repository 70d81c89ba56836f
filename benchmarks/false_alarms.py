"""How many pixels and components of pure noise the noise detector reports, against the ε that it promises.

python benchmarks/false_alarms.py [--images 2000] writes results/false_alarms.json, and from it the tables of docs/noise_residual.md and the
figure docs/false_alarms.svg. It runs some four minutes on one core.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib as mpl
import numpy as np
import skimage.data
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from blemish.noise import background
from blemish.noise.false_alarms import disc, false_alarms, least, log10_tail, number_of_tests
from blemish.noise.gaussianise import gaussianise
from blemish.noise.pyramid import grow, mirrored, pyramid

ROOT = Path(__file__).parents[1]
DOC = ROOT / "docs" / "noise_residual.md"
EPSILONS = (1.0, 0.1, 0.01)
RADII = (2, 4)
SIDE = 128
MODEL = {
    "patch": 8,
    "neighbors": 16,
    "h": 10.0,
    "relative": False,
    "box": (-8, 8),
    "search": "trees",
    "tile": 512,
    "seed": 0,
}


def counts(batches: Iterator[Tensor], settings: tuple[tuple[int, str], ...]) -> list[dict]:
    """For each (scales, bound) the means over all images, one per ε, of what has NFA ≤ ε.

    Counted are pixels of every scale's own grid, components of the final map, pixels of the final map, and images with any.
    """
    totals = np.zeros((len(settings), 4, len(EPSILONS)))
    images = 0
    for noise in batches:
        channels, height, width = noise.shape[1:]
        levels = pyramid(noise, max(scales for scales, _ in settings))
        levels = [false_alarms(x, RADII, 1.0, mirrored(s)) for s, x in enumerate(levels)]  # log10 p
        grown = [tuple(grow(a, height, width, s) for a in level) for s, level in enumerate(levels)]
        for total, (scales, bound) in zip(totals, settings, strict=True):
            tests = math.log10(number_of_tests(channels, len(RADII), height, width, scales, bound))
            final = least(grown[:scales]).log10_nfa
            for e, epsilon in enumerate(EPSILONS):
                limit = math.log10(epsilon) - tests
                hit = (final <= limit).numpy()
                touched = hit[hit.any((1, 2))]
                total[0, e] += sum(int((p <= limit).sum()) for p, _ in levels[:scales])
                total[1, e] += sum(ndimage.label(h, structure=np.ones((3, 3)))[1] for h in touched)
                total[2, e] += hit.sum()
                total[3, e] += len(touched)
        images += len(noise)
    names = ("pixels", "components", "map_pixels", "images_with_any")
    return [
        {"scales": scales, "bound": bound, "images": images, **dict(zip(names, (total / images).tolist(), strict=True))}
        for total, (scales, bound) in zip(totals, settings, strict=True)
    ]


def drawn(images: int, channels: int, seed: int, colour: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
    """White Gaussian noise (50, C, 128, 128) at a time, coloured by a periodic filter, so that its law is the same at every pixel."""
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, images, 50):
        yield colour(torch.randn(min(50, images - start), channels, SIDE, SIDE, generator=generator))


def spectral(gain: Tensor) -> Callable[[Tensor], Tensor]:
    """A filter by its gain (SIDE, SIDE//2 + 1) in the Fourier domain, drawn on a larger torus so that opposite borders are independent."""
    return lambda x: torch.fft.irfft2(torch.fft.rfft2(x) * gain, s=x.shape[-2:])


def blur_gain(side: int, sigma: float) -> Tensor:
    fy, fx = torch.fft.fftfreq(side)[:, None], torch.fft.rfftfreq(side)
    return torch.exp(-2 * (math.pi * sigma) ** 2 * (fy**2 + fx**2))


def textures() -> dict[str, Tensor]:
    """Crops (16, 1, 128, 128) of grey textures without defects."""
    return {
        name: torch.tensor(getattr(skimage.data, name)())
        .float()[None, None]
        .unfold(2, 128, 128)
        .unfold(3, 128, 128)
        .reshape(-1, 1, 128, 128)
        for name in ("brick", "grass", "gravel")
    }


def whole_detector(images: int, side: int, level: float, seed: int) -> list[dict]:
    """White noise as the image itself, through model, gaussianisation and test: what is left is no longer white."""
    generator = torch.Generator().manual_seed(seed)

    def residuals() -> Iterator[Tensor]:
        for start in range(0, images, 50):
            noise = 128 + level * torch.randn(min(50, images - start), 1, side, side, generator=generator)
            yield gaussianise(background.residual(noise, **MODEL))

    return counts(residuals(), ((1, "tests"),))


def borders(images: int, seed: int) -> list[dict]:
    """Mean pixels of 64×64 noise at NFA ≤ ε, N = R·H·W, for four ways of treating the border."""
    generator = torch.Generator().manual_seed(seed)
    kernel = torch.exp(-0.5 * torch.arange(-6, 7) ** 2.0)
    kernel = (kernel / kernel.sum())[None] * (kernel / kernel.sum())[:, None]
    wide = torch.randn(images, 1, 76, 76, generator=generator)
    low, white = F.conv2d(wide, kernel[None, None]), wide[..., 6:-6, 6:-6]
    rows = []
    for name, x in {"white": white, "low-pass": low, "high-pass": white - low}.items():
        for border in ("wrapped", "reflected", "cut, scaled to its own pixels", "zero outside"):
            best = torch.full_like(x[:, 0], math.inf)
            for radius in RADII:
                d = disc(radius, x.device).float()[None, None]
                mode = {"wrapped": "circular", "reflected": "reflect"}.get(border, "constant")
                m = F.conv2d(F.pad(x, (radius,) * 4, mode=mode), d)
                share = F.conv2d(F.pad(torch.ones_like(x[:1]), (radius,) * 4), d)
                if border.startswith("cut"):
                    m, share = m / share.sqrt(), torch.ones_like(share)
                if mode != "constant":
                    share = torch.ones_like(share)
                sigma = (m.square().mean((2, 3), keepdim=True) / share.mean()).sqrt()
                best = torch.minimum(best, log10_tail((m / sigma).abs())[:, 0] + math.log10(len(RADII) * 64 * 64))
            rows.append({"noise": name, "border": border, "pixels": [(best <= math.log10(e)).sum().item() / images for e in EPSILONS]})
    return rows


def measure(images: int, small: int) -> dict:
    """All figures: `images` of white noise, `small` of every colour."""
    sources: dict[str, Callable[[Tensor], Tensor]] = {"white": lambda x: x}
    low = blur_gain(SIDE, 1.0)
    sources["low-pass, σ 1 px"] = spectral(low)
    sources["high-pass, σ 1 px"] = spectral(1 - low)
    crops = textures()
    left = {name: gaussianise(background.residual(x, **MODEL)) for name, x in crops.items()}
    window = torch.hann_window(SIDE)[:, None] * torch.hann_window(SIDE)
    for name, r in left.items():
        power = torch.fft.rfft2((r - r.mean((2, 3), keepdim=True)) * window).abs().square().mean((0, 1))
        sources[f"spectrum of {name}'s residual"] = spectral((power / power.mean()).sqrt())
    rows = []

    def add(name: str, channels: int, found: list[dict]) -> None:
        rows.extend({"noise": name, "channels": channels, **f} for f in found)
        print(*rows[-len(found) :], sep="\n", flush=True)

    both = ((1, "tests"), (4, "tests"))
    for number, (name, colour) in enumerate(sources.items()):
        for channels in (1, 3, 5) if number < 3 else (1,):
            noise = drawn(images if name == "white" else small, channels, 1000 * number + channels, colour)
            add(name, channels, counts(noise, (*both, (4, "map")) if name == "white" else both))
    for name, r in left.items():
        add(f"{name}'s residual itself", 1, counts(iter([r]), both))
    add("white image of 48 px through the whole detector", 1, whole_detector(small, 48, 30.0, 7))
    return {"epsilon": EPSILONS, "side": SIDE, "rows": rows, "borders": borders(2000, 5)}


def table(result: dict) -> str:
    """Markdown of all rows."""
    head = "noise | C | scales | `bound` | images | pixels at ε = 1 / .1 / .01 | components | pixels of the full-resolution map"
    lines = [f"| {head} |", "|---|--:|--:|---|--:|---|---|---|"]
    for r in result["rows"]:
        cells = [" / ".join(f"{v:.3g}" for v in r[key]) for key in ("pixels", "components", "map_pixels")]
        lines.append(f"| {r['noise']} | {r['channels']} | {r['scales']} | {r['bound']} | {r['images']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def border_table(result: dict) -> str:
    lines = ["| noise | outside the image | pixels at ε = 1 / .1 / .01 |", "|---|---|---|"]
    lines += [f"| {r['noise']} | {r['border']} | " + " / ".join(f"{v:.3g}" for v in r["pixels"]) + " |" for r in result["borders"]]
    return "\n".join(lines)


def figure(result: dict, path: Path) -> None:
    """Mean count over ε for the sources of noise, C = 1, one and four scales; at or below 1 the bound holds."""
    mpl.use("svg")
    mpl.rcParams.update({"svg.hashsalt": "blemish", "svg.fonttype": "none", "font.size": 8})
    import matplotlib.pyplot as plt

    chosen = [r for r in result["rows"] if r["bound"] == "tests" and r["noise"] in ("white", "low-pass, σ 1 px", "high-pass, σ 1 px")]
    fig, axes = plt.subplots(1, 2, figsize=(7, 2.6), sharey=True, layout="constrained")
    for axis, key in zip(axes, ("pixels", "components"), strict=True):
        for r in chosen:
            ratio = [v / e if v else math.nan for v, e in zip(r[key], result["epsilon"], strict=True)]
            label = f"{r['noise'].split(',')[0]}, C={r['channels']}, {r['scales']} sc."
            axis.plot(result["epsilon"], ratio, marker="o", ms=3, lw=0.8, label=label, ls="-" if r["scales"] == 1 else "--")
        axis.axhline(1, color="k", lw=1)
        axis.set(xscale="log", xlabel="ε", title=f"mean {key} with NFA ≤ ε, over ε", ylim=(0, 1.8))
    axes[1].legend(fontsize=5, ncol=2, loc="upper right")
    fig.savefig(path, metadata={"Date": None})


def put(doc: Path, name: str, text: str) -> None:
    """Replace what stands between <!-- name --> and <!-- /name --> in a document."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, _, rest = doc.read_text(encoding="utf-8").partition(begin)
    aside = doc.with_suffix(".tmp")
    aside.write_text(before + begin + "\n" + text + "\n" + end + rest.partition(end)[2], encoding="utf-8")
    aside.replace(doc)


def keep(result: dict, path: Path) -> None:
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    aside.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--small", type=int, default=500, help="images of every other row")
    options = parser.parse_args()
    with torch.inference_mode():
        result = measure(options.images, options.small)
    keep(result, ROOT / "results" / "false_alarms.json")
    put(DOC, "false_alarms", table(result))
    put(DOC, "borders", border_table(result))
    figure(result, ROOT / "docs" / "false_alarms.svg")


if __name__ == "__main__":
    main()
