"""Operators are for tracers: eager mode calls what is in them, without the cost of a dispatch."""

import math
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

Function = TypeVar("Function", bound=Callable[..., Any])
PLAIN = {Tensor, torch.nn.Parameter}
ONCE = (
    "ppg_fast's kernels have no second derivative: leave create_graph=True out, or compute the loss with "
    'backend="reference"'
)


def traced(*tensors: Tensor) -> bool:
    """Whether somebody records what is called: torch.compile, a dispatch mode such as FakeTensorMode, a subclass."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return True
    return not PLAIN.issuperset(map(type, tensors))


def transformed() -> bool:
    """Whether torch.func or forward-mode AD is at work: operators of our own would lose its tangents in silence."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0  # type: ignore[attr-defined]


def outside_of_graphs(function: Function) -> Function:
    """A function at which a graph of torch.compile ends, as torch.compiler.disable makes one. That one imports the
    compiler, seconds for everybody who does not compile."""
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    return function


def constant(number: float) -> bool:
    """Whether torch.compile takes ``number`` for a part of the graph: what changes from call to call is none."""
    if not torch.compiler.is_compiling():
        return True
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return has_static_value(number)


def as_data(shape: torch.Size | tuple[int, ...], number: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A number that changes, as a tensor. A sum with one is the form in which torch.compile keeps a number open: a
    float in an operator's arguments, or in torch.full, would be compiled in, once for each value."""
    return torch.zeros(shape, dtype=dtype, device=device) + number


def as_operands(tensors: list[Tensor | None], numbers: list[float]) -> tuple[list[Tensor | None], list[float]]:
    """What an operator takes: where a number changes, all of them as one tensor behind the others, and a NaN in their
    place (autograd wants no empty list)."""
    if all([constant(number) for number in numbers]):  # noqa: C419 (torch.compile does not follow a generator here)
        return tensors, numbers
    cpu = torch.device("cpu")
    return [*tensors, torch.stack([as_data((), number, torch.float64, cpu) for number in numbers])], [math.nan]


def from_operands(tensors: list[Tensor | None], numbers: list[float]) -> tuple[list[Tensor | None], list[float]]:
    """What went into `as_operands`."""
    if len(numbers) > 1 or tensors[-1] is None:
        return tensors, numbers
    return tensors[:-1], tensors[-1].tolist()


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether a gradient of one of them may be asked for."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def first_order(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """``backward`` whose gradients, under create_graph, raise a RuntimeError where they are differentiated.

    `torch.autograd.function.once_differentiable` lets them pass as constants unless the upstream gradient itself has a
    derivative, which that of a plain sum has not: the second-order term would be dropped in silence.
    """

    @wraps(backward)
    def wrapped(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
        again = torch.is_grad_enabled()
        with torch.no_grad():
            gradients = backward(ctx, *upstream)
        if not again:
            return gradients
        return tuple(_without_derivative(g) if isinstance(g, Tensor) else g for g in gradients)

    return wrapped


def _without_derivative(gradient: Tensor) -> Tensor:
    return torch._C._functions.DelayedError(ONCE.encode(), 1)(gradient.detach().requires_grad_())  # type: ignore[attr-defined]


def times(gradient: Tensor, upstream: Tensor) -> Tensor:
    """gradient * upstream in the gradient's dtype, for tracers; else see `backends`, scale_rows. Not by a 0-d tensor: a
    GPU rounds that to 16 bits before it multiplies 16-bit values."""
    shaped = upstream if upstream.dim() else upstream.view([1] * gradient.dim())
    return (gradient * shaped).to(gradient.dtype)


def hand_out(ctx: Any) -> None:
    """From now on the gradient buffers of ``ctx`` are the caller's; RuntimeError where they already were."""
    if getattr(ctx, "given", False):
        raise RuntimeError(
            "the policy loss was differentiated a second time, but its only gradient buffer was handed out by the "
            "first backward pass: compute the loss again, or build on token_logprobs"
        )
    ctx.given = True


def differentiable(compute: Callable[..., Any], setup: Callable[..., None], backward: Callable[..., Any]) -> Any:
    """An autograd.Function of the three functions that a custom op is made of, to call in its place by ``apply``."""
    members = {"forward": compute, "setup_context": setup, "backward": first_order(backward)}
    statics = {name: staticmethod(function) for name, function in members.items()}
    return type(compute.__name__, (torch.autograd.Function,), statics)


def no_gradients(tensors: list[Tensor | None]) -> list[None] | None:
    """What the backward pass of a custom op gives for a list: one None each if all are tensors, else one for all."""
    return [None] * len(tensors) if all(tensor is not None for tensor in tensors) else None
