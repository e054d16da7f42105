"""On what, of what and by which command a result was measured."""

import importlib.metadata
import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from ppg_fast import backends

from .timing import cache_bytes

PACKAGES = (
    "ppg_fast", "torch", "triton", "numpy", "transformers", "liger-kernel", "trl", "cut-cross-entropy", "quack-kernels",
)  # fmt: skip
ROOT = Path(__file__).resolve().parents[1]
TUNED = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_TOP_PAD_": str(2**28)}
# glibc's malloc; tuned: freed memory is kept and used again
ALLOCATORS: dict[str, dict[str, str]] = {"default": {}, "tuned": TUNED}


def environment(threads: int, allocator: str) -> dict[str, str]:
    """Settings of the measuring process: bound threads, and how malloc treats what is freed."""
    return {"OMP_NUM_THREADS": str(threads), "OMP_PROC_BIND": "true", "OMP_PLACES": "cores", **ALLOCATORS[allocator]}


def machine_info(device: str) -> dict[str, Any]:
    """Hardware and system, without names that tell whose machine it is."""
    info: dict[str, Any] = {
        "system": platform.system(),
        "release": platform.release(),
        "machine": platform.machine(),
        "libc": " ".join(platform.libc_ver()),
        "python_version": platform.python_version(),
        "cpu": {"brand_raw": _cpu_name(), "count": os.cpu_count(), "last_level_cache": cache_bytes("cpu")},
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "huge_pages": _first_line(Path("/sys/kernel/mm/transparent_hugepage/enabled")),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    if backends.why_not("cpu") is None:
        from ppg_fast import native

        info["ppg_fast_isa"] = native.isa()
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        info["gpu"] = {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
        }
    return info


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    numbers = " ".join(
        f"{short} {fields[name]}" for short, name in (("family", "cpu family"), ("model", "model")) if name in fields
    )
    return f"{fields.get('model name', platform.processor())} ({numbers})" if numbers else platform.processor()


def _first_line(path: Path) -> str:
    return path.read_text().splitlines()[0] if path.exists() else ""


def versions() -> dict[str, str]:
    """Of every package that takes part and is installed."""
    present = {
        (d.metadata["Name"] or "").lower().replace("_", "-"): d.version for d in importlib.metadata.distributions()
    }
    return {name: present[name.replace("_", "-")] for name in PACKAGES if name.replace("_", "-") in present}


def commit_info() -> dict[str, Any]:
    """The commit that was measured, and whether the kernels or the harness differed from it."""

    def git(*arguments: str) -> str | None:
        try:
            return subprocess.run(
                ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
            ).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None

    changed = git("status", "--porcelain", "--untracked-files=no")
    return {
        "id": git("rev-parse", "HEAD") or "unknown",
        "time": git("log", "-1", "--format=%cI"),
        "dirty": bool(changed),
    }


def load() -> float | None:
    """Processes that wanted to run during the last minute: above the number of our own, the machine was not quiet."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def now() -> str:
    """UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
