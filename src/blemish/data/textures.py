"""Textures made on first use: crops of photographs in scikit-image, with drawn defects and their exact masks; no download."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import skimage.data
from PIL import Image
from scipy import ndimage
from scipy.spatial import cKDTree
from skimage.draw import line

from blemish.data.dataset import threaded
from blemish.data.mvtec import MVTec
from blemish.edge.checks import LARGEST_SEED, check_whole
from blemish.edge.errors import InputError
from blemish.edge.reading import find_images
from blemish.files import remove_stale

TEXTURES = ("brick", "grass", "gravel")  # 512×512 grey photographs, CC0, inside the scikit-image wheel
VERSION = 1  # of the drawing below, part of the folder's name
TRAIN_SHARE = 0.625  # columns of the photograph that training crops come from; test crops come from the rest
CROPS = {"train": 80, "test": 20, "defect": 8}
SMALLEST, LARGEST = 32, 192  # pixels of a crop: room for a defect, and for the crop in the test columns


@dataclass(kw_only=True, eq=False, repr=False)
class Textures(MVTec):
    """One photographed texture in MVTec AD's layout: 80 training crops, 20 normal test crops, 8 of each of six drawn defects.

    crop_size: side of the crops in pixels. texture_seed: of crops and defects; runs with other seeds use the same images. Training crops
    overlap, so that a hold-out of them is nearer to training than the test crops are: expect somewhat more false alarms than promised.
    """

    name = "textures"
    published = "made by this package from CC0 photographs in scikit-image (skimage.data); nothing to download"
    layout = "any folder that can be written; category is one of " + ", ".join(TEXTURES)

    crop_size: int
    texture_seed: int

    def __post_init__(self) -> None:
        check_whole("data", SMALLEST, LARGEST, crop_size=self.crop_size)
        check_whole("data", 0, LARGEST_SEED, texture_seed=self.texture_seed)
        self.root = Path(self.root) / key(self.crop_size, self.texture_seed)
        super().__post_init__()

    def prepare_data(self) -> None:
        self.folder()

    def folder(self) -> Path:
        if self.category not in TEXTURES:
            raise InputError(f"data.category={self.category}: no such texture; expected one of {', '.join(TEXTURES)}")
        make(self.root, self.category, self.crop_size, self.texture_seed)
        return self.root / self.category


def key(crop_size: int, seed: int) -> str:
    """The name of the folder for these settings, which no other drawing, size or seed has."""
    settings = {"version": VERSION, "size": crop_size, "seed": seed, "share": TRAIN_SHARE, "crops": CROPS, "defects": list(DEFECTS)}
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=4).hexdigest()
    return f"{VERSION}-{crop_size}-{seed}-{digest}"


def make(root: Path, name: str, crop_size: int, seed: int) -> None:
    """Write <root>/<name> in MVTec AD's layout unless it is there, atomically; several processes may do so at the same time."""
    final = root / name
    if is_complete(final):
        return
    with new_folder(final, "data.root=<folder>", is_complete) as folder:
        images = build(name, crop_size, seed)
        for parent in {(folder / path).parent for path in images}:
            parent.mkdir(parents=True, exist_ok=True)
        threaded(lambda path: Image.fromarray(images[path]).save(folder / path), list(images))


