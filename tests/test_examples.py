"""Every example runs as it stands, and what it trains gets better."""

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
    assert [path.stem for path in EXAMPLES] == ["accelerate_loop", "lightning_module", "plain_pytorch"]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_examples_are_short(path):
    assert len(path.read_text().splitlines()) <= 60
