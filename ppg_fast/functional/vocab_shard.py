"""A vocabulary that is spread over processes: tensor parallelism of the head."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, distributed

from ppg_fast import ops
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


def ops_of(vocab: VocabShard | None) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """`ops.linear_token_logprobs` and `ops.linear_policy_loss`, or in their place those of a shard."""
    if vocab is None:
        return ops.linear_token_logprobs, ops.linear_policy_loss
    require(isinstance(vocab, VocabShard), "vocab must be a VocabShard", type(vocab).__name__)

    def of_shard(op: Callable[..., Any], x: Tensor, *given: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        *arguments, backend = given
        return op(x, *arguments, _kernels(backend, x), vocab.part)

    return partial(of_shard, ops.linear_shard_logprobs), partial(of_shard, ops.linear_shard_policy_loss)
