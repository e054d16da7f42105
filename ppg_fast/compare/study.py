"""What a comparison computes: which runs, and with which settings."""

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ppg_fast.compare.results import MEASUREMENT, Run
from ppg_fast.compare.verdict_noise import with_noise_like
from ppg_fast.policy_classes import names_in, policy_class
from ppg_fast.rollouts.problems import PROBLEMS, REVIEWED, Problem, drawn, problem, problem_names
from ppg_fast.spec import require, require_number, require_one_of

BY = " by "  # a class and the loss that trains with it, where that is not the policy gradient
REINFORCE, SOFT_Q = LOSS_TYPES = ("reinforce", "soft_q")
AUTO, IMITATION = "auto", "imitation"  # in place of a policy class: found while training; every turn counts 1
CLASSES = f"greedy,lookahead:2,lookahead:3,lookahead:4,segment:4,full,{AUTO}"
LOG_CLASSES = f"greedy,lookahead:3,segment:4,full,{IMITATION}"
VERSIONS = ("tabular", "language")
# arms that are no policy class: the setting that a number behind a colon stands for, and what else it takes
RIVALS: dict[str, tuple[str, dict[str, Any]]] = {
    "discount": ("gamma", {}),
    "gae": ("gae_lambda", {"baseline": "value"}),
}
TOGETHER = 100  # seeds of a tabular policy that are trained at once
TUNING = 2**40  # the first of the seeds that learning rates are chosen by


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
    shared_noise: bool = False
    tune: int = 0
    noise_of: tuple[float, ...] = ()  # covariances of verdicts by lag, in place of the problem's own

    def __call__(self, part: Sequence[Run]) -> list[dict[str, Any]]:
        """The results of runs that differ by their seed alone."""
        first = part[0]
        if first.version == "tabular" and first.policy_class != MEASUREMENT:
            return self._tabular(first, [run.seed for run in part])
        one = {"tabular": self._moments, "language": self._language, "logged": self._logged}[first.version]
        return [one(run) for run in part]

    def _moments(self, run: Run) -> dict[str, Any]:
        from ppg_fast.compare import tabular, tabular_runs

        exact = tabular.TabularProblem(self._problem(run), self.shared_noise)
        return {"gradient": tabular_runs.measure(exact, self.fixed)}

    def _tabular(self, run: Run, seeds: list[int]) -> list[dict[str, Any]]:
        from ppg_fast.compare import tabular, tabular_runs

        exact = tabular.TabularProblem(self._problem(run), self.shared_noise)
        how: dict[str, Any] = {"max_steps": self.max_steps or tabular_runs.STEPS, "offline": self.offline}

        def learner(count: int) -> Any:
            chosen, loss_type = class_and_loss(run.policy_class)
            if chosen == AUTO:
                return tabular_runs.Auto(count)
            if loss_type == SOFT_Q:
                return tabular_runs.SoftQ(policy_class(chosen), self.beta, exact.start(), count)
            given = settings_of(chosen)
            if "gae_lambda" in given:
                return tabular_runs.Gae(given["gae_lambda"], exact.problem.turns, count)
            group = tabular_runs.COUNT if self.offline else tabular_runs.GROUP  # all of one policy: one group
            return tabular_runs.PolicyGradient(policy_class(given["policy_class"]), given.get("gamma", 1.0), group)

        if self.tune:
            how["learning_rate"] = tabular_runs.tuned(exact, learner, range(TUNING, TUNING + self.tune), **how)
        found = tabular_runs.train(exact, learner(len(seeds)), seeds, **how)
        if self.tune:
            found = [{**result, "learning_rate": how["learning_rate"]} for result in found]
        chosen, loss_type = class_and_loss(run.policy_class)
        if loss_type == SOFT_Q and self.offline and not exact.problem.finale:
            ends = [tabular_runs.soft_optima(exact, policy_class(chosen), self.beta, self.offline, s) for s in seeds]
            found = [{**result, **end} for result, end in zip(found, ends, strict=True)]
        return found

    def _language(self, run: Run) -> dict[str, Any]:
        from ppg_fast.compare import language

        config, folder = self._config(language.DEFAULTS, run), Path(self.folder)
        if run.policy_class == MEASUREMENT:
            return {"gradient": language.measure(self._in_words(run), config, folder, self.fixed, self.batches)}
        return language.train(self._in_words(run), config, folder, self.offline)

    def _in_words(self, run: Run) -> Any:
        from ppg_fast.compare.language import ProblemInWords

        return ProblemInWords(self._problem(run), self.shared_noise)

    def _problem(self, run: Run) -> Problem:
        """With the noise of this study."""
        of = problem(run.problem)
        return (with_noise_like(of, self.noise_of) if self.noise_of else of).with_noise(self.noise)

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
        own = {} if chosen in (MEASUREMENT, IMITATION) else settings_of(chosen)
        own |= {"loss_type": SOFT_Q, "beta": self.beta} if loss_type == SOFT_Q else {}
        steps = {} if self.max_steps is None else {"max_steps": self.max_steps}
        return make_config(defaults, steps, own, {"seed": run.seed, "device": "cpu"})

    @property
    def fixed(self) -> tuple[str, ...]:
        """The classes whose gradient can be looked at."""
        return tuple(dict.fromkeys([*(c for c in self.classes if is_class(c)), "full"]))

    @property
    def arms(self) -> tuple[str, ...]:
        """What is trained: every class by every loss; the name of a class stands for the policy gradient."""
        return tuple(c if loss == REINFORCE else c + BY + loss for c in self.classes for loss in self.loss_types)

    def settings(self) -> dict[str, Any]:
        """What must be equal for results to stand side by side; classes and losses may join later."""
        own = dataclasses.asdict(self)
        for name in ("folder", "classes", "loss_types"):
            own.pop(name)
        problems = repr([*sorted((PROBLEMS | REVIEWED).items()), *map(drawn, range(9))])
        own["problems"] = hashlib.sha256(problems.encode()).hexdigest()[:16]
        if self.data:  # by what it holds, wherever it lies
            path = Path(self.data)
            own |= {"data": path.name, "data_digest": hashlib.sha256(path.read_bytes()).hexdigest()[:16]}
        return own

    def parts(self, problems: str, version: str, seeds: range) -> list[list[Run]]:
        """What to compute: runs that are computed together, in such an order that a comparison cut short has every
        class of the seeds it got to."""
        if self.data:
            trained = [[Run("logged", "", c, s)] for s in seeds for c in self.arms]
            return [[Run("logged", "", MEASUREMENT, seeds[0])], *trained]
        names = problem_names(problems)
        require_one_of("version", version, (*VERSIONS, "both"))
        versions = VERSIONS if version == "both" else (version,)
        found = [[Run(v, n, MEASUREMENT, seeds[0])] for v in versions for n in names]
        for v in versions:
            size = TOGETHER if v == "tabular" else 1
            some = [seeds[i : i + size] for i in range(0, len(seeds), size)]
            found += [[Run(v, n, c, s) for s in part] for part in some for n in names for c in self.arms]
        return found


def settings_of(arm: str) -> dict[str, Any]:
    """What the trainer is told for an arm of a study: a policy class, or full planning with gamma G, `discount:G`, or
    with a critic and generalised advantages of lambda L, `gae:L`."""
    kind, _, number = arm.partition(":")
    if kind not in RIVALS:
        return {"policy_class": arm}
    name, settings = RIVALS[kind]
    require(number.replace(".", "", 1).isdigit(), f"{kind} needs its {name} behind a colon, a number", arm)
    return {"policy_class": "full", **settings, name: require_number(name, float(number), 0.0, 1.0)}


def is_class(arm: str) -> bool:
    """Whether an arm is a policy class alone, whose gradient can be looked at."""
    return arm not in (AUTO, IMITATION) and settings_of(arm).keys() == {"policy_class"}


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
    return tuple(dict.fromkeys(str(policy_class(n)) if n != extra and len(settings_of(n)) == 1 else n for n in names))
