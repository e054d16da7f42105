"""`ppg-fast rate`: ratings over HTTP that a run reads back, killed servers that lose none, who may not ask, a running
training, a terminal, and a real browser where there is one."""

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager

import pytest
from browser import CHROMIUM, Browser

from ppg_fast.cli import main
from ppg_fast.cli.rate import output_of
from ppg_fast.dialogues.dialogue import read_dialogues
from ppg_fast.rating.answers import Answers
from ppg_fast.rating.server import Server
from ppg_fast.rating.tasks import Tasks
from ppg_fast.rating.terminal import rate
from ppg_fast.rewards.ratings import Ratings
from ppg_fast.rewards.scoring import Transcript


def dialogue(name, turns=2, group="g"):
    messages = [{"role": "user", "content": f"<b>{name}</b> asks"}]
    for turn in range(turns):
        messages += [{"role": "assistant", "content": f"{name} says {turn}"}, {"role": "user", "content": "and?"}]
    return {"id": name, "group_id": group, "messages": messages, "turn_rewards": [0.0] * turns}


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(dialogue(name, 1 + i)) + "\n" for i, name in enumerate("abcd")))
    return path


@contextmanager
def serving(source, path, pairs=False):
    answers = Answers(path, "ann")
    with Server(Tasks(source, answers, pairs), 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield Client(server.url)
        finally:
            server.shutdown()
            thread.join()
            answers.close()


class Client:
    """What a page does, without a page."""

    def __init__(self, url):
        self.host, _, rest = url.removeprefix("http://").partition("/")
        self.token = rest.strip("/")

    def ask(self, method, path, body=None, **headers):
        connection = http.client.HTTPConnection(self.host, timeout=20)
        text = body if body is None or isinstance(body, (str, bytes)) else json.dumps(body)
        connection.request(method, path, text, headers)
        answer = connection.getresponse()
        found = answer.status, answer.read()
        connection.close()
        return found

    def __call__(self, what, **body):
        status, text = self.ask("POST" if body or what == "undo" else "GET", f"/{self.token}/{what}", body or None)
        return status, json.loads(text)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_scripted_rater_over_http_and_its_ratings_are_the_rewards(data, tmp_path):
    path = tmp_path / "out.jsonl"
    true = {(d.id, t): 1 + (ord(d.id) + t) % 5 for d in read_dialogues(data) for t in range(len(d.turn_rewards))}
    with serving(data, path) as client:
        status, state = client("next")
        assert (status, state["left"], state["done"], state["undo"]) == (200, 10, 0, False)
        while state["id"] is not None:
            _, state = client("rate", id=state["id"], turn=state["turn"], rating=true[state["id"], state["turn"]])
        assert (state["left"], state["done"], state["undo"]) == (0, 10, True)
    found = Ratings(str(path))([Transcript(d.id, d.messages) for d in read_dialogues(data)])
    assert {(d.id, t): v for d, row in zip(read_dialogues(data), found, strict=True) for t, v in enumerate(row)} == true
    assert lines(path)[0] == {"id": "a", "turn": 0, "rating": true["a", 0], "rater": "ann"}
    with serving(data, path) as client:
        assert client("next")[1]["done"] == 10, "another day goes on where this one ended"


def test_undo_takes_the_line_back_and_skip_writes_none(data, tmp_path):
    path = tmp_path / "out.jsonl"
    with serving(data, path) as client:
        client("rate", id="a", turn=0, rating=2)
        _, state = client("rate", id="b", turn=0, rating=3)
        assert (state["id"], state["turn"]) == ("b", 1)
        assert [said.get("rating") for said in state["dialogues"][0] if "turn" in said] == [3, None]
        _, state = client("skip", id="b", turn=1)
        assert state["id"] == "c"
        _, state = client("undo")
        assert (state["id"], state["turn"], state["left"]) == ("b", 0, 9)
        assert [line["id"] for line in lines(path)] == ["a"]
        client("rate", id="b", turn=0, rating=5)
    assert [(line["id"], line["rating"]) for line in lines(path)] == [("a", 2), ("b", 5)]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"id": "a", "turn": 0, "rating": 6}, "a rating must be one of 1, 2, 3, 4, 5, got 6"),
        ({"id": "a", "turn": 0, "rating": True}, "a rating must be one of 1, 2, 3, 4, 5, got True"),
        ({"id": "a", "turn": 1, "rating": 3}, "an answer must be about a turn of "),
        ({"id": "z", "turn": 0, "rating": 3}, "an answer must be about a turn of "),
        ({"id": ["a"], "turn": 0, "rating": 3}, "an answer must be about a turn of "),
        ([1], "a request must be a JSON object, got list"),
        ("{", "Expecting property name"),
    ],
)
def test_an_answer_that_is_none_is_one_line_and_writes_nothing(body, said, data, tmp_path):
    path = tmp_path / "out.jsonl"
    with serving(data, path) as client:
        status, text = client.ask("POST", f"/{client.token}/rate", body)
        assert status == 400
        assert said in json.loads(text)["error"]
        assert client("rate", id="b", turn=0, rating=1)[0] == 200
        assert "rated before; undo it first" in client("rate", id="b", turn=0, rating=2)[1]["error"]
    assert len(lines(path)) == 1


