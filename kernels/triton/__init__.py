"""The Triton backend: CUDA and ROCm tensors, and CPU tensors where Triton interprets its kernels. The contract is in
ppg_fast/backends.py.

The sources lie in kernels/triton and are installed as ``ppg_fast.kernels``.
"""

import torch
import triton

if not torch.cuda.is_available() and not triton.knobs.runtime.interpret:
    raise ImportError("triton needs a CUDA or ROCm device, or TRITON_INTERPRET=1 to run its kernels on a CPU")

from .distillation import distillation
from .fused_policy_loss import fused_policy_loss
from .logprobs import logprobs_bwd, logprobs_fwd, unit_of_maximum
from .partial_returns import partial_returns
from .policy_loss import policy_loss
from .scale_rows import scale_rows

__all__ = [
    "distillation",
    "fused_policy_loss",
    "logprobs_bwd",
    "logprobs_fwd",
    "partial_returns",
    "policy_loss",
    "scale_rows",
    "unit_of_maximum",
]
