"""Files of others: told by their content, with what they lack made; and one line for what is no file of dialogues."""

import bz2
import gzip
import json
import lzma
import warnings

import pytest

from ppg_fast.dialogues import Message, read_dialogues, read_prompts, write_dialogues
from ppg_fast.dialogues.dialogue import read_file
from ppg_fast.dialogues.files import RECIPES

HI, YO = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}
SAID = {"messages": [HI, YO]}
HUMAN, GPT = {"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}
CALL = {"type": "function", "function": {"name": "w", "arguments": {"a": 1}}}
CALLED = {"from": "function_call", "value": '{"name": "w", "arguments": {"a": 1}}'}
TURNS = "\n\nHuman: hi\n\nAssistant: yo\n\nHuman: Human: so?\n\nAssistant: "
TWICE = [("user", "hi"), ("assistant", "yo"), ("user", "Human: so?")]
ONE = [("user", "hi"), ("assistant", "yo")]


def write(path, *values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return path


def read(path, *values, strict=True):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return read_dialogues(write(path, *values), strict)


def spoken(dialogue):
    return [(message.role, message.content) for message in dialogue.messages]


FORMATS = {  # an object of a file; what is said, the rewards, and what stays beside
    "messages alone": (SAID, ONE, (None,), {}),
    "one reward": ({"messages": [HI, YO, HI, YO], "reward": 2}, ONE * 2, (None, 2.0), {"reward": 2}),
    "score": ({**SAID, "score": 0.5}, ONE, (0.5,), {"score": 0.5}),
    "rating": ({**SAID, "rating": 4, "turn_rewards": None}, ONE, (4.0,), {"rating": 4}),
    "boolean": ({**SAID, "label": False}, ONE, (0.0,), {"label": False}),
    "thumbs": ({**SAID, "label": "thumbs_up"}, ONE, (1.0,), {"label": "thumbs_up"}),
    "a label of another kind": ({**SAID, "label": "billing"}, ONE, (None,), {"label": "billing"}),
    "rewards of answers": ({"messages": [HI, {**YO, "score": 1}, HI, YO]}, ONE * 2, (1.0, None), {}),
    "turn_rewards before all": ({**SAID, "turn_rewards": [3], "score": 1}, ONE, (3.0,), {"score": 1}),
    "the assistant begins": ({"messages": [YO, HI, YO]}, [ONE[1], *ONE], (None, None), {}),
    "a system text beside": ({"system": "s", **SAID}, [("system", "s"), *ONE], (None,), {}),
    "other names of roles": ({"messages": [{"role": "developer", "content": "s"}, HI, {**YO, "role": "model"}]},
                             [("system", "s"), *ONE], (None,), {}),
    "ShareGPT": ({"conversations": [HUMAN, GPT], "source": "web"}, ONE, (None,), {"source": "web"}),
    "ShareGPT with a system text": ({"system": "s", "conversations": [HUMAN, GPT]},
                                    [("system", "s"), *ONE], (None,), {}),
    "from and value as messages": ({"messages": [HUMAN, GPT]}, ONE, (None,), {}),
    "conversations of roles": ({"conversation": [HI, YO], "turn": 1}, ONE, (None,), {"turn": 1}),
    "a call": ({"conversations": [HUMAN, CALLED, {"from": "observation", "value": "3"}, GPT]},
               [ONE[0], ("assistant", ""), ("tool", "3"), ONE[1]], (None, None), {}),
    "prompt and completion": ({"prompt": "hi", "completion": "yo", "label": True}, ONE, (1.0,), {"label": True}),
    "keys that are null": ({"messages": None, "chosen": None, "prompt": "hi", "completion": "yo", "rejected": None},
                           ONE, (None,), {"chosen": None, "rejected": None}),
    "as messages": ({"prompt": [HI, YO, HI], "completion": [YO]}, ONE * 2, (None, None), {}),
    "Alpaca": ({"instruction": "add", "input": "1 2", "output": "3", "history": [["hi", "yo"]], "system": "s"},
               [("system", "s"), *ONE, ("user", "add\n\n1 2"), ("assistant", "3")], (None, None), {}),
    "question and answer": ({"question": "hi", "answer": "yo", "level": 2}, ONE, (None,), {"level": 2}),
}  # fmt: skip


@pytest.mark.parametrize(("value", "said", "rewards", "more"), FORMATS.values(), ids=FORMATS)
def test_a_dialogue_of_another_format(value, said, rewards, more, tmp_path):
    (dialogue,) = read(tmp_path / "talk.jsonl", value)
    assert (spoken(dialogue), dialogue.turn_rewards, dialogue.more) == (said, rewards, more)
    assert dialogue.id == "talk/1"
    copies = [tmp_path / f"{n}.jsonl" for n in range(2)]
    write_dialogues(copies[0], [dialogue])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert read_dialogues(copies[0], strict=True) == [dialogue]
        write_dialogues(copies[1], read_dialogues(copies[0]))
    assert copies[0].read_bytes() == copies[1].read_bytes()


PAIRS = {  # an object with two answers, and what is said before them
    "text": ({"prompt": "hi", "chosen": "good", "rejected": "bad", "margin": 2}, ONE[:1]),
    "messages": ({"prompt": [HI, YO, HI], "chosen": [{**YO, "content": "good"}],
                  "rejected": [{**YO, "content": "bad"}]}, [*ONE, ONE[0]]),
    "whole dialogues": ({"prompt": "hi", "messages": [HI, YO], "chosen": [HI, {**YO, "content": "good"}],
                         "rejected": [HI, {**YO, "content": "bad"}]}, ONE[:1]),
    "ShareGPT": ({"conversations": [HUMAN], "chosen": {"from": "gpt", "value": "good"},
                  "rejected": {"from": "gpt", "value": "bad"}}, ONE[:1]),
    "one text": ({"chosen": TURNS + "good", "rejected": TURNS + "bad"}, TWICE),
}  # fmt: skip


@pytest.mark.parametrize(("value", "before"), PAIRS.values(), ids=PAIRS)
def test_chosen_and_rejected_are_two_dialogues_of_one_group(value, before, tmp_path):
    chosen, rejected = read(tmp_path / "pairs.jsonl", {**value, "id": 7, "source": "web"})
    assert spoken(chosen) == [*before, ("assistant", "good")]
    assert spoken(rejected) == [*before, ("assistant", "bad")]
    assert (chosen.id, rejected.id, chosen.group_id) == ("7/chosen", "7/rejected", rejected.group_id)
    assert (chosen.turn_rewards[-1], rejected.turn_rewards[-1]) == (1.0, 0.0)
    assert set(chosen.turn_rewards[:-1]) <= {None}
    assert chosen.more == rejected.more == {"source": "web", **({"margin": 2} if "margin" in value else {})}
    (prompt,) = read_prompts(write(tmp_path / "pairs.jsonl", value), strict=True)
    assert [(m.role, m.content) for m in prompt.messages] == before
    assert prompt.info["chosen"] == value["chosen"]


def test_a_call_of_sharegpt_is_one_of_ours(tmp_path):
    value = {
        "tools": json.dumps([{"name": "w"}]),
        "conversations": [HUMAN, CALLED, {"from": "tool", "value": "3"}, GPT],
    }
    (dialogue,) = read(tmp_path / "d.jsonl", value)
    assert dialogue.messages[1] == Message("assistant", "", {"tool_calls": [CALL]})
    assert dialogue.tools == ({"name": "w"},)


def test_what_is_made(tmp_path):
    other = {"messages": [{**HI, "content": "ho"}, YO]}
    dialogues = read(tmp_path / "a.b.jsonl", SAID, {**SAID, "id": 3, "group_id": 4}, {**SAID, "id": "x"}, other)
    assert [d.id for d in dialogues] == ["a.b/1", "3", "x", "a.b/4"]
    assert dialogues[1].group_id == "4"
    assert dialogues[0].group_id == dialogues[2].group_id != dialogues[3].group_id, "the opening's"
    assert read(tmp_path / "o.jsonl", {"messages": [YO]})[0].group_id == "o/1", "nothing opens it"
    (tools,) = read(tmp_path / "o.jsonl", {**SAID, "tools": [{"name": "w"}]})
    assert tools.group_id != dialogues[0].group_id
    path = write(tmp_path / "o.jsonl", {"messages": [HI, YO, HI, YO], "score": 1}, {**SAID, "score": 0})
    with pytest.warns(UserWarning, match="the one reward a dialogue .'score' of 2 dialogues. is that of its last turn"):
        read_dialogues(path, strict=True)


def test_prompts_need_no_more_than_an_opening(tmp_path):
    lines = [SAID, {"prompt": "hi"}, {"question": "hi", "answer": "42"}, {**SAID, "turn_rewards": "none yet"}]
    prompts = read_prompts(write(tmp_path / "p.jsonl", *lines), strict=True)
    assert [[m.content for m in p.messages] for p in prompts] == [["hi"]] * 4
    assert [p.id for p in prompts] == [f"line {n}" for n in (1, 2, 3, 4)]
    assert prompts[2].info == {"answer": "42"}, "for reward functions"
    with pytest.raises(
        ValueError, match="line 1: prompt 'line 1' must end with a message of the user or a tool, got a"
    ):
        read_prompts(write(tmp_path / "p.jsonl", {"prompt": [HI, YO]}), strict=True)


# ---- how a file is packed --------------------------------------------------------------------------------------------
LINES = [{**SAID, "id": f"d{n}", "group_id": "g", "turn_rewards": [n]} for n in range(3)]
AS_LINES = "".join(json.dumps(line) + "\n" for line in LINES).encode()
AS_LIST = json.dumps(LINES)
PACKED = {
    "gzip": gzip.compress(AS_LINES),
    "gzip of a list": gzip.compress(AS_LIST.encode()),
    "bzip2": bz2.compress(AS_LINES),
    "xz": lzma.compress(AS_LINES),
    "UTF-16": AS_LINES.decode().encode("utf-16"),
    "UTF-16 without a mark": AS_LIST.encode("utf-16-le"),
    "UTF-16 the other way round": AS_LINES.decode().encode("utf-16-be"),
    "UTF-32": AS_LIST.encode("utf-32"),
    "byte order mark": b"\xef\xbb\xbf" + AS_LINES,
    "carriage returns": AS_LINES.replace(b"\n", b"\r"),
    "pretty objects": "\n".join(json.dumps(line, indent=2) for line in LINES).encode(),
    "a pretty list": json.dumps(LINES, indent=1).encode(),
    "a wrapper": json.dumps({"version": 1, "data": LINES}).encode(),
    "rows": json.dumps({"features": [{"name": "id"}], "rows": [{"row_idx": 0, "row": r} for r in LINES]}).encode(),
    "one key": json.dumps({"talks": LINES}).encode(),
}


@pytest.mark.parametrize("raw", PACKED.values(), ids=PACKED)
def test_files_are_read_however_they_are_packed(raw, tmp_path):
    (tmp_path / "d.jsonl").write_bytes(AS_LINES)
    path = tmp_path / "other.bin"
    path.write_bytes(raw)
    assert read_dialogues(path, strict=True) == read_dialogues(tmp_path / "d.jsonl", strict=True)
    assert [p.id for p in read_prompts(path, strict=True)] == ["d0", "d1", "d2"]


def test_a_second_list_of_a_wrapper_is_not_lost_in_silence(tmp_path):
    path = tmp_path / "d.json"
    path.write_text(json.dumps({"train": LINES, "test": LINES[:1]}))
    with pytest.warns(UserWarning, match=r"d\.json: the 1 objects in 'test' are not read, only those in 'train'"):
        assert len(read_dialogues(path, strict=True)) == 3


def test_one_pretty_object_and_one_list_of_messages(tmp_path):
    path = tmp_path / "d.json"
    path.write_text(json.dumps(LINES[0], indent=2))
    assert [d.id for d in read_dialogues(path, strict=True)] == ["d0"]
    path.write_text(json.dumps([HI, YO, HI, YO], indent=2))
    assert [spoken(d) for d in read_file(path, strict=True, scored=False).dialogues] == [ONE * 2]
    path.write_text(json.dumps([HI, YO]) + "\n\n" + json.dumps([HI, YO, HI, YO]))
    assert [spoken(d) for d in read_file(path, strict=True, scored=False).dialogues] == [ONE, ONE * 2]


def test_what_is_cut_short_gives_what_is_whole(tmp_path):
    path = tmp_path / "d.jsonl.gz"
    lines = [{**line, "note": str(hash((n, line["id"])))} for n in range(2000) for line in LINES[:1]]
    lines = [{**line, "id": f"d{n}"} for n, line in enumerate(lines)]
    whole = gzip.compress("".join(json.dumps(line) + "\n" for line in lines).encode())
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.warns(UserWarning, match=r"line \d+: the archive is cut short or damaged: .*; left out"):
        assert 500 < len(read_dialogues(path)) < 2000
    with pytest.raises(ValueError, match="cut short or damaged"):
        read_dialogues(path, strict=True)
    path.write_text(json.dumps(LINES[0], indent=1) + json.dumps(LINES[1], indent=1)[:-9])
    with pytest.warns(UserWarning, match=r"dialogue 1 \(line 17\) is not JSON or cut short"):
        assert [d.id for d in read_dialogues(path)] == ["d0"]


def test_parquet(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    rows = [{**SAID, "score": 1.0}, {"messages": [HI, call], "score": None}]
    path = tmp_path / "d.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    with pytest.warns(UserWarning, match="1 of 2 assistant messages have no reward"):
        plain, calling = read_dialogues(path, strict=True)
    assert (plain.id, plain.turn_rewards, plain.messages[1].more) == ("d/0", (1.0,), {})
    assert calling.messages[1].tool_calls[0]["function"]["name"] == "f"
    path.write_bytes(path.read_bytes()[:200] + b"PAR1")
    with pytest.raises(ValueError, match="parquet that cannot be read"):
        read_dialogues(path)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match=r"looks like parquet, which pyarrow reads: pip install pyarrow"):
        read_dialogues(path)


# ---- what is no file of dialogues ------------------------------------------------------------------------------------
NONE = {
    "CSV": ("id,prompt,completion\n1,hi,yo\n", r"holds no JSON: it looks like CSV"),
    "TSV": ("id\tprompt\n1\thi\n", r"looks like TSV"),
    "prose with a comma": ("Well, hello\nthere\n", "looks like plain text"),
    "text": ("User: hi\nBot: yo\n" * 50, "looks like plain text"),
    "HTML": ("\n<!DOCTYPE html>\n<html>404</html>", "looks like an HTML page, perhaps an error page"),
    "LFS": ("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 3\n", "looks like a Git LFS pointer"),
    "annex": ("/annex/objects/MD5-s3--ab\n", "looks like a git-annex pointer"),
    "YAML": ("- messages:\n    - role: user\n", "looks like YAML"),
    "Python": ("{'messages': []}\n" * 50, "looks like Python's own notation"),
    "zip": (b"PK\x03\x04" + bytes(range(256)), "looks like a zip archive"),
    "bytes": (bytes(range(1, 256)) * 9, "looks like a binary file"),
    "cut parquet": (b"PAR1\x15\x04", "looks like parquet that is cut short"),
    "UTF-16 that is none": (b"\xff\xfea\x00\x00\xd8a", "begins as UTF-16 and is not"),
    "numbers": ("7\n8\n", "looks like plain text"),
    "other objects": (json.dumps({"foo": 1, "bar": "x" * 9999}), "line 1: is an object with the keys 'foo', 'bar'"),
    "many others": ('{"foo": 1}\n' * 50, "line 1: is an object with the keys 'foo': no dialogue in"),
    "a message a line": ("".join(json.dumps(m) + "\n" for m in (HI, YO)), "line 1: is one message"),
    "texts without roles": (json.dumps({"dialog": ["hi", "yo"]}), "is an object with the keys 'dialog'"),
    "a table by columns": (json.dumps({"messages": {"0": [HI, YO]}}), "list"),
    "one whole, one answer": (json.dumps({"chosen": [HI, YO], "rejected": "x"}), "must both be whole dialogues"),
    "answers without a prompt": (json.dumps({"chosen": "x" * 9999, "rejected": "x"}), "without a prompt must be whole"),
    "no answer": (json.dumps({"chosen": [HI, YO], "rejected": [HI, HI]}), "rejected must end with an answer .* 'user'"),
    "a call that is none": (json.dumps({"conversations": [{"from": "function_call", "value": "x" * 9999}]}),
                            "a function_call must be JSON with name and arguments"),
    "an image": (json.dumps({"messages": [{"role": "user", "content": [{"type": "image_url", "url": "x" * 9999}]}]}),
                 "message 0: content must be text: its part 0 is 'image_url'"),
    "a role of 9999 letters": (json.dumps({"messages": [{"role": "x" * 9999, "content": ""}]}), "message 0: role must"),
    "a completion of numbers": (json.dumps({"prompt": "hi", "completion": [1] * 9999}), "completion must be a text or"),
    "a history of texts": (json.dumps({"prompt": "hi", "output": "yo", "history": ["a"]}), "history must be a list of"),
    "two system texts": (json.dumps({"system": "s", "conversations": [{"from": "system", "value": "t"}, HUMAN, GPT]}),
                         "must have one system message"),
    "a system text of numbers": (json.dumps({"system": 3, "conversations": [HUMAN, GPT]}), "system must be a text"),
}  # fmt: skip


@pytest.mark.parametrize(("raw", "rule"), NONE.values(), ids=NONE)
def test_anything_else_is_one_line_that_says_what_it_looks_like(raw, rule, tmp_path, recwarn):
    path = tmp_path / "x.jsonl"
    path.write_bytes(raw if isinstance(raw, bytes) else raw.encode())
    for reader in (read_dialogues, read_prompts):
        for strict in (False, True):
            with pytest.raises(ValueError, match=rule) as error:
                reader(path, strict=strict)
            text = str(error.value).replace(str(path), "")
            assert "\n" not in text
            assert len(text) < 420
            assert not any("x" * 300 in str(one) for one in (text, *(w.message for w in recwarn)))
            if "it looks like" in text:
                assert RECIPES in text
    assert not recwarn.list, "one message, not twenty"


def test_a_prompt_alone_is_no_dialogue_and_a_bad_reward_costs_its_own(tmp_path):
    with pytest.raises(ValueError, match=r"line 1: holds 'prompt' without an answer .*it is one for --prompts"):
        read(tmp_path / "p.jsonl", {"prompt": "hi"})
    path = write(tmp_path / "p.jsonl", SAID, {**SAID, "reward": "high"}, {**SAID, "reward": 1e39}, {"prompt": "hi"})
    with pytest.warns(UserWarning, match="left out") as caught:
        found = read_file(path)
    assert [d.id for d in found.dialogues] == ["p/1"]
    said = " ".join(str(w.message) for w in caught)
    assert "line 2: dialogue 'p/2': reward must be a number, or thumbs up or down, got 'high'" in said
    assert "line 3: dialogue 'p/3', turn 0: a reward must be finite in float32" in said
    assert [d.turn_rewards for d in read_file(path, scored=False).dialogues] == [(None,)] * 3


def test_a_folder_is_named(tmp_path):
    with pytest.raises(IsADirectoryError, match="is a folder; give one file"):
        read_dialogues(tmp_path)
