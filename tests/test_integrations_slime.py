"""The contract of slime, by stand-ins with its documented names: lists of responses, its reducer, groups over ranks."""

import itertools
import re
from dataclasses import dataclass
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from host_case import GROUPS, MASK, OPTIONS, TURN_REWARDS, expected_credit, put

from ppg_fast.integrations import slime_options


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
        "eps_clip": 0.1, "eps_clip_high": 0.15, "eps_clip_c": 1.3, "entropy_coef": 0.05, "use_kl_loss": True,
        "kl_loss_coef": 0.2,
        "kl_loss_type": "low_var_kl", "rollout_temperature": 0.8, "use_rollout_logprobs": False, "use_tis": False,
        "tis_clip": 1.2,
    }  # fmt: skip
    return SimpleNamespace(**{**numbers, **fields})


@pytest.fixture
def slime(monkeypatch):
    sizes = SimpleNamespace(tp=1, cp=1)
    mpu = SimpleNamespace(
        get_tensor_model_parallel_world_size=lambda: sizes.tp, get_context_parallel_world_size=lambda: sizes.cp
    )
    put(monkeypatch, "megatron.core", mpu=mpu)
    put(
        monkeypatch,
        "slime.backends.megatron_utils.cp_utils",
        slice_log_prob_with_cp=lambda values, total, response: values[:: sizes.cp],
    )
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
@pytest.mark.parametrize(
    ("padding", "options"),
    [
        (0, {}), (3, {"use_tis": True}), (0, {"use_tis": True, "tis_clip_low": 0.9}),
        (0, {"use_tis": True, "tis_clip_low": 0.9, "custom_tis_function_path": slime_options.ICEPOP}),
        (0, {"use_opsm": True, "opsm_delta": 0.05}), (0, {"use_unbiased_kl": True}),
        (0, {"use_unbiased_kl": True, "kl_loss_type": "k3"}), (3, {"rollout_top_p": 0.9}),
    ],
)  # fmt: skip
def test_slime_loss_in_one_pass_is_its_loss_in_several(slime, old, padding, options):
    """Naive PyTorch in the order of slime's own loss: temperature, log-probs, entropy, clipped ratio, KL, its
    reducer."""
    module, _ = slime
    torch.manual_seed(5)
    totals, responses, V = [6, 9, 5], [4, 7, 2], 19
    tokens = [torch.randint(V, (n,)) for n in totals]
    masks = [torch.tensor(m) for m in ([1, 0, 1, 1], [1, 1, 0, 0, 1, 1, 0], [0, 0])]
    logits = torch.randn(1, sum(totals) + padding, V, requires_grad=True)
    args = slime_args(use_rollout_logprobs=old == "rollout_log_probs", **options)

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

    if "rollout_top_p" in options:
        batch |= (replay := top_p_replay(tokens, masks, V))
    dirty = [a.masked_fill(m == 0, torch.nan) for a, m in zip(batch["advantages"], masks, strict=True)]
    loss, metrics = module.ppg_loss(args, {**batch, "advantages": dirty}, logits, reduce)
    scaled, starts = torch.log_softmax(logits[0] / 0.8, -1), [0, 6, 15]
    rows = torch.cat(
        [torch.arange(s + n - R - 1, s + n - 1) for s, n, R in zip(starts, totals, responses, strict=True)]
    )
    taken = torch.cat([t[-R:] for t, R in zip(tokens, responses, strict=True)])
    scaled = scaled[rows]
    if "rollout_top_p" in options:
        scaled = scaled.masked_fill(~inside(replay, V), -torch.inf).log_softmax(-1)
    logprobs = scaled.gather(1, taken[:, None])[:, 0]
    entropy = -(scaled.exp() * scaled.masked_fill(scaled == -torch.inf, 0.0)).sum(-1)
    before = torch.cat(batch[old]) if old else logprobs.detach()
    ratio, A = (logprobs - before).exp(), torch.cat(batch["advantages"])
    surrogate = -torch.minimum(ratio * A, ratio.clamp(0.9, 1.15) * A)
    surrogate = torch.where(A < 0, torch.minimum(surrogate, -1.3 * A), surrogate)
    if options.get("use_opsm"):
        drift = [((o - l).detach() * m).sum() / m.sum().clamp(min=1) for o, l, m in zip(
            before.split(responses), logprobs.split(responses), masks, strict=True)]  # fmt: skip
        dropped = torch.cat([d.expand(n) for d, n in zip(drift, responses, strict=True)]) > 0.05
        assert not old or 0 < (dropped & (A < 0)).sum() < len(A)
        surrogate = surrogate.masked_fill(dropped & (A < 0), 0.0)
    if args.use_tis:
        weight, least = (before - torch.cat(batch["rollout_log_probs"])).exp(), options.get("tis_clip_low", 0.0)
        kept = weight * ((weight >= least) & (weight <= 1.2))
        surrogate = surrogate * (kept if "custom_tis_function_path" in options else weight.clamp(least, 1.2))
    delta = torch.cat(batch["ref_log_probs"]) - logprobs
    kl = (delta.exp() - delta - 1) * (ratio if options.get("use_unbiased_kl") else 1.0)
    kl = kl if args.kl_loss_type == "k3" else kl.clamp(-10, 10)
    naive = reduce(surrogate) - 0.05 * reduce(entropy) + 0.2 * reduce(kl)
    torch.testing.assert_close(loss, naive, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(value, logits)[0] for value in (loss, naive)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(metrics["entropy_loss"], reduce(entropy).detach(), rtol=1e-5, atol=1e-6)
    assert all(value.dim() == 0 and not value.requires_grad for value in metrics.values())


def top_p_replay(tokens, masks, V):
    """The kept set of each response token as slime's batch has them: int32, none where the token is context."""
    g, ids, offsets = torch.Generator().manual_seed(8), [], []
    for row, mask in zip(tokens, masks, strict=True):
        sets = [torch.randperm(V, generator=g)[:5].tolist() if read else [] for read in mask.tolist()]
        sets = [
            [int(t), *(i for i in kept if i != t)] if kept else []
            for t, kept in zip(row[-len(mask) :], sets, strict=True)
        ]
        ids.append(torch.tensor([i for kept in sets for i in kept], dtype=torch.int32))
        offsets.append(torch.tensor([0, *map(len, sets)], dtype=torch.int32).cumsum(0, dtype=torch.int32))
    return {"rollout_top_p_token_ids": ids, "rollout_top_p_token_offsets": offsets}


def inside(replay, V):
    """(sum of responses, V) bool; all of a token without a set, as in slime."""
    rows = []
    for ids, offsets in zip(*replay.values(), strict=True):
        for first, end in itertools.pairwise(offsets.tolist()):
            kept = torch.zeros(V, dtype=torch.bool)
            kept[ids[first:end].long()] = True
            rows.append(kept if end > first else ~kept)
    return torch.stack(rows)


BOUNDS = {  # what the losses have no place for
    "gspo": {}, "gspo_turn": {}, "cispo": {"eps_clip_c": None}, "reinforce": {"eps_clip_c": None},
}  # fmt: skip


@pytest.mark.parametrize("loss_type", BOUNDS)
def test_slime_loss_keeps_its_samples_apart(slime, loss_type):
    module, _ = slime
    torch.manual_seed(6)
    totals, responses = [6, 9], [4, 7]
    logits = torch.randn(1, 15, 19)
    args = slime_args(ppg_loss_type=loss_type, use_tis=True, entropy_coef=0.0, use_kl_loss=False, **BOUNDS[loss_type])
    fields = {
        "log_probs": lambda n: -2 - torch.rand(n),
        "rollout_log_probs": lambda n: -2 - torch.rand(n),
        "advantages": torch.randn,
    }
    batch = {name: [make(n) for n in responses] for name, make in fields.items()}
    masks = [torch.tensor(m) for m in ([1, 0, 1, 1], [1, 1, 0, 0, 1, 1, 0])]
    batch |= {
        "unconcat_tokens": [torch.randint(19, (n,)) for n in totals],
        "loss_masks": masks,
        "total_lengths": totals,
    }
    batch["response_lengths"] = responses
    both, _ = module.ppg_loss(args, batch, logits, torch.sum)
    alone = []
    for i, span in enumerate((slice(6), slice(6, 15))):
        one = {name: [values[i]] for name, values in batch.items()}
        alone.append(module.ppg_loss(args, one, logits[:, span], torch.sum)[0])
    torch.testing.assert_close(both, sum(alone))


@pytest.mark.parametrize("estimator", ["gspo", "cispo"])
def test_slimes_estimator_chooses_the_loss(slime, estimator):
    """advantage_estimator gspo and cispo are losses in slime: one ratio a response, or a clipped weight."""
    module, _ = slime
    torch.manual_seed(8)
    totals, responses = [6, 9], [4, 7]
    masks = [torch.tensor(m) for m in ([1, 0, 1, 1], [1, 1, 0, 0, 1, 1, 0])]
    logits, taken = torch.randn(1, 15, 19, requires_grad=True), [torch.randint(19, (n,)) for n in responses]
    batch = {
        "unconcat_tokens": [torch.cat([torch.zeros(2, dtype=torch.int64), t]) for t in taken], "loss_masks": masks,
        "total_lengths": totals, "response_lengths": responses,
        "log_probs": [-2.5 - torch.rand(n) for n in responses],
        "advantages": [torch.full((4,), 1.5), torch.full((7,), -0.75)],  # one number a response, as slime's own
    }  # fmt: skip
    only = {"entropy_coef": 0.0, "use_kl_loss": False, "eps_clip": 0.25, "eps_clip_high": 0.2, "eps_clip_c": None}
    args = slime_args(advantage_estimator=estimator, **only)
    loss, _ = module.ppg_loss(args, batch, logits, lambda x: (x * torch.cat(masks)).sum())
    naive = 0
    rows = (slice(1, 5), slice(7, 14))
    for r, t, mask, old, A in zip(rows, taken, masks, batch["log_probs"], batch["advantages"], strict=True):
        l = torch.log_softmax(logits[0, r] / 0.8, -1).gather(1, t[:, None])[:, 0]
        difference = l - old
        if estimator == "gspo":
            ratio = ((difference * mask).sum() / mask.sum()).exp()
            per_token = torch.maximum(-ratio * A, -ratio.clamp(0.75, 1.2) * A)
        else:
            per_token = -difference.exp().clamp(0.75, 1.2).detach() * A * l
        naive = naive + (per_token * mask).sum()
    torch.testing.assert_close(loss, naive)
    torch.testing.assert_close(*(torch.autograd.grad(value, logits)[0] for value in (loss, naive)))


REFUSED = {
    "advantages": {
        "advantage_estimator": "ppo", "gamma": 0.9, "lambd": 0.95, "kl_coef": 0.1, "rewards_normalization": False,
        "grpo_std_normalization": False, "custom_convert_samples_to_train_data_path": "mine.convert",
        "compute_advantages_and_returns": False, "ppg_polcy_class": "greedy",
    },
    "loss": {
        "kl_loss_type": "abs", "custom_tis_function_path": "mis.py:weights",
        "custom_pg_loss_reducer_function_path": "a.b",
        "get_mismatch_metrics": True, "true_on_policy_mode": True, "use_icepop": True,
    },
}  # fmt: skip


@pytest.mark.parametrize(("part", "name"), [(part, name) for part, cases in REFUSED.items() for name in cases])
def test_slimes_options_that_we_cannot_honour_are_refused(slime, part, name):
    module, _ = slime
    value = REFUSED[part][name]
    calls = {
        "advantages": [
            lambda args: module.reward_post_process(args, []),
            lambda args: module.ppg_advantages(args, {}),
        ],
        "loss": [lambda args: module.ppg_loss(args, {}, torch.randn(1, 3, 4), torch.sum)],
    }
    for call in calls[part]:
        with pytest.raises(ValueError, match=rf"^{name} .*of slime.* must .*got {re.escape(repr(value))}$") as error:
            call(slime_args(**{name: value}))
        assert "\n" not in str(error.value)


def test_every_row_that_refuses_has_a_case():
    for part, cases in REFUSED.items():
        rows = [o for o in slime_options.OPTIONS if o.part == part and o.allows]
        assert {name for o in rows for name in o.names.split()} <= set(cases)


def test_slimes_defaults_are_accepted(slime):
    module, _ = slime
    defaults = {
        "advantage_estimator": "grpo", "gamma": 1.0, "lambd": 1.0, "kl_coef": 0.0, "rewards_normalization": True,
        "grpo_std_normalization": True, "compute_advantages_and_returns": True, "normalize_advantages": True,
        "custom_advantage_function_path": "ppg_fast.integrations.slime.ppg_advantages", "use_opd": True,
        "tis_clip_low": 0, "custom_tis_function_path": None, "use_opsm": False, "opsm_delta": 1e-4,
        "rollout_top_p": 1.0, "loss_type": "custom_loss", "rl_importance_sampling_truncation_coef": 2.0,
    }  # fmt: skip
    args = slime_args(**defaults)
    assert module.reward_post_process(args, [])[0] == []
    assert module.loss_spec(args).loss_type == "ppo"


def test_an_option_of_a_later_slime_is_found_by_its_own_parser(slime, monkeypatch):
    """Whatever its name; Megatron's arguments, which have no defaults here, are left alone."""
    module, _ = slime

    def get_slime_extra_args_provider(add_custom_arguments=None):
        def add(parser):
            parser.add_argument("--gamma", type=float, default=1.0)
            parser.add_argument("--sharpen-rewards", type=float, default=2.0)

        return add

    put(monkeypatch, "slime.utils.arguments", get_slime_extra_args_provider=get_slime_extra_args_provider)
    module.reward_post_process(slime_args(sharpen_rewards=2.0, hidden_dropout=0.3), [])
    module.loss_spec(slime_args(sharpen_rewards=2.0))
    calls = lambda args: module.reward_post_process(args, []), module.loss_spec
    for call in calls:
        with pytest.raises(ValueError, match=r"^sharpen_rewards is an option of slime .* its default 2.0, got 3.0$"):
            call(slime_args(sharpen_rewards=3.0))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"use_unbiased_kl": True, "kl_loss_type": "k2"}, "use_unbiased_kl of slime needs kl_loss_type k3 .*got 'k2'"),
        ({"use_opsm": True, "use_tis": True}, "use_opsm of slime must be False with use_tis .*got True"),
        ({"use_opsm": True, "opsm_delta": 0.0}, "opsm_delta of slime must be > 0 with use_opsm, got 0.0"),
        ({"ppg_tau_positive": 2.0}, "tau_positive must be left out: loss_type ppo does not use it .*got 2.0"),
        ({"ppg_loss_type": "reinforce"}, "eps_clip_c of slime must be None for reinforce .*got 1.3"),
        ({"ppg_loss_type": "ppo", "advantage_estimator": "gspo"}, "ppg_loss_type must be gspo, .*got 'ppo'"),
    ],
)
def test_slimes_options_that_do_not_go_together(slime, fields, words):
    with pytest.raises(ValueError, match=words):
        slime[0].loss_spec(slime_args(**fields))


def test_kept_sets_of_slime_must_be_there(slime):
    batch = {"total_lengths": [4], "response_lengths": [2], "loss_masks": [[1, 1]], "unconcat_tokens": [torch.ones(4)]}
    with pytest.raises(ValueError, match="rollout_top_p < 1 needs rollout_top_p_token_ids and rollout_top_p_token_off"):
        slime[0].ppg_loss(slime_args(rollout_top_p=0.9, use_kl_loss=False), batch, torch.randn(1, 4, 9), torch.sum)


def test_slime_loss_needs_whole_responses(slime):
    module, sizes = slime
    sizes.cp = 2
    with pytest.raises(ValueError, match="needs a context parallel size of 1"):
        module.ppg_loss(slime_args(), {}, torch.randn(1, 3, 4), torch.sum)
