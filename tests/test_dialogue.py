"""Dialogues on disk: what is written comes back, and what is wrong is named by file, line, dialogue, turn and value."""

import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppg_fast.dialogues.dialogue import Dialogue, convert_to_jsonl, read_dialogues, write_dialogues
from ppg_fast.dialogues.message import ROLES, Message
from ppg_fast.dialogues.records import MAX_WARNINGS

GOOD = {
    "id": "a",
    "group_id": "g",
    "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}],
    "turn_rewards": [0.5],
}


def line(**changes):
    return json.dumps({**GOOD, **changes})


def write(path, *lines, end="\n"):
    path.write_bytes(b"\n".join(text if isinstance(text, bytes) else text.encode() for text in lines) + end.encode())
    return path


texts = st.text(max_size=20)
names = st.text(min_size=1, max_size=8)
finite = st.floats(-3.4e38, 3.4e38)


@st.composite
def dialogue_lists(draw):
    dialogues = []
    for identity in draw(st.lists(names, min_size=1, max_size=4, unique=True)):
        messages = draw(st.lists(st.builds(Message, st.sampled_from(ROLES), texts), max_size=6))
        messages.insert(draw(st.integers(0, len(messages))), Message("assistant", draw(texts)))
        turns = sum(m.role == "assistant" for m in messages)
        rewards = draw(st.lists(st.none() | finite, min_size=turns, max_size=turns))
        dialogues.append(Dialogue(identity, draw(names), tuple(messages), tuple(rewards)))
    return dialogues


@given(dialogue_lists())
def test_round_trip_is_exact(tmp_path_factory, dialogues):
    path = tmp_path_factory.mktemp("round") / "d.jsonl"
    write_dialogues(path, dialogues)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # unscored turns are told of
        assert read_dialogues(path, strict=True) == dialogues


def test_what_is_on_disk(tmp_path):
    write_dialogues(
        tmp_path / "d.jsonl", [Dialogue("a", "g", (Message("user", "hi\u2028"), Message("assistant", "hello")), (0.5,))]
    )
    (record,) = [json.loads(text) for text in (tmp_path / "d.jsonl").read_bytes().split(b"\n") if text]
    assert record == {**GOOD, "messages": [{"role": "user", "content": "hi\u2028"}, GOOD["messages"][1]]}


def test_good_lines_are_kept_and_bad_ones_named(tmp_path):
    path = write(tmp_path / "d.jsonl", line(), '{"id": "cut', line(id="c", turn_rewards=[]), line(id="d"))
    with pytest.warns(UserWarning, match="line") as caught:
        assert [d.id for d in read_dialogues(path)] == ["a", "d"]
    first, second = (str(w.message) for w in caught)
    assert f"{path}, line 2 is not JSON" in first
    assert f"{path}, line 3" in second
    assert "'c' has 1 assistant messages but 0 turn_rewards" in second
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        read_dialogues(path, strict=True)


def test_truncated_last_line_loses_only_itself(tmp_path):
    path = write(tmp_path / "d.jsonl", line(), line(id="b"), line(id="c")[:-20], end="")
    with pytest.warns(UserWarning, match="line 3 is not JSON"):
        assert [d.id for d in read_dialogues(path)] == ["a", "b"]


