"""Rewards: every kind through one interface, combined, and what goes wrong named with dialogue and turn."""

import json
import math
import shutil

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("httpx2")

import safetensors.torch
import transformers
from openai_server import said, serve

from ppg_fast.dialogues.chat_format import make_word_tokenizer
from ppg_fast.dialogues.dialogue import Message
from ppg_fast.endpoint import Endpoint
from ppg_fast.rewards import (
    Judge,
    PythonReward,
    Ratings,
    Reward,
    RewardModel,
    Transcript,
    load_function,
    make_rewards,
    score,
)
from ppg_fast.rewards.judge import parse_score


def transcript(name="d", answers=("one", "two three"), **info):
    messages = [Message("system", "be kind")]
    for n, answer in enumerate(answers):
        messages += [Message("user", f"question {n}"), Message("assistant", answer)]
    return Transcript(name, tuple(messages), info)


def words(messages):
    return len(messages[-1]["content"].split())


def test_in_scope_turn_a_reward_sees_the_dialogue_so_far():
    seen = []
    reward = Reward(
        "spy",
        PythonReward(
            lambda messages, id: seen.append((id, [m["content"] for m in messages])) or words(messages), "spy"
        ),
    )
    assert reward.turns([transcript(), transcript("e", ("x",))]) == [[1.0, 2.0], [1.0]]
    assert seen[0] == ("d", ["be kind", "question 0", "one"])
    assert seen[1] == ("d", ["be kind", "question 0", "one", "question 1", "two three"])
    assert seen[2][0] == "e"


def test_in_scope_dialogue_one_number_goes_to_the_last_turn_and_several_to_theirs():
    whole = lambda f: Reward("r", PythonReward(f, "r"), "dialogue").turns([transcript()])  # noqa: E731
    assert whole(lambda messages: len(messages)) == [[0.0, 5.0]]
    assert whole(lambda messages: [1, None]) == [[1.0, None]]
    assert whole(lambda messages: torch.tensor([0.5, 2.0])) == [[0.5, 2.0]]
    assert whole(lambda messages: torch.tensor(3.0)) == [[0.0, 3.0]]
    assert whole(lambda messages: None) == [[None, None]]


def test_weights_add_up_and_what_one_leaves_out_the_others_give():
    rewards = [
        Reward("a", PythonReward(words, "a"), weight=0.5),
        Reward("b", PythonReward(lambda messages: None if words(messages) == 1 else 10.0, "b"), weight=-0.1),
        Reward("c", PythonReward(lambda messages: None, "c")),
    ]
    scores = score(rewards, [transcript()])
    assert scores.totals == [[0.5, pytest.approx(0.5 * 2 - 0.1 * 10)]]
    assert (scores.unscored, score(rewards[2:], [transcript()]).unscored) == (0, 2)
    metrics = scores.describe()
    assert (metrics["rewards/a/mean"], metrics["rewards/a/std"], metrics["rewards/b/mean"]) == (1.5, 0.5, 10.0)


@pytest.mark.parametrize(
    ("function", "scope", "message"),
    [
        (
            lambda messages: {}["gone"],
            "turn",
            r"reward f failed at dialogue 'd', turn 0: KeyError: 'gone' \(test_rewards.py, line \d+: .*gone",
        ),
        (lambda messages: math.nan, "turn", "reward f at dialogue 'd', turn 0, must be a finite number.*got nan"),
        (lambda messages: "7", "turn", "dialogue 'd', turn 0, must .*got '7'"),
        (lambda messages: [1.0, 2.0], "turn", r"dialogue 'd', turn 0, .*\(one per turn wants @dialogue\)"),
        (lambda messages: [1.0], "dialogue", "reward f at dialogue 'd' must give one number or one per turn, 2, got 1"),
        (lambda messages: [1.0, math.inf], "dialogue", "dialogue 'd' at turn 1 must be a finite number.*got inf"),
        (lambda messages, answer: 1.0, "turn", "asks for answer, which dialogue 'd', turn 0 has not"),
    ],
)
def test_a_function_that_fails_is_named_with_dialogue_and_turn(function, scope, message):
    reward = Reward("f", PythonReward(function, "f"), scope)
    with pytest.raises(ValueError, match=message):
        reward.turns([transcript()])


