"""A causal reward model reads a dialogue once: the logits of its turns are those of its prefixes, each by itself."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

import test_rewards
from chat_case import CHATML, byte_tokenizer
from tokenizers import AddedToken

from ppg_fast.dialogues import Message
from ppg_fast.dialogues.renderer import Renderer
from ppg_fast.rewards import Reward, RewardModel, Transcript
from ppg_fast.rewards.turn_logits import Row, batches, encode_growing, reads_every_turn, rows_of

reward_folder = test_rewards.reward_folder
CHATML_TOKENS = ["<|im_start|>", "<|im_end|>"]
# earlier answers lose their last letter: no prefix begins the next
REWRITES = CHATML.replace(
    "{{ m.content }}", "{{ m.content if m.role != 'assistant' or loop.last else m.content[:-1] }}"
)


def dialogue(turns=4, name="d"):
    said = [Message(role, f"{name}{role[0]}{i}" * (i + 1)) for i in range(turns) for role in ("user", "assistant")]
    return Transcript(name, tuple(said))


def folder_of(path, template, kind="Llama"):
    tokenizer = byte_tokenizer(template, CHATML_TOKENS, eos_token="<|im_end|>")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(tokenizer), **sizes, num_labels=1, pad_token_id=0, max_position_embeddings=512
    )
    getattr(transformers, f"{kind}ForSequenceClassification")(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("template", [CHATML, REWRITES], ids=["appends", "rewrites"])
def test_one_pass_is_prefix_by_prefix(tmp_path, template):
    scorer = RewardModel(folder_of(tmp_path, template))
    assert scorer.one_pass
    some = [dialogue(4), dialogue(1, "e"), dialogue(3, "f")]
    reward, read = Reward("rm", scorer), []
    seen = scorer.model.get_input_embeddings().register_forward_pre_hook(lambda _, x: read.append(x[0].numel()))
    together = reward.turns(some)
    once = sum(read)
    read.clear()
    scorer.one_pass, scorer.max_tokens = False, 1
    alone = reward.turns(some)
    seen.remove()
    for one, other in zip(together, alone, strict=True):
        assert one == pytest.approx(other, abs=1e-5)
    lengths = [max(len(row.tokens) for row in scorer.rows([t])) for t in some]
    if template is CHATML:
        assert once == 3 * max(lengths), "one padded batch of whole dialogues"
        assert sum(read) > 2 * sum(lengths)
    else:
        assert len(scorer.rows(some[0].prefixes())) == 4


def test_a_dialogue_of_300_turns_is_read_once(tmp_path):
    """By the tokenizer too, but for the whole once more, which says that the parts are its own."""
    scorer = RewardModel(folder_of(tmp_path, CHATML))
    long, read, seen = dialogue(1), [], []
    long = Transcript("long", long.messages * 300)
    encode, scorer.positions = scorer.renderer.encode, None
    scorer.renderer.encode = lambda text: (read.append(len(text)), encode(text))[1]
    scorer.model.get_input_embeddings().register_forward_pre_hook(lambda _, x: seen.append(x[0].numel()))
    (row,) = Reward("rm", scorer).turns([long])
    whole = scorer.renderer.text(list(long.messages))
    assert len(row) == 300
    assert seen == [len(encode(whole))], "one forward pass over the tokens of the whole"
    assert sum(read) == 2 * len(whole)


@pytest.mark.parametrize("lstrip", [False, True])
def test_texts_that_grow_are_encoded_as_each_by_itself(lstrip):
    """A token that takes the space before it away is no boundary: then each text is encoded whole."""
    tokenizer = byte_tokenizer(CHATML, CHATML_TOKENS, eos_token="<|im_end|>")
    tokenizer.add_tokens([AddedToken("<|then|>", lstrip=lstrip, special=True)])
    renderer = Renderer(tokenizer)
    texts = [
        "one two ",
        "one two <|then|>three",
        "one two <|then|>three ",
        "one two <|then|>three four",
        "five",
        "five<|im_end|>",
    ]
    assert encode_growing(renderer, texts) == [renderer.encode(text) for text in texts]


def test_a_model_that_looks_ahead_is_asked_about_each_prefix(tmp_path):
    scorer = RewardModel(folder_of(tmp_path, CHATML, "Bert"))
    assert not scorer.one_pass
    (row,) = Reward("rm", scorer).turns([dialogue(3)])
    singly = [scorer([p])[0] for p in dialogue(3).prefixes()]
    assert row == pytest.approx(singly, abs=1e-5)
    looks = transformers.AutoModelForSequenceClassification.from_pretrained(folder_of(tmp_path / "c", CHATML))
    assert reads_every_turn(looks.eval(), 0)
    layer = looks.model.layers[0]
    layer.register_forward_hook(
        lambda _, args, out: out + out.mean(1, keepdim=True) if isinstance(out, torch.Tensor) else out
    )
    assert not reads_every_turn(looks, 0)


def test_rows_and_their_places():
    texts = [[1, 2], [1, 2, 3, 0], [1, 2, 3, 0, 4], [5], [5], [1]]
    rows = rows_of(texts, pad=0)
    assert rows == [
        Row([1, 2, 3, 0, 4], [(0, 1), (1, 2), (2, 4)]),
        Row([5], [(3, 0), (4, 0)]),
        Row([1], [(5, 0)]),
    ]
    assert [len(r.answers) for r in rows_of(texts, pad=None)] == [3, 2, 1]
    assert rows_of(texts, pad=None)[0].answers[1] == (1, 3)
    assert len(rows_of(texts, 0, shared=False)) == 6
    assert [len(part) for part in batches(rows, 10, 0)] == [2, 1]
    assert [len(part) for part in batches(rows, 10, None)] == [1, 1, 1]
