"""The architecture as a test: every op has its homes, and all languages count loss types alike."""

import re
from pathlib import Path

import pytest

from ppg_fast import backends
from ppg_fast.spec import BASELINES, REDUCTIONS, KLEstimator, LossType

ROOT = Path(__file__).parents[1]
EVERY = (
    "ppg_fast/reference/{}.py",
    "kernels/triton/{}.py",
    "csrc/cpu/{}.cpp",
    "csrc/cuda/{}.cu",
    "tests/test_{}.py",
    "bench/bench_{}.py",
)
# in CUDA the sweep of the fused loss is that of policy_loss
FUSED = (
    "ppg_fast/ops/{}.py",
    "kernels/triton/{}.py",
    "kernels/triton/credit.py",
    "csrc/cuda/credit.cu",
    "csrc/cuda/policy_loss.cu",
    "tests/test_{}.py",
)
HOMES = {"policy_loss": EVERY, "logprobs": EVERY, "partial_returns": EVERY, "fused_policy_loss": FUSED}
PARTS = ("kernels/triton/plan.py", "csrc/cuda/plan.h")  # how rows are laid over a device


@pytest.mark.parametrize("home", [home.format(op) for op, homes in HOMES.items() for home in homes] + [*PARTS])
def test_everything_has_its_home(home):
    assert (ROOT / home).is_file()


@pytest.mark.parametrize(
    "home", ["ppg_fast/reference/policy_term.py", "kernels/triton/policy_term.py", "csrc/policy_term.h"]
)
def test_the_scalar_loss_stands_three_times_only(home):
    text = (ROOT / home).read_text()
    assert "policy_term" in text
    assert text.count("def policy_term(") + text.count("Term policy_term(") == 1
    others = [
        p
        for p in (ROOT / Path(home).parts[0]).rglob("*.[phc]*")
        if p != ROOT / home and p.suffix != ".pyc" and re.search(r"def policy_term\(|Term policy_term\(", p.read_text())
    ]
    assert others == []


def test_backends_keep_the_contract(backend):
    module = backends.load(backend)
    contract = ("partial_returns",) if backend == "reference" else backends.CONTRACT
    assert [name for name in contract if not callable(getattr(module, name, None))] == []


def cpp_enum(name):
    body = re.search(rf"enum class {name} : int {{(.*?)}}", (ROOT / "csrc/args.h").read_text())[1]
    return {name: int(value) for name, value in re.findall(r"(\w+) = (\d+)", body)}


@pytest.mark.parametrize("enum", [LossType, KLEstimator], ids=lambda e: e.__name__)
def test_enums_agree_with_cpp(enum):
    assert cpp_enum(enum.__name__) == {member.name: member.value for member in enum}


@pytest.mark.parametrize(("name", "names"), [("Baseline", BASELINES), ("Reduction", REDUCTIONS)])
def test_names_that_travel_by_their_place_agree_with_cpp(name, names):
    assert cpp_enum(name) == {text.upper(): place for place, text in enumerate(names)}
