"""A data set to choose settings on without test images: training images alone, a part of them with drawn defects."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import track
from scipy import ndimage

from blemish.data.dataset import cut
from blemish.data.module import ImageData
from blemish.data.samplers import seeded_share
from blemish.data.textures import DEFECTS, blemished, new_folder
from blemish.edge.errors import InputError
from blemish.edge.reading import read

SIDES = (0.12, 0.45)  # of the square that a defect is drawn in, from and to, as shares of the image's shorter side
SMALLEST = 24  # pixels of that square


def blemish(
    image: np.ndarray,
    others: Sequence[np.ndarray],
    rng: np.random.Generator,
    inside: np.ndarray | None = None,
    sides: Sequence[float] = SIDES,
) -> tuple[np.ndarray, np.ndarray, str]:
    """Draw one defect on a uint8 image (H, W) or (H, W, 3); returns the image, the bool mask (H, W) of the defect, and its type.

    Type, strength, size and place are random; the place is where the image has contrast and inside the ROI `inside` (H, W), at whose border
    the defect ends. `sides`, from and to, are those of the square it is drawn in, as shares of the shorter side. `others` are images from
    which foreign material may be taken.
    """
    grey = image if image.ndim == 2 else image.mean(2)
    short = min(grey.shape)
    side = int(np.clip(rng.uniform(*sides) * short, min(SMALLEST, short), short))
    y, x = np.clip(np.array(place(grey, rng, inside)) - side // 2, 0, np.array(grey.shape) - side)
    square = slice(y, y + side), slice(x, x + side)
    clean = np.rint(grey[square]).astype(np.uint8)
    foreign = [piece(other, side) for other in others]
    kind = str(rng.choice([name for name in DEFECTS if name != "foreign" or foreign]))
    for _ in range(20):  # a stain on black, or foreign material that looks the same, is no defect
        changed, local = blemished(clean, DEFECTS[kind], rng.uniform(0.4, 1.0), foreign, rng)
        local = local if inside is None else local & inside[square]
        if 2 * (changed != clean)[local].sum() > local.sum() > 0:
            break
    mask, difference = np.zeros(grey.shape, bool), np.zeros(grey.shape)
    mask[square] = local
    difference[mask] = (changed.astype(float) - clean)[local]
    shifted = image + (difference if image.ndim == 2 else difference[..., None])
    return np.clip(np.rint(shifted), 0, 255).astype(np.uint8), mask, kind


def place(grey: np.ndarray, rng: np.random.Generator, inside: np.ndarray | None = None) -> tuple[int, int]:
    """A random pixel (y, x) inside the ROI, with a probability proportional to the squared contrast of its surroundings."""
    size = max(1.0, 0.02 * min(grey.shape))
    weight = ndimage.gaussian_filter(ndimage.gaussian_gradient_magnitude(grey.astype(float), 1.0), size).ravel() + 1e-6
    weight *= weight if inside is None else weight * inside.ravel()
    return divmod(int(rng.choice(weight.size, p=weight / weight.sum())), grey.shape[1])


def piece(image: np.ndarray, side: int) -> np.ndarray:
    """The grey values (h, w) of an image, continued by mirroring to at least `side` pixels a side."""
    grey = image if image.ndim == 2 else image.mean(2)
    return np.pad(grey, [(0, max(0, side - length)) for length in grey.shape], mode="symmetric")


def write(data: ImageData, output: str | Path, share: float, seed: int, sides: Sequence[float] | None = None) -> int:
    """Make a folder for `data=folder` of a data set's training images; returns the number of images with drawn defects.

    normal/ is to train on, normal_test/ a seeded share kept from it; defects/ has the images of normal_test/ with one defect each, masks/
    the pixels of the defects, drawn in squares of `sides`, by default SIDES. InputError if the folder exists, images are not of 8 bits, or
    the ROI is a folder of masks.
    """
    if data.roi and data.roi.folder:
        raise InputError(f"data.roi={data.roi.folder}: a mask for each image, which drawn images lack; expected one mask for all")
    output = Path(output)
    if output.exists():
        raise InputError(f"output={output}: exists; expected a new folder")
    rng = np.random.default_rng(seed)
    samples = [sample for sample in data.samples if sample.split in ("train", "calibrate")]
    tested = set(seeded_share(samples, share, seed))
    others: list[np.ndarray] = []
    with new_folder(output, "output=<folder>") as made:
        for folder in ("normal", "normal_test", "defects", "masks"):
            (made / folder).mkdir()
        for i, sample in enumerate(track(samples, "drawing", console=Console(stderr=True), transient=True)):
            image = cut(data.root, sample, read(data.root / sample.path))
            if image.dtype != np.uint8:
                raise InputError(f"{data.root / sample.path}: {image.dtype}; expected images of 8 bits")
            name = f"{i:05}.png"
            Image.fromarray(image).save(made / ("normal_test" if sample in tested else "normal") / name, compress_level=1)
            if sample in tested:
                changed, mask, _ = blemish(image, others[-8:], rng, data.roi and data.roi.inside(None, *image.shape[:2]), sides or SIDES)
                Image.fromarray(changed).save(made / "defects" / name, compress_level=1)
                Image.fromarray(mask).save(made / "masks" / name)
            others = [*others[-7:], image]
    return len(tested)
