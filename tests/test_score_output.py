"""`ppg-fast score`: what goes on is what the same content scored, keys survive, and the output is no guess."""

import json
import os
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from ppg_fast.cli import main
from ppg_fast.config import make_config
from ppg_fast.jobs import score as job
from ppg_fast.writing import opened


def line(number, **more):
    messages = [{"role": "user", "content": f"q {number}"}, {"role": "assistant", "content": "a" * number}]
    return {"id": f"d{number}", "group_id": "g", "messages": messages, "turn_rewards": [None], **more}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(job, "CHUNK", 2)
    lines = [line(n, topic=f"t{n}", deep={"x": [n]}) for n in range(1, 6)]
    Path("in.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    Path("helper.py").write_text("VALUE = 111.0\n")
    Path("rewards.py").write_text(
        "import os, sys; sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))\n"
        "sys.modules.pop('helper', None)\nimport helper\n"
        "def fixed(messages, topic):\n"
        "    if os.path.exists('stop') and topic == 't4':\n        raise RuntimeError('the judge is gone')\n"
        "    open('asked', 'a').write(topic + ' ')\n    return helper.VALUE\n"
    )
    return tmp_path


def run(*flags, output="out.jsonl"):
    return main(["score", "in.jsonl", "-o", output, "--reward", "rewards.py:fixed", *flags])


def rows(path="out.jsonl"):
    return [json.loads(text) for text in Path(path).read_text().split("\n") if text]


def cut_short(*flags):
    Path("stop").touch()
    assert run(*flags) == 1
    Path("stop").unlink()
    Path("asked").unlink()


def test_another_timeout_keeps_what_was_scored(capsys):
    cut_short()
    assert run("--timeout", "5", "--concurrency", "2", "--retries", "9", "--judge-retries", "5") == 0
    assert "2 of 5 dialogues were scored before: going on" in capsys.readouterr().out
    assert Path("asked").read_text() == "t3 t4 t5 "
    assert [row["turn_rewards"] for row in rows()] == [[111.0]] * 5
    assert not list(Path().glob(".out.jsonl.*"))


@pytest.mark.parametrize("file", ["helper.py", "rewards.py", "in.jsonl"])
def test_a_mended_reward_is_not_mixed_with_the_old_one(file, capsys):
    cut_short()
    text = Path(file).read_text().replace("111.0", "1.0").replace("helper.VALUE", "1.0").replace("q 5", "q five")
    Path(file).write_text(text)
    time = os.stat(file).st_mtime_ns + 10**10
    os.utime(file, ns=(time, time))  # Python's cache of bytecode looks at it
    assert run() == 0
    assert "other rewards or from other data, so it is not gone on with; remove it" in capsys.readouterr().out
    assert Path("asked").read_text() == "t1 t2 t3 t4 t5 "
    assert [row["turn_rewards"] for row in rows()] == [[111.0 if file == "in.jsonl" else 1.0]] * 5


def test_a_reward_file_that_moved_is_the_same(capsys):
    cut_short()
    Path("elsewhere").mkdir()
    for name in ("rewards.py", "helper.py"):
        Path(name).rename(Path("elsewhere") / name)
    assert main(["score", "in.jsonl", "-o", "out.jsonl", "--reward", "elsewhere/rewards.py:fixed"]) == 0
    assert "2 of 5 dialogues were scored before" in capsys.readouterr().out


def test_the_rubric_and_the_judge_s_model_count(monkeypatch):
    from ppg_fast.jobs.inputs import reward_digest
    from ppg_fast.rewards import make_rewards

    class Server:
        model = "one"

    def digest(formula="judge:rubric.txt"):
        return reward_digest(formula, make_rewards(formula, Server))

    Path("rubric.txt").write_text("be kind")
    first = digest()
    assert digest("1*judge:rubric.txt@turn") == first
    Path("copy.txt").write_text("be kind")
    assert digest("judge:copy.txt") == first
    assert digest("judge:rubric.txt@dialogue") != first
    Path("rubric.txt").write_text("be strict")
    assert digest() != first
    Path("rubric.txt").write_text("be kind")
    monkeypatch.setattr(Server, "model", "two")
    assert digest() != first


DAY = "{{ strftime_now('%d %b %Y') }}\n{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@pytest.fixture
def dated(tmp_path):
    """A reward model whose template writes the date."""
    import torch
    from transformers import Qwen3Config, Qwen3ForSequenceClassification

    from ppg_fast.dialogues.chat_format import make_byte_tokenizer

    tokenizer = make_byte_tokenizer(["hello"], 300)
    tokenizer.chat_template = DAY
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Qwen3Config(
        vocab_size=len(tokenizer), **sizes, num_key_value_heads=1, head_dim=8, num_labels=1, pad_token_id=0
    )
    torch.manual_seed(0)
    Qwen3ForSequenceClassification(config).save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    return f"model:{tmp_path / 'rm'}"


def test_a_reward_model_is_told_the_day_of_the_run(dated):
    from ppg_fast.dialogues.dialogue import Message
    from ppg_fast.jobs.endpoints import rewards_of
    from ppg_fast.rewards import Transcript

    (reward,) = rewards_of(make_config({"reward": dated, "template_date": "2024-02-05"}), "cpu")
    transcript = Transcript("a", (Message("user", "hi"), Message("assistant", "yo")))
    (row,) = reward.scorer.rows([transcript])
    text = reward.scorer.tokenizer.decode(row.tokens)
    assert text == "05 Feb 2024\nuser: hi\nassistant: yo\n"


def test_what_was_scored_on_another_day_is_gone_on_with_on_that_day_only(dated, monkeypatch, capsys):
    real, day = time.strftime, ["2024-02-05"]
    monkeypatch.setattr(time, "strftime", lambda form, *rest: day[0] if form == "%Y-%m-%d" else real(form, *rest))
    flags = ["score", "in.jsonl", "-o", "out.jsonl", "--reward", f"{dated} + rewards.py:fixed", "--overwrite"]

    def scored(again, *more):
        """Cut short on the fifth, and gone on with on the sixth: what is said, what comes out."""
        day[0] = "2024-02-05"
        Path("stop").touch()
        assert main(flags) == 1
        Path("stop").unlink()
        day[0] = "2024-02-06"
        assert main([*flags, *more]) == 0
        assert ("2 of 5 dialogues were scored before" in capsys.readouterr().out) == again
        return Path("out.jsonl").read_bytes()

    assert scored(True, "--template-date", "2024-02-05") != scored(False)


def test_keys_of_the_input_survive():
    strange = {"odd": "\ud800", "big": 10**30, "none": None, "text": "a\u2028b"}
    bad = line(7, topic="bad") | {"messages": []}  # left out; its id comes again
    lines = [bad, line(7, topic="good", **strange)]
    Path("in.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    assert run() == 0
    assert rows() == [line(7, topic="good", **strange) | {"turn_rewards": [111.0]}]
    Path("in.jsonl").write_text(json.dumps(lines, indent=1))
    assert run("--overwrite") == 0
    assert rows() == [line(7, topic="good", **strange) | {"turn_rewards": [111.0]}]


def test_a_device_is_written_through_and_stays_one(capsys):
    for name, status in (("/dev/null", 0), ("/dev/full", 1)):
        before = os.stat(name)
        assert run("--overwrite", output=name) == status
        assert stat.S_ISCHR(os.stat(name).st_mode)
        assert os.stat(name).st_rdev == before.st_rdev
    assert "'/dev/full': No space left on device" in capsys.readouterr().err
    assert not [p for p in Path("/dev").iterdir() if p.name.endswith((".partial", ".tmp"))]


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="no files in memory here")
def test_a_file_in_memory_is_a_file():
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        output = Path(folder) / "out.jsonl"
        assert run(output=str(output)) == 0
        output.write_text("old\n" * 1000)
        assert run(output=str(output)) == 1, "it exists"
        assert run("--overwrite", output=str(output)) == 0
        assert [row["turn_rewards"] for row in rows(output)] == [[111.0]] * 5


@pytest.mark.parametrize("to", ["a pipe", "a file"])
def test_standard_output_holds_the_lines_alone(to):
    argv = [sys.executable, "-m", "ppg_fast.cli", "score", "in.jsonl", "-o", "/dev/stdout", "--reward"]
    with open("shell.jsonl", "w") as file:
        out = subprocess.PIPE if to == "a pipe" else file
        done = subprocess.run([*argv, "rewards.py:fixed"], stdout=out, stderr=subprocess.PIPE, text=True, check=True)
    text = done.stdout if to == "a pipe" else Path("shell.jsonl").read_text()
    assert [json.loads(one)["turn_rewards"] for one in text.split("\n") if one] == [[111.0]] * 5
    assert "5 turns scored" in done.stderr


def test_a_pipe_is_written_through(tmp_path):
    os.mkfifo("pipe")
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(Path("pipe").read_text()), daemon=True)
    reader.start()
    assert run(output="pipe") == 0
    reader.join(10)
    assert read[0].count('"turn_rewards": [111.0]') == 5
    assert stat.S_ISFIFO(os.stat("pipe").st_mode)


