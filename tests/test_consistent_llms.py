"""The importer of the Consistent-LLMs family: small files with each of its traps, and the real ones where they are at
hand."""

import copy
import json
import re
import warnings
from pathlib import Path

import pytest

from ppg_fast.dialogues.consistent_llms import SCORE, VERDICTS, verdict
from ppg_fast.dialogues.dialogue import Message, read_dialogues, write_dialogues

REAL = Path(__file__).parents[1].parent / "shared/data/consistent-llms"


def record(verdicts, score, **changes):
    """A dialogue of Guide (P1) and Visitor (P2) whose P2 lines have the given verdicts."""
    lines = []
    for turn in range(len(verdicts)):
        lines += [[2 * turn, f"Guide: question {turn}\n"], [2 * turn + 1, f"Visitor: answer {turn}\n"]]
    judged = [[2 * turn + 1, f"It says so, I say {word}."] for turn, word in enumerate(verdicts) if word]
    return {"P1": "", "P2": "You visit.", "conversation": lines, VERDICTS: judged, SCORE: score, **changes}


def read(tmp_path, *records, strict=True):
    path = tmp_path / "family.json"
    path.write_text(json.dumps(records, indent=1), encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return read_dialogues(path, strict)


def rewards(tmp_path, *records):
    return [dialogue.turn_rewards for dialogue in read(tmp_path, *records)]


def test_messages(tmp_path):
    (dialogue,) = read(tmp_path, record(["YES", "NO", "NO"], 1 / 3))
    said = [("user", "question 0"), ("assistant", "answer 0"), ("user", "question 1"), ("assistant", "answer 1")]
    assert dialogue.messages[:5] == (Message("system", "You visit."), *(Message(*pair) for pair in said))
    assert dialogue.id == "family/0"


def test_polarity_is_what_reproduces_the_score(tmp_path):
    assert rewards(tmp_path, record(["YES", "NO", "NO"], 1 / 3)) == [(1.0, 0.0, 0.0)]
    assert rewards(tmp_path, record(["YES", "NO", "NO"], 2 / 3)) == [(0.0, 1.0, 1.0)]
    assert rewards(tmp_path, record(["YES", "NO", "NO"], 0.333)) == [(1.0, 0.0, 0.0)], (
        "a mean rounded to three decimals"
    )


def test_a_tie_is_decided_by_the_rest_of_the_file(tmp_path):
    tie = record(["YES", "NO"], 0.5)
    assert rewards(tmp_path, tie, record(["YES", "NO", "NO"], 1 / 3))[0] == (1.0, 0.0)
    assert rewards(tmp_path, tie, record(["YES", "NO", "NO"], 2 / 3))[0] == (0.0, 1.0)
    with pytest.raises(
        ValueError, match=r"cannot tell .* dialogue 0 .* 0\.5, the share of YES is 0\.5000, of NO 0\.5000"
    ):
        read(tmp_path, tie, tie)


NEITHER = r"dialogue 1 \(line \d+\): neither YES nor NO .* is 0\.9, the share of YES is 0\.3333, of NO 0\.6667"


def test_a_score_that_neither_polarity_reproduces_costs_its_dialogue(tmp_path):
    good, bad = record(["YES", "NO", "NO"], 1 / 3), record(["YES", "NO", "NO"], 0.9)
    with pytest.raises(ValueError, match=NEITHER):
        read(tmp_path, good, bad)
    assert [d.id for d in read(tmp_path, good, bad, good, strict=False)] == ["family/0", "family/2"]
    with pytest.raises(ValueError, match=r"no valid dialogue; first problem: .*dialogue 0 .*neither YES nor NO"):
        read(tmp_path, bad, strict=False)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "lenient"])
def test_dialogues_of_opposite_polarity(tmp_path, strict):
    other, one = record(["YES", "NO", "NO"], 1 / 3), record(["YES", "NO", "NO"], 2 / 3)
    with pytest.raises(ValueError, match=r"YES in one dialogue and NO in another.*dialogue 0.*dialogue 1"):
        read(tmp_path, other, one, one, one, strict=strict)
    rule = r"dialogue 1 .*consistent is YES here and NO in 4 other dialogues of the file"
    if strict:
        with pytest.raises(ValueError, match=rule):
            read(tmp_path, one, other, one, one, one)
    else:
        dialogues = read(tmp_path, one, other, one, one, one, strict=False)
        assert [(d.id, d.turn_rewards) for d in dialogues] == [(f"family/{n}", (0.0, 1.0, 1.0)) for n in (0, 2, 3, 4)]


