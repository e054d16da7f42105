"""The command line's manners: empty text, near misses, minus signs, terminals that cannot show a letter, readers that
leave."""

import json
import os
import subprocess
import sys
import warnings

import pytest

import ppg_fast as ppg
from ppg_fast.cli import main
from ppg_fast.config import DEFAULTS, make_config, read_yaml

ONE_STEP = ["--width", "16", "--layers", "1", "--no-progress", "--imitation-steps", "0", "--max-steps", "1"]
ONE_STEP += ["--num-prompts", "2", "--num-generations", "2", "--eval-dialogues", "2"]
TEXT = [name for name, default in DEFAULTS.items() if default is None or (isinstance(default, str) and default)]


def said(capsys, *argv):
    """The status and the only line on stderr."""
    try:
        status = main(list(argv))
    except SystemExit as error:
        status = error.code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("ppg-fast"), err
    assert err.count("\n") == 1, err
    return status, err


def shell(line, folder, **environment):
    """Run ``line`` with $PPG as the command; (status of each part of the pipe, stdout, stderr)."""
    given = {**os.environ, "OMP_NUM_THREADS": "1", "PPG": f"{sys.executable} -m ppg_fast", **environment}
    call = f"{line}; echo STATUS ${{PIPESTATUS[@]}} >&2"
    done = subprocess.run(["bash", "-c", call], cwd=folder, env=given, capture_output=True, timeout=300, check=False)
    *said, status = done.stderr.decode("utf-8").rstrip().rsplit("STATUS ", 1)
    return [int(s) for s in status.split()], done.stdout.decode("utf-8", "replace"), "".join(said)


@pytest.mark.parametrize("empty", ["", " ", "\t"])
@pytest.mark.parametrize("name", TEXT)
def test_no_text_is_empty(name, empty, tmp_path, capsys):
    """As a flag, as a key of a file, in a mapping: `--data "$LOG"` with LOG unset trained something else."""
    rule = f"{name} must not be empty: leave it out for its default"
    flag = "--" + name.replace("_", "-")
    for words in ([flag, empty], [f"{flag}={empty}"]):
        status, line = said(capsys, "train", *words)
        assert status == 1
        assert rule in line
    file = tmp_path / "c.yaml"
    file.write_text(json.dumps({name: empty}))
    status, line = said(capsys, "train", "--config", str(file))
    assert status == 1
    assert f"config {file}: {rule}" in line


def test_text_whose_default_is_empty_may_be(tmp_path):
    off = [name for name, default in DEFAULTS.items() if default == ""]
    wanted = "chat_template chat_template_kwargs freeze logits_dtype optim_args stop_phrase template_date"
    assert set(off) == set(wanted.split())
    assert make_config(dict.fromkeys(off, "")) == make_config()


@pytest.mark.parametrize(
    ("argv", "flag"),
    [
        (["train", "--config", ""], "--config"),
        (["train", "--resume", ""], "--resume"),
        (["train", "--resume="], "--resume"),
        (["info", "--config", " "], "--config"),
        (["score", "", "-o", "x", "--reward", "a:b"], "data"),
        (["score", "x", "-o", "", "--reward", "a:b"], "-o/--output"),
        (["merge", "", "-o", "x"], "RUN_OR_ADAPTER"),
        (["merge", "x", "-o", "y", "--base", ""], "--base"),
        (["merge", "x", "-o", "y", "--push-to-hub", ""], "--push-to-hub"),
        (["push", "x", ""], "REPO"),
        (["compare", "--data", ""], "--data"),
        (["compare", "--policy-classes", ""], "--policy-classes"),
        (["compare", "--output-dir", ""], "--output-dir"),
        (["bench", "--ops", ""], "--ops"),
    ],
)
def test_nor_is_a_flag_that_is_no_setting(argv, flag, capsys):
    assert said(capsys, *argv) == (
        2,
        f"ppg-fast {argv[0]}: {flag} must not be empty (ppg-fast {argv[0]} --help lists what there is)\n",
    )


