"""Which weights of a model train and which of its activations are kept: LoRA, frozen parts, activation checkpointing.

All by the libraries' own switches (peft, transformers). Here too: what of a model a checkpoint needs, and the weights
it started from.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ppg_fast.models.sharding import shard_like
from ppg_fast.spec import require

HEAD, EMBEDDINGS = "head", "embeddings"  # words that `freeze` knows


def add_lora(model: Any, rank: int, alpha: int = 0, dropout: float = 0.0, target_modules: str = "all-linear") -> Any:
    """``model`` with trainable low-rank adapters W + alpha / rank B A, everything else frozen; B starts at zero.

    ``alpha`` 0: twice the rank. ``target_modules``: "all-linear" (all linear layers but the head), or names or a
    regular expression as peft takes them, names separated by commas. The adapters are float32 whatever the model's
    dtype. ValueError where peft is missing, for targets that match nothing, and for the head.  Source: arXiv:2106.09685
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ValueError("lora_rank > 0 needs peft: pip install ppg_fast[lora]") from error
    targets: Any = (
        [name.strip() for name in target_modules.split(",")]
        if re.fullmatch(r"[\w., ]+", target_modules)
        else target_modules
    )
    targets = "all-linear" if target_modules in ("all-linear", "all_linear") else targets
    if isinstance(targets, str):
        _pattern("lora_target_modules", targets)
    model.requires_grad_(False)
    model.adapted_base = describe_base(model)
    model.add_adapter(LoraConfig(r=rank, lora_alpha=alpha or 2 * rank, lora_dropout=dropout, target_modules=targets))
    plain_head(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def _pattern(setting: str, text: str) -> re.Pattern[str]:
    """The regular expression ``text``; ValueError where it is none."""
    try:
        return re.compile(text)
    except re.error as error:
        raise ValueError(f"{setting} must be a regular expression, got {text!r}: {error}") from error


def plain_head(model: Any) -> Any:
    """The head of a causal LM; ValueError where it carries adapters: the fused head reads its weight alone and would
    leave them out."""
    head = model.get_output_embeddings()
    adapted = hasattr(head, "base_layer") or hasattr(head, "modules_to_save")
    require(not adapted, "adapters must not be on the head (leave it out of lora_target_modules)", type(head).__name__)
    return head


def freeze(model: Any, names: str) -> None:
    """Freeze what ``names``, separated by commas, name: "head", "embeddings", or regular expressions found in a
    parameter's name.

    A head that is tied to the embeddings is frozen with them. ValueError for a name that matches nothing.
    """
    words = {HEAD: model.get_output_embeddings(), EMBEDDINGS: model.get_input_embeddings()}
    for name in filter(None, (part.strip() for part in names.split(","))):
        if name in words:
            chosen = list(words[name].parameters())
        else:
            pattern = _pattern("freeze", name)
            chosen = [p for n, p in model.named_parameters(remove_duplicate=False) if pattern.search(n)]
        require(
            bool(chosen),
            f"freeze must name {HEAD}, {EMBEDDINGS} or (as regular expressions) weights of the model",
            name,
        )
        for parameter in chosen:
            parameter.requires_grad_(False)
    require(any(p.requires_grad for p in model.parameters()), "freeze must leave a weight to train", names)


def checkpoint_activations(model: Any, every_n_layers: int = 1, offload: bool = False) -> None:
    """Keep a layer's input only and compute its activations again in the backward pass; with ``offload`` keep the input
    in host memory.

    ``every_n_layers``: only every so many layers. ValueError where the model, or this transformers, does not know it.
    """
    switch = getattr(model, "activation_checkpointing_enable", None)
    try:
        if switch is not None:
            switch(
                {"use_reentrant": False}, every_n_layers=every_n_layers, offload=offload and model.device.type != "cpu"
            )  # on a CPU they are in host memory anyway
        else:
            import transformers

            newer = (
                "activation_offload and activation_checkpointing_every_n_layers need a newer transformers (5.23 "
                "has them)"
            )
            require(every_n_layers == 1 and not offload, newer, transformers.__version__)
            model.gradient_checkpointing_enable({"use_reentrant": False})
    except TypeError as error:
        raise ValueError(
            f"{type(model).__name__} does not know these options of activation checkpointing: {error}"
        ) from error


def describe_base(model: nn.Module, dtype: str = "") -> dict[str, str]:
    """What tells one base model of adapters from another of the same shapes: ``weights``, a checksum of them in
    ``dtype``."""
    dtype = dtype or str(next(model.parameters()).dtype).removeprefix("torch.")
    weights = ((name, p.detach().to(getattr(torch, dtype))) for name, p in model.named_parameters())
    return {"dtype": dtype, "weights": weights_digest(weights)}


def trainable_state(model: nn.Module) -> dict[str, Any]:
    """What of ``model.state_dict()`` training changes: everything but frozen parameters. Tensors are the model's
    own."""
    frozen = {n for n, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    return {name: value for name, value in model.state_dict().items() if name not in frozen}


def load_trainable_state(model: nn.Module, saved: dict[str, Any]) -> None:
    """Take over what `trainable_state` gave, whether either is sharded or not. ValueError where it is of other
    weights."""
    own = trainable_state(model)
    others = sorted(own.keys() ^ saved.keys())
    require(
        not others, "a checkpoint must hold the weights that train, and no others; in one of the two only", others[:3]
    )
    shapes = [(name, tuple(saved[name].shape), tuple(own[name].shape)) for name in own if isinstance(own[name], Tensor)]
    wrong = [f"{name} is {there} and {here} here" for name, there, here in shapes if there != here]
    require(
        not wrong, f"a checkpoint must hold weights of the model's shapes; {len(wrong)} differ", "; ".join(wrong[:1])
    )
    model.load_state_dict({name: shard_like(value, own[name]) for name, value in saved.items()}, strict=False)


def frozen_digest(model: nn.Module) -> str:
    """A checksum of the frozen weights, "" where there are none: a checkpoint without them is right on the same ones
    only."""
    frozen = [(n, p.detach()) for n, p in model.named_parameters() if not p.requires_grad]
    return weights_digest(frozen) if frozen else ""


def weights_digest(weights: Iterable[tuple[str, Tensor]]) -> str:
    """A checksum of named weights: their names, dtypes, shapes and bits."""
    total = hashlib.sha256()
    for name, weight in weights:
        # the model of a memory estimate has no bits
        bits = None if weight.is_meta else torch.hash_tensor(weight).view(torch.int64).item()
        total.update(repr((name, weight.dtype, tuple(weight.shape), bits)).encode())
    return total.hexdigest()


class StartingWeights:
    """The policy that a KL term refers to: a copy of the weights that train, as they are now. Frozen ones are shared
    with the model.

    With LoRA that is the adapters only: before the first step they are zero, so that the reference is the model without
    them.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    @contextmanager
    def in_place(self) -> Iterator[Any]:
        """The model with these weights, while the block runs. Exact: contents are exchanged, one weight at a time, and
        back."""
        self._exchange()
        try:
            yield self.model
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, parameter in self.model.named_parameters():
            if name in self.weights:
                held = parameter.detach().clone()
                parameter.copy_(self.weights[name])
                self.weights[name].copy_(held)

    def state_dict(self) -> dict[str, Tensor]:
        """The copy, by name."""
        return self.weights

    def load_state_dict(self, saved: dict[str, Tensor]) -> None:
        """Take over what `state_dict` gave; ValueError where it is of other weights."""
        others = sorted(self.weights.keys() ^ saved.keys())
        require(not others, "reference weights must be those that train; in one of the two only", others[:3])
        for name, weight in self.weights.items():
            weight.copy_(shard_like(saved[name], weight))
