"""transformers' causal LMs with a policy loss in place of their logits, family by family, against their own logits in
float64."""

import copy
import importlib.metadata
import inspect
import sys
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from closeness import assert_as_good_as
from host_case import found_is

import ppg_fast as ppg
from ppg_fast.integrations.transformers import LogitRule, logit_rule, patch
from ppg_fast.integrations.transformers.head import linear_of

V, B, L = 61, 3, 11
SIZES = {
    "vocab_size": V,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}
HEADS = {  # what stands between hidden states and logits, by family, none at its default
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {},
    "Mistral": {"sliding_window": 5},
    "Phi": {},  # a bias
    "Gemma2": {
        "final_logit_softcapping": 2.5,
        "attn_logit_softcapping": 3.0,
        "sliding_window": 4,
        "query_pre_attn_scalar": 11,
    },
    "Granite": {"logits_scaling": 3.0},
    "Cohere": {"logit_scale": 0.3},
    "HyperCLOVAX": {"logits_scaling": 0.7},
    "NanoChat": {"final_logit_softcapping": 5.0},
}
RULES = {
    "Gemma2": LogitRule(1.0, 2.5, V),
    "Granite": LogitRule(1 / 3, 0.0, V),
    "Cohere": LogitRule(0.3, 0.0, V),
    "HyperCLOVAX": LogitRule(0.7, 0.0, V),
    "NanoChat": LogitRule(1.0, 5.0, V),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """These models are too small to share among threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny(family="Llama", tied=False, **changes):
    """A two-layer model of random weights, with a random bias where the head has one."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        **{**SIZES, **HEADS.get(family, {}), "tie_word_embeddings": tied, **changes}
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    if model.lm_head.bias is not None:
        torch.nn.init.normal_(model.lm_head.bias)
    return model


@pytest.fixture
def batch():
    """Padded dialogues of uneven length, labels as transformers wants them, and a full set of per-token arguments."""
    ids = torch.randint(2, V, (B, L))
    # less padding than a window: in float64 transformers makes NaN of it
    mask = (torch.arange(L) < torch.tensor([[L], [8], [9]])).long()
    labels = ids.masked_fill((mask == 0) | (torch.arange(L) < 3), -100)
    return {
        "inputs": {"input_ids": ids, "attention_mask": mask},
        "labels": labels,
        "advantages": torch.randn(B, L),
        "old_logprobs": -4.0 + torch.rand(B, L),
        "ref_logprobs": -4.5 + torch.rand(B, L),
    }


SPEC = ppg.PolicyLossSpec(
    "ppo", clip_low=0.3, clip_high=0.4, kl_coef=0.07, kl_estimator="k3", entropy_coef=0.05, temperature=0.8
)


def expected_loss(logits, batch, spec=SPEC):
    """PPO with k3 and entropy bonus, token mean, by plain PyTorch in the dtype of the logits."""
    labels, values = (
        batch["labels"][:, 1:],
        {k: v[:, 1:].to(logits.dtype) for k, v in batch.items() if k not in ("inputs", "labels")},
    )
    all_logprobs = (logits[:, :-1] / spec.temperature).log_softmax(-1)
    logprobs = all_logprobs.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    ratio, A = (logprobs - values["old_logprobs"]).exp(), values["advantages"]
    surrogate = torch.minimum(ratio * A, ratio.clamp(1 - spec.clip_low, 1 + spec.clip_high) * A)
    d = values["ref_logprobs"] - logprobs
    entropy = -(all_logprobs.exp() * all_logprobs).sum(-1)
    per_token = -surrogate + spec.kl_coef * (d.exp() - d - 1) - spec.entropy_coef * entropy
    active = labels != -100
    return per_token[active].sum() / active.sum(), torch.where(active, logprobs, 0.0)


def gradients(loss, model):
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return dict(
        zip([n for n, _ in named], torch.autograd.grad(loss, [p for _, p in named], allow_unused=True), strict=True)
    )


def assert_equals_own_logits(model, batch):
    """Loss, log-probs and every gradient of the patched model, no worse than through its own logits, measured in
    float64."""
    exact = copy.deepcopy(model).double()
    truth, true_logprobs = expected_loss(exact(**batch["inputs"]).logits, batch)
    plain, plain_logprobs = expected_loss(model(**batch["inputs"]).logits, batch)
    arguments = {k: v for k, v in batch.items() if k != "inputs"}
    with patch(model, spec=SPEC):
        out = model(**batch["inputs"], **arguments)
    assert_as_good_as(out.loss, plain, truth, "loss")
    assert_as_good_as(out.logprobs[:, 1:], plain_logprobs, true_logprobs, "logprobs")
    expected, baseline = gradients(truth, exact), gradients(plain, model)
    for name, gradient in gradients(out.loss, model).items():
        assert_as_good_as(gradient, baseline[name], expected[name], name)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", HEADS)
def test_values_and_gradients_equal_those_of_the_models_own_logits(family, tied, batch):
    model = tiny(family, tied)
    assert logit_rule(model) == RULES.get(family, LogitRule(1.0, 0.0, V))
    assert_equals_own_logits(model, batch)


def test_a_scale_in_front_of_the_head_is_seen(batch):
    """MiniCPM3 divides its hidden states by config.logits_scaling, where Granite divides the logits by it."""
    latent = {
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
    }
    model = tiny("MiniCPM3", dim_model_base=8, **latent)
    assert model.config.logits_scaling == 3.0
    assert logit_rule(model) == LogitRule(1.0, 0.0, V)
    assert_equals_own_logits(model, batch)


class Reworked(transformers.LlamaForCausalLM):
    """A Llama whose forward does something to its logits that no config names."""

    @staticmethod
    def rework(logits):
        return logits

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = self.rework(out.logits)
        return out


def reworked(rework):
    config = transformers.LlamaConfig(**SIZES)
    torch.manual_seed(0)
    model = Reworked(config).eval()
    model.rework = rework
    return model


def test_rows_of_the_head_beyond_the_vocabulary_take_no_part(batch):
    model = reworked(lambda logits: logits[..., : V - 4])
    batch["labels"].masked_fill_(batch["labels"] >= V - 4, -100)
    assert logit_rule(model) == LogitRule(1.0, 0.0, V - 4)
    assert_equals_own_logits(model, batch)


@pytest.mark.parametrize(
    "rework",
    [
        lambda logits: 1.01 * logits,
        lambda logits: 30.0 * torch.tanh(logits / 30.0),
        lambda logits: logits - logits.mean(-1, keepdim=True),
        lambda logits: logits.where(torch.arange(V) != 7, -1e9),
    ],
    ids=["scale", "softcap", "centred", "a token forbidden"],
)
def test_logits_that_the_config_does_not_explain_are_refused(rework):
    with pytest.raises(
        ValueError, match=r"logits of Reworked must be a scale and softcap of hidden W\^T \+ b that its config names"
    ):
        patch(reworked(rework))


def test_a_model_in_training_with_dropout_is_recognised_and_left_as_it_was():
    model = tiny("Phi", resid_pdrop=0.5, embd_pdrop=0.5).train()
    state = torch.get_rng_state()
    logit_rule(model)
    assert torch.equal(state, torch.get_rng_state())
    assert all(part.training for part in model.modules())
    assert not model.lm_head._forward_pre_hooks


# ---- the logits never exist ------------------------------------------------------------------------------------------
def largest_allocation(run):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    return max(event.self_cpu_memory_usage for event in profile.events())


@pytest.mark.parametrize("with_advantages", [True, False])
def test_the_logits_never_exist(with_advantages):
    """No single allocation, forward or backward, reaches their size, and the head's own forward sees no row."""
    model, rows = tiny(vocab_size=4001), 96
    ids = torch.randint(2, 4001, (2, rows // 2))
    policy = {"advantages": torch.randn(2, rows // 2)} if with_advantages else {}
    seen = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.numel()))
    logits_bytes = 4 * rows * 4001
    assert largest_allocation(lambda: model(input_ids=ids, labels=ids).loss.backward()) >= logits_bytes
    with patch(model, chunk_rows=16):
        seen.clear()
        assert largest_allocation(lambda: model(input_ids=ids, labels=ids, **policy).loss.backward()) < logits_bytes / 2
    assert seen == [0]


# ---- plain calls, undo -----------------------------------------------------------------------------------------------
def test_calls_without_labels_are_the_models_own(batch):
    model = tiny("Gemma2")
    before = model(**batch["inputs"])
    generated = model.generate(batch["inputs"]["input_ids"][:, :4], max_new_tokens=5, do_sample=False)
    with patch(model):
        after = model(**batch["inputs"])
        assert type(after) is type(before)
        assert torch.equal(after.logits, before.logits)
        assert torch.equal(model(batch["inputs"]["input_ids"], batch["inputs"]["attention_mask"]).logits, before.logits)
        assert torch.equal(
            model.generate(batch["inputs"]["input_ids"][:, :4], max_new_tokens=5, do_sample=False), generated
        )
        assert model(batch["inputs"]["input_ids"], labels=batch["labels"], return_dict=False)[0].dim() == 0


def test_undo_leaves_class_and_instance_as_they_were():
    model, function = tiny(), transformers.LlamaForCausalLM.forward
    attributes, signature = set(vars(model)), inspect.signature(model.forward)
    patched = patch(model)
    assert transformers.LlamaForCausalLM.forward is function
    assert {"advantages", "turn_ids", "shift_labels"} <= set(inspect.signature(model.forward).parameters)
    patched.undo()
    assert set(vars(model)) == attributes
    assert model.forward.__func__ is function
    assert inspect.signature(model.forward) == signature
    wrapped = model.forward = lambda *args, **kwargs: function(model, *args, **kwargs)  # as accelerate's hooks do
    with patch(model):
        assert model.forward is not wrapped
    assert model.forward is wrapped


def test_undo_and_patch_keep_an_order():
    model = tiny()
    patched = patch(model)
    with pytest.raises(ValueError, match="must not be patched already, undo that first, got 'LlamaForCausalLM'"):
        patch(model)
    model.forward = lambda: None
    with pytest.raises(ValueError, match="undo what replaced the forward of the model first"):
        patched.undo()


def test_a_deep_copy_scores_with_its_own_head(batch):
    """A reference model is often a copy of the patched policy."""
    model = tiny()
    with patch(model):
        twin = copy.deepcopy(model)
        with torch.no_grad():
            model.lm_head.weight.mul_(3.0)
        own, other = (m(**batch["inputs"], labels=batch["labels"]).loss for m in (model, twin))
    assert not torch.isclose(own, other)
    torch.testing.assert_close(other, tiny()(**batch["inputs"], labels=batch["labels"]).loss)


# ---- labels and per-token arguments ----------------------------------------------------------------------------------
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
        with pytest.raises(ValueError, match=r"needs labels or shift_labels, got \['advantages'\]"):
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


# ---- heads -----------------------------------------------------------------------------------------------------------
class Quantized(torch.nn.Linear):
    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight.round(decimals=1))


def test_heads_that_are_no_plain_linear_layer_are_refused():
    model = tiny()
    model.lm_head = Quantized(24, V, bias=False)
    with pytest.raises(
        ValueError, match=r"must be a torch\.nn\.Linear, or LoRA or modules_to_save of peft over one, got '.*Quantized'"
    ):
        patch(model)
    with pytest.raises(ValueError, match=r"must be a causal LM with an output head .*got .*LlamaModel"):
        patch(tiny().model)
    with pytest.raises(ValueError, match="patch the model after its weights are there"):
        patch(tiny().to("meta"))


def with_lora(model, **changes):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    settings = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "lm_head"], "init_lora_weights": False, **changes}
    return peft.get_peft_model(model, peft.LoraConfig(**settings)).eval()


