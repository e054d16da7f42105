"""Tiny causal LMs of transformers, a padded batch for them, and the loss that a patched model has to reproduce."""

import copy

import pytest
import torch
import transformers
from closeness import assert_as_good_as

import ppg_fast as ppg
from ppg_fast.integrations.transformers import patch

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


def single_thread():
    """Body of a fixture: these models are too small to share among threads."""
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


def with_lora(model, **changes):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    settings = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "lm_head"], "init_lora_weights": False, **changes}
    return peft.get_peft_model(model, peft.LoraConfig(**settings)).eval()


def make_batch():
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
