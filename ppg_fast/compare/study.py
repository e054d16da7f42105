"""What a comparison computes: which runs, and with which settings."""

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ppg_fast.compare.results import MEASUREMENT, Run
from ppg_fast.policy_classes import CANDIDATES, Lookahead, names_in, policy_class
from ppg_fast.rollouts.problems import DRAWN, PROBLEMS, drawn, problem_names
from ppg_fast.spec import require, require_one_of

BY = " by "  # a class and the loss that trains with it, where that is not the policy gradient
REINFORCE, SOFT_Q = LOSS_TYPES = ("reinforce", "soft_q")
AUTO, IMITATION = "auto", "imitation"  # in place of a policy class: chosen while training; every turn counts 1
CLASSES = ",".join(str(c) for c in CANDIDATES if c != Lookahead(6)) + f",{AUTO}"  # six: half of a problem or more
LOG_CLASSES = f"greedy,lookahead:3,segment:4,full,{IMITATION}"
VERSIONS = ("tabular", "language")


@dataclass(frozen=True)
class Study:
    """What decides the result of a run beside its own name; calling it computes one. Picklable."""

    folder: str
    classes: tuple[str, ...]
    max_steps: int | None = None
    batches: int = 24
    data: str | None = None
    decompose: str | None = None
    strict: bool = False
    max_dialogue_tokens: int = 1024
    loss_types: tuple[str, ...] = (REINFORCE,)
    beta: float = 0.1
    offline: int = 0
    noise: float = 1.0

    def __call__(self, run: Run) -> dict[str, Any]:
        return {"tabular": self._tabular, "language": self._language, "logged": self._logged}[run.version](run)

    def _tabular(self, run: Run) -> dict[str, Any]:
        from ppg_fast.compare import tabular_runs

        if run.policy_class == MEASUREMENT:
            return {"gradient": tabular_runs.measure(run.problem, self.fixed, self.noise)}
        candidates = tuple(policy_class(c) for c in self.fixed)
        steps = self.max_steps or tabular_runs.STEPS
        chosen, loss_type = class_and_loss(run.policy_class)
        beta = self.beta if loss_type == SOFT_Q else 0.0
        how: dict[str, Any] = {
            "candidates": candidates,
            "max_steps": steps,
            "beta": beta,
            "offline": self.offline,
            "noise": self.noise,
        }
        return tabular_runs.train(run.problem, chosen, run.seed, **how)

    def _language(self, run: Run) -> dict[str, Any]:
        from ppg_fast.compare import language

        config, folder = self._config(language.DEFAULTS, run), Path(self.folder)
        if run.policy_class == MEASUREMENT:
            return {"gradient": language.measure(run.problem, config, folder, self.fixed, self.batches, self.noise)}
        return language.train(run.problem, config, folder, self.offline, self.noise)

    def _logged(self, run: Run) -> dict[str, Any]:
        from ppg_fast.compare import logged

        given = {"data": self.data, "strict": self.strict, "max_dialogue_tokens": self.max_dialogue_tokens}
        log, warned = logged.open_log(self._config({**logged.DEFAULTS, **given}, run), self.decompose)
        if run.policy_class == MEASUREMENT:
            return {"credits": log.credits(self.fixed), "warnings": warned}
        return log.train(None if run.policy_class == IMITATION else policy_class(run.policy_class))

    def _config(self, defaults: dict[str, Any], run: Run) -> Any:
        """Settings of the real trainer for a run."""
        from transformers.utils import logging

        from ppg_fast.config import make_config

        logging.disable_progress_bar()
        chosen, loss_type = class_and_loss(run.policy_class)
        own: dict[str, Any] = {} if chosen in (MEASUREMENT, IMITATION) else {"policy_class": chosen}
        own |= {"loss_type": SOFT_Q, "beta": self.beta} if loss_type == SOFT_Q else {}
        if chosen == AUTO:
            own["candidates"] = ",".join(self.fixed)
        steps = {} if self.max_steps is None else {"max_steps": self.max_steps}
        return make_config(defaults, steps, own, {"seed": run.seed, "device": "cpu"})

    @property
    def fixed(self) -> tuple[str, ...]:
        """The classes whose gradient can be looked at."""
        return tuple(dict.fromkeys([*(c for c in self.classes if c not in (AUTO, IMITATION)), "full"]))

    @property
    def arms(self) -> tuple[str, ...]:
        """What is trained: every class by every loss; the name of a class stands for the policy gradient."""
        return tuple(c if loss == REINFORCE else c + BY + loss for c in self.classes for loss in self.loss_types)

    def settings(self) -> dict[str, Any]:
        """What must be equal for results to stand side by side. Candidates of auto count, other classes and losses
        may join later."""
        own = dataclasses.asdict(self)
        own.pop("folder")
        own["classes"] = sorted(self.fixed) if AUTO in self.classes else []
        own.pop("loss_types")
        problems = repr([*sorted(PROBLEMS.items()), *map(drawn, range(9))])
        own["problems"] = hashlib.sha256(problems.encode()).hexdigest()[:16]
        if self.data:  # by what it holds, wherever it lies
            path = Path(self.data)
            own |= {"data": path.name, "data_digest": hashlib.sha256(path.read_bytes()).hexdigest()[:16]}
        return own

    def runs(self, problems: str, version: str, seeds: range) -> list[Run]:
        """What to compute, seed by seed, so that a comparison cut short has every class of the seeds it got to."""
        if self.data:
            trained = [Run("logged", "", c, s) for s in seeds for c in self.arms]
            return [Run("logged", "", MEASUREMENT, seeds[0]), *trained]
        names = problem_names(problems)
        require_one_of("version", version, (*VERSIONS, "both"))
        exact = version == "tabular" or not any(n.startswith(DRAWN) for n in names)
        require(exact, "drawn problems are not in words, so version must be tabular", version)
        versions = VERSIONS if version == "both" else (version,)
        measured = [Run(v, n, MEASUREMENT, seeds[0]) for v in versions for n in names]
        return measured + [Run(v, n, c, s) for v in versions for s in seeds for n in names for c in self.arms]


def class_and_loss(arm: str) -> tuple[str, str]:
    """The class that an arm of a study trains with, and its loss."""
    chosen, _, loss_type = arm.partition(BY)
    return chosen, loss_type or REINFORCE


def class_names(text: str | None, logged: bool) -> tuple[str, ...]:
    """The classes that ``text`` names, with commas, each once and as it prints; by default those of a comparison.

    ``auto`` is one of them on problems, ``imitation`` on logged dialogues.
    """
    extra = IMITATION if logged else AUTO
    names = names_in(text or (LOG_CLASSES if logged else CLASSES))
    return tuple(dict.fromkeys(name if name == extra else str(policy_class(name)) for name in names))
