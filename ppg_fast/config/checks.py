"""What every setting must be, and what settings must be together."""

from __future__ import annotations

import datetime
import json
import re
import shlex
from typing import TYPE_CHECKING

from ppg_fast.config.defaults import AUTO, LOSS_SETTINGS, OF_TEACHER, OF_TURNS, SOFT_Q, TRACKERS
from ppg_fast.distributed import PARALLEL
from ppg_fast.losses import LOSS_TYPES
from ppg_fast.policy_classes import LagWeights
from ppg_fast.spec import (
    BASELINES,
    DIVERGENCES,
    REDUCTIONS,
    VALUE,
    require,
    require_number,
    require_one_of,
    require_token_share,
)

if TYPE_CHECKING:
    from ppg_fast.config.train import TrainConfig

POSITIVE = """width layers vocab_size num_iterations num_prompts num_generations max_new_tokens max_turns
    max_tokens imitation_batch eval_every eval_dialogues keep_checkpoints
    activation_checkpointing_every_n_layers rank_timeout partner_tokens max_tool_calls
    judge_tokens concurrency rollout_batch human_every human_steps"""
COUNTS = """max_steps warmup_steps imitation_steps max_dialogue_tokens threads save_every max_skipped_steps
    lora_rank lora_alpha retries judge_retries replay keep_rollouts distill_top_k top_k"""
ABOVE_ZERO = "learning_rate imitation_learning_rate human_learning_rate max_grad_norm temperature eta beta distill_coef"
MOST = 2**31 - 1  # of anything that is counted
LARGEST_TD = 1e20  # times any number of dialogues float32 holds it, and its reciprocal


def check_each(config: TrainConfig) -> None:
    """ValueError, with rule and value, for the first setting that is none of its own."""
    for names, least in ((POSITIVE, 1), (COUNTS, 0)):
        for name in names.split():
            _require_int(name, getattr(config, name), least, MOST)
    _require_int("seed", config.seed, 0, 2**63 - 1)  # of PyTorch's generators
    _require_pattern("lora_target_modules", config.lora_target_modules)
    for part in config.freeze.split(","):
        _require_pattern("freeze", part)
    for part in filter(None, config.optim_args.replace(" ", "").split(",")):
        key, _, value = part.partition("=")
        require(bool(key and value) and "=" not in value, "optim_args must be key=value with commas", part)
    try:
        shlex.split(config.sampler_refresh or "")
    except ValueError as error:
        raise ValueError(f"sampler_refresh must be a command ({error}), got {config.sampler_refresh!r}") from error
    for name in ABOVE_ZERO.split():
        require_number(name, getattr(config, name), 0.0, open_low=True)
    for name in ("gamma", "final_learning_rate", "teacher_skill"):
        require_number(name, getattr(config, name), 0.0, 1.0)
    require_number("top_p", config.top_p, 0.0, 1.0, open_low=True)
    for name in ("lora_dropout", "adam_beta1", "adam_beta2"):
        require_number(name, getattr(config, name), 0.0, 1.0)
    require_number("weight_decay", config.weight_decay, 0.0)
    for name in ("nll_coef", "max_residual", "cql_coef"):
        require_number(name, getattr(config, name), 0.0)
    require_number("imitate_td", config.imitate_td, 0.0, LARGEST_TD)
    small = "imitate_td must be 0 or so large that float32 holds what it is weighed against"
    require(not config.imitate_td or config.imitate_td >= 1 / LARGEST_TD, small, config.imitate_td)
    _require_date("template_date", config.template_date)
    _require_object("chat_template_kwargs", config.chat_template_kwargs)
    require_one_of("baseline", config.baseline, (*BASELINES, VALUE))
    if config.gae_lambda is not None:
        require_number("gae_lambda", config.gae_lambda, 0.0, 1.0)
    require_one_of("reduction", config.reduction, REDUCTIONS[:-1])
    require_one_of("distill_divergence", config.distill_divergence, DIVERGENCES)
    if config.distill_beta is not None:
        require_number("distill_beta", config.distill_beta, 0.0, 1.0, open_low=True)
        require(config.distill_beta < 1, "distill_beta must be < 1: reverse_kl is the limit there", config.distill_beta)
    require_one_of("dtype", config.dtype, ("float32", "bfloat16"))
    require_one_of("logits_dtype", config.logits_dtype, ("", "float32"))
    for name in config.trackers:
        require_one_of("report_to", name, (*TRACKERS, "none"))
    require_one_of("parallel", config.parallel, PARALLEL)
    require_number("timeout", config.timeout, 0.0, open_low=True)
    require_number("partner_temperature", config.partner_temperature, 0.0)


