"""What a policy loss is. No torch, no kernels: everything else imports this."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ppg_fast.losses import (
    KL_ESTIMATORS,
    KL_NUMBERS,
    LOSS_NUMBERS,
    LOSS_TYPES,
    PRESETS,
    SHARED,
    WITH_ROLLOUT,
    KLEstimator,
    LossType,
    numbers_of,
)
from ppg_fast.rules import fail as fail
from ppg_fast.rules import require, require_float32, require_one_of
from ppg_fast.rules import require_number as require_number

if TYPE_CHECKING:
    from torch import Tensor

IGNORE = -100  # the label of a token that takes no part
MAX_LOG_RATIO = 20.0  # nats, the default of max_log_ratio; verl's number
# In a divergence a log-prob counts as at least this, in nats, so that a token that one of two distributions excludes
# gives a large number and not inf, and 0 where both do; and what a top-k teacher leaves to all other tokens as one
# counts as at least this, the last digit of a float32 near 1. Mirrored by csrc/cpu/distillation.cpp.
LEAST_LOGPROB, LEAST_TAIL = -1e4, 2.0**-23
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
REDUCTIONS = ("token_mean", "sequence_mean", "sequence_sum", "sum", "none")
BASELINES = ("none", "leave_one_out", "group_mean", "group_std")  # in the order of csrc/args.h, like the reductions
VALUE = "value"  # a baseline besides, of values that the caller has: made before the kernels, which do not know it
# what a NaN among the rollout log-probs of active tokens means, in the order of csrc/args.h
NAN_ROLLOUT = ("keep", "error", "one", "drop")
STD_EPS = 1e-6
# how a spec travels to the kernels, mirrored by csrc/args.h
SPEC_NUMBERS = (
    "clip_low",
    "clip_high",
    "dual_clip",
    "ratio_cap",
    "tau_positive",
    "tau_negative",
    "log_ratio_coef",
    "kl_coef",
    "kl_cap",
    "entropy_coef",
    "z_coef",
    "importance_floor",
    "importance_cap",
    "max_log_ratio",
    "temperature",
    "logit_softcap",
)
SPEC_CHOICES = ("loss_type", "kl_estimator", "nan_rollout", "importance_mode")
IMPORTANCE_MODES = ("truncate", "mask")  # in the order of csrc/args.h
RATIO_REDUCTIONS = ("mean", "sum")
# what a number is where a loss does not use it, which is also the only value it may be given there
UNUSED = {
    "clip_low": 0.2,
    "clip_high": 0.2,
    "dual_clip": 0.0,
    "ratio_cap": 0.0,
    "tau_positive": 1.0,
    "tau_negative": 1.05,
    "k_positive": 2.0,
    "lambda_positive": 3.0,
    "k_negative": 3.0,
    "lambda_negative": 2.0,
}


DEFAULT: Any = None  # of the loss: a number once the spec is made


@dataclass(frozen=True)
class PolicyLossSpec:
    """A policy loss: the surrogate and its numbers.

    loss of a token = importance * value(loss_type) + log_ratio_coef (l - old)^2 + kl_coef KL - entropy_coef H
    + z_coef lse^2

    ``loss_type``: formulas, defaults of its numbers and sources are in `ppg_fast.losses.LOSSES` and docs/losses.md.
    Numbers of the loss, None for its default, refused where it has no use for them: ``clip_low``, ``clip_high``, the
    bounds of its clip or gate; ``dual_clip`` (> 1) of ppo and gspo, ``ratio_cap`` of dppo, off at 0; ``tau_positive``,
    ``tau_negative`` of sapo; ``k_positive``, ``lambda_positive``, ``k_negative``, ``lambda_negative`` of vespo.

    ``kl_coef`` is the weight of ``kl_estimator``(l, ref), which is kept within ``kl_cap`` (0: off), without slope
    beyond; ``entropy_coef`` of the entropy bonus; ``log_ratio_coef`` of the squared log ratio; ``z_coef`` of the
    squared log-sum-exp of the logits (after softcap and temperature).

    The importance weight exp(old - rollout) is on where ``importance_cap`` or ``importance_floor`` is not 0;
    ``importance_mode`` "truncate": it is kept within [floor, cap]; "mask": it is 0 outside of them.

    ``ratio_reduction`` "sum": the ratio of gspo and gspo_turn is that of the whole sequence or turn, exp(sum of (l -
    old)), in place of the geometric mean over its tokens. ``opsm_delta`` (0: off) drops what is off-policy and bad
    (DeepSeek-V3.2, arXiv:2512.02556): the surrogate of a token with A < 0 is 0 where the mean over its sequence of
    (b - l), b the rollout log-prob if given, else the old one, is above it; other terms and denominators stay.

    ``temperature`` is a number, or one per token as a tensor of the labels' shape; logits pass through the softcap
    first and are divided by the temperature then. ``logit_softcap`` is off at 0. Numbers in nats or ratios. Log ratios
    (l - old, also the mean of gspo; old - rollout; ref - l in k3) count as at most ``max_log_ratio`` where they are
    exponentiated, and have no slope beyond, so that an outlier keeps loss and gradient finite.

    ``nan_rollout`` says what a NaN rollout log-prob of an active token is (samplers report none for a token that was
    forced on them): "keep", it stays NaN in the loss and the token's gradient; "error", a ValueError that counts them
    and names the first row (on a GPU this reads the values: one sync); "one", its importance weight is 1, ipo and
    icepop compare with old, opsm_delta with l; "drop", the token is masked: neither loss nor gradient, and it is in no
    count of active tokens (a given normalizer is what it was).
    """

    loss_type: str = "reinforce"
    clip_low: float = DEFAULT
    clip_high: float = DEFAULT
    dual_clip: float = DEFAULT
    kl_coef: float = 0.0
    kl_estimator: str = "k3"
    entropy_coef: float = 0.0
    importance_cap: float = 0.0
    temperature: float | Tensor = 1.0
    logit_softcap: float = 0.0
    nan_rollout: str = "keep"
    ratio_cap: float = DEFAULT
    tau_positive: float = DEFAULT
    tau_negative: float = DEFAULT
    log_ratio_coef: float = 0.0
    kl_cap: float = 0.0
    z_coef: float = 0.0
    importance_floor: float = 0.0
    importance_mode: str = "truncate"
    max_log_ratio: float = MAX_LOG_RATIO
    ratio_reduction: str = "mean"
    opsm_delta: float = 0.0
    k_positive: float = DEFAULT
    lambda_positive: float = DEFAULT
    k_negative: float = DEFAULT
    lambda_negative: float = DEFAULT

    def __post_init__(self) -> None:
        require_one_of("loss_type", self.loss_type, LOSS_TYPES)
        require_one_of("kl_estimator", self.kl_estimator, KL_ESTIMATORS)
        require_one_of("nan_rollout", self.nan_rollout, NAN_ROLLOUT)
        require_one_of("importance_mode", self.importance_mode, IMPORTANCE_MODES)
        require_one_of("ratio_reduction", self.ratio_reduction, RATIO_REDUCTIONS)
        sums = self.ratio_reduction == "mean" or self.loss_type in ("gspo", "gspo_turn")
        rule = f'ratio_reduction must be "mean" for loss_type {self.loss_type}: gspo, gspo_turn have it'
        require(sums, rule, self.ratio_reduction)
        self._own_numbers()
        terms = "kl_coef", "kl_cap", "log_ratio_coef", "z_coef", "importance_floor", "importance_cap", "opsm_delta"
        for name in terms:
            self._number(name, 0.0)
        self._number("entropy_coef", -math.inf)
        self._number("logit_softcap", 0.0)
        self._number("max_log_ratio", 0.0, 80.0, open_low=True)  # its exponential fits float32
        require(not self.kl_cap or bool(self.kl_coef), "kl_cap bounds a KL term and needs kl_coef > 0", self.kl_cap)
        rule = f"importance_floor must be at most importance_cap, {self.importance_cap}"
        require(not self.importance_cap or self.importance_floor <= self.importance_cap, rule, self.importance_floor)
        rule = 'importance_mode "mask" needs importance_floor or importance_cap'
        require(self.weighs_importance or self.importance_mode == "truncate", rule, self.importance_mode)
        # a tensor, and what else has a value a token, is for the ops to check
        t = self.temperature
        if isinstance(t, (int, float)) or not (hasattr(t, "requires_grad") or getattr(t, "shape", ())):
            self._number("temperature", 0.0, open_low=True)

    def _own_numbers(self) -> None:
        """The numbers of this loss: None becomes its default; ValueError for one that it has no use for."""
        uses = numbers_of(self.loss_type)
        for name, unused in UNUSED.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, uses.get(name, unused))
            positive = name.startswith(("tau", "lambda"))
            self._number(name, 0.0, 1.0 if name == "clip_low" else math.inf, open_low=positive)
            value = getattr(self, name)
            if name not in uses and value != unused:
                own = ", ".join(uses) or "no such number"
                fail(f"{name} must be left out: loss_type {self.loss_type} does not use it (it has {own})", value)
        require(not self.dual_clip or self.dual_clip > 1, "dual_clip must be 0 (off) or > 1", self.dual_clip)

    def _number(self, name: str, low: float, high: float = math.inf, *, open_low: bool = False) -> None:
        value = getattr(self, name)
        number = require_float32(name, value, low, high, open_low=open_low)
        if number is not value:
            object.__setattr__(self, name, number)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> PolicyLossSpec:
        """The spec that a trainer's users mean by ``name``, with ``changes``: "grpo", "dapo", "dr_grpo", "gspo",
        "gmpo", "cispo", "ipo", "icepop", "dppo_tv", "dppo_kl", "sapo", "topr", "vespo". Numbers and sources, and the
        reduction that goes with each: `ppg_fast.losses.PRESETS` and docs/losses.md."""
        require_one_of("a preset", name, tuple(PRESETS))
        return cls(**{**PRESETS[name].numbers, **changes})

    @property
    def needs_every_row(self) -> bool:
        """Whether a row of zero advantage still has a gradient."""
        return bool(self.kl_coef or self.entropy_coef or self.log_ratio_coef or self.z_coef)

    @property
    def weighs_importance(self) -> bool:
        """Whether the importance weight against the sampler is on."""
        return bool(self.importance_cap or self.importance_floor)

    @property
    def shared(self) -> str:
        """Whose tokens' log-probs the loss of one of them needs: "" (its own), "turn" or "sequence"."""
        return "sequence" if self.opsm_delta else SHARED.get(self.loss_type, "")

    @property
    def needs_turn_ids(self) -> bool:
        """Whether the tokens of a turn share a ratio."""
        return SHARED.get(self.loss_type) == "turn"

    @property
    def reads_rollout(self) -> bool:
        """Whether rollout log-probs enter the loss."""
        return self.weighs_importance or self.loss_type in WITH_ROLLOUT or bool(self.opsm_delta)

    @property
    def numbers(self) -> list[float]:
        """The numbers of a spec whose temperature is one, in the order of SPEC_NUMBERS: how kernels take them."""
        return [getattr(self, name) for name in SPEC_NUMBERS]

    @property
    def choices(self) -> list[int]:
        """The enums of a spec, in the order of SPEC_CHOICES."""
        return [
            LOSS_NUMBERS[self.loss_type],
            KL_NUMBERS[self.kl_estimator],
            NAN_ROLLOUT.index(self.nan_rollout),
            IMPORTANCE_MODES.index(self.importance_mode),
        ]

    @classmethod
    def of(cls, numbers: Sequence[float], choices: Sequence[int]) -> PolicyLossSpec:
        """The spec that `numbers` and `choices` describe."""
        loss_type, kl_estimator = LossType(choices[0]).name.lower(), KLEstimator(choices[1]).name.lower()
        named = dict(zip(SPEC_NUMBERS, numbers, strict=True))
        modes = {"nan_rollout": NAN_ROLLOUT[choices[2]], "importance_mode": IMPORTANCE_MODES[choices[3]]}
        return cls(loss_type=loss_type, kl_estimator=kl_estimator, **modes, **named)


