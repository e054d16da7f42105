"""A server on loopback that speaks enough of the OpenAI protocol, and misbehaves on demand."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = Any  # a dict to send as JSON, or a Raw


class Raw:
    """An answer as it is: status, body, headers, seconds of delay before it."""

    def __init__(
        self, status: int = 200, body: bytes = b"{}", headers: dict[str, str] | None = None, delay: float = 0.0
    ) -> None:
        self.status, self.body, self.headers, self.delay = status, body, headers or {}, delay


def said(text: str | None) -> dict:
    return {"choices": [{"message": {"role": "assistant", "content": text}}]}


class Server:
    """``answer(path, payload)`` gives the reply; requests, their headers and the largest number under way at a time are
    kept."""

    def __init__(self, answer: Callable[[str, dict], Reply], models: list[dict] | None = None) -> None:
        self.answer, self.listed = answer, [{"id": "tiny"}] if models is None else models
        self.requests: list[tuple[str, dict]] = []
        self.headers: list[dict[str, str]] = []
        self.under_way = self.most = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_address[1]}/v1"

    def handle(self, path: str, payload: dict, headers: dict[str, str]) -> Raw:
        if path == "/v1/models":
            return Raw(body=json.dumps({"data": self.listed}).encode())
        with self.lock:
            self.requests.append((path, payload))
            self.headers.append(headers)
            self.under_way += 1
            self.most = max(self.most, self.under_way)
        try:
            reply = self.answer(path, payload)
            raw = reply if isinstance(reply, Raw) else Raw(body=json.dumps(reply).encode())
            time.sleep(raw.delay)
            return raw
        finally:
            with self.lock:
                self.under_way -= 1


@contextmanager
def serve(answer: Callable[[str, dict], Reply], models: list[dict] | None = None) -> Iterator[Server]:
    server = Server(answer, models)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def respond(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            raw = server.handle(
                self.path, json.loads(body) if body else {}, {k.lower(): v for k, v in self.headers.items()}
            )
            try:
                self.send_response(raw.status)
                for name, value in {
                    "content-type": "application/json",
                    "content-length": str(len(raw.body)),
                    **raw.headers,
                }.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(raw.body)
            except (BrokenPipeError, ConnectionResetError):  # the client no longer waits
                self.close_connection = True

        do_GET = do_POST = respond

        def log_message(self, *_: object) -> None:
            pass

    server.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.http.daemon_threads = True
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.http.shutdown()
        server.http.server_close()
        thread.join()
