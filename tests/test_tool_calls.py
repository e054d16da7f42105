"""How calls are read: every format of the table, what is malformed in each, and any text at all."""

import json

import pytest

pytest.importorskip("transformers")

from chat_case import folder
from fuzz import fuzz
from hypothesis import given
from hypothesis import strategies as st
from tools_case import tiny

from ppg_fast.dialogues import Message
from ppg_fast.rollouts.tools.answer_reader import PROBE, AnswerReader, written_call
from ppg_fast.rollouts.tools.call_formats import FORMATS
from ppg_fast.rollouts.tools.calling import outcome, text_of, wrong_type
from ppg_fast.rollouts.tools.reading import Call, types_of

BAR = "\uff5c"
NAMES = {name.partition(" (")[2].rstrip(")").partition(",")[0]: name for name in FORMATS}
SCHEMA = {
    "look": {
        "word": {"type": "string"},
        "count": {"type": "integer"},
        "deep": {"type": "object"},
        "on": {"type": "boolean"},
    }
}
PLAIN = {"word": 'a "b" <c>', "count": 3, "deep": {"x": [1, None]}, "on": True}
JSON = json.dumps(PLAIN)


def deepseek(text):
    return text.replace("<|", f"<{BAR}").replace("|>", f"{BAR}>")


TWO = {  # of each format, an answer of two calls, the second without arguments; what else it says
    "Hermes": (
        f'Look:\n<tool_call>\n{{"name": "look", "arguments": {JSON}}}\n</tool_call>\n'
        '<tool_call>{"name": "none", "arguments": {}}</tool_call>',
        "Look:",
    ),
    "Qwen3-Coder": (
        'Look:\n<tool_call>\n<function=look>\n<parameter=word>\na "b" <c>\n</parameter>\n<parameter=count>\n3\n'
        "</parameter>"
        '\n<parameter=deep>\n{"x": [1, null]}\n</parameter>\n<parameter=on>\nTrue\n</parameter>\n</function>\n'
        "</tool_call>\n"
        "<tool_call>\n<function=none>\n</function>\n</tool_call>",
        "Look:",
    ),
    "GLM 4": (
        'Look:\n<tool_call>look\n<arg_key>word</arg_key>\n<arg_value>a "b" <c></arg_value>\n<arg_key>count</arg_key>\n'
        '<arg_value>3</arg_value>\n<arg_key>deep</arg_key>\n<arg_value>{"x": [1, null]}</arg_value>\n'
        "<arg_key>on</arg_key>\n<arg_value>true</arg_value>\n</tool_call>\n<tool_call>none</tool_call>",
        "Look:",
    ),
    "Llama 3": (f'<|python_tag|>{{"name": "look", "parameters": {JSON}}}; {{"name": "none", "parameters": {{}}}}', ""),
    "Mistral": (
        f'Look:[TOOL_CALLS] [{{"name": "look", "arguments": {JSON}}}, {{"name": "none", "arguments": {{}}}}]',
        "Look:",
    ),
    "DeepSeek V3": (
        deepseek(
            f"Look:<|tool▁calls▁begin|><|tool▁call▁begin|>function<|tool▁sep|>look\n```json\n{JSON}\n```<|tool▁call▁end|>\n"
            "<|tool▁call▁begin|>function<|tool▁sep|>none\n```json\n{}\n```<|tool▁call▁end|><|tool▁calls▁end|>"
        ),
        "Look:",
    ),
    "LFM2": (
        'Look:<|tool_call_start|>[look(word=\'a "b" <c>\', count=3, deep={"x": [1, null]}, on=True), none()]'
        "<|tool_call_end|>",
        "Look:",
    ),
    "Gemma 4": (
        'Look:<|tool_call>call:look{word:<|"|>a "b" <c><|"|>,count:3,deep:{x:[1,null]},on:true}<tool_call|>'
        "<|tool_call>call:none{}<tool_call|>",
        "Look:",
    ),
    "Phi-4": (
        f'Look:<|tool_call|>[{{"name": "look", "arguments": {JSON}}}, {{"name": "none"}}]<|/tool_call|>',
        "Look:",
    ),
    "Kimi K2": (
        f"Look:<|tool_calls_section_begin|><|tool_call_begin|>functions.look:0<|tool_call_argument_begin|>{JSON}"
        "<|tool_call_end|><|tool_call_begin|>functions.none:1<|tool_call_argument_begin|>{}<|tool_call_end|>"
        "<|tool_calls_section_end|>",
        "Look:",
    ),
    "Command R7B": (
        f'Look:<|START_ACTION|>[{{"tool_call_id": "0", "tool_name": "look", "parameters": {JSON}}}, '
        '{"tool_call_id": "1", "tool_name": "none", "parameters": {}}]<|END_ACTION|>',
        "Look:",
    ),
    "Muse": (
        '<atem:invoke name="look">\n<atem:parameter name="word">a "b" <c></atem:parameter>\n'
        '<atem:parameter name="count">3</atem:parameter>\n'
        '<atem:parameter name="deep">{"x": [1, null]}</atem:parameter>\n'
        '<atem:parameter name="on">true</atem:parameter>\n</atem:invoke>\n<atem:invoke name="none">\n</atem:invoke>',
        "",
    ),
}


