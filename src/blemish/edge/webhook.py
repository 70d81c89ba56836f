"""Alarms of a log sent to an address in their order by a thread: the log is the queue, so that nothing waits and nothing is lost."""

import hashlib
import hmac
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from threading import Event, Thread
from urllib.parse import urlsplit

from .errors import InputError
from .journal import Journal

SECRET = "BLEMISH_WEBHOOK_SECRET"  # the environment's variable; a secret in a command is seen by all users of a machine
TIMEOUT = 10  # seconds for an answer
PAUSE = (1, 60)  # seconds before another try, doubled up to the second
POSITION = "webhook"  # in the journal: bytes of the log that are done with

Post = Callable[[str, bytes, dict[str, str]], int]


class Webhook:
    """Posts every line of the log that is an alarm, or an image that could not be scored, as JSON.

    Without an answer, and for a status of 429 or 5xx, a line is sent again until it arrives; another status from 300 on is a refusal, which
    is counted. After a kill a line may come a second time, with the same `Idempotency-Key`. `secret` signs `time.body` by HMAC-SHA256.
    """

    def __init__(self, url: str, secret: str, journal: Journal, tell: Callable[[str], None], post: Post | None = None):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(f"webhook={url}: expected http://… or https://…")
        self.url, self.secret, self.journal, self.tell, self.post = url, secret.encode(), journal, tell, post or posted
        position = journal.get(POSITION)
        self.position = journal.size if position is None else position if position <= journal.size else 0
        self.sent = self.refused = 0
        self.trouble: str | None = None
        self.stop, self.new = Event(), Event()
        self.thread = Thread(target=self._run, name="webhook", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        while not self.stop.is_set():
            self.new.clear()
            for line, end in self.journal.lines(self.position):
                if line.get("decision") or "error" in line:
                    if not self._deliver(line):
                        return
                    with suppress(OSError):  # a full disk
                        self.journal.sync(**{POSITION: end})
                self.position = end
            self.new.wait(60)

    def _deliver(self, line: dict) -> bool:
        """Whether a line is done with; False at the end of the process."""
        body, pause = json.dumps(line).encode(), PAUSE[0]
        while not self.stop.is_set():
            stamp = str(int(time.time()))
            headers = {"Content-Type": "application/json", "Idempotency-Key": line["id"], "X-Blemish-Time": stamp}
            if self.secret:
                headers["X-Blemish-Signature"] = f"sha256={signature(self.secret, stamp, body)}"
            try:
                status = self.post(self.url, body, headers)
                self.trouble = f"status {status}" if status == 429 or status >= 500 else None
            except OSError as error:
                self.trouble = str(getattr(error, "reason", None) or error) or type(error).__name__
            if self.trouble is None:
                self.sent, self.refused = self.sent + (status < 300), self.refused + (status >= 300)
                if status >= 300:
                    self.tell(f"webhook: {line['name']}: refused with status {status}")
                return True
            self.stop.wait(pause)
            pause = min(2 * pause, PAUSE[1])
        return False

    @property
    def behind(self) -> int:
        """Bytes of the log that wait to be sent or passed over."""
        return max(self.journal.size - self.position, 0)

    def close(self, patience: float) -> None:
        """Wait for what is not sent yet, then end; what is left is sent after the next start."""
        self.new.set()
        end = time.monotonic() + patience
        while self.behind and time.monotonic() < end:
            self.stop.wait(0.05)
        self.stop.set()
        self.new.set()
        self.thread.join(TIMEOUT + 1)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: object) -> None:
        return None


def posted(url: str, body: bytes, headers: dict[str, str]) -> int:
    """Post to an address and return the status; OSError without an answer."""
    request = urllib.request.Request(url, body, headers, method="POST")
    try:
        with urllib.request.build_opener(_NoRedirects).open(request, timeout=TIMEOUT) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        error.close()
        return error.code


def signature(secret: bytes, stamp: str, body: bytes) -> str:
    """The HMAC-SHA256 of `stamp.body`, in hex, by which a receiver knows sender and time."""
    return hmac.new(secret, f"{stamp}.".encode() + body, hashlib.sha256).hexdigest()
