"""Tiny models, scripted rollouts and trainers for the tests of the TRL integration: offline, the same numbers every
run, on any rank."""

from __future__ import annotations

import copy
import os
import random
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from ppg_fast.integrations.trl import PPGConfig, PPGTrainer

os.environ["HF_HUB_OFFLINE"] = os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
VOCABULARY = 61
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 128, "eos_token_id": 1, "pad_token_id": 0,
    "bos_token_id": None,
    "initializer_range": 0.3,
}  # fmt: skip
# what their heads add: nothing, tied weights, a softcap, a scale, both kinds of scale, a bias, experts
ARCHITECTURES = {
    "Qwen3": {},
    "Llama": {"tie_word_embeddings": True},
    "Gemma2": {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8},
    "Granite": {"logits_scaling": 2.5},
    "Cohere": {"logit_scale": 0.375},
    "Phi": {},
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "output_router_logits": True,
                 "router_aux_loss_coef": 0.5},
}  # fmt: skip


def make_model(architecture: str = "Qwen3", **changes: Any) -> Any:
    config = getattr(transformers, f"{architecture}Config")(**{**SIZES, **ARCHITECTURES[architecture], **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        model = getattr(transformers, f"{architecture}ForCausalLM")(config)
        if model.get_output_embeddings().bias is not None:
            torch.nn.init.normal_(model.get_output_embeddings().bias)
    return model


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(VOCABULARY - 3))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>", "padding_side": "left"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def make_chat_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and the chat template of Qwen3 with its tool calls as TRL ships it."""
    from trl.chat_template_utils import qwen3_chat_template

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens(["<tool_call>", "</tool_call>", "<think>", "</think>"])
    names = {"pad_token": "<pad>", "eos_token": "<|im_end|>", "padding_side": "left"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=qwen3_chat_template, **names)


class ScriptedRollouts:
    """A rollout_func of 1 to ``turns`` turns with replies of the environment between them, a function of the step and
    the global row."""

    def __init__(self, turns: int, with_rewards: bool = True, with_turn_ids: bool = False) -> None:
        self.turns, self.with_rewards, self.with_turn_ids = turns, with_rewards, with_turn_ids
        self.calls = 0
        self.given: list[dict[str, list[Any]]] = []  # what each call returned

    def __call__(self, prompts: list[str], trainer: Any) -> dict[str, list[Any]]:
        first = trainer.accelerator.process_index * len(prompts)
        rows = [self.row(self.calls * 1009 + first + i) for i in range(len(prompts))]
        self.calls += 1
        self.given.append({key: [row[key] for row in rows] for key in rows[0]})
        return {
            "prompt_ids": [trainer.processing_class(p)["input_ids"] for p in prompts],
            **copy.deepcopy(self.given[-1]),
        }

    def row(self, seed: int) -> dict[str, Any]:
        draw = random.Random(seed)
        turns = draw.randint(1, self.turns)
        mask, ids = [], []
        for turn in range(turns):
            written, reply = (
                draw.randint(1, 4),
                0 if turn == turns - 1 or (self.with_turn_ids and draw.random() < 0.5) else draw.randint(1, 3),
            )
            mask += [1] * written + [0] * reply
            ids += [turn] * written + [-1] * reply
        tokens = [draw.randrange(3, VOCABULARY) for _ in mask[1:]] + [1]
        row = {"completion_ids": tokens, "logprobs": [-1.0] * len(mask), "env_mask": mask}
        row |= {"turn_rewards": [draw.choice([0.0, 1.0, 2.5, -1.5]) for _ in range(turns)]} if self.with_rewards else {}
        return row | ({"turn_ids": ids} if self.with_turn_ids else {})


def token_reward(prompts: list[str], completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A scalar reward that differs inside most groups, and not inside that of the prompt "w5"."""
    return [1.0 if prompt == "w5" else sum(ids) % 7 / 3 for prompt, ids in zip(prompts, completion_ids, strict=True)]


class Recorded:
    """Keeps the advantages and the loss mask of every generation batch and the loss of every micro-batch."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.batches: list[dict[str, torch.Tensor]] = []
        self.losses: list[float] = []
        super().__init__(*args, **options)

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        output = super()._generate_and_score_completions(inputs)
        mask = output["completion_mask"] * output.get("tool_mask", 1)
        self.batches.append({"advantages": output["advantages"].clone(), "mask": mask})
        return output

    def _compute_loss(self, model: Any, inputs: Any) -> Any:
        loss = super()._compute_loss(model, inputs)
        self.losses.append(loss.item())
        return loss


class RecordedGRPO(Recorded, GRPOTrainer):
    pass


class RecordedPPG(Recorded, PPGTrainer):
    pass


def make_trainer(
    folder: Path, kind: type, model: Any, rollouts: Any, reward_funcs: Any = None, extra: Any = None, **options: Any
) -> Any:
    """A trainer of 3 steps on two prompts; ``extra`` goes to the trainer, ``options`` to its config.

    It seeds every generator, and batches are shuffled: train one before the next is made. SGD, because Adam makes a
    step of the noise in a gradient that is zero.
    """
    config = PPGConfig if issubclass(kind, PPGTrainer) else GRPOConfig
    defaults = {
        "per_device_train_batch_size": 4, "num_generations": 4, "gradient_accumulation_steps": 2,
        "max_completion_length": 48,
        "max_steps": 3, "learning_rate": 0.1, "lr_scheduler_type": "constant", "optim": "sgd", "report_to": [],
        "logging_steps": 1,
        "use_cpu": True, "bf16": False, "save_strategy": "no", "gradient_checkpointing": False, "disable_tqdm": True,
        "shuffle_dataset": False, "temperature": 0.8,
    }  # fmt: skip
    args = config(output_dir=str(folder), **{**defaults, **options})
    data = Dataset.from_dict({"prompt": ["w1 w2 w3", "w5"] * 8})
    given = {
        "train_dataset": data,
        "eval_dataset": data,
        "processing_class": make_tokenizer(),
        "rollout_func": rollouts,
    }
    return kind(model=model, reward_funcs=reward_funcs, args=args, **{**given, **(extra or {})})


def train(*args: Any, **options: Any) -> Any:
    trainer = make_trainer(*args, **options)
    trainer.train()
    return trainer


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}
