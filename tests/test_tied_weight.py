"""A weight that is embedding and head: the gradient of both, in one tensor of its size."""

import copy

import pytest
import torch

pytest.importorskip("transformers")

import transformers

from ppg_fast.dialogues.packing import Sample, pack
from ppg_fast.models import causal_lm as models
from ppg_fast.models import tied_weight
from ppg_fast.models.adaptation import checkpoint_activations
from ppg_fast.ops import head as heads
from ppg_fast.spec import PolicyLossSpec

V = 61
SIZES = {
    "vocab_size": V, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 7, "initializer_range": 0.3,
}  # fmt: skip
CONFIGS = {
    "qwen3": lambda tied: transformers.Qwen3Config(**SIZES, tie_word_embeddings=tied),
    "gemma3, scaled embedding": lambda tied: transformers.Gemma3TextConfig(**SIZES, tie_word_embeddings=tied),
}


def model_of(kind, tied=True):
    torch.manual_seed(0)
    return models.prepare(transformers.AutoModelForCausalLM.from_config(CONFIGS[kind](tied)).train())


def batch():
    """Few words: some rows of the embedding are used several times, many not at all, one is the padding's."""
    tokens = torch.randint(3, 12, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    assert 7 in tokens
    return pack([Sample(tokens[:25], [-1, *[0] * 24], [1.0], 0), Sample(tokens[25:], [-1, *[0] * 14], [0.5], 1)])


def loss_of(model, advantages=((0.7,), (-0.4,))):
    return models.policy_loss(model, batch(), torch.tensor(advantages), PolicyLossSpec("reinforce")).loss


@pytest.fixture
def made(monkeypatch):
    """Where each d_weight lies that a head made, and the layout of what the embedding gave."""
    seen, found = [], heads.Head.gradients

    def gradients(head):
        out = found(head)
        seen.append(out[1].data_ptr())
        return out

    monkeypatch.setattr(heads.Head, "gradients", gradients)
    return seen


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("recomputed", [False, True])
def test_the_gradient_is_the_sum_of_head_and_embedding_in_the_memory_of_the_head(kind, recomputed, made):
    """The right value is that of the same model untied, whose two weights have a gradient each."""
    tied, apart = model_of(kind), model_of(kind, tied=False)
    apart.load_state_dict({**tied.state_dict(), "lm_head.weight": tied.lm_head.weight.detach()})
    if recomputed:
        checkpoint_activations(tied)
    for model in (apart, tied):
        loss_of(model).backward()
    weight = tied.get_input_embeddings().weight
    assert weight is tied.lm_head.weight
    expected = apart.lm_head.weight.grad.double() + apart.get_input_embeddings().weight.grad.double()
    torch.testing.assert_close(weight.grad.double(), expected, rtol=1e-5, atol=1e-6)
    assert weight.grad.layout == torch.strided
    assert weight.grad.data_ptr() == made[-1]
    for (name, one), (_, other) in zip(
        tied.get_decoder().layers.named_parameters(), apart.get_decoder().layers.named_parameters(), strict=True
    ):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_the_embeddings_gradient_has_a_row_a_token(monkeypatch):
    seen, backward = [], tied_weight._TwoUses.backward
    monkeypatch.setattr(
        tied_weight._TwoUses,
        "backward",
        staticmethod(lambda ctx, *given: (seen.append(given[1]), backward(ctx, *given))[1]),
    )
    loss_of(model_of("qwen3")).backward()
    (gradient,) = seen
    assert gradient.is_sparse
    assert gradient._values().shape[0] <= 40


def test_passes_add_up_and_the_same_input_gives_the_same_bits():
    def gradient(passes):
        model = model_of("qwen3")
        for _ in range(passes):
            loss_of(model).backward()
        return model.lm_head.weight.grad

    once = gradient(1)
    assert torch.equal(once, gradient(1))
    torch.testing.assert_close(gradient(2), 2 * once)


def test_log_probs_that_are_differentiated_give_the_same():
    def gradient(dense):
        model = model_of("gemma3, scaled embedding")
        if dense:
            model.get_input_embeddings().max_norm = 1e9  # an option under which gradients stay dense
        models.token_logprobs(model, batch()).sum().backward()
        return model.lm_head.weight.grad

    torch.testing.assert_close(gradient(False), gradient(True), rtol=1e-5, atol=1e-6)


def test_a_head_gradient_that_is_not_its_own_memory_is_left_alone():
    """That of a sum is one number, expanded; under create_graph the graph may need it again."""
    weight = torch.randn(V, 3, requires_grad=True)
    for create_graph in (False, True):
        for_head, for_embedding = tied_weight.two_uses(weight)
        read = torch.nn.functional.embedding(torch.tensor([4, 4, 9]), for_embedding, sparse=True)
        (gradient,) = torch.autograd.grad(for_head.sum() + 2 * read.sum(), weight, create_graph=create_graph)
        expected = torch.ones(V, 3)
        expected[4], expected[9] = 5.0, 3.0
        assert torch.equal(gradient, expected)


def test_no_advantage_and_no_tokens_give_zeros():
    model = model_of("qwen3")
    loss_of(model, ((0.0,), (0.0,))).backward()
    assert not model.lm_head.weight.grad.any()
    model.zero_grad()
    models.policy_loss(model, pack([]), torch.zeros(0, 0), PolicyLossSpec()).loss.backward()
    assert not model.lm_head.weight.grad.any()


def test_the_model_is_as_before_even_after_a_failure(monkeypatch):
    model = model_of("qwen3")
    embedding, before = model.get_input_embeddings(), copy.copy(model.get_input_embeddings().__dict__)
    loss_of(model)
    assert embedding.weight is model.lm_head.weight
    assert not embedding.sparse
    monkeypatch.setattr(model.get_decoder().layers[1], "forward", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loss_of(model)
    assert embedding.weight is model.lm_head.weight
    assert embedding.__dict__.keys() == before.keys()
    assert not embedding.sparse


def test_where_it_does_not_apply():
    def found(model):
        return tied_weight.shared_embedding(model, model.lm_head.weight)

    assert found(model_of("qwen3", tied=False)) is None
    model = model_of("qwen3")
    assert found(model) is model.get_input_embeddings()
    with torch.no_grad():
        assert found(model) is None
    model.get_input_embeddings().scale_grad_by_freq = True
    assert found(model) is None
    model = model_of("qwen3")
    model.lm_head.weight.requires_grad_(False)
    assert found(model) is None
