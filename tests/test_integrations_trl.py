"""The TRL integration against the real package: GRPO is a special case, our head is theirs, turns get the advantages
they should."""

import importlib
import sys
from dataclasses import dataclass, fields

import pytest
import torch

trl = pytest.importorskip("trl", reason="trl is not installed")
import pandas
from datasets import Dataset
from host_case import found_is
from transformers import TrainerCallback
from trl import GRPOConfig
from trl.trainer.utils import add_fused_lm_head as trl_fused_lm_head
from trl_case import (
    ARCHITECTURES,
    VOCABULARY,
    RecordedGRPO,
    RecordedPPG,
    ScriptedRollouts,
    make_chat_tokenizer,
    make_model,
    make_trainer,
    token_reward,
    train,
    weights,
)

import ppg_fast as ppg
from ppg_fast.integrations.options import check_unknown
from ppg_fast.integrations.trl import (
    PPGConfig,
    PPGTrainer,
    add_fused_lm_head,
    config,
    head,
    host,
    total_turn_reward,
    turns,
)
from ppg_fast.integrations.turns import turn_ids_of_mask
from ppg_fast.reference.policy_loss import kept_sequences, vespo_weight

LOSS_TYPES = ("grpo", "dapo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo", "vespo")
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def same_weights(one, other):
    ours, theirs = weights(one), weights(other)
    for name, value in ours.items():
        torch.testing.assert_close(
            value, theirs[name], rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


class WeightsOfSteps(TrainerCallback):
    def __init__(self):
        self.steps = []

    def on_step_end(self, args, state, control, model=None, **_):
        self.steps.append(weights(model))


# ---- GRPO is the special case of one turn ----------------------------------------------------------------------------
def same_training(ours, theirs):
    """Advantages and loss masks of every batch, losses of every micro-batch, weights at the end."""
    assert len(ours.batches) == len(theirs.batches) > 0
    for mine, peer in zip(ours.batches, theirs.batches, strict=True):
        assert torch.equal(mine["mask"], peer["mask"])
        torch.testing.assert_close(mine["advantages"], peer["advantages"][:, None] * peer["mask"], **CLOSE)
    assert max(batch["advantages"].abs().max() for batch in ours.batches) > 0.1
    torch.testing.assert_close(torch.tensor(ours.losses), torch.tensor(theirs.losses), **CLOSE)
    assert max(abs(loss) for loss in theirs.losses) > 1e-3
    same_weights(ours.model, theirs.model)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_one_turn_is_grpo(tmp_path, loss_type, level):
    """Off-policy too (two iterations on a batch), and where one group's rewards are all equal."""
    options = {"loss_type": loss_type, "importance_sampling_level": level, "num_iterations": 2, "max_steps": 4}
    theirs = train(tmp_path, RecordedGRPO, make_model(), ScriptedRollouts(1, False), token_reward, **options)
    ours = train(
        tmp_path, RecordedPPG, make_model(), ScriptedRollouts(1, False), token_reward, baseline="group_std", **options
    )
    same_training(ours, theirs)
    assert all((batch["advantages"] == 0).all(1).sum() >= 4 for batch in ours.batches)


def test_options_of_the_loss_are_trls(tmp_path):
    """Entropy bonus, high-entropy tokens only, off-policy mask, two-sided clip: what the table leaves to TRL."""
    options = {
        "entropy_coef": 0.3, "top_entropy_quantile": 0.5, "off_policy_mask_threshold": 1e-3, "delta": 1.05,
        "epsilon": 0.05, "learning_rate": 0.05, "num_iterations": 2, "max_steps": 4,
    }  # fmt: skip
    theirs = train(tmp_path, RecordedGRPO, make_model(), ScriptedRollouts(1, False), token_reward, **options)
    ours = train(
        tmp_path, RecordedPPG, make_model(), ScriptedRollouts(1, False), token_reward, baseline="group_std", **options
    )
    same_training(ours, theirs)
    plain = train(tmp_path, RecordedPPG, make_model(), ScriptedRollouts(1, False), token_reward, baseline="group_std")
    assert abs(plain.losses[0] - ours.losses[0]) > 1e-3  # the options do something


def test_one_turn_is_grpo_without_scaling(tmp_path):
    options = {"baseline": "group_mean", "policy_class": "greedy"}
    theirs = train(tmp_path, RecordedGRPO, make_model(), ScriptedRollouts(1, False), token_reward, scale_rewards="none")
    ours = train(tmp_path, RecordedPPG, make_model(), ScriptedRollouts(1, False), token_reward, **options)
    same_training(ours, theirs)


def test_reference_model_and_truncation_are_grpos(tmp_path):
    """A KL term (our head on the reference model) and masked truncated completions, whose rewards stay in their
    group."""
    make_model().save_pretrained(tmp_path / "model")

    class Truncated(ScriptedRollouts):
        def row(self, seed):
            row = super().row(seed)
            return row | {"completion_ids": [*row["completion_ids"][:-1], 7]} if seed % 3 == 0 else row

    options = {"beta": 0.2, "mask_truncated_completions": True, "num_iterations": 2}
    path = str(tmp_path / "model")
    theirs = train(tmp_path, RecordedGRPO, path, Truncated(1, False), token_reward, **options)
    ours = train(tmp_path, RecordedPPG, path, Truncated(1, False), token_reward, baseline="group_std", **options)
    assert ours.ref_model.forward.ppg_fast_head
    assert any((batch["mask"].sum(1) == 0).any() for batch in ours.batches)
    same_training(ours, theirs)
    kl = [[entry["kl"] for entry in trainer.state.log_history if "kl" in entry] for trainer in (ours, theirs)]
    torch.testing.assert_close(*map(torch.tensor, kl), **CLOSE)
    assert max(kl[1]) > 1e-4


# ---- turns -----------------------------------------------------------------------------------------------------------
def expected_advantages(given, mask, policy_class, gamma, baseline, group_size=4):
    """By the definition, one token at a time: the turn of a token is the number of runs of the mask that ended before
    it."""
    rewards, counts = given["turn_rewards"], torch.tensor([len(r) for r in given["turn_rewards"]])
    table = torch.zeros(len(rewards), int(counts.max()))
    for row, values in enumerate(rewards):
        table[row, : len(values)] = torch.tensor(values)
    returns = ppg.partial_returns(table, policy_class, gamma, counts)
    groups = torch.arange(len(rewards)) // group_size
    advantages = ppg.turn_advantages(returns, groups, baseline, counts)
    expected = torch.zeros(mask.shape)
    for row, written in enumerate(given["env_mask"]):
        turn, before = -1, 0
        for column, here in enumerate(written):
            if given.get("turn_ids"):
                turn = given["turn_ids"][row][column]
            elif here and not before:
                turn += 1
            if here:
                expected[row, column] = advantages[row, turn]
            before = here
    return expected


@pytest.mark.parametrize("with_turn_ids", [False, True], ids=["runs of the mask", "turn ids"])
@pytest.mark.parametrize(
    ("policy_class", "baseline"), [("greedy", "leave_one_out"), ("lookahead:2", "group_mean"), ("segment:2", "none")]
)
def test_turns_get_their_own_advantages(tmp_path, policy_class, baseline, with_turn_ids):
    rollouts = ScriptedRollouts(4, with_turn_ids=with_turn_ids)
    trainer = train(
        tmp_path, RecordedPPG, make_model(), rollouts, policy_class=policy_class, gamma=0.9, baseline=baseline
    )
    for batch, given in zip(trainer.batches, rollouts.given, strict=True):
        expected = expected_advantages(given, batch["mask"], policy_class, 0.9, baseline)
        torch.testing.assert_close(batch["advantages"], expected, **CLOSE)
        assert any(len(set(row[row != 0].tolist())) > 1 for row in expected)  # turns differ inside a rollout
    assert all(loss != 0 for loss in trainer.losses[:1])


def test_a_reward_mask_is_given_as_an_object(tmp_path):
    """Every second reward: a policy class that has no name."""
    mask = torch.eye(4, dtype=torch.bool).roll(1, 1)
    rollouts = ScriptedRollouts(4)
    trainer = train(
        tmp_path, RecordedPPG, make_model(), rollouts, extra={"policy_class": ppg.RewardMask(mask)}, max_steps=1
    )
    given = rollouts.given[0]
    padded = {**given, "turn_rewards": given["turn_rewards"]}
    table = torch.zeros(8, 4)
    for row, values in enumerate(padded["turn_rewards"]):
        table[row, : len(values)] = torch.tensor(values)
    counts = torch.tensor([len(r) for r in padded["turn_rewards"]])
    advantages = ppg.turn_advantages(
        ppg.partial_returns(table, ppg.RewardMask(mask), 1.0, counts), torch.arange(8) // 4, "leave_one_out", counts
    )
    first = trainer.batches[0]["advantages"][:, 0]
    torch.testing.assert_close(first, advantages[:, 0], **CLOSE)


def test_without_turn_rewards_the_last_turn_has_the_scalar(tmp_path):
    rollouts = ScriptedRollouts(3, with_rewards=False)
    trainer = train(
        tmp_path, RecordedPPG, make_model(), rollouts, token_reward, policy_class="greedy", baseline="none", max_steps=1
    )
    given, batch = rollouts.given[0], trainer.batches[0]
    for row, written in enumerate(given["env_mask"]):
        scalar = token_reward(["w1 w2 w3" if row < 4 else "w5"], [""], [given["completion_ids"][row]])[0]
        last = len(written) - 1 - written[::-1].index(0) if 0 in written else -1
        expected = torch.tensor([scalar if column > last else 0.0 for column in range(len(written))])
        torch.testing.assert_close(batch["advantages"][row, : len(written)], expected)


class Corridor:
    """An environment with one tool; each step has a reward of its own, and the message that ends the rollout has
    none."""

    def reset(self, **_):
        self.turn_rewards = []

    def step(self, metres: int) -> str:
        """Walk on.

        Args:
            metres: How far.
        """
        self.turn_rewards.append(float(metres))
        return f"You walked {metres}."

    def get_reward(self) -> float:
        return sum(self.turn_rewards)


def scripted_walk(trainer, steps):
    """In place of the model: rollout i walks i, i + 1, ... metres, ``steps[i]`` times, then says so."""
    walked = [0] * len(steps)

    def generate(prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        rows = range(len(steps)) if not any(walked) else [i for i, n in enumerate(walked) if n and n <= steps[i]]
        texts = []
        for i in rows:
            call = f'<tool_call>\n{{"name": "step", "arguments": {{"metres": {i + walked[i]}}}}}\n</tool_call>'
            texts.append(f"{call if walked[i] < steps[i] else 'I am there.'}<|im_end|>")
            walked[i] += 1
        assert len(texts) == len(prompt_ids)
        ids = [trainer.processing_class(text)["input_ids"] for text in texts]
        return ids, [[-1.0] * len(row) for row in ids]

    return generate


def test_environments_have_turn_rewards(tmp_path, monkeypatch):
    """TRL's own tool loop: turns are its runs of the tool mask, read after the rollout; the last message has no
    reward."""
    steps = [1, 2, 1, 3]
    data = Dataset.from_dict({"prompt": [[{"role": "user", "content": "Walk."}]] * 4})
    tokenizer = make_chat_tokenizer()
    extra = {"environment_factory": Corridor, "train_dataset": data, "processing_class": tokenizer}
    options = {
        "max_steps": 1,
        "gradient_accumulation_steps": 1,
        "max_completion_length": 900,
    }
    model = make_model(vocab_size=len(tokenizer), max_position_embeddings=4096)
    trainer = make_trainer(
        tmp_path, RecordedPPG, model, None, extra=extra, policy_class="lookahead:2", baseline="none", **options
    )
    monkeypatch.setattr(trainer, "_generate_single_turn", scripted_walk(trainer, steps))
    trainer.train()
    expected = {
        i: [float(i + n) + (i + n + 1 if n + 1 < count else 0) for n in range(count)] + [0.0]
        for i, count in enumerate(steps)
    }
    assert [list(row) for row in trainer._logs["advantages"]] == list(expected.values())
    batch = trainer.batches[0]
    runs = turn_ids_of_mask(batch["mask"])
    for i, values in expected.items():
        assert int(runs[i].max()) + 1 == len(values) == steps[i] + 1
        for turn, value in enumerate(values):
            assert (batch["advantages"][i][runs[i] == turn] == value).all()
    assert trainer.state.log_history[0]["reward"] == pytest.approx((0 + 3 + 2 + 12) / 4)


def test_unscored_rollouts_take_no_part(tmp_path):
    """Two turns each; were the unscored one in the mean, the equal rewards of the others would not cancel."""

    class Unscored(ScriptedRollouts):
        def row(self, seed):
            rewards = [None, None] if seed % 4 == 1 else [None, 3.0]
            return {
                "completion_ids": [5, 6, 7, 8, 1],
                "logprobs": [-1.0] * 5,
                "env_mask": [1, 0, 0, 1, 1],
                "turn_rewards": rewards,
            }

    trainer = train(
        tmp_path, RecordedPPG, make_model(), Unscored(2), baseline="group_mean", policy_class="greedy", max_steps=1
    )
    assert (trainer.batches[0]["advantages"] == 0).all()
    assert trainer.state.log_history[0]["turns/mean_count"] == 1.5
    totals = total_turn_reward([None] * 2, [None] * 2, turn_rewards=[[None, None], [1.0, None, 0.5]])
    assert totals == [None, 1.5]


def test_evaluation_groups_by_its_own_size(tmp_path):
    rollouts = ScriptedRollouts(3)
    trainer = make_trainer(
        tmp_path, RecordedPPG, make_model(), rollouts, num_generations_eval=2, per_device_eval_batch_size=4
    )
    metrics = trainer.evaluate()
    batch, given = trainer.batches[0], rollouts.given[0]
    torch.testing.assert_close(
        batch["advantages"], expected_advantages(given, batch["mask"], "full", 1.0, "leave_one_out", 2), **CLOSE
    )
    shown = trainer._logs["advantages"]
    assert len(shown) == 8  # two batches of four, none of them shown as GRPO's
    assert all(isinstance(row, turns.TurnAdvantages) for row in shown)
    assert metrics["eval_loss"] == pytest.approx(sum(trainer.losses) / len(trainer.losses), rel=1e-4)


def test_the_completions_table_shows_turns(tmp_path, capsys):
    rollouts = ScriptedRollouts(3)
    trainer = train(
        tmp_path, RecordedPPG, make_model(), rollouts, log_completions=True, max_steps=1, num_completions_to_print=2
    )
    column = pandas.read_parquet(tmp_path / "completions" / "completions_00001.parquet")["advantage"]
    assert [len(row) for row in column] == [len(r) for r in rollouts.given[0]["turn_rewards"]]
    assert any(len(row) > 1 for row in column)
    batch = trainer.batches[0]
    runs = turn_ids_of_mask(batch["mask"])
    for row, shown in enumerate(column):
        for turn, value in enumerate(shown):
            assert (batch["advantages"][row][runs[row] == turn] == value).all()
    assert f"{turns.TurnAdvantages([0.5, -1.25]):.2f}" == "0.50 -1.25"
    assert "Advantage" in capsys.readouterr().out
    history = trainer.state.log_history[0]
    counts = [len(r) for r in rollouts.given[0]["turn_rewards"]]
    assert history["turns/mean_count"] == pytest.approx(sum(counts) / len(counts))
    assert history["turns/reward"] == pytest.approx(sum(map(sum, rollouts.given[0]["turn_rewards"])) / sum(counts))
    shown = [value for row in column for value in row]
    assert history["turns/zero_advantage"] == pytest.approx(sum(v == 0 for v in shown) / len(shown))


def test_only_tokens_of_the_loss_are_projected(tmp_path, monkeypatch):
    """What tools, users and environments wrote costs no GEMM in the loss, whatever the old log-probs there are."""
    seen = []
    project = head.linear_token_logprobs
    monkeypatch.setattr(
        head, "linear_token_logprobs", lambda h, w, labels, **o: seen.append(labels) or project(h, w, labels, **o)
    )
    trainer = train(tmp_path, RecordedPPG, make_model(), ScriptedRollouts(4), num_iterations=2, max_steps=2)
    projected = [int((labels != -100).sum()) for labels in seen if labels.requires_grad is False]
    # two of the old log-probs, then the two micro-batches
    assert int(trainer.batches[0]["mask"].sum()) == sum(projected[2:4])
    assert sum(projected[:2]) > sum(projected[2:4])
    assert all(torch.tensor(trainer.losses).isfinite())


def test_a_token_of_the_environment_may_be_as_unlikely_as_it_likes(tmp_path):
    """Its ratio, exp of minus its old log-prob were it not masked, would be infinite, and NaN times a mask of 0."""
    model = make_model()
    with torch.no_grad():
        model.get_output_embeddings().weight *= 300
    trainer = train(
        tmp_path, RecordedPPG, model, ScriptedRollouts(3), num_iterations=2, max_steps=2, learning_rate=1e-9
    )
    assert all(torch.tensor(trainer.losses).isfinite())


# ---- the head --------------------------------------------------------------------------------------------------------
STEPS = {"max_steps": 3, "num_iterations": 2, "entropy_coef": 0.05, "loss_type": "grpo"}


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "LoRA"])
def test_training_with_our_head_is_training_with_trls(tmp_path, architecture):
    """Losses and weights of every step, with an entropy bonus and ratios that are not 1."""
    runs = []
    for name in ("ppg_fast", "trl"):
        extra, model = {}, make_model("Llama" if architecture == "LoRA" else architecture)
        if architecture == "LoRA":
            peft = pytest.importorskip("peft", reason="peft is not installed")
            extra["peft_config"] = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
        extra["callbacks"] = [callback := WeightsOfSteps()]
        trainer = train(
            tmp_path,
            RecordedPPG,
            model,
            ScriptedRollouts(3),
            extra=extra,
            policy_class="lookahead:2",
            fused_head=name,
            **STEPS,
        )
        runs.append((trainer, callback.steps))
    (ours, our_steps), (theirs, their_steps) = runs
    torch.testing.assert_close(torch.tensor(ours.losses), torch.tensor(theirs.losses), **CLOSE)
    for mine, peer in zip(our_steps, their_steps, strict=True):
        for name, value in mine.items():
            torch.testing.assert_close(
                value, peer[name], rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
            )
    assert len(our_steps) == 3
    moved = [name for name in our_steps[0] if not torch.equal(our_steps[0][name], our_steps[2][name])]
    assert moved
    history = [[(e["entropy"], e["grad_norm"]) for e in t.state.log_history if "entropy" in e] for t in (ours, theirs)]
    torch.testing.assert_close(*map(torch.tensor, history), rtol=1e-3, atol=1e-4)


