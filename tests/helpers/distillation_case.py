"""Both sides of a distillation, its formulas written out, and the call of the package."""

import math

import torch

import ppg_fast as ppg

N, D, E, V = 23, 16, 12, 209
KINDS = {"forward_kl": ("forward_kl", None), "reverse_kl": ("reverse_kl", None), "jsd": ("jsd", 0.3)}


def inputs(dtype=torch.float32, device="cpu"):
    """Both heads and labels, NaN in masked rows: (hidden, weight, bias), the teacher's, labels."""
    labels, rows = torch.randint(V, (N,)), torch.arange(N)
    labels[rows % 4 == 3] = -100
    heads = []
    for width in (D, E):
        hidden = torch.randn(N, width)
        hidden[rows % 4 == 3] = torch.nan
        head = hidden, torch.randn(V, width) * 3 / math.sqrt(width), torch.randn(V)
        heads.append(tuple(t.to(device, dtype) for t in head))
    return *heads, labels.to(device)


def capped(z, softcap):
    return softcap * torch.tanh(z / softcap) if softcap else z


def formula(logits, teacher_logits, divergence, beta, k=0):
    """D(q, p) of each row, written out; ``k``: of the teacher's k likeliest tokens and the rest as one."""
    p, q = logits.softmax(-1), teacher_logits.softmax(-1)
    if k:
        ids = q.topk(k).indices
        p, q = (torch.cat([x.gather(-1, ids), 1 - x.gather(-1, ids).sum(-1, keepdim=True)], -1) for x in (p, q))
    kl = lambda a, b: (a * (a / b).log()).sum(-1)  # noqa: E731
    if divergence == "forward_kl":
        return kl(q, p)
    if divergence == "reverse_kl":
        return kl(p, q)
    m = beta * q + (1 - beta) * p
    return beta * kl(q, m) + (1 - beta) * kl(p, m)


def textbook(student, taught, labels, dtype, kind, weights=1.0, temperature=1.0, caps=(0.0, 0.0), k=0):
    """Loss, divergences and gradients of sum of weights D over the active rows in ``dtype``."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in student]
    active = (labels != -100).nonzero().squeeze(1)
    z = torch.nn.functional.linear(leaves[0][active], *leaves[1:])
    y = torch.nn.functional.linear(taught[0][active].to(dtype), *(t.to(dtype) for t in taught[1:]))
    t = temperature[active, None].to(dtype) if isinstance(temperature, torch.Tensor) else temperature
    found = formula(capped(z, caps[0]) / t, capped(y, caps[1]) / t, *KINDS[kind], k)
    w = weights[active].to(dtype) if isinstance(weights, torch.Tensor) else weights
    each = torch.zeros(N, dtype=dtype, device=labels.device).index_put((active,), found)
    loss = (w * found).sum()
    grads = torch.autograd.grad(loss, leaves)
    named = {"loss": loss, "divergences": each, "d_hidden": grads[0], "d_weight": grads[1], "d_bias": grads[2]}
    return {name: value.detach().cpu() for name, value in named.items()}


def ours(student, teacher, labels, **options):
    hidden, weight, bias = (t.detach().requires_grad_() for t in student)
    out = ppg.linear_distillation_loss(hidden, weight, labels, teacher, bias=bias, **options)
    grads = torch.autograd.grad(out.loss, (hidden, weight, bias))
    return {"loss": out.loss, "divergences": out.divergences} | dict(
        zip(("d_hidden", "d_weight", "d_bias"), grads, strict=True)
    )


def teacher_of(taught, kind, **options):
    divergence, beta = KINDS[kind]
    return ppg.Teacher(*taught, divergence=divergence, beta=beta, **options)
