"""Logged dialogues: what each class credits at each turn, and held-out scores of a small model trained with it."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ppg_fast.config import TrainConfig
from ppg_fast.dialogues.packing import pack
from ppg_fast.functional import partial_returns
from ppg_fast.jobs.offline import OfflineJob
from ppg_fast.policy_classes import PolicyClass, policy_class
from ppg_fast.rewards.decomposition import DECOMPOSITIONS
from ppg_fast.training.evaluation import turn_logprobs
from ppg_fast.training.objective import Objective, require_nonnegative
from ppg_fast.training.trainer import optimise

DEFAULTS: dict[str, Any] = {"width": 64, "layers": 1, "threads": 1, "max_steps": 60, "learning_rate": 2e-3}
SHOWN = 60  # turns in the table of credits


class Log:
    """The dialogues of ``config.data`` as the offline job splits them, with rewards decomposed where that is asked
    for."""

    def __init__(self, config: TrainConfig, decompose: str | None = None) -> None:
        self.job = OfflineJob(config)
        if decompose:
            self.job.samples = [replace(s, rewards=list(s.rewards)) for s in self.job.samples]
            batch = pack(self.job.samples)
            rewards = DECOMPOSITIONS[decompose](batch.rewards, batch.turn_counts)
            for sample, row in zip(self.job.samples, rewards, strict=True):
                sample.rewards[:] = row[: len(sample.rewards)].tolist()
            if not config.allow_negative_rewards:
                require_nonnegative(self.job.samples, [d.id for d in self.job.dialogues])

    def credits(self, classes: tuple[str, ...]) -> dict[str, Any]:
        """By class: mean windowed return of each turn over the dialogues that reach it, share of turns with any, and
        effective share.

        The effective share of turns with weights w is (sum w)^2 / (n sum w^2): 1 where all count alike, 1/n where one
        counts only.
        """
        batch = pack(self.job.samples)
        mask = batch.turn_mask
        out: dict[str, Any] = {
            "dialogues": len(self.job.samples),
            "turns": int(mask.sum()),
            "reward": float(batch.rewards[mask].mean()),
        }
        out["classes"] = {}
        for name in classes:
            returns = partial_returns(batch.rewards, policy_class(name), turn_counts=batch.turn_counts).double()
            w = returns[mask]
            effective = float(w.sum() ** 2 / (len(w) * w.square().sum()).clamp(min=1e-12))
            by_turn = [float(returns[mask[:, t], t].mean()) for t in range(min(SHOWN, returns.shape[1]))]
            out["classes"][name] = {
                "credited": float((w != 0).double().mean()),
                "effective": effective,
                "by_turn": by_turn,
            }
        return out

    def train(self, chosen: PolicyClass | None) -> dict[str, Any]:
        """Train with one class, None to imitate; scores on the dialogues kept apart at the start, on the way and at
        the end."""
        job, config = self.job, self.job.config
        objective = replace(job.objective, policy_class=chosen) if chosen else Objective(imitate=True)
        steps, scores = [0], [self.scores()]
        for row in optimise(job.policy.model, job.collect, objective, job.policy.schedule()):
            if row["step"] % config.eval_every == 0 or row["step"] == config.max_steps:
                steps.append(row["step"])
                scores.append(self.scores())
        return {
            "steps": steps,
            "scores": {key: [s[key] for s in scores] for key in scores[0]},
            "held_out": len(job.held_out),
        }

    def scores(self) -> dict[str, float]:
        """Of the dialogues kept apart, in nats a token: log-likelihood of their answers, each weighted by

        ``per_turn`` its own reward, ``per_dialogue`` the mean reward of its dialogue, ``plain`` 1; ``contrast``: that
        of paid answers minus that of unpaid ones, what the model learned of the rewards at all.
        """
        job = self.job
        batch = pack([job.samples[i] for i in (job.held_out or job.seen)])
        logprobs, tokens = turn_logprobs(job.policy.module, batch, job.config.max_tokens)
        own, paid = batch.rewards.double(), (batch.rewards > 0) & (tokens > 0)
        unpaid = (tokens > 0) & ~paid

        def average(weight: torch.Tensor) -> float:
            return float((weight * logprobs).sum() / (weight * tokens).sum().clamp(min=1e-12))

        both = bool(paid.any() and unpaid.any())
        return {
            "per_turn": average(own),
            "per_dialogue": average((own.sum(1) / batch.turn_counts)[:, None]),
            "plain": average(torch.ones_like(own)),
            "contrast": average(paid.double()) - average(unpaid.double()) if both else 0.0,
        }


def open_log(config: TrainConfig, decompose: str | None) -> tuple[Log, list[str]]:
    """The log, and what reading it had to say: warnings go into the report."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        log = Log(config, decompose)
    path = Path(str(config.data))
    return log, [str(w.message).replace(str(path), path.name) for w in caught if "ppg_fast" in w.filename]
