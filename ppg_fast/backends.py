"""Who computes: one contract, and the one place that chooses.

A backend is a module with the CONTRACT functions. Logits are (B, L, V) with unit stride along V and any other strides,
in float32, bfloat16 or float16, seen as N = B L rows; per-row arguments are contiguous (N,), float32 but for ``labels``
(int64, negative = masked: such a row is not read). ``temperatures`` (N,) overrides ``temperature`` where it is given.
Optional tensors may be None. On a CPU, `partial_returns` and `fused_policy_loss` may return None, having computed
nothing, where a value breaks a rule: the op then names it.

    partial_returns(rewards, segment_ids, turn_counts, lookahead, segment_length, gamma) -> returns (B, T)

    logprobs_fwd(logits, labels, temperatures, temperature, logit_softcap, entropy: bool, score_norm=None)
            -> logprob, entropy, lse
        Log-prob, entropy ((0,) where it is not wanted) and what the backward pass starts from, lse (N, 2): the
        maximum m of each row (before the temperature, and in units of ``unit_of_maximum(logit_softcap)``, a number of
        the backend's) and sum_v exp(z_v - max z). The log-sum-exp is m unit / temperature + log of it, apart because no
        float32 holds both where all logits are far from 0. Zero where masked.

    logprobs_bwd(logits, labels, lse, entropy, d_logprob, d_entropy, d_lse, temperatures, temperature, logit_softcap,
            dlogits) -> None
        Writes d_logprob (1[v = label] - p) - d_entropy p (log p + H) + d_lse p into dlogits, which may be the logits;
        d_lse is the gradient of the log-sum-exp, None: 0. Rows that are masked or have d_logprob = d_entropy = d_lse
        = 0 are not read and get exact zeros. ``entropy`` is not read where ``d_entropy`` is None.

    policy_loss(logits, labels, advantages, weights, old_logprobs, ref_logprobs, rollout_logprobs, temperatures,
            nll_weights, spec, entropy: bool, dlogits, score_norm=None) -> loss, logprob, entropy
        Weighted loss, log-prob and entropy of each row; d(sum of losses) into dlogits where it is given, which may be
        the logits. A row is SKIP where masked; FULL where dlogits is given and its advantage or its nll weight is not
        zero or the spec needs every row; else FORWARD-ONLY. SKIP rows are not read; SKIP and FORWARD-ONLY rows get
        exact zeros in dlogits. NaN in a number that a row's loss is made of is NaN in its loss and, where the row is
        FULL, in its whole gradient. Entropy is (0,) unless wanted or needed. The spec is of a token-level loss with a
        number as temperature.

    distillation(logits, teacher_logits, labels, weights, temperatures, temperature, logit_softcap, teacher_softcap,
            beta: float, dlogits) -> divergence
        How far q = softmax(teacher's z) is from p = softmax(student's z) in each row, in nats, unweighted: beta 0 the
        forward KL(q, p), 1 the reverse KL(p, q), between beta KL(q, m) + (1 - beta) KL(p, m) with m = beta q + (1 -
        beta) p. teacher_logits (B, L, V) are of the dtype of the logits, with strides of their own; both are taken at
        the same temperature, each under its own softcap (0: none). Into dlogits, where given, weights[n] (None: 1)
        times the gradient of the divergence by the student's logits, through temperature and softcap; by z it is p - q;
        p (log(p / q) - KL(p, q)); (1 - beta) p (log(p / m) - KL(p, m)). dlogits may be the logits or the teacher's:
        every element is read before it is written. Rows that are masked or have weight 0 are not read, of neither
        side, and get 0 and exact zeros. A log-prob counts as at least LEAST_LOGPROB, so that a token that both exclude
        (-inf) adds 0. NaN in a logit of either side, or in the weight for the gradient alone, is NaN in the divergence
        and the whole gradient of its row. A divergence near 0 is a sum of small terms, not a difference of sums: its
        error is that of the log-probs. Labels only mask.

    scale_rows(x, scale, out) -> None
        Writes row n of x (B, L, V) times scale[n], or all times the one of scale (1,), rounded once, into out, which
        may be x, then rows whose scale is 1 are not touched, or hold 16 bits where x is float32. Both have unit stride
        along V and any other strides.

``score_norm``, (N,) or (B, L) float32 where given, is written like dlogits: |d logprob / d z|^2 = sum_v p_v^2 - 2
p_label + 1 of each row that is read, z the logit after softcap and temperature, never below 0; 0 elsewhere. The entropy
then counts as wanted. What else is returned or written has the same bits with and without it.

    fused_policy_loss(logits, columns: Columns, turns: Turns | None, reduction: Reduction, spec,
            skip_zero_advantages: bool, entropy: bool, dlogits, score_norm=None) -> loss, logprob, entropy
        From what the caller holds (`contract`) to the reduced loss and dlogits; on a GPU at most two launches,
        no other work on the device, no host sync. Row n = b L + l is active where its label is not negative,
        its mask not 0 and, under ``turns``, its turn id not negative; s is the run of cu_seqlens that it lies
        in, or n // (N // sequences). Its advantage A is that of the column, or of its turn: the return of turn
        t of dialogue s minus the baseline of that turn over its group, in float64 from float32 returns,
        dialogues in their order, so that equal returns give exact zeros; 0 at and beyond the turns of the
        dialogue. Its weight is 1 / (outer inner): outer is the normalizer where given, else max(active rows, 1)
        for token_mean, max(sequences with an active row, 1) for sequence_mean and sequence_sum, else 1; inner
        is max(active rows of s, 1) for sequence_mean, else 1. SKIP: a row that is not active, or under
        skip_zero_advantages one with A = 0 and no nll weight whose spec does not need every row; it was counted
        nevertheless. The rest as in policy_loss. Log-probs and entropies, in the shape of the labels, have the bits of
        logprobs_fwd. The loss is 0-d, summed in an order that does not depend on the schedule; of each token,
        not summed, for "none".

"reference", plain PyTorch, stands in where no backend can run: the ops then call its functions in their place.
"""

import importlib
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])
NAMES = ("cpu", "triton", "cuda")
CONTRACT = ("partial_returns", "logprobs_fwd", "logprobs_bwd", "policy_loss", "distillation", "scale_rows")
MODULES = {
    "cpu": "ppg_fast.native",
    "cuda": "ppg_fast.native",
    "triton": "ppg_fast.kernels",
    "reference": "ppg_fast.reference",
}


@cache
def load(name: str) -> ModuleType:
    """The module that holds the CONTRACT functions of backend ``name``: "cpu", "triton", "cuda", or "reference" for
    plain PyTorch."""
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


def constant_result(function: Function) -> Function:
    """What torch.compiler.assume_constant_result makes of it: torch.compile need not look inside. That one imports the
    compiler, seconds for everybody who does not compile."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_result
def fuses(name: str) -> bool:
    """Whether backend ``name`` takes a whole policy loss at once; plain PyTorch alone is composed of operations."""
    return hasattr(load(name), "fused_policy_loss")


@constant_result
def default(device_type: str) -> str:
    """The fastest backend that runs on tensors of ``device_type``; "reference" where no kernel does."""
    return _default(device_type)


@cache
def _default(device_type: str) -> str:
    order = ("cuda", "triton") if device_type == "cuda" else ("cpu",) if device_type == "cpu" else ()
    return next((name for name in order if why_not(name) is None), "reference")


def forget() -> None:
    """Look again at what can run here."""
    for known in (load, why_not, _default):
        known.cache_clear()
