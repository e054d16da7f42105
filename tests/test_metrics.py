"""Metrics of a step: by turn index, by rows of work, by answers; against counting by hand, and against the documented
names."""

import json
import math
import re
import statistics
from pathlib import Path

import pytest
import torch

from ppg_fast.dialogues.packing import Sample, pack
from ppg_fast.functional import PolicyLossOutput
from ppg_fast.spec import PolicyLossSpec
from ppg_fast.training.metrics import TokenMeans, by_turn, completion_lengths, describe, row_shares, turn_ranges

ROOT = Path(__file__).parents[1]


def two_dialogues():
    """Three and two turns; 2 + 3 + 1 and 2 + 2 tokens of the policy's, 12 + 7 in all."""
    one = Sample(
        list(range(12)), [-1, -1, 0, 0, -1, 1, 1, 1, -1, 2, -1, -1], [1.0, 0.0, 0.5], 0, cut_off=[False, True, False]
    )
    two = Sample(list(range(7)), [-1, 0, 0, -1, -1, 1, 1], [0.25, 2.0], 0, cut_off=[False, False])
    return [one, two]


# ---- by turn ---------------------------------------------------------------------------------------------------------
def test_turns_have_a_metric_each_and_share_one_later():
    assert [label for label, _, _ in turn_ranges(3)] == ["0", "1", "2"]
    labels = turn_ranges(100)
    assert labels[15:] == [("15", 15, 16), ("16-31", 16, 32), ("32-63", 32, 64), ("64-127", 64, 128)]
    covered = [turn for _, first, end in labels for turn in range(first, end)]
    assert covered == list(range(128)), "every turn once"


def test_by_turn_is_the_mean_over_the_dialogues_that_get_there():
    generator = torch.Generator().manual_seed(0)
    values, counts = torch.randn(5, 40, generator=generator), torch.tensor([40, 3, 17, 1, 33])
    there = torch.arange(40) < counts[:, None]
    values[~there] = math.nan
    found = by_turn("x", values, there)
    for label, first, end in turn_ranges(40):
        kept = [float(values[s, t]) for s in range(5) for t in range(first, min(end, 40)) if t < counts[s]]
        assert found[f"x/{label}"] == pytest.approx(statistics.fmean(kept), abs=1e-6)
        assert found[f"x_std/{label}"] == pytest.approx(statistics.pstdev(kept), abs=1e-6)
    assert len(found) == 2 * len(turn_ranges(40))
    assert by_turn("x", values[:0], there[:0]) == {}
    holes = torch.tensor([[False, True, False]])
    assert set(by_turn("x", torch.ones(1, 3), holes)) == {"x/1", "x_std/1"}


def test_describe_says_return_and_advantage_of_each_turn():
    samples = two_dialogues()
    batch = pack(samples)
    returns = torch.tensor([[1.5, 0.5, 0.5], [2.25, 2.0, 0.0]])
    advantages = torch.tensor([[-0.75, -1.5, 0.0], [0.75, 1.5, 0.0]])
    found = describe(samples, batch, returns, advantages)
    assert found["turns/return/0"] == pytest.approx(1.875)
    assert found["turns/return_std/0"] == pytest.approx(0.375)
    assert (found["turns/return/2"], found["turns/return_std/2"]) == (0.5, 0.0), (
        "the second dialogue does not get there"
    )
    assert (found["turns/advantage/1"], found["turns/advantage_std/1"]) == (0.0, 1.5)
    assert found["reward"] == pytest.approx(1.875)
    assert found["turns/mean_count"] == 2.5
    assert found["active_turns"] == 4
    assert describe([], pack([]), torch.zeros(0, 1), torch.zeros(0, 1))["reward"] == 0.0


