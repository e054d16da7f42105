"""What a run may change when it goes on: one list. All else is refused before anything is written."""

import dataclasses
import json
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from ppg_fast.cli import main
from ppg_fast.compare.command import parser as compare_parser
from ppg_fast.compare.study import Study
from ppg_fast.config import REWARD_SETTINGS, TrainConfig, make_config
from ppg_fast.jobs import changes, inputs, samples
from ppg_fast.jobs.score import HOW_ASKED
from ppg_fast.rewards import make_rewards

DOCS = Path(__file__).parents[1] / "docs/training_runs.md"
TINY = shlex.split(
    "--device cpu --width 16 --layers 1 --no-progress --max-new-tokens 2 --eval-dialogues 2 --eval-every 9 "
    "--imitation-steps 0 --max-steps 2 --num-prompts 2 --num-generations 2"
)
CLASSES = ("may change", "same content", "address", "fixed")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert main(["train", "--output-dir", str(folder), *TINY]) == 0
    return folder


@pytest.fixture
def run(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "run"))


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_every_setting_has_exactly_one_class():
    lists = [*changes.MAY_CHANGE.values(), changes.SAME_CONTENT, changes.ADDRESSES, changes.FIXED]
    names = [name for text in lists for name in text.split()]
    assert sorted(names) == sorted(field.name for field in dataclasses.fields(TrainConfig)), (
        "a new setting wants a place in ppg_fast/jobs/changes.py: may a run change it on --resume?"
    )
    assert set(changes.CLASSES.values()) == set(CLASSES)


def test_the_table_is_the_list():
    table = DOCS.read_text().split("## What a run may change on `--resume`")[1].split("\n## ")[0]
    rows = dict(re.findall(r"^\| ([^|`]+) \| (.+) \|$", table, re.MULTILINE))
    told = {name: sorted(re.findall(r"`(\w+)`", text)) for name, text in rows.items()}
    wanted = {name: sorted(names.split()) for name, names in changes.MAY_CHANGE.items()}
    wanted |= {"another name, the same content": sorted(changes.SAME_CONTENT.split())}
    wanted |= {"another address, the same model": sorted(changes.ADDRESSES.split())}
    assert told == wanted


REFUSED = [
    ("--seed 1", "seed 0 -> 1"),
    ("--eval-dialogues 3", "eval_dialogues 2 -> 3"),
    ("--optim adafactor", "optim 'adamw_torch' -> 'adafactor'"),
    ("--learning-rate 0.1 --gamma 0.5", "gamma 1.0 -> 0.5, learning_rate 0.001 -> 0.1"),
    ("--kl-coef 0.1", "kl_coef 0.0 -> 0.1"),
    ("--width 32", "width 16 -> 32"),
    ("--data FILE --baseline none", "data None -> 'FILE', baseline 'leave_one_out' -> 'none'"),
]


@pytest.mark.parametrize(("flags", "said"), REFUSED)
def test_another_setting_is_refused_before_anything_is_written(flags, said, run, tmp_path, capsys):
    file = tmp_path / "log.jsonl"
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    file.write_text(json.dumps({"id": "a", "group_id": "a", "messages": messages, "turn_rewards": [1.0]}) + "\n")
    before = contents(run)
    assert main(["train", "--resume", str(run), *shlex.split(flags.replace("FILE", str(file)))]) == 1
    lines = [line for line in capsys.readouterr().err.split("\n") if line and "warning" not in line]
    assert len(lines) == 1
    assert f"a run goes on with the settings it began with, got {said.replace('FILE', str(file))}: take" in lines[0]
    assert contents(run) == before


def test_a_setting_edited_in_the_file_is_one_too(run, capsys):
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("seed: 0", "seed: 7"))
    assert main(["train", "--resume", str(run)]) == 1
    assert "seed 0 -> 7" in capsys.readouterr().err
    (run / "config.yaml").write_text(text)
    assert main(["train", "--resume", str(run), "--eval-every", "1"]) == 0


def test_a_run_that_goes_further_keeps_its_old_end(run, capsys):
    def evaluations():
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().split("\n") if line]
        return {r["step"]: {k: v for k, v in r.items() if k != "seconds"} for r in rows if r["phase"] == "eval"}

    before = evaluations()
    assert sorted(before) == [0, 2]
    assert main(["train", "--resume", str(run), "--max-steps", "3"]) == 0
    after = evaluations()
    assert sorted(after) == [0, 2, 3]
    assert {step: after[step] for step in before} == before
    rows = [json.loads(line) for line in (run / "samples.jsonl").read_text().split("\n") if line]
    assert {r["step"] for r in rows if r["phase"] == "eval"} == {0, 2, 3}
    assert main(["train", "--resume", str(run)]) == 0, "and is not evaluated twice at its end"
    assert sorted(evaluations()) == [0, 2, 3]


def test_metrics_that_are_gone_cost_nothing_else(run, capsys):
    (run / "metrics.jsonl").write_text("")
    before = contents(run)
    assert main(["train", "--resume", str(run), "--max-steps", "3"]) == 1
    assert "metrics.jsonl must hold the" in capsys.readouterr().err
    assert contents(run) == before