@pytest.mark.parametrize("form", TWO)
def test_each_format_reads_its_calls(form):
    text, content = TWO[form]
    reading = FORMATS[NAMES[form]](text, SCHEMA, False)
    assert reading.calls == (Call("look", PLAIN), Call("none", {}))
    assert reading.content.strip() == content
    thought = FORMATS[NAMES[form]](f"<think>\nnot {text}\n</think>\n\n{text}", SCHEMA, False)
    assert thought.calls == reading.calls, "thoughts hold no calls"
    assert thought.reasoning == f"not {text}".strip()
    unfinished = FORMATS[NAMES[form]](text, SCHEMA, True)
    assert (unfinished.calls, unfinished.content) == ((), ""), "cut off in the middle of a thought"


def test_harmony_reads_both_ways_of_naming_the_function_and_one_call():
    read = FORMATS[NAMES["gpt-oss"]]
    thought = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant"
    for head in (
        " to=functions.look<|channel|>commentary json<|message|>",
        "<|channel|>commentary to=functions.look <|constrain|>json<|message|>",
        "<|channel|>commentary to=functions.look<|message|>",
    ):
        assert read(f"{thought}{head}{JSON}<|call|>", SCHEMA, False)[1:] == ("hm", (Call("look", PLAIN),))
        assert read(f"{head}{JSON}", SCHEMA, False).calls == (Call("look", PLAIN),)
    said = read(
        f"{thought}<|channel|>commentary<|message|>So.<|end|><|start|>assistant<|channel|>final<|message|>Hi", {}, False
    )
    assert said == ("So.Hi", "hm", ())
    assert read("<|channel|>commentary to=functions.look", {}, False).calls[0].arguments


def test_mistral_reads_names_before_arguments_and_ids():
    read = FORMATS[NAMES["Mistral"]]
    text = f"[TOOL_CALLS]look[CALL_ID]abcdefghi[ARGS]{JSON}[TOOL_CALLS]none{{}}"
    assert read(text, SCHEMA, False).calls == (Call("look", PLAIN, "abcdefghi"), Call("none", {}))
    listed = '[TOOL_CALLS] [{"name": "look", "arguments": {}, "id": "abcdefghi"}]'
    assert read(listed, SCHEMA, False).calls == (Call("look", {}, "abcdefghi"),)


def test_deepseeks_newer_form():
    text = deepseek(f"<|tool▁calls▁begin|><|tool▁call▁begin|>look<|tool▁sep|>{JSON}<|tool▁call▁end|><|tool▁calls▁end|>")
    assert FORMATS[NAMES["DeepSeek V3"]](text, SCHEMA, False).calls == (Call("look", PLAIN),)


