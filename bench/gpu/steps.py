"""The whole training step of models shaped like Qwen3-0.6B and 8B, random weights, on one GPU: forward, loss, backward,
optimizer.

Packed dialogues, activation checkpointing, bfloat16, AdamW. With our head and with its peers; how many tokens fit, and
how fast they go.
"""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import peers, providers
from ..problem import Case, Problem
from ..providers import Provider

DIALOGUE = 32768  # tokens of each dialogue in the batch
TURN = 512  # tokens of a turn and of what was said before it; the second half is the policy's
GUESS = 2e14  # floating-point operations a second, before anything has been measured


@dataclass(frozen=True)
class Shape:
    """What the config of a Qwen3 model says."""

    name: str
    width: int
    inner: int
    layers: int
    heads: int
    groups: int
    tied: bool
    vocabulary: int = 151936
    head_dim: int = 128

    @property
    def parameters(self) -> int:
        attention = 2 * self.width * self.head_dim * (self.heads + self.groups)
        return self.layers * (attention + 3 * self.width * self.inner) + self.vocabulary * self.width * (
            1 if self.tied else 2
        )

    def flops(self, tokens: int, dialogue: int) -> float:
        """Of a step with checkpointing: the forward pass twice, the backward pass for two."""
        attention = self.layers * 2 * tokens * dialogue * self.heads * self.head_dim  # causal: half of 4
        return 8.0 * self.parameters * tokens + 4.5 * attention


SMALL = Shape("Qwen3-0.6B", 1024, 3072, 28, 16, 8, True)
LARGE = Shape("Qwen3-8B", 4096, 12288, 36, 32, 8, False)
TINY = Shape("tiny", 32, 64, 2, 4, 2, True, 512, 8)
CASES = [  # shape, tokens, whether peers take part, whether checkpoints go to the host
    (SMALL, 32768, True, False), (LARGE, 32768, True, False), (SMALL, 131072, True, False),
    (SMALL, 262144, False, False),
    (LARGE, 131072, False, False), (LARGE, 262144, False, True),
]  # fmt: skip


