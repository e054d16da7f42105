"""Dialogues as tokens: one sample per dialogue with explicit turn ids, packed end to end into one row without
padding."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise, takewhile

import torch
from torch import Tensor

from ppg_fast.dialogues import kept_sets
from ppg_fast.functional import Kept
from ppg_fast.reference.turns import sum_of_turns, turn_mask
from ppg_fast.rules import FLOAT32_MAX
from ppg_fast.spec import IGNORE, require

CONTEXT = -1  # turn id of a token the policy did not choose
OF_SAMPLER = {"rollout_logprobs": "rollout log-prob", "entropies": "entropy"}  # one a token, where a sampler gave them


@dataclass
class Sample:
    """One dialogue as tokens; all lists but ``rewards`` have one entry per token.

    ``turn_ids``: the assistant's turn that a token belongs to, its end-of-turn token included, -1 for context.
    ``rewards``: one per turn. ``group_id``: dialogues of one prompt share it. ``rollout_logprobs``: the sampler's
    log-probability of the token itself, in nats, NaN where it told none, not read at context tokens. ``entropies``:
    likewise, of what it was sampled from. ``cut_off``: one per turn, whether a sampler stopped the answer before it
    ended by itself. ``starts``: where its parts begin. A part is what the model sees at once: its positions begin anew,
    and nothing in it attends to another; most dialogues are one. ``kept``: of a truncated sampler, the ids that each
    token was drawn from, in any order; it may end with the last token drawn.
    """

    tokens: list[int]
    turn_ids: list[int]
    rewards: list[float]
    group_id: int
    rollout_logprobs: list[float] | None = None
    cut_off: list[bool] | None = None
    starts: list[int] = field(default_factory=lambda: [0])
    entropies: list[float] | None = None
    kept: list[list[int]] | None = None

    @property
    def longest_part(self) -> int:
        """Tokens of its longest part: the positions that a model needs."""
        return max(stop - start for start, stop in pairwise([*self.starts, len(self.tokens)]))


# Dummy dialogue with zero gradient, for ranks without work.
NOTHING = Sample([0], [CONTEXT], [], 0, rollout_logprobs=[0.0])


@dataclass
class PackedBatch:
    """S dialogues end to end, N tokens. Position i predicts token i + 1 of its own part: ``labels``, ``turn_ids``,
    ``rollout_logprobs`` and ``entropies`` are those of the predicted token, so they go to the loss functions as they
    are.

    Rewards, groups, turns and the loss know dialogues, ``cu_seqlens``; attention and positions know the P >= S parts
    of dialogues, ``part_seqlens`` (`Sample.starts`).
    """

    tokens: Tensor  # (N,) int64
    labels: Tensor  # (N,) int64, -100 where the next token is not the assistant's or there is none
    turn_ids: Tensor  # (N,) int64 of the predicted token, -1 = context
    cu_seqlens: Tensor  # (S + 1,) int32, starts at 0
    part_seqlens: Tensor  # (P + 1,) int32, starts at 0 and holds every one of cu_seqlens
    position_ids: Tensor  # (N,) int64, restarts with each part
    rewards: Tensor  # (S, T) float32, zero beyond a dialogue's turns; T >= 1
    turn_counts: Tensor  # (S,) int64
    group_ids: Tensor  # (S,) int64
    rollout_logprobs: Tensor | None = None  # (N,) float32 in nats, 0 at context
    entropies: Tensor | None = None  # (N,) float32 in nats, of what each token was sampled from, 0 at context
    kept_ids: Tensor | None = None  # (M,) int64 and
    kept_offsets: Tensor | None = None  # (N + 1,) int64: the kept sets, as `Kept` has them, empty at context
    longest_part: int = -1  # tokens; found here, so that a batch on a GPU need not be asked

    def __post_init__(self) -> None:
        if self.longest_part < 0:
            self.longest_part = max(torch.diff(self.part_seqlens).tolist(), default=0)

    @property
    def kept(self) -> Kept | None:
        """What a truncated sampler drew each label from; None: the whole vocabulary."""
        if self.kept_ids is None or self.kept_offsets is None:
            return None
        return Kept(self.kept_ids, self.kept_offsets)

    @property
    def turn_mask(self) -> Tensor:
        """(S, T) bool: whether turn t of dialogue s exists."""
        return turn_mask(self.turn_counts, self.rewards.shape[1])

    @property
    def dialogue_ids(self) -> Tensor:
        """(N,) int64: the dialogue, 0 .. S - 1, that each token belongs to."""
        lengths = torch.diff(self.cu_seqlens).long()
        rows = torch.arange(len(lengths), device=lengths.device)
        return rows.repeat_interleave(lengths, output_size=len(self.tokens))

    def sum_of_turns(self, values: Tensor) -> Tensor:
        """(S, T) float64: the sum of ``values`` (N,) over the tokens of each turn."""
        S, T = self.rewards.shape
        return sum_of_turns(values, self.labels >= 0, self.turn_ids, self.dialogue_ids, (S, T))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        """The same batch on ``device``."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **{name: tensor.to(device, non_blocking=non_blocking) for name, tensor in tensors.items()})

    def part(self, dialogues: Sequence[int], lengths: Tensor | None = None) -> PackedBatch:
        """Some of its dialogues, in the order given, each up to its first ``lengths`` (S,) tokens; by default whole.

        What the last token kept would have predicted is masked. Rewards and turn counts stay whole.
        """
        rows = torch.tensor(dialogues, dtype=torch.int64, device=self.tokens.device)
        starts = self.cu_seqlens.long()[rows]
        sizes = torch.diff(self.cu_seqlens).long()[rows] if lengths is None else lengths[rows]
        ends = sizes.cumsum(0)
        count = int(sizes.sum())
        first = (starts - (ends - sizes)).repeat_interleave(sizes, output_size=count)
        at = torch.arange(count, device=rows.device) + first
        position_ids = self.position_ids[at]
        part_starts = (position_ids == 0).nonzero()[:, 0]
        turn_ids = self.turn_ids[at]
        turn_ids[ends - 1] = CONTEXT
        context = turn_ids == CONTEXT
        kept = kept_sets.chosen(self.kept_ids, self.kept_offsets, at, context)

        def taken(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[at].masked_fill_(context, 0.0)

        return PackedBatch(
            tokens=self.tokens[at],
            labels=self.labels[at].masked_fill_(context, IGNORE),
            turn_ids=turn_ids,
            cu_seqlens=torch.cat([ends.new_zeros(1), ends]).to(torch.int32),
            part_seqlens=torch.cat([part_starts, ends.new_tensor([len(at)])]).to(torch.int32),
            position_ids=position_ids,
            rewards=self.rewards[rows],
            turn_counts=self.turn_counts[rows],
            group_ids=self.group_ids[rows],
            rollout_logprobs=taken(self.rollout_logprobs),
            entropies=taken(self.entropies),
            kept_ids=kept[0],
            kept_offsets=kept[1],
        )


def pack(samples: Sequence[Sample]) -> PackedBatch:
    """Put samples end to end. No samples give a batch without tokens.

    ValueError names the sample and the value: lists of unequal length, a turn id outside -1 .. turns - 1, a reward or a
    log-prob of an assistant token that is not finite, no tokens, log-probs or kept sets in some samples only.
    """
    for index, sample in enumerate(samples):
        _check_sample(sample, index)
    for name in OF_SAMPLER:
        given = {getattr(sample, name) is not None for sample in samples}
        require(len(given) < 2, f"{name} must be given for all samples or for none", "some with and some without")
    lengths = torch.tensor([len(sample.tokens) for sample in samples], dtype=torch.int64)
    ends = lengths.cumsum(0)
    count = int(lengths.sum())
    require(count < 2**31, "a packed batch must have fewer than 2^31 tokens", count)
    starts = (ends - lengths).tolist()
    parts = [first + start for first, sample in zip(starts, samples, strict=True) for start in sample.starts]
    part_ends = torch.tensor([*parts[1:], count][: len(parts)], dtype=torch.int64)
    tokens = torch.tensor([token for sample in samples for token in sample.tokens], dtype=torch.int64)
    own_turns = torch.tensor([turn for sample in samples for turn in sample.turn_ids], dtype=torch.int64)

    def of_next_token(values: Tensor, at_last: float) -> Tensor:
        shifted = values.roll(-1)
        shifted[part_ends - 1] = at_last
        return shifted

    turn_ids = of_next_token(own_turns, CONTEXT)
    labels = of_next_token(tokens, IGNORE).masked_fill_(turn_ids == CONTEXT, IGNORE)

    def of_sampler(name: str) -> Tensor | None:
        if not samples or getattr(samples[0], name) is None:
            return None
        own = torch.tensor([value for sample in samples for value in getattr(sample, name)], dtype=torch.float32)
        return of_next_token(own, 0.0).masked_fill_(turn_ids == CONTEXT, 0.0)

    kept = kept_sets.packed(samples, turn_ids)
    turn_counts = torch.tensor([len(sample.rewards) for sample in samples], dtype=torch.int64)
    rewards = torch.zeros(
        len(samples), max([len(sample.rewards) for sample in samples], default=0) or 1, dtype=torch.float32
    )
    for row, sample in zip(rewards, samples, strict=True):
        row[: len(sample.rewards)] = torch.tensor(sample.rewards, dtype=torch.float32)
    return PackedBatch(
        tokens=tokens,
        labels=labels,
        turn_ids=turn_ids,
        cu_seqlens=torch.cat([ends.new_zeros(1), ends]).to(torch.int32),
        part_seqlens=torch.cat([ends.new_zeros(1), part_ends]).to(torch.int32),
        position_ids=_positions(part_ends),
        rewards=rewards,
        turn_counts=turn_counts,
        group_ids=torch.tensor([sample.group_id for sample in samples], dtype=torch.int64),
        rollout_logprobs=of_sampler("rollout_logprobs"),
        entropies=of_sampler("entropies"),
        kept_ids=kept[0],
        kept_offsets=kept[1],
    )


def _positions(ends: Tensor) -> Tensor:
    """0, 1, 2, ... in each of the parts that end before ``ends`` (P,)."""
    sizes = torch.diff(ends, prepend=ends.new_zeros(1))
    count = int(sizes.sum())
    return torch.arange(count) - (ends - sizes).repeat_interleave(sizes, output_size=count)


def micro_batches(sizes: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Dialogues of ``sizes`` tokens, by their index, in batches of at most ``max_tokens``: as few and then as even as
    two greedy rules make them, the fullest first.

    Longest first, into the fullest batch with room (best fit), decides how many; longest first into the emptiest
    spreads them evenly where that needs no more. Indices in a batch are in order. A dialogue longer than the budget
    comes alone: a turn is credited through all that came before it, so it is never cut, and dropping it would change
    the gradient. ValueError if max_tokens < 1.
    """
    is_count = isinstance(max_tokens, int) and not isinstance(max_tokens, bool) and max_tokens >= 1
    require(is_count, "max_tokens must be an integer >= 1", max_tokens)
    tight = _fill(sizes, max_tokens, [], fullest=True) or []
    even = _fill(sizes, max_tokens, [[] for _ in tight], fullest=False) or tight
    return sorted((sorted(batch) for batch in even), key=lambda batch: (-sum(sizes[i] for i in batch), batch[0]))


def _fill(sizes: Sequence[int], budget: int, batches: list[list[int]], fullest: bool) -> list[list[int]] | None:
    """Positions of ``sizes`` put into ``batches``, longest first; None where they do not hold all and new ones are not
    to be opened."""
    totals = [0] * len(batches)
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        room = [b for b, total in enumerate(totals) if total == 0 or total + sizes[i] <= budget]
        if not room and not fullest:
            return None
        if not room:
            room = [len(batches)]
            batches.append([])
            totals.append(0)
        best = max(room, key=totals.__getitem__) if fullest else min(room, key=totals.__getitem__)
        batches[best].append(i)
        totals[best] += sizes[i]
    return batches


def _check_sample(sample: Sample, index: int) -> None:
    name, turns = f"sample {index}", len(sample.rewards)
    require(bool(sample.tokens), f"{name} must have tokens", sample.tokens)
    starts = sample.starts
    rising = starts[:1] == [0] and all(a < b for a, b in pairwise([*starts, len(sample.tokens)]))
    require(rising, f"{name}: parts must start at 0 and rise below its {len(sample.tokens)} tokens", starts[:9])
    given = len(sample.turn_ids)
    require(given == len(sample.tokens), f"{name} must have one turn id per token: {len(sample.tokens)}", given)
    for turn_id in (min(sample.turn_ids), max(sample.turn_ids)):
        require(
            CONTEXT <= turn_id < turns, f"{name}: a turn id must be -1 or below the number of rewards {turns}", turn_id
        )
    for turn, reward in enumerate(sample.rewards):
        # NaN fails it too
        require(abs(reward) <= FLOAT32_MAX, f"{name}, turn {turn}: a reward must be finite in float32", reward)
    count = len(sample.tokens)
    given = len(sample.kept or ())
    require(given <= count, f"{name} must have at most one kept set per token: {count}", given)
    for field_name, what in OF_SAMPLER.items():
        values = getattr(sample, field_name)
        if values is None:
            continue
        require(len(values) == count, f"{name} must have one {what} per token: {count}", len(values))
        may_lack = field_name == "rollout_logprobs"  # NaN where the sampler told none
        for position, (value, turn) in enumerate(zip(values, sample.turn_ids, strict=True)):
            fine = turn == CONTEXT or math.isfinite(value) or (may_lack and math.isnan(value))
            require(fine, f"{name}, token {position}: {'an' if what[0] == 'e' else 'a'} {what} must be finite", value)


def cut_tokens(sample: Sample, max_tokens: int) -> Sample:
    """The turns that end within ``max_tokens`` tokens of their part, up to the first that does not, and the first in
    any case; 0: all. Rewards stay whole, and so do their windows."""
    turn_ids = sample.turn_ids
    if not max_tokens or len(turn_ids) <= max_tokens:
        return sample
    ends = [
        i
        for i in range(1, len(turn_ids) + 1)
        if turn_ids[i - 1] != CONTEXT and turn_ids[i - 1 : i + 1] != [turn_ids[i - 1]] * 2
    ]
    starts = sample.starts
    fits = takewhile(lambda end: end - starts[bisect_left(starts, end) - 1] <= max_tokens, ends)
    end = max(fits, default=ends[0] if ends else max_tokens)
    kept = [start for start in starts if start < end]
    return replace(sample, tokens=sample.tokens[:end], turn_ids=turn_ids[:end], starts=kept)