def check_together(config: TrainConfig) -> None:
    """ValueError, with rule and value, for settings that exclude or need each other."""
    require_one_of("loss_type", config.loss_type, (*LOSS_TYPES, *OF_TURNS))
    require(
        not config.lora_rank or bool(config.model),
        "lora_rank must be 0 without model: one made on the spot has nothing to adapt",
        config.lora_rank,
    )
    needs = "activation_offload must be off without activation_checkpointing"
    require(config.activation_checkpointing or not config.activation_offload, needs, config.activation_offload)
    require(
        not (config.data and config.prompts),
        "data (offline) and prompts (on-policy) exclude each other, got both",
        config.prompts,
    )
    limit = type(config).max_tool_calls
    has_tools = bool(config.tools) or config.max_tool_calls == limit
    require(has_tools, f"max_tool_calls must be {limit} without tools, where nothing is called", config.max_tool_calls)
    if config.measures:
        what = "policy_class auto needs" if config.policy_class == AUTO else "signals need"
        require(not config.data, f"{what} rollouts of the policy itself, so there must be no data", config.data)
    rule = "keep_rollouts must be 0 with data, whose dialogues are there already"
    require(not (config.data and config.keep_rollouts), rule, config.keep_rollouts)
    _check_teacher(config)
    _check_kept_sets(config)
    _check_of_turns(config)
    _check_imitation(config)
    _check_values(config)
    _check_gradients(config)
    require_token_share(config.token_share, config.loss_spec(), config.reduction, config.of_turns, config.measures)
    source = "data" if config.data else "sampler" if config.sampler else ""
    rule = f"token_share must be 1 with {source} and num_iterations 1: nothing says then how uncertain a token was"
    require(config.token_share == 1 or not source or config.num_iterations > 1, rule, config.token_share)
    if config.data and not config.allow_negative_rewards and not config.of_turns:
        rule = (
            "baseline must be none with data (a baseline makes weights negative and voids the bound; "
            "allow_negative_rewards permits it)"
        )
        require(config.baseline == "none", rule, config.baseline)


def _check_values(config: TrainConfig) -> None:
    """ValueError for a bootstrap without values, and for values of many windows at once."""
    valued = config.baseline == VALUE
    rule = f"gae_lambda must be left out with baseline {config.baseline}: baseline {VALUE} has it"
    require(valued or config.gae_lambda is None, rule, config.gae_lambda)
    rule = "gae_lambda goes with windows, whose end has a value: with weights of lags it must be left out"
    weighted = config.policy_class != AUTO and isinstance(config.chosen_class(), LagWeights)
    require(not weighted or config.gae_lambda is None, rule, config.gae_lambda)
    rule = f"baseline must be another than {VALUE} with policy_class auto or signals, which are of single rewards"
    require(not (valued and config.measures), rule, config.baseline)


def _check_gradients(config: TrainConfig) -> None:
    """ValueError for a term without a gradient to speak of, and for steps that nothing corrects."""
    rule = "kl_estimator must be another than k1 with kl_coef: as a loss its expected gradient is 0 (k2 is KL(pi, ref))"
    require(not (config.kl_coef and config.kl_estimator == "k1"), rule, config.kl_estimator)
    moved = config.num_iterations > 1 and config.loss_type == "reinforce" and not config.data
    rule = "num_iterations must be 1 with loss_type reinforce, which does not correct for the weights that have moved"
    require(not moved, f"{rule} (ppo, cispo, ... do)", config.num_iterations)


def _check_teacher(config: TrainConfig) -> None:
    """ValueError for a number of the divergence that nothing uses."""
    for name in () if config.teacher else OF_TEACHER:
        value, usual = getattr(config, name), getattr(type(config), name)
        require(value == usual, f"{name} must be {'left out' if usual is None else usual} without teacher", value)
    beta, of = config.distill_beta, config.distill_divergence
    rule = f"distill_beta must be left out with distill_divergence {of}: jsd has it"
    require(beta is None or of == "jsd", rule, beta)


