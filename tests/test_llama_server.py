"""llama.cpp's own server as sampler, partner and judge, killed and brought back: `make test-llama`, not part of `make
test`. The model is SmolLM2-135M-Instruct; the server is the program LLAMA_SERVER or the same code in a wheel."""

import os
from pathlib import Path

import pytest
import torch

MODELS = Path(os.environ.get("PPG_FAST_LLAMA", "nowhere"))
if not (MODELS / "float32.gguf").exists():
    pytest.skip("needs llama.cpp's server and a model: make test-llama", allow_module_level=True)

from ppg_fast.bench.llama_run import Run
from ppg_fast.bench.llama_server import ASKED, EXACT, FLOAT32, MODEL, NAME, Server, agreement

from ppg_fast.dialogues.chat_format import ChatFormat
from ppg_fast.dialogues.message import Message
from ppg_fast.endpoint import Endpoint, EndpointError
from ppg_fast.rollouts.generation import EndpointSampler, Request


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The float32 weights, as exact as it can be."""
    with Server(MODELS / FLOAT32, tmp_path_factory.mktemp("server"), *EXACT) as server:
        yield server


@pytest.fixture(scope="module")
def chat():
    from transformers import AutoTokenizer

    return ChatFormat(AutoTokenizer.from_pretrained(MODELS / MODEL))


def request(chat, text, limit, seed=0):
    return Request(seed, chat.opening([Message("user", text)]), limit, torch.Generator().manual_seed(seed))


# ---- one answer ------------------------------------------------------------------------------------------------------
def test_its_log_probs_are_the_trainers(server):
    found = agreement(server, MODELS)
    assert found["tokens"] > 100
    assert found["max"] < 2e-3, found
    assert found["asked_one_by_one"] > 0, "an emoji among them, or this proves less than it says"


def test_four_bits_a_weight_are_another_policy(tmp_path):
    with Server(MODELS / NAME, tmp_path) as coarse:
        found = agreement(coarse, MODELS, tokens=16)
    assert 2e-3 < found["mean"] < 0.5, found


def test_the_policys_banned_tokens_are_not_said_and_its_ends_end_an_answer(server, chat):
    sampler = EndpointSampler(Endpoint(f"{server.address}/v1"), chat.end_ids)
    requests = [request(chat, "Hello!", 4, seed) for seed in range(8)]
    first = {answer.tokens[0] for answer in sampler.answer(requests)}
    banning = EndpointSampler(Endpoint(f"{server.address}/v1"), chat.end_ids, banned=sorted(first))
    others = banning.answer(requests)
    assert not first & {token for answer in others for token in answer.tokens}
    end = sorted(first)[0]  # a word as an end: the server does not know it and goes on
    answers = EndpointSampler(Endpoint(f"{server.address}/v1"), [*chat.end_ids, end]).answer(requests)
    assert any(answer.tokens == [end] and answer.ended for answer in answers)


def test_a_dialogue_beyond_its_context_is_one_line(server, chat):
    sampler = EndpointSampler(Endpoint(f"{server.address}/v1"), chat.end_ids)
    with pytest.raises(EndpointError, match="exceeds the available context size") as caught:
        sampler.answer([request(chat, "so " * 1200, 4)])
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700
    assert sampler.positions == 1023, "4,096 tokens for 4 slots, the last of which ends an answer"
    full = request(chat, "so " * 1200, 1)
    full.tokens = full.tokens[-1022:]
    assert len(sampler.answer([full])[0].tokens) == 1
    full.limit = 9
    with pytest.raises(EndpointError, match="must not cut the dialogue"):
        sampler.answer([full])


def test_chat_completions_are_text(server):
    endpoint = Endpoint(f"{server.address}/v1")
    assert endpoint.model.endswith(".gguf")
    ask = [{"role": "user", "content": ASKED[0]}]
    one, two = (endpoint.answer(ask, max_tokens=4, temperature=0.0, seed=1) for _ in range(2))
    assert one.text
    assert one == two
    assert one.cut
    assert endpoint.refused == set()


# ---- whole runs ------------------------------------------------------------------------------------------------------
@pytest.fixture
def run(tmp_path):
    run = Run(MODELS, tmp_path)
    yield run
    run.stop()


def test_it_samples_what_is_trained_step_after_step_and_is_partner_and_judge(run):
    url = f"{run.server.address}/v1"
    both = f"{run.folder / 'rewards.py'}:length + judge"
    judged = ["--judge", url, "--judge-tokens", "8", "--judge-retries", "0", "--reward", both]
    assert run.train("--max-steps", "2", *judged).wait() == 0, run.said()
    worst = [row["sampling/sampling_logp_difference/max"] for row in run.rows("train")]
    assert len(worst) == 2
    assert max(worst) < 2e-3, "weights that it did not load would be further away"
    last = run.rows("rollout")[-1]
    assert {last[f"endpoint/{role}/retries"] for role in ("sampler", "partner", "judge")} == {0}
    assert min(last[f"endpoint/{role}/requests"] for role in ("sampler", "partner", "judge")) >= 8


def test_a_run_goes_on_where_the_server_dies_and_comes_back(run):
    process = run.train("--max-steps", "1", "--retries", "8")
    run.wait_for_rollouts(process)
    run.server.kill()
    assert process.wait() == 0, run.said()
    last = run.rows("rollout")[-1]
    assert last["endpoint/sampler/retries"] + last["endpoint/partner/retries"] > 0
    assert run.rows("train")[-1]["sampling/sampling_logp_difference/max"] < 2e-3


def test_a_run_ends_with_one_line_where_it_does_not_and_goes_on_later(run):
    process = run.train("--max-steps", "1", "--retries", "1")
    run.wait_for_rollouts(process)
    run.server.stop()
    assert process.wait() == 1, run.said()
    error = run.said().splitlines()[-1]
    assert "Traceback" not in run.said()
    assert "after 2 attempts" in error, error
    assert run.server.address in error, error
    run.server = Server(run.gguf, run.folder, *EXACT, kept=True, port=run.server.port)
    assert run.start("train", "--resume", run.out).wait() == 0, run.said()
    assert [row["step"] for row in run.rows("train")] == [1]
