"""Optimisers by the names that Hugging Face users know, resolved by transformers itself; Muon, and any of them on the
CPU's memory."""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ppg_fast.models.sharding import shard_like
from ppg_fast.spec import require

MUON = "muon"
NOT_OURS = {  # substrings of names: why
    "layerwise": "it steps during the backward pass, before gradients are clipped and checked",
    "lomo": "it steps during the backward pass, before gradients are clipped and checked",
    "schedule_free": "it has a schedule and weights for evaluation of its own",
}


def make_optimizer(
    model: nn.Module,
    name: str = "adamw_torch",
    *,
    arguments: str = "",
    betas: tuple[float, float] = (0.9, 0.95),
    weight_decay: float = 0.0,
    offload: bool = False,
) -> Any:
    """The optimizer ``name`` over the weights of ``model`` that train; its learning rate is set by whoever steps it.

    ``name``: a value of transformers' OptimizerNames, or "muon" (matrices of the decoder; AdamW for the rest).
    ``arguments``: as transformers' optim_args, "key=value,...". ``offload``: its state and step in host memory.
    ValueError for a name that is unknown or needs a package that is missing, saying which.
    """
    weights = [p for p in model.parameters() if p.requires_grad]
    require(bool(weights), "an optimizer must have a weight to train", 0)
    if name == MUON:
        return _muon(model, _numbers(arguments), betas, weight_decay, offload)
    cls, options = _resolve(model, name, arguments, betas)
    groups = options.pop("params", [{"params": weights}])

    def make(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return cls([{**group, "weight_decay": weight_decay} for group in groups], **options)

    return OnCPU(groups, make) if offload else make(groups)


def set_learning_rate(optimizer: Any, rate: float) -> None:
    """Of every group; in place where it is a tensor, since a compiled step (torchao's) holds on to it."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def load_optimizer_state(optimizer: Any, saved: dict[str, Any]) -> None:
    """Take over what ``optimizer.state_dict()`` gave, its moments sharded over ranks where the weights are."""
    if isinstance(optimizer, Together):
        for number, part in enumerate(optimizer.parts):
            load_optimizer_state(part, saved[str(number)])
        return
    if "state" in saved:
        weights = [p for group in optimizer.param_groups for p in group["params"]]
        moments = saved["state"].items()
        sharded = {i: {name: shard_like(value, weights[i]) for name, value in of.items()} for i, of in moments}
        saved = {**saved, "state": sharded}
    optimizer.load_state_dict(saved)


def _resolve(model: nn.Module, name: str, arguments: str, betas: tuple[float, float]) -> tuple[Any, dict[str, Any]]:
    """Class and keyword arguments as transformers' Trainer has them, without making its TrainingArguments, which would
    claim the device."""
    from transformers import Trainer, TrainingArguments
    from transformers.training_args import OptimizerNames

    names = [o.value for o in OptimizerNames]
    near = difflib.get_close_matches(name, [*names, MUON], 1)
    require(
        name in names,
        "optim must be a name that transformers knows, or muon" + (f"; did you mean {near[0]!r}?" if near else ""),
        name,
    )
    why = next((reason for part, reason in NOT_OURS.items() if part in name), "")
    require(not why, f"optim must be an optimizer of one step a batch ({why})", name)
    given = {f.name: f.default for f in fields(TrainingArguments)}
    given |= {
        "optim": name,
        "optim_args": arguments or None,
        "learning_rate": 0.0,
        "adam_beta1": betas[0],
        "adam_beta2": betas[1],
    }
    given |= {"optim_target_modules": "all-linear"}
    try:
        return Trainer.get_optimizer_cls_and_kwargs(SimpleNamespace(**given), model)  # type: ignore[arg-type]
    except ImportError as error:
        raise ValueError(f"optim {name!r} wants a package that is not here: {error}") from error


def _numbers(arguments: str) -> dict[str, Any]:
    pairs = [part.partition("=") for part in arguments.replace(" ", "").split(",") if part]
    try:
        return {key: value == "True" if value in ("True", "False") else float(value) for key, _, value in pairs}
    except ValueError as error:
        raise ValueError(f"optim_args must be numbers, True or False here, got {arguments!r}") from error


def _muon(
    model: Any, options: dict[str, Any], betas: tuple[float, float], weight_decay: float, offload: bool
) -> "Together":
    """Muon for the decoder's matrices, AdamW for embeddings, head, norms and biases, at one learning rate.

    Source: kellerjordan.github.io/posts/muon; the rate matched to AdamW's as in arXiv:2502.16982
    """
    muon = getattr(torch.optim, "Muon", None)
    require(muon is not None, "optim muon needs torch.optim.Muon (torch >= 2.9)", torch.__version__)
    assert muon is not None
    outer = {id(p) for part in (model.get_input_embeddings(), model.get_output_embeddings()) for p in part.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    inner = [p for p in trained if p.ndim == 2 and id(p) not in outer]
    rest = [p for p in trained if p.ndim != 2 or id(p) in outer]
    options = {"adjust_lr_fn": "match_rms_adamw", **options}
    makers: list[tuple[list[Any], Callable[[Any], torch.optim.Optimizer]]] = [
        (inner, lambda groups: muon(groups, lr=0.0, weight_decay=weight_decay, **options)),
        (rest, lambda groups: torch.optim.AdamW(groups, lr=0.0, betas=betas, weight_decay=weight_decay)),
    ]
    return Together([OnCPU([{"params": p}], make) if offload else make([{"params": p}]) for p, make in makers if p])


class Together:
    """Several optimizers as one."""

    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts = parts

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        return {str(n): part.state_dict() for n, part in enumerate(self.parts)}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        load_optimizer_state(self, saved)


class OnCPU:
    """An optimizer whose state, and whose step, are in host memory: a copy of the weights there, gradients down,
    weights back up.

    The gradient goes down when the step is taken, after clipping. torchao's CPUOffloadOptimizer sends it during the
    backward pass, so that clipping it afterwards, and leaving out a step whose gradient is not finite, would go
    unnoticed.
    """

    def __init__(
        self, groups: list[dict[str, Any]], make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
    ) -> None:
        hosted = []
        self.pairs: list[tuple[Tensor, Tensor]] = []
        for group in groups:
            pairs = [
                (p, torch.empty_like(p, device="cpu", pin_memory=p.is_cuda).copy_(p.detach())) for p in group["params"]
            ]
            self.pairs += pairs
            hosted.append({**group, "params": [host for _, host in pairs]})
        self.inner = make(hosted)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.inner.param_groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        for parameter, _ in self.pairs:
            if set_to_none:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad.zero_()

    @torch.no_grad()
    def step(self) -> None:
        for parameter, host in self.pairs:
            host.copy_(parameter)  # a checkpoint may have been loaded since
            if parameter.grad is None:
                host.grad = None
            elif host.grad is None:
                host.grad = torch.empty_like(host, pin_memory=parameter.is_cuda).copy_(parameter.grad)
            else:
                host.grad.copy_(parameter.grad)
        self.inner.step()
        for parameter, host in self.pairs:
            if parameter.grad is not None:
                parameter.copy_(host)

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.inner.load_state_dict(saved)
