"""Settings chosen without test images: a data set made of training images alone, a part of them with drawn defects."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import track
from scipy import ndimage

from blemish.data.dataset import cut
from blemish.data.module import ImageData, drawn
from blemish.data.textures import DEFECTS, blemished
from blemish.edge.errors import InputError
from blemish.edge.reading import read

SIDES = 0.12, 0.45  # of the square that a defect is drawn in, as shares of the image's shorter side
SMALLEST = 24  # pixels of that square


def blemish(
    image: np.ndarray, others: Sequence[np.ndarray], rng: np.random.Generator, inside: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, str]:
    """A uint8 image (H, W) or (H, W, 3) with one defect, its bool mask (H, W), and the defect's type, one of DEFECTS.

    Type, strength, size and place are drawn; the place where there is something to see rather than on a plain background, and inside of
    `inside` (H, W), at whose border the defect ends. `others` are images that a piece of foreign material may come from.
    """
    grey = image if image.ndim == 2 else image.mean(2)
    short = min(grey.shape)
    side = int(np.clip(rng.uniform(*SIDES) * short, min(SMALLEST, short), short))
    y, x = np.clip(np.array(place(grey, rng, inside)) - side // 2, 0, np.array(grey.shape) - side)
    window = np.rint(grey[y : y + side, x : x + side]).astype(np.uint8)
    foreign = [piece(other, side) for other in others]
    kind = str(rng.choice([name for name in DEFECTS if name != "foreign" or foreign]))
    for _ in range(20):  # a stain on black, or foreign matter that looks the same, is no defect
        changed, local = blemished(window, DEFECTS[kind], rng.uniform(0.4, 1.0), foreign, rng)
        local = local if inside is None else local & inside[y : y + side, x : x + side]
        if 2 * (changed != window)[local].sum() > local.sum() > 0:
            break
    mask = np.zeros(grey.shape, bool)
    mask[y : y + side, x : x + side] = local
    difference = np.zeros(grey.shape)
    difference[mask] = (changed.astype(float) - window)[local]
    shifted = image + (difference if image.ndim == 2 else difference[..., None])
    return np.clip(np.rint(shifted), 0, 255).astype(np.uint8), mask, kind


def place(grey: np.ndarray, rng: np.random.Generator, inside: np.ndarray | None = None) -> tuple[int, int]:
    """A pixel drawn with the square of its surroundings' contrast as probability, of those that are inside."""
    size = max(1.0, 0.02 * min(grey.shape))
    weight = ndimage.gaussian_filter(ndimage.gaussian_gradient_magnitude(grey.astype(float), 1.0), size).ravel() + 1e-6
    weight *= weight if inside is None else weight * inside.ravel()
    return divmod(int(rng.choice(weight.size, p=weight / weight.sum())), grey.shape[1])


def piece(image: np.ndarray, side: int) -> np.ndarray:
    """The grey values of an image (h, w) of at least `side` pixels a side, repeated by mirroring where it is smaller."""
    grey = image if image.ndim == 2 else image.mean(2)
    return np.pad(grey, [(0, max(0, side - length)) for length in grey.shape], mode="symmetric")


def write(data: ImageData, output: str | Path, share: float, seed: int) -> int:
    """Make the folder `output` of a data set's training images, for `data=folder`; returns the number of images drawn on.

    normal/ trains; normal_test/ is a seeded share of them, and defects/ has the same images with one defect each, masks/ its pixels.
    No test image of the data set is read. InputError if the folder exists, images are not of 8 bits, or each has a roi of its own.
    """
    if data.roi and data.roi.folder:
        raise InputError(f"data.roi={data.roi.folder}: a mask for each image, which drawn ones have not; expected one mask for all")
    output = Path(output)
    if output.exists():
        raise InputError(f"output={output}: exists; expected a folder that does not")
    rng = np.random.default_rng(seed)
    samples = [sample for sample in data.samples if sample.split in ("train", "calibrate")]
    held = set(drawn(samples, share, seed))
    aside = output.with_name(f".{output.name}-{os.getpid()}")
    others: list[np.ndarray] = []
    try:
        for folder in ("normal", "normal_test", "defects", "masks"):
            (aside / folder).mkdir(parents=True)
        for i, sample in enumerate(track(samples, "drawing", console=Console(stderr=True), transient=True)):
            image = cut(data.root, sample, read(data.root / sample.path))
            if image.dtype != np.uint8:
                raise InputError(f"{data.root / sample.path}: {image.dtype}; expected images of 8 bits")
            name = f"{i:05}.png"
            Image.fromarray(image).save(aside / ("normal_test" if sample in held else "normal") / name, compress_level=1)
            if sample in held:
                changed, mask, _ = blemish(image, others[-8:], rng, data.roi and data.roi.inside(None, *image.shape[:2]))
                Image.fromarray(changed).save(aside / "defects" / name, compress_level=1)
                Image.fromarray(mask).save(aside / "masks" / name)
            others = [*others[-7:], image]
        aside.rename(output)
    except OSError as error:
        raise InputError(f"output={output}: cannot be written ({error.strerror})") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return len(held)