def outputs_of(add, architecture, dtype=torch.float32, autocast=False, **call):
    model = make_model(architecture).to(dtype)
    add(model, temperature=0.7, outputs=head.OUTPUTS, cast_lm_head_to_fp32=call.pop("cast_lm_head_to_fp32", False))
    ids = torch.randint(3, VOCABULARY, (3, 10), generator=torch.Generator().manual_seed(5))
    labels = ids.masked_fill(torch.rand(3, 10, generator=torch.Generator().manual_seed(6)) < 0.4, -100)
    labels[2] = -100 if call.pop("empty", False) else labels[2]
    given = {"shift_labels": labels} if call.pop("shifted", False) else {"labels": labels}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model(input_ids=ids, attention_mask=torch.ones_like(ids), fused_lm_head=True, **given, **call)
    weight = torch.randn(2, *out.log_probs.shape, generator=torch.Generator().manual_seed(7))
    (out.loss + (weight[0] * out.log_probs + weight[1] * out.entropy).sum()).backward()
    return out, {name: p.grad for name, p in model.named_parameters()}, model


def contracts_agree(one, other, **tolerance):
    (out, grads, _), (peer, peer_grads, _) = one, other
    assert list(out) == list(peer)
    for name in peer:
        torch.testing.assert_close(out[name], peer[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}")
    for name, grad in peer_grads.items():
        torch.testing.assert_close(grads[name], grad, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


CALLS = [{}, {"shifted": True}, {"num_items_in_batch": 5}, {"empty": True}]


@pytest.mark.parametrize("call", CALLS, ids=["labels", "shift_labels", "num_items_in_batch", "a row of no label"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_head_keeps_trls_contract(architecture, call):
    """Every field of FusedCausalLMOutput and every gradient, at a temperature, with the model's own softcap, scale,
    bias, experts."""
    runs = [outputs_of(add, architecture, **call) for add in (add_fused_lm_head, trl_fused_lm_head)]
    contracts_agree(*runs, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("call", [{"cast_lm_head_to_fp32": True}, {}], ids=["cast to float32", "bfloat16"])
def test_the_head_in_bfloat16(call):
    runs = [outputs_of(add, "Granite", torch.bfloat16, **call) for add in (add_fused_lm_head, trl_fused_lm_head)]
    contracts_agree(*runs, rtol=2e-2, atol=5e-2)


def test_the_head_under_autocast():
    runs = [outputs_of(add, "Gemma2", autocast=True) for add in (add_fused_lm_head, trl_fused_lm_head)]
    contracts_agree(*runs, rtol=2e-2, atol=5e-2)


def test_no_label_at_all_is_a_zero_with_gradients():
    model = make_model()
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    ids = torch.randint(3, VOCABULARY, (2, 5))
    out = model(input_ids=ids, labels=torch.full_like(ids, -100), fused_lm_head=True)
    out.loss.backward()
    assert out.loss == 0
    assert all(p.grad is not None and (p.grad == 0).all() for p in model.parameters())
    assert out.is_top1 is None
    assert out.log_probs.shape == (2, 4)


def test_without_the_flag_the_forward_is_the_original():
    model, plain = make_model("Gemma2"), make_model("Gemma2")
    add_fused_lm_head(model)
    ids = torch.randint(3, VOCABULARY, (2, 5))
    for given in ({}, {"labels": ids}):
        ours, theirs = model(input_ids=ids, **given), plain(input_ids=ids, **given)
        torch.testing.assert_close(ours.logits, theirs.logits)
    torch.testing.assert_close(ours.loss, theirs.loss)
    assert (
        model.generate(ids, max_new_tokens=2, do_sample=False).tolist()
        == plain.generate(ids, max_new_tokens=2, do_sample=False).tolist()
    )


# ---- errors ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"policy_class": "lookahead:0"}, "integer >= 1, got 0"),
        ({"gamma": 1.5}, "gamma must be a finite number >= 0.0 and <= 1.0, got 1.5"),
        ({"baseline": "loo"}, "baseline must be one of none, leave_one_out, group_mean, group_std, got 'loo'"),
        ({"fused_head": "liger"}, "fused_head must be one of ppg_fast, trl, got 'liger'"),
        ({"scale_rewards": "batch"}, "scale_rewards of TRL must be 'group' or 'none' .*, got 'batch'"),
        ({"scale_rewards": "none", "baseline": "group_std"}, "got 'none'"),
        (
            {"multi_objective_aggregation": "normalize_then_sum"},
            "multi_objective_aggregation of TRL must be 'sum_then_normalize' .*, got 'normalize_then_sum'",
        ),
    ],
)
def test_options_name_the_rule(tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        PPGConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], **options)


def test_an_option_of_a_later_trl_is_not_swallowed(tmp_path):
    """Options of the loss are TRL's own business; one that nobody here has read is refused where it is not off."""

    @dataclass
    class LaterGRPOConfig(GRPOConfig):
        turn_smoothing: float = 0.25

    given = LaterGRPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to=[])
    names = config.OF_GRPO | {"turn_smoothing"}
    assert {f.name for f in fields(GRPOConfig)} >= config.OF_GRPO > {"loss_type", "beta", "scale_rewards"}
    check_unknown("TRL", config.OPTIONS, given, LaterGRPOConfig, names=names.__contains__)
    given.turn_smoothing = 0.5
    with pytest.raises(ValueError, match=r"^turn_smoothing is an option of TRL .* its default 0.25, got 0.5$"):
        check_unknown("TRL", config.OPTIONS, given, LaterGRPOConfig, names=names.__contains__)


def test_args_must_be_ours(tmp_path):
    with pytest.raises(TypeError, match="must be a PPGConfig, got GRPOConfig"):
        PPGTrainer(make_model(), token_reward, GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to=[]))