@contextlib.contextmanager
def new_folder(final: Path, setting: str, is_complete: Callable[[Path], bool] | None = None) -> Iterator[Path]:
    """A temporary folder that becomes `final` when the block ends well, and is removed otherwise.

    is_complete: tells a folder that another process has made, which is kept, from one to be replaced; without it no folder is replaced.
    InputError, with the setting to change, if the folder cannot be written.
    """
    temporary = final.with_name(f".{os.getpid()}-{os.urandom(4).hex()}")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(final.parent)  # of processes that were killed
        temporary.mkdir()
        yield temporary
        if is_complete and final.is_dir() and not is_complete(final):
            shutil.rmtree(final)
        temporary.rename(final)
    except OSError as error:
        if not (is_complete and is_complete(final)):
            raise InputError(f"{final}: cannot be written ({error.strerror}); choose another place with {setting}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def is_complete(folder: Path) -> bool:
    """Whether a folder has every file that `make` writes."""
    files = CROPS["train"] + CROPS["test"] + 2 * len(DEFECTS) * CROPS["defect"]
    return folder.is_dir() and len(find_images(folder, results=True)) == files


def build(name: str, crop_size: int, seed: int) -> dict[str, np.ndarray]:
    """The images of a texture by relative path, uint8 (crop_size, crop_size); masks are 255 exactly where a defect was drawn."""
    rng = np.random.default_rng([seed, TEXTURES.index(name)])
    photographs = {other: photograph(other) for other in TEXTURES}
    # columns of the photograph for training crops and for test crops
    train, test = np.split(photographs[name], [round(TRAIN_SHARE * photographs[name].shape[1])], axis=1)
    foreign = [image for other, image in photographs.items() if other != name]
    images = {f"train/good/{i:03}.png": cropped(train, crop_size, rng) for i in range(CROPS["train"])}
    images |= {f"test/good/{i:03}.png": cropped(test, crop_size, rng) for i in range(CROPS["test"])}
    for defect, draw in DEFECTS.items():
        for i, strength in enumerate(np.linspace(0.3, 1.0, CROPS["defect"])):  # from faint to plain
            image, mask = blemished(cropped(test, crop_size, rng), draw, strength, foreign, rng)
            images[f"test/{defect}/{i:03}.png"] = image
            images[f"ground_truth/{defect}/{i:03}_mask.png"] = mask.astype(np.uint8) * 255
    return images


def photograph(name: str) -> np.ndarray:
    return getattr(skimage.data, name)()


def cropped(image: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """A square crop at a random place, mirrored at random in both directions."""
    y, x = (rng.integers(0, side - size + 1) for side in image.shape)
    flip_y, flip_x = rng.choice((1, -1), 2)
    return image[y : y + size, x : x + size][::flip_y, ::flip_x].copy()


Drawn = tuple[np.ndarray, np.ndarray]  # a defect's look (h, w) float, and its coverage of each pixel (h, w) in [0, 1]
Draw = Callable[[np.ndarray, float, Sequence[np.ndarray], np.random.Generator], Drawn]


def blemished(
    image: np.ndarray, draw: Draw, strength: float, foreign: Sequence[np.ndarray], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """A uint8 image (h, w) with one defect, and the bool mask (h, w) of the pixels it covers; no other pixel changes."""
    clean = image.astype(float)
    look, cover = draw(clean, strength, foreign, rng)
    mask = cover > 0.1  # a fainter rim is not drawn, so that the mask is exact
    mixed = np.clip(np.rint(clean + cover * (look - clean)), 0, 255).astype(np.uint8)
    return np.where(mask, mixed, image), mask


def scratch(image: np.ndarray, strength: float, foreign: Sequence[np.ndarray], rng: np.random.Generator) -> Drawn:
    """A slightly bent line with a bright core and a dark flank, fading towards its ends."""
    size = len(image)
    far, way = _from_curve(size, rng.uniform(0.35, 0.75) * size, bend=0.3, rng=rng)
    width = (0.25 + 0.75 * np.sin(np.pi * way)) * (0.004 + 0.004 * strength) * size
    core = np.clip(width + 0.5 - np.abs(far), 0, 1)
    flank = np.clip(width + 0.5 - np.abs(far + 2 * width), 0, 1)
    cover = np.maximum(core, flank)
    light = (core - 0.6 * flank) / np.maximum(cover, 1e-9)
    return image + 120 * strength * light, cover


def stain(image: np.ndarray, strength: float, foreign: Sequence[np.ndarray], rng: np.random.Generator) -> Drawn:
    """A wet or oily blotch: the texture shows through, darker, and darkest at its rim, where it dried."""
    shape = _blob(len(image), rng.uniform(0.10, 0.20), rough=0.5, rng=rng)
    depth = ndimage.distance_transform_edt(shape)
    rim = np.exp(-depth / (0.02 * len(image)))
    darker = (0.15 + 0.35 * strength) * (0.75 + 0.6 * rim)
    uneven = 1 + 0.25 * _noise(len(image), 0.05, rng)
    return image * np.clip(1 - darker * uneven, 0, 1), _feathered(shape, 1.5)


def hole(image: np.ndarray, strength: float, foreign: Sequence[np.ndarray], rng: np.random.Generator) -> Drawn:
    """A pit: nearly black on the side away from the light, with a lit edge opposite."""
    size = len(image)
    shape = _blob(size, 0.03 + 0.04 * strength * rng.uniform(0.7, 1.3), rough=0.3, rng=rng)
    edge = ndimage.gaussian_filter(shape.astype(float), 0.012 * size)
    angle = rng.uniform(0, 2 * np.pi)
    slope = np.cos(angle) * ndimage.sobel(edge, 0) + np.sin(angle) * ndimage.sobel(edge, 1)
    lit = slope / (np.abs(slope).max() + 1e-9)
    dark = image.min() * rng.uniform(0.3, 0.8)
    floor = dark + (0.65 - 0.55 * strength) * (ndimage.gaussian_filter(image, 1) - dark)
    return floor + 60 * np.clip(lit, 0, 1), _feathered(shape, 0.8)


def smear(image: np.ndarray, strength: float, foreign: Sequence[np.ndarray], rng: np.random.Generator) -> Drawn:
    """A wiped place: blurred along one direction, under a dull film."""
    size = len(image)
    length = round((0.05 + 0.13 * strength) * size)
    kernel = np.zeros((2 * length + 1,) * 2)
    dy, dx = _direction(rng) * length
    rows, columns = line(round(length - dy), round(length - dx), round(length + dy), round(length + dx))
    kernel[rows, columns] = 1
    wiped = ndimage.convolve(image, kernel / kernel.sum(), mode="reflect")
    look = image + (0.5 + 0.5 * strength) * (wiped - image) + 6 + 8 * strength + 2 * _noise(size, 0.006, rng)
    return look, _feathered(_blob(size, rng.uniform(0.12, 0.19), rough=0.35, rng=rng), 2.0)


def foreign(image: np.ndarray, strength: float, foreign: Sequence[np.ndarray], rng: np.random.Generator) -> Drawn:
    """A piece of another material; the fainter, the nearer its brightness and contrast are to the surface's own."""
    size = len(image)
    other = cropped(foreign[rng.integers(len(foreign))], size, rng).astype(float)
    matched = (other - other.mean()) / other.std() * image.std() + image.mean()
    shifted = other + rng.choice((-1, 1)) * 45 * strength
    return matched + strength * (shifted - matched), _feathered(_blob(size, 0.07 + 0.09 * strength, rough=0.5, rng=rng), 1.0)


def missing(image: np.ndarray, strength: float, foreign: Sequence[np.ndarray], rng: np.random.Generator) -> Drawn:
    """A tilted block broken out of the surface: bare ground with grain, a shadow along two of its sides."""
    size = len(image)
    centre = rng.uniform(0.3, 0.7, 2) * size
    half = rng.uniform(0.08, 0.17, 2) * size
    along = _direction(rng)
    y, x = np.mgrid[:size, :size] - centre[:, None, None]
    u, v = along[0] * y + along[1] * x, -along[1] * y + along[0] * x
    ragged = 0.007 * size * _noise(size, 0.03, rng)
    inside = np.minimum(half[0] - np.abs(u), half[1] - np.abs(v)) + ragged
    shadow = np.clip(1 - np.minimum(half[0] + u, half[1] + v) / (0.06 * size), 0, 1)
    ground = ndimage.gaussian_filter(image, 0.12 * size, mode="reflect") * (1 - 0.25 * strength) + 6 * _noise(size, 0.008, rng)
    bare = ground - 45 * strength * shadow
    return image + (0.45 + 0.55 * strength) * (bare - image), np.clip(inside + 0.5, 0, 1)


DEFECTS: dict[str, Draw] = {draw.__name__: draw for draw in (foreign, hole, missing, scratch, smear, stain)}


def _direction(rng: np.random.Generator) -> np.ndarray:
    angle = rng.uniform(0, np.pi)
    return np.array([np.cos(angle), np.sin(angle)])


def _noise(size: int, scale: float, rng: np.random.Generator) -> np.ndarray:
    """Smooth noise of mean 0 and deviation 1; `scale` is its grain as a share of the side."""
    noise = ndimage.gaussian_filter(rng.standard_normal((size, size)), scale * size, mode="wrap")
    return (noise - noise.mean()) / noise.std()


def _blob(size: int, radius: float, rough: float, rng: np.random.Generator) -> np.ndarray:
    """A connected, irregular shape (size, size) bool; `radius` is a share of the side, `rough` the deviation from a circle as a share."""
    centre = rng.uniform(0.25, 0.75, 2) * size
    y, x = np.mgrid[:size, :size] - centre[:, None, None]
    angle, stretch = rng.uniform(0, np.pi), rng.uniform(0.7, 1.4)
    u, v = np.cos(angle) * y + np.sin(angle) * x, np.cos(angle) * x - np.sin(angle) * y
    distance = np.hypot(u * stretch, v / stretch) / (radius * size)
    shape = distance < 1 + rough * np.clip(_noise(size, 0.35 * radius, rng), -1.5, 1.5)
    parts, _ = ndimage.label(shape)
    return ndimage.binary_fill_holes(parts == np.bincount(parts[parts > 0]).argmax())


def _feathered(shape: np.ndarray, width: float) -> np.ndarray:
    """The coverage (h, w) of a shape with a rim of `width` pixels on either side of its border."""
    signed = ndimage.distance_transform_edt(shape) - ndimage.distance_transform_edt(~shape)
    return np.clip(0.5 + signed / (2 * width), 0, 1)


def _from_curve(size: int, length: float, bend: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The signed distance (size, size) of each pixel to a parabola's arc of about `length` pixels, and its nearest point there, 0 to 1."""
    centre = rng.uniform(0.35, 0.65, 2) * size
    along = _direction(rng)
    across = np.array([-along[1], along[0]])
    height = rng.uniform(-bend, bend) * length
    t = np.linspace(0, 1, 4 * size)
    points = centre + (t - 0.5)[:, None] * length * along + (4 * t * (1 - t) * height)[:, None] * across
    pixels = np.moveaxis(np.mgrid[:size, :size], 0, -1).reshape(-1, 2)
    far, nearest = cKDTree(points).query(pixels)
    normal = across * length - np.outer(4 * (1 - 2 * t) * height, along)  # of the arc, not of unit length
    side = np.where(((pixels - points[nearest]) * normal[nearest]).sum(axis=1) < 0, -1, 1)
    return (side * far).reshape(size, size), t[nearest].reshape(size, size)
