"""Prompts files, the partners, and `ppg-fast train --prompts` and `ppg-fast score` from end to end, offline."""

import json
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("httpx2")

from openai_server import Raw, said, serve
from test_cli import FILES, TINY, dialogue, failure, rows, write

from ppg_fast import stopping
from ppg_fast.cli import main
from ppg_fast.dialogues.chat_format import ChatFormat, make_byte_tokenizer
from ppg_fast.dialogues.dialogue import Dialogue, Message, read_dialogues
from ppg_fast.dialogues.prompts import Prompt, prompt_of, read_prompts
from ppg_fast.endpoint import Endpoint
from ppg_fast.jobs import score as scoring_job
from ppg_fast.jobs.prompts import prompt_seeds
from ppg_fast.models.causal_lm import load_model, make_model
from ppg_fast.rollouts.generation import LocalSampler, Request
from ppg_fast.rollouts.partner import (
    OPENER,
    Conversation,
    EndpointPartner,
    LoggedPartner,
    ModelPartner,
    NoPartner,
    step_all,
)
from ppg_fast.rollouts.rollout import collect_groups

OPENING = [{"role": "system", "content": "You sell shoes."}, {"role": "user", "content": "Hello!"}]


def test_prompts_dialogues_and_judged_files_are_read_alike(tmp_path):
    logged = [
        *OPENING,
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "Bye."},
        {"role": "assistant", "content": "Bye."},
    ]
    path = write(
        tmp_path / "p.jsonl",
        [
            {"id": "a", "messages": OPENING, "partner": "You want boots.", "answer": 42},
            {"messages": OPENING},
            {"id": "c", "group_id": "g", "messages": logged, "turn_rewards": [1, None]},
        ],
    )
    a, b, c = read_prompts(path, strict=True)
    assert (a.id, a.partner, a.info) == ("a", "You want boots.", {"answer": 42})
    assert (b.id, b.partner, b.logged) == ("line 2", "", ())
    assert (c.messages, c.logged, c.info) == (a.messages, ((Message("user", "Bye."),),), {"group_id": "g"})
    assert [m.content for m in a.messages] == ["You sell shoes.", "Hello!"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"id": "x", "messages": OPENING[:1]}, "prompt 'x' must end with a message of the user or a tool, got system"),
        ({"id": "x", "messages": []}, "got nothing"),
        ({"id": "a", "messages": OPENING}, "prompt id 'a' was used before"),
        ({"id": [3], "messages": OPENING}, "id must be a non-empty string"),
        ({"id": "x", "messages": OPENING, "partner": 1}, "prompt 'x': partner must be a string, got int 1"),
        ({"id": "x", "messages": [{"role": "king", "content": ""}]}, "prompt 'x', message 0: role must be one of"),
        ("{", "line 2 is not JSON"),
        ([1], "must be a JSON object"),
    ],
)
def test_bad_prompts_are_named_and_left_out_or_an_error(line, message, tmp_path):
    path = write(tmp_path / "p.jsonl", [{"id": "a", "messages": OPENING}, line])
    with pytest.warns(UserWarning, match=message):
        assert [p.id for p in read_prompts(path)] == ["a"]
    with pytest.raises(ValueError, match=message):
        read_prompts(path, strict=True)


def test_a_dialogue_that_the_assistant_opens_is_a_prompt_without_an_opening(tmp_path):
    messages = [{"role": "assistant", "content": "Hi."}, {"role": "user", "content": "Bye."}]
    path = write(tmp_path / "p.jsonl", [{"id": "a", "messages": messages}])
    (opened,) = read_prompts(path, strict=True)
    assert (opened.messages, opened.logged) == ((), ((Message("user", "Bye."),),))


def prompt(**changes):
    values = {"id": "p", "messages": tuple(Message(**m) for m in OPENING), "partner": "You want boots.", **changes}
    return Prompt(**values)