# ---- rows ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("spec", "shared", "full", "forward"),
    [
        (PolicyLossSpec(), False, 5 + 2, 0),
        (PolicyLossSpec("gspo"), False, 5 + 2, 0),
        (PolicyLossSpec("gspo"), True, 5 + 2, 1 + 2),  # the other turns of dialogues that have a turn with an advantage
        (PolicyLossSpec("gspo_turn"), True, 5 + 2, 0),
        (PolicyLossSpec("ppo", kl_coef=0.1), True, 10, 0),
        (PolicyLossSpec(entropy_coef=0.1), False, 10, 0),
    ],
)
def test_rows_are_counted_by_what_the_head_does(spec, shared, full, forward):
    """The policy's tokens of turns with an advantage; the shares add to one."""
    batch = pack(two_dialogues())
    found = row_shares(batch, torch.tensor([[-1.0, 2.0, 0.0], [0.0, 0.5, 0.0]]), spec, shared)
    assert found["rows/full_share"] == pytest.approx(full / 19)
    assert found["rows/forward_only_share"] == pytest.approx(forward / 19)
    assert sum(found.values()) == pytest.approx(1.0)


def test_rows_agree_with_what_the_loss_reads():
    """gspo reads the log-probs of a sequence's other turns; its output hides them by contract, its active rows do
    not."""
    from ppg_fast.functional.loss import LossRows

    batch = pack(two_dialogues())
    advantages = torch.tensor([[-1.0, 2.0, 0.0], [0.0, 0.0, 0.0]])
    lengths = torch.diff(batch.cu_seqlens).long()
    per_token = advantages[torch.arange(2).repeat_interleave(lengths), batch.turn_ids.clamp(min=0)] * (
        batch.turn_ids >= 0
    )
    for loss_type in ("ppo", "gspo", "gspo_turn"):
        spec = PolicyLossSpec(loss_type)
        options = {
            "cu_seqlens": batch.cu_seqlens,
            "turn_ids": batch.turn_ids,
            "spec": spec,
            "skip_zero_advantages": True,
        }
        rows = LossRows.of(batch.labels, per_token, torch.device("cpu"), old_logprobs=torch.zeros(19), **options)
        read = int((rows.tokens.labels >= 0).sum())
        found = row_shares(batch, advantages, spec, shared_ratios=True)
        assert round(19 * (found["rows/full_share"] + found["rows/forward_only_share"])) == read, loss_type


# ---- answers and tokens ----------------------------------------------------------------------------------------------
def test_lengths_of_answers():
    found = completion_lengths(two_dialogues())
    assert (found["completions/mean_length"], found["completions/min_length"], found["completions/max_length"]) == (
        2.0,
        1,
        3,
    )
    assert found["completions/clipped_ratio"] == pytest.approx(1 / 5)
    terminated = [found[f"completions/{which}_terminated_length"] for which in ("mean", "min", "max")]
    assert terminated == [7 / 4, 1, 2]
    logged = [Sample([1, 2, 3], [-1, 0, 0], [1.0, 1.0, 1.0], 0)]
    assert completion_lengths(logged) == {f"completions/{which}_length": 2 for which in ("mean", "min", "max")}, (
        "two turns were not read"
    )


def test_token_means_weigh_micro_batches_by_their_tokens():
    def out(logprobs, entropy):
        return PolicyLossOutput(
            torch.tensor(0.5), torch.tensor(logprobs), torch.zeros(3), {"entropy": torch.tensor(entropy)}
        )

    means = TokenMeans()
    means.add(out([-1.0, 0.0, -2.0], 0.3), torch.tensor([-1.5, -9.0, -2.0]))
    means.add(out([-4.0, 0.0, 0.0], 0.6), torch.tensor([-1.0, 0.0, 0.0]), old_logprobs=torch.tensor([-1.25, 0.0, 0.0]))
    found = means.means()
    assert found["loss"] == 1.0
    assert found["logprob"] == pytest.approx(-7 / 3)
    assert found["entropy"] == pytest.approx((2 * 0.3 + 0.6) / 3)
    assert found["sampling/sampling_logp_difference/mean"] == pytest.approx((0.5 + 0.0 + 0.25) / 3)
    assert found["sampling/sampling_logp_difference/max"] == pytest.approx(0.5)
    assert "sampling/sampling_logp_difference/max" not in TokenMeans().means()
    together = TokenMeans.total([means, means, TokenMeans()]).means()
    assert together == pytest.approx({**found, "loss": 2.0}), (
        "ranks: sums of losses, means over all tokens, the largest of all"
    )


