"""The configuration of `ppg-fast train`: one frozen dataclass, readable from YAML and from flags."""

from ppg_fast.config.defaults import (
    AUTO,
    OF_HUMAN,
    OF_PROMPTS,
    OF_REWARDS,
    OF_TURNS,
    OFFLINE,
    PROMPTS,
    REWARD_SETTINGS,
    REWARD_TRAINING,
    REWARD_TRAINING_DEFAULTS,
    SECTIONS,
    SOFT_Q,
    TRACKERS,
)
from ppg_fast.config.flags import Parser, add_flags
from ppg_fast.config.sources import DEFAULTS, as_now, make_config, read_yaml, write_yaml
from ppg_fast.config.train import TrainConfig

__all__ = [
    "AUTO",
    "DEFAULTS",
    "OFFLINE",
    "OF_HUMAN",
    "OF_PROMPTS",
    "OF_REWARDS",
    "OF_TURNS",
    "PROMPTS",
    "REWARD_SETTINGS",
    "REWARD_TRAINING",
    "REWARD_TRAINING_DEFAULTS",
    "SECTIONS",
    "SOFT_Q",
    "TRACKERS",
    "Parser",
    "TrainConfig",
    "add_flags",
    "as_now",
    "make_config",
    "read_yaml",
    "write_yaml",
]