def test_a_partner_sees_the_dialogue_from_its_side_and_ends_it_with_the_phrase():
    replies = ["Boots?", "Thanks. DONE"]
    with serve(lambda *_: said(replies.pop(0))) as server:
        partner = EndpointPartner(Endpoint(server.url), "Play the customer.", max_tokens=9)
        talk = Conversation([prompt()], partner, max_turns=5, stop_phrase="DONE")
        assert talk.reset(7) == list(prompt().messages)
        assert talk.step("Hi.") == (Message("user", "Boots?"), 0.0, False)
        assert talk.step("Sure.") == (None, 0.0, True)
    assert talk.messages[-1] == Message("user", "Thanks. DONE"), "rewards may read it"
    first, second = (payload for _, payload in server.requests)
    system = {"role": "system", "content": "Play the customer.\n\nYou want boots."}
    opener, hello, hi = (
        {"role": "user", "content": OPENER},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Hi."},
    )
    assert first["messages"] == [system, opener, hello, hi]
    assert second["messages"] == [
        system,
        opener,
        hello,
        hi,
        {"role": "assistant", "content": "Boots?"},
        {"role": "user", "content": "Sure."},
    ]
    assert (first["max_tokens"], first["temperature"]) == (9, 1.0)
    assert first["seed"] != second["seed"]


def test_the_log_and_nobody_as_partners_and_the_most_turns():
    logged = prompt(logged=(Message("user", "Two?"), Message("tool", "3")))
    talk = Conversation([logged], LoggedPartner(), max_turns=9)
    talk.reset(0)
    assert [talk.step(str(n))[0] for n in range(3)] == [Message("user", "Two?"), Message("tool", "3"), None]
    for partner, turns in ((NoPartner(), 9), (LoggedPartner(), 1)):
        talk = Conversation([logged], partner, turns)
        talk.reset(0)
        assert talk.step("x") == (None, 0.0, True)


def test_between_two_answers_everything_logged_is_heard_at_once():
    said = [("user", "u0"), ("assistant", "a0"), ("tool", "12"), ("tool", "13"), ("assistant", "a1"), ("user", "u1")]
    said += [("assistant", "a2"), ("assistant", "a3"), ("user", "u2")]
    results = [Message("tool", text, {"tool_call_id": text}) for text in ("12", "13")]
    messages = [Message(*m) for m in said[:2]] + results + [Message(*m) for m in said[4:]]
    logged = prompt_of(Dialogue("d", "g", tuple(messages), (None,) * 4))
    assert logged.logged == (tuple(results), (Message("user", "u1"),), (Message("user", "u2"),))
    talk = Conversation([logged], LoggedPartner(), max_turns=9, stop_phrase="u2", clean=str.strip)
    talk.reset(0)
    assert [talk.step("x") for _ in range(3)] == [
        (results, 0.0, False),
        (Message("user", "u1"), 0.0, False),
        (None, 0.0, True),
    ]
    assert [m.content for m in talk.transcript().messages] == ["u0", "x", "12", "13", "x", "u1", "x", "u2"]


def test_a_rollout_hears_two_results_before_it_answers_again():
    tokenizer = make_byte_tokenizer(["hello"], 280)
    model, chat = make_model(len(tokenizer), 32, 1), ChatFormat(tokenizer)
    said = [("user", "u"), ("assistant", "a"), ("tool", "12"), ("tool", "13"), ("assistant", "b"), ("user", "v")]
    logged = prompt_of(Dialogue("d", "g", tuple(Message(*m) for m in said), (None,) * 2))
    assert chat.rehearse(logged.messages, logged.replies()) == len(chat.opening(logged.messages))
    make = lambda: Conversation([logged], LoggedPartner(), 9, clean=chat.without_special)  # noqa: E731
    random = torch.Generator().manual_seed(0)
    (rollout,) = collect_groups(model, chat, make, [0], 1, generator=random, max_new_tokens=3, step_all=step_all)
    assert [m.role for m in rollout.messages] == ["user", "assistant", "tool", "tool", "assistant", "user", "assistant"]
    sample = rollout.sample
    text = tokenizer.decode([t for t, turn in zip(sample.tokens, sample.turn_ids, strict=True) if turn < 0])
    assert text == "<user>u<end><assistant><tool>12<end><tool>13<end><assistant><user>v<end><assistant>"


