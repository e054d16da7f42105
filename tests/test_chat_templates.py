"""Chat templates as models have them (those that TRL's package carries): where answers end, what they may hold, what
is trained, and that whatever cannot be written is refused by name."""

import re
from types import SimpleNamespace

import pytest

pytest.importorskip("transformers")

from chat_case import CHATML, byte_tokenizer, folder, tokenizer_of

from ppg_fast.dialogues import ChatFormat, Dialogue, Message, encode_dialogue
from ppg_fast.dialogues.renderer import Renderer

needs_trl = pytest.mark.skipif(folder() is None, reason="TRL's package carries the templates")
SYSTEM, ASK, ANSWER, GO, BYE = (
    Message("system", "be kind"),
    Message("user", "hello you"),
    Message("assistant", "good day"),
    Message("user", "and now?"),
    Message("assistant", "farewell"),
)
TALK = (ASK, ANSWER, GO, BYE)


def dialogue(*messages):
    turns = sum(m.role == "assistant" for m in messages)
    return Dialogue("d", "g", messages, (1.0,) * turns)


def turns(tokenizer, sample):
    """What the tokens of each turn say."""
    return [
        tokenizer.decode([t for t, of in zip(sample.tokens, sample.turn_ids, strict=True) if of == turn])
        for turn in range(len(sample.rewards))
    ]


def written(tokenizer, messages, **settings):
    """The tokens; content as parts where the template wants it so (models that see)."""
    conversation = [m.as_dict() for m in messages]
    if (
        "content'] %}{% if line['type']" in tokenizer.chat_template
        or "message['content'][0]" in tokenizer.chat_template
    ):
        conversation = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in conversation]
    return tokenizer.apply_chat_template(conversation, tokenize=True, return_dict=False, **settings)


# ---- ends and sayable tokens -----------------------------------------------------------------------------------------
ENDS = {  # the models' own generation configs and documentation
    "phi3": "<|end|>",
    "phi3_5": "<|end|>",
    "gptoss": "<|return|>",
    "cohere2": "<|END_OF_TURN_TOKEN|>",
    "qwen2_5": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "llama3_2": "<|eot_id|>",
    "gemma": "<end_of_turn>",
    "gemma3": "<end_of_turn>",
    "deepseek_r1_distill": "<\uff5cend▁of▁sentence\uff5c>",
    "nemotron_3_nano": "<|im_end|>",
    "lfm2": "<|im_end|>",
}
SAID = {  # special tokens inside of the models' answers
    "gptoss": {"<|start|>", "<|channel|>", "<|message|>", "<|end|>"},
    "cohere2": {"<|END_RESPONSE|>"},
    "lfm2_2_5": {"<|tool_call_start|>", "<|tool_call_end|>"},
    "deepseekv3_training": {
        "<\uff5ctool▁calls▁begin\uff5c>",
        "<\uff5ctool▁call▁begin\uff5c>",
        "<\uff5ctool▁sep\uff5c>",
    },
}


@needs_trl
@pytest.mark.parametrize("name", ENDS)
def test_an_answer_ends_where_the_model_ends_one(name):
    tokenizer = tokenizer_of(name)
    chat = ChatFormat(tokenizer)
    assert tokenizer.convert_ids_to_tokens(chat.end_id) == ENDS[name]
    assert not set(chat.end_ids) & set(chat.banned_token_ids(len(tokenizer)))


@needs_trl
@pytest.mark.parametrize("name", SAID)
def test_tokens_inside_of_answers_can_be_said_and_others_cannot(name):
    tokenizer = tokenizer_of(name)
    banned = set(tokenizer.convert_ids_to_tokens(ChatFormat(tokenizer).banned_token_ids(len(tokenizer))))
    assert not SAID[name] & banned
    assert tokenizer.bos_token in banned


def test_the_generation_config_has_ends_too():
    tokenizer = byte_tokenizer(CHATML, ["<|im_start|>", "<|im_end|>", "<|stop|>"], eos_token="<|endoftext|>")
    stop, eos = tokenizer.convert_tokens_to_ids(["<|stop|>", "<|endoftext|>"])
    own = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for given, ends in (([stop, eos], (own, stop, eos)), (stop, (own, stop)), (None, (own,))):
        chat = ChatFormat(tokenizer, SimpleNamespace(eos_token_id=given))
        assert chat.end_ids == ends
        assert not set(ends) & set(chat.banned_token_ids(len(tokenizer)))
    assert chat.decode([*tokenizer("hi")["input_ids"], own]) == "hi"


