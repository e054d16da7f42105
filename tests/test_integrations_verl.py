"""The verl integration against the real verl, which lives in an environment of its own: `make test-verl`."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

verl = pytest.importorskip("verl", reason="verl is not installed here; make test-verl builds its environment")

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from verl import DataProto
from verl.models.transformers.monkey_patch import patch_forward_with_backends
from verl.trainer.ppo import core_algos
from verl.trainer.ppo.ray_trainer import compute_advantage
from verl.trainer.ppo.v1.utils import compute_advantage_for_multi_trajectories
from verl.utils.config import omega_conf_to_dataclass

from ppg_fast.integrations.turns import Credit
from ppg_fast.integrations.verl import estimators, losses
from ppg_fast.integrations.verl.rewards import TurnRewardOutput, rm_scores

UIDS = np.array(["p", "q", "p", "q", "p", "solo"], dtype=object)  # groups of 3, 2 and 1, not next to each other


def masks(turn_lengths, length):
    """Response masks with one token of context between the turns: rows of turn lengths -> (bs, length) int64."""
    mask = torch.zeros(len(turn_lengths), length, dtype=torch.int64)
    for b, lengths in enumerate(turn_lengths):
        start = 0
        for n in lengths:
            mask[b, start : start + n] = 1
            start += n + 1
    return mask


ONE_TURN = masks([[5], [2], [7], [1], [3], [4]], 8)
THREE_TURNS = masks([[2, 1, 3], [1, 1, 1], [3, 2, 1], [1, 4, 1], [2, 2, 2], [1, 2, 3]], 10)
RAGGED = masks([[2, 1, 3], [4], [3, 2], [1, 4, 1], [2, 2, 1], [1, 2, 3]], 10)


def terminal_rewards(mask):
    """One reward a row, where verl puts it: on the last token of the response."""
    rewards = torch.zeros(mask.shape)
    last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
    rewards[torch.arange(len(mask)), last] = torch.tensor([0.3, 1.0, -0.7, 0.25, 1.9, 0.6])
    return rewards


def advantages(estimator, rewards, mask, **ppg_options):
    """verl's own route from a batch to its advantages."""
    config = OmegaConf.create(
        {"adv_estimator": estimator, "gamma": 1.0, **({"ppg": ppg_options} if ppg_options else {})}
    )
    OmegaConf.set_struct(config, True)  # as hydra hands it out
    data = DataProto.from_dict(
        tensors={"token_level_rewards": rewards, "response_mask": mask}, non_tensors={"uid": UIDS}
    )
    grpo = {"norm_adv_by_std_in_grpo": ppg_options.get("baseline") == "group_std"}
    out = compute_advantage(data, adv_estimator=estimator, config=config, **grpo)
    return out.batch["advantages"]


# ---- registration ----------------------------------------------------------------------------------------------------
def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)


def test_importing_verl_is_enough():
    done = run(
        "import verl\n"
        "from verl.trainer.ppo.core_algos import get_adv_estimator_fn, get_policy_loss_fn\n"
        "names = ['ppg_greedy', 'ppg_lookahead', 'ppg_segment', 'ppg_full', 'ppg_lags']\n"
        "print([callable(get_adv_estimator_fn(n)) for n in names], callable(get_policy_loss_fn('ppg')))"
    )
    assert done.stdout.strip() == "[True, True, True, True, True] True", done.stderr
    assert "ppg_fast" not in done.stderr


def test_a_failing_plugin_is_loud():
    done = run("import sys\nsys.modules['ppg_fast.integrations.verl.head'] = None\nimport verl\nprint('verl lives')")
    assert done.stdout.strip() == "verl lives"
    assert "ppg_fast: nothing of it is registered with verl" in done.stderr
    assert "ppg_fast.integrations.verl.head" in done.stderr