def test_a_verdict_that_holds_both_words_counts_either_way(tmp_path):
    """The authors' rule is `"YES" not in output`, whatever the last word is."""
    both, small = "contradicts him, YES? In the end NO", "it does not. Yes."
    judged = ["NO", "NO", both, "YES", small]  # by their rule NO, NO, YES, YES, NO: 3 of 5
    (dialogue,) = read(tmp_path, record(judged, 3 / 5))
    assert dialogue.turn_rewards == (1.0, 1.0, 1.0, 0.0, 0.0)
    # by the last word YES fits, by the authors' rule NO: the file is not decided by a guess
    undecided = record(["NO", "YES", both], 1 / 3)
    with pytest.raises(ValueError, match="cannot tell whether YES or NO means consistent"):
        read(tmp_path, undecided)
    assert read(tmp_path, undecided, record(["NO", "NO"], 1.0))[0].turn_rewards == (1.0, 0.0, 1.0)
    # none decides, and every rule of counting that gives the scores has the same word
    assert rewards(tmp_path, record([both, both, "YES"], 1 / 3)) == [(0.0, 0.0, 1.0)]


def test_personas_of_one_name_take_turns(tmp_path):
    same = {
        "pturn": 1,
        "P1": "Ethan, a baker",
        "P2": "Ethan, a miner",
        "conversation": [[0, "Ethan: I bake"], [1, "Ethan: I mine"]],
        "eval_prompt_consistency": [[0, "fits. NO"], [1, "fits. NO"]],
        "P2_prompt_consistency_score": 1.0,
    }
    (dialogue,) = read(tmp_path, same)
    assert [(m.role, m.content) for m in dialogue.messages[1:]] == [("user", "I bake"), ("assistant", "I mine")]
    assert dialogue.turn_rewards == (1.0,)
    (dialogue,) = read(tmp_path, same | {"pturn": 2})
    assert [(m.role, m.content) for m in dialogue.messages[1:]] == [("assistant", "I bake"), ("user", "I mine")]


def test_a_conversation_of_another_kind_is_none_of_the_family(tmp_path):
    said = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    (dialogue,) = read(tmp_path, {"conversation": said, "score": 1})
    assert [m.as_dict() for m in dialogue.messages] == said
    assert dialogue.turn_rewards == (1.0,)


def test_lines_without_a_verdict_are_unscored(tmp_path):
    said_nothing = record(["YES", "", "NO", "NO"], 0.25)
    assert rewards(tmp_path, said_nothing) == [(1.0, None, 0.0, 0.0)]
    counted_as_consistent = copy.deepcopy(said_nothing) | {SCORE: 0.75}
    counted_as_consistent[VERDICTS].append([3, "I cannot decide."])
    assert rewards(tmp_path, counted_as_consistent) == [(0.0, None, 1.0, 1.0)]
    without_that_line = record(["YES", "", "NO", "NO"], 1 / 3)
    assert rewards(tmp_path, without_that_line) == [(1.0, None, 0.0, 0.0)]


@pytest.mark.parametrize("missing", [{VERDICTS: None}, {VERDICTS: []}], ids=str)
def test_a_file_without_verdicts_is_unscored(tmp_path, missing):
    assert rewards(tmp_path, record(["YES", "NO"], 0, **missing)) == [(None, None)]


def test_a_dialogue_without_a_score_takes_the_polarity_of_the_file(tmp_path):
    unscored = record(["YES", "NO"], None)
    del unscored["P1"]
    assert rewards(tmp_path, record(["YES", "NO", "NO"], 2 / 3), unscored)[1] == (0.0, 1.0)
    del unscored[SCORE]
    assert rewards(tmp_path, record(["YES", "NO", "NO"], 2 / 3), unscored)[1] == (0.0, 1.0)
    with pytest.raises(ValueError, match="cannot tell"):
        read(tmp_path, unscored)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("not YES in the end. NO", "NO"),
        ("It is NOT so, NOTE this: YES.", "YES"),
        ("**NO** (YES was possible)", "YES"),
        ("it contradicts. (Yes)", "YES"),
        ("No.", "NO"),
        ("there is no conflict here", None),
        ("", None),
        (None, None),
    ],
)
def test_verdict(text, word):
    assert verdict(text) == word


def test_only_the_known_role_is_stripped(tmp_path):
    dialogue = record(["YES", "NO", "NO"], 1 / 3)
    dialogue["conversation"][1][1] = "Visitor: Guide: note this: at 10:30, Visitor: go\nGuide: no\n"
    assert read(tmp_path, dialogue)[0].messages[2].content == "Guide: note this: at 10:30, Visitor: go\nGuide: no"


