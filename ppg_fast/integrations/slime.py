"""slime >= 0.3.1: three functions for its dotted-path flags.

    --custom-reward-post-process-path  ppg_fast.integrations.slime.reward_post_process   rewards -> advantages of turns
    --custom-advantage-function-path   ppg_fast.integrations.slime.ppg_advantages        of turns -> of tokens
    --loss-type custom_loss --custom-loss-function-path ppg_fast.integrations.slime.ppg_loss        optional

Options, set by --custom-config-path: ppg_policy_class ("full"), ppg_gamma (1.0), ppg_baseline ("leave_one_out") and
ppg_loss_type, by default the loss of --advantage-estimator: "ppo" for grpo, "gspo", "cispo"; ppg_tau_positive,
ppg_tau_negative and ppg_log_ratio_coef for what slime has no option for.

A baseline needs its whole group, and slime distributes the samples of a group over ranks: so the first function, in the
rollout manager, computes it. `slime_options.OPTIONS` lists what becomes of slime's options.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ppg_fast.functional import Kept, PolicyLossOutput, VocabShard, policy_loss, policy_loss_from_logprobs
from ppg_fast.functional.kept import kept_columns
from ppg_fast.integrations.host import require_host
from ppg_fast.integrations.options import own_numbers
from ppg_fast.integrations.slime_options import ADVANTAGES, ESTIMATORS, KL_CAP, KL_TYPES, LOSS, check_options
from ppg_fast.integrations.turns import (
    Credit,
    group_numbers,
    inside,
    spread,
    stacked,
    turn_counts,
    turn_ids_of_mask,
)
from ppg_fast.spec import IGNORE, PolicyLossSpec, require

MINIMUM = "0.3.1"


def reward_post_process(args: Any, samples: list[Any]) -> tuple[list[float], list[Tensor]]:
    """Advantages of the turns of all samples of a rollout, in place of slime's normalised rewards.

    Args:
        args: slime's arguments, with the options above.
        samples: Samples with group_index, loss_mask (None: one turn), response_length and metadata["turn_rewards"], one
            number or None per turn (a run of the loss mask); without it the sample's reward goes to its last turn.

    Returns: the raw rewards, one number a sample, and the advantages, (turns,) float32 a sample.
    Raises: ValueError where a sample has another number of rewards than turns, and for an option that `OPTIONS`
        refuses.
    """
    check_options(args, ADVANTAGES)
    raw = [float(sample.get_reward_value(args)) for sample in samples]
    rows = []
    for sample, reward in zip(samples, raw, strict=True):
        mask = [1] * sample.response_length if sample.loss_mask is None else sample.loss_mask
        turns = int(turn_counts(turn_ids_of_mask(torch.as_tensor(mask)[None]))[0])
        given = (sample.metadata or {}).get("turn_rewards")
        row = [0.0] * (turns - 1) + [reward] * (turns > 0) if given is None else list(given)
        require(
            len(row) == turns,
            f'metadata["turn_rewards"] of sample {sample.index} needs one number for each of its {turns} turns',
            row,
        )
        rows.append(row)
    rewards, counts = stacked(rows)
    credit = Credit(
        getattr(args, "ppg_policy_class", "full"),
        getattr(args, "ppg_gamma", 1.0),
        getattr(args, "ppg_baseline", "leave_one_out"),
    )
    group_ids = group_numbers((sample.group_index for sample in samples), rewards.device)
    advantages, _ = credit.of_turns(rewards, group_ids, counts)
    return raw, [row[:count].clone() for row, count in zip(advantages, counts.tolist(), strict=True)]


def ppg_advantages(args: Any, rollout_data: dict[str, Any]) -> None:
    """Fill rollout_data["advantages"] and ["returns"], lists of (R_i,) float32, from the advantages of turns in
    ["rewards"].

    Args:
        rollout_data: rewards, a list of (turns,), from `reward_post_process`; loss_masks, a list of (R_i,);
            total_lengths and response_lengths. Under context parallelism each rank keeps its own part of a response, as
            slime slices log-probs.

    Raises: ValueError where a sample that is trained on has another number of advantages than turns, and for an option
        that `OPTIONS` refuses.
    """
    check_options(args, ADVANTAGES)
    cut = require_host("slime", MINIMUM, "slime.backends.megatron_utils.cp_utils").slice_log_prob_with_cp
    advantages = []
    lengths = rollout_data["total_lengths"], rollout_data["response_lengths"]
    for turns, mask, total, response in zip(rollout_data["rewards"], rollout_data["loss_masks"], *lengths, strict=True):
        turn_ids = turn_ids_of_mask(torch.as_tensor(mask)[None])
        values, count = (
            torch.as_tensor(turns, dtype=torch.float32, device=turn_ids.device).reshape(1, -1),
            int(turn_counts(turn_ids)[0]),
        )
        require(
            count in (0, values.shape[1]),
            "rewards must be those of reward_post_process, one per turn of the loss mask",
            turns,
        )
        advantages.append(cut(spread(values, turn_ids)[0], total, response))
    rollout_data["advantages"] = advantages
    rollout_data["returns"] = list(advantages)


def loss_spec(args: Any) -> PolicyLossSpec:
    """The loss that slime's arguments ask for; ValueError for one that it cannot honour, see `OPTIONS`."""
    check_options(args, LOSS)
    estimator = getattr(args, "advantage_estimator", "grpo")
    loss_type = getattr(args, "ppg_loss_type", None) or ESTIMATORS.get(estimator, "ppo")
    named = ESTIMATORS.get(estimator, loss_type)
    rule = f"ppg_loss_type must be {named}, the loss of slime's advantage_estimator {estimator} (or choose grpo there)"
    require(estimator == "grpo" or loss_type == named, rule, loss_type)
    most = getattr(args, "eps_clip_c", None) or 0.0
    high = args.eps_clip if args.eps_clip_high is None else args.eps_clip_high
    own = own_numbers(loss_type, clip_low=args.eps_clip, clip_high=high, dual_clip=most, ratio_cap=most)
    rule = f"eps_clip_c of slime must be None for {loss_type} (it has no dual clip)"
    require(not most or "dual_clip" in own or "ratio_cap" in own, rule, most)
    given = {name: getattr(args, f"ppg_{name}", None) for name in ("tau_positive", "tau_negative", "log_ratio_coef")}
    own |= {name: value for name, value in given.items() if value is not None}
    terms = {**_kl_term(args), **_importance_weight(args), "opsm_delta": _opsm_delta(args)}
    return PolicyLossSpec(
        loss_type, **own, **terms, entropy_coef=args.entropy_coef, temperature=args.rollout_temperature
    )


