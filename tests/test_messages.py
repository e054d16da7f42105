"""What a message carries beside role and content is never lost, and no more of a dialogue is read than is asked for."""

import json
import re
import time

import pytest

pytest.importorskip("transformers")

from chat_case import CHATML, byte_tokenizer
from test_cli import write

from ppg_fast.dialogues import (
    ChatFormat,
    Dialogue,
    Message,
    encode_dialogue,
    make_byte_tokenizer,
    read_dialogues,
    read_prompts,
    write_dialogues,
)

TALK = (("user", "hello you"), ("assistant", "good day"), ("user", "and now?"), ("assistant", "farewell"))
USER, REPLY = {"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}


def logged(number, *messages):
    messages = list(messages) or [USER, REPLY]
    turns = sum(m["role"] == "assistant" for m in messages)
    return {"id": f"d{number}", "group_id": "g", "messages": messages, "turn_rewards": [1.0] * turns}


def talk(*messages):
    turns = sum(role == "assistant" for role, _ in messages)
    return Dialogue("d", "g", tuple(Message(*m) for m in messages), tuple(range(1, turns + 1)))


# ---- what a message carries ------------------------------------------------------------------------------------------
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
CARRIED = [
    {"tool_calls": [CALL]},
    {"name": "anna"},
    {"tool_call_id": "c1"},
    {"reasoning_content": "hm"},
    {"thinking": "hm"},
]
LOST = [
    ({"function_call": {"name": "f", "arguments": ""}}, "function_call would be lost"),
    ({"audio": {"id": "a"}}, "audio would be lost"),
    ({"loss_weight": 0.5}, "loss_weight must be 0 or 1"),
    ({"tool_calls": [{"name": "f"}]}, r"tool_calls\[0\] must have a function with a name"),
    ({"name": 3}, "name must be a string"),
]
TOOLS = [{"type": "function", "function": {"name": "weather"}}]


@pytest.mark.parametrize("extra", CARRIED)
def test_what_a_message_carries_beside_its_content_is_kept(extra, tmp_path):
    path = write(tmp_path / "d.jsonl", [{**logged(0, USER, {**REPLY, **extra}), "tools": TOOLS}])
    (dialogue,) = read_dialogues(path, strict=True)
    assert dialogue.messages[1] == Message("assistant", "good day", extra)
    assert dialogue.tools == tuple(TOOLS)
    assert hash(dialogue.messages[1]) == hash(Message("assistant", "good day", dict(extra)))
    write_dialogues(tmp_path / "again.jsonl", [dialogue])
    assert read_dialogues(tmp_path / "again.jsonl", strict=True) == [dialogue]
    assert json.loads((tmp_path / "again.jsonl").read_text())["messages"][1] == {**REPLY, **extra}
    path = write(tmp_path / "p.jsonl", [{"id": "p", "messages": [{**USER, **extra}], "tools": TOOLS}])
    (prompt,) = read_prompts(path, strict=True)
    assert prompt.messages[0].more == extra
    assert prompt.tools == tuple(TOOLS)


@pytest.mark.parametrize(("extra", "rule"), LOST)
def test_what_nothing_writes_is_refused_by_name(extra, rule, tmp_path):
    path = write(tmp_path / "d.jsonl", [logged(0), logged(1, USER, {**REPLY, **extra})])
    rule = f"line 2: dialogue 'd1', message 1: {rule}"
    with pytest.warns(UserWarning, match=rule) as caught:
        assert [d.id for d in read_dialogues(path)] == ["d0"]
    assert all(len(str(w.message)) < 600 for w in caught)
    with pytest.raises(ValueError, match=rule):
        read_dialogues(path, strict=True)


@pytest.mark.parametrize("key", ["weight", "train", "loss_weight", "loss"])
def test_a_key_that_says_what_to_train_is_obeyed(key, tmp_path):
    lines = [logged(0, USER, {**REPLY, key: value}) for value in (0, False, 1, 1.0, True)]
    lines = [{**line, "id": str(number)} for number, line in enumerate(lines)]
    dialogues = read_dialogues(write(tmp_path / "d.jsonl", lines), strict=True)
    assert [d.messages[1].trained for d in dialogues] == [False, False, True, True, True]
    write_dialogues(tmp_path / "again.jsonl", dialogues)
    assert read_dialogues(tmp_path / "again.jsonl", strict=True) == dialogues


def test_contents_of_parts_and_of_none(tmp_path):
    parts = {"role": "assistant", "content": [{"type": "text", "text": "good "}, {"type": "text", "text": "day"}]}
    call = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    (dialogue,) = read_dialogues(write(tmp_path / "d.jsonl", [logged(0, USER, parts, USER, call)]), strict=True)
    assert [m.content for m in dialogue.messages] == ["hello", "good day", "hello", ""]
    image = {**parts, "content": [{"type": "image", "image": "x" * 200_000}]}
    for wrong, rule in ((image, "part 0 is 'image'"), ({**REPLY, "content": None}, "got NoneType None")):
        with pytest.raises(ValueError, match=f"message 1: content must be .*{rule}") as error:
            read_dialogues(write(tmp_path / "d.jsonl", [logged(0, USER, wrong)]), strict=True)
        assert len(str(error.value)) < 400


def test_empty_keys_say_nothing(tmp_path):
    nothing = {"tool_calls": None, "name": "", "weight": 1, "train": True, "refusal": None, "reasoning_content": ""}
    path = write(tmp_path / "d.jsonl", [{**logged(0, USER, {**REPLY, **nothing}), "tools": [], "source": "web"}])
    assert read_dialogues(path, strict=True)[0].messages == (Message("user", "hello"), Message("assistant", "good day"))


# ---- control tokens in contents --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "names", [{}, {"pad_token": "<|im_end|>"}, {"unk_token": "<|im_end|>"}, {"bos_token": "<|im_end|>"}]
)
@pytest.mark.parametrize("eos", ["<|im_end|>", "<|endoftext|>"])
def test_no_content_spells_a_control_token_whatever_its_roles(names, eos):
    tokenizer = byte_tokenizer(CHATML, ["<|im_start|>", "<|im_end|>", "<|spare|>"], eos_token=eos, **names)
    chat = ChatFormat(tokenizer)
    for token in {"<|im_start|>", "<|im_end|>", "<|spare|>", eos}:
        for index in (0, 1):
            messages = list(TALK)
            messages[index] = (messages[index][0], f"sure{token} extra")
            with pytest.raises(
                ValueError, match=rf"^dialogue 'd', message {index}: content must not hold .*{re.escape(token)}"
            ):
                encode_dialogue(tokenizer, talk(*messages))
        with pytest.raises(ValueError, match="content must not hold"):
            chat.opening([Message("user", f"sure{token}")])
        with pytest.raises(ValueError, match="content must not hold"):
            chat.reply(Message("user", f"sure{token}"))
        assert chat.without_special(f"sure{token} extra") == "sure extra"


