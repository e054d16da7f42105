"""A reward model on dialogues of many turns, the reward of every turn beside the forward pass alone:
`python -m ppg_fast.bench.reward_scoring`."""

import argparse
import math
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ppg_fast.dialogues.message import Message
from ppg_fast.rewards.scoring import Reward, Transcript

from . import machine, result_file
from .tables import NOT_MEASURED, Results, duration, of, table
from .timing import Contestant, Pace, interleave

NAME = "reward_scoring"
TURNS = (30, 100, 300)
WIDTH, LAYERS = 512, 8
AIM = 3.0  # times the forward pass, at most
ROUNDS = 5


def dialogue(turns: int) -> Transcript:
    """A dialogue of as many answers, of about a dozen words a message."""
    says = "this is what the {} has to say at turn {} of what they talk about"
    said = [Message(role, says.format(role, turn)) for turn in range(turns) for role in ("user", "assistant")]
    return Transcript(f"of {turns} turns", tuple(said))


def make_scorer(folder: Path, width: int, layers: int) -> Any:
    """A causal reward model of random weights with a byte-level tokenizer, saved and loaded."""
    from transformers import Qwen3Config, Qwen3ForSequenceClassification

    from ppg_fast.dialogues.chat_format import make_byte_tokenizer
    from ppg_fast.rewards.reward_model import RewardModel

    tokenizer = make_byte_tokenizer([message.content for message in dialogue(30).messages], 1024)
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    heads = {"num_attention_heads": width // 64 or 1, "num_key_value_heads": width // 64 or 1, "head_dim": 64}
    torch.manual_seed(0)
    whole = {"num_labels": 1, "pad_token_id": tokenizer.pad_token_id, "max_position_embeddings": 2**16}
    config = Qwen3Config(vocab_size=len(tokenizer), **sizes, **heads, **whole)
    Qwen3ForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return RewardModel(str(folder), max_tokens=2**16)


@torch.no_grad()
def measure(turns: Sequence[int] = TURNS, width: int = WIDTH, layers: int = LAYERS) -> list[dict[str, Any]]:
    """Seconds of both, in rounds with each other."""
    from ppg_fast.rewards.turn_logits import logits_of

    found = []
    with tempfile.TemporaryDirectory() as folder:
        scorer = make_scorer(Path(folder), width, layers)
        for count in turns:
            one = dialogue(count)
            rows = scorer.rows([one])
            contestants = [
                Contestant("scored", "ours", lambda one=one: Reward("model", scorer).turns([one])),
                Contestant("forward", "ceiling", lambda rows=rows: logits_of(scorer.model, rows, scorer.pad)),
            ]
            for contestant in contestants:
                contestant.call()
            seconds = interleave(contestants, Pace(ROUNDS, budget=math.inf), "cpu")
            medians = {name: statistics.median(taken) for name, taken in seconds.items()}
            found.append({"turns": count, "tokens": len(rows[0].tokens), **medians})
    return found


def scoring_section(results: Results) -> str:
    """For docs/reward_models.md."""
    text = ""
    for device, file in of(results, NAME):
        width, layers = file["size"]
        rows = [
            (
                f"{r['turns']}",
                f"{r['tokens']:,}",
                duration(r["scored"]),
                duration(r["forward"]),
                f"{r['scored'] / r['forward']:.2f} x",
            )
            for r in file["rows"]
        ]
        heads = (f"turns ({device}, {layers} layers of {width})", "tokens", "scored", "forward pass alone", "ratio")
        met = "met" if file["rows"][-1]["scored"] < AIM * file["rows"][-1]["forward"] else "missed"
        text += table(heads, rows) + f"\nAim: {rows[-1][0]} turns in under {AIM:g} x the forward pass: **{met}**.\n"
    return text or NOT_MEASURED


def main(argv: Sequence[str] | None = None) -> int:
    """Write ``reward_scoring.cpu.json``."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description="Measure a reward model on long dialogues.")
    parser.add_argument("--output", type=Path, default=result_file.FOLDER)
    arguments = parser.parse_args(argv)
    file = machine.header("python -m ppg_fast.bench.reward_scoring", "cpu", threads=torch.get_num_threads())
    result_file.write(arguments.output, f"{NAME}.cpu", file | {"size": [WIDTH, LAYERS], "rows": measure()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
