"""A model's own forward pass with no rows for its head, and the loss of the rows that the head would have had."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from ppg_fast.functional import linear_partial_policy_loss, linear_policy_loss, linear_token_logprobs
from ppg_fast.integrations.linear_head import linear_of, local, shard_of
from ppg_fast.integrations.transformers.alignment import CREDIT, TURNS, LabelledTokens
from ppg_fast.integrations.transformers.head import LogitRule, hooked, output_head
from ppg_fast.integrations.transformers.packing import check_packable
from ppg_fast.policy_classes import Greedy
from ppg_fast.spec import IGNORE, PolicyLossSpec, require


@dataclass
class PolicyCausalLMOutput(ModelOutput):
    """What a patched model returns where it is given labels.

    ``loss``: 0-d float32, or (B, L) with reduction "none"; the mean cross-entropy where no advantages or rewards were
        given.
    ``logprobs``, ``entropy``: (B, L) float32 in nats, at the places of the labels as they were given, zero where
        masked; differentiable only where no advantages or rewards were given, and then ``entropy`` only if asked for.
    ``metrics``: 0-d float32 tensors by name. ``aux_loss``: the router's, of mixtures of experts, already in ``loss``.
    ``logits``: None, always.
    """

    loss: Tensor | None = None
    logits: None = None
    logprobs: Tensor | None = None
    entropy: Tensor | None = None
    metrics: Mapping[str, Tensor] | None = None
    aux_loss: Tensor | None = None

    def __getitem__(self, key: Any) -> Any:
        """As in ModelOutput; ValueError for the logits, which label smoothing of transformers' Trainer would take."""
        require(key != "logits", "a patched model makes no logits (label_smoothing_factor must be 0)", key)
        return super().__getitem__(key)


def scored_forward(
    model: Any, original: Callable[..., Any], kwargs: dict[str, Any], tokens: LabelledTokens, rule: LogitRule
) -> Any:
    """The model's own forward pass with no rows for its head, and the loss of the rows that the head would have had."""
    found: list[PolicyCausalLMOutput] = []
    if "cu_seqlens" in tokens.arguments:
        check_packable(model)

    def score(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = inputs[0]
        found.append(_score(module, hidden, tokens, rule))  # here, where FSDP has the head's weight whole
        rows = 0 if shard_of(module) is None else 1  # a DTensor cannot be viewed without elements
        return (hidden[:, :rows], *inputs[1:])

    as_dict = kwargs.pop("return_dict", None)
    kwargs.setdefault("use_cache", False)
    with hooked(output_head(model), score):
        own = original(**kwargs, return_dict=True)
    require(len(found) == 1, "the model must call its head once in a forward pass", len(found))
    (out,) = found
    aux = getattr(own, "aux_loss", None)
    if aux is not None and out.loss is not None and out.loss.dim() == 0:
        out.loss = out.loss + _router_coefficient(model) * aux.to(out.loss.device)
    out.aux_loss = aux
    return out if (model.config.return_dict if as_dict is None else as_dict) else out.to_tuple()


def _router_coefficient(model: Any) -> float:
    """The weight of the router's loss as the model's own forward takes it."""
    owners = model, model.config.get_text_config()
    found = [getattr(owner, name, None) for owner in owners for name in ("router_aux_loss_coef", "aux_loss_coef")]
    coefficients = [float(value) for value in found if value is not None]
    require(bool(coefficients), "a router loss needs router_aux_loss_coef in the config", type(model).__name__)
    return coefficients[0]


def _score(head: nn.Module, hidden: Tensor, tokens: LabelledTokens, rule: LogitRule) -> PolicyCausalLMOutput:
    vocab = shard_of(head)
    if vocab is None:
        hidden, weight, bias = linear_of(head, hidden)
    else:
        hidden, weight, bias = linear_of(head, hidden, whole=local)
        rows, rule_of_rows = len(head.weight), "a head in shards must have as many rows as there are logits"  # type: ignore[arg-type]
        require(rows == rule.vocabulary, f"{rule_of_rows}, {rule.vocabulary}", rows)
    unembedding, device = rule.head(weight, bias), hidden.device
    given: dict[str, Any] = {
        name: value.to(device) if isinstance(value, Tensor) else value for name, value in tokens.arguments.items()
    }
    labels, spec = tokens.labels.to(device), unembedding.fold_spec(given.pop("spec", PolicyLossSpec()))
    weight = unembedding.weight
    given.update(bias=unembedding.bias, vocab=vocab)
    kinds = [name for name in CREDIT if name in given]
    require(len(kinds) <= 1, f"one of {', '.join(CREDIT)} makes the loss", kinds)
    want_entropy, policy_class = bool(given.pop("entropy", False)), given.pop("policy_class", None)
    if not kinds:
        return _log_probs(hidden, weight, labels, given, spec, tokens, want_entropy)
    turns = {name: given.pop(name) for name in TURNS if name in given}
    values = given.pop(kinds[0])
    if kinds[0] == "advantages":
        out = linear_policy_loss(hidden, weight, labels, values, spec=spec, **given)
    else:
        require("turn_ids" in given, f"{kinds[0]} need turn_ids", None)
        if kinds[0] == "turn_advantages":  # a turn credited for itself alone, against no baseline
            policy_class, turns = Greedy(), {k: v for k, v in turns.items() if k == "turn_counts"}
        require(policy_class is not None, "rewards need a policy_class", policy_class)
        turn_ids = given.pop("turn_ids")
        out = linear_partial_policy_loss(
            hidden, weight, labels, values, turn_ids, policy_class, spec=spec, **turns, **given
        )
    logprobs, entropy = tokens.in_place(out.logprobs), tokens.in_place(out.entropy)
    return PolicyCausalLMOutput(loss=tokens.in_place(out.loss), logprobs=logprobs, entropy=entropy, metrics=out.metrics)


def _log_probs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    given: dict[str, Any],
    spec: PolicyLossSpec,
    tokens: LabelledTokens,
    want_entropy: bool,
) -> PolicyCausalLMOutput:
    """Differentiable log-probs (and entropy), and their negative mean as transformers' own loss."""
    keep = ("bias", "vocab", "loss_mask", "chunk_rows", "logits_dtype", "validate", "backend")
    options = {name: given[name] for name in keep if name in given}
    numbers = {"temperature": spec.temperature, "logit_softcap": spec.logit_softcap, "entropy": want_entropy}
    result = linear_token_logprobs(hidden, weight, labels, **numbers, **options)
    logprobs, entropy = result if isinstance(result, tuple) else (result, None)
    active = labels != IGNORE if "loss_mask" not in given else (labels != IGNORE) & (given["loss_mask"] != 0)
    count = given.get("normalizer", active.sum().clamp(min=1))
    return PolicyCausalLMOutput(
        loss=-logprobs.sum() / count, logprobs=tokens.in_place(logprobs), entropy=tokens.in_place(entropy)
    )
