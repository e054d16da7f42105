"""A whole training step on one long dialogue: our trainer's beside TRL's GRPO, on one model, one optimizer and the same
tokens."""

import copy
import functools
import importlib.util
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .byte_dialogue import byte_sample, lines_of
from .problem import Case, relative_error
from .providers import Provider, Providers, Unavailable, gather
from .step import SHAPES, make_model, require_transformers

CHECKED_TOKENS = 2048  # of the shorter dialogue on which every step is checked against float64


@dataclass
class WholeStep:
    """A model, its optimizer and one dialogue; the steps that ran on it are kept between calls."""

    case: Case
    model: Any
    optimizer: torch.optim.Optimizer
    sample: Any
    steps: dict[str, Callable[[], tuple[Tensor, Tensor]]]

    @property
    def active_tokens(self) -> int:
        return sum(turn >= 0 for turn in self.sample.turn_ids)


def case(shape: str, tokens: int, device: str = "cpu", dtype: str = "float32") -> Case:
    """One dialogue of ``tokens`` tokens on a model of ``shape``."""
    sizes = SHAPES[shape]
    return Case("training_step", tokens, sizes.vocabulary, sizes.width, device=device, dtype=dtype, shape=shape)


@functools.lru_cache(maxsize=2)
def _model(shape: str, device: str, dtype: torch.dtype) -> tuple[Any, torch.optim.Optimizer]:
    """Kept, so that it is made once. The learning rate is 0: every step is alike."""
    model = make_model(shape, device, dtype)
    return model, torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)


def make(case: Case) -> WholeStep:
    """The dialogue of `byte_sample`, cut to the case's length, and the model of its shape. ``variant``: the file of
    dialogues, if any."""
    require_transformers()
    model, optimizer = _model(case.shape, case.device, case.torch_dtype)
    return WholeStep(case, model, optimizer, byte_sample(lines_of(case.variant), case.N), {})


# ---- the two steps ---------------------------------------------------------------------------------------------------
def _objective() -> Any:
    """Of both: returns over three turns, no baseline, PPO's surrogate on-policy, one mean over the assistant's
    tokens."""
    from ppg_fast.policy_classes import Lookahead
    from ppg_fast.spec import PolicyLossSpec
    from ppg_fast.training.objective import Objective

    return Objective(Lookahead(3), baseline="none", spec=PolicyLossSpec("ppo"), reduction="token_mean")


def our_step(problem: WholeStep) -> Callable[[], tuple[Tensor, Tensor]]:
    """A step of `ppg_fast.training.trainer.optimise`, packing and credit included."""
    from ppg_fast.models.causal_lm import prepare
    from ppg_fast.training.objective import Schedule
    from ppg_fast.training.trainer import TrainingState, optimise

    schedule = Schedule(10**9, 0.0, max_tokens=problem.case.N, max_grad_norm=1e9)
    state = TrainingState(problem.model, problem.optimizer)
    steps = optimise(problem.model, lambda step: [problem.sample], _objective(), schedule, state)

    def step() -> tuple[Tensor, Tensor]:
        prepare(problem.model)
        return torch.tensor(next(steps)["loss"]), problem.model.get_input_embeddings().weight.grad

    return step


def trl_step(problem: WholeStep) -> Callable[[], tuple[Tensor, Tensor]]:
    """A step of TRL's GRPOTrainer: its chunked head, its loss on the same advantages, then backward, clipping and the
    optimizer."""
    trainer = _grpo_trainer(problem)
    inputs = _grpo_inputs(problem)
    model = problem.model

    def step() -> tuple[Tensor, Tensor]:
        model.set_attn_implementation("sdpa")
        problem.optimizer.zero_grad(set_to_none=True)
        loss = trainer.compute_loss(model, inputs)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
        problem.optimizer.step()
        return loss.detach(), model.get_input_embeddings().weight.grad

    return step


