"""Log-probability of each label and entropy of each row. Mirrors kernels/triton/logprobs.py and csrc/*/logprobs.*"""

import torch
from torch import Tensor


def token_logprobs(logits: Tensor, labels: Tensor, temperature: Tensor | float = 1.0, logit_softcap: float = 0.0) -> tuple[Tensor, Tensor]:
    """l = log softmax(z)[label] and H = -sum p log p, with z = softcap(logits) / temperature.

    ``logits`` (N, V) in any floating dtype, ``labels`` (N,) int64, masked where negative: such a row is not read and gives
    zeros. ``temperature`` a number or (N,). Returns two (N,) tensors in the dtype of the logits, differentiable in them.
    """
    rows = (labels >= 0).nonzero().squeeze(-1)
    z = logits[rows]
    if logit_softcap:
        z = logit_softcap * torch.tanh(z / logit_softcap)
    z = z / (temperature[rows, None].to(z.dtype) if isinstance(temperature, Tensor) else temperature)
    logp = torch.log_softmax(z, -1)
    p = logp.exp()
    entropy = -(p * logp.masked_fill(p == 0, 0.0)).sum(-1)  # 0 log 0 = 0, also where a logit is -inf
    logprobs = logp.gather(-1, labels[rows, None]).squeeze(-1)
    zeros = torch.zeros(labels.shape, dtype=logits.dtype, device=logits.device)
    return zeros.index_put((rows,), logprobs), zeros.index_put((rows,), entropy)
