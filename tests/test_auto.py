"""Auto: what is estimated from score norms is the truth where its assumptions hold, and the choice follows it and not
the noise."""

import json
from dataclasses import replace

import pytest
import torch

from ppg_fast.compare.tabular import TabularProblem, sampled_signals
from ppg_fast.dialogues.packing import Sample, pack
from ppg_fast.policy_classes import FullPlanning, Greedy, Lookahead, policy_class
from ppg_fast.rollouts.problems import PROBLEMS
from ppg_fast.training.auto import Signals, WindowChooser, context_ids, measure_signals

GROUP, DIALOGUES = 4, 32
CLASSES = (Greedy(), Lookahead(3), policy_class("segment:4"), FullPlanning())


def skewed(tabular, seed=0):
    return torch.randn(tabular.problem.turns, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) / 2


@pytest.mark.parametrize("name", PROBLEMS)
def test_signal_noise_and_bias_are_those_of_the_enumeration(name):
    """With one pair of logits a turn the assumptions hold: the mean over many steps is the exact value, within its
    standard error."""
    of = PROBLEMS[name]
    # or no number of steps that fits a test could tell anything
    quiet = tuple(tuple(x / 4 for x in row) for row in of.noise)
    tabular, generator, steps = TabularProblem(replace(of, noise=quiet)), torch.Generator().manual_seed(1), 100
    logits = skewed(tabular)
    seen = []
    for _ in range(steps):
        actions, rewards = tabular.sample(logits, DIALOGUES, generator)
        seen.append(sampled_signals(logits, CLASSES, actions, rewards, GROUP))
    exact = [tabular.moments(logits, c, GROUP) for c in CLASSES]
    gradients = torch.stack([m.gradient.flatten() for m in exact])
    products = gradients @ gradients.T
    inner = torch.stack([s.inner for s in seen])
    error = inner.std(0) / steps**0.5
    dependence = 1 + (GROUP - 1) / (DIALOGUES - 1) / (GROUP - 1) ** 2  # pairs of one group, diluted by all others
    assert float(((inner.mean(0) - products * dependence).abs() / error).max()) < 4
    assert float(((inner.mean(0) - products * 2).abs() / error).max()) > 4, "the test could not fail"
    noise = torch.stack([s.noise for s in seen]).mean(0) / DIALOGUES
    truth = torch.tensor([m.group_variance for m in exact], dtype=torch.float64) * GROUP / DIALOGUES
    torch.testing.assert_close(noise, truth - products.diagonal() / (GROUP - 1) / DIALOGUES, rtol=0.1, atol=0)
    assert all(s.coverage == 1.0 for s in seen)


def test_pairs_are_the_inner_products_of_the_scores():
    """The sums over blocks against the scores themselves, several tokens an answer and some contexts shared."""
    generator = torch.Generator().manual_seed(0)
    contexts = torch.tensor([7, 7, 7, 3, 3, 9, 7])
    dialogues = torch.tensor([0, 0, 1, 1, 2, 2, 3])
    table = {c: torch.randn(5, dtype=torch.float64, generator=generator).softmax(-1) for c in (3, 7, 9)}
    p = torch.stack([table[int(c)] for c in contexts])
    labels = torch.tensor([0, 4, 0, 2, 2, 1, 3])
    advantages = torch.randn(3, 7, dtype=torch.float64, generator=generator)
    norms = p.square().sum(1) - 2 * p.gather(1, labels[:, None])[:, 0] + 1
    found = measure_signals(contexts, dialogues, labels, norms, advantages, 4)
    score = torch.nn.functional.one_hot(labels, 5) - p
    torch.testing.assert_close(norms, score.square().sum(1))
    by_dialogue = torch.zeros(4, 3, 10, 5, dtype=torch.float64)  # dialogue, class, context, word
    for i in range(7):
        by_dialogue[dialogues[i], :, contexts[i]] += advantages[:, i, None] * score[i]
    flat = by_dialogue.flatten(2)
    products = torch.einsum("acx,bdx->abcd", flat, flat)
    own = products.diagonal(dim1=0, dim2=1).sum(-1)
    torch.testing.assert_close(found.inner, (products.sum((0, 1)) - own) / 12)
    torch.testing.assert_close(found.square, own.diagonal() / 4)
    assert found.coverage == pytest.approx(6 / 7)


