"""`ppg-fast inspect`: what is shown is what a training step reads; nothing of the data gets out of its place."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("transformers")
from chat_case import CHATML, byte_tokenizer
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from ppg_fast.cli import main
from ppg_fast.config import make_config
from ppg_fast.dialogues.packing import pack
from ppg_fast.dialogues.renderer import Renderer
from ppg_fast.inspection import Inspector
from ppg_fast.inspection.pieces import TokenTexts, visible
from ppg_fast.jobs import OfflineJob
from ppg_fast.spec import IGNORE
from ppg_fast.training.objective import credit, tokens_to_read
from ppg_fast.training.trainer import TrainingState, optimise

ROOT = Path(__file__).parents[1]
TALK = [
    ("system", "You are Anna 🌱.\n"),
    ("user", "Who are  you?"),
    ("assistant", "Anna, 你好!"),
    ("user", "Sure?"),
    ("assistant", "Yes.\n\tQuite <b>sure</b>."),
]


def dialogue(name, rewards=(0.5, 1.0), talk=TALK, group="g"):
    messages = [{"role": role, "content": text} for role, text in talk]
    return {"id": name, "group_id": group, "messages": messages, "turn_rewards": list(rewards)}


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


@pytest.fixture
def data(tmp_path):
    other = dialogue("b", (0.25,), TALK[:3])
    return write(tmp_path / "talk.jsonl", dialogue("a"), other, dialogue("c", (1.0, 0.0), group="alone"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A checkpoint whose generation config names a second end token."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = byte_tokenizer(CHATML, ["<|im_start|>", "<|im_end|>", "<|stop|>"], eos_token="<|im_end|>")
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Qwen3Config(
        vocab_size=len(tokenizer), num_key_value_heads=2, head_dim=8, max_position_embeddings=200, **sizes
    )
    whole = Qwen3ForCausalLM(config)
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|stop|>"])
    whole.generation_config = GenerationConfig(eos_token_id=ends)
    whole.save_pretrained(folder)
    return str(folder)


def inspect(capsys, *argv):
    code = main(["inspect", *map(str, argv)])
    found = capsys.readouterr()
    return code, found.out, found.err


# ---- what is shown is what is trained --------------------------------------------------------------------------------
SETTINGS = {
    "greedy": {"policy_class": "greedy"},
    "lookahead": {"policy_class": "lookahead:2", "gamma": 0.5},
    "baseline": {"policy_class": "full", "baseline": "leave_one_out", "allow_negative_rewards": True},
    "cut": {"max_dialogue_tokens": 20},
    "template": {"chat_template": "chatml"},
}


CASES = [(name, with_model) for name in SETTINGS for with_model in (False, True) if with_model or name != "template"]


@pytest.mark.parametrize(("name", "with_model"), CASES)
def test_what_is_shown_is_what_a_step_reads(name, with_model, data, model):
    settings = {"data": data, "width": 16, "layers": 1, **SETTINGS[name]}
    if with_model:  # a token a byte
        settings |= {"model": model} | ({"max_dialogue_tokens": 120} if name == "cut" else {})
    config = make_config(settings)
    job = OfflineJob(config)
    batch = pack(job.samples)
    returns, weights = credit(batch, job.objective)
    for group in batch.group_ids.unique():  # alone in a step: what other groups have at a turn is not known here
        rows = (batch.group_ids == group).nonzero()[:, 0].tolist()
        _, own = credit(pack([job.samples[row] for row in rows]), job.objective)
        weights[rows, : own.shape[1]] = own
    lengths = tokens_to_read(batch, weights, job.objective).tolist()
    inspector = Inspector(config)
    assert inspector.chat.end_ids == job.policy.chat.end_ids
    assert inspector.reader.positions in (job.policy.positions, None)
    views = list(inspector.views(count=3))
    assert len(views) == len(job.samples)
    for row, view in enumerate(views):
        start, stop = batch.cu_seqlens[row : row + 2].tolist()
        ids = [number for piece in view.pieces for number in piece.ids]
        assert ids == batch.tokens[start:stop].tolist()
        trained = [piece.trained for piece in view.pieces for _ in piece.ids]
        assert trained[1:] == (batch.labels[start : stop - 1] != IGNORE).tolist()
        assert [p.turn for p in view.pieces for _ in p.ids][1:] == batch.turn_ids[start : stop - 1].tolist()
        read = [piece.read for piece in view.pieces for _ in piece.ids]
        assert read == [position < lengths[row] for position in range(len(ids))]
        turns = len(view.rows)
        assert [line.weight for line in view.rows] == weights[row, :turns].tolist()
        assert [line.returns[str(job.objective.policy_class)] for line in view.rows] == returns[row, :turns].tolist()
        for line in view.rows:
            assert line.tokens == sum(len(p.ids) for p in view.pieces if p.trained and p.turn == line.turn)
        ends = [piece for piece in view.pieces if piece.ends]
        assert len(ends) == sum(line.tokens > 0 for line in view.rows)
        assert {piece.ids[-1] for piece in ends} <= {inspector.chat.end_id}


@pytest.mark.parametrize("window", ["greedy", "lookahead:2", "full"])
def test_of_soft_q_learning_it_shows_the_advantages_of_its_first_step(window, tmp_path, capsys):
    """With all dialogues in that step, whose mean returns are then the file's."""
    records = [dialogue("a", (0.5, -1.0)), dialogue("b", (0.25,), TALK[:3]), dialogue("c", (1.0, 0.5), group="alone")]
    path = write(tmp_path / "talk.jsonl", *records)
    own = {"loss_type": "soft_q", "beta": 0.5, "policy_class": window, "gamma": 0.9, "num_prompts": 3}
    config = make_config({"data": path, "width": 16, "layers": 1, **own})
    job = OfflineJob(config)
    state = TrainingState.start(job.policy.model, job.objective, job.policy.schedule())
    first = next(optimise(job.policy.model, job.collect, job.objective, job.policy.schedule(), state))
    views = list(Inspector(config).views(count=3))
    for turn in (0, 1):
        shown = [line.weight for view in views for line in view.rows if line.turn == turn]
        assert sum(shown) / len(shown) == pytest.approx(first[f"turns/advantage/{turn}"], abs=1e-5)
    assert all(piece.read for view in views for piece in view.pieces if piece.trained)
    code, out, _ = inspect(capsys, path, "--loss-type", "soft_q", "--policy-class", window)
    assert code == 0
    assert re.split(r"\s{2,}", table_of(out)[0].strip())[-2:] == ["baseline", "advantage"]
    assert "soft Q-learning, beta 0.1" in out
    assert "log p(" not in out


