"""Folders and files as they really are: ten thousand of them, odd names, links, files that change under a run, pixels that are none."""

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
from omegaconf import OmegaConf
from PIL import Image
from support import CONFIGS, composed, tiny_overrides, tiny_run

from blemish.cli import path_as_typed
from blemish.data.dataset import Images
from blemish.data.manifest import read_manifest
from blemish.edge.errors import InputError
from blemish.edge.reading import find_images, read
from blemish.files import release
from blemish.methods.autoencoder import Autoencoder
from blemish.run.config import build
from blemish.run.predict import predict
from blemish.run.record import Record, lock_run_folder, read_record
from blemish.run.train import save_config, train

LEAN = ["model.n_features=20"]
ODD = "a b, [c]{d}=e 'f' \"g\" #h %20 größe 大"  # all that means something to a shell, to Hydra, or to a URL


@pytest.fixture
def data(tiny, tmp_path) -> Path:
    """A copy of the tiny data that a test may change."""
    shutil.copytree(tiny, tmp_path / "data")
    return tmp_path / "data"


def data_of(root: Path, *overrides: str):
    found = build(tiny_run(root, root, *overrides).data)
    found.setup()
    return found


def predicted(run: Path, images: Path, output: Path):
    return predict(composed(f"run='{run}'", f"input='{images}'", f"output='{output}'", "device=cpu", config="predict"))


def scores(folder: Path) -> list[dict]:
    with (folder / "scores.csv").open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        return list(csv.DictReader(file))


# ---- many


@pytest.mark.slow
def test_ten_thousand_files(tiny, tmp_path):
    many = tmp_path / "many"
    for part in ("normal", "normal_test", "square"):
        (many / part).mkdir(parents=True)
        for i, path in enumerate(sorted((tiny / part).iterdir())):
            Image.open(path).resize((16, 16)).save(many / part / f"first{i:02}.png")
    copies = sorted((many / "square").iterdir())
    (many / "square" / "deep").mkdir()
    for i in range(10_000 - len(copies)):
        os.link(copies[i % len(copies)], many / "square" / "deep" / f"{i:05}.png")
    train(tiny_run(many, tmp_path / "run", *LEAN, "data.masks=null", "image_size=32", "batch_size=64"))
    assert len(scores(tmp_path / "run")) == 10_006
    samples = read_manifest(tmp_path / "run" / "manifest.csv")
    assert len(samples) == len({sample.path for sample in samples}) == 10_030
    peak = read_record(tmp_path / "run")["peak_memory_mb"]["host"]
    assert len(predicted(tmp_path / "run", many / "square", tmp_path / "out").rows) == 10_000
    rows = scores(tmp_path / "out")
    assert [row["path"] for row in rows] == [str(path) for path in find_images(many / "square")]
    assert len({row["score"] for row in rows}) <= 3 * len(copies), "copies of one file score alike"
    assert sum(1 for path in (tmp_path / "out").rglob("*_map.png")) == 10_000
    assert peak < 4000


# ---- names

CALLS = """
import json, sys
from blemish.cli import main
for call in json.loads(sys.argv[1]):
    sys.argv = ["blemish", *call]
    main()
"""


