"""A client for servers that speak the OpenAI protocol (vLLM, SGLang, llama.cpp, OpenAI): retries, timeouts, bounded
concurrency.

The transport is httpx2, which Hugging Face's hub client brings along. The openai package would bring its own models of
every response, of which the fields that matter here (token ids) are no part.
"""

import email.utils
import json
import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from ppg_fast.spec import require, require_number

RETRIED = frozenset({408, 409, 425, 429, *range(500, 600)})  # what the openai client retries, and 425 Too Early
FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0  # seconds; doubled with each attempt
SHOWN = 300  # characters of a server's answer in an error

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class EndpointError(OSError):
    """A server that gave no usable answer, with its address, what was tried and what came back."""


class _Unusable(Exception):
    """One attempt failed in a way that another may not. ``wait``: seconds that the server asks for."""

    def __init__(self, why: str, wait: float | None = None) -> None:
        super().__init__(why)
        self.wait = wait


@dataclass
class Usage:
    """What a client did so far."""

    requests: int = 0
    retries: int = 0


class Endpoint:
    """One server. ``url`` is the base of its API, as in ``http://localhost:8000/v1``; a ``model`` that is not given is
    asked of the server.

    ``key``: where the API key is, ``env:NAME`` or ``file:PATH``; the key itself is kept in memory only. A request that
        times out after
    ``timeout`` seconds without an answer, cannot connect, breaks off, is no JSON or has a status of ``RETRIED`` is
    tried again up to ``retries`` times, after 0.5 s, 1 s, 2 s... or what ``Retry-After`` says. Other statuses are an
    error at once. At most ``concurrency`` requests are under way at a time. ValueError for a bad address or key;
    `EndpointError` where the server gives no answer.
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
        parts = urlsplit(url)
        good = (
            parts.scheme in ("http", "https") and bool(parts.hostname) and "@" not in parts.netloc and not parts.query
        )
        require(
            good, "an endpoint must be http(s)://host[:port]/path without a user, password or query", _without_user(url)
        )
        require_number("timeout", timeout, 0.0, open_low=True)
        require(retries >= 0, "retries must be >= 0", retries)
        require(concurrency >= 1, "concurrency must be >= 1", concurrency)
        self.url, self.timeout, self.retries, self.concurrency = url.rstrip("/"), timeout, retries, concurrency
        self.usage, self._key = Usage(), read_key(key)
        self._model, self._lock = model, threading.Lock()
        self._jitter = random.Random()  # not the global one, whose state belongs to the run
        self._client = self._make_client()

    @property
    def model(self) -> str:
        """The model to ask for: the given one, else the first that the server lists."""
        if self._model is None:
            self._model = str(self.models()[0]["id"])
        return self._model

    def models(self) -> list[dict[str, Any]]:
        """What ``/models`` lists, at least one."""
        listed = self.request("GET", f"{self.url}/models").get("data")
        if not isinstance(listed, list) or not listed or not all(isinstance(m, dict) and "id" in m for m in listed):
            raise EndpointError(f"{self.url}/models must list models, got {str(listed)[:SHOWN]}")
        return listed

    def post(self, path: str, payload: dict[str, Any]) -> dict[str, Any]:
        """The JSON object that ``url`` + ``path`` answers."""
        return self.request("POST", self.url + path, payload)

    def chat(self, messages: Sequence[dict[str, str]], **settings: Any) -> str:
        """The text of one chat completion; ``settings`` as the protocol names them (max_tokens, temperature, seed,
        ...)."""
        answer = self.post("/chat/completions", {"model": self.model, "messages": list(messages), **settings})
        try:
            content = answer["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError):
            content = answer
        if content is None:  # a reasoning model that ran out of tokens before its answer
            return ""
        if not isinstance(content, str):
            raise EndpointError(
                f"{self.url}/chat/completions must answer choices[0].message.content, got {json.dumps(answer)[:SHOWN]}"
            )
        return content.encode("utf-8", "replace").decode()  # JSON can spell half a surrogate pair

    def map(self, function: Callable[[_Item], _Result], items: Sequence[_Item]) -> list[_Result]:
        """``function`` of each item, at most ``concurrency`` at a time, in their order; after the first error no
        further item is begun."""
        if len(items) < 2:
            return [function(item) for item in items]
        pool = ThreadPoolExecutor(min(self.concurrency, len(items)), thread_name_prefix="endpoint")
        try:
            return [future.result() for future in [pool.submit(function, item) for item in items]]
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def request(self, method: str, url: str, payload: dict[str, Any] | None = None) -> dict[str, Any]:
        """One answered request, whatever it takes within ``retries``."""
        for attempt in range(self.retries + 1):
            with self._lock:
                self.usage.requests += 1
                self.usage.retries += attempt > 0
            try:
                return self._attempt(method, url, payload)
            except _Unusable as failure:
                if attempt == self.retries:
                    raise EndpointError(f"{url}: {failure}, after {attempt + 1} attempts") from failure
                wait = (
                    FIRST_WAIT * 2**attempt * (1 + 0.25 * self._jitter.random())
                    if failure.wait is None
                    else failure.wait
                )
                time.sleep(min(wait, LONGEST_WAIT))
        raise AssertionError("the last attempt returns or raises")

    def _attempt(self, method: str, url: str, payload: dict[str, Any] | None) -> dict[str, Any]:
        import httpx2

        try:
            response = self._client.request(method, url, json=payload)
        except httpx2.TimeoutException as error:
            raise _Unusable(f"no answer within {self.timeout:g} s ({type(error).__name__})") from error
        except httpx2.TransportError as error:
            raise _Unusable(f"{type(error).__name__}: {error}") from error
        if response.status_code in RETRIED:
            raise _Unusable(
                f"status {response.status_code}: {self._shown(response.text)}", _retry_after(response.headers)
            )
        if not response.is_success:
            raise EndpointError(f"{url}: status {response.status_code}: {self._shown(response.text)}")
        try:
            answer = json.loads(response.content)
        except ValueError as error:
            raise _Unusable(f"the answer is no JSON ({error}): {self._shown(response.text)}") from error
        if not isinstance(answer, dict):
            raise _Unusable(f"the answer must be a JSON object, got {self._shown(response.text)}")
        return answer

    def _shown(self, text: str) -> str:
        """The beginning of a server's answer; some repeat the key that they refuse."""
        text = " ".join(text.split())
        return (text.replace(self._key, "***") if self._key else text)[:SHOWN]

    def _make_client(self) -> Any:
        try:
            import httpx2
        except ImportError as error:
            raise ValueError("an endpoint needs httpx2: pip install ppg_fast[endpoint]") from error
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        limits = httpx2.Limits(max_connections=self.concurrency, max_keepalive_connections=self.concurrency)
        timeout = httpx2.Timeout(self.timeout, connect=min(10.0, self.timeout), pool=None)
        return httpx2.Client(headers=headers, limits=limits, timeout=timeout)


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


def _without_user(url: str) -> str:
    return url.rpartition("@")[2]


def _retry_after(headers: Any) -> float | None:
    """Seconds, from the header's number or date; None without one that can be read."""
    text = headers.get("retry-after", "")
    try:
        return max(0.0, float(text))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (TypeError, ValueError):
        return None