@pytest.mark.parametrize(
    ("turns", "change", "words"),
    [
        (1, {"turn_rewards": [1.0] * 9}, r"one per turn, \d found in the mask .* got '9 rewards'"),
        (3, {"turn_rewards": [1.0]}, r"one per turn, [23] found in the mask .* got '1 rewards'"),
        (1, {"turn_rewards": []}, None),  # none scored: the scalar stands in
        (1, {"turn_ids": [-1]}, r"turn_ids must name a turn >= 0 .* got \(\d, 0\)"),
        (1, {"turn_rewards": [float("nan")]}, "finite"),
    ],
)
def test_rewards_and_turns_must_fit(tmp_path, turns, change, words):
    class Changed(ScriptedRollouts):
        def row(self, seed):
            row = super().row(seed)
            return row | {
                key: value * (len(row["env_mask"]) if key == "turn_ids" else 1) for key, value in change.items()
            }

    trainer = make_trainer(tmp_path, RecordedPPG, make_model(), Changed(turns), token_reward)
    if words is None:
        trainer.train()
        return
    with pytest.raises(ValueError, match=words):
        trainer.train()


def test_an_old_or_missing_trl_is_one_line(monkeypatch):
    needed = r"^ppg_fast.integrations.trl needs trl >= 1.16, found %s: pip install 'trl>=1.16,<2'$"
    found_is(monkeypatch, "1.15.3")
    with pytest.raises(ImportError, match=needed % "1.15.3"):
        importlib.import_module("ppg_fast.integrations.trl")
    found_is(monkeypatch, None)
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(ImportError, match=needed % "none"):
        importlib.import_module("ppg_fast.integrations.trl")


