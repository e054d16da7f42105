"""prime-rl >= 0.8: a custom loss on its packed samples, and credit of turns for an Algorithm of its orchestrator.

    [trainer.loss]
    type = "custom"
    import_path = "ppg_fast.integrations.prime_rl.ppg_loss"
    kwargs = { loss_type = "dppo_tv", kl_tau = 1e-3 }          # prime-rl's own default

`OPTIONS` lists what becomes of prime-rl's options.
"""

from typing import Any

import torch

from ppg_fast.functional import policy_loss_from_logprobs
from ppg_fast.integrations.host import require_host
from ppg_fast.integrations.options import check, check_unknown, hosts_own, obeyed, refused
from ppg_fast.integrations.turns import Credit, inside, stacked, turn_ids_of_mask
from ppg_fast.policy_classes import PolicyClass
from ppg_fast.spec import PolicyLossSpec, require

MINIMUM = "0.8"
ADVANTAGES, LOSS = "advantages", "loss"
OPTIONS = (  # of trainer.loss.kwargs, and of the algorithm's configuration in the orchestrator
    obeyed(LOSS, "preset loss_type clip_low clip_high dual_clip ratio_cap tau_positive tau_negative log_ratio_coef "
           "kl_coef kl_estimator kl_cap max_log_ratio", "as in `PolicyLossSpec`; default: ppo"),
    obeyed(LOSS, "dppo_mask_low dppo_mask_high", "clip_low and clip_high"),
    obeyed(LOSS, "ipo_threshold", "clip_low and clip_high, both"),
    obeyed(LOSS, "kl_tau", "log_ratio_coef: its square of the log ratio to the sampler"),
    obeyed(LOSS, "adv_tau", "a factor of the advantages"),
    hosts_own(LOSS, "loss_weights", "factors of tokens: those of the rl component, which our loss takes"),
    hosts_own(LOSS, "temperature", "in the log-probs we are given"),
    obeyed(ADVANTAGES, "type sampling", "an Algorithm of your own whose score_group calls `credit_group`"),
    refused(ADVANTAGES, "action_loss_type", "rl", "our loss is that of the rl component"),
    refused(ADVANTAGES, "length_penalty", None, "credit_group has none: put it into the rewards of turns"),
    hosts_own(ADVANTAGES, "filter_zero_advantages", "drops tokens that have no gradient"),
)  # fmt: skip
ITS_NAMES = {  # numbers of prime-rl's own losses as ours
    "dppo_mask_low": ("clip_low",),
    "dppo_mask_high": ("clip_high",),
    "ipo_threshold": ("clip_low", "clip_high"),
    "kl_tau": ("log_ratio_coef",),
}


def loss_spec(**kwargs: Any) -> PolicyLossSpec:
    """The loss that ``kwargs`` of prime-rl's trainer.loss ask for: arguments of `PolicyLossSpec`, a ``preset`` that
    they change, and the names that prime-rl's own losses have for them. ValueError for another option, and for one
    given under two names."""
    known = [
        name for option in OPTIONS if option.part == LOSS and option.fate == "obeyed" for name in option.names.split()
    ]
    unknown = {name: value for name, value in kwargs.items() if name not in known}
    require(not unknown, f"kwargs of prime-rl's trainer.loss must be among {', '.join(known)}", unknown)
    given: dict[str, Any] = {}
    for name, value in kwargs.items():
        for ours in ITS_NAMES.get(name, (name,)):
            require(ours not in given, f"{ours} of prime-rl's trainer.loss must be given once", kwargs)
            given[ours] = value
    preset = given.pop("preset", None)
    return PolicyLossSpec(**{"loss_type": "ppo", **given}) if preset is None else PolicyLossSpec.preset(preset, **given)


