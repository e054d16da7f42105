"""Two gloo ranks train as one process does: losses, metrics and weights, with DDP and FSDP2."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

import ranks_case
from ranks_case import CASES, PARALLEL

HERE = Path(__file__).parent


def launch(world: int, *command: object, timeout: int = 150) -> subprocess.CompletedProcess:
    starter = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run([*starter, *map(str, command)], env=environment, capture_output=True, text=True, timeout=timeout, check=False)


@pytest.fixture(scope="module")
def alone():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield ranks_case.everything("auto")
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    done = launch(2, HERE / "ranks_case.py", folder)
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"rank{rank}of2.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("parallel", PARALLEL)
@pytest.mark.parametrize("name", CASES)
def test_two_ranks_train_as_one(name, parallel, alone, both):
    expected, ranks = alone[name], [rank[parallel][name] for rank in both]
    assert repr(ranks[0]["rows"]) == repr(ranks[1]["rows"]), "every rank says the same"
    assert [row.keys() for row in ranks[0]["rows"]] == [row.keys() for row in expected["rows"]]
    for mine, theirs in zip(ranks[0]["rows"], expected["rows"], strict=True):
        assert mine == pytest.approx(theirs, rel=2e-4, abs=2e-5, nan_ok=True)
    for rank in ranks:
        assert rank["weights"].keys() == expected["weights"].keys()
        for weight, value in expected["weights"].items():
            torch.testing.assert_close(rank["weights"][weight], value, rtol=1e-3, atol=5e-5, msg=lambda text, w=weight: f"{w}: {text}")


def test_the_cases_are_what_they_say(alone):
    """Something is learned where something is to be learned."""
    for name, result in alone.items():
        learned = any(row["grad_norm"] > 0 for row in result["rows"])
        assert learned == (name not in ("no dialogue at all", "nothing to learn")), name
    assert [row["skipped_steps"] for row in alone["not finite on one rank"]["rows"]] == [0, 1, 1]


def test_fsdp2_shards_and_ddp_does_not(alone, both):
    whole = alone["sequence_sum"]["shards"]
    assert [rank["ddp"]["sequence_sum"]["shards"] for rank in both] == [whole, whole]
    parts = [rank["fsdp2"]["sequence_sum"]["shards"] for rank in both]
    assert sum(parts) == whole
    assert max(parts) < 0.6 * whole
