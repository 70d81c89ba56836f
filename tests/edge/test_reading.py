"""Kinds of files against the arrays that were written into them, and the reader where neither torch nor tifffile is."""

import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from blemish.edge import reading
from blemish.edge.errors import InputError
from blemish.edge.reading import dtype_of, read, size_of

H, W = 24, 40
RNG = np.random.default_rng(0)
BYTES = RNG.integers(0, 256, (H, W, 4), dtype=np.uint8)
DEEP = RNG.integers(0, 65536, (H, W, 4)).astype(np.uint16)
WIDE = RNG.integers(0, 2**32, (H, W)).astype(np.uint32)
SIGNED = (DEEP.astype(np.int32) - 32768).astype(np.int16)
REAL = RNG.normal(size=(H, W, 3)) * 1e4
COLOURS = RNG.integers(0, 65536, (3, 256)).astype(np.uint16)


def planes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.moveaxis(array, -1, 0))


RGB, ALPHA, SEPARATE = {"photometric": "rgb"}, {"extrasamples": ["unassalpha"]}, {"planarconfig": "separate"}
GREY = {"photometric": "minisblack", "planarconfig": "contig"}
# what is written, how, and what is read
TIFFS = {
    "bytes from white": (BYTES[..., 0], {"photometric": "miniswhite"}, 255 - BYTES[..., 0]),
    "bytes by planes": (planes(BYTES[..., :3]), RGB | SEPARATE, BYTES[..., :3]),
    "bytes and alpha": (BYTES, RGB | ALPHA, BYTES[..., :3]),
    "grey bytes and alpha": (BYTES[..., :2], GREY | ALPHA, BYTES[..., 0]),
    "palette": (BYTES[..., 0], {"photometric": "palette", "colormap": COLOURS}, (COLOURS >> 8).astype(np.uint8).T[BYTES[..., 0]]),
    "one bit": (BYTES[..., 0] > 99, {"photometric": "minisblack"}, np.uint8(255) * (BYTES[..., 0] > 99)),
    "one bit from white": (BYTES[..., 0] > 99, {"photometric": "miniswhite"}, np.uint8(255) * (BYTES[..., 0] <= 99)),
    "16 bits of colour": (DEEP[..., :3], RGB, DEEP[..., :3]),
    "16 bits, big endian": (DEEP[..., :3], RGB | {"byteorder": ">"}, DEEP[..., :3]),
    "16 bits, BigTIFF": (DEEP[..., :3], RGB | {"byteorder": ">", "bigtiff": True}, DEEP[..., :3]),
    "16 bits, deflate": (DEEP[..., :3], RGB | {"compression": "zlib", "predictor": True}, DEEP[..., :3]),
    "16 bits, tiles": (DEEP[..., :3], RGB | {"compression": "zlib", "tile": (16, 16)}, DEEP[..., :3]),
    "16 bits, strips": (DEEP[..., :3], RGB | {"rowsperstrip": 5}, DEEP[..., :3]),
    "16 bits and alpha by planes": (planes(DEEP), RGB | SEPARATE | ALPHA, DEEP[..., :3]),
    "16 bits of grey and alpha": (DEEP[..., :2], GREY | ALPHA, DEEP[..., 0]),
    "32 bits from white": (WIDE, {"photometric": "miniswhite"}, (2**32 - 1 - WIDE).astype(np.float32)),
    "signed": (SIGNED[..., 0], {"byteorder": ">"}, SIGNED[..., 0].astype(np.float32)),
    "signed colour": (SIGNED[..., :3], RGB, SIGNED[..., :3].astype(np.float32)),
    "float by planes": (planes(REAL).astype(np.float32), RGB | SEPARATE, REAL.astype(np.float32)),
    "double": (REAL[..., 0], {"byteorder": ">"}, REAL[..., 0].astype(np.float32)),
    "half": (REAL[..., 0].astype(np.float16), {}, REAL[..., 0].astype(np.float16).astype(np.float32)),
}


@pytest.mark.parametrize("name", TIFFS)
def test_a_tiff_has_the_values_that_were_written(tmp_path, name):
    array, options, expected = TIFFS[name]
    tifffile.imwrite(tmp_path / "a.tif", array, **options)
    found = read(tmp_path / "a.tif")
    assert found.dtype == expected.dtype and np.array_equal(found, expected)
    assert dtype_of(tmp_path / "a.tif") == found.dtype.name and size_of(tmp_path / "a.tif") == (W, H)


@pytest.mark.parametrize(
    ("array", "options"),
    [
        (DEEP, {"photometric": "separated"}),
        (DEEP[..., :3], {"photometric": "cielab"}),
        (DEEP[..., :3], {"photometric": "ycbcr"}),
        (DEEP[..., 0], {"photometric": "palette", "colormap": RNG.integers(0, 65536, (3, 65536)).astype(np.uint16)}),
        (np.dstack([DEEP, DEEP[..., :1]]), GREY),
        (np.stack([BYTES[..., 0]] * 3), {"photometric": "minisblack", "volumetric": True}),
        (np.stack([DEEP[..., 0]] * 3), {"photometric": "minisblack"}),
    ],
    ids=["inks", "Lab", "YCbCr", "palette", "five channels", "volume", "pages"],
)
def test_a_tiff_whose_values_are_no_grey_or_colour_is_refused(tmp_path, array, options):
    tifffile.imwrite(tmp_path / "a.tif", array, **options)
    with pytest.raises(InputError, match=r"a\.tif"):
        read(tmp_path / "a.tif")