BAD = {  # a line, and what its message must say beside file and line
    "not an object": ("[1]", "JSON object, got list"),
    "number": ("7", "JSON object, got int"),
    "nothing that is known": ('{"note": 1}', r"an object with the keys 'note': no dialogue in a format known here"),
    "a message": (json.dumps(GOOD["messages"][0]), "is one message; the messages of a dialogue belong into one line"),
    "id of a wrong type": (line(id=[3]), r"id must be a non-empty string, got \[3\]"),
    "a long id": (line(id="x" * 300), "id must be at most 200 characters long, got 300: 'x{59}\\.\\.\\."),
    "empty id": (line(id=""), "id must be a non-empty string"),
    "group_id of a wrong type": (line(group_id=True), "group_id must be a non-empty string, got True"),
    "messages of a wrong type": (line(messages="hi"), "messages must be a list, got str 'hi'"),
    "rewards of a wrong type": (line(turn_rewards=0.5), "turn_rewards must be a list, got float 0.5"),
    "message of a wrong type": (
        line(messages=["hi"]),
        "message 0: must be an object with role and content, got str 'hi'",
    ),
    "message without content": (
        line(messages=[{"role": "user"}]),
        "message 0: must be an object with role and content",
    ),
    "content of a wrong type": (
        line(messages=[{"role": "user", "content": None}]),
        "message 0: content must be a string, got None",
    ),
    "unknown role": (
        line(messages=[GOOD["messages"][0], {"role": "bot", "content": ""}]),
        "message 1: role must be one of .* got 'bot'",
    ),
    "no assistant": (
        line(messages=[{"role": "user", "content": "hi"}], turn_rewards=[]),
        "'a' has no assistant message",
    ),
    "no messages": (line(messages=[], turn_rewards=[]), "'a' has no assistant message among its 0 messages"),
    "too many rewards": (line(turn_rewards=[1, 2]), "'a' has 1 assistant messages but 2 turn_rewards"),
    "NaN": (line(turn_rewards=[float("nan")]), "dialogue 'a', turn 0: a reward must be finite in float32, got nan"),
    "infinity": (
        line(turn_rewards=[float("-inf")]),
        "dialogue 'a', turn 0: a reward must be finite in float32, got -inf",
    ),
    "float overflow": (
        line(turn_rewards=[9]).replace("[9]", "[1e999]"),
        "dialogue 'a', turn 0: a reward must be finite in float32, got inf",
    ),
    "float32 overflow": (line(turn_rewards=[-1e39]), "turn 0: a reward must be finite in float32, got -1e"),
    "integer overflow": (
        line(turn_rewards=[10**400]),
        "dialogue 'a', turn 0: a reward must be finite in float32, got inf",
    ),
    "integer beyond parsing": (
        line(turn_rewards=[9]).replace("[9]", f"[{'9' * 5000}]"),
        "is not JSON that can be read",
    ),
    "boolean reward": (
        line(turn_rewards=[True]),
        "dialogue 'a', turn 0: a reward must be a number or null, got bool True",
    ),
    "text as reward": (line(turn_rewards=["0.5"]), "turn 0: a reward must be a number or null, got str '0.5'"),
    "not UTF-8": (line().encode().replace(b"hello", b"h\xe9llo"), "is not UTF-8"),
    "unpaired surrogate": (line().replace("hello", "\\ud800"), "message 1: content has an unpaired surrogate"),
    "brackets without end": ("[" * 100_000, "not JSON"),
}


@pytest.mark.parametrize(("text", "message"), BAD.values(), ids=BAD)
def test_every_wrong_line_is_named(tmp_path, text, message):
    path = write(tmp_path / "d.jsonl", line(id="first"), text, line(id="last"))
    with pytest.warns(UserWarning, match=f"line 2.*{message}"):
        assert [d.id for d in read_dialogues(path)] == ["first", "last"]
    with pytest.raises(ValueError, match=f"line 2.*{message}"):
        read_dialogues(path, strict=True)


def test_second_turn_is_named(tmp_path):
    two = [*GOOD["messages"], GOOD["messages"][1]]
    with pytest.raises(ValueError, match="dialogue 'a', turn 1: a reward must be finite in float32, got nan"):
        read_dialogues(write(tmp_path / "d.jsonl", line(messages=two, turn_rewards=[1, float("nan")])), strict=True)


def test_duplicate_ids(tmp_path):
    path = write(tmp_path / "d.jsonl", line(), line(id="b"), line(turn_rewards=[0.7]))
    with pytest.warns(UserWarning, match=r"line 3: dialogue id 'a' was used before, in .*line 1"):
        assert [(d.id, d.turn_rewards) for d in read_dialogues(path)] == [("a", (0.5,)), ("b", (0.5,))]
    dialogue = read_dialogues(write(path, line()))[0]
    with pytest.raises(ValueError, match="'a' stands twice"):
        write_dialogues(path, [dialogue, dialogue])


def test_byte_order_mark_blank_lines_and_carriage_returns(tmp_path):
    path = write(tmp_path / "d.jsonl", b"\xef\xbb\xbf" + line().encode() + b"\r", "", "  ", line(id="b"), "")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [d.id for d in read_dialogues(path)] == ["a", "b"]


@pytest.mark.parametrize("content", ["", "\n \n", "\ufeff"], ids=["nothing", "blank", "byte order mark"])
def test_empty_file(tmp_path, content):
    path = tmp_path / "d.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"d\.jsonl is empty"):
        read_dialogues(path)


