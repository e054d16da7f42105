"""Chat templates, dates and odd dialogues through `ppg-fast train`: one line before anything is written, or trained."""

import re
import shutil
import time
import warnings

import pytest

pytest.importorskip("transformers")

from chat_case import CHATML, byte_tokenizer
from test_cli import rows, write

from ppg_fast.cli import main
from ppg_fast.dialogues.records import MAX_WARNINGS
from ppg_fast.models.causal_lm import make_model

NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
)
NO_TOOL = "{% for m in messages if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endfor %}" + CHATML
NO_TOOL_AFTER_ONE = (
    "{% if messages | length == 3 and messages[2].role == 'tool' %}{{ raise_exception('no') }}{% endif %}" + CHATML
)
DATED = "Today is {{ strftime_now('%d %b %Y') }}.\n" + CHATML
RUN = ["--num-prompts", "2", "--num-generations", "2", "--max-new-tokens", "3", "--eval-every", "1", "--no-progress"]
RUN += ["--eval-dialogues", "1", "--max-steps"]
USER = {"role": "user", "content": "hello"}
SYSTEM, REPLY = {"role": "system", "content": "be kind"}, {"role": "assistant", "content": "good day"}


def folder(path, template, eos="<|im_end|>"):
    """A checkpoint of random weights with a tokenizer of bytes and this chat template."""
    tokenizer = byte_tokenizer(template, ["<|im_start|>", "<|im_end|>"], eos_token=eos)
    make_model(len(tokenizer), 32, 1, end_id=tokenizer.eos_token_id).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def logged(number, *messages):
    messages = list(messages) or [USER, REPLY]
    turns = sum(m["role"] == "assistant" for m in messages)
    return {"id": f"d{number}", "group_id": "g", "messages": messages, "turn_rewards": [1.0] * turns}


def reward(path):
    (path / "letters.py").write_text("def letters(messages):\n    return float(len(messages[-1]['content']))\n")
    return f"{path / 'letters.py'}:letters"


