"""Image files as arrays with all their bits, and the way from an array to the network's input and back."""

import errno
import hashlib
import logging
import os
import stat
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from io import BytesIO
from itertools import islice
from pathlib import Path

import numpy as np
import tifffile
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F

from blemish import runtime
from blemish.runtime import GREY, Geometry, middle, painted, unseen
from blemish.types import OUTSIDE, InputError

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm")
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")  # told by content, whatever the ending
SMALLEST = 8  # pixels; no backbone makes a map of less
LARGEST = 2**30  # pixels; a radiograph of 20,000 × 12,000 has a quarter of it
FREE, DENSEST = 2**24, 2**14  # pixels that any file may have, and those for each of its bytes: deflate packs 8256 of one bit
UINT16 = (0.0, 65535.0)
QUANTILES = (0.0005, 0.9995)
PAGES = 100  # of a TIFF that are looked at: in a damaged one they may follow one another in a circle
NO_WAITING = getattr(os, "O_NONBLOCK", 0)

Image.init()  # all its formats are known before the first file, which threads may open together
# Pillow's own limit, 179 million pixels, would refuse large radiographs
Image.MAX_IMAGE_PIXELS = LARGEST
# damaged metadata (EXIF, TIFF tags) of a sound image is no news to the user
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # refused by `_open`
for decoder in ("tifffile", "PIL.TiffImagePlugin"):  # what they say of a damaged file, `read` says with the path
    logging.getLogger(decoder).setLevel(logging.CRITICAL)


def find_images(folder: Path) -> list[Path]:
    """Every image file under a folder at any depth, sorted; hidden files and folders are left out, links followed once."""
    found, seen = [], set()
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # a link back to a folder already walked
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(place, name) for name in files if name.lower().endswith(ENDINGS) and not name.startswith(".")]
    return sorted(found)


def read(path: str | Path, digest: str = "") -> np.ndarray:
    """The image as uint8, uint16 or float32, (H, W) or (H, W, 3), with every bit the file holds.

    Alpha is dropped, palettes are expanded, EXIF orientation is applied, one bit becomes 0 and 255, 32-bit integers become
    float32. InputError names the path of a file that is missing, empty, damaged, cut short, of several pages, not finite, or
    has a side below 8 pixels, or whose content is no longer what `file_digest` once gave.
    """
    path = Path(path)
    try:
        data = content(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); expected an image file") from error
    if not data:
        raise InputError(f"{path}: the file is empty; expected an image")
    if digest and (found := digest_of(data)) != digest:
        raise InputError(f"{path}: changed while it was in use (digest {found}, before {digest}); run again")
    try:
        array = _decode(data)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except UnidentifiedImageError:
        raise InputError(f"{path}: not an image of a known kind; expected {', '.join(FORMATS)}") from None
    except Exception as error:  # decoders raise whatever they like on a damaged file
        raise InputError(f"{path}: damaged or cut short ({error}); expected a whole image") from error
    if array.ndim not in (2, 3) or array.shape[2:] not in ((), (3,)):
        raise InputError(f"{path}: an array of shape {array.shape}; expected grey (H, W) or colour (H, W, 3)")
    if min(array.shape[:2]) < SMALLEST:
        raise InputError(f"{path}: {array.shape[1]}×{array.shape[0]} pixels; expected at least {SMALLEST}×{SMALLEST}")
    if array.dtype == np.float32 and not np.isfinite(array).all():
        raise InputError(f"{path}: {np.count_nonzero(~np.isfinite(array))} values are NaN or infinite; expected finite values")
    return array


def digest_of(data: bytes) -> str:
    """16 hex digits that a file is known by."""
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def file_digest(path: Path) -> str:
    """`digest_of` a file's content."""
    return digest_of(content(path))


def content(path: Path) -> bytes:
    """The bytes of a file; OSError also for a pipe or a device, which `open` would wait for."""
    with open(path, "rb", buffering=0, opener=lambda name, flags: os.open(name, flags | NO_WAITING)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "neither a file nor a link to one", str(path))
        return file.readall()


