"""Chat templates of one's own choice: files, those that ship, and what they are told."""

import json
import shutil

import pytest

pytest.importorskip("transformers")

from chat_case import CHATML, byte_tokenizer, folder, tokenizer_of
from test_chat_runs import RUN, logged, refusal, reward
from test_chat_runs import folder as model_folder
from test_cli import rows, write

from ppg_fast.cli import main
from ppg_fast.config import make_config, read_yaml
from ppg_fast.dialogues import ChatFormat, Dialogue, Message, encode_dialogue
from ppg_fast.dialogues.template_choice import names_read, shipped, template_text

needs_trl = pytest.mark.skipif(not folder(), reason="TRL's package carries the templates")
TOOLS = ({"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": {}}},)
CALLS = [
    {"type": "function", "id": "c1", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}},
    {"type": "function", "id": "c2", "function": {"name": "weather", "arguments": {"city": "Oslo"}}},
]
TALK = (
    Message("system", "be kind"),
    Message("user", "weather?"),
    Message("assistant", "", {"tool_calls": CALLS, "reasoning_content": "I look"}),
    Message("tool", "12 C", {"tool_call_id": "c1"}),
    Message("tool", "3 C", {"tool_call_id": "c2"}),
    Message("assistant", "12 and 3", {"reasoning_content": "both are there"}),
    Message("user", "thanks"),
    Message("assistant", "bye"),
)
LIKE = {"chatml": "qwen2_5", "qwen3": "qwen3", "llama3": "llama3_1", "gemma": "gemma3", "phi": "phi3"}


def test_every_template_that_ships_is_tried_here():
    assert sorted(LIKE) == shipped()


@needs_trl
@pytest.mark.parametrize("name", LIKE)
def test_a_template_that_ships_only_appends_and_writes_everything(name):
    tokenizer = tokenizer_of(LIKE[name])
    chat = ChatFormat(tokenizer, template=template_text(name))
    sample = encode_dialogue(chat, Dialogue("d", "g", TALK, (1.0, 1.0, 1.0), TOOLS))
    assert sample.starts == [0]
    said = [
        tokenizer.decode([t for t, of in zip(sample.tokens, sample.turn_ids, strict=True) if of == turn])
        for turn in range(3)
    ]
    end = tokenizer.convert_ids_to_tokens(chat.end_id)
    assert said[0].startswith("<think>\nI look\n</think>\n\n")
    for city in ("Rome", "Oslo"):
        assert json.dumps({"city": city}) in said[0]
    assert said[0].count('"name": "weather"') == 2
    assert said[1:] == [f"<think>\nboth are there\n</think>\n\n12 and 3{end}", f"bye{end}"]
    # what a rollout has between the sampled answers is the same
    spans, turns = [], sample.turn_ids
    for place, turn in enumerate(turns):
        if not place or (turn < 0) != (turns[place - 1] < 0):
            spans.append([])
        spans[-1].append(sample.tokens[place])
    context = spans[::2]
    assert context[0] == chat.opening(TALK[:2], TOOLS)
    assert context[1] == chat.reply(TALK[3:5], TOOLS)
    block = tokenizer.encode("<think>\n\n</think>\n\n") if name == "qwen3" else []
    assert context[2] == chat.reply(TALK[6], TOOLS) + block


@needs_trl
def test_what_a_template_is_told_reaches_every_rendering_and_must_be_read():
    tokenizer = tokenizer_of("qwen3")
    chat = ChatFormat(tokenizer, template_kwargs={"enable_thinking": False})
    closed = tokenizer.encode("<think>\n\n</think>\n\n")
    ask = Message("user", "hello")
    assert chat.opening([ask])[-len(closed) :] == closed == chat.reply(ask)[-len(closed) :]
    assert chat.renderer.digest() != ChatFormat(tokenizer).renderer.digest()
    rule = r"names that the chat template reads \(enable_thinking\), got 'enable_thought'"
    with pytest.raises(ValueError, match=rule):
        ChatFormat(tokenizer, template_kwargs={"enable_thought": False})
    with pytest.raises(ValueError, match=r"\(it reads none\), got 'messages, tools'"):
        ChatFormat(tokenizer_of("qwen2_5"), template_kwargs={"tools": [], "messages": []})


