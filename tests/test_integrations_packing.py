"""Packed rows through a patched model: equal to the same dialogues one by one, and without the patch."""

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from transformers_case import SIZES, dialogues, single_thread, tiny

import ppg_fast as ppg
from ppg_fast.dialogues.packing import Sample
from ppg_fast.integrations.transformers import PACKED_ATTENTION, PackedCollator, patch

one_thread = pytest.fixture(autouse=True, scope="module")(single_thread)


def alone(model, dialogue):
    """Log-probs of a dialogue's assistant tokens from its own logits, at the position before each."""
    logits = model(input_ids=dialogue["input_ids"][None]).logits[0]
    labels = torch.cat([dialogue["input_ids"][1:], torch.zeros(1, dtype=torch.long)])
    taken = torch.cat([dialogue["turn_ids"][1:] >= 0, torch.zeros(1, dtype=torch.bool)])
    return logits.log_softmax(-1).gather(-1, labels[:, None])[:, 0].where(taken, 0.0)


PACKABLE = [
    (family, attention)
    for family in ("Qwen3", "Mistral", "Gemma2")
    for attention in ("eager", "sdpa", PACKED_ATTENTION)
]
PACKABLE.remove(("Gemma2", "sdpa"))  # transformers' sdpa leaves out the softcap of the scores


@pytest.mark.parametrize(("family", "attention"), PACKABLE)
def test_packed_log_probs_equal_those_of_each_dialogue_alone(family, attention):
    model, parts = tiny(family), dialogues()
    model.set_attn_implementation("eager")
    expected = torch.cat([alone(model, part) for part in parts])
    model.set_attn_implementation(attention)
    batch = {k: v for k, v in PackedCollator()(parts).items() if k not in ("rewards", "turn_counts", "group_ids")}
    with patch(model):
        torch.testing.assert_close(model(**batch).logprobs[0], expected, rtol=1e-4, atol=2e-5)
        del batch["shift_labels"]  # the same by transformers' own alignment
        own = model(**{**batch, "turn_ids": None, "rollout_logprobs": None}).logprobs[0]
        torch.testing.assert_close(own[1:], expected[:-1], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    "changes", [{"use_cache": True}, {"attention_mask": torch.ones(1, 40, dtype=torch.long)}], ids=["cache", "mask"]
)
def test_what_the_collator_leaves_out_would_mix_the_dialogues(changes):
    """The trap it is there for: transformers says nothing where packed dialogues see each other."""
    model, parts = tiny("Qwen3"), dialogues()
    expected = torch.cat([alone(model, part) for part in parts])
    batch = PackedCollator()(parts)
    assert "attention_mask" not in batch
    assert batch["use_cache"] is False
    call = {name: batch[name] for name in ("input_ids", "shift_labels", "position_ids")}
    with patch(model):
        mixed, kept = model(**call, **changes), model(**call)  # a patched model has no cache unless told to
    assert (mixed.logprobs[0] - expected).abs().max() > 0.01
    torch.testing.assert_close(kept.logprobs[0], expected, rtol=1e-4, atol=2e-5)


def test_no_label_crosses_from_one_dialogue_to_the_next():
    parts = dialogues()
    for part in parts:
        part["turn_ids"] = torch.zeros_like(part["turn_ids"])  # every token is the assistant's, the first ones too
        part["rewards"] = torch.ones(1)
    batch = PackedCollator()(parts)
    ends, starts = batch["cu_seq_lens_q"][1:].long() - 1, batch["cu_seq_lens_q"][:-1].long()
    assert (batch["shift_labels"][0, ends] == -100).all()
    assert (batch["turn_ids"][0, ends] == -1).all()
    assert (batch["labels"][0, starts] == -100).all()
    assert (batch["shift_labels"] != -100).sum() == (batch["labels"] != -100).sum() == 40 - len(parts)
    assert torch.equal(
        batch["shift_labels"][0, :-1][batch["shift_labels"][0, :-1] != -100], batch["labels"][batch["labels"] != -100]
    )
    assert batch["position_ids"][0, starts].eq(0).all()
    assert batch["max_length_q"] == 17
    assert batch["turn_counts"].tolist() == [1, 1, 1, 1]


def test_bounds_keep_labels_of_other_collators_apart():
    """Labels equal to input_ids across a bound are masked where the bounds are known."""
    model, parts = tiny("Qwen3"), dialogues()
    batch = PackedCollator()(parts)
    bounds = {
        name: batch[name]
        for name in ("input_ids", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
    }
    with patch(model):
        logprobs = model(**bounds, labels=batch["input_ids"]).logprobs[0]
    assert not logprobs[batch["cu_seq_lens_q"][:-1].long()].any()
    assert (logprobs != 0).sum() == 40 - len(parts)


def test_samples_and_mappings_collate_alike():
    parts = dialogues()
    samples = [
        Sample(
            d["input_ids"].tolist(),
            d["turn_ids"].tolist(),
            d["rewards"].tolist(),
            d["group_id"],
            d["rollout_logprobs"].tolist(),
        )
        for d in parts
    ]
    ours, theirs = PackedCollator()(parts), PackedCollator()(samples)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(v, theirs[k]) if isinstance(v, torch.Tensor) else v == theirs[k] for k, v in ours.items())