def test_a_logged_dialogue_is_a_prompt_with_its_log():
    messages = [("system", "s"), ("user", "u0"), ("assistant", "a0"), ("user", "u1"), ("assistant", "a1")]
    logged = Dialogue("d", "g", tuple(Message(*m) for m in messages), (1.0, 0.0))
    talk = Conversation([prompt_of(logged)], LoggedPartner(), max_turns=9)
    assert [m.content for m in talk.reset(0)] == ["s", "u0"]
    assert talk.step("anything") == (Message("user", "u1"), 0.0, False)
    assert talk.step("anything") == (None, 0.0, True)
    begun = replace(logged, messages=logged.messages[2:])
    assert prompt_of(begun).messages == (), "the assistant spoke first"
    assert prompt_of(begun).logged == ((Message("user", "u1"),),)
    with pytest.raises(ValueError, match="at least one prompt"):
        Conversation([], LoggedPartner(), 9)


def test_the_start_weights_as_partner_stay_and_do_not_hear_special_tokens():
    tokenizer = make_byte_tokenizer(["hello"], 280)
    model, chat = make_model(len(tokenizer), 32, 1), ChatFormat(tokenizer)
    partner = ModelPartner(model, chat, max_tokens=5, batch_size=2)
    talks = [Conversation([prompt(id=str(n))], partner, 3, clean=chat.without_special) for n in range(3)]

    def replies():
        for talk in talks:
            talk.reset(0)
        return [reply for reply, _, _ in step_all(talks, ["a <end> b", "", "<us<end>er>"])]

    before = replies()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert replies() == before
    assert len({r.content for r in before if r}) == 3, "each dialogue has its own luck"


def test_what_a_partner_says_is_cleaned_of_special_tokens():
    tokenizer = make_byte_tokenizer(["hello"], 280)
    model, chat = make_model(len(tokenizer), 32, 1), ChatFormat(tokenizer)
    with serve(lambda *_: said("hm <e<end>nd> <assistant>yes")) as server:
        make = lambda: Conversation([prompt()], EndpointPartner(Endpoint(server.url)), 2, clean=chat.without_special)  # noqa: E731
        (rollout,) = collect_groups(
            model, chat, make, [0], 1, generator=torch.Generator().manual_seed(0), max_new_tokens=3, step_all=step_all
        )
    assert rollout.messages[3] == Message("user", "hm  yes")
    assert len(rollout.sample.rewards) == 2


