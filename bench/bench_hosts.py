"""Inside other trainers: forward, loss and backward of a small model, the host with its own head and with ours."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ppg_fast.spec import IGNORE

from .problem import Case
from .providers import Provider, Providers, Unavailable, gather, selected_logprobs
from .step import require_transformers

ROWS = 4  # dialogues of a batch


@dataclass
class Hosted:
    """A model, one batch, and the forward that each host has put in place of the model's own."""

    model: Any
    input_ids: Tensor
    labels: Tensor  # aligned with input_ids, -100 where masked
    advantages: Tensor  # (B, 1)
    forwards: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def model_of(self, name: str, touch: Callable[[Any], Any]) -> Iterator[Any]:
        """The model as a host leaves it, which touches it the first time only."""
        if name not in self.forwards:
            touch(self.model)
            self.forwards[name] = self.model.__dict__.pop("forward", None)
        if self.forwards[name] is not None:
            self.model.forward = self.forwards[name]
        try:
            yield self.model
        finally:
            self.model.__dict__.pop("forward", None)


def cases(grid: str, device: str) -> list[Case]:
    """N tokens in `ROWS` dialogues, of which the policy wrote a quarter."""
    if grid == "quick":
        return [Case("hosts", 64, 512, 32, device=device, active=0.25)]
    dtype = "bfloat16" if device == "cuda" else "float32"
    return [Case("hosts", 16384 if device == "cuda" else 4096, 32000, 256, device=device, dtype=dtype, active=0.25)]


def make(case: Case, seed: int = 0, near: bool = True) -> Hosted:
    """A two-layer Qwen3 of random weights; random tokens, the last of each of eight turns are the policy's."""
    require_transformers()
    from ppg_fast.models.causal_lm import make_model

    draw = torch.Generator().manual_seed(seed)
    length = case.N // ROWS
    input_ids = torch.randint(case.V, (ROWS, length), generator=draw)
    turn = length // 8
    written = torch.arange(length) % turn >= turn - max(1, int(turn * case.active))
    labels = input_ids.masked_fill(~written, IGNORE)
    model = make_model(case.V, case.D, seed=seed).to(case.device, case.torch_dtype)
    advantages = torch.randn(ROWS, 1, generator=draw)
    return Hosted(model, input_ids.to(case.device), labels.to(case.device), advantages.to(case.device))


def _provider(name: str, kind: str, touch: Callable[[Any], Any], loss: Callable[[Any, Hosted], Tensor]) -> Provider:
    """Loss and gradients of every parameter; the last one's, the embedding's, is handed on to be checked."""

    @torch.enable_grad()
    def compute(problem: Hosted) -> tuple[Tensor, Tensor]:
        with problem.model_of(name, touch) as model:
            value = loss(model, problem)
            value.backward()
        gradient = model.get_input_embeddings().weight.grad
        model.zero_grad(set_to_none=True)
        return value.detach(), gradient

    return Provider(name, compute, kind, forward_only=True)


def _cross_entropy(model: Any, problem: Hosted) -> Tensor:
    return model(problem.input_ids, labels=problem.labels, use_cache=False).loss


def _with_scores(model: Any, problem: Hosted) -> Tensor:
    """TRL's call, and the surrogate of an on-policy step on top; scaled to be the cross-entropy where every advantage
    is 1."""
    scores = model(problem.input_ids, labels=problem.labels, fused_lm_head=True).log_probs
    return -(scores * problem.advantages).sum() / (problem.labels[:, 1:] != IGNORE).sum()


def transformers_hosts(case: Case) -> list[Provider]:
    """transformers."""
    from ppg_fast.integrations.transformers import patch

    return [
        _provider("transformers, its own loss", "peer", lambda model: None, _cross_entropy),
        _provider("transformers, patched by ppg_fast", "ours", patch, _cross_entropy),
    ]


def trl_hosts(case: Case) -> list[Provider]:
    """TRL."""
    try:
        from trl.trainer.utils import add_fused_lm_head as theirs  # pyright: ignore[reportMissingImports]

        from ppg_fast.integrations.trl import add_fused_lm_head as ours
    except ImportError as error:
        raise Unavailable(str(error)) from error
    return [
        _provider("TRL, its own head", "peer", theirs, _with_scores),
        _provider("TRL, head of ppg_fast", "ours", ours, _with_scores),
    ]


def participants(case: Case) -> Providers:
    """Each host twice."""
    return gather([transformers_hosts, trl_hosts], case)


def checker(problem: Hosted, case: Case) -> Callable[[Any], dict[str, float]]:
    """Errors against the loss that plain log-softmax gives, with advantages and without: the nearer one is the
    provider's."""
    truths = []
    for advantages in (torch.ones_like(problem.advantages), problem.advantages):
        model = problem.model
        logits = model(problem.input_ids, use_cache=False).logits[:, :-1]
        labels = problem.labels[:, 1:]
        scores = selected_logprobs(logits.flatten(0, 1), labels.flatten()).view(labels.shape)
        loss = -(scores * advantages).sum() / (labels != IGNORE).sum()
        loss.backward()
        truths.append((loss.detach(), model.get_input_embeddings().weight.grad))
        model.zero_grad(set_to_none=True)

    def check(result: tuple[Tensor, Tensor]) -> dict[str, float]:
        errors = []
        for loss, gradient in truths:
            of_loss = ((result[0] - loss).abs() / loss.abs()).item()
            of_gradient = ((result[1] - gradient).abs().max() / gradient.abs().max()).item()
            errors.append({"loss": of_loss, "d_embedding": of_gradient})
        return min(errors, key=lambda e: max(e.values()))

    return check


def facts(problem: Hosted, provider: str, seconds: float) -> dict[str, float]:
    """Tokens per second."""
    tokens, active = problem.input_ids.numel(), int((problem.labels != IGNORE).sum())
    return {"tokens": tokens, "active_tokens": active, "tokens_per_second": tokens / seconds}
