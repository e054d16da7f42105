"""A client for servers that speak the OpenAI protocol (vLLM, SGLang, llama.cpp, OpenAI): retries, timeouts, bounded
concurrency.

The transport is httpx2, which Hugging Face's hub client brings along. The openai package would bring its own models of
every response, of which the fields that matter here (token ids) are no part.
"""

import functools
import json
import os
import random
import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from ppg_fast import stopping
from ppg_fast.replies import SHOWN, Failure, Reply, asked_of, code_of, error_in, failure_of, read_chat
from ppg_fast.spec import require, require_number

FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0  # seconds; doubled with each attempt
LIMITS = ("max_tokens", "max_completion_tokens")  # two names of one setting; some servers refuse one of them

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class EndpointError(OSError):
    """A server that gave no usable answer, with its address, what was asked and what came back."""


class _Refused(EndpointError):
    """The request itself was refused, with ``text``."""

    def __init__(self, message: str, text: str) -> None:
        super().__init__(message)
        self.text = text


@dataclass
class Usage:
    """What a client did so far."""

    requests: int = 0
    retries: int = 0


class Endpoint:
    """One server. ``url`` is the base of its API, as in ``http://localhost:8000/v1``; a ``model`` that is not given is
    asked of the server.

    ``key``: where the API key is, ``env:NAME`` or ``file:PATH``; the key itself is kept in memory only. A request that
    times out after ``timeout`` seconds without an answer, cannot connect, breaks off, is no JSON or has a status of
    ``RETRIED``, its own or that of an error in its body, is tried again up to ``retries`` times, after 0.5 s, 1 s,
    2 s... or what ``Retry-After`` says. Other statuses, and answers that do not hold what was asked for, are an error
    at once. At most ``concurrency`` requests are under way at a time. ValueError for a bad address or key;
    `EndpointError` where the server gives no answer; `Stopped` once a signal asks for it.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        key: str | None = None,
        *,
        timeout: float = 300.0,
        retries: int = 4,
        concurrency: int = 16,
    ) -> None:
        rule = "an endpoint must be http(s)://host[:port]/path without a user, password or query"
        require(_is_address(url), rule, _without_user(url))
        require_number("timeout", timeout, 0.0, open_low=True)
        require(retries >= 0, "retries must be >= 0", retries)
        require(concurrency >= 1, "concurrency must be >= 1", concurrency)
        self.url, self.timeout, self.retries, self.concurrency = url.rstrip("/"), timeout, retries, concurrency
        self.usage, self._key = Usage(), read_key(key)
        self._model, self._lock = model, threading.Lock()
        self.refused: set[str] = set()  # settings that the server does not take
        self._jitter = random.Random()  # not the global one, whose state belongs to the run
        self._client = self._make_client(rule)

    @property
    def model(self) -> str:
        """The model to ask for: the given one, else the first that the server lists."""
        if self._model is None:
            self._model = str(self.models()[0]["id"])
        return self._model

    def models(self) -> list[dict[str, Any]]:
        """What ``/models`` lists, at least one."""

        def read(answer: dict[str, Any]) -> list[dict[str, Any]]:
            listed = answer.get("data")
            if not isinstance(listed, list) or not listed or not all(isinstance(m, dict) and "id" in m for m in listed):
                raise ValueError("the server must list models")
            return listed

        return self.request("GET", f"{self.url}/models", None, read)

    def answer(self, messages: Sequence[dict[str, str]], *, optional: Collection[str] = (), **settings: Any) -> Reply:
        """One chat completion; ``settings`` as the protocol names them (max_tokens, temperature, seed, ...).

        Where the server refuses ``max_tokens``, it is told ``max_completion_tokens`` from then on, and an ``optional``
        setting that it refuses is left out from then on: ``refused`` has their names. Text that is no answer, as in
        ``reasoning_content``, is not read.
        """
        tried: set[str] = set()
        first: _Refused | None = None
        while True:
            payload = {"model": self.model, "messages": list(messages)}
            for name, value in settings.items():
                if name not in self.refused | tried:
                    payload[name] = value
                elif name == LIMITS[0]:
                    payload[LIMITS[1]] = value
            try:
                reply = self.post("/chat/completions", payload, read_chat)
            except _Refused as refusal:
                named = [name for name in (LIMITS[0], *optional) if name in payload and name in refusal.text]
                if not named:
                    raise (first if first is not None and LIMITS[1] in refusal.text else refusal) from None
                first = first or refusal
                tried.add(named[0])
            else:
                self.refused |= tried
                return reply

    def chat(self, messages: Sequence[dict[str, str]], **settings: Any) -> str:
        """The text of `answer`, "" where it has none."""
        return self.answer(messages, **settings).text or ""

    def map(self, function: Callable[[_Item], _Result], items: Sequence[_Item]) -> list[_Result]:
        """``function`` of each item, at most ``concurrency`` at a time, in their order; after the first error no
        further item is begun."""
        return stopping.side_by_side(function, items, self.concurrency, name="endpoint")

    def post(self, path: str, payload: dict[str, Any], read: Callable[[dict[str, Any]], _Result]) -> _Result:
        """What ``read`` makes of the JSON object that ``url`` + ``path`` answers."""
        return self.request("POST", self.url + path, payload, read)

    def request(
        self, method: str, url: str, payload: dict[str, Any] | None, read: Callable[[dict[str, Any]], _Result]
    ) -> _Result:
        """What ``read`` makes of one answer, whatever it takes within ``retries``.

        The one place where answers are checked: a ValueError of ``read``, which says what an answer must hold, becomes
        an `EndpointError` with address, question and answer.
        """
        for attempt in range(self.retries + 1):
            stopping.check()
            with self._lock:
                self.usage.requests += 1
                self.usage.retries += attempt > 0
            try:
                return self._attempt(method, url, payload, read)
            except Failure as failure:
                said = f"{url}: {failure}" + (f", after {attempt + 1} attempts" if failure.again else "")
                said += f"; asked {asked_of(method, payload)}"
                if failure.refused:
                    raise _Refused(said, failure.text) from failure
                if attempt == self.retries or not failure.again:
                    raise EndpointError(said) from failure
                doubled = FIRST_WAIT * 2**attempt * (1 + 0.25 * self._jitter.random())
                stopping.sleep(min(doubled if failure.wait is None else failure.wait, LONGEST_WAIT))
        raise AssertionError("the last attempt returns or raises")

    def _attempt(
        self, method: str, url: str, payload: dict[str, Any] | None, read: Callable[[dict[str, Any]], _Result]
    ) -> _Result:
        import httpx2

        try:
            response = self._client.request(method, url, json=payload)
        except httpx2.TimeoutException as error:
            raise Failure(f"no answer within {self.timeout:g} s ({type(error).__name__})") from error
        except httpx2.RequestError as error:  # no connection, a broken one, a body that cannot be unpacked
            raise Failure(f"{type(error).__name__}: {self._shown(str(error))}") from error
        shown = self._shown(response.text)
        if not response.is_success:
            raise failure_of(response.status_code, response.text, shown, response.headers)
        try:
            answer = json.loads(response.content)
        except (ValueError, RecursionError) as error:
            raise Failure(f"the answer is no JSON ({error}): {shown}") from error
        if not isinstance(answer, dict):
            raise Failure(f"the answer must be a JSON object, got {shown}")
        if (error := error_in(answer)) is not None:
            raise failure_of(code_of(error), response.text, shown, response.headers)
        try:
            return read(answer)
        except ValueError as error:
            raise Failure(f"{error}, got {shown}", again=False) from error

    def _shown(self, text: str) -> str:
        """The beginning of a server's answer, for one line; some repeat the key that they refuse. What would steer a
        terminal is spelled out."""
        text = " ".join(text.split())
        text = (text.replace(self._key, "***") if self._key else text)[:SHOWN]
        return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)

    def _make_client(self, rule: str) -> Any:
        try:
            import httpx2
        except ImportError as error:
            raise ValueError("an endpoint needs httpx2: pip install ppg_fast[endpoint]") from error
        try:
            httpx2.URL(self.url)
        except httpx2.InvalidURL as error:
            raise ValueError(f"{rule}, got {self.url!r} ({error})") from error
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        limits = httpx2.Limits(max_connections=self.concurrency, max_keepalive_connections=self.concurrency)
        timeout = httpx2.Timeout(self.timeout, connect=min(10.0, self.timeout), pool=None)
        return httpx2.Client(headers=headers, limits=limits, timeout=timeout, verify=_certificates())


def read_key(where: str | None) -> str | None:
    """The API key at ``env:NAME`` (the field's convention is env:OPENAI_API_KEY) or ``file:PATH``; None for None.

    ValueError, without the value where that may be a key itself, for anything else, an unset variable, an empty file.
    """
    if where is None:
        return None
    kind, _, place = where.partition(":")
    if kind not in ("env", "file") or not place:
        raise ValueError(
            "a key must be given as env:NAME or file:PATH, never itself (settings are written to disk), got "
            "something else"
        )
    try:
        key = os.environ.get(place, "") if kind == "env" else Path(place).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"no API key at {where}: {error}") from error
    key = key.strip()
    require(
        bool(key) and key.isascii() and key.isprintable() and " " not in key,
        f"{where} must hold one API key",
        f"{len(key)} characters",
    )
    return key


@functools.cache
def _certificates() -> Any:
    """Of the authorities that are trusted: reading them takes longer than all the rest of a client."""
    import httpx2

    return httpx2.create_ssl_context()


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises where it is no number
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname) and "@" not in parts.netloc and not parts.query


def _without_user(url: str) -> str:
    return url.rpartition("@")[2]
