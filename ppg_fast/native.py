"""The C++ and CUDA backends: allocates outputs and unpacks the spec, nothing else. One contract, dispatched by the
tensors' device."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ppg_fast.contract import Columns, FusedArguments, Reduction, Turns
from ppg_fast.spec import PolicyLossSpec


def _load_extension() -> Any:
    """The extension's operators; ImportError with the remedy where it was not built."""
    built = sorted(Path(__file__).parent.glob("_C*.so"))
    if not built:
        raise ImportError(
            "the C++ extension is not built: install a C++20 compiler, then `pip install --no-build-isolation -e "
            ".` again"
        )
    torch.ops.load_library(built[0])
    return torch.ops.ppg_fast_native


_lib = _load_extension()
HAS_CUDA = "cuda" in _lib.build().split()
ISAS = ("avx512", "avx2", "baseline")


def isa() -> str:
    """The instruction set that the CPU kernels run on."""
    return _lib.build().split()[0].removeprefix("isa=")


def use_isa(name: str) -> None:
    """Run the CPU kernels on another instruction set of this processor, for tests and benchmarks, as the environment
    variable PPG_FAST_ISA does from the start; ValueError where it lacks it."""
    if not _lib.use_isa(name):
        raise ValueError(f"the instruction set must be one of {', '.join(ISAS)} that this processor has, got {name!r}")


if _name := os.environ.get("PPG_FAST_ISA"):
    use_isa(_name)


def want_huge_pages(memory: Tensor) -> None:
    """Advise the system to back fresh ``memory`` by huge pages; a system without them goes on as before."""
    _lib.want_huge_pages(memory)


def require_cuda() -> None:
    """ImportError with the remedy unless the CUDA kernels can run here."""
    if not HAS_CUDA:
        raise ImportError(
            "the extension was built without CUDA (no nvcc was on PATH): install the CUDA toolkit, then ppg_fast again"
        )
    if not torch.cuda.is_available():
        raise ImportError("torch sees no CUDA device")


def on_gpu(tensor: Tensor) -> bool:
    """Whether the kernels of ``tensor`` are those of csrc/cuda."""
    return not tensor.is_cpu


def _new(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def logprobs_fwd(
    logits: Tensor,
    labels: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    logit_softcap: float,
    entropy: bool,
    score_norm: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    N, entropy = labels.numel(), entropy or score_norm is not None
    logprob, ent, lse = _new(logits, N), _new(logits, N if entropy else 0), _new(logits, N, 2)
    _lib.logprobs_fwd.default(
        logits, labels, temperatures, temperature, logit_softcap, logprob, ent if entropy else None, lse, score_norm
    )
    return logprob, ent, lse


def unit_of_maximum(logit_softcap: float) -> float:
    return logit_softcap or 1.0  # under a softcap the kernels hold tanh(x / softcap)


def logprobs_bwd(
    logits: Tensor,
    labels: Tensor,
    lse: Tensor,
    entropy: Tensor,
    d_logprob: Tensor,
    d_entropy: Tensor | None,
    d_lse: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    logit_softcap: float,
    dlogits: Tensor,
) -> None:
    scale = temperatures, temperature, logit_softcap
    _lib.logprobs_bwd.default(logits, labels, lse, entropy, [d_logprob, d_entropy, d_lse], *scale, dlogits)


def policy_loss(
    logits: Tensor,
    labels: Tensor,
    advantages: Tensor,
    weights: Tensor | None,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    rollout_logprobs: Tensor | None,
    temperatures: Tensor | None,
    nll_weights: Tensor | None,
    spec: PolicyLossSpec,
    entropy: bool,
    dlogits: Tensor | None,
    score_norm: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    N = labels.numel()
    entropy = entropy or spec.entropy_coef != 0 or score_norm is not None
    loss, logprob, ent = _new(logits, N), _new(logits, N), _new(logits, N if entropy else 0)
    if N == 0:
        return loss, logprob, ent
    rows = [advantages, weights, old_logprobs, ref_logprobs, rollout_logprobs, temperatures, nll_weights]
    outputs = loss, logprob, ent if entropy else None, dlogits, score_norm
    _lib.policy_loss.default(logits, labels, rows, spec.numbers, spec.choices, *outputs)
    return loss, logprob, ent


def fused_policy_loss(
    logits: Tensor,
    columns: Columns,
    turns: Turns | None,
    reduction: Reduction,
    spec: PolicyLossSpec,
    skip_zero_advantages: bool,
    entropy: bool,
    dlogits: Tensor | None,
    score_norm: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor] | None:
    shape, summed, gpu = columns.labels.shape, reduction.kind != "none", on_gpu(logits)
    entropy = entropy or spec.entropy_coef != 0 or score_norm is not None
    new = (columns.advantages if turns is None else turns.rewards).new_empty  # type: ignore[union-attr]  # float32
    logprob, ent = new(shape), new(shape if entropy else 0)
    total = new(()) if summed else None
    loss = new(shape) if gpu or not summed else None  # on a CPU a sum needs none that the caller sees
    if shape.numel() == 0:
        return new(shape) if total is None else total.zero_(), logprob, ent
    credit, counts, counted = None, None, 0
    if turns is not None:
        credit = new((1 if turns.baseline == "none" else 2, *turns.rewards.shape))
    if gpu:
        counted, slices = _counts(shape.numel(), reduction)
        counts = torch.empty(counted * slices + 1, dtype=torch.int32, device=logits.device)
    lists = FusedArguments(columns, turns, reduction, spec, skip_zero_advantages).pack()
    outputs = [credit, loss, total, logprob, ent if entropy else None, score_norm, dlogits]
    if not _lib.fused_policy_loss.default(logits, *lists, counts, counted, outputs):
        return None
    return loss if total is None else total, logprob, ent  # type: ignore[return-value]


def _counts(rows: int, reduction: Reduction) -> tuple[int, int]:
    """How many sequences have their active tokens counted on a GPU, and in how many slices each, so that a slice is the
    tokens that a CTA loads at once, but few enough to be added up by each CTA or row of the sweep."""
    if reduction.kind == "sequence_mean" or (reduction.kind == "sequence_sum" and reduction.normalizer is None):
        return reduction.sequences, max(1, min(rows // reduction.sequences // 512, 16))
    if reduction.kind == "token_mean" and reduction.normalizer is None:
        return 1, max(1, min(rows // 512, 256))
    return 0, 1


def distillation(
    logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    weights: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    logit_softcap: float,
    teacher_softcap: float,
    beta: float,
    dlogits: Tensor | None,
) -> Tensor:
    divergence, numbers = _new(logits, labels.numel()), [temperature, logit_softcap, teacher_softcap, beta]
    _lib.distillation.default(logits, teacher_logits, labels, weights, temperatures, numbers, divergence, dlogits)
    return divergence


def scale_rows(x: Tensor, scale: Tensor, out: Tensor) -> None:
    _lib.scale_rows.default(x, scale, out)


def partial_returns(
    rewards: Tensor,
    segment_ids: Tensor | None,
    turn_counts: Tensor | None,
    lookahead: int,
    segment_length: int,
    gamma: float,
) -> Tensor | None:
    returns = rewards.new_empty(rewards.shape)
    valid = _lib.partial_returns.default(rewards, segment_ids, turn_counts, lookahead, segment_length, gamma, returns)
    return returns if valid else None
