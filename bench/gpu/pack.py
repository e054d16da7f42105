"""`make gpu-pack`: what travels beside the sources to a machine with a GPU, made on one without.

An extension, a second one whose kernels give up where they would wait for ever, the program of plans.cu, wheels of
what such a machine may lack, and a manifest of their sizes and hashes. There `take` puts to use what fits the sources,
the GPU and the system; what does not is built, or missing, as it would be without a pack.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import build, plans

ROOT = Path(__file__).resolve().parents[2]
PACK, LIMIT = Path("build/gpu-pack"), 64 * 2**20  # bytes, of all files together
EXTENSION = "_C.abi3.so"
FOLDERS = {"extension": False, "watchdog": True}  # of the extensions, and whether they have a watchdog
WHEELS = Path("build/gpu/wheels")  # where they are unpacked
WATCHED = Path("build/gpu/watched")  # a folder of links like build/gpu/site, around the extension with a watchdog


class DoesNotFit(Exception):
    """The pack is larger than may travel."""


def libc() -> str:
    """What compiled code needs at least of the system that it runs on."""
    return (os.confstr("CS_GNU_LIBC_VERSION") or "").removeprefix("glibc ")


# ---- here ------------------------------------------------------------------------------------------------------------
def make(root: Path, gpus: str, wheels: Sequence[str]) -> Path:
    """Fill root/build/gpu-pack for GPUs of these compute capabilities; what is there and fits stays. The manifest."""
    pack = root / PACK
    pack.mkdir(parents=True, exist_ok=True)
    (pack / "manifest.json").unlink(missing_ok=True)
    for name, watchdog in FOLDERS.items():
        extension(root, pack / name / EXTENSION, gpus, watchdog)
    if not plans.is_current(root, pack / "plans"):
        subprocess.run(plans.command(root, pack / "plans"), check=True)
    left_out = download(pack / "wheels", wheels)
    return write_manifest(pack, {"libc": libc(), "gpus": gpus, "left_out": left_out})


def extension(root: Path, out: Path, gpus: str, watchdog: bool) -> None:
    """The one that the tree was built to where that fits, else compiled."""
    source = build.sources(root)
    there = root / "ppg_fast" / EXTENSION
    if out.exists() and source.misfit(out, gpus.split(), watchdog) is None:
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    if there.exists() and source.misfit(there, gpus.split(), watchdog) is None:
        shutil.copy(there, out)
        return
    work = root / "build/gpu" / out.parent.name
    options = [f"--build-lib={work}", f"--build-temp={work / 'temp'}"]
    environment = {**os.environ, "TORCH_CUDA_ARCH_LIST": gpus, "PPG_FAST_WATCHDOG": str(int(watchdog))}
    environment.pop("PPG_FAST_EXTENSION", None)
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", *options], cwd=root, env=environment, check=True
    )
    shutil.copy(work / "ppg_fast" / EXTENSION, out)
    if reason := source.misfit(out, gpus.split(), watchdog):
        raise RuntimeError(f"{out} was just built, and yet {reason}: is there an nvcc?")


def download(folder: Path, wheels: Sequence[str]) -> dict[str, str]:
    """The wheels that are Python alone and so run in any; what there is none of, and why."""
    shutil.rmtree(folder, ignore_errors=True)
    left_out = {}
    pure = ["--only-binary=:all:", "--platform=any", "--implementation=py", "--abi=none", "--python-version=3.12"]
    for name in wheels:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *pure, f"--dest={folder}", name]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            left_out[name] = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
            print(f"left out: {name}: {left_out[name]}")
    return left_out


def write_manifest(pack: Path, facts: dict[str, Any]) -> Path:
    """Sizes and hashes of all that the pack holds, and ``facts``. DoesNotFit where it is more than LIMIT."""
    paths = [path for path in sorted(pack.rglob("*")) if path.is_file() and path.name != "manifest.json"]
    files = {str(path.relative_to(pack)): {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in paths}
    total = sum(file["bytes"] for file in files.values())
    if total > LIMIT:
        largest = sorted(files, key=lambda name: -files[name]["bytes"])[:5]
        named = ", ".join(f"{name} {files[name]['bytes'] / 2**20:.1f} MiB" for name in largest)
        raise DoesNotFit(f"{pack} may hold {LIMIT / 2**20:.0f} MiB, got {total / 2**20:.1f}; its largest: {named}")
    path = pack / "manifest.json"
    path.write_text(json.dumps({**facts, "bytes": total, "files": files}, indent=1) + "\n")
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ---- there -----------------------------------------------------------------------------------------------------------
def take(root: Path) -> list[str]:
    """Put to use what is in root/build/gpu-pack and fits; a line for each thing, also for what does not fit."""
    pack = root / PACK
    if not (pack / "manifest.json").exists():
        return []
    manifest = json.loads((pack / "manifest.json").read_text())
    whole = {
        name
        for name, file in manifest["files"].items()
        if (pack / name).exists() and sha256(pack / name) == file["sha256"]
    }
    said = [f"{name}: left, not as the manifest has it" for name in manifest["files"] if name not in whole]
    newer = _version(manifest["libc"]) > _version(libc())
    for name, watchdog in FOLDERS.items():
        path = f"{name}/{EXTENSION}"
        if path in whole:
            old = f"built on glibc {manifest['libc']}, here is {libc()}" if newer else None
            reason = old or build.misfit(root, pack / path, watchdog) or _place(root, pack / path, watchdog)
            said.append(f"{path}: {f'left, {reason}' if reason else 'taken'}")
    if "plans" in whole:
        fits = plans.is_current(root, pack / "plans") and not newer
        if fits:
            (root / plans.PROGRAM).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(pack / "plans", root / plans.PROGRAM)
        said.append(f"plans: {'taken' if fits else 'left, built from other sources or on a newer system'}")
    return said + unpack([pack / name for name in sorted(whole) if name.endswith(".whl")], root / WHEELS)


def _place(root: Path, extension: Path, watchdog: bool) -> str | None:
    """Where it is looked for; why not, where one that fits as well is there."""
    if watchdog:
        build.link(root, root / WATCHED, extension)
        return None
    if build.is_current(root):
        return "the one beside the sources fits"
    for old in (root / "ppg_fast").glob("_C*.so"):
        old.unlink()
    shutil.copy(extension, root / "ppg_fast" / EXTENSION)
    return None


def unpack(wheels: Sequence[Path], folder: Path) -> list[str]:
    """Into ``folder``, which `build.environment` has on the path, those whose modules Python does not find."""
    shutil.rmtree(folder, ignore_errors=True)
    said = []
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            tops = {Path(name).parts[0] for name in archive.namelist()}
            modules = {top.removesuffix(".py") for top in tops if not top.endswith((".dist-info", ".data", ".pth"))}
            wanted = [name for name in sorted(modules) if importlib.util.find_spec(name) is None]
            if wanted:
                archive.extractall(folder)
        said.append(f"{wheel.name}: {'taken' if wanted else 'left, installed here'}")
    return said


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part.isdigit())


def main(argv: Sequence[str] | None = None) -> int:
    """0 where the pack is ready, 1 where it is too large."""
    parser = argparse.ArgumentParser(prog="make gpu-pack", description="What travels to a machine with a GPU.")
    parser.add_argument("--gpus", default="9.0", help="compute capabilities, as TORCH_CUDA_ARCH_LIST has them [9.0]")
    parser.add_argument("wheels", nargs="*", help="packages that such a machine may lack")
    given = parser.parse_args(argv)
    try:
        manifest = make(ROOT, given.gpus, given.wheels)
    except DoesNotFit as error:
        print(error, file=sys.stderr)
        return 1
    held = json.loads(manifest.read_text())
    for name, file in held["files"].items():
        print(f"{file['bytes'] / 2**20:6.1f} MiB  {name}")
    print(f"{held['bytes'] / 2**20:6.1f} MiB of {LIMIT / 2**20:.0f} in {manifest.parent}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
