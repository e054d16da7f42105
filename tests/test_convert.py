"""`ppg-fast convert`, `ppg-fast score` and training on files as others have them, from end to end."""

import gzip
import json
import warnings
from pathlib import Path

import pytest

from ppg_fast.cli import main
from ppg_fast.dialogues import read_dialogues

HI, YO = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
TOLD = {
    "messages": [
        {"role": "developer", "content": [{"type": "text", "text": "Be kind."}], "at": 1},
        HI,
        {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None},
        {"role": "tool", "tool_call_id": "c1", "content": "12 C"},
        {**YO, "weight": 0, "logprobs": None},
        {**YO, "name": ""},
    ],
    "tools": [{"type": "function", "function": {"name": "weather"}}],
    "parallel_tool_calls": False,
    "score": 0.25,
    "odd": "\ud800",
}
SHAREGPT = {"id": 3, "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}], "lang": "de"}
EXTRA = ["--reward", "rewards.py:length"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("rewards.py").write_text("def length(messages):\n    return float(len(messages[-1]['content']))\n")
    write("in.jsonl", TOLD, SHAREGPT, {"messages": [HI]}, {"prompt": "hi", "chosen": "a\x1b[31m", "rejected": "b"})


def write(name, *values):
    Path(name).write_text("".join(json.dumps(value) + "\n" for value in values))


def rows(name):
    return [json.loads(text) for text in Path(name).read_text().split("\n") if text]


def test_convert_shows_what_it_understood_and_writes_it(capsys):
    assert main(["convert", "in.jsonl", "-o", "out.jsonl"]) == 0
    printed = capsys.readouterr()
    assert printed.out.split("\n") == [
        "in.jsonl: 4 dialogues (2 as chosen and rejected, 1 as messages, 1 as conversations (ShareGPT)), 1 left out",
        "12 messages, 1 tool calls, 2 groups",
        "6 turns, 3 scored (mean 0.417, 0 to 1), 3 not (they count as 0)",
        "1 messages are not trained: their line says so",
        "made: id of 3 from the file's name and the place in it",
        "made: group_id of 4 from the opening",
        "made: the reward of the last turn of 1 from 'score'",
        "made: the reward of the last turn of 2: 1 of what was chosen, 0 of what was rejected",
        "kept beside: parallel_tool_calls, score, odd, lang",
        "left out: in.jsonl, line 3: dialogue 'in/3' has no assistant message among its 1 messages",
        "",
        f"first dialogue: in/1, group {rows('out.jsonl')[0]['group_id']}",
        "  tools     1",
        "  system    Be kind.",
        "  user      hi",
        "  turn 0     -> calls weather  [no reward]",
        "  tool      12 C",
        "  turn 1    yo  [no reward, not trained]",
        "  turn 2    yo  [reward 0.25]",
        "out.jsonl: 4 dialogues written",
        "",
    ]
    assert printed.err == ""
    told, sharegpt, chosen, _ = rows("out.jsonl")
    assert told == {**TOLD, "id": "in/1", "group_id": told["group_id"], "turn_rewards": [None, None, 0.25]}
    made = {"id": "3", "group_id": sharegpt["group_id"], "turn_rewards": [None]}
    assert sharegpt == {**made, "messages": [HI, YO], "lang": "de"}
    assert (chosen["id"], chosen["turn_rewards"]) == ("in/4/chosen", [1.0])


@pytest.mark.parametrize("flags", [[], ["--strict"]])
def test_converting_what_was_converted_changes_nothing(flags, capsys):
    assert main(["convert", "in.jsonl", "-o", "one.jsonl"]) == 0
    assert main(["convert", "one.jsonl", "-o", "two.jsonl", *flags]) == 0
    assert Path("one.jsonl").read_bytes() == Path("two.jsonl").read_bytes()
    assert "0 left out" in capsys.readouterr().out


def test_nothing_is_written_where_something_is_refused(capsys):
    before = sorted(p.name for p in Path().iterdir())
    for flags, rule in (
        (["in.jsonl", "-o", "out.jsonl", "--strict"], "in.jsonl, line 3: dialogue 'in/3' has no assistant message"),
        (["in.jsonl", "-o", "in.jsonl", "--overwrite"], "--output must be another file than the input"),
        (["in.jsonl", "-o", "rewards.py"], "rewards.py exists: give another --output, or --overwrite"),
        (["rewards.py", "-o", "out.jsonl"], "rewards.py holds no JSON: it looks like plain text"),
        (["gone.jsonl", "-o", "out.jsonl"], "No such file"),
        ([".", "-o", "out.jsonl"], "is a folder; give one file of dialogues"),
    ):
        assert main(["convert", *flags]) == 1
        printed = capsys.readouterr()
        assert rule in printed.err
        assert printed.err.count("\n") == 1
        assert printed.out == ""
    assert sorted(p.name for p in Path().iterdir()) == before
    assert main(["convert", "in.jsonl"]) == 0
    assert "left out: in.jsonl, line 3" in capsys.readouterr().out
    assert sorted(p.name for p in Path().iterdir()) == before, "without -o it only shows"
    assert main(["convert", "in.jsonl", "-o", "rewards.py", "--overwrite"]) == 0
    assert len(rows("rewards.py")) == 4


def test_the_lines_alone_on_standard_output(capfd):
    assert main(["convert", "in.jsonl", "-o", "/dev/stdout"]) == 0
    printed = capfd.readouterr()
    assert [json.loads(line)["id"] for line in printed.out.splitlines()] == [
        "in/1",
        "3",
        "in/4/chosen",
        "in/4/rejected",
    ]
    assert "4 dialogues written" in printed.err


def test_no_message_shows_what_a_terminal_would_obey(capsys):
    write("in.jsonl", {"prompt": "hi\x1b[31m\nthere", "completion": "\x07" + "x" * 999})
    assert main(["convert", "in.jsonl"]) == 0
    out = capsys.readouterr().out
    assert "hi\ufffd[31m there" in out
    assert f"\ufffd{'x' * 99}..." in out
    assert "\x1b" not in out


def test_score_writes_back_everything_that_a_line_came_with(capsys):
    pytest.importorskip("transformers")
    Path("in.jsonl.gz").write_bytes(gzip.compress(Path("in.jsonl").read_bytes()))
    assert main(["score", "in.jsonl.gz", "-o", "out.jsonl", *EXTRA]) == 0
    printed = capsys.readouterr()
    assert "no reward" not in printed.err
    told, sharegpt, *pair = rows("out.jsonl")
    assert told == {**TOLD, "id": "in/1", "group_id": told["group_id"], "turn_rewards": [0.0, 2.0, 2.0]}
    assert list(sharegpt) == ["id", "group_id", "messages", "turn_rewards", "lang"]
    assert [line["turn_rewards"] for line in pair] == [[6.0], [1.0]]


def test_rewards_that_a_file_has_are_not_needed_to_score_it():
    pytest.importorskip("transformers")
    judged = {"P2": "You visit.", "conversation": [[0, "A: hi"], [1, "B: yo"]]}
    judged |= {"eval_prompt_consistency": [[1, "YES"]], "P2_prompt_consistency_score": 0.3}  # which no word gives
    write("in.jsonl", {"messages": [HI, YO], "turn_rewards": [1, 2, 3]}, judged)
    assert main(["score", "in.jsonl", "-o", "out.jsonl", *EXTRA, "--strict"]) == 0
    assert [row["turn_rewards"] for row in rows("out.jsonl")] == [[2.0], [2.0]]


# ---- training --------------------------------------------------------------------------------------------------------
OTHER = {"messages": [YO, {**HI, "content": "ho"}, YO]}


def warned_of(*lines, **settings):
    """What a job that would train on the lines warns of."""
    pytest.importorskip("transformers")
    from ppg_fast.config import make_config
    from ppg_fast.jobs.offline import OfflineJob

    write("in.jsonl", *lines)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        job = OfflineJob(make_config({"data": "in.jsonl", "width": 16, "layers": 1, **settings}))
    assert len(job.samples) == len(lines)
    return " ".join(str(warning.message) for warning in caught)


def test_bare_messages_train_and_are_told_to_be_unscored():
    said = warned_of(*[{"messages": [HI, YO] * 2}] * 2, OTHER)
    assert "in.jsonl: 6 of 6 assistant messages have no reward; they count as 0" in said
    assert (
        "every reward is 0, so nothing is learned: ppg-fast score gives rewards; supervised fine-tuning wants" in said
    )
    assert "--imitate" in said


def test_equal_rewards_are_no_supervised_fine_tuning_under_a_wide_class():
    line = {"messages": [HI, YO] * 9, "turn_rewards": [1] * 9}
    said = warned_of(line, line)
    assert "every reward is 1, and lookahead:3 weighs the turns 3, 3, 3, ..., 2, 1; supervised fine-tuning" in said
    said = warned_of(line, line, policy_class="greedy")
    assert said == ""


def test_a_dialogue_that_the_assistant_begins_is_trained_and_no_dialogue_is_empty():
    said = warned_of({**OTHER, "turn_rewards": [1, 0]}, {**OTHER, "turn_rewards": [0, 1]})
    assert said == ""
    assert read_dialogues("in.jsonl")[0].messages[0].role == "assistant"
