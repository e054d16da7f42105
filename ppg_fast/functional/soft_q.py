"""Soft Q-learning on the logits: a turn's log-sum-exp is its value, its log-probs are its advantages."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import Unpack

from ppg_fast import ops
from ppg_fast.contract import Turns
from ppg_fast.functional.linear import linear_token_logprobs
from ppg_fast.functional.logits import token_logprobs
from ppg_fast.functional.loss import check_turn_ids
from ppg_fast.functional.metrics import when_read
from ppg_fast.functional.returns import checked_turns
from ppg_fast.functional.tokens import (
    check_tensor,
    checked_normalizer,
    chosen_backend,
    ordered_sum,
    per_token,
    readable,
)
from ppg_fast.functional.turn_tokens import TurnOptions, TurnTokens
from ppg_fast.functional.vocab_shard import VocabShard
from ppg_fast.ops.checks import check_reward_size, check_rewards
from ppg_fast.policy_classes import PolicyClass
from ppg_fast.policy_classes import policy_class as named_policy_class
from ppg_fast.spec import SoftQSpec, fail, require


class SoftQOutput(NamedTuple):
    """What a soft Q loss returns; the loss alone is differentiable.

    ``loss``: 0-d float32. ``logprobs``, ``lse``: float32 of the labels' shape, in nats, 0 outside of turns.
    ``values``: (B, T) float32, beta u_t + offsets_t, what a turn's state is worth in units of the reward, and
    ``residuals``: (B, T) float32, delta_t in nats; both 0 where a turn has no token.
    ``metrics``: 0-d float32 tensors by name, on a GPU computed when they are read: active_tokens, turns (C),
        residual (root mean square over the turns), value and log_ratio (means over the turns).
    """

    loss: Tensor
    logprobs: Tensor
    lse: Tensor
    values: Tensor
    residuals: Tensor
    metrics: Mapping[str, Tensor]


class SoftQOptions(TurnOptions, total=False):
    """The keyword arguments that the soft Q losses share, see `soft_q_loss`."""

    ref_logprobs: Tensor | None
    ref_lse: Tensor | None
    target_lse: Tensor | None
    offsets: Tensor | None
    spec: SoftQSpec | None


@dataclass(frozen=True)
class _Turns:
    """The tokens of a call and what their turns are compared with."""

    at: TurnTokens
    turns: Turns
    backend: str
    first: Tensor  # (S, T) int64, the number of a turn's first token, N where it has none
    ends: Tensor  # (S, T) int64, the turn that the window of each turn ends before
    silent: Tensor  # (S, T + 1) bool, a turn of the dialogue without a token, so without a value
    ref_logprobs: Tensor  # (N,) float32
    ref_lse: Tensor  # (N,) float32
    target_lse: Tensor | None  # (N,) float32
    offsets: Tensor  # (S, T + 1) float64 in nats, 0 at the end of the dialogue and beyond
    spec: SoftQSpec
    normalizer: float | Tensor | None

    @staticmethod
    def of(
        labels: Tensor,
        rewards: Tensor,
        turn_ids: Tensor,
        policy_class: PolicyClass | str,
        backend: str | None,
        *,
        ref_logprobs: Tensor | None = None,
        ref_lse: Tensor | None = None,
        target_lse: Tensor | None = None,
        offsets: Tensor | None = None,
        spec: SoftQSpec | None = None,
        gamma: float = 1.0,
        turn_counts: Tensor | None = None,
        loss_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        normalizer: float | Tensor | None = None,
        validate: bool = False,
    ) -> "_Turns":
        require(isinstance(labels, Tensor), "labels must be a tensor", type(labels).__name__)
        check_turn_ids(turn_ids, labels)
        spec = SoftQSpec() if spec is None else spec
        require(isinstance(spec, SoftQSpec), "spec must be a SoftQSpec", type(spec).__name__)
        given = {"ref_logprobs": ref_logprobs, "ref_lse": ref_lse}
        for name, value in given.items():
            require(value is not None, f"soft Q-learning needs {name} (token_logprobs has lse=True)", value)
        ref, of_ref, target = (per_token(n, v, labels) for n, v in {**given, "target_lse": target_lse}.items())
        assert ref is not None
        assert of_ref is not None
        rule = "the policy class of soft Q-learning must be a window of turns (greedy, lookahead, segment, full)"
        require(named_policy_class(policy_class).is_window, rule, str(policy_class))
        turns = checked_turns(rewards, policy_class, gamma, turn_counts)
        if readable(labels, validate):
            check_rewards(turns.rewards, turns.turn_counts, turns.segment_ids)
            check_reward_size(turns.rewards, turns.turn_counts, spec.beta)
        at = TurnTokens.of(labels, turn_ids, turns, loss_mask, cu_seqlens, validate)
        ones, backend = torch.ones_like(turns.rewards), chosen_backend(backend, rewards)
        lengths = ops.partial_returns(turns._replace(rewards=ones, gamma=1.0), False, backend)
        if (factor := ops.mask_factor(loss_mask, validate)) is not None:
            turns = turns._replace(rewards=turns.rewards * factor)
        exists, first = lengths > 0, at.first_tokens()
        silent = torch.nn.functional.pad(exists & (first == labels.numel()), (0, 1))
        ends = torch.arange(at.shape[1], device=lengths.device) + lengths.long()
        if readable(labels, validate):
            _check_ends(silent.gather(1, ends) & (first < labels.numel()), ends)
        divisor = None if normalizer is None else checked_normalizer("sum", normalizer, labels.device, validate)
        offsets = _checked_offsets(offsets, exists) / spec.beta
        known = ref, of_ref, target
        return _Turns(at, turns, backend, first, ends, silent, *known, offsets, spec, divisor)

    def output(self, logprobs: Tensor, lse: Tensor) -> SoftQOutput:
        """The loss of differentiable log-probs and log-sum-exps of the labels' shape."""
        l, z, spec, there = logprobs.reshape(-1), lse.reshape(-1), self.spec, self.first < self.at.in_turn.numel()
        ratios, value = self.at.sums(l - self.ref_logprobs), self._of_first(z - self.ref_lse)
        bootstrap = value.detach() if self.target_lse is None else self._of_first(self.target_lse - self.ref_lse)
        targets = self._targets(ratios.detach(), bootstrap)
        residuals = torch.where(there, self.offsets[:, :-1] + value + ratios - targets, 0.0)
        errors, most = residuals.square() / 2, spec.max_residual
        if most:
            size = residuals.abs()
            errors = torch.where(size > most, most * (size - most / 2), errors)
        total = ordered_sum(errors.flatten())
        if spec.cql_coef:
            total = total - spec.cql_coef * ordered_sum(self.at.sums(l).flatten())
        loss = (total / (there.sum().clamp(min=1) if self.normalizer is None else self.normalizer)).float()
        values = torch.where(there, spec.beta * (value.detach() + self.offsets[:, :-1]), 0.0).float()
        left, ratios = residuals.detach().float(), ratios.detach()
        metrics = partial(_metrics, self.at.in_turn, there, values, left, ratios)
        lazy = when_read(metrics, {"values": values, "residuals": left}, {})
        return SoftQOutput(loss, self.at.where_read(logprobs), self.at.where_read(lse), values, left, lazy)

    def _of_first(self, values: Tensor) -> Tensor:
        """(S, T) float64, the value (N,) at each turn's first token; 0 where it has none."""
        return torch.nn.functional.pad(values, (0, 1))[self.first].double()

    def _targets(self, ratios: Tensor, bootstrap: Tensor) -> Tensor:
        """y_t of every turn in nats, (S, T) float64: what the window earns and what the state behind it is worth."""
        turns, beta = self.turns, self.spec.beta
        known = ratios.isfinite()
        earned = turns.rewards.double() / beta
        rho = (earned - torch.where(known, ratios, 0.0)).float()
        windowed = ops.partial_returns(turns._replace(rewards=rho), False, self.backend).double()
        unknown = turns._replace(rewards=(~known).float(), gamma=1.0)
        # the turn's own log ratio is what is learned: it is no part of its target, but NaN makes NaN of every window
        windowed = torch.where(ops.partial_returns(unknown, False, self.backend) > 0, torch.nan, windowed)
        worth = torch.nn.functional.pad(bootstrap, (0, 1)) + self.offsets
        at_end = torch.where(self.silent, torch.nan, worth).gather(1, self.ends)
        steps = self.ends - torch.arange(self.ends.shape[1], device=self.ends.device)
        return windowed - rho.double() + earned + turns.gamma ** steps.double() * at_end


