"""`--policy-class auto`: signal and noise of every policy class, from what one training step computes anyway, and the
choice among them.

The gradient of log p with respect to a token's logits is e_y - p, and two tokens that the policy chose in the same
context have, with n = |e_y - p|^2 = sum p^2 - 2 p_y + 1,

    <e_y - p, e_y' - p> = 1[y = y'] - p_y - p_y' + sum p^2 = 1[y = y'] - 1 + (n + n') / 2.

So with each token's label and its score norm n the inner product of any two dialogues' gradients is known in logit
space, for every class at once: a class only changes the advantages that the scores are multiplied with. Averaged over
pairs of DIFFERENT dialogues it is an unbiased estimate of <G_S, G_S'>, the expected gradients' inner product (a
U-statistic: their noise is independent); a dialogue with itself gives E|g_S|^2, signal plus noise. That is signal,
noise, and, through <G_S, G_full>, bias.

What it assumes. Logit space stands for parameter space: the tokens of one context (the partner's last message and the
answer so far) share their parameters, others share none. Exact for a tabular policy over such contexts. In a network
contexts share parameters too: signal then adds up over contexts faster than noise does, so the estimate takes a class
for noisier, relative to its signal, than it is. Where a partner never says the same twice, no pair is found beyond the
opening: ``coverage`` says for how many of the tokens there was one, and where it is low nothing is known of bias and
the chooser stays. With a leave-one-out baseline, dialogues of one group are not quite independent: signals come out
larger by a share of at most 1 / (G - 1)^2, the same for every class, and noise smaller by |G_S|^2 / (G - 1).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppg_fast.dialogues.packing import CONTEXT, PackedBatch
from ppg_fast.policy_classes import CANDIDATES, PolicyClass
from ppg_fast.spec import require


@dataclass(frozen=True)
class Signals:
    """Of C classes at one policy. ``inner`` (C, C): estimates of <G_S, G_S'>; ``square`` (C,): of E|g_S|^2 of one
    dialogue; float64.

    ``dialogues``: how many there were. ``coverage``: share of the tokens whose context another dialogue shared.
    """

    inner: Tensor
    square: Tensor
    dialogues: int
    coverage: float

    @property
    def noise(self) -> Tensor:
        """(C,) tr Cov of one dialogue's gradient."""
        return (self.square - self.inner.diagonal()).clamp(min=0)

    @property
    def signal_to_noise(self) -> Tensor:
        """(C,) |G_S|^2 / tr Cov of the mean over the dialogues; an estimate of the signal may be negative."""
        return self.inner.diagonal() * self.dialogues / self.noise.clamp(min=1e-300)

    @property
    def length(self) -> Tensor:
        """(C,) root mean square length of the mean over the dialogues, sqrt(|G_S|^2 + tr Cov / dialogues)."""
        return (self.inner.diagonal().clamp(min=0) + self.noise / self.dialogues).sqrt()

    def alignment(self, full: int) -> Tensor:
        """(C,) <G_S, G_full> / `length`, ``full`` the row of full planning.

        Divided by |G_full| it is the expected cosine between a batch's gradient and the true one, to first order.
        """
        return self.inner[:, full] / self.length.clamp(min=1e-150)


def context_ids(batch: PackedBatch) -> Tensor:
    """(N,) int64, equal where the predicted tokens follow the same words: the partner's last message and the answer so
    far."""
    turns, starts, ids = batch.turn_ids.tolist(), set(batch.part_seqlens.tolist()), []
    own, value = CONTEXT, 0
    for position, token in enumerate(batch.tokens.tolist()):
        turn = CONTEXT if position in starts else turns[position - 1]  # of the token itself
        if position in starts or (turn == CONTEXT and own != CONTEXT):
            value = 0
        value, own = hash((value, token)), turn
        ids.append(value)
    return torch.tensor(ids, dtype=torch.int64)


def measure_signals(
    contexts: Tensor, dialogues: Tensor, labels: Tensor, score_norms: Tensor, advantages: Tensor, count: int
) -> Signals:
    """Signal and noise of C classes from the N tokens that ``count`` dialogues' policies chose.

    Args:
        contexts: (N,) int64, equal for tokens chosen in one context, as `context_ids` gives them.
        dialogues: (N,) int64, the dialogue of each token.
        labels: (N,) int64, the tokens; score_norms: (N,) their sum p^2 - 2 p_y + 1.
        advantages: (C, N), what each class credits the token's turn with.

    Returns: Signals; zeros where there is no token.
    """
    norms, A = score_norms.double(), advantages.double()
    context = torch.unique(contexts, return_inverse=True)[1]
    occurrences, own_context = torch.unique(torch.stack([context, dialogues]), dim=1, return_inverse=True)
    all_pairs, own = (_pairs(block, labels, norms, A) for block in (context, own_context))
    sharing = occurrences[0].bincount()  # dialogues in which a context occurs
    coverage = float((sharing[context] > 1).double().mean()) if len(context) else 0.0
    return Signals((all_pairs - own) / max(1, count * (count - 1)), own.diagonal() / max(1, count), count, coverage)


