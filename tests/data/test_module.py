"""From files to splits and batches: shapes, orders, manifests, windows, and the errors a user meets."""

import logging
import math
import os

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from support import DATA, save

from blemish.data import dataset
from blemish.data.dataset import Images, Recent
from blemish.data.images import mask_to_network, to_network, to_unit
from blemish.data.manifest import Sample, read_manifest, write_manifest
from blemish.data.module import ImageData, held_out
from blemish.edge.errors import InputError
from blemish.edge.geometry import Geometry
from blemish.edge.reading import read
from blemish.types import NO_TRUTH

SIZE = 48


class Pictures(ImageData):
    """A root with train/, test/good and test/bad, and masks/ beside them."""

    name, published, layout = "pictures", "Somebody, Pictures, 2020", "train/*.png\ntest/good/*.png\ntest/bad/*.png"

    def scan(self):
        files = {split: sorted((self.folder() / split).glob("*.*")) for split in ("train", "test/good", "test/bad")}
        made = [Sample(self.relative(path), split.split("/")[0], 0, "good") for split in ("train", "test/good") for path in files[split]]
        for path in files["test/bad"]:
            mask = self.folder() / "masks" / path.name
            made.append(Sample(self.relative(path), "test", 1, "bad", self.relative(mask) if mask.exists() else ""))
        return made


def data_of(root, kind=Pictures, loading=(None, 0, None), **changes):
    data = kind(**{"root": root, "category": None, **DATA, **changes})
    data.set_loading(*loading)
    return data


def prepared(root, *args, **changes):
    data = data_of(root, *args, **changes)
    data.setup()
    return data


@pytest.fixture
def root(tmp_path):
    rng = np.random.default_rng(0)
    for folder, count in (("train", 10), ("test/good", 3), ("test/bad", 3)):
        for i in range(count):
            save(tmp_path / folder / f"{i:03}.png", rng.integers(0, 256, (SIZE, SIZE + i, 3)[: 2 + i % 2], dtype=np.uint8))
    for i in range(2):
        mask = np.zeros((SIZE, SIZE + i), np.uint8)
        mask[10:20, 5:30] = 255
        save(tmp_path / "masks" / f"{i:03}.png", mask)
    return tmp_path


@pytest.fixture
def opened(monkeypatch):
    """The paths of the images and masks that are decoded."""
    paths = []
    monkeypatch.setattr(dataset, "read", lambda path, *more: paths.append(path) or read(path, *more))
    monkeypatch.setattr(dataset, "read_mask", lambda path, read=dataset.read_mask: paths.append(path) or read(path))
    return paths


def rows_of(loader):
    return [(batch.image[i], int(batch.label[i]), batch.mask[i], batch.path[i]) for batch in loader for i in range(len(batch.path))]


def paths_of(loader):
    return [path for batch in loader for path in batch.path]


def test_batches_are_the_files_by_definition(root):
    data = prepared(root, crop=24)
    loaded = rows_of(data.test_dataloader())
    assert [path for *_, path in loaded] == [s.key for s in data.samples if s.split == "test"]
    for image, label, mask, path in loaded:
        array = np.array(Image.open(root / path))
        assert image.dtype == torch.float32 and image.shape == (3, 24, 24)
        assert (image - to_network(to_unit(array, {}), Geometry(32, 24))).abs().max() <= 1.01 / 255
        assert label == data.sample(path).label == int("bad" in path)
        expected = torch.zeros(array.shape[:2], dtype=torch.uint8)
        if "bad/002" in path:
            expected[:] = NO_TRUTH
        elif label:
            expected[10:20, 5:30] = 1
        assert mask.dtype == torch.uint8 and torch.equal(mask, mask_to_network(expected, Geometry(32, 24)))


