"""slime >= 0.3.1: three functions for its dotted-path flags.

    --custom-reward-post-process-path  ppg_fast.integrations.slime.reward_post_process   rewards -> advantages of turns
    --custom-advantage-function-path   ppg_fast.integrations.slime.ppg_advantages        of turns -> of tokens
    --loss-type custom_loss --custom-loss-function-path ppg_fast.integrations.slime.ppg_loss        optional

Options, set by --custom-config-path: ppg_policy_class ("full"), ppg_gamma (1.0), ppg_baseline ("leave_one_out") and
ppg_loss_type, by default the loss of --advantage-estimator: "ppo" for grpo, "gspo", "cispo".

A baseline needs its whole group, and slime distributes the samples of a group over ranks. So the first function takes
it in the rollout manager. `OPTIONS` says what becomes of every option of slime's that touches the loss.
"""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ppg_fast.functional import policy_loss
from ppg_fast.integrations.host import require_host
from ppg_fast.integrations.options import check, check_unknown, hosts_own, obeyed, refused
from ppg_fast.integrations.turns import Credit, group_numbers, spread, stacked, turn_counts, turn_ids_of_mask
from ppg_fast.spec import IGNORE, PolicyLossSpec, require

MINIMUM = "0.3.1"
KL_TYPES = {"k1": "k1", "k2": "k2", "k3": "k3", "low_var_kl": "k3"}
ESTIMATORS = {"grpo": "ppo", "gspo": "gspo", "cispo": "cispo"}  # the losses that slime chooses by its estimator
ADVANTAGES, LOSS = "advantages", "loss"
OPTIONS = (
    obeyed(ADVANTAGES, "ppg_policy_class ppg_gamma ppg_baseline", "as in `turn_advantages`"),
    obeyed(ADVANTAGES, "custom_reward_post_process_path custom_advantage_function_path", "the two functions here"),
    obeyed(ADVANTAGES, "reward_key", "the reward of a sample without `turn_rewards`"),
    refused(ADVANTAGES, "advantage_estimator", tuple(ESTIMATORS), "the advantages of other estimators are not ours"),
    refused(ADVANTAGES, "gamma", 1.0, "set ppg_gamma, a discount per turn"),
    refused(ADVANTAGES, "lambd", 1.0, "there is no GAE"),
    refused(ADVANTAGES, "kl_coef", 0.0, "rewards get no KL penalty: use_kl_loss and kl_loss_coef put it into the loss"),
    refused(ADVANTAGES, "rewards_normalization grpo_std_normalization", True, "ppg_baseline says what is subtracted"),
    refused(ADVANTAGES, "compute_advantages_and_returns", True, "without it no advantage is computed"),
    hosts_own(ADVANTAGES, "normalize_advantages", "whitens our advantages over the ranks"),
    hosts_own(ADVANTAGES, "use_opd opd_type opd_kl_coef", "subtracts the teacher's KL from our advantages"),
    hosts_own(ADVANTAGES, "dynamic_sampling_filter_path buffer_filter_path rollout_sample_filter_path "
              "rollout_all_samples_process_path custom_rm_path group_rm rm_type", "before us, on rewards of samples"),
    hosts_own(ADVANTAGES, "partial_rollout mask_offpolicy_in_partial_rollout loss_mask_type",
              "the loss mask, whose runs are the turns: a turn it masks wholly has no reward, which is an error"),
    hosts_own(ADVANTAGES, "allgather_cp", "slices our advantages as its log-probs"),
    obeyed(LOSS, "loss_type custom_loss_function_path", "`custom_loss` and `ppg_loss`"),
    obeyed(LOSS, "ppg_loss_type", "default: ppo, gspo or cispo by advantage_estimator"),
    obeyed(LOSS, "eps_clip eps_clip_high", "clip_low and clip_high; cispo has no lower clip and needs eps_clip >= 1"),
    obeyed(LOSS, "eps_clip_c", "dual_clip, for ppo, gspo and gspo_turn"),
    obeyed(LOSS, "use_kl_loss kl_loss_coef", "kl_coef"),
    obeyed(LOSS, "kl_loss_type", "kl_estimator", lambda kind: kind in KL_TYPES, "k1, k2, k3 or low_var_kl"),
    obeyed(LOSS, "entropy_coef", "of the logits at rollout_temperature"),
    obeyed(LOSS, "rollout_temperature", "temperature"),
    obeyed(LOSS, "use_rollout_logprobs", "the sampler's log-probs are the old ones"),
    obeyed(LOSS, "use_tis tis_clip", "importance_cap"),
    hosts_own(LOSS, "calculate_per_token_loss global_batch_size", "divides: our loss goes through its reducer"),
    refused(LOSS, "tis_clip_low", (None, 0), "our weights have no lower bound: --loss-type policy_loss has one"),
    refused(LOSS, "custom_tis_function_path custom_pg_loss_reducer_function_path", None, "use --loss-type policy_loss"),
    refused(LOSS, "use_opsm use_unbiased_kl get_mismatch_metrics", False, "use --loss-type policy_loss"),
    refused(LOSS, "true_on_policy_mode", False, "our log-probs are not the sampler's bit for bit"),
    refused(LOSS, "rollout_top_p", 1.0, "our log-probs are of the whole vocabulary: use --loss-type policy_loss"),
    hosts_own(LOSS, "log_probs_chunk_size recompute_loss_function use_rollout_entropy opsm_delta value_clip "
              "keep_old_actor ref_update_interval use_routing_replay use_rollout_routing_replay "
              "num_critic_only_steps enable_mtp_training", "memory, models and metrics: no part of this loss"),
)  # fmt: skip
# names that an option of a later slime would have if it changed a loss; the rest of its thousand options is Megatron's
FAMILIES = re.compile(
    "ppg_|eps_clip|(use_)?(tis|mis|opsm|icepop|kl)_|use_(tis|mis|opsm|icepop)$|custom_.*(loss|tis|reducer)"
    "|(?!rl_).*(advantage|pg_loss|importance)"
)


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


