"""Image files as arrays, arrays as network inputs, and windows fitted to them."""

import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from blemish.data.images import compact, mask_to_network, prepare, restored, to_image, to_network, to_unit
from blemish.data.ranges import fit_window
from blemish.edge.errors import InputError
from blemish.edge.geometry import Geometry
from blemish.edge.reading import dtype_of, find_images, read

H, W = 24, 40
GREY = np.random.default_rng(0).integers(0, 256, (H, W), dtype=np.uint8)
RGB = np.random.default_rng(1).integers(0, 256, (H, W, 3), dtype=np.uint8)
RAMP = np.arange(65536, dtype=np.uint16).reshape(256, 256)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(array, colour, *, before=b"", after=b"", interlaced=False):
    """PNG bytes written from the format's definition, for what Pillow cannot write; array (H, W, C) uint8 or uint16."""
    depth, (height, width) = array.dtype.itemsize * 8, array.shape[:2]
    passes = (
        [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)] if interlaced else [(0, 0, 1, 1)]
    )
    rows = b"".join(b"\0" + row.astype(array.dtype.newbyteorder(">")).tobytes() for y, x, dy, dx in passes for row in array[y::dy, x::dx])
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + before + chunk(b"IDAT", zlib.compress(rows)) + after + chunk(b"IEND", b"")


def exif(orientation):
    made = Image.Exif()
    made[274] = orientation
    return made


def saved(path, image, **options):
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(path, **options)
    return path


@pytest.mark.parametrize("kind", ["png", "bmp", "tif", "gif", "webp"])
@pytest.mark.parametrize("array", [GREY, RGB], ids=["grey", "rgb"])
def test_lossless_eight_bits(tmp_path, kind, array):
    array = array // 128 * 255 if kind == "gif" and array.ndim == 3 else array  # eight colours fit a palette
    found = read(saved(tmp_path / f"a.{kind}", array, **({"lossless": True} if kind == "webp" else {})))
    assert found.dtype == np.uint8 and np.array_equal(found if found.ndim == array.ndim else found[..., 0], array)


def test_jpeg_grey_colour_and_cmyk(tmp_path):
    smooth = np.add.outer(np.arange(H), np.arange(W)).astype(np.uint8) * 3
    colour = np.dstack([smooth, smooth[::-1], 255 - smooth])
    assert np.abs(read(saved(tmp_path / "g.jpg", smooth, quality=95)).astype(int) - smooth).max() < 12
    for image, most in ((colour, 4), (Image.fromarray(colour).convert("CMYK"), 8)):
        found = read(saved(tmp_path / "c.jpg", image, quality=95, subsampling=0))
        assert found.shape == (H, W, 3) and np.abs(found.astype(int) - colour).mean() < most


