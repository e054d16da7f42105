"""From packed dialogues to the policy loss through a Hugging Face causal LM, without ever making its logits."""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ppg_fast.dialogues.packing import NOTHING, PackedBatch, pack
from ppg_fast.distributed import Ranks
from ppg_fast.functional import (
    PolicyLossOutput,
    SoftQOutput,
    linear_policy_loss,
    linear_soft_q_loss,
    linear_token_logprobs,
)
from ppg_fast.models import varlen_attention
from ppg_fast.models.output_head import Head
from ppg_fast.models.tied_weight import read_with, shared_embedding, two_uses
from ppg_fast.ops.tracing import traced
from ppg_fast.policy_classes import PolicyClass
from ppg_fast.reference.turns import of_tokens
from ppg_fast.spec import PolicyLossSpec, SoftQSpec

if TYPE_CHECKING:
    from ppg_fast.models.frozen_teacher import FrozenTeacher


def make_model(
    vocab_size: int, width: int = 128, layers: int = 2, seed: int = 0, pad_id: int = 0, end_id: int = 1
) -> Any:
    """A Qwen3ForCausalLM from its config: ``layers`` of ``width``, 4 heads on 2 key-value heads of 32, tied head;
    weights from ``seed``.

    initializer_range 0.1, not 0.02: a model this narrow learns to look words up in its context in a third of the steps.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
        initializer_range=0.1,
        pad_token_id=pad_id,
        eos_token_id=end_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    return prepare(model)


def load_model(path: str, vocab_size: int, dtype: torch.dtype = torch.float32) -> Any:
    """The causal LM of a Hugging Face checkpoint folder, ready to be packed.

    ``vocab_size`` is the tokenizer's. ValueError if the model's embedding has fewer rows, and as `load_whole`.
    """
    return check_vocabulary(prepare(load_whole(path, dtype)), vocab_size)


def load_whole(path: str, dtype: torch.dtype | str) -> Any:
    """The causal LM of a folder, every weight of it from the folder; ``dtype`` "auto": as stored.

    ValueError in one line where it cannot be read, and where a weight is missing or of another shape: transformers
    would go on with random numbers in its place.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its report of many lines becomes one
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except Exception as error:  # one of a dozen classes, of four libraries
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(f"model {path!r} cannot be loaded as a causal language model: {reason[:200]}") from error
    finally:
        logging.set_verbosity(verbosity)
    model, found = loaded
    other = [f"{name} {tuple(stored)} for {tuple(own)}" for name, stored, own in sorted(found["mismatched_keys"])]
    for what, names in (
        ("of other shapes than its config.json says", other),
        ("missing", sorted(found["missing_keys"])),
    ):
        if names:
            raise ValueError(f"model {path!r} has {len(names)} weights {what}, such as {names[0]}")
    if unused := sorted(found["unexpected_keys"]):
        rest = f"{len(unused)} weights that {type(model).__name__} does not have, such as {unused[0]}"
        warnings.warn(f"model {path!r} holds {rest}; they are left out", stacklevel=3)
    return model


def check_vocabulary(model: Any, vocab_size: int) -> Any:
    """``model`` itself; ValueError if a tokenizer of ``vocab_size`` tokens can name a row its embedding does not
    have."""
    rows = model.get_input_embeddings().weight.shape[0]
    if vocab_size > rows:
        raise ValueError(
            f"the tokenizer's vocabulary must not exceed the model's embedding of {rows} rows, got {vocab_size} tokens"
        )
    return model


def prepare(model: Any) -> Any:
    """Let ``model`` attend inside each dialogue of a packed row; ValueError for layers that cannot be packed that
    way."""
    config = model.config.get_text_config()
    known = varlen_attention.LAYERS
    unknown = sorted(set(getattr(config, "layer_types", None) or ()) - set(known))
    if unknown:
        raise ValueError(
            f"packed training needs layers of {', '.join(known)}, got {', '.join(unknown)} in {config.model_type}"
        )
    model.set_attn_implementation(varlen_attention.NAME)
    return model


def decoder(model: Any) -> nn.Module:
    """The part of a causal LM below its head: token ids to hidden states."""
    return model.get_decoder() if hasattr(model, "get_decoder") else model.base_model


def policy_hidden(model: Any, batch: PackedBatch) -> Tensor:
    """Last hidden states (N, D) of a packed batch of N tokens. Each part of a dialogue sees itself only; positions
    restart with it."""
    if batch.tokens.numel() == 0:
        weight = model.get_output_embeddings().weight
        return weight.new_zeros(0, weight.shape[1]) + 0.0 * weight.sum()
    return decoder(model)(**_inputs(batch)).last_hidden_state[0]


def _inputs(batch: PackedBatch) -> dict[str, Any]:
    """What a decoder is called with."""
    return {
        "input_ids": batch.tokens[None],
        "attention_mask": None,
        "position_ids": batch.position_ids[None],
        "use_cache": False,
        "cu_seq_lens_q": batch.part_seqlens,
        "cu_seq_lens_k": batch.part_seqlens,
        "max_length_q": batch.longest_part,
        "max_length_k": batch.longest_part,
    }


def _hidden_and_head(model: Any, batch: PackedBatch) -> tuple[Tensor, Head]:
    """`policy_hidden` and the head to read it with; one weight for head and embedding gets one gradient tensor."""
    head = Head.of(model)
    embedding = shared_embedding(model, head.weight)
    if embedding is None or traced(head.weight) or batch.tokens.numel() == 0:
        return policy_hidden(model, batch), head
    for_head, for_embedding = two_uses(head.weight)
    out = read_with(decoder(model), embedding, for_embedding, _inputs(batch))
    return out.last_hidden_state[0], replace(head, weight=for_head)


