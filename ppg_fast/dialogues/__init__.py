"""Dialogues from files to packed tokens: formats on disk, chat templates, prompts, packing."""

from ppg_fast.dialogues.chat_format import ChatFormat, make_byte_tokenizer, make_word_tokenizer
from ppg_fast.dialogues.dialogue import Dialogue, convert_to_jsonl, read_dialogues, write_dialogues
from ppg_fast.dialogues.encoding import encode_dialogue
from ppg_fast.dialogues.message import Message
from ppg_fast.dialogues.packing import PackedBatch, Sample, micro_batches, pack
from ppg_fast.dialogues.prompts import Prompt, read_prompts

__all__ = [
    "ChatFormat",
    "Dialogue",
    "Message",
    "PackedBatch",
    "Prompt",
    "Sample",
    "convert_to_jsonl",
    "encode_dialogue",
    "make_byte_tokenizer",
    "make_word_tokenizer",
    "micro_batches",
    "pack",
    "read_dialogues",
    "read_prompts",
    "write_dialogues",
]
