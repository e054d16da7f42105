"""A weight that is the embedding and the output head at once: its two gradients meet in one tensor of its size."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ppg_fast.ops.tracing import needs_grad


class _TwoUses(torch.autograd.Function):
    """A weight (V, D), once for the head and once for the embedding.

    The gradient of the embedding is sparse, a row a token, and is added to that of the head where it lies. Autograd,
    which adds what arrives at one tensor, would make a second (V, D) for it.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        return weight.detach(), weight.detach()

    @staticmethod
    def backward(ctx: Any, of_head: Tensor | None, of_embedding: Tensor | None) -> Tensor | None:  # type: ignore[override]
        if of_head is None or of_embedding is None:
            return of_head if of_embedding is None else of_embedding.to_dense()
        if torch.is_grad_enabled() or not of_head.is_contiguous():  # a graph keeps it, or its elements share memory
            return of_head + of_embedding
        return of_head.add_(of_embedding)


def shared_embedding(model: Any, weight: Tensor) -> nn.Embedding | None:
    """The embedding of ``model`` whose weight is the head's ``weight`` and gets a gradient; None where they differ and
    where an option of the embedding forbids sparse gradients."""
    embedding = model.get_input_embeddings()
    if not isinstance(embedding, nn.Embedding) or embedding.weight is not weight:
        return None
    plain = embedding.max_norm is None and not embedding.scale_grad_by_freq
    return embedding if plain and needs_grad(weight) else None


def two_uses(weight: Tensor) -> tuple[Tensor, Tensor]:
    """``weight`` (V, D) as the head and as the embedding read it; its gradient is the sum of theirs.

    The gradient of the second may be sparse. That of the first is overwritten with the sum.
    """
    return _TwoUses.apply(weight)  # type: ignore[return-value]


def read_with(body: nn.Module, embedding: nn.Embedding, weight: Tensor, given: dict[str, Any]) -> Any:
    """``body(**given)`` where ``embedding``, a module of it, reads ``weight`` (V, D), whose gradient is then sparse."""
    name = next(name for name, module in body.named_modules() if module is embedding)
    before, embedding.sparse = embedding.sparse, True
    try:
        return functional_call(body, {f"{name}.weight": weight}, kwargs=given)
    finally:
        embedding.sparse = before
