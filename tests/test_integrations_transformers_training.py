"""Whole training runs and transformers' own Trainer through a patched model: equal to the same without the patch."""

import copy

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from transformers_case import V, dialogues, single_thread, tiny, with_lora

import ppg_fast as ppg
from ppg_fast.integrations.transformers import PackedCollator, patch

one_thread = pytest.fixture(autouse=True, scope="module")(single_thread)

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
