"""What a run may remove: what a run listed as its own, never an input, and nothing before the new one's first step."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from ppg_fast.cli import main
from ppg_fast.jobs.ownership import ASIDE, MANIFEST, OwnedFolder, require_folder
from ppg_fast.jobs.persona import PersonaJob
from ppg_fast.jobs.run_files import ENTRIES, FILES, recognise

DOCS = Path(__file__).parents[1] / "docs/training_runs.md"
TINY = shlex.split(
    "--device cpu --width 16 --layers 1 --no-progress --max-new-tokens 2 --eval-dialogues 2 --eval-every 9 "
    "--imitation-steps 0 --max-steps 1 --num-prompts 2 --num-generations 2"
)


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


def refused(capsys, *argv):
    assert main(["train", *TINY, *argv]) == 1
    said = capsys.readouterr().err.strip().split("\n")
    return said[-1]


def test_files_of_the_user_stay_wherever_they_lie(run):
    own = {
        "notes.txt": "mine",
        "checkpoint/notes.md": "mine",
        "checkpoints/list.txt": "mine",
        "results.csv": "mine",
    }
    for name, text in own.items():
        (run / name).write_text(text)
    assert main(["train", "--output-dir", str(run), *TINY, "--overwrite", "--seed", "5"]) == 0
    assert {name: (run / name).read_text() for name in own} == own
    assert json.loads((run / "summary.json").read_text())["seed"] == 5
    assert not (run / ASIDE).exists()


@pytest.mark.parametrize("name", ["README.md", "config.yaml", "samples.jsonl", "turns.png", "summary.json"])
def test_a_folder_without_a_run_is_nobody_s_to_empty(name, tmp_path, capsys):
    (tmp_path / name).write_text("mine: 1\n")
    said = refused(capsys, "--output-dir", str(tmp_path), "--overwrite")
    assert f"{tmp_path / name} exists, which no run of ours listed as its own" in said
    assert contents(tmp_path) == {name: b"mine: 1\n"}


def test_a_folder_named_checkpoint_that_is_no_run_s(whole, tmp_path, capsys):
    shutil.copytree(whole / "checkpoint", tmp_path / "checkpoint")
    before = contents(tmp_path)
    said = refused(capsys, "--output-dir", str(tmp_path), "--overwrite", "--model", str(tmp_path / "checkpoint"))
    assert "checkpoint exists, which no run of ours listed" in said
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--model", "checkpoint"),
        ("--model", "checkpoint/../checkpoint"),
        ("--partner-prompt", "samples_after.md"),
        ("--judge-key", "file:README.md"),
    ],
)
def test_an_input_is_never_removed(flag, value, run, tmp_path, capsys):
    before = contents(run)
    kind, _, name = value.rpartition(":")
    given = f"{kind}:{run / name}" if kind else str(run / name)
    (tmp_path / "p.jsonl").write_text('{"id": "a", "messages": [{"role": "user", "content": "hi"}]}\n')
    prompts = ["--prompts", str(tmp_path / "p.jsonl"), "--reward", "builtins:len", "--max-turns", "1"]
    said = refused(
        capsys, "--output-dir", str(run), "--overwrite", flag, given, *([] if flag == "--model" else prompts)
    )
    assert "is of the run that --overwrite would remove, and an input of the new one" in said
    assert contents(run) == before


def test_data_beside_a_run_stays(run, tmp_path):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    line = {"id": "a", "group_id": "a", "messages": messages, "turn_rewards": [1.0]}
    (run / "log.jsonl").write_text(json.dumps(line) + "\n")
    before = (run / "log.jsonl").read_bytes()
    flags = ["--overwrite", "--data", str(run / "log.jsonl"), "--baseline", "none"]
    assert main(["train", "--output-dir", str(run), *TINY, *flags]) == 0
    assert (run / "log.jsonl").read_bytes() == before


@pytest.mark.parametrize("name", ["", " ", "/", "~"])
def test_folders_that_take_no_run(name):
    with pytest.raises(ValueError, match="output_dir must"):
        require_folder(str(Path.home()) if name == "~" else name)


def test_a_run_that_ends_before_its_first_step_brings_the_old_one_back(run, monkeypatch, capsys):
    before = contents(run)

    def broken(self, step):
        raise ValueError("no reward today")

    for error in (["--report-to", "wandb"], ["--seed", "3"]):
        with monkeypatch.context() as patch:
            patch.setattr(PersonaJob, "collect", broken)
            patch.setattr("ppg_fast.jobs.trackers.require_trackers", lambda names: None)
            patch.setitem(__import__("sys").modules, "wandb", None)
            assert main(["train", "--output-dir", str(run), *TINY, "--overwrite", *error]) == 1
        capsys.readouterr()
        assert contents(run) == before
    assert main(["train", "--resume", str(run)]) == 0


def test_the_old_run_goes_at_the_first_step(run, monkeypatch):
    collect, seen = PersonaJob.collect, []

    def looking(self, step):
        seen.append((run / ASIDE / "metrics.jsonl").exists())
        return collect(self, step)

    monkeypatch.setattr(PersonaJob, "collect", looking)
    assert main(["train", "--output-dir", str(run), *TINY, "--overwrite", "--max-steps", "2"]) == 0
    assert seen == [True, False]


def owned(path):
    return OwnedFolder(path, ENTRIES, recognise, keep_last="config.yaml")


@pytest.mark.parametrize("moves", range(8))
def test_a_kill_at_any_moment_of_the_move_loses_nothing(moves, run, monkeypatch):
    before, rename, count = contents(run), Path.rename, []

    def dying(self, target):
        count.append(self)
        if len(count) > moves:
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", dying)
        with pytest.raises(KeyboardInterrupt):
            owned(run).begin(overwrite=True)
    owned(run).recover()
    assert contents(run) == before
    with pytest.raises(FileExistsError, match="already holds a run"):
        owned(run).begin(overwrite=False)


def test_a_kill_before_the_first_step(run):
    before = contents(run)
    owned(run).begin(overwrite=True)
    (run / "metrics.jsonl").write_text("new\n")
    with pytest.raises(FileExistsError, match="already holds a run"):
        owned(run).begin(overwrite=False)
    assert (run / ASIDE / "config.yaml").exists()
    owned(run).restore()
    assert contents(run) == before


def test_a_run_of_before_there_were_lists_is_known_by_its_content(run, capsys):
    (run / MANIFEST).unlink()
    (run / "checkpoint/notes.md").write_text("mine")
    (run / "samples_after.md").write_text("# my samples\n")
    before = contents(run)
    said = refused(capsys, "--output-dir", str(run), "--overwrite")
    assert "samples_after.md exists, which no run of ours listed" in said
    assert contents(run) == before
    (run / "samples_after.md").unlink()
    assert main(["train", "--output-dir", str(run), *TINY, "--overwrite", "--seed", "5"]) == 0
    assert (run / "checkpoint/notes.md").read_text() == "mine"
    assert json.loads((run / "summary.json").read_text())["seed"] == 5


@pytest.mark.parametrize("names", [["../other.txt"], ["/etc/passwd"], [3], "README.md", None])
def test_a_list_that_leads_out_of_the_folder_is_refused(names, run):
    (run.parent / "other.txt").write_text("mine")
    (run / MANIFEST).write_text(json.dumps({"files": names}))
    with pytest.raises(ValueError, match=re.escape(f"{run / MANIFEST} must list the files of a run")):
        owned(run).begin(overwrite=True)
    assert (run.parent / "other.txt").read_text() == "mine"


def test_a_link_in_a_run_s_folder_is_not_followed(run, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "step-00000001").mkdir()
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").symlink_to(other)
    with pytest.raises(FileExistsError, match="checkpoints exists, which no run of ours listed"):
        owned(run).begin(overwrite=True)
    assert (other / "step-00000001").is_dir()


def test_compare_removes_its_own_only(tmp_path, monkeypatch):
    from ppg_fast.compare import results
    from ppg_fast.compare.command import main as compare

    flags = ["--problem", "plan", "--version", "tabular", "--policy-classes", "greedy", "--seeds", "1"]
    flags += ["--max-steps", "2", "--output-dir", str(tmp_path / "c")]
    (tmp_path / "c/results").mkdir(parents=True)
    (tmp_path / "c/results/mine.json").write_text("{}")
    with pytest.raises(FileExistsError, match="results exists, which no run of ours listed"):
        compare([*flags, "--overwrite"])
    (tmp_path / "c/results/mine.json").unlink()
    assert compare(flags) == 0
    (tmp_path / "c/results/mine.json").write_text("{}")
    before = contents(tmp_path / "c")
    with monkeypatch.context() as patch:
        patch.setattr(results, "_compute", lambda *_: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            compare([*flags, "--overwrite", "--max-steps", "3"])
    assert contents(tmp_path / "c") == before
    assert compare([*flags, "--overwrite", "--max-steps", "3"]) == 0
    assert (tmp_path / "c/results/mine.json").read_text() == "{}"


def test_the_table_names_what_a_run_may_remove():
    table = DOCS.read_text().split("## What a run may delete")[1].split("\n## ")[0]
    named = set(re.findall(r"`([^`]+)`", table))
    tops = {entry.split("/")[0] for entry in ENTRIES} - {"checkpoint.new"}
    assert {name.rstrip("/") for name in named} >= tops | {MANIFEST, ASIDE}
    assert set(FILES) <= named
