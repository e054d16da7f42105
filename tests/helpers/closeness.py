"""One rule for "equal enough": no worse than plain PyTorch on the same inputs, element by element, plus the rounding of
the dtype."""

import torch
from torch import Tensor

# relative, of one result stored in that dtype
ROUNDING = {torch.float32: 4e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}
FLOOR = 5e-7  # absolute: log-probs are differences of float32 numbers of order 1 to 10, also where the truth is zero
STATISTICS = 4e-6  # relative to the largest element: float32 sums over the vocabulary


def assert_as_good_as(actual: Tensor, baseline: Tensor, truth: Tensor, name: str) -> None:
    """error(actual) <= 2 error(baseline) + ROUNDING |truth| + STATISTICS max |truth| + FLOOR.

    ``actual``: the kernel's; ``baseline``: plain PyTorch in float32 rounded to the same dtype; ``truth``: the reference
        in float64.
    """
    actual64, baseline64 = actual.detach().double().cpu(), baseline.detach().to(actual.dtype).double().cpu()
    assert actual64.shape == truth.shape, f"{name}: shape {tuple(actual64.shape)}, expected {tuple(truth.shape)}"
    if not truth.numel():
        return
    assert truth.isfinite().all(), (
        f"{name}: the truth itself is not finite, and nothing is further from NaN than allowed"
    )
    assert actual64.isfinite().all(), f"{name}: not finite at {actual64.isfinite().logical_not().nonzero()[0].tolist()}"
    error = (actual64 - truth).abs()
    allowed = (
        2 * (baseline64 - truth).abs() + ROUNDING[actual.dtype] * truth.abs() + STATISTICS * truth.abs().max() + FLOOR
    )
    if (error > allowed).any():
        at = (error - allowed).argmax()
        where = torch.unravel_index(at, error.shape)
        raise AssertionError(
            f"{name}: {actual64.flatten()[at]:.9g} at {[int(i) for i in where]}, expected {truth.flatten()[at]:.9g}, "
            f"{error.flatten()[at]:.3e} off where {allowed.flatten()[at]:.3e} is allowed"
        )
