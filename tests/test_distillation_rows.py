"""The row kernels of distillation, argument by argument as the contract words them, against the float64 reference and
its gradient by autograd."""

import pytest
import torch

import ppg_fast as ppg
from ppg_fast import backends, reference

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
BETAS = (0.0, 1.0, 0.3)
N = 6  # rows (2, 3): row 1 is masked, row 4 has weight 0; both hold NaN


@pytest.fixture
def kernel(backend):
    if backend == "reference":
        pytest.skip("reference: plain PyTorch, no row kernel")
    return backends.load(backend).distillation


class Rows:
    """A call: logits of student and teacher with gaps between their rows, and what each row brings along."""

    def __init__(self, V, dtype=torch.float32, *, softcaps=(0.0, 0.0), per_row=True, gaps=(0, 0), spread=3.0, seed=0):
        draw = torch.Generator().manual_seed(seed + V)
        self.logits, self.teacher = (self.strided(V, gap, dtype) for gap in gaps)
        self.logits.copy_(torch.randn(2, 3, V, generator=draw) * spread + 40)
        self.teacher.copy_(self.logits + torch.randn(2, 3, V, generator=draw) * spread / 2 - 70)
        self.labels = torch.tensor([0, -100, 5, 0, 1, 2])
        self.weights = torch.rand(N, generator=draw) + 0.5 if per_row else None
        self.temperatures = torch.rand(N, generator=draw) + 0.6 if per_row else None
        self.temperature, (self.softcap, self.teacher_softcap) = 0.8, softcaps
        skipped = [1]
        if per_row:
            self.weights[4] = 0
            skipped.append(4)
        for row in skipped:
            self.logits[row // 3, row % 3] = self.teacher[row // 3, row % 3] = torch.nan
        self.read = torch.tensor([row not in skipped for row in range(N)])

    @staticmethod
    def strided(V, gap, dtype):
        """(2, 3, V), rows ``gap`` elements apart, the batch a little more."""
        return torch.full((8 * (V + gap) + gap,), 7.75, dtype=dtype)[gap:].as_strided(
            (2, 3, V), (4 * (V + gap), V + gap, 1)
        )

    def truth(self, beta):
        """Divergence and weighted gradient in float64."""
        z, t = (x.double().flatten(0, 1).nan_to_num() for x in (self.logits, self.teacher))
        labels, z = torch.where(self.read, self.labels, -1), z.requires_grad_()
        scale = self.temperature if self.temperatures is None else self.temperatures.double()
        found = reference.distillation(z, t, labels, beta, scale, self.softcap, self.teacher_softcap)
        weights = torch.ones(N) if self.weights is None else self.weights
        return found.detach(), torch.autograd.grad((found * weights).sum(), z)[0].view(self.logits.shape)

    def run(self, kernel, device, beta, place="out"):
        """Divergence and gradient, in memory of its own or over the logits of one side."""
        at = [None if x is None else x.to(device) for x in (self.labels, self.weights, self.temperatures)]
        logits, teacher = (copied(x, device) for x in (self.logits, self.teacher))
        own = torch.full_like(logits, torch.nan)
        into = {"out": own, "student": logits, "teacher": teacher, "none": None}[place]
        found = kernel(logits, teacher, *at, self.temperature, self.softcap, self.teacher_softcap, beta, into)
        return found.cpu(), None if into is None else into.cpu()


def copied(view, device):
    """With the strides and gaps of the view, which `clone` would close."""
    return view._base.to(device, copy=True).as_strided(view.shape, view.stride(), view.storage_offset())


def check(rows, kernel, device, beta, place="out"):
    divergence, gradient = rows.run(kernel, device, beta, place)
    want, slope = rows.truth(beta)
    torch.testing.assert_close(divergence.double(), want, rtol=2e-6, atol=2e-6)
    assert (divergence[~rows.read] == 0).all()
    if gradient is not None:
        tolerance = {torch.float32: 4e-6}.get(gradient.dtype, torch.finfo(gradient.dtype).eps)
        torch.testing.assert_close(gradient.double(), slope, rtol=tolerance, atol=2e-6)
        assert not gradient.flatten(0, 1)[~rows.read].any()
    return divergence, gradient


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(("V", "dtype"), [(1, "f32"), (67, "f16"), (1003, "bf16"), (4099, "f32")])
def test_divergence_and_gradient(kernel, device, V, dtype, beta):
    """Lengths that fill no block; gaps that leave rows of either side unaligned."""
    check(Rows(V, DTYPES[dtype], gaps=(3, 1)), kernel, device, beta)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("softcaps", [(50.0, 0.0), (50.0, 60.0)], ids=str)
def test_softcaps(kernel, device, softcaps, beta):
    check(Rows(515, softcaps=softcaps, per_row=False), kernel, device, beta)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("place", ["student", "teacher", "none"])
def test_where_the_gradient_goes(kernel, device, place, beta):
    """Over the logits of either side, or nowhere: the same bits."""
    rows = Rows(1003, torch.bfloat16, gaps=(5, 2))
    apart, here = rows.run(kernel, device, beta), rows.run(kernel, device, beta, place)
    assert torch.equal(here[0], apart[0])
    assert here[1] is None or torch.equal(here[1], apart[1])


@pytest.mark.parametrize("beta", BETAS)
def test_a_divergence_near_0_keeps_its_digits(kernel, device, beta):
    rows = Rows(1500, per_row=False)
    noise = torch.randn(2, 3, 1500, generator=torch.Generator().manual_seed(1))
    rows.teacher.copy_(rows.logits - 70 + 1e-2 * noise)
    divergence, _ = rows.run(kernel, device, beta)
    want, _ = rows.truth(beta)
    assert want[rows.read].max() < 1e-4
    torch.testing.assert_close(divergence.double(), want, rtol=0, atol=3e-7)
    rows.teacher.copy_(rows.logits)
    divergence, gradient = rows.run(kernel, device, beta)
    assert not divergence.any()
    assert not gradient.any()


@pytest.mark.parametrize("beta", BETAS)
def test_excluded_tokens(kernel, device, beta):
    """What both exclude adds nothing; what the teacher alone does is a large number, not inf, where it counts."""
    rows = Rows(300, per_row=False)
    rows.logits[..., 7] = rows.teacher[..., 7] = -torch.inf
    rows.teacher[1, 0, 3:6] = -torch.inf
    divergence, _ = check(rows, kernel, device, beta)
    assert divergence.isfinite().all()


@pytest.mark.parametrize("beta", BETAS)
def test_not_a_number_stays_in_its_row(kernel, device, beta):
    rows = Rows(300, per_row=False)
    rows.weights = torch.ones(N)
    rows.logits[0, 0, 150] = rows.teacher[0, 2, 299] = torch.nan
    rows.logits[1, 0, 4] = torch.inf
    rows.weights[5] = torch.nan
    divergence, gradient = rows.run(kernel, device, beta)
    assert divergence.isnan().tolist() == [True, False, True, True, False, False]
    assert gradient.isnan().flatten(0, 1).all(1).tolist() == [True, False, True, True, False, True]
    assert gradient.isnan().flatten(0, 1).any(1).tolist() == [True, False, True, True, False, True]


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_in_the_middle_of_a_head(kernel, backend, device, divergence):
    """Chunks of a loss from hidden states, alone and beside a policy loss: what plain PyTorch gives."""
    hidden, weight, labels, advantages = torch.randn(9, 8), torch.randn(35, 8), torch.randint(35, (9,)), torch.randn(9)
    taught, labels[4] = (torch.randn(9, 5), torch.randn(35, 5)), -100
    found = {}
    for name, at in (("reference", "cpu"), (backend, device)):
        x, w, y, a = (tensor.to(at) for tensor in (hidden, weight, labels, advantages))
        teacher = ppg.Teacher(*(tensor.to(at) for tensor in taught), divergence=divergence)
        x.requires_grad_(), w.requires_grad_()
        alone = ppg.linear_distillation_loss(x, w, y, teacher, temperature=0.7, chunk_rows=4, backend=name).loss
        beside = ppg.linear_policy_loss(x, w, y, a, teacher=teacher, chunk_rows=4, backend=name).loss
        gradients = [torch.autograd.grad(loss, (x, w)) for loss in (alone, beside)]
        found[name] = [tensor.detach().cpu() for tensor in (alone, beside, *gradients[0], *gradients[1])]
    for actual, want in zip(found[backend], found["reference"], strict=True):
        torch.testing.assert_close(actual, want, rtol=1e-5, atol=2e-6)


def test_no_rows(kernel, device):
    for shape in ((0, 3, 7), (3, 0, 7)):
        x, none = torch.empty(shape, device=device), torch.empty(0, dtype=torch.int64, device=device)
        assert kernel(x, x, none, None, None, 1.0, 0.0, 0.0, 0.5, x).shape == (0,)