def test_no_valid_dialogue_is_an_error_even_if_not_strict(tmp_path):
    path = write(tmp_path / "d.jsonl", "{", "x")
    with pytest.raises(ValueError, match=r"no valid dialogue; first problem: .*line 1 is not JSON.* \(and 1 more\)"):
        read_dialogues(path)


def test_many_bad_lines_are_counted_not_listed(tmp_path):
    path = write(tmp_path / "d.jsonl", line(), *["{"] * (MAX_WARNINGS + 5))
    with pytest.warns(UserWarning, match="line") as caught:
        read_dialogues(path)
    assert len(caught) == MAX_WARNINGS + 1
    assert f"{MAX_WARNINGS + 5} dialogues left out, 1 kept" in str(caught[-1].message)


def test_unscored_turns_are_kept_and_reported(tmp_path):
    path = write(tmp_path / "d.jsonl", line(messages=GOOD["messages"] * 2, turn_rewards=[None, 1]))
    with pytest.warns(UserWarning, match="1 of 2 assistant messages have no reward; they count as 0"):
        (dialogue,) = read_dialogues(path, strict=True)
    assert dialogue.turn_rewards == (None, 1.0)
    assert dialogue.unscored == 1


def test_further_keys_are_kept(tmp_path):
    said = [{**GOOD["messages"][0], "at": "noon"}, {**GOOD["messages"][1], "name": "", "train": True}]
    path = write(tmp_path / "d.jsonl", line(note={"a": [1]}, messages=said))
    (dialogue,) = read_dialogues(path, strict=True)
    assert dialogue.more == {"note": {"a": [1]}}
    write_dialogues(tmp_path / "copy.jsonl", [dialogue])
    assert json.loads((tmp_path / "copy.jsonl").read_text()) == json.loads(path.read_text())
    assert dialogue.messages == tuple(Message(**m) for m in GOOD["messages"]), "they say nothing of what is trained"
    changed = replace(dialogue.messages[0], content="ho")
    assert changed.as_line() == {"role": "user", "content": "ho", "at": "noon"}


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "d.jsonl"
    (dialogue,) = read_dialogues(write(path, line()))
    before = path.read_bytes()

    def breaks():
        yield Dialogue("new", "g", dialogue.messages, (1.0,))
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError, match="the source broke"):
        write_dialogues(path, breaks())
    with pytest.raises(ValueError, match="no dialogues to write"):
        write_dialogues(path, [])
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["d.jsonl"]


def test_links_permissions_and_devices_stay_what_they_are(tmp_path):
    (dialogue,) = read_dialogues(write(tmp_path / "real.jsonl", line()))
    source = write(tmp_path / "s.jsonl", line(id="b"))
    (tmp_path / "real.jsonl").chmod(0o640)
    (tmp_path / "link.jsonl").symlink_to("real.jsonl")
    assert convert_to_jsonl(source, tmp_path / "link.jsonl") == 1
    assert (tmp_path / "link.jsonl").is_symlink()
    assert [d.id for d in read_dialogues(tmp_path / "real.jsonl")] == ["b"]
    assert (tmp_path / "real.jsonl").stat().st_mode & 0o777 == 0o640
    write_dialogues("/dev/null", [dialogue])
    assert Path("/dev/null").is_char_device()
    with pytest.raises(OSError, match="No space left"):
        write_dialogues("/dev/full", [dialogue])
    assert convert_to_jsonl(source, tmp_path / "new/deep.jsonl") == 1


def test_convert_writes_what_was_read(tmp_path):
    source = write(tmp_path / "s.jsonl", line(), line(id="b"))
    assert convert_to_jsonl(source, tmp_path / "t.jsonl") == 2
    assert read_dialogues(tmp_path / "t.jsonl") == read_dialogues(source)


def test_rooms_give_the_names_of_the_documents_and_import_transformers_only_on_use():
    code = (
        "import sys\n"
        "import ppg_fast.dialogues, ppg_fast.models.export, ppg_fast.rollouts.problems\n"
        "assert 'transformers' not in sys.modules\n"
        "for room in (ppg_fast.dialogues, ppg_fast.models, ppg_fast.rollouts):\n"
        "    assert all(getattr(room, name).__name__ == name for name in room.__all__)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
