"""The chat format that a run with the same settings reads with, without the model's weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ppg_fast.config import TrainConfig
from ppg_fast.dialogues.chat_format import ChatFormat
from ppg_fast.jobs.policy import chat_of, require_checkpoint


class Reader(NamedTuple):
    """``chat``: the format. ``positions``: how many tokens the model has positions for, None where it does not say."""

    chat: ChatFormat
    positions: int | None
    name: str


def reader_of(config: TrainConfig, make_tokenizer: Callable[[], Any]) -> Reader:
    """The chat format of the config's model, or of the tokenizer made on the spot that stands in for one; as
    `ppg_fast.jobs.policy.Policy` has them. ValueError for a folder that cannot be read."""
    if not config.model:
        return Reader(
            chat_of(config, make_tokenizer(), None), None, "a byte-level tokenizer made from the file, with role tokens"
        )
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    require_checkpoint(config.model)
    folder = Path(config.model)
    try:
        tokenizer, settings = AutoTokenizer.from_pretrained(folder), AutoConfig.from_pretrained(folder)
        stored = (folder / "generation_config.json").is_file()
        generation: Any = (
            GenerationConfig.from_pretrained(folder) if stored else GenerationConfig.from_model_config(settings)
        )
    except Exception as error:  # of a dozen classes, as they are read with the weights
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(f"tokenizer and config of {config.model!r} cannot be read: {reason[:200]}") from error
    positions = getattr(settings.get_text_config(), "max_position_embeddings", None)
    template = f" and the template {Path(config.chat_template).name}" if config.chat_template else ""
    return Reader(chat_of(config, tokenizer, generation), positions, f"the tokenizer of {folder.name}{template}")
