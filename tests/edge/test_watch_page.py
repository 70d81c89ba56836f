"""The live page of `watch`: what it hands out, what it refuses, and its behaviour in a browser."""

import contextlib
import http.client
import json
import shutil
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from edge.watched import lines, score, watching

pytest.importorskip("starlette", reason="no starlette here: pip install 'blemish[watch]'")
pytest.importorskip("uvicorn", reason="no uvicorn here: pip install 'blemish[watch]'")

from blemish.edge.errors import InputError
from blemish.edge.page import ALARMS, HEADERS, RECENT, TOKEN, Page


@pytest.fixture
def place(tmp_path, monkeypatch) -> tuple[Path, Path]:
    monkeypatch.setenv(TOKEN, "a-token")
    (tmp_path / "in").mkdir()
    return tmp_path / "in", tmp_path / "out"


@pytest.fixture
def served(place):
    """A watch whose images are scored and whose page is still served."""
    source, output = place
    for value in (0.5, 2.5, 3.5):
        (source / f"{value}.png").write_text(f"{value} END")
    works = []

    def start():
        work = watching(source, output, pictures=True, serve=True, port=0)
        work.page.close, close = lambda: None, work.page.close
        works.append(close)
        work.run()
        return work

    yield start
    for close in works:
        close()


def ask(page: Page, path: str, method: str = "GET", body: bytes | None = None, token: str | None = "a-token", **headers):
    """(status, headers, content) of a request; of the stream of events its first event."""
    headers = {name.replace("_", "-"): value for name, value in headers.items() if value is not None}
    headers |= {"Authorization": f"Bearer {token}"} if token is not None else {}
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", page.port, timeout=20)) as connection:
        connection.request(method, path, body, headers)
        with connection.getresponse() as answer:
            stream = answer.headers["Content-Type"] == "text/event-stream; charset=utf-8"
            found = b"".join(iter(answer.readline, b"\n")) if stream else answer.read()
            return answer.status, answer.headers, found


def judged(page: Page, id: str, verdict: str, **more):
    body = json.dumps({"id": id, "verdict": verdict}).encode()
    status, _, found = ask(page, "/verdict", "POST", body, **{"Content_Type": "application/json", **more})
    return status, found


def state_of(page: Page) -> dict:
    """What the page is told first."""
    kind, data = ask(page, "/events")[2].decode().splitlines()
    assert kind == "event: state"
    return json.loads(data.removeprefix("data: "))


def test_the_state_and_the_pictures(served, place):
    work = served()
    state = state_of(work.page)
    assert [point[1] for point in state["points"]] == [line["score"] for line in lines(place[1])]
    alarms = [line for line in lines(place[1]) if line["decision"]]
    assert state["alarms"] == [line | {"verdict": None} for line in alarms] and len(alarms) == 2
    for line in alarms:
        status, headers, found = ask(work.page, f"/image/{line['id']}")
        assert status == 200 and headers["Content-Type"] == "image/jpeg" and found[:2] == b"\xff\xd8"
    status, headers, found = ask(work.page, "/", token=None)  # the page itself holds nothing
    assert status == 200 and b"a-token" not in found and b"3.5.png" not in found
    assert "unsafe" not in headers["Content-Security-Policy"] and "default-src 'none'" in headers["Content-Security-Policy"]
    assert work.heard[0] == f"watch: http://127.0.0.1:{work.page.port}/#a-token"


def test_verdicts_are_kept_with_their_images(served, place):
    output = place[1]
    work = served()
    first, second = (line for line in lines(output) if line["decision"])
    for line, verdict in ((first, "rejected"), (first, "confirmed"), (second, "rejected")):
        assert judged(work.page, line["id"], verdict) == (200, b'{"kept":true}')
    rows = [json.loads(text) for text in (output / "verdicts.jsonl").read_text().splitlines()]
    assert [(row["id"], row["verdict"]) for row in rows] == [
        (first["id"], "rejected"),
        (first["id"], "confirmed"),
        (second["id"], "rejected"),
    ]
    kept = {path.relative_to(output / "verdicts").as_posix() for path in (output / "verdicts").rglob("*.png")}
    assert kept == {f"confirmed/{first['id']}-{Path(first['name']).name}", f"rejected/{second['id']}-{Path(second['name']).name}"}
    assert Path(rows[-1]["image"]).read_bytes() == Path(second["name"]).read_bytes()
    assert {line["id"]: line["verdict"] for line in state_of(work.page)["alarms"]} == {
        first["id"]: "confirmed",
        second["id"]: "rejected",
    }
    Path(first["name"]).write_text("9.25 END")  # another image of that name
    assert judged(work.page, first["id"], "rejected") == (200, b'{"kept":false}')
    with (output / "verdicts.jsonl").open("a") as file:
        file.write('{"id": "cut')  # by a power cut
    again = served()  # after a restart: from the log
    state = state_of(again.page)
    assert [line["verdict"] for line in state["alarms"] if line["id"] == second["id"]] == ["rejected"]
    assert ask(again.page, f"/image/{second['id']}")[0] == 200
    assert judged(again.page, second["id"], "confirmed")[0] == 200
    assert json.loads((output / "verdicts.jsonl").read_text().splitlines()[-1])["verdict"] == "confirmed"