def test_what_soft_q_learning_leaves_out_is_refused_with_its_reason(data, capsys):
    flags = ("--loss-type", "soft_q", "--policy-class", "greedy", "--max-dialogue-tokens", "20")
    code, out, _ = inspect(capsys, data, *flags)
    assert code == 0
    assert "refused    dialogue 'a': the window of turn 0 ends at turn 1, which must be read for its value" in out
    code, _, err = inspect(capsys, data, *flags, "--strict")
    assert code == 1
    assert "the window of turn 0 ends at turn 1" in err


def test_numbers_by_hand(data, capsys):
    """Rewards 0.5, 1 beside a rollout of one turn with 0.25: returns 1.5 and 1, baseline 0.25 and, alone at the second
    turn, 0."""
    flags = ("--policy-class", "full", "--baseline", "leave_one_out", "--allow-negative-rewards")
    code, out, _ = inspect(capsys, data, *flags)
    assert code == 0
    head, first, second = (re.split(r"\s{2,}", line.strip()) for line in table_of(out))
    assert head == ["turn", "tokens", "reward", "greedy", "lookahead:3", "segment:4", "full*", "baseline", "weight"]
    assert first[2:] == ["0.5", "0.5", "1.5", "1.5", "1.5", "0.25", "1.25"]
    assert second[2:] == ["1", "1", "1", "1", "1", "0", "1"]
    assert "1.25 log p(turn 0) + 1 log p(turn 1)" in out