def _decode(data: bytes) -> np.ndarray:
    if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return _decode_tiff(data)
    with _open(data) as image:
        if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:  # MPO: a photograph and its previews
            raise InputError(f"holds {image.n_frames} frames; expected one image a file")
        if image.format == "PNG" and data[24] == 16 and image.mode != "I;16":
            return _colour_png16(data)
        if image.format == "PPM" and image.mode == "RGB" and _ppm_maximum(data) > 255:
            raise InputError("a colour PPM of 16 bits would lose half of them; expected PNG or TIFF")
        sixteen = image.format == "PPM" and image.mode == "I"  # Pillow holds values stretched to 0..65535 in 32 bits
        array = _pillow(image)
        return array.astype(np.uint16) if sixteen else array


def _open(data: bytes) -> Image.Image:
    too_many = InputError(f"more than {LARGEST} pixels; expected at most that, cut it into tiles")
    try:
        image = Image.open(BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise too_many from None
    if image.width * image.height > LARGEST:  # up to twice as many Pillow merely warns
        image.close()
        raise too_many
    if image.format != "WEBP" and not (image.format == "TIFF" and image.mode == "1"):  # a blank one of these takes next to nothing
        _possible(image.width, image.height, data)
    return image


def _possible(width: int, height: int, data: bytes) -> None:
    """InputError for a size that so few bytes cannot hold: a decoder would first take the memory and then see the end of the file."""
    if width * height > FREE + DENSEST * len(data):
        raise InputError(f"{width}×{height} pixels in {len(data)} bytes, which cannot hold them; expected a whole image")


def _pillow(image: Image.Image) -> np.ndarray:
    _load_upright(image)
    mode = image.mode
    if mode.startswith("I;16"):
        return np.array(image).astype(np.uint16)  # in the machine's byte order, whatever the file's was
    if mode in ("I", "F"):
        return np.array(image, dtype=np.float32)
    if mode in ("1", "LA", "La"):
        return np.array(image.convert("L"))
    if mode in ("P", "PA"):
        return np.array(image.convert("RGBA").convert("RGB"))  # the short way warns of transparency
    return _copied(image if mode in ("L", "RGB") else image.convert("RGB"))


def _copied(image: Image.Image) -> np.ndarray:
    """np.array(image) of an L or RGB image, by bands of rows: Pillow's own way makes a third copy of all pixels in between."""
    width, height = image.size
    array, step = np.empty((height, width, 3) if image.mode == "RGB" else (height, width), np.uint8), max(1, 2**24 // width)
    for row in range(0, height, step):
        array[row : row + step] = np.asarray(image.crop((0, row, width, min(row + step, height))) if step < height else image)
    return array


def _colour_png16(data: bytes) -> np.ndarray:
    """PNG of 16 bits with colour or alpha, of which Pillow keeps one byte a value: read the high bytes, then the low ones.

    (torchvision reads all 16 bits but has ended the whole process on a damaged file.)
    """
    with _open(data) as image:
        tile = image.tile[0]
        if tile.args == "LA;16B":  # grey high, grey low, alpha high, alpha low: four bytes like a pixel of RGBA
            image.tile = [tile._replace(args="RGBA")]
            _load_upright(image)
            array = np.array(image).astype(np.uint16)
            return array[..., 0] << 8 | array[..., 1]
        high = _pillow(image).astype(np.uint16)
    with _open(data) as image:
        image.tile = [tile._replace(args=tile.args.replace("16B", "16L"))]
        return high << 8 | _pillow(image)


def _load_upright(image: Image.Image) -> None:
    image.load()  # before the question for EXIF, which a PNG may hold behind its pixels
    with suppress(SyntaxError):  # EXIF that is none, in a sound image
        ImageOps.exif_transpose(image, in_place=True)


def _ppm_maximum(data: bytes) -> int:
    header = b" ".join(line.split(b"#")[0] for line in data[:4096].split(b"\n"))
    return int(header.split()[3])


def _decode_tiff(data: bytes) -> np.ndarray:
    """Eight bits by Pillow, which knows all colour spaces and compressions; more bits by tifffile, which keeps them."""
    with tifffile.TiffFile(BytesIO(data)) as tiff:
        pages = [page for page in islice(tiff.pages, PAGES) if not page.is_reduced]  # thumbnails are not pages
        if len(pages) != 1:
            raise InputError(f"a TIFF of {len(pages)} pages{' or more' * (len(pages) == PAGES)}; expected one image a file")
        page = pages[0]
        if page.imagewidth * page.imagelength > LARGEST:
            raise InputError(f"{page.imagewidth}×{page.imagelength} pixels; expected at most {LARGEST}, cut it into tiles")
        if page.dtype not in (np.uint8, bool):
            _possible(page.imagewidth, page.imagelength, data)
        if page.dtype in (np.uint8, bool):
            with _open(data) as image:
                return _pillow(image)
        return _deep_tiff(page, data)


def _deep_tiff(page: tifffile.TiffPage, data: bytes) -> np.ndarray:
    if 0 in page.databytecounts:
        raise InputError("parts without content; expected a whole image")  # they would come out black
    orientation = page.tags.valueof(274, 1)
    try:
        array = page.asarray()
    except Exception:
        if page.samplesperpixel > 1:  # of each, Pillow would keep eight bits
            raise
        with _open(data) as image:  # its libtiff knows LZW, for which tifffile wants another package
            array, orientation = np.array(image), 1  # turned upright by Pillow
    if array.dtype.kind == "c":
        raise InputError("complex values; expected real ones")
    if array.ndim == 3 and page.planarconfig == tifffile.PLANARCONFIG.SEPARATE:
        array = np.moveaxis(array, 0, -1)
    if array.ndim == 3:
        array = array[..., :3] if array.shape[2] >= 3 else array[..., 0]  # without alpha
    if array.dtype.kind == "u" and page.photometric == tifffile.PHOTOMETRIC.MINISWHITE:
        array = np.asarray(2**page.bitspersample - 1, array.dtype) - array
    with np.errstate(over="ignore"):  # a double beyond float32 becomes infinite, which `read` refuses
        array = array.astype(np.uint16 if array.dtype == np.uint16 else np.float32)
    return np.ascontiguousarray(_upright(array, orientation))


def _upright(array: np.ndarray, orientation: int) -> np.ndarray:
    """Undo the eight orientations of the TIFF tag 274: the names are of the image's first row and first column."""
    turned = {
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
        8: lambda a: np.rot90(a),
    }
    return turned.get(orientation, lambda a: a)(array)


def dtype_of(path: str | Path) -> str:
    """The dtype `read` will return, "uint8", "uint16" or "float32", from the file's header where that is enough."""
    with Path(path).open("rb") as file:
        head = file.read(32)
    if head[:3] == b"\xff\xd8\xff" or head[:2] == b"BM" or head[:4] in (b"GIF8", b"RIFF"):
        return "uint8"
    if head[:4] == b"\x89PNG" and len(head) > 24:
        return "uint16" if head[24] == 16 else "uint8"
    return read(path).dtype.name


def to_unit(array: np.ndarray, window: Mapping[str, tuple[float, float]]) -> Tensor:
    """An image (H, W) or (H, W, 3) of any dtype as (3, H, W) float32 in [0, 1]: (value − lo) / (hi − lo), clamped.

    `window` has (lo, hi) for "uint16" and "float32" in the units of the file; uint8 is 0..255 always, uint16 is 0..65535
    without an entry, float32 without an entry is an InputError.
    """
    dtype = array.dtype.name
    ranges = {"uint16": UINT16, **window, "uint8": (0.0, 255.0)}
    if dtype not in ranges:
        raise InputError(f"data.window: no range for {dtype} images; expected [lo, hi], or auto with training images of that kind")
    lo, hi = ranges[dtype]
    unit = array.astype(np.float32)
    unit -= lo
    unit /= hi - lo
    image = torch.from_numpy(unit.clip(0, 1, out=unit))
    return image.permute(2, 0, 1) if image.ndim == 3 else image.expand(3, *image.shape)  # (3, H, W)


def fit_window(paths: Iterable[str | Path], load: Callable[[Path], np.ndarray] = read, most: int = 200) -> dict[str, tuple[float, float]]:
    """The range of values per dtype that holds all but the outermost 0.05 % on either side, over training images as `load` gives them.

    At most `most` images of a dtype are read, evenly spaced in the order given; only dtypes that occur get an entry and
    uint8 none. Where the two quantiles coincide the extremes take their place, and one above them for a constant.
    """
    found: dict[str, list] = {}
    for path in paths:
        found.setdefault(dtype_of(path), []).append(path)
    found.pop("uint8", None)
    window = {}
    for dtype, members in sorted(found.items()):
        chosen = [members[i] for i in np.unique(np.linspace(0, len(members) - 1, most).round().astype(int))]
        lo, hi = (_quantiles16 if dtype == "uint16" else _quantiles)(chosen, load)
        window[dtype] = (lo, hi if hi > lo else lo + 1.0)
    return window


def _quantiles16(paths: list, load: Callable) -> tuple[float, float]:
    counts = np.zeros(65536, dtype=np.int64)
    for path in paths:
        counts += np.bincount(load(path).ravel(), minlength=65536)
    share = counts.cumsum() / counts.sum()
    lo, hi = (int(np.searchsorted(share, q)) for q in QUANTILES)
    if lo == hi:
        lo, hi = np.flatnonzero(counts)[[0, -1]]
    return float(lo), float(hi)


def _quantiles(paths: list, load: Callable, each: int = 100_000) -> tuple[float, float]:
    """As `_quantiles16` with at most `each` values of an image, drawn at random."""
    rng = np.random.default_rng(0)
    arrays = (load(path).ravel() for path in paths)
    values = np.concatenate([a if a.size <= each else rng.choice(a, each, shuffle=False) for a in arrays])
    lo, hi = np.quantile(values, QUANTILES, method="inverted_cdf")
    if lo == hi:
        lo, hi = values.min(), values.max()
    return float(lo), float(hi)


def place(image: Tensor, geometry: Geometry) -> Tensor:
    """An image (3, H, W), float or uint8, as its geometry brings it to the network, by antialiased bilinear interpolation.

    InputError if the crop is larger than what it is cut from.
    """
    inner, outer, crop = geometry.inner(*image.shape[-2:]), geometry.outer(*image.shape[-2:]), geometry.crop
    if image.shape[-2:] != inner:
        # torch 2.14 on a CPU takes wrong rows of floats where the width becomes 1: on its side an image is resized right;
        # bytes are right as they are, and rounded after one axis and then the other
        turned = inner[1] == 1 and image.is_floating_point()
        image, shape = (image.mT.contiguous(), inner[::-1]) if turned else (image, inner)
        image = F.interpolate(image[None], shape, mode="bilinear", antialias=True, align_corners=False)[0]
        image = image.mT if turned else image
        image = image.clamp_(0, 1) if image.is_floating_point() else image
    if inner != outer:
        whole = image.new_full((*image.shape[:-2], *outer), GREY / 255 if image.is_floating_point() else GREY)
        whole[..., *middle(outer, inner)] = image
        image = whole
    if crop is None:
        return image
    if crop > min(outer):
        raise InputError(f"data.crop={crop} of an image of {outer[1]}×{outer[0]} pixels; expected at most {min(outer)}, or crop=null")
    return image[..., *middle(outer, (crop, crop))]


def place_mask(mask: Tensor, geometry: Geometry) -> Tensor:
    """A mask (H, W) uint8 to where `place` puts its image, by the nearest pixel so that no value is made up; OUTSIDE lies beside it."""
    # numpy: interpolate's nearest-exact starts threads within threads
    return torch.from_numpy(runtime.place_mask(mask.numpy(), geometry, OUTSIDE))


def prepare(array: np.ndarray, window: Mapping[str, tuple[float, float]], geometry: Geometry, seen: np.ndarray | None = None) -> Tensor:
    """`to_unit`, then `place`: (3, h, w) float32 in [0, 1]; bytes are resized as bytes, which is quicker and within one grey level.

    Where an image (H, W) is not `seen` it is painted before.
    """
    array = array if seen is None else painted(array, seen, window)
    if array.dtype == np.uint8:
        image = torch.from_numpy(array)
        image = image.permute(2, 0, 1) if image.ndim == 3 else image[None]  # (3, H, W) or (1, H, W)
        image = torch.from_numpy(place(image, geometry).numpy() / np.float32(255))  # torch would start threads within threads
    else:
        image = place(to_unit(array, window)[: 1 if array.ndim == 2 else 3], geometry)
    return image.expand(3, -1, -1)


def compact(image: Tensor) -> Tensor:
    """An image (3, H, W) in [0, 1] as the bytes it was made of if there are such, and (1, H, W) if it is grey; see `restored`."""
    image = image[:1] if torch.equal(image, image[:1].expand_as(image)) else image
    bytes = (image * 255).round().byte()
    return bytes if torch.equal(restored(bytes)[: len(image)], image) else image.clone()  # one channel must not hold on to three


def restored(stored: Tensor) -> Tensor:
    """What `compact` was given, (3, H, W) float32, to the last bit."""
    image = torch.from_numpy(stored.numpy() / np.float32(255)) if stored.dtype == torch.uint8 else stored.float()  # divided as in `prepare`
    return image.expand(3, -1, -1)


def hidden(height: int, width: int, geometry: Geometry, seen: np.ndarray | None) -> Tensor | None:
    """Where in the network's input (h, w) of an image (height, width) nothing is looked at, see `runtime.unseen`; None where all is.

    InputError if nothing is left.
    """
    where = unseen(height, width, geometry, seen)
    if where is None:
        return None
    check_seen(where)
    return torch.from_numpy(where)


def check_seen(hidden: np.ndarray | Tensor) -> None:
    """InputError where all of an image is hidden."""
    if hidden.all():
        raise InputError("nothing of its region is in this image at its size in the network; expected a region with a pixel of it")


def unplace(map: Tensor, height: int, width: int, geometry: Geometry, seen: np.ndarray | None = None) -> Tensor:
    """A map (h, w) in the network's pixels back in the pixels of the input image, (height, width) float32, bilinearly.

    What lay beside the image is gone. What lay outside the crop takes the map's minimum, and what is not `seen` (height, width) that of the
    rest. InputError if the map is not of the size that `place` makes.
    """
    inner, outer, crop = geometry.inner(height, width), geometry.outer(height, width), geometry.crop
    expected = outer if crop is None else (crop, crop)
    if tuple(map.shape) != expected:
        raise InputError(f"a map of {tuple(map.shape)}; expected {expected} with image_size={geometry.size} and crop={crop}")
    map = map.float()
    if crop is not None:
        padded = map.new_full(outer, map.min())
        padded[middle(outer, expected)] = map
        map = padded  # (size, size)
    map = map[middle(outer, inner)]
    if inner != (height, width):
        map = F.interpolate(map[None, None], (height, width), mode="bilinear", antialias=True, align_corners=False)[0, 0]
    if seen is None:
        return map
    seen = torch.from_numpy(seen)
    return torch.where(seen, map, map[seen].min())


def binary(mask: np.ndarray) -> np.ndarray:
    """A mask file's array (H, W) or (H, W, 3) of any dtype as uint8 0 and 1, by one rule.

    The full scale is the smallest of 1, 255, 65535 that no value exceeds, and a pixel is anomalous above half of it: this
    serves 0/1, 0/255 and grey masks whose edges are blurred. A mask that nowhere reaches half its scale holds class or
    instance numbers, and every pixel that is not 0 is anomalous.
    """
    mask = mask.max(axis=2) if mask.ndim == 3 else mask
    top = mask.max()
    half = next((scale for scale in (1, 255, 65535) if top <= scale), top) / 2
    return (mask > (half if top > half else 0)).astype(np.uint8)
