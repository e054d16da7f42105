"""Errors of the contract: each names the rule and the value."""

import re

import pytest
import torch

import ppg_fast as ppg

LOGITS, LABELS, TURNS = (
    torch.randn(2, 3, 5),
    torch.tensor([[0, 1, 2], [3, 4, 0]]),
    torch.tensor([[0, 1, -1], [2, 3, 3]]),
)
HIDDEN, WEIGHT, ONES, REWARDS, ZEROS = (
    torch.randn(2, 3, 8),
    torch.randn(5, 8),
    torch.ones(2, 3),
    torch.ones(2, 4),
    torch.tensor([0, 0]),
)


def loss(logits=LOGITS, labels=LABELS, advantages=ONES, **options):
    return lambda: ppg.policy_loss(logits, labels, advantages, **options)


def linear(hidden=HIDDEN, weight=WEIGHT, labels=LABELS, **options):
    return lambda: ppg.linear_policy_loss(hidden, weight, labels, ONES, **options)


def partial(rewards=REWARDS, turn_ids=TURNS, policy_class="full", **options):
    return lambda: ppg.partial_policy_loss(LOGITS, LABELS, rewards, turn_ids, policy_class, **options)


def returns(rewards=REWARDS, policy_class="full", *rest, **options):
    return lambda: ppg.partial_returns(rewards, policy_class, *rest, **options)


def advantages(*arguments):
    return lambda: ppg.turn_advantages(REWARDS, *arguments)


def spec(**numbers):
    return lambda: ppg.PolicyLossSpec(**numbers)


def packed(*bounds):
    return loss(LOGITS[0], LABELS[0], ONES[0], cu_seqlens=torch.tensor(bounds, dtype=torch.int32))


def turn_loss(turn_ids):
    return loss(old_logprobs=ONES, turn_ids=turn_ids, spec=ppg.PolicyLossSpec("gspo_turn"))


