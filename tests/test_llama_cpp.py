"""What llama.cpp's own server does beside the protocol, in a fake that does the same: `tests/test_llama_server.py` has
the real one."""

import pytest
import torch

pytest.importorskip("httpx2")
pytest.importorskip("transformers")

from openai_server import serve
from ppg_fast.bench.server_tables import run_section
from test_rollout import Ragged, make

from ppg_fast.endpoint import Endpoint, EndpointError
from ppg_fast.rollouts.generation import Answer, EndpointSampler, Request
from ppg_fast.rollouts.generation.llama_cpp import listed_places
from ppg_fast.rollouts.rollout import collect_groups

END, PART, WHOLE = 1, 4, 5
LISTED = [{"id": "m", "owned_by": "llamacpp"}]
LOGPROBS = {END: -1.5, PART: -2.5, WHOLE: -3.5, 7: -4.5}  # the same after whatever tokens


class LlamaCpp:
    """Says ``tokens``; lists the log-probs of ``listed`` only, and of the likeliest ones where it is asked for them."""

    def __init__(self, tokens, listed, likeliest=tuple(LOGPROBS), stop="limit"):
        self.tokens, self.listed, self.likeliest, self.stop = tokens, listed, likeliest, stop
        self.asked = []

    def __call__(self, path, payload):
        assert path == "/completion"
        self.asked.append(payload)
        if payload["n_probs"] == 1:
            probs = [{"id": t, "logprob": LOGPROBS[t]} for t in self.listed]
            return {"tokens": self.tokens, "completion_probabilities": probs, "stop_type": self.stop}
        assert payload["n_predict"] == 1
        [[said, bias]] = payload["logit_bias"]
        assert (said, bias > 100) == (END, True), "a token of whole characters, or the list stays empty again"
        shown = self.likeliest if payload["n_probs"] == 1_000 else tuple(LOGPROBS)
        top = [{"id": t, "logprob": LOGPROBS[t]} for t in shown]
        return {"tokens": [END], "completion_probabilities": [{"id": END, "top_logprobs": top}]}

    def answer(self, ends=(END,), limit=8, **settings):
        with serve(self, LISTED) as server:
            sampler = EndpointSampler(Endpoint(server.url, retries=0), ends, 10, **settings)
            return sampler.answer([Request(0, [8, 9], limit, torch.Generator())])[0]


def test_log_probs_within_a_character_are_asked_for_one_by_one():
    server = LlamaCpp([WHOLE, PART, PART, 7, END], [WHOLE, 7, END], stop="eos")
    assert server.answer() == Answer([WHOLE, PART, PART, 7, END], [-3.5, -2.5, -2.5, -4.5, -1.5], True)
    assert [a["prompt"] for a in server.asked] == [[8, 9], [8, 9, WHOLE], [8, 9, WHOLE, PART]]
    assert {a["model"] for a in server.asked} == {"m"}, "a server of many models must know which"


def test_an_unlikely_one_is_looked_up_among_all():
    server = LlamaCpp([PART, 7], [7], likeliest=(WHOLE,))
    assert server.answer().logprobs == [-2.5, -4.5]
    assert [a["n_probs"] for a in server.asked] == [1, 1_000, 1_000_000]


def test_what_may_be_another_tokens_log_prob_is_asked_for():
    assert listed_places([4, 5, 6], [4, 5, 6]) == {0: 0, 1: 1, 2: 2}
    assert listed_places([4, 5, 6], [4, 6]) == {0: 0, 2: 1}
    assert listed_places([4, 4, 6], [4, 6]) == {2: 1}, "either 4 may be the listed one"
    assert listed_places([4, 7, 4], [7]) == {1: 0}
    assert listed_places([4], []) == {}


@pytest.mark.parametrize("listed", [[7], [END, WHOLE], [WHOLE, END, END]])
def test_log_probs_of_other_tokens_are_refused(listed):
    with pytest.raises(EndpointError, match="log-probs of the tokens that it sampled, and gives those of others"):
        LlamaCpp([WHOLE, PART, END], listed).answer()


