"""Contracts of the hosts that are not installed here, by stand-ins with their documented names, signatures and denominators."""

import asyncio
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from enum import Enum
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

import ppg_fast as ppg
from ppg_fast.integrations import turns

ROOT = Path(__file__).parents[1]
MODULES = ["prime_rl", "skyrl", "slime", "nemo_rl"]


@pytest.fixture
def host(monkeypatch):
    """Puts a module with these attributes, and its parents, where an import finds it."""

    def put(name, **attributes):
        for end in [m.start() for m in re.finditer(r"\.", name)] + [len(name)]:
            if name[:end] not in sys.modules:
                monkeypatch.setitem(sys.modules, name[:end], ModuleType(name[:end]))
        vars(sys.modules[name]).update(attributes)

    return put


def run(code, *paths):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (*paths, ROOT)))}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, env=environment)


# ---- absent, old, broken ----------------------------------------------------------------------------------------------------------------
def test_nothing_of_a_host_is_imported():
    hosts = "verl|prime_rl|skyrl|slime|nemo_rl|ray|megatron"
    done = run(
        f"import sys, ppg_fast\nfrom ppg_fast.integrations import {', '.join(MODULES)}, turns\n"
        f"import re; print([m for m in sys.modules if re.fullmatch({hosts!r}, m)])"
    )
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


@pytest.mark.parametrize(
    ("call", "needed"),
    [
        (lambda: import_module("ppg_fast.integrations.prime_rl").credit_group([]), "prime-rl"),
        (lambda: import_module("ppg_fast.integrations.skyrl").register(), "SkyRL >= 0.3"),
        (lambda: import_module("ppg_fast.integrations.slime").ppg_advantages(None, {}), "slime >= 0.3.1"),
        (lambda: import_module("ppg_fast.integrations.nemo_rl").PPGLossFn(), "nemo-rl >= 0.6"),
    ],
    ids=MODULES,
)
def test_a_missing_host_is_one_line(call, needed):
    with pytest.raises(ImportError, match=re.escape(needed)) as error:
        call()
    assert "\n" not in str(error.value)


PLUGIN = "__version__ = {version!r}\ntry:\n    import ppg_fast.integrations.verl\nexcept Exception:\n    pass\nprint('verl lives')\n"


def fake_verl(folder, version):
    (folder / "verl").mkdir()
    (folder / "verl/__init__.py").write_text(PLUGIN.format(version=version))
    return run("import verl", folder)


def test_verl_that_is_too_old_is_told_so_although_it_hides_errors(tmp_path):
    done = fake_verl(tmp_path, "0.8.1")
    assert done.stdout.strip() == "verl lives"
    assert done.stderr.splitlines() == [
        "ppg_fast: nothing of it is registered with verl: ppg_fast.integrations.verl needs verl >= 0.9, found 0.8.1"
    ]


def test_verl_that_lacks_a_hook_is_told_so_although_it_hides_errors(tmp_path):
    done = fake_verl(tmp_path, "0.10.0.dev0")
    assert done.stdout.strip() == "verl lives"
    assert re.fullmatch("ppg_fast: nothing of it is registered with verl: .*'verl.trainer'.*", done.stderr.strip())


def test_verl_finds_the_plugin():
    project = (ROOT / "pyproject.toml").read_text()
    assert '[project.entry-points."verl.plugins"]\nppg_fast = "ppg_fast.integrations.verl"\n' in project
    assert (ROOT / "ppg_fast/integrations/verl/__init__.py").is_file()


