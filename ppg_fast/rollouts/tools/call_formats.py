"""How models write calls: a table of well-known formats. Which of them is a template's, the template says itself."""

import ast
import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ppg_fast.rollouts.tools.reading import (
    Call,
    Reading,
    json_call,
    json_calls,
    json_value,
    named_call,
    unread,
    value_of,
)

Parameters = Mapping[str, Mapping[str, Any]]  # of each function by name, the schema of each of its parameters
Found = tuple[int, int, list[Call]]  # where calls begin and end in a text, and what they are
Find = Callable[[str, Parameters], Iterator[Found]]
Reader = Callable[[str, Parameters, bool], Reading]  # of a text; whether it begins inside of a thought

OPENED = re.compile(r"\s*(?:<think>|<\|START_THINKING\|>)")
CLOSED = re.compile(r"</think>|<\|END_THINKING\|>")


def reader(find: Find) -> Reader:
    """Thoughts come first and hold no calls; what is neither thought nor call is content."""

    def read(text: str, parameters: Parameters, thinking: bool = False) -> Reading:
        opened = OPENED.match(text)
        start, thought = opened.end() if opened else 0, ""
        if thinking or opened:
            closed = CLOSED.search(text, start)
            thought, start = text[start : closed.start() if closed else None], closed.end() if closed else len(text)
        rest, said, last, calls = text[start:], "", 0, []
        for begins, ends, found in find(rest, parameters):
            said, last = said + rest[last:begins], ends
            calls += found
        return Reading(said + rest[last:], thought.strip(), tuple(calls))

    return read


def tagged(opening: str, closing: str) -> Find:
    """JSON between two tags; the last may be left out at the end of an answer."""
    at = re.compile(f"{re.escape(opening)}(.*?)(?:{re.escape(closing)}|$)", re.DOTALL)

    def find(text: str, _: Parameters) -> Iterator[Found]:
        for match in at.finditer(text):
            yield match.start(), match.end(), json_calls(match[1])

    return find


def marked_up(call: str, parameter: str, end: str) -> Find:
    """One element a parameter inside of one element a call, values as they are. ``call``: its ``name`` and its
    ``body``; ``parameter``: its ``key`` and its ``value``; ``end``: what may stand after the last one."""
    at, inside, after = (re.compile(pattern, re.DOTALL) for pattern in (call, parameter, end))

    def find(text: str, parameters: Parameters) -> Iterator[Found]:
        for match in at.finditer(text):
            name, body = (match["name"] or "").strip(), match["body"]
            known = parameters.get(name, {})
            pairs = {p["key"].strip(): value_of(p["value"], known.get(p["key"].strip())) for p in inside.finditer(body)}
            whole = bool(name) and after.fullmatch(inside.sub("", body)) is not None
            yield match.start(), match.end(), [Call(name, pairs) if whole else unread(match[0], name)]

    return find


QWEN_XML = marked_up(
    r"<tool_call>\s*(?:<function=(?P<name>[^>\n]*)>)?(?P<body>.*?)(?:</tool_call>|$)",
    r"<parameter=(?P<key>[^>\n]+)>\n?(?P<value>.*?)\n?</parameter>",
    r"\s*(?:</function>)?\s*",
)
GLM = marked_up(
    r"<tool_call>\s*(?P<name>[^\s<]*)(?P<body>.*?)(?:</tool_call>|$)",
    r"<arg_key>(?P<key>[^<]+)</arg_key>\s*<arg_value>(?P<value>.*?)</arg_value>",
    r"\s*",
)
INVOKE = marked_up(
    r"(?:\s*to=[^\s<]+<\|message\|>)?(?:<[\w:]*(?:function_calls|tool_call)>\s*)?"
    r'<(?:\w+:)?invoke name="(?P<name>[^"\n]*)">(?P<body>.*?)'
    r"(?:</(?:\w+:)?invoke>(?:\s*</[\w:]*(?:function_calls|tool_call)>)?|$)",
    r'<(?:\w+:)?parameter name="(?P<key>[^"\n]+)">(?P<value>.*?)</(?:\w+:)?parameter>',
    r"\s*",
)

