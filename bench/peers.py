"""The other libraries, each in the mode its users run it in. One that is not installed, or cannot do the case, says so.

Those that return log-probs get the loss on top by plain PyTorch (`ppo`), as their callers do.
"""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .problem import SPEC, Case, Problem, ppo
from .providers import Provider, Unavailable


def load(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        installed = importlib.util.find_spec(module.split(".")[0]) is not None
        raise Unavailable(
            f"cannot be imported: {error}" if installed else f"not installed (pip install {package})"
        ) from error


def _needs_cuda(case: Case, what: str) -> None:
    if case.device != "cuda":
        raise Unavailable(f"{what} needs a GPU")


# ---- from logits -----------------------------------------------------------------------------------------------------
def liger_triton(case: Case, interpreted: bool = False) -> Provider:
    """Liger GRPO (Triton)."""
    if not interpreted:
        _needs_cuda(case, "the Triton kernel")
    grpo = load("liger_kernel.transformers.grpo_loss", "liger-kernel")
    if case.zero:
        raise Unavailable("takes one advantage a sequence, and here the turns of a dialogue differ")

    def compute(p: Problem) -> Tensor:
        """Liger takes the logits of L + 1 positions and ignores the last."""
        assert p.base is not None
        numbers = {"temperature": 1.0, "beta": 0.0, "eps_low": SPEC.clip_low, "eps_high": SPEC.clip_high}
        rows = p.old_logprobs[None], None, p.labels.clamp(min=0)[None], p.sequence_advantages, p.mask[None]
        return grpo.triton_grpo_loss(p.base[None], *rows, **numbers, loss_type="bnpo", reduce=True)[0]

    def leaves(p: Problem) -> tuple[Tensor, ...]:
        assert p.base is not None
        return (p.base,)

    return Provider("Liger GRPO (Triton)", compute, destroys=True, leaves=leaves)


def quack(case: Case) -> Provider:
    """quack cross-entropy."""
    _needs_cuda(case, "quack")
    module = load("quack.cross_entropy", "quack-kernels")

    def compute(p: Problem) -> Tensor:
        return ppo(-module.cross_entropy(p.logits, p.labels, reduction="none", ignore_index=-100), p)

    return Provider("quack cross-entropy", compute)


def flash_attention(case: Case) -> Provider:
    """flash-attention cross-entropy."""
    _needs_cuda(case, "the Triton kernel")
    module = load("flash_attn.ops.triton.cross_entropy", "flash-attn")

    def compute(p: Problem) -> Tensor:
        """As verl calls it, the gradient in place."""
        return ppo(-module.cross_entropy_loss(p.logits, p.labels, ignore_index=-100, inplace_backward=True)[0], p)

    return Provider("flash-attention cross-entropy", compute, destroys=True)


def trl_selective(case: Case) -> Provider:
    """TRL selective_log_softmax."""
    utils = load("trl.trainer.utils", "trl")
    if case.op == "policy_loss":
        return Provider(
            "TRL selective_log_softmax", lambda p: ppo(utils.selective_log_softmax(p.logits, p.labels.clamp(min=0)), p)
        )
    return Provider("TRL selective_log_softmax", lambda p: utils.selective_log_softmax(p.logits, p.labels.clamp(min=0)))


def liger_selective(case: Case) -> Provider:
    """Liger fused_selective_log_softmax (Triton)."""
    _needs_cuda(case, "the Triton kernel")
    ops = load("liger_kernel.ops.grpo_loss", "liger-kernel")

    def compute(p: Problem) -> Tensor:
        assert p.base is not None
        return ops.fused_selective_log_softmax(p.base[None], p.labels.clamp(min=0)[None], 1.0, mask=p.mask[None])[0]

    return Provider("Liger selective log-softmax (Triton)", compute)


# ---- from hidden states ----------------------------------------------------------------------------------------------
def trl_head(case: Case) -> Provider:
    """TRL head."""
    kernels, utils = load("trl.kernels", "trl"), load("trl.trainer.utils", "trl")
    width = utils._CHUNKED_LOGPROB_CHUNK_SIZE

    def compute(p: Problem) -> Tensor:
        """As add_fused_lm_head calls it for GRPOTrainer: entropy too; the masked rows are dropped on a GPU only."""
        hidden, weight = p.leaves
        mask, labels, compact = p.mask, p.labels.clamp(min=0), p.labels.is_cuda
        rows = (hidden[mask], labels[mask]) if compact else (hidden, labels)
        arguments = (rows[0], weight, None, rows[1], 1.0, width, None, 1.0, ("log_probs", "entropy"))
        logprobs = kernels.ChunkedLogProbFunction.apply(*arguments)[0]
        logprobs = (
            logprobs.new_zeros(mask.shape).masked_scatter(mask, logprobs) if compact else logprobs.masked_fill(~mask, 0)
        )
        return ppo(logprobs, p)

    return Provider("TRL head", compute)


def _liger_chunked(case: Case, is_compiled: bool) -> Callable[[Problem], Tensor]:
    chunked = load("liger_kernel.chunked_loss", "liger-kernel")
    if case.zero:
        raise Unavailable("takes one advantage a sequence, and here the turns of a dialogue differ")
    loss = chunked.LigerFusedLinearGRPOLoss(
        beta=0.0,
        compiled=is_compiled,
        use_ref_model=False,
        epsilon_low=SPEC.clip_low,
        epsilon_high=SPEC.clip_high,
        loss_type="bnpo",
    )

    def compute(p: Problem) -> Tensor:
        hidden, weight = p.leaves
        batch = (p.sequences, -1)
        x, labels, old = (
            hidden.view(*batch, hidden.shape[-1]),
            p.labels.clamp(min=0).view(batch),
            p.old_logprobs.view(batch),
        )
        return loss(x, weight, labels, p.mask.view(batch), p.sequence_advantages, old_per_token_logps=old)[0]

    return compute


def liger_chunked(case: Case) -> Provider:
    """Liger chunked GRPO."""
    return Provider("Liger chunked GRPO", _liger_chunked(case, True), compiles=True)


def liger_chunked_eager(case: Case) -> Provider:
    """Liger chunked GRPO, compiled=False."""
    return Provider("Liger chunked GRPO, compiled=False", _liger_chunked(case, False))


def torch_chunked(case: Case) -> Provider:
    """F.linear_cross_entropy, chunked."""
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise Unavailable("needs torch >= 2.13")
    options = torch.nn.LinearCrossEntropyOptions()

    def compute(p: Problem) -> Tensor:
        hidden, weight = p.leaves
        return ppo(-F.linear_cross_entropy(hidden, weight, p.labels, reduction="none", options=options), p)

    return Provider("F.linear_cross_entropy, chunked", compute)


def cut_cross_entropy(case: Case) -> Provider:
    """cut-cross-entropy."""
    cce = load("cut_cross_entropy", "cut-cross-entropy")
    impl = "cce" if case.device == "cuda" else "torch_compile"

    def compute(p: Problem) -> Tensor:
        return ppo(-cce.linear_cross_entropy(*p.leaves, p.labels, reduction="none", impl=impl), p)

    return Provider(f"cut-cross-entropy ({impl})", compute, compiles=impl == "torch_compile")
