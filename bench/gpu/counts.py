"""Launches and syncs of one call, as torch's profiler and its sync debug mode see them."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import ppg_fast as ppg


def launches(call: Callable[[], Any]) -> list[str]:
    """Names of the kernels, copies and fills that the call put on the GPU."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
        call()
        torch.cuda.synchronize()
    return [str(e.name) for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA]


def syncs(call: Callable[[], Any]) -> int:
    """How often the call waited for the GPU."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in said)


def calls(device: str, tiny: bool, backend: str | None = None) -> dict[str, Callable[..., Any]]:
    """The paths that are counted, on a padded batch of four dialogues. Called with False they leave the backward pass
    out.

    The gradient of the logits is there after the forward pass; the backward pass multiplies it by what comes from
    above.
    """
    B, L, V, D, T = (2, 24, 97, 16, 3) if tiny else (4, 512, 32000, 256, 8)
    draw = torch.Generator(device).manual_seed(0)
    options: dict[str, Any] = {"generator": draw, "device": device}
    logits = torch.randn(B, L, V, dtype=torch.bfloat16, **options).requires_grad_()
    hidden = torch.randn(B, L, D, dtype=torch.bfloat16, **options).requires_grad_()
    weight = torch.randn(V, D, dtype=torch.bfloat16, **options).requires_grad_()
    labels, rewards = torch.randint(V, (B, L), **options), torch.rand(B, T, **options)
    turns = (torch.arange(L, device=device) * T // L).expand(B, L).contiguous()
    turns = torch.where(torch.arange(L, device=device) % (L // T) < 4, -1, turns)
    groups, advantages = torch.zeros(B, dtype=torch.int64, device=device), torch.randn(B, L, **options)
    credit: dict[str, Any] = {
        "baseline": "leave_one_out",
        "group_ids": groups,
        "backend": backend,
        "spec": ppg.PolicyLossSpec("ppo"),
    }
    class_ = ppg.Lookahead(2)

    def backward(make: Callable[[], ppg.PolicyLossOutput], *leaves: torch.Tensor) -> Callable[..., Any]:
        def call(whole: bool = True) -> Any:
            out = make()
            return (out.loss.detach(), *torch.autograd.grad(out.loss, leaves)) if whole else out

        return call

    linear = hidden, weight, labels
    return {
        "rewards and logits to loss and dlogits": backward(
            lambda: ppg.partial_policy_loss(logits, labels, rewards, turns, class_, **credit), logits
        ),
        "advantages and logits to loss and dlogits": backward(
            lambda: ppg.policy_loss(logits, labels, advantages, backend=backend), logits
        ),
        "log-probs and entropies of logits": lambda whole=True: ppg.token_logprobs(
            logits.detach(), labels, entropy=True, backend=backend
        ),
        "hidden states to loss and gradients": backward(
            lambda: ppg.linear_partial_policy_loss(*linear, rewards, turns, class_, **credit), hidden, weight
        ),
        "hidden states to loss and gradients, rows bounded": backward(
            lambda: ppg.linear_partial_policy_loss(*linear, rewards, turns, class_, max_active_rows=B * L, **credit),
            hidden,
            weight,
        ),
    }


def run(report: Any) -> None:
    """A line for each path."""
    for name, call in calls(report.device, report.tiny).items():

        def count(name: str = name, call: Callable[..., Any] = call) -> None:
            call()  # compiles, loads, allocates
            if report.device != "cuda":
                report.add(path=name)
                return
            forward = launches(partial(call, False))
            report.add(path=name, launches=forward, launches_with_backward=launches(call), syncs=syncs(call))

        report.case(name, count)
