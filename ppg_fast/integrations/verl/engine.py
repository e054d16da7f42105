"""`calculate_sum_pi_squared` for verl's FSDP engine with our fused head: verl computes the sum_v p_v^2 that its optimal
token baselines are made of from logits, and refuses the option where a fused head leaves none."""

import sys
from dataclasses import replace
from functools import wraps
from typing import Any

from torch import Tensor

MODULE, ENGINE = "verl.workers.engine.fsdp.transformer_impl", "FSDPEngineWithLMHead"
OPTION = "calculate_sum_pi_squared"


class Asked:
    """Where the head of one forward pass leaves sum_v p_v^2 of each token. It travels among the model's arguments, and
    not in its output, of which FSDP keeps the fields that it knows."""

    sum_pi_squared: Tensor | None = None


def give_sum_pi_squared() -> None:
    """Wrap the engine that is loaded in this process, if it is, so that the option asks our head for the sum."""
    module = sys.modules.get(MODULE)
    if module is None or hasattr(getattr(module, ENGINE).prepare_model_inputs, "knows_ppg"):
        return
    engine, get, assign = getattr(module, ENGINE), module.tu.get_non_tensor_data, module.tu.assign_non_tensor
    inputs, outputs = engine.prepare_model_inputs, engine.prepare_model_outputs

    @wraps(inputs)
    def prepare_model_inputs(self: Any, micro_batch: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        of_model, of_outputs = inputs(self, micro_batch)
        ours = (self.model_config.fused_kernel_options or {}).get("impl_backend") == "ppg"
        if ours and all(get(micro_batch, name, False) for name in (OPTION, "use_fused_kernels")):
            of_model["ppg_asked"] = of_outputs["ppg_asked"] = Asked()
        return of_model, of_outputs

    @wraps(outputs)
    def prepare_model_outputs(
        self: Any, output: Any, output_args: Any, micro_batch: Any, logits_processor_func: Any
    ) -> dict[str, Any]:
        asked = output_args.get("ppg_asked")
        if asked is None:
            return outputs(self, output, output_args, micro_batch, logits_processor_func)
        plain = micro_batch.copy()
        assign(plain, **{OPTION: False})
        made = outputs(self, output, output_args, plain, logits_processor_func)
        # in the place of the entropy, so that verl lays it out, gathers and cuts it like that
        assign(plain, calculate_entropy=True)
        swapped = replace(output, entropy=asked.sum_pi_squared)
        made["sum_pi_squared"] = outputs(self, swapped, output_args, plain, logits_processor_func)["entropy"]
        return made

    prepare_model_inputs.knows_ppg = True  # type: ignore[attr-defined]
    engine.prepare_model_inputs, engine.prepare_model_outputs = prepare_model_inputs, prepare_model_outputs
