"""Rollouts with tools: what is trained token by token, what the functions answer, and what is refused before a run."""

import json
import warnings
from functools import wraps
from itertools import groupby
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from chat_case import folder
from tools_case import scripted, tiny, tokenizer_with_calls

from ppg_fast.dialogues import ChatFormat, Message
from ppg_fast.dialogues.prompts import Prompt
from ppg_fast.rewards import Judge, Reward, RewardModel, Transcript, score
from ppg_fast.rollouts.generation import EndpointSampler
from ppg_fast.rollouts.partner import LoggedPartner, NoPartner, as_partner
from ppg_fast.rollouts.rollout import collect_groups
from ppg_fast.rollouts.tools import AnswerReader, ToolConversation, Tools, own_rewards, prepared, step_calls

EXAMPLES = Path(__file__).parents[1] / "examples/tools"
needs_trl = pytest.mark.skipif(folder() is None, reason="TRL's package carries the templates")
pytestmark = needs_trl


@pytest.fixture(scope="module")
def shop():
    return Tools(str(EXAMPLES / "shop.py"))


class Once:
    """A partner who replies once."""

    def replies(self, conversations):
        return [Message("user", "thanks") if c.turns == 1 else None for c in conversations]


def roll_out(monkeypatch, name, tools, *script, prompt=None, partner=None, calls=16, **settings):
    """Rollouts of one prompt with scripted answers, one for each dialogue of ``script``."""
    model, chat = tiny(name)
    sampler = scripted(monkeypatch, chat, *script)
    prompt = prepared(prompt or Prompt("p", (Message("user", "cost?"),)), tools)
    make = lambda: ToolConversation(  # noqa: E731
        [prompt], partner or NoPartner(), 4, "", chat.without_special, tools=tools, max_calls=calls
    )
    generator = torch.Generator().manual_seed(0)
    settings = {"generator": generator, "step_all": step_calls, "read": AnswerReader(chat), **settings}
    found = collect_groups(model, chat, make, [0], len(script), max_turns=99, **settings)
    return chat, found, sampler


def runs(chat, sample):
    """(whether it is trained, what it says) of each run of tokens."""
    pairs = zip(sample.turn_ids, sample.tokens, strict=True)
    return [
        (turn, chat.tokenizer.decode([token for _, token in run])) for turn, run in groupby(pairs, key=lambda p: p[0])
    ]


