"""Images given as files or arrays: the split, the rows, and that both give the same."""

import numpy as np
import pytest
import torch
from hypothesis import given as drawn
from hypothesis import strategies as st
from support import save

from blemish.data.arrays import ArrayData, array_of, images_of, window_of
from blemish.data.images import prepare
from blemish.edge.errors import InputError
from blemish.edge.geometry import Geometry
from blemish.edge.reading import read
from blemish.types import NORMAL

WINDOW = window_of(None)


def module(train, val=(), **changes) -> ArrayData:
    settings = {"image_size": 16, "crop": None, "batch_size": 4, "workers": 0, "seed": 0, "calibration": 0.25, "window": WINDOW}
    return ArrayData(train=train, val=list(val), **{**settings, **changes})


def noise(count: int, shape=(20, 24)) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (count, *shape), dtype=np.uint8))


def test_every_image_has_one_split():
    data = module(noise(40))
    assert (data.count("train"), data.count("calibrate")) == (30, 10)
    assert [s.split for s in module(noise(40)).samples] == [s.split for s in data.samples]
    assert [s.split for s in module(noise(40), seed=1).samples] != [s.split for s in data.samples]
    assert [s.split for s in module(noise(5), noise(3)).samples] == ["train"] * 5 + ["calibrate"] * 3
    assert (module(noise(1)).count("train"), module(noise(1)).count("calibrate")) == (1, 0)
    assert module([]).samples == []


def test_rows_are_those_of_files(tmp_path):
    arrays = noise(6, (20, 24, 3))
    files = [save(tmp_path / f"{i}.png", array) for i, array in enumerate(arrays)]
    for data in (module(arrays), module(files)):
        found = {}
        for batch in data.train_dataloader():
            assert (batch.label == NORMAL).all() and not batch.mask.any() and batch.mask.shape[1:] == batch.image.shape[2:]
            found |= dict(zip(batch.path, batch.image, strict=True))
        assert len(found) == data.count("train") == 5
        for key, image in found.items():
            assert torch.equal(image, prepare(arrays[int(key)], {}, Geometry(16)))


def test_a_file_is_trained_on_or_held_out(tmp_path):
    file = save(tmp_path / "a.png", noise(1)[0])
    with pytest.raises(InputError, match=r"a\.png: in both train and val"):
        module([file], [tmp_path / ".." / tmp_path.name / "a.png"])


@drawn(st.sampled_from(["uint8", "uint16", ">u2", "float16", "float32", "float64"]), st.booleans(), st.booleans(), st.booleans())
def test_a_tensor_is_as_its_array(dtype, colour, batch, strided):
    shape = (2,) * batch + (9, 10) + (3 if colour else 1,)
    generator, dtype = np.random.default_rng(0), np.dtype(dtype)
    array = (generator.random(shape) if dtype.kind == "f" else generator.integers(0, np.iinfo(dtype).max, shape)).astype(dtype)
    array = array[..., ::-1, :] if strided else array
    found, several = images_of(array)
    assert several == batch and len(found) == (2 if batch else 1)
    for image, source in zip(found, array if batch else [array], strict=True):
        assert image.dtype == (np.float32 if dtype.kind == "f" else dtype.newbyteorder("="))
        assert np.array_equal(image, (source if colour else source[..., 0]).astype(image.dtype))
        torch.from_numpy(image)  # contiguous, writable, of this machine's byte order
    native = np.ascontiguousarray(array.astype(dtype.newbyteorder("=")))
    tensor, _ = images_of(torch.from_numpy(native).movedim(-1, -3))
    assert all(np.array_equal(a, b) for a, b in zip(tensor, found, strict=True))


def test_a_read_only_array_is_left_alone():
    array = noise(1)[0]
    array.flags.writeable = False
    before = array.copy()
    ((image,), _) = images_of(array)
    image[:] = 0
    assert np.array_equal(array, before)


def test_ranges_are_of_the_dtype():
    assert WINDOW == {"uint16": (0.0, 65535.0), "float32": (0.0, 1.0)}
    assert window_of((0, 4095)) == {"uint16": (0.0, 4095.0), "float32": (0.0, 4095.0)}
    assert window_of({"uint16": (5, 6)}) == {"uint16": (5.0, 6.0), "float32": (0.0, 1.0)}
    outside = np.full((9, 9), 2.0, np.float32)
    with pytest.raises(InputError, match="floats from 2 to 2"):
        array_of(outside, WINDOW)
    assert array_of(outside, window_of((0, 4))) is outside


def test_a_deep_file_keeps_its_bits(tmp_path):
    deep = np.random.default_rng(0).integers(0, 4096, (20, 24), dtype=np.uint16)
    file = save(tmp_path / "a.png", deep)
    assert np.array_equal(read(file), deep)
    (batch,) = module([file], image_size=None).train_dataloader()
    torch.testing.assert_close(batch.image[0, 0], torch.from_numpy(deep / np.float32(65535)))
