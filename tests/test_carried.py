"""What messages carry beside their text, through chat templates as models have them: written and trained, or refused
by name."""

import json
import shutil

import pytest

pytest.importorskip("transformers")

import test_rewards
from chat_case import CHATML, byte_tokenizer, folder, tokenizer_of

from ppg_fast.dialogues import ChatFormat, Dialogue, Message, encode_dialogue, make_word_tokenizer
from ppg_fast.rewards import RewardModel, Transcript

reward_folder = test_rewards.reward_folder
needs_trl = pytest.mark.skipif(not folder(), reason="TRL's package carries the templates")
TOOLS = ({"type": "function", "function": {"name": "weather"}},)
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
ASK, RESULT = Message("user", "Weather in Rome?"), Message("tool", "12 C", {"tool_call_id": "c1"})
CALLED, SAID = Message("assistant", "", {"tool_calls": [CALL]}), Message("assistant", "It is 12 C.")
TALK = (ASK, CALLED, RESULT, SAID)
CHATML_TOKENS = ["<|im_start|>", "<|im_end|>"]

# as Mistral's templates ask for them: nine letters and digits, the same in call and result
NINE = """{% for m in messages %}{% if m.tool_calls %}{% for c in m.tool_calls %}{% if c.id | length != 9 %}
{{ raise_exception('ids of length 9') }}{% endif %}<|im_start|>assistant
{{ {'name': c.function.name, 'arguments': c.function.arguments, 'id': c.id} | tojson }}{% endfor %}<|im_end|>
{% elif m.role == 'tool' %}{% if m.tool_call_id | length != 9 %}{{ raise_exception('ids of length 9') }}{% endif %}
<|im_start|>tool
{{ m.tool_call_id }} {{ m.content }}<|im_end|>
{% else %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}{{ tools | tojson if tools }}"""
# arguments as text, and only without a content, as DeepSeek's first templates
TEXT = CHATML.replace(
    "{{ m.content }}",
    "{% if not m.content and m.tool_calls %}{% for c in m.tool_calls %}{{ c.function.name + c.function.arguments }}"
    "{% endfor %}"
    "{% else %}{{ m.content }}{% endif %}",
)


def chatml(template):
    return byte_tokenizer(template, CHATML_TOKENS, eos_token="<|im_end|>")


def dialogue(*messages, tools=()):
    return Dialogue("d", "g", messages, (1.0,) * sum(m.role == "assistant" for m in messages), tools)


def said(tokenizer, sample, turn):
    return tokenizer.decode([t for t, of in zip(sample.tokens, sample.turn_ids, strict=True) if of == turn])


def refused(act):
    with pytest.raises(ValueError, match="message") as found:
        act()
    assert "\n" not in str(found.value)
    assert len(str(found.value)) < 500
    return str(found.value)


@needs_trl
@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("qwen2_5", '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>'),
        ("qwen3", '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>'),
        ("llama3_2", '{"name": "weather", "parameters": {"city": "Rome"}}<|eot_id|>'),
        ("gptoss", ' to=functions.weather<|channel|>commentary json<|message|>{"city": "Rome"}<|call|>'),
    ],
)
def test_a_call_is_its_turns_and_trained(name, call):
    tokenizer = tokenizer_of(name)
    chat = ChatFormat(tokenizer)
    sample = encode_dialogue(chat, dialogue(*TALK, tools=TOOLS))
    assert said(tokenizer, sample, 0) == call
    context = said(tokenizer, sample, -1)
    assert "12 C" in context
    assert "weather" in context[: context.index("Weather in Rome?")] or name == "llama3_2"
    opening, reply = chat.opening([ASK], TOOLS), chat.reply(RESULT, TOOLS)
    assert sample.tokens[: len(opening)] == opening
    end = sample.turn_ids.index(1)
    block = len(tokenizer.encode("<think>\n\n</think>\n\n")) if name == "qwen3" else 0  # context, of a view of its own
    assert sample.tokens[end - block - len(reply) : end - block] == reply
    as_object = {**CALL, "function": {"name": "weather", "arguments": {"city": "Rome"}}}
    same = encode_dialogue(chat, dialogue(ASK, Message("assistant", "", {"tool_calls": [as_object]}), *TALK[2:]))
    assert said(tokenizer, same, 0) == call


@pytest.mark.parametrize("template", [NINE, TEXT], ids=["nine", "text"])
def test_calls_are_given_in_the_form_that_the_template_wants(template):
    tokenizer = chatml(template)
    chat = ChatFormat(tokenizer)
    sample = encode_dialogue(chat, dialogue(*TALK))
    call = said(tokenizer, sample, 0).removesuffix("<|im_end|>")
    if template is TEXT:
        assert call == 'weather{"city": "Rome"}'
        return
    made = json.loads(call)
    assert made["arguments"] == {"city": "Rome"}
    assert len(made["id"]) == 9
    assert f"{made['id']} 12 C" in said(tokenizer, sample, -1)
    assert len(chat.reply([RESULT, Message("tool", "3 C"), Message("user", "so?")])) > 30


@needs_trl
def test_results_of_several_tools_are_one_reply():
    tokenizer = tokenizer_of("qwen3")
    chat = ChatFormat(tokenizer)
    text = tokenizer.decode(chat.reply([RESULT, Message("tool", "3 C")], TOOLS))
    blocks = "\n<tool_response>\n12 C\n</tool_response>\n<tool_response>\n3 C\n</tool_response>"
    assert text == f"\n<|im_start|>user{blocks}<|im_end|>\n<|im_start|>assistant\n"
    assert chat.reply(ASK) == chat.reply([ASK])
    with pytest.raises(ValueError, match="a reply must have a message"):
        chat.reply([])
    rule = "a message of the system after an answer (message 1 of 2): the chat template leaves out"
    deepseek = ChatFormat(tokenizer_of("deepseek_r1_distill"))
    with pytest.raises(ValueError, match="a message of the system after an answer") as found:
        deepseek.reply([ASK, Message("system", "be kind")])
    assert str(found.value).startswith(rule)