# ---- token by token --------------------------------------------------------------------------------------------------
RESULT = "\n<|im_start|>user\n<tool_response>\n{}\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
LLAMA = "<|start_header_id|>{}<|end_header_id|>\n\n"
CASES = {  # a call, a last answer, a reply of the user, as the model writes them; what stands between
    "qwen3": (
        "<think>\nhm\n</think>\n\n"
        '<tool_call>\n{"name": "price", "arguments": {"item": "pear"}}\n</tool_call><|im_end|>',
        "4 each<|im_end|>",
        RESULT.format(4),
        "\n<|im_start|>user\nthanks<|im_end|>\n<|im_start|>assistant\n",
    ),
    "qwen3_5_nothink": (
        "<tool_call>\n<function=price>\n<parameter=item>\npear\n</parameter>\n</function>\n</tool_call><|im_end|>",
        "4 each<|im_end|>",
        RESULT.format(4) + "<think>\n\n</think>\n\n",
        "\n<|im_start|>user\nthanks<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    ),
    "llama3_2": (
        '{"name": "price", "parameters": {"item": "pear"}}<|eot_id|>',
        "4 each<|eot_id|>",
        f'{LLAMA.format("ipython")}"4"<|eot_id|>{LLAMA.format("assistant")}',
        f"{LLAMA.format('user')}thanks<|eot_id|>{LLAMA.format('assistant')}",
    ),
    "mistral": (
        '[TOOL_CALLS] [{"name": "price", "arguments": {"item": "pear"}, "id": "abcdefghi"}]</s>',
        " 4 each</s>",
        '[TOOL_RESULTS] {"content": "4", "call_id": "abcdefghi"}[/TOOL_RESULTS]',
        None,  # the tools stand before the last message of the user
    ),
    "gptoss": (
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant to=functions.price<|channel|>commentary json"
        '<|message|>{"item": "pear"}<|call|>',
        "<|channel|>final<|message|>4 each<|return|>",
        '<|start|>functions.price to=assistant<|channel|>commentary<|message|>"4"<|end|><|start|>assistant',
        "<|start|>user<|message|>thanks<|end|><|start|>assistant",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_calls_are_trained_and_their_results_are_context(name, shop, monkeypatch):
    call, answer, result, thanks = CASES[name]
    chat, (rollout,), sampler = roll_out(monkeypatch, name, shop, (call, answer, answer), partner=Once())
    (opened, opening), *spoken = runs(chat, rollout.sample)
    written = chat.tokenizer.apply_chat_template(
        [{"role": "user", "content": "cost?"}],
        tools=list(shop.schemas[""].values()),
        tokenize=False,
        add_generation_prompt=True,
    )
    assert (opened, opening) == (-1, written)
    if thanks is None:
        thanks = chat.tokenizer.decode(chat.reply(Message("user", "thanks"), rollout.tools))
        assert thanks.endswith("[/AVAILABLE_TOOLS][INST] thanks[/INST]")
    assert spoken == [(0, call), (-1, result), (1, answer), (-1, thanks), (2, answer)]
    for before, tokens in sampler.said:
        assert (before + tokens) == rollout.sample.tokens[: len(before) + len(tokens)], "what was sampled, as it was"
    banned = set(chat.banned_token_ids(len(chat.tokenizer)))
    assert not banned & {token for _, tokens in sampler.said for token in tokens}, "a sampler could have said it"
    assert rollout.cut_off == [False] * 3
    asked, called, told, said, *_ = rollout.messages
    assert (asked.content, told.content, said.content.strip()) == ("cost?", "4", "4 each")
    (made,) = called.tool_calls
    assert made["function"] == {"name": "price", "arguments": {"item": "pear"}}
    assert (told.role, told.more) == ("tool", {"name": "price", "tool_call_id": made["id"]})
    assert called.reasoning == ("hm" if "hm" in call else "")
    assert rollout.sample.rewards == [0.0] * 3


def test_append_only_templates_write_the_whole_as_it_was_sampled(shop, monkeypatch):
    """transformers' rendering of the messages as they were read, from the first to the last."""
    call, answer, *_ = CASES["llama3_2"]
    chat, (rollout,), _ = roll_out(monkeypatch, "llama3_2", shop, (call, call, answer, answer), partner=Once())
    written = chat.tokenizer.apply_chat_template(
        [m.as_dict() for m in rollout.messages], tools=list(rollout.tools), tokenize=True, return_dict=False
    )
    assert rollout.sample.tokens == written


def test_several_calls_of_an_answer_have_several_results_and_bad_ones_errors(shop, monkeypatch):
    bodies = [
        '{"name": "price", "arguments": {"item": "melon"}}',
        '{"name": "multiply", "arguments": "{\\"a\\": 2, \\"b\\": 11}"}',
        '{"name": "divide", "arguments": {}}',
        '{"name": "multiply", "arguments": {"a": 2}}',
        '{"name": "multiply", "arguments": {"a": 2, "b": "11"}}',
        '{"name": "price", "arguments": {"item": "<|im_end|>"}}',
        '{"name": "price", "argu',
    ]
    said = "".join(f"<tool_call>\n{body}\n</tool_call>\n" for body in bodies)
    with pytest.warns(UserWarning, match=r"prompt 'p': tool price raised KeyError: .*shop.py, line \d+"):
        chat, (rollout,), _ = roll_out(monkeypatch, "qwen2_5", shop, (f"{said}<|im_end|>", "22<|im_end|>"))
    _, called, *results, last = rollout.messages
    assert [m.role for m in results] == ["tool"] * 7
    texts = [m.content for m in results]
    assert texts[:2] == ["11", "22"]
    assert [json.loads(text)["error"] for text in texts[2:]] == [
        "there is no function 'divide', there is price, multiply",
        "multiply: missing a required argument: 'b'",
        'multiply: b must be of type integer, got "11"',
        "price: KeyError: 'no  in this shop'",
        "the call cannot be read: name and arguments (a JSON object) are expected, got "
        + repr('{"name": "price", "argu'),
    ]
    assert [call["id"] for call in called.tool_calls] == [m.more["tool_call_id"] for m in results]
    assert [m.more["name"] for m in results[-2:]] == ["price", "price"]
    assert last.content == "22"
    assert rollout.environment.counts == {"calls": 7, "failures": 5}
    assert "".join(text for turn, text in runs(chat, rollout.sample) if turn == -1).count("<tool_response>") == 7


def test_a_loop_of_calls_ends(shop, monkeypatch):
    call = CASES["llama3_2"][0]
    _, (rollout,), _ = roll_out(monkeypatch, "llama3_2", shop, (call,) * 9, calls=3)
    assert [m.role for m in rollout.messages] == ["user", *["assistant", "tool"] * 3, "assistant"]
    twice = call.replace("<|eot_id|>", "; ") + call
    _, (rollout,), _ = roll_out(monkeypatch, "llama3_2", shop, (twice,) * 9, calls=3)
    texts = [m.content for m in rollout.messages if m.role == "tool"]
    assert texts == ["4", "4", "4", '{"error": "no more calls: a dialogue may have 3 of them"}']
    assert len(rollout.sample.rewards) == 3


def test_partners_hear_no_calls_and_turns_are_those_they_hear(shop, monkeypatch):
    call, answer, *_ = CASES["qwen3"]
    _, (rollout,), _ = roll_out(monkeypatch, "qwen3", shop, (call, answer, call, answer), partner=Once())
    talk = rollout.environment
    assert [m.content for m in as_partner(talk, "be a user")] == [
        *("be a user", "Begin.", "cost?", "4 each", "thanks", "4 each")
    ]
    assert (talk.turns, len(rollout.sample.rewards)) == (2, 4)


def test_a_log_says_what_its_users_say_and_no_results(shop, monkeypatch):
    call, answer, *_ = CASES["qwen3"]
    result = Message("tool", "99", {"name": "price", "tool_call_id": "c"})
    prompt = Prompt("p", (Message("user", "cost?"),), logged=((result,), (Message("user", "thanks"),)))
    script = (call, answer, answer)
    _, (rollout,), _ = roll_out(monkeypatch, "qwen3", shop, script, prompt=prompt, partner=LoggedPartner())
    assert [m.content for m in rollout.messages if m.role != "assistant"] == ["cost?", "4", "thanks"]


def test_a_server_that_samples_is_read_alike(shop, monkeypatch):
    call, answer, *_ = CASES["llama3_2"]
    chat, (local,), sampler = roll_out(monkeypatch, "llama3_2", shop, (call, answer))
    sampler.script = [[call, answer]]
    server = object.__new__(EndpointSampler)
    server.positions = 2**62
    monkeypatch.setattr(EndpointSampler, "answer", lambda _, requests: sampler.answer(requests))
    prompt = prepared(Prompt("p", (Message("user", "cost?"),)), shop)
    make = lambda: ToolConversation([prompt], NoPartner(), 4, tools=shop)  # noqa: E731
    settings = {"generator": torch.Generator().manual_seed(0), "step_all": step_calls, "read": AnswerReader(chat)}
    (served,) = collect_groups(server, chat, make, [0], 1, **settings)
    assert (served.sample, served.messages) == (local.sample, local.messages)


def test_a_result_that_leaves_no_room_ends_the_dialogue(tmp_path, monkeypatch):
    tools = Tools(file_of(tmp_path, TYPED.format(name="f", body="return 'x' * 999")))
    said = '<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call><|im_end|>'
    room = 1200  # bytes: the opening has some 700 of them
    _, (rollout,), _ = roll_out(monkeypatch, "qwen2_5", tools, (said, said), max_dialogue_tokens=room)
    assert [m.role for m in rollout.messages] == ["user", "assistant"]
    assert [m.role for m in rollout.environment.messages] == ["user", "assistant", "tool"], "rewards see it"
    assert len(rollout.sample.tokens) < room


def test_replies_are_not_kept_for_ever(monkeypatch):
    monkeypatch.setattr("ppg_fast.dialogues.between.KEPT", 3)
    chat = ChatFormat(tokenizer_with_calls("qwen3"))
    replies = [chat.reply(Message("user", str(n))) for n in range(7)]
    assert len(chat._replies._known) <= 3
    assert chat.reply(Message("user", "0")) == replies[0]


def test_judges_are_not_asked_about_a_turn_that_calls():
    asked = []

    class Scorer:
        scores_calls = False

        def __call__(self, transcripts):
            asked.extend(transcripts)
            return [1.0 for _ in transcripts]

    calls = {"tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": {}}}]}
    talk = (Message("user", "a"), Message("assistant", "", calls), Message("tool", "b"), Message("assistant", "c"))
    transcript = Transcript("d", talk)
    assert Judge.scores_calls is RewardModel.scores_calls is False
    scores = score([Reward("r", Scorer())], [transcript])
    assert scores.totals == [[None, 1.0]]
    assert scores.without_calls([transcript]).totals == [[0.0, 1.0]]
    assert asked == [transcript]
    assert Reward("r", Scorer(), "dialogue").turns([transcript]) == [[0.0, 1.0]]