def test_what_is_held_is_bounded(place):
    output = place[1]
    page = Page(output, 0, lambda line: None)
    result = score(np.full((2, 2), 9.0))
    for number in range(3 * ALARMS):
        line = {"id": f"{number:016x}", "time": "2026-01-01T00:00:00Z", "name": "a", "score": 9.0, "threshold": 2.0, "decision": True}
        page.add(line, result)
    assert len(page.alarms) == len(page.pictures) == ALARMS and len(page.recent) == RECENT
    assert len(state_of(page)["alarms"]) == ALARMS
    page.close()


HOSTILE = ["/../../etc/passwd", "/image/../../../etc/passwd", "/image/..%2f..%2f..%2fetc%2fpasswd", "/image/%2e%2e/verdicts.jsonl"]
HOSTILE += ["/image/%00", "/image/" + "a" * 5000, "/watch.jsonl", "/alarms/", "/static/x", "//etc/passwd", "/image/", "/verdict/x", "/%ff"]


def test_bad_requests(served, place):
    """Whatever is asked is answered by a status, gives nothing away and changes nothing."""
    work = served()
    page = work.page
    id = next(line["id"] for line in lines(place[1]) if line["decision"])
    before = sorted(path.name for path in place[1].rglob("*"))
    for path in HOSTILE:
        status, headers, found = ask(page, path)
        assert status in (307, 404, 405) and b"root:" not in found, path
    for path in ("/events", f"/image/{id}", "/verdict", *HOSTILE):
        for token in (None, "", "wrong", "a-token2", "A-TOKEN", "\xe9"):
            assert ask(page, path, token=token)[0] == 401, (path, token)
    for host in ("evil.example", f"evil.example:{page.port}", "127.0.0.1", f"127.0.0.1:{page.port}@evil", f"[::1]:{page.port}", ""):
        assert ask(page, "/", Host=host)[0] == 421, host
        assert ask(page, "/events", Host=host)[0] == 421, host
    for origin in ("http://evil.example", "null", "https://127.0.0.1", f"http://localhost:{page.port}"):
        assert judged(page, id, "confirmed", Origin=origin)[0] == 403, origin
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", None):
        assert judged(page, id, "confirmed", Content_Type=kind)[0] == 415
    for body in (b"", b"{", b"[]", b'"x"', b"null", b"\xff\xfe", b"[" * 900, b'{"id": 1, "verdict": "confirmed"}', b'{"id": "x"}'):
        assert ask(page, "/verdict", "POST", body, Content_Type="application/json")[0] == 400, body
    for verdict in ("../confirmed", "", None, ["confirmed"], {"a": 1}):
        assert judged(page, id, verdict)[0] == 400
    for unknown in ("0" * 16, "../../x", "", id.upper() + " "):
        assert judged(page, unknown, "confirmed")[0] == 404
    assert judged(page, "x" * 5000, "confirmed")[0] == 413
    for method in ("GET", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"):
        status, headers, _ = ask(page, "/verdict", method, Origin=f"http://127.0.0.1:{page.port}")
        assert status == 405 and not any("access-control" in name.lower() for name in headers), method
    assert sorted(path.name for path in place[1].rglob("*")) == before
    assert judged(page, id, "confirmed", Origin=f"http://127.0.0.1:{page.port}")[0] == 200  # it is still there


def test_every_answer_has_its_headers(served):
    page = served().page
    for path, token in (("/", None), ("/nowhere", "a-token"), ("/events", None), ("/verdict", "a-token")):
        headers = ask(page, path, token=token)[1]
        assert {name: headers[name] for name in HEADERS} == HEADERS
        assert headers["Server"] is None


def raw(page: Page, data: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", page.port), timeout=10) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        found = b""
        while part := connection.recv(65536):
            found += part
    return found


def test_no_http_at_all(served):
    page = served().page
    host = f"Host: 127.0.0.1:{page.port}\r\n".encode()
    for data in (
        b"\x16\x03\x01\x02\x00",
        b"GET\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + 2 * host + b"\r\n",
        b"GET http://evil.example/ HTTP/1.1\r\nHost: evil.example\r\n\r\n",
        b"POST /verdict HTTP/1.1\r\n" + host + b"Content-Length: -1\r\n\r\n",
        b"POST /verdict HTTP/1.1\r\n" + host + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + host + b"X: " + b"a" * 200_000 + b"\r\n\r\n",
    ):
        try:
            found = raw(page, data)
        except OSError:  # the connection is closed while it is written to
            continue
        assert not found or found.split()[1] in (b"400", b"401", b"421", b"431"), (data[:60], found[:80])
    assert ask(page, "/")[0] == 200


def test_it_listens_on_this_machine_alone(served):
    page = served().page
    assert page.socket.getsockname()[0] == "127.0.0.1"
    with pytest.raises(InputError, match=f"port={page.port}: .*choose another"):
        Page(page.folder, page.port, lambda line: None)


# ---- in a browser


@pytest.mark.slow
def test_in_a_browser(place, browser):
    """Scores, pictures and alarms appear as they come; a click is kept, and a wrong token shows nothing."""
    source, output = place
    work = watching(source, output, pictures=True, serve=True, port=0, once=False, interval=0.05)
    pixels = np.random.default_rng(0).integers(0, 255, (300, 500, 3), dtype=np.uint8)

    def predict(path):
        result = score(path)
        return type(result)(**{**vars(result), "image": pixels, "map": np.linspace(0, 2, 150000, dtype=np.float32).reshape(300, 500)})

    work.scorer = work.scorer._replace(predict=predict)
    thread = threading.Thread(target=work.run)
    thread.start()
    try:
        wait = browser.wait
        browser.get(f"http://127.0.0.1:{work.page.port}/#wrong")
        wait(lambda: "token is missing or old" in browser.text("#health"))
        browser.get(f"http://127.0.0.1:{work.page.port}/")
        browser.execute_script("sessionStorage.clear()")
        browser.get(work.page.address.replace("#", "?again#"))
        (source / "<img src=x onerror=window.hit=1>.png").write_text("3.5 END")
        (source / "calm.png").write_text("0.5 END")
        wait(lambda: len(browser.find_elements("css selector", "#alarms figure")) == 1)
        wait(lambda: browser.execute_script("return document.querySelector('#alarms img').naturalWidth") == 250)
        assert browser.execute_script("return window.hit") is None and "onerror" in browser.text("#alarms figcaption")
        assert "a-token" not in browser.current_url
        wait(lambda: "2 images" in browser.text("#health"))
        wait(lambda: browser.execute_script("const c = document.querySelector('#chart'); return c.width") > 300)
        browser.find_elements("css selector", "#alarms button")[1].click()
        wait(lambda: (output / "verdicts.jsonl").is_file())
        wait(lambda: browser.find_elements("css selector", "#alarms button")[1].get_attribute("aria-pressed") == "true")
        assert json.loads((output / "verdicts.jsonl").read_text())["verdict"] == "rejected"
        browser.refresh()  # the token is still there
        wait(lambda: len(browser.find_elements("css selector", "#alarms [aria-pressed=true]")) == 1)
        assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE" and "401" not in entry["message"]]
    finally:
        work.stopping = True
        thread.join()


@pytest.fixture
def browser():
    selenium = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium, driver = (next(filter(None, map(shutil.which, names)), None) for names in (("chromium", "google-chrome"), ("chromedriver",)))
    if not chromium or not driver:
        pytest.skip("no Chromium and chromedriver here")
    options = selenium.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1400,1000"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = selenium.Chrome(options=options, service=selenium.ChromeService(driver))

    def wait(condition):
        end = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < end, chrome.find_element("css selector", "body").text
            time.sleep(0.1)

    chrome.wait, chrome.text = wait, lambda place: chrome.find_element("css selector", place).text
    yield chrome
    chrome.quit()