BARE = re.compile(r"\s*(<\|python_tag\|>)?\s*(?=\{)|\s*(<\|python_tag\|>)")
BARE_CALL = re.compile(r'\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*"[^"]*"\s*,\s*"(?:parameters|arguments)"')


def bare_json(text: str, _: Parameters) -> Iterator[Found]:
    """Llama 3: the answer is one JSON object with name and parameters, or several with semicolons between them."""
    begins = BARE.match(text)
    if not begins:
        return
    tagged, at, calls = bool(begins[1] or begins[2]), begins.end(), []
    while at < len(text.rstrip()):
        found = _object_at(text, at)
        call = json_call(found[0]) if found and {"parameters", "arguments"} & found[0].keys() else None
        if found is None or call is None:
            if calls or tagged or BARE_CALL.match(text, at):  # a plain object is an answer like any other
                calls.append(unread(text[at:]))
                at = len(text)
            break
        calls.append(call)
        at = found[1] + len(re.compile(r"[\s;]*").match(text, found[1])[0])  # type: ignore[index]
    if calls:
        yield 0, at, calls


def _object_at(text: str, start: int) -> tuple[dict[str, Any], int] | None:
    """The JSON object that begins at ``start``, and where it ends."""
    try:
        _, end = json.JSONDecoder().raw_decode(text, start)
        value = json_value(text[start:end])
    except (ValueError, RecursionError):
        return None
    return (value, end) if isinstance(value, dict) else None


MISTRAL = re.compile(r"\[TOOL_CALLS\](?P<body>.*?)(?=\[TOOL_CALLS\]|$)", re.DOTALL)
MISTRAL_NAMED = re.compile(
    r"\s*(?P<name>[\w.-]+)\s*(?:\[CALL_ID\](?P<id>\w*))?\s*(?:\[ARGS\])?\s*(?P<arguments>\{.*)", re.DOTALL
)


def mistral(text: str, _: Parameters) -> Iterator[Found]:
    """After the mark a JSON list of calls, or a name and its arguments."""
    for match in MISTRAL.finditer(text):
        named = MISTRAL_NAMED.fullmatch(match["body"])
        if not named:
            calls = json_calls(match["body"])
        else:
            calls = [named_call(named["name"], named["arguments"])._replace(id=named["id"] or "")]
        yield match.start(), match.end(), calls


DEEPSEEK = re.compile(
    r"(?:<\uff5ctool▁calls▁begin\uff5c>\s*)?<\uff5ctool▁call▁begin\uff5c>(?P<first>.*?)<\uff5ctool▁sep\uff5c>"
    r"(?P<second>.*?)(?:<\uff5ctool▁call▁end\uff5c>\s*(?:<\uff5ctool▁calls▁end\uff5c>)?|$)",
    re.DOTALL,
)
FENCED = re.compile(r"(?P<name>[^\n]*)\n```(?:json)?\n(?P<arguments>.*?)\n?```\s*", re.DOTALL)


def deepseek(text: str, _: Parameters) -> Iterator[Found]:
    """V3: kind, name, and a fenced block of JSON; V3.1: name, and JSON."""
    for match in DEEPSEEK.finditer(text):
        fenced = FENCED.fullmatch(match["second"])
        name = (fenced["name"] if fenced else match["first"]).strip()
        yield match.start(), match.end(), [named_call(name, fenced["arguments"] if fenced else match["second"])]


KIMI = re.compile(
    r"(?:<\|tool_calls_section_begin\|>\s*)?<\|tool_call_begin\|>\s*(?:functions\.)?(?P<name>[\w.-]*?)(?::\d+)?\s*"
    r"(?:<\|tool_call_argument_begin\|>(?P<arguments>.*?))?"
    r"(?:<\|tool_call_end\|>\s*(?:<\|tool_calls_section_end\|>)?|$)",
    re.DOTALL,
)


def kimi(text: str, _: Parameters) -> Iterator[Found]:
    """Name and number, and JSON."""
    for match in KIMI.finditer(text):
        given = match["arguments"]
        yield match.start(), match.end(), [named_call(match["name"], "-" if given is None else given)]


PYTHON = re.compile(r"<\|tool_call_start\|>(.*?)(?:<\|tool_call_end\|>|$)", re.DOTALL)


