"""Rollouts in lockstep: the sampler's log-probs are the trainer's, whatever holes the cache has."""

import pytest
import torch

pytest.importorskip("transformers")

import transformers

from ppg_fast.dialogues.chat_format import ChatFormat, make_word_tokenizer
from ppg_fast.dialogues.dialogue import Message
from ppg_fast.dialogues.packing import pack
from ppg_fast.models import causal_lm as models
from ppg_fast.rollouts.rollout import collect_groups


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """These models are too small to share among threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


WORDS = [
    "red",
    "blue",
    "tell",
    "me",
    "a",
    "colour",
    "or",
    "two",
    "please",
    "and",
    "then",
    "one",
    "more",
    "thanks",
    "bye",
]


class Ragged:
    """A partner whose questions and dialogues differ in length with the seed, so that the cache gets holes of every
    kind."""

    def reset(self, seed):
        self.turns, self.seed, self.heard = 1 + seed % 4, seed, []
        return [Message("system", " ".join(WORDS[: seed % 5 + 1])), Message("user", " ".join(WORDS[seed % 3 :]))]

    def step(self, assistant_text):
        self.heard.append(assistant_text)
        done = len(self.heard) == self.turns
        reply = None if done else Message("user", " ".join(WORDS[: 1 + (self.seed * 3 + len(self.heard)) % 7]))
        return reply, float(len(assistant_text.split())), done


def make(kind="qwen3", **changes):
    tokenizer = make_word_tokenizer(WORDS)
    if kind == "qwen3":
        model = models.make_model(len(tokenizer) + 3, width=32, layers=2, seed=1)  # rows of the head that name no token
    else:
        sizes = {
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "initializer_range": 0.3,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "bos_token_id": None,
        }
        caps = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}
        config = (
            transformers.Gemma2Config(**sizes, **caps, head_dim=8, sliding_window=6)
            if kind == "gemma2"
            else transformers.GraniteConfig(**sizes, logits_scaling=3.0)
        )
        torch.manual_seed(1)
        model = models.prepare(transformers.AutoModelForCausalLM.from_config(config))
    return model, ChatFormat(tokenizer)


def run(model, chat, seeds=range(7), group_size=2, seed=0, **settings):
    generator = torch.Generator().manual_seed(seed)
    return collect_groups(
        model, chat, Ragged, seeds, group_size, generator=generator, **{"max_new_tokens": 5, **settings}
    )


@pytest.mark.parametrize("kind", ["qwen3", "gemma2", "granite"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampler_and_trainer_agree_on_every_token(kind, temperature):
    model, chat = make(kind)
    rollouts = run(model, chat, temperature=temperature)
    batch = pack([r.sample for r in rollouts])
    trained = models.token_logprobs(model, batch, temperature)
    torch.testing.assert_close(batch.rollout_logprobs, trained, rtol=1e-4, atol=2e-5)
    assert len({len(r.sample.rewards) for r in rollouts}) > 1, "dialogues of different lengths"
    assert len({tuple(r.cut_off) for r in rollouts}) > 1, "some answers end by themselves"


def test_samples_are_the_dialogues():
    model, chat = make()
    for rollout in run(model, chat):
        sample, encode = rollout.sample, lambda text: chat.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert len(sample.tokens) == len(sample.turn_ids) == len(sample.rollout_logprobs)
        assert sample.rewards == [float(len(text.split())) for text in rollout.environment.heard]
        tokens, turn_ids, turn = chat.opening(rollout.messages[:2]), None, 0
        turn_ids = [-1] * len(tokens)
        for message in rollout.messages[2:]:
            if message.role == "assistant":
                said = encode(message.content) + ([] if rollout.cut_off[turn] else [chat.end_id])
                turn_ids += [turn] * len(said)
                turn += 1
            else:
                said = chat.reply(message)
                turn_ids += [-1] * len(said)
            tokens += said
        assert sample.tokens == tokens
        assert sample.turn_ids == turn_ids


def test_same_seed_same_rollouts_and_groups_share_a_partner():
    model, chat = make()
    first, again, other = (run(model, chat, seed=s) for s in (3, 3, 4))
    assert [r.sample for r in first] == [r.sample for r in again] != [r.sample for r in other]
    assert [r.sample.group_id for r in first] == [g for g in range(7) for _ in range(2)]
    assert all(a.messages[:2] == b.messages[:2] for a, b in zip(first[::2], first[1::2], strict=True))


def test_temperature_zero_takes_the_most_likely_token_and_needs_no_luck():
    model, chat = make()
    first, again = (run(model, chat, seed=s, temperature=0.0, group_size=1) for s in (3, 4))
    assert [r.sample.tokens for r in first] == [r.sample.tokens for r in again]
    r = first[3]
    position = r.sample.turn_ids.index(0)
    logits = model(torch.tensor([r.sample.tokens[:position]]), use_cache=False).logits[0, -1]
    logits[chat.banned_token_ids(len(logits))] = -torch.inf
    assert r.sample.tokens[position] == int(logits.argmax())
    with pytest.raises(ValueError, match="temperature must be >= 0"):
        run(model, chat, temperature=-1.0)


def test_special_tokens_are_never_said():
    model, chat = make()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(0.01)  # close to uniform over the head's rows
    banned = set(chat.banned_token_ids(model.config.vocab_size))
    said = {
        t
        for r in run(model, chat, group_size=8)
        for t, turn in zip(r.sample.tokens, r.sample.turn_ids, strict=True)
        if turn >= 0
    }
    assert not said & banned
    assert len(said) > 10


def test_dialogues_stop_at_max_turns_and_the_model_keeps_its_mode():
    model, chat = make()
    model.train()
    rollouts = run(model, chat, max_turns=2, max_new_tokens=1)
    assert {len(r.sample.rewards) for r in rollouts} == {1, 2}
    assert all(r.sample.turn_ids.count(0) == 1 for r in rollouts)
    assert model.training
