"""TRL's fused LM head, computed by `ppg_fast.linear_token_logprobs`: same arguments, same `FusedCausalLMOutput`, no
logits."""

import functools
from contextlib import nullcontext
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import Partial

from ppg_fast.functional import linear_token_logprobs
from ppg_fast.integrations.linear_head import linear_of
from ppg_fast.integrations.trl.host import ChunkedLogProbFunction, FusedCausalLMOutput
from ppg_fast.models.output_head import Head, final_softcap, logit_scale
from ppg_fast.spec import IGNORE, require

OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
TILE = 32768  # columns of the vocabulary that TRL's kernel holds at once


def _whole(parameter: Any) -> Any:
    """A parameter that FSDP2 has sharded, gathered; each shard gets the mean over the ranks of its gradient, as FSDP2's
    own would.

    FSDP2 gathers a head in its root group itself. This is for a head in a group of its own: its hooks run when it is
    called, and it is never called. By its defaults ``full_tensor()`` would hand each shard the gradient of its own
    rank's data alone.
    """
    if not hasattr(parameter, "full_tensor"):
        return parameter
    mesh = parameter.device_mesh
    whole = parameter.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if whole.requires_grad:
        whole.register_hook(lambda grad: grad / mesh.size())
    return whole


def _refuse_zero3() -> None:
    """ZeRO-3 empties a parameter after the forward pass, and the backward pass of this head reads the weight again."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    if is_deepspeed_zero3_enabled():
        raise ValueError(
            "the fused head of ppg_fast needs the whole weight in the backward pass, which ZeRO-3 frees: use "
            'fused_head="trl"'
        )


def _router_loss(config: Any, backbone_outputs: Any, attention_mask: Tensor | None) -> Tensor:
    """Load-balancing loss of a mixture of experts, by the function that every such model of transformers calls."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    loss = load_balancing_loss_func(
        backbone_outputs.router_logits, config.num_experts, config.num_experts_per_tok, attention_mask
    )
    assert isinstance(loss, Tensor)  # 0 only where there are no router logits
    return loss


class FusedHead:
    """From hidden states and labels to the per-token fields of `FusedCausalLMOutput`, for one model."""

    def __init__(self, config: Any, temperature: float, cast_to_fp32: bool, outputs: tuple[str, ...]) -> None:
        self.temperature, self.cast_to_fp32, self.outputs = temperature, cast_to_fp32, outputs
        self.scale, self.softcap = logit_scale(config), final_softcap(config)

    def __call__(self, hidden: Tensor, lm_head: Any, labels: Tensor) -> dict[str, Tensor]:
        """Fields (B, L) asked for; an adapter of the head is part of them (`linear_of`)."""
        context = nullcontext()
        if self.cast_to_fp32:
            hidden, context = hidden.float(), torch.autocast(hidden.device.type, enabled=False)
        with context:
            hidden, weight, bias = linear_of(lm_head, hidden, called=False, whole=_whole)
            labels = labels.to(hidden.device)  # a model spread by device_map may end elsewhere
            if not torch.is_autocast_enabled(hidden.device.type):
                weight, bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
            head = Head(weight, bias, self.scale, self.softcap)
            options: dict[str, Any] = {"entropy": "entropy" in self.outputs, **head.fold(self.temperature)}
            scores = linear_token_logprobs(hidden, weight, labels, bias=bias, **options)
            fields = {"log_probs": scores} if isinstance(scores, Tensor) else dict(zip(OUTPUTS, scores, strict=False))
            fields |= self._statistics(hidden, head, labels)
        return {name: fields[name] for name in self.outputs}

    def _statistics(self, hidden: Tensor, head: Head, labels: Tensor) -> dict[str, Tensor]:
        """The fields without a gradient that `linear_token_logprobs` does not give, by one more sweep of TRL's own
        kernel."""
        if not set(self.outputs) & set(OUTPUTS[2:]):
            return {}
        scored = labels != IGNORE
        with torch.no_grad():
            numbers = self.temperature, TILE, head.softcap or None, head.scale, OUTPUTS[2:]
            fields = ChunkedLogProbFunction.apply(hidden[scored], head.weight, head.bias, labels[scored], *numbers)
        assert fields is not None
        named = zip(OUTPUTS[2:], fields[2:], strict=True)
        return {name: field.new_zeros(scored.shape).masked_scatter(scored, field) for name, field in named}