def check_options(args: Any, part: str) -> None:
    """ValueError for the first of slime's arguments that this part cannot honour, or does not know."""
    check("slime", OPTIONS, args, part)
    check_unknown("slime", OPTIONS, args, names=lambda name: bool(FAMILIES.match(name)))


def loss_spec(args: Any) -> PolicyLossSpec:
    """slime's arguments as a spec; ValueError for one that this loss cannot honour, see `OPTIONS`."""
    check_options(args, LOSS)
    estimator = getattr(args, "advantage_estimator", "grpo")
    loss_type = getattr(args, "ppg_loss_type", None) or ESTIMATORS.get(estimator, "ppo")
    named = ESTIMATORS.get(estimator, loss_type)
    rule = f"ppg_loss_type must be {named}, the loss of slime's advantage_estimator {estimator} (or choose grpo there)"
    require(estimator == "grpo" or loss_type == named, rule, loss_type)
    dual_clip = getattr(args, "eps_clip_c", None) or 0.0
    rule = f"eps_clip_c of slime must be None for {loss_type} (it has no dual clip)"
    require(not dual_clip or loss_type not in ("cispo", "reinforce"), rule, dual_clip)
    rule = "eps_clip of slime must be at least 1 for cispo (it has no lower clip)"
    require(loss_type != "cispo" or args.eps_clip >= 1, rule, args.eps_clip)
    kl = args.kl_loss_type if getattr(args, "use_kl_loss", False) else None
    return PolicyLossSpec(
        loss_type,
        clip_low=min(args.eps_clip, 1.0),  # a ratio is never below 0
        clip_high=args.eps_clip if args.eps_clip_high is None else args.eps_clip_high,
        dual_clip=dual_clip,
        kl_coef=float(args.kl_loss_coef) if kl else 0.0,
        kl_estimator=KL_TYPES.get(kl or "", "k3"),
        entropy_coef=args.entropy_coef,
        importance_cap=args.tis_clip if getattr(args, "use_tis", False) else 0.0,
        temperature=args.rollout_temperature,
    )


def ppg_loss(
    args: Any, batch: dict[str, Any], logits: Tensor, sum_of_sample_mean: Callable[[Tensor], Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The policy loss, entropy and KL terms included, and its gradient in one pass over the logits, where slime takes
    several.

    Args:
        logits: (1, T, V) float32, packed; batch: unconcat_tokens, total_lengths, response_lengths, loss_masks,
            advantages, and log_probs, rollout_log_probs, ref_log_probs where the loss uses them, lists of one tensor a
            sample.
        sum_of_sample_mean: slime's reducer of the responses' tokens, (sum of R_i,) -> 0-d.

    Returns: 0-d loss and metrics by name.
    Raises: ValueError under tensor or context parallelism, which split a row of logits (use slime's own loss there),
        and for an option that `OPTIONS` refuses.
    """
    mpu = require_host("slime", MINIMUM, "megatron.core").mpu
    sizes = mpu.get_tensor_model_parallel_world_size(), mpu.get_context_parallel_world_size()
    require(
        sizes == (1, 1), "ppg_loss needs tensor and context parallel sizes of 1 (else --loss-type policy_loss)", sizes
    )
    spec, old = loss_spec(args), batch.get("rollout_log_probs" if args.use_rollout_logprobs else "log_probs")
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
    out = policy_loss(
        logits[0], placed(taken, IGNORE, torch.int64), placed(batch["advantages"]), loss_mask=placed(masks), spec=spec,
        reduction="none",
        old_logprobs=placed(old) if old else None,
        ref_logprobs=placed(batch["ref_log_probs"]) if spec.kl_coef else None,
        rollout_logprobs=placed(batch["rollout_log_probs"]) if spec.importance_cap else None,
        cu_seqlens=torch.tensor([0, *ends, *([T] if ends[-1] < T else [])], dtype=torch.int32, device=device),
        turn_ids=placed(turn_ids, -1, torch.int64) if spec.loss_type == "gspo_turn" else None,
    )  # fmt: skip
    # connected where no response token is on this rank
    loss = sum_of_sample_mean(out.loss[rows]) + 0.0 * out.loss.sum()
    metrics = {"loss": loss, "entropy_loss": sum_of_sample_mean(out.entropy[rows])}
    if old:
        metrics["ppo_kl"] = sum_of_sample_mean(torch.cat(old).to(device) - out.logprobs[rows])
    return loss, {name: value.detach().clone() for name, value in metrics.items()}