def test_the_two_sides_of_the_clip_are_told_apart():
    from ppg_fast.functional import policy_loss_from_logprobs

    logprobs = torch.tensor([0.5, -0.5, 0.5, -0.5, 0.0], requires_grad=True)
    advantages = torch.tensor([1.0, -1.0, -1.0, 1.0, 1.0])
    sides = {}
    for loss_type in ("ppo", "cispo"):
        spec = PolicyLossSpec(loss_type, clip_low=0.25, clip_high=0.3)
        out = policy_loss_from_logprobs(logprobs, advantages, old_logprobs=torch.zeros(5), spec=spec)
        sides[loss_type] = [round(5 * float(out.metrics[f"clip_fraction{side}"])) for side in ("_low", "_high", "")]
    assert sides == {"ppo": [1, 1, 2], "cispo": [2, 2, 4]}


# ---- the documented names --------------------------------------------------------------------------------------------
def documented():
    """Names of the table in docs/training.md, placeholders as patterns."""
    text = (ROOT / "docs/training.md").read_text()
    table = text.split("## Metrics\n")[1].split("\n## ")[0]
    names = [
        name
        for line in table.splitlines()
        if line.startswith("| `")
        for name in re.findall(r"`([^`]+)`", line.split("|")[1])
    ]
    return {
        name: re.compile(re.escape(name).replace("<t>", r"\d+(-\d+)?").replace("<kind>", r"\w+") + "$")
        for name in names
    }


def test_the_documented_metrics_are_those_that_runs_log(tmp_path):
    """Both ways: every name that four runs log is in the table (what rewards of one's own log has its page), and
    every name of the table is logged by one of them."""
    pytest.importorskip("transformers")
    from test_cli import SHORT, TINY, dialogue, write

    from ppg_fast.cli import main

    data = write(tmp_path / "log.jsonl", [dialogue(i) for i in range(6)])
    clipped = ["--loss-type", "ppo", "--num-iterations", "2", "--kl-coef", "0.1", "--importance-cap", "2"]
    persona = [
        *SHORT,
        *clipped,
        "--imitation-steps",
        "60",
        "--max-steps",
        "2",
        "--learning-rate",
        "0.01",
        "--eval-dialogues",
        "8",
    ]
    offline = ["--data", data, "--max-steps", "2", "--max-new-tokens", "2", *TINY]
    logged = set()
    soft_q = [*offline, "--loss-type", "soft_q"]
    rewards = tmp_path / "rewards.py"
    rewards.write_text("def even(messages):\n    return float(len(messages[-1]['content']) % 2)\n")
    valued = [*SHORT, "--max-steps", "2", "--baseline", "value", "--reward", f"{rewards}:even@turn"]
    runs = {"persona": persona, "offline": offline, "soft_q": soft_q, "valued": valued}
    for name, flags in runs.items():
        assert main(["train", "--output-dir", str(tmp_path / name), *flags]) == 0
        for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines():
            logged |= json.loads(line).keys()
    names = documented()
    assert len(names) > 40
    of_rewards = re.compile(r"(eval/)?rewards/")
    unknown = [name for name in sorted(logged) if not any(pattern.match(name) for pattern in names.values())]
    assert [name for name in unknown if not of_rewards.match(name)] == []
    assert [name for name, pattern in names.items() if not any(pattern.match(other) for other in logged)] == []
