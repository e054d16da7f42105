"""The architecture as a test: every op has its homes, and all languages count loss types alike."""

import re
from pathlib import Path

import pytest
import torch

from ppg_fast import backends, contract, ops
from ppg_fast.losses import KLEstimator, LossType
from ppg_fast.spec import (
    BASELINES,
    IMPORTANCE_MODES,
    LEAST_LOGPROB,
    NAN_ROLLOUT,
    REDUCTIONS,
    SPEC_CHOICES,
    SPEC_NUMBERS,
    PolicyLossSpec,
)

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
    "ppg_fast/ops/policy_loss.py",
    "csrc/cpu/{}.cpp",
    "csrc/cpu/credit.cpp",
    "kernels/triton/{}.py",
    "kernels/triton/credit.py",
    "csrc/cuda/credit.cu",
    "csrc/cuda/policy_loss.cu",
    "tests/test_{}.py",
)
HOMES = dict.fromkeys(("policy_loss", "logprobs", "partial_returns", "distillation"), EVERY)
HOMES["fused_policy_loss"] = FUSED
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
    body = re.search(rf"enum class {name} : int {{(.*?)}}", (ROOT / "csrc/args.h").read_text(), re.DOTALL)[1]
    return {name: int(value) for name, value in re.findall(r"(\w+) = (\d+)", body)}


@pytest.mark.parametrize("enum", [LossType, KLEstimator], ids=lambda e: e.__name__)
def test_enums_agree_with_cpp(enum):
    assert cpp_enum(enum.__name__) == {member.name: member.value for member in enum}


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("Baseline", BASELINES),
        ("Reduction", REDUCTIONS),
        ("NanRollout", NAN_ROLLOUT),
        ("ImportanceMode", IMPORTANCE_MODES),
    ],
)
def test_names_that_travel_by_their_place_agree_with_cpp(name, names):
    assert cpp_enum(name) == {text.upper(): place for place, text in enumerate(names)}


def wire(name, namespace):
    """The names of an unscoped enum of csrc/args.h, in order."""
    body = (ROOT / "csrc/args.h").read_text().split(f"namespace {namespace} {{")[1]
    return [word.lower() for word in re.findall(r"\w+", re.search(rf"enum {name} {{(.*?)}}", body, re.DOTALL)[1])]


@pytest.mark.parametrize(
    ("name", "namespace", "names"),
    [
        ("PerRow", "wire", contract.PerRow._fields),
        ("Number", "wire", SPEC_NUMBERS),
        ("Choice", "wire", SPEC_CHOICES),
        ("Tensor", "fused", contract.FUSED_TENSORS),
        ("Number", "fused", [n for n in contract.FUSED_NUMBERS if n not in SPEC_NUMBERS] + ["spec_numbers"]),
        ("Choice", "fused", [n for n in contract.FUSED_CHOICES if n not in SPEC_CHOICES] + ["spec_choices"]),
    ],
)
def test_lists_travel_in_the_order_of_args_h(name, namespace, names):
    assert wire(name, namespace) == list(names)


@pytest.mark.parametrize("policy_class", [None, "lookahead:3"])
@pytest.mark.parametrize("normalizer", [None, 2.5, torch.tensor(3.5)])
def test_what_is_packed_is_unpacked(policy_class, normalizer):
    names = iter(range(100))
    columns = contract.Columns(*(torch.tensor(next(names)) for _ in contract.Columns._fields))
    turns = contract.Turns(*(torch.tensor(next(names)) for _ in range(5)), 3, 2, 0.9, "group_std", 1e-3)
    reduction = contract.Reduction("sequence_sum", normalizer, 4, torch.tensor(next(names)))
    spec = PolicyLossSpec("ppo", 0.1, 0.3, 2.0, 0.05, "k1", 0.02, 1.5, 0.7, 9.0, "one")
    given = contract.FusedArguments(columns, turns if policy_class else None, reduction, spec, True)
    assert contract.FusedArguments.unpack(*given.pack()) == given
    rows = contract.RowArguments(torch.tensor(1), contract.PerRow(*map(torch.tensor, range(7))), spec)
    assert contract.RowArguments.unpack(*rows.pack()) == rows
    assert all(contract.Chunks.unpack(c.pack()) == c for c in (contract.Chunks(3, None), contract.Chunks(3, 7)))


def test_a_teacher_is_unpacked_as_it_was_packed():
    teacher = contract.TeacherRows(*map(torch.tensor, range(6)), 0.3, 7.0, 5)
    tensors, numbers, top_k = teacher.pack()
    assert contract.TeacherRows.unpack(tensors, numbers, top_k) == teacher


@pytest.mark.parametrize("source", ["cpu/distillation.cpp", "cuda/distillation.cu"])
def test_the_least_log_prob_is_one_number(source):
    assert f"LEAST_LOGPROB = {LEAST_LOGPROB / 1e4:g}e4f;" in (ROOT / "csrc" / source).read_text()


def test_no_operator_takes_more_than_ten_arguments():
    ours = [getattr(ops, name) for name in ops.__all__ if name.endswith("_op")]
    schemas = [op._opoverload._schema for op in ours]
    native = backends.load("cpu")._lib
    schemas += [getattr(native, name).default._schema for name in (*backends.CONTRACT, "fused_policy_loss")]
    assert len(schemas) >= 11
    assert [s.name for s in schemas if len(s.arguments) > 10] == []


def test_a_number_of_the_spec_stands_in_no_mirror():
    """The bound of log ratios and the width of sapo, which travel as numbers."""
    for home in ("csrc/policy_term.h", "kernels/triton/policy_term.py", "ppg_fast/reference/policy_term.py"):
        assert re.findall(r"\b(?:20|1\.05)(?:\.0?)?f?\b", (ROOT / home).read_text()) == [], home
