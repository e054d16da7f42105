"""`ppg-fast train --tools`: a run with functions, one with an environment, `--resume`, and what is refused."""

import pytest

pytest.importorskip("transformers")

from chat_case import CHATML, byte_tokenizer
from test_cli import dialogue, rows, write
from test_tools import CASES, EXAMPLES, PUT, needs_trl
from tools_case import tiny, tokenizer_with_calls

from ppg_fast.cli import main
from ppg_fast.dialogues import ChatFormat
from ppg_fast.dialogues.prompts import read_prompts
from ppg_fast.rollouts.generation import Answer
from ppg_fast.rollouts.partner import Conversation, NoPartner
from ppg_fast.rollouts.tools import AnswerReader

pytestmark = needs_trl


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    place = tmp_path_factory.mktemp("model") / "Qwen3"
    model, chat = tiny("qwen3")
    model.generation_config.eos_token_id = chat.end_id
    model.save_pretrained(place)
    chat.tokenizer.save_pretrained(place)
    return str(place)


TRAIN = ("--num-prompts", "1", "--num-generations", "2", "--max-steps", "1", "--eval-every", "9", "--no-progress")


def train(place, out, *flags):
    prompts = str(EXAMPLES / "prompts.jsonl")
    fixed = ("--model", place, "--prompts", prompts, "--partner", "none", "--output-dir", str(out))
    return main(["train", *fixed, *TRAIN, *flags])


def shopping(monkeypatch, *said):
    """Every sampler of rollouts says the same in every dialogue: a call, then an answer."""
    _, chat = tiny("qwen3")
    called = chat.tokenizer.convert_tokens_to_ids("</tool_response>")
    texts = [chat.renderer.encode(text) for text in said]

    class Shopper:
        def answer(self, requests):
            chosen = [texts[called in request.tokens] for request in requests]
            return [Answer(tokens, [-1.0] * len(tokens), True) for tokens in chosen]

    monkeypatch.setattr("ppg_fast.rollouts.rollout.LocalSampler", lambda *_: Shopper())


def test_a_run_with_tools_trains_and_is_resumed_with_the_same_tools_only(checkpoint, tmp_path, monkeypatch, capsys):
    shopping(monkeypatch, CASES["qwen3"][0], "22<|im_end|>")
    tools = tmp_path / "shop.py"
    tools.write_text((EXAMPLES / "shop.py").read_text())
    out = tmp_path / "run"
    reward = str(EXAMPLES / "rewards.py:right")
    assert train(checkpoint, out, "--tools", str(tools), "--reward", reward, "--num-prompts", "4") == 0
    (row,) = rows(out, "rollout")
    assert (row["tools/call_frequency"], row["tools/failure_frequency"]) == (1.0, 0.0)
    assert (row["rewards/right/mean"], row["rewards/unscored"]) == (0.25, 0), "one prompt of four asks for 22"
    assert rows(out, "train")[0]["turns/mean_count"] == 2
    assert "price(item='pear')" in (out / "samples_before.md").read_text()
    tools.write_text(tools.read_text().replace("11", "12"))
    assert main(["train", "--resume", str(out), "--max-steps", "2"]) == 1
    assert "a run goes on with the tools (the file, and the modules beside it" in capsys.readouterr().err
    tools.write_text(tools.read_text().replace("12", "11"))
    assert main(["train", "--resume", str(out), "--max-steps", "2"]) == 0
    assert len(rows(out, "rollout")) == 2


def test_an_environment_pays_without_a_reward_function(checkpoint, tmp_path, monkeypatch):
    shopping(monkeypatch, PUT.format(2).replace("pear", "melon"), "ok<|im_end|>")
    tools = str(EXAMPLES / "basket.py:Basket")
    reward = str(EXAMPLES / "rewards.py:in_the_basket") + "@dialogue"
    assert train(checkpoint, tmp_path / "run", "--tools", tools) == 0
    assert "1*Basket@dialogue" in (tmp_path / "run" / "README.md").read_text()
    assert train(checkpoint, tmp_path / "other", "--tools", tools, "--reward", reward) == 0
    (row,) = rows(tmp_path / "other", "rollout")
    assert {"rewards/Basket/mean", "rewards/in_the_basket/mean"} <= row.keys()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tools", "SHOP"], "a reward is needed"),
        (["--tools", "nowhere.py"], "nowhere.py cannot be loaded: FileNotFoundError"),
        (["--max-tool-calls", "3"], "max_tool_calls must be 16 without tools, where nothing is called, got 3"),
        (["--tools", "SHOP", "--max-tool-calls", "0"], "max_tool_calls must be an integer >= 1"),
        (["--tools", "BASKET:Basket", "--prompts", "LISTED"], "prompt 'a': tool 'fly' has no function in"),
    ],
)
def test_bad_settings_are_one_line_before_anything_is_written(flags, message, checkpoint, tmp_path, capsys):
    fly = [{"type": "function", "function": {"name": "fly"}}]
    listed = write(tmp_path / "p.jsonl", [{"id": "a", "messages": [{"role": "user", "content": "Go."}], "tools": fly}])
    names = {"SHOP": EXAMPLES / "shop.py", "BASKET:Basket": f"{EXAMPLES / 'basket.py'}:Basket", "LISTED": listed}
    assert train(checkpoint, tmp_path / "run", *[str(names.get(flag, flag)) for flag in flags]) == 1
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()


def test_tools_without_prompts_are_refused(tmp_path, capsys):
    data = write(tmp_path / "d.jsonl", [dialogue(n) for n in range(3)])
    assert (
        main(["train", "--data", data, "--tools", str(EXAMPLES / "shop.py"), "--output-dir", str(tmp_path / "r")]) == 1
    )
    assert "tools has no effect without prompts" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "why"), [("gemma3", "this one leaves them out"), ("phi3", "leaves them out")])
def test_a_template_that_writes_no_calls_is_refused(name, why):
    with pytest.raises(ValueError, match=f"^tools want a chat template that writes calls: .*{why}"):
        AnswerReader(ChatFormat(tokenizer_with_calls(name)))


def test_a_form_that_nothing_reads_is_refused_with_what_it_is():
    template = CHATML.replace(
        "{{ m.content }}", "{{ m.content }}{% for c in m.tool_calls %}!{{ c.function.name }}{% endfor %}"
    )
    tokenizer = byte_tokenizer(template, ["<|im_start|>", "<|im_end|>"], eos_token="<|im_end|>")
    with pytest.raises(ValueError, match=r"in a form that nothing here reads .* it writes '!look_up"):
        AnswerReader(ChatFormat(tokenizer))


def test_prompts_tools_reach_the_opening_without_functions_too():
    (prompt, *_) = read_prompts(EXAMPLES / "prompts.jsonl")
    talk = Conversation([prompt], NoPartner(), 1)
    talk.reset(0)
    assert talk.tools == prompt.tools
