"""Who computes: one contract, and the one place that chooses.

A backend is a module with the CONTRACT functions. Logits are (B, L, V) with unit stride along V and any other strides, in float32,
bfloat16 or float16, seen as N = B L rows; per-row arguments are contiguous (N,), float32 but for ``labels`` (int64, negative = masked:
such a row is not read). ``temperatures`` (N,) overrides ``temperature`` where it is given. Optional tensors may be None.

    partial_returns(rewards, segment_ids, turn_counts, lookahead, segment_length, gamma) -> returns (B, T)

    logprobs_fwd(logits, labels, temperatures, temperature, logit_softcap, entropy: bool) -> logprob, entropy, lse
        Log-prob, entropy ((0,) where it is not wanted) and log-sum-exp of each row, zero where masked.

    logprobs_bwd(logits, labels, lse, entropy, d_logprob, d_entropy, temperatures, temperature, logit_softcap, dlogits) -> None
        Writes d_logprob (1[v = label] - p) - d_entropy p (log p + H) into dlogits, which may be the logits. Rows that are masked or have
        d_logprob = d_entropy = 0 are not read and get exact zeros. ``entropy`` is not read where ``d_entropy`` is None.

    policy_loss(logits, labels, advantages, weights, old_logprobs, ref_logprobs, rollout_logprobs, temperatures, spec, entropy: bool,
                dlogits) -> loss, logprob, entropy
        Weighted loss, log-prob and entropy of each row; d(sum of losses) into dlogits where it is given, which may be the logits.
        A row is SKIP where masked; FULL where dlogits is given and its advantage is not zero or the spec has a KL or entropy term; else
        FORWARD-ONLY. SKIP rows are not read; SKIP and FORWARD-ONLY rows get exact zeros in dlogits. Entropy is (0,) unless wanted or
        needed. The spec is of a token-level loss with a number as temperature.

    rescale_rows(dlogits, scale) -> None
        Multiplies row n of dlogits by scale[n] in place; rows whose scale is 1 are not touched.

"reference", plain PyTorch, stands in where no backend can run: the ops then call its functions in their place.
"""

import importlib
from functools import cache
from types import ModuleType

import torch

NAMES = ("cpu", "triton", "cuda")
CONTRACT = ("partial_returns", "logprobs_fwd", "logprobs_bwd", "policy_loss", "rescale_rows")
MODULES = {"cpu": "ppg_fast.native", "cuda": "ppg_fast.native", "triton": "ppg_fast.kernels", "reference": "ppg_fast.reference"}


@cache
def load(name: str) -> ModuleType:
    """The module that holds the CONTRACT functions of backend ``name``: "cpu", "triton", "cuda", or "reference" for plain PyTorch."""
    if name not in MODULES:
        raise ValueError(f"backend must be one of {', '.join(MODULES)}, got {name!r}")
    module = importlib.import_module(MODULES[name])
    if name == "cuda":
        module.require_cuda()
    return module


@cache
def why_not(name: str) -> str | None:
    """None if backend ``name`` can run here, else the reason in words a person can act on."""
    try:
        load(name)
    except Exception as error:  # whatever keeps a backend from loading is the answer
        return f"{name}: {error}"
    return None


@torch.compiler.assume_constant_result  # torch.compile need not look inside
def default(device_type: str) -> str:
    """The fastest backend that runs on tensors of ``device_type``; "reference" where no kernel does."""
    order = ("cuda", "triton") if device_type == "cuda" else ("cpu",) if device_type == "cpu" else ()
    return next((name for name in order if why_not(name) is None), "reference")
