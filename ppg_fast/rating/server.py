"""The page for a browser on this machine, by the standard library: one address, one token, one writer."""

import base64
import hashlib
import hmac
import json
import re
import secrets
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from ppg_fast.rating.tasks import Tasks

ADDRESS = "127.0.0.1"
MOST = 1 << 16  # bytes of a request
PAGE = Path(__file__).with_name("page.html")


class Server(ThreadingHTTPServer):
    """Serves ``tasks`` at ``url``, which holds a token that nobody else knows; port 0 takes any that is free.

    403 for a request without the token, or to another host than this one: a page elsewhere may have its own name lead
    here (DNS rebinding). 400 with one line for an answer that is none. OSError where the port is taken.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, tasks: Tasks, port: int) -> None:
        self.tasks, self.token, self.lock = tasks, secrets.token_urlsafe(16), threading.Lock()
        self.page = PAGE.read_bytes()
        script = re.search(rb"<script>(.*?)</script>", self.page, re.DOTALL)
        assert script
        digest = base64.b64encode(hashlib.sha256(script[1]).digest()).decode()
        self.policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; connect-src 'self'"
        try:
            super().__init__((ADDRESS, port), Handler)
        except OSError as error:
            raise OSError(f"port {port} of {ADDRESS} cannot be had ({error.strerror}): give another --port") from error
        self.hosts = [f"{name}:{self.server_port}" for name in (ADDRESS, "localhost")]

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{self.hosts[0]}/{self.token}/"


class Handler(BaseHTTPRequestHandler):
    """GET the page and what is next; POST rate, skip and undo, each answered with what is next."""

    server: Server  # type: ignore[assignment]
    protocol_version = "HTTP/1.1"
    timeout = 60

    def do_GET(self) -> None:
        """The page, or the next task."""
        wanted = self._allowed()
        if wanted == "":
            self._send(200, self.server.page, "text/html; charset=utf-8")
        elif wanted == "next":
            self._act(lambda: None)
        elif wanted is not None:
            self._send(404, b"", "text/plain")

    def do_POST(self) -> None:
        """An answer, a skip or an undo."""
        wanted, tasks = self._allowed(), self.server.tasks
        if wanted is None:
            return
        try:
            given = self._body()
        except (ValueError, RecursionError) as error:
            self.close_connection = True  # what is left of it is no request
            self._send_json(400, {"error": str(error)})
            return
        place = given.get("id"), given.get("turn")
        actions = {
            "rate": lambda: tasks.rate(*place, given.get("rating")),
            "skip": lambda: tasks.skip(*place),
            "undo": tasks.undo,
        }
        if wanted in actions:
            self._act(actions[wanted])
        else:
            self._send(404, b"", "text/plain")

    def _allowed(self) -> str | None:
        """What is asked for, below the token; None, and 403 sent, for who may not ask."""
        _, token, rest = [*self.path.split("/", 2), "", ""][:3]
        here = self.headers.get("Host") in self.server.hosts
        origin = self.headers.get("Origin")
        same = origin is None or origin.removeprefix("http://") in self.server.hosts
        if here and same and hmac.compare_digest(token.encode(), self.server.token.encode()):
            return rest
        self.close_connection = True  # a body may follow
        self._send(403, b"forbidden\n", "text/plain")
        return None

    def _body(self) -> dict[str, Any]:
        length = self.headers.get("Content-Length") or "0"
        if not length.isdecimal() or int(length) > MOST:
            raise ValueError(f"a request must have at most {MOST} bytes, got {length[:20]}")
        value = json.loads(self.rfile.read(int(length)) or b"{}")
        if not isinstance(value, dict):
            raise ValueError(f"a request must be a JSON object, got {type(value).__name__}")
        return value

    def _act(self, action: Any) -> None:
        """One at a time: what was answered is on the disk before the next is shown."""
        with self.server.lock:
            try:
                action()
                status, state = 200, self.server.tasks.next()
            except ValueError as error:
                status, state = 400, {"error": str(error)}
            except OSError as error:
                status, state = 500, {"error": f"not saved: {error}"}
        self._send_json(status, state)

    def _send_json(self, status: int, value: dict[str, Any]) -> None:
        self._send(status, json.dumps(value).encode(), "application/json")

    def _send(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        for name, value in (
            ("Content-Type", kind),
            ("Content-Length", str(len(body))),
            ("Content-Security-Policy", self.server.policy),
            ("Cache-Control", "no-store"),
            ("Referrer-Policy", "no-referrer"),
            ("X-Content-Type-Options", "nosniff"),
            *([("Connection", "close")] if self.close_connection else []),
        ):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the token would be in it."""