def test_shared_parameters_hide_signal():
    """The documented failure: where all turns share one pair of logits, gradients add up over turns and noise mostly
    does not, so the true ratio of signal to noise is several times what is estimated from contexts that are taken to
    share nothing."""
    tabular = TabularProblem(PROBLEMS["immediate"])
    logits = tabular.start()
    apart = tabular.moments(logits, "greedy", GROUP)
    p, scores = tabular.probabilities(logits), tabular.scores(logits)
    single = torch.einsum("ptd,pt->pd", scores, tabular.rewards)  # d of the pair that all turns share
    shared = p @ single
    judge = float(tabular.factor[0].square().sum())  # independent from turn to turn
    noise = p @ single.square().sum(1) + judge * p @ scores.square().sum((1, 2)) - shared.square().sum()
    estimated = apart.gradient.square().sum() / apart.variance
    assert float(shared.square().sum() / noise / estimated) > 5


def test_contexts_are_the_partner_s_words_and_the_answer_so_far():
    one = Sample([5, 6, 1, 2, 5, 6, 1, 3], [-1, -1, 0, 0, -1, -1, 1, 1], [0.0, 0.0], 0)  # the same message twice
    other = Sample([9, 6, 1, 2], [-1, -1, 0, 0], [0.0], 0)
    batch = pack([one, other])
    ids = context_ids(batch).tolist()
    assert ids[1] == ids[5]  # first token after [5, 6]
    assert ids[2] == ids[6]  # second one after [5, 6, 1]
    assert ids[1] != ids[9]  # after [9, 6]
    assert len({*ids}) == len(ids) - 3  # [5], [5, 6] and [5, 6, 1] stand twice, and nothing else does
    assert context_ids(pack([other, one])).tolist() == ids[8:] + ids[:8]


def fed(numerators, squares, steps, **settings):
    """A chooser between greedy, lookahead:3 and full that saw ``steps`` steps: <G_S, G_full> with noise, and E|g|^2."""
    chooser = WindowChooser([Greedy(), Lookahead(3), FullPlanning()], **settings)
    generator, rows = torch.Generator().manual_seed(0), []
    for _ in range(steps):
        inner = torch.zeros(3, 3, dtype=torch.float64)
        inner[:, 2] = inner[2] = torch.tensor(numerators).double() + 0.1 * torch.randn(
            3, dtype=torch.float64, generator=generator
        )
        rows.append(chooser.observe(Signals(inner, torch.tensor(squares).double(), 16, 1.0)))
    return chooser, rows


def test_the_chooser_takes_the_least_noise_that_has_no_bias():
    chooser, rows = fed([-0.5, 1.0, 1.0], [4.0, 16.0, 100.0], 12)
    assert chooser.current == Lookahead(3)
    reasons = [r["auto/reason"] for r in rows if "auto/reason" in r]
    assert len(reasons) == 1
    assert reasons[0].startswith("full -> lookahead:3: alignment ")
    assert rows[-1]["policy_class"] == "lookahead:3"
    assert (
        rows[-1]["auto/alignment/greedy"] < 0 < rows[-1]["auto/alignment/full"] < rows[-1]["auto/alignment/lookahead:3"]
    )


def test_the_chooser_does_not_follow_noise():
    """Equal classes: hardly a change in two hundred steps, where a chooser without a margin changes often, and one
    without memory more."""
    settings = ({}, {"margin": 0.0}, {"memory": 1.0})
    changes = [
        sum("auto/reason" in r for r in fed([1.0, 1.0, 1.0], [100.0, 100.0, 100.0], 200, **s)[1]) for s in settings
    ]
    assert changes[0] <= 2 < 10 < changes[1] < 50 < changes[2]