@pytest.mark.parametrize(
    ("argv", "status", "message"),
    [
        (["trian"], 2, "no command 'trian'; did you mean 'train'?"),
        (["frobnicate"], 2, "no command 'frobnicate', only train | score"),
        (["train", "--max-stps", "3"], 2, "no flag '--max-stps'; did you mean '--max-steps'?"),
        (["train", "--max-stps=3"], 2, "no flag '--max-stps'; did you mean '--max-steps'?"),
        (["train", "--max-step", "3"], 2, "no flag '--max-step'"),  # no abbreviations
        (["info", "--tok", "3"], 2, "no flag '--tok'"),
        (["score", "x", "-o", "y", "--rewad", "a:b"], 2, "no flag '--rewad'; did you mean '--reward'?"),
        (["merge", "x", "-o", "y", "--bas", "z"], 2, "no flag '--bas'; did you mean '--base'?"),
        (["compare", "--seed", "3"], 2, "no flag '--seed'; did you mean '--seeds'?"),
        (["bench", "--op", "x"], 2, "no flag '--op'"),
        (["train", "run.yaml"], 2, "nothing is expected at 'run.yaml'"),
        (["train", "--max-steps"], 2, "--max-steps: expected one argument"),
        (["train", "--loss-type", "poo"], 1, "soft_q, got 'poo'; did you mean 'ppo'?"),
        (["train", "--reduction", "tokenmean"], 1, "did you mean 'token_mean'?"),
        (["train", "--freeze", "("], 1, "freeze must be a regular expression (missing ), unterminated"),
        (["train", "--freeze", "head,[a"], 1, "freeze must be a regular expression"),
        (["train", "--lora-target-modules", "(q|"], 1, "lora_target_modules must be a regular expression"),
        (["train", "--seed", str(2**64)], 1, f"seed must be an integer <= {2**63 - 1}, got {2**64}"),
        (["train", "--max-steps", str(2**31)], 1, f"max_steps must be an integer <= {2**31 - 1}, got {2**31}"),
        (["train", "--learning-rate", "9" * 400], 1, "learning_rate must be a finite number"),
        (["train", "--optim-args", "foo"], 1, "optim_args must be key=value with commas, got 'foo'"),
        (["train", "--optim-args", "a=b=c"], 1, "optim_args must be key=value with commas, got 'a=b=c'"),
        (["train", "--sampler-refresh", "echo '"], 1, "sampler_refresh must be a command (No closing quotation)"),
        (["train", "--data", "x", "--reward", "a:b"], 1, "reward has no effect with data (ppg-fast score rewards"),
        (["train", "--data", "x", "--judge", "http://x"], 1, "judge has no effect with data"),
        (["compare", "--first-seed", str(2**70)], 1, "the last seed must be below 2^63"),
        (["compare", "--problem", f"drawn:0..{10**14}"], 1, "a range of drawn problems must be below a million"),
        (["bench", "--threads", "x"], 2, "--threads must be numbers >= 1 with commas, got 'x'"),
        (["train", "--data", "no\nfile"], 1, r"'no\nfile': No such file or directory"),
        (["train", "--data", "a\udcff"], 2, "arguments must be text in"),
    ],
)
def test_what_is_wrong_is_one_line(argv, status, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ours, line = said(capsys, *argv)
    assert message in line
    assert ours == status
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nseed: 2\n", ", line 2: setting 'seed' is given twice"),
        ("max-steps: 1\nmax_steps: 2\n", ": setting 'max_steps' is given twice"),
        ("max_stps: 1", ": unknown setting 'max_stps'; did you mean 'max_steps'?"),
        ("run_name: 2026-99-99", ", line 1: a timestamp must be one, got '2026-99-99'"),
        ("run_name: !!bool x", ", line 1: a bool must be one, got 'x'"),
        ("a: [1\nb: 2", ", line 2: expected ',' or ']'"),
        ("[" * 1200, " must be a mapping of settings to values, got one nested too deeply"),
        (f"learning_rate: 1{'0' * 400}", ": learning_rate must be of type float, got a number of 1329 bits"),
        (f"max_steps: 0x{'f' * 9000}", ": max_steps must be of type int, got a number of 36000 bits"),
        ("- 1", " must be a mapping of settings to values, got list"),
        ("!!python/object:os.system x", "could not determine a constructor"),
    ],
)
def test_a_file_of_settings_is_named_with_its_line(text, message, tmp_path, capsys):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    status, line = said(capsys, "train", "--config", str(file))
    assert status == 1
    assert message in line
    assert len(line) < 600
    with pytest.raises(ValueError, match=r"c\.yaml"):
        make_config(read_yaml(str(file)))