def test_another_host_another_page_and_another_token_are_forbidden(data, tmp_path):
    path, body = tmp_path / "out.jsonl", {"id": "a", "turn": 0, "rating": 3}
    with serving(data, path) as client:
        place, port = f"/{client.token}/", client.host.partition(":")[2]
        for method, rest in (("GET", ""), ("GET", "next"), ("POST", "rate"), ("POST", "undo")):
            for host in ("evil.example", f"evil.example:{port}", "127.0.0.1", "127.0.0.1:1"):
                assert client.ask(method, place + rest, body, Host=host)[0] == 403
            assert client.ask(method, place + rest, body, Origin="http://evil.example")[0] == 403
            for token in ("", "x", client.token[:-1], client.token + "x"):
                assert client.ask(method, f"/{token}/{rest}", body)[0] == 403
        assert client.ask("GET", "/")[0] == 403
        assert client.ask("GET", place + "other")[0] == 404
        assert client.ask("POST", place + "rate", b"x", **{"Content-Length": str(1 << 20)})[0] == 400
        assert lines(path) == []
        for host in (client.host, f"localhost:{port}"):
            status, page = client.ask("GET", place, Host=host, Origin=f"http://{host}")
            assert (status, b"ppg-fast rate" in page) == (200, True)


def test_pairs_are_of_one_opening_and_one_line_each(tmp_path):
    data, path = tmp_path / "log.jsonl", tmp_path / "out.jsonl"
    rows = [dialogue(name, group=group) for name, group in zip("abcdefg", "ggghhhh", strict=True)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = iter((1, 0.5, 0))
    with serving(data, path, pairs=True) as client:
        _, state = client("next")
        assert (state["left"], len(state["dialogues"]), state["turn"]) == (3, 2, None)
        assert "one of 1, 0.5, 0, got 3" in client("rate", id=state["id"], turn=None, rating=3)[1]["error"]
        while state["id"] is not None:
            _, state = client("rate", id=state["id"], turn=None, rating=next(given))
    found = lines(path)
    assert [sorted([line["id"], line["against"]]) for line in found] == [["a", "b"], ["d", "e"], ["f", "g"]]
    assert [line["rating"] for line in found] == [1, 0.5, 0]
    assert Ratings(str(path)).ratings[found[0]["id"]] == {None: {"ann": 1.0}}


RATE = [sys.executable, "-m", "ppg_fast", "rate"]


def started(*flags):
    """A server in a process of its own, and a client for what it prints."""
    process = subprocess.Popen([*RATE, *map(str, flags), "--port", "0"], stdout=subprocess.PIPE, text=True)
    return process, Client(process.stdout.readline().split()[0])


def by_length(transcripts):
    """A reward model that likes long answers, and says nothing of those that only call tools."""
    return [[float(len(m.content)) for m in t.messages if m.role == "assistant"] for t in transcripts]


def test_what_a_reward_model_is_least_sure_of_comes_first(tmp_path):
    def talk(name, group, *answers):
        messages = [m for a in answers for m in ({"role": "user", "content": "?"}, {"role": "assistant", "content": a})]
        return {"id": name, "group_id": group, "messages": messages, "turn_rewards": [0.0] * len(answers)}

    known = [talk("a", "g", "x" * 9, "y"), talk("b", "g", "x"), talk("c", "h", "xx"), talk("d", "h", "x", "x")]
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in known))
    answers = Answers(tmp_path / "out.jsonl", "ann")
    turns = Tasks(path, answers, rewards=by_length)  # mean rewards 5, 1, 2, 1: the median is 1.5
    assert list(dict.fromkeys(name for name, _ in turns.places())) == ["b", "c", "d", "a"]
    assert turns.next()["id"] == "b"
    turns.rate("b", 0, 3)
    assert turns.next()["id"] == "c"
    pairs = Tasks(path, answers, pairs=True, rewards=by_length)  # returns 10 and 1, 2 and 2
    assert [{name, pairs.compared[name][1]} for name, _ in pairs.places()] == [{"c", "d"}, {"a", "b"}]
    answers.close()


