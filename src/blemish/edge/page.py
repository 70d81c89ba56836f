"""A live page of `watch` on this machine alone: last images, scores over time, drift, and alarms to confirm or reject.

The page itself holds nothing; all that it shows and does asks for the token, in a header that another site cannot send. No part of a
request becomes a path: pictures and alarms are those that this process knows by their id.
"""

import asyncio
import base64
import hashlib
import io
import json
import os
import re
import secrets
import socket
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock, Thread
from typing import Any

import numpy as np
from PIL import Image

from .errors import InputError
from .outputs import write_whole
from .result import Result

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import Request
    from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
    from starlette.routing import Route
    from starlette.types import ASGIApp, Receive, Scope, Send
except ImportError as error:
    raise InputError(f"serve=true: needs {error.name}, which is not here; pip install starlette uvicorn") from error

TOKEN = "BLEMISH_WATCH_TOKEN"  # the environment's variable of a token that outlasts a restart; otherwise it is drawn
SIDE = 480  # pixels of the longer side of a picture on the page
RECENT, ALARMS, POINTS, EVENTS = 24, 48, 2000, 500  # images, alarms, scores and events that are held
EVERY = 0.5  # seconds between two pictures of images that are no alarms
LARGEST = 1024  # bytes of a request's body
VERDICTS = ("confirmed", "rejected")  # of an alarm: the image has a defect, or is normal
HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Page:
    """What the page shows, given by the thread that scores, and the server that hands it out in a thread of its own.

    image_of: the unchanged image of a line of the log, None if it is gone. lines: of the log, the last alarms of which are listed again.
    """

    def __init__(self, folder: Path, port: int, image_of: Callable[[dict], Path | None], lines: Iterable[dict] = ()):
        self.folder, self.image_of, self.lock = folder, image_of, Lock()
        self.token = os.environ.get(TOKEN) or secrets.token_urlsafe(24)
        self.recent: deque[tuple[str, bytes]] = deque(maxlen=RECENT)
        self.pictures: dict[str, bytes] = {}
        self.alarms = {line["id"]: line for line in deque((line for line in lines if line.get("decision")), ALARMS)}
        self.verdicts: dict[str, str] = {}
        with suppress(OSError), (folder / "verdicts.jsonl").open("rb") as file:
            for text in file:
                with suppress(ValueError, TypeError, KeyError):  # a line that a power cut left
                    line = json.loads(text)
                    self.verdicts |= {line["id"]: line["verdict"]} if line["id"] in self.alarms else {}
        self.points: deque[tuple] = deque(maxlen=POINTS)
        self.events: deque[tuple[int, str, Any]] = deque(maxlen=EVENTS)
        self.number, self.state, self.drawn, self.closed = 0, {}, -EVERY, False
        try:
            self.socket = socket.create_server(("127.0.0.1", port))
        except OSError as error:
            raise InputError(f"port={port}: {error.strerror}; choose another, or 0 for any free one") from error
        self.port = self.socket.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}/#{self.token}"
        options = {"log_level": "critical", "access_log": False, "ws": "none", "lifespan": "off", "server_header": False}
        self.server = uvicorn.Server(uvicorn.Config(self.app(), limit_concurrency=64, timeout_graceful_shutdown=1, **options))
        self.thread = Thread(target=self.server.run, args=([self.socket],), name="page", daemon=True)
        self.thread.start()

    def add(self, line: dict, result: Result | None) -> None:
        """Show a line of the log and, of an alarm and now and then of another image, its picture."""
        alarm, now = bool(line.get("decision")), time.monotonic()
        picture = thumbnail(result) if result and result.image is not None and (alarm or now - self.drawn >= EVERY) else None
        with self.lock:
            if "score" in line:
                self.points.append((line["time"], line["score"], line["threshold"], alarm))
            if picture:
                self.drawn = now
                self.recent.append((line["id"], picture))
            if alarm:
                self.alarms[line["id"]] = line
                self.pictures |= {line["id"]: picture} if picture else {}
                if len(self.alarms) > ALARMS:
                    oldest = next(iter(self.alarms))
                    self.alarms.pop(oldest), self.pictures.pop(oldest, None), self.verdicts.pop(oldest, None)
            self._tell("line", line | {"shown": picture is not None})

    def show(self, state: dict) -> None:
        """Show the health."""
        with self.lock:
            self.state = state
            self._tell("health", state)

    def _tell(self, kind: str, data: Any) -> None:
        self.number += 1
        self.events.append((self.number, kind, data))

    def close(self) -> None:
        self.closed = self.server.should_exit = True
        self.thread.join(5)

    # ---- the server

    def app(self) -> "ASGIApp":
        text = Path(__file__).with_name("watch.html").read_text(encoding="utf-8")
        style, script = (_hash(re.search(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)[1]) for tag in ("style", "script"))
        policy = f"default-src 'none'; style-src '{style}'; script-src '{script}'; img-src blob: data:; connect-src 'self'; "
        policy += "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"

        def page(_: Request) -> Response:
            return HTMLResponse(text, headers={"Content-Security-Policy": policy})

        async def events(_: Request) -> Response:
            return StreamingResponse(self._events(), media_type="text/event-stream")

        def image(request: Request) -> Response:
            found = self._picture(request.path_params["id"])
            return Response(found, media_type="image/jpeg") if found else Response(status_code=404)

        async def verdict(request: Request) -> Response:
            body = b""
            async for part in request.stream():
                body += part
                if len(body) > LARGEST:
                    return Response(status_code=413)
            if request.headers.get("content-type") != "application/json":
                return Response(status_code=415)
            try:
                given = json.loads(body)
                id, verdict = given["id"], given["verdict"]
            except (ValueError, KeyError, TypeError, RecursionError):
                return Response(status_code=400)
            if verdict not in VERDICTS or not isinstance(id, str):
                return Response(status_code=400)
            return await run_in_threadpool(self.judge, id, verdict)

        routes = [Route("/", page), Route("/events", events), Route("/image/{id}", image), Route("/verdict", verdict, methods=["POST"])]
        return Guard(Starlette(routes=routes), self.token, {f"{name}:{self.port}" for name in ("127.0.0.1", "localhost")})

    async def _events(self) -> AsyncIterator[str]:
        """The state, then what is new; the state again for a page that is too slow."""
        last = -1
        while not self.closed:
            with self.lock:
                new = [event for event in self.events if event[0] > last]
                if last < 0 or self.number - last > len(new):
                    alarms = [line | {"verdict": self.verdicts.get(id)} for id, line in self.alarms.items()]
                    first = {"points": list(self.points), "recent": [id for id, _ in self.recent], "alarms": alarms, "health": self.state}
                    new = [(self.number, "state", first)]
                last = self.number
            for _, kind, data in new:
                yield f"event: {kind}\ndata: {json.dumps(data)}\n\n"
            if not new:
                yield ":\n\n"  # tells of a page that is gone
            await asyncio.sleep(0.25)

    def _picture(self, id: str) -> bytes | None:
        """The picture of an image that is shown: from memory, or of an alarm before the last start from its file."""
        with self.lock:
            found = self.pictures.get(id) or dict(self.recent).get(id)
            known = id in self.alarms
        if not found and known:
            with suppress(OSError), Image.open(self.folder / "alarms" / f"{id}.png") as picture:
                picture.thumbnail((SIDE, SIDE))
                found = jpeg(picture)
        return found

    def judge(self, id: str, verdict: str) -> Response:
        """Keep a verdict on an alarm: a line of verdicts.jsonl, and the image in the folder verdicts/confirmed or verdicts/rejected."""
        with self.lock:
            line = self.alarms.get(id)
            if line is None:
                return Response(status_code=404)
            kept, now = None, f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
            name = f"{id}-{Path(line['name']).name}" + (f"-{line['frame']}.png" if "frame" in line else "")
            try:
                if image := self.image_of(line):
                    kept = self.folder / "verdicts" / verdict / name
                    write_whole(kept, image.read_bytes())
                for other in {*VERDICTS} - {verdict}:
                    (self.folder / "verdicts" / other / name).unlink(missing_ok=True)
                row = {"id": id, "time": now, "name": line["name"], "verdict": verdict, "score": line["score"], "image": kept and str(kept)}
                with (self.folder / "verdicts.jsonl").open("ab+") as file:
                    file.seek(max(file.tell() - 1, 0))
                    torn = file.read(1) not in (b"", b"\n")
                    file.write(b"\n" * torn + json.dumps(row).encode() + b"\n")
                    file.flush()
                    os.fsync(file.fileno())
            except (OSError, InputError) as error:
                return JSONResponse({"error": str(error)}, status_code=507)
            self.verdicts[id] = verdict
            self._tell("verdict", {"id": id, "verdict": verdict, "kept": kept is not None})
        return JSONResponse({"kept": kept is not None})


