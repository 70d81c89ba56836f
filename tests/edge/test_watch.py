"""`watch`: every image once in the log, whatever happens to process, disk, files and network."""

import errno
import hashlib
import hmac
import http.server
import json
import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml
from edge.test_main import METADATA, distance
from edge.watched import CALIBRATION, SCORER, Simulated, lines, score, watching
from PIL import Image
from support import CONFIGS

from blemish.edge import __main__, arrivals, journal, monitor
from blemish.edge.arrivals import Arrivals, Camera, Folder, Item
from blemish.edge.errors import InputError
from blemish.edge.journal import Journal
from blemish.edge.monitor import Monitor
from blemish.edge.reading import is_result
from blemish.edge.result import Result
from blemish.edge.runtime import Model
from blemish.edge.watch import Scorer, Settings
from blemish.edge.webhook import SECRET


@pytest.fixture
def place(tmp_path) -> tuple[Path, Path]:
    (tmp_path / "in").mkdir()
    return tmp_path / "in", tmp_path / "out"


def put(source: Path, *values: float) -> None:
    for value in values:
        (source / f"{value}.png").write_text(f"{value} END")


def names(output: Path) -> list[str]:
    return [Path(line["name"]).name for line in lines(output)]


def test_the_keys_of_the_config_have_the_values_of_the_settings():
    config = yaml.safe_load((CONFIGS / "watch.yaml").read_text())
    for field in fields(Settings)[2:]:
        assert config[field.name] == field.default and type(config[field.name]) in (type(field.default), int), field.name
    others = {"defaults", "hydra", "run", "input", "output", "threads", "device"}
    assert config.keys() == others | {field.name for field in fields(Settings)[2:]}


def test_a_line_says_all_and_an_image_comes_once(place):
    source, output = place
    put(source, 0.5, 3.5)
    (source / "notes.txt").write_text("no image")
    (source / ".hidden.png").write_text("9 END")
    work = watching(source, output, stdout=True, pictures=True)
    work.run()
    calm, alarm = sorted(lines(output), key=lambda line: line["score"])
    assert list(alarm) == ["id", "time", "name", "score", "p_value", "decision", "threshold", "boxes", "bound", "picture", "model"]
    assert (alarm["name"], alarm["decision"], alarm["picture"]) == (str(source / "3.5.png"), True, f"alarms/{alarm['id']}.png")
    assert (calm["decision"], calm["picture"], calm["model"]) == (False, None, SCORER.model)
    assert [path.name for path in (output / "alarms").iterdir()] == [f"{alarm['id']}.png"] and is_result(output / alarm["picture"])
    assert [json.loads(text) for text in work.printed] == lines(output)
    assert work.heard[-1].startswith("watch: 2 images, 0 failed, ") and "1 alarms in the last hour" in work.heard[-1]
    watching(source, output).run()
    assert len(lines(output)) == 2
    put(source, 3.5)  # written again: another time of change, and so another image
    os.utime(source / "3.5.png", ns=(1, 1))
    watching(source, output).run()
    assert sorted(names(output)) == ["0.5.png", "3.5.png", "3.5.png"]


def test_the_oldest_comes_first(place):
    source, output = place
    for age, value in enumerate((0.3, 0.1, 0.2)):
        put(source, value)
        os.utime(source / f"{value}.png", ns=(age, age))
    watching(source, output).run()
    assert names(output) == ["0.3.png", "0.1.png", "0.2.png"]


def test_a_file_that_is_being_written_is_waited_for(place):
    source, _ = place
    clock, path = Simulated(), source / "slow.png"
    folder = Folder(source, lambda id: False, clock, 0.5, 10)
    path.write_text("1")
    for text in ("1.", "1.5", "1.5 EN"):  # it grows faster than it settles
        assert folder.take() == [] and folder.waiting == 1
        clock.sleep(0.4)
        path.write_text(text)
    assert folder.take() == []
    clock.sleep(0.6)  # it stalls, and is taken for complete
    (item,) = folder.take()
    with pytest.raises(InputError):
        score(item.image)
    assert folder.again(item) and folder.take() == []
    path.write_text("1.5 END")
    assert folder.take() == []
    clock.sleep(0.6)
    (item,) = folder.take()
    assert score(item.image).score == 1.5
    folder.done(item)
    assert folder.take() == [] and folder.waiting == 0


