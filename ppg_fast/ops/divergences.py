"""The divergence of a chunk of the student's logits from what a teacher has there, and its gradient."""

from types import ModuleType

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ppg_fast import reference
from ppg_fast.contract import Chunks, RowArguments, TeacherRows, Wanted
from ppg_fast.ops.allocation import fresh
from ppg_fast.ops.checks import check_labels, check_named
from ppg_fast.ops.head import Head
from ppg_fast.ops.rows import check_bound


class Divergences:
    """A teacher over chunks of rows: its head, or the tokens that it named. ``rows``: labels, temperature and softcap
    of the student."""

    def __init__(self, teacher: TeacherRows, rows: RowArguments, kernels: ModuleType, float32: bool) -> None:
        self.teacher, self.labels, self.kernels = teacher, rows.labels, kernels
        self.temperatures, self.spec = rows.per_row.temperatures, rows.spec
        self.head = None
        if teacher.hidden is not None and teacher.weight is not None:
            given = teacher.hidden, teacher.weight, teacher.bias, 0, (False, False, False), kernels, float32
            self.head = Head(*given)

    def __call__(self, rows: Tensor, logits: Tensor, gradient: str) -> tuple[Tensor, Tensor | None]:
        """Divergence (n,), not weighted, of ``logits`` (1, n, V), and where the gradient is: in their place for
        ``gradient`` "over", in memory of its own, which lives until the next chunk, for "apart", nowhere for ""."""
        there = None if self.head is None else self.head.logits(rows)
        out = {"": None, "over": logits}.get(gradient, there)
        if self.teacher.top_k:
            named = self._largest(there, rows) if there is not None else self._named(rows)
            if gradient == "apart" and out is None:
                out = fresh(logits, logits.shape)
            return self._of_tokens(rows, logits, *named, out), out
        scale = self._temperatures(rows), float(self.spec.temperature), self.spec.logit_softcap
        given = logits, there, self.labels[rows], self.teacher.coefs[rows], *scale
        return self.kernels.distillation(*given, self.teacher.softcap, self.teacher.beta, out), out

    def _temperatures(self, rows: Tensor) -> Tensor | None:
        return None if self.temperatures is None else self.temperatures[rows]

    def _named(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        assert self.teacher.ids is not None
        assert self.teacher.logprobs is not None
        return self.teacher.ids[rows], self.teacher.logprobs[rows]

    def _largest(self, logits: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The teacher's ids and log-probs (n, k) from its logits."""
        ids = logits[0].topk(self.teacher.top_k).indices
        first = torch.where(self.labels[rows] < 0, self.labels[rows], ids[:, 0])
        z = scaled(logits[0].gather(1, ids), self._divisor(rows), self.teacher.softcap)[0]
        scale = self._temperatures(rows), float(self.spec.temperature), self.teacher.softcap
        return ids, self.kernels.logprobs_fwd(logits, first, *scale, False)[0][:, None] + (z - z[:, :1])

    def _divisor(self, rows: Tensor) -> Tensor | float:
        return float(self.spec.temperature) if self.temperatures is None else self.temperatures[rows, None]

    def _of_tokens(
        self, rows: Tensor, logits: Tensor, ids: Tensor, teacher_logprobs: Tensor, out: Tensor | None
    ) -> Tensor:
        """Of k tokens and the rest: the gradient is -(sum of g) p_v, plus g at the tokens, g that of their log-probs.

        The backward pass of a log-prob writes the first part, and the few elements that have more are then written
        over, each rounded once.
        """
        labels, there, V = self.labels[rows], ids >= 0, logits.shape[-1]
        label = labels.clamp(min=0)[:, None]
        tokens = torch.cat([torch.where(there, ids, label), label], 1)
        z, slope = scaled(logits[0].gather(1, tokens), self._divisor(rows), self.spec.logit_softcap)
        scale = self._temperatures(rows), float(self.spec.temperature), self.spec.logit_softcap
        of_label, _, lse = self.kernels.logprobs_fwd(logits, labels, *scale, False)
        logprobs = of_label[:, None] + (z - z[:, -1:])
        with torch.enable_grad():
            student = logprobs[:, :-1].double().requires_grad_()
            tail = self.teacher.top_k < V
            found = reference.top_k_divergence(student, teacher_logprobs.double(), there, self.teacher.beta, tail)
            (g,) = torch.autograd.grad(found.sum(), student)
        divergence = torch.where(labels >= 0, found.detach().float(), 0.0)
        if out is None:
            return divergence
        g = torch.where(labels[:, None] >= 0, g.float() * self.teacher.coefs[rows, None], 0.0)
        total, own = g.sum(1), torch.nn.functional.pad(g, (0, 1))
        at_label = torch.where(there & (ids == label), g, 0.0).sum(1, keepdim=True)
        own = torch.where(tokens == label, at_label, own)
        self.kernels.logprobs_bwd(logits, labels, lse, of_label, total, None, None, *scale, out)
        values = (own - total[:, None] * logprobs.exp()) * slope
        out[0].scatter_(1, tokens, torch.where(labels[:, None] >= 0, values, 0.0).to(out.dtype))
        return divergence


def scaled(x: Tensor, temperature: Tensor | float, softcap: float) -> tuple[Tensor, Tensor | float]:
    """z of logits x in float32, and d z / d x."""
    x = x.float()
    if not softcap:
        return x / temperature, 1 / temperature
    t = torch.tanh(x / softcap)
    return softcap * t / temperature, (1 - t * t) / temperature


def check_values(rows: RowArguments, teacher: TeacherRows, vocabulary: int, validate: bool) -> None:
    """IndexError or ValueError that names the first value to break a rule; on a GPU only where asked for."""
    check_labels(rows.labels, vocabulary, validate)
    if teacher.ids is not None and (teacher.ids.is_cpu or validate):
        check_named(teacher.ids, (rows.labels >= 0) & (teacher.coefs != 0), vocabulary)


# ---- by plain PyTorch ------------------------------------------------------------------------------------------------
def reference_divergences(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: RowArguments,
    teacher: TeacherRows,
    wanted: Wanted,
    chunks: Chunks,
) -> Tensor:
    """The same by plain PyTorch: chunks of rows under activation checkpointing."""
    labels, spec, temperatures = rows.labels, rows.spec, rows.per_row.temperatures
    check_values(rows, teacher, weight.shape[0], wanted.validate)
    # a copy each chunk casts back, so that autograd adds the chunks' gradients up in float32
    dtype = torch.float32 if chunks.float32 else hidden.dtype
    weight, bias = weight.float(), None if bias is None else bias.float()

    def of_chunk(x: Tensor, weight: Tensor, bias: Tensor | None, part: Tensor) -> Tensor:
        logits = _logits(x, weight, bias, dtype)
        divisor = spec.temperature if temperatures is None else temperatures[part]
        return _reference_chunk(logits, teacher, part, divisor, spec.logit_softcap, dtype)

    divergence = torch.zeros(labels.numel(), device=hidden.device)
    active = (labels >= 0).nonzero().squeeze(1)
    check_bound(active.numel(), chunks.max_active)
    for part in ((labels >= 0) & (teacher.coefs != 0)).nonzero().squeeze(1).split(chunks.rows):
        found = checkpoint(of_chunk, hidden.index_select(0, part), weight, bias, part, use_reentrant=False)
        divergence = divergence.index_put((part,), found)
    return divergence


def _logits(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return torch.nn.functional.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)).float()


def _reference_chunk(
    logits: Tensor, teacher: TeacherRows, part: Tensor, divisor: Tensor | float, softcap: float, dtype: torch.dtype
) -> Tensor:
    every, V = torch.arange(part.numel(), device=part.device), logits.shape[1]
    ids, theirs = teacher.ids, teacher.logprobs
    if teacher.hidden is not None and teacher.weight is not None:
        z = _logits(teacher.hidden[part], teacher.weight, teacher.bias, dtype)
        if not teacher.top_k:
            return reference.distillation(logits, z, every, teacher.beta, divisor, softcap, teacher.softcap)
        theirs, ids = reference.log_softmax(z, every, divisor, teacher.softcap).topk(teacher.top_k)
    else:
        assert ids is not None
        assert theirs is not None
        ids, theirs = ids[part], theirs[part]
    ours = reference.log_softmax(logits, every, divisor, softcap).gather(1, ids.clamp(min=0))
    return reference.top_k_divergence(ours, theirs, ids >= 0, teacher.beta, teacher.top_k < V)