def require_token_share(share: float, spec: PolicyLossSpec, reduction: str, of_turns: bool, measures: bool) -> None:
    """ValueError for a share of an answer's tokens outside of (0, 1], and for one below 1 beside what needs them all: a
    ratio or a regression of whole answers, a denominator for each dialogue, signals of whole answers."""
    require_number("token_share", share, 0.0, 1.0, open_low=True)
    ratio = f"loss_type {spec.loss_type}" if not spec.opsm_delta else "opsm_delta"
    for found, what in (
        (of_turns, "a loss of whole turns (turn_regression, soft_q)"),
        (spec.shared, f"{ratio}, whose tokens share a ratio"),
        (reduction == "sequence_mean", "reduction sequence_mean, whose denominator is each dialogue's own"),
        (measures, "policy_class auto or signals, which read whole answers"),
    ):
        require(share == 1 or not found, f"token_share must be 1 with {what}", share)


@dataclass(frozen=True)
class SoftQSpec:
    """The numbers of soft Q-learning on the logits, see `soft_q_loss`.

    ``beta`` > 0 is the strength of the KL to the reference in units of the reward: the optimum is the reference times
    exp(Q / beta). ``cql_coef`` is the weight of -l of the tokens that were taken (conservative Q-learning), off at 0.
    Beyond ``max_residual`` nats, off at 0, a residual pulls no harder (Huber's loss). ``ema`` in [0, 1) is for who
    trains: how much of the target network that ``target_lse`` comes from stays at a step; at 0 there is none, and the
    policy itself, detached, is the target.
    """

    beta: float = 0.1
    cql_coef: float = 0.0
    max_residual: float = 0.0
    ema: float = 0.0

    def __post_init__(self) -> None:
        for name in ("beta", "cql_coef", "max_residual"):
            number = require_float32(name, getattr(self, name), 0.0, open_low=name == "beta")
            object.__setattr__(self, name, number)
        object.__setattr__(self, "ema", require_number("ema", self.ema, 0.0, 1.0))
        require(self.ema < 1, "ema must be < 1: at 1 the target would never move", self.ema)
