"""Who a policy learns from: a teacher's hidden states and head, or the tokens and log-probs that a served one gave."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ppg_fast import ops
from ppg_fast.contract import TeacherRows
from ppg_fast.functional.tokens import Tokens, advantages_per_token, check_floats, check_tensor, per_token
from ppg_fast.rules import fail, require, require_float32, require_integer, require_one_of
from ppg_fast.spec import DIVERGENCES


@dataclass(frozen=True, eq=False, kw_only=True)
class Distance:
    """How far from its teacher a policy is, and what that costs.

    ``divergence`` of the teacher's q from the policy's p, in nats: "forward_kl" KL(q, p), "reverse_kl" KL(p, q), "jsd"
    beta KL(q, m) + (1 - beta) KL(p, m) with m = beta q + (1 - beta) p, whose ``beta`` is 0.5 unless given
    (arXiv:2306.13649). A token's loss is ``coef`` times its weight times that: ``weights`` of the labels' shape, or
    (B,) for a (B, L) batch; ``turn_weights`` (B, T), one a turn, which needs turn_ids. Tokens of weight 0 are not read.
    """

    divergence: str = "forward_kl"
    beta: float | None = None
    coef: float = 1.0
    weights: Tensor | None = None
    turn_weights: Tensor | None = None

    def __post_init__(self) -> None:
        require_one_of("divergence", self.divergence, DIVERGENCES)
        if self.beta is not None:
            require(self.divergence == "jsd", 'beta goes with divergence "jsd"', self.divergence)
            beta = require_float32("beta", self.beta, 0.0, 1.0, open_low=True)
            require(beta < 1, 'beta must be < 1: divergence "reverse_kl" is the limit there', beta)
        require_float32("coef", self.coef, 0.0)
        both = self.weights is not None and self.turn_weights is not None
        require(not both, "give weights or turn_weights, not both", "both")

    @property
    def share(self) -> float:
        """The beta of the kernels: 0 for the forward KL, 1 for the reverse."""
        return {"forward_kl": 0.0, "reverse_kl": 1.0}.get(self.divergence, 0.5 if self.beta is None else self.beta)


@dataclass(frozen=True, eq=False)
class Teacher(Distance):
    """A teacher whose forward pass ran here, over the same tokens and vocabulary.

    ``hidden`` (..., D'), ``weight`` (V, D'), ``bias`` (V,) or None, in the dtype of the policy's (or any under
    autocast); no gradient reaches them. Its logits pass through ``logit_softcap`` of its own and are divided by the
    policy's temperature. ``top_k``: only its k likeliest tokens are told apart, all others count as one outcome; 0: all
    are.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    top_k: int = 0
    logit_softcap: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_integer("top_k", self.top_k, 0)
        require_float32("logit_softcap", self.logit_softcap, 0.0)

    def rows(self, x: Tensor, weight: Tensor, labels: Tensor) -> TeacherRows:
        """What it brings to the rows of the policy's head, coefficients still missing."""
        check_floats("the teacher's hidden", self.hidden)
        check_floats("the teacher's weight", self.weight)
        hidden, head, bias, V = self.hidden.detach(), self.weight.detach(), self.bias, weight.shape[0]
        shape = tuple(hidden.shape)
        require(shape[:-1] == tuple(labels.shape), f"the teacher's hidden must be {(*labels.shape, 'D')}", shape)
        fits = head.dim() == 2 and tuple(head.shape) == (V, shape[-1])
        require(fits, f"the teacher's weight must be {(V, shape[-1])}: one vocabulary", tuple(head.shape))
        if bias is not None:
            require(bias.shape == (V,), f"the teacher's bias must be {(V,)}", tuple(bias.shape))
        if torch.is_autocast_enabled(x.device.type):
            hidden, head, bias = hidden.to(x.dtype), head.to(x.dtype), None if bias is None else bias.to(x.dtype)
        for name, tensor in {"hidden": hidden, "weight": head, "bias": bias}.items():
            if tensor is not None and (tensor.dtype, tensor.device) != (x.dtype, x.device):
                rule = f"the teacher's {name} must be {x.dtype} on {x.device} like the policy's hidden states"
                fail(rule, (tensor.dtype, tensor.device))
        flat = hidden.reshape(labels.numel(), shape[-1])
        bias = None if bias is None else bias.detach()
        top_k = min(self.top_k, V)
        return TeacherRows(flat, head, bias, None, None, x.new_empty(0), self.share, self.logit_softcap, top_k)


