"""Objective, credit assignment and schedule."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ppg_fast import reference
from ppg_fast.dialogues.packing import PackedBatch, Sample, pack
from ppg_fast.functional import partial_returns, turn_advantages
from ppg_fast.policy_classes import FullPlanning, Lookahead, PolicyClass
from ppg_fast.reference import Residuals
from ppg_fast.reference.turns import of_tokens
from ppg_fast.rules import FLOAT32_MAX
from ppg_fast.spec import VALUE, PolicyLossSpec, SoftQSpec, require, require_token_share

if TYPE_CHECKING:
    from ppg_fast.models.frozen_teacher import FrozenTeacher


@dataclass(frozen=True)
class Objective:
    """The objective of a step. ``imitate``: every turn has advantage 1: supervised fine-tuning by the same kernel.

    ``signals``: `ppg_fast.training.auto` measures at every step which turns move which rewards; ``auto``: the next one
    is credited by the weights that follow, in place of ``policy_class``. ``scale``: what its advantages are multiplied
    with then.

    ``eta`` > 0: regression on turns (`ppg.turn_regression_loss`) in place of ``spec`` and ``reduction``: of pairs, or
    with baseline "none" of turns by themselves. Its old policy is that of the step's start, or ``from_start`` of the
    training's: dialogues of a log are all of one policy.

    ``soft_q``: soft Q-learning (`ppg.soft_q_loss`) in their place, with the weights at the start as its reference.
    ``replay``: steps whose dialogues are drawn again, as many as are new; soft Q-learning alone takes dialogues of
    another policy as they are. With ``imitate`` it knows no rewards and no mean returns, and its loss is taken times
    1 / cql_coef over the dialogues: supervised fine-tuning plus delta_t^2 / (2 cql_coef) of each turn.

    ``nll_coef``: the loss gains this times the mean of -l over the tokens of turns whose windowed return is positive
    (VAPO, arXiv:2504.05118). ``teacher``: its divergence joins the loss of every token.

    ``token_share`` < 1: of each answer only this share of its tokens is trained, the most uncertain ones
    (`training.token_share`), over the denominator of all. Their entropies come with the dialogues or, with several
    iterations, from the pass that finds the old log-probs.

    ``baseline`` "value": what a `training.critic.Critic` expects of a turn, beside the mean of the group;
    ``gae_lambda``: the returns are bootstrapped from it, None: not.
    """

    policy_class: PolicyClass = field(default_factory=lambda: Lookahead(3))
    gamma: float = 1.0
    baseline: str = "leave_one_out"
    spec: PolicyLossSpec = field(default_factory=PolicyLossSpec)
    reduction: str = "sequence_sum"
    num_iterations: int = 1
    imitate: bool = False
    signals: bool = False
    auto: bool = False
    scale: float = 1.0
    eta: float = 0.0
    from_start: bool = False
    nll_coef: float = 0.0
    soft_q: SoftQSpec | None = None
    replay: int = 0
    token_share: float = 1.0
    teacher: "FrozenTeacher | None" = None
    gae_lambda: float | None = None

    def __post_init__(self) -> None:
        """ValueError for a loss of whole turns over another loss, for replay without soft Q-learning, and for a share
        of the tokens where all are wanted."""
        of_turns = bool(self.eta or self.soft_q)
        require_token_share(self.token_share, self.spec, self.reduction, of_turns, self.signals)
        require(not self.replay or self.soft_q is not None, "replay must be 0 without soft_q", self.replay)
        rule, valued = f'gae_lambda must be None without baseline "{VALUE}"', self.baseline == VALUE
        require(valued or self.gae_lambda is None, rule, self.gae_lambda)
        require(self.signals or not self.auto, "auto goes with signals, which it learns from", self.signals)
        require(not (self.signals and self.imitate), "signals go without imitation, which knows no rewards", "imitate")
        rule = f'baseline "{VALUE}" goes without imitation and without signals, which are of single rewards'
        require(not valued or not (self.imitate or self.signals), rule, "signals" if self.signals else "imitate")
        if not of_turns:
            return
        rule = "soft Q-learning (soft_q) goes with" if self.soft_q else "a regression on turns (eta > 0) goes with"
        baselines = ("none",) if self.soft_q else ("leave_one_out", "none")
        require(self.baseline in baselines, f"{rule} baseline {' or '.join(baselines)}", self.baseline)
        require(self.reduction == "sum", f"{rule} reduction sum, its denominator is its own", self.reduction)
        plain = self.spec == PolicyLossSpec(temperature=self.spec.temperature)
        require(plain, f"{rule} the default spec, its distance to another policy is its own", self.spec)
        require(not (self.soft_q and self.signals), "soft Q-learning goes without signals", self.signals)
        require(not (self.soft_q and self.eta), "soft Q-learning goes with eta 0", self.eta)
        weighs = not (self.soft_q and self.imitate) or self.soft_q.cql_coef > 0
        require(weighs, "imitation with soft Q-learning goes with cql_coef > 0, what is imitated", self.soft_q)

    @property
    def soft_q_of_rewards(self) -> bool:
        """Whether soft Q-learning is of rewards, and not of demonstrations."""
        return self.soft_q is not None and not self.imitate


@dataclass(frozen=True)
class Schedule:
    """Steps and step sizes: ``warmup_steps`` to the peak learning rate, then linear to ``final_learning_rate`` of it.

    A step whose loss or gradient is not finite is skipped; more than ``max_skipped_steps`` of them in a row end the
    training. ``optim`` and what follows it: as `make_optimizer` takes them. ``bf16``: forward passes under bfloat16
    autocast.
    """

    max_steps: int
    learning_rate: float
    warmup_steps: int = 5
    final_learning_rate: float = 0.2
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    max_tokens: int = 16384
    max_skipped_steps: int = 3
    optim: str = "adamw_torch"
    optim_args: str = ""
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    optim_offload: bool = False
    bf16: bool = False

    def learning_rate_at(self, step: int) -> float:
        """Of steps 1 .. max_steps."""
        rise = min(1.0, step / max(1, self.warmup_steps))
        return self.learning_rate * rise * (1 - (1 - self.final_learning_rate) * step / self.max_steps)


def credit(batch: PackedBatch, objective: Objective, mean_returns: Sequence[float] = ()) -> tuple[Tensor, Tensor]:
    """Windowed returns and advantages of every turn, both (S, T) float32.

    A turn that nobody else of its group reached is compared with the other groups. With baseline "value",
    ``mean_returns`` from each turn index on are the values, and a `Critic` adds what it sees; without them, before the
    first step, nothing is bootstrapped.
    """
    counts = batch.turn_counts
    if objective.imitate:
        return batch.rewards, batch.turn_mask.float()
    if not len(counts):
        return batch.rewards, batch.rewards
    returns = partial_returns(batch.rewards, objective.policy_class, gamma=objective.gamma, turn_counts=counts)
    if objective.baseline == VALUE and mean_returns:
        known = torch.zeros(batch.rewards.shape[1], dtype=torch.float64)
        known[: len(mean_returns)] = torch.tensor(mean_returns[: len(known)], dtype=torch.float64)
        values = known.float().to(returns.device).expand(returns.shape)
        return returns, of_values(batch.rewards, values, counts, batch.group_ids, objective)
    baseline = "leave_one_out" if objective.baseline == VALUE else objective.baseline
    advantages = turn_advantages(returns, batch.group_ids, baseline, counts, alone="other_groups")
    return returns, advantages * objective.scale


def of_values(
    rewards: Tensor, values: Tensor, turn_counts: Tensor, group_ids: Tensor | None, objective: Objective
) -> Tensor:
    """Advantages (S, T) float32 against ``values`` (S, T), bootstrapped from them where the objective says so."""
    ahead = {} if objective.gae_lambda is None else {"values": values, "gae_lambda": objective.gae_lambda}
    returns = partial_returns(rewards, objective.policy_class, objective.gamma, turn_counts, **ahead)
    return turn_advantages(returns, group_ids, VALUE, turn_counts, values=values, alone="other_groups")


def turn_residuals(batch: PackedBatch, returns: Tensor, objective: Objective, log_ratios: Tensor | None) -> Residuals:
    """What a regression on the turns of a whole batch has left to explain; ``log_ratios`` (S, T) float64, None: 0."""
    groups = None if objective.baseline == "none" else batch.group_ids
    there = batch.sum_of_turns(torch.ones(len(batch.tokens))) > 0  # one that is read in part has turns without tokens
    ratios = torch.zeros_like(returns) if log_ratios is None else log_ratios
    return reference.turn_residuals(ratios, returns, there, groups, objective.eta)


def likelihood(batch: PackedBatch, returns: Tensor, objective: Objective) -> Tensor | None:
    """(S, T) float32: the weight of -l of each turn's tokens, over their number in the batch; None without the term."""
    if not objective.nll_coef:
        return None
    chosen = (batch.turn_mask & (returns > 0)).float()
    tokens = (chosen * batch.sum_of_turns(torch.ones(len(batch.tokens)))).sum().clamp(min=1)
    return objective.nll_coef * chosen / tokens.float()


