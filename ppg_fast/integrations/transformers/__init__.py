"""transformers: `patch` gives a causal LM a policy loss without logits, `PackedCollator` feeds it dialogues end to
end."""

from importlib.metadata import PackageNotFoundError, version

MINIMUM = (5, 10)

try:
    _found = version("transformers")
except PackageNotFoundError:
    _found = "none"
if _found == "none" or tuple(int(part) for part in _found.split(".")[:2]) < MINIMUM:
    raise ImportError(
        f"ppg_fast.integrations.transformers needs transformers >= {MINIMUM[0]}.{MINIMUM[1]}, found {_found}"
    )

from ppg_fast.integrations.transformers.head import LogitRule, logit_rule  # noqa: E402
from ppg_fast.integrations.transformers.packing import PACKED_ATTENTION, PackedCollator  # noqa: E402
from ppg_fast.integrations.transformers.patch import Patch, patch  # noqa: E402
from ppg_fast.integrations.transformers.scoring import PolicyCausalLMOutput  # noqa: E402

__all__ = ["PACKED_ATTENTION", "LogitRule", "PackedCollator", "Patch", "PolicyCausalLMOutput", "logit_rule", "patch"]
