"""`ppg-fast info`: versions and backends, or the memory of a training step; what of the [train] extra is missing."""

import importlib.metadata
import platform
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

EXTRA = ("transformers", "tokenizers", "safetensors", "rich", "matplotlib", "yaml")  # modules of ppg_fast[train]


def missing(modules: Sequence[str] = EXTRA) -> list[str]:
    """Those of ``modules`` that are not installed."""
    return [name for name in modules if find_spec(name) is None]


def about(arguments: dict[str, Any]) -> int:
    """`ppg-fast info`: versions and backends, or with settings the memory of a training step under them."""
    asked = {name: arguments.pop(name) for name in ("config", "tokens", "memory_gb")}
    return _memory(arguments, **asked) if arguments or any(v is not None for v in asked.values()) else _info()


def _memory(flags: dict[str, object], config: str | None, tokens: int | None, memory_gb: float | None) -> int:
    """The memory of a training step under the given settings."""
    import torch

    from ppg_fast.config import make_config, read_yaml
    from ppg_fast.jobs.memory_estimate import report
    from ppg_fast.spec import require, require_number

    settings = make_config(read_yaml(config) if config else {}, flags)
    device = settings.device.split(":")[0].replace("auto", "cuda" if torch.cuda.is_available() else "cpu")
    tokens = settings.max_tokens if tokens is None else tokens
    require(tokens >= 1, "tokens must be an integer >= 1", tokens)
    if memory_gb is not None:
        require_number("memory_gb", memory_gb, 0.0, open_low=True)
    there = torch.cuda.get_device_properties(0).total_memory if device == "cuda" and torch.cuda.is_available() else 0
    print(report(settings, tokens, device, there if memory_gb is None else memory_gb * 1e9))
    return 0


def _info() -> int:
    """Versions, devices and backends; works without the [train] extra."""
    import torch

    from ppg_fast import __version__, backends, openmp
    from ppg_fast.ops.products import product_dtype

    print(f"ppg_fast {__version__}  python {platform.python_version()}  {platform.system()} {platform.machine()}")
    cuda = torch.version.cuda or "none"
    print(f"torch {torch.__version__}  threads {torch.get_num_threads()}  CUDA of torch: {cuda}")
    print(f"CPU threads that wait: {openmp.waits()}")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"CUDA devices: {', '.join(devices) or 'none that torch sees'}")
    print("\nbackends")
    for name in backends.NAMES:
        print(f"  {name:<8}{(backends.why_not(name) or 'runs here').removeprefix(name + ': ')}")
    for device in ("cpu", "cuda") if devices else ("cpu",):
        chosen = backends.default(device)
        print(
            f"  tensors on {device} use {chosen}"
            + (" (plain PyTorch: right, but slow)" if chosen == "reference" else "")
        )
    for dtype in (torch.bfloat16, torch.float16):  # by the processor's flags: a measured choice would change bits
        own = product_dtype(dtype, "cpu") == dtype
        how = "by the CPU's own products" if own else "in float32, tile by tile: this CPU has no products of that type"
        print(f"  a head of {str(dtype).removeprefix('torch.')} on cpu is multiplied {how}")
    print("\ntrain")
    lacking = missing()
    if lacking:
        print(f"  not ready, {', '.join(lacking)} missing: pip install ppg_fast[train]")
    else:
        versions = (
            f"{name} {importlib.metadata.version(name)}" for name in ("transformers", "tokenizers", "safetensors")
        )
        print(f"  ready ({', '.join(versions)}): ppg-fast train")
        print("  several GPUs: torchrun --nproc-per-node N -m ppg_fast train")
        print(f"  configs for accelerate launch: {Path(__file__).parent / 'launch'}")
    return 0
