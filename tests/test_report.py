"""What a run leaves for people: sample tables, plots, a README that is true, trackers, and a help that can be read."""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from test_cli import SHORT, dialogue, failure, rows, write

from ppg_fast.cli import main
from ppg_fast.config import OFFLINE, SECTIONS, TrainConfig, add_flags, make_config
from ppg_fast.dialogues.packing import Sample
from ppg_fast.jobs import PromptsJob, cards, curves, samples, trackers
from ppg_fast.policy_classes import Greedy
from ppg_fast.rollouts.rollout import Rollout
from ppg_fast.training.objective import Objective


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "my-run"
    flags = ["--imitation-steps", "60", "--learning-rate", "0.01", "--report-to", "tensorboard", "--max-steps", "4"]
    assert main(["train", "--output-dir", str(folder), *SHORT, *flags]) == 0
    return folder


# ---- samples ---------------------------------------------------------------------------------------------------------
def two_samples():
    return [
        Sample([5, 6, 7, 8, 9], [-1, 0, 0, -1, 1], [reward, 0.5], 3, cut_off=[False, True]) for reward in (1.0, 0.25)
    ]


def spell(tokens):
    return " ".join(map(str, tokens))


def test_a_table_has_a_line_for_every_answer():
    table = samples.answer_rows("train", 7, two_samples(), spell, Objective(Greedy()))
    assert [(r["dialogue"], r["turn"], r["prompt"], r["answer"]) for r in table[:2]] == [
        (0, 0, "5", "6 7"),
        (0, 1, "8", "9"),
    ]
    assert [r["advantage"] for r in table] == [0.75, 0.0, -0.75, 0.0], "leave-one-out over the group"
    assert [(r["reward"], r["return"], r["tokens"], r["cut_off"]) for r in table[:2]] == [
        (1.0, 1.0, 2, False),
        (0.5, 0.5, 1, True),
    ]
    unscored = samples.answer_rows("eval", 0, two_samples(), spell, Objective(), scored=False)
    assert {(r["reward"], r["return"], r["advantage"]) for r in unscored} == {(None, None, None)}
    assert len(samples.answer_rows("train", 7, two_samples() * 9, spell, Objective())) == 2 * samples.SHOWN


def test_a_sample_knows_which_answers_of_its_rollout_were_cut_off():
    sample = two_samples()[0]
    assert Rollout(None, sample, cut_off=[True, True]).sample.cut_off == [True, True]


def test_rows_of_steps_that_are_taken_again_are_dropped(tmp_path):
    path = tmp_path / "samples.jsonl"
    samples.append_rows(
        path, [{"phase": p, "step": s} for p, s in (("eval", 0), ("train", 10), ("eval", 10), ("train", 20))]
    )
    with open(path, "a") as file:
        file.write('{"phase": "tra')
    samples.keep_rows(path, {"eval": 10, "train": 15})
    assert [tuple(json.loads(line).values()) for line in path.read_text().splitlines()] == [
        ("eval", 0),
        ("train", 10),
        ("eval", 10),
    ]
    samples.keep_rows(tmp_path / "none.jsonl", {})