STRIPS = (  # as Qwen3's: the reasoning of an answer is gone once somebody has replied
    "{% for t in tools or [] %}<|im_start|>tool {{ t.function.name }}<|im_end|>{% endfor %}{% for m in messages %}"
    "<|im_start|>{{ m.role }}\n{% if m.reasoning_content and loop.last %}<think>{{ m.reasoning_content }}</think>"
    "{% endif %}{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALL = {"type": "function", "id": "c1", "function": {"name": "bread", "arguments": {"kind": "rye"}}}
TOOLS = [{"type": "function", "function": {"name": "bread", "parameters": {"type": "object", "properties": {}}}}]
STEPS = [
    {"role": "user", "content": "Bread?"},
    {"role": "assistant", "content": "", "reasoning_content": "I look.", "tool_calls": [CALL]},
    {"role": "tool", "content": "rye", "tool_call_id": "c1", "name": "bread"},
    {"role": "assistant", "content": "Rye.", "weight": 0},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes.", "reasoning_content": "I am."},
]


@pytest.fixture(scope="module")
def thinker(model, tmp_path_factory):
    """The same model with a template that rewrites earlier answers."""
    folder = tmp_path_factory.mktemp("thinker") / "model"
    shutil.copytree(model, folder)
    (folder / "chat_template.jinja").write_text(STRIPS)
    return str(folder)


def test_parts_calls_and_answers_of_weight_0(tmp_path, thinker, capsys):
    record = {**dialogue("a", (0.5, 1.0, 0.25), group="g"), "messages": STEPS, "tools": TOOLS}
    data = write(tmp_path / "talk.jsonl", record)
    config = make_config({"data": data, "model": thinker, "policy_class": "lookahead:2"})
    batch = pack(OfflineJob(config).samples)
    (view,) = Inspector(config).views()
    assert len(batch.part_seqlens) == 3
    starts = [next(p.position for p in view.pieces if p.part == part) for part in (0, 1)]
    assert starts == batch.part_seqlens[:-1].tolist()
    trained = [number for p in view.pieces if p.trained for number in p.ids]
    assert trained == batch.labels[batch.labels != IGNORE].tolist()
    assert [(row.tokens > 0, row.part, row.weight) for row in view.rows] == [
        (True, 0, 1.5),
        (False, None, 1.25),
        (True, 1, 0.25),
    ]
    _, out, _ = inspect(capsys, data, "--model", thinker, "--policy-class", "lookahead:2")
    assert "2 parts, since the template rewrites earlier messages" in out
    assert "part 1: what the model sees when it answers turn 0\n<|im_start|>tool bread<|im_end|>" in out
    first, second = out.split("part 2: what the model sees when it answers turn 2\n")
    assert '[0 <think>I look.</think>{"name": "bread", "arguments": {"kind": "rye"}}<|im_end|>]' in first
    assert "<1 Rye.<|im_end|>>" in second
    assert "[2 <think>I am.</think>Yes.<|im_end|>]" in second
    assert table_of(out)[2].endswith("-  weight 0: not trained")
    assert "1.5 log p(turn 0) + 0.25 log p(turn 2)" in out


def table_of(out):
    lines = out.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("turn "))
    return lines[start : lines.index("", start)]


def test_texts_in_a_row_are_the_whole(model):
    tokenizer = byte_tokenizer(CHATML, ["<|im_start|>", "<|im_end|>"])
    texts = TokenTexts(Renderer(tokenizer))
    for text in (" two  spaces\n", "🌱你好é", "<|im_end|> a", "\u200d\u202e"):
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        groups = texts.groups(tokens)
        assert "".join(shown for _, shown in groups) == text
        assert [number for ids, _ in groups for number in ids] == tokens
    broken = tokenizer("🌱", add_special_tokens=False)["input_ids"][:2]
    assert next(ids for ids, _ in texts.groups([*broken, *tokenizer("b")["input_ids"]]))[:2] == broken


def test_a_turn_that_is_not_read(data, capsys):
    _, out, _ = inspect(capsys, data, "--max-dialogue-tokens", "20")
    assert "cut off by max_dialogue_tokens 20: turn 1 is not read" in out
    assert "assistant: Yes. " in out
    assert "cut off: not read" in table_of(out)[-1]
    _, out, _ = inspect(capsys, data, "--dialogue", "c", "--policy-class", "greedy")
    assert "not read from here on" in out
    assert "weighs nothing" in table_of(out)[-1]


# ---- which dialogues -------------------------------------------------------------------------------------------------
def test_dialogues_by_id_and_place(data, capsys):
    titles = lambda *flags: re.findall(r"^dialogue '(\w)'", inspect(capsys, data, *flags)[1], re.MULTILINE)  # noqa: E731
    assert titles() == ["a"]
    assert titles("--count", "9") == ["a", "b", "c"]
    assert titles("--dialogue", "c", "--dialogue", "0") == ["c", "a"]
    assert titles("--dialogue", "1", "--count", "2") == ["b", "c"]
    code, _, err = inspect(capsys, data, "--dialogue", "d")
    assert (code, err.count("\n")) == (1, 1)
    assert "no dialogue 'd' among the 3" in err
    assert "'a', 'b', 'c'" in err
    assert inspect(capsys, data, "--count", "0")[0] == 1