# ---- turns -------------------------------------------------------------------------------------------------------------------------------
def test_turns_and_rewards_of_a_mask():
    mask = torch.tensor([[0, 1, 1, 0, 1, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]])
    ids = turns.turn_ids_of_mask(mask)
    assert ids.tolist() == [[-1, 0, 0, -1, 1, -1], [0] * 6, [-1] * 6]
    assert turns.turn_counts(ids).tolist() == [2, 1, 0]
    assert turns.last_tokens(ids).nonzero().tolist() == [[0, 2], [0, 4], [1, 5]]
    rewards = torch.tensor([[0, 1.0, 2.0, 4.0, 8.0, 16.0], [1.0] * 6, [5.0] * 6])  # between turns: the turn before; without turns: ignored
    assert turns.rewards_of_turns(rewards, ids).tolist() == [[7.0, 24.0], [6.0, 0.0], [0.0, 0.0]]
    with pytest.raises(ValueError, match=r"before the first turn .* got \[\[0, 0\]\]"):
        turns.rewards_of_turns(torch.ones(3, 6), ids)
    with pytest.raises(ValueError, match="shape of the mask"):
        turns.rewards_of_turns(torch.ones(3, 5), ids)
    given = [[0.5, -1.0], [2.0], []]
    assert turns.rewards_of_turns(turns.place_turn_rewards(given, ids), ids).tolist() == [[0.5, -1.0], [2.0, 0.0], [0.0, 0.0]]
    with pytest.raises(ValueError, match="row 1 has 1 turns and needs as many rewards"):
        turns.place_turn_rewards([[0.5, -1.0], [2.0, 1.0], []], ids)
    assert turns.group_numbers(["b", "a", "b"], mask.device).tolist() == [0, 1, 0]


def credited(rewards, counts, groups, **options):
    """What every adapter has to reproduce, from the public functions."""
    returns = ppg.partial_returns(rewards, options.get("policy_class", "full"), options.get("gamma", 1.0), counts)
    return ppg.turn_advantages(returns, groups, options.get("baseline", "leave_one_out"), counts)


# three dialogues of one prompt and one of another: turns of 2, 3, 1 and 2 in rows of 9 tokens
MASK = torch.tensor([[0, 1, 1, 0, 0, 1, 1, 1, 0], [1, 0, 1, 1, 0, 1, 0, 0, 0], [0, 0, 1, 1, 1, 0, 0, 0, 0], [1, 1, 0, 1, 1, 1, 1, 0, 0]])
COUNTS, GROUPS = torch.tensor([2, 3, 1, 2]), torch.tensor([0, 0, 0, 1])
TURN_REWARDS = [[0.5, 2.0], [1.0, None, -1.0], [0.25], [3.0, 0.125]]
REWARDS = torch.tensor([[0.5, 2.0, 0], [1.0, 0, -1.0], [0.25, 0, 0], [3.0, 0.125, 0]])
OPTIONS = {"policy_class": "lookahead:2", "gamma": 0.75, "baseline": "group_mean"}


def expected_credit():
    return turns.spread(credited(REWARDS, COUNTS, GROUPS, **OPTIONS), turns.turn_ids_of_mask(MASK))


@pytest.fixture
def batch():
    """Log-probs of tokens (own alignment) from logits of the tokens before, as every trainer computes them."""
    torch.manual_seed(11)
    B, S, V = 4, 9, 23
    logits, tokens = torch.randn(B, S, V, requires_grad=True), torch.randint(V, (B, S))
    mask = MASK.clone()
    mask[:, 0] = 0  # nothing predicts the first token
    near = ppg.token_logprobs(logits[:, :-1], tokens[:, 1:]).detach()
    around = {name: torch.nn.functional.pad(near + 0.8 * torch.rand(B, S - 1) - 0.4, (1, 0)) for name in ("old", "ref", "rollout")}
    return SimpleNamespace(logits=logits, tokens=tokens, mask=mask, advantages=torch.randn(B, S), **around)


def truth(batch, spec, reduction="token_mean", normalizer=None, rows=slice(None)):
    """Loss and gradient from the logits of rows of the batch."""
    cut = {name: getattr(batch, name)[rows, 1:] for name in ("mask", "old", "ref", "rollout", "advantages", "tokens")}
    options = {"old_logprobs": cut["old"], "ref_logprobs": cut["ref"], "rollout_logprobs": cut["rollout"], "loss_mask": cut["mask"]}
    options["turn_ids"] = turns.turn_ids_of_mask(batch.mask)[rows, 1:]
    loss = ppg.policy_loss(
        batch.logits[rows, :-1], cut["tokens"], cut["advantages"], spec=spec, reduction=reduction, normalizer=normalizer, **options
    ).loss
    return loss.detach(), torch.autograd.grad(loss, batch.logits)[0]


