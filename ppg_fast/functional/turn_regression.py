"""Regression on turns: the log ratio of a turn learns what its windowed return says, compared within a group."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from typing_extensions import Unpack

from ppg_fast import ops, reference
from ppg_fast.functional.kept import Kept
from ppg_fast.functional.linear import linear_token_logprobs
from ppg_fast.functional.logits import token_logprobs
from ppg_fast.functional.loss import PolicyLossOutput, check_turn_ids
from ppg_fast.functional.metrics import when_read
from ppg_fast.functional.returns import checked_turns
from ppg_fast.functional.tokens import check_tensor, checked_normalizer, chosen_backend, ordered_sum, per_token
from ppg_fast.functional.turn_tokens import TurnOptions, TurnTokens
from ppg_fast.functional.vocab_shard import VocabShard
from ppg_fast.policy_classes import PolicyClass
from ppg_fast.rules import require_float32
from ppg_fast.spec import MAX_LOG_RATIO, require


class TurnRegressionOptions(TurnOptions, total=False):
    """The keyword arguments that the regressions on turns share, see `turn_regression_loss`."""

    eta: float
    old_logprobs: Tensor | None
    group_ids: Tensor | None
    values: Tensor | None


@dataclass(frozen=True)
class _Turns:
    """The tokens of a call and what their turns are regressed on."""

    at: TurnTokens
    returns: Tensor  # (S, T) float32, minus the values
    old: Tensor | None  # (N,) float32
    group_ids: Tensor | None
    eta: float
    normalizer: float | Tensor | None

    @staticmethod
    def of(
        labels: Tensor,
        rewards: Tensor,
        turn_ids: Tensor,
        policy_class: PolicyClass | str,
        backend: str | None,
        *,
        eta: float = 1.0,
        old_logprobs: Tensor | None = None,
        group_ids: Tensor | None = None,
        values: Tensor | None = None,
        gamma: float = 1.0,
        turn_counts: Tensor | None = None,
        loss_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        normalizer: float | Tensor | None = None,
        validate: bool = False,
    ) -> "_Turns":
        require(isinstance(labels, Tensor), "labels must be a tensor", type(labels).__name__)
        check_turn_ids(turn_ids, labels)
        eta = require_float32("eta", eta, 0.0, open_low=True)
        centred = "none" if group_ids is None else "leave_one_out"
        turns = checked_turns(rewards, policy_class, gamma, turn_counts, centred, group_ids)
        returns = ops.partial_returns(turns, validate, chosen_backend(backend, rewards))
        if values is not None:
            check_tensor("values", values, None, returns.device)
            require(values.shape == returns.shape, f"values must be (B, T) = {tuple(returns.shape)}", values.shape)
            returns = returns - values.detach().float()
        at = TurnTokens.of(labels, turn_ids, turns, loss_mask, cu_seqlens, validate)
        factor = ops.mask_factor(loss_mask, validate)
        returns = returns if factor is None else returns * factor
        old, divisor = per_token("old_logprobs", old_logprobs, labels), None
        if normalizer is not None:
            divisor = checked_normalizer("sum", normalizer, labels.device, validate)
        return _Turns(at, returns, old, turns.group_ids, eta, divisor)

    def output(self, logprobs: Tensor, entropy: Tensor | None) -> PolicyLossOutput:
        """The loss of differentiable log-probs of the labels' shape."""
        l = logprobs.reshape(-1)
        count = self.at.counts()
        ratios = self.at.sums(l - (l.detach() if self.old is None else self.old))
        residuals = reference.turn_residuals(ratios, self.returns, count > 0, self.group_ids, self.eta)
        loss = residuals.loss(self.normalizer).float()
        read = self.at.where_read(logprobs)
        spread = torch.zeros_like(read) if entropy is None else entropy.detach()
        metrics = partial(self._metrics, read.reshape(-1), spread.reshape(-1), count > 0, residuals)
        made_of = {"logprobs": read, "entropy": spread, "old_logprobs": self.old, "returns": self.returns}
        return PolicyLossOutput(loss, read, spread, when_read(metrics, made_of, {}))

    def _metrics(
        self, logprobs: Tensor, entropy: Tensor, there: Tensor, found: reference.Residuals
    ) -> dict[str, Tensor]:
        in_turn = self.at.in_turn
        tokens = in_turn.sum()
        columns = {"entropy": entropy}
        if self.old is not None:
            columns["approx_kl"] = reference.k3(logprobs - self.old, MAX_LOG_RATIO)
        means = {
            name: ordered_sum(torch.where(in_turn, values, 0.0)) / tokens.clamp(min=1)
            for name, values in columns.items()
        }
        before = reference.turn_residuals(torch.zeros_like(self.returns), self.returns, there, self.group_ids, self.eta)
        left = found.loss().detach() / before.loss()
        return {
            "active_tokens": tokens.float(),
            "squared_errors": found.errors.float(),
            "explained": torch.where(before.loss() > 0, 1 - left, 0.0).float(),
            **means,
        }


