"""Did the models come whole? What they say greedily, by plain transformers."""

from itertools import product
from pathlib import Path
from typing import Any

from .models import GEMMA3, SMOLLM2, folder

SENTENCES = {  # and what has to come
    "The capital of France is": "Paris",
    "Monday, Tuesday, Wednesday,": "Thursday",
}


def said(place: Path, text: str, new_tokens: int = 8) -> str:
    """What the model of a folder adds to ``text``, greedily."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(place)
    model: Any = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
    inputs = tokenizer(text, return_tensors="pt")
    with torch.inference_mode():
        out = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def answered(place: Path, messages: list[dict[str, str]], new_tokens: int = 16) -> str:
    """What the model of a folder answers, greedily, through its own chat template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(place)
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return said(place, str(text), new_tokens)


def facts(place: Path) -> dict[str, Any]:
    """Sizes of a model's folder."""
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(place).get_text_config()
    template = AutoTokenizer.from_pretrained(place).chat_template is not None
    return {
        "vocabulary": config.vocab_size,
        "width": config.hidden_size,
        "layers": config.num_hidden_layers,
        "weights_bytes": (place / "model.safetensors").stat().st_size,
        "chat_template": template,
    }


def measure(arguments: Any) -> dict[str, Any]:
    """Each model and sentence: what came and whether it is what has to come."""
    del arguments
    spoken = []
    for name, (text, expected) in product((SMOLLM2, GEMMA3), SENTENCES.items()):
        place = folder(name)
        found = said(place, text)
        spoken.append({"model": name, "text": text, "said": found, "right": expected in found, **facts(place)})
    return {"spoken": spoken}
