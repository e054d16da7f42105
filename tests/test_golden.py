"""Losses and gradients that change only with a line in CHANGELOG.md: tests/golden/losses.json on every backend."""

import json
import re
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path

import golden
import numpy as np
import oracle
import pytest
import torch
from closeness import assert_as_good_as

import ppg_fast as ppg
from ppg_fast.losses import KL_ESTIMATORS, LOSS_TYPES
from ppg_fast.spec import REDUCTIONS

ROOT = Path(__file__).parents[1]
NAMES = ("d_hidden", "d_weight", "d_bias")


def from_logits(case, spec, reduction, dtype, backend, device):
    with torch.no_grad():
        logits = torch.nn.functional.linear(*case.head(dtype, device))
    logits.requires_grad_()
    options = case.options(spec, reduction, dtype, device)
    out = ppg.policy_loss(
        logits, case.labels.to(device), case.advantages.to(device).float(), backend=backend, **options
    )
    upstream = case.upstream.to(device).float() if reduction == "none" else None
    return {"loss": out.loss, "d_logits": torch.autograd.grad(out.loss, logits, upstream)[0]}


def from_hidden_states(case, spec, reduction, dtype, backend, device):
    hidden, weight, bias = head = case.head(dtype, device)
    options = case.options(spec, reduction, dtype, device)
    labels, advantages = case.labels.to(device), case.advantages.to(device).float()
    out = ppg.linear_policy_loss(hidden, weight, labels, advantages, bias=bias, backend=backend, **options)
    upstream = case.upstream.to(device).float() if reduction == "none" else None
    return {"loss": out.loss} | dict(zip(NAMES, torch.autograd.grad(out.loss, head, upstream), strict=True))


@pytest.fixture(scope="module")
def file():
    return golden.read()


@pytest.mark.parametrize("door", [from_logits, from_hidden_states])
@pytest.mark.parametrize("dtype", golden.DTYPES)
@pytest.mark.parametrize("loss", golden.LOSSES | golden.MORE_LOSSES)
def test_the_file_holds_on_every_backend(backend, device, file, loss, dtype, door):
    case, cases = golden.inputs(), golden.of_loss(loss)
    if (
        backend == "triton" and device == "cpu" and len(cases) > len(REDUCTIONS)
    ):  # the interpreter is slow: each term and each reduction, not each pair
        cases = list(zip(islice(cycle(golden.TERMS), len(REDUCTIONS)), REDUCTIONS, strict=True))
    for terms, reduction in cases:
        spec, name = golden.spec(loss, terms), golden.key(loss, terms, reduction)
        actual = door(case, spec, reduction, golden.DTYPES[dtype], backend, device)
        plain = golden.textbook(case, spec, reduction, golden.DTYPES[dtype])
        for k, value in actual.items():
            assert_as_good_as(value, plain[k], file[name][k].view(value.shape), f"{name}: {k}")


def test_the_file_is_what_the_reference_says(file):
    truth = golden.truth()
    assert file.keys() == truth.keys()
    for name, numbers in truth.items():
        assert file[name].keys() == numbers.keys()
        for k, value in numbers.items():
            torch.testing.assert_close(
                file[name][k], value.detach().flatten(), rtol=1e-6, atol=1e-12, msg=f"{name} {k}"
            )


def test_the_file_is_what_the_formulas_say(file):
    """An implementation in numpy and plain loops that shares no code with the package."""
    case, flat = golden.inputs(), lambda t: t.flatten().numpy()
    hidden, weight, bias = (t.numpy() for t in (case.hidden.view(-1, golden.D), case.weight, case.bias))
    logits, active = oracle.linear_logits(hidden, weight, bias), flat(case.labels) >= 0
    for loss, terms, reduction in golden.GRID:
        name, batch = (
            golden.key(loss, terms, reduction),
            oracle.Batch(
                flat(case.labels),
                flat(case.advantages),
                active,
                oracle.sequences((golden.B, golden.L)),
                flat(case.turn_ids),
                *map(flat, (case.old_logprobs, case.ref_logprobs, case.rollout_logprobs)),
                golden.spec(loss, terms),
                reduction,
            ),
        )
        upstream = flat(case.upstream) if reduction == "none" else 1.0
        value, _, _, dlogits = oracle.policy_loss(logits, batch, upstream)
        gradients = (dlogits, *oracle.linear_gradients(dlogits, hidden, weight, active))
        expected = dict(zip(("loss", "d_logits", *NAMES), (value, *gradients), strict=True))
        for k, v in expected.items():  # the weights of a reduction are float32
            close = {"rtol": 1e-6, "atol": 1e-7 * np.abs(v).max()}
            np.testing.assert_allclose(file[name][k], np.ravel(v), **close, err_msg=f"{name} {k}")


