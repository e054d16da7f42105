"""Files of reward functions: imported as `python FILE` would import them, and their failures are one line."""

import pickle
import sys

import pytest

pytest.importorskip("transformers")
pytest.importorskip("httpx2")

from ppg_fast.dialogues.dialogue import Message
from ppg_fast.rewards import Transcript, load_function, make_rewards

T = Transcript("d7", (Message("user", "q"), Message("assistant", "a")))


@pytest.fixture(autouse=True)
def imports():
    """sys.modules and sys.path as they were."""
    modules, path = dict(sys.modules), list(sys.path)
    yield
    sys.path[:] = path
    for name in sys.modules.keys() - modules.keys():
        del sys.modules[name]


def value(formula):
    return [reward.turns([T])[0][0] for reward in make_rewards(formula)]


def write(folder, **files):
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    return folder


DATACLASS = """
from __future__ import annotations
import dataclasses, pickle, typing
from helper_of_rewards import W

@dataclasses.dataclass
class Part:
    weight: float = W
    kinds: typing.ClassVar[list[int]] = []

def f(messages):
    return pickle.loads(pickle.dumps(Part(weight=W))).weight + len(dataclasses.fields(Part))
"""


def test_dataclasses_pickle_and_modules_beside_the_file_work(tmp_path):
    write(tmp_path, scores=DATACLASS, helper_of_rewards="W = 2.5\n")
    assert value(f"{tmp_path}/scores.py:f") == [3.5]
    f = load_function(f"{tmp_path}/scores.py:f")
    assert pickle.loads(pickle.dumps(f)) is f


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_process_pool_finds_the_functions_of_the_file(method, tmp_path):
    pool = (
        "import multiprocessing\n"
        "def double(x): return 2.0 * x\n"
        "def f(messages):\n"
        f"    with multiprocessing.get_context({method!r}).Pool(1) as pool: return pool.map(double, [1, 4])[1]\n"
    )
    write(tmp_path, pooled_scores=pool)
    assert value(f"{tmp_path}/pooled_scores.py:f") == [8.0]


def test_two_files_of_one_name_keep_their_own_helpers_also_those_imported_late(tmp_path):
    text = (
        "from shared_name import W\n"
        "def now(messages): return W\n"
        "def late(messages):\n    import late_name\n    return late_name.W\n"
    )
    for name, number in (("a", 1.0), ("b", 2.0)):
        write(tmp_path / name, scores=text, shared_name=f"W = {number}\n", late_name=f"W = {10 * number}\n")
    a, b = (f"{tmp_path}/{name}/scores.py" for name in "ab")
    assert value(f"{a}:now + {b}:now + {a}:late + {b}:late + {a}:late + {b}:now") == [1.0, 2.0, 10.0, 20.0, 10.0, 2.0]
    assert [load_function(f"{place}:now").__module__.startswith("scores") for place in (a, b)] == [True, True]


@pytest.mark.parametrize("name", ["json", "torch", "numpy", "ppg_fast", "collections", "yaml", "a.b"])
def test_a_file_with_the_name_of_a_package_leaves_the_package_alone(name, tmp_path):
    before = {n: sys.modules.get(n) for n in ("json", "torch", "numpy", "ppg_fast", "collections", "yaml")}
    (tmp_path / f"{name}.py").write_text(
        "import pickle, json, torch\nclass A: x = 4.0\ndef f(m): return pickle.loads(pickle.dumps(A())).x\n"
    )
    assert value(f"{tmp_path}/{name}.py:f") == [4.0]
    assert {n: sys.modules.get(n) for n in before} == before


def test_a_file_that_is_rewritten_at_once_is_read_anew_and_leaves_nothing_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    for number in "123":
        write(tmp_path, rewritten=f"def f(messages): return {number}.0\n")
        assert value(f"{tmp_path}/rewritten.py:f") == [float(number)]
    assert [p.name for p in tmp_path.iterdir()] == ["rewritten.py"]


def test_functions_of_one_file_share_their_module(tmp_path):
    write(
        tmp_path, counting="seen = []\ndef f(messages): seen.append(1); return 0.0\ndef g(messages): return len(seen)\n"
    )
    assert value(f"{tmp_path}/counting.py:f + {tmp_path}/counting.py:g") == [0.0, 1.0]


AT_IMPORT = [
    ("import sys\nsys.exit(0)\n", r"SystemExit: 0 \(broken.py, line 2: sys.exit\(0\)\)"),
    ("raise SystemExit\n", r"SystemExit \(broken.py, line 1: raise SystemExit\)"),
    ("x = 1\ny = {}['k']\n", r"KeyError: 'k' \(broken.py, line 2: y = {}\['k'\]\)"),
    ("import json\nx = json.loads('{')\n", r"JSONDecodeError: .* \(broken.py, line 2: x = json.loads\('{'\)\)"),
    ("import not_there_at_all\n", r"ModuleNotFoundError: .*not_there_at_all.* \(broken.py, line 1"),
    ("def f(m) return 1\n", r"SyntaxError: .*\(broken.py, line 1\)"),
    ("raise ValueError('one\\ntwo')\n", r"ValueError: one two \(broken.py, line 1"),
    ("class E(BaseException): pass\nraise E('no')\n", r"E: no \(broken.py, line 2"),
    ("x = 1\x00\n", "SyntaxError"),
]


@pytest.mark.parametrize(("text", "said"), AT_IMPORT, ids=[said[:12] for _, said in AT_IMPORT])
def test_a_file_that_fails_when_imported_is_one_line_with_the_users_own(text, said, tmp_path):
    (tmp_path / "broken.py").write_text(text)
    with pytest.raises(
        ValueError, match="reward function .*broken.py:f: .*broken.py cannot be loaded: " + said
    ) as caught:
        make_rewards(f"{tmp_path}/broken.py:f")
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is not None
    assert "broken" not in sys.modules


IN_THE_FUNCTION = [
    ("import sys\ndef f(m): sys.exit(0)\n", "SystemExit: 0"),
    (
        "import json\ndef f(m):\n    return json.loads('[' * 100000)\n",
        r"RecursionError: .*\(fails.py, line 3: return json",
    ),
    ("def f(m): return f(m)\n", "RecursionError"),
    ("def f(): return 1\n", "TypeError"),
    ("import asyncio\ndef f(m): raise asyncio.CancelledError\n", "CancelledError"),
]


@pytest.mark.parametrize(("text", "said"), IN_THE_FUNCTION, ids=[said[:12] for _, said in IN_THE_FUNCTION])
def test_a_function_that_fails_is_one_line_with_dialogue_turn_and_line(text, said, tmp_path):
    write(tmp_path, fails=text)
    with pytest.raises(ValueError, match=r"fails.py:f failed at dialogue 'd7', turn 0: " + said) as caught:
        value(f"{tmp_path}/fails.py:f")
    assert "\n" not in str(caught.value)


def test_ctrl_c_in_a_function_is_the_users(tmp_path):
    write(tmp_path, stops="def f(messages): raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        value(f"{tmp_path}/stops.py:f")


def test_a_function_that_does_not_tell_its_arguments_is_named():
    with pytest.raises(ValueError, match="reward builtins:dict must tell its arguments"):
        make_rewards("builtins:dict")
