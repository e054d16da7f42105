"""Dialogues whose turns the model sees in several views: parts of one dialogue, in packing, loss and gradient."""

from copy import deepcopy
from itertools import pairwise

import pytest
import torch

pytest.importorskip("transformers")

from chat_case import byte_tokenizer

from ppg_fast.dialogues import ChatFormat, Dialogue, Message, encode_dialogue
from ppg_fast.dialogues.packing import CONTEXT, Sample, cut_tokens, micro_batches, pack
from ppg_fast.models.causal_lm import make_model, policy_loss, token_logprobs
from ppg_fast.policy_classes import FullPlanning
from ppg_fast.spec import PolicyLossSpec
from ppg_fast.training.evaluation import turn_logprobs
from ppg_fast.training.objective import Objective, credit, denominator, tokens_to_read

# strips earlier thoughts, as Qwen3's and others do
STRIPPING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>"
    "{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TALK = (
    Message("user", "hello"),
    Message("assistant", "good day", {"reasoning_content": "be kind"}),
    Message("user", "and now?"),
    Message("assistant", "bye", {"reasoning_content": "be brief"}),
    Message("user", "so soon?"),
    Message("assistant", "yes"),
)


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer(STRIPPING, ["<|im_start|>", "<|im_end|>"], ["<think>", "</think>"], eos_token="<|im_end|>")


@pytest.fixture(scope="module")
def samples(tokenizer):
    chat = ChatFormat(tokenizer)
    one = encode_dialogue(chat, Dialogue("a", "g", TALK, (0.5, 1.0, 0.25)))
    other = encode_dialogue(chat, Dialogue("b", "g", TALK[:4], (1.0, 0.75)))
    return [one, Sample([7, 8, 9, 10], [CONTEXT, 0, 0, CONTEXT], [2.0], 3), other]


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_model(len(tokenizer), 32, 2)


def alone(sample):
    """Each part as a dialogue of its own, with the turns that it trains."""
    bounds = [*sample.starts, len(sample.tokens)]
    for start, stop in pairwise(bounds):
        yield sample.tokens[start:stop], sample.turn_ids[start:stop]


def test_a_part_for_each_view(tokenizer, samples):
    assert [len(sample.starts) for sample in samples] == [3, 1, 2]
    texts = [tokenizer.decode(tokens) for tokens, _ in alone(samples[0])]
    assert texts[1] == (
        "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\ngood day<|im_end|>\n<|im_start|>user\nand now?"
        "<|im_end|>\n<|im_start|>assistant\n<think>be brief</think>bye<|im_end|>"
    )
    assert texts[2].endswith("<|im_start|>assistant\n<think></think>yes<|im_end|>\n")
    said = [tokenizer.decode([t for t, of in zip(*part, strict=True) if of >= 0]) for part in alone(samples[0])]
    assert said == ["<think>be kind</think>good day<|im_end|>", "<think>be brief</think>bye<|im_end|>", "yes<|im_end|>"]


def test_packing_keeps_dialogues_and_parts(samples):
    batch = pack(samples)
    assert batch.cu_seqlens.tolist() == [0, *torch.tensor([len(s.tokens) for s in samples]).cumsum(0).tolist()]
    starts = [f + s for f, sample in zip(batch.cu_seqlens.tolist(), samples, strict=False) for s in sample.starts]
    assert batch.part_seqlens.tolist() == [*starts, len(batch.tokens)]
    assert batch.longest_part == max(sample.longest_part for sample in samples)
    assert [n for n, p in enumerate(batch.position_ids.tolist()) if p == 0] == starts
    assert all(batch.labels[stop - 1] == -100 for stop in [*starts[1:], len(batch.tokens)])
    assert batch.dialogue_ids.bincount().tolist() == [len(s.tokens) for s in samples]
    for dialogues in ([2, 0], [1], [0, 1, 2]):
        part, packed = batch.part(dialogues), pack([samples[n] for n in dialogues])
        for name in ("tokens", "labels", "turn_ids", "cu_seqlens", "part_seqlens", "position_ids"):
            assert getattr(part, name).tolist() == getattr(packed, name).tolist(), name
        assert part.longest_part == packed.longest_part
    cut = batch.part([0, 2], torch.tensor([samples[0].starts[2] + 3, 0, samples[2].starts[1]]))
    assert cut.part_seqlens.tolist()[:-1] == [*samples[0].starts, samples[0].starts[2] + 3]
    assert int((cut.turn_ids == 2).sum()) == 0


def gradient(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten().double() for p in model.parameters()])


def logprobs_of(model, tokens):
    """transformers alone, in double precision: log-probs of the tokens from the second on."""
    ids = torch.tensor(tokens)
    logits = model(ids[None], use_cache=False).logits[0]
    return logits.log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0]


@pytest.fixture(scope="module")
def oracle(model):
    exact = deepcopy(model).double()
    exact.set_attn_implementation("eager")
    return exact


