"""Peak memory of real steps next to the estimate: `python memory_case.py FOLDER NAME...` prints one JSON line a case.

One process imports everything and forks one child a case, so that a case starts from the same resident memory and with
an allocator that has no past.
"""

import json
import os
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen3Config

from ppg_fast.config import make_config
from ppg_fast.dialogues.packing import Sample
from ppg_fast.jobs.memory_estimate import estimate
from ppg_fast.jobs.policy import adapted
from ppg_fast.models.causal_lm import load_model, make_model, prepare
from ppg_fast.models.frozen_teacher import FrozenTeacher
from ppg_fast.policy_classes import Greedy
from ppg_fast.spec import PolicyLossSpec
from ppg_fast.training.objective import Objective, Schedule
from ppg_fast.training.trainer import TrainingState, optimise

SIZES = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
MODELS = {
    "tied": Qwen3Config(
        **SIZES, vocab_size=16000, intermediate_size=768, num_hidden_layers=6, head_dim=64, tie_word_embeddings=True
    ),
    "deep": LlamaConfig(**SIZES, vocab_size=2000, intermediate_size=640, num_hidden_layers=12),
    "window": MistralConfig(**SIZES, vocab_size=4000, intermediate_size=768, num_hidden_layers=6, sliding_window=256),
}
CASES = {  # name: model, lengths of the dialogues of a pass, settings
    "all weights": ("tied", (600, 400), {}),
    "checkpointing": ("tied", (1200,), {"activation_checkpointing": True}),
    "adapters": ("tied", (1000,), {"lora_rank": 8}),
    "adapters, checkpointing": ("tied", (1100, 700), {"lora_rank": 8, "activation_checkpointing": True}),
    # bfloat16 is emulated by most CPUs: fewer tokens
    "autocast": ("tied", (400,), {"bf16": True}),
    "reference, adafactor": ("tied", (300,), {"kl_coef": 0.1, "optim": "adafactor"}),
    "every fourth layer": (
        "deep",
        (900,),
        {"activation_checkpointing": True, "activation_checkpointing_every_n_layers": 4},
    ),
    "bfloat16": ("deep", (500,), {"dtype": "bfloat16"}),
    "window": ("window", (900,), {}),
    "teacher": ("tied", (500,), {"teacher": "tied"}),
}


def resident(line: str) -> int:
    """VmRSS, VmHWM or RssFile of this process, in bytes."""
    return next(
        1024 * int(text.split()[1])
        for text in Path("/proc/self/status").read_text().splitlines()
        if text.startswith(line)
    )


def dialogues(lengths: tuple[int, ...], vocabulary: int) -> list[Sample]:
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(vocabulary, (n,), generator=generator).tolist() for n in lengths]
    return [Sample(t, [-1, *[0] * (len(t) - 1)], [1.0], i) for i, t in enumerate(tokens)]


def take_steps(config, lengths: tuple[int, ...]) -> int:
    """Bytes of resident memory that a step of two passes adds at its peak, after a small one that made the optimizer's
    state."""
    warm_up()  # here too: a fork's page tables begin without the pages of libraries
    before, of_files = resident("VmRSS"), resident("RssFile")
    Path("/proc/self/clear_refs").write_text("5")
    model = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(config.model), dtype=getattr(torch, config.dtype)
    )
    model = adapted(prepare(model).train(), config)
    samples = dialogues(lengths, model.config.vocab_size)
    teacher = load_model(config.teacher, 1) if config.teacher else None
    taught = FrozenTeacher(teacher, model.config.vocab_size) if teacher else None
    objective = Objective(Greedy(), baseline="none", spec=PolicyLossSpec(kl_coef=config.kl_coef), teacher=taught)
    schedule = Schedule(
        2, 1e-3, optim=config.optim, optim_offload=config.optim_offload, bf16=config.bf16, max_tokens=sum(lengths)
    )
    state = TrainingState.start(model, objective, schedule)
    for _ in optimise(
        model, lambda step: samples + samples if step == 2 else dialogues((20,), 50), objective, schedule, state
    ):
        pass
    # pages of libraries come with their first touch, more or fewer of them by the state of the page cache, and stay
    return resident("VmHWM") - before - (resident("RssFile") - of_files)


def warm_up() -> None:
    """Load what the first step of a process loads."""
    model = make_model(50, 32, 1)
    objective = Objective(Greedy(), baseline="none")
    for _ in optimise(model, lambda _: dialogues((20, 10), 50), objective, Schedule(1, 1e-3)):
        pass


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    for name, model_config in MODELS.items():
        model_config.save_pretrained(folder / name)
    AutoModelForCausalLM.from_config(MODELS["tied"]).save_pretrained(folder / "tied")
    warm_up()
    for name in sys.argv[2:] or CASES:
        model_name, lengths, settings = CASES[name]
        taught = {"teacher": str(folder / settings["teacher"])} if "teacher" in settings else {}
        config = make_config({"model": str(folder / model_name), **settings, **taught})
        read, write = os.pipe()
        if not (child := os.fork()):
            os.write(write, str(take_steps(config, lengths)).encode())
            os._exit(0)
        os.close(write)
        measured = int(os.read(read, 100))
        os.close(read)
        os.waitpid(child, 0)
        found = estimate(config, sum(lengths))
        items = {k: round(v / 1e6) for k, v in found.items.items()}
        print(
            json.dumps(
                {"case": name, "estimated": found.total, "measured": measured, "phase": found.phase, "items": items}
            ),
            flush=True,
        )