def test_registering_twice_changes_nothing():
    from ppg_fast.integrations.verl import register

    before = core_algos.get_adv_estimator_fn("ppg_full"), patch_forward_with_backends
    register()
    from verl.models.transformers import monkey_patch

    assert (core_algos.get_adv_estimator_fn("ppg_full"), monkey_patch.patch_forward_with_backends) == before


def test_verls_own_configuration_takes_every_option():
    """Through hydra, as on verl's command line, and through the dataclass its workers make of it."""
    overrides = [
        "algorithm.adv_estimator=ppg_lookahead", "+algorithm.ppg.lookahead=2", "+algorithm.ppg.gamma=0.9",
        "+algorithm.ppg.baseline=group_mean",
        "actor_rollout_ref.actor.policy_loss.loss_mode=ppg", "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1",
        "actor_rollout_ref.model.use_fused_kernels=true",
        "actor_rollout_ref.model.fused_kernel_options.impl_backend=ppg",
    ]  # fmt: skip
    with initialize_config_dir(str(Path(verl.__file__).parent / "trainer/config"), version_base=None):
        config = compose("ppo_trainer", overrides=overrides)
    assert estimators.credit("lookahead", config.algorithm) == Credit("lookahead:2", 0.9, "group_mean")
    actor_config = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    assert core_algos.get_policy_loss_fn(actor_config.policy_loss.loss_mode) is losses.LOSSES["ppg"]
    spec = losses.loss_spec("ppo", actor_config)
    assert (spec.clip_low, spec.clip_high, spec.dual_clip) == (0.2, 0.2, 3.0)