def _grpo_trainer(problem: WholeStep) -> Any:
    try:
        from datasets import Dataset  # pyright: ignore[reportMissingImports]
        from trl import GRPOConfig, GRPOTrainer  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise Unavailable(f"needs trl (pip install ppg_fast[trl]): {error}") from error
    from ppg_fast.dialogues.chat_format import make_byte_tokenizer

    problem.model.set_attn_implementation("sdpa")
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "per_device_train_batch_size": 2, "num_generations": 2, "gradient_checkpointing": False,
            "loss_type": "bnpo", "use_cpu": problem.case.device == "cpu", "bf16": False,
            "report_to": [], "save_strategy": "no", "disable_tqdm": True,
        }  # fmt: skip
        data = Dataset.from_dict({"prompt": ["a", "b"]})
        given = {"train_dataset": data, "processing_class": make_byte_tokenizer(["a"], 263)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of transformers, at TRL's own settings
            arguments = GRPOConfig(output_dir=folder, **options)
            trainer = GRPOTrainer(model=problem.model, reward_funcs=lambda **_: [0.0, 0.0], args=arguments, **given)
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def _grpo_inputs(problem: WholeStep) -> dict[str, Tensor]:
    """What `_generate_and_score_completions` hands to the loss: prompt and completion, the assistant's tokens marked as
    a tool mask."""
    from ppg_fast.dialogues.packing import pack
    from ppg_fast.training.objective import credit

    sample, device = problem.sample, problem.case.device
    _, advantages = credit(pack([sample]), _objective())
    tokens, turn_ids = (torch.tensor(values, device=device)[None] for values in (sample.tokens, sample.turn_ids))
    first = int((turn_ids[0] >= 0).nonzero()[0])
    mask = turn_ids[:, first:] >= 0
    per_token = torch.where(mask, advantages.to(device)[0][turn_ids[:, first:].clamp(min=0)], 0.0)
    completion = tokens[:, first:]
    masks = {
        "prompt_mask": torch.ones_like(tokens[:, :first]),
        "completion_mask": torch.ones_like(completion),
        "tool_mask": mask.long(),
    }
    return {"prompt_ids": tokens[:, :first], "completion_ids": completion, **masks, "advantages": per_token}


STEPS = {"ppg_fast": our_step, "TRL GRPO": trl_step}


def participants(case: Case) -> Providers:
    """Our trainer and TRL's."""

    def provider(name: str) -> Provider:
        def compute(problem: WholeStep) -> tuple[str, Tensor, Tensor]:
            if name not in problem.steps:
                problem.steps[name] = STEPS[name](problem)
            with torch.enable_grad():
                loss, gradient = problem.steps[name]()
            return name, loss, gradient.clone()

        return Provider(name, compute, "ours" if name == "ppg_fast" else "peer", forward_only=True)

    def ours(case: Case) -> Provider:
        """ppg_fast."""
        return provider("ppg_fast")

    def trl(case: Case) -> Provider:
        """TRL GRPO."""
        if importlib.util.find_spec("trl") is None:
            raise Unavailable("not installed (pip install ppg_fast[trl])")
        return provider("TRL GRPO")

    return gather([ours, trl], case)


# ---- is it right -----------------------------------------------------------------------------------------------------
def truth(problem: WholeStep) -> tuple[Tensor, Tensor]:
    """Loss and the embedding's gradient in float64 from plain logits; only for short dialogues."""
    from ppg_fast.dialogues.packing import pack
    from ppg_fast.training.objective import credit

    model = copy.deepcopy(problem.model).double()
    model.__dict__.pop("forward", None)  # TRL's, which is bound to the model that was copied
    model.set_attn_implementation("eager")
    model.zero_grad(set_to_none=True)
    batch = pack([problem.sample]).to(problem.case.device)
    _, advantages = credit(pack([problem.sample]), _objective())
    logits = model(batch.tokens[None], use_cache=False).logits[0]
    active = batch.labels >= 0
    logprobs = logits.log_softmax(-1)[active].gather(1, batch.labels[active, None])[:, 0]
    weights = advantages.to(problem.case.device)[0][batch.turn_ids[active]].double()
    ratio = (logprobs - logprobs.detach()).exp()
    loss = -(ratio * weights).sum() / active.sum()
    loss.backward()
    return loss.detach(), model.get_input_embeddings().weight.grad


def checker(problem: WholeStep, case: Case) -> Callable[[Any], dict[str, float]]:
    """Each step on a short dialogue against float64; at full length the two against each other, the first one being the
    measure."""
    short = make(replace(case, N=min(case.N, CHECKED_TOKENS)))
    expected = truth(short)
    first: list[tuple[Tensor, Tensor]] = []

    def check(result: tuple[str, Tensor, Tensor]) -> dict[str, float]:
        name, loss, gradient = result
        own = STEPS[name](short)()
        errors = {"loss": relative_error(own[0], expected[0]), "d_embedding": relative_error(own[1], expected[1])}
        if first:
            errors["agreement"] = relative_error(gradient, first[0][1].double())
        else:
            first.append((loss, gradient))
        return errors

    return check