def policy_loss(
    model: Any,
    batch: PackedBatch,
    advantages: Tensor | Callable[[Tensor], Tensor],
    spec: PolicyLossSpec,
    *,
    reduction: str = "sequence_sum",
    skip_zero_advantages: bool = True,
    teacher: "FrozenTeacher | None" = None,
    on_hidden: Callable[[Tensor], None] | None = None,
    **options: Any,
) -> PolicyLossOutput:
    """The policy loss of a packed batch from hidden states through the model's own head; the (N, V) logits never exist.

    ``advantages`` (S, T) float32, one a turn, as is what `turn_advantages` returns; every token of a turn gets its
    turn's. A function makes them of the hidden states (N, D), detached: so a critic needs no pass of its own. The
    log-probs (N,) are those of ``batch.labels``. Turns of advantage zero cost what context costs, unless
    ``skip_zero_advantages`` is off. ``options``: per-token values (N,) and the rest as `ppg.linear_policy_loss`.
    ``teacher``: reads the batch first. ``on_hidden``: is shown the hidden states (N, D), to register a hook there.
    """
    taught = None if teacher is None else teacher.of(batch, Head.of(model).scale)
    hidden, head = _hidden_and_head(model, batch)
    if on_hidden is not None:
        on_hidden(hidden)
    if not isinstance(advantages, Tensor):
        advantages = advantages(hidden.detach())
    return linear_policy_loss(
        hidden,
        head.weight,
        batch.labels,
        token_advantages(batch, advantages),
        bias=head.bias,
        cu_seqlens=batch.cu_seqlens,
        turn_ids=batch.turn_ids,
        spec=head.fold_spec(spec),
        reduction=reduction,
        skip_zero_advantages=skip_zero_advantages,
        teacher=taught,
        kept=batch.kept,
        **options,
    )


def soft_q_loss(
    model: Any, batch: PackedBatch, policy_class: PolicyClass, *, temperature: float = 1.0, **options: Any
) -> SoftQOutput:
    """The soft Q loss of a packed batch and its rewards through the model's own head. ``options``: per-token values
    (N,) and the rest as `ppg.linear_soft_q_loss`."""
    hidden, head = _hidden_and_head(model, batch)
    return linear_soft_q_loss(
        hidden,
        head.weight,
        batch.labels,
        batch.rewards,
        batch.turn_ids,
        policy_class,
        bias=head.bias,
        cu_seqlens=batch.cu_seqlens,
        turn_counts=batch.turn_counts,
        **head.fold(temperature),
        **options,
    )


def token_logprobs(
    model: Any, batch: PackedBatch, temperature: float = 1.0, logits_dtype: str | None = None, **also: bool
) -> Any:
    """log pi(label) of each token (N,) float32, 0 on context, over the batch's kept sets where it has them; with
    ``entropy`` and ``lse`` a tuple, the entropies and the log-sum-exps of the logits too. Differentiable."""
    hidden, head = _hidden_and_head(model, batch)
    options = {"bias": head.bias, "logits_dtype": logits_dtype, "kept": batch.kept, **also, **head.fold(temperature)}
    return linear_token_logprobs(hidden, head.weight, batch.labels, **options)


def token_advantages(batch: PackedBatch, advantages: Tensor) -> Tensor:
    """The advantage (S, T) of each token's turn, (N,), 0 on context."""
    return of_tokens(advantages, batch.turn_ids, batch.dialogue_ids)


class PolicyModule(nn.Module):
    """A causal LM whose forward is its policy loss: one call that uses every weight, the head's too.

    DDP and FSDP2 work around the forward of a module: so each weight is gathered once a micro-batch, and each has a
    gradient, be it zero. ``autocast``: the dtype of mixed precision, None: that of the weights.
    ``logits_dtype``: as in `ppg.linear_policy_loss`, of losses and log-probs alike.
    """

    def __init__(self, model: Any, autocast: torch.dtype | None = None, logits_dtype: str | None = None) -> None:
        super().__init__()
        self.model, self.autocast, self.logits_dtype = model, autocast, logits_dtype

    def forward(
        self,
        batch: PackedBatch,
        advantages: Tensor | Callable[[Tensor], Tensor] | None,
        spec: PolicyLossSpec | SoftQSpec,
        **options: Any,
    ) -> Any:
        """`policy_loss`, or without ``advantages`` the `token_logprobs` at the temperature of ``spec``, with what
        ``options`` ask for beside them; of a SoftQSpec the `soft_q_loss`, whose advantages are its own."""
        with torch.autocast(batch.tokens.device.type, self.autocast) if self.autocast else nullcontext():
            if isinstance(spec, SoftQSpec):
                return soft_q_loss(self.model, batch, spec=spec, logits_dtype=self.logits_dtype, **options)
            if advantages is None:
                return token_logprobs(self.model, batch, float(spec.temperature), self.logits_dtype, **options)
            return policy_loss(self.model, batch, advantages, spec, logits_dtype=self.logits_dtype, **options)


def distribute(model: Any, ranks: Ranks, logits_dtype: str | None = None) -> nn.Module:
    """Spread ``model`` over ``ranks``, in place, before its optimizer is made; returns its PolicyModule as it is to be
    called."""
    module = ranks.shard(model, PolicyModule(model, ranks.autocast, logits_dtype))
    if ranks.sharded:  # FSDP2 takes for its root what is called first
        with ranks.no_grad_forward(module):
            module(pack([NOTHING]).to(model.device), None, PolicyLossSpec())
    return module
