"""The whole training step of models shaped like Qwen3-0.6B and 8B, random weights, on one GPU: forward, loss, backward,
optimizer.

Packed dialogues, activation checkpointing, bfloat16, AdamW. With our head and with its peers; how many tokens fit, and
how fast they go.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch

from .. import peers, providers, step
from ..problem import Case, Problem
from ..providers import Provider

DIALOGUE = 32768  # tokens of each dialogue in the batch
TURN = 512  # tokens of a turn and of what was said before it; the second half is the policy's
GUESS = 2e14  # floating-point operations a second, before anything has been measured


CASES = [  # model, tokens, whether peers take part, whether checkpoints go to the host
    ("Qwen3-0.6B", 32768, True, False), ("Qwen3-8B", 32768, True, False), ("Qwen3-0.6B", 131072, True, False),
    ("Qwen3-0.6B", 262144, False, False), ("Qwen3-8B", 131072, False, False), ("Qwen3-8B", 262144, False, True),
]  # fmt: skip


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
        "tokens": ids, "labels": labels, "cu_seqlens": bounds, "part_seqlens": bounds,
        "position_ids": place,
        "turn_ids": torch.where(said, turns, -1),
        "rewards": rewards, "turn_counts": counts.long() + dialogue // turn,
        "group_ids": torch.zeros(len(bounds) - 1, dtype=torch.int64),
    }  # fmt: skip
    batch = PackedBatch(**{f.name: known[f.name] for f in fields(PackedBatch) if f.name in known})
    return batch, Problem(labels, advantages, torch.zeros(tokens, device=device), 1, None)


def _contestants(
    shape: step.Shape, tokens: int, device: str, with_peers: bool
) -> tuple[list[Provider], dict[str, str]]:
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
    name: str = ""

    def use(self, name: str) -> None:
        """Have the model of that name in hand, and no other in memory."""
        from ppg_fast.models.causal_lm import prepare

        if self.name != name:
            self.model, device = None, self.report.device
            made = step.make_model(name, device, torch.bfloat16 if device == "cuda" else torch.float32)
            self.model, self.name = prepare(made), name
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def case(self, name: str, tokens: int, dialogue: int, turn: int, with_peers: bool, offload: bool) -> None:
        """A line for each head."""
        self.use(name)
        shape, device = step.SHAPES[name], self.report.device
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, fused=device == "cuda")
        batch, head = make_batch(tokens, dialogue, turn, shape.vocabulary, device)
        found, missing = _contestants(shape, tokens, device, with_peers)
        self.report.add(missing=missing)
        size = {
            "model": name, "parameters": shape.parameters, "tokens": tokens, "dialogue": dialogue, "offload": offload,
            "active": float((head.labels >= 0).float().mean()),
        }  # fmt: skip
        for provider in found:

            def call(provider: Provider = provider) -> tuple[float, float]:
                return step.step_with(provider, self.model, optimizer, batch, head, device, offload)[2:]

            result = self.measured(call)
            self.report.add(**size, provider=provider.name, **result)
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
        sizes, lengths = [("smallest", 128, True, False), ("smallest", 256, False, True)], (64, 16)
    for name, tokens, with_peers, offload in sizes:
        needed = 0.0 if report.tiny else 5.0 + 2.5 * step.SHAPES[name].flops(tokens, lengths[0]) / here.rate
        work = partial(here.case, name, tokens, *lengths, with_peers, offload)
        report.case(f"step of {name}, {tokens} tokens", work, needed)
