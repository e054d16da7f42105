"""What a server's answer says: read field by field, each failure with whether another attempt may pass."""

import email.utils
import re
import time
from typing import Any, NamedTuple

RETRIED = frozenset({408, 409, 425, 429, *range(500, 600)})  # what the openai client retries, and 425 Too Early
SHOWN = 300  # characters of a server's answer in an error

TOLD = ("model", "max_tokens", "max_completion_tokens", "n_predict", "temperature", "seed")  # of a request, in an error
CUT = ("length", "max_tokens", "model_length")  # words of servers for an answer that was cut at its limit
THOUGHT = re.compile(r"<(think|thinking|thought|reasoning)>.*?(?:</\1>|\Z)", re.DOTALL | re.IGNORECASE)
THOUGHT_END = re.compile(r"\A.*</(?:think|thinking|thought|reasoning)>", re.DOTALL | re.IGNORECASE)


class Failure(Exception):
    """One attempt failed. ``again``: another may not. ``wait``: seconds that the server asks for. ``refused``: whether
    the server did not like the request, and said so in ``text``."""

    def __init__(
        self, why: str, *, again: bool = True, wait: float | None = None, refused: bool = False, text: str = ""
    ) -> None:
        super().__init__(why)
        self.again, self.wait, self.refused, self.text = again, wait, refused, text


class Reply(NamedTuple):
    """What a chat completion says: its text without thoughts, None where it has none, and whether it was cut at its
    limit."""

    text: str | None
    cut: bool


def without_thoughts(text: str) -> str:
    """What a model says beside its thoughts: <think>...</think>, also one that is not closed or began in the prompt."""
    said = THOUGHT_END.sub("", THOUGHT.sub("", text))
    return said.strip() if said != text else text


def read_chat(answer: dict[str, Any]) -> Reply:
    """The first choice of a chat completion."""
    choice = first_choice(answer)
    message, cut = choice.get("message"), choice.get("finish_reason") in CUT
    # one that was cut within its thoughts may leave the content out
    content = message.get("content", None if cut else 0) if isinstance(message, dict) else 0
    if content is not None and not isinstance(content, str):
        raise ValueError("a chat completion must hold choices[0].message.content, text or null")
    # JSON can spell half a surrogate pair
    text = content if content is None else without_thoughts(content.encode("utf-8", "replace").decode())
    return Reply(text, cut)


def first_choice(answer: dict[str, Any]) -> dict[str, Any]:
    """The first choice of a completion. ValueError where there is none."""
    choices = answer.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise ValueError("a completion must answer choices, a list of objects with at least one")
    return choices[0]


def error_in(answer: dict[str, Any]) -> Any:
    """The error that an answer of status 200 is, or None."""
    if answer.get("error"):
        return answer["error"]
    if answer.get("object") == "error":
        return answer
    choices = answer.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    if isinstance(first, dict) and (first.get("error") or first.get("finish_reason") == "error"):
        return first.get("error") or {}
    return None


def code_of(error: Any) -> int | None:
    """The HTTP status that an error object names, None where it names none."""
    named = [str(error.get(key)) for key in ("code", "status", "status_code")] if isinstance(error, dict) else []
    return next((int(code) for code in named if re.fullmatch("[1-5][0-9][0-9]", code)), None)


def failure_of(status: int | None, text: str, shown: str, headers: Any) -> Failure:
    """The failure that a status is, whether it is the answer's own or stands in its body; without one, it may pass."""
    again = status is None or status in RETRIED
    why = f"status {status}: {shown}" if status else f"the answer is an error: {shown}"
    return Failure(why, again=again, wait=_retry_after(headers), refused=status in (400, 422), text=text)


def asked_of(method: str, payload: dict[str, Any] | None) -> str:
    """What a request asked for, in a few words."""
    asked = {**(payload or {}), **(payload or {}).get("sampling_params", {})}
    nouns = {"messages": "messages", "prompt": "tokens", "token_ids": "tokens"}
    counts = [f"{len(asked[key])} {noun}" for key, noun in nouns.items() if key in asked]
    return ", ".join([method, *counts, *(f"{key} {asked[key]}" for key in TOLD if key in asked)])


def _retry_after(headers: Any) -> float | None:
    """Seconds, from the header's number or date; None without one that can be read."""
    text = headers.get("retry-after", "")
    try:
        return max(0.0, float(text))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return None
