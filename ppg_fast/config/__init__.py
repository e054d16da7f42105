"""The configuration of `ppg-fast train`: one frozen dataclass, readable from YAML and from flags."""

from ppg_fast.config.defaults import OFFLINE, PROMPTS, REWARD_SETTINGS, SECTIONS
from ppg_fast.config.sources import add_flags, make_config, read_yaml, write_yaml
from ppg_fast.config.train import AUTO, TRACKERS, TrainConfig

__all__ = [
    "AUTO",
    "OFFLINE",
    "PROMPTS",
    "REWARD_SETTINGS",
    "SECTIONS",
    "TRACKERS",
    "TrainConfig",
    "add_flags",
    "make_config",
    "read_yaml",
    "write_yaml",
]