def _checked_offsets(offsets: Tensor | None, exists: Tensor) -> Tensor:
    """(S, T + 1) float64, the offset of each turn that is there, 0 elsewhere and at the end of the dialogue."""
    if offsets is None:
        return torch.zeros(exists.shape[0], exists.shape[1] + 1, dtype=torch.float64, device=exists.device)
    check_tensor("offsets", offsets, None, exists.device)
    rule = f"offsets must be (T,) = ({exists.shape[1]},), one for each turn index"
    require(offsets.shape == exists.shape[1:], rule, tuple(offsets.shape))
    if offsets.is_cpu:
        require(bool(offsets.isfinite().all()), "offsets must be finite", offsets.tolist())
    return torch.nn.functional.pad(torch.where(exists, offsets.detach().double(), 0.0), (0, 1))


def _check_ends(valueless: Tensor, ends: Tensor) -> None:
    """ValueError where the window of a turn ends at a turn that has no active token to take a value from."""
    if valueless.any():
        b, t = (int(i) for i in valueless.nonzero()[0])
        rule = (
            "the turn behind a window must have an active token, whose log-sum-exp is its value (give turn_counts, or "
            "a longer window)"
        )
        fail(rule, f"none in turn {int(ends[b, t])} of dialogue {b}")


def _metrics(in_turn: Tensor, there: Tensor, values: Tensor, residuals: Tensor, ratios: Tensor) -> dict[str, Tensor]:
    turns = there.sum().clamp(min=1)
    means = ordered_sum(torch.stack([residuals.double().square(), values.double(), ratios]).flatten(1)) / turns
    found = {"active_tokens": in_turn.sum(), "turns": there.sum(), "residual": means[0].sqrt()}
    return {name: number.float() for name, number in {**found, "value": means[1], "log_ratio": means[2]}.items()}


