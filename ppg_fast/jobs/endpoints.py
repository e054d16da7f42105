"""The endpoints, the partner and the rewards that a config names."""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch

from ppg_fast.config import TrainConfig
from ppg_fast.dialogues.chat_format import ChatFormat
from ppg_fast.endpoint import Endpoint
from ppg_fast.jobs.log_ratio import LogRatio
from ppg_fast.jobs.refitted_model import RefittedModel
from ppg_fast.rewards import Ratings, Reward, make_rewards
from ppg_fast.rewards.values import read_text
from ppg_fast.rollouts.partner import INSTRUCTION, EndpointPartner, LoggedPartner, ModelPartner, NoPartner, Partner


def make_endpoint(config: TrainConfig, role: str) -> Endpoint:
    """The endpoint of ``role``: partner, judge or sampler."""
    url, model, key = (getattr(config, role + suffix) for suffix in ("", "_model", "_key"))
    return Endpoint(url, model, key, timeout=config.timeout, retries=config.retries, concurrency=config.concurrency)


def rewards_of(
    config: TrainConfig, device: torch.device | str, loaded: dict[str, ModuleType] | None = None
) -> list[Reward]:
    """The config's rewards; with a judge and no formula, the judge. ``loaded``: files that are loaded already.
    ValueError where there is neither."""
    formula = config.reward or ("judge" if config.judge else None)
    if not formula:
        raise ValueError(
            "a reward is needed: --reward file.py:function, model:FOLDER, judge (with --judge URL) or ratings:FILE"
        )
    judge = (lambda: make_endpoint(config, "judge")) if config.judge else None
    settings: dict[str, Any] = {
        "judge_range": config.judge_range,
        "judge_retries": config.judge_retries,
        "judge_tokens": config.judge_tokens,
        "device": device,
        "template_date": config.template_date,
        "loaded": loaded,
        "human": (lambda folder: RefittedModel(folder, config, device)) if config.reward_model else None,
        "of_two_models": lambda kind, models: LogRatio(kind, models, device, config.max_tokens, config.template_date),
    }
    return make_rewards(formula, judge, **settings)


def rewards_of_new_answers(
    config: TrainConfig, device: torch.device | str, loaded: dict[str, ModuleType] | None = None
) -> list[Reward]:
    """The same for answers that nobody has seen: ValueError for ratings, which are of logged ones."""
    rewards = rewards_of(config, device, loaded)
    if any(isinstance(reward.scorer, Ratings) for reward in rewards):
        raise ValueError(
            f"ratings are of logged answers (ppg-fast score, then train --data), not of new ones, got {config.reward!r}"
        )
    return rewards


def refitted(rewards: Sequence[Reward]) -> RefittedModel | None:
    """The one of ``rewards`` that learns from people while it rewards."""
    return next((reward.scorer for reward in rewards if isinstance(reward.scorer, RefittedModel)), None)


def partner_of(config: TrainConfig, model: Any, chat: ChatFormat) -> Partner:
    """The config's partner. ValueError for a name that is none."""
    name = config.partner
    if name in ("logged", "none"):
        return LoggedPartner() if name == "logged" else NoPartner()
    instruction = read_text(config.partner_prompt, "partner_prompt").strip() if config.partner_prompt else INSTRUCTION
    settings: dict[str, Any] = {"temperature": config.partner_temperature, "max_tokens": config.partner_tokens}
    if name == "self":
        return ModelPartner(model, chat, instruction, batch_size=config.rollout_batch, **settings)
    if not name.startswith(("http://", "https://")):
        raise ValueError(f"partner must be logged, none, self or the URL of an endpoint, got {name!r}")
    return EndpointPartner(make_endpoint(config, "partner"), instruction, **settings)