def test_a_tokenizers_own_response_template_reads_calls(shop, monkeypatch):
    from trl.chat_template_utils import qwen3_template

    call, answer, *_ = CASES["qwen3"]
    tokenizer = tokenizer_with_calls("qwen3")
    tokenizer.response_template = qwen3_template
    chat = ChatFormat(tokenizer)
    parsed = []
    real = type(tokenizer).parse_response
    spy = wraps(real)(lambda *given, **named: parsed.append(real(*given, **named)) or parsed[-1])
    monkeypatch.setattr(type(tokenizer), "parse_response", spy)
    reader = AnswerReader(chat)
    schemas = list(shop.schemas[""].values())
    asked = chat.opening([Message("user", "cost?")], schemas)
    encode = chat.renderer.encode
    read = reader(encode(call), asked, 0, schemas)
    assert read.tool_calls[0]["function"] == parsed[0]["tool_calls"][0]["function"]
    assert read.reasoning == "hm"
    assert reader(encode(answer), asked, 0, schemas) == Message("assistant", "4 each")
    broken = reader(encode(call.replace("}}", "}")), asked, 0, schemas)
    assert broken.tool_calls[0]["function"]["name"] == "price"
    assert isinstance(broken.tool_calls[0]["function"]["arguments"], str), "a malformed call is one all the same"


