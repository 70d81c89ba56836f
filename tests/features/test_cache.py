"""What is read back is what was computed, whatever happened to the folder in between, and nothing is computed twice."""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from support import CONFIGS, composed, tiny_run

from blemish.data.dataset import Images
from blemish.data.images import restored
from blemish.data.manifest import Sample
from blemish.data.module import ImageData
from blemish.detector import Detector, TrainedDetector
from blemish.edge.errors import InputError
from blemish.features import cache as module
from blemish.features.cache import NoRoom, Shelf, Store, StoredData, name_of, pack_image, pack_maps, unpack_maps
from blemish.features.extractor import Features
from blemish.run.config import build
from blemish.run.record import read_record
from blemish.run.train import train
from blemish.types import Prediction

ONE_MORE = 2**-11  # what float16 rounding may change of a value
MAPS, PIXELS, BOTH = (lambda split: (True, False)), (lambda split: (False, True)), (lambda split: (True, True))
QUICK = ["save.curves=false", "save.checkpoint=false", "save.pictures=0"]


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


def data_of(tiny: Path, *overrides: str) -> ImageData:
    data = build(tiny_run(tiny, tiny, *overrides).data)
    data.setup()
    return data


def stored(root: Path, data: ImageData, reads=MAPS, stages=(1, 2), dtype="float32", max_gb=None, images=True, seed=0) -> StoredData:
    features = Features("test_resnet", list(stages), "random", seed)
    return StoredData(
        Store(root, dtype, max_gb), data, features, reads, images, torch.device("cpu"), lambda name: contextlib.nullcontext(), False
    )


def shards(root: Path) -> list[Path]:
    return sorted(root.rglob("*.safetensors"))


def filled(shelf: Shelf, count: int, first: int = 0, size: int = 4) -> dict[str, torch.Tensor]:
    """Tensors that tell their name, one a shard."""
    values = {f"n{i}": torch.full((size, 2), float(i)) for i in range(first, first + count)}
    for name, value in values.items():
        shelf.add(name, value)
        shelf.write()
    return values


# ---- what is stored is what was computed


@given(st.integers(0, 2**32 - 1), st.floats(-30, 40))
def test_no_value_of_a_map_changes_by_more_than_float16_rounding(seed, exponent):
    map = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    back = unpack_maps(pack_maps(map[None], torch.float16))[0]
    assert (back - map).abs().max() <= ONE_MORE * map.abs().max()
    normal = map.abs() >= 2**-14
    assert ((back - map).abs() <= ONE_MORE * map.abs())[normal].all()
    assert torch.equal(unpack_maps(pack_maps(map[None], torch.float32))[0], map)


def test_what_float16_cannot_hold_stays_float32():
    fits, large, small = torch.full((2, 3, 3), 65504.0), torch.full((2, 3, 3), 65520.0), torch.full((2, 3, 3), 1e-6)
    broken = torch.tensor([1.0, torch.inf, torch.nan]).expand(2, 3, 3)
    assert [m.dtype for m in pack_maps(torch.stack([fits, large, small, broken]), torch.float16)] == [torch.float16] + 3 * [torch.float32]
    back = unpack_maps(pack_maps(torch.stack([fits, large, small]), torch.float16))  # kinds mix in a batch
    assert torch.equal(back, torch.stack([fits, large, small]))
    torch.testing.assert_close(unpack_maps(pack_maps(broken[None], torch.float16))[0], broken, rtol=0, atol=0, equal_nan=True)