class Guard:
    """Refuse requests of other names for this machine (DNS rebinding), of other origins, and without the token."""

    def __init__(self, app: ASGIApp, token: str, hosts: set[str]):
        self.app, self.token, self.hosts = app, f"Bearer {token}".encode(), hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(name.lower(), value) for name, value in scope["headers"]]
        hosts = [value.decode("latin-1") for name, value in headers if name == b"host"]
        origins = [value.decode("latin-1") for name, value in headers if name == b"origin"]
        given = next((value for name, value in headers if name == b"authorization"), b"")
        refused = None
        if len(hosts) != 1 or hosts[0] not in self.hosts:
            refused = 421
        elif any(origin != f"http://{hosts[0]}" for origin in origins):
            refused = 403
        elif scope["path"] != "/" and not secrets.compare_digest(given, self.token):
            refused = 401

        async def sending(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *((k.lower().encode(), v.encode()) for k, v in HEADERS.items())]
            await send(message)

        await (Response(status_code=refused) if refused else self.app)(scope, receive, sending)


def thumbnail(result: Result) -> bytes:
    """The overlay of a result as a JPEG of at most SIDE pixels."""
    step = -(-max(result.image.shape[:2]) // SIDE)
    small = {name: array[::step, ::step] for name in ("map", "inside") if (array := getattr(result, name)) is not None}
    return jpeg(replace(result, image=np.asarray(Image.fromarray(result.image).reduce(step)), **small).overlay())


def jpeg(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.convert("RGB").save(file, "JPEG", quality=85)
    return file.getvalue()


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