def own_logprobs(batch):
    """(B, S) with a garbage first column, differentiable in the logits."""
    return torch.nn.functional.pad(ppg.token_logprobs(batch.logits[:, :-1], batch.tokens[:, 1:]), (1, 0), value=torch.nan)


def same(loss, batch, expected):
    torch.testing.assert_close(loss.detach(), expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(loss, batch.logits)[0], expected[1], rtol=1e-4, atol=1e-6)


# ---- prime-rl ----------------------------------------------------------------------------------------------------------------------------
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
def prime(host):
    host("prime_rl.trainer.rl.loss", LossOutputs=LossOutputs)
    host("prime_rl.orchestrator.algo.routing", assign_advantages=assign_advantages)
    return import_module("ppg_fast.integrations.prime_rl")


@pytest.mark.parametrize("loss_type", ["ppo", "reinforce", "cispo", "gspo", "gspo_turn"])
def test_prime_rl_sums_a_sample_and_the_trainer_divides(batch, prime, loss_type):
    kwargs = {"loss_type": loss_type, "clip_low": 0.1, "clip_high": 0.15, "dual_clip": 1.3, "kl_coef": 0.2, "kl_estimator": "k2"}
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
        return LossInputs(own_logprobs(batch)[0], batch.old[0], None, batch.advantages[0], batch.mask[0].bool(), **fields)

    whole, halved = prime.ppg_loss(inputs()).loss, prime.ppg_loss(inputs(loss_weights=torch.full((9,), 0.5))).loss
    torch.testing.assert_close(halved, whole / 2)
    with pytest.raises(ValueError, match="KL term"):
        prime.ppg_loss(inputs(), kl_coef=0.1)
    with pytest.raises(TypeError):
        prime.ppg_loss(inputs(), clip=0.1)


def test_prime_rl_credits_turns(prime):
    traces = []
    for mask, rewards in zip(MASK[:3], TURN_REWARDS[:3], strict=True):
        ids, nodes = turns.turn_ids_of_mask(mask[None])[0], []
        for t in range(len(rewards)):
            nodes += [Node([0, 0]), Node([0, *[1] * int((ids == t).sum())])]  # an observation, then a turn with a template token before it
        traces.append(Trace(nodes, {"turn_rewards": rewards}))

    class Algorithm:  # its documented hook
        async def score_group(self, group):
            prime.credit_group(group, **OPTIONS)

    asyncio.run(Algorithm().score_group(traces))
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


# ---- SkyRL -------------------------------------------------------------------------------------------------------------------------------
@dataclass
class AlgorithmConfig:
    eps_clip_low: float = 0.1
    eps_clip_high: float = 0.15
    use_kl_in_reward: bool = False
    off_policy_correction: float | None = None  # of the stand-in below: the cap of token weights


class RayPPOTrainer:
    """The estimator's call in SkyRL's trainer, and the scaling of advantages before its losses."""

    def __init__(self, estimators, config):
        self.estimators, self.config = estimators, config

    def compute_advantages_and_returns(self, data):
        data["advantages"], data["returns"] = self.estimators["ppg"](
            token_level_rewards=data["rewards"], response_mask=data["response_mask"], index=data["uids"], values=None,
            grpo_norm_by_std=True, gamma=1.0, lambd=1.0, config=self.config,
        )  # fmt: skip
        return data