# ---- what is called --------------------------------------------------------------------------------------------------
def file_of(tmp_path, text, name="mine.py"):
    (tmp_path / name).write_text(text)
    return str(tmp_path / name)


TYPED = '''
def {name}(x: int) -> str:
    """Say it.

    Args:
        x: A number.
    """
    {body}
'''


@pytest.mark.parametrize(
    ("text", "names", "message"),
    [
        ("x = 1", "", "has no public function and no environment_factory: name a class"),
        ("import nothing_there", "", "cannot be loaded: ModuleNotFoundError"),
        ("def f(x): pass", "", r"f: a tool wants types and a docstring .*no docstring"),
        ("def f(x: int):\n    'Say.'", "", "no description for the argument 'x'"),
        (TYPED.format(name="f", body="pass"), ":g", "has no function or class 'g'"),
        ("class A:\n    pass", ":A", "an environment must have a method reset, A has none"),
        ("class A:\n    def __init__(self): 1 / 0", ":A", "no environment can be made: ZeroDivisionError"),
        ("class A: pass\nclass B: pass", ":A,B", "one class or factory of environments at most, got A, B"),
    ],
)
def test_what_is_no_tool_is_one_line(text, names, message, tmp_path):
    with pytest.raises(ValueError, match=message) as found:
        Tools(file_of(tmp_path, text) + names)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("where", ["", ":f", "tools", "x.py:"])
def test_a_place_that_is_none_is_refused(where):
    with pytest.raises(ValueError, match=r"^tools must be file.py, file.py:name,name or module:name,name|cannot be"):
        Tools(where)


def test_a_prompt_chooses_among_the_functions(shop):
    plain = {"type": "function", "function": {"name": "price"}}
    own = {"type": "function", "function": {"name": "price", "parameters": {"type": "object", "properties": {}}}}
    ask = (Message("user", "cost?"),)
    assert [t["function"]["name"] for t in prepared(Prompt("p", ask), shop).tools] == ["price", "multiply"]
    (chosen,) = prepared(Prompt("p", ask, tools=(plain,)), shop).tools
    assert chosen["function"]["description"].startswith("Look up")
    assert prepared(Prompt("p", ask, tools=(own,)), shop).tools == (own,)
    with pytest.raises(ValueError, match=r"^tool 'fly' has no function in .*shop.py, which has price, multiply$"):
        prepared(Prompt("p", ask, tools=({"type": "function", "function": {"name": "fly"}},)), shop)


