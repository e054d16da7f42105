"""One training step on the meta device: the model's own code runs, and every tensor that it makes is counted while it
lives.

Attention and head, whose kernels have no meta device, stand in by the memory of theirs; autocast, which it has not
either, by its casts.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from ppg_fast.config import TrainConfig
from ppg_fast.jobs.memory_count import Count
from ppg_fast.models.adaptation import StartingWeights, plain_head
from ppg_fast.models.causal_lm import decoder
from ppg_fast.models.tied_weight import shared_embedding
from ppg_fast.models.varlen_attention import QUERY_BLOCK
from ppg_fast.ops.head import default_chunk_rows, equal_chunks, row_stride
from ppg_fast.ops.products import product_dtype
from ppg_fast.training.optimisers import make_optimizer, set_learning_rate

NAME = "ppg_counted"  # of the attention that stands in
BATCH_BYTES = 5 * 8 + 12 * 4  # a token's share of a packed batch: five of int64, and the float32 rows of the loss
STATE_BYTES = {"8bit": 2.0, "4bit": 1.0}  # of optimisers that a meta device cannot step: two states of a parameter
# of matrix products: seen with MKL on one thread; cuBLAS's default on Hopper
WORKSPACE = {"cpu": 16 * 2**20, "cuda": 32 * 2**20}


class Step:
    """One step of ``model``, beside its ``teacher``, on the meta device, each of its tensors under its name in
    ``count``."""

    def __init__(self, model: Any, config: TrainConfig, device: str, teacher: Any = None) -> None:
        from transformers import AttentionInterface

        self.model, self.config, self.cuda, self.count = model, config, device == "cuda", Count()
        self.teacher = teacher
        self.layers = getattr(decoder(model), "layers", ())
        for module in model.modules():
            if checkpoint := getattr(module, "_gradient_checkpointing_func", None):
                # the casts of a forward pass do not reach what its backward pass computes again
                again = partial(checkpoint, context_fn=lambda: (nullcontext(), _Autocast(config.bf16, cached=False)))
                on_host = config.activation_offload and self.cuda
                module._gradient_checkpointing_func = partial(_on_the_host, again) if on_host else again
        AttentionInterface.register(NAME, self.attend)
        for one in (model, *([] if teacher is None else [teacher])):
            one.set_attn_implementation(NAME)
        for layer in self.layers:
            layer.register_forward_pre_hook(lambda *_: setattr(self.count, "name", "layers"))
            layer.register_forward_hook(lambda *_: setattr(self.count, "name", "final"))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda p: self.count.rename(p.grad, "gradients"))

    def begin(self, tokens: int) -> None:
        """What is there before the first pass."""
        count, config = self.count, self.config
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            count.note(tensor)
        with count.under("teacher"):
            for tensor in () if self.teacher is None else (*self.teacher.parameters(), *self.teacher.buffers()):
                count.note(tensor)
        with count.under("reference"):
            self.reference = StartingWeights(self.model) if config.keeps_start else None
        with count.under("optimizer"):
            self.optimizer = self._optimizer()
        with count.under("batch"):
            self.batch = torch.empty(tokens * BATCH_BYTES, dtype=torch.uint8, device="meta")
        with count.under("workspace"):
            self.workspace = torch.empty(WORKSPACE["cuda" if self.cuda else "cpu"], dtype=torch.uint8, device="meta")

    def _optimizer(self) -> Any:
        config, trained = self.config, [p for p in self.model.parameters() if p.requires_grad]
        bits = next((size for name, size in STATE_BYTES.items() if name in config.optim), None)
        hosted = config.optim_offload or "paged" in config.optim
        if self.cuda and hosted:
            return None
        if bits:
            self.state = torch.empty(int(bits * sum(p.numel() for p in trained)), dtype=torch.uint8, device="meta")
            return None
        if config.optim_offload:  # weights and gradients once more
            self.copies = [torch.empty_like(p) for p in trained for _ in range(2)]
        optimizer = make_optimizer(self.model, config.optim, arguments=config.optim_args)
        for group in optimizer.param_groups:
            # what a device would choose; a fused kernel makes no tensors between, no more than single ones
            if "foreach" in group:
                group["foreach"], group["fused"] = self.cuda and not group.get("fused"), None
        with self.count.under("step"):
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter)
        set_learning_rate(optimizer, 1e-3)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return optimizer

    def forward_and_backward(self, tokens: int) -> None:
        """One micro-batch."""
        count, bf16 = self.count, self.config.bf16
        taught = self.read_by_teacher(tokens)
        with count.phase_of("forward pass"), count.under("final"), _Autocast(bf16):
            ids, weight = torch.empty(1, tokens, dtype=torch.int64, device="meta"), plain_head(self.model).weight
            given = {"position_ids": ids, "use_cache": False, "max_length_q": tokens}
            if embedding := shared_embedding(self.model, weight):  # its gradient is a row a token
                with torch.no_grad():
                    given["inputs_embeds"] = embedding(ids)
                given["inputs_embeds"].requires_grad_()
            else:
                given["input_ids"] = ids
            out = decoder(self.model)(**given)
            hidden = out.last_hidden_state[0]
            del out, given
        with count.phase_of("head"):
            if bf16:
                with count.under("head"):
                    hidden, weight = hidden.to(torch.bfloat16), weight.to(torch.bfloat16)
            loss = _Head.apply(hidden, weight, self)
            del hidden, weight, taught
        with count.phase_of("backward pass"), count.under("backward"), _Autocast(bf16, cached=False):
            torch.autograd.backward(
                loss
            )  # not loss.backward, under which the casts are off and layers recompute without

    @torch.no_grad()
    def read_by_teacher(self, tokens: int) -> Tensor | None:
        """Its hidden states, which the head of a pass wants."""
        if self.teacher is None:
            return None
        with self.count.phase_of("teacher's forward pass"), self.count.under("teacher"):
            ids = torch.empty(1, tokens, dtype=torch.int64, device="meta")
            given = {"input_ids": ids, "position_ids": ids, "use_cache": False, "max_length_q": tokens}
            return decoder(self.teacher)(**given).last_hidden_state[0]

    def optimise(self) -> None:
        """The step itself."""
        if self.optimizer is not None:
            with self.count.phase_of("optimizer step"), self.count.under("step"):
                self.optimizer.step()

    def attend(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, sliding_window: Any = None, **_: Any
    ) -> tuple[Tensor, None]:
        """The memory of `varlen_attention`, in place of it."""
        with self.count.under(self.count.name if self.count.name in ("backward", "teacher") else "attention"):
            if self.config.bf16:
                q, k, v = (t.to(torch.bfloat16) for t in (q, k, v))
            if self.cuda and q.dtype != torch.float32:
                q, k, v = (t.transpose(1, 2).contiguous() for t in (q, k, v))
                return _Attend.apply(q, k, v, (0,)), None
            length = q.shape[2]
            seen = (length, QUERY_BLOCK + sliding_window) if sliding_window and sliding_window < length else (0,)
            q, k, v = (t.split([length], dim=2)[0] for t in (q, k, v))
            return torch.cat([_Attend.apply(q, k, v, seen).transpose(1, 2)], dim=1), None


def _on_the_host(checkpoint: Callable[..., Any], *args: Any) -> Any:
    """What a checkpointed layer keeps is no memory of the device."""
    with saved_tensors_hooks(
        lambda t: (t.shape, t.dtype), lambda kept: torch.empty(kept[0], dtype=kept[1], device="meta")
    ):
        return checkpoint(*args)


class _Attend(torch.autograd.Function):
    """The memory of a fused attention kernel: its inputs, its output and a log-sum-exp a row; a mask of the window
    where it needs one."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, seen: tuple[int, ...]) -> Tensor:
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, lse, q.new_empty(seen, dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        return *(torch.empty_like(t) for t in ctx.saved_tensors[:3]), None


class _Head(torch.autograd.Function):
    """The memory of `linear_policy_loss`: gradients made in the forward pass, one chunk of logits."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, step: Step) -> Tensor:
        ctx.step, wanted = step, weight.requires_grad
        (V, D), device = weight.shape, "cuda" if step.cuda else "cpu"
        size = 4 if step.config.logits_dtype else product_dtype(weight.dtype, device).itemsize
        most = default_chunk_rows(V, size, device, frozen=not wanted)
        rows = equal_chunks(hidden.shape[0], most)
        with step.count.under("head"):
            d_hidden = torch.empty_like(hidden)
        with step.count.under("d_weight"):
            total = weight.dtype if rows >= hidden.shape[0] else torch.float32  # of more than one product
            d_weight = torch.empty_like(weight, dtype=total) if wanted else hidden.new_empty(0)
        chunk = rows * (row_stride(V) + 2 * D) * size
        its_own = {} if step.teacher is None else {"teacher": rows * row_stride(V) * size}
        step.count.look(head=chunk, **its_own)
        with step.count.under("d_weight"):
            d_weight = d_weight.to(weight.dtype)
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.wanted = wanted
        return hidden.new_empty((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden, d_weight if ctx.wanted else None, None


class _Autocast(TorchFunctionMode):
    """Autocast's casts of linear layers, which the meta device does not have; leaves that train are cast once in a
    forward pass."""

    def __init__(self, enabled: bool, cached: bool = True) -> None:
        super().__init__()
        self.enabled, self.cache = enabled, {} if cached else None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.enabled and func is nn.functional.linear:
            args = tuple(self._cast(t) if isinstance(t, Tensor) else t for t in args)
        return func(*args, **(kwargs or {}))

    def _cast(self, tensor: Tensor) -> Tensor:
        if self.cache is None or not (tensor.is_leaf and tensor.requires_grad):
            return tensor.to(torch.bfloat16)
        if id(tensor) not in self.cache:
            self.cache[id(tensor)] = tensor.to(torch.bfloat16)
        return self.cache[id(tensor)]
