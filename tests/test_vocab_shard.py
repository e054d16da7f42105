"""A vocabulary that two processes share, 400 tokens and 603: what each gets is what the whole head gives."""

import re
from dataclasses import replace
from datetime import timedelta
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from cases import LOSSES, TERMS
from closeness import assert_as_good_as
from forks import run_ranks
from host_case import put
from test_integrations_slime import slime_args, top_p_replay
from torch import distributed

import ppg_fast as ppg
from ppg_fast import backends, ops

pytestmark = pytest.mark.skipif(backends.why_not("cpu") is not None, reason="needs the CPU kernels")
N, D, CUT = 60, 24, (0, 400, 1003)
SPECS = {
    "ppo": replace(LOSSES["ppo"], **TERMS["everything"]),
    "gspo": replace(LOSSES["ppo"], loss_type="gspo", entropy_coef=0.02, z_coef=0.01),  # logits are computed twice
    "cispo": replace(LOSSES["cispo"], **TERMS["all-new"]),
}


def problem(dtype=torch.float32):
    g = torch.Generator().manual_seed(3)
    hidden, weight, bias = (torch.randn(*s, generator=g).to(dtype) for s in ((N, D), (CUT[-1], D), (CUT[-1],)))
    labels = torch.randint(CUT[-1], (N,), generator=g)
    labels[:3] = torch.tensor([0, 399, 400])
    labels[torch.arange(N) % 5 == 4] = -100
    hidden[labels == -100] = torch.nan
    A, old = torch.randn(N, generator=g), torch.randn(N, generator=g) * 0.3 - 5
    given = {"old_logprobs": old, "ref_logprobs": old + 0.1, "rollout_logprobs": old - 0.1}
    return hidden, 0.7 * weight, bias, labels, A, given


def loss_and_gradients(hidden, weight, bias, labels, A, given, **options):
    leaves = [t.detach().requires_grad_() for t in (hidden, weight, bias)]
    out = ppg.linear_policy_loss(*leaves[:2], labels, A, bias=leaves[2], **given, **options)
    grads = torch.autograd.grad(out.loss, leaves)
    norms = [out.metrics["score_norms"]] if options.get("score_norms") else []
    return [t.detach() for t in (out.loss, out.logprobs, out.entropy, *grads, *norms)]


def rank_case(folder):
    rank = distributed.get_rank()
    own = slice(CUT[rank], CUT[rank + 1])
    shard = ppg.VocabShard(CUT[rank])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        hidden, weight, bias, labels, A, given = problem(dtype)
        for name, spec in SPECS.items():
            options = {"spec": spec, "vocab": shard, "chunk_rows": 16 + 16 * rank, "logits_dtype": "float32"}
            options["score_norms"] = True
            found = loss_and_gradients(hidden, weight[own], bias[own], labels, A, given, **options)
            torch.save(found, folder / f"{name}-{str(dtype)[6:]}-{rank}.pt")
    hidden, weight, bias, labels, *_ = problem()
    z = torch.nn.functional.linear(hidden.nan_to_num(), weight[own], bias[own])[None].requires_grad_()
    l, H = ops.shard_logprobs(z, labels, None, [0.7, 5.0], shard.part, "cpu")
    torch.save(
        [l.detach(), H.detach(), torch.autograd.grad((l + 0.3 * H).sum(), z)[0][0]], folder / f"logits-{rank}.pt"
    )
    torch.save([of_chunks(own, shard), soft_q(own, shard), uncounted(own, shard)], folder / f"rest-{rank}.pt")
    torch.save([slime_case(True, rank, top_p) for top_p in (1.0, 0.9)], folder / f"slime-{rank}.pt")
    if find_spec("transformers"):
        torch.save(transformers_case(True), folder / f"transformers-{rank}.pt")
    errors = []
    for start, y in ((390, labels), (410, labels), (CUT[1], torch.full_like(labels, 1003))):
        with pytest.raises((ValueError, IndexError)) as error:
            ppg.linear_token_logprobs(hidden, weight[own], y, vocab=ppg.VocabShard(rank * start))
        errors.append(str(error.value))
    for A, more in ((torch.arange(N) % (3 + rank), {}), (torch.ones(N), {"max_active_rows": 9})):
        with pytest.raises(ValueError, match="must") as error:
            ppg.linear_policy_loss(hidden, weight[own].requires_grad_(), labels, A.float(), vocab=shard, **more)
        errors.append(str(error.value))
    torch.save(errors, folder / f"errors-{rank}.pt")


