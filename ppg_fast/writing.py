"""How a file is written: whole or as it was, and what is no regular file written through; whatever fails is one thing,
an OSError that names the place."""

import os
import shutil
import stat
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

STREAMS = ("/dev/", "/proc/")  # names of open files: what they lead to is somebody's already
MEMORY = "/dev/shm/"  # files like any other, in memory


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Whatever fails in the block is an OSError that names ``path``, or the file that the system named.

    A full disk is an OSError from Python, a SafetensorError from safetensors, a RuntimeError from `torch.save`.
    ValueError, which is about input, stays as it is.
    """
    try:
        yield
    except (ValueError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise
        cause = refusal(error) or error
        said = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
        named = said if str(path) in said else f"{path} cannot be written: {said}"
        raise (type(error) if isinstance(error, FileExistsError) else OSError)(named) from error


def refusal(error: BaseException) -> OSError | None:
    """What the system said, where a library hides it behind an error of its own."""
    return next((e for e in (error, error.__cause__, error.__context__) if isinstance(e, OSError)), None)


def is_stream(path: Path) -> bool:
    """Whether ``path`` is a device, a pipe or the name of an open file, and written through instead of replaced."""
    if str(path.absolute()).startswith(STREAMS) and not str(path.absolute()).startswith(MEMORY):
        return True
    try:
        return not stat.S_ISREG(os.stat(path).st_mode) and not path.is_dir()
    except FileNotFoundError:
        return False


def check_output(path: Path, overwrite: bool, inputs: Iterable[Path] = (), flag: str = "--output") -> None:
    """FileExistsError where ``path`` holds something and ``overwrite`` is off; IsADirectoryError for a folder;
    ValueError where it is one of ``inputs``, or lies in one. ``flag``: what named it."""
    if path.is_dir():
        raise IsADirectoryError(f"{flag} must be a file, got the folder {str(path)!r}")
    for given in inputs:
        same = given.exists() and path.exists() and given.samefile(path)
        if same or (given.is_dir() and given.resolve() in path.resolve().parents and path.exists()):
            raise ValueError(f"{flag} must be another file than the input {str(given)!r}, got {str(path)!r}")
    if path.exists() and not is_stream(path) and not overwrite:
        raise FileExistsError(f"{path} exists: give another {flag}, or --overwrite to replace it")


@contextmanager
def opened(path: Path) -> Iterator[TextIO]:
    """A text file to write to. A regular one keeps its permissions and is replaced at the end, if nothing failed; of a
    link, what it leads to."""
    if is_stream(path):
        sys.stdout.flush()
        number = os.dup(1) if is_stdout(path) else os.open(path, os.O_WRONLY)
        try:
            with os.fdopen(number, "w", encoding="utf-8", newline="\n") as file:
                yield file
        except OSError as error:
            if error.errno is None or error.filename is not None:
                raise
            # of a write, which names no file
            raise OSError(error.errno, error.strerror, str(path)) from error
        return
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            shutil.copymode(target, temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk and not only in its cache."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_stdout(path: Path) -> bool:
    """Whether it names the standard output, which goes on where it is: opened anew, it would begin at its start."""
    try:
        return is_stream(path) and os.path.samestat(os.stat(path), os.fstat(1))
    except OSError:
        return False
