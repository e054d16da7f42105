"""`logratio:MODEL,BASE` and `inverse_soft_q:MODEL,BASE`: what transformers gives, folders of one vocabulary, known by
their content."""

from dataclasses import replace

import pytest
import torch

transformers = pytest.importorskip("transformers")

import ppg_fast as ppg
from ppg_fast.config import make_config
from ppg_fast.dialogues import Message, make_word_tokenizer
from ppg_fast.jobs.endpoints import rewards_of
from ppg_fast.jobs.inputs import input_paths, reward_digest, with_absolute_paths
from ppg_fast.models.causal_lm import make_model
from ppg_fast.rewards import Transcript

KINDS = ["logratio", "inverse_soft_q"]
WORDS = ["be", "kind", "one", "two", "three"]


def folder(path, seed, words=WORDS):
    tokenizer = make_word_tokenizer(words)
    make_model(len(tokenizer), 16, 1, seed, tokenizer.pad_token_id).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def reward_of(formula):
    return rewards_of(make_config({"reward": formula}), "cpu")


def talk(name, *answers):
    said = [m for a in answers for m in (Message("user", "be kind"), Message("assistant", a))]
    return Transcript(name, tuple(said))


def written_out(model, base, transcript):
    """(log ratio, value) in nats of each turn, by plain logits in float64 of the dialogue up to it."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    both = [transformers.AutoModelForCausalLM.from_pretrained(f).double() for f in (model, base)]
    said = [{"role": m.role, "content": m.content.replace("<e<end>nd>", "")} for m in transcript.messages]
    rows = []
    for until in range(1, len(said), 2):
        before = tokenizer.apply_chat_template(said[:until], add_generation_prompt=True, return_dict=False)
        whole = tokenizer.apply_chat_template(said[: until + 1], return_dict=False)
        assert whole[: len(before)] == before
        logits = [m(torch.tensor([whole])).logits[0] for m in both]
        places = range(len(before), len(whole))
        sums = [sum(z.log_softmax(-1)[i - 1, whole[i]].item() for i in places) for z in logits]
        values = [z[len(before) - 1].logsumexp(0).item() for z in logits]
        rows.append((sums[0] - sums[1], values[0] - values[1]))
    return rows


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_formula_of_log_probs_and_values(kind, tmp_path):
    model, base = folder(tmp_path / "m", 1), folder(tmp_path / "b", 2)
    (reward,) = reward_of(f"0.1*{kind}:{model},{base}")
    some = [talk("a", "one two", "three", "two"), talk("b", "<e<end>nd>two")]
    passes = []
    for m in reward.scorer.models:
        m.get_decoder().register_forward_hook(lambda *_: passes.append(1))
    found = reward.turns(some)
    assert len(passes) == 2, "one of each model for all turns"
    for row, t in zip(found, some, strict=True):
        ratios, values = zip(*written_out(model, base, t), strict=True)
        behind = [*values[1:], 0.0]
        moved = [u - later if kind == "inverse_soft_q" else 0.0 for u, later in zip(values, behind, strict=True)]
        assert row == pytest.approx([ratio + more for ratio, more in zip(ratios, moved, strict=True)], abs=1e-4)
    assert reward.scope == "dialogue"
    reward.scorer.max_tokens = 1
    for one, other in zip(reward.turns(some), found, strict=True):
        assert one == pytest.approx(other, abs=1e-5)


@pytest.mark.parametrize("policy_class", ["greedy", "lookahead:2", "full"])
def test_it_is_what_soft_q_learning_has_no_residual_with(policy_class, tmp_path):
    model, base = folder(tmp_path / "m", 1), folder(tmp_path / "b", 2)
    (reward,) = reward_of(f"inverse_soft_q:{model},{base}")
    one = talk("a", "one two", "three", "two")
    (rewards,) = reward.turns([one])
    ratios, values = (torch.tensor([row]) for row in zip(*written_out(model, base, one), strict=True))
    nothing, spec = torch.zeros(1, 3), ppg.SoftQSpec(beta=1.0)
    out = ppg.soft_q_loss_from_logprobs(
        ratios, values, torch.tensor([rewards]), torch.arange(3)[None], policy_class,
        ref_logprobs=nothing, ref_lse=nothing, spec=spec,
    )  # fmt: skip
    assert out.residuals.abs().max() < 1e-3
    assert max(map(abs, rewards)) > 0.1


def test_an_answer_that_is_not_trained_has_a_value_too(tmp_path):
    model, base = folder(tmp_path / "m", 1), folder(tmp_path / "b", 2)
    (reward,) = reward_of(f"inverse_soft_q:{model},{base}")
    one = talk("a", "one two", "three")
    untrained = [replace(m, trained=m.role != "assistant" or m.content != "three") for m in one.messages]
    assert reward.turns([replace(one, messages=tuple(untrained))]) == reward.turns([one])


@pytest.mark.parametrize("kind", KINDS)
def test_what_it_cannot_compare_is_one_line(kind, tmp_path):
    model, other = folder(tmp_path / "m", 1), folder(tmp_path / "o", 1, [*WORDS[:-1], "four"])
    for formula, said in (
        (f"{kind}:{model}", f"{kind} must be MODEL,BASE: two folders"),
        (f"{kind}:{model},{tmp_path}", f"{kind} must name folders with a Hugging Face checkpoint"),
        (f"{kind}:{model},{other}", f"{kind} must have the vocabulary of the model beside it, .* differs in 2"),
    ):
        with pytest.raises(ValueError, match=said):
            reward_of(formula)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_known_by_the_content_of_both(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, seed in (("m", 1), ("b", 2)):
        folder(tmp_path / name, seed)
    settings = {"reward": f"{kind}:m,b"}
    assert [str(p) for p in input_paths(settings)] == ["m", "b"]
    assert with_absolute_paths(settings)["reward"] == f"{kind}:{tmp_path / 'm'},{tmp_path / 'b'}"
    rewards = reward_of(f"{kind}:m,b")
    before = reward_digest(f"{kind}:m,b", rewards)
    (tmp_path / "b" / "config.json").write_text((tmp_path / "b" / "config.json").read_text() + " ")
    assert reward_digest(f"{kind}:m,b", rewards) != before
