"""The forward and backward passes of a step: which dialogues each reads, and what is known of them before."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ppg_fast.dialogues.packing import NOTHING, PackedBatch, micro_batches, pack
from ppg_fast.distributed import Ranks
from ppg_fast.models.adaptation import StartingWeights
from ppg_fast.reference.turns import of_tokens
from ppg_fast.spec import PolicyLossSpec
from ppg_fast.training.objective import Objective, turn_residuals
from ppg_fast.training.token_share import train_most_uncertain


@dataclass
class Pass:
    """Some dialogues of a step's batch, by their index there, on the model's device; none in a dummy pass."""

    dialogues: Sequence[int]
    batch: PackedBatch
    advantages: Tensor  # (S, T) float32
    old_logprobs: Tensor | None = None  # (N,) under the weights before the first of several iterations
    ref_logprobs: Tensor | None = None  # (N,) under the reference of a KL term or of soft Q-learning
    ref_lse: Tensor | None = None  # (N,) log-sum-exp of the logits under the latter
    offsets: Tensor | None = None  # (T,) mean returns from each turn index on, for soft Q-learning
    values: Tensor | None = None  # (S, T) that soft Q-learning's last pass gave the turns, in units of the reward
    residuals: Tensor | None = None  # (S, T) of that pass, in nats
    nll_weights: Tensor | None = None  # (N,) of the likelihood of each label
    complete: Callable[[Tensor], Tensor] | None = None  # hidden states (N, D) to the advantages, for a critic


def make_passes(
    batch: PackedBatch,
    advantages: Tensor,
    lengths: Tensor,
    max_tokens: int,
    device: torch.device,
    ranks: Ranks,
    likelihood: Tensor | None = None,
) -> list[Pass]:
    """This rank's passes over the first ``lengths`` (S,) tokens of each dialogue, of at most ``max_tokens`` each.
    ``likelihood``: (S, T), the weight of -l of each turn's tokens.

    There are as many as any rank has, at least one: those of a rank with less work are dummies without a gradient.
    """
    sizes = lengths.tolist()
    read = [dialogue for dialogue, size in enumerate(sizes) if size]
    mine = [read[i] for i in ranks.share([sizes[dialogue] for dialogue in read])]
    passes = []
    for indices in micro_batches([sizes[dialogue] for dialogue in mine], max_tokens):
        chosen = [mine[i] for i in indices]
        part = batch.part(chosen, lengths)
        weights = None if likelihood is None else of_tokens(likelihood[chosen], part.turn_ids, part.dialogue_ids)
        one = Pass(chosen, part.to(device), advantages[chosen].to(device))
        one.nll_weights = None if weights is None else weights.to(device)
        passes.append(one)
    lacking = max(1, ranks.largest(len(passes))) - len(passes)
    dummy = Pass([], pack([NOTHING]).to(device), torch.zeros(1, 1, device=device))
    return passes + [dummy] * lacking


def add_logprobs(
    passes: Sequence[Pass], module: nn.Module, objective: Objective, reference: StartingWeights | None, ranks: Ranks
) -> None:
    """Fill in the log-probs that the objective compares with: old ones for several iterations, those of ``reference``
    where there is one. With a share of the tokens the others lose their labels, as soon as the entropies are known."""
    share = objective.token_share
    if share < 1:
        for one in passes:
            if one.batch.entropies is not None:
                one.batch = train_most_uncertain(one.batch, one.batch.entropies, share)
    if objective.num_iterations > 1 and not (objective.from_start or objective.soft_q):
        for one in passes:
            ranks.check()
            if share < 1 and one.batch.entropies is None:
                one.old_logprobs, entropies = _read(module, one.batch, objective.spec, ranks, entropy=True)
                one.batch = train_most_uncertain(one.batch, entropies, share)
            else:
                one.old_logprobs = _read(module, one.batch, objective.spec, ranks)
    if reference is not None:
        with reference.in_place():
            for one in passes:
                ranks.check()
                if objective.soft_q:
                    one.ref_logprobs, one.ref_lse = _read(module, one.batch, objective.spec, ranks, lse=True)
                else:
                    one.ref_logprobs = _read(module, one.batch, objective.spec, ranks)
    if objective.from_start:
        for one in passes:
            one.old_logprobs, one.ref_logprobs = one.ref_logprobs, None


def regress(
    passes: Sequence[Pass],
    module: nn.Module,
    batch: PackedBatch,
    returns: Tensor,
    objective: Objective,
    ranks: Ranks,
    moved: bool,
    check: Callable[[], None],
) -> dict[str, float]:
    """Give the passes over ``batch`` the advantages with which REINFORCE has the gradient of the regression on turns at
    the weights as they are; its loss and the share of it that is explained.

    Log ratios are those of whole turns and groups, so they are found before any pass has a gradient. Where the weights
    have not ``moved`` from the old policy's, all of them are 0.
    """
    ratios = None
    if moved:
        sums: list[Tensor | None] = []
        for one in passes:
            check()
            logprobs = _read(module, one.batch, objective.spec, ranks)
            old = one.old_logprobs
            sums.append(None if old is None else one.batch.sum_of_turns(logprobs - old))
        ratios = of_all(passes, sums, batch, ranks)
    found, before = (turn_residuals(batch, returns, objective, r) for r in (ratios, None))
    advantages = (objective.scale * found.advantages(objective.eta)).float()
    for one in passes:
        if one.dialogues:
            one.advantages = advantages[one.dialogues].to(one.advantages.device)
    loss, at_old = float(found.loss()), float(before.loss())
    return {"loss": loss, "explained": 1 - loss / at_old if at_old else 0.0}


def loss_of(
    one: Pass,
    module: nn.Module,
    objective: Objective,
    normalizer: float | None,
    on_hidden: Callable[[Tensor], None] | None = None,
) -> Any:
    """The loss of a pass, differentiable, and what was found on the way. ``on_hidden``: is shown its hidden states."""
    if objective.soft_q is None:
        return module(
            one.batch,
            one.complete or one.advantages,
            objective.spec,
            old_logprobs=one.old_logprobs,
            ref_logprobs=one.ref_logprobs,
            rollout_logprobs=one.batch.rollout_logprobs if objective.spec.reads_rollout else None,
            nll_weights=one.nll_weights,
            nll_normalizer=None if one.nll_weights is None else 1.0,
            reduction=objective.reduction,
            normalizer=normalizer,
            skip_zero_advantages=not objective.teacher,  # which teaches every token
            teacher=objective.teacher,
            on_hidden=on_hidden,
        )
    unpaid = replace(one.batch, rewards=torch.zeros_like(one.batch.rewards)) if objective.imitate else one.batch
    out = module(
        unpaid,
        None,
        objective.soft_q,
        policy_class=objective.policy_class,
        gamma=objective.gamma,
        temperature=objective.spec.temperature,
        ref_logprobs=one.ref_logprobs,
        ref_lse=one.ref_lse,
        offsets=one.offsets,
        normalizer=normalizer,
    )
    one.values, one.residuals = out.values, out.residuals
    return out


def compare_with(passes: Sequence[Pass], mean_returns: Sequence[float]) -> None:
    """Give the passes of soft Q-learning the mean return from each turn index on, 0 where none is known."""
    for one in passes:
        known = torch.tensor(mean_returns[: one.batch.rewards.shape[1]], dtype=torch.float64)
        lacking = one.batch.rewards.shape[1] - len(known)
        one.offsets = torch.nn.functional.pad(known, (0, lacking)).to(one.batch.rewards.device)


def weighed(passes: Sequence[Pass], batch: PackedBatch, objective: Objective, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """What the last passes of soft Q-learning gave the turns of ``batch``, (S, T) float32: the value of each in units
    of the reward, and what its tokens were weighed with: the advantage in the same units, -beta times its residual, or
    in imitation 1 - residual / cql_coef."""
    assert objective.soft_q
    values = of_all(passes, [one.values for one in passes], batch, ranks)
    residuals = of_all(passes, [one.residuals for one in passes], batch, ranks)
    if objective.imitate:
        return values.float(), (batch.turn_mask.double() - residuals / objective.soft_q.cql_coef).float()
    return values.float(), (-objective.soft_q.beta * residuals).float()


def of_all(
    passes: Sequence[Pass], found: Sequence[Tensor | None], batch: PackedBatch, ranks: Ranks, *size: int
) -> Tensor:
    """What the passes of all ranks found of their turns, as (S, T) float64 of ``batch`` on the CPU, or (S, T, *size)
    float32: a dialogue is in one pass of one rank."""
    dtype = torch.float32 if size else torch.float64
    whole = torch.zeros(*batch.rewards.shape, *size, dtype=dtype)
    own = [
        (list(one.dialogues), values.to(dtype).cpu())
        for one, values in zip(passes, found, strict=True)
        if one.dialogues and values is not None
    ]
    for of_rank in ranks.gather(own):
        for dialogues, values in of_rank:
            whole[dialogues] = values
    return whole


def _read(module: nn.Module, batch: PackedBatch, spec: PolicyLossSpec, ranks: Ranks, **also: bool) -> Any:
    """The log-probs of a batch's labels (N,), and what ``also`` asks for, without a gradient and without dropout."""
    was_training = module.training
    module.eval()
    try:
        with ranks.no_grad_forward(module):
            return module(batch, None, spec, **also)
    finally:
        module.train(was_training)