def test_it_covers_what_there_is(file):
    specs = [golden.spec(loss, terms) for loss, terms, _ in golden.GRID]
    assert {s.loss_type for s in specs} == set(LOSS_TYPES)
    assert {s.kl_estimator for s in specs if s.kl_coef} == set(KL_ESTIMATORS)
    assert len(file) == len(specs)
    assert golden.FILE.stat().st_size < 160 * 1024
    saved, case = json.loads(golden.FILE.read_text())["inputs"], golden.inputs()
    for name in golden.Inputs.__dataclass_fields__:  # the file stands for itself, and no dtype rounds what it holds
        exact = getattr(case, name)
        assert saved[name] == exact.flatten().tolist(), name
    for dtype in golden.DTYPES.values():
        head = [t.to(dtype) for t in (case.hidden, case.weight, case.bias)]
        assert all(
            torch.equal(t.double(), getattr(case, n)) for t, n in zip(head, ("hidden", "weight", "bias"), strict=True)
        )
        logits = torch.nn.functional.linear(*head).double()
        assert torch.equal(logits, torch.nn.functional.linear(case.hidden, case.weight, case.bias))


@pytest.mark.parametrize("number", ["clip_low", "clip_high", "temperature"])
def test_every_number_of_a_loss_shows(file, number):
    """A clip that no token reaches would let any change of it pass."""
    case, seen = golden.inputs(), set()
    for loss in [loss for loss in golden.LOSSES if number == "temperature" or number in golden.LOSSES[loss]]:
        spec = golden.spec(loss, "alone")
        moved = replace(spec, **{number: getattr(spec, number) * 1.01})
        out = golden.textbook(case, moved, "sum", torch.float64)
        if not torch.allclose(out["loss"], file[golden.key(loss, "alone", "sum")]["loss"][0], rtol=1e-5):
            seen.add(loss)
    clipped = {"clip_low": {"ppo", "ppo-dual-clip", "gspo", "gspo_turn"}}
    clipped["clip_high"] = clipped["clip_low"] | {"cispo"}
    assert seen == clipped.get(number, set(golden.LOSSES))


def named_digest(changelog: str) -> str | None:
    """The digest that the newest version's last line about golden losses names."""
    newest = changelog.split("\n## ")[1] if "\n## " in changelog else ""
    found = re.findall(r"golden\s+losses\s+`?([0-9a-f]{12})\b", newest, re.IGNORECASE)
    return found[-1] if found else None


def test_a_change_of_the_file_has_a_line_in_the_changelog():
    rule = "tests/golden/losses.json changed: say why in CHANGELOG.md, in a line with: golden losses " + golden.digest()
    assert named_digest((ROOT / "CHANGELOG.md").read_text()) == golden.digest(), rule


def test_the_digest_is_that_of_the_newest_line(tmp_path):
    page = (
        "# Changelog\n\n## 0.2\n* Golden losses `{}`: first.\n* golden\n  losses {}: k4.\n\n## 0.1\n* golden losses {}"
    )
    assert named_digest(page.format("a" * 12, "b" * 12, "c" * 12)) == "b" * 12
    assert named_digest("# Changelog\n\n## 0.2\n* k4\n\n## 0.1\n* golden losses " + "a" * 12) is None
    (tmp_path / "losses.json").write_text(golden.FILE.read_text().replace("1", "2", 1))
    assert golden.digest(tmp_path / "losses.json") != golden.digest()
