"""What a chat template writes around an answer: the tokens that end one, and the special tokens it may hold."""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from ppg_fast.dialogues.conversation import ANSWER, ASK, CALL_ID, STAND_IN
from ppg_fast.dialogues.message import REASONING, Message
from ppg_fast.dialogues.renderer import Renderer, shared_start
from ppg_fast.dialogues.template_choice import require_tokens

CALL = {"type": "function", "id": CALL_ID, "function": {"name": "f", "arguments": {"x": "y"}}}
RICHER = (  # answers of more than text, as templates know them
    *(Message("assistant", STAND_IN, {name: "b"}) for name in REASONING),
    Message("assistant", f"<think>\nb\n</think>\n\n{STAND_IN}"),
    Message("assistant", "", {"tool_calls": [CALL]}),
)


class AnswerForm(NamedTuple):
    """``end_ids``: tokens that end an answer, the template's own first. ``sayable``: special tokens inside of one.

    ``opened``: what the template writes between the generation prompt and the answer's text; ``closed``: from the text
    up to and with the end. ``closed_before``: the same once somebody has replied, which differs in some templates.
    """

    end_ids: tuple[int, ...]
    sayable: frozenset[int]
    opened: str
    closed: str
    closed_before: str


def require_own_tokens(renderer: Renderer) -> None:
    """ValueError where the template writes markup around messages that is no token of the tokenizer."""
    said = [*RICHER, replace(RICHER[-1], content=STAND_IN), Message("system", "a"), Message("tool", "b")]
    for one in ([ASK], [ASK, ANSWER], *([ASK, other] for other in said)):
        try:
            text = renderer.text(one, answer_next=True)
        except ValueError:  # what a template refuses it does not write
            continue
        require_tokens(text, renderer.added)


def answer_form(renderer: Renderer, end_ids: Sequence[int] = ()) -> AnswerForm:
    """The form of answers in the template of ``renderer``, found by rendering stand-ins.

    The end is the last added token that follows an answer both at the end of a dialogue and before a reply (Cohere2:
    two tokens close it, Phi-3: the one before the end of the whole); where the two have nothing in common (gpt-oss),
    the first at the end of a dialogue. What closes an answer that calls a tool ends one too, and so do ``end_ids``,
    those of the model's generation config. ValueError for a template that does not write the answer, or does not end it
    with an added token.
    """
    at = renderer.token_pattern
    asked = renderer.before_answer([ASK])
    whole = renderer.text([ASK, ANSWER])
    if STAND_IN not in whole:
        raise ValueError(f"the chat template must write the answer, got {whole[:60]!r}")
    after = whole.rpartition(STAND_IN)[2]
    between = _before_a_reply(renderer, after)
    shared = list(at.finditer(shared_start(after, between)))
    last = shared[-1] if shared else at.search(after)
    first_between = shared[-1] if shared else at.search(between)
    if last is None or first_between is None or (not shared and between[: first_between.start()].strip()):
        rule = "the chat template must end an answer with a special (or added) token of the tokenizer"
        raise ValueError(f"{rule}, got {after[:60]!r} after it")
    rich = _richer(renderer, at, asked)
    calls = [found[-1] for found in [list(at.finditer(rich[-1]))] if found and not rich[-1][found[-1].end() :].strip()]
    ends = dict.fromkeys([renderer.added[last[0]], *(renderer.added[match[0]] for match in calls), *end_ids])
    said = {
        renderer.added[match[0]]
        for text in (_said(at, asked, whole[: len(whole) - len(after) + last.start()]), *rich)
        for match in at.finditer(text)
    }
    said &= set(renderer.special.values())
    start = whole.rindex(STAND_IN)
    written = whole[len(asked) : start] if whole.startswith(asked) else ""
    closed = after[: last.end()]
    return AnswerForm(tuple(ends), frozenset(said - set(ends)), written, closed, between[: first_between.end()])


def _before_a_reply(renderer: Renderer, otherwise: str) -> str:
    """What follows an answer once the user has replied; ``otherwise`` where the template takes no reply."""
    try:
        text = renderer.text([ASK, ANSWER, Message("user", "c")])
    except ValueError:
        return otherwise
    return text.partition(STAND_IN)[2]


def _richer(renderer: Renderer, at: re.Pattern[str], asked: str) -> list[str]:
    """Answers with reasoning, and last one with a tool call, from the generation prompt on; those that are written."""
    texts: list[str] = []
    for answer in RICHER:
        try:
            text = asked if renderer.by_role and answer.more else renderer.text([ASK, answer])
        except ValueError:  # a template that does not know these: its plain answers count
            text = asked
        texts.append(_said(at, asked, text))
    return texts


def _said(at: re.Pattern[str], asked: str, text: str) -> str:
    """What ``text`` has after the generation prompt of ``asked``, as far as the two agree, tokens whole."""
    start = len(shared_start(asked, text))
    return text[next((m.start() for m in at.finditer(text) if m.start() < start < m.end()), start) :]