@pytest.mark.parametrize(("colour", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("where", ["none", "before", "after"])
def test_sixteen_bit_png_keeps_every_bit(tmp_path, colour, channels, interlaced, where):
    array = np.random.default_rng(colour).integers(0, 65536, (H, W, channels)).astype(np.uint16)
    tag = chunk(b"eXIf", exif(6).tobytes().removeprefix(b"Exif\0\0"))
    path = tmp_path / "a.png"
    path.write_bytes(png(array, colour, interlaced=interlaced, **({where: tag} if where != "none" else {})))
    expected = array[..., 0] if channels < 3 else array[..., :3]
    found = read(path)
    assert found.dtype == np.uint16 and np.array_equal(found, expected if where == "none" else np.rot90(expected, -1))


def test_sixteen_bit_ramp_survives_to_the_network(tmp_path):
    path = saved(tmp_path / "ramp.png", RAMP)
    window = fit_window([path])
    unit = to_unit(read(path), window)
    assert unit.shape == (3, 256, 256) and unit.dtype == torch.float32
    assert len(unit[0].unique()) >= 60_000 and unit.min() == 0 and unit.max() == 1


TIFFS = {
    "grey8": (GREY, {}),
    "rgb8": (RGB, {"photometric": "rgb"}),
    "grey16": (RAMP, {}),
    "grey16 big endian": (RAMP, {"byteorder": ">"}),
    "grey16 deflate tiles": (RAMP, {"compression": "zlib", "tile": (64, 64), "predictor": True}),
    "grey16 bigtiff": (RAMP, {"bigtiff": True}),
    "rgb16": (RGB.astype(np.uint16) * 257, {"photometric": "rgb"}),
    "rgb16 planes": (np.moveaxis(RGB.astype(np.uint16) * 257, 2, 0), {"photometric": "rgb", "planarconfig": "separate"}),
    "float": (GREY / np.float32(7) - 3, {}),
    "rgb float": (RGB / np.float32(7), {"photometric": "rgb"}),
}


@pytest.mark.parametrize("name", TIFFS)
def test_tiff_keeps_every_bit(tmp_path, name):
    array, options = TIFFS[name]
    tifffile.imwrite(tmp_path / "a.tif", array, **options)
    found = read(tmp_path / "a.tif")
    expected = np.moveaxis(array, 0, -1) if "planes" in name else array
    assert found.dtype == array.dtype.newbyteorder("=") and np.array_equal(found, expected)


def test_tiff_of_other_kinds(tmp_path):
    path = tmp_path / "a.tif"
    for dtype in (np.int16, np.int32, np.uint32, np.float16, np.float64, np.int8):
        array = (GREY.astype(np.int64) // 2).astype(dtype)
        tifffile.imwrite(path, array)
        assert read(path).dtype == np.float32 and np.array_equal(read(path), array.astype(np.float32))
    tifffile.imwrite(path, RAMP, photometric="miniswhite")
    assert np.array_equal(read(path), 65535 - RAMP)
    tifffile.imwrite(path, np.dstack([RGB, GREY]).astype(np.uint16) * 256, photometric="rgb", extrasamples=["unassalpha"])
    assert np.array_equal(read(path), RGB.astype(np.uint16) * 256)
    for array in (RAMP, RGB):
        assert np.array_equal(read(saved(path, array, compression="tiff_lzw")), array)
    assert np.array_equal(read(saved(path, GREY > 127)), (GREY > 127) * np.uint8(255))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tif8", "tif16", "tif16 lzw"])
def test_orientation_is_applied(tmp_path, orientation, kind):
    upright = {
        1: lambda a: a,
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: np.transpose,
        6: lambda a: np.rot90(a, -1),
        7: lambda a: np.rot90(a, 2).T,
        8: np.rot90,
    }[orientation]
    blocks = np.kron(np.arange(1, 7).reshape(2, 3) * 40, np.ones((16, 16))).astype(np.uint8)
    path = tmp_path / f"a.{kind[:4].rstrip('81')}"
    if kind.startswith("tif"):
        blocks = blocks.astype(np.uint16) * 200 if "16" in kind else blocks
        saved(path, blocks, tiffinfo={274: orientation}, **({"compression": "tiff_lzw"} if "lzw" in kind else {}))
    else:
        saved(path, blocks, exif=exif(orientation), **({"lossless": True} if kind == "webp" else {}))
    found = read(path)
    found = found[..., 0] if found.ndim == 3 else found
    assert found.shape == upright(blocks).shape and np.abs(found.astype(int) - upright(blocks)).max() <= (12 if kind == "jpg" else 0)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # outside of pytest reading.py silences them
@pytest.mark.parametrize("kind", ["jpg", "png", "webp"])
def test_damaged_exif_does_not_spoil_a_sound_image(tmp_path, kind):
    for data in (b"Exif\0\0garbage", b"Exif\0\0", b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\1" * 40, exif(9).tobytes()):
        assert read(saved(tmp_path / f"a.{kind}", RGB, exif=data)).shape == RGB.shape


def test_photograph_with_a_preview_is_one_image(tmp_path):
    path = saved(tmp_path / "a.mpo", Image.fromarray(RGB), save_all=True, append_images=[Image.fromarray(RGB[:12])])
    assert read(path).shape == RGB.shape


def test_palette_alpha_and_one_bit(tmp_path):
    palette = Image.fromarray(RGB // 128 * 255).quantize(8)
    colours = np.array(palette.convert("RGB"))
    alpha = np.random.default_rng(2).integers(0, 256, (H, W), dtype=np.uint8)
    for name, image, expected, options in (
        ("p.png", palette, colours, {}),
        ("t.png", palette, colours, {"transparency": b"\x00\x80"}),
        ("t.gif", palette, colours, {"transparency": 0}),
        ("a.png", np.dstack([RGB, alpha]), RGB, {}),
        ("la.png", np.dstack([GREY, alpha]), GREY, {}),
        ("1.png", GREY > 127, (GREY > 127) * np.uint8(255), {}),
    ):
        assert np.array_equal(read(saved(tmp_path / name, image, **options)), expected), name


def test_integers_of_32_bits_and_16_bit_pgm(tmp_path):
    assert read(saved(tmp_path / "i.tif", Image.fromarray(GREY.astype(np.int32) * 1000))).dtype == np.float32
    for maximum, values in ((65535, RAMP), (1023, RAMP // 64)):
        path = tmp_path / f"{maximum}.pgm"
        path.write_bytes(b"P5\n# x\n256 256\n%d\n" % maximum + values.astype(">u2").tobytes())
        found = read(path)
        assert found.dtype == np.uint16 and len(np.unique(found)) == maximum + 1 and found.max() == 65535
    (tmp_path / "c.ppm").write_bytes(b"P6\n10 10\n65535\n" + bytes(600))
    with pytest.raises(InputError, match="expected PNG or TIFF"):
        read(tmp_path / "c.ppm")


def test_content_not_the_ending_decides(tmp_path):
    path = saved(tmp_path / "a.png", GREY).rename(tmp_path / "a.jpg")
    assert np.array_equal(read(path), GREY)
    tifffile.imwrite(tmp_path / "b.tif", RAMP)
    assert np.array_equal(read((tmp_path / "b.tif").rename(tmp_path / "b.png")), RAMP)


def broken():
    """The bytes of files that cannot be used, and what the error says."""

    def written(image, kind="TIFF", **options):
        buffer = BytesIO()
        if kind == "TIFF":
            tifffile.imwrite(buffer, image, **options)
        else:
            Image.fromarray(image).save(buffer, kind, **options)
        return bytearray(buffer.getvalue())

    big = np.random.default_rng(3).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    corrupt, corrupt16, jpeg = written(big, "PNG"), bytearray(png(big.astype(np.uint16) * 251, 2)), written(big, "JPEG")
    for data in (corrupt, corrupt16):
        data[len(data) // 2] ^= 0xFF
    nan = np.ones((9, 9), np.float32)
    nan[3, 4] = np.nan
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0))
    return {
        "empty": (b"", "empty"),
        "text": (b"hello, this is no image", "not an image of a known kind"),
        "corrupt PNG": (corrupt, "damaged"),
        "corrupt PNG of 16 bits": (corrupt16, "damaged"),
        "truncated PNG": (corrupt[: len(corrupt) // 2], "damaged"),
        "truncated JPEG": (jpeg[: len(jpeg) // 2], "damaged"),
        "truncated TIFF": (written(big.astype(np.uint16), photometric="rgb")[:-5000], "damaged"),
        "1×1": (written(GREY[:1, :1], "PNG"), "1×1 pixels; expected at least 8×8"),
        "thin": (written(GREY[:, :7], "PNG"), "7×24 pixels"),
        "NaN": (written(nan), "NaN"),
        "pages": (written(np.zeros((3, 20, 20), np.uint16), photometric="minisblack"), "3 pages; expected one"),
        "frames": (written(GREY, "GIF", save_all=True, append_images=[Image.fromarray(255 - GREY)]), "2 frames; expected one"),
        "complex": (written(np.zeros((20, 20), np.complex64)), "complex"),
        "huge": (b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b""), "pixels"),
    }


BROKEN = broken()


@pytest.mark.parametrize("name", BROKEN)
def test_unusable_file_is_named(tmp_path, name):
    data, says = BROKEN[name]
    path = tmp_path / "some image.png"
    path.write_bytes(data)
    with pytest.raises(InputError) as error:
        read(path)
    assert str(path) in str(error.value) and says in str(error.value)


def test_absent_file_and_folder(tmp_path):
    for path in (tmp_path / "none.png", tmp_path):
        with pytest.raises(InputError, match=rf"{path}: cannot be read"):
            read(path)


def test_large_radiograph_is_no_bomb():
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 20000, 12000, 8, 0, 0, 0, 0))
    with Image.open(BytesIO(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b""))) as image:
        assert image.size == (20000, 12000)  # neither a warning nor an error


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(["PNG", "JPEG", "BMP", "GIF", "TIFF"]), st.integers(0, 10**6), st.integers(0, 255), st.integers(1, 10**6))
def test_damage_is_an_input_error_or_an_image(tmp_path_factory, kind, where, value, length):
    buffer = BytesIO()
    Image.fromarray(RGB).save(buffer, kind)
    data = bytearray(buffer.getvalue())
    data[where % len(data)] = value
    path = tmp_path_factory.mktemp("damage") / "a"
    path.write_bytes(data[: max(len(data) - (length if length % 3 == 0 else 0), 1)])
    try:
        array = read(path)
    except InputError as error:
        assert str(path) in str(error)
    else:
        assert array.dtype in (np.uint8, np.uint16, np.float32) and min(array.shape[:2]) >= 8


def test_dtype_from_the_header_is_the_dtype_of_read(tmp_path):
    for name, (array, options) in TIFFS.items():
        tifffile.imwrite(tmp_path / f"{name}.tif", array, **options)
    (tmp_path / "16.png").write_bytes(png(RAMP[..., None], 0))
    for kind in ("png", "jpg", "bmp", "gif", "webp"):
        saved(tmp_path / f"8.{kind}", RGB)
    for path in tmp_path.iterdir():
        assert dtype_of(path) == read(path).dtype.name, path.name


def test_to_unit_by_dtype():
    assert torch.equal(to_unit(GREY, {})[0], torch.from_numpy(GREY / np.float32(255)))
    assert to_unit(GREY, {"uint8": (3, 4)})[0, 0, 0] == np.float32(GREY[0, 0]) / 255  # bytes are 0..255 always
    np.testing.assert_allclose(to_unit(RAMP, {})[1].numpy(), RAMP / 65535, atol=1e-7)
    np.testing.assert_allclose(to_unit(RAMP, {"uint16": (1000, 3000)})[2].numpy(), np.clip((RAMP - 1000.0) / 2000, 0, 1), atol=1e-6)
    assert torch.equal(to_unit(RGB, {}), torch.from_numpy(RGB).permute(2, 0, 1) / 255)
    with pytest.raises(InputError, match=r"data\.window.*float32"):
        to_unit(GREY.astype(np.float32), {})


def test_fitted_window_is_the_pooled_quantile(tmp_path):
    rng = np.random.default_rng(4)
    arrays = [rng.gamma(3, 900 + 40 * i, (60, 70)).astype(np.uint16) for i in range(5)]
    paths = [saved(tmp_path / f"{i}.png", array) for i, array in enumerate(arrays)]
    floats = [array.astype(np.float32) / 7 for array in arrays]
    for i, array in enumerate(floats):
        tifffile.imwrite(tmp_path / f"{i}.tif", array)
    window = fit_window([*paths, *sorted(tmp_path.glob("*.tif")), saved(tmp_path / "8.png", GREY)])
    assert set(window) == {"uint16", "float32"}
    for dtype, values in (("uint16", arrays), ("float32", floats)):
        assert window[dtype] == pytest.approx(np.quantile(np.stack(values), (0.0005, 0.9995), method="inverted_cdf"))


def test_degenerate_windows(tmp_path):
    assert fit_window([saved(tmp_path / "8.png", GREY)]) == {} and fit_window([]) == {}
    constant = saved(tmp_path / "c.png", np.full((20, 20), 500, np.uint16))
    assert fit_window([constant]) == {"uint16": (500.0, 501.0)}
    spot = np.zeros((100, 100), np.uint16)
    spot[5, 5] = 60000
    assert fit_window([saved(tmp_path / "s.png", spot)]) == {"uint16": (0.0, 60000.0)}
    tifffile.imwrite(tmp_path / "f.tif", np.full((20, 20), 0.25, np.float32))
    assert fit_window([tmp_path / "f.tif"]) == {"float32": (0.25, 1.25)}


def test_window_reads_evenly_spaced_images(tmp_path):
    paths = [saved(tmp_path / f"{i:03}.png", np.full((8, 8), i, np.uint16)) for i in range(50)]
    assert fit_window(paths, most=5)["uint16"] == (0, 49)


def box_weights(size, out):
    """Antialiased bilinear resampling of one axis by its definition: a triangle of the width of an output pixel."""
    scale = max(size / out, 1)
    centre = (np.arange(out) + 0.5) * size / out
    weights = np.clip(1 - np.abs((np.arange(size) + 0.5)[None] - centre[:, None]) / scale, 0, None)
    return weights / weights.sum(1, keepdims=True)  # (out, size)


@pytest.mark.parametrize("size", [8, 17, 24, 64])
def test_place_is_antialiased_bilinear(size):
    image = to_unit(RGB, {})
    expected = np.einsum("yh,chw,xw->cyx", box_weights(H, size), image.numpy(), box_weights(W, size))
    np.testing.assert_allclose(to_network(image, Geometry(size)).numpy(), expected, atol=2e-6)
    for array in (GREY, RGB, RAMP):
        quick, slow = prepare(array, {}, Geometry(size)), to_network(to_unit(array, {}), Geometry(size))
        assert quick.shape == (3, size, size) and quick.dtype == torch.float32
        assert (quick - slow).abs().max() <= 1.01 / 255


@pytest.mark.parametrize("shape", [(43, 8), (8, 43), (400, 9)])
def test_the_thinnest_letterbox_is_resized_right(shape):
    image = torch.rand(3, *shape, generator=torch.Generator().manual_seed(0))
    high, wide = Geometry(8, None, "letterbox").resized(*shape)
    expected = np.einsum("yh,chw,xw->cyx", box_weights(shape[0], high), image.numpy(), box_weights(shape[1], wide))
    placed = to_network(image, Geometry(8, None, "letterbox"))
    rows, columns = (slice((8 - side) // 2, (8 - side) // 2 + side) for side in (high, wide))
    assert min(high, wide) == 1
    np.testing.assert_allclose(placed[:, rows, columns], expected, atol=2e-6)


def test_crop_is_the_centre_and_no_larger_than_the_image():
    image = to_unit(RGB, {})
    assert torch.equal(to_network(image, Geometry()), image)
    assert torch.equal(to_network(image, Geometry(None, 10)), image[:, 7:17, 15:25])
    assert torch.equal(to_network(image, Geometry(32, 9)), to_network(image, Geometry(32))[:, 11:20, 11:20])
    with pytest.raises(InputError, match=r"data\.crop=30"):
        to_network(image, Geometry(None, 30))


@pytest.mark.parametrize("shape", [(24, 40), (64, 64), (37, 101), (5, 300)])
@pytest.mark.parametrize("size", [8, 30, 64, 129])
def test_mask_takes_the_nearest_pixel(shape, size):
    mask = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    expected = torch.nn.functional.interpolate(mask[None, None].double(), (size, size), mode="nearest-exact")[0, 0]
    assert torch.equal(mask_to_network(mask, Geometry(size)), expected.to(torch.uint8))


def test_mask_is_placed_as_its_image():
    mask = torch.zeros(H, W, dtype=torch.uint8)
    mask[4:14, 10:30] = 1
    mask[0, 0] = 255
    for size, crop in ((48, None), (48, 32), (None, 20), (12, 8)):
        placed = mask_to_network(mask, Geometry(size, crop))
        image = to_network(mask.clamp(max=1).float().expand(3, -1, -1), Geometry(size, crop))
        assert placed.shape == image.shape[1:] and set(placed.unique().tolist()) <= {0, 1, 255}
        clear = (image[0] < 0.01) | (image[0] > 0.99)
        assert torch.equal((placed > 0)[clear], (image[0] > 0.5)[clear])


def test_outside_the_crop_lies_the_minimum():
    map = torch.rand(16, 16) - 3
    back = to_image(map, 32, 32, Geometry(32, 16))
    assert torch.equal(back[8:24, 8:24], map) and back[:8].unique().item() == map.min()
    with pytest.raises(InputError, match=r"\(32, 32\)"):
        to_image(map, 100, 100, Geometry(32))


def test_find_images(tmp_path):
    names = ["b.PNG", "a.jpg", "Ünï cödé/c d.TiF", "deep/er/e.bmp"]
    for name in [*names, ".hidden.png", ".cache/x.png", "notes.txt", "Thumbs.db"]:
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "f.webp").touch()
    (tmp_path / "set" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "deep" / "loop").symlink_to(tmp_path / "set")
    found = [path.relative_to(tmp_path / "set").as_posix() for path in find_images(tmp_path / "set")]
    assert sorted(found) == sorted([*names, "link/f.webp"]) and find_images(tmp_path / "set") == sorted(find_images(tmp_path / "set"))


def test_an_image_is_found_by_its_content_and_one_that_is_not_read_is_named(tmp_path, caplog):
    for format in ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM"):
        Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(tmp_path / f"{format}.jfif", format=format)
    for name, text in {"n.txt": "BM and P5", "a.json": "{}", "photo.svg": "<svg/>", "empty": ""}.items():
        (tmp_path / name).write_text(text)
    assert {path.stem for path in find_images(tmp_path)} == {"PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM"}
    assert "photo.svg" in caplog.text


@pytest.mark.parametrize(("levels", "grey"), [(255, True), (255, False), (65535, True), (65535, False)])
def test_an_image_is_kept_in_no_more_memory_than_it_needs(levels, grey):
    values = torch.randint(levels + 1, (1 if grey else 3, 6, 5), generator=torch.Generator().manual_seed(0))
    image = (values.float().numpy() / np.float32(levels)).repeat(3 // len(values), 0)
    small = compact(torch.from_numpy(image))
    assert small.untyped_storage().nbytes() == values.numel() * (1 if levels == 255 else 4)
    assert np.array_equal(restored(small), image)