def live_turns(advantages: Tensor, beside: Tensor | None) -> Tensor:
    """(S, T): the advantage of each turn or, where that is 0, what is learned there ``beside`` it: the weight of its
    `likelihood`, or 1 with a teacher and where soft Q-learning finds it on the way."""
    return advantages if beside is None else advantages.where(advantages != 0, beside)


def turns_with_gradient(batch: PackedBatch, advantages: Tensor, spec: PolicyLossSpec) -> Tensor:
    """(S, T) bool: turns whose advantage is not zero; with a KL or entropy term all of them."""
    return batch.turn_mask if spec.needs_every_row else advantages != 0


def tokens_to_read(batch: PackedBatch, advantages: Tensor, objective: Objective) -> Tensor:
    """(S,) int64: how many of its first tokens a step has to read of each dialogue.

    A dialogue ends with its last turn whose advantage is not zero, and is left out where it has none: what follows has
    no gradient. With a KL or entropy term every assistant token has one; where a dialogue's tokens share a ratio (gspo)
    or a mean (sequence_mean), a dialogue with a gradient is read up to its last turn; every dialogue is for a
    regression whose log ratios are not all 0. The denominator stays that of the whole batch.
    """
    spec = objective.spec
    credited = turns_with_gradient(batch, advantages, spec)
    if objective.reduction == "sequence_mean" or (
        spec.shared == "sequence" and (objective.num_iterations > 1 or spec.opsm_delta)
    ):
        credited = credited.any(1, keepdim=True).expand_as(credited)
    if objective.eta and (objective.num_iterations > 1 or objective.from_start):
        credited = batch.turn_mask
    dialogue_ids = batch.dialogue_ids
    read = of_tokens(credited, batch.turn_ids, dialogue_ids)
    within = torch.arange(len(batch.tokens), device=dialogue_ids.device) - batch.cu_seqlens.long()[dialogue_ids]
    ends = torch.where(read, within + 2, 0)  # the predicted token is read too
    return torch.zeros_like(batch.turn_counts).scatter_reduce(0, dialogue_ids, ends, "amax")