def pythonic(text: str, _: Parameters) -> Iterator[Found]:
    """LFM2: a Python list of calls with keywords."""
    for match in PYTHON.finditer(text):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of what the policy's text would be as a program
                tree = ast.parse(match[1].strip(), mode="eval").body
            calls = [
                _python_call(node, match[1].strip()) for node in (tree.elts if isinstance(tree, ast.List) else [tree])
            ]
        except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
            calls = []
        yield match.start(), match.end(), calls or [unread(match[1])]


def _python_call(node: ast.expr, text: str) -> Call:
    if not isinstance(node, ast.Call) or node.args or any(word.arg is None for word in node.keywords):
        raise ValueError("no call with keywords")
    return Call(ast.unparse(node.func), {str(word.arg): _python_value(word.value, text) for word in node.keywords})


def _python_value(node: ast.expr, text: str) -> Any:
    """A Python literal, or JSON, which templates write where a value is an object."""
    try:
        value = ast.literal_eval(node)
    except ValueError:
        return json_value(ast.get_source_segment(text, node) or "")
    return json_value(json.dumps(value, allow_nan=False))


GEMMA = re.compile(r"<\|tool_call>call:(?P<name>[\w.-]*)(?P<body>.*?)(?:<tool_call\|>|$)", re.DOTALL)


def gemma(text: str, _: Parameters) -> Iterator[Found]:
    """Gemma 4: JSON without quotes around keys, and with a token of its own around texts."""
    for match in GEMMA.finditer(text):
        parts = match["body"].split('<|"|>')
        for i, part in enumerate(parts):
            parts[i] = json.dumps(part) if i % 2 else re.sub(r"([{,]\s*)(\w+)(\s*:)", r'\1"\2"\3', part)
        yield match.start(), match.end(), [named_call(match["name"], "".join(parts))]


HARMONY = re.compile(
    r"(?:<\|start\|>assistant)?\s*(?:to=(?P<to>\S+?)\s*)?<\|channel\|>(?P<channel>\w+)"
    r"(?:\s*to=(?P<at>[^\s<]+))?\s*(?:<\|constrain\|>)?\s*(?:\w+)?\s*<\|message\|>"
    r"(?P<body>.*?)(?:<\|end\|>|<\|call\|>|<\|return\|>|$)",
    re.DOTALL,
)


def harmony(text: str, _: Parameters, thinking: bool = False) -> Reading:
    """gpt-oss: messages of channels; one that is sent to a function is a call, and ends the answer."""
    thoughts, said, calls, last = [], [], [], 0
    for match in HARMONY.finditer(text):
        before, last = text[last : match.start()], match.end()
        to = match["to"] or match["at"] or ""
        if to.startswith("functions."):
            calls.append(named_call(to.removeprefix("functions."), match["body"]))
            break
        said += [before] if match["channel"] == "analysis" else [before, match["body"]]
        thoughts += [match["body"]] if match["channel"] == "analysis" else []
    if not calls and "to=functions." in text[last:]:  # a call without its head
        calls, last = [unread(text[last:])], len(text)
    return Reading("".join([*said, text[last:]]), "\n".join(thoughts), tuple(calls))


FORMATS: dict[str, Reader] = {
    "JSON in <tool_call> (Hermes, Qwen2.5, Qwen3, SmolLM3)": reader(tagged("<tool_call>", "</tool_call>")),
    "XML in <tool_call> (Qwen3-Coder, Qwen3.5, Nemotron 3)": reader(QWEN_XML),
    "keys and values in <tool_call> (GLM 4)": reader(GLM),
    "a JSON object (Llama 3)": reader(bare_json),
    "[TOOL_CALLS] (Mistral)": reader(mistral),
    "harmony (gpt-oss)": harmony,
    "tool calls in tokens (DeepSeek V3)": reader(deepseek),
    "Python calls (LFM2)": reader(pythonic),
    "call:NAME (Gemma 4)": reader(gemma),
    "JSON in <|tool_call|> (Phi-4, Granite)": reader(tagged("<|tool_call|>", "<|/tool_call|>")),
    "invoke elements (Muse, MiniMax)": reader(INVOKE),
    "sections of tokens (Kimi K2)": reader(kimi),
    "JSON in <|START_ACTION|> (Command R7B)": reader(tagged("<|START_ACTION|>", "<|END_ACTION|>")),
}
