"""The operators: custom op + fake + autograd over the backend contract, whole under `torch.compile(fullgraph=True)`.

They take canonical rows: logits (B, L, V) or hidden states (N, D), per-row arguments (N,), labels -100 where masked.
Shapes and defaults are the business of `functional`; checks of values are made here, where they run under torch.compile
too.
"""

from ppg_fast.ops.checks import check_temperatures, mask_factor
from ppg_fast.ops.head import default_chunk_rows
from ppg_fast.ops.kept_logits import kept_columns, kept_logits, kept_rows
from ppg_fast.ops.linear_distillation import (
    linear_distillation,
    linear_distillation_op,
    linear_divergences,
    linear_divergences_op,
)
from ppg_fast.ops.linear_policy_loss import linear_policy_loss, linear_policy_loss_op
from ppg_fast.ops.linear_token_logprobs import linear_token_logprobs, linear_token_logprobs_op
from ppg_fast.ops.linear_vocab_shards import linear_shard_logprobs, linear_shard_policy_loss
from ppg_fast.ops.partial_returns import partial_returns, partial_returns_op
from ppg_fast.ops.policy_loss import policy_loss, policy_loss_op, reference_policy_loss
from ppg_fast.ops.products import product_dtype
from ppg_fast.ops.rollouts import mask_of_rollouts
from ppg_fast.ops.sequences import active_labels, sequence_ids, sequence_ids_op, turn_credit_op
from ppg_fast.ops.token_logprobs import token_logprobs, token_logprobs_op
from ppg_fast.ops.vocab_shards import Part, shard_kept_columns, shard_logprobs

__all__ = [
    "Part",
    "active_labels",
    "check_temperatures",
    "default_chunk_rows",
    "kept_columns",
    "kept_logits",
    "kept_rows",
    "linear_distillation",
    "linear_distillation_op",
    "linear_divergences",
    "linear_divergences_op",
    "linear_policy_loss",
    "linear_policy_loss_op",
    "linear_shard_logprobs",
    "linear_shard_policy_loss",
    "linear_token_logprobs",
    "linear_token_logprobs_op",
    "mask_factor",
    "mask_of_rollouts",
    "partial_returns",
    "partial_returns_op",
    "policy_loss",
    "policy_loss_op",
    "product_dtype",
    "reference_policy_loss",
    "sequence_ids",
    "sequence_ids_op",
    "shard_kept_columns",
    "shard_logprobs",
    "token_logprobs",
    "token_logprobs_op",
    "turn_credit_op",
]
