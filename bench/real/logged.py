"""Offline on files of logged dialogues with SmolLM2 and LoRA: what a user would check before trusting a run."""

import os
import shutil
from pathlib import Path
from typing import Any

from . import command, speech
from .models import SMOLLM2, folder

SETTINGS: dict[str, Any] = {
    "policy_class": "lookahead:3",
    "lora_rank": 16,
    "lora_target_modules": ".*layers[.]2[0-9][.].*_proj",
    "learning_rate": 2e-3,
    "warmup_steps": 1,
    "max_steps": 6,
    "num_prompts": 2,
    "max_dialogue_tokens": 320,
    "max_new_tokens": 12,
    "max_turns": 1,
    "eval_every": 6,
    "eval_dialogues": 3,
    "save_every": 0,
    "threads": 1,
    "seed": 100,
}
QUESTION = [{"role": "user", "content": "I had a hard week and I do not sleep well."}]


def measure(arguments: Any) -> dict[str, Any]:
    """Every file of ``--data``."""
    settings = {**SETTINGS, **arguments.set}
    return {"settings": settings, "files": [_one(Path(f), settings, Path(arguments.work)) for f in arguments.data]}


def _one(data: Path, settings: dict[str, Any], work: Path) -> dict[str, Any]:
    """A run on a file, the same one stopped half-way, and what comes out of it."""
    work.mkdir(parents=True, exist_ok=True)
    model, load = folder(SMOLLM2), os.getloadavg()[0]
    given = command.flags({"data": str(data.resolve()), "model": str(model), **settings})
    whole, halved, merged = (work / f"logged-{name}" for name in ("whole", "halved", "merged"))
    for place in (whole, halved, merged):
        shutil.rmtree(place, ignore_errors=True)
    own, log = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}, work / "logged.log"
    log.unlink(missing_ok=True)
    train = ["ppg_fast", "train", "--no-progress", *given, "--output-dir"]
    ran = command.run([*train, str(whole)], own, log)
    half = settings["max_steps"] // 2
    command.run([*train, str(halved)], own, log, lambda: len(command.rows(halved, "train")) >= half)
    stopped = len(command.rows(halved, "train"))
    command.run(["ppg_fast", "train", "--no-progress", "--resume", str(halved)], own, log)
    command.run(["ppg_fast", "merge", str(whole), "-o", str(merged)], own, log)
    return {
        "data": data.name,
        "seconds": ran.seconds,
        "cpu_seconds": ran.cpu_seconds,
        "peak_bytes": ran.peak_bytes,
        "load_before": round(load, 2),
        "points": [{"step": row["step"], "logprob": row["eval/logprob"]} for row in command.rows(whole, "eval")],
        "losses": [row["loss"] for row in command.rows(whole, "train")],
        "stopped_after": stopped,
        "resumed_alike": same_weights(whole / "checkpoint", halved / "checkpoint"),
        "merge_error": merge_error(model, whole / "checkpoint", merged),
        "turns": masks(data, model, settings["max_dialogue_tokens"]),
        "asked": QUESTION[-1]["content"],
        "before": speech.answered(model, QUESTION, 32),
        "after": speech.answered(merged, QUESTION, 32),
    }


def same_weights(one: Path, other: Path) -> bool:
    """Whether two folders hold the same weights, to the bit."""
    names = sorted(path.name for path in one.glob("*.safetensors"))
    there = sorted(path.name for path in other.glob("*.safetensors"))
    return bool(names) and names == there and all((one / n).read_bytes() == (other / n).read_bytes() for n in names)


def merge_error(base: Path, adapter: Path, merged: Path) -> dict[str, float]:
    """The largest difference of log-probs between the model with its adapters and the merged one, and what the adapters
    changed at all."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(base)(QUESTION[0]["content"], return_tensors="pt")["input_ids"]
    load = lambda place: AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()  # noqa: E731
    with torch.inference_mode():
        plain, whole = (load(place)(tokens).logits.log_softmax(-1) for place in (base, merged))
        adapted = PeftModel.from_pretrained(load(base), str(adapter))(tokens).logits.log_softmax(-1)
    return {"merged": float((whole - adapted).abs().max()), "trained": float((plain - adapted).abs().max())}


def masks(data: Path, model: Path, max_tokens: int) -> dict[str, int]:
    """Turns whose trained tokens, decoded by plain transformers, are the logged answer and one end token; and all turns
    that are read whole."""
    from transformers import AutoTokenizer

    from ppg_fast.dialogues.chat_format import ChatFormat
    from ppg_fast.dialogues.dialogue import read_dialogues
    from ppg_fast.dialogues.encoding import encode_dialogue

    tokenizer = AutoTokenizer.from_pretrained(model)
    chat, counts = ChatFormat(tokenizer), {"read": 0, "exact": 0, "dialogues": 0}
    for dialogue in read_dialogues(str(data)):
        sample = encode_dialogue(chat, dialogue, max_tokens)
        answers = [m.content for m in dialogue.messages if m.role == "assistant"]
        counts["dialogues"] += 1
        for turn in range(max(sample.turn_ids, default=-1) + 1):
            trained = [t for t, of in zip(sample.tokens, sample.turn_ids, strict=True) if of == turn]
            if trained[-1] != tokenizer.eos_token_id:
                continue  # cut by the bound on tokens
            counts["read"] += 1
            counts["exact"] += tokenizer.decode(trained[:-1]) == answers[turn]
    return counts
