"""Only what pyproject.toml cannot say: compile csrc/ into ppg_fast/_C, with CUDA where there is an nvcc, not at all
without a compiler. Environment variables: CXX and NVCC name the compilers (`NVCC=` leaves CUDA out),
TORCH_CUDA_ARCH_LIST the GPUs, PPG_FAST_WATCHDOG=1 ends a kernel that waits for ever (slower: for tests),
PPG_FAST_EXTENSION an extension to pack as it is."""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from torch.utils import cpp_extension
from torch.utils.cpp_extension import BuildExtension, CppExtension

sys.path.insert(0, str(Path("csrc").resolve()))
import sources

ARCHITECTURES = (
    "arch=compute_80,code=sm_80",
    "arch=compute_90a,code=sm_90a",
    "arch=compute_100,code=sm_100",
    "arch=compute_100,code=compute_100",
)
WATCHDOG = ["-DPPG_WATCHDOG"] if os.environ.get("PPG_FAST_WATCHDOG") == "1" else []


def architectures() -> list[str]:
    """What nvcc compiles for, as torch chooses it: TORCH_CUDA_ARCH_LIST, else the GPUs that are there; else everything.

    Hopper always with its own instructions, which carry the "a".
    """
    there = sorted({"{}.{}".format(*torch.cuda.get_device_capability(n)) for n in range(torch.cuda.device_count())})
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST") or ";".join(there)
    if not asked:
        return list(ARCHITECTURES)
    os.environ["TORCH_CUDA_ARCH_LIST"] = asked
    chosen = (flag.removeprefix("-gencode=") for flag in cpp_extension._get_cuda_arch_flags())
    return [arch.replace("compute_90,code=sm_90", "compute_90a,code=sm_90a") for arch in chosen]


def cuda_runtime(nvcc: str) -> str:
    """The folder of libcudart_static.a; nvcc may be a wrapper script, so it is asked where its toolkit is."""
    plan = subprocess.run([nvcc, "-dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    top = next(line.split("TOP=", 1)[1].strip() for line in plan.splitlines() if "TOP=" in line)
    return next(str(d) for d in (Path(top, "lib64"), Path(top, "lib")) if (d / "libcudart_static.a").exists())


class Build(BuildExtension):
    """Adds the CUDA launchers, which know nothing of torch, as plain objects compiled by nvcc."""

    def build_extensions(self) -> None:
        extension = self.extensions[0]
        if given := os.environ.get("PPG_FAST_EXTENSION"):
            target = Path(self.get_ext_fullpath(extension.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(given, target)
            return
        if nvcc := shutil.which(os.environ.get("NVCC", "nvcc")):
            extension.extra_objects += self.compile_cuda(nvcc)
            extension.define_macros.append(("PPG_WITH_CUDA", "1"))
            extension.extra_link_args += [f"-L{cuda_runtime(nvcc)}", "-lcudart_static", "-lrt", "-ldl", "-lpthread"]
        extension.define_macros.append(("PPG_SOURCES", f'"{sources.checksum()}{"-watchdog" if WATCHDOG else ""}"'))
        super().build_extensions()

    def compile_cuda(self, nvcc: str) -> list[str]:
        """The object of every unit, as many at once as there are cores, or MAX_JOBS."""
        folder = Path(self.build_temp, "cuda")
        folder.mkdir(parents=True, exist_ok=True)
        flags = ["-std=c++17", "-O3", "-lineinfo", "-Xcompiler=-fPIC,-fvisibility=hidden", "-t2"]
        flags += [*WATCHDOG, *(f"-gencode={arch}" for arch in architectures())]

        def compile_one(unit: sources.Unit) -> str:
            out = str(folder / f"{unit.name}.o")
            if subprocess.run([nvcc, *flags, *unit.flags, "-c", str(unit.source), "-o", out]).returncode:
                raise RuntimeError("nvcc failed, see above; set NVCC to nothing to build without CUDA")
            return out

        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
            return list(pool.map(compile_one, sources.cuda_units()))


native = CppExtension(
    "ppg_fast._C",
    ["csrc/bindings.cpp", *sorted(map(str, Path("csrc/cpu").glob("*.cpp")))],
    py_limited_api=True,
    extra_compile_args=[
        "-O3", "-std=c++20", "-ffp-contract=fast", "-fvisibility=hidden", "-Wno-attributes", "-Wno-psabi",
        "-DTORCH_TARGET_VERSION=0x020b000000000000", "-DPy_LIMITED_API=0x030a0000",
    ],
    extra_link_args=["-Wl,--no-as-needed"],
)  # fmt: skip
# Without a compiler the package still installs, and `ppg-fast info` says what is missing; a compiler that fails is an
# error.
has_compiler = shutil.which(os.environ.get("CXX", "c++")) is not None

setup(
    ext_modules=[native] if has_compiler else [],
    cmdclass={"build_ext": Build, "bdist_wheel": bdist_wheel},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