@pytest.mark.parametrize(
    ("form", "text", "name"),
    [
        ("Hermes", '<tool_call>\n{"name": "look", "arguments": {"word": ', "look"),
        ("Hermes", "<tool_call></tool_call>", ""),
        ("Hermes", '<tool_call>{"name": "look", "arguments": [1]}</tool_call>', "look"),
        ("Hermes", '<tool_call>{"name": "look", "arguments": {"count": NaN}}</tool_call>', "look"),
        ("Hermes", '<tool_call>{"name": "look", "arguments": {"count": 1e999}}</tool_call>', "look"),
        ("Hermes", '<tool_call>{"name": "look", "arguments": {"word": "\\ud800"}}</tool_call>', "look"),
        ("Hermes", '<tool_call>{"name": "look", "arguments": {"count": ' + "9" * 5000 + "}}</tool_call>", "look"),
        ("Hermes", '<tool_call>{"name": "look", "arguments": ' + "[" * 9000 + "}</tool_call>", "look"),
        ("Hermes", '<tool_call>{"name": "look", "arguments": {"a":' + "[" * 40 + "]" * 40 + "}}</tool_call>", "look"),
        ("Qwen3-Coder", "<tool_call>\n<function=look>\n<parameter=word>\nhalf", "look"),
        ("Qwen3-Coder", "<tool_call>\nlook\n</tool_call>", ""),
        ("GLM 4", "<tool_call>look\n<arg_key>word</arg_key>\n<arg_value>half", "look"),
        ("Llama 3", '{"name": "look", "parameters": {"word": ', "look"),
        ("Llama 3", "<|python_tag|>print(1)", ""),
        ("Mistral", "[TOOL_CALLS]", ""),
        ("Mistral", "[TOOL_CALLS]look{", "look"),
        ("LFM2", "<|tool_call_start|>[look(3)]<|tool_call_end|>", ""),
        ("LFM2", "<|tool_call_start|>[look(word=f())]<|tool_call_end|>", ""),
        ("LFM2", "<|tool_call_start|>[]<|tool_call_end|>", ""),
        ("Gemma 4", '<|tool_call>call:look{word:<|"|>half', "look"),
        ("gpt-oss", " to=functions.look<|channel|>commentary json<|message|>{", "look"),
        ("Muse", '<atem:invoke name="look">\n<atem:parameter name="word">half', "look"),
    ],
)
def test_what_cannot_be_read_is_a_call_all_the_same(form, text, name):
    (call,) = FORMATS[NAMES[form]](text, SCHEMA, False).calls
    assert call.name == name
    assert isinstance(call.arguments, str)


@pytest.mark.parametrize(
    "text", ['{"name": "Bob", "age": 3}', "{", "{ this } is text", '{"a": 1} is what I mean', "I may say <tool_calls>."]
)
def test_an_answer_in_braces_is_an_answer(text):
    for form in ("Llama 3", "Hermes", "Mistral"):
        assert FORMATS[NAMES[form]](text, SCHEMA, False) == (text, "", ())


# ---- arguments and results -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"type": "integer"}, [3, 3.0], ["3", 3.5, True, None]),
        ({"type": "number"}, [3, 3.5], ["3", False]),
        ({"type": "string"}, [""], [3, None, []]),
        ({"type": "string", "nullable": True}, ["", None], [3]),
        ({"type": ["string", "integer"]}, ["", 3], [3.5, {}]),
        ({"anyOf": [{"type": "array"}, {"type": "null"}]}, [[], None], ["", 3]),
        ({"anyOf": [{"type": "array"}, {}]}, [[], None, ""], []),
        ({"type": "string", "enum": ["a", "b"]}, ["a"], ["c"]),
        ({"enum": [1, 2]}, [1], [3]),
        ({}, [3, "", None, []], []),
        ({"type": "image"}, [3, ""], []),
        ("none", [3, ""], []),
    ],
)
def test_types_of_arguments(schema, good, bad):
    function = {"parameters": {"properties": {"x": schema}}}
    assert [value for value in good if wrong_type({"x": value}, function)] == []
    assert [value for value in bad if not wrong_type({"x": value}, function)] == []
    assert wrong_type({"y": 3}, function) == ""
    assert wrong_type({"x": 3}, {"parameters": [1]}) == ""


def test_results_as_text():
    texts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    values = ["x", 3, 2.5, None, True, {"a": "\u00e9"}, [1, "b"], texts, {1}]
    assert list(map(text_of, values)) == ["x", "3", "2.5", "None", "True", '{"a": "\u00e9"}', '[1, "b"]', "ab", "{1}"]
    with pytest.raises(TypeError, match="must be text"):
        text_of([{"type": "image", "image": 3}])


