"""Two gloo ranks train as one process does: losses, metrics and weights, with DDP and FSDP2."""

import json
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import distributed

pytest.importorskip("transformers")

import ranks_case
from kill_case import CLOCKS, write_dialogues
from ranks_case import CASES, JOBS, LOSSES, PARALLEL, train
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import ppg_fast
from ppg_fast.dialogues.chat_format import ChatFormat, make_word_tokenizer
from ppg_fast.distributed import Ranks
from ppg_fast.models.causal_lm import make_model
from ppg_fast.rollouts.persona import PersonaInterview, words
from ppg_fast.rollouts.rollout import collect_groups
from ppg_fast.training import checkpoint

HERE = Path(__file__).with_name("helpers")


ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]),
}


def launch(world: int, *command: object, timeout: int = 300) -> subprocess.CompletedProcess:
    starter = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    return subprocess.run(
        [*starter, *map(str, command)], env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout, check=False
    )


@pytest.fixture(scope="module")
def alone():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield ranks_case.everything("auto")
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of all runs; with those of one process, whole and cut."""
    folder, threads = tmp_path_factory.mktemp("ranks"), torch.get_num_threads()
    write_dialogues(folder / "log.jsonl")
    with lone_rank():
        for job, options in JOBS.items():
            options = (*options, *(("--data", folder / "log.jsonl") if job == "offline" else ()))
            assert train(*options, "--output-dir", folder / f"{job}-alone") == 0
            assert train(*options, "--output-dir", folder / f"{job}-alone-cut", cut_at=3) == 143
    torch.set_num_threads(threads)
    return folder


@pytest.fixture(scope="module")
def both(folder):
    done = launch(2, HERE / "ranks_case.py", folder)
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"rank{rank}of2.pt", weights_only=True) for rank in range(2)]


@contextmanager
def lone_rank():
    """What torchrun makes of one process: a group of one, in which dialogues are drawn as any number of ranks draws
    them."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("parallel", PARALLEL)
@pytest.mark.parametrize("name", [name for name in CASES if name != "bf16"])
def test_two_ranks_train_as_one(name, parallel, alone, both):
    expected, ranks = alone[name], [rank[parallel][name] for rank in both]
    assert repr(ranks[0]["rows"]) == repr(ranks[1]["rows"]), "every rank says the same"
    assert [row.keys() for row in ranks[0]["rows"]] == [row.keys() for row in expected["rows"]]
    for mine, theirs in zip(ranks[0]["rows"], expected["rows"], strict=True):
        assert mine == pytest.approx(theirs, rel=2e-4, abs=2e-5, nan_ok=True)
    for rank in ranks:
        assert rank["weights"].keys() == expected["weights"].keys()
        for weight, value in expected["weights"].items():
            torch.testing.assert_close(
                rank["weights"][weight], value, rtol=1e-3, atol=5e-5, msg=lambda text, w=weight: f"{w}: {text}"
            )


@pytest.mark.parametrize("parallel", PARALLEL)
def test_mixed_precision_keeps_weights_and_losses(parallel, alone, both):
    """Passes in bfloat16, weights and their updates in float32: losses near those of float32, and not the same."""
    for result in (alone["bf16"], both[0][parallel]["bf16"]):
        losses, expected = ([row["loss"] for row in of["rows"]] for of in (result, alone["sequence_sum"]))
        assert losses == pytest.approx(expected, rel=0.05)
        assert losses != pytest.approx(expected, rel=1e-5)
        assert {weight.dtype for weight in result["weights"].values()} == {torch.float32}


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


def rows(folder):
    return [
        {k: v for k, v in json.loads(line).items() if k not in CLOCKS}
        for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]