@pytest.fixture
def prompts_run(tmp_path, monkeypatch):
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    lines = [{"id": str(i), "messages": [{"role": "user", "content": f"say {i}"}]} for i in range(3)]
    Path("p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    Path("weights.py").write_text("W = 0.5\n")
    Path("rewards.py").write_text(
        "import sys, os; sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))\n"
        "from weights import W\ndef brief(messages):\n    return W * len(messages[-1]['content'])\n"
    )
    flags = ["--prompts", "p.jsonl", "--partner", "none", "--max-turns", "1", "--reward", "2*rewards.py:brief"]
    assert main(["train", *TINY, "--max-steps", "1", *flags, "--output-dir", "run"]) == 0
    return folder


def test_relative_paths_are_read_alike_from_another_folder(prompts_run, monkeypatch):
    monkeypatch.chdir(prompts_run.parent)
    assert main(["train", "--resume", "work/run", "--max-steps", "2"]) == 0


def test_data_and_rewards_are_known_by_their_content(prompts_run, capsys):
    before = contents(prompts_run / "run")
    for name, words in (("weights.py", "the rewards"), ("rewards.py", "the rewards"), ("p.jsonl", "the dialogues")):
        text = Path(name).read_text()
        Path(name).write_text(text.replace("0.5", "0.7").replace("len(", "1 + len(").replace("say 1", "tell 1"))
        capsys.readouterr()
        assert main(["train", "--resume", "run", "--max-steps", "2"]) == 1
        assert f"a run goes on with {words}" in capsys.readouterr().err
        assert contents(prompts_run / "run") == before
        Path(name).write_text(text)
    shutil.copy("p.jsonl", "moved.jsonl")
    assert main(["train", "--resume", "run", "--max-steps", "2", "--prompts", "moved.jsonl"]) == 0


def test_model_and_partner_are_known_by_their_content(tmp_path):
    (tmp_path / "m").mkdir()
    for name in ("config.json", "tokenizer_config.json", "model.safetensors", "README.md"):
        (tmp_path / "m" / name).write_text("one")
    (tmp_path / "told.txt").write_text("be curt")

    def digests(partner="self"):
        config = make_config({"model": f"{tmp_path}/m", "partner": partner, "partner_prompt": f"{tmp_path}/told.txt"})
        return inputs.model_digest(config), inputs.partner_digest(config)

    first, logged = digests(), digests("logged")
    for name, model, partner, of_logged in (
        ("m/tokenizer_config.json", True, True, False),
        ("m/model.safetensors", False, True, False),
        ("told.txt", False, True, True),
        ("m/README.md", False, True, False),
    ):
        (tmp_path / name).write_text("two")
        assert (digests()[0] != first[0], digests()[1] != first[1]) == (model, partner), name
        assert (digests("logged")[1] != logged[1]) == of_logged, name
        (tmp_path / name).write_text("be curt" if name == "told.txt" else "one")


def test_paths_of_a_config_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {"prompts": "a/p.jsonl", "model": None, "judge_key": "file:k", "partner_key": "env:K"}
    given["reward"] = "0.5*r.py:f@dialogue + -1*judge:rub.txt + judge + model:m@turn + ratings:/x/r.jsonl + mod:f"
    found = inputs.with_absolute_paths(given)
    here = os.getcwd()
    assert (found["prompts"], found["model"]) == (f"{here}/a/p.jsonl", None)
    assert (found["judge_key"], found["partner_key"]) == (f"file:{here}/k", "env:K")
    terms = [f"0.5*{here}/r.py:f@dialogue", f"-1*judge:{here}/rub.txt", "judge", f"model:{here}/m@turn"]
    assert found["reward"] == " + ".join([*terms, "ratings:/x/r.jsonl", "mod:f"])
    assert inputs.with_absolute_paths(found) == found
    names = {str(path) for path in inputs.input_paths(given)}
    assert names == {"a/p.jsonl", "k", "r.py", "rub.txt", "m", "/x/r.jsonl"}


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\r"])
def test_a_text_with_another_line_break_is_one_row(mark, tmp_path):
    path = tmp_path / "samples.jsonl"
    rows = [{"phase": "train", "step": step, "answer": f"one{mark}two {step}"} for step in range(1, 6)]
    samples.append_rows(path, rows)
    with open(path, "a") as file:
        file.write('{"phase": "train", "st')
    samples.keep_rows(path, {"train": 3})
    assert [json.loads(line) for line in path.read_text().split("\n") if line] == rows[:3]


def test_every_setting_of_score_is_in_the_digest_or_is_how_it_is_asked():
    class Server:
        model = "one"

    def digest(**settings):
        config = make_config({"reward": "judge", **settings})
        Server.model = config.judge_model or "one"
        return inputs.reward_digest(
            config.reward,
            make_rewards(config.reward, Server, judge_range=config.judge_range),
        )

    changed = {"judge_model": "two", "judge_range": "0:5", "reward": "2*judge"}
    rest = set(REWARD_SETTINGS) - set(HOW_ASKED) - {"template_date"}  # of reward models: test_score_output
    assert rest == set(changed)
    for name in rest:
        assert digest(**{name: changed[name]}) != digest(), name


def test_every_flag_of_compare_is_in_its_settings_or_changes_no_result():
    flags = {action.dest for action in compare_parser()._actions} - {"help"}
    held = set(Study("x", ("full",), 1, 3).settings())
    which = {
        "problem",
        "version",
        "policy_classes",
        "loss_type",
        "seeds",
        "first_seed",
    }  # say which results, each in its own file
    assert flags - held == which | {"jobs", "output_dir", "overwrite"}
