"""NVIDIA NeMo-RL >= 0.6: a LossFunction, and an advantage estimator, for a driver script that calls grpo_train(...,
loss_fn=...)."""

from typing import Any

import torch
from torch import Tensor

from ppg_fast.functional import policy_loss_from_logprobs
from ppg_fast.integrations.host import import_host
from ppg_fast.integrations.turns import Credit, last_tokens, place_turn_rewards, turn_counts, turn_ids_of_mask
from ppg_fast.spec import PolicyClass, PolicyLossSpec

NEEDED = "nemo-rl >= 0.6"


class PPGLossFn:
    """The policy loss as NeMo-RL's LossFunction over log-probs.

    ``spec``: the loss; ``token_level``: divided by the global number of tokens, else the mean over sequences of their
        token mean,
    divided by the global number of sequences. ``importance_cap`` of the spec uses generation_logprobs.
    """

    def __init__(
        self, spec: PolicyLossSpec | None = None, *, token_level: bool = True, use_fused_linear_logprobs: bool = False
    ) -> None:
        interfaces = import_host("nemo_rl.algorithms.loss.interfaces", NEEDED)
        self.spec = PolicyLossSpec("ppo") if spec is None else spec
        self.token_level = token_level
        self.loss_type = interfaces.LossType.TOKEN_LEVEL if token_level else interfaces.LossType.SEQUENCE_LEVEL
        self.input_type = interfaces.LossInputType.LOGPROB
        self.use_fused_linear_logprobs = use_fused_linear_logprobs

    def __call__(
        self, next_token_logprobs: Tensor, data: Any, global_valid_seqs: Tensor, global_valid_toks: Tensor, **_: Any
    ) -> tuple[Tensor, dict[str, float]]:
        """Loss and metrics of a micro-batch.

        Args:
            next_token_logprobs: (B, S - 1) differentiable, position i holding the log-prob of token i + 1.
            data: token_mask, advantages, prev_logprobs, generation_logprobs (B, S), sample_mask (B,);
                reference_policy_logprobs (B, S) where the spec has a KL term.
            global_valid_seqs, global_valid_toks: 0-d, the denominators over all ranks and micro-batches.

        Returns: 0-d loss, already divided, and metrics by name.
        """
        keep = data.get("curr_logprobs_keep_mask")  # next-token frame: tokens that top-k or top-p filtering left
        mask = data["token_mask"][:, 1:] * data["sample_mask"][:, None] * (1 if keep is None else keep)
        old, rollout = data["prev_logprobs"][:, 1:], data["generation_logprobs"][:, 1:]
        denominator = global_valid_toks if self.token_level else global_valid_seqs
        tokens, normalizer = (
            torch.as_tensor(n, device=mask.device).reshape(()).float() for n in (global_valid_toks, denominator)
        )
        out = policy_loss_from_logprobs(
            next_token_logprobs, data["advantages"][:, 1:], loss_mask=mask, old_logprobs=old, rollout_logprobs=rollout,
            ref_logprobs=data["reference_policy_logprobs"][:, 1:] if self.spec.kl_coef else None,
            turn_ids=turn_ids_of_mask(mask) if self.spec.loss_type == "gspo_turn" else None, spec=self.spec,
            reduction="token_mean" if self.token_level else "sequence_mean", normalizer=normalizer.clamp(min=1),
        )  # fmt: skip
        # grpo_train looks for this name; NeMo-RL sums metrics over micro-batches, hence its denominator
        mismatch = torch.where(mask != 0, (rollout - old).abs().exp(), 0.0).sum() / tokens.clamp(min=1)
        metrics = {"loss": out.loss, "token_mult_prob_error": mismatch, "num_valid_samples": data["sample_mask"].sum()}
        return out.loss, {name: float(value) for name, value in metrics.items()}


class PPGAdvantageEstimator:
    """Advantages of turns under NeMo-RL's estimator interface. ``policy_class``, ``gamma``, ``baseline``: as in
    `turn_advantages`."""

    def __init__(
        self, policy_class: PolicyClass | str = "full", gamma: float = 1.0, baseline: str = "leave_one_out"
    ) -> None:
        self.credit = Credit(policy_class, gamma, baseline)

    def compute_advantage(
        self,
        prompt_ids: Tensor,
        rewards: Tensor,
        mask: Tensor,
        repeated_batch: Any = None,
        valid_mask: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """Advantage of the turn of each token, (B, S) float32, zero outside of the mask.

        Args:
            prompt_ids: (B, P) tokens of the prompts, equal for the rollouts of one prompt, or (B,).
            rewards: (B,) of the dialogues, given to the last turn where there are no rewards of turns.
            mask: (B, S), non-zero on the policy's own tokens; its runs are the turns.
            repeated_batch: the batch; ``repeated_batch["turn_rewards"]``, if there, holds one number per turn for each
                row.
            valid_mask: (B,), 0 for rows that take no part in the baselines either.

        Raises: ValueError where a row that takes part has another number of rewards than turns.
        """
        mask = mask if valid_mask is None else mask * valid_mask[:, None]
        turn_ids = turn_ids_of_mask(mask)
        counts = turn_counts(turn_ids)
        if repeated_batch is not None and "turn_rewards" in repeated_batch:
            rows = [
                list(row) if n else [] for row, n in zip(repeated_batch["turn_rewards"], counts.tolist(), strict=True)
            ]
            token_rewards = place_turn_rewards(rows, turn_ids)
        else:
            final = last_tokens(turn_ids) & (turn_ids == counts[:, None] - 1)
            token_rewards = torch.where(final, rewards[:, None].float(), 0.0)
        group_ids = torch.unique(prompt_ids, dim=0, return_inverse=True)[1]
        return self.credit.of_tokens(token_rewards, turn_ids, group_ids.to(mask.device))[0]
