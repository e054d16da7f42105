"""README.md of a run folder, and the model card beside the weights: for people who have only these."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ppg_fast.config import TrainConfig

WHAT = {
    "metrics.jsonl": (
        "one line a step: `phase` is `imitation`, `train` or `eval`; the names are explained in "
        "docs/training.md of ppg_fast"
    ),
    "samples.jsonl": (
        "one line an answer: prompt, answer, reward, return and advantage of its turn; "
        "`pandas.read_json(..., lines=True)`"
    ),
    "samples_before.md": "held-out dialogues before training, to read",
    "samples_after.md": "the same after it",
    "learning_curve.png": "training and held-out curve",
    "turns.png": "return and advantage by turn index, at the beginning and at the end of training",
    "checkpoint": "the trained model, its config and tokenizer, as transformers loads them",
    "checkpoints": "the whole state of the run, for `--resume`; can be deleted once the run is over",
    "trackers": "what tensorboard or wandb keep on disk",
    "rollouts": "dialogues of each step, in the format of logged ones: `ppg-fast rate` shows them",
    "reward_model": "what people's ratings made of the reward model: `--reward model:FOLDER` reads it",
    "not_finite.jsonl": "the dialogues of the steps whose loss or gradient was not finite",
    "config.yaml": "every setting; `ppg-fast train --config config.yaml --output-dir OTHER` runs it again",
    "summary.json": "how it ended, in numbers",
    ".ppg_fast.json": "which files the run wrote, so that `--overwrite` takes no others",
}
RARE = ("trackers", "not_finite.jsonl", "rollouts", "reward_model")
ENDED = {
    "finished": "It ran to its end.",
    "stopped": "It was stopped by hand (Ctrl-C); what was done is here, and `--resume` goes on.",
    "terminated": "It was told to end (SIGTERM, SIGHUP); what was done is here, and `--resume` goes on.",
    "failed": "It failed; what was saved of it is here, and `--resume` goes on from the newest checkpoint.",
}
RUNNING = "It is running, or was killed: there is no summary yet. `--resume` goes on from the newest checkpoint."
LOAD = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{where}")
tokenizer = AutoTokenizer.from_pretrained("{where}")
```
"""


def write_readme(path: Path, config: TrainConfig, description: str, summary: Mapping[str, Any] | None) -> None:
    """README.md of the run folder. ``description``: a sentence on what was trained; ``summary`` is None while it
    runs."""
    status = ENDED.get(summary["status"], str(summary["status"])) if summary else RUNNING
    if summary and summary.get("error"):
        status += f" What it said: {summary['error']}"
    lines = [f"# {path.resolve().name}: a training run of ppg_fast", "", f"{description} {status}".lstrip(), ""]
    if summary:
        lines += [*_results(summary), ""]
    lines += ["| file | what it is |", "|---|---|"]
    here = {
        name: text for name, text in WHAT.items() if (path / name).exists() or (summary is None and name not in RARE)
    }
    lines += [f"| `{name}{'' if '.' in name else '/'}` | {text} |" for name, text in here.items()]
    lines += ["", "## Load the model", "", LOAD.format(where="checkpoint").rstrip(), ""]
    lines += [
        "## Go on, or again",
        "",
        "```",
        f"ppg-fast train --resume {config.output_dir}",
        "ppg-fast train --config config.yaml ",
    ]
    lines[-1] += "--output-dir runs/again"
    (path / "README.md").write_text("\n".join([*lines, "```", ""]), encoding="utf-8")


def write_model_card(checkpoint: Path, config: TrainConfig, description: str, summary: Mapping[str, Any]) -> None:
    """README.md beside the weights, with the front matter that the Hub reads; nothing where there are no weights."""
    if not checkpoint.is_dir():
        return
    base = [f"base_model: {config.model}"] if config.model and not Path(config.model).exists() else []
    library = "peft" if config.lora_rank else "transformers"
    front = [f"library_name: {library}", "pipeline_tag: text-generation", *base]
    tags = ["ppg_fast", "reinforcement-learning", "partial-policy-gradients"]
    lines = ["---", *front, "tags:", *(f"- {tag}" for tag in tags), "---", "", "# A policy trained with ppg_fast", ""]
    named = Path(config.model or "").name
    adapters = (
        f"These are LoRA adapters of rank {config.lora_rank} for the base model `{named}`; without it they are no"
    )
    adapters += f" model. `ppg-fast merge . -o OUTPUT --base {named}` makes one of the two."
    lines += [*([adapters, ""] if config.lora_rank else [])]
    lines += [
        description,
        "",
        *_results(summary),
        "",
        LOAD.format(where="."),
        "Settings of the run:",
        "",
        "| | |",
        "|---|---|",
    ]
    shown = (
        "policy_class",
        "gamma",
        "baseline",
        "loss_type",
        "reduction",
        "max_steps",
        "num_prompts",
        "num_generations",
        "learning_rate",
    )
    lines += [f"| `{name}` | {getattr(config, name)} |" for name in (*shown, "seed")]
    source = "Partial policy gradients credit each turn of a dialogue for a chosen subset of the future rewards"
    lines += ["", f"{source} ([arXiv:2603.06138](https://arxiv.org/abs/2603.06138)).", ""]
    (checkpoint / "README.md").write_text("\n".join(lines), encoding="utf-8")


def _results(summary: Mapping[str, Any]) -> list[str]:
    """One line on the steps, and a table of what was evaluated before and after."""
    spent = f"{summary['steps']} steps in {summary['seconds']:,.0f} s on {summary.get('device', 'unknown')}"
    lines = [f"{spent}, {summary.get('parameters', 0):,} parameters, torch {summary.get('torch', 'unknown')}."]
    names = [name.removesuffix("/start") for name in summary if name.endswith("/start")]
    if names:
        lines += ["", "| held-out | before | after |", "|---|---:|---:|"]
        lines += [f"| `{name}` | {summary[f'{name}/start']:.4g} | {summary[f'{name}/end']:.4g} |" for name in names]
    return lines
