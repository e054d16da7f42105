"""Only what pyproject.toml cannot say: compile csrc/ into ppg_fast/_C, with CUDA where there is an nvcc, not at all
without a compiler. Environment variables: CXX and NVCC name the compilers (`NVCC=` leaves CUDA out),
TORCH_CUDA_ARCH_LIST the GPUs, PPG_FAST_EXTENSION an extension to pack as it is; PPG_FAST_WATCHDOG=1 makes kernels trap
where they would wait for ever; MAX_JOBS: of compilers at once."""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from setuptools import Extension, setup
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
    """Compiles the kernels and their launchers, which know nothing of torch, beside the bindings."""

    def build_extensions(self) -> None:
        extension = self.extensions[0]
        if given := os.environ.get("PPG_FAST_EXTENSION"):
            if reason := sources.misfit(Path(given)):
                raise SystemExit(f"PPG_FAST_EXTENSION must fit the sources, got {given}, {reason}; build it again")
            target = Path(self.get_ext_fullpath(extension.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(given, target)
            return
        self.nvcc = shutil.which(os.environ.get("NVCC", "nvcc"))
        self.gpus, self.watchdog = architectures() if self.nvcc else [], os.environ.get("PPG_FAST_WATCHDOG") == "1"
        if self.nvcc:
            extension.define_macros.append(("PPG_WITH_CUDA", "1"))
            runtime = [f"-L{cuda_runtime(self.nvcc)}", "-lcudart_static", "-lrt", "-ldl", "-lpthread"]
            extension.extra_link_args += runtime
        codes = tuple(gpu.split("code=")[1] for gpu in self.gpus)
        told = sources.Built(sources.checksum(), codes, self.watchdog)
        extension.define_macros.append(("PPG_BUILT", f'"{told.text}"'))
        self.force = True  # what is up to date is known by what it tells, not by its time
        super().build_extensions()

    def build_extension(self, extension: Extension) -> None:
        """No more compilers at once than cores, and one for the bindings."""
        Path(self.build_temp).mkdir(parents=True, exist_ok=True)
        compile_bindings = self.compiler.compile

        def compile_all(*args: Any, **options: Any) -> list[str]:
            with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
                units = [pool.submit(self.compile_unit, *job) for job in self.jobs(extension)]
                return compile_bindings(*args, **options) + [unit.result() for unit in units]

        self.compiler.compile = compile_all
        super().build_extension(extension)

    def jobs(self, extension: Extension) -> list[tuple[list[str], sources.Unit]]:
        """A compiler with its flags, and what it shall compile."""
        cuda = [str(self.nvcc), "-std=c++17", "-O3", "-lineinfo", "-Xcompiler=-fPIC,-fvisibility=hidden", "-t2"]
        cuda += ["-Xfatbin=-compress-all"]  # nvcc leaves the code of small units as it is
        cuda += [*(f"-gencode={gpu}" for gpu in self.gpus), *(["-DPPG_WATCHDOG"] if self.watchdog else [])]
        cpu = [cpp_extension.get_cxx_compiler(), *self.compiler.compiler_so[1:], *extension.extra_compile_args]
        units = [(cuda, unit) for unit in sources.cuda_units() if self.nvcc]
        return units + [(cpu, unit) for unit in sources.cpu_units()]

    def compile_unit(self, command: list[str], unit: sources.Unit) -> str:
        out = Path(self.build_temp, f"{unit.source.parent.name}-{unit.name}.o")
        done = subprocess.run(
            [*command, *unit.flags, "-c", str(unit.source), "-o", str(out)], stderr=subprocess.PIPE, text=True
        )
        if done.returncode:  # only then: GCC 12 warns a thousand times of its own AVX-512 headers
            raise RuntimeError(f"{done.stderr}{command[0]} failed; set NVCC to nothing to build without CUDA")
        return str(out)


native = CppExtension(
    "ppg_fast._C",
    ["csrc/bindings.cpp"],
    py_limited_api=True,
    extra_compile_args=[
        "-O3", "-std=c++20", "-ffp-contract=fast", "-fvisibility=hidden", "-Wno-attributes", "-Wno-psabi",
        "-DTORCH_TARGET_VERSION=0x020b000000000000",
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
