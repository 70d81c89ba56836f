"""How many pixels and components of noise the noise detector reports, against the ε that it promises.

python benchmarks/false_alarms.py [--images 2000] [--again] writes results/false_alarms.json, and from it the tables of
docs/noise_residual.md and the figure docs/false_alarms.svg. Rows that the file already has for as many images are kept unless --again is
given; all of them take some twenty minutes on one core. Energies and three more photographs have 300 images, whole detectors 20.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

import matplotlib as mpl
import numpy as np
import skimage.data
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from scipy import ndimage
from torch import Tensor

from blemish.detector import Detector
from blemish.noise import background
from blemish.noise.false_alarms import disc, false_alarms, least, log10_tail, number_of_tests, tests_of
from blemish.noise.gaussianise import gaussianise
from blemish.noise.pyramid import grow, mirrored, pyramid
from blemish.run.config import build

ROOT = Path(__file__).parents[1]
DOC = ROOT / "docs" / "noise_residual.md"
EPSILONS = (1.0, 0.1, 0.01)
RADII = (2, 4)
SIDE = 128
TEXTURES = ("brick", "grass", "gravel")
MORE = ("moon", "immunohistochemistry", "retina")  # surfaces that scikit-image has without a download, too
FEATURES = {"source": "features", "stages": [1, 2, 3], "patch_cells": 2, "components": 16}
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


def counts(batches: Iterator[Tensor], settings: tuple[tuple[int, str], ...], measured: bool = False, statistic: str = "mean") -> list[dict]:
    """For each (scales, bound) the means over all images, one per ε, of what has NFA ≤ ε.

    Counted are pixels of every scale's own grid, components of the final map, pixels of the final map, and images with any.
    """
    totals = np.zeros((len(settings), 4, len(EPSILONS)))
    images = 0
    for noise in batches:
        channels, height, width = noise.shape[1:]
        channels = tests_of(statistic, channels)
        levels = pyramid(noise, max(scales for scales, _ in settings))
        levels = [false_alarms(x, RADII, 1.0, mirrored(s), measured, statistic) for s, x in enumerate(levels)]  # log10 p
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
    """A periodic filter by its gain (SIDE, SIDE//2 + 1) in the Fourier domain."""
    return lambda x: torch.fft.irfft2(torch.fft.rfft2(x) * gain, s=x.shape[-2:])


def blur_gain(side: int, sigma: float) -> Tensor:
    fy, fx = torch.fft.fftfreq(side)[:, None], torch.fft.rfftfreq(side)
    return torch.exp(-2 * (math.pi * sigma) ** 2 * (fy**2 + fx**2))


def photograph(name: str) -> Tensor:
    """A grey photograph (1, 1, 512, 512), the middle of a larger one, in [0, 255]."""
    image = torch.tensor(getattr(skimage.data, name)()).float()
    image = image if image.ndim == 2 else image.mean(2)
    top, left = ((side - 512) // 2 for side in image.shape)
    return image[None, None, top : top + 512, left : left + 512]


@cache
def residual(name: str) -> Tensor:
    """What the patch model leaves of a whole photograph (1, 1, 512, 512) of a surface without defects."""
    return background.residual(photograph(name), **MODEL)


def crops(name: str, images: int, seed: int) -> Iterator[Tensor]:
    """Crops (50, 1, 128, 128) of a residual at a time from places drawn at random: they overlap, and 16 would cover the photograph."""
    generator, whole = torch.Generator().manual_seed(seed), residual(name)
    corners = torch.randint(0, whole.shape[-1] - SIDE + 1, (images, 2), generator=generator).tolist()
    for start in range(0, images, 50):
        yield torch.cat([whole[..., y : y + SIDE, x : x + SIDE] for y, x in corners[start : start + 50]])


def shuffled(x: Tensor, generator: torch.Generator) -> Tensor:
    """The same values of every channel in a drawn order: their law without any structure in space."""
    x = x.flatten(2)
    return x.gather(2, torch.rand(x.shape, generator=generator).argsort(2)).view(*x.shape[:2], SIDE, SIDE)


def other_phases(x: Tensor, generator: torch.Generator) -> Tensor:
    """The same power spectrum of every channel with the phases of white noise: correlation without structure."""
    white = torch.fft.rfft2(torch.randn(x.shape, generator=generator))
    return torch.fft.irfft2(white / white.abs() * torch.fft.rfft2(x).abs(), s=x.shape[-2:])


def changed(batches: Iterator[Tensor], change: Callable[[Tensor, torch.Generator], Tensor], seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (gaussianise(change(x, generator)) for x in batches)


@cache
def spectrum(name: str) -> Tensor:
    """The gain (SIDE, SIDE//2 + 1) that gives white noise the mean power spectrum of windowed crops of a residual."""
    x = gaussianise(torch.cat(list(crops(name, 200, 3))))
    window = torch.hann_window(SIDE)[:, None] * torch.hann_window(SIDE)
    power = torch.fft.rfft2((x - x.mean((2, 3), keepdim=True)) * window).abs().square().mean((0, 1))
    return (power / power.mean()).sqrt()


def whole_detector(images: int, side: int, level: float, seed: int) -> Iterator[Tensor]:
    """White noise as the image itself, through model and gaussianisation: what is left is no longer white."""
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, images, 50):
        noise = 128 + level * torch.randn(min(50, images - start), 1, side, side, generator=generator)
        yield gaussianise(background.residual(noise, **MODEL))


def detector(**changes) -> Detector:
    """The method on one scale, with the bundled network."""
    overrides = ["model=noise_residual", "backbone=tf_efficientnet_lite0", "weights=bundled", "data=textures", "model.scales=1"]
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        cfg = compose("train", overrides=[*overrides, "model.channels=1", *(f"model.{key}={value}" for key, value in changes.items())])
    return build(cfg.model).eval()


def alarms_of(name: str, images: int, **changes) -> list[dict]:
    """What a detector finds in crops of the right half of a photograph; references are the eight of the left half, which do not overlap."""
    model, photo = detector(**changes), photograph(name).expand(1, 3, -1, -1) / 255
    if model.needs_fit:
        state = model.new_state(8)
        state.update(photo[..., :256].unfold(2, SIDE, SIDE).unfold(3, SIDE, SIDE)[0].permute(1, 2, 0, 3, 4).flatten(0, 1))
        model.fit(state)
    generator = torch.Generator().manual_seed(2)
    corners = zip(*(torch.randint(0, room - SIDE + 1, (images,), generator=generator).tolist() for room in (512, 256)), strict=True)
    crops = torch.cat([photo[..., y : y + SIDE, 256 + x : 256 + x + SIDE] for y, x in corners])
    nfa = torch.cat([model.alarms(part).log10_nfa for part in crops.split(4)])
    step = 4 if model.backbone else 1  # cells of the network's finest stage
    hits = [(nfa <= math.log10(epsilon)) for epsilon in EPSILONS]
    row = {"scales": 1, "bound": "tests", "images": images, "pixels": [h[:, ::step, ::step].sum().item() / images for h in hits]}
    row["components"] = [sum(ndimage.label(one, structure=np.ones((3, 3)))[1] for one in h.numpy()) / images for h in hits]
    row["map_pixels"] = [h.sum().item() / images for h in hits]
    row["images_with_any"] = [h.any(2).any(1).float().mean().item() for h in hits]
    return [row | {"promise": model.bound_kind}]


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


def measure(images: int, path: Path, again: bool) -> dict:
    """All figures for `images` images of each kind; rows that the file at `path` has for as many stay, and it gets each new one at once."""
    known = {} if again or not path.is_file() else json.loads(path.read_text(encoding="utf-8"))
    result = {"epsilon": EPSILONS, "side": SIDE, "rows": [], "borders": known.get("borders") or borders(2000, 5)}
    both = ((1, "tests"), (4, "tests"))

    def add(name: str, channels: int, batches: Iterator[Tensor], count: Callable[..., list[dict]], least: int = images) -> None:
        found = [r for r in known.get("rows", []) if (r["noise"], r["channels"]) == (name, channels) and r["images"] >= least]
        result["rows"].extend(found or [{"noise": name, "channels": channels, **f} for f in count(batches)])
        if not found:
            seen = {(r["noise"], r["channels"]) for r in result["rows"]}
            later = [r for r in known.get("rows", []) if (r["noise"], r["channels"]) not in seen]
            keep({**result, "rows": result["rows"] + later}, path)
            print(*result["rows"][-2:], sep="\n", flush=True)

    few = min(300, images)
    low = blur_gain(SIDE, 1.0)
    colours: dict[str, Callable[[Tensor], Tensor]] = {"white": lambda x: x}
    colours |= {"low-pass, σ 1 px": spectral(low), "high-pass, σ 1 px": spectral(1 - low)}
    colours |= {f"spectrum of {name}'s residual": lambda x, name=name: spectral(spectrum(name))(x) for name in TEXTURES}
    for number, (name, colour) in enumerate(colours.items()):
        settings = (*both, (4, "map")) if name == "white" else both
        for channels in (1, 3, 5) if number < 3 else (1,):
            add(name, channels, drawn(images, channels, 1000 * number + channels, colour), partial(counts, settings=settings))
    for name in TEXTURES:
        for kind, change in (("pixels shuffled", shuffled), ("phases drawn", other_phases)):
            add(f"{name}'s residual, {kind}", 1, changed(crops(name, images, 9), change, 11), partial(counts, settings=both))
        itself = f"{name}'s residual itself"
        add(itself, 1, map(gaussianise, crops(name, images, 9)), partial(counts, settings=both))
        add(f"{itself}, mode: measured", 1, map(gaussianise, crops(name, images, 9)), partial(counts, settings=both, measured=True))
    white = drawn(images, 1, 1, colours["white"])
    add("white, mode: measured", 1, white, partial(counts, settings=both, measured=True))
    add("white image of 48 px through the whole detector", 1, whole_detector(images, 48, 30.0, 7), partial(counts, settings=both[:1]))
    for channels in (1, 5):
        count = partial(counts, settings=both, statistic="both")
        add("white, means and energy", channels, drawn(few, channels, channels, colours["white"]), count, few)
    for name in TEXTURES + MORE:
        for kind, options in (("", {}), (", mode: measured", {"measured": True})):
            for statistic in ("mean", "both") if kind else ("mean",):
                title = f"{name}'s residual itself{kind}" + (", means and energy" if statistic == "both" else "")
                if name in MORE or statistic == "both":
                    batches = map(gaussianise, crops(name, few, 9))
                    add(title, 1, batches, partial(counts, settings=both, statistic=statistic, **options), few)
    few = min(20, images)
    for name in TEXTURES + MORE:
        for kind, options in (
            ("pixels, 8 references", {"references": 8}),
            ("features, means and energy, 8 references", {"references": 8, "statistic": "both", **FEATURES}),
            ("features, energy, 8 references", {"references": 8, "statistic": "energy", **FEATURES}),
            ("features, energy, alone", {"statistic": "energy", **FEATURES}),
        ):
            add(f"{name}: {kind}", 1, iter(()), lambda _, n=name, o=options: alarms_of(n, few, **o), few)
    return result


def table(result: dict) -> str:
    """Markdown of all rows."""
    head = "noise | C | scales | `bound` | images | pixels at ε = 1 / .1 / .01 | components | pixels of the full-resolution map"
    lines = [f"| {head} |", "|---|--:|--:|---|--:|---|---|---|"]
    for r in result["rows"]:
        cells = [" / ".join(f"{v:.3g}" for v in r[key]) for key in ("pixels", "components", "map_pixels")]
        noise = r["noise"] + (f" ({r['promise']})" if "promise" in r else "")
        lines.append(f"| {noise} | {r['channels']} | {r['scales']} | {r['bound']} | {r['images']} | " + " | ".join(cells) + " |")
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
    parser.add_argument("--again", action="store_true", help="measure every row, those of the file too")
    options = parser.parse_args()
    path = ROOT / "results" / "false_alarms.json"
    with torch.inference_mode():
        result = measure(options.images, path, options.again)
    keep(result, path)
    put(DOC, "false_alarms", table(result))
    put(DOC, "borders", border_table(result))
    figure(result, ROOT / "docs" / "false_alarms.svg")


if __name__ == "__main__":
    main()
