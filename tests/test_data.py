"""Tokens, turn ids and packed batches: bounds exact to the token, and one packed row equal to its dialogues one by
one."""

import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ppg_fast.dialogues.dialogue import Dialogue, Message
from ppg_fast.dialogues.packing import (
    Sample,
    encode_dialogue,
    micro_batches,
    pack,
    stable_group_id,
    trim_after_last_turn,
)

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
CONVERSATION = [{"role": m.role, "content": m.content} for m in TALK]


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
    assert words == ["<user>", "and", "you", "<end>", "<assistant>", "good", "day", "<end>", "<user>", "now", "<end>"]
    assert sample.turn_ids == [-1, -1, -1, -1, -1, 0, 0, 0, -1, -1, -1]
    assert sample.rewards == [1.0]
    assert sample.group_id == stable_group_id("g")


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


def test_template_that_ends_a_turn_without_a_token_of_its_own(chat_tokenizer):
    chat_tokenizer = _with_template(
        chat_tokenizer,
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}|{% endfor %}{% if add_generation_prompt %}[assistant]{% "
        "endif %}",
    )
    assert turn_texts(chat_tokenizer, encode_dialogue(chat_tokenizer, dialogue()))[0] == "good day\n\nfriend|"


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
    "forgets": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if loop.last and m.role == 'assistant' %}think{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "dialogue 'd', message 3: the chat template must only append .* 'think",
    ),
    "merges": (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}{% if add_generation_prompt %}assistant: {% "
        "endif %}",
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
        ValueError, match=r"dialogue 'd', message 0: content must not hold a control token .* '<\|im_end\|>'"
    ):
        encode_dialogue(chat_tokenizer, dialogue((Message("user", "a<|im_end|>"), Message("assistant", "b"))))
    with pytest.raises(
        ValueError, match=r"dialogue 'd', message 1: content must not hold a control token .* '<assistant>'"
    ):
        encode_dialogue(OURS, dialogue((Message("user", "now"), Message("assistant", "<assistant> now"))))


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


@st.composite
def samples(draw, with_logprobs=False):
    turns = draw(st.integers(0, 4))
    turn_ids = draw(st.lists(st.integers(-1, turns - 1), min_size=1, max_size=9))
    tokens = [draw(st.integers(0, 99)) for _ in turn_ids]
    rewards = [draw(st.floats(-9, 9, width=32)) for _ in range(turns)]
    logprobs = (
        [float("nan") if turn < 0 else -draw(st.floats(0, 9, width=32)) for turn in turn_ids] if with_logprobs else None
    )
    return Sample(tokens, turn_ids, rewards, draw(st.integers(0, 2**63 - 1)), logprobs)


@settings(deadline=None)
@given(st.booleans().flatmap(lambda with_logprobs: st.lists(samples(with_logprobs), max_size=5)))
def test_packed_row_is_its_dialogues_one_by_one(drawn):
    batch = pack(drawn)
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.cu_seqlens.tolist() == [
        0,
        *torch.tensor([len(s.tokens) for s in drawn], dtype=torch.int64).cumsum(0).tolist(),
    ]
    assert {
        t.dtype
        for t in (batch.tokens, batch.labels, batch.turn_ids, batch.position_ids, batch.turn_counts, batch.group_ids)
    } == {torch.int64}
    assert batch.rewards.dtype == torch.float32
    assert batch.rewards.shape == (len(drawn), max([1, *(len(s.rewards) for s in drawn)]))
    assert batch.turn_counts.tolist() == [len(s.rewards) for s in drawn]
    assert batch.group_ids.tolist() == [s.group_id for s in drawn]
    for n, sample in enumerate(drawn):
        rows = slice(batch.cu_seqlens[n], batch.cu_seqlens[n + 1])
        assert batch.tokens[rows].tolist() == sample.tokens
        assert batch.position_ids[rows].tolist() == list(range(len(sample.tokens)))
        assert batch.turn_ids[rows].tolist() == [*sample.turn_ids[1:], -1]
        following = zip(sample.tokens[1:], sample.turn_ids[1:], strict=True)
        assert batch.labels[rows].tolist() == [*(token if turn >= 0 else -100 for token, turn in following), -100]
        assert batch.rewards[n].tolist() == sample.rewards + [0.0] * (batch.rewards.shape[1] - len(sample.rewards))
        if sample.rollout_logprobs is not None:
            following = zip(sample.rollout_logprobs[1:], sample.turn_ids[1:], strict=True)
            assert batch.rollout_logprobs[rows].tolist() == [
                *(value if turn >= 0 else 0.0 for value, turn in following),
                0.0,
            ]
    assert (batch.rollout_logprobs is None) == all(s.rollout_logprobs is None for s in drawn)


