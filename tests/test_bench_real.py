"""`make real` without its models: what it counts, keeps and renders, on made results."""

import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from ppg_fast.bench import result_file
from ppg_fast.bench.real import __main__ as real
from ppg_fast.bench.real import command, models, persona, sections, speech, wide_vocabulary
from ppg_fast.bench.tables import NOT_MEASURED
from ppg_fast.bench.whole_step import _objective

from ppg_fast.dialogues.packing import pack
from ppg_fast.dialogues.prompts import read_prompts
from ppg_fast.training.objective import credit

EXAMPLE = Path(__file__).parents[1] / "examples/persona"


# ---- a process that is counted ---------------------------------------------------------------------------------------
@pytest.fixture
def module(tmp_path):
    """A function that writes a module and gives the environment in which `python -m made` runs it."""

    def make(code):
        (tmp_path / "made.py").write_text(code)
        return {"PYTHONPATH": str(tmp_path)}

    return make


def test_a_process_is_counted(module, tmp_path):
    code = "import time; b = bytearray(60 << 20); t = time.process_time()\nwhile time.process_time() - t < 0.3: pass"
    ran = command.run(["made"], module(code), tmp_path / "log")
    assert ran.status == 0
    assert 0.3 <= ran.cpu_seconds <= 10
    assert ran.seconds >= 0.3
    assert ran.peak_bytes >= 60 << 20


def test_a_process_that_fails_says_why(module, tmp_path):
    with pytest.raises(RuntimeError, match=r"^made a ended with status 3: the last line$"):
        command.run(["made", "a"], module("import sys; print('first\\nthe last line'); sys.exit(3)"), tmp_path / "log")


def test_a_process_is_stopped_when_it_is_time(module, tmp_path):
    code = f"import pathlib, time\npathlib.Path({str(tmp_path / 'begun')!r}).touch()\ntime.sleep(60)"
    ran = command.run(["made"], module(code), tmp_path / "log", (tmp_path / "begun").exists)
    assert ran.status == -15
    assert ran.seconds < 30


def test_time_adds_up_and_the_larger_peak_counts():
    assert command.Ran(-15, 1.0, 2.0, 7) + command.Ran(0, 10.0, 20.0, 5) == command.Ran(0, 11.0, 22.0, 7)