def same_run(one, other):
    """Same rows and weights, to the rounding of another order of sums."""
    assert len(rows(one)) == len(rows(other)) > 5
    for mine, theirs in zip(rows(one), rows(other), strict=True):
        assert mine.pop("phase") == theirs.pop("phase")
        assert mine == pytest.approx(theirs, rel=1e-3, abs=2e-4)
    mine, theirs = (load_file(folder / "checkpoint/model.safetensors") for folder in (one, other))
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(
            mine[name], value, rtol=1e-2, atol=2e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("parallel", PARALLEL)
def test_all_ranks_end_alike(parallel, both):
    codes = [rank["codes"][parallel] for rank in both]
    assert (
        codes[0]
        == codes[1]
        == {
            f"{job} {part}": 143 if part == "cut" else 0
            for job in JOBS
            for part in ("whole", "cut", "resumed", "taken up")
        }
    )


@pytest.mark.parametrize("parallel", PARALLEL)
@pytest.mark.parametrize("job", JOBS)
class TestJobs:
    def test_two_ranks_run_it_as_one(self, job, parallel, folder, both):
        same_run(folder / f"{job}-{parallel}", folder / f"{job}-alone")
        state = json.loads((folder / f"{job}-{parallel}/summary.json").read_text())
        assert (state["status"], state["ranks"]) == ("finished", 2)

    def test_resume_gives_the_same_bits(self, job, parallel, folder, both):
        whole, resumed = folder / f"{job}-{parallel}", folder / f"{job}-{parallel}-cut"
        assert rows(resumed) == rows(whole)
        weights = [(run / "checkpoint/model.safetensors").read_bytes() for run in (resumed, whole)]
        assert weights[0] == weights[1]

    def test_one_process_goes_on_with_what_two_ranks_began(self, job, parallel, folder, both):
        run = folder / f"{job}-{parallel}-moved"
        assert json.loads((run / "summary.json").read_text())["status"] == "terminated"
        with lone_rank():
            assert train("--resume", run, "--parallel", "ddp") == 0
        same_run(run, folder / f"{job}-alone")

    def test_two_ranks_go_on_with_what_one_process_began(self, job, parallel, folder, both):
        same_run(folder / f"{job}-alone-to-{parallel}", folder / f"{job}-alone")

    def test_the_checkpoint_is_one_of_transformers(self, job, parallel, folder, both):
        run = folder / f"{job}-{parallel}"
        model = AutoModelForCausalLM.from_pretrained(run / "checkpoint")
        assert model.lm_head.weight is model.model.embed_tokens.weight
        kept = sorted(path.name for path in next((run / "checkpoints").glob("step-*")).rglob("*") if path.is_file())
        assert kept == (
            ["SHA256SUMS", "state.pt"]
            if parallel == "ddp"
            else [".metadata", "SHA256SUMS", "__0_0.distcp", "__1_0.distcp", "state.pt"]
        )


def test_a_checkpoint_that_one_rank_cannot_write_or_read_is_none_for_all(both):
    for rank in both:
        found = rank["failures"]
        assert re.search(r"step-00000002: .*File too large", found["refusal"])
        assert found["kept"] == ["step-00000001"]
        step, values, part = found["found"]
        assert (step, values.tolist(), part) == (1, [1.0] * 4096, 2048)
    wrong = r"the checksum of shards/__1_0.distcp differs"
    said = rf"damaged checkpoint .*step-00000003 \({wrong}\): going on from step-00000001"
    assert [len(rank["failures"]["said"]) for rank in both] == [1, 0]
    assert re.search(said, both[0]["failures"]["said"][0])


def test_a_rank_that_is_lost_is_an_error_on_the_others(tmp_path):
    """Without torchrun, which would end them: rank 0 finds out by itself, says so, and the run can go on. One test of
    all losses, whose ranks are forks of one process."""
    write_dialogues(tmp_path / "log.jsonl")
    command = [sys.executable, HERE / "ranks_case.py", tmp_path, *LOSSES]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    ends = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [end["how"] for end in ends] == list(LOSSES)
    for end in ends:
        run, said = tmp_path / end["how"], end["said"]
        assert end["status"] == 1, said
        rule = (
            "a rank died or did not answer within 5 seconds (rank_timeout); --resume goes on from the newest "
            "checkpoint: "
        )
        assert f"ppg-fast: {rule}" in said
        assert "Traceback" not in said
        assert json.loads((run / "summary.json").read_text())["status"] == "failed"
        assert [p.name for p in checkpoint.checkpoints(run / "checkpoints")] == ["step-00000002"]
        with lone_rank():
            assert train("--resume", run, "--parallel", "fsdp2") == 0


@pytest.mark.parametrize("name", PARALLEL)
def test_accelerate_launch_says_how(name, monkeypatch):
    """The shipped configs, as accelerate's own launcher reads them and tells its processes."""
    launch = pytest.importorskip("accelerate.commands.launch")
    from accelerate.utils.launch import prepare_multi_gpu_env

    config = Path(ppg_fast.__file__).parent / "launch" / f"{name}.yaml"
    command = ["--config_file", str(config), "--num_processes", "2", "-m", "ppg_fast.cli", "train"]
    arguments, _, _ = launch._validate_launch_command(launch.launch_command_parser().parse_args(command))
    assert (arguments.num_processes, arguments.multi_gpu or arguments.use_fsdp) == (2, True)
    for key, value in prepare_multi_gpu_env(arguments).items():
        if key.startswith(("ACCELERATE_", "FSDP_")):
            monkeypatch.setenv(key, value)
    with lone_rank():
        ranks = Ranks()
        assert (ranks.sharded, ranks.dtype) == (name == "fsdp2", torch.bfloat16)
        assert not Ranks("ddp").sharded, "a setting of the run wins"
        monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
        if name == "fsdp2":
            with pytest.raises(
                ValueError, match="fsdp_offload_params of the accelerate config must be false, got 'true'"
            ):
                Ranks()


def test_a_rank_takes_the_device_of_its_number(monkeypatch):
    for key, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(ValueError, match="device must be auto, cpu or cuda, got 'cuda:1'"):
        Ranks.join(device="cuda:1")


def test_work_is_shared_out_evenly_and_completely():
    ranks, sizes = [Ranks() for _ in range(3)], [50, 1, 1, 20, 30, 1, 48]
    shares = []
    for number, one in enumerate(ranks):
        one.rank, one.world = number, 3
        shares.append(one.share(sizes))
    assert sorted(i for share in shares for i in share) == list(range(len(sizes)))
    assert [sum(sizes[i] for i in share) for share in shares] == [51, 50, 50]
    assert Ranks().share(sizes) == list(range(len(sizes)))


def test_a_part_of_the_rollouts_is_what_it_would_be_among_all():
    """So that any number of ranks draws the same dialogues."""
    chat = ChatFormat(make_word_tokenizer(words()))
    model = make_model(len(chat.tokenizer), width=16, layers=1)

    def roll_out(only=None):
        generator = torch.Generator().manual_seed(3)
        limits = {"generator": generator, "max_new_tokens": 4, "max_turns": 2, "only": only}
        found = collect_groups(model, chat, PersonaInterview, [5, 6, 7], 2, **limits)
        return [(r.sample.group_id, r.sample.tokens) for r in found], int(torch.randint(2**30, (), generator=generator))

    everything, after = roll_out()
    for only in (range(0), range(2), range(2, 5), range(5, 6)):
        part, then = roll_out(only)
        assert part == [everything[i] for i in only]
        assert then == after, "all ranks go on from the same state"
