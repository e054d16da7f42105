"""Dialogues of several turns through `ppg-fast train`, offline and on-policy, in the chat templates of the models that
people train: what a step trains, and what the model is asked, are what an oracle on transformers alone says."""

import json

import pytest

transformers = pytest.importorskip("transformers")
import torch
from chat_case import folder, tokenizer_of
from template_oracle import expected
from template_shapes import ANSWER, ASK, BYE, GO, SHAPES, tools_of
from test_cli import rows, write

from ppg_fast.cli import main

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
SIZES |= {"num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 8192}
FAMILIES = {  # template, the family's own model where it is made of layers that are trained here, a second dialogue
    "Qwen2.5": ("qwen2_5", "Qwen2Config", "two tools"),
    "Qwen3": ("qwen3", "Qwen3Config", "thinking"),
    "Qwen3.5": ("qwen3_5_think", "Qwen3Config", "one tool"),
    "Llama 3.2": ("llama3_2", "LlamaConfig", "call alone"),
    "Gemma 2": ("gemma", "Gemma2Config", "spaces"),
    "Gemma 3": ("gemma3", "Gemma3TextConfig", "system"),
    "Mistral": ("mistral", "MistralConfig", "call alone"),
    "Phi-3": ("phi3", "Phi3Config", "system"),
    "Phi-4": ("phi4", "Phi3Config", "two assistants"),
    "gpt-oss": ("gptoss", "Qwen3Config", "thinking"),
    "SmolLM2": ("smollm2", "LlamaConfig", "two users"),
    "DeepSeek-R1 distill": ("deepseek_r1_distill", "Qwen2Config", "empty answer"),
}
FLAGS = ["--num-prompts", "2", "--num-generations", "2", "--max-new-tokens", "3", "--max-turns", "2"]
FLAGS += ["--max-steps", "1", "--eval-every", "1", "--eval-dialogues", "1", "--no-progress"]
REWARD = "def letters(messages):\n    return float(sum(messages[-1]['content'].encode()) % 97)\n"

if folder() is None:
    pytest.skip("TRL's package carries the templates", allow_module_level=True)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, tmp_path_factory):
    """(folder of a checkpoint of random weights, its tokenizer, template, second dialogue)."""
    name, config, shape = FAMILIES[request.param]
    path, tokenizer = tmp_path_factory.mktemp("model"), tokenizer_of(name)
    ids = {"pad_token_id": 0, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    made = getattr(transformers, config)(vocab_size=len(tokenizer), **SIZES, **ids)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(made).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path), tokenizer, name, shape


def logged(number, messages):
    turns = sum(message["role"] == "assistant" for message in messages)
    record = {"id": f"d{number}", "group_id": "g", "messages": messages, "turn_rewards": [1.0 + number] * turns}
    return record | ({"tools": tools_of(messages)} if tools_of(messages) else {})


def test_offline_each_turn_of_each_dialogue_is_trained(model, tmp_path, capsys):
    path, tokenizer, name, shape = model
    talks = [[ASK, ANSWER, GO, BYE], SHAPES[shape]]
    data = write(tmp_path / "d.jsonl", [logged(n, talk) for n, talk in enumerate(talks)])
    out = tmp_path / "out"
    assert main(["train", "--data", str(data), "--model", path, "--output-dir", str(out), *FLAGS]) == 0
    assert "left out" not in capsys.readouterr().err
    answers = [len(tokenizer(turn.answer)["input_ids"]) for talk in talks for turn in turns(tokenizer, name, talk)]
    (step,) = rows(out, "train")
    assert step["completions/mean_length"] == sum(answers) / len(answers)
    assert (step["completions/min_length"], step["completions/max_length"]) == (min(answers), max(answers))
    assert step["grad_norm"] > 0
    assert step["skipped_steps"] == 0


def turns(tokenizer, name, talk):
    found = expected(tokenizer, name, talk)
    assert found.faults == []
    return found.turns


def test_on_policy_the_model_is_asked_what_the_template_writes(model, tmp_path):
    path, tokenizer, name, _ = model
    talk = [ASK, ANSWER, GO, BYE]
    (tmp_path / "letters.py").write_text(REWARD)
    data = write(tmp_path / "d.jsonl", [{"id": f"p{n}", "messages": talk} for n in range(2)])
    flags = ["--prompts", str(data), "--partner", "logged", "--reward", f"{tmp_path / 'letters.py'}:letters"]
    out = tmp_path / "out"
    assert main(["train", *flags, "--model", path, "--output-dir", str(out), *FLAGS]) == 0
    (step,) = rows(out, "train")
    assert step["turns/mean_count"] == 2
    assert step["sampling/sampling_logp_difference/max"] < 1e-4
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    asked = {sample["turn"]: sample["prompt"] for sample in samples if sample["phase"] == "train"}
    found = expected(tokenizer, name, talk)
    texts = [found.openings, found.replies[0]]
    plain = lambda text: tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True)  # noqa: E731
    for turn, text in asked.items():
        assert text in [plain(one) for one in texts[turn]]
    assert set(asked) == {0, 1}
