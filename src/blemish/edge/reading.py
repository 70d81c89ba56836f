"""Image files as arrays with all their bits: the only reader, in training as on a device."""

import errno
import hashlib
import logging
import os
import stat
import warnings
from contextlib import suppress
from io import BytesIO
from itertools import islice
from mimetypes import guess_type
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .errors import InputError

# of images, which a damaged one has too; other files are looked into
ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm")
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")  # by content, whatever the ending
TIFF_HEADS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
SMALLEST = 8  # pixels; no backbone makes a map of less
LARGEST = 2**30  # pixels; a radiograph of 20,000 × 12,000 has a quarter of it
FREE, DENSEST = 2**24, 2**14  # pixels that any file may have, and those for each of its bytes: deflate packs 8256 of one bit
PHOTOMETRIC = (0, 1, 2)  # of deep TIFFs: grey from white to black, grey from black to white, RGB
SIGNED = (np.int16, np.int32, np.float32)
PAGES = 100  # of a TIFF that are read: in a damaged one they may form a circle
SOFTWARE = "blemish"  # of the PNG's tEXt entry `Software`: the picture is a result, not a photograph
RESULT = b"tEXtSoftware\0" + SOFTWARE.encode()

log = logging.getLogger(__name__)

Image.init()  # all its formats are known before the first file, which threads may open together
Image.MAX_IMAGE_PIXELS = LARGEST // 2  # Pillow refuses twice as many; its own limit refuses large radiographs
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # of more than half
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")  # damaged EXIF or tags of a sound image
for decoder in ("tifffile", "PIL.TiffImagePlugin"):  # what they log of a damaged file, `read` raises with the path
    logging.getLogger(decoder).setLevel(logging.CRITICAL)


def is_result(path: Path) -> bool:
    """Whether a file is a PNG that blemish wrote as a result, wherever it was moved to; its first bytes tell."""
    with suppress(OSError):
        return RESULT in content(path, 128)
    return False


def find_images(folder: Path, results: bool = False) -> list[Path]:
    """Every image file under a folder at any depth, sorted; hidden files and folders are left out, links followed once.

    A file of another ending is looked into. Images of kinds that are not read are left out with a warning; so are pictures that blemish
    wrote as results, unless `results` are wanted, as where masks are looked for.
    """
    found, others, seen = [], [], set()
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        # a link back to a folder already walked ends there
        folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith("."))
        for name in (name for name in files if name[0] != "." and real not in seen):
            path = Path(place, name)
            if name.lower().endswith(ENDINGS) or _is_image(path):
                found.append(path)
            elif (guess_type(name)[0] or "").startswith("image/"):
                others.append(path)
        seen.add(real)
    if others:
        log.warning("%s: %d images of a kind that is not read are left out, as %s", folder, len(others), min(others).relative_to(folder))
    images = sorted(found if results else (path for path in found if not is_result(path)))
    if len(images) < len(found):
        log.warning("%s: %d pictures there were written by blemish, and are left out", folder, len(found) - len(images))
    return images


def _is_image(path: Path) -> bool:
    """Whether a file's content is that of an image that can be read."""
    with suppress(Exception):  # decoders raise whatever they like
        if content(path, 4) in TIFF_HEADS:
            return True
        with Image.open(path, formats=FORMATS):
            return True
    return False


def read(path: str | Path, digest: str = "", labels: bool = False) -> np.ndarray:
    """The image as uint8, uint16 or float32, (H, W) or (H, W, 3), with every bit the file holds.

    Alpha is dropped, palettes are expanded, EXIF orientation is applied, one bit becomes 0 and 255, 32-bit integers become
    float32. InputError names the path of a file that is missing, empty, damaged, cut short, of several pages, not finite, or
    has a side below 8 pixels, or whose content no longer has the `digest` that `file_digest` once gave.
    `labels`: alpha stays, as the last of two or four channels, and a palette's colours become class numbers, int32, see `_classes`.
    """
    path = Path(path)
    try:
        data = content(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); expected an image file") from error
    try:
        return _array_of(data, digest, labels)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except UnidentifiedImageError:
        raise InputError(f"{path}: not an image of a known kind; expected {', '.join(FORMATS)}") from None
    except Exception as error:  # decoders raise whatever they like on a damaged file
        raise InputError(f"{path}: damaged or cut short ({error}); expected a complete image") from error