def test_both_speakers_judged_and_names_differ_between_dialogues(tmp_path):
    """As the family's chats have it: P2 is the second to speak, and both personas are judged."""
    chats = []
    for first, second in (("Ann", "Bo"), ("Cy", "Dee")):
        lines = [
            [0, f"{first}: a\n"],
            [1, f"{second}: b\n"],
            [2, f"{first}: c\n"],
            [3, f"{second}: d\n"],
            [4, f"{first}: e\n"],
            [5, f"{second}: f\n"],
        ]
        judged = [[n, word] for n, word in enumerate(["YES", "YES", "YES", "NO", "YES", "NO"])]
        chats.append(
            {
                "P1": "x",
                "P2": "y",
                "pturn": 1,
                "conversation": lines,
                VERDICTS: judged,
                "P1_prompt_consistency_score": 1.0,
                SCORE: 1 / 3,
            }
        )
    dialogues = read(tmp_path, *chats)
    assert [d.turn_rewards for d in dialogues] == [(1.0, 0.0, 0.0)] * 2
    assert [m.content for m in dialogues[1].messages if m.role == "assistant"] == ["b", "d", "f"]
    (p2_first,) = read(tmp_path, chats[0] | {"pturn": 2, SCORE: 1.0})
    assert [m.content for m in p2_first.messages if m.role == "assistant"] == ["a", "c", "e"]
    assert p2_first.turn_rewards == (1.0, 1.0, 1.0)
    only_first_judged = copy.deepcopy(chats[0])
    only_first_judged[VERDICTS] = only_first_judged[VERDICTS][::2]
    del only_first_judged[SCORE]
    (dialogue,) = read(tmp_path, only_first_judged)
    assert [m.content for m in dialogue.messages if m.role == "assistant"] == ["b", "d", "f"]
    assert dialogue.turn_rewards == (None, None, None)


def test_the_judged_speaker_is_the_assistant_even_if_it_speaks_first(tmp_path):
    lines = [[0, "Visitor: hello\n"], [1, "Guide: hi\n"], [2, "Visitor: bye\n"]]
    judged = [[0, "YES"], [2, "YES"]]
    (dialogue,) = read(tmp_path, {"P2": "You visit.", "conversation": lines, VERDICTS: judged, SCORE: 1.0})
    assert [m.role for m in dialogue.messages] == ["system", "assistant", "user", "assistant"]


def test_gaps_in_line_numbers_empty_lines_and_no_persona(tmp_path):
    dialogue = record(["YES", "NO", "NO"], 1 / 3, P2="", conversation_only=True)
    dialogue["conversation"] = [[7 * n, text] for n, text in dialogue["conversation"]]
    dialogue[VERDICTS] = [[7 * n, text] for n, text in dialogue[VERDICTS]]
    dialogue["conversation"][3][1] = "Visitor: \n"
    (read_back,) = read(tmp_path, dialogue)
    assert read_back.turn_rewards == (1.0, 0.0, 0.0)
    assert [m.content for m in read_back.messages] == [
        "question 0",
        "answer 0",
        "question 1",
        "",
        "question 2",
        "answer 2",
    ]
    assert read_back.group_id == read_back.id, "without a persona nothing says which dialogues share a prompt"


def test_dialogues_of_one_persona_are_one_group(tmp_path):
    same, other = record(["YES", "NO", "NO"], 1 / 3), record(["YES", "NO", "NO"], 1 / 3, P2="You hide.")
    groups = [d.group_id for d in read(tmp_path, same, same, other)]
    assert groups[0] == groups[1] != groups[2]


