"""A problem with a tabular policy, one pair of logits a turn: every expectation by enumeration of all answers, in
float64.

Rewards are a function of the answers plus noise of known covariance, and all moments below are at most quadratic in the
rewards, so the noise enters through its covariance, exactly, whatever its sources are.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ppg_fast.functional import partial_returns, soft_q_loss_from_logprobs, turn_advantages
from ppg_fast.policy_classes import PolicyClass
from ppg_fast.policy_classes import policy_class as named_policy_class
from ppg_fast.rollouts.problems import Problem
from ppg_fast.spec import SoftQSpec
from ppg_fast.training.auto import StepSignals

HONEST = 0  # index of the action


@dataclass(frozen=True)
class Moments:
    """Exact moments of a class's gradient estimator at a policy. ``gradient`` (T, 2) is its expectation, the gradient
    of J_S.

    ``variance``: trace of the covariance of one dialogue's estimate without baseline. ``group_variance``: of the mean
        over a group with
    the leave-one-out baseline. ``bias``: distance of ``gradient`` from that of the true value, ``cosine`` the cosine
    between them.
    """

    gradient: Tensor
    variance: float
    group_variance: float
    bias: float
    cosine: float

    def describe(self) -> dict[str, float]:
        """All but the gradient itself, of which the norm."""
        norm = float(self.gradient.norm())
        return {
            "gradient_norm": norm,
            "variance": self.variance,
            "group_variance": self.group_variance,
            "bias": self.bias,
            "cosine": self.cosine,
            "signal_to_noise": norm**2 / max(self.group_variance, 1e-300),
        }


class TabularProblem:
    """Every course that the answers can take, as (P, T) arrays: P = 2^T. ``shared``: the dialogues of a group have the
    same noise, as those have whose partner is drawn by one seed; the leave-one-out baseline takes it out."""

    def __init__(self, of: Problem, shared: bool = False) -> None:
        self.problem, self.shared, turns = of, shared, of.turns
        self.actions = torch.tensor(list(itertools.product((0, 1), repeat=turns)))  # (P, T)
        honest = (self.actions == HONEST).double()
        self.rewards = honest @ torch.tensor(of.honest_pays, dtype=torch.float64)
        self.rewards += (1 - honest) * torch.tensor(of.tempting_pays, dtype=torch.float64)
        self.rewards[:, -1] += of.finale * honest.mean(1) ** 2
        self.factor = torch.tensor(of.noise, dtype=torch.float64)  # noise = factor @ standard normals

    def start(self) -> Tensor:
        """Logits (T, 2) of the policy that tosses a coin."""
        return torch.zeros(self.problem.turns, 2, dtype=torch.float64)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Of every course, (P,)."""
        chosen = logits.log_softmax(-1).expand(len(self.actions), -1, -1).gather(-1, self.actions[..., None])
        return chosen[..., 0].sum(1).exp()

    def value(self, logits: Tensor) -> Tensor:
        """The expected return at logits (..., T, 2), which noise adds nothing to: turns answer independently, so the
        finale's E[mean^2] is (sum p)^2 + sum p (1 - p) over T^2."""
        p, of = logits.softmax(-1)[..., HONEST], self.problem
        honest, tempting = (torch.tensor(pays, dtype=torch.float64) for pays in (of.honest_pays, of.tempting_pays))
        finale = of.finale / of.turns**2 * (p.sum(-1) ** 2 + (p * (1 - p)).sum(-1))
        return (p * honest.sum(1) + (1 - p) * tempting).sum(-1) + finale

    def scores(self, logits: Tensor) -> Tensor:
        """grad log pi(a_t), (P, T, 2): row t of the logits' gradient; turn t moves no other row."""
        return torch.nn.functional.one_hot(self.actions, 2).double() - logits.softmax(-1)

    def window(self, policy_class: PolicyClass | str) -> Tensor:
        """Which rewards each turn is credited for, (T, T) of 0 and 1: column k is the return of a single reward at turn
        k."""
        return partial_returns(torch.eye(self.problem.turns), policy_class).double().T

    def gradient(self, logits: Tensor, policy_class: PolicyClass | str) -> Tensor:
        """E[sum_t grad log pi(a_t) R_t], (T, 2): the gradient of J_S at ``logits``."""
        returns = self.rewards @ self.window(policy_class).T
        return torch.einsum("p,ptd,pt->td", self.probabilities(logits), self.scores(logits), returns)

    def soft_optimum(
        self, window: Tensor, beta: float, actions: Tensor | None = None, rewards: Tensor | None = None
    ) -> Tensor:
        """Logits (T, 2) that soft Q-learning ends at with the coin as reference: Q / beta, Q_t(a) the mean of the
        ``window`` (T, T) of rewards where turn t is answered by a. Of all courses, or of dialogues (count, T). Exact
        where what turns earn adds up (no finale): the others' answers then do not matter."""
        returns = (self.rewards if rewards is None else rewards) @ window.T
        taken = torch.nn.functional.one_hot(self.actions if actions is None else actions, 2).double()
        return torch.einsum("pt,pta->ta", returns, taken) / taken.sum(0) / beta

    def moments(self, logits: Tensor, policy_class: PolicyClass | str, group_size: int) -> Moments:
        """Everything about a class's estimator at ``logits``.

        With the leave-one-out baseline the mean over a group is, turn by turn, the sample covariance of score and
        return: a U-statistic of the kernel h(i, j) = (s_i - s_j)(R_i - R_j) / 2, so its variance is
        (4 (G - 2) zeta_1 + 2 zeta_2) / (G (G - 1)),    zeta_1 = Var E[h | i],    zeta_2 = Var h          (Hoeffding,
        1948)
        """
        p, s, window = self.probabilities(logits), self.scores(logits), self.window(policy_class)
        returns, noise = self.rewards @ window.T, (window @ self.factor).square().sum(1)  # its variance, turn by turn
        norm = s.square().sum(-1)  # (P, T); scores of different turns are orthogonal
        mean = p @ returns
        gradient = torch.einsum("p,ptd,pt->td", p, s, returns)
        signal = gradient.square().sum()
        cross = (s * returns[..., None]).flatten(1)
        variance = p @ cross.square().sum(1) + (p @ norm @ noise) - signal
        if self.shared and group_size > 1:
            noise = torch.zeros_like(noise)
        centred = (s * (returns - mean)[..., None]).flatten(1)
        zeta_1 = (p @ centred.square().sum(1) + p @ norm @ noise - signal) / 4
        square, second = p @ returns.square() + noise, p @ (norm * (returns.square() + noise))
        zeta_2 = (
            2 * (second + (p @ norm) * square - 2 * (p @ (norm * returns)) * mean) + 4 * gradient.square().sum(1)
        ).sum() / 4 - signal
        G = group_size
        group = (4 * (G - 2) * zeta_1 + 2 * zeta_2) / (G * (G - 1)) if G > 1 else variance
        truth = self.gradient(logits, "full")
        cosine = float((gradient * truth).sum() / (gradient.norm() * truth.norm()).clamp(min=1e-300))
        return Moments(gradient, float(variance), float(group), float((gradient - truth).norm()), cosine)

    def sample(
        self, logits: Tensor, count: int, generator: torch.Generator, group_size: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Actions (count, T) and rewards (count, T) with noise, of dialogues of the policy."""
        turns, sources = self.factor.shape
        tossed = torch.rand(count, turns, dtype=torch.float64, generator=generator)
        actions, alike = (tossed >= logits.softmax(-1)[:, HONEST]).long(), group_size if self.shared else 1
        noise = torch.randn(count // alike, sources, dtype=torch.float64, generator=generator) @ self.factor.T
        return actions, self.rewards[self.courses(actions)] + noise.repeat_interleave(alike, 0)

    def courses(self, actions: Tensor) -> Tensor:
        """The place of each row of ``actions`` (..., T) among all courses."""
        return actions @ (2 ** torch.arange(self.problem.turns - 1, -1, -1))


def estimate(
    logits: Tensor,
    policy_class: PolicyClass | str,
    actions: Tensor,
    rewards: Tensor,
    group_size: int,
    gamma: float = 1.0,
) -> Tensor:
    """The estimator itself: the mean over sampled dialogues with the leave-one-out baseline, (S, T, 2) for S policies
    with ``count`` dialogues each, (S, count, T)."""
    returns = partial_returns(rewards.flatten(0, 1), named_policy_class(policy_class), gamma)
    groups = torch.arange(len(returns)) // group_size
    advantages = turn_advantages(returns, groups, "leave_one_out" if group_size > 1 else "none")
    return ascent(logits, actions, advantages.view(rewards.shape))


def ascent(logits: Tensor, actions: Tensor, advantages: Tensor) -> Tensor:
    """The mean over dialogues of grad log pi(a_t) A_t: (S, T, 2) from (S, T, 2), (S, count, T) and the same."""
    scores = torch.nn.functional.one_hot(actions, 2).double() - logits.softmax(-1)[:, None]
    return (scores * advantages[..., None]).mean(1)


def soft_q_gradient(
    logits: Tensor,
    reference: Tensor,
    policy_class: PolicyClass,
    actions: Tensor,
    rewards: Tensor,
    beta: float,
    offsets: Sequence[float],
) -> Tensor:
    """The gradient of the soft Q loss of sampled dialogues, (T, 2): a turn is one token, and its state the turn."""
    count, turns = actions.shape
    z = logits.detach().requires_grad_()
    chosen = [x.log_softmax(-1).expand(count, -1, -1).gather(-1, actions[..., None])[..., 0] for x in (z, reference)]
    lse = [x.logsumexp(-1).expand(count, -1) for x in (z, reference)]
    out = soft_q_loss_from_logprobs(
        chosen[0], lse[0], rewards, torch.arange(turns).expand(count, -1), policy_class, spec=SoftQSpec(beta=beta),
        ref_logprobs=chosen[1].float(), ref_lse=lse[1].float(), offsets=torch.tensor(offsets),
    )  # fmt: skip
    return torch.autograd.grad(out.loss, z)[0]


def sampled_signals(logits: Tensor, actions: Tensor, rewards: Tensor, group_size: int) -> StepSignals:
    """What `ppg_fast.training.auto` sees of sampled dialogues, actions and rewards (count, T), of a policy's logits
    (T, 2)."""
    count, turns = actions.shape
    own = torch.nn.functional.one_hot(actions, 2).double() - logits.softmax(-1)
    scores = torch.einsum("ita,tu->itua", own, torch.eye(turns, dtype=torch.float64)).flatten(2)
    groups = torch.arange(count) // group_size
    return StepSignals(scores, turn_advantages(rewards, groups).double(), coverage=1.0)
