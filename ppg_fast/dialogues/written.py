"""Whether a chat template writes everything that messages carry: nothing is lost in silence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from ppg_fast.dialogues.conversation import ANSWER, STAND_IN, Tools, as_object, function_of
from ppg_fast.dialogues.message import REASONING, Message
from ppg_fast.dialogues.renderer import Renderer

THOUGHT = "</think>"  # ends the reasoning that a content begins with


class _Mark(NamedTuple):
    """Something that a message says (``message`` -1: that the tools say), and a text that was put into it."""

    message: int
    what: str
    text: str


def require_written(renderer: Renderer, messages: Sequence[Message], tools: Tools = (), after: str = "") -> None:
    """ValueError that names the first message of which the template leaves something out: content, calls with their
    arguments, reasoning, a speaker's name; or the tools.

    One rendering for all of them, each with a mark of its own. What the template leaves out there it must write where
    it counts: an answer as the last message (earlier reasoning may be left out of the history), another one in what the
    model sees before the next answer. ``after``: the messages after the first two are looked for behind this text.
    """
    if renderer.by_role:
        _require_plain(messages, tools)
        return
    views: dict[tuple[int, bool], list[tuple[int, str]]] = {}
    for index, what in _unwritten(renderer, messages, tools, after):
        stop = next((n for n in range(max(index, 0), len(messages)) if messages[n].role == "assistant"), None)
        if stop is not None and not after:
            seen = stop != index  # by the model, before it answers
            if (stop, seen) not in views:
                views[stop, seen] = _unwritten(renderer, messages[: stop + (not seen)], tools, after, seen)
            if (index, what) not in views[stop, seen]:
                continue
        use = "use a template that writes it (--chat-template)"
        if index < 0:
            raise ValueError(f"message 0: the chat template leaves out {what}: {use}, or leave the tools out")
        raise ValueError(f"message {index}: the chat template leaves out {what}: leave it out, or {use}")


def _require_plain(messages: Sequence[Message], tools: Tools) -> None:
    """ValueError for what role tokens cannot write."""
    for index, message in enumerate(messages):
        carried = [key for key in message.more if key not in ("tool_call_id", *(["name"] * (message.role == "tool")))]
        if carried:
            rule = f"a tokenizer without a chat template writes role and content only, not {', '.join(carried)}"
            raise ValueError(f"message {index}: {rule}: write it into the content, or use --chat-template")
    if tools:
        raise ValueError("message 0: a tokenizer without a chat template writes no tools: use --chat-template")


def _unwritten(
    renderer: Renderer, messages: Sequence[Message], tools: Tools, after: str, answer_next: bool = False
) -> list[tuple[int, str]]:
    """What the template does not write of these, as (message, what)."""
    mark = STAND_IN
    while any(mark in message.content for message in messages):
        mark += "q"
    marks: list[_Mark] = []
    marked_tools = [_marked_tool(tool, f"{mark}t{number}x", marks) for number, tool in enumerate(tools)]
    marked = [_marked(message, index, mark, marks) for index, message in enumerate(messages)]
    talks = [*([marked] if marked else []), [*marked, ANSWER]]
    text = _first(renderer, talks, marked_tools, answer_next)
    if text is None:  # a content that must be in a form of its own
        return _without_effect(renderer, messages, tools)
    behind = text.partition(after)[2] if after else text
    return [(m.message, m.what) for m in marks if m.text not in (behind if after and m.message >= 2 else text)]


def _first(
    renderer: Renderer, talks: Sequence[Sequence[Message]], tools: Tools, answer_next: bool = False
) -> str | None:
    """The text of the first that the template takes; None where it takes none."""
    for talk in talks:
        try:
            return renderer.text(talk, answer_next, tools)
        except ValueError:  # noqa: PERF203
            continue
    return None


def _marked(message: Message, index: int, mark: str, marks: list[_Mark]) -> Message:
    """The message with marks in everything that a template should write."""

    def put(what: str, kind: str) -> str:
        marks.append(_Mark(index, what, f"{mark}{index}{kind}x"))
        return marks[-1].text

    content, more = message.content, dict(message.more)
    if content or not more:
        said = f"what the {message.role} says here ({content[:60]!r})"
        content = f"{content} {put(said, 'c')}"
        if message.role == "assistant" and THOUGHT in content:
            content = content.replace(THOUGHT, f" {put('the reasoning in the content', 'i')}{THOUGHT}", 1)
    if message.reasoning:
        thought = f"{message.reasoning} {put(f'the reasoning ({message.reasoning[:60]!r})', 'r')}"
        more |= {key: thought for key in REASONING if key in more}
    if message.tool_calls:
        more["tool_calls"] = [_marked_call(call, n, put) for n, call in enumerate(message.tool_calls)]
    if message.role != "tool" and more.get("name"):
        more["name"] += put(f"the name of the speaker ({more['name'][:60]!r})", "n")
    return replace(message, content=content, more=more)


def _marked_call(call: Mapping[str, Any], number: int, put: Any) -> dict[str, Any]:
    function = dict(call["function"])
    arguments = as_object(function.get("arguments", {}))
    what = f"tool call {number} ({function['name'][:60]!r})"
    function["name"] += put(what, f"f{number}")
    if isinstance(arguments, str):
        function["arguments"] = f"{arguments} {put(f'the arguments of {what}', f'a{number}')}"
    else:
        function["arguments"] = {**arguments, "marked": put(f"the arguments of {what}", f"a{number}")}
    return {**call, "function": function}


def _marked_tool(tool: Mapping[str, Any], mark: str, marks: list[_Mark]) -> dict[str, Any]:
    function = function_of(tool)
    if not isinstance(function.get("name"), str):
        return dict(tool)
    marks.append(_Mark(-1, f"the tool {function['name'][:60]!r}", mark))
    named = {**function, "name": function["name"] + mark}
    return {**tool, "function": named} if "function" in tool else named


def _without_effect(renderer: Renderer, messages: Sequence[Message], tools: Tools) -> list[tuple[int, str]]:
    """Messages whose content, exchanged for another, changes nothing; those that can be exchanged."""
    whole, found = _first(renderer, [messages], tools), []
    for index, message in enumerate(messages):
        if not message.content:
            continue
        others = [*messages]
        others[index] = replace(message, content=STAND_IN)
        if whole is not None and _first(renderer, [others], tools) == whole:
            found.append((index, f"what the {message.role} says here ({message.content[:60]!r})"))
    return found