@pytest.mark.parametrize("loss_type", ["reinforce", "gspo"])
def test_the_gradient_is_the_sum_over_turns_each_on_its_view(model, oracle, samples, loss_type):
    """Dialogue by dialogue and turn by turn; gspo has one ratio for all tokens of a dialogue, whatever its parts."""
    batch = pack(samples)
    _, advantages = credit(batch, Objective(FullPlanning(), baseline="none"))
    noise = 0.1 * torch.randn(len(batch.tokens), generator=torch.Generator().manual_seed(0))
    old = token_logprobs(model, batch).detach() + noise if loss_type == "gspo" else None
    spec = PolicyLossSpec(loss_type=loss_type)
    found = gradient(model, policy_loss(model, batch, advantages, spec, old_logprobs=old).loss)
    total, first = 0.0, 0
    for row, sample in enumerate(samples):
        chosen, credits, off = [], [], []
        for tokens, turn_ids in alone(sample):
            active = torch.tensor([turn >= 0 for turn in turn_ids[1:]])
            chosen.append(logprobs_of(oracle, tokens)[active])
            credits += [float(advantages[row, turn]) for turn in turn_ids[1:] if turn >= 0]
            off.append(noise[first : first + len(active)][active])
            first += len(tokens)
        ratio = (-torch.cat(off).double().mean()).exp() if loss_type == "gspo" else 1.0
        total = total - (ratio * torch.tensor(credits).double() * torch.cat(chosen)).sum()
    right = gradient(oracle, total / len(samples))
    assert float((found - right).norm() / right.norm()) < 1e-5


def test_reading_up_to_the_last_credited_turn_changes_no_gradient(model, samples):
    batch, objective = pack(samples), Objective(FullPlanning(), baseline="none")
    advantages = torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.0, 0.0], [0.5, 0.0, 0.0]])
    lengths = tokens_to_read(batch, advantages, objective)
    ends = [
        [max(n for n, t in enumerate(s.turn_ids) if t == turn) + 1 for turn in range(len(s.rewards))] for s in samples
    ]
    assert lengths.tolist() == [ends[0][1], 0, ends[2][0]]
    whole = gradient(model, policy_loss(model, batch, advantages, PolicyLossSpec(), normalizer=3.0).loss)
    short = batch.part([0, 2], lengths)
    assert short.part_seqlens.tolist() == [0, samples[0].starts[1], ends[0][1], ends[0][1] + ends[2][0]]
    read = policy_loss(model, short, advantages[[0, 2]], PolicyLossSpec(), normalizer=3.0)
    assert torch.allclose(whole, gradient(model, read.loss), rtol=1e-4, atol=1e-6 * float(whole.abs().max()))
    assert denominator(batch, Objective(reduction="sequence_sum")) == 3.0


def test_turns_are_evaluated_on_their_own_view(model, oracle, samples):
    batch = pack(samples)
    logprobs, counts = turn_logprobs(_Module(model), batch, 64)
    for row, sample in enumerate(samples):
        assert counts[row, : len(sample.rewards)].tolist() == [
            sample.turn_ids.count(t) for t in range(len(sample.rewards))
        ]
        for tokens, turn_ids in alone(sample):
            own = logprobs_of(oracle, tokens)
            for turn in set(turn_ids) - {CONTEXT}:
                right = sum(own[n - 1].item() for n, t in enumerate(turn_ids) if t == turn)
                assert float(logprobs[row, turn]) == pytest.approx(right, rel=1e-5)


class _Module(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch, advantages, spec):
        return token_logprobs(self.model, batch)


def test_a_bound_on_tokens_is_on_positions(samples):
    sample = samples[0]
    ends = [n + 1 for n, t in enumerate(sample.turn_ids) if t >= 0 and sample.turn_ids[n + 1 : n + 2] != [t]]
    sizes = [end - start for end, start in zip(ends, sample.starts, strict=True)]
    assert sizes == sorted(sizes)
    for kept, (size, end) in enumerate(zip(sizes, ends, strict=True), 1):
        cut = cut_tokens(sample, size)
        assert (len(cut.tokens), cut.starts, cut.rewards) == (end, sample.starts[:kept], sample.rewards)
    assert cut_tokens(sample, 3).starts == [0]
    assert sample.longest_part == len(sample.tokens) - sample.starts[2]
    assert micro_batches([len(s.tokens) for s in samples], 10)[0] == [0]


def test_encoding_stops_at_the_bound(tokenizer, samples):
    chat, dialogue = ChatFormat(tokenizer), Dialogue("a", "g", TALK, (0.5, 1.0, 0.25))
    for bound in (samples[0].longest_part - 2, 60, samples[0].starts[1]):
        cut, right = encode_dialogue(chat, dialogue, bound), cut_tokens(samples[0], bound)
        assert (cut.tokens, cut.turn_ids, cut.starts) == (right.tokens, right.turn_ids, right.starts)


@pytest.mark.parametrize("starts", [[], [1], [0, 0], [0, 4], [0, 3, 2]])
def test_parts_that_are_none_are_refused(starts):
    with pytest.raises(ValueError, match="sample 0: parts must start at 0 and rise below its 4 tokens"):
        pack([Sample([7, 8, 9, 10], [CONTEXT, 0, 0, CONTEXT], [2.0], 3, starts=starts)])


def test_an_answer_that_is_not_trained_is_context(tokenizer):
    first = Message("assistant", "good day", {"reasoning_content": "be kind"}, trained=False)
    chat = ChatFormat(tokenizer)
    sample = encode_dialogue(chat, Dialogue("a", "g", (TALK[0], first, *TALK[2:4]), (0.5, 1.0)))
    assert sample.starts == [0], "a view is made for what is trained"
    assert (sample.rewards, set(sample.turn_ids)) == ([0.5, 1.0], {CONTEXT, 1})
    batch = pack([sample])
    returns, _ = credit(batch, Objective(FullPlanning(), baseline="none"))
    assert returns.tolist() == [[1.5, 1.0]]
    with pytest.raises(ValueError, match=r"^dialogue 'a', message 1: no answer is trained"):
        encode_dialogue(chat, Dialogue("a", "g", (TALK[0], first), (0.5,)))
