"""transformers: `patch` gives a causal LM a policy loss without logits, `PackedCollator` feeds it dialogues end to
end."""

from ppg_fast.integrations.host import require_host

require_host("transformers", "5.10")

from ppg_fast.integrations.transformers.head import LogitRule, logit_rule  # noqa: E402
from ppg_fast.integrations.transformers.packing import PACKED_ATTENTION, PackedCollator  # noqa: E402
from ppg_fast.integrations.transformers.patch import Patch, patch  # noqa: E402
from ppg_fast.integrations.transformers.scoring import PolicyCausalLMOutput  # noqa: E402

__all__ = ["PACKED_ATTENTION", "LogitRule", "PackedCollator", "Patch", "PolicyCausalLMOutput", "logit_rule", "patch"]