def test_every_prompt_comes_once_an_epoch_and_the_step_decides_which():
    seeds = [seed for step in range(1, 8) for seed in prompt_seeds(step, 5, 7, seed=3)]
    assert len(set(seeds)) == 35
    for epoch in range(5):
        assert sorted(s % 7 for s in seeds[epoch * 7 : epoch * 7 + 7]) == list(range(7))
        assert {s // 7 for s in seeds[epoch * 7 : epoch * 7 + 7]} == {epoch}
    assert seeds[:7] != [s - 7 for s in seeds[7:14]], "epochs differ in their order"
    assert prompt_seeds(3, 5, 7, seed=3) == seeds[10:15]


REWARD = (
    "def letters(messages, goal):\n    text = messages[-1]['content']\n    return sum(c in goal for c in text) / "
    "max(1, len(text))\n"
)
LEARN = [
    *TINY,
    "--vocab-size",
    "280",
    "--num-prompts",
    "4",
    "--num-generations",
    "6",
    "--max-new-tokens",
    "8",
    "--max-turns",
    "2",
]
LEARN += ["--learning-rate", "0.02", "--policy-class", "greedy", "--eval-dialogues", "2", "--save-every", "2"]


@pytest.fixture
def files(tmp_path):
    (tmp_path / "letters.py").write_text(REWARD)
    openings = [
        {"id": f"p{n}", "messages": [{"role": "user", "content": f"say {n}"}], "goal": "abcdefghijklmnopqrstuvwxyz"}
        for n in range(10)
    ]
    return {
        "prompts": write(tmp_path / "p.jsonl", openings),
        "reward": f"{tmp_path / 'letters.py'}:letters",
        "folder": tmp_path / "run",
    }


def train(files, *flags):
    return main(
        [
            "train",
            "--prompts",
            files["prompts"],
            "--reward",
            files["reward"],
            "--output-dir",
            str(files["folder"]),
            *LEARN,
            *flags,
        ]
    )


def weights(folder):
    return (folder / "checkpoint" / "model.safetensors").read_bytes()


def test_a_run_with_a_partner_behind_http_learns_what_is_paid(files, monkeypatch):
    monkeypatch.setattr(stopping, "sleep", lambda seconds: None)
    count = []

    def partner(path, payload):
        count.append(payload)
        return Raw(503) if len(count) % 50 == 7 else said(f"and then? {payload['seed'] % 10}")

    monkeypatch.setenv("A_KEY", "sk-very-secret")
    with serve(partner) as server:
        flags = ("--partner", server.url, "--partner-key", "env:A_KEY", "--max-steps", "20", "--eval-every", "10")
        assert train(files, *flags) == 0
    folder = files["folder"]
    assert {p.name for p in folder.iterdir()} == FILES
    start, _, end = (row["eval/reward"] for row in rows(folder, "eval"))
    assert end > start + 0.4, "of 2, for two turns of letters only"
    rollouts = rows(folder, "rollout")
    assert [r["step"] for r in rollouts] == list(range(1, 21))
    assert rollouts[-1]["rewards/letters/mean"] > rollouts[0]["rewards/letters/mean"] + 0.2
    assert rollouts[-1]["endpoint/partner/retries"] > 0
    assert rows(folder, "train")[-1]["turns/mean_count"] == 2
    assert "and then?" in (folder / "samples_after.md").read_text()
    assert {h["authorization"] for h in server.headers} == {"Bearer sk-very-secret"}
    for file in folder.rglob("*"):
        assert file.is_dir() or b"sk-very-secret" not in file.read_bytes(), file


def test_resume_goes_on_with_the_prompts_that_would_have_come(files, tmp_path):
    flags = ("--partner", "self", "--partner-tokens", "3", "--eval-every", "3", "--max-steps")
    assert train(files, *flags, "4") == 0
    whole = files["folder"]
    files["folder"] = tmp_path / "half"
    assert train(files, *flags, "4", "--final-learning-rate", "0.2") == 0
    (tmp_path / "half" / "checkpoints" / "step-00000004").rename(tmp_path / "gone")
    assert main(["train", "--resume", str(tmp_path / "half")]) == 0
    assert weights(tmp_path / "half") == weights(whole)
    clocks = ("seconds", "rollout_time")
    strip = lambda folder: [{k: v for k, v in r.items() if k not in clocks} for r in rows(folder, "rollout")]  # noqa: E731
    assert strip(tmp_path / "half") == strip(whole)


def test_a_judge_alone_is_the_reward_and_its_failures_are_counted(files):
    with serve(lambda path, payload: said("SCORE: 5" if payload["temperature"] else "hm")) as server:
        flags = [
            "--prompts",
            files["prompts"],
            "--output-dir",
            str(files["folder"]),
            "--judge",
            server.url,
            "--partner",
            "none",
        ]
        assert main(["train", *flags, *LEARN, "--max-steps", "1"]) == 0
    assert rows(files["folder"], "rollout")[0]["rewards/judge/mean"] == 0.5


def test_a_judge_that_often_fails_is_warned_of_once_and_one_that_always_fails_is_an_error(files, capsys):
    flags = ["--prompts", files["prompts"], *LEARN, "--partner", "none", "--judge-retries", "0", "--max-steps", "2"]
    with serve(lambda *_: said("hm" if len(server.requests) % 3 == 0 else "SCORE: 5")) as server:
        assert main(["train", *flags, "--judge", server.url, "--output-dir", str(files["folder"])]) == 0
        warning = "turns could not be scored; they count as reward 0"
        assert capsys.readouterr().err.count(warning) == 1
        assert rows(files["folder"], "rollout")[1]["rewards/unscored"] == 8
        server.answer = lambda *_: said("hm")
        err = failure(capsys, *flags, "--judge", server.url, "--output-dir", str(files["folder"]) + "2")
    assert "no turn of 2 dialogues could be scored by judge" in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--partner", "bob"], "partner must be logged, none, self or the URL of an endpoint, got 'bob'"),
        (["--partner", "http://h/v1", "--partner-key", "sk-secret"], "env:NAME or file:PATH"),
        (["--reward", "ratings:RATINGS"], "ratings are of logged answers"),
        (["--reward", "judge"], "give --judge URL"),
        (["--data", "x.jsonl"], "data (offline) and prompts (on-policy) exclude each other"),
        (["--sampler", "http://h/v1", "--temperature", "0.7"], "temperature 1"),
        (["--sampler", "http://h/v1"], "importance_cap > 0"),
        (["--max-dialogue-tokens", "3"], "none of 10 prompts can be written"),
        (["--strict", "--max-dialogue-tokens", "3"], "prompt 'p0': an opening must be shorter than the 3 tokens"),
        (["--timeout", "0"], "timeout must be"),
    ],
)
def test_bad_settings_are_an_error_before_anything_is_written(flags, message, files, tmp_path, capsys):
    ratings = write(tmp_path / "r.jsonl", [{"id": "p0", "rating": 1}])
    given = ["--prompts", files["prompts"], "--reward", files["reward"], "--output-dir", str(files["folder"]), *LEARN]
    said = failure(capsys, *given, *[f.replace("RATINGS", ratings) for f in flags])
    assert message in said
    assert "sk-secret" not in said
    assert not files["folder"].exists()


