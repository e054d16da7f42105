"""A case of the oracle as a call of the package, and how they are compared."""

from dataclasses import replace

import numpy as np
import oracle
import torch
from cases import spec_of

import ppg_fast as ppg
from ppg_fast.losses import KL_ESTIMATORS

# relative error: [0] from logits, a few roundings to the dtype of the inputs; [1] from hidden states, whose logits a
# GEMM has rounded
RELATIVE = {torch.float32: (2e-5, 2e-5), torch.bfloat16: (1.5 * 2**-8, 4e-2), torch.float16: (1.5 * 2**-10, 5e-3)}


def close(actual, truth, name, relative=2e-5, scale=0.0):
    """|actual - truth| <= relative (|truth| + max(|truth|, scale) / 4), and never NaN."""
    actual, truth = actual.detach().double().numpy(), np.asarray(truth)
    assert actual.shape == truth.shape, f"{name}: shape {actual.shape}, expected {truth.shape}"
    allowed = relative * (np.abs(truth) + max(np.abs(truth).max(initial=0), scale) / 4) + 1e-7
    bad = ~(np.abs(actual - truth) <= allowed)
    assert not bad.any(), f"{name}: {actual[bad][:4]}, expected {truth[bad][:4]} at {np.argwhere(bad)[:4].tolist()}"


def random_spec(seed, loss_type, **fixed):
    """No number at its default; each optional term in about half of the draws."""
    rng = np.random.default_rng(seed + 1000)
    on = rng.random(6) < 0.5
    temperature = torch.tensor(rng.uniform(0.6, 1.4, 24), dtype=torch.float32) if on[0] else 0.8
    terms = {"dual_clip": 1.4, "kl_coef": 0.13, "entropy_coef": 0.03, "importance_cap": 1.25, "logit_softcap": 3.0}
    numbers = {name: value if here else 0.0 for (name, value), here in zip(terms.items(), on[1:], strict=True)}
    bounds = (0.02, 0.01) if loss_type == "dppo_kl" else (0.15, 0.3)
    numbers |= dict(zip(("clip_low", "clip_high"), bounds, strict=True))
    numbers |= {"temperature": temperature, "kl_estimator": str(rng.choice(KL_ESTIMATORS))}
    numbers |= {"ratio_cap": 1.2, "tau_positive": 1.3, "tau_negative": 1.7}
    on = rng.random(4) < 0.4
    numbers |= {"log_ratio_coef": 0.05 * on[0], "importance_floor": 0.8 * on[1], "kl_cap": 0.1 * on[2]}
    numbers["kl_cap"] *= numbers["kl_coef"] != 0
    if on[3] and (numbers["importance_cap"] or numbers["importance_floor"]):
        numbers["importance_mode"] = "mask"
    return spec_of(loss_type, **{**numbers, **fixed})


def draw(seed, layout, loss_type, reduction="token_mean", fixed=(), **options):
    spec = random_spec(seed, loss_type, **dict(fixed))
    if isinstance(spec.temperature, torch.Tensor):
        spec = replace(spec, temperature=spec.temperature[: np.prod(oracle.LAYOUTS[layout][0])])
    return oracle.draw(seed, layout, spec, reduction, normalizer=5.5 if seed % 4 == 0 else None, **options)


def arranged(values, layout, dtype=torch.float32):
    """(N, ...) as a tensor and its view in the layout: the first columns of a longer batch, or transposed in memory."""
    shape = oracle.LAYOUTS[layout][0]
    t = torch.as_tensor(values).to(dtype).reshape(*shape, *np.shape(values)[1:])
    if layout == "padded":
        return torch.cat([t, t[:, :1]], 1), lambda leaf: leaf[:, :-1]
    return (
        (t.transpose(0, 2).contiguous(), lambda leaf: leaf.transpose(0, 2))
        if layout == "cube"
        else (t, lambda leaf: leaf)
    )


