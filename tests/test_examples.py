"""Every example runs as it stands, and what it trains gets better; the documents' code runs, too."""

import functools
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


@pytest.mark.parametrize("side", ["-", "+"])
def test_both_sides_of_the_diff_in_the_readme_train(side, tmp_path, monkeypatch):
    """What a TRL user has, and what it becomes: the same arguments, three lines changed, turns weighted each by its own
    advantage."""
    pytest.importorskip("trl", reason="trl is not installed")
    import trl
    from datasets import Dataset
    from trl_case import ScriptedRollouts, make_model, make_tokenizer, token_reward

    from ppg_fast.integrations import trl as trl_integration

    (block,) = re.findall(r"```diff\n(.*?)```", (EXAMPLES[0].parents[1] / "README.md").read_text(), re.DOTALL)
    lines = block.splitlines()
    assert [line[0] for line in lines if line[:1] in "+-" and line] == ["-", "+"] * 3
    monkeypatch.chdir(tmp_path)
    make_model().save_pretrained("model")
    make_tokenizer().save_pretrained("model")
    small = {"use_cpu": True, "max_steps": 1, "max_completion_length": 48, "report_to": []}
    for module, name in ((trl, "GRPOConfig"), (trl_integration, "PPGConfig")):
        monkeypatch.setattr(module, name, functools.partial(getattr(module, name), **small))
    rollout = ScriptedRollouts(3)
    data = Dataset.from_dict({"prompt": ["w1 w2 w3", "w5"] * 4})
    scope = {"model": "model", "rewards": token_reward, "data": data, "rollout": rollout}
    *setup, train = (line[1:] for line in lines if line[:1] in (" ", side))
    exec(compile("\n".join(setup), "README.md", "exec"), scope)
    trainer = scope["trainer"]
    before = trainer.model.lm_head.weight.detach().clone()
    exec(train, scope)
    assert not trainer.model.lm_head.weight.equal(before)
    logged = trainer._logs["advantages"][0]
    assert isinstance(logged, list if side == "+" else float)
    if side == "+":
        assert len(logged) == len(rollout.given[0]["turn_rewards"][0])
