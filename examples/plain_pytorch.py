"""Partial policy gradients in plain PyTorch: any model that gives hidden states and a head. Runs offline in seconds.

Two turns of three tokens; a turn is paid for its even tokens, so `lookahead:1` credits each turn for itself.
"""

import torch
from torch import nn

import ppg_fast as ppg

VOCABULARY, USER, DIALOGUES, TURN_IDS = 16, 1, 32, [-1, 0, 0, 0, -1, 1, 1, 1]


def main(steps: int = 40) -> list[float]:
    torch.manual_seed(0)
    embedding, body, head = nn.Embedding(VOCABULARY, 32), nn.GRU(32, 32, batch_first=True), nn.Linear(32, VOCABULARY)
    optimizer = torch.optim.Adam([*embedding.parameters(), *body.parameters(), *head.parameters()], lr=1e-2)
    turn_ids, history = torch.tensor(TURN_IDS).expand(DIALOGUES, -1), []
    for _ in range(steps):
        tokens = torch.full((DIALOGUES, 1), USER)
        with torch.no_grad():
            for turn in TURN_IDS[1:]:  # the policy speaks in turns, the user in between
                logits = head(body(embedding(tokens))[0][:, -1])
                said = torch.multinomial(logits.softmax(-1), 1) if turn >= 0 else torch.full((DIALOGUES, 1), USER)
                tokens = torch.cat([tokens, said], 1)
        rewards = torch.stack([((tokens % 2 == 0) & (turn_ids == turn)).float().sum(1) / 3 for turn in range(2)], 1)
        out = ppg.linear_partial_policy_loss(
            body(embedding(tokens[:, :-1]))[0], head.weight, tokens[:, 1:], rewards, turn_ids[:, 1:], "lookahead:1",
            bias=head.bias,
            baseline="leave_one_out", group_ids=torch.zeros(DIALOGUES, dtype=torch.long), reduction="sequence_sum",
        )  # fmt: skip
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        history.append(rewards.mean().item())
    return history


if __name__ == "__main__":
    rewards = main()
    print(f"mean reward of a turn: {rewards[0]:.2f} at first, {rewards[-1]:.2f} at last")
