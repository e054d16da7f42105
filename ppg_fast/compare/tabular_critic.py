"""What a tabular policy's return is expected to be: a ridge regression of each turn on all that came before it."""

import torch
from torch import Tensor

from ppg_fast.training.experience import KEPT

RIDGE = 1.0


class TabularCritic:
    """V_t = w_t . (1, the answers before t, the rewards before t), of past steps only, for S policies side by side.

    A_t = sum over steps of KEPT^age z_t z_t^T, w_t = (A_t + RIDGE)^-1 b_t.
    """

    def __init__(self, policies: int, turns: int) -> None:
        size = 1 + 2 * turns
        before = torch.ones(turns, turns, dtype=torch.float64).tril(-1)
        self.seen = torch.cat([torch.ones(turns, 1, dtype=torch.float64), before, before], 1)  # (T, F) of 0 and 1
        self.ridge = torch.full((size,), RIDGE, dtype=torch.float64).index_fill_(0, torch.tensor(0), 1e-6).diag()
        self.moments = torch.zeros(policies, turns, size, size, dtype=torch.float64)
        self.products = torch.zeros(policies, turns, size, dtype=torch.float64)
        self.weights = torch.zeros(policies, turns, size, dtype=torch.float64)

    def features(self, actions: Tensor, rewards: Tensor) -> Tensor:
        """(S, n, F) of actions and rewards (S, n, T); `seen` says which of them a turn may look at."""
        return torch.cat([torch.ones_like(rewards[..., :1]), actions - 0.5, rewards], -1)

    def values(self, actions: Tensor, rewards: Tensor) -> Tensor:
        """(S, n, T): of each turn before its answer; 0 before the first lesson."""
        return torch.einsum("snf,tf,stf->snt", self.features(actions, rewards), self.seen, self.weights)

    def learn(self, actions: Tensor, rewards: Tensor) -> None:
        """From the returns of a step's dialogues, to their ends."""
        z, returns = self.features(actions, rewards), rewards.flip(-1).cumsum(-1).flip(-1)
        pairs = torch.einsum("snf,sng->sfg", z, z)[:, None] * self.seen[:, :, None] * self.seen[:, None]
        self.moments = KEPT * self.moments + pairs
        self.products = KEPT * self.products + torch.einsum("snf,snt->stf", z, returns) * self.seen
        self.weights = torch.linalg.solve(self.moments + self.ridge, self.products)