def test_maps_come_back_in_the_networks_memory_order():
    features = Features("test_resnet", [1], "random", seed=0)
    (live,) = features(torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    back = unpack_maps(pack_maps(live, torch.float32))
    assert torch.equal(back, live)
    assert back.stride() == live.stride()


def test_bytes_stay_bytes_and_deeper_images_are_not_cut_to_them():
    g = torch.Generator().manual_seed(0)
    colour = torch.from_numpy(torch.randint(0, 256, (3, 9, 8), generator=g).numpy().astype(np.float32) / np.float32(255))
    grey = colour[:1].expand(3, -1, -1)
    deep = torch.rand(1, 9, 8, generator=g).expand(3, -1, -1)
    assert [(tuple(p.shape), p.dtype) for p in (pack_image(i, torch.float16) for i in (colour, grey, deep))] == [
        ((3, 9, 8), torch.uint8),
        ((1, 9, 8), torch.uint8),
        ((1, 9, 8), torch.float16),
    ]
    for image in (colour, grey):
        assert torch.equal(restored(pack_image(image, torch.float16)), image)
    assert (restored(pack_image(deep, torch.float16)) - deep).abs().max() <= ONE_MORE
    assert torch.equal(restored(pack_image(deep, torch.float32)), deep)


# ---- whole runs


@pytest.fixture(scope="module")
def off(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("off") / "run"
    return folder, figures(train(tiny_run(tiny, folder, *QUICK, "save.pictures=4")))


def test_float32_changes_nothing_and_float16_no_more_than_rounding(tiny, off, tmp_path):
    same = train(tiny_run(tiny, tmp_path / "same", *on(tmp_path / "store", "store.dtype=float32", "save.pictures=4")))
    assert figures(same) == pytest.approx(off[1], rel=1e-6)
    pictures = sorted((off[0] / "images").iterdir())
    assert len(pictures) == 4
    for path in pictures:
        assert np.array_equal(Image.open(path), Image.open(tmp_path / "same" / "images" / path.name))
    rounded = figures(train(tiny_run(tiny, tmp_path / "rounded", *on(tmp_path / "store"))))
    for name, value in off[1].items():
        if isinstance(value, float):  # PaDiM's whitening multiplies the rounding of 2⁻¹¹, but ranks hardly move
            tolerance = {"rel": 4 * ONE_MORE} if name.endswith("_threshold") else {"abs": 1e-3}
            assert rounded[name] == pytest.approx(value, **tolerance), name


def test_a_second_run_decodes_and_computes_nothing(tiny, tmp_path):
    first = train(tiny_run(tiny, tmp_path / "first", *on(tmp_path / "store")))
    record = read_record(tmp_path / "first")["store"]
    assert (record["read"], record["computed"], record["path"]) == (0, 36, str(tmp_path / "store"))
    assert record["bytes"] == sum(path.stat().st_size for path in shards(tmp_path / "store"))
    with counted(Features, "forward") as forwards, counted(Images, "__getitem__") as decoded:
        second = train(tiny_run(tiny, tmp_path / "second", *on(tmp_path / "store")))
    assert not forwards
    assert not decoded
    assert figures(second) == figures(first)
    record = read_record(tmp_path / "second")["store"]
    assert (record["read"], record["computed"]) == (36, 0)


@pytest.mark.slow
def test_another_method_another_split_and_other_stages_share_the_maps(tiny, tmp_path):
    def run(name, *overrides):
        train(tiny_run(tiny, tmp_path / name, *on(tmp_path / "store"), *overrides))
        return read_record(tmp_path / name)["store"]["computed"]

    assert run("first") == 36
    assert run("cut", "model.stages=[2,3]", "model.n_features=7") == 0
    assert run("shallow", "model.stages=[1,2]") == 0
    assert run("other_split", "protocol=paper") == 0
    assert run("other_hold_out", "data.calibration=0.1") == 0
    assert run("one_more_stage", "model.stages=[1,2,3,4]") == 36
    assert len(shards(tmp_path / "store")) == len({path.parent for path in shards(tmp_path / "store")}) * 3  # splits, and no stage twice


@pytest.mark.parametrize("change", [["image_size=32"], ["crop=32"], ["weights=random", "seed=1"], ["store.dtype=float32"]])
def test_what_maps_depend_on_keeps_them_apart(tiny, tmp_path, change):
    train(tiny_run(tiny, tmp_path / "first", *on(tmp_path / "store")))
    before = set(shards(tmp_path / "store"))
    train(tiny_run(tiny, tmp_path / "second", *on(tmp_path / "store"), *change))
    assert read_record(tmp_path / "second")["store"]["computed"] == 36
    assert before < set(shards(tmp_path / "store"))


def test_the_range_of_deep_images_keeps_them_apart(tmp_path):
    data = [deep_data(tmp_path, window) for window in ("dtype", [0, 1000])]
    batches = [next(iter(stored(tmp_path / "store", d).loader("test"))) for d in data]
    for d, batch in zip(data, batches, strict=True):
        expected = Features("test_resnet", [1, 2], "random", 0)(next(iter(d.loader("test"))).image)
        torch.testing.assert_close(batch.maps, expected)
    assert not torch.allclose(batches[0].maps[0], batches[1].maps[0])


def deep_data(tmp_path: Path, window) -> ImageData:
    g = np.random.default_rng(0)
    for split, label in (("train", "good"), ("test", "good"), ("test", "bad")):
        for i in range(3):
            path = tmp_path / "deep" / split / label / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                Image.fromarray(g.integers(0, 1000, (40, 48), dtype=np.uint16)).save(path)
    overrides = ["data.normal=train/good", "data.normal_test=test/good", "data.abnormal=[test/bad]", "data.masks=null"]
    cfg = tiny_run(tmp_path / "deep", tmp_path, *overrides)
    cfg.data.window = window
    data = build(cfg.data)
    data.setup()
    return data


# ---- the batches


def assert_batches_equal(data: ImageData, other: StoredData, images: bool):
    features = other.features
    for split, shuffle in (("train", True), ("calibrate", False), ("test", False)):
        pairs = list(zip(data.loader(split, shuffle), other.loader(split, shuffle), strict=True))
        assert pairs
        for live, read in pairs:
            assert live.path == read.path
            assert torch.equal(live.label, read.label)
            assert torch.equal(live.mask, read.mask)
            assert read.image.shape[-2:] == live.image.shape[-2:]
            assert len(read.image) == len(live.image)
            if images:
                assert torch.equal(read.image, live.image)
            else:
                assert read.image.shape[1] == 0
            if read.maps is not None:
                torch.testing.assert_close(read.maps, features(live.image), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reads", [MAPS, PIXELS, BOTH])
def test_batches_are_those_of_the_data_module(tiny, tmp_path, reads):
    data = data_of(tiny, "image_size=48", "crop=40")
    assert_batches_equal(data, stored(tmp_path, data, reads), images=reads is not MAPS)
    with counted(Images, "__getitem__") as decoded:
        assert_batches_equal(data, stored(tmp_path, data, reads), images=reads is not MAPS)
    assert len(decoded) == 36  # by the data module
    if reads is BOTH:  # images decoded, maps from the store
        assert_batches_equal(data, stored(tmp_path, data, reads, images=False), images=True)


@pytest.mark.parametrize("size", [7, 40])  # of 18 images
def test_an_epoch_of_so_many_images_is_that_of_the_data_module(tiny, tmp_path, size):
    data = data_of(tiny)
    data.paced(size)
    other = stored(tmp_path, data)
    assert_batches_equal(data, other, images=False)
    assert sum(len(batch.path) for batch in other.train_dataloader()) == size


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
    assert len({name_of(sample) for sample in rows}) == len(rows)
    again = stored(tmp_path, data)
    copy = rows[0]._replace(path="copy.png")  # the same content elsewhere
    data.samples = [copy, *rows]
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
        source = data
        if root:
            source = StoredData(
                Store(root, "float32", None),
                data,
                model.backbone,
                model.inputs_for,
                True,
                torch.device("cpu"),
                contextlib.nullcontext,
                False,
            )
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


# ---- what can happen to the folder


def test_a_changed_image_is_computed_again(tiny, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(tiny, root)
    train(tiny_run(root, tmp_path / "first", *on(tmp_path / "store")))
    victim = root / "square" / "000.png"
    Image.fromarray(255 - np.array(Image.open(victim))).save(victim)
    changed = train(tiny_run(root, tmp_path / "second", *on(tmp_path / "store")))
    record = read_record(tmp_path / "second")["store"]
    assert (record["read"], record["computed"]) == (35, 1)
    without = train(tiny_run(root, tmp_path / "third", *QUICK))
    assert changed["image_f1_max_threshold"] == pytest.approx(without["image_f1_max_threshold"], rel=4 * ONE_MORE)


def test_an_image_that_changes_while_it_is_read_is_not_stored(tiny, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(tiny, root)
    data = data_of(root)
    victim = root / "square" / "000.png"
    Image.fromarray(255 - np.array(Image.open(victim))).save(victim)
    with pytest.raises(InputError, match=r"000\.png: changed"):
        stored(tmp_path / "store", data).loader("test")


def damaged_copies(path: Path):
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-3] ^= 1
    yield from (b"", whole[:5], whole[: len(whole) // 2], whole[:-1], bytes(flipped), b"\0" * len(whole), b"not a shard at all")


def test_damaged_shards_are_noticed_and_made_again(tmp_path, caplog):
    store = Store(tmp_path, "float32", None)
    values = filled(Shelf(store, "x", {"a": 1}), 3)
    victim = shards(tmp_path)[1]
    whole = victim.read_bytes()
    for damage in damaged_copies(victim):
        victim.write_bytes(damage)
        shelf = Shelf(store, "x", {"a": 1})
        shelf.find(values)
        assert len(shelf.found) == 2
        assert all(torch.equal(shelf.found[name], values[name]) for name in shelf.found)
        assert not victim.exists()
        assert f"{victim} is damaged" in caplog.text
        caplog.clear()
    foreign = Shelf(store, "x", {"a": 2})
    foreign.folder.mkdir()
    (foreign.folder / victim.name).write_bytes(whole)  # a sound file in the wrong folder
    foreign.find(values)
    assert not foreign.found


def test_a_run_on_a_damaged_store(tiny, off, tmp_path):
    first = train(tiny_run(tiny, tmp_path / "first", *on(tmp_path / "store")))
    for path, damage in zip(shards(tmp_path / "store"), damaged_copies(shards(tmp_path / "store")[0]), strict=False):
        path.write_bytes(damage)
    assert figures(train(tiny_run(tiny, tmp_path / "second", *on(tmp_path / "store")))) == figures(first)


def test_leftovers_of_killed_writers_go_when_they_are_old(tmp_path):
    store = Store(tmp_path, "float32", None)
    shelf = Shelf(store, "x", {})
    filled(shelf, 1)
    old, fresh = shelf.folder / ".part-old", shelf.folder / ".part-fresh"
    for path in (old, fresh):
        path.write_bytes(b"half a shard")
    os.utime(old, (time.time() - 2 * module.STALE,) * 2)
    assert len(store.shards()) == 1
    assert fresh.exists()
    assert not old.exists()


def test_least_recently_used_shards_go_first(tmp_path):
    first = Shelf(Store(tmp_path, "float32", None), "x", {})
    values = filled(first, 4, size=1000)
    size = shards(tmp_path)[0].stat().st_size
    (paths,) = [{next(iter(names)): path for path, names in first.names.items()}]
    for age, name in enumerate(("n3", "n1", "n0", "n2")):  # used in this order
        os.utime(paths[name], (1e9 + age,) * 2)
    second = Shelf(Store(tmp_path, "float32", 4.5 * size / 1e9), "x", {})
    second.find(["n3"])  # a use: the oldest is now n1
    filled(second, 1, first=4, size=1000)
    assert {name for name, path in paths.items() if path.exists()} == {"n0", "n2", "n3"}
    assert torch.equal(first.found["n1"], values["n1"])  # whoever has it open keeps it
    filled(second, 2, first=5, size=1000)
    assert sum(path.stat().st_size for path in shards(tmp_path)) <= 4.5 * size
    assert paths["n3"].exists()  # in use
    with pytest.raises(NoRoom, match=r"store\.max_gb"):
        filled(second, 1, first=7, size=1000)


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
            written.append(path.name)
            if len([name for name in written if name.startswith(module.PART)]) > 4 and path.name.startswith(module.PART):
                raise OSError(28, "No space left on device")
            return replace(path, target)

        monkeypatch.setattr(Path, "replace", full)
    metrics = figures(train(tiny_run(tiny, tmp_path / "run", *on(root, "store.dtype=float32", *more))))
    assert metrics == pytest.approx(off[1], rel=1e-6)
    assert caplog.text.count("maps are computed and not stored") == 1
    assert not list(tmp_path.rglob(".part-*"))


def test_wrong_values_name_the_right_ones(tmp_path):
    with pytest.raises(InputError, match=r"store\.dtype=int8"):
        Store(tmp_path, "int8", None)
    with pytest.raises(InputError, match=r"store\.max_gb=0"):
        Store(tmp_path, "float16", 0)


def test_images_of_their_own_sizes_are_not_stored(tiny, tmp_path, caplog):
    data = data_of(tiny, "image_size=null")
    assert next(iter(stored(tmp_path, data).loader("test"))).maps is None
    assert "expected image_size" in caplog.text


# ---- several processes; a script forks them from one that has everything loaded

WRITERS = """
import contextlib, os, random, signal, sys, time
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[1])
from support import tiny_run
from blemish.features import cache as module
from blemish.features.extractor import Features
from blemish.run.config import build

torch.set_num_threads(1)
module.SHARD_IMAGES = 1  # many small files: a kill meets a writer at work
tiny = Path(sys.argv[2])
data = build(tiny_run(tiny, tiny, "batch_size=2").data)
data.setup()
features = Features("test_resnet", [1, 2], "random", 0)

def prepared(root):
    store = module.Store(root, "float16", None)
    still = lambda name: contextlib.nullcontext()
    return module.StoredData(store, data, features, lambda split: (True, True), True, torch.device("cpu"), still, False)

def forked(work):
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)
        work()
        os._exit(0)
    return pid

def fill(whole):
    for split in ("train", "calibrate", "test"):
        whole.loader(split)

whole, rng, sync = prepared(Path(sys.argv[3])), random.Random(0), os.fsync
for moment in range(12):
    heard, told = os.pipe()

    def fsync(number):
        os.write(told, b".")
        sync(number)

    def victim():
        os.close(heard)
        module.os.fsync = fsync
        fill(whole)

    pid = forked(victim)
    os.close(told)
    for _ in range(rng.randrange(1, 12)):
        os.read(heard, 1)
    time.sleep(rng.choice([0, rng.uniform(0, 0.004)]))
    os.kill(pid, signal.SIGKILL)
    killed = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    print("killed" if killed else "finished", flush=True)

whole = prepared(Path(sys.argv[4]))
def together():
    fill(whole)
    os.write(1, f"computed {whole.computed}\\n".encode())  # in one piece, as the others write as well
first = forked(together)
while not any(Path(sys.argv[4]).rglob("*.safetensors")):
    time.sleep(0.001)  # or all three could be done before anyone has written
for pid in [first, forked(together), forked(together)]:
    assert os.waitpid(pid, 0)[1] == 0
"""


@pytest.fixture(scope="module")
def written(tiny, tmp_path_factory):
    """(store that a dozen writers were killed at, store that three filled at once, what the script said)."""
    if not hasattr(os, "fork"):
        pytest.skip("this system cannot fork, which is how the writers to be killed are made")
    killed, together = tmp_path_factory.mktemp("killed"), tmp_path_factory.mktemp("together")
    command = [sys.executable, "-c", WRITERS, str(CONFIGS.parent / "tests"), *map(str, (tiny, killed, together))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return killed, together, done.stdout.splitlines()


def assert_sound(tiny: Path, root: Path) -> tuple[int, StoredData]:
    """Everything found is the truth, and a run completes the rest; returns how many tensors were there."""
    data = data_of(tiny)
    whole = stored(root, data, BOTH, dtype="float16")
    by_name = {name_of(sample): data.image(sample.key) for sample in data.samples}
    for shelf in (*whole.maps, whole.images):
        shelf.find(by_name)
    for stage, shelf in enumerate(whole.maps):
        for name, found in shelf.found.items():
            map = whole.features(by_name[name][None])[stage][0]
            torch.testing.assert_close(unpack_maps([found])[0], map, rtol=2 * ONE_MORE, atol=1e-6)
    assert all(torch.equal(restored(found), by_name[name]) for name, found in whole.images.found.items())
    there = sum(len(shelf.found) for shelf in (*whole.maps, whole.images))
    batches = [batch for split in ("train", "calibrate", "test") for batch in whole.loader(split)]
    assert sum(len(batch.path) for batch in batches) == len(data.samples)
    return there, whole


@pytest.mark.slow
def test_killed_writers_leave_nothing_that_is_believed(tiny, written):
    assert written[2].count("killed") >= 6
    there, whole = assert_sound(tiny, written[0])
    assert there > 0
    assert whole.read + whole.computed == 36


@pytest.mark.slow
def test_processes_fill_one_store_together(tiny, written):
    computed = [int(line.split()[1]) for line in written[2] if line.startswith("computed")]
    assert len(computed) == 3
    assert 36 <= sum(computed) < 3 * 36  # they share the work
    there, whole = assert_sound(tiny, written[1])
    assert (there, whole.computed) == (3 * 36, 0)


def test_the_sample_is_known_by_its_content_and_its_tile():
    sample = Sample("a.png", "train", 0, "good", digest="0123456789abcdef")
    assert name_of(sample) == name_of(sample._replace(path="b.png", split="test", label=1)) != name_of(sample._replace(tile="0,0,9,9"))


@pytest.mark.slow
def test_tiles_are_stored_as_a_map(tiny, tmp_path):
    options = ["model=self_similarity", "model.stages=[3]", "batch_size=8", "save.pictures=0"]
    off = train(tiny_run(tiny, tmp_path / "off", *options))
    store = ["store=on", f"store.root='{tmp_path / 'store'}'"]
    records = []
    for name, more in (("first", []), ("second", ["model.neighbors=2"]), ("third", ["model.stride=16"])):
        on = train(tiny_run(tiny, tmp_path / name, *options, *store, *more))
        records.append(read_record(tmp_path / name)["store"])
        if not more:
            assert on["pixel_auroc"] == pytest.approx(off["pixel_auroc"], abs=2e-3)
    assert [record["computed"] for record in records] == [36, 0, 36]  # other words read them, other tiles do not


# ---- what is looked at


def region_file(path: Path, columns: int) -> Path:
    seen = np.zeros((64, 64), np.uint8)
    seen[:, :columns] = 255
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(seen).save(path)
    return path


@pytest.mark.slow
def test_geometry_and_region_keep_maps_apart(tiny, tmp_path):
    masks = [region_file(tmp_path / f"{columns}.png", columns) for columns in (30, 40)]
    for folder in ("normal", "normal_test", "square"):
        for i, path in enumerate(sorted((tiny / folder).glob("*.png"))):
            region_file(tmp_path / "own" / folder / path.name, 30 + i % 2 * 10)
    changes = [[], ["image_size=48"], ["crop=48"], ["image_size=48", "crop=40"]]
    changes += [["resize=letterbox"], *([f"data.roi='{mask}'"] for mask in (*masks, tmp_path / "own"))]
    for change in changes:
        data = data_of(tiny, *change)
        other = stored(tmp_path / "store", data, BOTH)
        assert_batches_equal(data, other, images=True)
        assert (other.computed, other.read) == (36, 0), change
        again = stored(tmp_path / "store", data_of(tiny, *change))
        for split in ("train", "calibrate", "test"):
            again.loader(split)
        assert again.computed == 0


def test_masks_of_stored_batches_know_region_and_bars(tmp_path):
    g = np.random.default_rng(0)
    for split, label in (("train", "good"), ("test", "good"), ("test", "bad")):
        for i in range(3):
            path = tmp_path / "data" / split / label / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(g.integers(0, 256, (40 + 10 * i, 70 - 10 * i), dtype=np.uint8)).save(path)
    overrides = ["data.normal=train/good", "data.normal_test=test/good", "data.abnormal=[test/bad]", "data.masks=null"]
    overrides += ["resize=letterbox", f"data.roi='{region_file(tmp_path / 'mask.png', 50)}'"]
    data = build(tiny_run(tmp_path / "data", tmp_path, *overrides).data)
    data.setup()
    assert_batches_equal(data, stored(tmp_path / "store", data), images=False)