@pytest.mark.parametrize("family", ["Llama", "Phi", "Gemma2"])
def test_lora_on_the_head_of_a_frozen_model(family, batch):
    model = with_lora(tiny(family))
    assert not model.get_base_model().lm_head.base_layer.weight.requires_grad
    assert_equals_own_logits(model, batch)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_rslora": True},
        {"lora_bias": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"]},
    ],
    ids=["rslora", "lora_bias", "modules_to_save", "not on the head"],
)
def test_other_adapters(changes, batch):
    model = with_lora(tiny("Phi"), **changes)
    for name, parameter in model.named_parameters():
        if "lora" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    assert_equals_own_logits(model, batch)


def test_adapters_given_after_the_patch_two_of_them_switched_off_and_merged(batch):
    call = {**batch["inputs"], "labels": batch["labels"]}
    base = tiny()
    with patch(base):
        model = with_lora(base)
        peft = sys.modules["peft"]
        model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
        model.base_model.set_adapter(["default", "second"])
        both = model(**call).loss
        with model.disable_adapter():
            none = model(**call).loss
        model.merge_adapter()
        merged = model(**call).loss
        model.unmerge_adapter()
    torch.testing.assert_close(both, model(**call).loss)
    torch.testing.assert_close(merged, both)
    torch.testing.assert_close(none, tiny()(**call).loss)
    assert not torch.isclose(both, none)


