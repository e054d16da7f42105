"""TRL (1.16 and later): GRPO's trainer with partial policy gradients and a head that makes no logits.

    from ppg_fast.integrations.trl import PPGConfig, PPGTrainer

Turn rewards come from ``rollout_func`` (a list a rollout under "turn_rewards") or from the environments (an attribute
of that name); without either, the sum of the reward functions is the reward of the last turn.
"""

from ppg_fast.integrations.trl.config import PPGConfig, PPGOptions
from ppg_fast.integrations.trl.head import add_fused_lm_head
from ppg_fast.integrations.trl.trainer import PPGTrainer
from ppg_fast.integrations.trl.turns import total_turn_reward

__all__ = ["PPGConfig", "PPGOptions", "PPGTrainer", "add_fused_lm_head", "total_turn_reward"]