def test_names_that_a_template_reads():
    template = (
        "{% generation %}{% set own = 1 %}{{ own }}{{ bos_token }}{{ range(3) }}{% if not day is defined %}"
        "{% set day = 2 %}{% endif %}{{ day }}{{ mood | default('good') }}{% macro f(a) %}{{ a }}{{ style }}"
        "{% endmacro %}{% endgeneration %}"
    )
    assert names_read(template) == ["day", "mood", "style"]
    assert names_read("{% for %}") == []


def test_a_template_must_be_found_and_its_tokens_be_the_tokenizers(tmp_path):
    with pytest.raises(ValueError, match=r"chatml, gemma, llama3, phi, qwen3, got 'chatm'.*chatml"):
        template_text("chatm")
    assert template_text("") == ""
    (tmp_path / "own.jinja").write_text("mine")
    assert template_text(str(tmp_path / "own.jinja")) == "mine"
    tokenizer = byte_tokenizer(CHATML, ["<|im_start|>", "<|im_end|>"], eos_token="<|im_end|>")
    with pytest.raises(ValueError, match=r"must have the tokens .* missing, got '.*<\|start_header_id\|>'"):
        ChatFormat(tokenizer, template=template_text("llama3"))
    assert tokenizer.chat_template == CHATML, "refused before anything is changed"
    several = byte_tokenizer({"default": CHATML, "tool_use": "T" + CHATML}, ["<|im_start|>", "<|im_end|>"])
    assert template_text("tool_use", several) == "T" + CHATML


def test_a_run_with_a_template_file_keeps_it_and_is_resumed_with_the_same_only(tmp_path, capsys):
    model, own = model_folder(tmp_path / "m", CHATML), tmp_path / "own.jinja"
    own.write_text("Talk:{{ style }}" + CHATML)
    path = write(tmp_path / "d.jsonl", [logged(n) for n in range(2)])
    run = tmp_path / "run"
    (tmp_path / "c.yaml").write_text("chat_template_kwargs: {style: plain}\n")
    flags = ["--config", str(tmp_path / "c.yaml"), "--data", path, "--model", model, "--chat-template", str(own)]
    assert main(["train", *flags, "--output-dir", str(run), "--save-every", "1", *RUN, "1"]) == 0
    assert (run / "checkpoint/chat_template.jinja").read_text() == own.read_text()
    assert json.loads(make_config(read_yaml(str(run / "config.yaml"))).chat_template_kwargs) == {"style": "plain"}
    shutil.move(own, tmp_path / "moved.jinja")
    again = ["--resume", str(run), "--chat-template", str(tmp_path / "moved.jinja"), "--max-steps", "2"]
    assert main(["train", *again]) == 0
    assert len(rows(run, "train")) == 2
    capsys.readouterr()
    assert "chat_template_kwargs" in refusal(capsys, *again, "--chat-template-kwargs", '{"style": "other"}')
    (tmp_path / "moved.jinja").write_text("Other:{{ style }}" + CHATML)
    assert "a run goes on with the" in refusal(capsys, *again[:-1], "3")


def test_prompts_with_a_template_that_ships(tmp_path):
    model = model_folder(tmp_path / "m", "Odd: " + CHATML)
    path = write(tmp_path / "p.jsonl", [{"messages": [{"role": "user", "content": "hello"}]}] * 2)
    flags = ["--prompts", path, "--model", model, "--reward", reward(tmp_path), "--chat-template", "chatml"]
    assert main(["train", *flags, "--output-dir", str(tmp_path / "out"), *RUN, "1"]) == 0
    assert (tmp_path / "out/checkpoint/chat_template.jinja").read_text() == template_text("chatml")


@pytest.mark.parametrize("given", ["[1]", "{", "3", '"a"'])
def test_what_a_template_is_told_must_be_an_object(given, capsys):
    assert "chat_template_kwargs must be a JSON object" in refusal(capsys, f"--chat-template-kwargs={given}")