def turn_regression_loss(
    logits: Tensor,
    labels: Tensor,
    rewards: Tensor,
    turn_ids: Tensor,
    policy_class: PolicyClass | str,
    *,
    temperature: float | Tensor = 1.0,
    logit_softcap: float = 0.0,
    backend: str | None = None,
    **options: Unpack[TurnRegressionOptions],
) -> PolicyLossOutput:
    """Squared error between what two rollouts of a group earn from a turn on and what the policy says of it.

    loss = 1/C sum over groups, turns t and pairs i < j of ((L_it - L_jt) / eta - (R_it - R_jt))^2

    L_it = sum of (l - old) over the active tokens of turn t of dialogue i, R_it = its return over the rewards in S_t
    (`partial_returns`), C = the squared errors that are summed. A pair is compared at the turns that both reached with
    an active token; what no other dialogue of the group reached has no gradient. All pairs cost what the tokens cost.
    With old = l it is a policy gradient: -d loss / d L_it = 2 / (eta C) sum over j of (R_it - R_jt).
    (REFUEL, arXiv:2410.04612, of pairs that branch at the turn)

    Args:
        logits, labels, temperature, logit_softcap, backend: as in `token_logprobs`.
        rewards, turn_ids, policy_class, gamma, turn_counts: as in `partial_policy_loss`.
        eta: > 0, how far the policy moves: at loss 0 it is old exp(eta R) up to what a group shares.
        old_logprobs: (...) of the policy that acted; None = on-policy, l itself, detached.
        group_ids: (B,) integers, equal for the rollouts of one opening. None: no pairs, each turn alone,
            loss = 1/C sum of (L_it / eta - R_it)^2 (A*PO, arXiv:2505.20686, where ``values`` are the optimal ones).
        values: (B, T) of the states that the turns begin in, subtracted from the returns: prefixes of two rollouts
            differ after their first turn.
        normalizer: a number or 0-d tensor in place of C.
        loss_mask, cu_seqlens, validate: as in `policy_loss`.

    Returns: `PolicyLossOutput`; log-probs and entropy zero outside of turns. Metrics: active_tokens, squared_errors
        (C), explained (the share of the loss at L = 0 that is gone), entropy, approx_kl(old, new).
    Raises: as `partial_policy_loss`; ValueError for eta <= 0 and values of another shape.
    """
    turns = _Turns.of(labels, rewards, turn_ids, policy_class, backend, **options)
    validate = options.get("validate", False)
    scale = {"temperature": temperature, "logit_softcap": logit_softcap}
    return turns.output(
        *token_logprobs(logits, turns.at.labels, **scale, entropy=True, validate=validate, backend=backend)  # type: ignore[arg-type]
    )


def linear_turn_regression_loss(
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
    kept: Kept | None = None,
    vocab: VocabShard | None = None,
    temperature: float | Tensor = 1.0,
    logit_softcap: float = 0.0,
    backend: str | None = None,
    **options: Unpack[TurnRegressionOptions],
) -> PolicyLossOutput:
    """`turn_regression_loss` of logits = hidden @ weight.T + bias, which never exist.

    hidden, weight, bias, chunk_rows, max_active_rows, logits_dtype, kept, vocab: as in `linear_token_logprobs`; the
    rest as in `turn_regression_loss`.
    """
    turns = _Turns.of(labels, rewards, turn_ids, policy_class, backend, **options)
    found = linear_token_logprobs(
        hidden, weight, turns.at.labels, bias=bias, chunk_rows=chunk_rows, max_active_rows=max_active_rows,
        logits_dtype=logits_dtype, kept=kept, vocab=vocab, temperature=temperature, logit_softcap=logit_softcap,
        entropy=True, validate=options.get("validate", False), backend=backend,
    )  # fmt: skip
    return turns.output(*found)  # type: ignore[arg-type]


def turn_regression_loss_from_logprobs(
    logprobs: Tensor,
    rewards: Tensor,
    turn_ids: Tensor,
    policy_class: PolicyClass | str,
    **options: Unpack[TurnRegressionOptions],
) -> PolicyLossOutput:
    """`turn_regression_loss` of log-probs (...) that the caller's own forward pass computed, differentiable in them.

    What tokens outside of turns hold is not used. The entropy is zero.
    """
    floats = isinstance(logprobs, Tensor) and logprobs.is_floating_point()
    require(floats, "logprobs must be a floating point tensor", logprobs)
    labels = torch.zeros(logprobs.shape, dtype=torch.int64, device=logprobs.device)
    turns = _Turns.of(labels, rewards, turn_ids, policy_class, None, **options)
    read = turns.at.in_turn.view(logprobs.shape)
    return turns.output(torch.where(read, logprobs.float(), 0.0), None)
