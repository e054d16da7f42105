"""Prints the PTX of Triton's scalar loss alone, one JSON line a loss. No row is swept in it, so that a minimum in it is
one of the scalar loss.

A script of its own, because the interpreter that other tests run under patches ``triton.language`` for good. Run by
test_compiled_nan.py.
"""

import importlib.util
import json
import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

package = importlib.util.find_spec("ppg_fast.kernels")
assert package is not None
sys.modules["ppg_fast.kernels"] = importlib.util.module_from_spec(package)  # it refuses to load without a device

from ppg_fast.kernels.policy_term import importance_weight, policy_term

from ppg_fast.losses import KLEstimator, LossType
from ppg_fast.spec import IMPORTANCE_MODES, NAN_ROLLOUT


@triton.jit
def scalar_loss(
    values, out, LOSS_TYPE: tl.constexpr, KL_ESTIMATOR: tl.constexpr, NAN_ROLLOUT: tl.constexpr,
    IMPORTANCE_MODE: tl.constexpr,
):  # fmt: skip
    """With every number on."""
    logprob, entropy, lse, old = tl.load(values), tl.load(values + 1), tl.load(values + 2), tl.load(values + 3)
    ref, rollout, advantage, most = tl.load(values + 4), tl.load(values + 5), tl.load(values + 6), tl.load(values + 7)
    weight = importance_weight(
        old, rollout, tl.load(values + 8), tl.load(values + 9), most, NAN_ROLLOUT, IMPORTANCE_MODE
    )
    loss, slope = policy_term(
        logprob, entropy, lse, old, ref, rollout, weight, advantage, tl.load(values + 10), tl.load(values + 11),
        tl.load(values + 12), tl.load(values + 13), tl.load(values + 14), tl.load(values + 15), tl.load(values + 16),
        tl.load(values + 17), most, LOSS_TYPE, KL_ESTIMATOR,
    )  # fmt: skip
    tl.store(out, loss)
    tl.store(out + 1, slope)


# each loss, each estimator, and of nan_rollout the one value that is another code; gspo has the term of ppo
CASES = (
    (LossType.REINFORCE, KLEstimator.K2, "one", "truncate"),
    (LossType.CISPO, KLEstimator.K1, "keep", "mask"),
    (LossType.PPO, KLEstimator.K3, "one", "truncate"),
    (LossType.IPO, KLEstimator.K3_UNBIASED, "keep", "truncate"),
    (LossType.ICEPOP, KLEstimator.K3_PLUS, "one", "mask"),
    (LossType.DPPO_TV, KLEstimator.ABS, "keep", "truncate"),
    (LossType.DPPO_KL, KLEstimator.K3_UNBIASED, "keep", "mask"),
    (LossType.SAPO, KLEstimator.ABS, "keep", "truncate"),
    (LossType.TOPR, KLEstimator.K3_PLUS, "keep", "truncate"),
)


def main() -> None:
    for loss, kl, rule, mode in CASES:
        places = NAN_ROLLOUT.index(rule), IMPORTANCE_MODES.index(mode)
        values = dict(zip(("NAN_ROLLOUT", "IMPORTANCE_MODE"), places, strict=True))
        chosen = {"LOSS_TYPE": int(loss), "KL_ESTIMATOR": int(kl), **values}
        names = ("values", "out", *chosen)
        signature = {name: "constexpr" if name in chosen else "*fp32" for name in names}
        constants = {(names.index(name),): value for name, value in chosen.items()}
        source = ASTSource(fn=scalar_loss, signature=signature, constexprs=constants)
        ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
        print(json.dumps({"loss": f"{loss.name} {kl.name} {rule} {mode}", "ptx": ptx}))


if __name__ == "__main__":
    main()