def _check_kept_sets(config: TrainConfig) -> None:
    """ValueError for kept sets of a sampler that has spoken long ago, and beside what speaks of the whole
    vocabulary."""
    if config.top_k or config.top_p < 1:
        whole = "it speaks of the whole vocabulary"
        soft_q = config.loss_type == SOFT_Q
        for what, there, why in (
            ("data", config.data, "kept sets come with new answers, and logged ones have none"),
            ("teacher", config.teacher, whole),
            ("loss_type soft_q", soft_q, whole),
        ):
            require(not there, f"top_p must be 1 and top_k 0 with {what} ({why})", (config.top_p, config.top_k))


def _check_imitation(config: TrainConfig) -> None:
    """ValueError for imitation of nothing, and for a setting that it does not use."""
    require(config.imitate or not config.imitate_td, "imitate_td must be 0 without imitate", config.imitate_td)
    if config.imitate:
        require(bool(config.data), "imitate goes with data, the demonstrations", config.data)
        usual = type(config)
        used = {"policy_class": (usual.policy_class, "greedy"), "gamma": (usual.gamma,), "baseline": ("none",)}
        used |= {"loss_type": ("reinforce",), "nll_coef": (0.0,), "num_iterations": (1,)}
        for name, allowed in used.items():
            value = getattr(config, name)
            require(value in allowed, f"{name} must be {allowed[0]} with imitate, which does not use it", value)


def _check_of_turns(config: TrainConfig) -> None:
    """ValueError for a setting that a loss of whole turns does not use, and for its own without it."""
    for loss_type, (own, _) in OF_TURNS.items():
        for name in own if loss_type != config.loss_type else ():
            value, usual = getattr(config, name), getattr(type(config), name)
            why = ": another loss would take an older policy's dialogues for its own" if name == "replay" else ""
            require(value == usual, f"{name} must be {usual} without loss_type {loss_type}{why}", value)
    if not config.of_turns:
        return
    of_it = "with imitate_td" if config.imitate_td else f"with loss_type {config.loss_type}"
    alone = config.loss_type == SOFT_Q and config.data  # no groups are drawn for what compares none
    require_one_of(f"baseline {of_it}", config.baseline, ("none",) if alone else ("none", "leave_one_out"))
    if config.loss_type == SOFT_Q:
        auto = config.policy_class == AUTO
        require(
            not auto, f"policy_class must be one class {of_it}: auto looks at policy gradients", config.policy_class
        )
        rule = f"policy_class must be a window of turns {of_it} (greedy, lookahead, segment, full)"
        require(auto or config.chosen_class().is_window, rule, config.policy_class)
        require(not config.signals, f"signals must be off {of_it}: they are those of policy gradients", config.signals)
        again = "with data, whose dialogues are drawn again anyway"
        require(not (config.data and config.replay), f"replay must be 0 {again}", config.replay)
    for name in ("reduction", *sorted({*LOSS_SETTINGS, "nll_coef", "teacher"} - {"loss_type", "temperature"})):
        value, usual = getattr(config, name), getattr(type(config), name)
        allowed = "left out" if usual is None else usual
        require(value == usual, f"{name} must be {allowed} {of_it}, which does not use it", value)


def as_json_text(value: object) -> str:
    """A setting that is an object as its JSON text; what JSON does not know as its own text, which no check takes."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError):
        return str(value)


def _require_object(name: str, text: str) -> None:
    try:
        right = not text or isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        right = False
    require(right, f"{name} must be a JSON object", text[:200])


def _require_date(name: str, value: str) -> None:
    try:
        right = not value or datetime.date.fromisoformat(value).isoformat() == value
    except ValueError:
        right = False
    require(right, f"{name} must be a date, YYYY-MM-DD", value)


def _require_int(name: str, value: object, low: int, high: int) -> None:
    right = isinstance(value, int) and not isinstance(value, bool)
    require(right and value >= low, f"{name} must be an integer >= {low}", value)  # type: ignore[operator]
    require(value <= high, f"{name} must be an integer <= {high}", value)  # type: ignore[operator]


def _require_pattern(name: str, text: str) -> None:
    try:
        re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{name} must be a regular expression ({error}), got {text!r}") from error