# call, words of the rule, the value
ERRORS = [
    (spec(loss_type="grpo"), "loss_type.*ppo", "grpo"),
    (spec(kl_estimator="k4"), "kl_estimator.*k3", "k4"),
    (spec(clip_low=-0.5), "clip_low", "-0.5"),
    (spec(clip_high=float("nan")), "clip_high", "nan"),
    (spec(loss_type="ppo", dual_clip=0.5), "dual_clip.*> 1", "0.5"),
    (spec(kl_coef=-1.0), "kl_coef", "-1.0"),
    (spec(entropy_coef=float("inf")), "entropy_coef.*finite", "inf"),
    (spec(entropy_coef="a"), "entropy_coef", "a"),
    (spec(dual_clip="a"), "dual_clip", "a"),
    (spec(importance_cap=-2.0), "importance_cap", "-2.0"),
    (spec(temperature=0.0), "temperature.*> 0", "0.0"),
    (spec(logit_softcap=-3.0), "logit_softcap", "-3.0"),
    (lambda: ppg.Lookahead(0), "K.*>= 1", "0"),
    (lambda: ppg.Lookahead(1.5), "K.*integer", "1.5"),
    (lambda: ppg.Segment(0), "Segment.*>= 1", "0"),
    (lambda: ppg.policy_class("window:2"), "policy class", "window:2"),
    (lambda: ppg.policy_class("lookahead:-1"), "K.*>= 1", "-1"),
    (returns(REWARDS, "full", 1.5), "gamma.*<= 1", "1.5"),
    (returns(REWARDS, "full", -0.5), "gamma.*>= 0", "-0.5"),
    (returns(policy_class="all"), "policy class", "all"),
    (returns(torch.tensor([[1.0, torch.nan]])), "rewards must be finite.*dialogue 0, turn 1", "nan"),
    (returns(ONES.int()), "rewards.*floating", "int32"),
    (returns(ONES * torch.inf, backend="reference"), "rewards must be finite", "inf"),
    (returns(ONES[0]), r"rewards.*\(B, T\)", "3"),
    (returns(REWARDS, "full", 1.0, torch.tensor([4, 5])), "turn_counts.*4", "5"),
    (returns(REWARDS, "full", 1.0, ONES[0]), "turn_counts.*2", "3"),
    (returns(REWARDS, "full", 1.0, torch.tensor([4, -1])), "turn_counts", "-1"),
    (returns(backend="tpu"), "backend.*cpu", "tpu"),
    (
        returns(policy_class=ppg.Segment(torch.tensor([[0, 0, 1, 1], [2, 3, 2, 2]]))),
        "contiguous.*dialogue 1",
        "2, 3, 2, 2",
    ),
    (returns(policy_class=ppg.Segment(ONES.long())), r"segment ids.*\(2, 4\)", r"\(2, 3\)"),
    (returns(policy_class=ppg.Segment(REWARDS)), "segment ids.*integers", "float32"),
    (returns(policy_class=ppg.RewardMask(torch.ones(3, 3).bool())), r"\(4, 4\)", r"\(3, 3\)"),
    (returns(policy_class=ppg.RewardMask(torch.ones(4, 4))), "bool", "float32"),
    (returns(policy_class=ppg.RewardWeights(torch.ones(3, 3))), r"\(4, 4\)", r"\(3, 3\)"),
    (returns(policy_class=ppg.RewardWeights(torch.ones(4, 4).bool())), "RewardWeights must be real", "bool"),
    (returns(policy_class=ppg.RewardWeights(-torch.eye(4))), "finite and >= 0, at turn 0, reward 0 too", "-1.0"),
    (returns(policy_class=ppg.RewardWeights(torch.eye(4) / 0)), "finite and >= 0, at turn 0, reward 0 too", "inf"),
    (returns(REWARDS, ppg.RewardWeights(torch.ones(4, 4)), 0.0), "before the turn need gamma > 0", "0.0"),
    (advantages(ZEROS, "mean"), "baseline.*leave_one_out", "mean"),
    (advantages(None), "group_ids", "None"),
    (advantages(ZEROS[:1]), "group_ids.*2", "1"),
    (advantages(ONES[:, 0]), "group_ids.*integers", "float32"),
    (advantages(ZEROS, "group_mean", ZEROS + 5), "turn_counts.*4", "5"),
    (loss(LOGITS.double()), "logits.*float32", "float64"),
    (loss(labels=LABELS.int()), "labels.*int64", "int32"),
    (loss(LOGITS[:, :2]), "logits", r"\(2, 2, 5\)"),
    (loss(advantages=ONES[0]), r"advantages.*\(2, 3\)", r"\(3,\)"),
    (loss(loss_mask=ONES[0]), r"loss_mask.*\(2, 3\)", r"\(3,\)"),
    (loss(reduction="mean"), "reduction", "mean"),
    (loss(old_logprobs=ONES[:, :1]), "old_logprobs", r"\(2, 1\)"),
    (loss(ref_logprobs=ONES[0]), "ref_logprobs", r"\(3,\)"),
    (loss(rollout_logprobs=ONES[0]), "rollout_logprobs", "3"),
    (loss(spec=ppg.PolicyLossSpec(kl_coef=0.1)), "ref_logprobs", "None"),
    (loss(spec=ppg.PolicyLossSpec(temperature=ONES[0])), "temperature", r"\(3,\)"),
    (loss(spec=ppg.PolicyLossSpec(temperature=-ONES)), "temperature.*> 0", "-1"),
    (loss(spec={"loss_type": "ppo"}), "PolicyLossSpec", "dict"),
    (loss(backend="tpu"), "backend", "tpu"),
    (loss(normalizer=0.0), "normalizer.*> 0", "0.0"),
    (loss(normalizer=ONES[0]), "normalizer.*0-d", r"\(3,\)"),
    (loss(normalizer=torch.tensor(-2.0)), "normalizer.*> 0", "-2"),
    (loss(cu_seqlens=torch.tensor([0, 6], dtype=torch.int32)), "cu_seqlens.*packed", r"\(2, 3\)"),
    (packed(0, 2), "cu_seqlens.*3", r"\[0, 2\]"),
    (packed(1, 3), "cu_seqlens.*0", r"\[1, 3\]"),
    (packed(0, 2, 1, 3), "cu_seqlens.*rise", "0, 2, 1, 3"),
    (turn_loss(None), "gspo_turn.*turn_ids", "None"),
    (turn_loss(TURNS[:1]), "turn_ids", r"\(1, 3\)"),
    (turn_loss(TURNS.T), r"turn_ids.*\(2, 3\)", r"\(3, 2\)"),
    (turn_loss(TURNS / 2), "turn_ids.*integer", "float32"),
    (partial(turn_ids=TURNS + 1), "turn_ids.*row 4", "4"),
    (partial(turn_ids=TURNS - 1), "turn_ids.*row 2", "-2"),
    (partial(turn_ids=TURNS.float()), "turn_ids.*integer", "float32"),
    (partial(turn_ids=TURNS[:1]), "turn_ids", r"\(1, 3\)"),
    (partial(REWARDS[:1]), "rewards.*one row per sequence", "1"),
    (partial(turn_counts=ZEROS + 2), "turn_ids.*2 turns", "2 at row 3"),
    (partial(baseline="leave_one_out"), "group_ids", "None"),
    (partial(gamma=2.0), "gamma", "2.0"),
    (partial(REWARDS * torch.nan), "rewards must be finite", "nan"),
    (linear(WEIGHT), "hidden", r"\(5, 8\)"),
    (linear(weight=WEIGHT.T), "weight.*8", r"\(8, 5\)"),
    (linear(weight=WEIGHT.half()), "one dtype", "float16"),
    (linear(bias=ONES[0]), r"bias.*\(5,\)", r"\(3,\)"),
    (linear(bias=WEIGHT[:, 0].half()), "bias.*float32", "float16"),
    (linear(chunk_rows=0), "chunk_rows.*>= 1", "0"),
    (linear(HIDDEN.double()), "hidden.*float32", "float64"),
    (linear(weight=WEIGHT[:0], labels=LABELS * 0 - 100), "vocabulary|weight", "0"),
    (linear(backend="tpu"), "backend", "tpu"),
    (lambda: ppg.token_logprobs(LOGITS, LABELS, temperature=0.0), "temperature.*> 0", "0.0"),
    (lambda: ppg.linear_token_logprobs(HIDDEN, WEIGHT, LABELS[0]), "hidden", r"\(2, 3, 8\)"),
]