def test_its_model_must_be_one(data, tmp_path, capsys):
    pytest.importorskip("transformers")
    assert main(["rate", str(data), "--least-sure", str(tmp_path / "none"), "--terminal"]) == 1
    assert "a reward model must be a folder" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.ratings.jsonl"))


def test_kill_minus_nine_loses_no_rating(data, tmp_path):
    """Killed when an answer is confirmed: every one that was is in the file, and the next server goes on there."""
    path, confirmed = tmp_path / "out.jsonl", []
    process, client = started(data, "--rater", "ann", "-o", path)
    try:
        _, state = client("next")
        for rating in (1, 4, 2):
            asked = {"id": state["id"], "turn": state["turn"], "rating": rating}
            status, state = client("rate", **asked)
            assert status == 200
            confirmed.append(asked)
    finally:
        process.kill()
        process.wait()
    assert [{k: line[k] for k in ("id", "turn", "rating")} for line in lines(path)] == confirmed
    with serving(data, path) as client:
        _, after = client("next")
        assert (after["done"], after["id"], after["turn"]) == (3, state["id"], state["turn"])


def test_an_answer_is_on_the_disk_before_it_is_confirmed(data, tmp_path, monkeypatch):
    path, order = tmp_path / "out.jsonl", []
    with serving(data, path) as client:
        fsync = os.fsync
        monkeypatch.setattr(os, "fsync", lambda file: (order.append(path.stat().st_size), fsync(file)))
        client("rate", id="a", turn=0, rating=2)
        assert order == [path.stat().st_size]

        def full(file, text):
            return write(file, text[:9])

        write = os.write
        monkeypatch.setattr(os, "write", full)
        status, text = client.ask("POST", f"/{client.token}/rate", {"id": "b", "turn": 0, "rating": 2})
        monkeypatch.undo()
        assert status == 500
        assert "not saved" in json.loads(text)["error"]
        assert client("rate", id="b", turn=0, rating=3)[0] == 200
    assert [(line["id"], line["rating"]) for line in lines(path)] == [("a", 2), ("b", 3)]


def test_a_file_of_ratings_is_kept_to_one_writer_and_read_whole(data, tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text('{"id": "a", "turn": 0, "rating": 3, "rater": "bob"}')  # no end of line
    with serving(data, path) as client:
        with pytest.raises(ValueError, match=r"out.jsonl must be written by one process at a time"):
            Answers(path, "ann")
        assert client("next")[1]["id"] == "a", "another rater's rating is not this one's"
        client("rate", id="a", turn=0, rating=4)
    assert Ratings(str(path)).ratings["a"][0] == {"bob": 3.0, "ann": 4.0}
    with open(path, "a") as file:
        file.write('{"id": "b", "tur')
    with pytest.raises(ValueError, match=r"out.jsonl, line 3 is no JSON"):
        Answers(path, "ann")


def test_the_same_in_a_terminal(data, tmp_path, capsys):
    path, said, keys = tmp_path / "out.jsonl", [], iter(["2", "9", "5", "u", "4", "s", "q"])
    answers = Answers(path, "ann")
    rate(Tasks(data, answers), lambda _: next(keys), said.append)
    answers.close()
    assert [(line["id"], line["turn"], line["rating"]) for line in lines(path)] == [("a", 0, 2), ("b", 0, 4)]
    assert "assistant, turn 0: a says 0" in said
    assert "no answer: '9'" in said


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["{tmp}/none.jsonl"], "what is rated must be the folder of a run or a file of dialogues, got"),
        (["{tmp}"], "must hold a dialogue (a run keeps them by --keep-rollouts), got 'none'"),
        (["{data}", "--port", "70000"], "port must be from 0 to 65535, got 70000"),
        (["{data}", "--rater", "a/b"], "a rater must be a name of letters, digits, _.@-, got 'a/b'"),
    ],
)
def test_what_is_refused(flags, said, data, tmp_path, capsys):
    assert main(["rate", *[flag.format(tmp=tmp_path, data=data) for flag in flags]]) == 1
    assert said in capsys.readouterr().err


