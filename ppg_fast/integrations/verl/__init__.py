"""verl >= 0.9: advantage estimators, policy losses and a fused kernel, registered when verl is imported.

The entry point group ``verl.plugins`` loads this module in every process that imports verl; without verl nothing loads
it. Then the configuration may say

    algorithm.adv_estimator                            ppg_greedy | ppg_lookahead | ppg_segment | ppg_full | ppg_lags
    +algorithm.ppg.lookahead, .segment_length, .lags, .gamma, .baseline
    actor_rollout_ref.actor.policy_loss.loss_mode      ppg | ppg_NAME, a loss of docs/losses.md
    actor_rollout_ref.model.fused_kernel_options.impl_backend   ppg       (with use_fused_kernels)

Rewards of turns reach verl through `ppg_fast.integrations.verl.rewards`.
"""

import sys

from ppg_fast.integrations.host import require_host


def register() -> None:
    """Register everything with the installed verl; ImportError, in one line, where it is missing or too old."""
    require_host("verl", "0.9")
    from ppg_fast.integrations.verl import estimators, head, losses

    for module in (estimators, losses, head):
        module.register()


try:
    register()
except Exception as error:
    # verl logs a failing plugin at level DEBUG only: the run would end in an unknown estimator, or use verl's own head
    print(f"ppg_fast: nothing of it is registered with verl: {error}", file=sys.stderr, flush=True)
    raise
