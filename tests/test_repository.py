"""The repository's habits as tests: the README's code runs, tools are pinned alike, public functions are documented,
files stay small."""

import inspect
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import LONGEST, longest_first

import ppg_fast as ppg
from ppg_fast.losses import LOSS_TYPES
from ppg_fast.spec import BASELINES, REDUCTIONS

ROOT = Path(__file__).parents[1]


def python_blocks(document: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)


@pytest.mark.parametrize(
    ("number", "trained"), [(0, ("hidden", "head")), (1, ("model",))], ids=["loss backend", "transformers"]
)
def test_the_readme_runs(number, trained):
    torch.use_deterministic_algorithms(False)  # a reader's torch.empty holds no NaN
    blocks = python_blocks("README.md")
    assert len(blocks) == 2
    if "model" in trained:
        pytest.importorskip("transformers")
    exec(compile(blocks[number], "README.md", "exec"), scope := {})
    for name in trained:
        gradient = scope[name].lm_head.weight.grad if name == "model" else scope[name].grad
        assert gradient.isfinite().all()
        assert gradient.abs().sum() > 0


def test_tools_are_pinned_alike():
    project, hooks = (ROOT / "pyproject.toml").read_text(), (ROOT / ".pre-commit-config.yaml").read_text()
    for tool in ("ruff", "clang-format"):
        versions = set(re.findall(rf"{tool}==([\d.]+)", project + hooks))
        assert len(versions) == 1, (tool, versions)
        assert re.search(rf"{tool}==", hooks), tool


def test_workflows_run_what_there_is():
    """Every `make` target that a workflow or CONTRIBUTING.md names is in the Makefile, and every file in the tree."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    workflows = sorted((ROOT / ".github/workflows").glob("*.yml"))
    assert {path.stem for path in workflows} == {"test", "wheels"}
    text = "".join(path.read_text() for path in workflows)
    assert set(re.findall(r"\bmake ([a-z-]+)", text)) >= {"train", "test", "test-verl"}
    named = re.findall(r"\bmake ([a-z-]+)", text + (ROOT / "CONTRIBUTING.md").read_text())
    assert set(named) - targets == set()
    assert [path for path in re.findall(r"tests/\w+\.py", text) if not (ROOT / path).exists()] == []


WIDTH = 120  # columns of prose


def wide_lines(text):
    """Numbers of the lines of prose that are too wide: not tables, code, generated sections, or a link by itself."""
    found, code, generated = [], False, False
    for number, line in enumerate(text.splitlines(), 1):
        code ^= line.lstrip().startswith("```")
        generated = (generated or line.startswith("<!-- bench:")) and not line.startswith("<!-- /bench")
        apart = code or generated or line.lstrip().startswith("|")
        if len(line) > WIDTH and not apart and not re.fullmatch(r"[\s*-]*!?\[?\S+\]?\(?\S*\)?[.,;:]?", line):
            found.append(number)
    return found


def test_prose_is_not_wide():
    wide, narrow = "word " * 30, "word"
    page = [wide, narrow, "```", wide, "```", f"| {wide} |", "<!-- bench:x -->", wide, "<!-- /bench -->", f"* {wide}"]
    assert wide_lines("\n".join([*page, f"- [{'x' * 60}](https://{'y' * 80})."])) == [1, 10]
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    assert {page.name: lines for page in pages if (lines := wide_lines(page.read_text()))} == {}


@pytest.mark.parametrize("name", [n for n in ppg.__all__ if inspect.isfunction(getattr(ppg, n))])
def test_public_functions_document_every_argument(name):
    function = getattr(ppg, name)
    text = inspect.getdoc(function)
    linked = text + "".join(
        inspect.getdoc(getattr(ppg, other)) for other in re.findall(r"`(\w+)`", text) if other in ppg.__all__
    )
    linked += "".join(
        inspect.getdoc(getattr(ppg, other)) for other in re.findall(r"`(\w+)`", linked) if other in ppg.__all__
    )
    missing = [
        p for p in inspect.signature(function).parameters if p != "options" and not re.search(rf"\b{p}\b", linked)
    ]
    assert missing == []


def test_the_readme_names_every_choice():
    readme = (ROOT / "README.md").read_text()
    assert [name for name in (*LOSS_TYPES, *REDUCTIONS) if f"`{name}`" not in readme] == []
    assert [
        name
        for name in BASELINES
        if name.replace("_", "-") not in readme.replace("group mean", "group-mean").replace("group std", "group-std")
    ] == []


@pytest.mark.parametrize("folder", ["ppg_fast", "kernels", "csrc", "bench"])
def test_files_stay_small(folder):
    sources = (p for p in (ROOT / folder).rglob("*") if p.suffix in {".py", ".cpp", ".cu", ".cuh", ".h"})
    assert {str(p.relative_to(ROOT)): n for p in sources if (n := len(p.read_text().splitlines())) > 300} == {}


def test_the_longest_tests_are_at_the_head_of_each_half():
    assert [name for name in LONGEST if not (ROOT / "tests" / name).exists()] == []
    items = [SimpleNamespace(path=Path(name), n=n) for name in ("test_a.py", *LONGEST, "test_z.py") for n in range(9)]
    found = longest_first(items)
    assert sorted(map(id, found)) == sorted(map(id, items))
    assert [found[start].path.name for start in (0, 9, 18)] == [*LONGEST[:5:2]]
    assert found[len(items) // 2].path.name == LONGEST[1]