@pytest.fixture
def sky(host):
    registries = {"advantage": {}, "loss": {}}

    def register(kind):
        return lambda name: lambda function: registries[kind].setdefault(name, function)

    host(
        "skyrl.backends.skyrl_train.utils.ppo_utils",
        register_advantage_estimator=register("advantage"), register_policy_loss=register("loss"),
        reduce_loss=lambda loss, mask: loss.sum() if mask is None else (loss * mask).sum(),
    )  # fmt: skip

    def apply_off_policy_correction(loss, old, rollout, mask, cap):
        weights = torch.ones_like(loss) if cap is None else (old - rollout).exp().clamp(max=cap)
        return loss * weights, mask, {"corrected": float(cap is not None)}

    host("skyrl.backends.skyrl_train.utils.off_policy_correction_utils", apply_off_policy_correction=apply_off_policy_correction)
    return import_module("ppg_fast.integrations.skyrl"), registries


def test_skyrl_estimator_sees_turns_through_the_loss_mask(sky):
    skyrl, registries = sky
    skyrl.register(**OPTIONS)

    class Trainer(skyrl.CreditByLossMask, RayPPOTrainer):
        pass

    # SkyRL aligns to the right, and its response mask covers observations
    loss_mask = torch.zeros(4, 11)
    loss_mask[:, 2:] = MASK
    ids = turns.turn_ids_of_mask(loss_mask)
    data = {
        "rewards": turns.place_turn_rewards(TURN_REWARDS, ids), "uids": ["p", "p", "p", "q"], "loss_mask": loss_mask,
        "response_mask": torch.ones(4, 11),
    }  # fmt: skip
    out = Trainer(registries["advantage"], AlgorithmConfig()).compute_advantages_and_returns(dict(data))
    torch.testing.assert_close(out["advantages"][:, 2:], expected_credit())
    assert torch.equal(out["response_mask"], data["response_mask"])
    with pytest.raises(ValueError, match="CreditByLossMask"):  # one run: all turns merged
        RayPPOTrainer(registries["advantage"], AlgorithmConfig()).compute_advantages_and_returns(dict(data))
    kl = AlgorithmConfig(use_kl_in_reward=True)
    penalised = {**data, "rewards": data["rewards"] + 0.01 * loss_mask}
    everywhere = Trainer(registries["advantage"], kl).compute_advantages_and_returns(penalised)
    assert everywhere["advantages"].isfinite().all()


@pytest.mark.parametrize("loss_type", ["ppo", "reinforce", "cispo", "gspo"])
def test_skyrl_sums_what_the_advantages_have_scaled(batch, sky, loss_type):
    skyrl, registries = sky
    skyrl.register(loss_type=loss_type)
    scaled = batch.advantages / batch.mask.sum()  # SkyRL's loss_reduction token_mean
    arguments = (own_logprobs(batch), batch.old, scaled, AlgorithmConfig(), batch.mask.float())
    loss, metrics = registries["loss"]["ppg"](*arguments, rollout_logprobs=batch.rollout)
    same(loss, batch, truth(batch, ppg.PolicyLossSpec(loss_type, clip_low=0.1, clip_high=0.15)))
    assert {"clip_ratio", "corrected"} <= set(metrics)
    capped = (own_logprobs(batch), batch.old, scaled, AlgorithmConfig(off_policy_correction=1.1), batch.mask.float(), batch.rollout)
    corrected = ppg.PolicyLossSpec(loss_type, clip_low=0.1, clip_high=0.15, importance_cap=1.1)
    same(registries["loss"]["ppg"](*capped)[0], batch, truth(batch, corrected))
    assert registries["loss"]["ppg"].__name__ == "ppg_policy_loss"


# ---- slime -------------------------------------------------------------------------------------------------------------------------------
@dataclass
class Sample:
    index: int
    group_index: int
    response_length: int
    loss_mask: list | None
    reward: float
    metadata: dict | None = None

    def get_reward_value(self, args):
        return self.reward


def slime_args(**fields):
    numbers = {
        "eps_clip": 0.1, "eps_clip_high": 0.15, "eps_clip_c": 1.3, "entropy_coef": 0.05, "use_kl_loss": True, "kl_loss_coef": 0.2,
        "kl_loss_type": "low_var_kl", "rollout_temperature": 0.8, "use_rollout_logprobs": False, "use_tis": False, "tis_clip": 1.2,
    }  # fmt: skip
    return SimpleNamespace(**{**numbers, **fields})