def test_a_changed_hook_is_one_line():
    class Changed:
        def _calculate_rewards(self, inputs, prompts):
            pass

    with pytest.raises(
        ImportError, match=r"needs GRPOTrainer._calculate_rewards\(self, inputs, .*got \(self, inputs, prompts\) in trl"
    ):
        host.require_hooks(Changed, trl_fused_lm_head)
    with pytest.raises(ImportError, match="got nothing of that name in trl"):
        host.require_hooks(host.GRPOTrainer, None)


def test_zero3_is_refused(monkeypatch):
    monkeypatch.setattr("transformers.integrations.deepspeed.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match='ZeRO-3 frees: use fused_head="trl"'):
        add_fused_lm_head(make_model())


def test_head_numbers_are_checked():
    with pytest.raises(ValueError, match=r"outputs must be among log_probs, .*got \['logits'\]"):
        add_fused_lm_head(make_model(), outputs=("logits",))
    with pytest.raises(ValueError, match="logit_scale of the model must be > 0, got 0"):
        add_fused_lm_head(make_model("Cohere", logit_scale=0.0))


def test_a_trainer_that_does_not_call_the_hooks_is_loud(tmp_path, monkeypatch):
    monkeypatch.setattr("trl.trainer.grpo_trainer.GRPOTrainer._generate_and_score_completions", lambda self, inputs: {})
    trainer = make_trainer(tmp_path, RecordedPPG, make_model(), ScriptedRollouts(1))
    with pytest.raises(RuntimeError, match="no longer calls _calculate_rewards"):
        PPGTrainer._generate_and_score_completions(trainer, [])


@pytest.mark.parametrize("unknown", [False, True])
def test_masks_and_weights_of_sequences_are_those_of_trl(unknown):
    """`opsm_delta` and vespo against TRL's own functions, also where the sampler does not know a token's log-prob."""
    g = torch.Generator().manual_seed(5)
    mask = torch.rand(6, 9, generator=g) < 0.8
    old = -torch.rand(6, 9, generator=g)
    l, A = old + 0.3 * torch.randn(6, 9, generator=g), torch.randn(6, 1, generator=g)
    weights = torch.where(mask, torch.rand(6, 9, generator=g) + 0.5, 1.0)
    acted = old.masked_fill(torch.arange(9) == 3, torch.nan) if unknown else old
    dropped = ppg.PolicyLossSpec("ppo", opsm_delta=0.02, nan_rollout="one")
    rows = torch.arange(6).repeat_interleave(9), 6
    flat = [t.flatten() for t in (mask, A.expand(6, 9))]
    ours = kept_sequences(l.flatten(), acted.flatten(), *flat, rows, dropped).view(6, 9)
    theirs = trl.GRPOTrainer.get_off_policy_mask(A, l, acted, mask.float(), 0.02)
    assert torch.equal(ours, theirs.expand(6, 9))
    assert 0 < (ours == 0).sum() < ours.numel()
    for importance in (None, weights):
        own = 1.0 if importance is None else importance.flatten()
        ours = vespo_weight(l.flatten(), old.flatten(), own, *flat, rows, ppg.PolicyLossSpec("vespo")).view(6, 9)
        theirs = trl.GRPOTrainer.get_gamma_weights(A, l - old, mask.float(), importance)
        torch.testing.assert_close(ours, theirs.expand(6, 9))