@dataclass(frozen=True, eq=False)
class TopKTeacher(Distance):
    """A teacher served elsewhere, known by k tokens of each place: all others count as one outcome.

    ``ids`` (..., k) integers, each once, negative: none; ``logprobs`` (..., k) in nats, at the policy's temperature.
    The mass of all others is 1 minus that of the named, and at least 2^-23.
    """

    ids: Tensor
    logprobs: Tensor

    def rows(self, x: Tensor, weight: Tensor, labels: Tensor) -> TeacherRows:
        """What it brings to the rows of the policy's head, coefficients still missing."""
        for name, tensor in {"ids": self.ids, "logprobs": self.logprobs}.items():
            check_tensor(f"the teacher's {name}", tensor, None, x.device)
            shape = tuple(tensor.shape)
            fits = len(shape) == labels.dim() + 1 and shape[:-1] == tuple(labels.shape) and shape[-1] >= 1
            require(fits, f"the teacher's {name} must be {(*labels.shape, 'k')}", shape)
        require(not self.ids.is_floating_point(), "the teacher's ids must be integers", self.ids.dtype)
        alike = self.ids.shape == self.logprobs.shape
        require(alike, "the teacher's ids and logprobs must be of one shape", tuple(self.logprobs.shape))
        ids = self.ids.reshape(labels.numel(), -1).long().contiguous()
        logprobs = self.logprobs.detach().reshape(ids.shape).float().contiguous()
        return TeacherRows(None, None, None, ids, logprobs, x.new_empty(0), self.share, 0.0, ids.shape[1])


def teacher_rows(
    teacher: Teacher | TopKTeacher,
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    tokens: Tokens,
    reduction: Tensor | None,
    turn_ids: Tensor | None,
    validate: bool,
) -> TeacherRows:
    """The teacher as rows, with the coefficient of each divergence in the reduced loss: 0 where masked.

    ``tokens``: all that are active; ``reduction``: the weight of each in it, (N,) or None for 1.
    """
    if not isinstance(teacher, Distance):
        fail("teacher must be a Teacher or a TopKTeacher", type(teacher).__name__)
    if teacher.turn_weights is not None:
        coefs = _of_turns(teacher.turn_weights, labels, tokens, turn_ids, validate)
    else:
        given = None if teacher.weights is None else advantages_per_token(teacher.weights, labels)
        own = per_token("weights of the teacher", given, labels)
        coefs = torch.ones(tokens.labels.shape, device=x.device) if own is None else own
    coefs = torch.where(tokens.active, coefs * teacher.coef * (1.0 if reduction is None else reduction), 0.0)
    return teacher.rows(x, weight, labels)._replace(coefs=coefs)


def _of_turns(weights: Tensor, labels: Tensor, tokens: Tokens, turn_ids: Tensor | None, validate: bool) -> Tensor:
    require(turn_ids is not None, "turn_weights of the teacher need turn_ids", turn_ids)
    assert turn_ids is not None
    check_tensor("turn_ids", turn_ids, labels.shape, labels.device)
    check_tensor("turn_weights of the teacher", weights, None, labels.device)
    fits = weights.dim() == 2 and weights.shape[0] == tokens.sequence_count
    require(fits, f"turn_weights of the teacher must be {(tokens.sequence_count, 'T')}", tuple(weights.shape))
    turns = turn_ids.reshape(-1).long()
    return ops.turn_credit_op(weights.detach().float(), turns, tokens.sequences(), None, tokens.active, validate)


def all_active(tokens: Tokens, active: Tensor, labels: Tensor) -> Tokens:
    """The tokens as they were before skip_zero_advantages masked some."""
    return replace(tokens, labels=torch.where(active, labels.reshape(-1), tokens.labels))
