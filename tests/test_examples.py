"""Every example runs as it stands, and what it trains gets better."""

import re
import runpy
from pathlib import Path

import pytest

pytest.importorskip("transformers")

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
HOSTS = {"accelerate_loop": "accelerate", "lightning_module": "lightning"}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_example(path):
    if path.stem in HOSTS:
        pytest.importorskip(HOSTS[path.stem], reason=f"{HOSTS[path.stem]} is not installed")
    history = runpy.run_path(str(path))["main"]()
    quarter = len(history) // 4
    first, last = sum(history[:quarter]) / quarter, sum(history[-quarter:]) / quarter
    assert last > first + 0.1 * abs(first), (first, last)


def test_there_is_an_example_for_each_way():
    assert {"accelerate_loop", "lightning_module", "plain_pytorch"} <= {path.stem for path in EXAMPLES}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_examples_are_short(path):
    assert len(path.read_text().splitlines()) <= 60


def recipes(section):
    """The Python blocks of one section of docs/integrations.md."""
    text = (EXAMPLES[0].parents[1] / "docs/integrations.md").read_text()
    return re.findall(r"```python\n(.*?)```", text.split(f"\n## {section}\n")[1].split("\n## ")[0], re.DOTALL)


@pytest.mark.parametrize("recipe", recipes("transformers"), ids=lambda r: r.splitlines()[1].split()[-1])
def test_the_recipes_run(recipe):
    exec(compile(recipe, "docs/integrations.md", "exec"), scope := {})
    assert scope["model"].lm_head.weight.grad.abs().sum() > 0


def test_the_page_names_every_example():
    page = (EXAMPLES[0].parents[1] / "docs/integrations.md").read_text()
    assert [path.name for path in EXAMPLES if f"(../examples/{path.name})" not in page] == []