def size_of(path: str | Path) -> tuple[int, int]:
    """(width, height) of what `read` gives, from the file's header where that is enough; InputError as there."""
    path = Path(path)
    try:
        if content(path, 4) in TIFF_HEADS:
            import tifffile

            with tifffile.TiffFile(path) as tiff:
                page = next(page for page in islice(tiff.pages, PAGES) if not page.is_reduced)
                size, orientation = (page.imagewidth, page.imagelength), page.tags.valueof(274, 1)
        else:
            with Image.open(path, formats=FORMATS) as image:
                size, orientation = image.size, 1
                # of a PNG, Pillow would decode all pixels to look for EXIF behind them
                if image.format != "PNG" or {"exif", "Raw profile type exif"} & image.info.keys() or b"eXIf" in path.read_bytes():
                    orientation = image.getexif().get(274, 1)
    except Exception:  # `read` raises what is wrong with a file
        size, orientation = read(path).shape[1::-1], 1
    return size[::-1] if orientation in (5, 6, 7, 8) else size


def dtype_of(path: str | Path) -> str:
    """The dtype `read` will return, "uint8", "uint16" or "float32", from the file's header where that is enough."""
    head = content(path, 32)
    if head[:3] == b"\xff\xd8\xff" or head[:2] == b"BM" or head[:4] in (b"GIF8", b"RIFF"):
        return "uint8"
    if head[:4] == b"\x89PNG" and len(head) > 24:
        return "uint16" if head[24] == 16 else "uint8"
    return read(path).dtype.name


def digest_of(data: bytes) -> str:
    """16 hex digits that stand for a file's content."""
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def file_digest(path: Path) -> str:
    """`digest_of` a file's content."""
    return digest_of(content(path))


def content(path: str | Path, size: int = -1) -> bytes:
    """The first `size` bytes of a file, all of them by default; OSError also for a pipe or a device, which `open` would wait for."""

    def open_now(name: str, flags: int) -> int:
        return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))

    with open(path, "rb", buffering=0, opener=open_now) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "neither a file nor a link to one", str(path))
        return file.read(size)


def _array_of(data: bytes, digest: str, labels: bool) -> np.ndarray:
    if not data:
        raise InputError("the file is empty; expected an image")
    if digest and (found := digest_of(data)) != digest:
        raise InputError(f"changed while it was in use (digest {found}, before {digest}); run again")
    array = _decode_tiff(data, labels) if data[:4] in TIFF_HEADS else _decode(data, labels)
    if array.ndim not in (2, 3) or array.shape[2:] not in ((), (3,), *[(2,), (4,)] * labels):
        raise InputError(f"an array of shape {array.shape}; expected grey (H, W) or colour (H, W, 3)")
    if min(array.shape[:2]) < SMALLEST:
        raise InputError(f"{array.shape[1]}×{array.shape[0]} pixels; expected at least {SMALLEST}×{SMALLEST}")
    if array.dtype == np.float32 and not np.isfinite(array).all():
        raise InputError(f"{np.count_nonzero(~np.isfinite(array))} values are NaN or infinite; expected finite values")
    return array


def _decode(data: bytes, labels: bool) -> np.ndarray:
    with _open(data) as image:
        if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:  # MPO: a photograph and its previews
            raise InputError(f"{image.n_frames} frames; expected one image a file")
        if image.format == "PNG" and data[24] == 16 and image.mode != "I;16":
            return _colour_png16(data, labels)
        if image.format == "PPM" and image.mode == "RGB":
            header = b" ".join(line.split(b"#")[0] for line in data[:4096].split(b"\n"))
            if int(header.split()[3]) > 255:
                raise InputError("a colour PPM of 16 bits would lose half of them; expected PNG or TIFF")
        is_deep = image.format == "PPM" and image.mode == "I"  # Pillow holds values stretched to 0..65535 in 32 bits
        array = _pillow(image, labels)
        return array.astype(np.uint16) if is_deep else array


