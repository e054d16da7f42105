"""Our linear head as a fused kernel of verl, ``impl_backend: ppg``, for every model whose forward verl fuses with its
torch backend.

verl hands its fused heads ``lm_head.weight`` alone: no bias, no adapter, none of the scale and softcap that Gemma,
Granite or Cohere put behind it. Ours reads them from the model whose forward is running.
"""

from contextvars import ContextVar
from functools import wraps
from typing import Any

from torch import Tensor
from verl.models.transformers import monkey_patch  # pyright: ignore[reportMissingImports]
from verl.utils.experimental import torch_functional  # pyright: ignore[reportMissingImports]

from ppg_fast.functional import linear_token_logprobs
from ppg_fast.integrations.linear_head import linear_of
from ppg_fast.integrations.verl.engine import Asked, give_sum_pi_squared
from ppg_fast.models.output_head import Head, final_softcap, logit_scale

BACKEND = "ppg"
# the model whose forward is running, and where its sum_v p_v^2 of each token is asked for
_running: ContextVar[tuple[Any, Asked | None]] = ContextVar("the forward pass that is running", default=(None, None))


class FusedLinear(torch_functional.FusedLinearForPPO):
    """verl's fused head with one more ``impl_backend``, "ppg"; the others are verl's own."""

    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch") -> None:
        super().__init__(chunk_size, "torch" if impl_backend == BACKEND else impl_backend)
        self.impl_backend = impl_backend

    def forward(
        self, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy of each token, without the logits.

        Args:
            hidden_states: (..., D); vocab_weights: (V, D), of one dtype or under autocast.
            input_ids: (...) integers, the tokens these states predict (verl has rolled them).
            temperature: a number > 0.

        Returns: (...) float32 each, in nats, differentiable in both; inside of a forward that `with_ppg_backend` has
            patched those of the model's own logits, bias, adapter, scale and softcap included.
        Raises: ValueError where the model's head is not one product with a weight (quantized, DoRA, hooks).
        """
        if self.impl_backend != BACKEND:
            return super().forward(hidden_states, vocab_weights, input_ids, temperature)
        (model, asked), head = _running.get(), Head(vocab_weights, None)
        if model is not None:

            def whole(parameter: Any) -> Any:
                """The weight that verl has gathered, where FSDP2 has sharded it."""
                return vocab_weights if hasattr(parameter, "full_tensor") else parameter

            config, lm_head = model.config.get_text_config(), model.get_output_embeddings()
            hidden_states, weight, bias = linear_of(lm_head, hidden_states, called=False, whole=whole)
            head = Head(weight, bias, logit_scale(config), final_softcap(config))
        options = {
            "bias": head.bias,
            "entropy": True,
            "score_norms": asked is not None,
            **head.fold(float(temperature)),
        }
        logprobs, entropy, *norms = linear_token_logprobs(hidden_states, head.weight, input_ids.long(), **options)
        if asked is not None:  # the norm is sum_v p_v^2 - 2 p_label + 1
            asked.sum_pi_squared = norms[0] + 2 * logprobs.detach().exp() - 1
        return logprobs, entropy


def with_ppg_backend(patch: Any) -> Any:
    """verl's patch_forward_with_backends with one more backend, "ppg": the forward of its torch backend with our
    head."""

    @wraps(patch)
    def patch_forward_with_backends(
        model: Any, use_fused_kernels: bool = False, fused_kernels_backend: str | None = None
    ) -> None:
        ours = use_fused_kernels and fused_kernels_backend == BACKEND
        patch(model, use_fused_kernels, "torch" if ours else fused_kernels_backend)
        if ours:
            model._verl_fused_kernels_backend = BACKEND
            fused = type(model).forward

            @wraps(fused)
            def forward(self: Any, *args: Any, ppg_asked: Asked | None = None, **kwargs: Any) -> Any:
                token = _running.set((self, ppg_asked))
                try:
                    return fused(self, *args, **kwargs)
                finally:
                    _running.reset(token)

            type(model).forward = forward
            give_sum_pi_squared()
            print(f"{model.__class__.__name__} uses the fused head of ppg_fast")

    patch_forward_with_backends.knows_ppg = True  # type: ignore[attr-defined]
    return patch_forward_with_backends


def register() -> None:
    """Add the backend "ppg" to verl's. The forwards look the head's class up when they run: this serves all models."""
    if not hasattr(monkey_patch.patch_forward_with_backends, "knows_ppg"):
        monkey_patch.patch_forward_with_backends = with_ppg_backend(monkey_patch.patch_forward_with_backends)
        torch_functional.FusedLinearForPPO = FusedLinear