def test_no_reward_is_an_error(files, capsys):
    assert "a reward is needed" in failure(
        capsys, "--prompts", files["prompts"], "--output-dir", str(files["folder"]), *LEARN
    )


def test_a_reward_that_fails_names_the_dialogue_and_the_run_can_go_on(files, capsys):
    Path(files["reward"].rpartition(":")[0]).write_text(
        REWARD.replace("goal)", "goal, state=[0])").replace("text =", "state[0] += 1; 1 / (state[0] < 200); text =")
    )
    assert train(files, "--partner", "none", "--max-steps", "20") == 1
    err = capsys.readouterr().err
    assert "letters failed at dialogue 'p" in err
    assert "ZeroDivisionError: division by zero (letters.py, line 2: state[0] += 1;" in err
    assert json.loads((files["folder"] / "summary.json").read_text())["status"] == "failed"
    assert list((files["folder"] / "checkpoints").iterdir())


@pytest.mark.parametrize("kept", [(), ("--top-p", "0.7", "--top-k", "6")], ids=["whole", "kept sets"])
def test_a_sampler_endpoint_is_refreshed_with_the_weights_of_the_step(files, tmp_path, kept):
    """The server is the policy itself, loaded anew from the folder that the refresh command is given."""
    lock, seen = threading.Lock(), []

    def engine(path, payload):
        assert path == ("/inference/v1/generate" if kept else "/v1/completions")
        payload = {"prompt": payload.get("token_ids"), **payload, **payload.get("sampling_params", {})}
        with lock, torch.no_grad():
            weights = json.loads((tmp_path / "loaded").read_text())
            if not seen or seen[-1][0] != weights["sum"]:
                seen.append((weights["sum"], load_model(weights["folder"], 263).eval()))
            stream = torch.Generator().manual_seed(payload["seed"])
            cut = (payload["top_p"], payload["top_k"]) if kept else ()
            sampler = LocalSampler(seen[-1][1], payload["stop_token_ids"][0], [0, 2, 3, 4, 5, 6], 1.0, *cut)
            answer = sampler.answer([Request(0, payload["prompt"], payload["max_tokens"], stream)])[0]
        choice = {"token_ids": answer.tokens, "finish_reason": "stop" if answer.ended else "length"}
        content = [{"logprob": value} for value in answer.logprobs]
        logprobs = {"content": content} if kept else {"token_logprobs": answer.logprobs}
        return {"choices": [{**choice, "logprobs": logprobs, "sampling_mask": answer.kept}]}

    (tmp_path / "load.py").write_text(
        "import hashlib, json, pathlib, sys\n"
        "data = pathlib.Path(sys.argv[1], 'model.safetensors').read_bytes()\n"
        "pathlib.Path(sys.argv[2]).write_text(json.dumps({'sum': hashlib.sha256(data).hexdigest(), 'folder': "
        "sys.argv[1]}))\n"
    )
    with serve(engine) as server:
        refresh = f"{sys.executable} {tmp_path / 'load.py'} {{folder}} {tmp_path / 'loaded'}"
        flags = (
            "--sampler",
            server.url,
            "--sampler-refresh",
            refresh,
            "--partner",
            "none",
            "--max-steps",
            "3",
            "--importance-cap",
            "2",
        )
        assert train(files, *flags, *kept) == 0
        assert len(seen) == 3, "one set of weights a step"
        for row in rows(files["folder"], "train"):
            assert row["sampling/sampling_logp_difference/max"] < 1e-4, "over the whole vocabulary: a nat"
        if kept:
            return
        files["folder"] = tmp_path / "broken"
        assert train(files, *flags[:3], "false", *flags[4:]) == 1


