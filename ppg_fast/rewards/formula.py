"""Rewards by name: "0.5*rewards.py:brief + judge:rubric.txt@dialogue"."""

import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ppg_fast.endpoint import Endpoint
from ppg_fast.rewards.judge import RUBRIC, Judge, parse_range
from ppg_fast.rewards.python import PythonReward
from ppg_fast.rewards.ratings import Ratings
from ppg_fast.rewards.reward_model import RewardModel
from ppg_fast.rewards.scoring import Reward, Scorer
from ppg_fast.rewards.values import read_text

INVERSE_SOFT_Q = "inverse_soft_q"
OF_TWO_MODELS = ("logratio", INVERSE_SOFT_Q)
TERM = re.compile(
    r"(?:(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*\*\s*)?(?P<what>.+?)(?:@(?P<scope>turn|dialogue))?"
)


def split_terms(formula: str) -> list[str]:
    """The terms of a formula, as they are written."""
    return [term.strip() for term in re.split(r"\s+\+\s+", formula.strip())]


def make_rewards(
    formula: str,
    judge: Callable[[], Endpoint] | None = None,
    *,
    judge_range: str = "0:10",
    judge_retries: int = 2,
    judge_tokens: int = 512,
    device: torch.device | str = "cpu",
    template_date: str = "",
    loaded: dict[str, ModuleType] | None = None,
    of_two_models: Callable[[str, str], Scorer] | None = None,
    human: Callable[[str], Scorer] | None = None,
) -> list[Reward]:
    """The terms of ``formula``, separated by " + ", each ``[WEIGHT*]WHAT[@turn|@dialogue]``.

    WHAT is ``file.py:function``, ``module:function``, ``model:FOLDER``, ``logratio:MODEL,BASE``,
    ``inverse_soft_q:MODEL,BASE``, ``judge``, ``judge:RUBRIC`` (a text file) or ``ratings:FILE``. The scope is turn but
    for ratings and what is of two models, which give each turn its number; ``of_two_models`` makes the latter's scorer
    of its name and what stands behind the colon, ``human`` that of ``human:FOLDER``. ``judge`` makes the endpoint where
    a term wants one, and it may say ``judge_tokens`` tokens. ``template_date``: what the templates of reward models are
    told. ``loaded``: files that are loaded already. ValueError names the term that cannot be read.
    """
    rewards: list[Reward] = []
    loaded = {} if loaded is None else loaded  # one module for all functions of a file
    low, high = parse_range(judge_range)
    for term in split_terms(formula):
        found = TERM.fullmatch(term)
        if not found:
            raise ValueError(f"a reward must be [WEIGHT*]WHAT[@turn|@dialogue], got {term!r} in {formula!r}")
        what, scope = found["what"], found["scope"] or "turn"
        kind, _, rest = what.partition(":")
        if kind == "judge":
            if judge is None:
                raise ValueError(f"reward {what!r} wants a judge: give --judge URL")
            rubric = read_text(rest, "rubric") if rest else RUBRIC
            settings: dict[str, Any] = {"retries": judge_retries, "max_tokens": judge_tokens}
            name, scorer = kind, Judge(judge(), rubric, scope=scope, low=low, high=high, **settings)
        elif kind == "model":
            name, scorer = Path(rest).name, RewardModel(rest, device, date=template_date)
        elif kind in OF_TWO_MODELS and of_two_models is not None:
            name, scorer, scope = kind, of_two_models(kind, rest), "dialogue"
        elif kind == "human" and human is not None:
            name, scorer = kind, human(rest)
        elif kind == "human":
            raise ValueError(f"people rate what a run says (ppg-fast train), not a file: ratings:FILE, got {what!r}")
        elif kind == "ratings":
            name, scorer, scope = kind, Ratings(rest), "dialogue"
        else:
            name, scorer = what.rpartition(":")[2], PythonReward.at(what, loaded)
        taken = [r.name for r in rewards if re.fullmatch(re.escape(name) + r"(_\d+)?", r.name)]
        name += f"_{len(taken) + 1}" if taken else ""
        rewards.append(Reward(name, scorer, scope, float(found["weight"] or 1.0)))
    return rewards