def test_a_file_that_changes_while_it_is_scored_comes_once(place):
    """It was empty when it was seen, and complete when it was read."""
    source, output = place
    (source / "a.png").write_text("")
    work = watching(source, output)
    real = work.scorer.predict
    work.scorer = work.scorer._replace(predict=lambda path: (path.stat().st_size or path.write_text("1.5 END"), real(path))[1])
    work.run()
    assert [line["score"] for line in lines(output)] == [1.5]


def test_a_damaged_file_is_logged_after_patience_and_stops_no_other(place):
    source, output = place
    put(source, 0.5)
    (source / "bad.png").write_text("half")
    os.utime(source / "bad.png", ns=(1, 1))  # the first
    watching(source, output, Simulated(), patience=5.0).run()
    assert names(output) == ["0.5.png", "bad.png"]
    assert lines(output)[1]["error"] == "cut short" and "score" not in lines(output)[1]
    watching(source, output).run()
    assert len(lines(output)) == 2


def test_a_folder_that_is_gone_for_a_while_loses_nothing(place):
    source, output = place
    put(source, 0.1, 0.2, 0.3)
    work = watching(source, output, Simulated(), once=False)
    gone, real = [], work.scorer.predict

    def predict(image):
        if image.name == "0.2.png" and not gone:
            gone.append(source.rename(source.with_name("away")))
        return real(image) if not gone or source.is_dir() else failing(image)

    def failing(image):
        raise InputError(f"{image}: cannot be read")

    ticks = []

    def sleep(seconds):
        ticks.append(work.source.lost)
        if len(ticks) == 5:
            source.with_name("away").rename(source)
        work.stopping = len(ticks) > 60
        work.clock.passed += seconds

    work.clock.sleep, work.scorer = sleep, work.scorer._replace(predict=predict)
    work.run()
    assert sorted(names(output)) == ["0.1.png", "0.2.png", "0.3.png"] and all("score" in line for line in lines(output))
    assert any(ticks) and ticks[-1] is None


@pytest.mark.parametrize("left", [b'{"id": "0123', b'{"id": "0123456789abcdef", "a": 1}', b"\0\0\0\0\n", b'{"id', b"\0"])
def test_what_a_power_cut_left_of_a_line_is_cut_off(place, left):
    source, output = place
    for number in range(2):
        put(source, 0.1 + number)
        watching(source, output).run()
        with (output / "watch.jsonl").open("ab") as file:
            file.write(left)
    (output / ".watch.db").unlink()
    watching(source, output).run()
    assert names(output) == ["0.1.png", "1.1.png"]


def test_a_log_of_the_users_stays(place):
    source, output = place
    output.mkdir()
    for text in ("mine\n", "mine", '{"mine": 1}\n'):
        (output / "watch.jsonl").write_text(text)
        with pytest.raises(InputError, match=r"watch.jsonl: not a line of this log at byte 0"):
            watching(source, output)
        assert (output / "watch.jsonl").read_text() == text


def test_the_index_is_made_again(place):
    source, output = place
    put(source, 0.1, 0.2)
    watching(source, output).run()
    for damage in (b"", b"no database", bytes(5000)):
        (output / ".watch.db").write_bytes(damage)
        watching(source, output).run()
        assert len(lines(output)) == 2
    (output / "watch.jsonl").rename(output / "old.jsonl")  # the index remembers what a log held that was moved away
    put(source, 0.3)
    watching(source, output).run()
    assert names(output) == ["0.3.png"]


def test_a_second_process_is_refused(place):
    _, output = place
    first = Journal(output)
    with pytest.raises(InputError, match="another process watches"):
        Journal(output)
    first.close()
    Journal(output).close()


def test_a_full_disk_waits_and_loses_nothing(place, monkeypatch):
    """The disk is full for half of the writes: a half of a line is written, then nothing."""
    source, output = place
    put(source, *(number / 10 for number in range(30)))
    work, write, calls = watching(source, output, Simulated(), pictures=True), os.write, []

    def failing(file, data):
        calls.append(1)
        if len(calls) % 7 == 3:
            return write(file, data[:20])
        if len(calls) % 7 > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, data)

    def full(path, data):
        calls.append(1)
        if len(calls) % 5 == 0:
            raise InputError("full") from OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)

    monkeypatch.setattr(journal.os, "write", failing)
    monkeypatch.setattr("blemish.edge.watch.write_whole", full)
    work.run()
    assert len(names(output)) == len(set(names(output))) == 30
    assert all((output / line["picture"]).is_file() for line in lines(output) if line["decision"])
    assert f"watch: {output}: cannot be written to (No space left on device): free some space; nothing is lost, images wait" in work.heard
    assert "watch: written again" in work.heard