@pytest.fixture
def slime(host):
    sizes = SimpleNamespace(tp=1, cp=1)
    mpu = SimpleNamespace(get_tensor_model_parallel_world_size=lambda: sizes.tp, get_context_parallel_world_size=lambda: sizes.cp)
    host("megatron.core", mpu=mpu)
    host("slime.backends.megatron_utils.cp_utils", slice_log_prob_with_cp=lambda values, total, response: values[:: sizes.cp])
    return import_module("ppg_fast.integrations.slime"), sizes


def test_slime_credits_turns_across_ranks(slime):
    module, sizes = slime
    args = slime_args(**{f"ppg_{name}": value for name, value in OPTIONS.items()})
    samples = [
        Sample(b, int(GROUPS[b]), 9, MASK[b].tolist(), 7.0, {"turn_rewards": TURN_REWARDS[b]}) for b in range(4)
    ]  # fmt: skip
    raw, rewards = module.reward_post_process(args, samples)
    assert raw == [7.0] * 4
    assert [tuple(r.shape) for r in rewards] == [(2,), (3,), (1,), (2,)]
    for rank in ([0, 3], [2, 1]):  # a group is spread over ranks, in another order
        data = {"rewards": [rewards[i] for i in rank], "loss_masks": [MASK[i] for i in rank]}
        data |= {"total_lengths": [12, 13], "response_lengths": [9, 9]}
        module.ppg_advantages(args, data)
        torch.testing.assert_close(torch.stack(data["advantages"]), expected_credit()[rank])
        assert len(data["returns"]) == 2
    sizes.cp = 2
    module.ppg_advantages(args, data)
    torch.testing.assert_close(data["advantages"][0], expected_credit()[2][::2])
    data["loss_masks"] = [torch.zeros(9), torch.ones(9)]  # a sample taken out of the loss; one whose turns have merged
    with pytest.raises(ValueError, match="one per turn"):
        module.ppg_advantages(args, data)
    data["loss_masks"][1] = MASK[1]
    module.ppg_advantages(args, data)
    assert not data["advantages"][0].any()


def test_slime_without_rewards_of_turns_is_rloo(slime):
    module, _ = slime
    scores = [1.0, 4.0, -2.0, 0.5]
    samples = [Sample(b, int(GROUPS[b]), 5, None if b % 2 else [1, 0, 1, 1, 0], r) for b, r in enumerate(scores)]
    _, rewards = module.reward_post_process(slime_args(), samples)
    assert [r[0].item() for r in rewards] == [1.0 - 1.0, 4.0 + 0.5, -2.0 - 2.5, 0.5]
    samples[0].metadata = {"turn_rewards": [1.0]}
    with pytest.raises(ValueError, match="sample 0 needs one number for each of its 2 turns"):
        module.reward_post_process(slime_args(), samples)


