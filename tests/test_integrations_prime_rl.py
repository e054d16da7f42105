"""The contract of prime-rl, by stand-ins with its documented names: per sample, a sum, compact advantages."""

import asyncio
from dataclasses import dataclass, field
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from host_case import MASK, OPTIONS, TURN_REWARDS, a_batch, expected_credit, own_logprobs, put, same, truth
from pydantic import BaseModel

import ppg_fast as ppg
from ppg_fast.integrations import turns


@pytest.fixture
def batch():
    return a_batch()


@dataclass
class LossInputs:
    trainer_logprobs: torch.Tensor
    inference_logprobs: torch.Tensor
    ref_logprobs: torch.Tensor | None
    advantages: torch.Tensor
    loss_mask: torch.Tensor
    loss_weights: torch.Tensor | None = None


@dataclass
class LossOutputs:
    loss: torch.Tensor
    metrics: dict


@dataclass
class Node:
    mask: list
    advantages: list | None = None

    @property
    def token_ids(self):
        return list(range(len(self.mask)))


@dataclass
class Trace:
    nodes: list
    info: dict
    trainable: bool = True
    branches: list = field(default_factory=list)

    def __post_init__(self):
        self.branches = self.branches or [SimpleNamespace(trainable=self.trainable, nodes=self.nodes)]


def assign_advantages(trace, values):
    """Compact: one value for each sampled token, in the order of the nodes."""
    values, sampled = list(values), [node for node in trace.nodes if any(node.mask)]
    assert len(values) == sum(sum(node.mask) for node in sampled)
    for node in sampled:
        node.advantages = [values.pop(0) for _ in range(sum(node.mask))]


@pytest.fixture
def prime(monkeypatch):
    put(monkeypatch, "prime_rl.trainer.rl.loss", LossOutputs=LossOutputs)
    put(monkeypatch, "prime_rl.orchestrator.algo.routing", assign_advantages=assign_advantages)
    return import_module("ppg_fast.integrations.prime_rl")


@pytest.mark.parametrize("loss_type", ["ppo", "reinforce", "cispo", "gspo", "gspo_turn"])
def test_prime_rl_sums_a_sample_and_the_trainer_divides(batch, prime, loss_type):
    kwargs = {"loss_type": loss_type, "kl_coef": 0.2, "kl_estimator": "k2"}
    kwargs |= {} if loss_type == "reinforce" else {"clip_low": 0.1, "clip_high": 0.15}
    kwargs |= {} if loss_type in ("cispo", "reinforce") else {"dual_clip": 1.3}
    logprobs, scale = own_logprobs(batch), batch.mask.sum()
    columns = zip(logprobs, batch.old, batch.ref, batch.advantages, batch.mask.bool(), strict=True)
    outputs = [prime.ppg_loss(LossInputs(*sample), **kwargs) for sample in columns]
    loss = sum(out.loss for out in outputs) / scale  # what the trainer does
    assert all(isinstance(out, LossOutputs) and all(v.dim() == 0 for v in out.metrics.values()) for out in outputs)
    spec = ppg.PolicyLossSpec(**kwargs)
    expected = [truth(batch, spec, "sum", rows=slice(b, b + 1)) for b in range(4)]
    same(loss, batch, (sum(e[0] for e in expected) / scale, sum(e[1] for e in expected) / scale))


def test_prime_rl_weights_and_errors(batch, prime):
    def inputs(**fields):
        return LossInputs(
            own_logprobs(batch)[0], batch.old[0], None, batch.advantages[0], batch.mask[0].bool(), **fields
        )

    whole, halved = prime.ppg_loss(inputs()).loss, prime.ppg_loss(inputs(loss_weights=torch.full((9,), 0.5))).loss
    torch.testing.assert_close(halved, whole / 2)
    with pytest.raises(ValueError, match="KL term"):
        prime.ppg_loss(inputs(), kl_coef=0.1)
    with pytest.raises(ValueError, match=r"kwargs of .*trainer.loss must be among preset, .*got {'clip': 0.1}"):
        prime.ppg_loss(inputs(), clip=0.1)
    with pytest.raises(ValueError, match=r"dual_clip must be left out: loss_type cispo does not use it .*got 3.0"):
        prime.ppg_loss(inputs(), loss_type="cispo", dual_clip=3.0)
    with pytest.raises(ValueError, match=r"^clip_low of prime-rl's trainer.loss must be given once, got {'clip_low'"):
        prime.ppg_loss(inputs(), clip_low=0.1, ipo_threshold=0.2)
    assert prime.loss_spec(preset="ipo", kl_tau=0.0) == ppg.PolicyLossSpec("ipo")


def test_prime_rl_credits_turns(prime):
    traces = []
    for mask, rewards in zip(MASK[:3], TURN_REWARDS[:3], strict=True):
        ids, nodes = turns.turn_ids_of_mask(mask[None])[0], []
        for t in range(len(rewards)):
            # an observation, then a turn with a template token before it
            nodes += [Node([0, 0]), Node([0, *[1] * int((ids == t).sum())])]
        traces.append(Trace(nodes, {"turn_rewards": rewards}))

    def iter_trainable_traces(episodes):  # as in prime_rl.orchestrator.algo.base
        return ((episode, trace) for episode in episodes for trace in episode.traces)

    class Algorithm:  # its documented hook
        async def score_group(self, episodes):
            prime.credit_group([trace for _, trace in iter_trainable_traces(episodes)], **OPTIONS)

    asyncio.run(Algorithm().score_group([SimpleNamespace(traces=[trace]) for trace in traces]))
    for trace, values, mask in zip(traces, expected_credit(), MASK, strict=False):
        compact = [a for node in trace.nodes if node.advantages for a in node.advantages]
        torch.testing.assert_close(torch.tensor(compact), values[mask.bool()])


@pytest.mark.parametrize(
    ("trace", "rule"),
    [
        (Trace([Node([1]), Node([1])], {"turn_rewards": [1.0]}), "each of its 2 turns"),
        (Trace([Node([1])], {}), r"info\['turn_rewards'\]"),
        (Trace([Node([1])], {}, branches=[SimpleNamespace(trainable=True, nodes=[])] * 2), "one trainable branch"),
    ],
)
def test_prime_rl_names_what_is_wrong_with_a_trace(prime, trace, rule):
    with pytest.raises(ValueError, match=rule):
        prime.credit_group([trace])


class GRPOAlgoConfig(BaseModel, extra="allow"):
    type: str = "grpo"
    length_penalty: dict | None = None
    decay: float = 0.95


def test_prime_rls_algorithm_is_checked(prime):
    group = [Trace([Node([1])], {"turn_rewards": [1.0]}), Trace([Node([1])], {"turn_rewards": [3.0]})]
    prime.credit_group(group, config=GRPOAlgoConfig(type="mine"))
    assert [trace.nodes[0].advantages for trace in group] == [[-2.0], [2.0]]
    with pytest.raises(ValueError, match=r"^length_penalty of prime-rl's algorithm must be None .*, got {'type': 1}$"):
        prime.credit_group(group, config=GRPOAlgoConfig(length_penalty={"type": 1}))
    with pytest.raises(ValueError, match=r"^decay is an option of prime-rl's algorithm .* its default 0.95, got 0.5$"):
        prime.credit_group(group, config=GRPOAlgoConfig(decay=0.5))
