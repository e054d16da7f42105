"""Dialogues few enough to enumerate: their probabilities, their scores, and gradients of expected rewards by finite
differences.

Rewards are multiples of 1/8, so that returns are exact in float32; all else is float64.
"""

import itertools

import torch

import ppg_fast as ppg

EPS = 1e-5  # of the central differences; their error is about 1e-10
FINITE_DIFFERENCE = {"atol": 1e-8, "rtol": 1e-7}
FEATURES = 5


class Tree:
    """Every dialogue of ``turns`` turns with ``tokens`` binary tokens each and one of ``replies`` random replies, as
    (B, T, ...) arrays.

    log pi(a_t | h_t) is the sum of its tokens' log-probs, each from features of (history, tokens so far); parameters
    are shared by all.
    Rewards depend on the whole history. ``ragged``: some dialogues end early.
    """

    def __init__(self, turns, tokens=1, replies=1, ragged=False, seed=0):
        self.turns, self.tokens = turns, tokens
        self.random = torch.Generator().manual_seed(seed)
        self._features, paths = [], []
        self._grow((), replies, ragged, 1.0, paths)
        self.features = torch.stack(self._features)  # (rows, 2, FEATURES)
        pad = (torch.zeros(tokens, dtype=torch.int64), torch.zeros(tokens, dtype=torch.int64), 0.0)
        columns = [list(zip(*[*path, *[pad] * (turns - len(path))], strict=True)) for path, _ in paths]
        self.rows = torch.stack([torch.stack(c[0]) for c in columns])  # (B, T, tokens)
        self.chosen = torch.stack([torch.stack(c[1]) for c in columns])  # (B, T, tokens)
        self.rewards = torch.tensor([c[2] for c in columns])  # (B, T) float32
        self.counts = torch.tensor([len(path) for path, _ in paths])
        self.there = torch.arange(turns) < self.counts[:, None]
        self.reply_probability = torch.tensor([p for _, p in paths], dtype=torch.float64)
        self.theta = self._normal(FEATURES) / 2

    def _normal(self, *shape):
        return torch.randn(*shape, dtype=torch.float64, generator=self.random)

    def _grow(self, path, replies, ragged, probability, paths):
        rows = {}
        for length in range(self.tokens):
            for prefix in itertools.product((0, 1), repeat=length):
                rows[prefix] = len(self._features)
                self._features.append(self._normal(2, FEATURES))
        for action in itertools.product((0, 1), repeat=self.tokens):
            reward = float(torch.randint(-16, 17, (), generator=self.random)) / 8
            step = torch.tensor([rows[action[:n]] for n in range(self.tokens)]), torch.tensor(action), reward
            odds = torch.rand(replies, dtype=torch.float64, generator=self.random) + 0.1
            for share in (odds / odds.sum()).tolist():
                grown = (*path, step)
                over = len(grown) == self.turns or (ragged and float(torch.rand((), generator=self.random)) < 0.4)
                if over:
                    paths.append((grown, probability * share))
                else:
                    self._grow(grown, replies, ragged, probability * share, paths)

    def token_logits(self, theta):
        return self.features @ theta  # (rows, 2)

    def turn_logprobs(self, theta):
        """log pi(a_t | h_t), (B, T) float64, 0 where there is no turn."""
        each = self.token_logits(theta).log_softmax(-1)[self.rows, self.chosen]
        return torch.where(self.there, each.sum(-1), 0.0)

    def scores(self, theta):
        """grad log pi(a_t | h_t), (B, T, FEATURES), in closed form."""
        mean = (self.token_logits(theta).softmax(-1)[..., None] * self.features).sum(1)
        each = self.features[self.rows, self.chosen] - mean[self.rows]
        return torch.where(self.there[..., None], each.sum(2), 0.0)

    def probabilities(self, theta):
        return self.reply_probability * self.turn_logprobs(theta).sum(1).exp()

    def expected_gradient(self, advantages):
        """E[sum_t grad log pi(a_t | h_t) A_t] at theta_0, advantages (B, T)."""
        per_dialogue = (self.scores(self.theta) * advantages.double()[..., None]).sum(1)
        return self.probabilities(self.theta) @ per_dialogue

    def expected_reward(self, theta, turn, acts_by_theta):
        """E[r_turn | the turns of ``acts_by_theta`` (T,) bool act by theta, all others by theta_0]."""
        logprobs = torch.where(acts_by_theta, self.turn_logprobs(theta), self.turn_logprobs(self.theta)).sum(1)
        return (self.reply_probability * logprobs.exp() * self.rewards[:, turn].double()).sum()

    def gradient(self, function):
        """Central differences of function(theta) at theta_0."""
        steps = torch.eye(FEATURES, dtype=torch.float64) * EPS
        return torch.stack([function(self.theta + step) - function(self.theta - step) for step in steps]) / (2 * EPS)

    def surrogate_gradient(self, credited):
        """Gradient of J_S = sum_k E[r_k | turns in T_k act by theta, all others by theta_0], T_k = column k of
        ``credited`` (T, T)."""
        return self.gradient(
            lambda theta: sum(self.expected_reward(theta, k, credited[:, k]) for k in range(self.turns))
        )

    def true_gradient(self):
        everyone = torch.ones(self.turns, dtype=torch.bool)
        return self.gradient(lambda theta: sum(self.expected_reward(theta, k, everyone) for k in range(self.turns)))

    def returns(self, policy_class, gamma=1.0):
        return ppg.partial_returns(self.rewards, policy_class, gamma, self.counts)


class Groups:
    """Every group of ``size`` independent dialogues of a tree, with its probability."""

    def __init__(self, tree, size):
        self.tree, self.size = tree, size
        members = torch.arange(len(tree.counts))
        self.members = torch.cartesian_prod(*[members] * size).view(-1, size)  # (M, size)
        self.probability = tree.probabilities(tree.theta)[self.members].prod(1)
        self.ids = torch.arange(len(self.members)).repeat_interleave(size)
        self.counts = tree.counts[self.members.flatten()]

    def advantages(self, returns, baseline):
        return ppg.turn_advantages(returns[self.members.flatten()], self.ids, baseline, self.counts)

    def expected_gradient(self, advantages):
        """E over groups of the mean over members; advantages (M size, T)."""
        advantages = advantages.double().view(len(self.members), self.size, -1)
        scores = self.tree.scores(self.tree.theta)
        return (
            sum(
                torch.einsum("m,mt,mtd->d", self.probability, advantages[:, g], scores[self.members[:, g]])
                for g in range(self.size)
            )
            / self.size
        )
