"""Calls of a patched model: labels, per-token arguments and rewards in one alignment, and what is refused."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")

from transformers_case import SPEC, B, L, gradients, make_batch, single_thread, tiny

import ppg_fast as ppg
from ppg_fast.integrations.transformers import patch
from ppg_fast.integrations.transformers.alignment import LabelledTokens

one_thread = pytest.fixture(autouse=True, scope="module")(single_thread)
batch = pytest.fixture(make_batch)


def test_labels_alone_give_log_probs_and_the_loss_of_transformers(batch):
    model, arguments = tiny(), {**batch["inputs"], "labels": batch["labels"]}
    own = model(**arguments, num_items_in_batch=torch.tensor(29))
    logprobs = own.logits[:, :-1].log_softmax(-1)
    taken = batch["labels"][:, 1:].clamp(min=0)
    expected = logprobs.gather(-1, taken[..., None])[..., 0].where(batch["labels"][:, 1:] != -100, 0.0)
    with patch(model):
        out = model(**arguments, num_items_in_batch=torch.tensor(29), entropy=True)
        mean = model(**arguments).loss
    torch.testing.assert_close(out.loss, own.loss)
    torch.testing.assert_close(mean, model(**arguments).loss)
    torch.testing.assert_close(out.logprobs, torch.nn.functional.pad(expected, (1, 0)), rtol=1e-5, atol=1e-5)
    entropy = -(logprobs.exp() * logprobs).sum(-1).where(batch["labels"][:, 1:] != -100, 0.0)
    torch.testing.assert_close(out.entropy[:, 1:], entropy, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(B, L)
    ours = gradients((out.logprobs * upstream + out.entropy * upstream**2).sum(), model)
    theirs = gradients((expected * upstream[:, 1:] + entropy * upstream[:, 1:] ** 2).sum(), model)
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-3, atol=1e-4)


def test_shift_labels_and_labels_say_the_same(batch):
    model, spec = tiny(), replace(SPEC, temperature=0.5 + torch.rand(B, L))
    own = {k: v for k, v in batch.items() if k != "inputs"}
    moved = {("shift_labels" if k == "labels" else k): v.roll(-1, 1) for k, v in own.items()}
    moved["shift_labels"][:, -1] = -100
    moved_spec = replace(spec, temperature=spec.temperature.roll(-1, 1))
    with patch(model, reduction="none"):
        here = model(**batch["inputs"], **own, spec=spec)
        # labels beside shift_labels are not read
        there = model(**batch["inputs"], **moved, labels=own["labels"], spec=moved_spec)
    for a, b in ((here.loss, there.loss), (here.logprobs, there.logprobs), (here.entropy, there.entropy)):
        assert torch.equal(a[:, 1:], b[:, :-1])
        assert not a[:, 0].any()
        assert a.any()


def test_alignment_leaves_the_callers_arguments_as_they_were():
    labels, old = torch.tensor([[5, 6, 7]]), torch.tensor([[0.0, -1.0, -2.0]])
    spec = ppg.PolicyLossSpec(temperature=torch.tensor([[1.0, 2.0, 3.0]]))
    given, bounds = {"old_logprobs": old, "spec": spec}, torch.tensor([0, 2, 3])
    tokens = LabelledTokens.of(labels, None, {"cu_seq_lens_q": bounds}, given, 2)
    assert tokens.labels.tolist() == [[6, -100, -100]]
    assert tokens.arguments["old_logprobs"].tolist() == [[-1.0, -2.0, 0.0]]
    assert tokens.arguments["spec"].temperature.tolist() == [[2.0, 3.0, 1.0]]
    assert (tokens.arguments["cu_seqlens"] is bounds, tokens.arguments["normalizer"]) == (True, 1.0)  # one is left
    assert given.keys() == {"old_logprobs", "spec"}
    assert given["old_logprobs"] is old
    assert given["spec"] is spec


def test_log_probs_of_one_call_are_the_old_log_probs_of_the_next(batch):
    model = tiny("Cohere")
    with patch(model, spec=ppg.PolicyLossSpec("ppo", temperature=0.7)):
        first = model(**batch["inputs"], labels=batch["labels"])
        again = model(
            **batch["inputs"],
            labels=batch["labels"],
            advantages=batch["advantages"],
            old_logprobs=first.logprobs,
            reduction="sum",
        )
    assert again.metrics["approx_kl"] == 0
    active = batch["labels"] != -100
    torch.testing.assert_close(again.loss, -batch["advantages"][active].sum())


def test_advantages_per_token_dialogue_and_turn_and_rewards_agree(batch):
    model, turn_ids = tiny(), torch.full((B, L), -1)
    turn_ids[:, 3:5], turn_ids[:, 6:8] = 0, 1
    rewards, group_ids = torch.randn(B, 2), torch.tensor([4, 9, 4])
    returns = ppg.partial_returns(rewards, "lookahead:2", 0.9)
    per_turn = ppg.turn_advantages(returns, group_ids, "leave_one_out")
    per_token = per_turn.gather(1, turn_ids.clamp(min=0))
    call = {**batch["inputs"], "labels": batch["labels"], "turn_ids": turn_ids}
    with patch(model, policy_class="lookahead:2", gamma=0.9, baseline="leave_one_out", reduction="sequence_sum"):
        from_rewards = model(**call, rewards=rewards, group_ids=group_ids).loss
        from_turns = model(**call, turn_advantages=per_turn).loss
        from_tokens = model(**call, loss_mask=turn_ids >= 0, advantages=per_token).loss
        one_each = model(**call, loss_mask=turn_ids >= 0, advantages=per_turn[:, 0]).loss
        spread = model(**call, loss_mask=turn_ids >= 0, advantages=per_turn[:, :1].expand(B, L)).loss
    assert from_rewards == from_turns == from_tokens
    assert one_each == spread != from_tokens
    assert from_rewards.item() != 0


def test_arguments_that_contradict_each_other_are_refused(batch):
    model, call = tiny(), {**batch["inputs"], "labels": batch["labels"]}
    A = batch["advantages"]
    with patch(model):
        with pytest.raises(ValueError, match=r"needs labels or shift_labels .*, got \['advantages'\]"):
            model(**batch["inputs"], advantages=A)
        with pytest.raises(ValueError, match="one of advantages, turn_advantages, rewards makes the loss, got"):
            model(**call, advantages=A, rewards=torch.ones(B, 1))
        with pytest.raises(ValueError, match="rewards need turn_ids"):
            model(**call, rewards=torch.ones(B, 1))
        with pytest.raises(ValueError, match="rewards need a policy_class"):
            model(**call, rewards=torch.ones(B, 1), turn_ids=torch.zeros(B, L, dtype=torch.long))
        with pytest.raises(ValueError, match=r"num_items_in_batch goes with reduction token_mean.*got 'sequence_mean'"):
            model(**call, advantages=A, num_items_in_batch=7, reduction="sequence_mean")
        with pytest.raises(ValueError, match="advantages must have the shape of labels"):
            model(**call, advantages=A[:, 1:])
        with pytest.raises(ValueError, match="must be the shape of labels and a hidden size"):
            model(**call, advantages=A, logits_to_keep=4)
    with pytest.raises(ValueError, match=r"defaults of a patch are spec, .*got \['temperature'\]"):
        patch(model, temperature=0.5)
    with (
        patch(tiny("Gemma2")) as patched,
        pytest.raises(ValueError, match=r"must be 0 or the model's own, 2\.5, got 4"),
    ):
        patched.model(**call, advantages=A, spec=ppg.PolicyLossSpec(logit_softcap=4.0))
