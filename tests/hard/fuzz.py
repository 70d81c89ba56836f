"""Thousands of damaged image files, decoded one after the other: what `test_fuzz.py` starts, so that a crash is seen.

Arguments: a folder to work in, the number of files, a seed. Prints how they ended, the slowest, and the memory that was needed.
"""

import collections
import faulthandler
import io
import json
import resource
import struct
import sys
import time
import traceback
import warnings
import zlib
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

from blemish.edge.errors import InputError
from blemish.edge.reading import read, size_of

PLACE, COUNT, SEED = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
HANGS = 60  # seconds for one file, on a busy machine


def seeds() -> dict[str, bytes]:
    """Small sound files of every kind that is read, and of the ways in which pixels are packed."""
    rng = np.random.default_rng(0)
    smooth = (np.add.outer(np.arange(24), np.arange(40)) * 3).astype(np.uint8)
    rgb = np.dstack([smooth, smooth[::-1], rng.integers(0, 256, smooth.shape, np.uint8)])
    grey, deep, colour = Image.fromarray(smooth), Image.fromarray(smooth.astype(np.uint16) * 257), Image.fromarray(rgb)
    exif = Image.Exif()
    exif[274] = 6
    found = {}

    palette, bits, orientation = colour.quantize(9), grey.convert("1"), {"tiffinfo": {274: 6}}
    compressions = [(colour, {"compression": name}) for name in ("raw", "tiff_lzw", "tiff_deflate", "packbits", "jpeg")]
    pictures = {
        "PNG": [
            (grey, {}),
            (colour, {"exif": exif}),
            (deep, {}),
            (palette, {"transparency": b"\x00\x80"}),
            (colour.convert("RGBA"), {}),
            (bits, {}),
        ],
        "JPEG": [(grey, {}), (colour, {"exif": exif}), (colour, {"progressive": True}), (colour.convert("CMYK"), {})],
        "BMP": [(colour, {}), (grey, {}), (bits, {})],
        "GIF": [(palette, {})],
        "WEBP": [(colour, {}), (colour, {"lossless": True})],
        "TIFF": [*compressions, (bits, {"compression": "group4"}), (deep, {"compression": "tiff_lzw"}), (grey, orientation)],
    }
    for kind, images in pictures.items():
        for number, (image, options) in enumerate(images):
            file = io.BytesIO()
            image.save(file, kind, **options)
            found[f"{kind} {number}"] = file.getvalue()
    found["pgm"] = b"P5\n40 24\n65535\n" + smooth.astype(">u2").tobytes()
    planes = np.moveaxis(rgb.astype(np.uint16) * 257, 2, 0)
    for name, array, options in (
        ("deep", smooth.astype(np.uint16), {}),
        ("float", smooth / np.float32(7), {}),
        ("tiles", np.kron(smooth, np.ones((4, 4))).astype(np.uint16), {"compression": "zlib", "tile": (32, 32), "predictor": True}),
        ("big", smooth.astype(np.uint16), {"bigtiff": True, "byteorder": ">"}),
        ("planes", planes, {"photometric": "rgb", "planarconfig": "separate"}),
    ):
        file = io.BytesIO()
        tifffile.imwrite(file, array, **options)
        found[f"tiff {name}"] = file.getvalue()
    return found


def mutated(data: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """One to three damages: flipped bits, extreme numbers, cuts, bytes put in, left out or doubled, and the head of another file."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        at = int(len(data) * (rng.random() ** rng.integers(1, 4)))  # headers more often than pixels
        length = int(rng.integers(1, 32))
        match rng.integers(8):
            case 0 | 1:
                for place in rng.integers(0, max(len(data), 1), rng.integers(1, 9)) if data else ():
                    data[place] ^= 1 << rng.integers(8)
            case 2:
                extreme = rng.choice([0, 1, 2**16 - 1, 2**31 - 1, 2**32 - 1, 2**20])
                data[at : at + 4] = struct.pack(rng.choice(["<I", ">I"]), int(extreme))
            case 3:
                del data[at:]
            case 4:
                data[at:at] = rng.bytes(length)
            case 5:
                del data[at : at + length]
            case 6:
                data[at:at] = data[at : at + length]
            case 7:
                cut = int(rng.integers(0, min(64, len(other))))
                data[:cut] = other[:cut]
    return bytes(data)


def with_checksums(data: bytes) -> bytes:
    """A PNG whose chunks have the checksums of their content, so that damage comes past them."""
    out, at = bytearray(data[:8]), 8
    while at + 12 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        if at + 12 + length > len(data):
            break
        body = data[at + 4 : at + 8 + length]
        out += data[at : at + 4] + body + struct.pack(">I", zlib.crc32(body))
        at += 12 + length
    return bytes(out + data[at:])


def ending(path: Path) -> str:
    """How a file ends: as an image, or as an error that names it; anything else is raised."""
    ends = []
    for work in (read, size_of):
        try:
            found = work(path)
        except InputError as error:
            if str(path) not in str(error):
                raise AssertionError(f"no path in {error}") from error
            ends.append("error")
        else:
            if work is read and not (found.dtype in (np.uint8, np.uint16, np.float32) and min(found.shape[:2]) >= 8):
                raise AssertionError(f"an image of {found.dtype} {found.shape}")
            ends.append("image")
    return ends[0]


def leave(screen: io.TextIOBase, message: str) -> None:
    screen.write(message + "\n")
    sys.exit(1)


def main() -> None:
    rng, sound = np.random.default_rng(SEED), seeds()
    screen, sys.stderr = sys.stderr, io.StringIO()  # of Python; libtiff, which nobody can keep quiet, writes past it
    leaked: list[str] = []
    warnings.simplefilter("always", append=True)  # behind the filters that the package itself has
    warnings.showwarning = lambda message, *rest, **more: leaked.append(f"{rest[0].__name__}: {message}")
    path, ends, slowest, kept = PLACE / "some image", collections.Counter(), (0.0, ""), list(sound)
    for name, data in sound.items():
        path.write_bytes(data)
        if ending(path) != "image":
            raise AssertionError(f"{name}: the sound file is refused")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(COUNT):
        name = kept[number % len(kept)]
        data = mutated(sound[name], sound[kept[rng.integers(len(kept))]], rng)
        if data[:4] == b"\x89PNG" and rng.random() < 0.7:
            data = with_checksums(data)
        path.write_bytes(data)
        faulthandler.dump_traceback_later(HANGS, exit=True, file=screen)
        began = time.monotonic()
        try:
            ends[ending(path)] += 1
        except BaseException:
            (PLACE / "culprit").write_bytes(data)
            traceback.print_exc(file=screen)
            leave(screen, f"{name}, file {number} of seed {SEED}, kept as {PLACE / 'culprit'}")
        if (took := time.monotonic() - began) > slowest[0]:
            slowest = took, f"{name}, file {number}"
            (PLACE / "slowest").write_bytes(data)
        if leaked or sys.stderr.getvalue():
            (PLACE / "culprit").write_bytes(data)
            leave(screen, f"{name}, file {number}: said {leaked} {sys.stderr.getvalue()}")
    faulthandler.cancel_dump_traceback_later()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sys.stdout.write(json.dumps({"ends": ends, "slowest": slowest, "mb": round((peak - before) / 1024), "leaked": leaked}) + "\n")


if __name__ == "__main__":
    main()