class Call:
    """A case as tensors: masked rows are NaN or inf in every argument, their labels -100 or, under loss_mask 0, out of
    range."""

    def __init__(self, case, dtype=torch.float32, seed=0):
        batch, rng = case.batch, np.random.default_rng(seed)
        self.case, self.dtype, self.shape = case, dtype, oracle.LAYOUTS[case.layout][0]
        N, V = case.logits.shape
        by_label = rng.random(N) < 0.5
        poison = np.where(np.arange(N) % 2, np.nan, np.inf)
        labels = np.where(batch.active, batch.labels, np.where(by_label, oracle.IGNORE, V + 3))
        mask = torch.tensor(batch.active | (by_label & (rng.random(N) < 0.5))).to(
            (torch.bool, torch.int64, torch.float32)[seed % 3]
        )
        self.labels, self.advantages = (
            self.place(labels, torch.int64),
            self.place(np.where(batch.active, batch.advantages, np.nan)),
        )
        known = {"old_logprobs": batch.old, "ref_logprobs": batch.ref, "rollout_logprobs": batch.rollout}
        known["nll_weights"] = batch.nll
        cu = oracle.LAYOUTS[case.layout][1]
        self.options = {
            name: None if v is None else self.place(np.where(batch.active, v, np.nan)) for name, v in known.items()
        }
        self.options |= {"loss_mask": self.place(mask, mask.dtype), "turn_ids": self.place(batch.turn, torch.int64)}
        self.options |= {
            "cu_seqlens": None if cu is None else torch.tensor(cu, dtype=torch.int32),
            "reduction": batch.reduction,
        }
        self.options["normalizer"] = (
            torch.tensor(batch.normalizer) if batch.normalizer and seed % 8 else batch.normalizer
        )
        t = batch.spec.temperature
        self.options["spec"] = (
            replace(batch.spec, temperature=self.place(t)) if isinstance(t, torch.Tensor) else batch.spec
        )
        leaf, view = arranged(np.where(batch.active[:, None], case.rows, poison[:, None]), case.layout, dtype)
        self.leaves = {"rows": (leaf, view)}
        same = lambda leaf: leaf  # noqa: E731
        self.leaves |= {
            n: (torch.tensor(v).to(dtype), same)
            for n, v in (("weight", case.weight), ("bias", case.bias))
            if v is not None
        }
        self.views = [view(leaf.requires_grad_()) for leaf, view in self.leaves.values()]
        if case.bias is not None:
            self.options["bias"] = self.views.pop()

    def place(self, values, dtype=torch.float32):
        t, view = arranged(values, self.case.layout, dtype)
        return view(t)

    def __call__(self, advantages=None, **more):
        function = ppg.policy_loss if self.case.weight is None else ppg.linear_policy_loss
        return function(
            *self.views, self.labels, self.advantages if advantages is None else advantages, **{**self.options, **more}
        )

    def check(self, out, upstream=1.0, skipped=False):
        """Values, then one backward pass and all gradients, against the oracle."""
        batch, (exact, rounded) = (
            self.case.batch,
            (RELATIVE[torch.float32][0], RELATIVE[self.dtype][self.case.weight is not None]),
        )
        forward = exact if self.case.weight is None else rounded
        loss, logprobs, entropy, dlogits = oracle.policy_loss(self.case.logits, batch, upstream)
        logprobs, entropy = np.where(skipped, 0, (logprobs, entropy))
        assert out.loss.dtype == out.logprobs.dtype == out.entropy.dtype == torch.float32
        close(out.logprobs, logprobs.reshape(self.shape), "logprobs", forward, 4.0)
        close(out.entropy, entropy.reshape(self.shape), "entropy", forward, 4.0)
        terms = np.abs(oracle.policy_loss(self.case.logits, replace(batch, reduction="none"))[0]).max()
        close(out.loss, np.reshape(loss, self.shape if batch.reduction == "none" else ()), "loss", forward, 4 * terms)
        (
            out.loss * torch.as_tensor(upstream, dtype=torch.float32).reshape(self.shape if np.ndim(upstream) else ())
        ).sum().backward()
        self.check_gradients(dlogits, rounded)

    def check_gradients(self, dlogits, relative):
        expected = self.case.gradients(dlogits)
        for name, (leaf, view) in self.leaves.items():
            assert leaf.grad.dtype == self.dtype
            inside = view(leaf.grad)
            assert leaf.grad.count_nonzero() == inside.count_nonzero(), f"d_{name} outside of the view"
            close(inside.reshape(expected[name].shape), expected[name], f"d_{name}", relative)
        if self.case.weight is None or name == "rows":
            assert not inside.reshape(expected[name].shape)[torch.tensor(~self.case.batch.active)].any()


def upstream_of(case, seed):
    N = case.batch.labels.size
    return (
        np.random.default_rng(seed).normal(size=N) if case.batch.reduction == "none" else (1.0, -1.75, 1 / 3)[seed % 3]
    )


def by_turns(cases: list, turn: int, turns: int, backend: str, device: str) -> list:
    """All cases; where Triton is interpreted or CUDA emulated, which is slow, those of this turn: each is some
    turn's."""
    slow = backend in ("triton", "cuda") and device == "cpu"
    return cases[turn % turns :: turns] if slow else cases
