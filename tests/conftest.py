import os
import signal
import sys
from types import SimpleNamespace

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported: its kernels then run on the CPU

from ppg_fast import backends


def _round_to_bfloat16_in_the_interpreter() -> None:
    """Triton's interpreter truncates float32 to bfloat16 where a GPU rounds to the nearest even."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    cast = interpreter.InterpreterBuilder.cast_impl

    def cast_impl(self, src, dst_type):
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            nearest = torch.from_numpy(np.ascontiguousarray(src.data)).to(torch.bfloat16)
            return interpreter.TensorHandle(nearest.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)
        return cast(self, src, dst_type)

    interpreter.InterpreterBuilder.cast_impl = cast_impl


@pytest.fixture(scope="session")
def emulated_cuda() -> None:
    from emulator.build import build, install, why_not

    if not torch.cuda.is_available() and backends.why_not("cpu") is None and why_not() is None:
        install(build())


@pytest.fixture(scope="session")
def interpreted_triton() -> None:
    if not torch.cuda.is_available() and backends.why_not("triton") is None:
        _round_to_bfloat16_in_the_interpreter()


@pytest.fixture(params=("reference", *backends.NAMES))
def backend(request: pytest.FixtureRequest) -> str:
    """Every test that asks for ``backend`` runs once on each, and says why where one cannot run."""
    if request.param == "cuda":
        request.getfixturevalue("emulated_cuda")
    if request.param == "triton":
        request.getfixturevalue("interpreted_triton")
    if request.param != "reference" and (reason := backends.why_not(request.param)):
        pytest.skip(reason)
    return request.param


@pytest.fixture
def device(backend: str) -> str:
    return "cuda" if backend in ("triton", "cuda") and torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _strict():
    """The same numbers every run, and NaN in every torch.empty, so that an output left unwritten is seen."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def threads_stay():
    """A run sets the threads of the process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def signals_are_heard():
    """Also where the tests themselves run under nohup or in the background of a script, which begin with signals
    ignored; so do their child processes."""
    heard = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in heard.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


# Files with the longest tests and fixtures, by turns for one of two workers and for the other.
LONGEST = (
    "test_cuda_emulated.py",
    "test_ranks.py",
    "test_cuda_compile.py",
    "test_triton_compile.py",
    "test_bench_gpu_driver.py",
    "test_memory.py",
    "test_wheel.py",
    "test_integrations_trl_ranks.py",
    "test_bench_gpu_kills.py",
    "test_run_ends.py",
)


def longest_first(items: list[pytest.Item]) -> list[pytest.Item]:
    """LONGEST at the head of each half, which is what each of two workers begins with (`--dist worksteal`): what is
    left at the end, and moves from one to the other, are short tests whose fixtures are cheap."""
    heads = [[i for name in LONGEST[first::2] for i in items if i.path.name == name] for first in (0, 1)]
    others = [item for item in items if item.path.name not in LONGEST]
    half = max(0, len(items) // 2 - len(heads[0]))
    return heads[0] + others[:half] + heads[1] + others[half:]


@pytest.hookimpl(tryfirst=True)  # before `-m` looks at the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`-m gpu` chooses what runs on a GPU: tests marked so, and every test of a backend that is there because of the
    GPU."""
    there = torch.cuda.is_available()
    for item in items:
        on_gpu = item.callspec.params.get("backend") in ("triton", "cuda") if hasattr(item, "callspec") else False
        if there and on_gpu:
            item.add_marker(pytest.mark.gpu)
        if not there and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    items[:] = longest_first(items)


@pytest.fixture(autouse=True)
def hardly_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots take most of a tiny run's time, so that of the runs that a test makes in its own process only the first
    draws. Those of fixtures and in other processes do, and test_report looks at what is drawn."""
    if "ppg_fast.jobs.run_folder" in sys.modules:
        stub = dict.fromkeys(("draw_curve", "draw_turns"), lambda path, *_: path.write_bytes(b"\x89PNG"))
        monkeypatch.setattr("ppg_fast.jobs.run_folder.curves", SimpleNamespace(**stub))