BROKEN = {
    "no tokens": (Sample([], [], [], 0), "sample 1 must have tokens"),
    "turn ids": (Sample([1, 2], [0], [0.5], 0), "sample 1 must have one turn id per token: 2, got 1"),
    "turn beyond": (
        Sample([1], [2], [0.5, 0.5], 0),
        "sample 1: a turn id must be -1 or below the number of rewards 2, got 2",
    ),
    "turn below": (Sample([1], [-2], [0.5], 0), "sample 1: a turn id must be -1 .* got -2"),
    "nan reward": (
        Sample([1], [0], [0.5, float("nan")], 0),
        "sample 1, turn 1: a reward must be finite in float32, got nan",
    ),
    "large reward": (Sample([1], [0], [-1e39], 0), "sample 1, turn 0: a reward must be finite in float32, got -1e"),
    "some logprobs": (Sample([1], [0], [0.5], 0, [-0.3]), "rollout_logprobs must be given for all samples or for none"),
}


@pytest.mark.parametrize(("sample", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_samples_are_named(sample, message):
    with pytest.raises(ValueError, match=message):
        pack([Sample([1], [0], [0.5], 0), sample])


def test_broken_logprobs_are_named():
    with pytest.raises(ValueError, match="sample 0 must have one rollout log-prob per token: 2, got 1"):
        pack([Sample([1, 2], [-1, 0], [0.5], 0, [-0.3])])
    with pytest.raises(ValueError, match="sample 0, token 1: a rollout log-prob must be finite, got -inf"):
        pack([Sample([1, 2], [-1, 0], [0.5], 0, [0.0, float("-inf")])])


def test_to_moves_every_tensor():
    moved = pack([Sample([1, 2], [-1, 0], [0.5], 3, [0.0, -0.3])]).to("meta")
    assert {tensor.device.type for tensor in vars(moved).values()} == {"meta"}
    assert pack([Sample([1], [0], [0.5], 3)]).to("meta").rollout_logprobs is None


@settings(deadline=None)
@given(st.lists(st.integers(1, 30), max_size=20), st.integers(1, 25))
def test_micro_batches_hold_everything_under_the_budget(lengths, max_tokens):
    given_samples = [Sample([n] * length, [-1] * length, [], 0) for n, length in enumerate(lengths)]
    batches = list(micro_batches(given_samples, max_tokens))
    names = [[sample.tokens[0] for sample in batch] for batch in batches]
    assert sorted(n for batch in names for n in batch) == list(range(len(lengths)))
    assert all(batch == sorted(batch) for batch in names), "a batch keeps the order of the samples"
    totals = [sum(len(sample.tokens) for sample in batch) for batch in batches]
    assert all(total <= max_tokens or len(batch) == 1 for total, batch in zip(totals, batches, strict=True))
    assert totals == sorted(totals, reverse=True)


def test_micro_batches_are_few_and_even():
    """Consecutive filling would need four, of 9, 2, 9 and 1 tokens; best fit alone would leave 10, 10 and 1."""
    lengths = [5, 4, 2, 9, 1]
    batches = list(micro_batches([Sample([n] * length, [-1] * length, [], 0) for n, length in enumerate(lengths)], 11))
    assert [[len(s.tokens) for s in batch] for batch in batches] == [[2, 9], [5, 4, 1]]
    batches = list(
        micro_batches([Sample([n] * length, [-1] * length, [], 0) for n, length in enumerate([6, 6, 2, 2, 2, 2])], 12)
    )
    assert [sum(len(s.tokens) for s in batch) for batch in batches] == [10, 10], "best fit alone would make 12 and 8"


@pytest.mark.parametrize("max_tokens", [0, -3, 2.5, True])
def test_micro_batches_refuse_a_budget(max_tokens):
    with pytest.raises(ValueError, match=f"max_tokens must be an integer >= 1, got {max_tokens}"):
        next(micro_batches([], max_tokens))


def test_trim_after_last_turn():
    sample = Sample([1, 2, 3, 4], [-1, 0, -1, -1], [0.5], 7, [0.0, -0.3, 0.0, 0.0])
    assert trim_after_last_turn(sample) == Sample([1, 2], [-1, 0], [0.5], 7, [0.0, -0.3])
    longer = Sample([1, 2, 3, 4, 5], [0, -1, 0, -1, 1], [0.5, 1.0], 7)
    assert trim_after_last_turn(longer) == longer
    assert trim_after_last_turn(longer, {0}) == Sample([1, 2, 3], [0, -1, 0], [0.5, 1.0], 7)
    assert trim_after_last_turn(Sample([1, 2], [0, -1], [0.5], 7)).tokens == [], "nothing predicts a first token"


def test_group_ids_do_not_depend_on_the_process():
    code = (
        "import json; from ppg_fast.dialogues.packing import stable_group_id as f; print(json.dumps([f('g'), f('é')]))"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(other.stdout) == [stable_group_id("g"), stable_group_id("é")]
    assert 0 <= stable_group_id("g") < 2**63