def _aligned(hidden: Tensor, labels: Tensor | None, shift_labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """Hidden states and the labels that they predict."""
    if shift_labels is not None:
        return hidden, shift_labels
    require(labels is not None, "fused_lm_head=True needs labels or shift_labels", None)
    assert labels is not None
    return hidden[:, :-1], labels[:, 1:]


def add_fused_lm_head(
    model: Any, temperature: float = 1.0, cast_lm_head_to_fp32: bool = False, outputs: tuple[str, ...] = ("log_probs",)
) -> None:
    """TRL's `add_fused_lm_head` on our kernels: ``model(..., labels=labels, fused_lm_head=True)`` returns log-probs,
    not logits.

    l = log softmax(softcap(scale (h W^T + b)) / temperature)[label]; scale and softcap are the model's own.

    Rows whose label is -100 are not projected on any device (TRL's own head projects them on a CPU). Labels are shifted
    inside, ``shift_labels`` are not. Without ``fused_lm_head=True`` the forward is the original one.

    Args:
        model: a causal language model of transformers whose head is a linear layer, with LoRA or modules_to_save of
            peft on it or without, added before or after this; or a `peft.PeftModel` over one.
        temperature: the logits are divided by it.
        cast_lm_head_to_fp32: project in float32, outside autocast.
        outputs: the fields of `FusedCausalLMOutput` to fill: "log_probs" (always) and "entropy" are ours;
            "log_sum_sq_probs", "mean_logits" and "is_top1" cost one more sweep, by TRL's kernel.

    Raises: ValueError under ZeRO-3, for an unknown field, a logit scale <= 0 or a temperature <= 0, and in calls for a
        head that is not one product with a weight (quantized, DoRA, hooks, see `linear_of`).
    """
    _refuse_zero3()
    unknown = [name for name in outputs if name not in OUTPUTS]
    require(not unknown, f"outputs must be among {', '.join(OUTPUTS)}", unknown)
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    original, config = model.forward, model.config.get_text_config()
    head = FusedHead(config, temperature, cast_lm_head_to_fp32, tuple(dict.fromkeys(("log_probs", *outputs))))

    @functools.wraps(type(model).forward)  # generate() reads the signature
    def forward(
        self: Any,
        *args: Any,
        fused_lm_head: bool = False,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        own = {"labels": labels, "shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
        if not fused_lm_head:
            return original(*args, **kwargs, **{name: value for name, value in own.items() if value is not None})
        kwargs["use_cache"] = False
        if getattr(config, "output_router_logits", False):
            kwargs.setdefault("output_router_logits", True)
        # looked up at each call: FSDP and PEFT replace modules after this patch
        backbone = self.base_model(*args, **kwargs)
        hidden, predicted = _aligned(backbone.last_hidden_state, labels, shift_labels)
        lm_head = self.get_output_embeddings()
        fields = head(hidden, lm_head, predicted)
        mask = predicted.to(fields["log_probs"].device) != IGNORE
        count = mask.sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        loss, aux_loss = -fields["log_probs"].sum() / torch.where(count > 0, count, 1).to(mask.device), None
        if kwargs.get("output_router_logits"):
            aux_loss = _router_loss(config, backbone, kwargs.get("attention_mask"))
            loss = loss + getattr(config, "router_aux_loss_coef", 0.0) * aux_loss
        return FusedCausalLMOutput(loss=loss, **fields, label_mask=mask, aux_loss=aux_loss)

    forward.ppg_fast_head = True  # type: ignore[attr-defined]
    model.forward = MethodType(forward, model)