def soft_q_loss(
    logits: Tensor,
    labels: Tensor,
    rewards: Tensor,
    turn_ids: Tensor,
    policy_class: PolicyClass | str,
    *,
    temperature: float | Tensor = 1.0,
    logit_softcap: float = 0.0,
    backend: str | None = None,
    **options: Unpack[SoftQOptions],
) -> SoftQOutput:
    """Soft Q-learning on the logits: what a turn's tokens and its state say, against the rewards of its window.

    L_t = sum of (l - l_ref) over the turn's active tokens, u_t = lse - lse_ref at the first one, c_t = offset / beta

    y_t = sum over k in S_t of gamma^(k-t) (r_k / beta - [k > t] L_k) + gamma^n (u_(t+n) + c_(t+n))     no gradient
    delta_t = c_t + u_t + L_t - y_t,    loss = 1/C (sum over turns of delta_t^2 / 2 - cql_coef sum of l)

    n = the turns of the window S_t; behind the last turn u = c = 0; C = the turns that have a token. softmax(z) is the
    policy, V_t = beta (u_t + c_t) its value, Q - V = beta L_t; at the reference all are 0. The gradient is delta_t / C
    at each l of the turn and at lse of its first token. At delta = 0 it is the soft optimum of the window's problem,
    whoever acted: no old log-probs, no importance weights.

    Args:
        logits, labels, temperature, logit_softcap, backend: as in `token_logprobs`; lse is that of z there.
        rewards, turn_ids, gamma, turn_counts: as in `partial_policy_loss`.
        policy_class: as in `partial_returns`, but for a RewardMask and LagWeights: the window must be one run of
            turns.
        ref_logprobs, ref_lse: (...) of the reference, at the same temperature; both must be given.
        target_lse: (...) of a target network, for u of the state behind the window; None: the policy's, detached.
        offsets: (T,) in units of the reward, what a turn of that index is worth, for instance a running mean of the
            returns: it moves no optimum, but without it the logits have to learn what all answers share.
        spec: beta and the other numbers, default ``SoftQSpec()``.
        normalizer: a number or 0-d tensor in place of C.
        loss_mask, cu_seqlens, validate: as in `policy_loss`.

    Returns: `SoftQOutput`.
    Raises: as `partial_policy_loss`; ValueError for a missing reference, a RewardMask or LagWeights, offsets of another
        shape and a window that ends at a turn without an active token (on a GPU without ``validate``: NaN), and for a
        reward that beta makes too large for float32 (there: not finite).
    """
    turns = _Turns.of(labels, rewards, turn_ids, policy_class, backend, **options)
    found = token_logprobs(
        logits, turns.at.labels, temperature=temperature, logit_softcap=logit_softcap, lse=True,
        validate=options.get("validate", False), backend=backend,
    )  # fmt: skip
    return turns.output(*found)