@pytest.mark.parametrize(("call", "rule", "value"), ERRORS, ids=[f"{rule}-{value}" for _, rule, value in ERRORS])
def test_an_error_names_the_rule_and_the_value(call, rule, value):
    with pytest.raises(ValueError, match=rule) as error:
        call()
    assert re.search(value, str(error.value))


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("label", [5, -1])
def test_a_label_out_of_range(label, backend):
    labels = LABELS.clone()
    labels[1, 1] = label
    options = {"backend": backend}
    sequence_level = {"spec": ppg.PolicyLossSpec("gspo"), "old_logprobs": ONES, **options}
    functions = (
        loss(labels=labels, **options), loss(labels=labels, **sequence_level),
        linear(labels=labels, **options), linear(labels=labels, **sequence_level),
        lambda: ppg.token_logprobs(LOGITS, labels, **options),
        lambda: ppg.linear_token_logprobs(HIDDEN, WEIGHT, labels, **options),
        lambda: ppg.partial_policy_loss(LOGITS, labels, REWARDS, TURNS, "full", **options),
    )  # fmt: skip
    for function in functions:
        with pytest.raises(IndexError, match=rf"labels must be in.*5.*{label} at row 4"):
            function()


def test_masked_tokens_may_hold_any_turn_id_and_ids_beyond_the_dialogue_may_be_scattered():
    out = partial(turn_ids=TURNS + 9, loss_mask=torch.zeros(2, 3))()
    assert out.loss == 0
    ids = torch.tensor([[0, 1, 0, 1], [2, 2, 3, 2]])
    assert returns(REWARDS, ppg.Segment(ids), 1.0, torch.tensor([2, 3]))().tolist() == [[1, 1, 0, 0], [2, 1, 1, 0]]