def test_dialogues_that_cannot_be_packed_are_refused():
    parts, collate = dialogues(), PackedCollator()
    with pytest.raises(ValueError, match="at least one dialogue, got 0"):
        collate([])
    with pytest.raises(ValueError, match="a dialogue needs input_ids and turn_ids, got"):
        collate([{"input_ids": [3, 4]}])
    with pytest.raises(ValueError, match=r"a dialogue has the fields input_ids.*got \['attention_mask'\]"):
        collate([{**parts[0], "attention_mask": [1] * 13}])
    with pytest.raises(ValueError, match="rewards must be given for all dialogues or for none"):
        collate([parts[0], {**parts[2], "rewards": None}])
    with pytest.raises(ValueError, match="turn"):
        collate([{**parts[0], "rewards": [1.0]}])


RECURRENT = {"Mamba": {"state_size": 8}, "Lfm2": {"layer_types": ["conv", "full_attention"]}}


@pytest.mark.parametrize("family", RECURRENT)
def test_layers_that_carry_a_state_over_the_bounds_are_refused(family):
    """transformers mixes such dialogues without a word; padded ones are fine."""
    model, batch = (
        transformers.AutoModelForCausalLM.from_config(recurrent_config(family)).eval(),
        PackedCollator()(dialogues()),
    )
    call = {name: batch[name] for name in ("input_ids", "shift_labels", "position_ids")}
    expected = torch.cat([alone(model, part) for part in dialogues()])
    with patch(model):
        assert (model(**call).logprobs[0] - expected).abs().max() > 0.1
        with pytest.raises(
            ValueError,
            match=f"dialogues can be packed for layers of full_attention.*pad them for {family.lower()}, got",
        ):
            model(**call, cu_seq_lens_q=batch["cu_seq_lens_q"])
        padded = model(input_ids=batch["input_ids"][:, :13], labels=batch["input_ids"][:, :13])
    assert padded.loss > 0


def recurrent_config(family):
    torch.manual_seed(0)
    kept = {
        k: v
        for k, v in SIZES.items()
        if family != "Mamba" or k in ("vocab_size", "hidden_size", "num_hidden_layers", "initializer_range")
    }
    return getattr(transformers, f"{family}Config")(**kept, **RECURRENT[family])


def test_the_loss_of_a_packed_batch_equals_the_loss_from_its_own_logits():
    model, batch = tiny("Granite"), PackedCollator()(dialogues())
    spec = ppg.PolicyLossSpec("gspo_turn", clip_low=0.3, clip_high=0.4, temperature=0.9, importance_cap=1.5)
    turns = {
        "gamma": 0.9,
        "baseline": "leave_one_out",
        "group_ids": batch["group_ids"],
        "turn_counts": batch["turn_counts"],
    }
    old = batch["rollout_logprobs"] - 3.0
    logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    expected = ppg.partial_policy_loss(
        logits, batch["shift_labels"], batch["rewards"], batch["turn_ids"], "lookahead:2", old_logprobs=old, spec=spec,
        rollout_logprobs=batch["rollout_logprobs"], cu_seqlens=batch["cu_seq_lens_q"], reduction="sequence_mean",
        **turns,
    )  # fmt: skip
    with patch(
        model, spec=spec, policy_class="lookahead:2", gamma=0.9, baseline="leave_one_out", reduction="sequence_mean"
    ):
        out = model(**batch, old_logprobs=old)
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.logprobs, expected.logprobs, rtol=1e-4, atol=1e-5)
    for a, b in zip(
        torch.autograd.grad(out.loss, model.parameters()),
        torch.autograd.grad(expected.loss, model.parameters()),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_parts_of_a_dialogue_are_kept_apart_and_count_as_one_dialogue():
    """Against the parts as dialogues of their own: log-probs are theirs, a mean over sequences is the dialogue's."""
    model = tiny("Qwen3")
    first, second = Sample([3, 5, 7, 9], [-1, 0, 0, -1], [1.0], 0), Sample([3, 6, 8], [-1, 0, 0], [1.0], 0)
    whole = Sample([3, 5, 7, 9, 3, 6, 8], [-1, 0, 0, -1, -1, 1, 1], [1.0, 1.0], 0, starts=[0, 4])
    assert "cu_seqlens" not in PackedCollator()([first, second])
    one, two = PackedCollator()([whole, first]), PackedCollator()([first, second, first])
    assert one["cu_seqlens"].tolist() == [0, 7, 11]
    for name in ("position_ids", "labels", "shift_labels", "cu_seq_lens_q", "max_length_q"):
        assert torch.equal(torch.as_tensor(one[name]), torch.as_tensor(two[name])), name
    model.set_attn_implementation(PACKED_ATTENTION)
    advantages = torch.tensor([[0.5] * 11])
    credit = ("rewards", "turn_counts", "group_ids", "turn_ids")
    with patch(model, reduction="sequence_mean"):
        for drop in ("shift_labels", "labels"):
            a, b = ({k: v for k, v in batch.items() if k not in (*credit, drop)} for batch in (one, two))
            torch.testing.assert_close(model(**a).logprobs, model(**b).logprobs)
        taken = one["shift_labels"][0] >= 0
        logprobs = model(**a).logprobs[0].where(taken, 0.0)
        loss = model(**a, advantages=advantages).loss
    means = [logprobs[:7].sum() / int(taken[:7].sum()), logprobs[7:].sum() / int(taken[7:].sum())]
    torch.testing.assert_close(loss, -0.5 * sum(means) / 2)