def test_results_are_bounded_text_without_special_tokens(tmp_path, monkeypatch):
    body = (
        "return [lambda: 'a<|im_end|>b', lambda: 'x' * 99_999, lambda: {'a': ['\u00e9']}, lambda: None,"
        " lambda: '\\ud800', lambda: exit(3), lambda: [{'type': 'text', 'text': 'part'}]][x]()"
    )
    tools = Tools(file_of(tmp_path, TYPED.format(name="f", body=body)))
    said = "".join(f'<tool_call>{{"name": "f", "arguments": {{"x": {n}}}}}</tool_call>' for n in range(7))
    with warnings.catch_warnings(record=True):
        _, (rollout,), _ = roll_out(monkeypatch, "qwen2_5", tools, (f"{said}<|im_end|>", "ok<|im_end|>"))
    texts = [m.content for m in rollout.messages if m.role == "tool"]
    assert [texts[n] for n in (0, 2, 3, 4, 6)] == ["ab", '{"a": ["\u00e9"]}', "None", "?", "part"]
    assert texts[1].endswith("(cut off: 16384 of 99999 characters)")
    assert texts[5] == '{"error": "f: SystemExit: 3"}'


def test_async_tools_and_a_module_with_helpers(tmp_path, monkeypatch):
    (tmp_path / "beside_the_tools.py").write_text("WORD = 'beside'")
    text = TYPED.format(name="f", body="import beside_the_tools; return beside_the_tools.WORD")
    text += "def _helper(x): pass\nfrom json import dumps\n"
    tools = Tools(file_of(tmp_path, text.replace("def f", "async def f")))
    assert tools.names == ["f"]
    said = '<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call><|im_end|>'
    _, (rollout,), _ = roll_out(monkeypatch, "qwen2_5", tools, (said, "ok<|im_end|>"))
    assert [m.content for m in rollout.messages if m.role == "tool"] == ["beside"]


# ---- environments ----------------------------------------------------------------------------------------------------
PUT = '<tool_call>\n{{"name": "put", "arguments": {{"item": "pear", "count": {}}}}}\n</tool_call><|im_end|>'


def test_an_environment_is_one_rollouts_own(monkeypatch):
    tools = Tools(str(EXAMPLES / "basket.py") + ":Basket")
    prompt = Prompt("p", (Message("user", "Shop."),), info={"item": "pear"})
    script = [(PUT.format(2), PUT.format(3), "ok<|im_end|>"), ("no<|im_end|>",)]
    _, (one, two), _ = roll_out(monkeypatch, "qwen3", tools, *script, prompt=prompt)
    assert one.messages[0].content == "Shop. The basket is for pears."
    assert [m.content for m in one.messages if m.role == "tool"] == ["2 pears in the basket", "5 pears in the basket"]
    assert two.environment.environment.basket == {}
    (reward,) = own_rewards(tools)
    assert reward.name == "Basket"
    assert reward.turns([r.environment.transcript() for r in (one, two)]) == [[0.0, 0.0, 1.0], [0.0]]


def test_trls_environment_works_as_it_is_and_factories_go_by_name(tmp_path, monkeypatch):
    text = '''
class Counter:
    def reset(self, **kwargs) -> str | None:
        assert "environment" not in kwargs and kwargs["prompt"][0]["content"] == "Go."
        self.count = kwargs["begin"]

    def step(self, by: int) -> int:
        """Count on.

        Args:
            by: How far.
        """
        self.count += by
        return self.count

    async def get_reward(self) -> float:
        return float(self.count)

class Other(Counter):
    def get_reward(self):
        return -1.0

environment_factory = {"counter": Counter, "other": lambda: Other()}
'''
    tools = Tools(file_of(tmp_path, text))
    info = {"environment": "counter", "begin": 4}
    said = '<tool_call>{"name": "step", "arguments": {"by": 3}}</tool_call><|im_end|>'
    ask = (Message("user", "Go."),)
    for name, values in (("counter", [[0.0, 7.0], [None, None]]), ("other", [[None, None], [0.0, -1.0]])):
        prompt = Prompt("p", ask, info={**info, "environment": name})
        _, (rollout,), _ = roll_out(monkeypatch, "qwen3", tools, (said, "ok<|im_end|>"), prompt=prompt)
        rewards = {reward.name: reward for reward in own_rewards(tools)}
        found = [rewards[kind].turns([rollout.environment.transcript()]) for kind in ("Counter", "Other")]
        assert found == [[row] for row in values]
    with pytest.raises(ValueError, match="environment must be one of counter, other, got 'third'"):
        prepared(Prompt("p", ask, info={"environment": "third"}), tools)
    bad = Prompt("p", ask, info={"environment": "counter"})
    with pytest.raises(ValueError, match=r"prompt 'p': the environment's reset failed: KeyError: 'begin'"):
        roll_out(monkeypatch, "qwen3", tools, (said,), prompt=bad)
