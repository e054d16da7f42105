"""On-policy on persona interviews with SmolLM2: train, be stopped, go on, merge, and speak by plain transformers."""

import importlib.util
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from . import command, speech
from .models import MINILM, SMOLLM2, folder

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples/persona"
SEEDS = (100, 101, 102)
SETTINGS: dict[str, Any] = {
    "policy_class": "lookahead:3",
    "lora_rank": 16,
    "lora_target_modules": ".*layers[.]2[0-9][.].*_proj",  # the last ten of thirty layers: half of the backward pass
    "learning_rate": 5e-3,
    "warmup_steps": 1,
    "max_steps": 20,
    "num_prompts": 4,
    "num_generations": 4,
    "max_turns": 3,
    "max_new_tokens": 8,
    "eval_every": 5,
    "eval_dialogues": 10,
    "save_every": 0,
    "threads": 1,
}
SHOWN = 2  # dialogues before and after


def environment() -> dict[str, str]:
    """Of a run: one thread, no network, and where the reward finds its encoder."""
    own = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    return {**own, "EMBEDDER": str(folder(MINILM))}


def measure(arguments: Any) -> dict[str, Any]:
    """One run a seed, with the settings that ``--set`` changes."""
    settings, work = {**SETTINGS, **arguments.set}, Path(arguments.work)
    prompts = work / "prompts.jsonl"
    prompts.parent.mkdir(parents=True, exist_ok=True)
    prompts.write_text("".join(json.dumps(line) + "\n" for line in _openings()))
    model = folder(SMOLLM2)
    reward = f"{EXAMPLE / 'rewards.py'}:persona"
    fixed = {"prompts": str(prompts), "model": str(model), "reward": reward}
    runs = [_once(seed, fixed, settings, work / f"persona-{seed}") for seed in arguments.seeds or SEEDS]
    return {"settings": settings, "runs": runs}


def _once(seed: int, fixed: dict[str, Any], settings: dict[str, Any], place: Path) -> dict[str, Any]:
    """A run with these settings, or what it gave if it has been done in this folder."""
    kept = place.with_suffix(".json")
    if kept.exists() and (done := json.loads(kept.read_text()))["settings"] == settings:
        return done["run"]
    run = _run(seed, {**fixed, **settings}, place)
    kept.write_text(json.dumps({"settings": settings, "run": run}))
    return run


def _openings() -> Any:
    spec = importlib.util.spec_from_file_location("persona_prompts", EXAMPLE / "prompts.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.lines()


def _run(seed: int, settings: dict[str, Any], place: Path) -> dict[str, Any]:
    """A run; that of the first seed is stopped after its first evaluation under way, goes on, and then speaks."""
    load, log, first = os.getloadavg()[0], place.with_suffix(".log"), seed == SEEDS[0]
    shutil.rmtree(place, ignore_errors=True)
    log.unlink(missing_ok=True)
    train = ["ppg_fast", "train", "--no-progress", "--seed", str(seed), "--output-dir", str(place)]
    train += command.flags(settings)
    ran = command.run(train, environment(), log, (lambda: len(command.rows(place, "eval")) > 1) if first else None)
    stopped = len(command.rows(place, "train"))
    if first:
        ran += command.run(["ppg_fast", "train", "--no-progress", "--resume", str(place)], environment(), log)
    return {
        "seed": seed,
        "points": points(place),
        "returns": [{"step": row["step"], "reward": row["reward"]} for row in command.rows(place, "train")],
        "seconds": ran.seconds,
        "cpu_seconds": ran.cpu_seconds,
        "peak_bytes": ran.peak_bytes,
        "load_before": round(load, 2),
        "dialogues": {when: dialogues(place, when) for when in ("before", "after")},
        **({"stopped_after": stopped, **_spoken(settings, place, log)} if first else {}),
    }


def _spoken(settings: dict[str, Any], place: Path, log: Path) -> dict[str, str]:
    """What plain transformers answers to the first opening, before and from what was saved, adapters merged."""
    whole, merged = place / "checkpoint", place.with_name(f"{place.name}-merged")
    if settings.get("lora_rank"):
        shutil.rmtree(merged, ignore_errors=True)
        command.run(["ppg_fast", "merge", str(place), "-o", str(merged)], environment(), log)
        whole = merged
    question = _question(settings["prompts"])
    before, after = (speech.answered(folder, question) for folder in (Path(settings["model"]), whole))
    return {"asked": question[-1]["content"], "before": before, "after": after}


def points(place: Path) -> list[dict[str, Any]]:
    """Held-out return by step, with the seconds of the run at which it was known."""
    found = command.rows(place, "eval")
    return [{"step": row["step"], "reward": row["eval/reward"], "seconds": row["seconds"]} for row in found]


def dialogues(place: Path, when: str) -> list[str]:
    """The first held-out dialogues of the run's page of samples, one block of text each."""
    text = (place / f"samples_{when}.md").read_text()
    return [part.strip() for part in re.split(r"(?m)^## ", text)[1 : SHOWN + 1]]


def _question(prompts: str) -> list[dict[str, str]]:
    """The opening of the first prompt, as plain transformers takes it."""
    with open(prompts) as file:
        messages = json.loads(file.readline())["messages"]
    return messages[:2]
