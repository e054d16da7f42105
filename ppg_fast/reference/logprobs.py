"""Log-probability of each label, entropy and score norm of each row. Mirrors kernels/triton/logprobs.py and
csrc/*/logprobs.*"""

import torch
from torch import Tensor


def token_logprobs(
    logits: Tensor, labels: Tensor, temperature: Tensor | float = 1.0, logit_softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """l = log softmax(z)[label] and H = -sum p log p, with z = softcap(logits) / temperature.

    ``logits`` (N, V) in any floating dtype, ``labels`` (N,) int64, masked where negative: such a row is not read and
    gives zeros. ``temperature`` a number or (N,). Returns two (N,) tensors in the dtype of the logits, differentiable
    in them.
    """
    rows = (labels >= 0).nonzero().squeeze(-1)
    logp = log_softmax(logits, rows, temperature, logit_softcap)
    p = logp.exp()
    entropy = -(p * logp.masked_fill(p == 0, 0.0)).sum(-1)  # 0 log 0 = 0, also where a logit is -inf
    logprobs = logp.gather(-1, labels[rows, None]).squeeze(-1)
    zeros = torch.zeros(labels.shape, dtype=logits.dtype, device=logits.device)
    return zeros.index_put((rows,), logprobs), zeros.index_put((rows,), entropy)


def score_norms(
    logits: Tensor, labels: Tensor, temperature: Tensor | float = 1.0, logit_softcap: float = 0.0
) -> Tensor:
    """|d l / d z|^2 = sum p^2 - 2 p[label] + 1 in [0, 2], (N,); zero where masked, no gradient. Arguments as in
    `token_logprobs`."""
    rows = (labels >= 0).nonzero().squeeze(-1)
    p = log_softmax(logits.detach(), rows, temperature, logit_softcap).exp()
    norms = p.square().sum(-1) - 2 * p.gather(-1, labels[rows, None]).squeeze(-1) + 1
    return torch.zeros(labels.shape, dtype=logits.dtype, device=logits.device).index_put((rows,), norms.clamp(min=0))


def log_sum_exps(
    logits: Tensor, labels: Tensor, temperature: Tensor | float = 1.0, logit_softcap: float = 0.0
) -> Tensor:
    """log sum_v exp(z_v) of each row, (N,), differentiable in the logits; zero where masked. Arguments as in
    `token_logprobs`."""
    rows = (labels >= 0).nonzero().squeeze(-1)
    z = _capped(logits[rows], logit_softcap)
    sums = (z / _of_rows(temperature, rows, z)).logsumexp(-1)
    return torch.zeros(labels.shape, dtype=logits.dtype, device=logits.device).index_put((rows,), sums)


def log_softmax(logits: Tensor, rows: Tensor, temperature: Tensor | float, logit_softcap: float) -> Tensor:
    """log softmax of z = softcap(logits) / temperature in the rows of these numbers, (n, V)."""
    z = _capped(logits[rows], logit_softcap)
    z = z - z.detach().amax(-1, keepdim=True)  # before a small temperature makes large numbers of it
    return torch.log_softmax(z / _of_rows(temperature, rows, z), -1)


def _capped(z: Tensor, logit_softcap: float) -> Tensor:
    return logit_softcap * torch.tanh(z / logit_softcap) if logit_softcap else z


def _of_rows(temperature: Tensor | float, rows: Tensor, like: Tensor) -> Tensor | float:
    return temperature[rows, None].to(like.dtype) if isinstance(temperature, Tensor) else temperature
