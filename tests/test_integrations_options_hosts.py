"""Every option of every host has a row in the table of its adapter: of the installed classes where they can be
imported, and of the names read from the sources where they cannot.

Red for a new option: read what it does to the loss, then give it a row."""

import importlib
import importlib.util
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
from host_options import NAMES

ROOT = Path(__file__).parents[1] / "ppg_fast/integrations"
CLASSES = [  # module, class, table, what stands in front of a name there
    ("verl.trainer.config", "AlgoConfig", "verl.ALGORITHM", ""),
    *(("verl.workers.config", f"{name}ActorConfig", "verl.ACTOR", "") for name in ("", "FSDP", "Mcore", "VeOmni")),
    ("verl.workers.config", "PolicyLossConfig", "verl.ACTOR", "policy_loss."),
    ("skyrl.train.config.config", "AlgorithmConfig", "skyrl", ""),
    ("nemo_rl.algorithms.grpo", "GRPOConfig", "nemo_rl", "grpo."),
    ("nemo_rl.algorithms.loss.loss_functions", "ClippedPGLossConfig", "nemo_rl", "loss_fn."),
    ("nemo_rl.algorithms.advantage_estimator", "AdvEstimatorConfig", "nemo_rl", "grpo.adv_estimator."),
    ("prime_rl.configs.trainer", "DefaultLossConfig", "prime_rl", ""),
    ("prime_rl.configs.trainer", "IPOLossConfig", "prime_rl", ""),
    ("prime_rl.configs.algorithm", "GRPOAlgoConfig", "prime_rl", ""),
    ("axolotl.utils.schemas.trl", "TRLConfig", "axolotl", "trl."),
]


def rows_of(table, monkeypatch):
    """The names of a table; verl's and axolotl's without their hosts."""
    if table == "axolotl":
        pytest.importorskip("trl", reason="trl is not installed")
        importlib.import_module("axolotl_case").stub_axolotl(monkeypatch, None)
    if table.startswith("verl"):
        spec = importlib.util.spec_from_file_location("verl_options", ROOT / "verl/options.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        options = getattr(module, table.partition(".")[2])
    else:
        options = importlib.import_module(f"ppg_fast.integrations.{table}").OPTIONS
    return {name for option in options for name in option.names.split()}


def without_a_row(names, prefix, rows):
    """Those of ``names`` that neither have a row nor are a section whose options have."""
    paths = [prefix + name for name in names]
    return [p for p in paths if p not in rows and not any(row.startswith(f"{p}.") for row in rows)]


@pytest.mark.parametrize(("title", "table", "prefix", "names"), NAMES, ids=[row[0] for row in NAMES])
def test_every_option_that_was_read_has_a_row(title, table, prefix, names, monkeypatch):
    assert without_a_row(names.split(), prefix, rows_of(table, monkeypatch)) == [], title


@pytest.mark.parametrize(("module", "name", "table", "prefix"), CLASSES, ids=[f"{m}.{n}" for m, n, *_ in CLASSES])
def test_every_option_of_an_installed_host_has_a_row(module, name, table, prefix, monkeypatch):
    kind = getattr(pytest.importorskip(module, reason=f"{module} is not installed", exc_type=ImportError), name)
    options = [field.name for field in fields(kind)] if is_dataclass(kind) else list(kind.model_fields)
    options = [option for option in options if not option.startswith("_")]
    assert options
    assert without_a_row(options, prefix, rows_of(table, monkeypatch)) == []


def test_an_option_without_a_row_is_found():
    rows = {"a", "b.c"}
    assert without_a_row(["a", "b", "c"], "", rows) == ["c"]
    assert without_a_row(["c", "d"], "b.", rows) == ["b.d"]
