"""Partial policy gradients with accelerate: packed rows, accumulation, and one denominator for the window on all ranks.

Offline in seconds: `python examples/accelerate_loop.py`, or on two processes `torchrun --nproc_per_node 2
examples/accelerate_loop.py`.
"""

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import ppg_fast as ppg
from ppg_fast.integrations.transformers import PackedCollator, patch

VOCABULARY, TURN_IDS, WINDOW = 16, [-1, 0, 0, 0, -1, 1, 1, 1], 2


def logged_dialogue(number: int) -> dict:
    """Two random turns, each paid for its even tokens; four dialogues are a group."""
    tokens = torch.randint(1, VOCABULARY, (len(TURN_IDS),), generator=torch.Generator().manual_seed(number))
    rewards = [(tokens[start : start + 3] % 2 == 0).float().mean().item() for start in (1, 5)]
    return {"input_ids": tokens, "turn_ids": TURN_IDS, "rewards": rewards, "group_id": number // 4}


def main(epochs: int = 4) -> list[float]:
    accelerator = Accelerator(gradient_accumulation_steps=WINDOW, cpu=True)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes))
    # before DDP wraps it
    patch(model, spec=ppg.PolicyLossSpec("reinforce"), policy_class="greedy", baseline="leave_one_out")
    loader = DataLoader([logged_dialogue(n) for n in range(64)], batch_size=8, collate_fn=PackedCollator())
    model, optimizer, loader = accelerator.prepare(model, torch.optim.Adam(model.parameters(), lr=3e-3), loader)
    even = []
    for _ in range(epochs):
        batches = list(loader)
        for start in range(0, len(batches), WINDOW):
            window = batches[start : start + WINDOW]
            labels = sum((batch["shift_labels"] != -100).sum() for batch in window)
            tokens = accelerator.gather(labels).sum().clamp(min=1)
            for batch in window:
                # backward divides by WINDOW, DDP by the ranks: the denominator is the window's tokens
                with accelerator.accumulate(model):
                    out = model(**batch, normalizer=tokens / (WINDOW * accelerator.num_processes))
                    accelerator.backward(out.loss)
                    optimizer.step()
                    optimizer.zero_grad()
                even.append(out.logprobs[(batch["shift_labels"] % 2 == 0) & (batch["turn_ids"] >= 0)].mean().item())
    return even


if __name__ == "__main__":
    logprobs = main()
    print(f"mean log-prob of what was rewarded: {logprobs[0]:.2f} at first, {logprobs[-1]:.2f} at last")
