"""PPGTrainer: GRPOTrainer whose advantages are those of turns, (B, C), from windowed returns gathered over ranks."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from ppg_fast.integrations.trl import turns
from ppg_fast.integrations.trl.config import PPGConfig, check_options
from ppg_fast.integrations.trl.head import add_fused_lm_head
from ppg_fast.integrations.trl.host import GRPOTrainer, grpo_trainer
from ppg_fast.integrations.turns import turn_ids_of_mask
from ppg_fast.policy_classes import PolicyClass
from ppg_fast.policy_classes import policy_class as named_policy_class

LOGPROBS = ("old_per_token_logps", "ref_per_token_logps", "sampling_per_token_logps")


@contextmanager
def _our_head_instead() -> Iterator[None]:
    """While GRPOTrainer.__init__ runs, our add_fused_lm_head replaces TRL's: there neither policy nor reference is
    wrapped yet."""
    theirs = grpo_trainer.add_fused_lm_head
    grpo_trainer.add_fused_lm_head = add_fused_lm_head
    try:
        yield
    finally:
        grpo_trainer.add_fused_lm_head = theirs


class _Scoring:
    """A model whose labels are dropped where a (B, C) mask over its last C tokens is 0, so that the head does not
    project them."""

    def __init__(self, model: Any, mask: Tensor) -> None:
        self.model, self.mask = model, mask

    def __call__(self, *, labels: Tensor, **inputs: Any) -> Any:
        kept = torch.nn.functional.pad(self.mask != 0, (labels.shape[1] - self.mask.shape[1], 0))
        return self.model(**inputs, labels=labels.masked_fill(~kept, -100))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


def _loss_mask(batch: dict[str, Any]) -> Tensor:
    """(B, C): 1 on tokens of the model, 0 on padding and on tokens of tools, users and environments."""
    mask = batch["completion_mask"]
    return mask * batch["tool_mask"] if "tool_mask" in batch else mask


class PPGTrainer(GRPOTrainer):
    """GRPOTrainer with an advantage per turn: A_t = R_t - baseline of the group at turn t, R_t the return over the
    policy class's window.

    Rewards, generation, losses, KL, entropy bonus, importance weights and logging are GRPOTrainer's; returns and
    baselines are `ppg_fast.partial_returns` and `ppg_fast.turn_advantages` over the rollouts of all ranks, so that
    groups may straddle them.

    Turn rewards of a rollout, one per turn, None = not scored (0): ``rollout_func``'s output under
    ``args.turn_reward_key``, else the attribute of that name of its environment, else the weighted sum of the reward
    functions as the reward of the last turn. Where turns have rewards of their own, reward functions are for the log
    only. Turns are the runs of ``env_mask`` or of the tool mask, or what ``rollout_func`` gives under
    ``args.turn_id_key``. A rollout that ``mask_truncated_completions`` masks counts as one turn unless its list of
    rewards says more.

    Args:
        reward_funcs: as in GRPOTrainer; None without environments: `total_turn_reward`.
        args: a `PPGConfig`.
        policy_class: a `ppg_fast.PolicyClass` in place of ``args.policy_class``, for a RewardMask.
        the rest: as in GRPOTrainer.

    Raises: TypeError for other args; ValueError where rewards and turns do not fit, RuntimeError where TRL no longer
        calls a hook.
    """

    args: Any  # a PPGConfig, or another GRPOConfig with PPGOptions among its bases
    model: Any
    num_generations: Any
    num_generations_eval: Any
    _tag_names = ["trl", "ppg"]  # noqa: RUF012
    _name = "PPG"
    _paper = {"title": "Partial Policy Gradients for RL in LLMs", "id": "2603.06138"}  # noqa: RUF012

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: Any = None,
        *others: Any,
        policy_class: PolicyClass | None = None,
        **options: Any,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = PPGConfig(f"{name.split('/')[-1]}-PPG")
        check_options(args)
        self.policy_class = named_policy_class(args.policy_class if policy_class is None else policy_class)
        if reward_funcs is None and options.get("environment_factory") is None:
            reward_funcs = partial(turns.total_turn_reward, key=args.turn_reward_key)
        self._scored: dict[str, list[Any]] | None = None
        if args.fused_head == "trl":
            super().__init__(model, reward_funcs, args, *others, **options)
            return
        with _our_head_instead():
            super().__init__(model, reward_funcs, args, *others, **options)
        policy: Any = self.model
        policy = policy.get_base_model() if hasattr(policy, "get_base_model") else policy
        if not getattr(policy.forward, "ppg_fast_head", False):
            raise RuntimeError(
                "GRPOTrainer no longer adds its head by trl.trainer.grpo_trainer.add_fused_lm_head: use "
                'fused_head="trl"'
            )

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        rewards_per_func = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        key, environments = self.args.turn_reward_key, self.environments or [None] * len(inputs)
        extras = [example.get(key) for example in inputs]
        self._scored = {  # read after the reward functions, which may fill an environment's rewards
            "extras": extras,
            "environments": [getattr(environment, key, None) for environment in environments],
            "turn_ids": [example.get(self.args.turn_id_key) for example in inputs],
            "scalars": self._scalar_rewards(rewards_per_func, len(inputs)),
        }
        return rewards_per_func

    def _scalar_rewards(self, rewards_per_func: Tensor, local: int) -> list[float]:
        """The weighted sum of the reward functions for this rank's rollouts, NaN where none gave a number."""
        total = (rewards_per_func * self.reward_weights.to(rewards_per_func.device)).nansum(1)
        total = total.masked_fill(rewards_per_func.isnan().all(1), torch.nan)
        start = self.accelerator.process_index * local
        return total[start : start + local].tolist()

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        self._scored = None
        output = super()._generate_and_score_completions(inputs)
        scored, self._scored = self._scored, None
        if scored is None:
            raise RuntimeError(
                "GRPOTrainer no longer calls _calculate_rewards in _generate_and_score_completions, where turn "
                "rewards are read"
            )
        mask = _loss_mask(output)
        turn = self._turns(scored["turn_ids"], mask)
        rewards = self._turn_rewards(scored, turn)
        group_size = self.num_generations if self.model.training else self.num_generations_eval
        everyone = gather_object(rewards)
        options = self.policy_class, self.args.gamma, self.args.baseline, self.args.std_eps
        advantages, counts = turns.advantages_of_turns(everyone, group_size, *options)
        start = self.accelerator.process_index * len(rewards)
        output["advantages"] = turns.advantages_of_tokens(
            advantages[start : start + len(rewards)].to(mask.device), turn
        )
        # the loss does not score masked tokens again: 0 in all log-probs keeps their ratio at 1
        for name in LOGPROBS:
            if name in output:
                output[name] = output[name].masked_fill(mask == 0, 0.0)
        ratio = output.get("importance_sampling_ratio")
        if ratio is not None and ratio.shape == mask.shape:  # of tokens; GRPOTrainer multiplies by the mask
            output["importance_sampling_ratio"] = ratio.masked_fill(mask == 0, 1.0)
        self._log_turns(everyone, advantages, counts)
        return output

    def _turns(self, given: list[Any], mask: Tensor) -> Tensor:
        if all(ids is None for ids in given):
            return turn_ids_of_mask(mask)
        if any(ids is None for ids in given):
            raise ValueError(
                f"{self.args.turn_id_key} must be given for every rollout or for none, got None for {given.index(None)}"
            )
        return turns.turns_of_ids(given, mask)

    def _turn_rewards(self, scored: dict[str, list[Any]], turn: Tensor) -> list[list[float | None]]:
        found = (turn.amax(1) + 1).tolist() if turn.shape[1] else [0] * len(turn)
        rows = zip(scored["extras"], scored["environments"], scored["scalars"], found, strict=True)
        return [
            list(
                turns.rewards_of_turns(extra if extra is not None else own, scalar, count, every_turn=extra is not None)
            )
            for extra, own, scalar, count in rows
        ]

    def _log_turns(self, rewards: list[list[float | None]], advantages: Tensor, counts: Tensor) -> None:
        """Put the advantages of turns into the completions table, in place of those of rollouts, and log three
        metrics."""
        column = self._logs["advantages"]
        for _ in range(min(len(rewards), len(column))):
            column.pop()
        column.extend(
            turns.TurnAdvantages(row[:n].tolist()) for row, n in zip(advantages, counts.tolist(), strict=True)
        )
        turn_mask = torch.arange(advantages.shape[1]) < counts[:, None]
        scored = [reward for given in rewards for reward in given if reward is not None]
        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics["turns/mean_count"].append(counts.float().mean().item())
        metrics["turns/reward"].append(sum(scored) / max(len(scored), 1))
        metrics["turns/zero_advantage"].append((advantages[turn_mask] == 0).float().mean().item())

    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        return super()._compute_loss(_Scoring(model, _loss_mask(inputs)), inputs)
