"""What ends a run: signals anywhere in it, with the same bits afterwards, and at once where they come twice."""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from test_checkpoint import SHORT, rows, status, weights

from ppg_fast import stopping
from ppg_fast.cli import main
from ppg_fast.distributed import Ranks
from ppg_fast.endpoint import Endpoint
from ppg_fast.jobs.persona import PersonaJob
from ppg_fast.training.evaluation import on_logged_prefix

pytestmark = pytest.mark.usefixtures("signals_are_heard")
CODES = {signal.SIGINT: (130, "stopped"), signal.SIGTERM: (143, "terminated"), signal.SIGHUP: (129, "terminated")}


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    path = tmp_path_factory.mktemp("log") / "log.jsonl"
    said = [{"role": "user", "content": "who ?"}, {"role": "assistant", "content": "i am anna ."}]
    lines = [{"id": f"d{i}", "group_id": "g", "messages": said * (1 + i % 2)} for i in range(10)]
    path.write_text("".join(json.dumps({**d, "turn_rewards": [0.5] * (len(d["messages"]) // 2)}) + "\n" for d in lines))
    return path


@pytest.fixture(scope="module")
def offline(log):
    return [
        *SHORT[: SHORT.index("--imitation-steps")],
        *["--max-steps", "4", "--vocab-size", "280", "--data"],
        str(log),
    ]


def train(folder, options):
    return main(["train", "--output-dir", str(folder), *options])


@pytest.fixture(scope="module")
def whole(tmp_path_factory, offline):
    folder = tmp_path_factory.mktemp("whole")
    runs = {"persona": SHORT, "offline": offline}
    assert [train(folder / job, options) for job, options in runs.items()] == [0, 0]
    return {job: (folder / job, options) for job, options in runs.items()}


class Sender:
    """Counts the places where a signal is heard, and sends one at the ``at``-th; 0: never."""

    def __init__(self, patch, at, number):
        self.count, self.at, self.number = 0, at, number
        for owner in (stopping, Ranks):
            patch.setattr(owner, "check", self.counting(owner.check))
        patch.setattr(on_logged_prefix, "__defaults__", (stopping.check,))

    def counting(self, check):
        def counted(*arguments):
            self.count += 1
            if self.count == self.at:
                os.kill(os.getpid(), self.number)
            check(*arguments)

        return counted


@pytest.mark.parametrize("job", ["persona", "offline"])
def test_a_signal_anywhere_and_resume_give_the_bits_of_a_whole_run(job, whole, tmp_path, monkeypatch, capsys):
    reference, options = whole[job]
    with monkeypatch.context() as patch:
        places = Sender(patch, 0, 0)
        assert train(tmp_path / "counted", options) == 0
    tried = sorted({max(1, round(places.count * share)) for share in (0.02, 0.4, 0.7, 1.0)})
    for at, number in zip(tried, [signal.SIGHUP, signal.SIGTERM, signal.SIGINT] * 2, strict=False):
        run = tmp_path / f"run-{at}"
        with monkeypatch.context() as patch:
            Sender(patch, at, number)
            assert (train(run, options), status(run)) == CODES[number], at
        assert not (run / "metrics.jsonl").exists() or rows(run) == rows(reference)[: len(rows(run))]
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
        capsys.readouterr()
        assert main(["train", "--resume", str(run)]) == 0
        taken = [r["step"] for r in rows(run) if r["phase"] == "train"]
        assert rows(run) == rows(reference), (at, taken)
        assert weights(run) == weights(reference)
        if job == "persona":
            assert (run / "samples.jsonl").read_bytes() == (reference / "samples.jsonl").read_bytes()


def test_what_was_done_is_kept_though_no_checkpoint_was_due(whole, tmp_path, monkeypatch):
    """Stopped within the evaluation after step 2 of a run that saves every 1000 steps: steps 1 and 2 are there."""
    _, options = whole["persona"]
    evaluations, measure = [], PersonaJob.measure

    def interrupted(self, when):
        evaluations.append(when)
        if len(evaluations) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return measure(self, when)

    monkeypatch.setattr(PersonaJob, "measure", interrupted)
    assert train(tmp_path / "run", [*options, "--save-every", "1000"]) == 143
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000001", "step-00000003"]
    assert evaluations == ["before", ""], "nothing is evaluated once more"
    assert not (tmp_path / "run/samples_after.md").exists()


def listening(code: str, *numbers: int, pause: float = 0.3) -> tuple[int, float, str]:
    """Exit status, seconds from the last signal to the end, and stderr of a program that gets ``numbers`` once it says
    that it is ready."""
    # the module alone, which needs nothing: importing torch takes seconds, and so does its end
    program = f"import sys, time\nsys.path.append({str(Path(stopping.__file__).parent)!r})\nimport stopping\n"
    program += textwrap.dedent(code)
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as p:
        assert p.stdout.readline() == "ready\n", p.stderr.read()
        for number in numbers:
            time.sleep(pause)
            p.send_signal(number)
        start = time.monotonic()
        said = p.communicate(timeout=60)[1]
        return p.returncode, time.monotonic() - start, said


DEAF = """
    with stopping.on_signals(at_once=False, notice="saving"):
        print("ready", flush=True)
        time.sleep(30)
"""


@pytest.mark.parametrize("numbers", [(2, 2), (15, 15), (15, 2), (1, 15)])
def test_the_second_signal_ends_the_process_whatever_runs(numbers):
    code, seconds, said = listening(DEAF, *numbers)
    assert code == 128 + numbers[1]
    assert seconds < 10  # not the 30 of its sleep
    assert "saving" in said
    assert "Traceback" not in said


def test_the_second_signal_reaches_a_process_that_is_inside_of_one_long_operation():
    """Where Python calls no handler: a lock that is taken in C, without the interpreter in between."""
    held = """
        import ctypes
        with stopping.on_signals(at_once=False):
            print("ready", flush=True)
            end = time.monotonic() + 30
            while time.monotonic() < end:
                ctypes.CDLL(None).sleep(30)  # woken by each signal, and goes on in C
    """
    code, seconds, _ = listening(held, 15, 15)
    assert (code, seconds < 10) == (143, True)


def test_hangups_and_launchers_say_it_twice():
    """A terminal that closes may send SIGHUP by the kernel and by its shell; torchrun passes on what its group got."""
    slow = """
        with stopping.on_signals(at_once=False, repeats={}):
            print("ready", flush=True)
            time.sleep(1.5)
    """
    assert listening(slow.format(0.0), 1, 1, pause=0.1)[0] == 0
    assert listening(slow.format(3.0), 2, 15, pause=0.1)[0] == 0


def test_threads_are_not_waited_for():
    """Two requests that nobody answers: the first signal ends them, and the process does not wait at its end."""
    blocked = """
        import threading
        def main():
            print("ready", flush=True)
            stopping.side_by_side(lambda _: threading.Event().wait(60), [1, 2, 3], 2)
            return 0
        raise SystemExit(stopping.as_command(main)())
    """
    code, seconds, said = listening(blocked, 15)
    assert (code, said) == (143, "ppg-fast: stopped (SIGTERM)\n")
    assert seconds < 10  # not the 30 of its sleep


def test_side_by_side_keeps_the_order_and_raises_the_first_error():
    assert stopping.side_by_side(lambda i: i * i, range(20), 3) == [i * i for i in range(20)]
    assert stopping.side_by_side(lambda i: i, [], 3) == []
    begun = []

    def fails(i):
        begun.append(i)
        if i == 2:
            raise ValueError(i)
        time.sleep(0.01)

    with pytest.raises(ValueError, match="2"):
        stopping.side_by_side(fails, range(1000), 2)
    assert len(begun) < 50


def test_a_wait_between_two_tries_ends_at_a_signal(monkeypatch):
    """A server that is not there, asked again after 0.5 s, 1 s, 2 s, ...: 8 s and more."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        free.close()
    endpoint = Endpoint(url, "m", retries=5)
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM))
    start = time.monotonic()
    timer.start()
    with stopping.on_signals(at_once=False), pytest.raises(stopping.Stopped, match="SIGTERM"):
        endpoint.map(lambda _: endpoint.chat([]), [1, 2])
    assert time.monotonic() - start < 6
    assert stopping.requested() == 0, "it was heard"


def test_score_ends_at_a_signal(log, tmp_path):
    """Its judge accepts connections and never answers."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        judge = ["--reward", "judge", "--judge", f"http://127.0.0.1:{silent.getsockname()[1]}/v1", "--judge-model", "m"]
        timer = threading.Timer(2.0, os.kill, (os.getpid(), signal.SIGTERM))
        start = time.monotonic()
        timer.start()
        assert main(["score", str(log), "-o", str(tmp_path / "scored.jsonl"), *judge]) == 143
    assert time.monotonic() - start < 20  # of the minutes that a judge has
    assert not (tmp_path / "scored.jsonl").exists()


def test_a_signal_that_somebody_swallowed_is_heard_by_who_listens_next():
    """A bare ``except:`` of a library, before a run begins to listen by itself."""
    with stopping.on_signals():
        with suppress(BaseException):
            signal.raise_signal(signal.SIGTERM)
        with stopping.on_signals(at_once=False), pytest.raises(stopping.Stopped, match="SIGTERM"):
            stopping.check()
    assert stopping.requested() == 0


def test_a_hangup_that_is_ignored_stays_so():
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopping.on_signals(at_once=False):
            os.kill(os.getpid(), signal.SIGHUP)
            assert stopping.requested() == 0
    finally:
        signal.signal(signal.SIGHUP, before)
