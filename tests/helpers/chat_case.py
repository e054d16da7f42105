"""Tokenizers of bytes with the chat templates that TRL's package carries, and the special tokens of their models."""

import importlib.util
import re
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKUP = re.compile(
    r"<[|\uff5c][^<>{}'\" ]+?>|<[^<>|{}'\" ]+?[|\uff5c]>|</?s>|<(?:bos|eos|start_of_turn|end_of_turn)>|"
    r"<end_of_utterance>|\[/?[A-Z][A-Z_]+\]|</?(?:think|tool_call|tool_response)>"
)
OWN = Path(__file__).parent / "templates"  # formats of models whose templates TRL does not carry, in our words
SHIPS = Path(__file__).parents[2] / "ppg_fast/dialogues/templates"
PLAIN = re.compile("think|tool_call>|tool_response>")  # tokens of their own in these models, and not special


def folder() -> Path | None:
    """Where TRL's chat templates lie; None where TRL is not installed."""
    spec = importlib.util.find_spec("trl")
    return Path(spec.submodule_search_locations[0], "chat_templates") if spec else None


def byte_tokenizer(template, special=(), plain=(), **names):
    """Bytes, ``special`` tokens, tokens that are added but not special, and a chat template."""
    core = Tokenizer(
        models.BPE(vocab={c: n for n, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **names)
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.add_tokens(list(plain))
    tokenizer.chat_template = template
    return tokenizer


def tokenizer_of(name):
    """A tokenizer with a template, its markup as tokens: "ships/NAME", or one beside this file or of TRL's."""
    place, _, name = name.rpartition("/")
    paths = [SHIPS / f"{name}.jinja"] if place else [OWN / f"{name}.jinja", folder() / f"{name}.jinja"]
    template = next(path for path in paths if path.exists()).read_text(encoding="utf-8")
    markup = list(dict.fromkeys(MARKUP.findall(template)))
    eos = {"gemma": "<eos>", "llama": "<|eot_id|>", "cohere": "<|END_OF_TURN_TOKEN|>", "mistral": "</s>"}
    eos |= {"phi4": "<|im_end|>", "smollm2": "<|im_end|>"}
    names = {
        "eos_token": next((token for family, token in eos.items() if name.startswith(family)), "<|endoftext|>"),
        "bos_token": "<bos>" if "gemma" in name else "<s>",
    }
    plain = [token for token in markup if PLAIN.search(token)]
    special = [token for token in markup if token not in (*plain, *names.values())]
    return byte_tokenizer(template, special, plain, **names)