def test_lora_dropout_on_the_head_is_that_of_peft(batch):
    """The adapter's input is dropped, never the head's: one seed, one loss."""
    model = with_lora(tiny(), target_modules=["lm_head"], lora_dropout=0.5).train()
    call = {**batch["inputs"], "labels": batch["labels"]}
    torch.manual_seed(5)
    expected = model(**call).loss
    with patch(model):
        torch.manual_seed(5)
        torch.testing.assert_close(model(**call).loss, expected)
        assert not torch.isclose(model(**call).loss, expected)


def test_a_small_lora_update_survives_half_precision():
    """A sum of a bfloat16 weight and a small update would be the weight again."""
    head = with_lora(tiny().bfloat16(), target_modules=["lm_head"]).get_base_model().lm_head
    with torch.no_grad():
        head.lora_B["default"].weight.mul_(1e-3)
    hidden = torch.randn(50, 24).bfloat16()
    x, weight, _ = linear_of(head, hidden)
    change = x.double() @ weight.double().t() - hidden.double() @ head.base_layer.weight.double().t()
    A, B = head.lora_A["default"].weight.double(), head.lora_B["default"].weight.double()
    expected = hidden.double() @ A.t() @ B.t() * head.scaling["default"]
    assert (change - expected).norm() < 0.02 * expected.norm()


