"""What is compiled of csrc, what a finished extension tells, and what travels to a machine with a GPU: with compilers
and wheels that pretend."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import sources
from ppg_fast.bench.gpu import build, pack, plans
from setuptools.dist import Distribution

ROOT = Path(__file__).parents[1]


# ---- units -----------------------------------------------------------------------------------------------------------
def test_every_source_is_compiled_and_every_kernel_of_the_sweep():
    units = [*sources.cuda_units(), *sources.cpu_units()]
    on_disk = {
        path for folder in ("cuda", "cpu") for path in (ROOT / "csrc" / folder).glob("*.c*") if "cuh" not in path.name
    }
    assert {unit.source for unit in units} == on_disk
    assert len({(unit.source.parent, unit.name) for unit in units}) == len(units)
    text = (ROOT / "csrc/cuda/policy_loss_sweep.cu").read_text()
    assert set(re.findall(r"PPG_SWEEPS\((\w+)\)$", text, re.MULTILINE)) == set(sources.DTYPES)
    assert set(re.findall(r"PPG_SWEEP\(E, (\w+)\)", text)) - {"SUMS"} == set(sources.SUMS)
    isas = re.search(r"enum class Isa {(.*?)}", (ROOT / "csrc/cpu/isa.h").read_text())[1].split(",")
    assert sorted(sources.ISAS) == list(range(len(isas)))


FAKE = """#!/bin/sh
echo "+ $0 $*" >> {log}
case "$*" in *-dryrun*) echo '#$ TOP={top}' >&2; exit 0;; esac
{work}
while [ $# -gt 0 ]; do [ "$1" = -o ] && cp {object} "$2"; shift; done
echo "- $0" >> {log}
"""


def compilers(folder, work="", object="an object"):
    """Programs that pretend to be nvcc and c++: they note when they begin and end, and what they shall do."""
    (folder / "lib64").mkdir(parents=True)
    (folder / "lib64/libcudart_static.a").touch()
    (folder / "object").write_text(object)
    for name in ("nvcc", "c++"):
        text = FAKE.format(log=folder / "log", top=folder, work=work, object=folder / "object")
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return {"NVCC": str(folder / "nvcc"), "CXX": str(folder / "c++"), "CC": str(folder / "c++")}


@pytest.fixture
def setup(monkeypatch):
    """Runs `setup.py build_ext` in this process, where torch is imported already."""

    def run(out, ninja=True, **environment):
        monkeypatch.chdir(ROOT)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        scope = {"__name__": "setup"}
        exec((ROOT / "setup.py").read_text().split("# Without a compiler")[0], scope)
        command = scope["Build"](Distribution({"ext_modules": [scope["native"]]}), use_ninja=ninja)
        command.build_lib, command.build_temp = str(out), str(out / "temp")
        command.ensure_finalized()
        command.run()

    return run


def test_setup_compiles_every_unit_no_more_at_once_than_asked(tmp_path, setup):
    fakes = compilers(tmp_path / "bin", "sleep 0.1")
    setup(tmp_path, **fakes, MAX_JOBS="2", TORCH_CUDA_ARCH_LIST="9.0", PPG_FAST_WATCHDOG="1")
    log = (tmp_path / "bin/log").read_text().splitlines()
    begun = [line for line in log if line.startswith("+") and "-dryrun" not in line]
    for unit in sources.cuda_units() + sources.cpu_units():
        compiled = [line for line in begun if f" -c {unit.source} " in line]
        cuda = unit.source.suffix == ".cu"
        assert sum(all(flag in line.split() for flag in unit.flags) for line in compiled) == 1, unit
        assert all(("sm_90a" in line) == ("-DPPG_WATCHDOG" in line) == cuda for line in compiled)
    told = next(line for line in begun if "bindings.cpp" in line)
    assert f"sources={sources.checksum()} gpus=sm_90a watchdog=1" in told
    running = most = 0
    for line in log:
        running += {"+": 1, "-": -1}[line[0]] if "-dryrun" not in line else 0
        most = max(most, running)
    assert most <= 3, "two units and the bindings"
    setup(tmp_path, ninja=False, PPG_FAST_WATCHDOG="0")
    again = (tmp_path / "bin/log").read_text().splitlines()[len(log) :]
    assert sum(" -shared " in line for line in begun) == 1
    assert sum(" -shared " in line for line in again) == 1, "a finished extension is linked again when asked"


def test_a_compiler_that_fails_is_an_error(tmp_path, setup):
    fakes = compilers(tmp_path / "bin", 'case "$*" in *PPG_SUMS=ENTROPY*) echo went wrong >&2; exit 3;; esac')
    with pytest.raises(RuntimeError, match=r"went wrong\n.*nvcc failed; set NVCC"):
        setup(tmp_path, **fakes, TORCH_CUDA_ARCH_LIST="9.0")
    assert not list(tmp_path.rglob("_C*.so"))


# ---- what an extension tells -----------------------------------------------------------------------------------------
def fake(path, told):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\x7fELF\0machine code " + told.text.encode() + b"\0more")
    return path


@pytest.mark.parametrize(
    ("gpus", "fits", "others"),
    [
        ("sm_80", "8.0 8.6 8.9", "7.5 9.0 10.0"),
        ("sm_90a", "9.0", "8.0 10.0"),
        ("sm_86", "8.6 8.9", "8.0 9.0"),
        ("sm_80 compute_80", "8.0 8.9", "7.5 9.0"),  # its kernels for clusters are empty
        ("compute_90a", "9.0", "10.0"),
        ("sm_100 compute_100", "10.0 10.3 12.0", "9.0"),
        ("", "", "9.0"),
    ],
)
def test_code_fits_a_gpu(tmp_path, gpus, fits, others):
    extension = fake(tmp_path / "_C.so", sources.Built(sources.checksum(), tuple(gpus.split())))
    assert [sources.misfit(extension, [capability]) for capability in fits.split()] == [None] * len(fits.split())
    for capability in others.split():
        assert sources.misfit(extension, [capability]).endswith(f"here is {capability}")


def test_an_extension_of_other_sources_does_not_fit(tmp_path):
    now = sources.checksum()
    assert sources.misfit(fake(tmp_path / "_C.so", sources.Built(now))) is None
    assert sources.misfit(fake(tmp_path / "_C.so", sources.Built(now, watchdog=True))) == "built with a watchdog"
    assert sources.misfit(tmp_path / "_C.so", watchdog=True) is None
    other = sources.misfit(fake(tmp_path / "_C.so", sources.Built("0" * 64)))
    assert other == f"built from other sources: {'0' * 12}, these are {now[:12]}"
    (tmp_path / "_C.so").write_bytes(b"\x7fELF")
    assert "it tells none" in sources.misfit(tmp_path / "_C.so")


def test_setup_packs_no_extension_of_other_sources(tmp_path, setup):
    given = fake(tmp_path / "given.so", sources.Built("0" * 64))
    with pytest.raises(SystemExit, match=f"PPG_FAST_EXTENSION must fit the sources, got {given}, built from other"):
        setup(tmp_path, PPG_FAST_EXTENSION=str(given))
    assert not list(tmp_path.rglob("_C*.so"))
    setup(tmp_path, PPG_FAST_EXTENSION=str(fake(given, sources.Built(sources.checksum()))))
    assert next(tmp_path.rglob("_C*.so")).read_bytes() == given.read_bytes()


# ---- the pack --------------------------------------------------------------------------------------------------------
COMPILES = """
import os, pathlib, sys
sys.path.insert(0, "csrc")
import sources
out = next(word.split("=")[1] for word in sys.argv if word.startswith("--build-lib="))
path = pathlib.Path(out, "ppg_fast/_C.abi3.so")
path.parent.mkdir(parents=True)
gpus, watchdog = os.environ["TORCH_CUDA_ARCH_LIST"], os.environ["PPG_FAST_WATCHDOG"] == "1"
path.write_text(sources.Built(sources.checksum(), (f"sm_{gpus.replace('.', '')}a",), watchdog).text)
"""


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A repository with two sources and the least package, on a machine with a Hopper GPU."""
    for name in (
        "csrc/cuda/a.cu",
        "csrc/args.h",
        "setup.py",
        "bench/gpu/plans.cu",
        "kernels/triton/k.py",
        "ppg_fast/__init__.py",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"// {name}")
    (tmp_path / "setup.py").write_text(COMPILES)
    shutil.copy(ROOT / "csrc/sources.py", tmp_path / "csrc")
    monkeypatch.setattr(build, "gpus", lambda: ["9.0"])
    return tmp_path


def packed(tree, gpus=("sm_90a",), libc="2.17"):
    """A pack as `make` leaves it: both extensions, the program, a wheel that is missing here and one that is not."""
    folder, now = tree / pack.PACK, build.sources(tree).checksum()
    for name, watchdog in pack.FOLDERS.items():
        fake(folder / name / pack.EXTENSION, sources.Built(now, gpus, watchdog))
    (folder / "plans").write_text(f"a program of {plans.checksum(tree)}")
    (folder / "wheels").mkdir(exist_ok=True)
    for name in ("never_heard_of", "pytest"):
        with zipfile.ZipFile(folder / f"wheels/{name}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}/__init__.py", "value = 7")
            wheel.writestr(f"{name}-1.0.dist-info/METADATA", f"Name: {name}")
    return pack.write_manifest(folder, {"libc": libc, "gpus": "9.0"})


def test_the_manifest_names_what_travels(tree):
    manifest = json.loads(packed(tree).read_text())
    assert sorted(manifest["files"]) == [
        "extension/_C.abi3.so", "plans", "watchdog/_C.abi3.so",
        "wheels/never_heard_of-1.0-py3-none-any.whl", "wheels/pytest-1.0-py3-none-any.whl",
    ]  # fmt: skip
    assert manifest["bytes"] == sum((tree / pack.PACK / name).stat().st_size for name in manifest["files"])


def test_a_pack_that_is_too_large_names_the_largest(tree, monkeypatch):
    monkeypatch.setattr(pack, "LIMIT", 3 * 2**20)
    (tree / pack.PACK).mkdir(parents=True)
    for name, size in {"small": 1, "large": 2 * 2**20, "larger": 2**21 + 2**19}.items():
        (tree / pack.PACK / name).write_bytes(bytes(size))
    with pytest.raises(
        pack.DoesNotFit, match=r"may hold 3 MiB, got 4\.5; its largest: larger 2\.5 MiB, large 2\.0 MiB"
    ):
        pack.write_manifest(tree / pack.PACK, {"libc": "2.17"})
    assert not (tree / pack.PACK / "manifest.json").exists()


def test_what_fits_is_taken(tree):
    assert pack.take(tree) == [], "no pack"
    packed(tree)
    assert pack.take(tree) == [
        "extension/_C.abi3.so: taken",
        "watchdog/_C.abi3.so: taken",
        "plans: taken",
        "never_heard_of-1.0-py3-none-any.whl: taken",
        "pytest-1.0-py3-none-any.whl: left, installed here",
    ]
    assert build.is_current(tree)
    assert plans.is_current(tree, tree / plans.PROGRAM)
    watched = tree / pack.WATCHED / "ppg_fast"
    assert watched.joinpath(pack.EXTENSION).samefile(tree / pack.PACK / "watchdog" / pack.EXTENSION)
    assert watched.joinpath("__init__.py").samefile(tree / "ppg_fast/__init__.py")
    path = build.environment(tree / "build/gpu/site")["PYTHONPATH"].split(os.pathsep)
    found = subprocess.run(
        [sys.executable, "-S", "-c", "import never_heard_of; print(never_heard_of.value)"],
        env={"PYTHONPATH": os.pathsep.join(path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert found.stdout.strip() == "7", found.stderr
    assert "extension/_C.abi3.so: left, the one beside the sources fits" in pack.take(tree)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda tree: (tree / "csrc/args.h").write_text("// other"), "built from other sources"),
        (lambda tree: packed(tree, gpus=("sm_80",)), "built for sm_80, here is 9.0"),
        (lambda tree: packed(tree, libc="99.1"), "built on glibc 99.1, here is"),
    ],
    ids=["sources", "GPU", "system"],
)
def test_what_does_not_fit_is_left_and_built(tree, change, reason):
    packed(tree)
    change(tree)
    said = {line.split(": ")[0]: line for line in pack.take(tree)}
    assert f"left, {reason}" in said["extension/_C.abi3.so"]
    assert f"left, {reason}" in said["watchdog/_C.abi3.so"]
    assert not build.is_current(tree), "so that it is built"
    assert not (tree / pack.WATCHED).exists()


def test_a_damaged_file_is_left(tree):
    packed(tree)
    with (tree / pack.PACK / "plans").open("a") as file:
        file.write("cut")
    (tree / pack.PACK / "watchdog" / pack.EXTENSION).unlink()
    said = pack.take(tree)
    assert "plans: left, not as the manifest has it" in said
    assert "watchdog/_C.abi3.so: left, not as the manifest has it" in said
    assert "extension/_C.abi3.so: taken" in said
    assert not (tree / plans.PROGRAM).exists()


def test_a_pack_is_made_of_what_is_there(tree, monkeypatch):
    """An extension that fits is packed as it is, another is compiled, a wheel that there is none of is said."""
    compilers(tree / "bin", object=plans.checksum(tree))
    monkeypatch.setenv("PATH", f"{tree / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    there = fake(tree / "ppg_fast" / pack.EXTENSION, sources.Built(build.sources(tree).checksum(), ("sm_90a",)))
    manifest = json.loads(pack.make(tree, "9.0", ["never-heard-of"]).read_text())
    assert sorted(manifest["files"]) == ["extension/_C.abi3.so", "plans", "watchdog/_C.abi3.so"]
    assert manifest["files"]["extension/_C.abi3.so"]["sha256"] == pack.sha256(there)
    assert sources.built(tree / pack.PACK / "watchdog" / pack.EXTENSION).gpus == ("sm_90a",)
    assert "No matching distribution" in manifest["left_out"]["never-heard-of"]