THOUGHT = Message("assistant", "yes", {"reasoning": "well"})
LOST = [
    (CHATML, (ASK, CALLED), (), "message 1: the chat template leaves out tool call 0 ('weather')"),
    (CHATML, (ASK, THOUGHT), (), "message 1: the chat template leaves out the reasoning ('well')"),
    (CHATML, (ASK, SAID), TOOLS, "message 0: the chat template leaves out the tool 'weather'"),
    (CHATML, (Message("user", "hi", {"name": "Anna"}), SAID), (), "message 0: .* the name of the speaker ('Anna')"),
    (TEXT, (ASK, Message("assistant", "so", {"tool_calls": [CALL]})), (), "message 1: .* out tool call 0"),
    (
        CHATML.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}"),
        (ASK, Message("assistant", "<think>hm</think>yes")),
        (),
        "message 1: .* the reasoning in the content",
    ),
]


@pytest.mark.parametrize(("template", "messages", "tools", "rule"), LOST)
def test_what_the_template_does_not_write_is_refused_by_name(template, messages, tools, rule):
    chat = ChatFormat(chatml(template))
    text = refused(lambda: encode_dialogue(chat, dialogue(*messages, tools=tools)))
    head, _, tail = rule.partition(" .* ")
    assert text.startswith(f"dialogue 'd', {head}")
    assert tail in text
    if messages[-1] is SAID:
        assert refused(lambda: chat.opening(messages[:-1], tools)).startswith(head)


@pytest.mark.parametrize(
    ("messages", "tools", "rule"),
    [
        ((ASK, CALLED), (), "message 1: a tokenizer without a chat template writes role and content only, not tool_c"),
        ((ASK, THOUGHT), (), "message 1: a tokenizer without a chat template writes role and content only, not reaso"),
        ((ASK, SAID), TOOLS, "message 0: a tokenizer without a chat template writes no tools"),
    ],
)
def test_role_tokens_write_role_and_content_only(messages, tools, rule):
    chat = ChatFormat(make_word_tokenizer(["yes"]))
    assert refused(lambda: encode_dialogue(chat, dialogue(*messages, tools=tools))).startswith(f"dialogue 'd', {rule}")


def test_earlier_thoughts_may_be_left_out_of_the_history():
    """The template's view: an answer's own thoughts must be written where it is trained."""
    stripping = CHATML.replace(
        "{{ m.content }}", "{% if loop.last and m.thinking %}[{{ m.thinking }}]{% endif %}{{ m.content }}"
    )
    tokenizer = chatml(stripping)
    sample = encode_dialogue(tokenizer, dialogue(ASK, THOUGHT, ASK, THOUGHT))
    assert [said(tokenizer, sample, turn) for turn in (0, 1)] == ["[well]yes<|im_end|>"] * 2
    assert len(sample.starts) == 2


@needs_trl
@pytest.mark.parametrize(
    ("more", "key"),
    [
        ({"tool_calls": [{"function": {"name": "f<|im_end|>"}}]}, "tool_calls"),
        ({"tool_calls": [{"function": {"name": "f", "arguments": {"x": ["<|im_start|>"]}}}]}, "tool_calls"),
        ({"reasoning_content": "so<|im_end|>"}, "reasoning_content"),
    ],
)
def test_no_control_token_hides_in_what_a_message_carries(more, key):
    chat = ChatFormat(tokenizer_of("qwen2_5"))
    text = refused(lambda: encode_dialogue(chat, dialogue(ASK, Message("assistant", "", more))))
    assert f"message 1: {key} must not hold a special token of the tokenizer" in text
    with pytest.raises(ValueError, match="tools must not hold a special token of the tokenizer"):
        chat.opening([ASK], [{"type": "function", "function": {"name": "f", "description": "<|im_end|>"}}])


def test_a_last_call_without_an_end_is_refused():
    open_ended = CHATML.replace(
        "{{ m.content }}<|im_end|>\n",
        "{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}{% else %}{{ m.content }}<|im_end|>\n{% endif %}",
    )
    text = refused(lambda: encode_dialogue(chatml(open_ended), dialogue(ASK, CALLED)))
    assert text.startswith("dialogue 'd', message 1: the chat template must end the answer with a token that ends one")


def test_a_reward_model_reads_calls_or_says_that_it_cannot(reward_folder, tmp_path):
    """Its template would leave them out without a word, and the reward would be that of an empty answer."""
    call = {"type": "function", "function": {"name": "one", "arguments": {"x": "t<end>wo"}}}
    talk = Transcript("called", (Message("user", "one"), Message("assistant", "", {"tool_calls": [call]})))
    with pytest.raises(ValueError, match=r"must write tool calls, it leaves out those of dialogue 'called'"):
        RewardModel(str(reward_folder))([talk])
    shutil.copytree(reward_folder, tmp_path, dirs_exist_ok=True)
    template = "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls %} CALL{% endfor %}{% endfor %}"
    template = template.replace("CALL", "{{ c.function.name }} {{ c.function.arguments.x }}")
    (tmp_path / "chat_template.jinja").write_text(template)
    reward = RewardModel(str(tmp_path))
    plain = Transcript("plain", (Message("user", "one"), Message("assistant", " one two")))
    assert reward([talk]) == reward([plain])