def _open(data: bytes) -> Image.Image:
    try:
        image = Image.open(BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise InputError(f"more than {LARGEST} pixels; expected at most that, cut it into tiles") from None
    if image.format != "WEBP" and not (image.format == "TIFF" and image.mode == "1"):  # a blank one of these takes next to nothing
        _check_possible(image.width, image.height, data)
    return image


def _check_possible(width: int, height: int, data: bytes) -> None:
    """InputError for a size that so few bytes cannot hold: a decoder would first take the memory and then see the end of the file."""
    if width * height > FREE + DENSEST * len(data):
        raise InputError(f"{width}×{height} pixels in {len(data)} bytes, which cannot hold them; expected a complete image")


def _pillow(image: Image.Image, labels: bool) -> np.ndarray:
    _load_upright(image)
    mode = image.mode
    if mode.startswith("I;16"):
        return np.array(image).astype(np.uint16)  # in the machine's byte order, whatever the file's was
    if mode in ("I", "F"):
        return np.array(image, dtype=np.float32)
    if labels and image.has_transparency_data:
        return np.array((image.convert("LA") if mode == "La" else image).convert("RGBA"))
    if labels and mode == "P":
        return _classes(image)
    if mode in ("1", "LA", "La"):
        return np.array(image.convert("L"))
    if mode in ("P", "PA"):
        return np.array(image.convert("RGBA").convert("RGB"))  # the short way warns of transparency
    return _copied(image if mode in ("L", "RGB") else image.convert("RGB"))


def array_of_picture(image: Image.Image) -> np.ndarray:
    """The array of a picture that Pillow has opened or made, as `read` gives that of its file, with the bits that Pillow keeps."""
    try:
        return _pillow(image.copy(), labels=False)  # a copy, as it is turned upright
    except OSError as error:  # Pillow decodes a file when its pixels are asked for
        raise InputError(f"a picture of Pillow, {getattr(image, 'filename', '')}: damaged or cut short ({error})") from error


def _load_upright(image: Image.Image) -> None:
    image.load()  # first, as a PNG may hold EXIF behind its pixels
    with suppress(SyntaxError):  # invalid EXIF in a valid image
        ImageOps.exif_transpose(image, in_place=True)


def _classes(image: Image.Image) -> np.ndarray:
    """The class numbers (H, W) int32 of an image with a palette, 0 being the background.

    Its levels, uint8, where the palette merely encodes an image on black: grey ones, or black not the first of its colours.
    """
    numbers = np.array(image)
    palette = np.zeros((256, 3), np.uint8)
    stored = np.array(image.getpalette(), np.uint8).reshape(-1, 3)
    palette[: len(stored)] = stored
    colours = palette[np.bincount(numbers.ravel(), minlength=256) > 0]
    black = np.count_nonzero(~colours.any(1))
    if black and (palette[0].any() or (black == 1 and (colours == colours[:, :1]).all())):
        return palette.max(1)[numbers]
    return numbers.astype(np.int32)


def _copied(image: Image.Image) -> np.ndarray:
    """np.array(image) of an L or RGB image, by bands of rows: in one piece it takes a third copy of all pixels in between."""
    width, height = image.size
    array, step = np.empty((height, width, 3) if image.mode == "RGB" else (height, width), np.uint8), max(1, 2**24 // width)
    for row in range(0, height, step):
        array[row : row + step] = np.asarray(image.crop((0, row, width, min(row + step, height))) if step < height else image)
    return array


def _colour_png16(data: bytes, labels: bool) -> np.ndarray:
    """A 16-bit PNG with colour or alpha, of which Pillow keeps one byte a value: read the high bytes, then the low ones.

    (torchvision reads all 16 bits but has ended the whole process on a damaged file.)
    """
    with _open(data) as image:
        tile = image.tile[0]
        if tile.args == "LA;16B":  # grey high, grey low, alpha high, alpha low: four bytes like a pixel of RGBA
            image.tile = [tile._replace(args="RGBA")]
            _load_upright(image)
            array = np.array(image).astype(np.uint16)
            both = array[..., ::2] << 8 | array[..., 1::2]
            return both if labels else both[..., 0]
        labels = labels and image.mode == "RGBA"  # not for one colour that is transparent, which Pillow knows by one byte
        high = _pillow(image, labels).astype(np.uint16)
    with _open(data) as image:
        image.tile = [tile._replace(args=tile.args.replace("16B", "16L"))]
        return high << 8 | _pillow(image, labels)


def _decode_tiff(data: bytes, labels: bool) -> np.ndarray:
    """Eight bits by Pillow, which knows all colour spaces and compressions; more bits by tifffile, which keeps them."""
    try:
        import tifffile
    except ImportError:
        raise InputError("a TIFF is read with tifffile, which is not here (pip install tifffile); or hand over an array") from None
    with tifffile.TiffFile(BytesIO(data)) as tiff:
        pages = [page for page in islice(tiff.pages, PAGES) if not page.is_reduced]  # thumbnails are not pages
        if len(pages) != 1 or pages[0].imagedepth != 1:
            layers = pages[0].imagedepth if len(pages) == 1 else len(pages)
            raise InputError(f"a TIFF of {layers} pages; expected one image a file")
        page = pages[0]
        if page.imagewidth * page.imagelength > LARGEST:
            raise InputError(f"{page.imagewidth}×{page.imagelength} pixels; expected at most {LARGEST}, cut it into tiles")
        if page.dtype in (np.uint8, bool):
            with _open(data) as image:
                return _pillow(image, labels)
        _check_possible(page.imagewidth, page.imagelength, data)
        return _deep_tiff(page, data, labels)


def _deep_tiff(page: Any, data: bytes, labels: bool) -> np.ndarray:
    if 0 in page.databytecounts:
        raise InputError("parts without content; expected a complete image")  # they would come out black
    if page.photometric not in PHOTOMETRIC or page.samplesperpixel > 4 or page.dtype.kind == "c":
        kind = getattr(page.photometric, "name", page.photometric)
        raise InputError(
            f"a TIFF of {page.samplesperpixel} {page.dtype} values a pixel that mean {kind}; expected real values, grey or RGB"
        )
    orientation = page.tags.valueof(274, 1)
    try:
        array = page.asarray()
    except Exception as error:
        if "imagecodecs" not in str(error) and not isinstance(error, ImportError):
            raise
        # Pillow's libtiff knows more compressions, but keeps eight bits of a colour, and mixes up the bytes of some values
        if page.samplesperpixel > 1 or not (page.dtype == np.uint16 or (page.dtype in SIGNED and page.parent.byteorder == "<")):
            kind = f"{page.compression.name.lower()}, {page.samplesperpixel} {page.dtype} values a pixel"
            raise InputError(f"a TIFF of {kind}, needs imagecodecs (pip install imagecodecs); or save it by deflate") from None
        with _open(data) as image:
            array, orientation = np.array(image), 1  # turned upright by Pillow
    if array.ndim == 3 and page.planarconfig == 2:
        array = np.moveaxis(array, 0, -1)
    alpha = labels and array.ndim == 3 and array.shape[2] in (2, 4) and any(kind in (1, 2) for kind in page.extrasamples)
    if array.ndim == 3 and not alpha:
        array = array[..., :3] if array.shape[2] >= 3 else array[..., 0]
    if array.dtype.kind == "u" and page.photometric == 0:
        array = np.asarray(2**page.bitspersample - 1, array.dtype) - array
    with np.errstate(over="ignore"):  # a double beyond float32 becomes infinite, which is refused later
        array = array.astype(np.uint16 if array.dtype == np.uint16 else np.float32)
    return np.ascontiguousarray(_upright(array, orientation))


def _upright(array: np.ndarray, orientation: int) -> np.ndarray:
    """Undo one of the eight orientations of the TIFF tag 274."""
    array = array.swapaxes(0, 1) if orientation in (5, 6, 7, 8) else array
    rows, columns = -1 if orientation in (3, 4, 7, 8) else 1, -1 if orientation in (2, 3, 6, 7) else 1
    return array[::rows, ::columns]