def of_chunks(own, shard):
    """How often logits are computed and all processes gather something, in a loss over three chunks and its gradient,
    and in log-probs."""
    hidden, weight, _, labels, A, _ = problem()
    head, counts = import_module("ppg_fast.ops.head"), []
    for call in (
        lambda w: ppg.linear_policy_loss(hidden, w, labels, A, vocab=shard, chunk_rows=16).loss,
        lambda w: ppg.linear_token_logprobs(hidden, w, labels, vocab=shard, chunk_rows=16).sum(),
    ):
        with pytest.MonkeyPatch.context() as patch:
            products = counted_calls(patch, head, "project")
            gathers = counted_calls(patch, distributed, "all_gather")
            call(weight[own].clone().requires_grad_()).backward()
        counts.append((len(products), len(gathers)))
    return counts


def uncounted(own, shard):
    """Log-probs and gradients by both forms, of rows that are counted, bounded as on a GPU, and bounded too low."""
    hidden, weight, _, labels, A, _ = problem()
    found = []
    for bound, counting in ((None, True), (N, False), (9, False)):
        with pytest.MonkeyPatch.context() as patch:
            for module in ("linear_policy_loss", "linear_vocab_shards"):
                patch.setattr(
                    import_module(f"ppg_fast.ops.{module}"), "counted", lambda *_, counting=counting: counting
                )
            options = {"vocab": shard, "max_active_rows": bound, "chunk_rows": 64}
            w = weight[own].clone().requires_grad_()
            out = ppg.linear_policy_loss(hidden, w, labels, A, **options)
            l = ppg.linear_token_logprobs(hidden, w, labels, **options)
            grads = [torch.autograd.grad(loss, w)[0] for loss in (out.loss, (l * A).sum())]
        found.append([t.detach() for t in (out.loss, l, *grads)])
    return found


def counted_calls(patch, module, name):
    """A list that grows with each call of a function of the module."""
    calls, function = [], getattr(module, name)
    patch.setattr(module, name, lambda *given, **named: (calls.append(name), function(*given, **named))[1])
    return calls


def soft_q(own, shard=None):
    """Loss, values and gradients of soft Q-learning, whose turns are worth a log-sum-exp."""
    hidden, weight, bias, labels, A, given = problem()
    leaves = [t.detach().requires_grad_() for t in (hidden, weight[own], bias[own])]
    shape, turns = (4, 15), torch.arange(15).div(5, rounding_mode="floor").expand(4, 15)
    refs = {"ref_logprobs": given["ref_logprobs"].view(shape), "ref_lse": A.view(shape)}
    rewards = torch.arange(12.0).view(4, 3) / 12
    out = ppg.linear_soft_q_loss(
        leaves[0].view(*shape, D), leaves[1], labels.view(shape), rewards, turns, "lookahead:2", bias=leaves[2],
        vocab=shard, max_active_rows=N, **refs,
    )  # fmt: skip
    return [t.detach() for t in (out.loss, out.values, out.lse, *torch.autograd.grad(out.loss, leaves))]


def slime_case(shard, rank, top_p):
    """slime's loss under tensor parallelism 2, from this rank's half of the logits, or of all of them."""
    with pytest.MonkeyPatch.context() as patch:
        put(patch, "slime")
        put(patch, "megatron.core", mpu=SimpleNamespace(
            get_tensor_model_parallel_world_size=lambda: 2 if shard else 1, get_context_parallel_world_size=lambda: 1,
            get_tensor_model_parallel_rank=lambda: rank, get_tensor_model_parallel_group=lambda: None,
        ))  # fmt: skip
        g, responses = torch.Generator().manual_seed(1), [4, 7]
        logits = torch.randn(1, 15, 20, generator=g)
        logits = (logits[..., 10 * rank : 10 * rank + 10] if shard else logits).clone().requires_grad_()
        batch = {
            "unconcat_tokens": [torch.randint(20, (n,), generator=g) for n in (6, 9)], "total_lengths": [6, 9],
            "response_lengths": responses, "loss_masks": [torch.tensor([1, 0, 1, 1]), torch.ones(7)],
            "advantages": [torch.randn(n, generator=g) for n in responses],
            "log_probs": [-torch.rand(n, generator=g) - 2 for n in responses],
        }  # fmt: skip
        args = slime_args(use_kl_loss=False, rollout_top_p=top_p)
        if top_p < 1:
            batch |= top_p_replay(batch["unconcat_tokens"], batch["loss_masks"], 20)
        loss, metrics = import_module("ppg_fast.integrations.slime").ppg_loss(args, batch, logits, torch.sum)
        return [loss.detach(), metrics["entropy_loss"], torch.autograd.grad(loss, logits)[0][0]]