def denominator(batch: PackedBatch, objective: Objective) -> float | None:
    """What the loss is divided by, over all micro-batches of ``batch``: its labels, the dialogues that have one, or for
    soft Q-learning the turns that do; where that imitates, the dialogues times what it weighs their likelihood by."""
    if objective.soft_q and objective.imitate:
        return objective.soft_q.cql_coef * max(1.0, float(len(batch.dialogue_ids[batch.labels >= 0].unique())))
    if objective.soft_q:
        return max(1.0, float((batch.sum_of_turns(torch.ones(len(batch.tokens))) > 0).sum()))
    reduction = objective.reduction
    labels = batch.dialogue_ids[batch.labels >= 0].bincount()
    total = {"token_mean": labels.sum(), "sequence_mean": (labels > 0).sum(), "sequence_sum": (labels > 0).sum()}
    return max(1.0, float(total[reduction])) if reduction in total else None


def require_nonnegative(samples: Sequence[Sample], names: Sequence[str]) -> None:
    """ValueError at the first negative reward: log pi weighted by it is no lower bound of the objective any more."""
    for sample, name in zip(samples, names, strict=True):
        for turn, reward in enumerate(sample.rewards):
            if reward < 0:
                why = "negative ones void the lower bound; allow_negative_rewards permits them"
                rule = f"offline rewards must be >= 0 ({why})"
                raise ValueError(f"{rule}, got {reward} in dialogue {name!r}, turn {turn}")


