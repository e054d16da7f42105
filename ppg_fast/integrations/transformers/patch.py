"""`patch(model)`: a causal LM that answers labels with a policy loss or with log-probs; its logits never exist."""

import functools
import inspect
from collections.abc import Callable
from types import MethodType, TracebackType
from typing import Any

from ppg_fast.integrations.transformers.alignment import ARGUMENTS, CREDIT, DEFAULTS, LabelledTokens
from ppg_fast.integrations.transformers.head import LogitRule, logit_rule, output_head
from ppg_fast.integrations.transformers.scoring import scored_forward
from ppg_fast.spec import require

UNLABELLED = (
    "a policy loss needs labels or shift_labels (transformers' Trainer takes labels away for label_smoothing_factor "
    "and compute_loss_func: leave them out)"
)


class Patch:
    """A patched model, and the way back: `undo()`, or leaving the ``with`` block."""

    def __init__(self, model: Any, forward: Callable[..., Any]) -> None:
        self.model, self._before = model, model.__dict__.get("forward")
        self._forward = model.forward = MethodType(forward, model)
        self._guard = model.register_forward_pre_hook(_refuse_replaced, with_kwargs=True)

    def undo(self) -> None:
        """The model as it was, in class and instance; ValueError where something else has replaced ``forward``
        since."""
        require(
            self.model.__dict__.get("forward") is self._forward,
            "undo what replaced the forward of the model first",
            self.model.forward,
        )
        self._guard.remove()
        if self._before is None:
            del self.model.forward
        else:
            self.model.forward = self._before

    def __enter__(self) -> "Patch":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


def _refuse_replaced(module: Any, _: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """ValueError for a policy loss asked of a forward that something has put in place of the patched one, which would
    swallow it."""
    forward: Any = module.forward
    while forward is not None and not getattr(forward, "ppg_fast", False):  # accelerate wraps it
        forward = getattr(forward, "__wrapped__", None)
    given = [name for name in CREDIT if kwargs.get(name) is not None]
    rule = (
        "the forward of a patched model was replaced (use_liger_kernel of transformers' Trainer does that: leave it "
        "False), which drops"
    )
    require(forward is not None or not given, rule, given)


def patch(model: Any, **defaults: Any) -> Patch:
    """Let ``model(..., labels=...)`` give the policy loss or the log-probs from hidden states, without its logits.

    loss = sum over active tokens of weight * term(l, H, old, ref, rollout, A)   as `ppg_fast.linear_policy_loss`

    A call with ``labels`` or ``shift_labels`` returns `PolicyCausalLMOutput`; any other is the model's own: generation
    is untouched. Such a call also takes, besides the model's own arguments (B rows of L tokens; S dialogues: the rows,
    or the runs of cu_seqlens):

        labels        (B, L) int64, aligned with input_ids as everywhere in transformers: the shift is made here;
                      -100 = masked.
        shift_labels  (B, L) int64, already shifted: position i predicts shift_labels[i]. Wins over labels.
        advantages    (B, L), or (B,) one a dialogue. Per-token arguments stand where their label stands: at the token
                      itself with labels, at the token before it with shift_labels.
        turn_advantages  (S, T) one a turn, with turn_ids: (B, L) integers, -1 = context (masked), else the turn of the
                      label.
        rewards       (S, T), with turn_ids and policy_class, and gamma, baseline, group_ids, turn_counts, values,
                      gae_lambda as in `linear_partial_policy_loss`.
        loss_mask, old_logprobs, ref_logprobs, rollout_logprobs  (B, L); spec, reduction, normalizer,
                      skip_zero_advantages, chunk_rows, logits_dtype, validate, backend: as in `linear_policy_loss`.
                      num_items_in_batch of transformers' Trainer is the normalizer of token_mean.
        cu_seqlens    (S + 1,) int32, the dialogues of one packed row, default the cu_seq_lens_q of the model's own
                      arguments; no dialogue predicts the first token of the next.
        entropy       with no advantages or rewards: also the entropy, differentiable.

    use_cache is off unless given: with a cache, transformers lets packed dialogues see each other.

    Args:
        model: a causal LM of transformers whose head is a linear layer, with a scale and a softcap or without, or a
            `peft.PeftModel` over one (LoRA or modules_to_save on the head, given before or after).
        **defaults: spec, reduction, skip_zero_advantages, chunk_rows, logits_dtype, validate, backend, policy_class,
            gamma, baseline, entropy for calls that do not give them.

    Returns: `Patch`, a context manager with ``undo()``.
    Raises: ValueError for a model without such a head, for logits that its config does not explain (found by its own
        forward pass on two tokens), for a model that is patched already, unknown defaults; in calls, as
        `ppg_fast.linear_policy_loss`, and for packed dialogues in a model whose layers carry a state from one to the
        next.
    """
    unknown = sorted(set(defaults) - set(DEFAULTS))
    require(not unknown, f"the defaults of a patch are {', '.join(DEFAULTS)}", unknown)
    target = model.get_base_model() if hasattr(model, "get_base_model") else model
    output_head(target)
    require(
        not hasattr(target.forward, "ppg_fast"),
        "the model must not be patched already, undo that first",
        type(target).__name__,
    )
    return Patch(target, _make_forward(target, logit_rule(target), defaults))


def _make_forward(model: Any, rule: LogitRule, defaults: dict[str, Any]) -> Callable[..., Any]:
    replaced = model.__dict__.get("forward")  # as accelerate's hooks leave it
    own = type(model).forward
    signature = inspect.signature(own)
    names = list(signature.parameters)[1:]

    @functools.wraps(own)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        # a deep copy of the model calls itself
        original = functools.partial(own, self) if replaced is None else replaced
        kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        given = {name: value for name in ARGUMENTS if (value := kwargs.pop(name, None)) is not None}
        labels, shift_labels = kwargs.pop("labels", None), kwargs.pop("shift_labels", None)
        if labels is None and shift_labels is None:
            require(not given, UNLABELLED, sorted(given))
            return original(**kwargs)
        given = {**defaults, **given}
        items = kwargs.pop("num_items_in_batch", None)
        return scored_forward(
            self, original, kwargs, LabelledTokens.of(labels, shift_labels, kwargs, given, items), rule
        )

    forward.__signature__ = _with_arguments(signature)  # type: ignore[attr-defined]
    forward.ppg_fast = True  # type: ignore[attr-defined]
    return forward


def _with_arguments(signature: inspect.Signature) -> inspect.Signature:
    """The signature with ours before its **kwargs: transformers' Trainer drops columns that the signature lacks."""
    parameters = list(signature.parameters.values())
    names = [name for name in ("shift_labels", *ARGUMENTS) if name not in signature.parameters]
    added = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in names]
    end = len(parameters) - (parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
    return signature.replace(parameters=[*parameters[:end], *added, *parameters[end:]])
