"""Rewards by name: "0.5*rewards.py:brief + judge:rubric.txt@dialogue"."""

import re
from collections.abc import Callable
from pathlib import Path

import torch

from ppg_fast.endpoint import Endpoint
from ppg_fast.rewards.judge import RUBRIC, Judge
from ppg_fast.rewards.python import PythonReward, load_function
from ppg_fast.rewards.ratings import Ratings
from ppg_fast.rewards.reward_model import RewardModel
from ppg_fast.rewards.scoring import Reward

TERM = re.compile(
    r"(?:(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*\*\s*)?(?P<what>.+?)(?:@(?P<scope>turn|dialogue))?"
)


def make_rewards(
    formula: str,
    judge: Callable[[], Endpoint] | None = None,
    *,
    judge_range: str = "0:10",
    judge_retries: int = 2,
    device: torch.device | str = "cpu",
) -> list[Reward]:
    """The terms of ``formula``, separated by " + ", each ``[WEIGHT*]WHAT[@turn|@dialogue]``.

    WHAT is ``file.py:function``, ``module:function``, ``model:FOLDER``, ``judge``, ``judge:RUBRIC`` (a text file) or
    ``ratings:FILE``. The scope is turn but for ratings, which say themselves what they rate. ``judge`` makes the
    endpoint where a term wants one. ValueError names the term that cannot be read.
    """
    rewards: list[Reward] = []
    for term in re.split(r"\s+\+\s+", formula.strip()):
        found = TERM.fullmatch(term.strip())
        if not found:
            raise ValueError(f"a reward must be [WEIGHT*]WHAT[@turn|@dialogue], got {term!r} in {formula!r}")
        what, scope = found["what"], found["scope"] or "turn"
        kind, _, rest = what.partition(":")
        if kind == "judge":
            if judge is None:
                raise ValueError(f"reward {what!r} wants a judge: give --judge URL")
            low, high = parse_range(judge_range)
            rubric = Path(rest).read_text(encoding="utf-8") if rest else RUBRIC
            name, scorer = kind, Judge(judge(), rubric, scope=scope, low=low, high=high, retries=judge_retries)
        elif kind == "model":
            name, scorer = Path(rest).name, RewardModel(rest, device)
        elif kind == "ratings":
            name, scorer, scope = kind, Ratings(rest), "dialogue"
        else:
            name, scorer = what.rpartition(":")[2], PythonReward(load_function(what), what)
        taken = [r.name for r in rewards if re.fullmatch(re.escape(name) + r"(_\d+)?", r.name)]
        name += f"_{len(taken) + 1}" if taken else ""
        rewards.append(Reward(name, scorer, scope, float(found["weight"] or 1.0)))
    return rewards


def parse_range(text: str) -> tuple[float, float]:
    """LOW:HIGH as two numbers."""
    try:
        low, high = map(float, text.split(":"))
    except ValueError as error:
        raise ValueError(f"judge_range must be LOW:HIGH, got {text!r}") from error
    return low, high
