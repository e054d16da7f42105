"""What a job trains: model, tokenizer and the sources of randomness, made on the spot or loaded."""

import json
import platform
import random
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from ppg_fast import backends
from ppg_fast.config import AUTO, SOFT_Q, TrainConfig
from ppg_fast.dialogues.chat_format import ChatFormat
from ppg_fast.dialogues.packing import Sample
from ppg_fast.dialogues.template_choice import template_text
from ppg_fast.distributed import Ranks
from ppg_fast.endpoint import Usage
from ppg_fast.models.adaptation import add_lora, checkpoint_activations, freeze
from ppg_fast.models.causal_lm import check_vocabulary, distribute, load_model, make_model
from ppg_fast.models.freed_memory import give_back_freed_memory
from ppg_fast.models.frozen_teacher import FrozenTeacher, require_same_vocabulary
from ppg_fast.policy_classes import Greedy
from ppg_fast.rollouts.environment import Environment
from ppg_fast.rollouts.generation import EndpointSampler
from ppg_fast.rollouts.rollout import Read, Rollout, StepAll, collect_groups, step_each
from ppg_fast.spec import SoftQSpec
from ppg_fast.training.metrics import peak_memory_mb
from ppg_fast.training.objective import Objective, Schedule


class Policy:
    """The model with its tokenizer, on its device, spread over ``ranks``.

    ``make_tokenizer`` is asked where the config names no checkpoint folder. ValueError for a folder without one, for a
    tokenizer whose vocabulary exceeds the model's embedding, and for a device that is not there.
    """

    def __init__(self, config: TrainConfig, make_tokenizer: Callable[[], Any], ranks: Ranks | None = None) -> None:
        from transformers import set_seed

        self.config, self.ranks = config, ranks or Ranks(config.parallel, config.bf16, config.sync_each_batch)
        device = device_of(config.device)
        set_seed(config.seed % 2**32)  # the global generators: dropout and environments may draw from them
        if config.threads or not config.model:
            torch.set_num_threads(config.threads or 1)
        if config.model:
            require_checkpoint(config.model)
            from transformers import AutoTokenizer

            self.tokenizer = AutoTokenizer.from_pretrained(config.model)
            model = load_model(config.model, len(self.tokenizer))
        else:
            self.tokenizer = make_tokenizer()
            pad, end = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
            model = make_model(len(self.tokenizer), config.width, config.layers, config.seed, pad, end)
        model = (
            check_vocabulary(model, len(self.tokenizer)).to(device=device, dtype=getattr(torch, config.dtype)).train()
        )
        half = config.bf16 or (self.ranks.autocast is torch.bfloat16)
        self.teacher = teacher_of(config, self.tokenizer, model, torch.bfloat16 if half else model.dtype)
        self.model = adapted(model, config)
        self.parameters = [
            sum(p.numel() for p in self.model.parameters() if p.requires_grad or not only) for only in (False, True)
        ]
        self.module = distribute(self.model, self.ranks, config.logits_dtype or None)
        if self.ranks.rank:  # weights began alike; what dropout and environments draw must not
            set_seed((config.seed + self.ranks.rank) % 2**32)
        self.chat = chat_of(config, self.tokenizer, self.model.generation_config)
        self.rng = random.Random(config.seed)
        self.generator = self.sampling_generator(config.seed)
        self.said: list[dict[str, Any]] = []  # the first dialogues of the step under way, `keep_rollouts` of them
        self.fitted: Any = None  # a reward model that is trained beside it, with a state of its own
        self.used: dict[str, Usage] = {}  # of endpoints, by role, by this rank; a resumed run counts on

    @property
    def positions(self) -> int | None:
        """How many tokens the model, and its teacher, have positions for, where they say."""
        models = [self.model, *([self.teacher.model] if self.teacher else [])]
        found = [getattr(model.config.get_text_config(), "max_position_embeddings", None) for model in models]
        return min(filter(None, found), default=None)

    def sampling_generator(self, seed: int) -> torch.Generator:
        """A generator on the model's device."""
        return torch.Generator(self.model.device).manual_seed(seed)

    def roll_out(
        self,
        make_environment: Callable[[], Environment],
        seeds: Sequence[int],
        group_size: int,
        generator: torch.Generator,
        *,
        step_all: StepAll = step_each,
        read: Read | None = None,
        sampler: EndpointSampler | None = None,
        only: range | None = None,
    ) -> list[Rollout]:
        """Rollouts with the sampling settings of the config, of ``sampler`` where there is one. All ranks call it.

        ``only``: those of them that this rank rolls out (`Ranks.part`); `of_all` makes them whole. Any number of ranks
            draws the same. An error of one of them, and a signal to it, is everyone's.
        """
        c = self.config
        act = lambda: collect_groups(  # noqa: E731
            sampler or self.model,
            self.chat,
            make_environment,
            seeds,
            group_size,
            generator=generator,
            max_new_tokens=c.max_new_tokens,
            temperature=c.temperature,
            top_p=c.top_p,
            top_k=c.top_k,
            max_turns=c.max_turns + (c.max_tool_calls + 1 if c.tools else 0),  # answers that call are turns too
            max_dialogue_tokens=0 if c.data else c.max_dialogue_tokens,  # offline it bounds what is read
            batch_size=c.rollout_batch,
            step_all=step_all,
            read=read,
            only=only,
            entropies=c.token_share < 1,
        )
        with self.ranks.sampling(self.model):
            return self.ranks.together(act)

    def of_all(self, rollouts: Sequence[Rollout]) -> list[Sample]:
        """What was rolled out on all ranks, in order, on each of them; its first dialogues stay as messages too."""
        count = self.config.keep_rollouts
        if count:
            own = [{"messages": rollout.messages, "tools": tuple(rollout.tools)} for rollout in rollouts[:count]]
            self.said = [one for part in self.ranks.gather(own) for one in part][:count]
        return [sample for part in self.ranks.gather([rollout.sample for rollout in rollouts]) for sample in part]

    def objective(self) -> Objective:
        """The partial policy gradient that the config describes."""
        return replace(objective_of(self.config), teacher=self.teacher)

    def schedule(self) -> Schedule:
        """Its steps."""
        return Schedule(**{field.name: getattr(self.config, field.name) for field in fields(Schedule)})

    def state_dict(self) -> dict[str, Any]:
        """Where the sources of randomness stand; with them the position in the data, which is drawn at random."""
        state: dict[str, Any] = {"rng": self.rng.getstate(), "generator": self.generator.get_state()}
        state |= {"reward_model": self.fitted.state_dict()} if self.fitted else {}
        return state | ({"used": self.usage()} if self.used else {})

    def usage(self) -> dict[str, dict[str, int]]:
        """Requests and retries so far of each endpoint, those of all ranks together. All ranks call it."""
        of_ranks = self.ranks.gather({role: vars(usage) for role, usage in self.used.items()})
        return {
            role: {name: sum(of_rank[role][name] for of_rank in of_ranks) for name in counts}
            for role, counts in of_ranks[0].items()
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Set what `state_dict` gave."""
        for role, counts in saved.get("used", {}).items():
            if role in self.used and self.ranks.is_main:
                vars(self.used[role]).update(counts)
        if self.fitted:
            self.fitted.load_state_dict(saved["reward_model"])
        self.rng.setstate(saved["rng"])
        self.generator.set_state(saved["generator"])

    def describe(self) -> dict[str, Any]:
        """Size, place and versions, for a summary."""
        device = self.model.device
        return {
            "parameters": self.parameters[0],
            "trainable_parameters": self.parameters[1],
            "ranks": self.ranks.world,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
            "backend": backends.default(device.type),
            "peak_memory_mb": round(peak_memory_mb(self.model), 1),
            "torch": torch.__version__,
            "python": platform.python_version(),
        }


def require_checkpoint(model: str, name: str = "model") -> None:
    """ValueError for a folder that is no whole checkpoint of Hugging Face's kind."""
    if Path(model, "config.json").is_file():
        return
    if Path(model, "adapter_config.json").is_file():
        raise ValueError(f"{name} must be a whole checkpoint, got adapters, which first want merging: {model!r}")
    raise ValueError(f"{name} must be a folder with a Hugging Face checkpoint (config.json), got {model!r}")


def teacher_of(config: TrainConfig, tokenizer: Any, model: Any, dtype: torch.dtype) -> FrozenTeacher | None:
    """The teacher that ``config`` names, beside the policy ``model``; None without one.

    ValueError for a folder without one, a tokenizer of another vocabulary, and a head of fewer rows than the policy's.
    """
    if config.teacher is None:
        return None
    from transformers import AutoTokenizer

    require_checkpoint(config.teacher, "teacher")
    try:
        its_tokenizer = AutoTokenizer.from_pretrained(config.teacher)
    except Exception as error:  # transformers and tokenizers raise what they like, over many lines
        said = " ".join(str(error).split())[:200]
        raise ValueError(f"teacher must come with its tokenizer, got none in {config.teacher!r} ({said})") from error
    require_same_vocabulary("teacher", config.teacher, its_tokenizer, tokenizer)
    teacher = load_model(config.teacher, len(tokenizer), dtype).to(model.device)
    settings = {"divergence": config.distill_divergence, "beta": config.distill_beta, "coef": config.distill_coef}
    return FrozenTeacher(teacher, model.get_output_embeddings().weight.shape[0], top_k=config.distill_top_k, **settings)


def chat_of(config: TrainConfig, tokenizer: Any, generation_config: Any) -> ChatFormat:
    """The chat format of ``tokenizer`` under the settings of ``config``."""
    return ChatFormat(
        tokenizer,
        generation_config,
        config.template_date,
        template_text(config.chat_template, tokenizer),
        json.loads(config.chat_template_kwargs or "{}"),
    )


def objective_of(config: TrainConfig) -> Objective:
    """The partial policy gradient that ``config`` describes."""
    numbers = {name: getattr(config, name) for name in ("beta", "cql_coef", "max_residual")}
    soft_q = SoftQSpec(**numbers) if config.loss_type == SOFT_Q else None
    if config.imitate_td:  # of `Objective`: the weight of a turn's squared residual is 1 / (2 cql_coef)
        soft_q = SoftQSpec(beta=1.0, cql_coef=1 / (2 * config.imitate_td))
    return Objective(
        Greedy() if config.imitate_td else config.chosen_class(),
        config.gamma,
        "none" if soft_q else config.baseline,
        config.loss_spec(),
        "sum" if config.of_turns else config.reduction,
        config.num_iterations,
        signals=config.measures,
        auto=config.policy_class == AUTO,
        eta=config.eta if config.regresses else 0.0,
        from_start=config.regresses and config.keeps_start,
        nll_coef=config.nll_coef,
        soft_q=soft_q,
        replay=config.replay,
        token_share=config.token_share,
        imitate=config.imitate,
        gae_lambda=config.gae_lambda,
    )


def adapted(model: Any, config: TrainConfig) -> Any:
    """``model`` with the adapters, frozen parts and activation checkpointing of ``config``."""
    if config.lora_rank:
        model = add_lora(model, config.lora_rank, config.lora_alpha, config.lora_dropout, config.lora_target_modules)
    if config.freeze:
        freeze(model, config.freeze)
    if config.activation_checkpointing:
        checkpoint_activations(model, config.activation_checkpointing_every_n_layers, config.activation_offload)
        give_back_freed_memory(model)
    return model


def device_of(name: str) -> torch.device:
    """The device that a config names; auto: CUDA if there is one. ValueError for one that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device must be auto, cpu, or a CUDA device of this machine, got {name!r} ({str(error).splitlines()[0]})"
        ) from error
    return device
