"""critic: a training step of the trainer against the group's mean; against the values of its critic, which reads the
hidden states of the same pass, solves its regression and learns from the step; and with `auto`, which reads the scores
of the turns from the same pass and estimates its weights from them."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .problem import Case, relative_error
from .providers import Provider, Providers, gather
from .step import require_transformers

GROUP, TURNS, CONTEXT_TOKENS = 8, 8, 3  # rollouts of an opening, turns of a dialogue, tokens a turn that are read only
TOKENS = 8  # that are the policy's, a turn
PAST = 3  # steps that critic and weights have learned from before
AUTO = "auto"  # a way to credit, beside the baselines


@dataclass
class Steps:
    """A model whose learning rate is 0, the dialogues of a step, and a critic and weights that know others."""

    model: Any
    optimizer: torch.optim.Optimizer
    samples: list[Any]
    critic: Any
    weights: Any


def cases(grid: str, device: str) -> list[Case]:
    """N tokens a step: one with a head of 32,000 whose hidden states are projected, and the interview's model. The
    larger first: by the time of the smaller, in which the head is little, it would seem to take a minute."""
    if grid == "quick":
        return [Case("critic", 1408, 64, 32, device=device)]
    return [Case("critic", 5632, V, D, device=device) for V, D in ((32000, 512), (512, 128))]


def _samples(case: Case, seed: int) -> list[Any]:
    from ppg_fast.dialogues.packing import CONTEXT, Sample

    generator = torch.Generator().manual_seed(seed)
    turn_ids = [t for turn in range(TURNS) for t in (*[CONTEXT] * CONTEXT_TOKENS, *[turn] * TOKENS)]
    found = []
    for i in range(case.N // len(turn_ids)):
        tokens = torch.randint(2, case.V, (len(turn_ids),), generator=generator).tolist()
        rewards = torch.randn(TURNS, generator=generator).tolist()
        found.append(Sample(tokens, turn_ids, rewards, i // GROUP))
    return found


def _objective(way: str, weights: Any) -> Any:
    """``way``: a baseline, or "auto"."""
    from ppg_fast.policy_classes import FullPlanning
    from ppg_fast.training.objective import Objective

    if way == AUTO:
        chosen = weights.policy_class(TURNS)
        return Objective(chosen, signals=True, auto=True, scale=weights.scale)
    return Objective(FullPlanning(), 1.0, way, gae_lambda=0.95 if way == "value" else None)


def make(case: Case, seed: int = 0) -> Steps:
    """Dialogues of random tokens and rewards; critic and weights have learned from PAST steps of them."""
    require_transformers()
    from ppg_fast.models.causal_lm import make_model
    from ppg_fast.training.auto import CreditWeights
    from ppg_fast.training.critic import Critic

    model = make_model(case.V, case.D, seed=seed).to(case.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    problem = Steps(model, optimizer, [], Critic(), CreditWeights())
    for step in range(PAST):
        problem.samples = _samples(case, 1 + seed + step)
        for way in ("value", AUTO):
            _step(problem, case, way)
    problem.samples = _samples(case, seed)
    return problem


def _step(problem: Steps, case: Case, way: str) -> tuple[Tensor, Tensor]:
    """Loss and gradient of the embedding of a step, packing, credit and the optimizer included."""
    from ppg_fast.training.objective import Schedule
    from ppg_fast.training.trainer import update

    schedule = Schedule(1, 0.0, max_tokens=case.N, max_grad_norm=1e9)
    critic, objective = problem.critic if way == "value" else None, _objective(way, problem.weights)
    with torch.enable_grad():
        row = update(problem.model, problem.optimizer, problem.samples, objective, schedule, critic=critic)
    if critic:
        critic.take_in(row["lesson"])
    if way == AUTO:
        problem.weights.observe(row["signals"])
    return torch.tensor(row["loss"]), problem.model.get_input_embeddings().weight.grad.clone()


def participants(case: Case) -> Providers:
    """Ours without either; the same with the critic and with auto, whose time over ours is what they cost."""

    def plain(case: Case) -> Provider:
        """ppg_fast."""
        return Provider("ppg_fast, leave_one_out", lambda p: _step(p, case, "leave_one_out"), "ours", forward_only=True)

    def valued(case: Case) -> Provider:
        """ppg_fast with its critic."""
        return Provider("ppg_fast, value and its critic", lambda p: _step(p, case, "value"), "ours", forward_only=True)

    def weighed(case: Case) -> Provider:
        """ppg_fast with auto."""
        return Provider("ppg_fast, auto", lambda p: _step(p, case, AUTO), "ours", forward_only=True)

    return gather([plain, valued, weighed], case)


def _truth(problem: Steps, way: str) -> Tensor:
    """The loss from plain logits in float64, with advantages by the formula."""
    from ppg_fast.dialogues.packing import pack
    from ppg_fast.models.causal_lm import decoder
    from ppg_fast.training.critic import first_tokens, rewards_before
    from ppg_fast.training.objective import credit, of_values

    model, objective = copy.deepcopy(problem.model).double(), _objective(way, problem.weights)
    batch = pack(problem.samples)
    model.set_attn_implementation("eager")
    ids = batch.tokens.view(len(problem.samples), -1).to(model.device)
    hidden = decoder(model)(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)
    l = (hidden @ model.get_output_embeddings().weight.T).log_softmax(-1).cpu()
    _, advantages = credit(batch, objective, problem.critic.means if way == "value" else ())
    if way == "value":
        at, turns = first_tokens(batch)
        features = problem.critic.features(hidden[at].cpu(), rewards_before(batch).flatten(0, 1)[turns])
        values = problem.critic.foretell(features).view(batch.rewards.shape).float()
        counts = batch.turn_counts
        advantages = advantages + of_values(torch.zeros_like(batch.rewards), values, counts, None, objective)
    active = batch.labels >= 0
    own = l[active].gather(1, batch.labels[active, None])[:, 0]
    weights = advantages[batch.dialogue_ids[active], batch.turn_ids[active]].double()
    return -(own * weights).sum() / len(problem.samples)


@torch.no_grad()
def checker(problem: Steps, case: Case) -> Callable[[Any], dict[str, float]]:
    """The loss of each against float64, in the order of the participants; the gradient is the trainer's, whose tests
    compare it."""
    expected = [_truth(problem, way) for way in ("leave_one_out", "value", AUTO)]
    return lambda result: {"loss": relative_error(result[0], expected.pop(0))}