@pytest.mark.parametrize("count", [1, 2, 3, 8, 40, 75, 76, 77, 100, 190, 191, 1000])
@pytest.mark.parametrize("share", [0.01, 0.1, 0.25, 0.9])
def test_hold_out_size(count, share):
    out = held_out([str(i) for i in range(count)], share, 0)
    wanted = max(math.ceil(share * count - 1e-9), 19)
    assert len(out) == (0 if count == 1 else max(1, min(wanted, count // 4)))


def test_hold_out_follows_seed_and_protocol(root):
    def calibrate(**changes):
        data = prepared(root, **changes)
        return {s.path for s in data.samples if s.split == "calibrate"}, data.digest

    first, digest = calibrate()
    assert len(first) == 2 and all(path.startswith("train/") for path in first)
    assert calibrate() == (first, digest)
    assert len({frozenset(calibrate(seed=seed)[0]) for seed in range(10)}) > 3
    assert calibrate(protocol="paper")[0] == set()


def test_tiles_of_one_image_stay_on_one_side(root):
    class Tiles(Pictures):
        def scan(self):
            return [s._replace(tile=f"{x},{y},16,16") for s in super().scan() for x in (0, 16) for y in (0, 16)]

    data = prepared(root, Tiles, image_size=16)
    train, calibrate = ({s.path for s in data.samples if s.split == split} for split in ("train", "calibrate"))
    assert len(calibrate) == 2 and not train & calibrate and len(data.samples) == 16 * 4


def test_a_tile_is_cut_before_resizing_and_its_image_decoded_once(root, opened):
    box = Sample("test/bad/000.png", "test", 1, "bad", boxes="2 4 20 9;30 30 99 99")
    samples = [box._replace(tile=f"{x},{y},16,12") for y in (0, 12, 24, 36) for x in (0, 16, 32)]
    samples += [s._replace(boxes="", mask="masks/000.png") for s in samples]
    array, mask = (np.array(Image.open(root / name)) for name in ("test/bad/000.png", "masks/000.png"))
    boxes = np.zeros_like(mask)
    boxes[4:9, 2:20] = boxes[30:, 30:] = 1
    for i, (image, _, found, key) in enumerate(Images(samples, root, {}, Geometry()).__getitems__(list(range(24)))):
        x, y, w, h = map(int, key.split("#")[1].split(","))
        assert torch.equal(image, to_unit(array[y : y + h, x : x + w], {}))
        np.testing.assert_array_equal(found, (boxes if i < 12 else mask > 0)[y : y + h, x : x + w])
    assert len(opened) == 2
    with pytest.raises(InputError, match=r"000\.png: the tile 40,0,16,16"):
        Images([Sample("train/000.png", "train", 0, "good", tile="40,0,16,16")], root, {}, Geometry())[0]


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_images_of_a_training_are_decoded_twice_and_stay_as_they_are(tmp_path, dtype, opened):
    samples = []
    for i in range(6):
        save(tmp_path / f"{i}.png", np.random.default_rng(i).integers(0, np.iinfo(dtype).max, (20, 24), dtype))
        samples.append(Sample(f"{i}.png", "train", 0, "good"))
    images = Images(samples, tmp_path, {"uint16": (0.0, 65535.0)}, Geometry(16))
    epochs = [images.__getitems__(rows) for rows in ([0, 1, 2, 3], [3, 2, 1, 0], [0, 1, 2, 3, 4, 4])]
    assert len(opened) == 4 + 4 + 1
    for row, same, again in zip(epochs[0], reversed(epochs[1]), epochs[2], strict=False):
        assert all(torch.equal(row[i], same[i]) and torch.equal(row[i], again[i]) for i in (0, 2))
        assert row[1::2] == same[1::2] == again[1::2]
    assert sorted(images.kept) == [0, 1, 2, 3]
    assert {image.dtype for _, image, *_ in images.kept.values()} == {torch.uint8 if dtype == "uint8" else torch.float32}
    assert images.room == dataset.KEPT - sum(image.nbytes + mask.nbytes for _, image, _, mask, _ in images.kept.values())
    os.utime(tmp_path / "0.png", (0, 0))
    again = images.__getitems__([0, 1])  # a file that was touched is read again
    assert len(opened) == 10 and torch.equal(again[0][0], epochs[0][0][0]) and len(images.kept) == 4
    images.__getitems__([0, 1])
    assert len(opened) == 10


def test_no_more_images_are_kept_than_there_is_room_for(root, monkeypatch):
    monkeypatch.setattr(dataset, "KEPT", 3 * 2 * 16 * 16 + 5)  # images and masks of 16×16 bytes
    loader = prepared(root, protocol="paper", image_size=16, crop=None).train_dataloader()
    epochs = [{path: image for batch in loader for path, image in zip(batch.path, batch.image, strict=True)} for _ in range(4)]
    assert len(loader.dataset.kept) <= 3 and loader.dataset.room >= 0
    assert all(torch.equal(epoch[path], image) for epoch in epochs for path, image in epochs[0].items())


def test_recent_keeps_what_fits_and_one_at_least(root):
    paths = [root / "train" / f"{i:03}.png" for i in range(3)]
    small, roomy = Recent(most=1), Recent(most=10**6)
    for path in paths[:2]:
        assert np.array_equal(small(path, read), read(path)) and [key[0] for key in small.arrays] == [path]
    for path in (*paths, paths[0]):
        roomy(path, read)
    assert [key[0] for key in roomy.arrays] == [paths[1], paths[2], paths[0]]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # python 3.12+, of fork by the DataLoader
def test_threads_processes_and_a_plain_loop_agree(root, monkeypatch):
    data = prepared(root)
    images = data.test_dataloader().dataset
    plain = [images[i] for i in range(len(images))]
    monkeypatch.setattr(dataset.os, "sched_getaffinity", lambda _: range(6), raising=False)
    threads = rows_of(data.test_dataloader())
    data.workers = 1
    processes = rows_of(data.test_dataloader())
    for a, b, c in zip(plain, threads, processes, strict=True):
        assert a[1] == b[1] == c[1] and a[3] == b[3] == c[3]
        assert all(torch.equal(a[i], b[i]) and torch.equal(a[i], c[i]) for i in (0, 2))


def test_shuffling_is_seeded_and_epochs_differ(root):
    def epochs(seed):
        loader = prepared(root, seed=seed, protocol="paper").train_dataloader()
        return [paths_of(loader) for _ in range(2)]

    torch.manual_seed(0)
    first = epochs(0)
    torch.manual_seed(1)
    assert epochs(0) == first  # the global stream does not matter
    assert first[0] != first[1] and sorted(first[0]) == sorted(first[1]) and len(first[0]) == 10
    assert epochs(1) != first


@pytest.mark.parametrize("size", [3, 10, 24])
@pytest.mark.parametrize("tile", [None, 8])
def test_an_epoch_of_so_many_images(root, size, tile):
    def loader(epoch_size):
        changes = {} if tile is None else {"image_size": None}
        return prepared(root, loading=(tile, 0, epoch_size), protocol="paper", batch_size=4, **changes).train_dataloader()

    plain, paced = loader(None), loader(size)
    rows = len(plain.dataset)
    orders = [paths_of(plain) for _ in range(max(4, -(-4 * size // rows)))]
    together = [key for order in orders for key in order]  # laid end to end
    expected = [orders[i][:size] if size <= rows else together[i * size : (i + 1) * size] for i in range(4)]
    assert [len(paced), *(len(paths_of(paced)) for _ in range(2))] == [-(-size // 4), size, size]
    paced.sampler.set_epoch(0)
    assert [paths_of(paced) for _ in range(4)] == expected
    paced.sampler.set_epoch(2)  # as a resumed training does
    assert paths_of(paced) == expected[2]
    with paced.sampler.full_pass():
        assert sorted(paths_of(paced)) == sorted(orders[0])
    assert len(paths_of(paced)) == size


@pytest.mark.parametrize("wrong", [0, -1, 2.5, True, "all"])
def test_an_epoch_is_of_a_number_of_images(root, wrong):
    with pytest.raises(InputError, match=r"epoch_size="):
        data_of(root).set_loading(None, 0, wrong)


def test_same_seed_same_manifest_and_setup_only_once(root, tmp_path_factory):
    files = []
    for i in range(2):
        data = prepared(root)
        samples = data.samples
        data.setup("test")
        assert data.samples is samples
        files.append(tmp_path_factory.mktemp("manifest") / f"{i}.csv")
        write_manifest(files[-1], data.samples)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert all(len(s.digest) == 16 for s in read_manifest(files[0]))


def test_a_manifest_replaces_the_scan(root):
    data, path = prepared(root, seed=5), root / "m.csv"
    write_manifest(path, data.samples)
    again = prepared(root, seed=6, manifest=path)
    assert again.samples == data.samples and again.digest == data.digest
    paper = prepared(root, protocol="paper", manifest=path)
    assert not any(s.split == "calibrate" for s in paper.samples) and sum(s.split == "train" for s in paper.samples) == 10
    save(root / "train" / "000.png", np.zeros((20, 20), np.uint8))
    with pytest.raises(InputError, match=r"000\.png: changed since"):
        prepared(root, manifest=path)
    (root / "train" / "000.png").unlink()
    with pytest.raises(InputError, match=r"000\.png: cannot be read .*m\.csv"):
        prepared(root, manifest=path)


def test_sixteen_bits_use_a_window_fitted_to_training_images(root):
    rng = np.random.default_rng(1)
    for i in range(10):
        save(root / "train" / f"{i:03}.png", rng.integers(1000, 3001, (SIZE, SIZE)).astype(np.uint16))
    data = prepared(root, image_size=None, batch_size=1)
    lo, hi = data.window["uint16"]
    assert set(data.window) == {"uint16"} and 1000 <= lo < 1010 and 2990 < hi <= 3000
    assert all(batch.image.min() < 0.01 and batch.image.max() > 0.99 for batch in data.train_dataloader())
    assert prepared(root, window="dtype").window == {"uint8": (0, 255), "uint16": (0, 65535)}
    assert prepared(root, window=[5, 10]).window == {"uint16": (5, 10), "float32": (5, 10)}
    assert prepared(root, window={"uint16": [1, 2]}).window == {"uint16": (1, 2)}


def test_a_float_image_needs_a_window(root):
    tifffile.imwrite(root / "test/good/x.tif", np.random.default_rng(0).random((20, 20), np.float32))
    with pytest.raises(InputError, match=r"x\.tif: float32 .*uint8.*data\.window=\[0,1\]"):
        list(prepared(root).test_dataloader())


def spoil(root):
    file = root / "test/good/001.png"
    file.write_bytes(file.read_bytes()[:-400])
    save(root / "masks/001.png", np.zeros((SIZE, SIZE), np.uint8))  # one column short
    (root / "train/003.png").write_bytes(b"")
    (root / "train/004.png").write_bytes(b"text")


def test_stop_at_the_image(root):
    spoil(root)
    with pytest.raises(InputError, match=r"train/003\.png: the file is empty"):
        prepared(root)
    for name in ("train/003", "train/004"):
        (root / f"{name}.png").unlink()
    with pytest.raises(InputError, match=rf"masks/001\.png: a mask of 48×48 .*bad/001\.png of {SIZE + 1}×48"):
        list(prepared(root).test_dataloader())
    (root / "masks/001.png").unlink()
    with pytest.raises(InputError, match=r"good/001\.png: damaged"):
        list(prepared(root).test_dataloader())


def test_skip_leaves_out_counts_and_lists(root, caplog):
    spoil(root)
    with caplog.at_level(logging.WARNING):
        data = prepared(root, on_error="skip")
    bad = {"test/good/001.png", "test/bad/001.png", "train/003.png", "train/004.png"}
    assert set(data.skipped) == bad == {s.path for s in data.samples if s.split == "skipped"}
    assert all(path in caplog.text for path in bad) and "skipped 4 of 16" in caplog.text
    assert len(rows_of(data.test_dataloader())) == 4
    assert len(rows_of(data.train_dataloader())) + len(rows_of(data.calibrate_dataloader())) == 8
    assert len(rows_of(data.calibrate_dataloader())) == 2  # of the eight that are left
    write_manifest(root / "m.csv", data.samples)
    assert prepared(root, manifest=root / "m.csv").digest == data.digest
    absent = Sample("train/none.png", "train", 0, "good")
    write_manifest(root / "m.csv", [*(s._replace(digest="") for s in data.samples), absent])
    assert list(prepared(root, manifest=root / "m.csv", on_error="skip").skipped) == ["train/none.png"]


def test_missing_data_is_explained(root):
    for changes, says in (
        ({"root": root / "nowhere"}, ["nowhere: no such folder"]),
        ({"category": "tests"}, ["no category 'tests'", "did you mean 'test'?", "found masks, test, train"]),
    ):
        with pytest.raises(InputError) as error:
            prepared(**{"root": root, **changes})
        for text in [*says, str(root), "train/*.png", "Somebody, Pictures, 2020", "data.root="]:
            assert text in str(error.value)
    for folder in ("test", "train"):
        for path in (root / folder).rglob("*.png"):
            path.unlink()
        with pytest.raises(InputError, match=rf"{root}.*no {folder} image"):
            prepared(root)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("protocol", "strict"),
        ("data.on_error", "ignore"),
        ("data.calibration", 0),
        ("data.calibration", 1.0),
        ("crop", 33),
        ("crop", 4),
        ("image_size", 4),
        ("batch_size", 0),
        ("workers", -1),
        ("data.window", "full"),
        ("data.window", [3, 3]),
        ("data.window", [1, 2, 3]),
        ("data.window", {"uint8": [0, 1]}),
        ("data.window", [0, float("inf")]),
        ("data.window", None),
    ],
)
def test_values_are_checked_at_construction(tmp_path, key, value):
    with pytest.raises(InputError) as error:
        data_of(tmp_path, **{key.removeprefix("data."): value})
    assert str(error.value).startswith(f"{key}=")


def test_native_sizes_do_not_mix_in_a_batch(root):
    with pytest.raises(InputError, match="image_size=null"):
        list(prepared(root, image_size=None).test_dataloader())
    single = prepared(root, image_size=None, batch_size=1)
    assert {tuple(batch.image.shape[2:]) for batch in single.test_dataloader()} == {(SIZE, SIZE + i) for i in range(3)}


def test_labels_that_cannot_be_true_are_refused_and_copies_counted(root, caplog):
    data = prepared(root, protocol="paper")
    path, samples = root / "m.csv", data.samples

    def changed(**fields):
        write_manifest(path, [samples[0], samples[1]._replace(**fields), *samples[2:]])
        return lambda: prepared(root, manifest=path, protocol="paper")

    for fields, says in (
        ({"split": "train", "label": 1}, "label 1 in split train"),
        ({"label": 0, "mask": "masks/000.png"}, r"label 0, but masks/000\.png marks pixels"),
        ({"label": 0, "mask": "", "boxes": "0 0 9 9"}, "label 0, but boxes marks"),
    ):
        with pytest.raises(InputError, match=rf"m\.csv, line 3: .*{samples[1].path}: {says}"):
            changed(**fields)()
    assert not caplog.text
    for name in ("train/001.png", "test/good/000.png"):
        (root / name).write_bytes((root / "train/000.png").read_bytes())
    prepared(root, protocol="paper")
    assert "3 in train and test" in caplog.text
    for i in range(10):
        (root / f"train/{i:03}.png").write_bytes((root / "train/000.png").read_bytes())
    with pytest.raises(InputError, match=r"train/000\.png: all 10 images of split train have the same content"):
        prepared(root, protocol="paper")


@pytest.mark.parametrize("name", ["good", "all", "pooled"])
def test_no_defect_type_has_the_name_of_a_row_of_tables(root, name):
    class Renamed(Pictures):
        def scan(self):
            return [s._replace(defect=name) if s.label else s._replace(defect="fine") for s in super().scan()]

    assert {(s.label, s.defect) for s in prepared(root, Renamed).samples} == {(0, "good"), (1, f"{name} (defect)")}


def test_what_is_known_reaches_the_loaders(root):
    data = prepared(root, shots=8, defects=1, contamination=0.1, protocol="clean")
    assert data.knowledge == "8 shots, 1 defects, 0.1 contaminated"
    assert [len(data.samples_of(split)) for split in ("train", "calibrate", "defects", "test")] == [7, 2, 1, 4]
    assert next(iter(data.loader("defects"))).label.tolist() == [1]
    for wrong in ({"shots": 0}, {"defects": -1}, {"contamination": 1.0}, {"shots": 2, "protocol": "unlabelled"}):
        with pytest.raises(InputError, match="unlabelled" if "protocol" in wrong else next(iter(wrong))):
            data_of(root, **wrong)