def test_a_list_without_the_token_is_refused():
    server = LlamaCpp([PART], [])
    server.tokens = [9]
    with pytest.raises(EndpointError, match="list the log-prob of every token, got none of 9"):
        server.answer()


def test_an_answer_is_over_at_an_end_that_the_server_does_not_know():
    server = LlamaCpp([WHOLE, 7, WHOLE, END], [WHOLE, 7, WHOLE, END], stop="eos")
    assert server.answer(ends=(END, 7)) == Answer([WHOLE, 7], [-3.5, -4.5], True)
    server.stop = "limit"
    assert server.answer(ends=(7,)) == Answer([WHOLE, 7], [-3.5, -4.5], True)


def test_banned_tokens_are_not_said():
    server = LlamaCpp([WHOLE], [WHOLE])
    server.answer(banned=[0, 3])
    assert server.asked[0]["logit_bias"] == [[0, False], [3, False]]
    assert server.asked[0]["samplers"] == ["temperature"]


@pytest.mark.parametrize(
    ("listed", "positions", "most"),
    [
        ({"meta": {"n_ctx": 32}}, 100, 31),  # llama.cpp calls what fills its context cut
        ({"max_model_len": 32}, None, 32),
        ({"max_model_len": 32}, 20, 20),
        ({"max_model_len": None, "meta": None}, 20, 20),
        ({"max_model_len": -1, "meta": {"n_ctx": 0}}, 20, 20),  # of a model that is not loaded
        ({}, None, 2**62),
    ],
)
def test_a_dialogue_ends_where_the_server_or_the_policy_has_no_more_room(listed, positions, most):
    models = [{"id": "other", "max_model_len": 3}, {"id": "m", **listed}]
    with serve(LlamaCpp([WHOLE], [WHOLE]), models) as server:
        assert EndpointSampler(Endpoint(server.url, "m"), 1, 10, positions=positions).positions == most


def test_rollouts_keep_to_the_servers_context():
    chat, asked = make()[1], []

    def one_word(path, payload):
        asked.append((len(payload["prompt"]), payload["n_predict"]))
        tokens = [5] * payload["n_predict"]
        probs = [{"id": 5, "logprob": -1.0} for _ in tokens]
        return {"tokens": tokens, "completion_probabilities": probs, "stop_type": "limit"}

    with serve(one_word, [{"id": "m", "owned_by": "llamacpp", "meta": {"n_ctx": 24}}]) as server:
        sampler = EndpointSampler(Endpoint(server.url), chat.end_id)
        stream = torch.Generator().manual_seed(1)
        collect_groups(sampler, chat, Ragged, range(3), 2, generator=stream, max_new_tokens=6)
    assert max(length + limit for length, limit in asked) == 23


# ---- a run whose server dies -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(("steps", "alive"), [([1, 2, 3], True), ([1, 3], False)])
def test_what_a_run_lost_is_seen(steps, alive):
    run = {
        "seconds": 1200.0, "killed": [3.0, 70.5], "alive": alive, "status": 0, "steps": steps, "longest": 90.0,
        "difference": 2.5e-4, "last_line": "error: gone", "sampler/retries": 2, "partner/retries": 1,
    }  # fmt: skip
    text = run_section({"llama_run.cpu": {"run": run, "ppg_fast": {"server": "LLAMA_SERVER"}}})
    assert "| times that the server was killed (SIGKILL) | 2 |" in text
    assert f"| the run was alive until it was asked to stop | {'yes' if alive else '**no**: error: gone'} |" in text
    assert f"| no step was left out or taken twice | {'yes' if steps == [1, 2, 3] else '**no**'} |" in text
    assert "| requests of sampler and partner that were sent again | 3 |" in text
    assert "| 2.5e-04 |" in text
