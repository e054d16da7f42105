"""The C++ and CUDA backends: allocates outputs and unpacks the spec, nothing else. One contract, dispatched by the tensors' device."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ppg_fast.spec import KLEstimator, LossType, PolicyLossSpec


def _load_extension() -> Any:
    """The extension's operators; ImportError with the remedy where it was not built."""
    built = sorted(Path(__file__).parent.glob("_C*.so"))
    if not built:
        raise ImportError("the C++ extension is not built: install a C++20 compiler, then `pip install --no-build-isolation -e .` again")
    torch.ops.load_library(built[0])
    return torch.ops.ppg_fast_native


_lib = _load_extension()
HAS_CUDA = "cuda" in _lib.build()
ISAS = ("avx512", "avx2", "baseline")


def isa() -> str:
    """The instruction set that the CPU kernels run on."""
    return _lib.build().split()[0].removeprefix("isa=")


def use_isa(name: str) -> None:
    """Run the CPU kernels on another instruction set of this processor, for tests and benchmarks; ValueError where it lacks it."""
    if not _lib.use_isa(name):
        raise ValueError(f"the instruction set must be one of {', '.join(ISAS)} that this processor has, got {name!r}")


def want_huge_pages(memory: Tensor) -> None:
    """Advise the system to back fresh ``memory`` by huge pages; a system without them goes on as before."""
    _lib.want_huge_pages(memory)


def require_cuda() -> None:
    """ImportError with the remedy unless the CUDA kernels can run here."""
    if not HAS_CUDA:
        raise ImportError("the extension was built without CUDA (no nvcc was on PATH): install the CUDA toolkit, then ppg_fast again")
    if not torch.cuda.is_available():
        raise ImportError("torch sees no CUDA device")


def _new(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def logprobs_fwd(
    logits: Tensor, labels: Tensor, temperatures: Tensor | None, temperature: float, logit_softcap: float, entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    N = labels.numel()
    logprob, ent, lse = _new(logits, N), _new(logits, N if entropy else 0), _new(logits, N)
    _lib.logprobs_fwd(logits, labels, temperatures, temperature, logit_softcap, logprob, ent if entropy else None, lse)
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
    _lib.logprobs_bwd(logits, labels, lse, entropy, d_logprob, d_entropy, temperatures, temperature, logit_softcap, dlogits)


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
) -> tuple[Tensor, Tensor, Tensor]:
    N = labels.numel()
    entropy = entropy or spec.entropy_coef != 0
    loss, logprob, ent = _new(logits, N), _new(logits, N), _new(logits, N if entropy else 0)
    _lib.policy_loss(
        logits, labels, advantages, weights, old_logprobs, ref_logprobs, rollout_logprobs, temperatures,
        LossType[spec.loss_type.upper()], KLEstimator[spec.kl_estimator.upper()], spec.clip_low, spec.clip_high, spec.dual_clip,
        spec.kl_coef, spec.entropy_coef, spec.importance_cap, spec.temperature, spec.logit_softcap,
        loss, logprob, ent if entropy else None, dlogits,
    )  # fmt: skip
    return loss, logprob, ent


def rescale_rows(dlogits: Tensor, scale: Tensor) -> None:
    _lib.rescale_rows(dlogits, scale)


def partial_returns(
    rewards: Tensor, segment_ids: Tensor | None, turn_counts: Tensor | None, lookahead: int, segment_length: int, gamma: float
) -> Tensor:
    returns = _new(rewards, *rewards.shape)
    _lib.partial_returns(rewards, segment_ids, turn_counts, lookahead, segment_length, gamma, returns)
    return returns