def test_score_fills_every_turn_and_goes_on_after_a_failure(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(scoring_job, "CHUNK", 2)
    records = [dialogue(n, rewards=(None, None), likes="anna" if n % 2 else "bruno") for n in range(5)]
    data, out = write(tmp_path / "in.jsonl", records), tmp_path / "out" / "scored.jsonl"
    with serve(lambda *_: Raw(400, b"no more") if len(server.requests) > 8 else said("SCORE: 4")) as server:
        (tmp_path / "r.py").write_text("def named(messages, likes): return float(likes in messages[-1]['content'])\n")
        formula = f"{tmp_path / 'r.py'}:named + 0.5*judge"
        flags = ["score", data, "-o", str(out), "--reward", formula, "--judge", server.url, "--concurrency", "1"]
        assert main(flags) == 1
        assert "no more" in capsys.readouterr().err
        assert not out.exists()
        asked, server.answer = len(server.requests), lambda *_: said("SCORE: 4")
        assert main(flags) == 0
        assert len(server.requests) - asked == 2, "four dialogues were scored before"
    said_ = capsys.readouterr().out
    assert "4 of 5 dialogues were scored before" in said_
    assert "5 dialogues, 10 turns scored, 0 not, mean reward 0.4" in said_
    scored = read_dialogues(out, strict=True)
    assert [d.turn_rewards for d in scored[:2]] == [(0.2, 0.2), (1.2, 0.2)]
    assert [d.messages for d in scored] == [d.messages for d in read_dialogues_quietly(data)]
    assert {p.name for p in out.parent.iterdir()} == {"scored.jsonl"}
    assert main(flags) == 1
    assert "exists" in capsys.readouterr().err


def read_dialogues_quietly(path):
    with pytest.warns(UserWarning, match="have no reward"):
        return read_dialogues(path)


def test_score_with_human_ratings_then_train_on_them(tmp_path, capsys):
    data = write(tmp_path / "in.jsonl", [dialogue(n) for n in range(6)])
    ratings = write(
        tmp_path / "r.jsonl",
        [{"id": f"d{n}", "turn": t, "rating": r, "rater": r} for n in range(6) for t in (0, 1) for r in (1, 2)],
    )
    out = str(tmp_path / "scored.jsonl")
    assert main(["score", data, "-o", out, "--reward", f"ratings:{ratings}"]) == 0
    assert "12 turns scored, 0 not, mean reward 1.5" in capsys.readouterr().out
    assert (
        main(
            [
                "train",
                "--data",
                out,
                "--output-dir",
                str(tmp_path / "run"),
                "--max-steps",
                "1",
                "--max-new-tokens",
                "2",
                *TINY,
            ]
        )
        == 0
    )
