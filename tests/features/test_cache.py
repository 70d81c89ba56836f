"""What is read back is what was computed, whatever happened to the folder in between, and nothing is computed twice."""

import contextlib
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from support import composed, tiny_run

from blemish.data.dataset import Images
from blemish.data.images import restored
from blemish.data.module import ImageData
from blemish.detector import Detector, TrainedDetector
from blemish.edge.errors import InputError
from blemish.features import cache as module
from blemish.features.cache import Shards, Store, StoredData, content_key, pack_image, pack_maps, unpack_maps
from blemish.features.extractor import Features
from blemish.run.config import build, check_config
from blemish.run.record import read_record
from blemish.run.train import train
from blemish.types import Prediction

ROUNDING = 2**-11  # what float16 may change of a value
MAPS, PIXELS, BOTH = (lambda split: (True, False)), (lambda split: (False, True)), (lambda split: (True, True))
SPLITS = ("train", "calibrate", "test")
QUICK = ["save.checkpoint=false"]


@contextlib.contextmanager
def counted(kind: type, method: str):
    """A list that gets one entry a call."""
    original, calls = getattr(kind, method), []

    def count(self, *args):
        calls.append(args)
        return original(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, method, count)
        yield calls


def on(root: Path, *more: str) -> list[str]:
    return ["store=on", f"store.root='{root}'", *QUICK, *more]


def figures(metrics: dict) -> dict:
    """All numbers that are not times."""
    return {name: value for name, value in metrics.items() if isinstance(value, int | float) and not name.endswith("_seconds")}


def data_of(root: Path, *overrides: str) -> ImageData:
    data = build(tiny_run(root, root, *overrides).data)
    data.setup()
    return data


def stored(root: Path, data: ImageData, inputs=MAPS, dtype="float32", images=True, features=None) -> StoredData:
    features = features or Features("test_resnet", [1, 2], "random", 0)
    store, cpu = Store(root, dtype, None), torch.device("cpu")
    return StoredData(store, data, features, inputs, images, cpu, contextlib.nullcontext, False)


def filled(data: StoredData) -> tuple[int, int]:
    """(images read, images computed) for all splits."""
    for split in SPLITS:
        data.loader(split)
    return data.read, data.computed


def files(root: Path) -> list[Path]:
    return sorted(root.rglob("*.safetensors"))


def write(shards: Shards, *numbers: int, size: int = 4) -> dict[str, torch.Tensor]:
    """Tensors that tell their key, one a shard."""
    values = {f"n{i}": torch.full((size, 2), float(i)) for i in numbers}
    for key, value in values.items():
        shards.write({key: value})
    return values


# ---- what is stored is what was computed


@given(st.integers(0, 2**32 - 1), st.floats(-30, 40))
def test_no_value_of_a_map_changes_by_more_than_float16_rounding(seed, exponent):
    map = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    back = unpack_maps(pack_maps(map[None], torch.float16))[0]
    assert (back - map).abs().max() <= ROUNDING * map.abs().max()
    normal = map.abs() >= 2**-14
    assert ((back - map).abs() <= ROUNDING * map.abs())[normal].all()
    back = unpack_maps(pack_maps(map[None], torch.float32))
    assert torch.equal(back[0], map)
    assert back.is_contiguous(memory_format=torch.channels_last)  # as the network made them


def test_what_float16_cannot_hold_stays_float32():
    fits, large, small = torch.full((2, 3, 3), 65504.0), torch.full((2, 3, 3), 65520.0), torch.full((2, 3, 3), 1e-6)
    broken = torch.tensor([1.0, torch.inf, torch.nan]).expand(2, 3, 3)
    packed = pack_maps(torch.stack([fits, large, small, broken]), torch.float16)
    assert [m.dtype for m in packed] == [torch.float16] + 3 * [torch.float32]
    assert torch.equal(unpack_maps(packed[:3]), torch.stack([fits, large, small]))  # kinds mix in a batch
    torch.testing.assert_close(unpack_maps(packed[3:])[0], broken, rtol=0, atol=0, equal_nan=True)


