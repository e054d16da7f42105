"""Every chat template that TRL's package carries, in thirteen dialogues: exact or refused, as an oracle on transformers
alone finds it; the table in docs/data.md says the same."""

from pathlib import Path

import pytest

pytest.importorskip("transformers")

from ppg_fast.bench import result_file
from template_table import NAMES, row

STORED = Path(__file__).parents[1] / result_file.FOLDER
COMMAND = "python tests/helpers/template_table.py; ppg-fast bench --render"


@pytest.fixture(scope="module")
def stored():
    return result_file.load(STORED)["chat_templates.cpu"]["chat_templates"]


@pytest.mark.skipif(not NAMES, reason="TRL's package carries the templates")
def test_the_table_has_every_template(stored):
    assert list(stored) == NAMES, f"the table of docs/data.md is stale: {COMMAND}"


@pytest.mark.parametrize("name", NAMES)
def test_each_dialogue_is_exact_or_refused(name, stored):
    cells = row(name)
    assert {shape: problem for shape, (_, problem) in cells.items() if problem} == {}
    assert stored[name] == {shape: outcome for shape, (outcome, _) in cells.items()}, f"stale: {COMMAND}"
