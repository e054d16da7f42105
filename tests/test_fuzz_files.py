"""Files of dialogues, prompts and ratings that are anything: what goes in is kept as it is, or left out with a line
that names it."""

import gzip
import json
import re
from contextlib import suppress

import pytest
import torch
from fuzz import as_json, assert_one_line, fuzz, mangled, numbers, outcome, texts, values
from hypothesis import given
from hypothesis import strategies as st

from ppg_fast.dialogues import read_dialogues, write_dialogues
from ppg_fast.dialogues.dialogue import Message
from ppg_fast.dialogues.prompts import read_prompts
from ppg_fast.rewards import Ratings, Transcript

messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "assistant", "tool"]), "content": texts}
    ),
    min_size=1,
    max_size=4,
)


@st.composite
def dialogues(draw):
    """A dialogue that is mostly right: the number of rewards fits, a key may be gone or hold something else."""
    said = draw(messages)
    turns = sum(m["role"] == "assistant" for m in said)
    reward = st.one_of(st.none(), st.integers(-1, 1), st.floats(0, 1))
    record = {
        "id": draw(st.sampled_from(["a", "b", "c", "d"]) | texts),
        "group_id": draw(st.sampled_from(["g", "h"]) | texts),
        "messages": said,
        "turn_rewards": draw(st.lists(reward, min_size=turns, max_size=turns)),
    }
    change = draw(st.sampled_from(["", "", "", "drop", "other", "more", "inside", "mangle"]))
    key = draw(st.sampled_from(sorted(record)))
    if change == "drop":
        del record[key]
    elif change == "other":
        record[key] = draw(values)
    elif change == "more":
        record[draw(texts)] = draw(values)
    elif change == "inside" and isinstance(record[key], list):
        record[key].insert(draw(st.integers(0, len(record[key]))), draw(values))
    line = as_json(record)
    return draw(mangled(line)) if change == "mangle" else line.encode("utf-8", "surrogatepass")


@st.composite
def prompts(draw):
    said = draw(messages)
    record = {"messages": [*said, {"role": "user", "content": draw(texts)}][-3:]}
    if draw(st.booleans()):
        record["id"] = draw(st.sampled_from(["a", "b"]) | values)
    if draw(st.booleans()):
        record[draw(st.sampled_from(["partner", "messages", "goal"]))] = draw(values)
    return draw(mangled(as_json(record)))


lines = st.one_of(dialogues(), values.map(lambda v: as_json(v).encode("utf-8", "surrogatepass")), st.binary(max_size=9))
files = st.lists(lines.map(lambda b: b.replace(b"\n", b" ")), max_size=5).map(b"\n".join)


def left_out(caught, path):
    """How many lines the warnings leave out; each is one line that names file and line."""
    found = [w for w in caught if w.endswith("; left out")]
    for warning in caught:
        assert_one_line(warning, path)
    for warning in found:
        assert re.search(rf"^{re.escape(path)}, (line|dialogue) \d+", warning), warning
    return len(found)


@pytest.mark.parametrize("read", [read_dialogues, read_prompts])
def test_a_file_gives_what_it_holds_or_says_what_it_leaves_out(read, tmp_path):
    path = tmp_path / "log.jsonl"
    name = str(path)

    @fuzz(200)
    @given(raw=files if read is read_dialogues else st.lists(prompts() | lines, max_size=5).map(b"\n".join))
    def check(raw):
        path.write_bytes(raw)
        found, error, caught = outcome(lambda: read(name), ValueError)
        gone, there = left_out(caught, name), sum(bool(line.strip()) for line in raw.split(b"\n"))
        if error:
            assert_one_line(error, name)
        elif raw.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] != b"[":
            assert len(found) + gone == there
        _, strict, _ = outcome(lambda: read(name, strict=True), ValueError)
        assert bool(strict) == bool(error or gone)
        if strict:
            assert_one_line(strict, name)

    check()


def test_what_is_kept_is_what_was_written(tmp_path):
    path = tmp_path / "log.jsonl"

    @fuzz(100)
    @given(raw=files)
    def check(raw):
        path.write_bytes(raw)
        found, error, _ = outcome(lambda: read_dialogues(path), ValueError)
        written = {}
        for line in raw.split(b"\n"):
            with suppress(ValueError, TypeError, KeyError):
                record = json.loads(line.removeprefix(b"\xef\xbb\xbf").decode())
                written.setdefault(str(record["id"]), []).append(record)
        for dialogue in () if error else found:
            if dialogue.id.startswith("log/"):  # made of file and line
                continue
            as_written = [
                {"role": m["role"], "content": m["content"]}
                for r in written.get(dialogue.id, ())
                if isinstance(r["messages"], list)
                for m in r["messages"]
                if isinstance(m, dict) and {"role", "content"} <= m.keys()
            ]
            assert all(m.as_dict() in as_written for m in dialogue.messages)
            rewards = [r["turn_rewards"] for r in written[dialogue.id] if isinstance(r.get("turn_rewards"), list)]
            assert list(dialogue.turn_rewards) in rewards or not any(dialogue.turn_rewards)

    check()


