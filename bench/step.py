"""What the step benchmarks share: models by their sizes, and a training step whose loss is a provider's."""

import contextlib
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .byte_dialogue import END
from .problem import Problem
from .providers import Provider, Unavailable


@dataclass(frozen=True)
class Shape:
    """What the config of a Qwen3 model says."""

    vocabulary: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    tied: bool = True

    @property
    def parameters(self) -> int:
        attention = 2 * self.width * self.head_dim * (self.heads + self.kv_heads)
        embeddings = self.vocabulary * self.width * (1 if self.tied else 2)
        return self.layers * (attention + 3 * self.width * self.inner) + embeddings

    def flops(self, tokens: int, dialogue: int) -> float:
        """Of a step with checkpointing: the forward pass twice, the backward pass for two."""
        attention = self.layers * 2 * tokens * dialogue * self.heads * self.head_dim  # causal: half of 4
        return 8.0 * self.parameters * tokens + 4.5 * attention


SHAPES = {
    "smallest": Shape(264, 32, 1, 2, 1, 16, 64),
    "bytes": Shape(264, 128, 2, 4, 2, 32, 256),
    "Qwen3-0.6B": Shape(151936, 1024, 28, 16, 8, 128, 3072),
    "Qwen3-8B": Shape(151936, 4096, 36, 32, 8, 128, 12288, tied=False),
}


def require_transformers() -> None:
    """`Unavailable` with the remedy."""
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise Unavailable("needs transformers (pip install ppg_fast[train])") from error


def make_model(name: str, device: str, dtype: torch.dtype) -> Any:
    """A model of one of `SHAPES` with random weights, made where they are used, ready to train."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    shape = SHAPES[name]
    config = Qwen3Config(
        vocab_size=shape.vocabulary, hidden_size=shape.width, intermediate_size=shape.inner,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim, tie_word_embeddings=shape.tied, max_position_embeddings=2**20,
        pad_token_id=0, eos_token_id=END, bos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(0)
        return Qwen3ForCausalLM._from_config(config, dtype=dtype).train()


def clock(device: str) -> float:
    """Seconds, when everything that was begun is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@torch.enable_grad()
def step_with(
    provider: Provider, model: Any, optimizer: Any, batch: Any, head: Problem, device: str, offload: bool = False
) -> tuple[Tensor, Tensor, float, float]:
    """A step whose loss is the provider's -> loss, the gradient that enters the model, seconds, those of head and loss.

    The backward pass runs in two parts, so that the loss can be clocked. ``offload``: checkpoints lie on the host.
    """
    from ppg_fast.models.causal_lm import policy_hidden

    begin = clock(device)
    with torch.autograd.graph.save_on_cpu() if offload else contextlib.nullcontext():
        hidden: Tensor = policy_hidden(model, batch)
    start = clock(device)
    top = hidden.detach().requires_grad_()
    loss = provider.compute(replace(head, hidden=top, weight=model.get_output_embeddings().weight))
    loss.backward()
    loss_seconds = clock(device) - start
    assert top.grad is not None
    hidden.backward(top.grad)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach(), top.grad, clock(device) - begin, loss_seconds