# ---- what is trained -------------------------------------------------------------------------------------------------
@needs_trl
@pytest.mark.parametrize("name", ["llama3_training", "qwen2_5_training", "gemma_training", "phi3_training"])
def test_trained_tokens_are_those_of_the_templates_own_generation_marks(name):
    """transformers' assistant mask, from marks in the template, knows nothing of ends or of generation prompts."""
    tokenizer = tokenizer_of(name)
    sample = encode_dialogue(tokenizer, dialogue(*TALK))
    marked = tokenizer.apply_chat_template(
        [m.as_dict() for m in TALK], return_dict=True, return_assistant_tokens_mask=True
    )
    assert sample.tokens == marked["input_ids"]
    masked = [t for t, of in zip(marked["input_ids"], marked["assistant_masks"], strict=True) if of]
    trained = [t for t, of in zip(sample.tokens, sample.turn_ids, strict=True) if of >= 0]
    after_the_end = set(tokenizer("\n")["input_ids"]) | {tokenizer.eos_token_id}
    assert [t for t in masked if t not in after_the_end] == [t for t in trained if t not in after_the_end]
    assert turns(tokenizer, sample) == [f"{m.content}{ENDS[name.removesuffix('_training')]}" for m in (ANSWER, BYE)]


@needs_trl
@pytest.mark.parametrize("name", ["llama3_2", "qwen2_5", "gemma3", "phi3", "phi3_5", "lfm2"])
def test_on_policy_and_offline_are_the_same_tokens(name):
    tokenizer = tokenizer_of(name)
    chat = ChatFormat(tokenizer)
    spoken = [*chat.opening([ASK]), *chat.answer(ANSWER.content), *chat.reply(GO), *chat.answer(BYE.content)]
    assert encode_dialogue(chat, dialogue(*TALK)).tokens[: len(spoken)] == spoken
    assert spoken[: -len(chat.answer(BYE.content))] == written(tokenizer, TALK[:3], add_generation_prompt=True)


@needs_trl
@pytest.mark.parametrize("name", ["qwen3", "qwen3_6", "deepseek_r1_distill", "gptoss", "nemotron_3_nano"])
def test_a_template_that_rewrites_earlier_answers_has_replies_all_the_same(name):
    """History stays as it was sampled: only what follows the answer is the template's."""
    tokenizer = tokenizer_of(name)
    chat = ChatFormat(tokenizer)
    whole = tokenizer.decode(written(tokenizer, TALK[:3], add_generation_prompt=True))
    reply = tokenizer.decode(chat.reply(GO))
    assert GO.content in reply
    assert ANSWER.content not in reply
    assert whole.endswith(reply)
    ended = whole.removesuffix(reply)
    assert re.search("good day<[|\uff5c](im_end|end▁of▁sentence|end)[|\uff5c]>$", ended)


@needs_trl
@pytest.mark.parametrize("name", ["qwen3", "qwen3_5_think", "deepseek_r1_distill", "gptoss", "nemotron_3_nano", "phi3"])
def test_each_turn_is_trained_on_what_the_model_would_see(name):
    """transformers alone, view by view: the messages before an answer with the generation prompt, then the answer."""
    tokenizer = tokenizer_of(name)
    sample = encode_dialogue(tokenizer, dialogue(*TALK))
    assert len(sample.starts) == (1 if name == "phi3" else 2)
    for turn, stop in enumerate((1, 3)):
        place = sample.turn_ids.index(turn)
        start = max(start for start in sample.starts if start <= place)
        prompt = written(tokenizer, TALK[:stop], add_generation_prompt=True)
        assert sample.tokens[start:][: len(prompt)] == prompt
        between = tokenizer.decode(sample.tokens[start + len(prompt) : place])
        assert re.fullmatch(r"(\s|</?think>)*", between)
    channel = "<|channel|>final<|message|>" if name == "gptoss" else ""  # the model's own choice
    end = ENDS[name.removesuffix("_5_think")]
    assert turns(tokenizer, sample) == [f"{channel}{m.content}{end}" for m in (ANSWER, BYE)]


# ---- refusals --------------------------------------------------------------------------------------------------------
@needs_trl
def test_what_a_template_refuses_names_the_message():
    gemma = ChatFormat(tokenizer_of("gemma"))
    rule = "message 0: the chat template refuses it: System role not supported"
    with pytest.raises(ValueError, match=f"^dialogue 'd', {rule}$"):
        encode_dialogue(gemma, dialogue(SYSTEM, *TALK))
    with pytest.raises(ValueError, match=f"^{rule}$"):
        gemma.opening([SYSTEM, ASK])
    with pytest.raises(ValueError, match=r"^dialogue 'd', message 2: .* must alternate"):
        encode_dialogue(gemma, dialogue(ASK, ANSWER, BYE))
    with pytest.raises(ValueError, match=r"^a message of the tool after an answer: .* must alternate"):
        gemma.reply(Message("tool", "12 C"))