def linear_soft_q_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    rewards: Tensor,
    turn_ids: Tensor,
    policy_class: PolicyClass | str,
    *,
    bias: Tensor | None = None,
    chunk_rows: int | None = None,
    max_active_rows: int | None = None,
    logits_dtype: torch.dtype | str | None = None,
    vocab: VocabShard | None = None,
    temperature: float | Tensor = 1.0,
    logit_softcap: float = 0.0,
    backend: str | None = None,
    **options: Unpack[SoftQOptions],
) -> SoftQOutput:
    """`soft_q_loss` of logits = hidden @ weight.T + bias, which never exist.

    hidden, weight, bias, chunk_rows, max_active_rows, logits_dtype, vocab: as in `linear_token_logprobs`; the rest as
    in `soft_q_loss`.
    """
    turns = _Turns.of(labels, rewards, turn_ids, policy_class, backend, **options)
    found = linear_token_logprobs(
        hidden, weight, turns.at.labels, bias=bias, chunk_rows=chunk_rows, max_active_rows=max_active_rows,
        logits_dtype=logits_dtype, vocab=vocab, temperature=temperature, logit_softcap=logit_softcap, lse=True,
        validate=options.get("validate", False), backend=backend,
    )  # fmt: skip
    return turns.output(*found)


def soft_q_loss_from_logprobs(
    logprobs: Tensor,
    lse: Tensor,
    rewards: Tensor,
    turn_ids: Tensor,
    policy_class: PolicyClass | str,
    **options: Unpack[SoftQOptions],
) -> SoftQOutput:
    """`soft_q_loss` of log-probs and log-sum-exps (...) that the caller's own forward pass computed, differentiable in
    both. What tokens outside of turns hold is not used."""
    floats = isinstance(logprobs, Tensor) and logprobs.is_floating_point()
    require(floats, "logprobs must be a floating point tensor", logprobs)
    check_tensor("lse", lse, logprobs.shape, logprobs.device)
    labels = torch.zeros(logprobs.shape, dtype=torch.int64, device=logprobs.device)
    turns = _Turns.of(labels, rewards, turn_ids, policy_class, None, **options)
    read = turns.at.in_turn.view(logprobs.shape)
    return turns.output(*(torch.where(read, values.float(), 0.0) for values in (logprobs, lse)))
