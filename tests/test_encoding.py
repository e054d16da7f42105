"""Logged dialogues as tokens and turn ids: bounds exact to the token, the same tokens as on-policy."""

import json
import subprocess
import sys

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ppg_fast.dialogues.chat_format import ChatFormat, make_word_tokenizer
from ppg_fast.dialogues.dialogue import Dialogue, Message
from ppg_fast.dialogues.encoding import encode_dialogue, stable_group_id
from ppg_fast.dialogues.renderer import Renderer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TALK = (
    Message("system", "be kind"),
    Message("user", "hello  you 🌱"),
    Message("assistant", "good day\n\nfriend"),
    Message("assistant", ""),
    Message("user", "and now ?"),
    Message("assistant", "farewell 🌱"),
)
CONVERSATION = [m.as_dict() for m in TALK]


def dialogue(messages=TALK, rewards=None):
    turns = sum(m.role == "assistant" for m in messages)
    return Dialogue("d", "g", messages, tuple(range(1, turns + 1)) if rewards is None else rewards)


def word_tokenizer(*special):
    words = sorted({word for m in TALK for word in m.content.split()})
    core = Tokenizer(
        models.WordLevel({word: n for n, word in enumerate(["<pad>", *special, *words])}, unk_token="<pad>")
    )
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<end>" if "<end>" in special else None
    )


OURS = word_tokenizer("<end>", "<system>", "<user>", "<assistant>")


WRITTEN = ["<user>", "and", "you", "<end>", "<assistant>", "good", "day", "<end>", "<user>", "now", "<end>"]


@pytest.fixture(scope="module")
def chat_tokenizer():
    """Byte-level BPE with merges across whatever the training text offers, and ChatML."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(
        [*(m.content for m in TALK), "assistant: good day", "assistant: farewell", "user: hello"] * 3, trainer
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", chat_template=CHATML)


def turn_texts(tokenizer, sample):
    """turn -> what its tokens say."""
    turns = sorted({turn for turn in sample.turn_ids if turn >= 0})
    return {
        t: tokenizer.decode([k for k, turn in zip(sample.tokens, sample.turn_ids, strict=True) if turn == t])
        for t in turns
    }


def test_role_tokens():
    sample = encode_dialogue(
        OURS, dialogue((Message("user", "and you"), Message("assistant", "good day"), Message("user", "now")))
    )
    words = OURS.convert_ids_to_tokens(sample.tokens)
    assert words == WRITTEN
    assert sample.turn_ids == [-1, -1, -1, -1, -1, 0, 0, 0, -1, -1, -1]
    assert sample.rewards == [1.0]
    assert sample.group_id == stable_group_id("g")


@pytest.mark.parametrize("answer_next", [False, True])
def test_role_tokens_are_written_as_the_template_of_a_saved_tokenizer_writes_them(answer_next):
    tokenizer = make_word_tokenizer(["hello"])
    text = Renderer(tokenizer).text([*TALK, Message("tool", "ok")], answer_next)
    conversation = [*CONVERSATION, {"role": "tool", "content": "ok"}]
    assert text == tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=answer_next)


def test_adjacent_turns_stay_apart():
    sample = encode_dialogue(
        OURS, dialogue((Message("user", "now"), Message("assistant", ""), Message("assistant", "")))
    )
    assert sample.turn_ids == [-1, -1, -1, -1, 0, -1, 1]


def test_unscored_turn_has_reward_zero():
    assert encode_dialogue(OURS, dialogue(rewards=(None, 0.5, None))).rewards == [0.0, 0.5, 0.0]


def test_chat_template(chat_tokenizer):
    sample = encode_dialogue(chat_tokenizer, dialogue())
    assert sample.tokens == chat_tokenizer.apply_chat_template(CONVERSATION, tokenize=True, return_dict=False)
    assert turn_texts(chat_tokenizer, sample) == {
        0: "good day\n\nfriend<|im_end|>",
        1: "<|im_end|>",
        2: "farewell 🌱<|im_end|>",
    }


def test_a_prompt_of_a_rollout_is_the_context_of_its_turn(chat_tokenizer):
    sample = encode_dialogue(chat_tokenizer, dialogue())
    prompt = chat_tokenizer.apply_chat_template(
        CONVERSATION[:5], tokenize=True, return_dict=False, add_generation_prompt=True
    )
    assert sample.turn_ids.index(2) == len(prompt)
    assert sample.tokens[: len(prompt)] == prompt


def test_tokenizer_that_marks_the_beginning_of_a_text():
    """As SentencePiece's do: a part alone is encoded otherwise than inside the whole."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=90, special_tokens=["</s>"], show_progress=False)
    core.train_from_iterator([m.content for m in TALK] * 2 + ["[system][user][assistant]"], trainer)
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}{% if add_generation_prompt "
        "%}[assistant]{% endif %}"
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", chat_template=template)
    sample = encode_dialogue(tokenizer, dialogue())
    assert sample.tokens == tokenizer.apply_chat_template(CONVERSATION, tokenize=True, return_dict=False)
    assert sample.turn_ids.count(1) == 1, "an empty turn is its end-of-turn token"
    ends = [n for n, token in enumerate(sample.tokens) if token == tokenizer.eos_token_id]
    assert [sample.turn_ids[n] for n in ends] == [-1, -1, 0, 1, -1, 2]


def _with_template(tokenizer, template):
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer, eos_token="<|im_end|>", chat_template=template
    )


TEMPLATES = {  # a template that cannot be cut exactly, and what the message must say
    "merges": (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}"
        "assistant: {% endif %}",
        "dialogue 'd', message 2: a token must not cross the bound of a turn",
    ),
    "refuses": (
        "{% for m in messages %}{% if loop.index > 3 and messages[loop.index0 - 1].role == m.role %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{{ m.content }}<|im_end|>{% endfor %}",
        "dialogue 'd', message 3: the chat template refuses it: roles must alternate",
    ),
}