BAD = {
    "conversation": ({"conversation": {}}, "conversation must be a list, got dict"),
    "line": ({"conversation": [["0", "Guide: a"]]}, r"conversation entry 0 must be \[line number, text\]"),
    "line number twice": ({"conversation": [[0, "Guide: a"], [0, "Visitor: b"]]}, "line number 0 stands twice"),
    "nobody speaks": (
        {"conversation": [[0, "hello"]], VERDICTS: []},
        "line 0 does not begin with one of the two speakers",
    ),
    "third speaker": (
        {"conversation": [*record(["YES"] * 3, 1)["conversation"], [9, "Cat: purr"]]},
        "line 9 does not begin with .*Guide.*Visitor",
    ),
    "no lines": ({"conversation": [], VERDICTS: []}, "the conversation is empty"),
    "one speaker": ({"conversation": [[0, "Guide: a"]], VERDICTS: []}, "'Guide' is the only speaker"),
    "verdict on a line that is not there": ({VERDICTS: [[99, "YES"]]}, "a verdict on line 99"),
    "two verdicts": ({VERDICTS: [[1, "YES"], [1, "NO"]]}, "two verdicts on line 1"),
    "score": ({SCORE: "high"}, f"{SCORE} must be a finite number, got 'high'"),
    "NaN score": ({SCORE: float("nan")}, f"{SCORE} must be a finite number, got nan"),
    "persona": ({"P2": 7}, "P2 must be a string, got int 7"),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_a_wrong_dialogue_is_named_and_the_others_kept(tmp_path, changes, message):
    good = record(["YES", "NO", "NO"], 1 / 3)
    with pytest.raises(ValueError, match=rf"family\.json, dialogue 1 \(line \d+\).*{message}"):
        read(tmp_path, good, good | changes)
    assert [d.id for d in read(tmp_path, good, good | changes, good, strict=False)] == ["family/0", "family/2"]


def test_truncated_file_keeps_the_whole_dialogues(tmp_path):
    path = tmp_path / "family.json"
    text = json.dumps([record(["YES", "NO", "NO"], 1 / 3)] * 3, indent=1)
    last_line = text[:-200].count("\n") + 1
    path.write_text(text[:-200], encoding="utf-8")
    with pytest.warns(
        UserWarning, match=rf"family\.json, dialogue 2 \(line \d+\) is not JSON or cut short, at line {last_line}"
    ):
        assert [d.id for d in read_dialogues(path)] == ["family/0", "family/1"]
    with pytest.raises(ValueError, match="dialogue 2"):
        read_dialogues(path, strict=True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("text", ["[]", "[{}]", "[", '[{"conversation": []} {}]', "[1] 2"])
def test_lists_without_a_dialogue(tmp_path, text):
    path = tmp_path / "family.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"family\.json has no valid dialogue; first problem"):
        read_dialogues(path)


def test_bytes_that_are_not_utf8_spoil_one_dialogue(tmp_path):
    good = record(["YES", "NO", "NO"], 1 / 3)
    path = tmp_path / "family.json"
    path.write_bytes(json.dumps([good, good | {"topic": "mark"}, good]).encode().replace(b"mark", b"\xff"))
    with pytest.warns(UserWarning, match="dialogue 1 .* is not UTF-8"):
        assert [d.id for d in read_dialogues(path)] == ["family/0", "family/2"]


def test_one_family_dialogue_a_line(tmp_path):
    path = tmp_path / "family.jsonl"
    path.write_text("\n".join(json.dumps(record(["YES", "NO", "NO"], 2 / 3)) for _ in range(2)), encoding="utf-8")
    assert [d.turn_rewards for d in read_dialogues(path, strict=True)] == [(0.0, 1.0, 1.0)] * 2


FILES = {  # consistent word, dialogues, lines of the persona
    "education_mistral-instruct_0_792.json": ("NO", 32, 960),
    "therapy_mistral-instruct_0_501.json": ("YES", 43, 685),
    "therapy_long_mistral-instruct_0_959.json": ("NO", 10, 1250),
}


@pytest.mark.skipif(not REAL.is_dir(), reason=f"the real files are not at {REAL.name} beside the repository")
@pytest.mark.parametrize(("name", "facts"), FILES.items())
def test_real_file(tmp_path, name, facts):
    """Against a second reading of the same file that shares no code with the importer."""
    consistent, count, lines = facts
    originals = json.loads((REAL / name).read_text(encoding="utf-8"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dialogues = read_dialogues(REAL / name, strict=True)
        write_dialogues(tmp_path / "copy.jsonl", dialogues)
        assert read_dialogues(tmp_path / "copy.jsonl", strict=True) == dialogues
    assert len(dialogues) == len(originals) == count
    assert sum(len(d.turn_rewards) for d in dialogues) == lines
    for dialogue, original in zip(dialogues, originals, strict=True):
        assert dialogue.messages[0] == Message("system", original["P2"].strip())
        spoken = [message.content for message in dialogue.messages[1:]]
        for content, (_, text) in zip(spoken, original["conversation"], strict=True):
            assert text.strip().endswith(content)
            assert re.fullmatch(
                r"(Teacher|Student|Therapist|Patient):\s*", text[: text.rindex(content)] if content else text
            )
        # these three files counted a line without a verdict as consistent
        counted = [1.0 if reward is None else reward for reward in dialogue.turn_rewards]
        assert sum(counted) / len(counted) == pytest.approx(original[SCORE])
        for reward, (_, text) in zip(dialogue.turn_rewards, original[VERDICTS], strict=True):
            if text.rstrip(" .)*").endswith((" YES", " NO")):
                assert reward == float(text.rstrip(" .)*").endswith(consistent))
