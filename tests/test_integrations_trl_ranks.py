"""Two gloo ranks whose groups straddle them train as one rank does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed")
HERE = Path(__file__).with_name("helpers")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, str(HERE / "trl_ranks.py"), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, cwd=folder)
    assert done.returncode == 0, done.stderr[-4000:]
    read = [(1, 0), (2, 0), (2, 1)]
    alone, *both = (torch.load(folder / f"rank{rank}of{world}.pt", weights_only=True) for world, rank in read)
    return alone, both


CHOICES = [("lookahead:2", "leave_one_out"), ("full", "group_std"), ("segment:2", "group_mean")]


@pytest.mark.parametrize("choice", CHOICES, ids=" ".join)
def test_two_ranks_train_as_one(results, choice):
    """Advantages of every rollout, losses, metrics, the completions table and the weights after three steps."""
    alone, both = results[0]["runs"][choice], [rank["runs"][choice] for rank in results[1]]
    # of different rollouts
    assert all(one != two for one, two in zip(*(rank["lengths"] for rank in both), strict=True))
    for step, expected in enumerate(alone["advantages"]):
        assert expected.abs().max() > 0.1
        first = 0
        for rank in both:
            rows = rank["advantages"][step]
            assert alone["lengths"][step][first : first + len(rows)] == rank["lengths"][step]
            width = max(rows.shape[1], expected.shape[1])
            mine = torch.nn.functional.pad(rows, (0, width - rows.shape[1]))
            torch.testing.assert_close(mine, expected[first : first + len(rows)], rtol=1e-6, atol=1e-7)
            first += len(rows)
        assert first == len(expected) == 4
    torch.testing.assert_close(torch.tensor(both[0]["losses"]), torch.tensor(alone["losses"]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.tensor(both[0]["metrics"]), torch.tensor(alone["metrics"]))
    assert both[0]["shown"] == both[1]["shown"]
    assert len({len(row) for row in both[0]["shown"]}) > 1
    for mine, expected in zip(both[0]["shown"], alone["shown"], strict=True):
        torch.testing.assert_close(torch.tensor(mine), torch.tensor(expected))
    for rank in both:
        for name, value in alone["weights"].items():
            torch.testing.assert_close(
                rank["weights"][name], value, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.mark.parametrize("own_group", [False, True], ids=["head in the root group", "head in a group of its own"])
def test_fsdp2_averages_the_heads_gradient(results, own_group):
    """Ranks with different data: the sharded gradients, gathered, are the mean over all of it."""
    alone = results[0]["heads"][own_group]
    for rank in results[1]:
        for name, expected in alone.items():
            actual = rank["heads"][own_group][name]
            torch.testing.assert_close(
                actual, expected, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
            )
