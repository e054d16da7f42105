"""How far a teacher's distribution is from the student's, token by token. Mirrors kernels/triton/distillation.py and
csrc/*/distillation.*"""

import math

import torch
from torch import Tensor

from ppg_fast.reference.logprobs import log_softmax
from ppg_fast.spec import LEAST_LOGPROB, LEAST_TAIL


def distillation(
    logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    beta: float,
    temperature: Tensor | float = 1.0,
    logit_softcap: float = 0.0,
    teacher_softcap: float = 0.0,
) -> Tensor:
    """The divergence of each row in nats, differentiable in ``logits``; 0 where the label is negative: such a row is
    not read.

    p = softmax of ``logits`` (N, V), q of ``teacher_logits`` (N, V), both at one temperature, a number or (N,), each
    under its own softcap. Returns (N,) in the dtype of the logits: see `divergence`.
    """
    rows = (labels >= 0).nonzero().squeeze(-1)
    student = log_softmax(logits, rows, temperature, logit_softcap)
    teacher = log_softmax(teacher_logits.detach(), rows, temperature, teacher_softcap)
    found = divergence(student, teacher, beta).sum(-1)
    return torch.zeros(labels.shape, dtype=logits.dtype, device=logits.device).index_put((rows,), found)


def divergence(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """What each outcome adds to the divergence of log q, ``teacher``, from log p, ``student``; log-probs count as at
    least LEAST_LOGPROB.

    beta 0: KL(q, p) = sum q (log q - log p); beta 1: KL(p, q); between, the generalised Jensen-Shannon divergence beta
    KL(q, m) + (1 - beta) KL(p, m) with m = beta q + (1 - beta) p.  Source: arXiv:2306.13649
    """
    s, t = (logp.clamp(min=LEAST_LOGPROB) for logp in (student, teacher))
    p, q = s.exp(), t.exp()
    if beta == 0:
        return q * (t - s)
    if beta == 1:
        return p * (s - t)
    m = torch.logaddexp(s + math.log1p(-beta), t + math.log(beta))
    return beta * q * (t - m) + (1 - beta) * p * (s - m)


def top_k_divergence(student: Tensor, teacher: Tensor, there: Tensor, beta: float, tail: bool) -> Tensor:
    """The divergence of k outcomes and, with ``tail``, of all others as one; (N,), differentiable in ``student``.

    ``student``, ``teacher``: log-probs of the same tokens, (N, k); ``there``: (N, k) bool, which of them the teacher
    named. The mass of the others is 1 minus that of the named, and at least LEAST_TAIL on either side.
    """
    found = divergence(torch.where(there, student, 0.0), torch.where(there, teacher, 0.0), beta)
    found = torch.where(there, found, 0.0).sum(-1)
    if not tail:
        return found
    s, t = (1 - torch.where(there, logp.exp(), 0.0).sum(-1) for logp in (student, teacher))
    return found + divergence(s.clamp(min=LEAST_TAIL).log(), t.clamp(min=LEAST_TAIL).log(), beta)