@pytest.mark.parametrize(
    "template",
    ["{% for m in messages %}{{ m.content", "{{ messages.nothing.here }}", "{{ 1 / 0 }}", "{% for %}\n{{ x }}"],
)
def test_a_broken_template_is_one_line(template):
    tokenizer = byte_tokenizer(template, eos_token="<end>")
    with pytest.raises(ValueError, match=r"^[^\n]*the chat template refuses it: [^\n]+$"):
        ChatFormat(tokenizer)


DROPPING = CHATML.replace(
    "{% for m in messages %}", "{% for m in messages if m.role in ('user', 'assistant') or loop.index0 == 0 %}"
).replace("loop.index0 == 0", "m == messages[0]")


def test_a_context_message_that_the_template_drops_is_an_error():
    tokenizer = byte_tokenizer(DROPPING, ["<|im_start|>", "<|im_end|>"], eos_token="<|im_end|>")
    chat = ChatFormat(tokenizer)
    tool, system = Message("tool", "12"), Message("system", "now in French")
    said = r"the chat template leaves out what the {} says here \('{}'\)"
    for message in (tool, system):
        rule = said.format(message.role, message.content)
        with pytest.raises(ValueError, match=f"^dialogue 'd', message 2: {rule}"):
            encode_dialogue(
                tokenizer, dialogue(ASK, ANSWER, message, Message("assistant", "It is 12 C, now in French."))
            )
        with pytest.raises(ValueError, match=f"^a message of the {message.role} after an answer: {rule}"):
            chat.reply(message)
    with pytest.raises(ValueError, match="^message 1: " + said.format("tool", "12")):
        chat.opening([ASK, tool])
    assert turns(tokenizer, encode_dialogue(tokenizer, dialogue(SYSTEM, *TALK))) == [
        "good day<|im_end|>",
        "farewell<|im_end|>",
    ]


@needs_trl
def test_a_system_message_that_moves_to_the_front_is_no_reply():
    with pytest.raises(
        ValueError, match=r"a message of the system after an answer: .* leaves out what the system says"
    ):
        ChatFormat(tokenizer_of("deepseek_r1_distill")).reply(SYSTEM)


# ---- who begins ------------------------------------------------------------------------------------------------------
@needs_trl
@pytest.mark.parametrize("name", ["qwen2_5_training", "llama3_2", "lfm2", "phi3"])
@pytest.mark.parametrize("context", [(), (SYSTEM,)], ids=["nothing", "system"])
def test_the_assistant_may_begin_where_the_template_lets_it(name, context):
    tokenizer = tokenizer_of(name)
    messages = (*context, ANSWER, GO, BYE)
    sample = encode_dialogue(tokenizer, dialogue(*messages))
    end = ENDS[name.removesuffix("_training")]
    assert turns(tokenizer, sample) == [f"good day{end}", f"farewell{end}"]
    assert sample.tokens == written(tokenizer, messages)
    chat = ChatFormat(tokenizer)
    assert sample.tokens[: sample.turn_ids.index(0)] == chat.opening(context)


@needs_trl
def test_the_assistant_may_not_begin_where_the_template_refuses_it():
    with pytest.raises(ValueError, match=r"^dialogue 'd', message 0: the chat template refuses it: .* must alternate"):
        encode_dialogue(tokenizer_of("gemma"), dialogue(ANSWER, GO, BYE))


# ---- dates -----------------------------------------------------------------------------------------------------------
@needs_trl
@pytest.mark.parametrize(
    ("name", "line"), [("llama3_2", "Today Date: 05 Feb 2024"), ("gptoss", "Current date: 2024-02-05")]
)
def test_the_date_of_a_template_is_given(name, line):
    tokenizer = tokenizer_of(name)
    one, same, other = (ChatFormat(tokenizer, None, day) for day in ("2024-02-05", "2024-02-05", "2024-02-06"))
    assert line in tokenizer.decode(one.opening([ASK]))
    assert one.opening([ASK]) == same.opening([ASK]) != other.opening([ASK])
    assert one.renderer.digest() == other.renderer.digest()
    today = tokenizer.decode(ChatFormat(tokenizer).opening([ASK]))
    assert today == tokenizer.decode(written(tokenizer, [ASK], add_generation_prompt=True))


def test_the_digest_is_of_template_and_tokenizer():
    make = lambda template, *special: Renderer(byte_tokenizer(template, special, eos_token="<|im_end|>")).digest()  # noqa: E731
    assert make(CHATML, "<|im_start|>") == make(CHATML, "<|im_start|>")
    assert len({make(CHATML, "<|im_start|>"), make(CHATML + " ", "<|im_start|>"), make(CHATML, "<|start|>")}) == 3
