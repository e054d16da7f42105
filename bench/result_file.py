"""Result files: one header, one form on disk, one reader and one writer. Needs nothing but Python's own library."""

import gzip
import json
import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDER = Path("bench/results")
VERSION = "5.3.1"  # of pytest-benchmark, whose file format this is
WIDTH = 240  # characters of a line; a list of numbers is one line however long
LARGE = 200 * 2**10  # bytes of text above which a file is compressed


# ---- the header ------------------------------------------------------------------------------------------------------
def header(
    command: str,
    machine_info: dict[str, Any] | None = None,
    versions: dict[str, str] | None = None,
    commit: str | None = None,
    **more: Any,
) -> dict[str, Any]:
    """On what, of what and by which command is measured from now on; ``more`` stands beside the command.

    ``machine_info`` and ``versions``: what `machine` adds where torch can be imported. ``commit``: what is measured,
    where the tree is no git repository.
    """
    return {
        "machine_info": {**host(), **(machine_info or {})},
        "commit_info": {
            "id": commit or _git("rev-parse", "HEAD") or "unknown",
            "time": _git("log", "-1", "--format=%cI"),
            "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        },
        "datetime": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "version": VERSION,
        "ppg_fast": {
            "command": command,
            "versions": versions or {},
            "load_before": round(os.getloadavg()[0], 2),  # above the number of our own processes: it was not quiet
            "missing": {},
            **more,
        },
        "benchmarks": [],
    }


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def host() -> dict[str, Any]:
    """Hardware and system, without names that tell whose machine it is."""
    return {
        "system": platform.system(),
        "release": platform.release(),
        "machine": platform.machine(),
        "libc": " ".join(platform.libc_ver()),
        "python_version": platform.python_version(),
        "cpu": {"brand_raw": _cpu_name(), "count": os.cpu_count(), "last_level_cache": cpu_cache_bytes()},
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "huge_pages": _text_of(Path("/sys/kernel/mm/transparent_hugepage/enabled")),
    }


def cpu_cache_bytes() -> int:
    """Size of the largest cache."""
    sizes = [_text_of(p) for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    return max([int(s[:-1]) * units[s[-1]] for s in sizes if s[-1:] in units], default=32 * 2**20)


def _cpu_name() -> str:
    lines = _text_of(Path("/proc/cpuinfo")).splitlines()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    numbers = [
        f"{short} {fields[name]}" for short, name in (("family", "cpu family"), ("model", "model")) if name in fields
    ]
    name = fields.get("model name", platform.processor())
    return f"{name} ({' '.join(numbers)})" if numbers else name


def processor(machine_info: dict[str, Any]) -> str:
    """What a result holds for, as a reader finds it on their own machine: the GPU's name, else the CPU's with family
    and model, and the instruction set of our kernels there."""
    if "gpu" in machine_info:
        return machine_info["gpu"]["name"]
    isa = {"avx512": "AVX-512", "avx2": "AVX2"}.get(machine_info.get("ppg_fast_isa", ""))
    name = re.sub(r"\((R|TM)\)", "", machine_info["cpu"]["brand_raw"])
    forced = " (forced)" if isa and machine_info.get("ppg_fast_isa_forced") else ""
    return ", ".join(filter(None, (name, isa))) + forced


def name_of(op: str, device: str, machine_info: dict[str, Any]) -> str:
    """The file of an op's times: each processor has its own, "policy_loss.cpu.amd-epyc-25-17", and each instruction set
    that is forced on it, "policy_loss.cpu.intel-xeon-6-207-avx2"."""
    words = re.findall("[a-z0-9]+", processor({**machine_info, "ppg_fast_isa": ""}).lower())
    forced = [machine_info["ppg_fast_isa"]] if machine_info.get("ppg_fast_isa_forced") else []
    place = "-".join([*(w for w in words if w not in ("family", "model", "cpu", "processor")), *forced])
    return f"{op}.{device}.{place or 'unknown'}"


def _text_of(path: Path) -> str:
    return path.read_text().strip() if path.exists() else ""


# ---- the files -------------------------------------------------------------------------------------------------------
def write(folder: Path, name: str, file: dict[str, Any]) -> Path:
    """``name``.json in ``folder``, compressed to .json.gz where it is large; whole whenever it is looked at, and on the
    disk when this returns."""
    content = (_json(file) + "\n").encode()
    plain, packed = folder / f"{name}.json", folder / f"{name}.json.gz"
    path, other = (packed, plain) if len(content) > LARGE else (plain, packed)
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / f"{name}.draft"
    with draft.open("wb") as out:
        out.write(gzip.compress(content, mtime=0) if path is packed else content)
        out.flush()
        os.fsync(out.fileno())  # before it takes the place of the one before
    draft.replace(path)
    other.unlink(missing_ok=True)
    return path


def read(path: Path) -> dict[str, Any]:
    """One result file, compressed or not."""
    content = path.read_bytes()
    return json.loads(gzip.decompress(content) if path.suffix == ".gz" else content)


def load(folder: Path) -> dict[str, dict[str, Any]]:
    """Every result file of a folder: "policy_loss.cpu" -> its content."""
    return {path.name.split(".json")[0]: read(path) for path in sorted(folder.glob("*.json*"))}


def _json(value: Any, indent: int = 0) -> str:
    """Each value on one line where it is short or a list of numbers, else one line a member."""
    flat = json.dumps(value)
    numbers = isinstance(value, list) and all(isinstance(v, (int, float)) for v in value)
    if not isinstance(value, (dict, list)) or numbers or len(flat) + indent <= WIDTH:
        return flat
    pairs = value.items() if isinstance(value, dict) else [(None, v) for v in value]
    members = [("" if key is None else f"{json.dumps(key)}: ") + _json(v, indent + 1) for key, v in pairs]
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    space = "\n" + " " * (indent + 1)
    return f"{opening}{space}{f',{space}'.join(members)}{space[:-1]}{closing}"
