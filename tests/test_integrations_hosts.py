"""Hosts that are missing, too old or broken, and the bookkeeping of turns that their adapters share."""

import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from host_case import found_is, put

from ppg_fast.integrations import host, turns

ROOT = Path(__file__).parents[1]
MODULES = ["prime_rl", "skyrl", "slime", "nemo_rl"]


def run(code, *paths):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (*paths, ROOT)))}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, env=environment)


# ---- absent, old, broken ---------------------------------------------------------------------------------------------
def test_nothing_of_a_host_is_imported():
    hosts = "verl|prime_rl|skyrl|slime|nemo_rl|ray|megatron"
    done = run(
        f"import sys, ppg_fast\nfrom ppg_fast.integrations import {', '.join(MODULES)}, turns\n"
        f"import re; print([m for m in sys.modules if re.fullmatch({hosts!r}, m)])"
    )
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


@pytest.mark.parametrize(
    ("call", "needed"),
    [
        (lambda: import_module("ppg_fast.integrations.prime_rl").credit_group([]), "prime-rl >= 0.8"),
        (lambda: import_module("ppg_fast.integrations.skyrl").register(), "skyrl >= 0.3"),
        (lambda: import_module("ppg_fast.integrations.slime").ppg_advantages(None, {}), "slime >= 0.3.1"),
        (lambda: import_module("ppg_fast.integrations.nemo_rl").PPGLossFn(), "nemo-rl >= 0.6"),
    ],
    ids=MODULES,
)
def test_a_missing_host_is_one_line(call, needed):
    with pytest.raises(
        ImportError, match=f" needs {re.escape(needed)}, found none: (pip install|a clone of) "
    ) as error:
        call()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("metadata_version", "attribute", "minimum", "old"),
    [
        ("1.15.3", None, "1.16", "1.15.3"),
        ("1.16.0", None, "1.16", None),
        ("0.10.0.dev0", None, "0.9", None),
        ("0.3", None, "0.3.1", "0.3"),
        ("2.0+local.7", "0.1", "1.0", None),  # metadata first
        (None, "0.8.1", "0.9", "0.8.1"),  # a folder on the path
        (None, "0.9", "0.9", None),
        (None, None, "0.9", None),  # unknown: taken as it is
    ],
)
def test_the_version_is_the_installed_one(monkeypatch, metadata_version, attribute, minimum, old):
    found_is(monkeypatch, metadata_version)
    put(monkeypatch, "a_host.deep.inside", tool=3)
    if attribute:
        monkeypatch.setattr(sys.modules["a_host"], "__version__", attribute, raising=False)
    for _ in range(2):  # the second time from what the first one found
        if old:
            line = rf"^ppg_fast.integrations.a_host needs a-host >= {minimum}, found {old}: pip install "
            with pytest.raises(ImportError, match=f"{line}'a-host>={minimum}'$"):
                host.require_host("a-host", minimum, "a_host.deep.inside")
        else:
            assert host.require_host("a-host", minimum, "a_host.deep.inside").tool == 3
            assert host.require_host("a-host", minimum) is sys.modules["a_host"]


def test_a_host_without_a_module_is_told_apart_from_a_broken_one(monkeypatch, tmp_path):
    found_is(monkeypatch, "2.0")
    (tmp_path / "half_host").mkdir()
    (tmp_path / "half_host/__init__.py").touch()
    (tmp_path / "half_host/broken.py").write_text("import nothing_of_that_name")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=r"needs half-host >= 1.0, found 2.0 without 'half_host.later': pip install"):
        host.require_host("half-host", "1.0", "half_host.later")
    with pytest.raises(ModuleNotFoundError, match=r"^No module named 'nothing_of_that_name'$"):
        host.require_host("half-host", "1.0", "half_host.broken")


PLUGIN = (
    "__version__ = {version!r}\ntry:\n    import ppg_fast.integrations.verl\nexcept Exception:\n    "
    "pass\nprint('verl lives')\n"
)


def fake_verl(folder, version):
    (folder / "verl").mkdir()
    (folder / "verl/__init__.py").write_text(PLUGIN.format(version=version))
    return run("import verl", folder)


def test_verl_that_is_too_old_is_told_so_although_it_hides_errors(tmp_path):
    done = fake_verl(tmp_path, "0.8.1")
    assert done.stdout.strip() == "verl lives"
    assert done.stderr.splitlines() == [
        "ppg_fast: nothing of it is registered with verl: ppg_fast.integrations.verl needs verl >= 0.9, found 0.8.1: "
        "pip install 'verl>=0.9'"
    ]


def test_verl_that_lacks_a_hook_is_told_so_although_it_hides_errors(tmp_path):
    done = fake_verl(tmp_path, "0.10.0.dev0")
    assert done.stdout.strip() == "verl lives"
    assert re.fullmatch("ppg_fast: nothing of it is registered with verl: .*'verl.trainer'.*", done.stderr.strip())


def test_verl_finds_the_plugin():
    project = (ROOT / "pyproject.toml").read_text()
    assert '[project.entry-points."verl.plugins"]\nppg_fast = "ppg_fast.integrations.verl"\n' in project
    assert (ROOT / "ppg_fast/integrations/verl/__init__.py").is_file()


# ---- turns -----------------------------------------------------------------------------------------------------------
def test_turns_and_rewards_of_a_mask():
    mask = torch.tensor([[0, 1, 1, 0, 1, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]])
    ids = turns.turn_ids_of_mask(mask)
    assert ids.tolist() == [[-1, 0, 0, -1, 1, -1], [0] * 6, [-1] * 6]
    assert turns.turn_counts(ids).tolist() == [2, 1, 0]
    assert turns.last_tokens(ids).nonzero().tolist() == [[0, 2], [0, 4], [1, 5]]
    # between turns: the turn before; without turns: ignored
    rewards = torch.tensor([[0, 1.0, 2.0, 4.0, 8.0, 16.0], [1.0] * 6, [5.0] * 6])
    assert turns.rewards_of_turns(rewards, ids).tolist() == [[7.0, 24.0], [6.0, 0.0], [0.0, 0.0]]
    with pytest.raises(ValueError, match=r"before the first turn .* got \[\[0, 0\]\]"):
        turns.rewards_of_turns(torch.ones(3, 6), ids)
    with pytest.raises(ValueError, match="shape of the mask"):
        turns.rewards_of_turns(torch.ones(3, 5), ids)
    given = [[0.5, -1.0], [2.0], []]
    assert turns.rewards_of_turns(turns.place_turn_rewards(given, ids), ids).tolist() == [
        [0.5, -1.0],
        [2.0, 0.0],
        [0.0, 0.0],
    ]
    with pytest.raises(ValueError, match="row 1 has 1 turns and needs as many rewards"):
        turns.place_turn_rewards([[0.5, -1.0], [2.0, 1.0], []], ids)
    assert turns.group_numbers(["b", "a", "b"], mask.device).tolist() == [0, 1, 0]
