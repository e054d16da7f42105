"""An answer as a message of the OpenAI format: what was sampled, read by transformers' response template or by one of
the formats in our table."""

import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ppg_fast.dialogues.chat_format import ChatFormat
from ppg_fast.dialogues.conversation import function_of
from ppg_fast.dialogues.message import REASONING, Message
from ppg_fast.dialogues.renderer import Renderer, shared_start
from ppg_fast.rollouts.tools.call_formats import CLOSED, FORMATS, OPENED, Reader
from ppg_fast.rollouts.tools.reading import Call, Reading, json_call, json_value, unread

ASK = {"role": "user", "content": "a"}
PROBE = Call("look_up", {"x": "y", "n": 3}, "call00001")  # the length of Mistral's ids
TAIL = 32  # tokens before an answer that say whether it begins inside of a thought


class AnswerReader:
    """Reads answers for tools.

    A tokenizer with a ``response_template`` is read by transformers' own `parse_response`, and where that fails for a
    malformed call by our table; others by the table, in the format in which the chat template writes a call. ValueError
    for a template that writes no calls, or writes them as nothing here reads them.
    """

    def __init__(self, chat: ChatFormat) -> None:
        self.chat, self.tokenizer = chat, chat.tokenizer
        written, begins = written_call(chat.renderer)
        ends = self.tokenizer.convert_ids_to_tokens(list(chat.end_ids))
        written = written[: min(at for at in (len(written), *map(written.find, ends)) if at >= 0)]
        self.format, self.table = next(
            ((name, read) for name, read in FORMATS.items() if _reads(read, written, begins)), ("", None)
        )
        self.takes = _takes(self.tokenizer)
        if self.table is None and not self.takes:
            rule = "the chat template writes calls in a form that nothing here reads (docs/tools.md lists the forms)"
            do = "give the tokenizer a response_template (transformers), or use --chat-template"
            raise ValueError(f"tools: {rule}: {do}; it writes {written[:100]!r}")

    def __call__(
        self, tokens: Sequence[int], before: Sequence[int], turn: int, tools: Sequence[Mapping[str, Any]] = ()
    ) -> Message:
        """The message that ``tokens`` say after the tokens ``before``; calls that cannot be read have their text as
        arguments. Ids of calls are those that were sampled, else made of turn and number."""
        reading = self._reading(list(tokens), list(before), tools)
        more: dict[str, Any] = {}
        clean = self.chat.without_special
        if reading.reasoning.strip():
            more["reasoning_content"] = clean(reading.reasoning).strip()
        if reading.calls:
            more["tool_calls"] = [_as_openai(call, turn, number) for number, call in enumerate(reading.calls)]
        content = clean(reading.content)
        return Message("assistant", content.strip() if more else content, more)

    def _reading(self, tokens: list[int], before: list[int], tools: Sequence[Mapping[str, Any]]) -> Reading:
        if self.takes:
            given: dict[str, Any] = {"prefix": before} | ({"tools": list(tools)} if "tools" in self.takes else {})
            try:
                return _of_parsed(self.tokenizer.parse_response(tokens, **given))
            except Exception:  # whatever a malformed call makes it raise
                if self.table is None:
                    return Reading("", "", (unread(self._text(tokens)),))
        assert self.table is not None
        thinking = _in_thought(self.tokenizer.decode(before[-TAIL:], skip_special_tokens=False))
        return self.table(self._text(tokens), parameters_of(tools), thinking)

    def _text(self, tokens: list[int]) -> str:
        """The answer with its special tokens, its end left out."""
        said = tokens[:-1] if tokens and tokens[-1] in self.chat.end_ids else tokens
        return self.tokenizer.decode(said, skip_special_tokens=False)


def parameters_of(tools: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Mapping[str, Any]]]:
    """The schema of every parameter of each function, by name."""
    return {str(function_of(tool).get("name")): properties_of(function_of(tool)) for tool in tools}


def properties_of(function: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The schema of every parameter of a function; those that are none say nothing."""
    parameters = function.get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
    found = properties if isinstance(properties, Mapping) else {}
    return {str(name): schema for name, schema in found.items() if isinstance(schema, Mapping)}


def written_call(renderer: Renderer) -> tuple[str, bool]:
    """A call as the chat template writes it, from the generation prompt on, and whether that ends inside of a thought.

    ValueError for a template that refuses it or leaves it out.
    """
    asked = renderer.before_answer([Message("user", "a")])
    reason = ""
    for arguments in (PROBE.arguments, json.dumps(PROBE.arguments)):  # some templates want text
        function = {"name": PROBE.name, "arguments": arguments}
        answer = {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": PROBE.id, "type": "function", "function": function}],
        }
        try:
            text = renderer.raw([ASK, answer])
        except Exception as error:
            reason = " ".join(str(error).split())[:100]
            continue
        if PROBE.name in text:
            return text[len(shared_start(asked, text)) :], _in_thought(asked)
    rule = "tools want a chat template that writes calls: use another model, or --chat-template"
    raise ValueError(f"{rule} ({reason or 'this one leaves them out'})")


def _reads(read: Reader, text: str, thinking: bool) -> bool:
    """Whether ``read`` finds the call that was written, and nothing else."""
    readings = (read(text, {}, begins) for begins in dict.fromkeys((thinking, False)))
    return any([call[:2] for call in reading.calls] == [PROBE[:2]] for reading in readings)


def _takes(tokenizer: Any) -> set[str]:
    """What `parse_response` takes beside the answer; nothing where the tokenizer has no template for it."""
    if getattr(tokenizer, "response_template", None) is None:
        return set()
    names = set(inspect.signature(tokenizer.parse_response).parameters)
    return names if "prefix" in names else set()


def _of_parsed(parsed: Any) -> Reading:
    """What transformers read. ValueError where a call of it is none."""
    found = [json_call(json_value(json.dumps(call))) for call in parsed.get("tool_calls") or ()]
    calls = tuple(call for call in found if call is not None)
    if len(calls) < len(found):
        raise ValueError("a call without a name")
    reasoning = next((parsed[name] for name in REASONING if isinstance(parsed.get(name), str)), "")
    return Reading(parsed.get("content") or "", reasoning, calls)


def _in_thought(text: str) -> bool:
    """Whether ``text`` ends inside of a thought."""
    last = [*OPENED.finditer(text)][-1:]
    return bool(last) and not CLOSED.search(text, last[0].end())


def made_id(turn: int, number: int) -> str:
    """The id of a call that has none: of nine characters, as Mistral's templates want them."""
    return f"c{turn % 10_000:04d}{number % 10_000:04d}"


def _as_openai(call: Call, turn: int, number: int) -> dict[str, Any]:
    made = made_id(turn, number)
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id if len(call.id) == len(made) else made, "type": "function", "function": function}
