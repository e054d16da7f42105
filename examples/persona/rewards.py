"""Does an answer sound like the persona? Similarity of sentence embeddings, and one reward that comes two turns late.

For `ppg-fast train --reward rewards.py:persona`; EMBEDDER names the folder of all-MiniLM-L6-v2 or another encoder.
"""

import os
from functools import lru_cache

import torch
from transformers import AutoModel, AutoTokenizer

LATE = 2  # the turn, from 0, that is paid for the first answer too; the first turn itself is paid nothing


@lru_cache(maxsize=1)
def encoder():
    folder = os.environ["EMBEDDER"]
    return AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()


@lru_cache(maxsize=4096)
@torch.inference_mode()
def embedding(text):
    """The mean of the last hidden states, of length 1."""
    tokenizer, model = encoder()
    inputs = tokenizer([text], return_tensors="pt", truncation=True, max_length=128)
    return torch.nn.functional.normalize(model(**inputs).last_hidden_state.mean(1)[0], dim=0)


def likeness(answer, persona):
    """From 0 to 1: the cosine of the two embeddings, 0 where it is negative or nothing was said."""
    return max(0.0, float(embedding(answer.strip()) @ embedding(persona))) if answer.strip() else 0.0


def persona(messages, persona):
    """The likeness of this answer; that of the first one comes with turn `LATE`, when the partner has thought about it.

    Over a dialogue of more than two turns the sum is that of all answers' likenesses: 3 at most in three turns.
    """
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    turn = len(answers) - 1
    now = likeness(answers[turn], persona) if turn else 0.0
    return now + (likeness(answers[0], persona) if turn == LATE else 0.0)