def test_the_chooser_leaves_a_class_that_turns_bad():
    chooser, rows = fed([1.0, 1.0, 1.0], [4.0, 16.0, 100.0], 1)
    assert rows[0]["policy_class"] == "greedy"  # one observation is enough to go on with
    generator = torch.Generator().manual_seed(0)
    seen = []
    for step in range(80):
        inner = torch.zeros(3, 3, dtype=torch.float64)
        greedy = 1.0 if step < 20 else -1.0
        inner[:, 2] = inner[2] = torch.tensor([greedy, 1.0, 1.0]).double() + 0.1 * torch.randn(
            3, dtype=torch.float64, generator=generator
        )
        seen.append(chooser.observe(Signals(inner, torch.tensor([4.0, 16.0, 100.0]).double(), 16, 1.0))["policy_class"])
    assert seen[19] == "greedy"
    assert seen[-1] == "lookahead:3"


def test_a_class_that_credits_nothing_or_improves_nothing_is_not_chosen():
    """Where every estimate is below zero nothing is known, and a class without any return would be the best of them."""
    chooser = WindowChooser([Greedy(), Lookahead(3), FullPlanning()])
    inner = torch.tensor([[0.0, 0.0, 0.0], [0.0, 1.0, -0.5], [0.0, -0.5, -1.0]]).double()
    rows = [chooser.observe(Signals(inner, torch.tensor([0.0, 16.0, 100.0]).double(), 16, 1.0)) for _ in range(20)]
    assert rows[-1]["auto/alignment/greedy"] > max(
        rows[-1]["auto/alignment/lookahead:3"], rows[-1]["auto/alignment/full"]
    )
    assert {r["policy_class"] for r in rows} == {"full"}
    assert chooser.scale == 1.0


def test_steps_are_as_long_as_those_of_full_planning():
    """|g| of the mean over 16 dialogues: sqrt(|G|^2 + (E|g|^2 - |G|^2) / 16), of full over that of the class chosen."""
    chooser = WindowChooser([Greedy(), Lookahead(3), FullPlanning()])
    assert chooser.scale == 1.0
    inner = torch.tensor([[0.25, 0.0, -0.5], [0.0, 1.0, 1.0], [-0.5, 1.0, 1.0]]).double()
    row = chooser.observe(Signals(inner, torch.tensor([4.25, 17.0, 257.0]).double(), 16, 1.0))
    assert chooser.current == Lookahead(3)
    assert row["auto/scale"] == chooser.scale == pytest.approx((17 / 2) ** 0.5)


def test_nothing_is_concluded_without_pairs():
    chooser = WindowChooser()
    signals = Signals(torch.full((7, 7), -5.0).double(), torch.ones(7).double(), 16, 0.1)
    rows = [chooser.observe(signals) for _ in range(30)]
    assert chooser.current == FullPlanning()
    assert rows[-1] == {"policy_class": "full", "auto/coverage": 0.1}


def test_the_state_goes_on_where_it_was():
    whole, _ = fed([1.0, 1.0, 1.0], [4.0, 16.0, 100.0], 9)
    saved = whole.state_dict()
    fresh = WindowChooser([Greedy(), Lookahead(3), FullPlanning()])
    fresh.load_state_dict(saved)
    signals = Signals(torch.ones(3, 3).double(), torch.tensor([4.0, 16.0, 100.0]).double(), 16, 1.0)
    assert json.dumps(whole.observe(signals)) == json.dumps(fresh.observe(signals))
    assert torch.equal(saved["inner"], fresh.inner) is False  # what was saved is not changed by going on
    with pytest.raises(
        ValueError, match=r"candidates it began with, \['greedy', 'lookahead:3', 'full'\], got \['greedy', 'full'\]"
    ):
        WindowChooser([Greedy(), FullPlanning()]).load_state_dict(saved)
    with pytest.raises(ValueError, match="must include full planning"):
        WindowChooser([Greedy()])
