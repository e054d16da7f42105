"""On what, of what and by which command a result was measured."""

import importlib.metadata
import os
from typing import Any

import torch

from ppg_fast import backends, openmp

from . import gpu_state as nvml
from . import result_file

PACKAGES = (
    "ppg_fast", "torch", "triton", "numpy", "transformers", "liger-kernel", "trl", "cut-cross-entropy", "quack-kernels",
)  # fmt: skip
TUNED = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_TOP_PAD_": str(2**28)}
# glibc's malloc; tuned: freed memory is kept and used again
ALLOCATORS: dict[str, dict[str, str]] = {"default": {}, "tuned": TUNED}


def environment(threads: int, allocator: str) -> dict[str, str]:
    """Settings of the measuring process: bound threads, and how malloc treats what is freed."""
    bound = {"OMP_NUM_THREADS": str(threads), "OMP_PROC_BIND": "true", "OMP_PLACES": "cores"}
    return {**bound, "GOMP_SPINCOUNT": str(openmp.SPINS), **ALLOCATORS[allocator]}


def machine_info(device: str) -> dict[str, Any]:
    """What `result_file.host` cannot know without torch: instruction sets and the GPU."""
    info: dict[str, Any] = {"torch_cpu_capability": torch.backends.cpu.get_cpu_capability()}
    if backends.why_not("cpu") is None:
        from ppg_fast import native

        info["ppg_fast_isa"] = native.isa()
        if os.environ.get("PPG_FAST_ISA"):
            info["ppg_fast_isa_forced"] = True
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        info["gpu"] = {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
        }
    return info


def gpu_state(device: str) -> dict[str, Any]:
    """Clocks and power of now: `gpu_state.state`; nothing of a CPU."""
    return nvml.state(str(torch.cuda.get_device_properties(0).uuid)) if device == "cuda" else {}


def versions() -> dict[str, str]:
    """Of every package that takes part and is installed."""
    present = {
        (d.metadata["Name"] or "").lower().replace("_", "-"): d.version for d in importlib.metadata.distributions()
    }
    return {name: present[name.replace("_", "-")] for name in PACKAGES if name.replace("_", "-") in present}


def header(command: str, device: str, **more: Any) -> dict[str, Any]:
    """`result_file.header` of a process that has torch."""
    return result_file.header(command, machine_info(device), versions(), **more)