def test_a_run_that_goes_on_has_every_sample_once(tmp_path, monkeypatch):
    from ppg_fast.jobs.persona import PersonaJob

    flags = [
        "--output-dir",
        str(tmp_path / "run"),
        *SHORT,
        "--imitation-steps",
        "0",
        "--save-every",
        "1",
        "--eval-every",
        "1",
    ]
    rollouts = PersonaJob.collect

    def broken(self, step):
        if step == 3:
            raise OSError("the machine went away")
        return rollouts(self, step)

    with monkeypatch.context() as patched:
        patched.setattr(PersonaJob, "collect", broken)
        assert main(["train", *flags]) == 1
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0
    table = [json.loads(line) for line in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    keys = [(r["phase"], r["step"], r["dialogue"], r["turn"]) for r in table]
    assert len(keys) == len(set(keys))
    assert {k[:2] for k in keys} == {("eval", step) for step in range(4)} | {("train", step) for step in range(1, 4)}
    assert "It ran to its end." in (tmp_path / "run/README.md").read_text()


# ---- plots and pages -------------------------------------------------------------------------------------------------
def test_turns_are_drawn_in_their_order():
    logged = [
        {"turns/return/2": 1.0, "turns/return_std/2": 0.5, "turns/return/16-31": 3.0},
        {"turns/return/10": 2.0, "turns/return/2": 3.0},
    ]
    assert curves.turn_profile(logged, "turns/return") == [("2", 2.0, 0.5), ("10", 2.0, 0.0), ("16-31", 3.0, 0.0)]


def test_plots_are_drawn_from_a_run_and_from_nothing(run, tmp_path):
    assert (run / "turns.png").read_bytes().startswith(b"\x89PNG")
    curves.draw_turns(tmp_path / "a.png", rows(run, "train"), rows(run, "eval"))
    curves.draw_turns(tmp_path / "b.png", [], [])
    assert (tmp_path / "a.png").stat().st_size > 1.5 * (tmp_path / "b.png").stat().st_size


def test_the_folder_says_what_it_is(run):
    """Every file is named, none that is not there, and what it says to type works."""
    text = (run / "README.md").read_text()
    named = {
        line.split("`")[1].rstrip("/") for line in text.splitlines() if line.startswith("| `") and "eval/" not in line
    }
    assert named == {path.name for path in run.iterdir()} - {"README.md"}
    assert "It ran to its end." in text
    assert "`lookahead:3`" in text
    block = text.split("```python\n")[1].split("```")[0]
    done = os.getcwd()
    os.chdir(run)
    try:
        exec(compile(block, "README.md", "exec"), scope := {})
        assert scope["model"].config.vocab_size == len(scope["tokenizer"])
    finally:
        os.chdir(done)
    card = (run / "checkpoint/README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "| `policy_class` | lookahead:3 |" in card


def test_a_run_under_way_and_every_end_are_described(tmp_path):
    config, description = make_config({"data": "logs/talks.jsonl"}), "Offline training on `talks.jsonl`."
    cards.write_readme(tmp_path, config, description, None)
    assert "there is no summary yet" in (tmp_path / "README.md").read_text()
    for status, words in cards.ENDED.items():
        cards.write_readme(
            tmp_path,
            config,
            description,
            {"status": status, "steps": 3, "seconds": 1.0, "eval/logprob/start": -2.0, "eval/logprob/end": -1.5},
        )
        text = (tmp_path / "README.md").read_text()
        assert words in text
        assert "`talks.jsonl`" in text
        assert "| `eval/logprob` | -2 | -1.5 |" in text


RUNS = {  # flags of a run, and what its cards must name
    "persona": ("", ["On-policy training", "rollouts of the persona interview"]),
    "offline": ("--data FILE", ["Offline training", "logged dialogues of `talks.jsonl`"]),
    "prompts": ("--prompts FILE --reward REWARD", ["prompts of `talks.jsonl`", "logged partner", "1*brief@turn"]),
    "self": ("--prompts FILE --reward 2*REWARD@dialogue --partner self", ["own start weights", "2*brief@dialogue"]),
}


def make_files(folder):
    """--data and --prompts files, and a reward."""
    (folder / "rewards.py").write_text("def brief(messages):\n    return 1.0\n")
    write(folder / "talks.jsonl", [dialogue(n) for n in range(5)])
    return {"FILE": str(folder / "talks.jsonl"), "REWARD": f"{folder / 'rewards.py'}:brief"}


@pytest.mark.parametrize("name", RUNS)
def test_readme_and_model_card_say_what_was_trained_on(name, tmp_path):
    flags, wanted = RUNS[name]
    for key, value in make_files(tmp_path).items():
        flags = flags.replace(key, value)
    short = [*SHORT, "--imitation-steps", "0", "--max-steps", "0", "--max-new-tokens", "2", "--max-turns", "2"]
    assert main(["train", "--output-dir", str(tmp_path / "run"), *short, *flags.split()]) == 0
    for card in ("README.md", "checkpoint/README.md"):
        text = (tmp_path / "run" / card).read_text()
        assert [part for part in wanted if part not in text] == []
        assert ("persona interview" in text) == (name == "persona")


def test_addresses_and_folders_stay_out_of_the_cards(tmp_path):
    files = make_files(tmp_path)
    settings = {"prompts": files["FILE"], "reward": files["REWARD"], "partner": "http://10.1.2.3:8000/v1", "width": 16}
    text = PromptsJob(make_config({**settings, "partner_model": "qwen", "layers": 1})).description()
    assert "a model behind an endpoint (`qwen`) as partner" in text
    assert "10.1.2.3" not in text
    assert str(tmp_path) not in text


# ---- trackers --------------------------------------------------------------------------------------------------------
def test_tensorboard_has_what_the_run_logged(run):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    read = event_accumulator.EventAccumulator(str(run / "trackers/tensorboard"))
    read.Reload()
    rewards = [(e.step, e.value) for e in read.Scalars("train/reward")]
    assert [step for step, _ in rewards] == [61, 62, 63, 64], "the steps of all phases"
    assert [value for _, value in rewards] == pytest.approx([r["reward"] for r in rows(run, "train")], abs=1e-5)
    assert [e.step for e in read.Scalars("eval/reward")] == [60, 62, 64]
    assert len(read.Scalars("imitation/loss")) == 60
    assert any("samples" in tag for tag in read.Tags()["tensors"])


def test_wandb_and_trackio_take_a_run_offline(tmp_path):
    """In a process of its own: they start services and threads."""
    for package in ("accelerate", "wandb", "trackio"):
        pytest.importorskip(package)
    code = (
        "import json\nfrom pathlib import Path\nfrom ppg_fast.config import make_config\nfrom ppg_fast.jobs.trackers "
        "import Trackers\n"
        "config = make_config({'report_to': 'wandb,trackio', 'report_offline': True, 'project': 'p', "
        "'run_name': 'r'})\n"
        "for resume in (False, True):\n"
        "    t = Trackers(config, Path('run'), resume)\n"
        "    t.log('train', {'loss': 0.5 + resume, 'bad': float('nan'), 'name': 'x'}, 1 + resume)\n"
        "    t.log_table('train/samples', [{'turn': 0, 'answer': 'yes'}], 1 + resume)\n"
        "    t.finish()\n"
        "import trackio\n"
        "print('RUNS', len(list(trackio.Api().runs('p'))))\n"
    )
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "error::UserWarning", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=170)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "RUNS 1" in done.stdout
    runs = list((tmp_path / "run/trackers/wandb").glob("offline-run-*"))
    identity = (tmp_path / "run/trackers/run_id").read_text().strip()
    assert runs
    assert all(path.name.endswith(identity) for path in runs), "the same run again"


def test_a_missing_package_is_one_line_before_anything_is_written(tmp_path, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(trackers, "find_spec", lambda name: None if name == "trackio" else find(name))
    said = failure(capsys, "--output-dir", str(tmp_path / "run"), "--report-to", "trackio", *SHORT)
    assert said == "ppg-fast: report_to trackio needs trackio: pip install ppg_fast[trackers]\n"
    assert not (tmp_path / "run").exists()
    assert "report_to must be one of" in failure(capsys, "--report-to", "tensorbord")


def test_a_tracker_that_fails_is_left_out_and_the_run_goes_on(tmp_path):
    class Broken:
        name = "wandb"

        def log(self, values, step):
            raise ConnectionError("no route\nto host")

    reporting = trackers.Trackers(make_config(), tmp_path)
    assert reporting.active == []
    reporting.active = [Broken()]
    with pytest.warns(UserWarning, match="report_to wandb could not log and is left out from here on: no route$"):
        reporting.log("train", {"loss": 1.0}, 1)
    reporting.log("train", {"loss": 1.0}, 2)
    reporting.finish()


def test_a_tracker_that_cannot_start_is_an_error(tmp_path, monkeypatch):
    accelerate = pytest.importorskip("accelerate.tracking")
    monkeypatch.setattr(
        accelerate.TensorBoardTracker, "start", lambda self: (_ for _ in ()).throw(RuntimeError("not logged in"))
    )
    with pytest.raises(ValueError, match="report_to tensorboard cannot start: not logged in"):
        trackers.Trackers(make_config({"report_to": "tensorboard"}), tmp_path)


# ---- settings --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("base", [{}, {"data": "log.jsonl"}], ids=["on-policy", "offline"])
def test_every_default_can_be_given(base):
    """As a value and as a flag's text: it is the same config."""
    expected = make_config(base)
    for field in fields(TrainConfig):
        value = getattr(expected, field.name)
        texts = [value] if value is None or isinstance(value, bool) else [value, str(value)]
        for text in texts:
            assert make_config(base, {field.name: text}) == expected, field.name


def test_the_help_comes_in_groups_and_names_every_setting():
    parser = argparse.ArgumentParser(prog="x")
    add_flags(parser)
    text = parser.format_help()
    groups = {group.title: [action.dest for action in group._group_actions] for group in parser._action_groups}
    assert all(title in groups for title in SECTIONS.values())
    assert [name for name in SECTIONS if name not in asdict(TrainConfig())] == []
    grouped = [name for title in SECTIONS.values() for name in groups[title]]
    assert grouped == [field.name for field in fields(TrainConfig)]
    assert max(len(groups[title]) for title in SECTIONS.values()) <= 20
    assert all(f"--{field.name.replace('_', '-')}" in text for field in fields(TrainConfig))
    assert all(field.metadata["help"] for field in fields(TrainConfig))
    assert set(OFFLINE) <= {field.name for field in fields(TrainConfig)}


def test_documented_files_are_the_files(run):
    text = (Path(__file__).parents[1] / "docs/training.md").read_text()
    for name in cards.WHAT:
        assert f"`{name}" in text, name