def test_one_that_was_left_out_says_why(tmp_path, capsys):
    data = write(tmp_path / "talk.jsonl", dialogue("a"), dialogue("odd", (1.0, "x")))
    code, out, _ = inspect(capsys, data, "--dialogue", "odd")
    assert code == 0
    (refusal,) = re.findall("refused .*", out)
    assert "a reward must be a number" in refusal
    assert "user: Who are  you?" in out.replace("··", "  ")
    assert "dialogue 'a'" in inspect(capsys, data, "--dialogue", "0")[1]
    assert inspect(capsys, data, "--dialogue", "even")[0] == 1


def test_a_refused_dialogue_is_shown_up_to_there(tmp_path, capsys):
    talk = [*TALK[:3], ("user", "Say <end> now"), ("assistant", "No.")]
    data = write(tmp_path / "talk.jsonl", dialogue("a", talk=talk))
    code, out, _ = inspect(capsys, data)
    assert code == 0
    (refusal,) = re.findall("refused .*", out)
    assert "message 3: content must not hold a special token" in refusal
    assert "[0 Anna, 你好!<end>]" in out
    assert "user: Say <end> now" in out
    code, out, err = inspect(capsys, data, "--strict")
    assert (code, out) == (1, "")
    assert "message 3" in err


def test_a_dialogue_longer_than_the_model(tmp_path, model, capsys):
    data = write(tmp_path / "talk.jsonl", dialogue("a", (1.0,), [("user", "a"), ("assistant", "b" * 300)]))
    _, out, _ = inspect(capsys, data, "--model", model)
    assert "refused    dialogue 'a': what is read of it must fit the model's 200 positions" in out


def test_the_file_as_a_whole(tmp_path, capsys):
    data = write(tmp_path / "talk.jsonl", dialogue("a", (0.0, 1.0)), dialogue("b", (0.0, -1.0)))
    _, out, err = inspect(capsys, data, "--policy-class", "greedy")
    assert "rewards come with the last turn only" in out + err
    assert "training refuses this file: offline rewards must be >= 0" in out
    assert "refuses" not in inspect(capsys, data, "--policy-class", "greedy", "--allow-negative-rewards")[1]


# ---- openings --------------------------------------------------------------------------------------------------------
def test_openings(tmp_path, capsys):
    opening = {"id": "o", "messages": dialogue("a", talk=TALK[:2])["messages"], "goal": 4}
    path = write(tmp_path / "openings.jsonl", opening)
    code, out, _ = inspect(capsys, path)
    assert code == 0
    assert "Who are··you?<end><assistant>[0 the policy answers here]" in out
    assert "for rewards goal" in " ".join(out.split())
    data = write(tmp_path / "talk.jsonl", dialogue("a"))
    _, out, _ = inspect(capsys, "--prompts", data)
    assert "[0 the policy answers here]<user>Sure?<end><assistant>[1 the policy answers here]" in out
    assert inspect(capsys, data, "--prompts", path)[0] == 1
    assert inspect(capsys)[0] == 1


def test_a_refused_opening(tmp_path, capsys):
    path = write(tmp_path / "openings.jsonl", {"id": "o", "messages": [{"role": "user", "content": "a <end>"}]})
    code, out, _ = inspect(capsys, path)
    assert code == 0
    assert "refused    prompt 'o': message 0: content must not hold" in out


def test_openings_with_tools_and_without_room(tmp_path, thinker, capsys):
    file = tmp_path / "tools.py"
    file.write_text(
        'def bread(kind: str) -> str:\n    """Sell.\n\n    Args:\n        kind: of bread\n    """\n    return kind\n'
    )
    path = write(tmp_path / "openings.jsonl", {"id": "o", "messages": STEPS[:1]})
    flags = ("--model", thinker, "--tools", f"{file}:bread")
    _, out, _ = inspect(capsys, path, *flags)
    assert "tools      bread" in out
    assert "<|im_start|>tool bread<|im_end|>" in out
    _, out, _ = inspect(capsys, path, *flags, "--max-dialogue-tokens", "9")
    assert "refused    prompt 'o': an opening must be shorter than the 9 tokens" in out
    assert "Bread?" in out
    data = write(tmp_path / "talk.jsonl", dialogue("a"))
    assert "tools has no effect without prompts" in inspect(capsys, data, "--tools", f"{file}:bread")[2]


