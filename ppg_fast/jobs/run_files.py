"""The files of a run: what it may write and therefore remove, and how those of a run without a list are known."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ppg_fast.config import read_yaml

CONFIG = "config.yaml"
# of a model's folder, as save_pretrained names them; what else lies there is the user's
MODEL_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*config.json",
    "tokenizer*",
    "*.jinja",
    "vocab*",
    "merges*",
)
FILES = {  # name: what is told of it, in docs/training.md
    "metrics.jsonl": "lines",
    "samples.jsonl": "lines",
    "not_finite.jsonl": "lines",
    "samples_before.md": "page",
    "samples_after.md": "page",
    "README.md": "page",
    "learning_curve.png": "picture",
    "turns.png": "picture",
    "summary.json": "summary",
    CONFIG: "settings",
}
CHECKPOINT = "checkpoint"  # its other files are listed one by one, before they are there
FOLDERS = (
    f"{CHECKPOINT}/README.md",
    *(
        "rollouts/step-*.jsonl",
        "rollouts/ratings-*.jsonl",
        "checkpoints/step-*",
        "checkpoint.new",
        "reward_model/.new",
        "trackers/run_id",
        "trackers/tensorboard",
        "trackers/wandb",
    ),
    *(f"{folder}/{name}" for folder in ("sampler", "reward_model") for name in MODEL_FILES),
)
ENTRIES = (*FILES, *FOLDERS)


def recognise(folder: Path) -> list[str]:
    """The entries of a run that began before there were lists: files of our names that hold what ours hold."""
    try:
        settings = read_yaml(str(folder / CONFIG)) if (folder / CONFIG).is_file() else {}
    except ValueError:
        return []
    if not {"output_dir", "policy_class", "loss_type", "max_steps"} <= settings.keys():
        return []
    files = [name for name in FILES if (folder / name).is_file() and _LOOKS[FILES[name]](folder / name)]
    model = (f"{CHECKPOINT}/{name}" for name in (*MODEL_FILES, "adapter_model*"))
    return [*files, *FOLDERS, *model]


def _lines(path: Path) -> bool:
    with open(path, "rb") as file:
        first = file.readline()
    return not first or ({"step"} < _object(first).keys() and bool({"phase", "turn_ids"} & _object(first).keys()))


def _page(path: Path) -> bool:
    with open(path, encoding="utf-8", errors="replace") as file:
        first = file.readline().strip()
    return first.endswith(": a training run of ppg_fast") or (
        first.startswith("# Dialogues ") and first.endswith(" training")
    )


def _picture(path: Path) -> bool:
    head = path.read_bytes()[:1000]
    return head.startswith(b"\x89PNG") and b"Matplotlib" in head


def _summary(path: Path) -> bool:
    return {"status", "policy_class", "loss_type"} <= _object(path.read_bytes()).keys()


def _object(text: bytes) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


_LOOKS: dict[str, Callable[[Path], bool]] = {
    "lines": _lines,
    "page": _page,
    "picture": _picture,
    "summary": _summary,
    "settings": Path.is_file,
}