def test_a_value_may_begin_with_a_minus():
    from ppg_fast.cli import _parser

    words = ["train", "--reward", "-0.1*judge", "--judge-range", "-5:5", "--freeze", "-x", "--max-steps", "3"]
    found = vars(_parser(words).parse_args(words))
    assert (found["reward"], found["judge_range"], found["freeze"], found["max_steps"]) == (
        "-0.1*judge",
        "-5:5",
        "-x",
        "3",
    )
    with pytest.raises(SystemExit):  # a flag is a flag
        _parser([]).parse_args(["train", "--reward", "--max-steps", "3"])
    assert vars(_parser([]).parse_args(["score", "-o", "x", "y"]))["output"] == "x"


def test_classes_print_as_they_are_named():
    from ppg_fast.dialogues.packing import Sample
    from ppg_fast.training.objective import Objective, warn_if_hardly_credited

    assert str(ppg.Greedy()) == "greedy"
    samples = [
        Sample(tokens=[1, 2, 3, 4, 5], turn_ids=[-1, 0, -1, 1, 2], rewards=[0.0, 0.0, 1.0], group_id=0)
        for _ in range(2)
    ]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_if_hardly_credited(samples, Objective(ppg.Greedy()))
    assert [str(w.message) for w in caught] == [
        "rewards come with the last turn only: greedy credits 2 of 6 turns, full all"
    ]


def test_out_of_memory_is_one_line(monkeypatch, capsys):
    import torch

    from ppg_fast import jobs

    for error in (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError()):
        monkeypatch.setattr(jobs, "run_job", lambda *_, error=error, **__: (_ for _ in ()).throw(error))
        status, line = said(capsys, "train")
        assert status == 1
        assert line.startswith("ppg-fast: out of memory: ")
    monkeypatch.setattr(jobs, "run_job", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        main(["train"])


def test_a_reader_that_leaves(tmp_path):
    """`| true` reads nothing: what only prints ends as a shell expects, what works finishes its work."""
    status, _, err = shell("$PPG info | true", tmp_path)
    assert (status, err) == ([141, 0], "")
    status, _, err = shell(f"$PPG train --output-dir run {' '.join(ONE_STEP)} | true", tmp_path)
    assert status == [0, 0]
    assert err == "ppg-fast: warning: the output is lost (nobody reads it any more); the work goes on\n"
    assert json.loads((tmp_path / "run/summary.json").read_text())["status"] == "finished"


def test_a_terminal_without_the_letters(tmp_path):
    """A dialogue, a folder and a warning with letters that ASCII does not have."""
    turns = [{"role": "user", "content": "hä…"}, {"role": "assistant", "content": "jø 🎉"}]
    lines = [{"id": f"dü{i}", "group_id": "g", "messages": turns, "turn_rewards": [1.0]} for i in range(6)]
    lines[3] = {**lines[3], "turn_rewards": []}
    text = "\n".join(json.dumps({**line, "id": line["id"]}, ensure_ascii=False) for line in lines)
    (tmp_path / "log…").write_text(text, encoding="utf-8")
    call = "$PPG train --data log… --output-dir rün --width 16 --layers 1 --max-steps 1"
    status, out, err = shell(call, tmp_path, PYTHONIOENCODING="ascii")
    assert status == [0], err
    assert "r\\xfcn" in out
    assert "log\\u2026, line 4" in err
    status, _, err = shell("$PPG train --data log…", tmp_path, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert status == [2]
    assert err.count("\n") == 1
    assert err.startswith("ppg-fast: arguments must be text in ascii (or set LC_ALL=C.UTF-8), got ")


def test_the_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"ppg_fast {ppg.__version__}\n"