def test_a_taken_port_is_named(data, tmp_path, capsys):
    with serving(data, tmp_path / "one") as client:
        port = client.host.partition(":")[2]
        assert main(["rate", str(data), "--port", port, "-o", str(tmp_path / "two")]) == 1
    assert f"port {port} of 127.0.0.1 cannot be had" in capsys.readouterr().err


# ---- of a run that trains --------------------------------------------------------------------------------------------
RUN = (
    "--device cpu --width 16 --layers 1 --no-progress --save-every 1 --eval-every 9 --eval-dialogues 1 "
    "--max-new-tokens 2 --imitation-steps 0 --max-steps 2 --num-prompts 2 --num-generations 2 --keep-rollouts 3"
)


def test_a_run_keeps_rollouts_that_are_rated_while_it_trains_and_read_back(tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers")
    from ppg_fast.jobs.persona import PersonaJob

    run, collect, seen = tmp_path / "run", PersonaJob.collect, []

    def between(self, step):
        if step == 2:  # the first step's are there while the second is rolled out
            with serving(run, output_of(run, "ann", False)) as client:
                _, state = client("next")
                seen.append(state["id"])
                client("rate", id=state["id"], turn=0, rating=4)
                os.kill(os.getpid(), signal.SIGTERM)
        return collect(self, step)

    monkeypatch.setattr(PersonaJob, "collect", between)
    assert main(["train", "--output-dir", str(run), *RUN.split()]) == 143
    monkeypatch.undo()
    first = run / "rollouts/step-000001.jsonl"
    kept = read_dialogues(first)
    assert [(d.id.partition("-")[0], d.group_id) for d in kept] == [("step", f"step-000001/{g}") for g in (0, 0, 1)]
    assert seen == [kept[0].id]
    before = first.read_bytes()
    assert main(["train", "--resume", str(run), "--no-progress"]) == 0
    assert (first.read_bytes(), len(list(run.glob("rollouts/*")))) == (before, 2)
    answers = Answers(output_of(run, "ann", False), "ann")
    tasks = Tasks(run, answers)
    assert tasks.next()["id"].startswith("step-000002/"), "the newest first"
    assert tasks.next()["done"] == 1
    answers.close()
    scored = tmp_path / "scored.jsonl"
    formula = f"ratings:{output_of(run, 'ann', False)}"
    assert main(["score", str(first), "-o", str(scored), "--reward", formula]) == 0
    assert read_dialogues(scored)[0].turn_rewards[:2] == (4.0, None)
    assert main(["train", "--output-dir", str(run), *RUN.split(), "--overwrite", "--max-steps", "1"]) == 0
    assert [path.name for path in run.glob("rollouts/*")] == ["step-000001.jsonl"]
    assert len(lines(output_of(run, "ann", False))) == 1, "what people said is theirs: no run removes it"


def test_the_setting():
    from ppg_fast.config import make_config

    with pytest.raises(ValueError, match=r"^keep_rollouts must be 0 with data, .*got 2$"):
        make_config({"data": "log.jsonl", "keep_rollouts": 2})
    with pytest.raises(ValueError, match=r"^keep_rollouts must be an integer >= 0, got -1$"):
        make_config({"keep_rollouts": -1})


# ---- a real browser --------------------------------------------------------------------------------------------------
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_browser_rates_by_its_keys(data, tmp_path):
    """Keys, undo and buttons in the page itself; what a dialogue says is text there, whatever it looks like."""
    path = tmp_path / "out.jsonl"
    with serving(data, path) as client, Browser(tmp_path / "profile") as browser:
        browser.open(f"http://{client.host}/{client.token}/")
        browser.wait("document.getElementById('progress').textContent === '0 rated, 10 left'")
        assert browser.evaluate("document.querySelector('.said').textContent") == "user<b>a</b> asks"
        for key, done in (("3", 1), ("5", 2), ("u", 1), ("1", 2), ("s", 2), ("4", 3)):
            shown = browser.evaluate("document.getElementById('dialogues').textContent")
            browser.press(key)
            browser.wait(f"document.getElementById('progress').textContent.startsWith('{done} rated')")
            browser.wait(f"document.getElementById('dialogues').textContent !== {json.dumps(shown)}")
        browser.evaluate("[...document.querySelectorAll('button')].find(b => b.textContent === '2').click()")
        browser.wait("document.getElementById('progress').textContent.startsWith('4 rated')")
    found = [(line["id"], line["turn"], line["rating"]) for line in lines(path)]
    assert found == [("a", 0, 3), ("b", 0, 1), ("c", 0, 4), ("c", 1, 2)]