def _kl_term(args: Any) -> dict[str, Any]:
    if not getattr(args, "use_kl_loss", False) or not args.kl_loss_coef:
        return {}
    estimator = KL_TYPES[args.kl_loss_type]
    if getattr(args, "use_unbiased_kl", False):
        rule = "use_unbiased_kl of slime needs kl_loss_type k3 or low_var_kl (or --loss-type policy_loss)"
        require(estimator == "k3", rule, args.kl_loss_type)
        estimator = "k3_unbiased"
    cap = KL_CAP if args.kl_loss_type == "low_var_kl" else 0.0
    return {"kl_coef": float(args.kl_loss_coef), "kl_estimator": estimator, "kl_cap": cap}


def _opsm_delta(args: Any) -> float:
    """The threshold of off-policy sequence masking; slime measures from the old log-probs, ours from those of the
    sampler where it has them."""
    if not getattr(args, "use_opsm", False):
        return 0.0
    rule = "use_opsm of slime must be False with use_tis (or --loss-type policy_loss)"
    require(not getattr(args, "use_tis", False), rule, True)
    require(args.opsm_delta > 0, "opsm_delta of slime must be > 0 with use_opsm", args.opsm_delta)
    return float(args.opsm_delta)


def _importance_weight(args: Any) -> dict[str, Any]:
    if not getattr(args, "use_tis", False):
        return {}
    mode = "mask" if getattr(args, "custom_tis_function_path", None) else "truncate"
    low = getattr(args, "tis_clip_low", None) or 0.0
    return {"importance_cap": args.tis_clip, "importance_floor": low, "importance_mode": mode}


