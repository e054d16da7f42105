"""Partial policy gradients in Lightning, from logged dialogues with a reward per turn: packed rows, no logits. Runs
offline in seconds."""

import lightning
import torch
from torch.utils.data import DataLoader
from transformers import Qwen3Config, Qwen3ForCausalLM

import ppg_fast as ppg
from ppg_fast.integrations.transformers import PackedCollator, patch

VOCABULARY, TURN_IDS = 16, [-1, 0, 0, 0, -1, 1, 1, 1]


def logged_dialogue(number: int) -> dict:
    """Two random turns, each rewarded for its even tokens; four dialogues are a group."""
    tokens = torch.randint(1, VOCABULARY, (len(TURN_IDS),), generator=torch.Generator().manual_seed(number))
    rewards = [(tokens[start : start + 3] % 2 == 0).float().mean().item() for start in (1, 5)]
    return {"input_ids": tokens, "turn_ids": TURN_IDS, "rewards": rewards, "group_id": number // 4}


class PolicyModule(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, **heads}
        self.policy = Qwen3ForCausalLM(Qwen3Config(vocab_size=VOCABULARY, **sizes))
        loss = {"spec": ppg.PolicyLossSpec("reinforce"), "reduction": "sequence_sum"}
        patch(self.policy, policy_class="greedy", baseline="leave_one_out", **loss)
        self.even: list[float] = []

    def training_step(self, batch: dict, index: int) -> torch.Tensor:
        out = self.policy(**batch)
        even = batch["shift_labels"] % 2 == 0
        self.even.append(out.logprobs[even & (batch["turn_ids"] >= 0)].mean().item())
        return out.loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=3e-3)


def main(epochs: int = 4) -> list[float]:
    lightning.seed_everything(0, verbose=False)
    loader = DataLoader([logged_dialogue(n) for n in range(64)], batch_size=16, collate_fn=PackedCollator())
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    module = PolicyModule()
    lightning.Trainer(max_epochs=epochs, accelerator="cpu", devices=1, **quiet).fit(module, loader)
    return module.even


if __name__ == "__main__":
    logprobs = main()
    print(f"mean log-prob of what was rewarded: {logprobs[0]:.2f} at first, {logprobs[-1]:.2f} at last")
