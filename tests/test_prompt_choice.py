"""Prompts chosen by query: what can be gained is gained, what cannot is said; the paired difference by hand; files."""

import json
import random
import statistics
from dataclasses import replace

import pytest

pytest.importorskip("sklearn")

import numpy as np

from ppg_fast import prompt_choice
from ppg_fast.cli import main
from ppg_fast.prompt_choice import Model, Row, best_or_better, choose, fit, load, save, values_of

WORDS = [
    "alpha",
    "beta",
    "gamma",
    "red",
    "blue",
    "green",
    "apple",
    "pear",
    "plum",
    "tree",
    "house",
    "car",
    "road",
    "hill",
]
PROMPTS = ("steps", "short", "plain")


def chance(query, prompt, interaction):
    """How likely a prompt is right: with an interaction each is best for its own kind of query."""
    if not interaction:
        return {"steps": 0.7, "short": 0.6, "plain": 0.5}[prompt]
    return 0.85 if {"steps": "sum", "short": "poem"}.get(prompt) == query.split()[0] else 0.5


def queries(count, seed):
    rng = random.Random(seed)
    return [" ".join([rng.choice(["sum", "poem"]), *rng.sample(WORDS, 5), f"n{seed}x{q}"]) for q in range(count)]


def log(interaction, count=400, seed=0):
    rng = random.Random(seed)
    return [Row(q, p, int(rng.random() < chance(q, p, interaction))) for q in queries(count, seed) for p in PROMPTS]


def chosen_for(choice, asked, tmp_path):
    """By way of the files."""
    save(choice, tmp_path / "fitted")
    (tmp_path / "asked").write_text("".join(json.dumps({"query": q}) + "\n" for q in asked))
    found = choose(load(str(tmp_path / "fitted")), str(tmp_path / "asked"))
    assert [one["query"] for one in found] == asked
    return [one["prompt"] for one in found]


def test_of_an_interaction_nearly_all_is_gained_on_new_queries(tmp_path):
    choice, asked = fit(log(True, seed=7)), queries(500, 1)
    assert choice.lower > 0
    reachable, gained = (
        statistics.mean(chance(q, p, True) - chance(q, choice.best, True) for q, p in zip(asked, of, strict=True))
        for of in (
            [max(PROMPTS, key=lambda p: chance(q, p, True)) for q in asked],
            chosen_for(choice, asked, tmp_path),
        )
    )
    assert reachable > 0.1
    assert gained >= 0.9 * reachable
    assert abs(choice.gain - reachable) < 3 * choice.error, "cross-fitted, the log says what new queries give"


@pytest.mark.parametrize("kind", ["no interaction", "shuffled"])
def test_where_nothing_is_to_be_gained_it_says_so(kind, tmp_path):
    rows = log(kind == "shuffled", count=200)
    if kind == "shuffled":
        labels = [row.correct for row in rows]
        random.Random(3).shuffle(labels)
        rows = [replace(row, correct=label) for row, label in zip(rows, labels, strict=True)]
    choice = fit(rows)
    assert choice.lower <= 0
    assert "no gain: every query gets the best single prompt" in choice.describe()
    assert set(chosen_for(choice, queries(20, 1), tmp_path)) == {choice.best}
    assert kind == "shuffled" or choice.best == "steps"


def test_the_paired_difference_by_hand_and_no_model_sees_the_query_it_answers(monkeypatch):
    """A rule in the place of the trees: what is left is folds, choice, difference and error."""
    seen = []

    class Rule:
        def __init__(self, rows, prompts, embed):
            self.known, self.prompts = {row.query for row in rows}, prompts

        def __call__(self, asked):
            assert not self.known & set(asked)
            seen.extend(asked)
            assert len(self.known) == 400 * 4 // 5
            kinds = {"sum": "steps", "poem": "short"}
            return np.array([[float(p == kinds[q.split()[0]]) for p in self.prompts] for q in asked])

    monkeypatch.setattr(prompt_choice, "Model", Rule)
    rows = log(True)
    choice = fit(rows)
    assert sorted(seen) == sorted({row.query for row in rows})
    right = {(row.query, row.prompt): row.correct for row in rows}
    asked = queries(400, 0)
    best = max(sorted(PROMPTS), key=lambda p: sum(right[q, p] for q in asked))
    gains = [right[q, {"sum": "steps", "poem": "short"}[q.split()[0]]] - right[q, best] for q in asked]
    assert choice.best == best
    assert choice.gain == pytest.approx(statistics.mean(gains))
    assert choice.error == pytest.approx(statistics.stdev(gains) / 20)


def test_same_rows_in_any_order_same_numbers():
    rows = log(True, count=40)
    assert fit(rows) == fit(rows[::-1]) == fit(random.Random(1).sample(rows, len(rows)))


def test_of_two_alike_the_best_single_prompt_and_then_the_first():
    scores = np.array([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0], [0.5, 0.5, 0.5], [0.2, 0.1, 0.3]])
    assert best_or_better(scores, 1).tolist() == [1, 1, 1, 2]
    assert best_or_better(scores, 0).tolist() == [0, 1, 0, 2]