@pytest.mark.slow
def test_odd_names_from_beginning_to_end(tiny, tmp_path):
    place = tmp_path / ODD
    shutil.copytree(tiny, place / "data")
    quiet = [text for text in tiny_overrides(tiny) if not text.startswith("data.root=")]
    run, pictures = place / "run", place / "pictures"
    pictures.mkdir()
    shutil.copy(tiny / "square" / "000.png", pictures / f"{ODD}.png")
    calls = [
        ["train", *quiet, *LEAN, f"data.root={place / 'data'}", f"run_dir={run}", "store=on", f"store.root={place / 'store'}"],
        ["predict", f"run={run}", f"input={pictures}", f"output={place / 'out'}", "device=cpu"],
        ["test", f"run={run}", f"output={place / 'again'}", "device=cpu"],
        ["table", f"runs={place}", f"output={place / 'table.csv'}"],
    ]
    done = subprocess.run([sys.executable, "-c", CALLS, json.dumps(calls)], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert read_record(run)["status"] == "finished"
    assert list((place / "store").rglob("*.safetensors"))
    assert [row["path"] for row in scores(place / "out")] == [str(pictures / f"{ODD}.png")]
    assert (place / "out" / f"{ODD}_overlay.png").is_file()
    assert scores(place / "again") == scores(run)
    assert (place / "table.csv").is_file()


PLACES = ["/tmp/a b", "/tmp/ä", "~/x", "a=b", "a,b", "[a]", "{a}", "a(b)", "a: b", "it's", '"a', "#1", "C:\\x"]
PLACES += ["2024", "2024_05", "1e5", "true"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("key", ["run_dir", "data.root"])
def test_a_path_is_what_was_typed(key, place):
    cfg = composed("data=folder", path_as_typed(f"{key}={place}", several=False))
    assert OmegaConf.select(cfg, key) == place
    quoted = f"{key}='{place}'"
    assert "'" in place or path_as_typed(quoted, several=False) == quoted, "what is quoted is left"


def test_what_is_no_path_is_left():
    for text in (
        "seed=1",
        "run_dir=null",
        "resume=true",
        "model.stages=[1,2]",
        "-m",
        "seed=1,2",
        "output=",
        "weights=pretrained",
        "~run_dir",
    ):
        assert path_as_typed(text, several=False) == text
    assert path_as_typed("data.root=a,b", several=True) == "data.root=a,b"
    assert path_as_typed("data.root=a,b", several=False) == "data.root='a,b'"
    assert path_as_typed("+change.data.root=a,b", several=False) == "+change.data.root='a,b'"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems take names of text only")
def test_a_name_that_is_not_text(data, tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    os.rename(data / "square" / "000.png", data / "square" / name)  # noqa: PTH104
    os.rename(data / "masks" / "000.png", data / "masks" / name)  # noqa: PTH104
    run = tmp_path / "run"
    train(tiny_run(data, run, *LEAN, "save.pictures=-1"))
    assert b"square/caf\xe9.png" in [os.fsencode(row["path"]) for row in scores(run)]
    assert any(sample.path == f"square/{name}" for sample in read_manifest(run / "manifest.csv"))
    assert len(predicted(run, data / "square", tmp_path / "out").rows) == 6


# ---- links


def test_links_are_followed_and_lead_nowhere_twice(data, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    shutil.move(data / "normal", elsewhere)
    (data / "normal").symlink_to(elsewhere, target_is_directory=True)
    (elsewhere / "round").symlink_to(data, target_is_directory=True)  # normal/round/normal/round/…
    inside = data / "square" / "deeper"
    inside.mkdir()
    (inside / "up").symlink_to("..", target_is_directory=True)
    found = find_images(data / "square")
    assert len(found) == len({path.resolve() for path in found}) == 6
    (elsewhere / "round").unlink()
    (data / "normal" / "000.png").rename(tmp_path / "one.png")
    (data / "normal" / "000.png").symlink_to(tmp_path / "one.png")
    assert len([sample for sample in data_of(data).samples if sample.path.startswith("normal/")]) == 24


@pytest.mark.parametrize("kind", ["dangling", "circle", "folder"])
def test_a_link_that_leads_nowhere_is_named(kind, data, tmp_path):
    path = data / "square" / "zzz.png"
    if kind == "folder":
        path.mkdir()
        assert len(find_images(data / "square")) == 6, "a folder is no image, whatever it is called"
        return
    path.symlink_to(tmp_path / "nothing" if kind == "dangling" else path)
    with pytest.raises(InputError, match=r"zzz\.png: cannot be read"):
        data_of(data)
    assert data_of(data, "data.on_error=skip").skipped.keys() == {"square/zzz.png"}
    options = ["run=null", "model=noise_residual", f"input='{path}'", f"output='{tmp_path / 'out'}'"]
    with pytest.raises(InputError, match=r"zzz\.png: no such file"):
        predict(composed(*options, config="predict"))


def test_what_is_no_file_is_named(data):
    os.mkfifo(data / "square" / "zzz.png")  # nobody writes: whoever opens it waits for ever
    with pytest.raises(InputError, match=r"zzz\.png: .*expected an image file"):
        data_of(data)
    assert data_of(data, "data.on_error=skip").skipped.keys() == {"square/zzz.png"}


# ---- files that change


def replaced(path: Path) -> None:
    Image.fromarray(255 - np.array(Image.open(path))).save(path)


@pytest.mark.parametrize("change", ["replaced", "removed", "cut"])
@pytest.mark.parametrize("store", ["off", "on"])
def test_an_image_that_changes_during_a_run_ends_it(change, store, data, tmp_path, monkeypatch):
    victim, load, count = data / "square" / "003.png", Images.__getitem__, []
    sound = victim.read_bytes()
    changes = {"replaced": lambda: replaced(victim), "removed": victim.unlink, "cut": lambda: victim.write_bytes(sound[: len(sound) // 2])}

    def changed(self, index):
        if not count:
            count.append(index)
            changes[change]()
        return load(self, index)

    monkeypatch.setattr(Images, "__getitem__", changed)
    options = [f"store={store}", *([f"store.root='{tmp_path / 'store'}'"] if store == "on" else [])]
    said = "cannot be read" if change == "removed" else "changed while it was in use"
    with pytest.raises(InputError, match=rf"003\.png: {said}"):
        train(tiny_run(data, tmp_path / "run", *LEAN, *options))
    assert said in read_record(tmp_path / "run")["error"]["message"]
    assert not (tmp_path / "run" / "metrics.json").exists()
    monkeypatch.undo()
    victim.write_bytes(sound)
    again = train(tiny_run(data, tmp_path / "run", *LEAN, *options))
    fresh = train(tiny_run(data, tmp_path / "fresh", *LEAN, *(text.replace("store'", "other'") for text in options)))
    assert again["image_auroc"] == fresh["image_auroc"]
    if store == "off":
        assert scores(tmp_path / "run") == scores(tmp_path / "fresh")


def test_a_training_image_that_changes_between_epochs(data, tmp_path, monkeypatch):
    victim = data / next(sample.path for sample in data_of(data).samples if sample.split == "train")

    def at_end(self):
        if self.current_epoch == 1:
            replaced(victim)

    monkeypatch.setattr(Autoencoder, "on_train_epoch_end", at_end)
    with pytest.raises(InputError, match=rf"{victim.name}: changed while it was in use"):
        train(tiny_run(data, tmp_path / "run", "model=autoencoder", "trainer.max_epochs=4"))
    assert read_record(tmp_path / "run")["status"] == "failed"


# ---- pixels


def written(root: Path, counts: tuple[int, int, int], ending: str, array: Callable[[str], np.ndarray]) -> Path:
    """A data set of `array(folder)`, so many files in normal, normal_test and square."""
    for part, count in zip(("normal", "normal_test", "square"), counts, strict=True):
        (root / part).mkdir(parents=True)
        for i in range(count):
            (tifffile.imwrite if ending == "tif" else imwrite)(root / part / f"{i:03}.{ending}", array(part))
    return root


def imwrite(path: Path, array: np.ndarray) -> None:
    Image.fromarray(array).save(path)


def test_pixels_that_are_no_numbers(tmp_path):
    rng = np.random.default_rng(0)
    root = written(tmp_path / "data", (24, 6, 6), "tif", lambda _: rng.normal(size=(64, 64)).astype(np.float32))
    for name, value in (("square/001.tif", np.nan), ("square/004.tif", np.inf), ("normal/007.tif", -np.inf)):
        array = tifffile.imread(root / name)
        array[5, 6] = value
        tifffile.imwrite(root / name, array)
    with pytest.raises(InputError, match=r"\.tif: .*NaN"):
        train(tiny_run(root, tmp_path / "run", *LEAN, "data.masks=null"))
    train(tiny_run(root, tmp_path / "skipping", *LEAN, "data.masks=null", "data.on_error=skip"))
    listed = {sample.path for sample in read_manifest(tmp_path / "skipping" / "manifest.csv") if sample.split == "skipped"}
    assert listed == {"square/001.tif", "square/004.tif", "normal/007.tif"}
    assert len(scores(tmp_path / "skipping")) == 10
    done = predicted(tmp_path / "skipping", root / "square", tmp_path / "out")
    assert [path.name for path, _ in done.failed] == ["001.tif", "004.tif"] and len(done.rows) == 4


@pytest.mark.parametrize("method", ["padim", "patchcore", "dfm", "spade", "self_similarity", "autoencoder", "stfpm"])
@pytest.mark.parametrize("kind", ["uint8", "uint16"])
def test_images_of_one_value(method, kind, tmp_path):
    def array(part: str) -> np.ndarray:
        array = np.full((64, 64), 100, kind)
        array[20:40, 20:40] = 200 if part == "square" else 100
        return array

    root, trained = written(tmp_path / "data", (12, 4, 4), "png", array), method in ("autoencoder", "stfpm")
    for number, path in enumerate(sorted(root.glob("normal/*"))):  # copies of one file are refused: equal pixels in different files
        path.write_bytes(path.read_bytes() + bytes([number]))
    cfg = tiny_run(root, tmp_path / "run", f"model={method}", "save.pictures=1", "data.masks=null", "trainer.max_epochs=1")
    if method in ("dfm", "self_similarity"):
        with pytest.raises(InputError, match="all rows are equal"):
            train(cfg)
        return
    auroc = train(cfg)["image_auroc"]
    assert auroc == 1 or (trained and auroc is not None)
    assert np.isfinite([float(row["score"]) for row in scores(tmp_path / "run")]).all()


def test_a_file_that_claims_more_than_it_can_hold_takes_no_memory(tmp_path):
    resource = pytest.importorskip("resource", reason="getrusage, which measures the peak memory, is POSIX only")
    paths = [tmp_path / name for name in ("claim.bmp", "claim8.tif", "claim16.tif")]
    imwrite(paths[0], np.zeros((16, 16), np.uint8))
    content = bytearray(paths[0].read_bytes())
    content[18:26] = (30000).to_bytes(4, "little") * 2
    paths[0].write_bytes(content)
    for path, dtype in zip(paths[1:], (np.uint8, np.uint16), strict=True):
        tifffile.imwrite(path, np.zeros((16, 16), dtype))
        with tifffile.TiffFile(path, mode="r+") as tiff:
            for tag in ("ImageWidth", "ImageLength"):
                tiff.pages[0].tags[tag].overwrite(30000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for path in paths:
        with pytest.raises(InputError, match=path.name):
            read(path)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < 1024


# ---- two at once


def test_the_second_of_two_runs_in_one_folder_is_refused(tiny, tmp_path):
    run = tmp_path / "run"
    lock_run_folder(run, overwrite=False)
    Record(run, {})
    save_config(tiny_run(tiny, run))
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    for cfg in (tiny_run(tiny, run, *LEAN), tiny_run(tiny, run, *LEAN, "overwrite=true"), composed(f"resume='{run}'")):
        with pytest.raises(InputError, match=rf"{run}: another process is writing"):
            train(cfg)
        assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    release(run)
    train(tiny_run(tiny, run, *LEAN))
    assert read_record(run)["status"] == "finished"


@pytest.mark.slow
def test_of_two_runs_begun_together_one_ends_well(tiny, tmp_path):
    command = [sys.executable, str(CONFIGS.parent / "tools" / "train.py"), *tiny_overrides(tiny), *LEAN, f"run_dir={tmp_path / 'run'}"]
    both = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = {process.communicate(timeout=900)[1]: process.returncode for process in both}
    assert sorted(errors.values()) == [0, 2], errors
    assert str(tmp_path / "run") in next(text for text, status in errors.items() if status == 2)
    assert read_record(tmp_path / "run")["status"] == "finished"
    fresh = train(tiny_run(tiny, tmp_path / "fresh", *LEAN))
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["image_auroc"] == fresh["image_auroc"]
