"""A whole training step on long dialogues: forward, loss, backward, optimizer, with the loss swapped; and the share of
time it takes.

A case with a ``shape`` is the other comparison, of whole trainers: `whole_step`.
"""

import math
import random
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ppg_fast.functional import partial_returns

from . import peers, providers, whole_step
from .longest import longest_facts
from .problem import Case, Problem, act_near_by, make_truth
from .providers import Provider, Providers, gather
from .step import require_transformers, step_with
from .step_parts import parts
from .timing import Pace

TURNS, TOKENS_OF_A_TURN = 125, 24  # of the dialogue that stands in where no file is given
CONTROL = 8  # token ids kept for roles
WHOLE_TOKENS = 40_000  # of the dialogue that whole trainers are given
WHOLE_TRUTH = 4e11  # multiply-adds in float64


@dataclass
class Step:
    """A model, its optimizer, one packed batch, and the head's inputs but for the hidden states."""

    model: Any
    optimizer: torch.optim.Optimizer
    batch: Any
    head: Problem
    loss_share: dict[str, float] = field(default_factory=dict)  # of the last step that each provider made


def cases(grid: str, device: str) -> list[Case]:
    """N tokens at most, from the front of the file that ``--dialogues`` names; a synthetic dialogue without it. Then
    whole trainers."""
    if grid == "quick":
        return [Case("training_step", 256, 512, 32, device=device), whole_step.case("smallest", 512, device)]
    dtype = "bfloat16" if device == "cuda" else "float32"
    swapped = Case("training_step", 16384, 32000, 256, device=device, dtype=dtype)
    return [swapped, whole_step.case("bytes", WHOLE_TOKENS, device, dtype)]


def pace_of(case: Case, pace: Pace) -> Pace:
    """Whole trainers are slow and few: both have the rounds that an interval wants."""
    return replace(pace, slow=math.inf, own=pace.least) if case.shape else pace


def _word_sample(messages: Sequence[tuple[str, str]], rewards: Sequence[float], vocabulary: int) -> Any:
    """One token a word or sign, by a hash of it: lengths and repetitions are those of the text, and no tokenizer has to
    be downloaded."""
    from ppg_fast.dialogues.packing import CONTEXT, Sample

    tokens, turn_ids, turn = [], [], 0
    for role, content in messages:
        words = [CONTROL + zlib.crc32(w.encode()) % (vocabulary - CONTROL) for w in re.findall(r"\w+|[^\w\s]", content)]
        tokens += [zlib.crc32(role.encode()) % (CONTROL - 1), *words, CONTROL - 1]
        turn_ids += [CONTEXT] + [turn if role == "assistant" else CONTEXT] * (len(words) + 1)
        turn += role == "assistant"
    return Sample(tokens, turn_ids, list(rewards), 0)


def _dialogues(case: Case) -> list[tuple[list[tuple[str, str]], list[float]]]:
    if case.variant:
        from ppg_fast.dialogues.dialogue import read_dialogues

        read = read_dialogues(case.variant)
        return [([(m.role, m.content) for m in d.messages], [r or 0.0 for r in d.turn_rewards]) for d in read]
    draw = random.Random(0)
    speech = [" ".join(str(draw.randrange(5000)) for _ in range(TOKENS_OF_A_TURN)) for _ in range(2 * TURNS)]
    lines = [("assistant" if n % 2 else "user", text) for n, text in enumerate(speech)]
    return [(lines, [float(draw.random() < 0.7) for _ in range(TURNS)])]


def make(case: Case, seed: int = 0, near: bool = True) -> Any:
    """A two-layer Qwen3, not pretrained; advantages are returns over three turns; the learning rate is 0, so that every
    step is alike."""
    if case.shape:
        return whole_step.make(case)
    require_transformers()
    from ppg_fast.dialogues.packing import cut_tokens, micro_batches, pack
    from ppg_fast.models.causal_lm import make_model, policy_hidden, token_advantages

    samples = [cut_tokens(_word_sample(*dialogue, case.V), case.N) for dialogue in _dialogues(case)]
    fullest = micro_batches([len(s.tokens) for s in samples], case.N)[0]
    batch = pack([samples[i] for i in fullest]).to(case.device)
    model = make_model(case.V, case.D, seed=seed).to(case.device, case.torch_dtype)
    returns = partial_returns(batch.rewards, "lookahead:3", turn_counts=batch.turn_counts)
    hidden = policy_hidden(model, batch).detach().requires_grad_()
    weight = model.get_output_embeddings().weight
    labels, zeros = batch.labels, torch.zeros(batch.labels.shape, device=case.device)
    head = Problem(labels, token_advantages(batch, returns), zeros, 1, None, hidden=hidden, weight=weight)
    if near:
        act_near_by(head, torch.Generator(case.device).manual_seed(seed))
    return Step(model, torch.optim.AdamW(model.parameters(), lr=0.0), batch, head)


def _step_with(provider: Provider, case: Case) -> Provider:
    """A training step whose loss is the provider's."""

    def compute(step: Step) -> tuple[Tensor, Tensor]:
        loss, d_hidden, seconds, of_loss = step_with(
            provider, step.model, step.optimizer, step.batch, step.head, case.device
        )
        step.loss_share[provider.name] = of_loss / seconds
        return loss, d_hidden

    return replace(provider, compute=compute, forward_only=True)


def _ours(case: Case) -> list[Provider]:
    """ppg_fast."""
    return [
        Provider(f"ppg_fast {name}", providers.loss_from_hidden(name, True), "ours")
        for name in providers.our_backends(case)
    ]


def participants(case: Case) -> Providers:
    """The trainer's own loss, the loss from whole logits, and TRL's head."""
    if case.shape:
        return whole_step.participants(case)
    found, missing = gather([_ours, providers.eager, peers.trl_head], case)
    return [_step_with(p, case) for p in found], missing


def checker(problem: Any, case: Case) -> Callable[[Any], dict[str, float]]:
    """Errors of the loss and of the gradient that enters the model."""
    if case.shape:
        return whole_step.checker(problem, case)
    truth = make_truth(problem.head, budget=WHOLE_TRUTH)

    def check(result: tuple[Tensor, Tensor]) -> dict[str, float]:
        loss, d_hidden = result
        return replace(truth, d_weight=None).errors(loss, (d_hidden, d_hidden))

    return check


def facts(problem: Any, provider: str, seconds: float) -> dict[str, Any]:
    """Tokens per second, and the share of the step that the head and the loss take; of whole trainers, where the step
    goes and the longest dialogue that fits."""
    if isinstance(problem, whole_step.WholeStep):
        tokens = len(problem.sample.tokens)
        speed = {"tokens": tokens, "active_tokens": problem.active_tokens, "tokens_per_second": tokens / seconds}
        with torch.enable_grad():
            found = {"parts": parts(problem.steps[provider])}
        return {**speed, **found, **longest_facts(problem.case, provider)}
    tokens, active = problem.batch.tokens.numel(), int(problem.head.mask.sum())
    share = problem.loss_share[provider]
    return {"tokens": tokens, "active_tokens": active, "tokens_per_second": tokens / seconds, "loss_share": share}
