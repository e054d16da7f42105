"""Weights for others: LoRA adapters merged into their base model, a folder uploaded to the Hugging Face Hub."""

import json
from pathlib import Path
from typing import Any

ADAPTER_CONFIG = "adapter_config.json"  # peft's mark of an adapter folder
BASE = "adapter_base.json"  # ours, beside it: what `describe_base` says of the model that it was trained on


def find_adapter(path: Path) -> Path:
    """The adapter folder that ``path`` is, or that the run in ``path`` holds; ValueError where there is none."""
    for folder in (path, path / "checkpoint"):
        if (folder / ADAPTER_CONFIG).is_file():
            return folder
    if (path / "checkpoint" / "config.json").is_file():
        raise ValueError(f"merge wants adapters, and {path / 'checkpoint'} is a whole model already: nothing to merge")
    raise ValueError(f"merge wants the folder of a run or of an adapter ({ADAPTER_CONFIG}), got {str(path)!r}")


def write_base(folder: Path, model: Any) -> None:
    """Beside the adapters of ``model``, on which weights they were trained; nothing for a model without adapters."""
    if described := getattr(model, "adapted_base", None):
        (folder / BASE).write_text(json.dumps(described) + "\n", encoding="utf-8")


def _check_base(adapter: Path, model: Any, base: str, named: object) -> None:
    """ValueError where ``model`` is not the one that the adapter was trained on, as far as its folder says."""
    if not (adapter / BASE).is_file():
        return
    from ppg_fast.models.adaptation import describe_base

    described = json.loads((adapter / BASE).read_text(encoding="utf-8"))
    if describe_base(model, described["dtype"]) != described:
        rule = f"merge wants the base model that the adapter was trained on (it names {str(named)!r})"
        raise ValueError(f"{rule}, got one of other weights: {base!r}")


def merge_adapter(source: str, output: str, base: str | None = None) -> Path:
    """Write to ``output`` the base model with the adapter of ``source`` merged, and the tokenizer; returns the folder.

    ``source``: a run or an adapter folder. ``base``: the base model, by default the one that the adapter names.
    ValueError for a folder without an adapter, for a base that is not there or has other weights than the one that the
    adapter was trained on, and for an ``output`` that holds something.
    """
    from transformers import AutoTokenizer

    from ppg_fast.models.causal_lm import load_whole

    adapter, target = find_adapter(Path(source)), Path(output)
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"--output must be a new or empty folder, got {output!r}")
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ValueError("merge needs peft: pip install ppg_fast[lora]") from error
    named = json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
    base = base or named
    if not base or not Path(base, "config.json").is_file():
        raise ValueError(
            f"the adapter's base model must be a folder with a Hugging Face checkpoint (--base FOLDER), got {base!r}"
        )
    found = load_whole(base, "auto")
    _check_base(adapter, found, base, named)
    model = PeftModel.from_pretrained(found, str(adapter))
    whole = model.merge_and_unload(safe_merge=True)
    with_tokenizer = adapter if (adapter / "tokenizer_config.json").is_file() else Path(base)
    whole.save_pretrained(target)
    AutoTokenizer.from_pretrained(with_tokenizer).save_pretrained(target)
    return target


def find_weights(path: Path) -> Path:
    """The folder to upload: ``path`` itself if it holds a model or an adapter, else the checkpoint/ of the run in
    it."""
    for folder in (path, path / "checkpoint"):
        if (folder / "config.json").is_file() or (folder / ADAPTER_CONFIG).is_file():
            return folder
    raise ValueError(f"push wants a folder with a model (config.json), or the folder of a run, got {str(path)!r}")


def require_repository(name: str) -> None:
    """ValueError unless ``name`` can be a repository of the Hub, user/name."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"a Hub repository must be named user/name: {error}") from error
    if "/" not in name:
        raise ValueError(f"a Hub repository must be named user/name, got {name!r}")


def push_to_hub(source: str, repository: str, private: bool = False) -> str:
    """Upload the weights of ``source`` (a run or a model folder) with their model card; returns the address of the
    commit.

    The repository is made if it does not exist. OSError with one line where the Hub refuses: no token, no right, no
    network.
    """
    from huggingface_hub import HfApi

    folder = find_weights(Path(source))
    require_repository(repository)
    try:
        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository, folder_path=str(folder), commit_message=f"{folder.name} of ppg_fast"
        )
    except Exception as error:  # the client has many: no token, HTTP status, connection
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise OSError(f"{folder} could not be pushed to {repository}: {reason}") from error
    return str(getattr(commit, "commit_url", commit))