def test_a_link_stays_and_what_it_leads_to_is_written():
    Path("real").mkdir()
    Path("real/old.jsonl").write_text("old\n")
    Path("real/old.jsonl").chmod(0o640)
    Path("out.jsonl").symlink_to("real/old.jsonl")
    assert run() == 1
    assert Path("real/old.jsonl").read_text() == "old\n"
    assert run("--overwrite") == 0
    assert Path("out.jsonl").is_symlink()
    assert len(rows("real/old.jsonl")) == 5
    assert stat.S_IMODE(os.stat("real/old.jsonl").st_mode) == 0o640


@pytest.mark.parametrize("output", ["in.jsonl", "./in.jsonl", "link.jsonl", "hard.jsonl", "rewards.py", "a folder"])
def test_an_input_or_a_folder_is_no_output(output, capsys):
    Path("link.jsonl").symlink_to("in.jsonl")
    os.link("in.jsonl", "hard.jsonl")
    Path("a folder").mkdir()
    before = {p.name: p.read_bytes() for p in Path().iterdir() if p.is_file()}
    assert run("--overwrite", output=output) == 1
    assert "--output must be a" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in Path().iterdir() if p.is_file()} == before


def test_a_write_that_fails_leaves_the_file_as_it_was():
    Path("x").write_text("old")

    def write():
        with opened(Path("x")) as file:
            file.write("half")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write()
    assert Path("x").read_text() == "old"
    assert not list(Path().glob(".x.*"))


def test_a_config_is_not_needed_for_what_is_scored():
    config = make_config({"reward": "rewards.py:fixed"})
    assert [d.turn_rewards for d in job.score_file("in.jsonl", Path("new/deep.jsonl"), config)] == [(111.0,)] * 5
