"""What training steps change, as one state that a checkpoint holds and a resumed run takes over whole."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ppg_fast.dialogues.packing import Sample
from ppg_fast.models.adaptation import StartingWeights, load_trainable_state, trainable_state
from ppg_fast.spec import VALUE, require
from ppg_fast.training.auto import CreditWeights
from ppg_fast.training.critic import Critic
from ppg_fast.training.experience import Experience
from ppg_fast.training.objective import Objective, Schedule
from ppg_fast.training.optimisers import load_optimizer_state, make_optimizer


class NotFinite(FloatingPointError):
    """Too many steps in a row had a loss or gradient that is not finite. ``batches``: (step, its dialogues) of each of
    them."""

    def __init__(self, message: str, batches: list[tuple[int, Sequence[Sample]]]) -> None:
        super().__init__(message)
        self.batches = batches


class SkippedSteps:
    """Steps whose loss or gradient was not finite: how many so far, and the last ones in a row with their dialogues."""

    def __init__(self) -> None:
        self.total = 0
        self.in_a_row: list[tuple[int, Sequence[Sample]]] = []

    def observe(self, step: int, samples: Sequence[Sample], loss: float, grad_norm: float, limit: int) -> None:
        """Take in a step. NotFinite for more than ``limit`` in a row."""
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.in_a_row = []
            return
        self.total += 1
        self.in_a_row.append((step, samples))
        if len(self.in_a_row) > limit:
            rule = "loss and gradient must be finite (the weights are those before these steps)"
            seen = f"loss {loss} and gradient norm {grad_norm} at step {step}"
            raise NotFinite(f"{rule}, got {seen}, the last of {len(self.in_a_row)} in a row", self.in_a_row)

    def require_some_taken(self, steps: int) -> None:
        """NotFinite where all of ``steps`` were skipped: nothing was learned."""
        if self.total and self.total >= steps:
            rule = "loss and gradient must be finite in some step, or nothing is learned"
            raise NotFinite(f"{rule}; got none in {steps} steps (are the rewards too large?)", self.in_a_row)

    def state_dict(self) -> dict[str, Any]:
        """Both, in plain types."""
        return {"total": self.total, "in_a_row": [(step, [asdict(s) for s in batch]) for step, batch in self.in_a_row]}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.total = saved["total"]
        self.in_a_row = [(step, [Sample(**sample) for sample in batch]) for step, batch in saved["in_a_row"]]


@dataclass
class TrainingState:
    """What steps change, but for the sources of randomness. ``reference``: the weights at the start, where a KL term,
    a regression or soft Q-learning wants them.

    ``credit_weights``: what has been seen of which turns move which rewards, where the objective has signals.
    ``experience``: what soft Q-learning remembers of earlier steps. ``critic``: with baseline "value". A field is saved
    and loaded by its own ``state_dict`` and ``load_state_dict`` where it has them, as a plain value where not.
    """

    model: Any
    optimizer: Any
    reference: StartingWeights | None = None
    step: int = 0
    num_tokens: int = 0
    skipped: SkippedSteps = field(default_factory=SkippedSteps)
    credit_weights: CreditWeights | None = None
    experience: Experience | None = None
    critic: Critic | None = None

    @classmethod
    def start(cls, model: Any, objective: Objective, schedule: Schedule) -> "TrainingState":
        """Before the first step; where ranks share ``model``, it is sharded already."""
        optimizer = make_optimizer(
            model,
            schedule.optim,
            arguments=schedule.optim_args,
            betas=(schedule.adam_beta1, schedule.adam_beta2),
            weight_decay=schedule.weight_decay,
            offload=schedule.optim_offload,
        )
        compared = objective.spec.kl_coef or objective.from_start or objective.soft_q
        return cls(
            model,
            optimizer,
            reference=StartingWeights(model) if compared else None,
            credit_weights=CreditWeights(objective.auto) if objective.signals else None,
            experience=Experience(objective.replay, objective.gamma) if objective.soft_q_of_rewards else None,
            critic=Critic() if objective.baseline == VALUE else None,
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything that training changes, as `torch.save` likes it: frozen weights are not in it."""
        parts: dict[str, Any] = {**vars(self), "model": None}
        saved = {name: part.state_dict() if hasattr(part, "state_dict") else part for name, part in parts.items()}
        return saved | {"model": trainable_state(self.model)}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Take over what `state_dict` gave. ValueError where it is of other weights, or has a part that this state does
        not have."""
        own = vars(self)
        saved = {name: part for name, part in saved.items() if name in own or part is not None}  # of an older version
        saved = {
            **dict.fromkeys(name for name, part in own.items() if part is None),
            **saved,
        }  # of a version without it
        require(saved.keys() == own.keys(), f"a training state must have {sorted(own)}", sorted(saved))
        for name, part in own.items():
            began = "without" if saved[name] is None else "with"
            rule = f"training that began {began} a {name} must go on {began} one"
            require((part is None) == (saved[name] is None), rule, type(part).__name__)
        for name, value in saved.items():
            if name == "model":
                load_trainable_state(self.model, value)
            elif name == "optimizer":
                load_optimizer_state(self.optimizer, value)
            elif hasattr(own[name], "load_state_dict"):
                own[name].load_state_dict(value)
            else:
                setattr(self, name, value)