turn = st.one_of(
    st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt", "system", "function_call"]), "value": texts}),
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": texts | values}),
)
side = st.one_of(texts, st.lists(turn, min_size=1, max_size=3), turn, values)
judged = st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["A: hi YES", "B: NO", "A: yo", "NO YES"])), max_size=4)
others = st.one_of(
    st.fixed_dictionaries({"conversations": st.lists(turn, max_size=3)}, optional={"system": texts | values}),
    st.fixed_dictionaries({"chosen": side, "rejected": side}, optional={"prompt": side, "messages": side}),
    st.fixed_dictionaries({"prompt": side, "completion": side}, optional={"label": values, "reward": numbers}),
    st.fixed_dictionaries({"instruction": texts, "output": side}, optional={"input": values, "history": values}),
    st.fixed_dictionaries(
        {"conversation": judged | st.lists(turn, max_size=2), "P2": texts | values},
        optional={
            "eval_prompt_consistency": judged,
            "P2_prompt_consistency_score": numbers,
            "pturn": st.integers(1, 2),
        },
    ),
    st.lists(turn, max_size=3),
    st.dictionaries(st.sampled_from(["data", "rows", "messages", "prompt", "text"]), side, max_size=2),
)
shapes = st.sampled_from(["lines", "lines", "pretty", "list", "wrapped", "utf-16", "gzip"])


def packed(lines, shape):
    """The objects as a file of that shape."""
    if shape in ("lines", "utf-16", "gzip"):
        raw = "\n".join(as_json(line) for line in lines)
        coded = raw.encode("utf-16" if shape == "utf-16" else "utf-8", "surrogatepass")
        return gzip.compress(coded) if shape == "gzip" else coded
    whole = {"pretty": lines[0] if lines else {}, "list": lines, "wrapped": {"data": lines}}[shape]
    return json.dumps(whole, indent=1).encode("utf-8", "surrogatepass")


def test_files_of_others_are_read_or_refused_in_one_line(tmp_path):
    path, copy = tmp_path / "log.jsonl", tmp_path / "copy.jsonl"

    @fuzz(250)
    @given(lines=st.lists(others, max_size=4), shape=shapes, cut=st.integers(0, 40) | st.just(10**9))
    def check(lines, shape, cut):
        path.write_bytes(packed(lines, shape)[: cut if cut > 9 else None])
        for read in (read_dialogues, read_prompts):
            found, error, caught = outcome(lambda read=read: read(path), ValueError)
            for said in [error] * bool(error) + caught:
                assert_one_line(said, str(path))
                assert len(said) - len(str(path)) < 700
            if error or read is read_prompts:
                continue
            write_dialogues(copy, found)
            again, wrong, _ = outcome(lambda: read_dialogues(copy, strict=True), ValueError)
            assert not wrong
            assert again == found
            written = copy.read_bytes()
            write_dialogues(copy, again)
            assert copy.read_bytes() == written

    check()


def test_what_goes_in_is_trained_on_held_out_or_left_out(tmp_path):
    """Through the job: lines = dialogues to train on + held out + named in a warning."""
    pytest.importorskip("transformers")
    from ppg_fast.config import make_config
    from ppg_fast.jobs.offline import OfflineJob

    path = tmp_path / "log.jsonl"
    small = {"width": 16, "layers": 1, "vocab_size": 263, "device": "cpu", "threads": torch.get_num_threads()}

    @fuzz(25)
    @given(raw=st.lists(dialogues(), min_size=4, max_size=9).map(b"\n".join))
    def check(raw):
        path.write_bytes(raw)
        config = make_config({"data": str(path), "allow_negative_rewards": True, **small})
        job, error, caught = outcome(lambda: OfflineJob(config), ValueError)
        if error:
            assert_one_line(error, str(path), "dialogue", "none of")
            return
        gone = sum(w.endswith("; left out") for w in caught)
        assert len(job.held_out) + len(job.seen) + gone == sum(bool(line.strip()) for line in raw.split(b"\n"))

    check()


rating = st.fixed_dictionaries(
    {"id": st.sampled_from(["a", "b"]) | values, "rating": st.integers(0, 5) | values},
    optional={"turn": st.integers(0, 2) | values, "rater": st.sampled_from(["x", "y"]) | values},
)


def test_ratings(tmp_path):
    path = tmp_path / "ratings.jsonl"
    spoken = (Message("user", "hi"), Message("assistant", "a"), Message("user", "so"), Message("assistant", "b"))

    @fuzz(300)
    @given(raw=st.lists(rating.map(as_json).flatmap(mangled), max_size=4).map(b"\n".join))
    def check(raw):
        path.write_bytes(raw)
        ratings, error, _ = outcome(lambda: Ratings(str(path)), ValueError)
        if error:
            assert_one_line(error, str(path))
            return
        rows, error, _ = outcome(lambda: ratings([Transcript("a", spoken), Transcript("b", spoken)]), ValueError)
        if error:
            assert_one_line(error, str(path))
            return
        asked = {json.loads(line.removeprefix(b"\xef\xbb\xbf"))["id"] for line in raw.split(b"\n") if line.strip()}
        assert set(ratings.unused) == asked - {"a", "b"}
        for name, row in zip("ab", rows, strict=True):
            assert len(row) == 2
            assert any(value is not None for value in row) == (name in asked)

    check()
