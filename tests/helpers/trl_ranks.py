"""What each rank runs for test_integrations_trl_ranks.py: train a little, project through a sharded head, write what
came out. `trl_ranks.py FOLDER` does it alone and on two ranks."""

import os
import sys
from pathlib import Path

import torch
from forks import fork, run_ranks
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from trl_case import VOCABULARY, RecordedPPG, ScriptedRollouts, make_model, token_reward, train, weights

from ppg_fast.integrations.trl import add_fused_lm_head

CHOICES = [("lookahead:2", "leave_one_out"), ("full", "group_std"), ("segment:2", "group_mean")]
SCALAR = CHOICES[2]  # no turn rewards: the reward function's, on the last turn


def run(folder: Path, world: int, policy_class: str, baseline: str) -> dict:
    """Groups of 4 on batches of 4 over all ranks: on two ranks, each holds half of a group."""
    scalar = (policy_class, baseline) == SCALAR
    rollouts, rewards = ScriptedRollouts(5, with_rewards=not scalar), token_reward if scalar else None
    credit = {"policy_class": policy_class, "gamma": 0.9, "baseline": baseline}
    options = {
        "per_device_train_batch_size": 4 // world,
        "gradient_accumulation_steps": 1,
        "loss_type": "dapo",
        **credit,
    }
    trainer = train(folder, RecordedPPG, make_model(), rollouts, rewards, **options)
    return {
        "advantages": [batch["advantages"] for batch in trainer.batches],
        "lengths": [[len(row) for row in given["completion_ids"]] for given in rollouts.given],
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "metrics": [
            [entry[f"turns/{n}"] for n in ("mean_count", "reward")]
            for entry in trainer.state.log_history
            if "loss" in entry
        ],
        "shown": [list(row) for row in trainer._logs["advantages"]],
        "weights": weights(trainer.accelerator.unwrap_model(trainer.model)),
    }


def sharded_head(rank: int, world: int, *, own_group: bool) -> dict[str, torch.Tensor]:
    """Gradients of a model sharded by FSDP2, each rank with data of its own; on one rank, their mean over the data of
    two."""
    grads: dict[str, torch.Tensor] = {}
    for data in (0, 1) if world == 1 else (rank,):
        model = make_model("Phi")
        add_fused_lm_head(model, temperature=0.7, outputs=("log_probs", "entropy"))
        if world > 1:
            mesh = init_device_mesh("cpu", (world,))
            for part in ([model.get_output_embeddings()] if own_group else []) + [model.model.layers[0], model]:
                fully_shard(part, mesh=mesh)
        ids = torch.randint(3, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(data))
        out = model(input_ids=ids, labels=ids, fused_lm_head=True)
        (out.loss + out.entropy.sum()).backward()
        for name, parameter in model.named_parameters():
            grad = parameter.grad if world == 1 else parameter.grad.full_tensor()
            grads[name] = grads.get(name, 0) + (grad / 2 if world == 1 else grad)
    return grads


def main(folder: Path, world: int) -> None:
    results = {choice: run(folder, world, *choice) for choice in CHOICES}
    rank = dist.get_rank() if dist.is_initialized() else 0
    assert world == (dist.get_world_size() if dist.is_initialized() else 1)
    heads = {own_group: sharded_head(rank, world, own_group=own_group) for own_group in (False, True)}
    torch.save({"runs": results, "heads": heads}, folder / f"rank{rank}of{world}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    _, status = os.waitpid(fork(lambda: main(Path(sys.argv[1]), 1), {}), 0)
    if status:
        sys.exit(f"the one process ended with wait status {status}")
    run_ranks(2, lambda: main(Path(sys.argv[1]), 2))
