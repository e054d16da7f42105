"""The documents: their code runs, their links lead somewhere, a page is not too long."""

import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
RENDERED = re.compile(r"<!-- bench:\w+ -->.*?<!-- /bench -->", re.DOTALL)
CODE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)


def name(path):
    return str(path.relative_to(ROOT))


def blocks(page, language, section=""):
    """The code of one language in a page, or in one section of it."""
    text = (ROOT / page).read_text()
    text = text.split(f"\n## {section}\n")[1].split("\n## ")[0] if section else text
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


# ---- links and lengths -----------------------------------------------------------------------------------------------
def anchors(path):
    """GitHub's names of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", CODE.sub("", path.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", CODE.sub("", page.read_text())):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "log.md"], ids=name)
def test_named_files_and_modules_exist(page):
    """Paths in backticks, and what the code imports from this package; the log speaks of files that are gone."""
    text = page.read_text()
    paths = re.findall(r"`((?:ppg_fast|kernels|csrc|tests|bench|examples|docs)/[\w./-]+)`", text)
    assert [path for path in paths if not re.search(r"\bX\b|_X\.", path) and not (ROOT / path).exists()] == []
    for module, names in re.findall(r"^from (ppg_fast[\w.]*) import ([\w, ]+)$", text, re.MULTILINE):
        path = ROOT / module.replace(".", "/")
        source = (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text()
        missing = [
            n for n in names.split(", ") if not re.search(rf"\b{n}\b", source) and not (path / f"{n}.py").exists()
        ]
        assert missing == [], module


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_a_page_takes_ten_minutes(page):
    """About 2,000 words beside tables of results. Of the log and of the page of hosts one reads a section."""
    words = len(re.findall(r"\S*\w\S*", RENDERED.sub("", page.read_text())))
    assert page.name in ("log.md", "integrations.md") or words <= 2200


# ---- code ------------------------------------------------------------------------------------------------------------
def test_the_loop_in_python_learns(capsys):
    """The environment and the loop of docs/python_api.md, as they stand."""
    pytest.importorskip("transformers")
    scope = {}
    for block in blocks("docs/python_api.md", "python", "An environment and a training loop"):
        exec(compile(block, "docs/python_api.md", "exec"), scope)
    rewards = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines()]
    assert len(rewards) == 60
    assert sum(rewards[-10:]) > sum(rewards[:10]) + 2


def test_the_loop_of_several_ranks_runs_as_one(capsys):
    pytest.importorskip("transformers")
    (block,) = blocks("docs/python_api.md", "python", "Several ranks")
    exec(compile(block, "docs/python_api.md", "exec"), {})
    steps = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [step for step, _ in steps] == ["1", "2"]
    assert any(float(loss) for _, loss in steps)


@pytest.mark.parametrize("side", ["-", "+"])
def test_both_sides_of_the_diff_in_the_readme_train(side, tmp_path, monkeypatch):
    """What a TRL user has, and what it becomes: the same arguments, three lines changed, turns weighted each by its own
    advantage."""
    pytest.importorskip("trl", reason="trl is not installed")
    import trl
    from datasets import Dataset
    from trl_case import ScriptedRollouts, make_model, make_tokenizer, token_reward

    from ppg_fast.integrations import trl as trl_integration

    (block,) = blocks("README.md", "diff")
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
