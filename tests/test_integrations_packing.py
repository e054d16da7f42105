"""Packed rows, whole training runs and transformers' own Trainer through a patched model: equal to the same without the
patch."""

import copy

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from test_integrations_transformers import SIZES, tiny, with_lora

import ppg_fast as ppg
from ppg_fast.dialogues.packing import Sample
from ppg_fast.integrations.transformers import PACKED_ATTENTION, PackedCollator, patch

V = SIZES["vocab_size"]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """These models are too small to share among threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def dialogues(lengths=(13, 1, 9, 17), seed=3):
    """Dialogues of uneven lengths with up to three turns, adjacent ones among them, and one that has none."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number, n in enumerate(lengths):
        tokens = torch.randint(2, V, (n,), generator=generator)
        turn_ids = torch.tensor(
            [0 if 3 <= i < 5 else 1 if 5 <= i < 8 else 2 if 10 <= i < n - 1 else -1 for i in range(n)]
        )
        turns = int(turn_ids.max()) + 1
        rewards = torch.randn(turns, generator=generator)
        logprobs = -torch.rand(n, generator=generator)
        made.append(
            {
                "input_ids": tokens,
                "turn_ids": turn_ids,
                "rewards": rewards,
                "group_id": number % 2,
                "rollout_logprobs": logprobs,
            }
        )
    return made


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


# ---- training --------------------------------------------------------------------------------------------------------
SPEC = ppg.PolicyLossSpec("ppo", clip_low=0.2, clip_high=0.3, kl_coef=0.02, temperature=0.9)
STEPS = 6


def losses_of_training(model, through_the_head):
    """PPO on packed batches with two epochs each; the logits either the model's own or never made."""
    reference = copy.deepcopy(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=3e-3), []
    settings = {"reduction": "sequence_mean", "gamma": 0.9, "baseline": "leave_one_out"}
    for step in range(STEPS):
        batch = PackedCollator()(dialogues(seed=step // 2))
        inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}
        if step % 2 == 0:
            with torch.no_grad():
                old = ppg.token_logprobs(model(**inputs).logits, batch["shift_labels"], temperature=0.9)
                ref = ppg.token_logprobs(reference(**inputs).logits, batch["shift_labels"], temperature=0.9)
        if through_the_head:
            with patch(model, spec=SPEC, policy_class="segment:2", **settings):
                loss = model(**batch, old_logprobs=old, ref_logprobs=ref).loss
        else:
            turns = {
                "group_ids": batch["group_ids"],
                "turn_counts": batch["turn_counts"],
                "cu_seqlens": batch["cu_seq_lens_q"],
            }
            dialogues_of = batch["shift_labels"], batch["rewards"], batch["turn_ids"], "segment:2"
            options = {"old_logprobs": old, "ref_logprobs": ref, "spec": SPEC, **turns, **settings}
            loss = ppg.partial_policy_loss(model(**inputs).logits, *dialogues_of, **options).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, [p.detach().clone() for p in trained]


@pytest.mark.parametrize("adapted", [False, True], ids=["every weight", "LoRA with the head"])
@pytest.mark.parametrize("family", ["Llama", "Gemma2", "Granite"])
def test_training_with_the_patch_equals_training_without_it_step_by_step(family, adapted):
    def model():
        return with_lora(tiny(family)) if adapted else tiny(family)

    (ours, weights), (theirs, expected) = losses_of_training(model(), True), losses_of_training(model(), False)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert len({round(loss, 4) for loss in ours}) == STEPS
    for a, b in zip(weights, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=3e-4)  # AdamW divides gradients near zero by their size


class Rows(torch.utils.data.Dataset):
    """Eight rows of one length with a label, an advantage and an old log-prob per token, and columns nobody asked
    for."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(2, V, (10,), generator=generator)
        labels = ids.masked_fill(torch.arange(10) < 2 + index % 3, -100)
        return {
            "input_ids": ids,
            "labels": labels,
            "advantages": torch.randn(10, generator=generator),
            "remark": torch.zeros(1),
        }


class WithoutPatch(transformers.Trainer):
    """What a user of transformers' Trainer would write by hand: the loss from logits, divided by the items of the whole
    window."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        advantages = inputs.pop("advantages")
        logits = model(input_ids=inputs["input_ids"]).logits
        return ppg.policy_loss(
            logits[:, :-1], inputs["labels"][:, 1:], advantages[:, 1:], reduction="sum", normalizer=num_items_in_batch
        ).loss


def trainer_losses(model, trainer, folder, **arguments):
    settings = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=4, logging_steps=1,
        learning_rate=3e-3,
        save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True, seed=3, **arguments,
    )  # fmt: skip
    trained = trainer(model=model, args=settings, train_dataset=Rows())
    trained.train()
    return [entry["loss"] for entry in trained.state.log_history if "loss" in entry]


def test_the_trainer_of_transformers_feeds_a_patched_model(tmp_path):
    """Columns of the policy loss reach the model, others are dropped, and accumulated steps share one denominator."""
    expected = trainer_losses(tiny(), WithoutPatch, tmp_path, remove_unused_columns=False)
    model = tiny()
    with patch(model):
        losses = trainer_losses(model, transformers.Trainer, tmp_path)
    assert len(losses) == 4
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-4)