def test_an_end_while_the_disk_is_full(place, monkeypatch):
    source, output = place
    put(source, 0.1, 0.2)
    work = watching(source, output, Simulated())
    with monkeypatch.context() as patch:
        patch.setattr(work.journal, "append", lambda line: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        work.clock.sleep = lambda seconds: setattr(work, "stopping", True)
        work.run()
    assert lines(output) == []
    watching(source, output).run()
    assert sorted(names(output)) == ["0.1.png", "0.2.png"]


def test_the_monitor_is_that_of_an_undisturbed_stream(place):
    """Saved seldom, it takes the rest from the log."""
    source, output = place
    for number in range(4):
        put(source, *(number + part / 100 for part in range(10)))
        work = watching(source, output)
        work._save()
        if number % 2 == 0:
            work._save = lambda end=True: None  # as if killed
        work.run()
    expected = Monitor.open(output / "other.json", True, 0.01, CALIBRATION, 0)
    bounds = expected.take([line["score"] for line in lines(output)])
    assert bounds == [line["bound"] for line in lines(output)] and bounds[0] != bounds[-1]
    saved = json.loads((output / "monitor.json").read_text())
    assert saved["test"]["scores"] == 40 and saved["state"]["drift"]["scores"] == expected.drift.scores
    assert saved["test"]["log10_wealth"] == pytest.approx(expected.drift.log_wealth / np.log(10))


# ---- webhook


class Receiver(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        time.sleep(self.server.delay)
        status = self.server.statuses.pop(0) if self.server.statuses else 200
        self.server.got.append((status, dict(self.headers), body))
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "/elsewhere")
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def receiver():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    server.got, server.statuses, server.delay, server.url = [], [], 0.0, f"http://127.0.0.1:{server.server_port}/hook?a=b"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_slow_webhook_holds_nothing_up_and_gets_every_alarm_once(place, receiver, monkeypatch):
    source, output = place
    monkeypatch.setenv(SECRET, "s3cret")
    monkeypatch.setattr("blemish.edge.webhook.PAUSE", (0.01, 0.02))
    receiver.delay, receiver.statuses = 0.3, [500, 503, 200, 302, 429]
    watching(source, output, webhook=receiver.url).run()  # from its first start on
    put(source, *(2.0 + number / 10 for number in range(1, 6)), 0.5)
    (source / "bad.png").write_text("half")
    work = watching(source, output, webhook=receiver.url, patience=0.0)
    ended = []
    close = work.webhook.close
    work.webhook.close = lambda patience: (ended.append(len(receiver.got)), close(patience))
    work.run()
    assert ended[0] < 7, "scoring has ended before the webhook"
    arrived = [json.loads(body) for status, _, body in receiver.got if status in (200, 302)]
    assert arrived == [line for line in lines(output) if line.get("decision") or "error" in line] and len(arrived) == 6
    assert [status for status, *_ in receiver.got][:5] == [500, 503, 200, 302, 429]
    for _, headers, body in receiver.got:
        signed = hmac.new(b"s3cret", f"{headers['X-Blemish-Time']}.".encode() + body, hashlib.sha256).hexdigest()
        assert headers["X-Blemish-Signature"] == f"sha256={signed}" and headers["Idempotency-Key"] == json.loads(body)["id"]
    assert any("refused with status 302" in text for text in work.heard)
    watching(source, output, webhook=receiver.url).run()
    assert len([1 for status, *_ in receiver.got if status in (200, 302)]) == 6, "nothing comes twice"


def test_a_dead_webhook_is_caught_up_with_after_a_restart(place, monkeypatch):
    source, output = place
    monkeypatch.setattr("blemish.edge.webhook.PAUSE", (0.01, 0.02))
    monkeypatch.setattr("blemish.edge.watch.FAREWELL", 0.2)
    got = []

    def dead(url, body, headers):
        raise OSError("connection refused")

    def alive(url, body, headers):
        got.append(json.loads(body))
        assert "X-Blemish-Signature" not in headers
        return 204

    watching(source, output, webhook="http://x", post=alive).run()
    put(source, 2.5, 3.5)
    work = watching(source, output, webhook="http://x", post=dead)
    work.run()
    assert got == [] and "connection refused" in work.heard[-1] and len(lines(output)) == 2
    watching(source, output, webhook="http://x", post=alive).run()
    assert got == lines(output)


def test_only_http_is_posted_to(place):
    with pytest.raises(InputError, match="webhook=file:///etc/passwd: expected http"):
        watching(*place, webhook="file:///etc/passwd")


# ---- cameras and videos


class Capture:
    """A camera that gives frames until it is lost, then those of another opening."""

    def __init__(self, frames):
        self.frames, self.released = list(frames), False

    def isOpened(self):
        return True

    def read(self):
        if self.frames:
            return True, np.full((8, 8, 3), (0, 0, self.frames.pop(0)), np.uint8)
        return False, None

    def release(self):
        self.released = True


def test_a_camera_drops_the_oldest_and_comes_back(monkeypatch):
    monkeypatch.setattr(arrivals, "REOPEN", (0.01, 0.02))
    captures = [Capture([1, 2, 3, 4, 5]), Capture([]), Capture([6])]
    opened = iter([*captures, *(Capture([]) for _ in range(1000))])
    camera = Camera("rtsp://me:secret@host/stream", 3, arrivals.Clock(), lambda address: next(opened))
    end = time.monotonic() + 20
    while camera.dropped < 3 and time.monotonic() < end:
        time.sleep(0.01)
    items = [camera.take()[0] for _ in range(3)]
    assert [int(item.image[0, 0, 0]) for item in items] == [4, 5, 6] and camera.take() == [] and camera.dropped == 3
    while camera.lost is None and time.monotonic() < end:
        time.sleep(0.01)
    assert "secret" not in camera.lost and items[0].name == "rtsp://host/stream"
    camera.close()
    assert captures[0].released


def test_a_video_goes_on_after_its_last_frame(tmp_path):
    cv2 = pytest.importorskip("cv2", reason="no OpenCV here: pip install 'blemish[watch]'")
    path, output = tmp_path / "line.avi", tmp_path / "out"
    video = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10, (64, 48))
    for number in range(12):
        video.write(np.full((48, 64, 3), 10 * number, np.uint8))
    video.release()
    work, real = watching(path, output, pictures=True), score
    work.scorer = work.scorer._replace(predict=lambda image: (setattr(work, "stopping", work.images == 4), real(image))[1])
    work.run()
    assert [line["frame"] for line in lines(output)] == [1, 2, 3, 4, 5]
    watching(path, output).run()
    assert [line["frame"] for line in lines(output)] == list(range(1, 13))
    assert [line["score"] for line in lines(output)] == pytest.approx([10 * number for number in range(12)], abs=4)
    assert lines(output)[1]["decision"] and not is_result(output / "alarms" / f"{lines(output)[1]['id']}_image.png")


