"""One process and two gloo ranks end alike: what is counted is counted over all, and what one hears all do."""

import json
import subprocess
import sys

import pytest
import torch

pytest.importorskip("transformers")

import ends_case
from kill_case import CLOCKS
from test_ranks import ENVIRONMENT, HERE, lone_rank

from ppg_fast.distributed import Ranks
from ppg_fast.stopping import Stopped

CODES = {"some": 0, "none": 1, "large": 1, "whole": 0, "cut": 143, "resumed": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ends")


@pytest.fixture(scope="module")
def two(folder):
    command = [sys.executable, HERE / "ends_case.py", folder]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"rank{rank}of2.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def one(folder):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with lone_rank():
        codes = ends_case.ends(folder, 0, 1)
    torch.set_num_threads(threads)
    return codes


def test_they_end_alike(one, two):
    """`some` leaves all dialogues of one rank unscored, which is no reason to end."""
    assert [one, *two] == [CODES] * 3


def rows(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in (*CLOCKS, "rollout_time")} for row in lines]


def test_they_count_alike(folder, one, two):
    mine, theirs = (rows(folder / f"some-{world}") for world in (1, 2))
    assert [r.get("rewards/unscored") for r in mine] == [r.get("rewards/unscored") for r in theirs]
    assert sum(r.get("rewards/unscored", 0) for r in mine) > 0


def test_what_all_end_with_names_the_same_dialogue(folder, one, two):
    for name, said in (("none", "no turn of "), ("large", "at dialogue 'q1', turn 0, must be a finite")):
        ends = [json.loads((folder / f"{name}-{world}/summary.json").read_text()) for world in (1, 2)]
        assert ends[0]["error"] == ends[1]["error"]
        assert said in ends[0]["error"]


def test_a_signal_to_one_rank_stops_all_and_they_go_on_with_the_same_bits(folder, one, two):
    for world in (1, 2):
        assert rows(folder / f"cut-{world}") == rows(folder / f"whole-{world}")
        weights = [(folder / f"{run}-{world}/checkpoint/model.safetensors").read_bytes() for run in ("cut", "whole")]
        assert weights[0] == weights[1]


def test_an_error_travels_with_its_class():
    """Of a rank by itself, without messages."""
    ranks = Ranks()
    assert ranks.together(lambda: 3) == 3
    with pytest.raises(Stopped):
        ranks.together(lambda: (_ for _ in ()).throw(Stopped(15)))