# ---- estimators ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mask", [ONE_TURN, THREE_TURNS], ids=["one turn", "three turns"])
def test_full_planning_and_a_terminal_reward_is_rloo(mask):
    rewards = terminal_rewards(mask)
    for theirs in ("rloo", "rloo_vectorized"):
        groups = (
            torch.tensor(UIDS != "solo") if theirs == "rloo_vectorized" else torch.ones(len(UIDS), dtype=torch.bool)
        )
        # the vectorized one drops a rollout that is alone; the other keeps it, as we do
        expected = advantages(theirs, rewards, mask)
        torch.testing.assert_close(
            advantages("ppg_full", rewards, mask)[groups], expected[groups], rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("baseline", ["group_mean", "group_std"])
@pytest.mark.parametrize("mask", [ONE_TURN, THREE_TURNS], ids=["one turn", "three turns"])
def test_full_planning_and_a_terminal_reward_is_grpo(mask, baseline):
    rewards = terminal_rewards(mask)
    ours = advantages("ppg_full", rewards, mask, baseline=baseline)
    config = {"baseline": baseline}  # read by the helper above: whether GRPO divides by the standard deviation
    torch.testing.assert_close(ours, advantages("grpo", rewards, mask, **config), rtol=1e-5, atol=1e-5)


CLASSES = {
    "ppg_greedy": {},
    "ppg_lookahead": {"lookahead": 2},
    "ppg_segment": {"segment_length": 2},
    "ppg_full": {},
    "ppg_lags": {"lags": [1, 0.5]},
}


@pytest.mark.parametrize("estimator", CLASSES)
def test_every_policy_class_by_hand(estimator):
    """Dialogues of 3, 1, 2, 3, 3 and 3 turns, discounted; the window of each turn and its group written out."""
    generator = torch.Generator().manual_seed(5)
    turn_rewards = [[float(torch.randn((), generator=generator)) for _ in range(n)] for n in (3, 1, 2, 3, 3, 3)]
    gamma = 0.8
    ends = {
        "ppg_greedy": lambda t, n: t + 1,
        "ppg_lookahead": lambda t, n: min(t + 2, n),
        "ppg_segment": lambda t, n: min(t // 2 * 2 + 2, n),
        "ppg_full": lambda t, n: n,
        "ppg_lags": lambda t, n: min(t + 2, n),
    }
    by_lag = (1.0, 0.5, 0.0) if estimator == "ppg_lags" else (1.0, 1.0, 1.0)
    returns = [
        [
            sum(by_lag[k - t] * gamma ** (k - t) * row[k] for k in range(t, ends[estimator](t, len(row))))
            for t in range(len(row))
        ]
        for row in turn_rewards
    ]
    expected = torch.zeros(RAGGED.shape)
    for b, row in enumerate(returns):
        starts = [i for i in range(RAGGED.shape[1]) if RAGGED[b, i] and (i == 0 or not RAGGED[b, i - 1])]
        for t, start in enumerate(starts):
            others = [returns[o][t] for o in range(len(UIDS)) if o != b and UIDS[o] == UIDS[b] and t < len(returns[o])]
            end = next((i for i in range(start, RAGGED.shape[1]) if not RAGGED[b, i]), RAGGED.shape[1])
            expected[b, start:end] = row[t] - (sum(others) / len(others) if others else 0.0)
    ours = advantages(estimator, rm_scores(turn_rewards, RAGGED), RAGGED, gamma=gamma, **CLASSES[estimator])
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_the_v1_trainer_delegates():
    """verl's default trainer computes GRPO itself and hands every other estimator on."""
    tensors = {"token_level_rewards": terminal_rewards(THREE_TURNS), "response_mask": THREE_TURNS}
    data = DataProto.from_dict(tensors=tensors, non_tensors={"uid": UIDS})
    keys = [f"{uid}_{i}_0" for i, uid in enumerate(UIDS)]
    out = compute_advantage_for_multi_trajectories(data, keys, adv_estimator="ppg_full", config=OmegaConf.create({}))
    torch.testing.assert_close(out.batch["advantages"], advantages("rloo", *tensors.values()), rtol=1e-5, atol=1e-6)


def test_wrong_options_are_named():
    rewards = terminal_rewards(ONE_TURN)
    with pytest.raises(ValueError, match=r"ppg_lookahead needs \+algorithm.ppg.lookahead"):
        advantages("ppg_lookahead", rewards, ONE_TURN)
    with pytest.raises(ValueError, match="lookahed"):
        advantages("ppg_lookahead", rewards, ONE_TURN, lookahed=2)
    with pytest.raises(ValueError, match="baseline must be one of"):
        advantages("ppg_full", rewards, ONE_TURN, baseline="rloo")
    shifted = torch.zeros_like(ONE_TURN)
    shifted[:, 2:] = ONE_TURN[:, :-2]
    with pytest.raises(ValueError, match="before the first turn"):
        advantages("ppg_full", torch.ones(ONE_TURN.shape), shifted)


# ---- rewards ---------------------------------------------------------------------------------------------------------
def test_rewards_stand_on_the_last_token_of_their_turn():
    mask = torch.tensor([[1, 1, 0, 0, 1, 0, 1, 1], [0, 1, 1, 1, 0, 0, 0, 0]])
    expected = torch.tensor([[0, 0.5, 0, 0, 0, 0, 0, -2.0], [0, 0, 0, 3.0, 0, 0, 0, 0]])
    assert torch.equal(rm_scores([[0.5, None, -2.0], [3.0]], mask), expected)
    with pytest.raises(ValueError, match="row 1 has 1 turns"):
        rm_scores([[0.5, 0.1, -2.0], [3.0, 4.0]], mask)


def test_an_agent_loop_hands_its_turn_rewards_on():
    def output(**fields):
        tokens = {"prompt_ids": [1, 2], "response_ids": [3, 4, 5, 6], "response_mask": [1, 0, 1, 1]}
        return TurnRewardOutput(**tokens, metrics={}, **fields)

    fields = output(turn_rewards=[0.25, 2.0]).as_dict()
    assert fields["rm_scores"].tolist() == [0.25, 0.0, 0.0, 2.0]
    assert "turn_rewards" not in fields
    assert output(turn_rewards=[0.25, None]).reward_score == 0.25
    assert output(turn_rewards=[0.25, 2.0], reward_score=9.0).as_dict()["rm_scores"].sum() == 2.25
