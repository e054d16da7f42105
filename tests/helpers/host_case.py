"""Stand-ins of hosts as modules, and one batch whose credit and loss every adapter has to reproduce."""

import re
import sys
from importlib import metadata
from types import ModuleType, SimpleNamespace

import torch

import ppg_fast as ppg
from ppg_fast.integrations import host, turns


def put(monkeypatch, name, **attributes):
    """Puts a module with these attributes, and its parents, where an import finds it."""
    for end in [m.start() for m in re.finditer(r"\.", name)] + [len(name)]:
        if name[:end] not in sys.modules:
            monkeypatch.setitem(sys.modules, name[:end], ModuleType(name[:end]))
    vars(sys.modules[name]).update(attributes)


def found_is(monkeypatch, version):
    """Every host has this version, or none, for modules of ours that are imported from now on."""

    def found(name):
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(metadata, "version", found)
    monkeypatch.setattr(host, "_satisfied", set())
    for name in [name for name in sys.modules if re.match(r"ppg_fast\.integrations\.(trl|verl|transformers)\b", name)]:
        monkeypatch.delitem(sys.modules, name)


def credited(rewards, counts, groups, **options):
    """What every adapter has to reproduce, from the public functions."""
    returns = ppg.partial_returns(rewards, options.get("policy_class", "full"), options.get("gamma", 1.0), counts)
    return ppg.turn_advantages(returns, groups, options.get("baseline", "leave_one_out"), counts)


# three dialogues of one prompt and one of another: turns of 2, 3, 1 and 2 in rows of 9 tokens
MASK = torch.tensor(
    [[0, 1, 1, 0, 0, 1, 1, 1, 0], [1, 0, 1, 1, 0, 1, 0, 0, 0], [0, 0, 1, 1, 1, 0, 0, 0, 0], [1, 1, 0, 1, 1, 1, 1, 0, 0]]
)
COUNTS, GROUPS = torch.tensor([2, 3, 1, 2]), torch.tensor([0, 0, 0, 1])
TURN_REWARDS = [[0.5, 2.0], [1.0, None, -1.0], [0.25], [3.0, 0.125]]
REWARDS = torch.tensor([[0.5, 2.0, 0], [1.0, 0, -1.0], [0.25, 0, 0], [3.0, 0.125, 0]])
OPTIONS = {"policy_class": "lookahead:2", "gamma": 0.75, "baseline": "group_mean"}


def expected_credit():
    return turns.spread(credited(REWARDS, COUNTS, GROUPS, **OPTIONS), turns.turn_ids_of_mask(MASK))


def a_batch():
    """Log-probs of tokens (own alignment) from logits of the tokens before, as every trainer computes them."""
    torch.manual_seed(11)
    B, S, V = 4, 9, 23
    logits, tokens = torch.randn(B, S, V, requires_grad=True), torch.randint(V, (B, S))
    mask = MASK.clone()
    mask[:, 0] = 0  # nothing predicts the first token
    near = ppg.token_logprobs(logits[:, :-1], tokens[:, 1:]).detach()
    around = {
        name: torch.nn.functional.pad(near + 0.8 * torch.rand(B, S - 1) - 0.4, (1, 0))
        for name in ("old", "ref", "rollout")
    }
    return SimpleNamespace(logits=logits, tokens=tokens, mask=mask, advantages=torch.randn(B, S), **around)


def truth(batch, spec, reduction="token_mean", normalizer=None, rows=slice(None)):
    """Loss and gradient from the logits of rows of the batch."""
    cut = {name: getattr(batch, name)[rows, 1:] for name in ("mask", "old", "ref", "rollout", "advantages", "tokens")}
    options = {
        "old_logprobs": cut["old"],
        "ref_logprobs": cut["ref"],
        "rollout_logprobs": cut["rollout"],
        "loss_mask": cut["mask"],
    }
    options["turn_ids"] = turns.turn_ids_of_mask(batch.mask)[rows, 1:]
    loss = ppg.policy_loss(
        batch.logits[rows, :-1],
        cut["tokens"],
        cut["advantages"],
        spec=spec,
        reduction=reduction,
        normalizer=normalizer,
        **options,
    ).loss
    return loss.detach(), torch.autograd.grad(loss, batch.logits)[0]


def own_logprobs(batch):
    """(B, S) with a garbage first column, differentiable in the logits."""
    return torch.nn.functional.pad(
        ppg.token_logprobs(batch.logits[:, :-1], batch.tokens[:, 1:]), (1, 0), value=torch.nan
    )


def same(loss, batch, expected):
    torch.testing.assert_close(loss.detach(), expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(loss, batch.logits)[0], expected[1], rtol=1e-4, atol=1e-6)