def ppg_loss(inputs: Any, adv_tau: float = 1.0, **kwargs: Any) -> Any:
    """The policy loss of one sample, summed: prime-rl divides by its global number of tokens.

    Args:
        inputs: LossInputs with trainer_logprobs (differentiable), inference_logprobs, ref_logprobs or None, advantages,
            loss_mask and loss_weights or None, each (seq,), own alignment. The sampler's log-probs are the old ones, so
            the ratio covers the mismatch between sampler and trainer too.
        adv_tau: a factor of the advantages; kwargs: see `loss_spec`.

    Returns: LossOutputs with the sum as loss and metrics by name.
    Raises: ValueError for a KL term where the algorithm scores no ref_logprobs, and for other options.
    """
    spec = loss_spec(**kwargs)
    turn_ids = turn_ids_of_mask(inputs.loss_mask[None])[0] if spec.needs_turn_ids else None
    out = policy_loss_from_logprobs(
        inputs.trainer_logprobs, adv_tau * inputs.advantages, loss_mask=inputs.loss_mask,
        old_logprobs=inputs.inference_logprobs, ref_logprobs=inputs.ref_logprobs, turn_ids=turn_ids, spec=spec,
        reduction="none",
    )  # fmt: skip
    weights = inputs.loss_weights
    loss = out.loss if weights is None else out.loss * inside(weights, inputs.loss_mask)
    metrics = {name: out.metrics[name] for name in ("approx_kl", "clip_fraction", "kl") if name in out.metrics}
    return require_host("prime-rl", MINIMUM, "prime_rl.trainer.rl.loss").LossOutputs(loss=loss.sum(), metrics=metrics)


def _sampled_nodes(trace: Any) -> list[Any]:
    """The nodes of a trace with sampled tokens, one per turn, in order: those whose advantages prime-rl's
    assign_advantages sets."""
    branches = [branch for branch in trace.branches if branch.trainable]
    require(len(branches) <= 1, "turns have one order in a trace with one trainable branch; branches", len(branches))
    trainable = {id(node) for branch in branches for node in branch.nodes}
    return [node for node in trace.nodes if id(node) in trainable and any(node.mask)]


def credit_group(
    group: list[Any],
    policy_class: PolicyClass | str = "full",
    gamma: float = 1.0,
    baseline: str = "leave_one_out",
    key: str = "turn_rewards",
    config: Any = None,
) -> None:
    """Assign to each sampled token of a group of traces the advantage of its turn: the body of an Algorithm's
    ``score_group``.

    Args:
        group: traces of one prompt, each with ``info[key]``, one number or None per turn (a node with sampled tokens),
            None counting 0.
        policy_class, gamma, baseline: as in `partial_returns` and `turn_advantages`.
        config: the algorithm's configuration, if it is to be checked for options that this does not honour.

    Raises: ValueError for such an option, and where a trace has no such rewards, another number of them than turns, or
        several trainable branches.
    """
    if config is not None:
        check("prime-rl's algorithm", OPTIONS, config, ADVANTAGES)
        check_unknown("prime-rl's algorithm", OPTIONS, config)
    turns = [_sampled_nodes(trace) for trace in group]
    for trace, nodes in zip(group, turns, strict=True):
        rewards = trace.info.get(key)
        has_all = rewards is not None and len(rewards) == len(nodes)
        require(has_all, f"info[{key!r}] of a trace needs one reward for each of its {len(nodes)} turns", rewards)
    rewards, counts = stacked([trace.info[key] for trace in group])
    group_ids = torch.zeros(len(group), dtype=torch.int64)
    advantages, _ = Credit(policy_class, gamma, baseline).of_turns(rewards, group_ids, counts)
    assign_advantages = require_host("prime-rl", MINIMUM, "prime_rl.orchestrator.algo.routing").assign_advantages
    for trace, nodes, row in zip(group, turns, advantages.tolist(), strict=True):
        assign_advantages(
            trace, [value for node, value in zip(nodes, row, strict=False) for _ in range(sum(node.mask))]
        )