def test_dora_on_the_head_is_refused():
    with pytest.raises(ValueError, match=r"LoRA of the head must be plain .*got 'default'"):
        patch(with_lora(tiny(), use_dora=True))


def test_the_loss_of_a_router_is_added_as_the_model_adds_it(batch):
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "output_router_logits": True}
    model = tiny("Qwen3Moe", router_aux_loss_coef=0.5, **experts)
    call = {**batch["inputs"], "labels": batch["labels"]}
    own = model(**call)
    with patch(model):
        out = model(**call)
        scored = model(**call, advantages=torch.ones(B, L))
    torch.testing.assert_close(out.aux_loss, own.aux_loss)
    for loss in (out.loss, scored.loss):
        torch.testing.assert_close(loss, own.loss)
    assert own.aux_loss > 0.1


# ---- the host --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("found", ["4.57.1", None])
def test_a_missing_or_old_host_is_one_line(found, monkeypatch):
    found_is(monkeypatch, found)
    if found is None:
        monkeypatch.setitem(sys.modules, "transformers", None)
    needed = (
        rf"^ppg_fast\.integrations\.transformers needs transformers >= 5\.10, found {found or 'none'}: pip install "
    )
    with pytest.raises(ImportError, match=needed + "'transformers>=5.10'$"):
        importlib.import_module("ppg_fast.integrations.transformers")
