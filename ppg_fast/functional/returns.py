"""From rewards to advantages: which future rewards a turn is credited for, and what is subtracted from them."""

import torch
from torch import Tensor

from ppg_fast import ops, reference
from ppg_fast.contract import Turns
from ppg_fast.functional.tokens import chosen_backend
from ppg_fast.ops.checks import check_rewards, check_turn_counts
from ppg_fast.policy_classes import Greedy, LagWeights, PolicyClass, RewardMask, RewardWeights, Segment
from ppg_fast.policy_classes import policy_class as named_policy_class
from ppg_fast.spec import BASELINES, STD_EPS, VALUE, fail, require, require_number, require_one_of

ALONE = ("uncentred", "other_groups")  # what becomes of a turn that nobody else of its group reached


def _check_turns(values: Tensor, name: str, turn_counts: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Values (B, T) as contiguous float32 and turn_counts (B,) on their device, or a ValueError."""
    if not isinstance(values, Tensor) or values.dim() != 2:
        fail(f"{name} must be a (B, T) tensor", getattr(values, "shape", values))
    if not values.is_floating_point():
        fail(f"{name} must be floating point", values.dtype)
    if turn_counts is not None:
        require(isinstance(turn_counts, Tensor), "turn_counts must be a tensor", type(turn_counts).__name__)
        shape_is_valid = turn_counts.shape == values.shape[:1] and not turn_counts.is_floating_point()
        require(
            shape_is_valid,
            f"turn_counts must be ({values.shape[0]},) integers",
            (tuple(turn_counts.shape), turn_counts.dtype),
        )
        require(
            turn_counts.device == values.device,
            f"turn_counts must be on the device of {name}, {values.device}",
            turn_counts.device,
        )
        turn_counts = _integers(turn_counts)
    if values.requires_grad:
        values = values.detach()
    if values.dtype != torch.float32:
        values = values.float()
    return values.contiguous(), turn_counts


def _integers(values: Tensor) -> Tensor:
    """Contiguous int32 or int64, as the kernels read them."""
    return (values if values.dtype in (torch.int32, torch.int64) else values.long()).contiguous()


def _check_values(values: Tensor | None, returns: Tensor, exists: Tensor) -> Tensor:
    """Values of the turns (B, T), like the returns or rewards (B, T) beside them, or a ValueError."""
    require(isinstance(values, Tensor), f'values (B, T) must be given with baseline "{VALUE}" and gae_lambda', values)
    assert values is not None
    checked, _ = _check_turns(values, "values", None)
    rule = f"values must be (B, T) = {tuple(returns.shape)} on {returns.device}"
    fits = values.shape == returns.shape and values.device == returns.device
    require(fits, rule, (tuple(values.shape), str(values.device)))
    if values.is_cpu and not torch.compiler.is_compiling():
        wrong = (exists & ~checked.isfinite()).nonzero()[:1].tolist()
        require(not wrong, "values must be finite, in every turn that exists; not at (row, turn)", wrong)
    return torch.where(exists, checked, 0.0)


def require_values(baseline: str, values: Tensor | None, gae_lambda: float | None) -> None:
    """ValueError for what goes with baseline "value" alone."""
    for name, given in (("values", values), ("gae_lambda", gae_lambda)):
        rule = f'{name} must be None with baseline "{baseline}": baseline "{VALUE}" has it'
        require(baseline == VALUE or given is None, rule, gae_lambda if name == "gae_lambda" else "a tensor")


def _check_groups(
    group_ids: Tensor | None, baseline: str, values: Tensor, names: tuple[str, ...] = BASELINES
) -> Tensor | None:
    """Group ids (B,) on the device of the values (B, T); None for baseline "none", and where "value" has none."""
    require_one_of("baseline", baseline, names)
    if baseline == "none" or (baseline == VALUE and group_ids is None):
        return None
    require(isinstance(group_ids, Tensor), f'baseline "{baseline}" needs group_ids', group_ids)
    assert group_ids is not None
    shape_is_valid = group_ids.shape == values.shape[:1] and not group_ids.is_floating_point()
    require(
        shape_is_valid, f"group_ids must be ({values.shape[0]},) integers", (tuple(group_ids.shape), group_ids.dtype)
    )
    return _integers(group_ids.to(values.device))


def _segment_ids(segment: Segment, rewards: Tensor) -> Tensor:
    ids = torch.as_tensor(segment.ids_or_length, device=rewards.device)
    require(not ids.is_floating_point() and ids.dtype != torch.bool, "segment ids must be integers", ids.dtype)
    shape_is_valid = ids.shape in (rewards.shape, rewards.shape[1:])
    require(shape_is_valid, f"segment ids must be (B, T) = {tuple(rewards.shape)}", tuple(ids.shape))
    return ids.long().expand(rewards.shape).contiguous()


def _reward_mask(policy_class: RewardMask, rewards: Tensor, gamma: float) -> Tensor:
    mask, T = torch.as_tensor(policy_class.mask, device=rewards.device), rewards.shape[1]
    require(mask.shape == (T, T), f"the mask of RewardMask must be (T, T) = ({T}, {T})", tuple(mask.shape))
    require(mask.dtype == torch.bool, "the mask of RewardMask must be boolean", mask.dtype)
    if gamma == 0:  # gamma^(k-t) has no value for a reward before the turn
        require(
            bool((mask == mask.triu()).all()),
            "a RewardMask that credits rewards before the turn needs gamma > 0",
            gamma,
        )
    return mask.contiguous()


def _reward_weights(policy_class: RewardWeights, rewards: Tensor, gamma: float) -> Tensor:
    """(T, T) float64 on the device of the rewards (B, T), or a ValueError."""
    weights, T = torch.as_tensor(policy_class.weights, device=rewards.device), rewards.shape[1]
    require(weights.shape == (T, T), f"the weights of RewardWeights must be (T, T) = ({T}, {T})", tuple(weights.shape))
    rule = "the weights of RewardWeights must be real numbers"
    require(not weights.is_complex() and weights.dtype != torch.bool, rule, weights.dtype)
    weights = weights.detach().double()
    if weights.is_cpu and not torch.compiler.is_compiling():
        for turn, reward in (~((weights >= 0) & weights.isfinite())).nonzero()[:1].tolist():
            place = f"turn {turn}, reward {reward}"
            fail(f"the weights of RewardWeights must be finite and >= 0, at {place} too", float(weights[turn, reward]))
        before = bool((weights == weights.triu()).all())
        require(gamma > 0 or before, "RewardWeights that credit rewards before the turn need gamma > 0", gamma)
    return weights


def _weighted(
    policy_class: LagWeights | RewardWeights, rewards: Tensor, gamma: float, turn_counts: Tensor | None
) -> Tensor:
    """The returns (B, T) of weights. Each is handed on as a turn's one reward, so no kernel has to know of them."""
    if rewards.is_cpu and not torch.compiler.is_compiling():
        check_rewards(rewards, turn_counts, None)  # here an error still names the reward
    if isinstance(policy_class, RewardWeights):
        weights = _reward_weights(policy_class, rewards, gamma)
        return reference.weighted_returns(rewards, weights, turn_counts, gamma)
    weights = torch.tensor(policy_class.weights, dtype=torch.float64, device=rewards.device)
    return reference.lagged_returns(rewards, weights, turn_counts, gamma)


def checked_turns(
    rewards: Tensor,
    policy_class: PolicyClass | str,
    gamma: float,
    turn_counts: Tensor | None,
    baseline: str = "none",
    group_ids: Tensor | None = None,
) -> Turns:
    """The arguments of `partial_returns` and `turn_advantages` as the kernels take them, or a ValueError."""
    chosen = named_policy_class(policy_class)
    gamma = require_number("gamma", gamma, 0.0, 1.0)
    rewards, turn_counts = _check_turns(rewards, "rewards", turn_counts)
    if isinstance(chosen, (LagWeights, RewardWeights)):
        chosen, rewards = Greedy(), _weighted(chosen, rewards, gamma, turn_counts)
    segment_ids = (
        _segment_ids(chosen, rewards) if isinstance(chosen, Segment) and chosen.segment_ids is not None else None
    )
    mask = _reward_mask(chosen, rewards, gamma) if isinstance(chosen, RewardMask) else None
    groups = _check_groups(group_ids, baseline, rewards)
    return Turns(
        rewards, turn_counts, segment_ids, mask, groups, chosen.lookahead, chosen.segment_length, gamma, baseline
    )


def partial_returns(
    rewards: Tensor,
    policy_class: PolicyClass | str,
    gamma: float = 1.0,
    turn_counts: Tensor | None = None,
    *,
    values: Tensor | None = None,
    gae_lambda: float | None = None,
    validate: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Return of each turn over the future rewards that its policy class credits it for.

    R[b, t] = sum over k in S_t of gamma^(k-t) rewards[b, k]                                   (arXiv:2603.06138)

    With ``gae_lambda`` what lies beyond the window is bootstrapped from ``values`` V, 0 past the end of the dialogue:

    R[b, t] = V_t + sum over k in S_t of (gamma gae_lambda)^(k-t) (r_k + gamma V_(k+1) - V_k)  (GAE, arXiv:1506.02438)

    which for gae_lambda 1 and a window of n rewards is their sum + gamma^n V_(t+n): the n-step return.

    Args:
        rewards: (B, T) floating point, one per turn; what lies beyond ``turn_counts`` is ignored, NaN included.
        policy_class: ``Greedy() | Lookahead(k) | Segment(ids_or_length) | FullPlanning() | LagWeights(weights) |
            RewardMask(mask) | RewardWeights(weights)``, or the name of one.
        gamma: discount per turn, in [0, 1].
        turn_counts: (B,) integers, the turns of each dialogue; default T.
        values: (B, T) floating point, the return that is expected from turn t on, before its answer; a constant.
        gae_lambda: in [0, 1], for windows, so not for masks and weights; None: no bootstrap, and no values.
        validate: on a GPU, also make the checks of values, which need a sync. On a CPU they are always made.
        backend: "cpu" | "triton" | "cuda" | "reference"; default the fastest that runs here.

    Returns: (B, T) float32, zero beyond the dialogue. Not differentiable.
    Raises: ValueError for wrong shapes or dtypes, gamma or gae_lambda outside [0, 1], non-finite rewards or values,
        scattered segments, values without gae_lambda or it without them.
    """
    turns = checked_turns(rewards, policy_class, gamma, turn_counts)
    backend = chosen_backend(backend, rewards)
    if gae_lambda is None:
        require(
            values is None, "values bootstrap a return where gae_lambda is given; without it they must be None", "V"
        )
        return ops.partial_returns(turns, validate, backend)
    decay = turns.gamma * require_number("gae_lambda", gae_lambda, 0.0, 1.0)
    rule = "gae_lambda goes with windows (greedy, lookahead:K, segment:LENGTH, full), whose end has a value"
    require(named_policy_class(policy_class).is_window, rule, policy_class)
    B, T = turns.rewards.shape
    exists = torch.ones(B, T, dtype=torch.bool, device=rewards.device)
    if turns.turn_counts is not None:
        exists = reference.turn_mask(turns.turn_counts, T)
    known = _check_values(values, turns.rewards, exists).double()
    following = torch.nn.functional.pad(known, (0, 1))[:, 1:]
    residuals = torch.where(exists, turns.rewards + turns.gamma * following - known, 0.0).float()
    advantages = ops.partial_returns(turns._replace(rewards=residuals, gamma=decay), validate, backend)
    return (known + advantages).float()


def turn_advantages(
    returns: Tensor,
    group_ids: Tensor | None,
    baseline: str = "leave_one_out",
    turn_counts: Tensor | None = None,
    *,
    values: Tensor | None = None,
    alone: str = "uncentred",
    std_eps: float = STD_EPS,
) -> Tensor:
    """Return of each turn minus the baseline of the same turn over its group of rollouts, or minus its value.

    leave_one_out  A = R - mean of the others      unbiased
    group_mean     A = R - mean of the group       (m-1)/m of the exact gradient of a turn that m > 1 of the group
                   reach: one factor for all where dialogues are equally long, else the direction is off too
    group_std      A = (R - mean) / (std + std_eps), std with Bessel's correction; biased; 0 where all returns are equal
    value          A = R - V, and with group_ids minus the mean of what that leaves of the others: unbiased where V is a
                   function of what came before the turn's answer, and R of rewards alone
    none           A = R

    Only members of the group that reached the turn count.

    Args:
        returns: (B, T) floating point, as from `partial_returns`, bootstrapped or not.
        group_ids: (B,) integers, equal for the rollouts of one prompt; may be None for baselines "none" and "value".
        turn_counts: (B,) integers, the turns of each dialogue; default T.
        values: (B, T) floating point, for baseline "value"; a constant.
        alone: of a turn that nobody else of its group reached: "uncentred", its baseline is 0; "other_groups", it is
            the mean of the other groups at that turn, which is unbiased as well and varies less.

    Returns: (B, T) float32, zero beyond the dialogue. Computed in float64, so that equal returns give exact zeros. Not
        differentiable.
    Raises: ValueError for wrong shapes, dtypes or names, and for values that another baseline would not use.
    """
    std_eps = require_number("std_eps", std_eps, 0.0)
    require_one_of("alone", alone, ALONE)
    returns, turn_counts = _check_turns(returns, "returns", turn_counts)
    if turn_counts is not None and turn_counts.is_cpu and not torch.compiler.is_compiling():
        check_turn_counts(turn_counts, returns.shape[1])
    group_ids = _check_groups(group_ids, baseline, returns, (*BASELINES, VALUE))
    B, T = returns.shape
    if turn_counts is None:
        turn_counts = torch.full((B,), T, device=returns.device)
    exists = reference.turn_mask(turn_counts, T)
    own = torch.where(exists, returns, 0.0).double()
    if baseline == VALUE:
        own = own - _check_values(values, returns, exists)
    else:
        require(values is None, f'values go with baseline "{VALUE}"; with "{baseline}" they must be None', "V")
    if group_ids is None:
        return own.float()
    return torch.where(exists, _centred(own, exists, group_ids, baseline, alone, std_eps), 0.0).float()


def _centred(own: Tensor, exists: Tensor, group_ids: Tensor, baseline: str, alone: str, std_eps: float) -> Tensor:
    """What the turns (B, T) float64 have beyond the baseline of their group."""
    groups, B = reference.consecutive_ids(group_ids), len(own)
    members = reference.group_sum(exists.double(), groups, B)[groups]
    total = reference.group_sum(own, groups, B)[groups]
    if baseline in ("leave_one_out", VALUE):
        advantages = own - (total - own) / (members - 1).clamp(min=1)
    else:
        advantages = own - total / members.clamp(min=1)
        if baseline == "group_std":
            square = reference.group_sum(torch.where(exists, advantages**2, 0.0), groups, B)[groups]
            advantages = advantages / ((square / (members - 1).clamp(min=1)).sqrt() + std_eps)
    if alone == "other_groups":
        others = exists.sum(0) - members
        own = own - (own.sum(0) - total) / others.clamp(min=1)
    return torch.where(members <= 1, own, advantages)