def _pairs(block: Tensor, labels: Tensor, norms: Tensor, advantages: Tensor) -> Tensor:
    """(C, C) sum over all pairs (i, j) of one block, i = j included, of A_i A'_j (1[y = y'] - 1 + (n_i + n_j) / 2)."""
    blocks = int(block.max()) + 1 if len(block) else 0
    same = torch.unique(torch.stack([block, labels]), dim=1, return_inverse=True)[1]
    words = int(same.max()) + 1 if len(same) else 0

    by_word, by_block = _totals(advantages, same, words), _totals(advantages, block, blocks)
    shift = _totals(advantages * (norms - 1) / 2, block, blocks) @ by_block.T
    return by_word @ by_word.T + shift + shift.T


def _totals(values: Tensor, index: Tensor, size: int) -> Tensor:
    """(C, size) sums of the columns of ``values`` (C, N) by ``index``. NumPy's, since torch's deterministic index_add
    is slow."""
    return torch.from_numpy(np.stack([np.bincount(index.numpy(), row.numpy(), size) for row in values]))


class WindowChooser:
    """Which of ``candidates`` to train with next; with ``fixed``, that class whatever is seen. Same observations, same
    choices.

    The figure of merit of a class is its alignment, the expected cosine of its batch gradient with the true one, up to
    the factor |G_full| that all have in common:

        <G_S, G_full> / sqrt(|G_S|^2 + tr Cov_S / dialogues)

    Bias lowers the numerator (below zero where the class moves away from the return), noise raises the denominator,
    and it is proportional to what a step of given length gains. What is observed is averaged over the last ``memory``
    steps. ``current`` is the best class, unless its lead over the one before is less than ``margin`` of it; it does not
    wait for a lead that is statistically clear (docs/log.md says what was tried). It begins with full planning, which
    has no bias.
    """

    def __init__(
        self,
        candidates: Sequence[PolicyClass] = CANDIDATES,
        *,
        fixed: PolicyClass | None = None,
        memory: float = 30.0,
        margin: float = 0.05,
        min_coverage: float = 0.5,
    ) -> None:
        self.candidates, self.names = list(candidates), [str(c) for c in candidates]
        require("full" in self.names, "the candidates of auto must include full planning", self.names)
        require(memory >= 1, "memory must be at least one step", memory)
        self.fixed, self.keep, self.margin, self.min_coverage = fixed, 1 - 1 / memory, margin, min_coverage
        self.full = self.chosen = self.names.index("full")
        count = len(self.names)
        self.weight, self.dialogues = 0.0, 1
        self.inner = torch.zeros(count, count, dtype=torch.float64)
        self.square = torch.zeros(count, dtype=torch.float64)

    @property
    def current(self) -> PolicyClass:
        """What the next step should credit."""
        return self.fixed or self.candidates[self.chosen]

    @property
    def scale(self) -> float:
        """What the next step should multiply the advantages of `current` with: its gradients are then as long as those
        of full planning.

        Adam divides by the gradients it remembers: after a class of large ones, those of a class with less noise would
        hardly move it.
        """
        if self.fixed or self.chosen == self.full:
            return 1.0
        lengths = self._average().length
        return float(lengths[self.full] / lengths[self.chosen])

    def _average(self) -> Signals:
        return Signals(self.inner / self.weight, self.square / self.weight, self.dialogues, coverage=1.0)

    def observe(self, signals: Signals) -> dict[str, Any]:
        """Take in one step's signals; metrics for the log, ``auto/reason`` where the class changes. ``policy_class`` is
        the next one."""
        row: dict[str, Any] = {"policy_class": str(self.current), "auto/coverage": signals.coverage}
        finite = bool(signals.inner.isfinite().all() and signals.square.isfinite().all())  # else it would stay so
        if signals.coverage < self.min_coverage or not (finite and signals.square[self.full] > 0):
            return row
        self.weight, self.dialogues = self.keep * self.weight + 1 - self.keep, signals.dialogues
        for total, value in ((self.inner, signals.inner), (self.square, signals.square)):
            total.mul_(self.keep).add_(value, alpha=1 - self.keep)
        average = self._average()
        merit = average.alignment(self.full)
        for what, values in (("alignment", merit), ("signal_to_noise", average.signal_to_noise)):
            row |= {f"auto/{what}/{n}": float(x) for n, x in zip(self.names, values, strict=True)}
        if self.fixed:
            return row
        best = int(merit.argmax())
        before, after = float(merit[self.chosen]), float(merit[best])
        if after > 0 and after - before > self.margin * after:  # below zero nothing is known of any
            row["auto/reason"] = (
                f"{self.names[self.chosen]} -> {self.names[best]}: alignment {after:.3g} against {before:.3g}"
            )
            self.chosen = best
        return {**row, "policy_class": self.names[self.chosen], "auto/scale": self.scale}

    def state_dict(self) -> dict[str, Any]:
        """Everything that choices depend on, of plain types and tensors."""
        names = ("chosen", "weight", "dialogues", "inner", "square")
        values = {name: getattr(self, name) for name in names}
        return {"names": self.names, **{n: v.clone() if isinstance(v, Tensor) else v for n, v in values.items()}}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave; ValueError for other candidates."""
        rule = f"auto goes on with the candidates it began with, {saved['names']}"
        require(saved["names"] == self.names, rule, self.names)
        for name, value in saved.items():
            setattr(self, name, value.clone() if isinstance(value, Tensor) else value)
