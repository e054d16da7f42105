"""The processes that train one model together: who is who, what they tell each other, how the model is spread over
them.

The engines are torch's: DistributedDataParallel, FSDP2 (`fully_shard`), process groups. Started by ``torchrun`` or
``accelerate launch``; without either, `Ranks()` is one process by itself and nothing here communicates.

What keeps ranks from waiting for each other for ever: all of them take the same number of passes through the model, a
decision that one of them makes (`largest`, `run_on_main`) is everyone's, and a collective operation that a rank does
not answer ends in an error after ``timeout``.
"""

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from ppg_fast import stopping
from ppg_fast.spec import require, require_one_of

PARALLEL = ("auto", "ddp", "fsdp2")
T = TypeVar("T")


class Ranks:
    """One process among ``world``, number ``rank``; rank 0 is the main one, which writes what is written once.

    ``joined``: started as one of several, be it the only one. ``autocast``: the dtype of mixed precision where FSDP2
        does not see to it.
    """

    def __init__(self, parallel: str = "auto", bf16: bool = False, sync_each_batch: bool = False) -> None:
        require_one_of("parallel", parallel, PARALLEL)
        launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # what `accelerate launch` tells its processes
        require_one_of("mixed_precision of the accelerate config", launched, ("no", "bf16"))
        self.dtype = torch.bfloat16 if bf16 or launched == "bf16" else None
        self.joined = distributed.is_available() and distributed.is_initialized()
        self.rank, self.world = (distributed.get_rank(), distributed.get_world_size()) if self.joined else (0, 1)
        self.sharded = self.joined and (_launched_fsdp() if parallel == "auto" else parallel == "fsdp2")
        self.autocast = None if self.sharded else self.dtype
        self.sync_each_batch = sync_each_batch
        self.founded = False  # whether the process group is ours to end
        self.mesh: Any = None
        self._modules: dict[nn.Module, nn.Module] = {}

    @classmethod
    def join(
        cls,
        parallel: str = "auto",
        bf16: bool = False,
        sync_each_batch: bool = False,
        device: str = "auto",
        timeout: int = 1800,
    ) -> "Ranks":
        """Meet the other ranks, where a launcher started this process as one of them.

        ``parallel``: "ddp" (the whole model on every rank), "fsdp2" (a part on each), "auto": as `accelerate launch`
            was told, else ddp.
        ``device``: "cpu" meets over gloo; else each rank takes the CUDA device of its LOCAL_RANK and nccl, and gloo for
            messages.
        ``timeout``: seconds after which an answer that does not come is an error. ValueError for a device of its own.
        """
        launched = distributed.is_available() and {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()
        if not launched or distributed.is_initialized():
            return cls(parallel, bf16, sync_each_batch)
        require_one_of("parallel", parallel, PARALLEL)
        rule = "a rank takes the device of its LOCAL_RANK, so device must be auto, cpu or cuda"
        require(device in ("auto", "cpu", "cuda"), rule, device)
        cuda = device != "cpu" and torch.cuda.is_available()
        if cuda:
            local = int(os.environ.get("LOCAL_RANK", 0))
            require(
                local < torch.cuda.device_count(),
                f"LOCAL_RANK must be below the {torch.cuda.device_count()} CUDA devices here",
                local,
            )
            torch.cuda.set_device(local)
        distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(seconds=timeout))
        ranks = cls(parallel, bf16, sync_each_batch)
        ranks.founded = True
        return ranks

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def leave(self) -> None:
        """Part from the others in good order, where `join` met them."""
        if self.founded:
            distributed.barrier()
            distributed.destroy_process_group()

    def share(self, sizes: Sequence[int]) -> list[int]:
        """Which of several pieces of work are this rank's, in order. Largest first, each goes to the rank with the
        least so far."""
        loads, shares = [0] * self.world, [[] for _ in range(self.world)]
        for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
            lightest = loads.index(min(loads))
            loads[lightest] += sizes[index]
            shares[lightest].append(index)
        return sorted(shares[self.rank])

    def part(self, count: int) -> range:
        """Which of ``count`` equal pieces of work are this rank's: as many on each as can be, in order of ranks."""
        return range(count * self.rank // self.world, count * (self.rank + 1) // self.world)

    def gather(self, value: T) -> list[T]:
        """The ``value`` of every rank, in order of ranks."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        distributed.all_gather_object(values, value)
        return values

    def largest(self, value: int) -> int:
        """The largest ``value`` of all ranks."""
        if self.world == 1:
            return value
        held = torch.tensor(value)
        distributed.all_reduce(held, distributed.ReduceOp.MAX)
        return int(held)

    def run_on_main(self, act: Callable[[], T]) -> T:
        """``act()`` on rank 0, and its result, or its error, on all ranks."""
        if self.world == 1:
            return act()
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = act()
            except (Exception, stopping.Stopped) as error:  # raised again below, by all
                outcome[1] = error
        distributed.broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def run_on_all(self, act: Callable[[], T]) -> list[T]:
        """``act()`` on every rank, and the results of all, or the first error, on all ranks."""
        return self.gather(self.together(act))

    def together(self, act: Callable[[], T]) -> T:
        """``act()`` on every rank, and this one's result; where some fail or are told to stop, all raise the first."""
        if self.world == 1:
            return act()
        try:
            result, failed = act(), None
        except (Exception, stopping.Stopped) as error:  # raised again below, by all
            result, failed = None, error
        for error in filter(None, self.gather(failed)):
            raise error from failed
        return result  # type: ignore[return-value]

    def check(self) -> None:
        """Stopped, on all ranks, where a signal came to one of them. All call it, between two passes."""
        if number := self.largest(stopping.requested()):
            raise stopping.Stopped(number)

    def shard(self, model: nn.Module, module: nn.Module) -> nn.Module:
        """Spread ``model`` over the ranks, in place; returns what to call, and remembers it for `module`.

        ``module`` has ``model`` inside and uses all of its weights in one forward. FSDP2 shards each module of the
        classes that the model names as its layers (``_no_split_modules``), and with ``module`` as its root what is
        left: embedding, last norm and head.
        """
        called = module
        if self.sharded:
            self._shard(model, module)
        elif self.joined:
            from torch.nn.parallel import DistributedDataParallel

            devices = [torch.cuda.current_device()] if next(model.parameters()).is_cuda else None
            with warnings.catch_warnings():
                # newer releases have another word for it than older ones
                warnings.simplefilter("ignore", FutureWarning)
                called = DistributedDataParallel(
                    module, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True
                )
        self._modules[model] = called
        return called

    def _shard(self, model: nn.Module, module: nn.Module) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        if self.mesh is None:
            device = next(p for p in model.parameters() if not p.is_meta).device.type
            self.mesh = init_device_mesh(device, (self.world,))
        # inputs stay as they are: advantages and log-probs are float32 whatever the weights are
        policy = MixedPrecisionPolicy(param_dtype=self.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        layers = set(getattr(model, "_no_split_modules", None) or ())
        for part in [m for m in model.modules() if type(m).__name__ in layers]:
            fully_shard(part, mesh=self.mesh, mp_policy=policy)
        fully_shard(module, mesh=self.mesh, mp_policy=policy)

    def module(self, model: nn.Module) -> nn.Module | None:
        """What `shard` gave for ``model``; None if it was never sharded."""
        return self._modules.get(model)

    @contextmanager
    def accumulate(self, module: nn.Module, last: bool) -> Iterator[None]:
        """Forward and backward of one micro-batch: gradients are summed over the ranks with the last one of a step
        only.

        With ``sync_each_batch`` FSDP2 does so each time, and keeps no whole gradient between them.
        """
        if self.sharded:
            assert hasattr(module, "set_requires_gradient_sync")
            module.set_requires_gradient_sync(last or self.sync_each_batch)  # type: ignore[operator]
            yield
        else:
            with nullcontext() if last or not self.joined else module.no_sync():  # type: ignore[operator]
                yield

    @contextmanager
    def no_grad_forward(self, module: nn.Module) -> Iterator[None]:
        """Forward passes of ``module`` without a gradient; what FSDP2 gathered for them is given back."""
        try:
            with torch.no_grad():
                yield
        finally:
            if hasattr(module, "reshard"):
                module.reshard()  # type: ignore[operator]

    @contextmanager
    def sampling(self, model: nn.Module) -> Iterator[None]:
        """The whole of ``model`` on this rank, for passes that other ranks do not take, with the precision of training.

        FSDP2 gathers all weights once here: each rank then goes at its own pace, which passes that gather could not.
        """
        module, device = self.module(model), next(model.parameters()).device.type
        parts = (
            [part for part in module.modules() if hasattr(part, "unshard")]
            if module is not None and self.sharded
            else []
        )
        for part in parts:
            part.set_reshard_after_forward(False, recurse=False)  # type: ignore[operator]
            part.unshard()  # type: ignore[operator]
        try:
            with torch.autocast(device, self.autocast) if self.autocast else nullcontext():
                yield
        finally:
            for part in parts:
                part.reshard()  # type: ignore[operator]
                part.set_reshard_after_forward(part is not module, recurse=False)  # type: ignore[operator]

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Room for a tensor, spread over the ranks as FSDP2 spreads a parameter; on the CPU where each rank holds it
        whole."""
        if not self.sharded:
            return torch.empty(shape, dtype=dtype)
        from torch.distributed.tensor import Shard, empty

        return empty(*shape, dtype=dtype, device_mesh=self.mesh, placements=[Shard(0)])

    def full_state(self, model: nn.Module) -> dict[str, Any] | None:
        """All weights of ``model``, gathered to the CPU of rank 0; empty on the others, None where it is whole
        anyhow."""
        if not self.sharded:
            return None
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        state: dict[str, Any] = get_model_state_dict(
            model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
        )
        names: dict[nn.Parameter, str] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            one = names.setdefault(parameter, name)
            if one in state:  # weights that are tied are one tensor again, and are written once
                state[name] = state[one]
        return state


def lost_a_rank(error: RuntimeError) -> bool:
    """Whether ``error`` is what a collective operation says when another rank has died or does not answer."""
    return isinstance(error, distributed.DistError) or any(
        word in str(error) for word in ("gloo", "NCCL", "onnection closed")
    )


def _launched_fsdp() -> bool:
    """Whether `accelerate launch` was told to use FSDP. ValueError for what of its plugin we do not do."""
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return False
    for name, instead in (
        ("FSDP_OFFLOAD_PARAMS", "false"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "false"),
        ("FSDP_VERSION", "2"),
    ):
        given = os.environ.get(name, instead)
        require(given.lower() == instead, f"{name.lower()} of the accelerate config must be {instead}", given)
    return True
