"""The configuration of `ppg-fast train`: everything that decides a run, checked."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from ppg_fast.config.checks import as_json_text, check_each, check_together
from ppg_fast.config.defaults import AUTO, LOSS_SETTINGS, OF_TURNS, SOFT_Q, TRACKERS, TURN_REGRESSION
from ppg_fast.losses import KL_ESTIMATORS, LOSS_TYPES, PRESETS
from ppg_fast.policy_classes import FullPlanning, PolicyClass, policy_class
from ppg_fast.spec import BASELINES, DIVERGENCES, MAX_LOG_RATIO, VALUE, PolicyLossSpec, require, require_one_of

OF_PRESET: Any = None  # a loss_type once the config is made


def _option(default: Any, help: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run: on-policy in the persona interview, offline with ``data``, on-policy on openings
    with ``prompts``."""

    output_dir: str = _option("runs/persona", "folder of the run; one that holds a run is an error")
    overwrite: bool = _option(False, "replace the run that output_dir holds")
    data: str | None = _option(None, "logged dialogues (formats: docs/data.md): train offline on them")
    strict: bool = _option(False, "a bad line of data is an error instead of a warning")
    allow_negative_rewards: bool = _option(False, "train offline although negative weights void the lower bound")
    imitate: bool = _option(False, "data are demonstrations: every answer counts 1, whatever rewards they have")
    imitate_td: float = _option(0.0, "imitate: weight of a turn's squared soft Q residual without rewards, 0: off")
    model: str | None = _option(None, "Hugging Face checkpoint folder; default: a small Qwen3 made on the spot")
    width: int = _option(128, "hidden size of the model made on the spot")
    layers: int = _option(2, "its layers")
    vocab_size: int = _option(1024, "vocabulary of the byte-level tokenizer made from data")
    template_date: str = _option("", "YYYY-MM-DD: the date a chat template may write; default: the run's first day")
    chat_template: str = _option("", "in place of the tokenizer's own: a file, or chatml, gemma, llama3, phi, qwen3")
    chat_template_kwargs: str = _option(
        "", 'what the chat template is told in every rendering, JSON: {"enable_thinking": false}'
    )
    device: str = _option("auto", "auto (CUDA if there is one), cpu, cuda, cuda:1, ...")
    dtype: str = _option("float32", "float32 or bfloat16 weights")
    bf16: bool = _option(False, "compute in bfloat16 on the weights as they are; also where accelerate launch says so")
    logits_dtype: str = _option("", "float32: logits of bfloat16 passes in float32; default: what the device does best")
    lora_rank: int = _option(0, "train low-rank adapters of this rank and freeze the rest, 0: off; wants --model")
    lora_alpha: int = _option(0, "the adapters are scaled by lora_alpha / lora_rank, 0: twice the rank")
    lora_dropout: float = _option(0.0, "of the adapters' input")
    lora_target_modules: str = _option(
        "all-linear", "layers that get one: all-linear (but the head), names with commas, or one regular expression"
    )
    freeze: str = _option(
        "", "weights that do not train: head, embeddings, or regular expressions of their names, with commas"
    )
    activation_checkpointing: bool = _option(
        False, "keep each layer's input only and compute the rest again in the backward pass"
    )
    activation_checkpointing_every_n_layers: int = _option(1, "only every so many layers")
    activation_offload: bool = _option(False, "keep these inputs in host memory")
    parallel: str = _option("auto", "several ranks: ddp, fsdp2; auto: as accelerate launch says, else ddp")
    sync_each_batch: bool = _option(
        False, "fsdp2: reduce gradients after every pass instead of once a step; less memory, more traffic"
    )
    rank_timeout: int = _option(1800, "seconds that ranks wait for one that does not answer")
    threads: int = _option(0, "CPU threads of PyTorch, 0: one for the model made on the spot, else its default")
    seed: int = _option(0, "of weights, dialogues and sampling")

    policy_class: str = _option(
        "lookahead:3",
        "future rewards a turn is credited for: greedy, lookahead:K, segment:LENGTH, full, lags:W0,W1,... (a weight a "
        "lag), auto (weights found while training); supervised fine-tuning is --imitate",
    )
    signals: bool = _option(False, "log the weights that auto would have, whatever class trains")
    gamma: float = _option(1.0, "discount inside the window")
    baseline: str = _option(
        "leave_one_out",
        f"subtracted from the windowed return at the same turn: {', '.join((*BASELINES, VALUE))} (docs/values.md)",
    )
    gae_lambda: float | None = _option(
        None, "baseline value: bootstrap beyond the window, 1: from its end, below: GAE; default: none"
    )
    preset: str | None = _option(
        None, f"numbers of a loss that people train with, which other flags change: {', '.join(PRESETS)}"
    )
    loss_type: str = _option(
        OF_PRESET,
        f"{', '.join((*LOSS_TYPES, *OF_TURNS))} (docs/losses.md); default: the preset's, else reinforce",
    )
    eta: float = _option(1.0, "how far turn_regression lets the policy move: old exp(eta return) is its optimum")
    beta: float = _option(0.1, "soft_q: reward that a nat of distance to the weights at the start costs")
    max_residual: float = _option(0.0, "soft_q: nats of a residual beyond which it pulls no harder, 0: no bound")
    cql_coef: float = _option(0.0, "soft_q: weight of the negative log-likelihood of what was said, conservative")
    replay: int = _option(0, "soft_q: steps whose dialogues are drawn again, as many as are new, 0: none")
    reduction: str = _option("sequence_sum", "of token losses; sequence_sum is the exact gradient")
    num_iterations: int = _option(1, "updates on each batch; more than 1 wants a clipped loss_type")
    clip_low: float | None = _option(
        None, "lower bound of the ratio, 1 - clip_low, or of the gate; default: the loss's"
    )
    clip_high: float | None = _option(
        None, "upper bound of the ratio, 1 + clip_high, or of the gate; default: the loss's"
    )
    dual_clip: float | None = _option(
        None, "ppo, gspo: most that a ratio counts where the advantage is negative, 0: off"
    )
    ratio_cap: float | None = _option(None, "dppo: most that a ratio counts, 0: off; default: the preset's, else off")
    tau_positive: float | None = _option(None, "sapo: how fast the weight fades, positive advantages; default: 1.0")
    tau_negative: float | None = _option(None, "sapo: how fast the weight fades, negative advantages; default: 1.05")
    k_positive: float | None = _option(None, "vespo: rise of the weight, positive advantages; default: 2.0")
    lambda_positive: float | None = _option(None, "vespo: its fall, positive advantages; default: 3.0")
    k_negative: float | None = _option(None, "vespo: rise of the weight, negative advantages; default: 3.0")
    lambda_negative: float | None = _option(None, "vespo: its fall, negative advantages; default: 2.0")
    ratio_reduction: str = _option("mean", "gspo: ratios of a sequence or turn by the mean or sum of the log ratios")
    opsm_delta: float = _option(0.0, "drops sequences with A < 0 further off-policy than this, nats a token, 0: off")
    log_ratio_coef: float | None = _option(None, "weight of the squared log ratio; default: the preset's, else 0")
    z_coef: float = _option(0.0, "weight of the squared log-sum-exp of the logits (z-loss)")
    kl_coef: float = _option(0.0, "weight of the KL divergence to the weights at the start of this phase")
    kl_estimator: str = _option("k3", f"{', '.join(KL_ESTIMATORS)}; as losses: k2 of KL(pi, ref), k3 of KL(ref, pi)")
    kl_cap: float = _option(0.0, "most that its estimate counts, without a gradient beyond, 0: off")
    entropy_coef: float = _option(0.0, "weight of the entropy bonus")
    nll_coef: float = _option(0.0, "weight of the mean likelihood loss of turns whose return is positive (VAPO)")
    token_share: float = _option(
        1.0, "share of each answer's tokens that is trained, the most uncertain ones; the denominator is that of all"
    )
    importance_cap: float = _option(0.0, "truncated importance weight against the sampler, 0: off")
    importance_floor: float = _option(0.0, "its lower bound")
    importance_mode: str = _option("truncate", "truncate: kept within its bounds; mask: 0 outside of them")
    max_log_ratio: float = _option(MAX_LOG_RATIO, "most that a log ratio counts where it is exponentiated, nats")
    nan_rollout: str = _option(
        "keep",
        "a token that a sampler endpoint tells no log-prob of; keep, error: refused; one: weight 1; drop: masked",
    )
    teacher: str | None = _option(
        None,
        "checkpoint folder of a frozen teacher: its divergence joins the loss of each token (docs/distillation.md)",
    )
    distill_coef: float = _option(1.0, "weight of that divergence")
    distill_divergence: str = _option("forward_kl", ", ".join(DIVERGENCES))
    distill_beta: float | None = _option(None, "the teacher's share in the mixture of jsd; default: 0.5")
    distill_top_k: int = _option(
        0, "tell the teacher's k likeliest tokens apart, all others are one outcome; 0: all are"
    )

    max_steps: int = _option(80, "policy-gradient steps")
    num_prompts: int = _option(8, "dialogue openings a step on-policy; dialogues a step offline")
    num_generations: int = _option(8, "rollouts of each opening (the group of the baseline)")
    max_new_tokens: int = _option(6, "tokens of an answer")
    max_turns: int = _option(64, "turns of a dialogue")
    temperature: float = _option(1.0, "of sampling and of the trained policy")
    top_p: float = _option(1.0, "sample from, and train over, the likeliest tokens that hold this probability; 1: all")
    top_k: int = _option(0, "likewise from this many tokens at most; 0: all")
    learning_rate: float = _option(1e-3, "peak of the optimiser's")
    warmup_steps: int = _option(5, "steps to the peak; then linear decay")
    final_learning_rate: float = _option(0.2, "share of the peak at the last step")
    weight_decay: float = _option(0.0, "of the optimiser")
    optim: str = _option(
        "adamw_torch",
        "optimiser, by the names of transformers (adamw_torch_8bit, paged_adamw_8bit, adafactor, ...) or muon",
    )
    optim_args: str = _option("", "further numbers of it, key=value,...")
    adam_beta1: float = _option(0.9, "of Adam's kin")
    adam_beta2: float = _option(0.95, "of Adam's kin")
    optim_offload: bool = _option(False, "keep its state in host memory and take its step there")
    max_grad_norm: float = _option(1.0, "gradients are scaled down to this norm")
    max_tokens: int = _option(16384, "token budget of one forward pass; gradients accumulate over passes")
    max_skipped_steps: int = _option(3, "steps in a row that are skipped, not finite; one more ends the run")
    max_dialogue_tokens: int = _option(
        0, "a dialogue is generated up to this, offline read up to it (its rewards stay whole); 0: no bound"
    )

    imitation_steps: int = _option(400, "warm start: steps that imitate scripted, imperfect answers (on-policy only)")
    imitation_batch: int = _option(16, "dialogues a step of it")
    imitation_learning_rate: float = _option(2e-3, "peak of the optimiser's during it")
    teacher_skill: float = _option(0.5, "how often the script is right")

    prompts: str | None = _option(None, "openings of dialogues (JSONL, docs/data.md): train on-policy on them")
    partner: str = _option(
        "logged", "who answers the policy: logged, none, self (the weights at the start), or the URL of an endpoint"
    )
    partner_model: str | None = _option(None, "model of that endpoint; default: the first it lists")
    partner_key: str | None = _option(None, "where its API key is: env:NAME or file:PATH")
    partner_prompt: str | None = _option(
        None, "text file: what a partner that is a model is told to be; default: a user"
    )
    partner_tokens: int = _option(256, "tokens of its reply")
    partner_temperature: float = _option(1.0, "of its sampling")
    stop_phrase: str = _option("", "a reply that holds it ends the dialogue")
    tools: str | None = _option(
        None,
        "functions that the policy may call: file.py, file.py:name,name, or a class of environments (docs/tools.md)",
    )
    max_tool_calls: int = _option(16, "calls of a dialogue; an answer that calls once more ends it")
    reward: str | None = _option(
        None,
        "[WEIGHT*]WHAT[@turn|@dialogue] + ...: file.py:function, model:FOLDER, logratio:MODEL,BASE, "
        "inverse_soft_q:MODEL,BASE, judge[:RUBRIC], ratings:FILE, human:RUN/ratings (docs/rate.md)",
    )
    reward_model: str | None = _option(None, "reward human: folder of a language or reward model, refitted to ratings")
    human_every: int = _option(20, "reward human: steps between two fits of reward_model to all ratings so far")
    human_steps: int = _option(100, "most steps of a fit; it ends where ratings held out say so")
    human_learning_rate: float = _option(1e-5, "peak of the optimiser's during a fit")
    judge: str | None = _option(None, "URL of the endpoint that judges")
    judge_model: str | None = _option(None, "its model; default: the first it lists")
    judge_key: str | None = _option(None, "where its API key is: env:NAME or file:PATH")
    judge_range: str = _option("0:10", "LOW:HIGH of its scores, which become rewards from 0 to 1")
    judge_retries: int = _option(
        2, "times it is asked again for a score that cannot be read; then the turn stays unscored"
    )
    judge_tokens: int = _option(512, "tokens of its reply, thoughts included; a reply that was cut counts as unread")
    sampler: str | None = _option(
        None, "URL of a vLLM, SGLang or llama.cpp endpoint that generates the rollouts; default: the model itself"
    )
    sampler_model: str | None = _option(None, "its model; default: the first it lists")
    sampler_key: str | None = _option(None, "where its API key is: env:NAME or file:PATH")
    sampler_refresh: str | None = _option(
        None, "command that makes it load the weights in {folder}, run before each step's rollouts"
    )
    timeout: float = _option(300.0, "seconds without an answer after which an endpoint is asked again")
    retries: int = _option(4, "times that an endpoint is asked again")
    concurrency: int = _option(16, "requests to an endpoint at a time")
    rollout_batch: int = _option(64, "dialogues generated at once: memory and speed only")

    eval_every: int = _option(10, "steps between evaluations on held-out dialogues")
    eval_dialogues: int = _option(64, "held-out dialogues")
    save_every: int = _option(
        20, "steps of any phase between checkpoints for --resume, 0: at its end only (and when stopped)"
    )
    keep_checkpoints: int = _option(2, "checkpoints kept; from 2 on, a damaged newest one costs the steps since then")
    keep_rollouts: int = _option(
        0, "dialogues of each step that are written to rollouts/, for `ppg-fast rate` (docs/rate.md), 0: none"
    )
    progress: bool = _option(True, "progress bar where there is a terminal")

    report_to: str = _option(
        "none", f"trackers besides the run's own folder, comma-separated: {', '.join(TRACKERS)}; or none"
    )
    project: str = _option("ppg_fast", "the trackers' project")
    run_name: str | None = _option(None, "the trackers' name of the run; default: the name of output_dir")
    report_offline: bool = _option(False, "wandb keeps the run on disk, for `wandb sync`; the others are local anyway")
    push_to_hub: str | None = _option(None, "Hugging Face repository (user/name) that takes checkpoint/ at the end")
    hub_private: bool = _option(False, "make that repository private where it does not exist yet")

    def __post_init__(self) -> None:
        """ValueError with the rule and the value."""
        if not isinstance(self.chat_template_kwargs, str):  # a mapping of a YAML file, or of Python
            object.__setattr__(self, "chat_template_kwargs", as_json_text(self.chat_template_kwargs))
        check_each(self)
        if self.policy_class != AUTO:
            object.__setattr__(self, "policy_class", str(self.chosen_class()))  # as it prints everywhere
        if self.loss_type is OF_PRESET:
            object.__setattr__(self, "loss_type", self._of_preset().get("loss_type", "reinforce"))
        check_together(self)
        self.loss_spec()

    @property
    def trackers(self) -> list[str]:
        """The trackers that ``report_to`` names, each once."""
        names = [name.strip() for name in self.report_to.split(",")]
        return [name for name in dict.fromkeys(names) if name not in ("", "none")]

    @property
    def regresses(self) -> bool:
        """Whether the loss is a regression on turns."""
        return self.loss_type == TURN_REGRESSION

    @property
    def of_turns(self) -> bool:
        """Whether the loss is one of whole turns: for rewards of both signs, with numbers of its own."""
        return self.loss_type in OF_TURNS or self.imitate_td > 0

    @property
    def keeps_start(self) -> bool:
        """Whether the weights at the start are compared with, and so kept."""
        soft_q = self.loss_type == SOFT_Q or self.imitate_td > 0
        return self.kl_coef != 0 or soft_q or (self.regresses and self.data is not None)

    def chosen_class(self) -> PolicyClass:
        """The policy class of the first step: full planning with auto."""
        return FullPlanning() if self.policy_class == AUTO else policy_class(self.policy_class)

    @property
    def measures(self) -> bool:
        """Whether a step measures which turns move which rewards: what auto learns from, and ``signals`` logs."""
        return self.policy_class == AUTO or self.signals

    def _of_preset(self) -> dict[str, Any]:
        """The numbers of the preset; none without one."""
        if self.preset is None:
            return {}
        require_one_of("preset", self.preset, tuple(PRESETS))
        return PRESETS[self.preset].numbers

    def loss_spec(self) -> PolicyLossSpec:
        """The policy loss: what is set, else the preset's, else the loss's own."""
        numbers = self._of_preset()
        rule = f"loss_type must be {numbers.get('loss_type')} with preset {self.preset}, or left out"
        require(self.loss_type == numbers.get("loss_type", self.loss_type), rule, self.loss_type)
        given = {name: getattr(self, name) for name in LOSS_SETTINGS}
        if self.of_turns:
            given["loss_type"] = "reinforce"  # what a step of it is
        return PolicyLossSpec(**{**numbers, **{name: value for name, value in given.items() if value is not None}})