@pytest.mark.parametrize("old", ["log_probs", "rollout_log_probs", None])
@pytest.mark.parametrize(("padding", "use_tis"), [(0, False), (3, True)])
def test_slime_loss_in_one_pass_is_its_loss_in_several(slime, old, padding, use_tis):
    """Naive PyTorch in the order of slime's own loss: temperature, log-probs, entropy, clipped ratio, KL, its reducer."""
    module, _ = slime
    torch.manual_seed(5)
    totals, responses, V = [6, 9, 5], [4, 7, 2], 19
    tokens = [torch.randint(V, (n,)) for n in totals]
    masks = [torch.tensor(m) for m in ([1, 0, 1, 1], [1, 1, 0, 0, 1, 1, 0], [0, 0])]
    logits = torch.randn(1, sum(totals) + padding, V, requires_grad=True)
    args = slime_args(use_rollout_logprobs=old == "rollout_log_probs", use_tis=use_tis)

    def per_token():
        return [-torch.rand(n) - 1.5 for n in responses]

    batch = {
        "unconcat_tokens": tokens, "total_lengths": totals, "response_lengths": responses, "loss_masks": masks,
        "advantages": [torch.randn(n) for n in responses], "ref_log_probs": per_token(), "log_probs": None,
        "rollout_log_probs": per_token(),
    }  # fmt: skip
    if old:
        batch[old] = per_token()

    def reduce(x):  # sum of sample means
        parts = zip(x.split(responses), masks, strict=True)
        return sum((values * mask).sum() / mask.sum().clamp(min=1) for values, mask in parts)

    dirty = [a.masked_fill(m == 0, torch.nan) for a, m in zip(batch["advantages"], masks, strict=True)]
    loss, metrics = module.ppg_loss(args, {**batch, "advantages": dirty}, logits, reduce)
    scaled, starts = torch.log_softmax(logits[0] / 0.8, -1), [0, 6, 15]
    rows = torch.cat([torch.arange(s + n - R - 1, s + n - 1) for s, n, R in zip(starts, totals, responses, strict=True)])
    taken = torch.cat([t[-R:] for t, R in zip(tokens, responses, strict=True)])
    logprobs = scaled[rows].gather(1, taken[:, None])[:, 0]
    entropy = -(scaled[rows].exp() * scaled[rows]).sum(-1)
    before = torch.cat(batch[old]) if old else logprobs.detach()
    ratio, A = (logprobs - before).exp(), torch.cat(batch["advantages"])
    surrogate = -torch.minimum(ratio * A, ratio.clamp(0.9, 1.15) * A)
    surrogate = torch.where(A < 0, torch.minimum(surrogate, -1.3 * A), surrogate)
    if use_tis:
        surrogate = surrogate * (before - torch.cat(batch["rollout_log_probs"])).exp().clamp(max=1.2)
    delta = torch.cat(batch["ref_log_probs"]) - logprobs
    naive = reduce(surrogate) - 0.05 * reduce(entropy) + 0.2 * reduce(delta.exp() - delta - 1)
    torch.testing.assert_close(loss, naive, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(value, logits)[0] for value in (loss, naive)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(metrics["entropy_loss"], reduce(entropy).detach(), rtol=1e-5, atol=1e-6)
    assert all(value.dim() == 0 and not value.requires_grad for value in metrics.values())


@pytest.mark.parametrize("loss_type", ["gspo", "gspo_turn", "cispo", "reinforce"])
def test_slime_loss_keeps_its_samples_apart(slime, loss_type):
    module, _ = slime
    torch.manual_seed(6)
    totals, responses = [6, 9], [4, 7]
    logits, args = torch.randn(1, 15, 19), slime_args(ppg_loss_type=loss_type, use_tis=True, entropy_coef=0.0, use_kl_loss=False)
    fields = {"log_probs": lambda n: -2 - torch.rand(n), "rollout_log_probs": lambda n: -2 - torch.rand(n), "advantages": torch.randn}
    batch = {name: [make(n) for n in responses] for name, make in fields.items()}
    masks = [torch.tensor(m) for m in ([1, 0, 1, 1], [1, 1, 0, 0, 1, 1, 0])]
    batch |= {"unconcat_tokens": [torch.randint(19, (n,)) for n in totals], "loss_masks": masks, "total_lengths": totals}
    batch["response_lengths"] = responses
    both, _ = module.ppg_loss(args, batch, logits, torch.sum)
    alone = []
    for i, span in enumerate((slice(6), slice(6, 15))):
        one = {name: [values[i]] for name, values in batch.items()}
        alone.append(module.ppg_loss(args, one, logits[:, span], torch.sum)[0])
    torch.testing.assert_close(both, sum(alone))


def test_slime_loss_says_what_it_cannot_do(slime):
    module, sizes = slime
    with pytest.raises(ValueError, match="kl_loss_type"):
        module.loss_spec(slime_args(kl_loss_type="abs"))
    with pytest.raises(ValueError, match="tis_clip_low"):
        module.loss_spec(slime_args(use_tis=True, tis_clip_low=0.5))
    sizes.tp = 2
    with pytest.raises(ValueError, match="tensor and context parallel"):
        module.ppg_loss(slime_args(), {}, torch.randn(1, 3, 4), torch.sum)


# ---- NeMo-RL -----------------------------------------------------------------------------------------------------------------------------
class LossType(Enum):
    TOKEN_LEVEL = "token_level"
    SEQUENCE_LEVEL = "sequence_level"


class LossInputType(Enum):
    LOGIT = "logit"
    LOGPROB = "logprob"


@pytest.fixture
def nemo(host):
    host("nemo_rl.algorithms.loss.interfaces", LossType=LossType, LossInputType=LossInputType)
    return import_module("ppg_fast.integrations.nemo_rl")


@pytest.mark.parametrize("token_level", [True, False])
def test_nemo_rl_micro_batches_share_global_denominators(batch, nemo, token_level):
    spec = ppg.PolicyLossSpec("ppo", clip_low=0.1, clip_high=0.15, kl_coef=0.2, importance_cap=1.1)
    loss_fn = nemo.PPGLossFn(spec, token_level=token_level)
    assert loss_fn.loss_type == (LossType.TOKEN_LEVEL if token_level else LossType.SEQUENCE_LEVEL)
    assert loss_fn.input_type == LossInputType.LOGPROB
    sample_mask = torch.tensor([1.0, 1.0, 0.0, 1.0])
    tokens, sequences = (batch.mask * sample_mask[:, None]).sum(), sample_mask.sum()

    def loss(rows):
        fields = {"token_mask": token_mask, "advantages": batch.advantages, "prev_logprobs": batch.old, "sample_mask": sample_mask}
        fields |= {"generation_logprobs": batch.rollout, "reference_policy_logprobs": batch.ref, "input_ids": batch.tokens}
        next_token = ppg.token_logprobs(batch.logits[:, :-1], batch.tokens[:, 1:])
        data = {name: value[rows] for name, value in fields.items()}
        value, metrics = loss_fn(data=data, global_valid_seqs=sequences, global_valid_toks=tokens, next_token_logprobs=next_token[rows])
        assert metrics["token_mult_prob_error"] > 0
        return value

    token_mask, batch.mask = batch.mask.float(), batch.mask * sample_mask[:, None].long()
    expected = truth(batch, spec, "token_mean" if token_level else "sequence_mean", float(tokens if token_level else sequences))
    same(loss(slice(0, 3)) + loss(slice(3, None)), batch, expected)


def test_nemo_rl_estimator(nemo):
    estimator = nemo.PPGAdvantageEstimator(**OPTIONS)
    prompts = torch.tensor([[5, 6], [5, 6], [5, 6], [5, 7]])
    arguments = {"prompt_ids": prompts, "rewards": torch.ones(4), "mask": MASK.float(), "logprobs_policy": None, "logprobs_reference": None}
    ours = estimator.compute_advantage(**arguments, repeated_batch={"turn_rewards": TURN_REWARDS})
    torch.testing.assert_close(ours, expected_credit())
    valid = torch.tensor([1.0, 0.0, 1.0, 1.0])  # a row that took part in nothing: no vote in the baseline
    left = estimator.compute_advantage(**arguments, repeated_batch={"turn_rewards": TURN_REWARDS}, valid_mask=valid)
    rewards, counts = REWARDS.clone(), COUNTS.clone()
    rewards[1], counts[1] = 0, 0
    expected = turns.spread(credited(rewards, counts, GROUPS, **OPTIONS), turns.turn_ids_of_mask(MASK * valid[:, None].long()))
    torch.testing.assert_close(left, expected)
    outcome = nemo.PPGAdvantageEstimator().compute_advantage(prompts, torch.tensor([1.0, 4.0, -2.0, 0.5]), MASK)
    first = [row[mask.bool()][0] for row, mask in zip(outcome, MASK, strict=True)]
    np.testing.assert_allclose(first, [1.0 - 1.0, 4.0 + 0.5, -2.0 - 2.5, 0.5])
    assert outcome[1, 5] == 4.0  # the only dialogue with a third turn: the reward stands there, without a baseline