def test_settings_from_a_file(tmp_path, data, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(f"data: {data}\npolicy_class: greedy\n")
    assert "greedy*" in inspect(capsys, "--config", file)[1]
    assert "full*" in inspect(capsys, "--config", file, "--policy-class", "full")[1]
    other = write(tmp_path / "other.jsonl", dialogue("z"))
    assert "dialogue 'z'" in inspect(capsys, other, "--config", file)[1]


# ---- the terminal ----------------------------------------------------------------------------------------------------
EVIL = "\x1b[31m<script>alert(1)</script>\u202e&\" onload='x' \x00\x07"


def test_white_space_and_what_does_not_print():
    assert visible("a b  c\td\n", "x", "y") == "a b··c→d↵\n"
    assert visible(" a", "x") == " a"
    assert visible(" a") == "·a"
    assert visible("\x1b\u202e\u200d") == "\\x1b\\u202e\\u200d"


def test_colours_where_there_are_any(data, capsys, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("FORCE_COLOR", "1")
    coloured = inspect(capsys, data)[1]
    assert "\x1b[" in coloured
    monkeypatch.delenv("FORCE_COLOR")
    plain = inspect(capsys, data)[1]
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured) == plain
    monkeypatch.setenv("NO_COLOR", "1")
    assert inspect(capsys, data)[1] == plain
    assert "[0 Anna, 你好!<end>]<user>" in plain


def test_a_terminal_obeys_nothing_of_the_data(tmp_path, capsys):
    talk = [("user", EVIL), ("assistant", EVIL + "[bold]x[/bold]")]
    data = write(tmp_path / "talk.jsonl", dialogue(EVIL, (1.0,), talk, group=EVIL))
    _, out, _ = inspect(capsys, data)
    assert not set("\x1b\x00\x07\u202e") & set(out)
    assert "[bold]x[/bold]" in out


# ---- the page --------------------------------------------------------------------------------------------------------
class Page(HTMLParser):
    """Elements with their attributes, and the text outside of script and style."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.said, self.open = [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] not in (["script"], ["style"]):
            self.said += data


def test_the_page_is_whole_and_holds_the_data_as_text(tmp_path, capsys):
    talk = [("user", EVIL), ("assistant", "Yes  <b>&amp;\n")]
    data = write(tmp_path / "talk.jsonl", dialogue(EVIL, (1.0,), talk, group=EVIL))
    code, out, _ = inspect(capsys, data, "--html", tmp_path / "page.html")
    assert code == 0
    assert "1 dialogue" in out
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert "Yes··<b>&amp;↵" in page.said
    assert "\\x1b[31m<script>alert(1)</script>\\u202e" in page.said
    assert [tag for tag, _ in page.elements].count("script") == 1
    attributes = [(name, value) for _, attrs in page.elements for name, value in attrs.items()]
    assert not [name for name, _ in attributes if name.startswith("on") or name == "src"]
    assert all(value.startswith("#d") for name, value in attributes if name == "href")
    ids = [value for name, value in attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert {value for name, value in attributes if name == "href"} <= {f"#{name}" for name in ids}
    assert not re.search(r"https?:|url\(|@import", text)
    assert not set("\x1b\x00\x07\u202e") & set(text)
    titles = [attrs["title"] for _, attrs in page.elements if "title" in attrs]
    assert any(re.fullmatch(r"token \d+ '<end>', position \d+, turn 0", title) for title in titles)


def test_a_page_that_exists_stays(tmp_path, data, capsys):
    page = tmp_path / "page.html"
    page.write_text("mine")
    code, _, err = inspect(capsys, data, "--html", page)
    assert (code, page.read_text()) == (1, "mine")
    assert "give another --html, or --overwrite" in err
    assert inspect(capsys, data, "--html", page, "--dialogue", "no", "--overwrite")[0] == 1
    assert page.read_text() == "mine"
    assert inspect(capsys, data, "--html", page, "--overwrite")[0] == 0
    assert page.read_text().startswith("<!doctype html>")
    assert inspect(capsys, data, "--html", data, "--overwrite")[0] == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["page.html", "talk.jsonl"]


# ---- the document ----------------------------------------------------------------------------------------------------
def test_the_example_of_the_document(tmp_path, capsys):
    text = (ROOT / "docs/inspect.md").read_text(encoding="utf-8")
    (record,), (shown,) = (re.findall(rf"```{kind}\n(.*?)```", text, re.DOTALL) for kind in ("json", "text"))
    (command,) = re.findall(r"`ppg-fast inspect (talk\.jsonl .*?)`", text)
    data = write(tmp_path / "talk.jsonl", json.loads(record))
    code, out, _ = inspect(capsys, data, *command.split()[1:])
    assert code == 0
    assert shown.splitlines() == [line.rstrip() for line in out.rstrip("\n").splitlines()]
