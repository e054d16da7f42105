"""The C++ and CUDA backends: allocates outputs and unpacks the spec, nothing else. One contract, dispatched by the
tensors' device."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ppg_fast.spec import BASELINES, REDUCTIONS, Columns, KLEstimator, LossType, PolicyLossSpec, Reduction, Turns


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
HAS_CUDA = "cuda" in _lib.build()
ISAS = ("avx512", "avx2", "baseline")


def isa() -> str:
    """The instruction set that the CPU kernels run on."""
    return _lib.build().split()[0].removeprefix("isa=")


def use_isa(name: str) -> None:
    """Run the CPU kernels on another instruction set of this processor, for tests and benchmarks; ValueError where it
    lacks it."""
    if not _lib.use_isa(name):
        raise ValueError(f"the instruction set must be one of {', '.join(ISAS)} that this processor has, got {name!r}")


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


def _new(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _term(spec: PolicyLossSpec) -> tuple[float, ...]:
    """The numbers of the scalar loss, as the operators take them."""
    return (
        LossType[spec.loss_type.upper()], KLEstimator[spec.kl_estimator.upper()], spec.clip_low, spec.clip_high,
        spec.dual_clip,
        spec.kl_coef, spec.entropy_coef, spec.importance_cap, spec.temperature, spec.logit_softcap,
    )  # fmt: skip


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
    logprob, ent, lse = _new(logits, N), _new(logits, N if entropy else 0), _new(logits, N)
    _lib.logprobs_fwd(
        logits, labels, temperatures, temperature, logit_softcap, logprob, ent if entropy else None, lse, score_norm
    )
    return logprob, ent, lse


def logprobs_bwd(
    logits: Tensor,
    labels: Tensor,
    lse: Tensor,
    entropy: Tensor,
    d_logprob: Tensor,
    d_entropy: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    logit_softcap: float,
    dlogits: Tensor,
) -> None:
    _lib.logprobs_bwd(
        logits, labels, lse, entropy, d_logprob, d_entropy, temperatures, temperature, logit_softcap, dlogits
    )


def policy_loss(
    logits: Tensor,
    labels: Tensor,
    advantages: Tensor,
    weights: Tensor | None,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    rollout_logprobs: Tensor | None,
    temperatures: Tensor | None,
    spec: PolicyLossSpec,
    entropy: bool,
    dlogits: Tensor | None,
    score_norm: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    N = labels.numel()
    entropy = entropy or spec.entropy_coef != 0 or score_norm is not None
    loss, logprob, ent = _new(logits, N), _new(logits, N), _new(logits, N if entropy else 0)
    _lib.policy_loss(
        logits, labels, advantages, weights, old_logprobs, ref_logprobs, rollout_logprobs, temperatures, *_term(spec),
        loss, logprob, ent if entropy else None, dlogits, score_norm,
    )  # fmt: skip
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
) -> tuple[Tensor, Tensor, Tensor]:
    shape, summed, given = logits.shape[:2], reduction.kind != "none", reduction.normalizer
    entropy = entropy or spec.entropy_coef != 0 or score_norm is not None
    loss, logprob, ent = _new(logits, *shape), _new(logits, *shape), _new(logits, *shape if entropy else (0,))
    if shape.numel() == 0:
        return torch.zeros((), device=logits.device) if summed else loss, logprob, ent
    counted, slices = _counts(shape.numel(), reduction)
    normalizer = (0.0, given) if isinstance(given, Tensor) else (given or 0.0, None)
    work = torch.empty(counted * slices + 1, dtype=torch.int32, device=logits.device)
    total, credit, given_turns = _new(logits) if summed else None, None, (*(None,) * 5, 1, 0, 1.0, 0, 0.0)
    if turns is not None:
        credit = _new(logits, 1 if turns.baseline == "none" else 2, *turns.rewards.shape)
        given_turns = *turns[:8], BASELINES.index(turns.baseline), turns.std_eps
    _lib.fused_policy_loss(
        logits, *columns, *given_turns, REDUCTIONS.index(reduction.kind), *normalizer,
        reduction.sequences, reduction.cu_seqlens, counted, slices, skip_zero_advantages, *_term(spec),
        credit, work, loss, total, logprob, ent if entropy else None, dlogits, score_norm,
    )  # fmt: skip
    return loss if total is None else total, logprob, ent


def _counts(rows: int, reduction: Reduction) -> tuple[int, int]:
    """How many sequences have their active tokens counted, and in how many slices each, so that a slice is a few
    thousand tokens."""
    if reduction.kind == "sequence_mean" or (reduction.kind == "sequence_sum" and reduction.normalizer is None):
        return reduction.sequences, max(1, min(rows // reduction.sequences // 4096, 16))
    if reduction.kind == "token_mean" and reduction.normalizer is None:
        return 1, max(1, min(rows // 4096, 128))
    return 0, 1


def rescale_rows(dlogits: Tensor, scale: Tensor) -> None:
    _lib.rescale_rows(dlogits, scale)


def partial_returns(
    rewards: Tensor,
    segment_ids: Tensor | None,
    turn_counts: Tensor | None,
    lookahead: int,
    segment_length: int,
    gamma: float,
) -> Tensor:
    returns = _new(rewards, *rewards.shape)
    _lib.partial_returns(rewards, segment_ids, turn_counts, lookahead, segment_length, gamma, returns)
    return returns
