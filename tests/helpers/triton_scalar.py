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
from ppg_fast.spec import NAN_ROLLOUT


@triton.jit
def scalar_loss(values, out, LOSS_TYPE: tl.constexpr, KL_ESTIMATOR: tl.constexpr, NAN_ROLLOUT: tl.constexpr):
    logprob, entropy, old, ref = tl.load(values), tl.load(values + 1), tl.load(values + 2), tl.load(values + 3)
    weight = importance_weight(old, tl.load(values + 4), tl.load(values + 5), NAN_ROLLOUT)
    loss, slope = policy_term(
        logprob, entropy, old, ref, weight, tl.load(values + 6), tl.load(values + 7), tl.load(values + 8),
        tl.load(values + 9), tl.load(values + 10), tl.load(values + 11), LOSS_TYPE, KL_ESTIMATOR,
    )  # fmt: skip
    tl.store(out, loss)
    tl.store(out + 1, slope)


def main() -> None:
    one = NAN_ROLLOUT.index("one")
    for loss, kl, rule in (  # gspo has the term of ppo, and of nan_rollout only "one" is another code
        (LossType.REINFORCE, KLEstimator.K2, one),
        (LossType.CISPO, KLEstimator.K1, 0),
        (LossType.PPO, KLEstimator.K3, one),
    ):
        chosen = {"LOSS_TYPE": int(loss), "KL_ESTIMATOR": int(kl), "NAN_ROLLOUT": rule}
        names = ("values", "out", *chosen)
        signature = {name: "constexpr" if name in chosen else "*fp32" for name in names}
        constants = {(names.index(name),): value for name, value in chosen.items()}
        source = ASTSource(fn=scalar_loss, signature=signature, constexprs=constants)
        ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
        print(json.dumps({"loss": f"{loss.name} {kl.name} {NAN_ROLLOUT[rule]}", "ptx": ptx}))


if __name__ == "__main__":
    main()
