"""The command line: what it leaves behind, and what it says about bad input."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from ppg_fast.cli import main

TINY = ["--width", "16", "--layers", "1", "--no-progress"]
SHORT = [
    *TINY,
    "--imitation-steps",
    "2",
    "--max-steps",
    "3",
    "--num-prompts",
    "2",
    "--num-generations",
    "2",
    "--eval-every",
    "2",
    "--eval-dialogues",
    "3",
]
FILES = {
    ".ppg_fast.json",
    "config.yaml",
    "metrics.jsonl",
    "learning_curve.png",
    "samples_before.md",
    "samples_after.md",
    "summary.json",
    "checkpoint",
    "checkpoints",
    "README.md",
    "samples.jsonl",
    "turns.png",
}


def dialogue(number, rewards=(1.0, 0.5), **changes):
    answers = [f"i am anna number {number} .", "yes , quite sure !"]
    messages = [{"role": "system", "content": "You are Anna."}]
    for question, answer in zip(["who are you ?", "are you sure ?"], answers, strict=True):
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"id": f"d{number}", "group_id": "g", "messages": messages, "turn_rewards": list(rewards), **changes}


def write(path, records):
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records) + "\n", encoding="utf-8")
    return str(path)


def rows(folder, phase):
    return [r for r in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if r["phase"] == phase]


def failure(capsys, *argv):
    assert main(["train", *argv]) == 1
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def persona_run(tmp_path_factory):
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("persona") / "run"
    assert main(["train", "--output-dir", str(folder), *SHORT]) == 0
    return folder


def test_a_run_leaves_everything(persona_run):
    assert {p.name for p in persona_run.iterdir()} == FILES
    summary = json.loads((persona_run / "summary.json").read_text())
    assert (summary["status"], summary["steps"], summary["policy_class"]) == ("finished", 3, "lookahead:3")
    assert summary["eval/reward/start"] == rows(persona_run, "eval")[0]["eval/reward"]
    assert [r["step"] for r in rows(persona_run, "train")] == [1, 2, 3]
    assert [r["step"] for r in rows(persona_run, "eval")] == [0, 2, 3]
    named = {
        "reward",
        "reward_std",
        "entropy",
        "grad_norm",
        "completions/mean_length",
        "num_tokens",
        "step_time",
        "turns/return/0",
        "loss",
    }
    assert (
        named | {"perf/peak_memory_mb", "perf/tokens_per_second", "learning_rate"}
        <= rows(persona_run, "train")[0].keys()
    )
    assert (persona_run / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert (persona_run / "samples_after.md").read_text().count("**system**") == 3


def test_the_checkpoint_loads_with_the_auto_classes_and_trains_on(persona_run, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (
        auto.from_pretrained(persona_run / "checkpoint") for auto in (AutoModelForCausalLM, AutoTokenizer)
    )
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "what is your name ?"}], add_generation_prompt=True, return_tensors="pt"
    )
    again = AutoModelForCausalLM.from_pretrained(persona_run / "checkpoint", attn_implementation="eager")
    torch.testing.assert_close(model(**ids).logits, again(**ids).logits, rtol=1e-4, atol=1e-5)
    assert (persona_run / "checkpoint" / "model.safetensors").is_file()
    flags = [
        "--output-dir",
        str(tmp_path / "next"),
        *SHORT,
        "--imitation-steps",
        "0",
        "--model",
        str(persona_run / "checkpoint"),
    ]
    assert main(["train", *flags]) == 0


def test_same_seed_same_run(persona_run, tmp_path):
    assert main(["train", "--config", str(persona_run / "config.yaml"), "--output-dir", str(tmp_path / "again")]) == 0
    ours, theirs = ([(r["loss"], r["reward"]) for r in rows(f, "train")] for f in (persona_run, tmp_path / "again"))
    assert ours == theirs


def test_a_folder_that_holds_a_run_is_not_touched(persona_run, capsys):
    before = (persona_run / "metrics.jsonl").read_bytes()
    assert "already holds a run" in failure(capsys, "--output-dir", str(persona_run), *SHORT)
    assert (persona_run / "metrics.jsonl").read_bytes() == before


def test_overwrite_replaces_a_run_and_nothing_else(persona_run, tmp_path, capsys):
    folder = tmp_path / "mine"
    shutil.copytree(persona_run, folder)
    (folder / "notes.txt").write_text("mine")
    assert (
        main(
            ["train", "--output-dir", str(folder), "--overwrite", *SHORT, "--max-steps", "1", "--imitation-steps", "0"]
        )
        == 0
    )
    assert (folder / "notes.txt").read_text() == "mine"
    assert json.loads((folder / "summary.json").read_text())["status"] == "finished"


def test_ctrl_c_keeps_what_was_done(tmp_path, monkeypatch):
    from ppg_fast.jobs.persona import PersonaJob

    rollouts = PersonaJob.collect

    def interrupted(self, step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return rollouts(self, step)

    monkeypatch.setattr(PersonaJob, "collect", interrupted)
    assert main(["train", "--output-dir", str(tmp_path / "run"), *SHORT]) == 130
    of_the_end = {"learning_curve.png", "turns.png", "samples_after.md"}
    assert {p.name for p in (tmp_path / "run").iterdir()} == FILES - of_the_end
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("stopped", 1)


def test_a_crash_keeps_the_weights_and_says_failed(tmp_path, monkeypatch, capsys):
    from ppg_fast.jobs.persona import PersonaJob

    def broken(self, step):
        raise FloatingPointError("the gradient must be finite, got norm nan")

    monkeypatch.setattr(PersonaJob, "collect", broken)
    assert "got norm nan" in failure(capsys, "--output-dir", str(tmp_path / "run"), *SHORT)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "failed"
    assert (tmp_path / "run" / "checkpoint" / "model.safetensors").is_file()


def test_offline_raises_the_likelihood_of_rewarded_answers(tmp_path):
    records = [dialogue(i, rewards=(1.0, 0.0)) for i in range(10)]
    data, folder = write(tmp_path / "log.jsonl", records), tmp_path / "run"
    flags = [
        "--data",
        data,
        "--output-dir",
        str(folder),
        "--max-steps",
        "25",
        "--learning-rate",
        "0.01",
        "--vocab-size",
        "280",
        *TINY,
    ]
    assert main(["train", *flags, "--max-new-tokens", "4", "--policy-class", "greedy"]) == 0
    assert {p.name for p in folder.iterdir()} == FILES
    start, *_, end = rows(folder, "eval")
    assert end["eval/logprob"] > start["eval/logprob"] + 0.3
    train = rows(folder, "train")
    assert train[-1]["logprob"] > train[0]["logprob"] + 1.0, "of the first turn, the only one that is paid"
    assert train[0]["reward"] == 1.0
    assert "`reward" not in (folder / "samples_after.md").read_text()


def test_bad_lines_are_named_and_the_good_ones_kept(tmp_path, capsys):
    pytest.importorskip("transformers")
    spoken = dialogue(1)
    spoken["messages"][1]["content"] = "hi <end> there"
    data = write(tmp_path / "log.jsonl", [dialogue(0), '{"id": "cut', spoken, dialogue(2, rewards=(1.0,)), dialogue(3)])
    flags = ["--data", data, "--max-steps", "1", *TINY, "--max-new-tokens", "2"]
    assert main(["train", *flags, "--output-dir", str(tmp_path / "run")]) == 0
    err = capsys.readouterr().err
    assert "log.jsonl, line 2" in err
    assert "line 4" in err
    assert "'d1'" in err
    assert "<end>" in err
    assert "line 2" in failure(capsys, *flags, "--strict", "--output-dir", str(tmp_path / "strict"))
    assert not (tmp_path / "strict").exists()


@pytest.mark.parametrize(
    ("rewards", "flags", "message"),
    [
        ((1.0, -0.5), [], r"got -0.5 in dialogue 'd0', turn 1"),
        ((1.0, 0.5), ["--baseline", "leave_one_out"], "baseline must be none with data"),
        ((1.0, 0.5), ["--policy-class", "lookahead:0"], "K of Lookahead must be an integer >= 1, got 0"),
        ((1.0, 0.5), ["--vocab-size", "100"], "vocab_size must be at least 263"),
        ((1.0, 0.5), ["--model", "nowhere"], "folder with a Hugging Face checkpoint (config.json), got 'nowhere'"),
        ((1.0, 0.5), ["--device", "cuda:99"], "got 'cuda:99'"),
    ],
)
def test_bad_input_is_an_error_before_anything_is_written(rewards, flags, message, tmp_path, capsys):
    pytest.importorskip("transformers")
    data = write(tmp_path / "log.jsonl", [dialogue(0, rewards=rewards)])
    assert message in failure(capsys, "--data", data, "--output-dir", str(tmp_path / "run"), *TINY, *flags)
    assert not (tmp_path / "run").exists()


def test_negative_rewards_can_be_allowed_and_terminal_ones_are_warned_of(tmp_path, capsys):
    pytest.importorskip("transformers")
    data = write(tmp_path / "log.jsonl", [dialogue(i, rewards=(0.0, -0.5)) for i in range(2)])
    flags = ["--allow-negative-rewards", "--max-steps", "1", "--max-new-tokens", "2", "--policy-class", "greedy", *TINY]
    assert main(["train", "--data", data, "--output-dir", str(tmp_path / "run"), *flags]) == 0
    assert "last turn only" in capsys.readouterr().err


def test_a_tokenizer_larger_than_the_model_is_refused(persona_run, tmp_path, capsys):
    from transformers import AutoTokenizer

    folder = tmp_path / "model"
    import shutil

    shutil.copytree(persona_run / "checkpoint", folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["surplus"])
    tokenizer.save_pretrained(folder)
    assert "must not exceed the model's embedding" in failure(
        capsys, "--model", str(folder), "--output-dir", str(tmp_path / "run"), *SHORT
    )


@pytest.mark.parametrize(
    ("yaml", "flags", "message"),
    [
        ("learning_rat: 1", [], "unknown setting 'learning_rat'; did you mean 'learning_rate'?"),
        ("max_steps: many", [], "max_steps must be of type int, got 'many'"),
        ("max_steps: [1]", [], "max_steps must be of type int, got [1]"),
        ("overwrite: 3", [], "overwrite must be of type bool, got 3"),
        ("- 1", [], "must be a mapping"),
        ("a: {", [], "config"),
        ("", ["--learning-rate", "0"], "learning_rate must be a finite number > 0"),
        ("", ["--max-steps", "-1"], "max_steps must be an integer >= 0, got -1"),
        ("", ["--loss-type", "dpo"], "loss_type must be one of"),
        ("", ["--gamma", "1.5"], "gamma must be"),
    ],
)
def test_bad_settings_are_named(yaml, flags, message, tmp_path, capsys):
    pytest.importorskip("transformers")
    (tmp_path / "c.yaml").write_text(yaml)
    assert message in failure(capsys, "--config", str(tmp_path / "c.yaml"), *flags)


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path):
    from ppg_fast.config import OFFLINE, TrainConfig, make_config, read_yaml, write_yaml

    (tmp_path / "c.yaml").write_text("learning-rate: 1e-4\nmax_steps: 7\ndata: x.jsonl\n")
    config = make_config(read_yaml(str(tmp_path / "c.yaml")), {"max_steps": "9"})
    assert (config.learning_rate, config.max_steps, config.baseline) == (1e-4, 9, OFFLINE["baseline"])
    assert make_config() == TrainConfig()
    write_yaml(tmp_path / "d.yaml", config)
    assert make_config(read_yaml(str(tmp_path / "d.yaml"))) == config


def test_info_says_what_runs_here(capsys):
    from ppg_fast import backends

    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for name in backends.NAMES:
        line = next(line for line in out.splitlines() if line.startswith(f"  {name} "))
        assert ("runs here" in line) == (backends.why_not(name) is None)


def test_info_and_help_work_without_the_train_extra():
    """In a fresh process in which every package of the extra is missing."""
    code = (
        "from importlib.machinery import PathFinder\n"
        "missing, find = {'transformers', 'tokenizers', 'safetensors', 'rich', 'matplotlib', 'yaml'}, "
        "PathFinder.find_spec\n"
        "absent = lambda cls, name, *a: None if name.split('.')[0] in missing else find(name, *a)\n"
        "PathFinder.find_spec = classmethod(absent)\n"
        "from ppg_fast.cli import main\n"
        "print(main(['info']), main(['train']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout.strip().endswith("0 1"), done.stderr
    assert done.stderr.strip().splitlines()[-1].endswith("pip install ppg_fast[train]")
