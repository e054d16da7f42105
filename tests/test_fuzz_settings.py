"""YAML and flags that are anything: settings, or one line that names the file, the key or the flag."""

from types import SimpleNamespace
from typing import get_type_hints

import pytest
from fuzz import assert_one_line, fuzz, outcome, texts, values
from hypothesis import given
from hypothesis import strategies as st

from ppg_fast import jobs
from ppg_fast.cli import main
from ppg_fast.compare import command
from ppg_fast.config import DEFAULTS, TrainConfig, make_config, read_yaml
from ppg_fast.config.sources import base_type, write_yaml

TYPES = get_type_hints(TrainConfig)
names = st.sampled_from(sorted(DEFAULTS))
near = st.sampled_from([*sorted(DEFAULTS), "max-steps", "max_stps", "lr", "config", "resume"])
plain = st.one_of(
    st.integers(-1, 3), st.floats(0, 1), st.booleans(), texts, st.sampled_from(["full", "auto", "ppo", "cpu"])
)
AWKWARD = """~ !!int_'' !!float_'' !!bool_x !!timestamp_x !!binary_x !!python/name:os.system 2026-99-99
    &a_[*a] {a:_b} ?_x -_1 ' 1e-3 = <<:_1 [[[[ %YAML_9"""
AWKWARD = [*(word.replace("_", " ") for word in AWKWARD.split()), "0x" + "f" * 5000, "1" * 5000]
yaml_scalars = st.one_of(*[st.sampled_from(AWKWARD)] * 6, plain.map(str), texts)  # a third


def test_a_file_of_settings(tmp_path):
    path = tmp_path / "c.yaml"

    @fuzz(250)
    @given(
        pairs=st.lists(st.tuples(near, yaml_scalars), max_size=3),
        junk=st.one_of(*[st.just(b"")] * 4, st.binary(max_size=6)),
    )
    def check(pairs, junk):
        text = "\n".join(f"{key}: {value}" for key, value in pairs)
        path.write_bytes(text.encode("utf-8", "surrogatepass") + junk)
        config, error, _ = outcome(lambda: make_config(read_yaml(str(path))), ValueError)
        if error:
            assert_one_line(error, str(path), *(key.replace("-", "_") for key, _ in pairs), "policy class", "lookahead")
        else:
            back = tmp_path / "back.yaml"
            write_yaml(back, config)
            assert make_config(read_yaml(str(back))) == config

    check()


@fuzz(300)
@given(source=st.dictionaries(names, st.one_of(plain, values), max_size=3))
def test_a_mapping_of_settings(source):
    config, error, _ = outcome(lambda: make_config(source), ValueError)
    if error:
        assert_one_line(error, *source, "policy class", "Lookahead", "Segment")
        return
    for name, value in source.items():
        kept = getattr(config, name)
        assert type(kept) in (base_type(TYPES[name]), type(None))
        if isinstance(value, str) and isinstance(kept, str) and name != "policy_class":
            assert kept == value


word = st.one_of(
    near.map(lambda name: "--" + name.replace("_", "-")),
    names.map(lambda name: "--no-" + name.replace("_", "-")),
    st.sampled_from(["-o", "-h=", "--max-step", "--", "-1", "-0.5*a:b", "--data=", "--tokens", "x", "0:10"]),
    plain.map(str),
    texts,
    st.tuples(near, texts).map(lambda pair: f"--{pair[0].replace('_', '-')}={pair[1]}"),
).map(lambda text: text.replace("\x00", ""))


@pytest.fixture
def idle(monkeypatch, tmp_path):
    """Commands that check everything and do nothing; configs that reached a job."""
    reached = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jobs, "run_job", lambda config, resume=False: reached.append(config) or 0)
    monkeypatch.setattr("ppg_fast.jobs.score.score_file", lambda *a, **k: reached.append(a[2]))
    untouched = SimpleNamespace(discard=lambda: None, restore=lambda: None)
    monkeypatch.setattr(command, "_open", lambda folder, study, overwrite: reached.append(study) or untouched)
    monkeypatch.setattr(command, "_compute", lambda *a: None)
    monkeypatch.setattr(command, "summarise", lambda *a: {"problems": [], "across": []})
    monkeypatch.setattr("ppg_fast.compare.page.render", lambda _: "")
    monkeypatch.setattr("ppg_fast.compare.results.write_whole", lambda *a: None)
    return reached


@pytest.mark.parametrize(
    "head", [["train"], ["score", "x.jsonl", "-o", "y"], ["compare"], []], ids=lambda h: "-".join(h[:1])
)
def test_flags(head, idle, capsys):
    @fuzz(120)
    @given(words=st.lists(word, max_size=4))
    def check(words):
        idle.clear()
        try:
            status = main([*head, *words])
        except SystemExit as error:
            status = error.code
        out, err = capsys.readouterr()
        if status == 0:
            assert idle or not head or "-h" in words, (words, out)
        else:
            assert idle == []
            assert out == ""
            assert_one_line(err.removesuffix("\n"), "ppg-fast")
            assert status in (1, 2)

    check()


def test_every_flag_alone_reaches_the_run(idle):
    """No value that a default has is refused or changed."""
    for name, default in DEFAULTS.items():
        if default is not None and not isinstance(default, bool):
            idle.clear()
            assert main(["train", f"--{name.replace('_', '-')}={default}"]) == 0
            assert idle == [TrainConfig()]