@pytest.mark.parametrize(("template", "message"), TEMPLATES.values(), ids=TEMPLATES)
def test_templates_that_cannot_be_cut(chat_tokenizer, template, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        encode_dialogue(_with_template(chat_tokenizer, template), dialogue())


def test_content_may_not_speak_for_the_tokenizer(chat_tokenizer):
    with pytest.raises(
        ValueError, match=r"dialogue 'd', message 0: content must not hold a special token .* '<\|im_end\|>'"
    ):
        encode_dialogue(chat_tokenizer, dialogue((Message("user", "a<|im_end|>"), Message("assistant", "b"))))
    with pytest.raises(
        ValueError, match=r"dialogue 'd', message 1: content must not hold a special token .* '<assistant>'"
    ):
        encode_dialogue(OURS, dialogue((Message("user", "now"), Message("assistant", "<assistant> now"))))


def test_padding_that_also_ends_a_turn_is_no_content(chat_tokenizer):
    """Many set pad_token = eos_token; every special token is guarded, whatever else it is used for."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=chat_tokenizer._tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<unk>",
        chat_template=CHATML,
    )
    with pytest.raises(ValueError, match=r"message 0: content must not hold a special token .* '<\|im_end\|>'"):
        encode_dialogue(tokenizer, dialogue((Message("user", "a<|im_end|>"), Message("assistant", "b"))))
    with pytest.raises(
        ValueError, match=r"message 0: content must not hold a special token .* '<unk>' in 'an <unk> word'"
    ):
        encode_dialogue(tokenizer, dialogue((Message("user", "an <unk> word"), Message("assistant", "b"))))


def test_a_pad_token_of_the_template_alone_is_no_content(chat_tokenizer):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=chat_tokenizer._tokenizer, pad_token="<|im_end|>", chat_template=CHATML
    )
    with pytest.raises(ValueError, match=r"message 0: content must not hold a special token .* '<\|im_end\|>'"):
        encode_dialogue(tokenizer, dialogue((Message("user", "a<|im_end|>"), Message("assistant", "b"))))


def test_role_tokens_of_the_vocabulary_are_the_same_logged_and_spoken():
    """Role tokens that the tokenizer does not split a text at: "<user>and" is one unknown word to it."""
    talk = dialogue((Message("user", "and you"), Message("assistant", "good day"), Message("user", "now")))
    tokenizer = word_tokenizer("<end>", "<system>", "<user>", "<assistant>")
    before = encode_dialogue(tokenizer, talk)
    chat = ChatFormat(tokenizer)
    spoken = [*chat.opening(talk.messages[:1]), *chat.answer("good day"), *chat.reply(talk.messages[2])]
    assert tokenizer.convert_ids_to_tokens(spoken) == [*WRITTEN, "<assistant>"]
    assert encode_dialogue(tokenizer, talk) == before, "ChatFormat gives the tokenizer a template"
    assert {tokenizer.convert_tokens_to_ids(f"<{role}>") for role in ("system", "user", "assistant")} <= set(
        chat.banned_token_ids(len(tokenizer))
    )


def test_what_a_template_refuses_is_a_value_error_in_a_rollout_too(chat_tokenizer):
    alternating = (
        "{% for m in messages %}{% if not loop.first and messages[loop.index0 - 1].role == m.role %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{{ m.content }}<|im_end|>{% endfor %}"
    )
    chat = ChatFormat(_with_template(chat_tokenizer, alternating))
    with pytest.raises(ValueError, match="the chat template refuses it: roles must alternate"):
        chat.opening([Message("user", "a"), Message("user", "b")])


def test_a_template_must_end_an_answer(chat_tokenizer):
    bare = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}|{% endfor %}{% if add_generation_prompt %}[assistant]{% "
    )
    tokenizer = _with_template(chat_tokenizer, bare + "endif %}")
    for use in (ChatFormat, lambda t: encode_dialogue(t, dialogue())):
        with pytest.raises(
            ValueError, match=r"must end an answer with a special \(or added\) token .*, got '\|' after it"
        ):
            use(tokenizer)


def test_tokenizers_that_do_not_fit():
    with pytest.raises(ValueError, match=r"must have the tokens <system> .*missing, got \['<assistant>'\]"):
        encode_dialogue(word_tokenizer("<end>", "<system>", "<user>"), dialogue())
    with pytest.raises(ValueError, match="message 0: the tokenizer must have a token for the role, got '<tool>'"):
        encode_dialogue(OURS, dialogue((Message("tool", "now"), Message("assistant", "now"))))


def test_long_dialogue_is_linear_in_tokens(chat_tokenizer, monkeypatch):
    """Every token is encoded a bounded number of times, however many turns there are."""
    long = dialogue((Message("user", "hello"), Message("assistant", "good day")) * 100)
    encoded = 0
    original = type(chat_tokenizer).__call__

    def counting(self, text, **options):
        nonlocal encoded
        encoded += len(text)
        return original(self, text, **options)

    monkeypatch.setattr(type(chat_tokenizer), "__call__", counting)
    sample = encode_dialogue(chat_tokenizer, long)
    assert encoded <= 2 * len(chat_tokenizer.decode(sample.tokens))
    assert set(sample.turn_ids) == {-1, *range(100)}


def test_group_ids_do_not_depend_on_the_process():
    code = (
        "import json; from ppg_fast.dialogues.encoding import stable_group_id as f; print(json.dumps([f('g'), f('é')]))"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(other.stdout) == [stable_group_id("g"), stable_group_id("é")]
    assert 0 <= stable_group_id("g") < 2**63
