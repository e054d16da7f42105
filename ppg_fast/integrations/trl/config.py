"""PPGConfig: GRPOConfig and the words of this package."""

from dataclasses import dataclass, field
from typing import Any

from ppg_fast.integrations.trl.host import GRPOConfig
from ppg_fast.spec import BASELINES, policy_class, require, require_number, require_one_of

HEADS = ("ppg_fast", "trl")


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class PPGOptions:
    """What `PPGConfig` adds to GRPOConfig, as a mixin for trainers that have a config class of their own."""

    policy_class: str = _option(
        "full", "Future rewards a turn is credited for: greedy, lookahead:K, segment:LENGTH or full."
    )
    gamma: float = _option(1.0, "Discount per turn inside the window, in [0, 1].")
    baseline: str = _option(
        "leave_one_out", f"Subtracted from the windowed return at the same turn: {', '.join(BASELINES)}."
    )
    std_eps: float = _option(
        1e-4, "Added to the standard deviation of the baseline group_std; the default is GRPOTrainer's own number."
    )
    turn_reward_key: str = _option(
        "turn_rewards", "Key of rollout_func's output, or attribute of an environment: rewards of the turns."
    )
    turn_id_key: str = _option(
        "turn_ids", "Key of rollout_func's output: the turn of each completion token, -1 where it is no action."
    )
    fused_head: str = _option("ppg_fast", "Whose fused head gives the log-probs: ppg_fast or trl.")


def check_options(args: Any) -> None:
    """TypeError unless ``args`` has the options, ValueError, with the rule and the value, unless they go together."""
    if not isinstance(args, PPGOptions):
        raise TypeError(f"args of PPGTrainer must be a PPGConfig, got {type(args).__name__}")
    _check_values(args)


def _check_values(args: Any) -> None:
    policy_class(args.policy_class)
    require_number("gamma", args.gamma, 0.0, 1.0)
    require_one_of("baseline", args.baseline, BASELINES)
    require_number("std_eps", args.std_eps, 0.0)
    require_one_of("fused_head", args.fused_head, HEADS)
    rule = 'multi_objective_aggregation must be "sum_then_normalize": turns have one reward, the weighted sum'
    require(args.multi_objective_aggregation == "sum_then_normalize", rule, args.multi_objective_aggregation)
    require(
        args.scale_rewards != "batch",
        'scale_rewards must not be "batch": baseline decides what is divided by what',
        "batch",
    )
    contradiction = args.baseline == "group_std" and args.scale_rewards == "none"
    require(
        not contradiction,
        'baseline "group_std" divides by a standard deviation, scale_rewards must be "group"',
        args.scale_rewards,
    )


@dataclass
class PPGConfig(PPGOptions, GRPOConfig):
    """GRPOConfig with a policy class, a discount and a baseline for the turns of a dialogue.

    A_t = R_t - baseline of R_t over the group at turn t,  R_t = sum over k in S_t of gamma^(k-t) r_k
    (arXiv:2603.06138)

    Args:
        policy_class: S_t, as `ppg_fast.policy_class` reads it: "greedy", "lookahead:K", "segment:LENGTH", "full".
        gamma: discount per turn, in [0, 1].
        baseline: "none" | "leave_one_out" | "group_mean" | "group_std", as in `ppg_fast.turn_advantages`. It takes the
            place of
            ``scale_rewards``: "group_mean" is its "none", "group_std" its "group"; "batch" has no counterpart and is
                refused.
        std_eps: as in `ppg_fast.turn_advantages`.
        turn_reward_key: where turn rewards are found: key of ``rollout_func``'s output or attribute of an environment.
        turn_id_key: key of ``rollout_func``'s output for explicit turn ids; without it, turns are the runs of the mask.
        fused_head: "ppg_fast" or "trl".
        the rest: as in GRPOConfig.

    Raises: ValueError for a name or number out of range, or options that contradict each other.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(self)