def lzw(data: bytes) -> bytes:
    """As LZW without a word: the table is emptied before its codes would take more than nine bits."""
    codes = [code for start in range(0, len(data), 200) for code in (256, *data[start : start + 200])] + [257]
    bits = "".join(f"{code:09b}" for code in codes)
    return int(bits.ljust(-(-len(bits) // 8) * 8, "0"), 2).to_bytes(-(-len(bits) // 8))


def lzw_tiff(array: np.ndarray, order: str) -> bytes:
    """A TIFF of one strip, from the format's definition; array (H, W) or (H, W, 3)."""
    data, channels = lzw(array.astype(array.dtype.newbyteorder(order)).tobytes()), array.shape[2] if array.ndim == 3 else 1
    format = {"u": 1, "i": 2, "f": 3}[array.dtype.kind]
    tags = {256: W, 257: H, 258: array.dtype.itemsize * 8, 259: 5, 262: 2 if channels == 3 else 1, 273: 8, 277: channels, 278: H}
    tags |= {279: len(data), 339: format}
    if channels == 3:
        tags[258], tags[339] = None, None  # three values each, behind the strip
    start = 8 + len(data) + len(data) % 2
    more = struct.pack(f"{order}3H3H", *[array.dtype.itemsize * 8] * 3, *[format] * 3)
    entries = b""
    for tag, value in sorted(tags.items()):
        if value is None:
            entries += struct.pack(f"{order}HHII", tag, 3, 3, start + (6 if tag == 339 else 0))
        else:
            entries += struct.pack(f"{order}HHII", tag, 4, 1, value)
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, start + len(more))
    return head + data + bytes(len(data) % 2) + more + struct.pack(f"{order}H", len(tags)) + entries + bytes(4)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    "array", [DEEP[..., 0], SIGNED[..., 0], WIDE, REAL[..., 0].astype(np.float32), DEEP[..., :3]], ids=lambda a: a.dtype
)
def test_lzw_of_deep_values_is_read_right_or_refused(tmp_path, array, order):
    path = tmp_path / "a.tif"
    path.write_bytes(lzw_tiff(array, order))
    try:
        found = read(path)
    except InputError as error:
        assert ("imagecodecs" in str(error) and array.dtype != np.uint16) or array.ndim == 3
    else:
        assert np.array_equal(found, array.astype(found.dtype))


def few_bits(levels: np.ndarray, depth: int, palette: np.ndarray | None) -> bytes:
    """PNG bytes of 1, 2 or 4 bits a pixel from the format's definition."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    bits = np.unpackbits(levels[..., None], axis=2)[..., 8 - depth :].reshape(len(levels), -1)
    rows = b"".join(b"\0" + np.packbits(row).tobytes() for row in bits)
    header = struct.pack(">IIBBBBB", levels.shape[1], levels.shape[0], depth, 0 if palette is None else 3, 0, 0, 0)
    colours = b"" if palette is None else chunk(b"PLTE", palette.tobytes()) + chunk(b"tRNS", b"\x00\x80")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + colours + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("coloured", [False, True])
def test_a_png_of_few_bits(tmp_path, depth, coloured):
    levels, palette = BYTES[:, :37, 0] >> (8 - depth), BYTES.reshape(-1, 4)[: 2**depth, :3]
    (tmp_path / "a.png").write_bytes(few_bits(levels, depth, palette if coloured else None))
    expected = palette[levels] if coloured else levels * np.uint8(255 // (2**depth - 1))
    assert np.array_equal(read(tmp_path / "a.png"), expected)


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_a_progressive_jpeg_has_the_pixels_of_one_that_is_not(tmp_path, mode):
    for progressive in (False, True):
        Image.fromarray(BYTES[..., :3]).convert(mode).save(tmp_path / f"{progressive}.jpg", quality=90, progressive=progressive)
    assert np.array_equal(read(tmp_path / "True.jpg"), read(tmp_path / "False.jpg"))


def test_bytes_of_netpbm(tmp_path):
    (tmp_path / "a.pgm").write_bytes(b"P5\n# x\n%d %d\n255\n" % (W, H) + BYTES[..., 0].tobytes())
    (tmp_path / "a.ppm").write_bytes(b"P6\n%d %d\n255\n" % (W, H) + BYTES[..., :3].tobytes())
    assert np.array_equal(read(tmp_path / "a.pgm"), BYTES[..., 0])
    assert np.array_equal(read(tmp_path / "a.ppm"), BYTES[..., :3])


ALONE = """
import importlib.abc, sys
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in sys.argv[2].split():
            raise ImportError(f"{name} is not there")
sys.meta_path.insert(0, Blocked())
sys.path.insert(0, sys.argv[1])
from edge.runtime import InputError, pixels
for path in sys.argv[3:]:
    try:
        print(pixels(path).sum())
    except InputError as error:
        print(error)
"""


@pytest.mark.parametrize("absent", ["", "tifffile", "PIL tifffile"])
def test_the_folder_travels_by_itself(tmp_path, absent):
    (tmp_path / "edge").symlink_to(Path(reading.__file__).parent)
    Image.fromarray(BYTES).save(tmp_path / "a.png")
    tifffile.imwrite(tmp_path / "a.tif", DEEP[..., :3], photometric="rgb")
    command = [sys.executable, "-c", ALONE, tmp_path, f"{absent} torch blemish", tmp_path / "a.png", tmp_path / "a.tif"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    png, tif = done.stdout.splitlines()
    assert png == str(BYTES[..., :3].sum()) if "PIL" not in absent else "pip install pillow" in png
    assert tif == str(DEEP[..., :3].sum()) if not absent else ("pip install" in tif and "a.tif" in tif)