def require_targets(sample: Sample, name: str, objective: Objective) -> None:
    """ValueError at the first turn of dialogue ``name`` for which soft Q-learning has no target: its window ends at a
    turn of which nothing is read, where the value of what follows would be taken from, or beta makes its reward larger
    than float32 can hold. Nothing is asked of other objectives."""
    if objective.soft_q is None:
        return
    beta = objective.soft_q.beta
    mend = f"where beta {beta:g} divides it (raise it, or scale the rewards down)"
    rule = f"dialogue {name!r}: a reward must be at most {FLOAT32_MAX * beta:.3g} in size {mend}"
    for turn, reward in enumerate(sample.rewards):
        require(abs(reward) <= FLOAT32_MAX * beta, rule, f"{reward:g} at turn {turn}")
    rewards = torch.ones(1, len(sample.rewards))
    lengths = partial_returns(rewards, objective.policy_class)[0].long().tolist() if sample.rewards else []
    read = set(sample.turn_ids)
    for turn, length in enumerate(lengths):
        end = turn + length
        if turn in read and end < len(lengths) and end not in read:
            rule = f"dialogue {name!r}: the window of turn {turn} ends at turn {end}, which must be read for its value"
            mend = "raise max_dialogue_tokens" + ("" if objective.imitate else ", or take policy_class full")
            raise ValueError(f"{rule} in soft Q-learning, got none of its tokens ({mend})")


def warn_if_hardly_credited(samples: Sequence[Sample], objective: Objective) -> None:
    """Warn where rewards come with the last turn only and the policy class looks less far ahead: most turns then learn
    nothing."""
    long = [s for s in samples if len(s.rewards) > 1]
    if not long or any(any(s.rewards[:-1]) for s in long) or not any(s.rewards[-1] for s in long):
        return
    returns, _ = credit(pack(long), objective)
    turns = sum(len(s.rewards) for s in long if s.rewards[-1])
    credited = int((returns != 0).sum())
    if credited < turns:
        seen = f"{objective.policy_class} credits {credited} of {turns} turns, {FullPlanning()} all"
        warnings.warn(f"rewards come with the last turn only: {seen}", stacklevel=2)


def warn_if_equal(samples: Sequence[Sample], objective: Objective) -> None:
    """Warn where all rewards are equal: with 0 nothing is learned, and otherwise a class that looks ahead weighs a turn
    by how many follow it, where supervised fine-tuning weighs them alike."""
    given = {reward for sample in samples for reward in sample.rewards}
    longest = max(samples, key=lambda sample: len(sample.rewards))
    alike = "supervised fine-tuning wants --imitate"
    if given == {0.0}:
        seen = "every reward is 0, so nothing is learned"
        warnings.warn(f"{seen}: ppg-fast score gives rewards; {alike}", stacklevel=2)
    elif len(given) == 1 and not objective.auto and len(longest.rewards) > 1:
        returns, _ = credit(pack([longest]), objective)
        weights = [f"{weight:g}" for weight in returns.flatten().tolist()]
        if len(set(weights)) > 1:
            shown = ", ".join(weights[:3] + (["..."] if len(weights) > 5 else []) + weights[3:][-2:])
            seen = f"every reward is {given.pop():g}, and {objective.policy_class} weighs the turns {shown}"
            warnings.warn(f"{seen}; {alike}", stacklevel=2)