def make_model(shape: Shape, device: str, dtype: torch.dtype) -> Any:
    """Random weights, made where they are used."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from ppg_fast.models.causal_lm import prepare

    config = Qwen3Config(
        vocab_size=shape.vocabulary, hidden_size=shape.width, intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.groups, head_dim=shape.head_dim,
        max_position_embeddings=40960,
        tie_word_embeddings=shape.tied, pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = prepare(Qwen3ForCausalLM(config))
    finally:
        torch.set_default_dtype(default)
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def make_batch(tokens: int, dialogue: int, turn: int, vocabulary: int, device: str) -> tuple[Any, Problem]:
    """Packed dialogues, and the head's inputs but for the hidden states; a third of the turns has no advantage."""
    from ppg_fast.dialogues.packing import PackedBatch

    draw = torch.Generator(device).manual_seed(0)
    ids = torch.randint(vocabulary, (tokens,), generator=draw, device=device)
    place = torch.arange(tokens, device=device) % dialogue
    said = place % turn >= turn // 2
    labels = torch.where(said, torch.randint(vocabulary, (tokens,), generator=draw, device=device), -100)
    turns = place // turn
    advantages = torch.where(turns % 3 == 2, 0.0, torch.where(turns % 3 == 1, 1.0, -0.7))
    bounds = torch.arange(0, tokens + 1, dialogue, device=device, dtype=torch.int32)
    rewards, counts = (torch.zeros(s, device=device) for s in ((len(bounds) - 1, dialogue // turn), (len(bounds) - 1,)))
    known = {
        "tokens": ids, "labels": labels, "cu_seqlens": bounds, "position_ids": place,
        "turn_ids": torch.where(said, turns, -1),
        "rewards": rewards, "turn_counts": counts.long() + dialogue // turn,
        "group_ids": torch.zeros(len(bounds) - 1, dtype=torch.int64),
    }  # fmt: skip
    batch = PackedBatch(**{f.name: known[f.name] for f in fields(PackedBatch) if f.name in known})
    return batch, Problem(labels, advantages, torch.zeros(tokens, device=device), 1, None)


def step(
    model: Any, optimizer: Any, batch: Any, head: Problem, provider: Provider, device: str, offload: bool
) -> tuple[float, float]:
    """One step -> its seconds and those of head and loss, whose backward pass runs first and by itself."""
    from ppg_fast.models.causal_lm import policy_hidden

    def clock() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    begin = clock()
    with torch.autograd.graph.save_on_cpu() if offload else contextlib.nullcontext():
        hidden: Tensor = policy_hidden(model, batch)
    start = clock()
    top = hidden.detach().requires_grad_()
    provider.compute(replace(head, hidden=top, weight=model.get_output_embeddings().weight)).backward()
    loss_seconds = clock() - start
    assert top.grad is not None
    hidden.backward(top.grad)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return clock() - begin, loss_seconds


def _contestants(shape: Shape, tokens: int, device: str, with_peers: bool) -> tuple[list[Provider], dict[str, str]]:
    case = Case("linear", tokens, shape.vocabulary, shape.width, dtype="bfloat16", device=device)
    names = providers.our_backends(case)[-1:]  # the CUDA kernels where they run
    ours = [Provider(f"ppg_fast {name}", providers.loss_from_hidden(name, True), "ours") for name in names]
    found, missing = providers.gather(
        [providers.eager, peers.trl_head, peers.torch_chunked] if with_peers else [], case
    )
    return ours + found, {f"step {name}": reason for name, reason in missing.items()}


@dataclass
class Run:
    """The model in hand, and how fast our steps went."""

    report: Any
    rate: float = GUESS
    model: Any = None
    shape: Shape | None = None

    def case(self, shape: Shape, tokens: int, dialogue: int, turn: int, with_peers: bool, offload: bool) -> None:
        """A line for each head."""
        device = self.report.device
        if self.shape != shape:
            self.model = None
            self.model, self.shape = (
                make_model(shape, device, torch.bfloat16 if device == "cuda" else torch.float32),
                shape,
            )
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, fused=device == "cuda")
        batch, head = make_batch(tokens, dialogue, turn, shape.vocabulary, device)
        found, missing = _contestants(shape, tokens, device, with_peers)
        self.report.add(missing=missing)
        size = {
            "model": shape.name,
            "parameters": shape.parameters,
            "tokens": tokens,
            "dialogue": dialogue,
            "offload": offload,
        }
        for provider in found:
            result = self.measured(lambda p=provider: step(self.model, optimizer, batch, head, p, device, offload))
            self.report.add(**size, active=float((head.labels >= 0).float().mean()), provider=provider.name, **result)
            if provider.kind == "ours" and result["fits"]:
                self.rate = shape.flops(tokens, dialogue) / result["seconds"]

    def measured(self, call: Callable[[], tuple[float, float]]) -> dict[str, Any]:
        """Two steps and the second one's figures; the first one's where there is no time for another; or why it does
        not fit."""
        cuda = self.report.device == "cuda"
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            first = call()
            second = call() if self.report.left > 1.5 * first[0] else first
        except torch.OutOfMemoryError as error:
            self.model.zero_grad(set_to_none=True)
            return {"fits": False, "reason": str(error).splitlines()[0][:200]}
        peak = torch.cuda.max_memory_allocated() if cuda else None
        return {
            "fits": True,
            "seconds": second[0],
            "loss_seconds": second[1],
            "warm": second is not first,
            "peak_bytes": peak,
        }


def run(report: Any) -> None:
    """A line a model, length and head; one that does not fit into memory says so."""
    here, sizes, lengths = Run(report), CASES, (DIALOGUE, TURN)
    if report.tiny:
        sizes, lengths = [(TINY, 128, True, False), (TINY, 256, False, True)], (64, 16)
    for shape, tokens, with_peers, offload in sizes:
        needed = 0.0 if report.tiny else 5.0 + 2.5 * shape.flops(tokens, lengths[0]) / here.rate
        work = partial(here.case, shape, tokens, *lengths, with_peers, offload)
        report.case(f"step of {shape.name}, {tokens} tokens", work, needed)