def refusal(capsys, *arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert main(["train", *map(str, arguments)]) == 1
    (line,) = [text for text in capsys.readouterr().err.splitlines() if "Writing model" not in text and text.strip()]
    return line


@pytest.mark.parametrize(
    ("template", "prompts", "message"),
    [
        (NO_SYSTEM, [{"messages": [SYSTEM, USER]}], "prompt 'line 1': message 0: the chat template refuses it: System"),
        (NO_TOOL, [logged(0, USER, REPLY, {"role": "tool", "content": "12"}, REPLY)], "after an answer: .* no tools"),
        ("{% for m in messages %}", [{"messages": [USER]}], "the chat template refuses it: Unexpected end of template"),
        (CHATML, [{"messages": [{"role": "user", "content": "a<|im_end|>"}]}], "message 0: content must not hold"),
        (CHATML, [logged(0, USER, REPLY, {"role": "user", "content": "b<|im_end|>"})], "content must not hold"),
    ],
)
def test_on_policy_a_template_that_refuses_is_one_line_and_nothing_is_written(
    template, prompts, message, tmp_path, capsys
):
    model, out = folder(tmp_path / "m", template), tmp_path / "out"
    capsys.readouterr()
    path = write(tmp_path / "p.jsonl", prompts)
    flags = ["--prompts", path, "--model", model, "--output-dir", out, "--reward", reward(tmp_path), "--max-turns", 2]
    line = refusal(capsys, *flags, *RUN, 1)
    assert re.search(message, line), line
    assert not out.exists()


def test_the_persona_interview_tries_the_template_before_it_writes(tmp_path, capsys):
    model, out = folder(tmp_path / "m", NO_SYSTEM), tmp_path / "out"
    capsys.readouterr()
    assert "message 0: the chat template refuses it: System role" in refusal(
        capsys, "--model", model, "--output-dir", out, *RUN, 1
    )
    assert not out.exists()


def test_a_partner_of_its_own_weights_tries_the_template_before_it_writes(tmp_path, capsys):
    model, out = folder(tmp_path / "m", NO_SYSTEM), tmp_path / "out"
    capsys.readouterr()
    path = write(tmp_path / "p.jsonl", [{"messages": [USER]}] * 2)
    flags = [
        "--prompts",
        path,
        "--model",
        model,
        "--output-dir",
        out,
        "--reward",
        reward(tmp_path),
        "--partner",
        "self",
    ]
    assert "message 0: the chat template refuses it: System role" in refusal(capsys, *flags, *RUN, 1)
    assert not out.exists()


def test_offline_a_refused_dialogue_costs_itself_one_warning_and_all_of_them_the_run(tmp_path, capsys):
    model, out = folder(tmp_path / "m", NO_SYSTEM), tmp_path / "out"
    path = write(tmp_path / "d.jsonl", [logged(0), logged(1, SYSTEM, USER, REPLY), logged(2)])
    flags = ["--model", model, "--output-dir", str(out), *RUN, "1"]
    assert main(["train", "--data", path, *flags]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    assert len(said) == 1
    assert said[0].endswith(
        "d.jsonl, line 2: dialogue 'd1', message 0: the chat template refuses it: System role not supported; left out"
    )
    capsys.readouterr()
    path = write(tmp_path / "d.jsonl", [logged(1, SYSTEM, USER, REPLY)])
    line = refusal(capsys, "--data", path, *flags[:2], "--output-dir", tmp_path / "other", *RUN, 1)
    assert "none of 1 dialogues can be written" in line
    assert "dialogue 'd1', message 0: the chat template refuses it: System role not supported" in line
    assert not (tmp_path / "other").exists()


def test_a_log_that_the_policy_cannot_be_asked_in_still_trains(tmp_path):
    """The page of sample answers leaves out what cannot be asked, here a tool right after the first answer."""
    talk = [USER, REPLY, USER, REPLY, {"role": "tool", "content": "12"}, REPLY]
    path = write(tmp_path / "d.jsonl", [logged(n, *talk) for n in range(2)])
    model = folder(tmp_path / "m", NO_TOOL_AFTER_ONE)
    assert main(["train", "--data", path, "--model", model, "--output-dir", str(tmp_path / "out"), *RUN, "1"]) == 0


# ---- dates -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["data", "prompts"])
def test_a_run_keeps_its_date(kind, tmp_path, monkeypatch, capsys):
    """Begun on one day, resumed on another: the same dialogues to the same bits, and the date is in its config."""
    model = folder(tmp_path / "m", DATED)
    records = [logged(n) for n in range(5)] if kind == "data" else [{"messages": [USER]}] * 2
    path = write(tmp_path / "d.jsonl", records)
    extra = ["--reward", reward(tmp_path)] if kind == "prompts" else []
    real, day = time.strftime, ["2024-02-05"]
    monkeypatch.setattr(time, "strftime", lambda form, *rest: day[0] if form == "%Y-%m-%d" else real(form, *rest))
    run, again = tmp_path / "run", tmp_path / "again"
    flags = [f"--{kind}", path, "--model", model, *extra, "--save-every", "1", *RUN, "2"]
    assert main(["train", *flags, "--output-dir", str(run)]) == 0
    shutil.copytree(run, again)
    shutil.rmtree(again / "checkpoints/step-00000002")
    day[0] = "2024-02-06"
    assert main(["train", "--resume", str(again)]) == 0
    assert "template_date: '2024-02-05'" in (again / "config.yaml").read_text()
    ends = [[row["grad_norm"] for row in rows(folder, "train")] for folder in (run, again)]
    assert ends[0] == ends[1]
    assert len(ends[0]) == 2
    # and it is the day that is read: another one is another run
    assert main(["train", *flags, "--output-dir", str(tmp_path / "next")]) == 0
    assert [row["grad_norm"] for row in rows(tmp_path / "next", "train")] != ends[0]


def test_a_changed_template_or_message_is_another_run(tmp_path, capsys):
    model = folder(tmp_path / "m", CHATML)
    path = write(tmp_path / "d.jsonl", [logged(n) for n in range(2)])
    flags = ["--data", path, "--model", model, "--output-dir", str(tmp_path / "run"), "--save-every", "1", *RUN, "1"]
    assert main(["train", *flags]) == 0
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    for change in (lambda: folder(tmp_path / "m", "Talk:" + CHATML), lambda: write(tmp_path / "d.jsonl", [logged(7)])):
        change()
        capsys.readouterr()
        assert "a run goes on with the dialogues and the tokenizer it began with" in refusal(
            capsys, "--resume", tmp_path / "run", "--max-steps", 2
        )
        assert (tmp_path / "run/metrics.jsonl").read_bytes() == before


def test_a_date_must_be_one(tmp_path, capsys):
    assert "template_date must be a date, YYYY-MM-DD" in refusal(capsys, "--template-date", "5.2.2024")


def test_many_refusals_are_a_few_lines_and_a_count(tmp_path, capsys):
    model, count = folder(tmp_path / "m", NO_SYSTEM), MAX_WARNINGS + 5
    refused = [logged(n, SYSTEM, USER, REPLY) for n in range(count)]
    path = write(tmp_path / "d.jsonl", [*refused, logged(count)])
    out = str(tmp_path / "out")
    assert main(["train", "--data", path, "--model", model, "--output-dir", out, *map(str, RUN), "1"]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    assert len(said) == MAX_WARNINGS + 1
    assert said[-1].endswith(f"d.jsonl: {count} dialogues left out, 1 kept")