def ppg_loss(
    args: Any, batch: dict[str, Any], logits: Tensor, sum_of_sample_mean: Callable[[Tensor], Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The policy loss with its entropy and KL terms, and its gradient, in one pass over the logits.

    Args:
        logits: (1, T, V) float32, packed, under tensor parallelism this rank's columns; batch: unconcat_tokens,
            total_lengths, response_lengths, loss_masks, advantages, and log_probs, rollout_log_probs, ref_log_probs
            where the loss uses them, lists of one tensor a sample; with rollout_top_p < 1 rollout_top_p_token_ids and
            rollout_top_p_token_offsets, the kept set of each response token, over which loss and entropy then are.
        sum_of_sample_mean: slime's reducer of the responses' tokens, (sum of R_i,) -> 0-d.

    Returns: 0-d loss and metrics by name.
    Raises: ValueError under context parallelism (use slime's own loss there), and for an option that `OPTIONS` refuses.
    """
    mpu = require_host("slime", MINIMUM, "megatron.core").mpu
    size = mpu.get_context_parallel_world_size()
    require(size == 1, "ppg_loss needs a context parallel size of 1 (else --loss-type policy_loss)", size)
    spec, old = loss_spec(args), batch.get("rollout_log_probs" if args.use_rollout_logprobs else "log_probs")
    # off-policy sequence masking measures from the old ones
    rollout = batch.get("rollout_log_probs") if spec.reads_rollout and not spec.opsm_delta else None
    T, device, ends = logits.shape[1], logits.device, torch.as_tensor(batch["total_lengths"]).cumsum(0).tolist()
    responses = batch["response_lengths"]
    rows = torch.cat(
        [torch.arange(end - R - 1, end - 1, device=device) for end, R in zip(ends, responses, strict=True)]
    )

    def placed(values: list[Tensor], fill: float = 0.0, dtype: torch.dtype = torch.float32) -> Tensor:
        """Values of the responses on the rows of logits that predict their tokens."""
        return torch.full((T,), fill, dtype=dtype, device=device).index_put(
            (rows,), torch.cat(values).to(device, dtype)
        )

    masks = [torch.as_tensor(mask) for mask in batch["loss_masks"]]
    taken = [tokens[len(tokens) - R :] for tokens, R in zip(batch["unconcat_tokens"], responses, strict=True)]
    turn_ids = [turn_ids_of_mask(mask[None])[0] for mask in masks]
    shared: dict[str, Any] = {
        "loss_mask": placed(masks), "spec": spec, "reduction": "none",
        "old_logprobs": placed(old) if old else None,
        "ref_logprobs": placed(batch["ref_log_probs"]) if spec.kl_coef else None,
        "rollout_logprobs": placed(rollout) if rollout else None,
        "cu_seqlens": torch.tensor([0, *ends, *([T] if ends[-1] < T else [])], dtype=torch.int32, device=device),
        "turn_ids": placed(turn_ids, -1, torch.int64) if spec.needs_turn_ids else None,
    }  # fmt: skip
    kept = None
    if getattr(args, "rollout_top_p", 1.0) != 1.0:
        ids, offsets = _handed_over(batch)
        sizes = placed([of_sample.diff() for of_sample in offsets], 0, torch.int64)
        kept = Kept(torch.cat(ids).to(device), torch.nn.functional.pad(sizes.cumsum(0), (1, 0)))
    out = _loss_of(mpu, logits[0], placed(taken, IGNORE, torch.int64), placed(batch["advantages"]), shared, kept)
    # the second term connects the loss to the model on a rank without response tokens
    loss = sum_of_sample_mean(out.loss[rows]) + 0.0 * out.loss.sum()
    metrics = {"loss": loss, "entropy_loss": sum_of_sample_mean(out.entropy[rows])}
    if old:
        change = torch.cat(old).to(device) - out.logprobs[rows]
        metrics["ppo_kl"] = sum_of_sample_mean(inside(change, torch.cat(masks).to(device)))
    return loss, {name: value.detach().clone() for name, value in metrics.items()}


def _handed_over(batch: dict[str, Any]) -> list[list[Tensor]]:
    """Kept ids and their offsets, one tensor a sample each. ValueError where slime has none."""
    names = "rollout_top_p_token_ids", "rollout_top_p_token_offsets"
    rule = f"rollout_top_p < 1 needs {' and '.join(names)} in the batch, which slime takes from its own SGLang"
    require(all(batch.get(name) is not None for name in names), rule, sorted(batch))
    return [[torch.as_tensor(of_sample) for of_sample in batch[name]] for name in names]


def _loss_of(
    mpu: Any, logits: Tensor, labels: Tensor, advantages: Tensor, shared: dict[str, Any], kept: Kept | None
) -> PolicyLossOutput:
    """`policy_loss` of logits (T, V), under tensor parallelism from the columns of all ranks, equally many on each."""
    vocab = None
    if mpu.get_tensor_model_parallel_world_size() > 1:
        start = mpu.get_tensor_model_parallel_rank() * logits.shape[-1]
        vocab = VocabShard(start, mpu.get_tensor_model_parallel_group())
    if kept is None and vocab is None:
        return policy_loss(logits, labels, advantages, **shared)
    labels = labels.masked_fill(shared["loss_mask"] == 0, IGNORE)
    if kept is not None:
        return policy_loss(*kept_columns(kept, logits, labels, vocab), advantages, **shared)
    assert vocab is not None
    l, H = vocab.token_logprobs(logits, labels, temperature=float(shared["spec"].temperature))
    return policy_loss_from_logprobs(l, advantages, entropy=H, **shared)