def test_a_log_that_did_not_try_everything_is_weighed_by_its_propensities():
    rows = [Row("q", "a", 1, 0.25), Row("q", "b", 1, 0.5), Row("q", "b", 0, 0.5), Row("r", "b", 1, 0.8)]
    assert values_of(rows, ["q", "r"], ["a", "b"]).tolist() == [[4 / 3, 2 / 3], [0.0, 1.25]]
    tried = [Row("q", "a", 1), Row("q", "a", 0), Row("q", "b", 1)]
    assert values_of(tried, ["q"], ["a", "b"]).tolist() == [[0.5, 1.0]]
    rng, drawn = random.Random(5), []
    for query in queries(1500, 5):
        prompt, propensity = rng.choices([("steps", 0.6), ("short", 0.4)], (0.6, 0.4))[0]
        drawn.append(Row(query, prompt, int(rng.random() < chance(query, prompt, True)), propensity))
    choice = fit(drawn)
    assert choice.lower > 0
    assert choice.shares[choice.prompts.index("short")] == pytest.approx(0.675, abs=0.1)
    told = r"^where not every prompt .* its propensity \('(steps|short)' was not tried with .*got '1 rows without one'$"
    with pytest.raises(ValueError, match=told):
        fit([row if i else replace(row, propensity=None) for i, row in enumerate(drawn)])


def test_an_encoder_in_a_folder_embeds(tmp_path):
    transformers = pytest.importorskip("transformers")
    from ppg_fast.dialogues.chat_format import make_word_tokenizer

    rows = log(True, count=60)
    tokenizer = make_word_tokenizer([*WORDS, "sum", "poem"])
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    transformers.BertModel(transformers.BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    choice = fit(rows, str(tmp_path / "m"))
    embed = prompt_choice._Encoder(choice.encoder)
    predicted = Model(rows, choice.prompts, embed)(["sum red", "poem red"])
    assert predicted.shape == (2, 3)
    with pytest.raises(ValueError, match=r"^encoder must be a folder with config.json"):
        fit(rows, str(tmp_path))


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


GOOD = [{"query": row.query, "prompt": row.prompt, "correct": row.correct} for row in log(True, count=60)]


def test_the_commands(tmp_path, capsys):
    fitted = str(tmp_path / "F")
    assert main(["prompts", "fit", write(tmp_path / "log.jsonl", GOOD), "-o", fitted]) == 0
    assert "180 answers to 60 queries, 3 prompts; best single prompt" in capsys.readouterr().out
    asked = [{"query": "sum red", "id": 7}, {"query": "poem", "prompts": ["plain"]}]
    assert main(["prompts", "choose", fitted, write(tmp_path / "asked.jsonl", asked)]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(one["query"], one.get("id")) for one in found] == [("sum red", 7), ("poem", None)]
    assert found[0]["prompt"] in PROMPTS
    assert found[1]["prompt"] == "plain"
    assert main(["prompts", "fit", str(tmp_path / "log.jsonl"), "-o", fitted]) == 1
    assert "exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"correct": 0.5}, "line 1: correct must be 0 or 1, got 0.5"),
        ({"query": " "}, "line 1: query must be a text that is not empty, got ' '"),
        ({"prompt": 3}, "line 1: prompt must be a text that is not empty, got 3"),
        ({"propensity": 1.0}, "line 1: a propensity must be a number > 0 and < 1, got 1.0"),
        ({"prompt": "new"}, "where not every prompt was tried with every query, each row must have its propensity"),
    ],
)
def test_a_row_that_is_none_is_named(change, said, tmp_path, capsys):
    data = write(tmp_path / "log.jsonl", [{**GOOD[0], **change}, *GOOD[1:]])
    assert main(["prompts", "fit", data, "-o", str(tmp_path / "F")]) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "F").exists()


def test_what_else_is_refused(tmp_path, capsys):
    for rows, said in (
        (GOOD[:30], "a log must have at least 20 queries, got 10"),
        ([row for row in GOOD if row["prompt"] == "plain"], "a log must have at least 2 prompts, got 1"),
        (
            [
                {**row, "prompt": "new", "propensity": 0.5} if i < 3 else {**row, "propensity": 0.5}
                for i, row in enumerate(GOOD)
            ],
            "prompt 'new' must have at least 20 rows, got 3",
        ),
        ([{**row, "query": "!" * (i // 3 + 1)} for i, row in enumerate(GOOD)], "the queries of a log must have words"),
    ):
        assert main(["prompts", "fit", write(tmp_path / "log.jsonl", rows), "-o", str(tmp_path / "F")]) == 1
        assert said in capsys.readouterr().err
    save(fit(log(True, count=40)), tmp_path / "F")
    asked = write(tmp_path / "asked.jsonl", [{"query": "a"}, {"query": "b", "prompts": ["other"]}])
    assert main(["prompts", "choose", str(tmp_path / "F"), asked]) == 1
    assert "line 2: a prompt must be one of the log's 3, got 'other'" in capsys.readouterr().err
    assert main(["prompts", "choose", asked, asked]) == 1
    assert "must be what `ppg-fast prompts fit` wrote" in capsys.readouterr().err


def test_without_scikit_learn_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr("ppg_fast.cli.prompts.missing", lambda modules: list(modules))
    assert main(["prompts", "choose", "a", "b"]) == 1
    assert capsys.readouterr().err == "ppg-fast prompts needs scikit-learn: pip install ppg_fast[prompts]\n"
