"""Who may import whom: a module sees its own package and every floor below, never its neighbours or what is above."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = [  # ground first; a room is a module or a package
    ["openmp", "rules", "stopping", "writing"],
    ["losses", "policy_classes"],
    ["spec"],
    ["contract"],
    ["reference", "kernels", "native"],
    ["backends"],
    ["ops"],
    ["functional", "distributed", "replies"],
    ["config", "endpoint", "console"],
    ["dialogues"],
    ["models", "rewards"],
    ["rollouts", "training"],
    ["jobs", "integrations"],
    ["compare", "about", "inspection", "rating", "prompt_choice"],
    ["bench"],
    ["cli"],
    ["__main__"],
]
CORE = FLOORS[:7]
FLOOR = {f"ppg_fast.{room}": n for n, rooms in enumerate(FLOORS) for room in rooms}
FILES = {
    p: "ppg_fast." + ".".join(p.relative_to(ROOT / "ppg_fast").with_suffix("").parts)
    for p in (ROOT / "ppg_fast").rglob("*.py")
}
FILES |= {p: f"ppg_fast.kernels.{p.stem}" for p in (ROOT / "kernels/triton").glob("*.py")}
FILES |= {p: "ppg_fast." + ".".join(p.relative_to(ROOT).with_suffix("").parts) for p in (ROOT / "bench").rglob("*.py")}


def room(module: str) -> str | None:
    return next((r for r in FLOOR if module == r or module.startswith(r + ".")), None)


def imported(path: Path) -> Iterator[str]:
    """Every module of ours that the file imports, at its top or inside a function; relative imports stay in the
    package."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", [p for p in FILES if room(FILES[p])], ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path):
    here = room(FILES[path])
    for name in imported(path):
        there = room(name)
        assert there in (None, here) or FLOOR[there] < FLOOR[here], (
            f"{FILES[path]} (floor {FLOOR[here]}) imports {name} (floor {FLOOR[there]})"
        )


def test_every_module_has_a_floor():
    assert [m for m in FILES.values() if room(m) is None and m != "ppg_fast.__init__"] == []


def test_the_core_needs_torch_and_numpy_only():
    """Floors 0 to 4 import nothing else that would have to be installed."""
    allowed = {"torch", "numpy", "triton", "typing_extensions", "ppg_fast"}
    for path, module in FILES.items():
        if room(module) in {f"ppg_fast.{r}" for rooms in CORE for r in rooms}:
            foreign = {name.split(".")[0] for name in imported(path)} - allowed - set(sys.stdlib_module_names)
            assert not foreign, f"{module} imports {foreign}"