# ---- any text --------------------------------------------------------------------------------------------------------
PIECES = st.sampled_from(
    [
        *(
            "<tool_call>",
            "</tool_call>",
            "<function=look>",
            "</function>",
            "<parameter=word>",
            "</parameter>",
            '"name"',
        ),
        *("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", ": "),
        *("to=functions.look", "<|channel|>", "commentary json", "<|message|>", "<|call|>", "<|end|>", "analysis"),
        *(deepseek("<|tool▁call▁begin|>"), deepseek("<|tool▁sep|>"), "```json\n", "<|tool_call_start|>", "[look(word="),
        *("<|tool_call>call:look", '<|"|>', "<tool_call|>", "<think>", "</think>", "{", "}", "[", "]", ")", ",", "\n"),
        *('{"name": "look", "arguments": {"word": "x"}}', '{"name": "look", "parameters": {}}', "\x00", "\ud7ff", "'"),
        *(
            '<atem:invoke name="look">',
            '<atem:parameter name="word">',
            "</atem:parameter>",
            "</atem:invoke>",
            "\\",
            "1e9",
        ),
    ]
)
TEXTS = st.lists(PIECES | st.text(max_size=5), max_size=14).map("".join)
TOOLS = [
    {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": SCHEMA["look"]}}}
]


def look(**arguments):
    return arguments.get("word", 1 / 0)


@fuzz(200)
@given(TEXTS, st.booleans(), st.sampled_from(sorted(FORMATS)))
def test_any_text_has_a_reading_and_every_call_an_outcome(text, thinking, form):
    reading = FORMATS[form](text, SCHEMA, thinking)
    for call in reading.calls:
        function = {"name": call.name, "arguments": call.arguments}
        message = Message(
            "assistant", "", {"tool_calls": [{"id": "c00000000", "type": "function", "function": function}]}
        )
        found = outcome(message.tool_calls[0], {"look": look}, {"look": TOOLS[0]})
        assert len(found.text) < 600 or not found.failed
        Message("tool", found.text)


@pytest.mark.skipif(folder() is None, reason="TRL's package carries the templates")
@pytest.mark.parametrize(
    "name", ["qwen2_5", "qwen3_6", "nemotron_3_nano", "gemma4", "lfm2_2_5", "muse_glimmer", "llama3_1"]
)
def test_what_a_template_writes_is_read_back(name):
    """With the tokens that it has for it, behind its own generation prompt."""
    _, chat = tiny(name)
    text, _ = written_call(chat.renderer)
    asked = chat.renderer.encode(chat.renderer.before_answer([Message("user", "a")]))
    end = min(at + len(token) for token in names(chat) if (at := text.find(token)) >= 0)
    read = AnswerReader(chat)(chat.renderer.encode(text[:end]), asked, 0)
    (call,) = read.tool_calls
    assert call["function"] == {"name": PROBE.name, "arguments": PROBE.arguments}
    assert (read.content, read.reasoning) == ("", "")


def names(chat):
    return chat.tokenizer.convert_ids_to_tokens(list(chat.end_ids))


@pytest.mark.skipif(folder() is None, reason="TRL's package carries the templates")
@pytest.mark.parametrize("name", ["qwen3", "gptoss"])
def test_any_tokens_have_a_reading(name):
    from trl import chat_template_utils

    _, chat = tiny(name)
    plain = AnswerReader(chat)
    chat.tokenizer.response_template = getattr(chat_template_utils, f"{name}_template")
    parsed = AnswerReader(chat)
    chat.tokenizer.response_template = None
    before = chat.opening([Message("user", "a")], TOOLS)

    @fuzz(60)
    @given(st.lists(st.integers(0, len(chat.tokenizer) - 1), max_size=20), TEXTS)
    def check(tokens, text):
        for said in (tokens, [*chat.renderer.encode(text), chat.end_id]):
            for read in (plain, parsed):
                message = read(said, before, 3, TOOLS)
                assert message.role == "assistant"
                chat.renderer.check(Message("assistant", message.content))

    check()


def test_types_of_a_schema():
    assert types_of({"anyOf": [{"type": "string"}, {"type": ["integer", "null"]}]}) == ("string", "integer", "null")
    assert types_of({"type": "string", "nullable": True}) == ("string", "null")
    assert types_of({"type": 3}) == ()