def test_bytes_stay_bytes_and_deeper_images_are_not_cut_to_them():
    g = torch.Generator().manual_seed(0)
    colour = torch.from_numpy(torch.randint(0, 256, (3, 9, 8), generator=g).numpy().astype(np.float32) / np.float32(255))
    deep = torch.rand(1, 9, 8, generator=g).expand(3, -1, -1)
    for image, channels in ((colour, 3), (colour[:1].expand(3, -1, -1), 1)):
        packed = pack_image(image, torch.float16)
        assert (tuple(packed.shape), packed.dtype) == ((channels, 9, 8), torch.uint8)
        assert torch.equal(restored(packed), image)
    assert pack_image(deep, torch.float16).dtype == torch.float16
    assert (restored(pack_image(deep, torch.float16)) - deep).abs().max() <= ROUNDING
    assert torch.equal(restored(pack_image(deep, torch.float32)), deep)


# ---- whole runs


@pytest.fixture(scope="module")
def off(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("off") / "run"
    return folder, figures(train(tiny_run(tiny, folder, *QUICK, "save.pictures=4")))


@pytest.fixture(scope="module")
def first(tiny, tmp_path_factory):
    """The metrics of a run that fills a store, the store, and its record."""
    folder = tmp_path_factory.mktemp("first")
    metrics = figures(train(tiny_run(tiny, folder / "run", *on(folder / "store"))))
    return metrics, folder / "store", read_record(folder / "run")["store"]


def test_float32_changes_nothing_and_float16_no_more_than_rounding(tiny, off, first, tmp_path):
    same = train(tiny_run(tiny, tmp_path / "same", *on(tmp_path / "store", "store.dtype=float32", "save.pictures=4")))
    assert figures(same) == pytest.approx(off[1], rel=1e-6)
    pictures = sorted((off[0] / "images").iterdir())
    assert len(pictures) == 4
    for path in pictures:
        assert np.array_equal(Image.open(path), Image.open(tmp_path / "same" / "images" / path.name))
    for name, value in off[1].items():
        if isinstance(value, float):  # PaDiM's whitening multiplies the rounding of 2⁻¹¹, but ranks hardly move
            tolerance = {"rel": 4 * ROUNDING} if name.endswith("_threshold") else {"abs": 1e-3}
            assert first[0][name] == pytest.approx(value, **tolerance), name


def test_a_second_run_decodes_and_computes_nothing(tiny, first, tmp_path):
    metrics, store, record = first
    assert (record["read"], record["computed"], record["path"]) == (0, 36, str(store))
    assert record["bytes"] == sum(path.stat().st_size for path in files(store))
    with counted(Features, "forward") as forwards, counted(Images, "__getitem__") as decoded:
        second = train(tiny_run(tiny, tmp_path / "second", *on(store)))
    assert not forwards
    assert not decoded
    assert figures(second) == metrics
    record = read_record(tmp_path / "second")["store"]
    assert (record["read"], record["computed"]) == (36, 0)


def column_mask(path: Path, columns: int) -> Path:
    inside = np.zeros((64, 64), np.uint8)
    inside[:, :columns] = 255
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(inside).save(path)
    return path


def test_images_of_several_sizes_and_16_bits(tmp_path):
    g = np.random.default_rng(0)
    for label in ("train", "good", "bad"):
        (tmp_path / "data" / label).mkdir(parents=True)
        for i in range(3):
            image = g.integers(0, 1000, (40 + 10 * i, 70 - 10 * i), dtype=np.uint16)
            Image.fromarray(image).save(tmp_path / "data" / label / f"{i}.png")
    options = ["data.normal=train", "data.normal_test=good", "data.abnormal=[bad]", "data.masks=null", "resize=letterbox"]
    roi, maps = column_mask(tmp_path / "mask.png", 50), []
    for window in ("dtype", "[0,1000]"):
        data = data_of(tmp_path / "data", *options, f"data.roi='{roi}'", f"data.window={window}")
        other = stored(tmp_path / "store", data)
        assert_batches_equal(data, other, images=False)
        maps.append(next(iter(other.loader("test"))).maps[0])
    assert not torch.allclose(*maps)  # the range of values keeps them apart


def test_what_maps_depend_on_keeps_them_apart(tiny, tmp_path):
    masks = [column_mask(tmp_path / f"{columns}.png", columns) for columns in (30, 40)]
    for folder in ("normal", "normal_test", "square"):
        for i, path in enumerate(sorted((tiny / folder).glob("*.png"))):
            column_mask(tmp_path / "own" / folder / path.name, 30 + i % 2 * 10)
    changes = [[], ["image_size=48"], ["crop=48"], ["resize=letterbox"]]
    changes += [[f"data.roi='{mask}'"] for mask in (*masks, tmp_path / "own")]
    for change in changes:
        data = data_of(tiny, *change)
        other = stored(tmp_path / "store", data, BOTH)
        assert_batches_equal(data, other, images=True)
        assert (other.computed, other.read) == (36, 0), change
        assert filled(stored(tmp_path / "store", data)) == (36, 0)
    store, data = tmp_path / "store", data_of(tiny)
    assert filled(stored(store, data, dtype="float16")) == (0, 36)
    for seed, stages, known in ((0, [1, 2], 36), (1, [1, 2], 0), (0, [2], 36), (0, [1, 2, 3], 0), (0, [2, 3], 36)):
        features = Features("test_resnet", stages, "random", seed)
        assert filled(stored(store, data, features=features)) == (known, 36 - known), (seed, stages)
    # two stages and images of 4 geometries, two stages of another dtype and of other weights, one more stage; none of them twice
    assert len({path.parent for path in files(store)}) == 4 * 3 + 2 + 2 + 1
    for change in (["protocol=paper"], ["data.calibration=0.1"]):  # what maps do not depend on
        assert filled(stored(store, data_of(tiny, *change)))[1] == 0


# ---- the batches


def assert_batches_equal(data: ImageData, other: StoredData, images: bool):
    for split in SPLITS:
        pairs = list(zip(data.loader(split, split == "train"), other.loader(split, split == "train"), strict=True))
        assert pairs
        for live, read in pairs:
            assert live.path == read.path
            assert torch.equal(live.label, read.label)
            assert torch.equal(live.mask, read.mask)
            if images:
                assert torch.equal(read.image, live.image)
            else:
                assert read.image.shape == (len(live.image), 0, *live.image.shape[-2:])
            if read.maps is not None:
                torch.testing.assert_close(read.maps, other.features(live.image), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("inputs", [MAPS, PIXELS, BOTH])
@pytest.mark.parametrize("size", [None, 7, 40])  # of an epoch; there are 18 images
def test_batches_are_those_of_the_data_module(tiny, tmp_path, inputs, size):
    data = data_of(tiny, "image_size=48", "crop=40")
    data.set_loading(None, 0, size)
    assert_batches_equal(data, stored(tmp_path, data, inputs), images=inputs is not MAPS)
    with counted(Images, "__getitem__") as decoded:
        assert_batches_equal(data, stored(tmp_path, data, inputs), images=inputs is not MAPS)
    if size is None:
        assert len(decoded) == 36  # by the data module
    if inputs is BOTH:  # images decoded, maps from the store
        assert_batches_equal(data, stored(tmp_path, data, inputs, images=False), images=True)


def test_tiles_boxes_and_copies(tiny, tmp_path):
    data = data_of(tiny)
    rows = []
    for sample in data.samples:
        rows.append(sample._replace(mask="", boxes="3 4 20 30" if sample.label == 1 else ""))
        if sample.split == "test":
            rows += [sample._replace(tile="0,0,32,40"), sample._replace(tile="16,8,48,48", mask="", boxes="20 10 64 40")]
    data.samples = rows
    data._by_key = {sample.key: sample for sample in rows}
    assert_batches_equal(data, stored(tmp_path, data), images=False)
    assert len({content_key(sample) for sample in rows}) == len(rows)
    assert content_key(rows[0]) == content_key(rows[0]._replace(path="b.png", split="test", label=1))
    again = stored(tmp_path, data)
    data.samples = [rows[0]._replace(path="copy.png"), *rows]  # the same content elsewhere
    again.loader("train")
    assert (again.read, again.computed) == (sum(s.split == "train" for s in rows), 0)


class Toy(TrainedDetector):
    """A student that follows one stage of a frozen teacher and looks at the images for it."""

    def __init__(self):
        super().__init__()
        self.backbone = Features("test_resnet", [1], "random", 0)
        self.student = torch.nn.Conv2d(3, self.backbone.channels[0], 4, stride=4)

    def forward(self, image):
        return Prediction((self.student(image) - self.features(image)[0]).square().mean((1, 2, 3)))

    def loss(self, batch):
        return (self.student(batch.image) - self.maps(batch)[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training")
@pytest.mark.filterwarnings("ignore:.*smaller than the logging interval")
def test_epochs_of_a_frozen_teacher_run_it_once(tiny, tmp_path):
    data, losses, calls = data_of(tiny), [], []
    for root in (None, tmp_path, tmp_path):
        torch.manual_seed(0)
        model = Toy()
        assert (model.inputs_for("train"), model.inputs_for("test")) == ((True, True), (False, True))
        source = stored(root, data, model.inputs_for, features=model.backbone) if root else data
        trainer = pl.Trainer(max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
        with counted(Features, "forward") as forwards, counted(Images, "__getitem__") as decoded:
            trainer.fit(model, datamodule=source)
        losses.append(float(trainer.callback_metrics["loss"]))
        calls.append((len(forwards), len(decoded)))
    assert calls == [(9, 36), (3, 18), (0, 0)]  # 18 images in batches of 8, kept from the second epoch on
    assert losses[1:] == [pytest.approx(losses[0], rel=1e-5)] * 2


def test_only_the_backbones_own_maps_are_taken_from_the_store():
    class Own(Toy):
        def features(self, image):
            return [m.relu() for m in self.backbone(image)]

    class Blind(Detector):
        def forward(self, image):
            return Prediction(image.mean((1, 2, 3)))

    padim = build(composed("model=padim", "backbone=test_resnet", "weights=random").model)
    assert padim.inputs_for("train") == padim.inputs_for("test") == padim.inputs_for("calibrate") == (True, False)
    assert Own().inputs_for("train") == Own().inputs_for("test") == Blind().inputs_for("test") == (False, True)


@pytest.mark.slow
def test_tiles_are_stored_as_a_map(tiny, tmp_path):
    options = ["model=self_similarity", "model.stages=[3]"]
    off = train(tiny_run(tiny, tmp_path / "off", *options))
    computed = []
    for name, more in (("first", []), ("second", ["model.neighbors=2"]), ("third", ["model.stride=16"])):
        metrics = train(tiny_run(tiny, tmp_path / name, *options, *on(tmp_path / "store"), *more))
        computed.append(read_record(tmp_path / name)["store"]["computed"])
        if not more:
            assert metrics["pixel_auroc"] == pytest.approx(off["pixel_auroc"], abs=2e-3)
    assert computed == [36, 0, 36]  # other words read them, other tiles do not


# ---- what can happen to the folder


def test_a_changed_image_is_computed_again_unless_it_changes_while_it_is_read(tiny, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(tiny, root)
    assert filled(stored(tmp_path / "store", data_of(root))) == (0, 36)
    late, victim = data_of(root), root / "square" / "000.png"
    Image.fromarray(255 - np.array(Image.open(victim))).save(victim)
    changed = data_of(root)
    other = stored(tmp_path / "store", changed)
    assert_batches_equal(changed, other, images=False)
    assert (other.read, other.computed) == (35, 1)
    with pytest.raises(InputError, match=r"000\.png: changed"):
        stored(tmp_path / "other", late).loader("test")


def damaged_copies(path: Path):
    sound = path.read_bytes()
    flipped = bytearray(sound)
    flipped[-3] ^= 1
    yield from (b"", sound[:5], sound[: len(sound) // 2], sound[:-1], bytes(flipped), b"\0" * len(sound), b"not a shard at all")


def test_damaged_shards_are_noticed_and_made_again(tmp_path, caplog):
    store = Store(tmp_path, "float32", None)
    values = write(Shards(store, "x", {"a": 1}), 0, 1, 2)
    victim = files(tmp_path)[1]
    sound = victim.read_bytes()
    for damage in damaged_copies(victim):
        victim.write_bytes(damage)
        shards = Shards(store, "x", {"a": 1})
        assert len(shards.absent(values)) == 1
        assert all(torch.equal(found, values[key]) for key, found in shards.found.items())
        assert not victim.exists()
        assert f"{victim} is damaged" in caplog.text
        caplog.clear()
    foreign = Shards(store, "x", {"a": 2})
    foreign.folder.mkdir()
    (foreign.folder / victim.name).write_bytes(sound)  # a sound file in the wrong folder
    assert foreign.absent(values) == set(values)


def test_a_run_on_a_damaged_store(tiny, first, tmp_path):
    shutil.copytree(first[1], tmp_path / "store")
    for path, damage in zip(files(tmp_path / "store"), damaged_copies(files(tmp_path / "store")[0]), strict=False):
        path.write_bytes(damage)
    assert figures(train(tiny_run(tiny, tmp_path / "run", *on(tmp_path / "store")))) == first[0]


def test_leftovers_of_killed_writers_and_least_recently_used_shards_go(tmp_path):
    shards = Shards(Store(tmp_path, "float32", None), "x", {})
    values = write(shards, *range(4), size=1000)
    paths = {next(iter(keys)): path for path, keys in shards.keys.items()}
    size = files(tmp_path)[0].stat().st_size
    for age, key in enumerate(("n3", "n1", "n0", "n2")):  # used in this order
        os.utime(paths[key], (1e9 + age,) * 2)
    old, fresh = shards.folder / f"{module.PART}old", shards.folder / f"{module.PART}fresh"
    for path in (old, fresh):
        path.write_bytes(b"half a shard")
    os.utime(old, (time.time() - 2 * module.STALE,) * 2)
    second = Shards(Store(tmp_path, "float32", 4.5 * size / 1e9), "x", {})
    second.absent(["n3"])  # a use: the oldest is now n1
    write(second, 4, size=1000)
    assert {key for key, path in paths.items() if path.exists()} == {"n0", "n2", "n3"}
    assert (old.exists(), fresh.exists()) == (False, True)
    assert torch.equal(shards.found["n1"], values["n1"])  # whoever has it open keeps it
    write(second, 5, 6, size=1000)
    assert sum(path.stat().st_size for path in files(tmp_path)) <= 4.5 * size
    assert paths["n3"].exists()  # in use
    with pytest.raises(OSError, match=r"store\.max_gb"):
        write(second, 7, size=1000)


@pytest.mark.parametrize("obstacle", ["bound", "disk", "folder", "half way"])
def test_where_nothing_can_be_stored_the_run_computes(tiny, off, tmp_path, caplog, monkeypatch, obstacle):
    root, more = tmp_path / "store", []
    if obstacle == "bound":
        more = ["store.max_gb=1e-6"]
    elif obstacle == "disk":
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage._replace(free=100))
    elif obstacle == "folder":
        root.write_text("a file")
    else:
        written, replace = [], Path.replace

        def full(path, target):
            written.extend([path] if path.name.startswith(module.PART) else [])
            if len(written) > 4 and path in written:
                raise OSError(28, "No space left on device")
            return replace(path, target)

        monkeypatch.setattr(Path, "replace", full)
    metrics = figures(train(tiny_run(tiny, tmp_path / "run", *on(root, "store.dtype=float32", *more))))
    assert metrics == pytest.approx(off[1], rel=1e-6)
    assert caplog.text.count("maps are computed and not stored") == 1
    assert not list(tmp_path.rglob(f"{module.PART}*"))


@pytest.mark.parametrize("wrong", ["store.dtype=int8", "store.max_gb=0"])
def test_wrong_values_are_named(tiny, tmp_path, wrong):
    with pytest.raises(InputError, match=wrong):
        check_config(tiny_run(tiny, tmp_path, *on(tmp_path), wrong))


def test_images_of_their_own_sizes_are_not_stored(tiny, tmp_path, caplog):
    data = data_of(tiny, "image_size=null")
    assert next(iter(stored(tmp_path, data).loader("test"))).maps is None
    assert "expected image_size" in caplog.text


# ---- several writers; that kills leave a sound store is for tests/hard/power_cut.py


def test_what_another_has_finished_meanwhile_is_not_computed(tiny, tmp_path):
    data = data_of(tiny)
    first, other = stored(tmp_path, data), stored(tmp_path, data)

    def charge(name):
        if name == "features" and not other.computed:  # while the first batch of 8 is computed
            filled(other)
        return contextlib.nullcontext()

    first.charge = charge
    filled(first)
    assert (first.computed, other.computed) == (8, 36)


def test_writers_fill_one_store_together(tiny, tmp_path):
    data = data_of(tiny, "batch_size=2")
    writers = [stored(tmp_path, data, BOTH) for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        assert 36 <= sum(computed for _, computed in pool.map(filled, writers)) <= 3 * 36
    again = stored(tmp_path, data, BOTH)
    assert_batches_equal(data, again, images=True)
    assert (again.read, again.computed) == (36, 0)