def test_structure_that_is_not_marked_as_special_is_guarded_and_words_are_not():
    tokenizer = byte_tokenizer(CHATML, [], ["<|im_start|>", "<|im_end|>", "<think>"], eos_token="<|endoftext|>")
    assert tokenizer.convert_ids_to_tokens(ChatFormat(tokenizer).end_id) == "<|im_end|>"
    with pytest.raises(ValueError, match="message 1: content must not hold"):
        encode_dialogue(tokenizer, talk(TALK[0], ("assistant", "sure<|im_end|> extra")))
    thought = encode_dialogue(tokenizer, talk(TALK[0], ("assistant", "<think>hm</think>yes")))
    trained = [t for t, turn in zip(thought.tokens, thought.turn_ids, strict=True) if turn == 0]
    assert tokenizer.decode(trained) == "<think>hm</think>yes<|im_end|>"


# ---- bounds ----------------------------------------------------------------------------------------------------------
def test_no_more_is_encoded_than_the_bound_takes(monkeypatch):
    tokenizer = make_byte_tokenizer(["hello you"], 300)
    encoded = 0
    original = type(tokenizer).__call__

    def counting(self, text, **options):
        nonlocal encoded
        encoded += len(text)
        return original(self, text, **options)

    monkeypatch.setattr(type(tokenizer), "__call__", counting)
    big = "hello you " * 1_000_000
    small = [("user", "hello"), ("assistant", "you")]
    for late in ([("user", big), ("assistant", "you")], [("user", "hello"), ("assistant", big)]):
        encoded = 0
        sample = encode_dialogue(tokenizer, talk(*small, *late), 64)
        assert sample.tokens == encode_dialogue(tokenizer, talk(*small)).tokens[: len(sample.tokens)]
        assert sample.rewards == [1.0, 2.0]
        assert set(sample.turn_ids) == {-1, 0}
        assert encoded < 50_000
    for messages, index in ([("user", big), ("assistant", "you")], 1), ([("user", "hello"), ("assistant", big)], 1):
        encoded = 0
        with pytest.raises(
            ValueError, match=rf"dialogue 'd', message {index}: a dialogue's first answer must begin within"
        ):
            encode_dialogue(tokenizer, talk(*messages), 64)
        assert encoded < 50_000


def test_within_the_bound_the_tokens_are_those_of_the_whole():
    tokenizer = make_byte_tokenizer(["hello you"], 300)
    long = talk(*[("user", "hello"), ("assistant", "good day")] * 40)
    whole = encode_dialogue(tokenizer, long)
    for bound in (25, 60, 200, 10_000):
        sample = encode_dialogue(tokenizer, long, bound)
        ends = [n + 1 for n, t in enumerate(whole.turn_ids) if t >= 0 and [t] != whole.turn_ids[n + 1 : n + 2]]
        end = max((e for e in ends if e <= bound), default=ends[0]) if bound < len(whole.tokens) else len(whole.tokens)
        assert (sample.tokens, sample.turn_ids) == (whole.tokens[:end], whole.turn_ids[:end])


def test_a_long_dialogue_of_many_turns_is_rendered_as_far_as_it_is_read(tmp_path):
    """Rendering every prefix of a dialogue is quadratic; 20,000 messages under a bound are as fast as few."""
    tokenizer = byte_tokenizer(CHATML, ["<|im_start|>", "<|im_end|>"], eos_token="<|im_end|>")
    start = time.perf_counter()
    sample = encode_dialogue(tokenizer, talk(*[("user", "hello" * 50), ("assistant", "good day" * 50)] * 10_000), 1024)
    assert time.perf_counter() - start < 5
    assert max(sample.turn_ids) == 0
    assert len(sample.rewards) == 10_000
    assert sample.rewards[-1] == 10_000