@pytest.mark.parametrize(("source", "says"), [("nowhere", "not there"), ("image.png", "an image"), ("notes.txt", "no video")])
def test_what_cannot_be_watched(tmp_path, source, says):
    Image.new("L", (16, 16)).save(tmp_path / "image.png")
    (tmp_path / "notes.txt").write_text("text")
    if source == "notes.txt":
        pytest.importorskip("cv2", reason="no OpenCV here: pip install 'blemish[watch]'")
    with pytest.raises(InputError, match=f"input={tmp_path / source}: .*{says}"):
        watching(tmp_path / source, tmp_path / "out")


# ---- long and rough


def simulated(place, hours: float, monkeypatch, at=()) -> list[int]:
    """Watch a folder that gets ten images every ten simulated seconds, each removed after a minute; the memory at some hours, in bytes."""
    source, output = place
    clock, rng, memory, process = Simulated(), np.random.default_rng(0), {}, psutil.Process()

    def listed(folder):
        second = 10 * int(clock.now() // 10)
        if (hour := second / 3600) in at:
            memory[hour] = process.memory_info().rss
        work.stopping = hour >= hours
        return ((f"{source}/{number}.jpg", (1, number)) for number in range(max(0, second - 60), second))

    def predict(path):
        value = float(rng.normal())
        return Result(value, 0.5, value > 2, None, threshold=2.0)

    monkeypatch.setattr(arrivals, "listed", listed)
    scorer = Scorer(predict, CALIBRATION, "0")
    work = watching(source, output, clock, scorer=scorer, once=False, interval=10.0, health=60.0)
    work.run()
    found = [line["name"] for line in lines(output)]
    assert len(found) == len(set(found)) == pytest.approx(3600 * hours, abs=20)
    assert len(work.heard) == pytest.approx(60 * hours, abs=2) and re.search(r" 1\.\d+/s", work.heard[-2])
    assert work.state()["alarms"] == pytest.approx(3600 * 0.023, abs=40)
    return list(memory.values())


def test_an_hour(place, monkeypatch):
    simulated(place, 1, monkeypatch)


@pytest.mark.slow
def test_a_day_in_bounded_memory(place, monkeypatch):
    """From the 16th hour on, when the monitor has its 50,000 scores, nothing grows."""
    early, late = simulated(place, 24, monkeypatch, at=(16, 24))
    assert late - early < 8e6, f"{(late - early) / 1e6:.1f} MB more"


def killed(tmp_path, files: int, kills: int) -> None:
    """Files in bursts, and a process that is killed again and again; then every file once in the log, with its own score."""
    command = [sys.executable, str(Path(__file__).with_name("watched.py")), str(tmp_path), str(files), str(kills)]
    environment = os.environ | {"PYTHONPATH": str(Path(arrivals.__file__).parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = lines(tmp_path / "out")
    assert len(found) == files
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".watch.db", "monitor.json", "watch.jsonl"]
    assert {Path(line["name"]).stem: line["score"] for line in found} == {f"{n:05}": n / 1000 for n in range(files)}
    assert sum(json.loads(done.stdout).values()) >= kills
    saved = json.loads((tmp_path / "out" / "monitor.json").read_text())
    assert saved["test"]["scores"] == files and saved["summary"]["mean"] == pytest.approx((files - 1) / 2000)


def test_kills(tmp_path):
    killed(tmp_path, 120, 4)


@pytest.mark.slow
def test_ten_thousand_files_and_many_kills(tmp_path):
    killed(tmp_path, 10_000, 60)


# ---- without torch


@pytest.fixture
def export(monkeypatch, tmp_path) -> Path:
    def load(self, *_):
        return json.dumps(METADATA), lambda batch: [distance(batch).max((1, 2)), distance(batch)]

    monkeypatch.setattr(Model, "load", load)
    (tmp_path / "model.onnx").write_text("")
    return tmp_path / "model.onnx"


def test_the_command_without_torch(place, export, capsys):
    source, output = place
    spot = np.full((64, 96), 130, np.uint8)
    Image.fromarray(spot).save(source / "calm.png")
    spot[20:40, 30:60] = 255
    Image.fromarray(spot).save(source / "spot.png")
    command = ["watch", str(export), str(source), str(output), "--once", "--stdout", "--settle", "0", "--no-monitor"]
    assert __main__.main(command) == 0
    out, err = capsys.readouterr()
    calm, alarm = sorted(map(json.loads, out.splitlines()), key=lambda line: line["score"])
    assert not calm["decision"] and alarm["decision"] and len(alarm["boxes"]) == 1 and (output / alarm["picture"]).is_file()
    assert "watch: 2 images" in err and not (output / "monitor.json").exists()
    assert __main__.main(["watch", str(export), str(tmp_path := source.parent / "nowhere"), str(output)]) == 2
    assert f"error: input={tmp_path}: not there" in capsys.readouterr().err
    for option, value in (("--settle", "-1"), ("--queue", "0"), ("--port", "70000"), ("--monitor-rate", "2")):
        assert __main__.main([*command, option, value]) == 2
        assert f"error: {option[2:].replace('-', '_')}={value}" in capsys.readouterr().err.replace(".0:", ":")
    assert __main__.main(["watch", str(export), str(source), str(source / "out")]) == 2


def test_a_signal_ends_it(place, export, monkeypatch):
    import signal

    source, output = place
    for number, status in ((signal.SIGTERM, 0), (signal.SIGINT, 130)):
        timer = threading.Timer(0.5, os.kill, (os.getpid(), number))
        timer.start()
        assert __main__.main(["watch", str(export), str(source), str(output), "--no-monitor"]) == status
        timer.join()
    Journal(output).close()  # it is released


def test_an_arrival_is_told_of_what_it_has_to_do():
    with pytest.raises(NotImplementedError):
        Arrivals().take()
    assert not Arrivals().again(Item("", Path(), ""))
    assert monitor.finite({"a": [float("-inf"), 1.0], "b": float("inf")}) == {"a": [None, 1.0], "b": None}
