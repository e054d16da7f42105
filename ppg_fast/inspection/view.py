"""What is shown of one dialogue, and how it is had from the packed batch that a training step reads."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ppg_fast.dialogues.conversation import function_of
from ppg_fast.dialogues.message import Message
from ppg_fast.dialogues.packing import CONTEXT, PackedBatch
from ppg_fast.functional import partial_returns
from ppg_fast.inspection.pieces import TokenTexts, runs
from ppg_fast.policy_classes import FullPlanning, Greedy, Lookahead, PolicyClass, Segment
from ppg_fast.spec import IGNORE
from ppg_fast.training.objective import Objective, credit, likelihood, live_turns, tokens_to_read

ADVANTAGE = "advantage"  # in place of "weight" where it is one number of many, which changes as the policy learns
BESIDE = (Greedy(), Lookahead(3), Segment(4), FullPlanning())  # classes beside the one that trains


@dataclass(frozen=True)
class Piece:
    """A token, or several that share a character. ``turn``: whose answer it is, -1 for context. ``trained``: whether
    the loss has its log-prob. ``ends``: the token that ends an answer. ``read``: whether a training step reads it.
    """

    text: str
    ids: tuple[int, ...]
    names: tuple[str, ...]
    position: int
    part: int = 0
    turn: int = CONTEXT
    trained: bool = False
    special: bool = False
    ends: bool = False
    read: bool = True


@dataclass(frozen=True)
class TurnRow:
    """One turn: tokens that train, reward, windowed return by policy class, what is subtracted from it, and what its
    log-prob is weighted with; by soft Q-learning at the weights of the start."""

    turn: int
    tokens: int
    part: int | None  # None where nothing of it trains
    reward: float | None
    returns: Mapping[str, float]
    baseline: float
    weight: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class View:
    """One dialogue or opening. ``facts``: (name, value) lines. ``refusal``: why training leaves it out. ``tail``: role
    and text of messages that are not read, ``why`` they are not. ``chosen``: the policy class that trains.
    ``weighed``: the name of the rows' weight."""

    title: str
    facts: tuple[tuple[str, str], ...]
    pieces: tuple[Piece, ...]
    rows: tuple[TurnRow, ...] = ()
    chosen: str = ""
    baseline: str = "none"
    weighed: str = "weight"
    refusal: str = ""
    tail: tuple[tuple[str, str], ...] = ()
    why: str = ""


def pieces_of(batch: PackedBatch, row: int, length: int, texts: TokenTexts, ends: Sequence[int]) -> list[Piece]:
    """The tokens of dialogue ``row`` of ``batch``: trained are those that a position before them has as its label.

    ``length``: how many of them a step reads.
    """
    start, stop = batch.cu_seqlens[row : row + 2].tolist()
    tokens = batch.tokens[start:stop].tolist()
    turns = [CONTEXT, *batch.turn_ids[start : stop - 1].tolist()]
    labels = [IGNORE, *batch.labels[start : stop - 1].tolist()]
    restarts = (batch.position_ids[start:stop] == 0).cumsum(0) - 1
    parts = restarts.tolist()
    found: list[Piece] = []
    for (turn, trained, part), begin, end in runs(
        [(turn, label != IGNORE, part) for turn, label, part in zip(turns, labels, parts, strict=True)]
    ):
        place = begin
        for ids, text in texts.groups(tokens[begin:end]):
            place += len(ids)
            names = tuple(texts.tokenizer.convert_ids_to_tokens(ids))
            last = trained and place == end and ids[-1] in ends
            piece = Piece(text, tuple(ids), names, place - len(ids), part, turn if trained else CONTEXT, trained)
            found.append(replace(piece, special=ids[0] in texts.special, ends=last, read=place <= length))
    return found


def context_pieces(tokens: Sequence[int], texts: TokenTexts, position: int = 0) -> list[Piece]:
    """The same of tokens that are all context."""
    found = []
    for ids, text in texts.groups(tokens):
        names = tuple(texts.tokenizer.convert_ids_to_tokens(ids))
        found.append(Piece(text, tuple(ids), names, position, special=ids[0] in texts.special))
        position += len(ids)
    return found


def classes_beside(chosen: PolicyClass) -> list[PolicyClass]:
    """The chosen class and those it is compared with, in the order of how far they look ahead."""
    beside = [one for one in BESIDE if str(one) != str(chosen)]
    return sorted(
        [chosen, *beside], key=lambda one: (isinstance(one, FullPlanning), isinstance(one, Segment), one.lookahead)
    )


@dataclass(frozen=True)
class Credit:
    """What a step makes of one dialogue's rewards; each list has one number a turn. ``length``: tokens that it
    reads."""

    returns: Mapping[str, Sequence[float]]
    chosen: Sequence[float]
    weights: Sequence[float]
    length: int


def credit_of(batch: PackedBatch, row: int, objective: Objective, means: Sequence[float] = ()) -> Credit:
    """The credit of dialogue ``row`` among the others of ``batch``, whose groups give the baseline.

    Soft Q-learning, at the weights of the start: the advantage of turn t is its windowed return less c_t - gamma^n
    c_(t+n), where n is the length of its window and ``means`` are c, the mean return from each turn on.
    """
    chosen, weights = credit(batch, objective)
    counts = batch.turn_counts
    turns = int(counts[row])
    beside = {}
    for one in classes_beside(objective.policy_class):
        returns = partial_returns(batch.rewards, one, gamma=objective.gamma, turn_counts=counts)
        beside[str(one)] = returns[row, :turns].tolist()
    live = live_turns(weights, likelihood(batch, chosen, objective))
    if objective.soft_q:
        live = batch.turn_mask.float()
        known = torch.tensor([*means[:turns], *[0.0] * (turns + 1 - len(means[:turns]))], dtype=torch.float64)
        lengths = partial_returns(torch.ones(1, turns), objective.policy_class)[0].long()
        behind = objective.gamma**lengths * known[torch.arange(turns) + lengths]
        weights = (weights.double()[:, :turns] - (known[:-1] - behind)).float()
    length = int(tokens_to_read(batch, live, objective)[row])
    return Credit(beside, chosen[row, :turns].tolist(), weights[row, :turns].tolist(), length)


def trained_tokens(batch: PackedBatch, row: int) -> list[int]:
    """How many tokens of each turn have a label."""
    start, stop = batch.cu_seqlens[row : row + 2].tolist()
    labelled = batch.turn_ids[start:stop][batch.labels[start:stop] != IGNORE]
    return torch.bincount(labelled, minlength=int(batch.turn_counts[row])).tolist()


def said(messages: Sequence[Message]) -> tuple[tuple[str, str], ...]:
    """(role, text) of messages, what they carry beside it as JSON."""
    return tuple((message.role, " ".join(filter(None, (message.content, _carried(message))))) for message in messages)


def _carried(message: Message) -> str:
    return json.dumps(dict(message.more), ensure_ascii=False) if message.more else ""


def tool_names(tools: Sequence[Mapping[str, Any]]) -> str:
    """The functions that may be called."""
    return ", ".join(str(function_of(tool).get("name")) for tool in tools)
