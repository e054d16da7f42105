"""`logratio:MODEL,BASE`: what transformers gives, folders of one vocabulary, known by their content."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

from ppg_fast.config import make_config
from ppg_fast.dialogues import Message, make_word_tokenizer
from ppg_fast.jobs.endpoints import rewards_of
from ppg_fast.jobs.inputs import input_paths, reward_digest, with_absolute_paths
from ppg_fast.models.causal_lm import make_model
from ppg_fast.rewards import Transcript

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


def test_it_is_the_difference_of_log_probs_of_a_turn(tmp_path):
    model, base = folder(tmp_path / "m", 1), folder(tmp_path / "b", 2)
    (reward,) = reward_of(f"0.1*logratio:{model},{base}")
    some = [talk("a", "one two", "three"), talk("b", "<e<end>nd>two")]
    found = reward.turns(some)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    both = [transformers.AutoModelForCausalLM.from_pretrained(f).double() for f in (model, base)]
    for row, t in zip(found, some, strict=True):
        for turn, value in enumerate(row):
            said = [{"role": m.role, "content": m.content.replace("<e<end>nd>", "")} for m in t.messages]
            until = 2 * turn + 1
            before = tokenizer.apply_chat_template(said[:until], add_generation_prompt=True, return_dict=False)
            whole = tokenizer.apply_chat_template(said[: until + 1], return_dict=False)
            assert whole[: len(before)] == before
            logp = [m(torch.tensor([whole])).logits[0].log_softmax(-1) for m in both]
            sums = [sum(l[i - 1, whole[i]].item() for i in range(len(before), len(whole))) for l in logp]
            assert value == pytest.approx(sums[0] - sums[1], abs=1e-4)
    assert reward.scope == "dialogue"
    reward.scorer.max_tokens = 1
    for one, other in zip(reward.turns(some), found, strict=True):
        assert one == pytest.approx(other, abs=1e-5)


def test_what_it_cannot_compare_is_one_line(tmp_path):
    model, other = folder(tmp_path / "m", 1), folder(tmp_path / "o", 1, [*WORDS[:-1], "four"])
    for formula, said in (
        (f"logratio:{model}", "logratio must be MODEL,BASE: two folders"),
        (f"logratio:{model},{tmp_path}", "logratio must name folders with a Hugging Face checkpoint"),
        (f"logratio:{model},{other}", "logratio must have the vocabulary of the model beside it, .* differs in 2"),
    ):
        with pytest.raises(ValueError, match=said):
            reward_of(formula)


def test_it_is_known_by_the_content_of_both(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, seed in (("m", 1), ("b", 2)):
        folder(tmp_path / name, seed)
    settings = {"reward": "logratio:m,b"}
    assert [str(p) for p in input_paths(settings)] == ["m", "b"]
    assert with_absolute_paths(settings)["reward"] == f"logratio:{tmp_path / 'm'},{tmp_path / 'b'}"
    rewards = reward_of("logratio:m,b")
    before = reward_digest("logratio:m,b", rewards)
    (tmp_path / "b" / "config.json").write_text((tmp_path / "b" / "config.json").read_text() + " ")
    assert reward_digest("logratio:m,b", rewards) != before
