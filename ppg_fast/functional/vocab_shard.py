"""A vocabulary that is spread over processes: tensor parallelism of the head."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed

from ppg_fast import ops
from ppg_fast.contract import Chunks
from ppg_fast.functional.tokens import check_floats, chosen_backend
from ppg_fast.rules import require_integer, require_number
from ppg_fast.spec import require


@dataclass(frozen=True, eq=False)
class VocabShard:
    """Which tokens of the vocabulary the weight of this process holds: ``start``, ``start`` + 1, ..., one a row.

    ``group``: the processes that hold the vocabulary together, a torch.distributed process group, or None for all. Each
    calls the same function with the same hidden states, labels, which are of the whole vocabulary, and arguments; what
    they hold may be of different sizes, but follows each other without overlap and gap, else ValueError. Every process
    gets the whole loss, d_hidden, and d_weight of its own rows.
    """

    start: int
    group: Any = None

    def __post_init__(self) -> None:
        require_integer("start of a vocabulary shard", self.start, 0)

    @property
    def part(self) -> ops.Part:
        """As the ops take it. ValueError where there are no processes."""
        joined = distributed.is_available() and distributed.is_initialized()
        require(joined, "a vocabulary shard needs torch.distributed.init_process_group", self.start)
        return ops.Part(self.start, self.group)

    def token_logprobs(
        self, logits: Tensor, labels: Tensor, *, temperature: float = 1.0, logit_softcap: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies of the whole vocabulary from this process's columns of the logits.

        Args:
            logits: (N, V) of this shard, in any dtype of `ppg.token_logprobs`; labels: (N,) int64 of the whole
                vocabulary, -100 = masked.
            temperature, logit_softcap: as there.

        Returns: two (N,) float32, the same on all processes; the gradient of the logits is that of this shard.
        Raises: as `ppg.token_logprobs`, and where the shards do not follow each other.
        """
        check_floats("logits", logits)
        fits = logits.dim() == 2 and logits.shape[:1] == labels.shape
        require(fits, f"logits must be (N, V) of labels (N,), {tuple(labels.shape)}", tuple(logits.shape))
        scale = [require_number("temperature", temperature, 0.0, open_low=True), float(logit_softcap)]
        rows = logits if logits.stride(-1) == 1 else logits.contiguous()
        return ops.shard_logprobs(rows[None], labels, None, scale, self.part, _kernels(None, logits))


def _kernels(backend: str | None, tensor: Tensor) -> str:
    name = chosen_backend(backend, tensor)
    require(name != "reference", "a vocabulary shard needs a backend of kernels", name)
    return name


def shard_logprobs(
    vocab: VocabShard,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    temperatures: Tensor | None,
    scale: tuple[float, float],
    chunks: Chunks,
    validate: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    """Log-prob and entropy of ``labels`` (N,) over the whole vocabulary, neither score norms nor log-sum-exps;
    see `ops.vocab_shards`."""
    require(isinstance(vocab, VocabShard), "vocab must be a VocabShard", type(vocab).__name__)
    backend = _kernels(backend, x)
    rule = "a vocabulary shard goes without max_active_rows"
    require(chunks.max_active is None, rule, chunks.max_active)
    given = x, weight, bias, labels, temperatures, list(scale), vocab.part, chunks, validate, backend
    return *ops.linear_shard_logprobs(*given), torch.empty(0), torch.empty(0)