def test_only_whole_lines_of_metrics_are_read(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"phase": "eval", "step": 0}\n{"phase": "train", "step": 1}\n{"pha')
    assert command.rows(tmp_path, "eval") == [{"phase": "eval", "step": 0}]
    assert len(command.rows(tmp_path)) == 2
    assert command.rows(tmp_path / "none") == []


# ---- models and steps ------------------------------------------------------------------------------------------------
def test_a_model_is_made_once_and_whole(tmp_path, monkeypatch):
    """One whose making broke off is made again."""
    made = []

    def maker(place):
        made.append(place)
        if len(made) == 1:
            raise RuntimeError("broke off")

    monkeypatch.setenv(models.CACHE, str(tmp_path))
    monkeypatch.setitem(models.MAKERS, "some", maker)
    with pytest.raises(RuntimeError, match="broke off"):
        models.folder("some")
    assert models.folder("some") == models.folder("some") == tmp_path / "some"
    assert len(made) == 2


def test_results_name_no_folder_of_this_machine(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(speech, "measure", lambda arguments: {"spoken": [dict(arguments.set)]})
    given = ["speech", "--work", "/somewhere/else", "--set", "learning_rate=1e-3", "--output", str(tmp_path)]
    assert real.main(given) == 0
    file = result_file.read(tmp_path / "real_speech.cpu.json")
    assert file["spoken"] == [{"learning_rate": "1e-3"}]
    assert file["ppg_fast"]["command"].startswith("python -m ppg_fast.bench.real speech --work else --set")
    assert str(tmp_path.parent) not in json.dumps(file)
    assert "wrote" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["speech", "logged"], "step logged wants --data FILE, a file of logged dialogues"),
        (["logged", "--data", "nowhere.json"], "--data must be files, got 'nowhere.json'"),
        (["sing"], "a step must be one of speech, persona, logged, wide_vocabulary, got 'sing'"),
        (["speech", "--set", "nothing"], "must be NAME=VALUE, got 'nothing'"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is(given, said, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        real.main([*given, "--output", str(tmp_path)])
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_everything_is_done_where_no_step_is_named_but_what_has_no_data(tmp_path, monkeypatch, capsys):
    for step in real.STEPS.values():
        monkeypatch.setattr(step, "measure", lambda arguments: {"done": True})
    assert real.main(["--output", str(tmp_path)]) == 0
    names = ("real_speech.cpu.json", "real_persona.cpu.json", "real_wide_vocabulary.cpu.json")
    assert {path.name for path in tmp_path.iterdir()} == set(names)
    assert capsys.readouterr().err == "logged: left out, it wants --data FILE\n"


@pytest.mark.parametrize(("share", "active"), [(1.0, 2047), (0.25, 512)])
def test_every_advantage_of_the_wide_step_is_one(share, active):
    """There the policy's loss, TRL's and the likelihood have one gradient."""
    sample = wide_vocabulary.sample_of(share)
    assert sum(turn >= 0 for turn in sample.turn_ids) == active
    assert sorted({turn for turn in sample.turn_ids if turn >= 0}) == list(range(len(sample.rewards)))
    _, advantages = credit(pack([sample]), _objective())
    assert advantages.tolist() == [[1.0] * len(sample.rewards)]


# ---- the persona example ---------------------------------------------------------------------------------------------
def test_the_first_answer_is_paid_two_turns_late():
    scope = runpy.run_path(str(EXAMPLE / "rewards.py"))
    scope["persona"].__globals__["likeness"] = lambda answer, persona: float(answer)
    messages, paid = [], []
    for answer in ("1", "10", "100", "1000"):  # of more turns than the example has
        messages += [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
        paid.append(scope["persona"](messages, persona="I am one."))
    assert paid == [0.0, 10.0, 101.0, 1000.0]


def test_the_prompts_can_be_read(tmp_path):
    lines = list(persona._openings())
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    prompts = read_prompts(tmp_path / "prompts.jsonl", strict=True)
    assert len(prompts) == 60
    assert all(len(p.messages) == 2 and p.info["persona"] for p in prompts)
    assert {tuple(m.role for turn in p.logged for m in turn) for p in prompts} == {("user", "user")}
    assert lines == list(persona._openings())  # the same every time
    assert persona._question(str(tmp_path / "prompts.jsonl")) == lines[0]["messages"][:2]


def test_dialogues_and_points_come_from_the_run(tmp_path):
    page = (
        "# Dialogues\n\nnote\n\n## Dialogue 1: return 0.46\n\n- a\n\n## Dialogue 2: return 1\n\n- b\n\n## Dialogue 3\n"
    )
    (tmp_path / "samples_after.md").write_text(page)
    row = {"phase": "eval", "step": 0, "eval/reward": 0.5, "seconds": 3.0, "eval/turns/mean_count": 4}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    assert persona.dialogues(tmp_path, "after") == ["Dialogue 1: return 0.46\n\n- a", "Dialogue 2: return 1\n\n- b"]
    assert persona.points(tmp_path) == [{"step": 0, "reward": 0.5, "seconds": 3.0}]


def test_a_seed_is_run_once_for_its_settings(tmp_path, monkeypatch):
    """What a crash of a later seed cannot take away."""
    asked = []
    monkeypatch.setattr(persona, "_run", lambda seed, settings, place: asked.append(settings) or {"seed": seed})
    once = lambda rate: persona._once(100, {"model": "m"}, {"learning_rate": rate}, tmp_path / "p")  # noqa: E731
    assert once(1.0) == once(1.0) == {"seed": 100}
    assert asked == [{"model": "m", "learning_rate": 1.0}]
    assert once(2.0) == {"seed": 100}
    assert len(asked) == 2


# ---- what is rendered ------------------------------------------------------------------------------------------------
def run_of(seed, returns, seconds, cpu_seconds):
    points = [{"step": 8 * n, "reward": r, "seconds": seconds * n / 2} for n, r in enumerate(returns)]
    spoken = {"asked": "Who?", "before": "I | you", "after": "", "stopped_after": 8}
    kept = {when: [f"Dialogue of <{when}>"] for when in ("before", "after")}
    times = {"seconds": seconds, "cpu_seconds": cpu_seconds, "load_before": 5.5}
    return {"seed": seed, "points": points, **times, **spoken, "dialogues": kept}


def test_held_out_returns_are_shares_of_the_best_of_all_seeds():
    runs = [run_of(100, (0.5, 1.0, 2.0), 2400.0, 900.0), run_of(101, (0.5, 1.6, 1.7), 2400.0, 900.0)]
    text = sections.persona_section({"real_persona.cpu": {"runs": runs, "settings": {"lora_rank": 16}}})
    assert "| seed 100 | 25% (0.50) | 50% (1.00) | 100% (2.00) | step 16, 2,400 s | 900 s |" in text
    assert "| seed 101 | 25% (0.50) | 80% (1.60) | 85% (1.70) | step 8, 1,200 s | 450 s |" in text
    assert "80% of the best (2.00 of 3) within 15 minutes: 0 of 2 seeds by the clock of this machine, 2 of 2 by" in text
    assert "lora_rank 16" in text


def test_a_seed_that_never_gets_there_says_so():
    runs = [run_of(100, (0.5, 3.0), 60.0, 50.0), run_of(101, (0.5, 2.3), 60.0, 50.0)]
    text = sections.persona_section({"real_persona.cpu": {"runs": runs, "settings": {}}})
    assert "| never |" in text
    assert "1 of 2 seeds by the clock of this machine, 1 of 2" in text


def test_samples_cannot_break_the_page():
    text = sections.samples_section({"real_persona.cpu": {"runs": [run_of(100, (0.5,), 60.0, 50.0)]}})
    assert "Dialogue of &lt;after>" in text
    assert "| seed 100, stopped after step 8 | Who? | I \\| you | (nothing) |" in text


def step_of(name, peak, cpu_seconds, share=1.0):
    sizes = {"peak_bytes": peak << 20, "state_bytes": 100 << 20, "grad_norm": 2.5, "active": 2047}
    times = {"seconds": 2 * cpu_seconds, "cpu_seconds": cpu_seconds, "load_before": 1.0}
    return {"what": "LoRA", "share": share, "name": name, **sizes, **times}


@pytest.mark.parametrize(("peak", "seconds", "verdict"), [(150, 60, "met"), (151, 60, "missed"), (150, 71, "missed")])
def test_the_next_best_is_taken_measure_by_measure(peak, seconds, verdict):
    """Peak against the smallest peak, time against the shortest time, whoever has them."""
    steps = [step_of("ppg_fast", peak, seconds), step_of("TRL GRPO", 300, 90), step_of("transformers", 600, 70)]
    text = sections.wide_section({"real_wide_vocabulary.cpu": {"steps": steps, "tokens": 2048}})
    above = (peak - 100) / 200
    measured = f"peak {peak / 300:.0%}, above weights and gradients {above:.0%}, time {seconds / 70:.0%}"
    assert (
        f"Ours as a share of the next best: {measured}; the aim (50% of the peak, no more time) is {verdict}." in text
    )
    assert "| TRL GRPO | 300 MiB | 100 MiB | 200 MiB | 90.0 s | 180.0 s |" in text


def test_only_settings_that_differ_are_told():
    tried = [
        {"settings": {"seed": 7, "learning_rate": rate}, "points": [{"step": 0, "reward": 0.5}], "returns": [0.4, 0.6]}
        | {"name": "x", "step_seconds": 60.0}
        for rate in (1e-3, 3e-3)
    ]
    text = sections.tried_section({"real_tried.cpu": {"tried": tried}})
    assert "| learning_rate 0.003 | 0: 0.50 | 0.40, 0.60 | 60.0 s |" in text
    assert "seed" not in text


def test_checks_that_fail_are_seen():
    file = {
        "points": [{"step": 0, "logprob": -3.0}, {"step": 8, "logprob": -2.5}], "losses": [900.0, 800.0],
        "turns": {"exact": 9, "read": 10, "dialogues": 3}, "stopped_after": 4, "resumed_alike": False,
        "merge_error": {"merged": 1e-5, "trained": 2.0}, "seconds": 100.0, "cpu_seconds": 60.0, "peak_bytes": 1 << 30,
        "before": "x", "after": "y", "data": "some.json",
    }  # fmt: skip
    text = sections.logged_section({"real_logged.cpu": {"files": [file, {**file, "data": "other.json"}]}})
    assert "| some.json | 3 dialogues |" in text
    assert "| other.json | 3 dialogues |" in text
    assert "| -3.000 → -2.500 |" in text
    assert "| 9 of 10 |" in text
    assert "stopped after step 4, went on: the same weights | **no** |" in text


def test_every_section_waits_for_its_results():
    assert {section({}) for section in sections.SECTIONS.values()} == {NOT_MEASURED}


def test_the_harness_is_no_part_of_training():
    """`make real` is asked for by name: nothing of it is imported by the trainer, and no model by rendering."""
    assert "gguf" not in sys.modules


# ---- a step with a wide vocabulary -----------------------------------------------------------------------------------
@pytest.fixture
def small_gemma(tmp_path, monkeypatch):
    """A Gemma 3 of random weights in the place of the real one: sliding and full attention, a tied head."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Gemma3TextConfig(
        vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, sliding_window=16, layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    place = tmp_path / models.GEMMA3
    transformers.Gemma3ForCausalLM(config).save_pretrained(place)
    (place / "done").touch()
    monkeypatch.setenv(models.CACHE, str(tmp_path))
    monkeypatch.setattr(wide_vocabulary, "TOKENS", 128)
    monkeypatch.setattr(wide_vocabulary, "WORDS", (3, 500))


def test_a_case_is_measured_once_and_can_be_chosen(tmp_path, monkeypatch, small_gemma):
    asked = []
    monkeypatch.setattr(wide_vocabulary, "_apart", lambda *case: asked.append(case) or {"case": case})
    given = SimpleNamespace(work=tmp_path / "work", set={"only": "all weights 0.25|LoRA 1.0 TRL"})
    first = wide_vocabulary.measure(given)["steps"]
    assert [step["case"] for step in first] == [
        *(["all weights", 0.25, name] for name in wide_vocabulary.NAMES),
        ["LoRA", 1.0, "TRL GRPO"],
    ]
    assert wide_vocabulary.measure(given)["steps"] == first
    assert len(asked) == 4


@pytest.mark.parametrize("what", [f"all weights{wide_vocabulary.RECOMPUTED}", "LoRA"])
def test_all_who_are_compared_have_one_gradient(small_gemma, what):
    pytest.importorskip("trl")
    pytest.importorskip("peft")
    found = {name: wide_vocabulary.one(what, 0.25, name) for name in wide_vocabulary.NAMES}
    assert {step["active"] for step in found.values()} == {32}
    norms = [step["grad_norm"] for step in found.values()]
    assert norms[0] > 0
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-4)
