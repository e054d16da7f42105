"""The axolotl plugin against stubs of what it calls and imports, on the real TRL."""

import importlib
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

pytest.importorskip("trl", reason="trl is not installed")
from axolotl_case import stub_axolotl
from datasets import Dataset
from host_case import found_is
from trl import GRPOConfig
from trl_case import ScriptedRollouts, make_model, make_tokenizer

import ppg_fast as ppg
from ppg_fast.integrations.trl import PPGTrainer


def by_name(path):
    module, name = path.rsplit(".", 1)
    return getattr(importlib.import_module(module), name)


def test_the_axolotl_plugin_trains_as_axolotl_would_call_it(tmp_path, monkeypatch):
    """The steps of axolotl 0.19's builder: keys, training arguments of a class of its own, callbacks, a trainer class
    without a model."""
    rollouts = ScriptedRollouts(3)
    host_trainer = stub_axolotl(monkeypatch, rollouts)
    plugin = by_name("ppg_fast.integrations.axolotl.PPGPlugin")()
    keys = by_name(plugin.get_input_args())(ppg={"policy_class": "greedy", "baseline": "none"})
    cfg = SimpleNamespace(rl="grpo", ppg=keys.ppg)
    mixin = by_name(plugin.get_training_args_mixin())

    class Mixins(mixin):  # as axolotl merges them: a plain class, not a dataclass
        pass

    @dataclass
    class AxolotlGRPOConfig(Mixins, GRPOConfig):
        context_parallel_size: int | None = None

    small = {
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
    }
    args = AxolotlGRPOConfig(
        str(tmp_path), save_strategy="no", disable_tqdm=True, **small, **plugin.get_training_args(cfg)
    )
    trainer_class = plugin.get_trainer_cls(cfg)
    data = Dataset.from_dict({"prompt": ["w1 w2 w3", "w5"] * 4})
    options = {"args": args, "train_dataset": data, "processing_class": make_tokenizer()}
    trainer = trainer_class(callbacks=plugin.add_callbacks_pre_trainer(cfg=cfg, model=make_model()), **options)
    trainer.train()
    assert issubclass(trainer_class, PPGTrainer)
    assert issubclass(trainer_class, host_trainer)
    assert trainer.policy_class == ppg.Greedy()
    assert [list(row) for row in trainer._logs["advantages"]] == rollouts.given[0]["turn_rewards"]


def test_the_axolotl_plugin_leaves_the_rest_alone(monkeypatch):
    stub_axolotl(monkeypatch, None)
    plugin = by_name("ppg_fast.integrations.axolotl.PPGPlugin")()
    other = SimpleNamespace(rl="dpo", ppg=None)
    assert plugin.get_trainer_cls(other) is None
    assert plugin.get_training_args(other) == {}
    with pytest.raises(ValueError, match=r"ppg must hold only policy_class, gamma, .* got \['lookahead_k'\]"):
        plugin.get_training_args(SimpleNamespace(rl="grpo", ppg={"lookahead_k": 2}))
    with pytest.raises(RuntimeError, match="no model was seen"):
        plugin.get_trainer_cls(SimpleNamespace(rl="grpo", ppg=None))()


def test_the_axolotl_plugin_fails_loudly(monkeypatch):
    """By no ImportError, which axolotl swallows."""
    monkeypatch.delitem(sys.modules, "ppg_fast.integrations.axolotl", raising=False)
    monkeypatch.setitem(sys.modules, "axolotl", None)
    with pytest.raises(RuntimeError, match=r"needs axolotl >= 0.18, found none: pip install 'axolotl>=0.18'"):
        importlib.import_module("ppg_fast.integrations.axolotl")
    stub_axolotl(monkeypatch, None)
    found_is(monkeypatch, "1.9.0")
    with pytest.raises(RuntimeError, match=r"needs trl >= 1.16, found 1.9.0: pip install"):
        importlib.import_module("ppg_fast.integrations.axolotl")


REFUSED = {
    "trl.use_data_producer": True, "trl.async_prefetch": True, "trl.streaming_partial_batch": True,
    "trl.vllm_lora_sync": True, "trl.prefetch_depth": 2, "trl.vllm_sync_interval": 2, "trl.streaming_min_groups": 2,
    "trl.replay_buffer_size": 64, "trl.reroll_start_fraction": 0.5, "trl.reward_num_workers": 4,
    "context_parallel_size": 2, "batch_flattening": True,
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_axolotls_options_that_we_cannot_honour_are_refused(monkeypatch, name):
    stub_axolotl(monkeypatch, None)
    plugin = by_name("ppg_fast.integrations.axolotl.PPGPlugin")()
    outer, _, inner = name.rpartition(".")
    value = REFUSED[name]
    given = {outer: {inner: value}} if outer else {inner: value}
    cfg = SimpleNamespace(**{"rl": "grpo", "ppg": None, "trl": None, **given})
    with pytest.raises(ValueError, match=rf"^{name} of axolotl must be .*, got {value}$"):
        plugin.get_training_args(cfg)
    cfg.rl = "dpo"
    assert plugin.get_training_args(cfg) == {}


def test_every_row_that_refuses_has_a_case(monkeypatch):
    stub_axolotl(monkeypatch, None)
    rows = by_name("ppg_fast.integrations.axolotl.OPTIONS")
    assert {name for option in rows if option.allows for name in option.names.split()} == set(REFUSED)


def test_axolotls_defaults_are_accepted(monkeypatch):
    stub_axolotl(monkeypatch, None)
    plugin = by_name("ppg_fast.integrations.axolotl.PPGPlugin")()
    trl = {"use_data_producer": False, "async_prefetch": False, "prefetch_depth": None, "replay_buffer_size": 0,
           "reroll_start_fraction": 1.0, "reward_num_workers": 1, "skip_zero_advantage_batches": True}  # fmt: skip
    cfg = SimpleNamespace(rl="grpo", ppg={"gamma": 0.5}, trl=trl, context_parallel_size=1, batch_flattening=None)
    assert plugin.get_training_args(cfg) == {"gamma": 0.5}