def test_a_scorer_must_give_a_value_for_each():
    with pytest.raises(ValueError, match="one value for each of 2 dialogues, got 1"):
        Reward("short", lambda transcripts: [1.0]).turns([transcript()])


def test_functions_are_found_by_file_or_module_and_get_what_they_name(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "def right(messages, answer, id, weight=2.0): return weight * (messages[-1]['content'] == answer)\n"
        "def all(messages, **info): return len(info)\n"
    )
    given = transcript(answer="two three", topic="x")
    (reward,) = make_rewards(f"{tmp_path / 'mine.py'}:right")
    assert (reward.name, reward.turns([given])) == ("right", [[0.0, 2.0]])
    monkeypatch.chdir(tmp_path)
    assert make_rewards("mine:all")[0].turns([given]) == [[3.0, 3.0]]
    for where, message in [
        ("mine.py:gone", "has no function 'gone'"),
        ("nowhere.py:f", "cannot be loaded"),
        ("mine", "module:function or file.py:function"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_function(where)


def test_a_formula_names_weights_scopes_and_kinds(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def f(messages): return 1.0\ndef g(messages): return 2.0\n")
    rewards = make_rewards(f"0.5*{path}:f + -2e-1 * {path}:g@dialogue + {path}:f")
    assert [(r.name, r.weight, r.scope) for r in rewards] == [
        ("f", 0.5, "turn"),
        ("g", -0.2, "dialogue"),
        ("f_2", 1.0, "turn"),
    ]
    assert score(rewards, [transcript()]).totals == [[pytest.approx(1.5), pytest.approx(1.1)]]
    with pytest.raises(ValueError, match="wants a judge"):
        make_rewards("judge")
    with pytest.raises(ValueError, match="judge_range must be LOW:HIGH"):
        make_rewards("judge", lambda: Endpoint("http://h/v1"), judge_range="10")
    with pytest.raises(ValueError, match="numbers that rise"):
        make_rewards("judge", lambda: Endpoint("http://h/v1"), judge_range="5:5")


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        ("It is true to the persona.\nSCORE: 7", 7.0),
        ("a score of 3\n... on reflection\n**Score:** **8.5**/10.", 8.5),
        ('{"reason": "fine", "score": 4}', 4.0),
        (" 6 ", 6.0),
        ("6/10", 6.0),
        ("<think>score: 9? no</think>\nScore = 2", 2.0),
        ("SCORE: <5>", 5.0),
        ("SCORE: 0", 0.0),
        ("SCORE: 11", None),
        ("SCORE: -1", None),
        ("SCORE: 7-8", None),
        ("SCORE: 7,5", None),
        ("SCORE: 70%", None),
        ("SCORE: 4/5", None),
        ("SCORE: 1.2.3", None),
        ("turn 3 is good", None),
        ("<think>SCORE: 9", None),
        ("SCORE: nan", None),
        ("", None),
    ],
)
def test_a_score_is_read_or_refused_never_guessed(reply, value):
    assert parse_score(reply, 0, 10) == value


def test_a_judge_sees_the_rubric_and_the_dialogue_as_material_and_is_asked_again():
    replies = {"one": ["no idea", "SCORE: 13", "SCORE: 8"], "two three": ["hm"] * 9}

    def judge(path, payload):
        dialogue = json.loads(payload["messages"][1]["content"].split("\n\n")[1])
        return said(replies[dialogue[-1]["content"]].pop(0))

    with serve(judge) as server:
        judged = Judge(Endpoint(server.url), "Is it kind?", low=4, high=12)
        assert Reward("judge", judged).turns([transcript()]) == [[0.5, None]]
    assert judged.unparsable == 1


def test_a_judge_of_whole_dialogues_is_asked_once(tmp_path):
    (tmp_path / "rubric.txt").write_text("Is it kind?\n")
    with serve(lambda *_: said("SCORE: 5")) as server:
        (reward,) = make_rewards(f"judge:{tmp_path / 'rubric.txt'}@dialogue", lambda: Endpoint(server.url, "m"))
        assert reward.turns([transcript()]) == [[0.0, 0.5]]
    ((_, payload),) = server.requests
    assert payload["messages"][0] == {"role": "system", "content": "Is it kind?"}
    assert "as a whole" in payload["messages"][1]["content"]
    assert payload["temperature"] == 0.0


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_ratings_are_averaged_over_raters(tmp_path):
    rows = [
        {"id": "d", "turn": 0, "rating": 4, "rater": "a"},
        {"id": "d", "turn": 0, "rating": 1, "rater": "b"},
        {"id": "e", "rating": 2.5},
        {"id": "other", "turn": 0, "rating": 1},
    ]
    (reward,) = make_rewards("2*ratings:" + write(tmp_path / "r.jsonl", rows))
    assert reward.turns([transcript(), transcript("e"), transcript("f")]) == [[2.5, None], [None, 2.5], [None, None]]
    assert (reward.weight, reward.scorer.unused) == (2.0, ["other"])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"id": "d", "turn": 5, "rating": 1}], "rates turn 5 of dialogue 'd', which has 2"),
        ([{"id": "d", "turn": 0, "rating": 1}] * 2, "line 2: rater None rates dialogue 'd', turn 0, a second time"),
        ([{"id": "d", "turn": 1, "rating": 1}, {"id": "d", "rating": 1}], "last turn of dialogue 'd' with and without"),
        ([{"id": "d", "turn": 0, "rating": math.nan}], "line 1: a rating must be a finite number, got nan"),
        ([{"id": "d", "turn": 0, "rating": True}], "finite number, got True"),
        ([{"id": "d", "turn": -1, "rating": 1}], "line 1: id must be a string and turn an integer >= 0"),
        ([{"id": "d"}], "line 1 must be a JSON object with id and rating"),
        ([3], "line 1 must be a JSON object"),
        ([], "holds no rating"),
    ],
)
def test_bad_ratings_are_named(rows, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        Ratings(write(tmp_path / "r.jsonl", rows))([transcript()])


@pytest.fixture(scope="module")
def reward_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rm")
    tokenizer = make_word_tokenizer(["be", "kind", "question", "0", "1", "one", "two", "three"])
    config = transformers.Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=32,
        num_labels=1,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    transformers.Qwen3ForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_reward_model_gives_its_logit_whatever_the_batch(reward_folder):
    (reward,) = make_rewards(f"model:{reward_folder}")
    many = [transcript(), transcript("e", ("three <e<end>nd> one",)), transcript("f", ("one", "two", "three"))]
    batched = reward.turns(many)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(reward_folder)
    for row, t in zip(batched, many, strict=True):
        for value, prefix in zip(row, t.prefixes(), strict=True):
            messages = [{"role": m.role, "content": m.content.replace("<e<end>nd>", "")} for m in prefix.messages]
            tokens = reward.scorer.tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
            assert value == pytest.approx(float(model(input_ids=tokens["input_ids"]).logits.detach()), abs=1e-5)
    reward.scorer.max_tokens = 1
    for one, other in zip(batched, reward.turns(many), strict=True):
        assert one == pytest.approx(other, abs=1e-5)
    reward.scorer.pad = None
    assert reward.turns(many)[0] == pytest.approx(batched[0], abs=1e-5)


def test_a_reward_model_names_what_it_cannot_read(reward_folder, tmp_path):
    with pytest.raises(ValueError, match=r"at most 32 tokens, got .* in dialogue 'long' up to turn 1"):
        RewardModel(str(reward_folder))([transcript("long", ("one", "two " * 30))])
    with pytest.raises(ValueError, match="must be a folder with a Hugging Face checkpoint"):
        RewardModel(str(tmp_path))
    transformers.AutoModelForSequenceClassification.from_pretrained(
        reward_folder, num_labels=3, ignore_mismatched_sizes=True
    ).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(reward_folder).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must have one label, got 3"):
        RewardModel(str(tmp_path))


def test_a_reward_model_that_lacks_weights_or_is_damaged_is_refused_in_one_line(reward_folder, tmp_path):
    shutil.copytree(reward_folder, tmp_path, dirs_exist_ok=True)
    weights = tmp_path / "model.safetensors"
    kept = safetensors.torch.load_file(weights)
    del kept["score.weight"]  # transformers would draw it at random
    safetensors.torch.save_file(kept, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"must hold all of its weights, .* lacks score.weight"):
        RewardModel(str(tmp_path))
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"reward model .* cannot be loaded: ") as caught:
        RewardModel(str(tmp_path))
    assert "\n" not in str(caught.value)