def transformers_case(shard):
    """A model whose head transformers' tensor parallelism has spread, patched: loss, gradients of a norm and the
    head."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from ppg_fast.integrations.transformers import patch

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Qwen3Config(vocab_size=83, num_key_value_heads=1, head_dim=16, tie_word_embeddings=False, **sizes)
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config)
    if shard:
        from torch.distributed.device_mesh import init_device_mesh
        from transformers.distributed.tensor_parallel import apply_tensor_parallelism

        plan = dict.fromkeys(("lm_head.weight", "lm_head"), "colwise_gather_output")
        apply_tensor_parallelism(model, init_device_mesh("cpu", (2,)), plan)
    patch(model)
    ids = torch.randint(83, (2, 9), generator=torch.Generator().manual_seed(2))
    out = model(input_ids=ids, labels=ids, advantages=torch.tensor([1.0, -0.5]))
    out.loss.backward()
    head = model.lm_head.weight.grad
    plain = model(input_ids=ids, labels=ids).logprobs
    whole = head.full_tensor() if shard else head
    return [out.loss.detach(), out.logprobs, plain.detach(), model.model.norm.weight.grad, whole]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What two ranks over gloo found, by name and rank."""
    folder = tmp_path_factory.mktemp("shards")

    def run():
        torch.set_num_threads(1)
        distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
        rank_case(folder)
        distributed.destroy_process_group()

    run_ranks(2, run)
    return {path.stem: torch.load(path) for path in folder.iterdir()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("loss", SPECS)
def test_shards_give_what_the_whole_head_gives(found, loss, dtype):
    case = problem(getattr(torch, dtype))
    spec = SPECS[loss]
    whole = loss_and_gradients(*case, spec=spec, logits_dtype="float32", score_norms=True)
    hidden, weight, bias, labels, A, given = case
    doubles = [t.double() for t in (hidden, weight, bias)]
    leaves = [t.requires_grad_() for t in doubles]
    truth = exact(leaves, labels, A, given, spec)
    ranks = [found[f"{loss}-{dtype}-{rank}"] for rank in (0, 1)]
    for name, a, b, plain, true in zip(("loss", "logprob", "entropy", "d_hidden"), *ranks, whole, truth, strict=False):
        assert torch.equal(a, b), f"{name}: alike on both"
        compare(a, plain, true, name)
    for at, name in ((4, "d_weight"), (5, "d_bias")):
        compare(torch.cat([r[at] for r in ranks]), whole[at], truth[at], name)
    assert torch.equal(ranks[0][6], ranks[1][6]), "score norms: alike on both"
    compare(ranks[0][6], whole[6], truth[6], "score norms")


def compare(actual, plain, true, name):
    if actual.dtype == torch.float32:
        assert_as_good_as(actual, plain, true, name)
    else:  # a gradient in 16 bits: that of the logits is rounded for its products, d_hidden in two parts
        assert (actual.double() - true).norm() <= 2 * torch.finfo(actual.dtype).eps * true.norm(), name


def exact(leaves, labels, A, given, spec):
    """In float64, by the reference."""
    from ppg_fast import reference
    from ppg_fast.functional.loss import LossRows

    hidden, weight, bias = leaves
    rows = LossRows.of(labels, A, labels.device, **given, spec=spec)
    *per_row, _, nll = (None if t is None else t.double() for t in rows.per_row)
    z = torch.nn.functional.linear(torch.where((labels >= 0)[:, None], hidden, 0.0), weight, bias)
    loss, l, H = reference.policy_loss(z, labels, *per_row, rows.spec, rows.groups, nll)
    grads = torch.autograd.grad(loss.sum(), leaves)
    norms = reference.score_norms(z, labels, rows.spec.temperature, rows.spec.logit_softcap)
    return [t.detach() for t in (loss.sum(), l, H, *grads, norms)]


def test_logits_of_shards(found):
    hidden, weight, bias, labels, *_ = problem()
    z = torch.nn.functional.linear(hidden.nan_to_num(), weight, bias).requires_grad_()
    l, H = ppg.token_logprobs(z, labels, temperature=0.7, logit_softcap=5.0, entropy=True)
    gradient = torch.autograd.grad((l + 0.3 * H).sum(), z)[0]
    for rank in (0, 1):
        own = slice(CUT[rank], CUT[rank + 1])
        for mine, whole in zip(found[f"logits-{rank}"], (l, H, gradient[:, own]), strict=True):
            torch.testing.assert_close(mine, whole.detach(), rtol=2e-5, atol=2e-6)


def test_a_loss_makes_its_logits_once(found):
    for rank in (0, 1):
        loss, logprobs = found[f"rest-{rank}"][0]
        assert loss == (3, 1 + 3), "48 rows in chunks of 16: a product each; the places, and a message a chunk"
        assert logprobs == (6, 1 + 1), "in both passes; the places, and one message"


def test_a_bound_on_the_active_rows(found):
    for rank in (0, 1):
        counted, bounded, low = found[f"rest-{rank}"][2]
        torch.testing.assert_close(counted, bounded, rtol=1e-5, atol=1e-6)
        for a, c in zip(counted, low, strict=True):
            assert c[a != 0].isnan().all(), "too low a bound is told by NaN where nobody counts"


def test_soft_q_learning_over_shards(found):
    whole = soft_q(slice(None))
    for rank in (0, 1):
        for at, mine in enumerate(found[f"rest-{rank}"][1]):
            expected = whole[at][CUT[rank] : CUT[rank + 1]] if at > 3 else whole[at]
            torch.testing.assert_close(mine, expected, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize(("case", "top_p"), [(0, 1.0), (1, 0.9)])
def test_slime_under_tensor_parallelism(found, case, top_p):
    loss, entropy, gradient = slime_case(False, 0, top_p)
    for rank in (0, 1):
        mine, own, part = found[f"slime-{rank}"][case]
        torch.testing.assert_close((mine, own), (loss, entropy))
        torch.testing.assert_close(part, gradient[:, 10 * rank : 10 * rank + 10], rtol=1e-5, atol=1e-6)


def test_a_head_that_transformers_has_spread(found):
    pytest.importorskip("transformers.distributed.tensor_parallel")
    for rank in (0, 1):
        torch.testing.assert_close(found[f"transformers-{rank}"], transformers_case(False), rtol=1e-4, atol=1e-5)


def test_shards_that_do_not_tile_are_refused(found):
    rule = "shards (start, size) of a vocabulary must begin at 0 and follow each other without overlap and gap, got "
    beyond = "labels must be in [0, 1003) or -100, got 1003 at row 0"
    for rank in (0, 1):
        overlap, gap, outside, other, more = found[f"errors-{rank}"]
        assert overlap == rule + "[(0, 400), (390, 603)]"
        assert gap == rule + "[(0, 400), (410, 603)]"
        assert outside == beyond
        assert other.startswith("the processes of a vocabulary shard must give the same labels and arguments")
        assert more == "max_active_rows must be at least the number of active rows, got '9 for 48'"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "a vocabulary shard needs torch.distributed.init_process_group"),
        ({"backend": "reference"}, "a vocabulary shard needs a backend of kernels"),
        ({"teacher": 1}, "a vocabulary shard goes without a teacher"),
        (
            {"kept": ppg.Kept(torch.zeros(0).long(), torch.zeros(N + 1).long())},
            "kept sets go without a vocabulary shard",
        ),
    ],
)
def test_what_does_not_go_with_a_shard(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        loss_and_gradients(*problem(), vocab=ppg.VocabShard(0), **change)
    with pytest.raises(ValueError, match="start of a vocabulary shard"):
        ppg.VocabShard(-1)
