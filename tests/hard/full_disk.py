"""What happens where there is no room: one clear error, earlier results as they were, and a run that goes well once there is room again.

Run by `test_full_disk.py`, where disks can be mounted.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from edge.watched import lines, watching
from support import CONFIGS, composed, tiny_overrides, tiny_run

from blemish.api import AnomalyDetector
from blemish.data.manifest import write_manifest
from blemish.deploy.export import export_run
from blemish.edge.errors import InputError
from blemish.report import tables
from blemish.run.config import build
from blemish.run.predict import predict
from blemish.run.record import FINISHED, read_record
from blemish.run.train import train

SHARES = (0, 0.02, 0.1, 0.3, 0.7)
LEAN = ["save.curves=false", "save.pictures=2", "model.n_features=20", "batch_size=8"]


class Disk:
    """A small disk whose free space can be taken away."""

    def __init__(self, place: Path):
        self.place, self.ballast = place, place / "ballast"

    def leave(self, free: int) -> None:
        """Fill the disk but for about `free` bytes, in pages of 4 KiB."""
        self.ballast.unlink(missing_ok=True)
        metadata = os.statvfs(self.place)
        pages = metadata.f_bavail - free // metadata.f_frsize
        with self.ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(pages, 0) * metadata.f_frsize or 1)

    def clear(self) -> None:
        self.ballast.unlink(missing_ok=True)


@pytest.fixture
def disk(tmp_path):
    place = tmp_path / "small disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", place], check=True)
    yield Disk(place)
    subprocess.run(["umount", "--lazy", place], check=True)


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def fills(disk: Disk, work: Callable[[], object], keep: Path, shares: Sequence[float] = SHARES) -> int:
    """Do the work with room for growing shares of the size of `keep`, until it succeeds, at last with all room; return how often it failed.

    Each failure must name the full disk, and leave `keep` as it was.
    """
    before = content(keep)
    size = sum(map(len, before.values()))
    for failed, share in enumerate(shares):
        disk.leave(int(share * size))
        try:
            work()
        except InputError as error:
            assert "No space left on device" in str(error), error
            assert str(disk.place) in str(error), error
            assert content(keep) == before
        else:
            return failed
    disk.clear()
    work()
    return len(shares)


@pytest.mark.parametrize("method", ["padim", "autoencoder"])
def test_a_run_folder(disk, tiny, method):
    lean = LEAN if method == "padim" else ["save.curves=false", "save.pictures=2", "trainer.max_epochs=2", "model.latent=16"]
    first = train(tiny_run(tiny, disk.place / "first", f"model={method}", *lean))
    again = disk.place / "second"
    assert fills(disk, lambda: train(tiny_run(tiny, again, f"model={method}", *lean)), disk.place / "first") >= 3
    disk.clear()
    assert {path.name for path in again.iterdir()} == {path.name for path in (disk.place / "first").iterdir()}, "nothing unfinished is left"
    assert read_record(again)["status"] == FINISHED
    second = json.loads((again / "metrics.json").read_text())
    assert [second[name] for name in tables.METRICS] == [first[name] for name in tables.METRICS]
    assert len(tables.collect(disk.place)) == 2


def test_the_tool_ends_with_one_message(disk, tiny):
    disk.leave(40 * 1024)
    command = [sys.executable, str(CONFIGS.parent / "tools" / "train.py"), *tiny_overrides(tiny), f"run_dir={disk.place / 'run'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr + done.stdout
    assert f"{disk.place / 'run'}" in done.stderr
    assert "No space left on device" in done.stderr


def test_a_run_that_was_stopped_by_it_is_resumed(disk, tiny):
    options = ["model=autoencoder", "trainer.max_epochs=3", "save.curves=false", "save.pictures=0", "model.latent=16"]
    whole = train(tiny_run(tiny, disk.place / "full_pass", *options))
    disk.leave(60 * 1024)
    with pytest.raises(InputError, match=r"last\.ckpt.*o space left"):
        train(tiny_run(tiny, disk.place / "cut", *options))
    assert read_record(disk.place / "cut")["status"] == "failed"
    disk.clear()
    found = train(composed(f"resume='{disk.place / 'cut'}'"))
    assert [found[name] for name in tables.METRICS] == [whole[name] for name in tables.METRICS]


def test_a_store(disk, tiny, tmp_path, caplog):
    store = disk.place / "store"
    options = ["store=on", f"store.root='{store}'", *LEAN]
    expected = train(tiny_run(tiny, tmp_path / "off", *LEAN))
    train(tiny_run(tiny, tmp_path / "first", *options))
    before = content(store)
    disk.leave(0)
    other = ["image_size=96"]  # other maps, for which there is no room
    found = train(tiny_run(tiny, tmp_path / "second", *options, *other))
    assert "maps are computed and not stored" in caplog.text
    assert found["image_auroc"] is not None
    assert content(store) == before
    read = train(tiny_run(tiny, tmp_path / "third", *options))
    assert read_record(tmp_path / "third")["store"]["computed"] == 0
    assert read["image_auroc"] == pytest.approx(expected["image_auroc"], abs=0.05)


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(tiny_run(tiny, folder, *LEAN))
    return folder


def test_predictions(disk, finished, tiny):
    def work(output: Path):
        cfg = composed(f"run='{finished}'", f"input='{tiny / 'square'}'", f"output='{output}'", "device=cpu", config="predict")
        return len(predict(cfg).rows)

    work(disk.place / "first")
    assert fills(disk, lambda: work(disk.place / "second"), disk.place / "first") >= 3
    disk.clear()
    assert content(disk.place / "second").keys() == content(disk.place / "first").keys()


def test_an_export(disk, finished):
    def work(output: Path):
        options = ["format=torch_export", f"output='{output}'", f"run='{finished}'", "n=2"]
        return export_run(composed(*options, config="export"))

    first = disk.place / "first" / "model.pt2"
    work(first)
    second = disk.place / "second" / "model.pt2"
    assert fills(disk, lambda: work(second), first.parent, (0, 0.3, 0.9)) >= 2
    assert [path.name for path in second.parent.glob("[!.]*")] == ["model.pt2"]


def test_a_saved_detector_a_table_and_a_manifest(disk, finished, tiny):
    detector = AnomalyDetector.load(finished, device="cpu")
    detector.save(disk.place / "first" / "detector.ckpt")
    assert fills(disk, lambda: detector.save(disk.place / "second.ckpt"), disk.place / "first") >= 2
    image = np.zeros((64, 64, 3), np.uint8)
    assert AnomalyDetector.load(disk.place / "second.ckpt", device="cpu").predict(image).score == detector.predict(image).score
    args = (None, None, None, "run", "image_auroc", None)
    fills(disk, lambda: tables.write(finished, disk.place / "table.csv", *args), disk.place / "first")
    data = build(tiny_run(tiny, tiny).data)
    data.setup()
    assert fills(disk, lambda: write_manifest(disk.place / "manifest.csv", data.samples), disk.place / "first") >= 1


def test_watch_waits_for_room(disk, tmp_path):
    """The disk fills up again and again while images arrive; at the end each is in the log once, with its picture, and the index agrees."""
    source, output, count = tmp_path / "in", disk.place / "out", 400
    source.mkdir()
    work = watching(source, output, pictures=True, once=False)
    thread = threading.Thread(target=work.run)
    thread.start()
    for part in range(4):
        while True:
            with contextlib.suppress(OSError):  # it wrote between the count and the filling
                disk.leave(4096 * part)
                break
        for number in range(part * count // 4, (part + 1) * count // 4):
            (source / f"{number:04}.png").write_text(f"{number / 100} END")
        end = time.monotonic() + 60
        while work.trouble is None and time.monotonic() < end:
            time.sleep(0.02)
        assert "No space left on device" in work.trouble and "No space left on device" in work.line()
        disk.clear()
        while work.images < (part + 1) * count // 4 and time.monotonic() < end:
            time.sleep(0.02)
    work.stopping = True
    thread.join()
    assert [text for text in work.heard if "written again" in text]
    watching(source, output).run()
    found = lines(output)
    assert len(found) == len({line["name"] for line in found}) == count
    assert all((output / line["picture"]).stat().st_size for line in found if line["decision"])
