"""What an answer is worth: Python functions, reward models, judges and human ratings behind one interface, combined by
weights."""

from ppg_fast.rewards.formula import make_rewards
from ppg_fast.rewards.judge import Judge
from ppg_fast.rewards.python import PythonReward, load_function
from ppg_fast.rewards.ratings import Ratings
from ppg_fast.rewards.reward_model import RewardModel
from ppg_fast.rewards.scoring import SCOPES, Reward, Scorer, Scores, Transcript, score

__all__ = [
    "SCOPES",
    "Judge",
    "PythonReward",
    "Ratings",
    "Reward",
    "RewardModel",
    "Scorer",
    "Scores",
    "Transcript",
    "load_function",
    "make_rewards",
    "score",
]
