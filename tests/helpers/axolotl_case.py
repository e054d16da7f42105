"""Stand-ins for the modules of axolotl that its plugin meets."""

from __future__ import annotations

import sys
from types import ModuleType

from trl import GRPOTrainer
from trl_case import token_reward


def stub_axolotl(monkeypatch, rollout_func):
    """The names of axolotl 0.19 that the plugin meets, with their signatures: BasePlugin and GRPOStrategy."""

    class BasePlugin:
        def get_input_args(self): ...
        def get_training_args_mixin(self): ...
        def get_trainer_cls(self, cfg): ...
        def get_training_args(self, cfg): ...
        def add_callbacks_pre_trainer(self, cfg, model): ...

    class AxolotlGRPOTrainer(GRPOTrainer):
        pass

    class GRPOStrategy:
        @classmethod
        def get_trainer_class(cls, sequence_parallel=False, async_grpo=False):
            return AxolotlGRPOTrainer

        @classmethod
        def set_trainer_args(cls, cfg):
            return [[token_reward]]

        @classmethod
        def set_trainer_kwargs(cls, cfg):
            return {"rollout_func": rollout_func}

    contents = {
        "": {},
        ".integrations": {},
        ".integrations.base": {"BasePlugin": BasePlugin},
        ".core": {},
        ".core.trainers": {},
        ".core.trainers.grpo": {"GRPOStrategy": GRPOStrategy},
    }
    for name, content in contents.items():
        module = ModuleType(f"axolotl{name}")
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delitem(sys.modules, "ppg_fast.integrations.axolotl", raising=False)
    return AxolotlGRPOTrainer
