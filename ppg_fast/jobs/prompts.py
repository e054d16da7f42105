"""On-policy on the user's own prompts: rollouts with a partner, rewards for whole transcripts, evaluation on prompts
kept apart."""

import hashlib
import random
import shlex
import subprocess
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ppg_fast.config import TrainConfig
from ppg_fast.dialogues.chat_format import make_byte_tokenizer
from ppg_fast.dialogues.packing import Sample
from ppg_fast.dialogues.prompts import Prompt, read_prompts
from ppg_fast.distributed import Ranks
from ppg_fast.jobs.endpoints import make_endpoint, partner_of, rewards_of_new_answers
from ppg_fast.jobs.policy import Policy
from ppg_fast.jobs.resume import ResumableRun
from ppg_fast.jobs.run_folder import Progress, RunFolder
from ppg_fast.jobs.samples import SHOWN
from ppg_fast.rewards import Scores, score
from ppg_fast.rollouts.generation import EndpointSampler
from ppg_fast.rollouts.partner import Conversation, LoggedPartner, step_all
from ppg_fast.rollouts.rollout import Rollout
from ppg_fast.spec import require
from ppg_fast.training.evaluation import of_rollouts
from ppg_fast.training.objective import warn_if_hardly_credited

REFRESH_FOLDER = "sampler"  # weights for an endpoint that samples


class PromptsJob:
    """Train on prompts; evaluate on a part of them kept apart (at most a fifth, none of fewer than five)."""

    def __init__(self, config: TrainConfig, ranks: Ranks | None = None) -> None:
        self.config = config
        prompts = read_prompts(str(config.prompts), config.strict)
        contents = [m.content for p in prompts for m in (*p.messages, *p.logged)]
        self.policy = Policy(config, lambda: make_byte_tokenizer(contents, config.vocab_size), ranks)
        self.objective, policy = self.policy.objective(), self.policy
        self.rewards = rewards_of_new_answers(config, policy.model.device)
        require(
            config.partner != "self" or not policy.ranks.sharded,
            "partner self goes with whole models (parallel ddp)",
            "fsdp2",
        )
        self.partner = partner_of(config, policy.model, policy.chat)
        self.sampler = self._make_sampler()
        self.prompts = self._readable(prompts)
        order = list(range(len(self.prompts)))
        policy.rng.shuffle(order)
        apart = min(config.eval_dialogues, len(order) // 5)
        self.held_out, self.seen = ([self.prompts[i] for i in part] for part in (order[:apart], order[apart:]))
        self.run: ResumableRun | None = None
        self.last: list[Sample] = []  # of the step under way
        self.warned = False

    @property
    def data_digest(self) -> str:
        """A checksum of the prompts as the policy reads them."""
        total = hashlib.sha256()
        for prompt in self.prompts:
            total.update(
                repr((prompt.id, prompt.partner, prompt.logged, self.policy.chat.opening(prompt.messages))).encode()
            )
        return total.hexdigest()

    def train(self, run: ResumableRun, progress: Progress) -> None:
        """Climb the windowed return."""
        config, self.run = self.config, run
        names = " + ".join(f"{r.weight:g}*{r.name}@{r.scope}" for r in self.rewards)
        progress.say(
            f"{len(self.seen)} prompts to train on, {len(self.held_out)} held out; partner {config.partner}; "
            f"reward {names}"
        )
        if not run.of_phase("eval"):
            self.evaluate(run, progress, 0, "before")
        with progress.phase(config.policy_class, config.max_steps) as phase:
            for metrics in run.climb("train", self.rollouts, self.objective, self.policy.schedule()):
                phase.show(metrics, "reward")
                if metrics["step"] % config.eval_every == 0 and metrics["step"] < config.max_steps:
                    run.log_samples("train", metrics["step"], self.last, self.policy.chat, self.objective)
                    self.evaluate(run, progress, metrics["step"])

    def rollouts(self, step: int) -> list[Sample]:
        """Groups of rollouts of the policy as it is now, paid; what they were like goes to the metrics as phase
        rollout."""
        config, policy, start = self.config, self.policy, time.perf_counter()
        if self.sampler and config.sampler_refresh:
            state = policy.ranks.full_state(policy.model)
            policy.ranks.run_on_main(lambda: self._refresh(str(config.sampler_refresh), state))
        seeds = prompt_seeds(step, config.num_prompts, len(self.seen), config.seed)
        make = lambda: self._conversation(self.seen)  # noqa: E731
        mine = policy.ranks.part(len(seeds) * config.num_generations)
        settings = {"step_all": step_all, "sampler": self.sampler, "only": mine}
        rollouts = policy.roll_out(make, seeds, config.num_generations, policy.generator, **settings)
        scores = Scores.together(policy.ranks.run_on_all(lambda: self._pay(rollouts)))
        self.last = samples = policy.of_all(rollouts)
        if step == 1:
            warn_if_hardly_credited(samples, self.objective)
        if self.run:
            self.run.log(
                "rollout",
                {"step": step, **scores.describe(), "rollout_time": time.perf_counter() - start, **self._usage()},
            )
        return samples

    def evaluate(self, run: RunFolder, progress: Progress, step: int, when: str = "") -> None:
        """Mean return on the prompts kept apart, answered by the model in this process, with the same noise every
        time."""
        prompts, name = (
            (self.held_out, "held-out") if self.held_out else (self.seen[: self.config.eval_dialogues], "training")
        )
        generator = self.policy.sampling_generator(0)
        ranks, make = self.policy.ranks, lambda: self._conversation(prompts)
        only = None if ranks.is_main else range(0)  # one rank asks partners and judges, and tells the others
        rollouts = self.policy.roll_out(make, range(len(prompts)), 1, generator, step_all=step_all, only=only)
        metrics = ranks.run_on_main(lambda: self._measure(rollouts))
        run.log("eval", {"step": step, **metrics})
        run.log_samples("eval", step, [r.sample for r in rollouts], self.policy.chat, self.objective)
        progress.say(
            f"{name} prompts after step {step}: return {metrics['eval/reward']:.3f} over "
            f"{metrics['eval/turns/mean_count']:.1f} turns"
        )
        if when:
            run.write_samples(
                when,
                rollouts[:SHOWN],
                f"{name.capitalize()} prompts, step {step}, temperature {self.config.temperature}.",
            )

    def _measure(self, rollouts: Sequence[Rollout]) -> dict[str, float]:
        """What the rollouts earn, and each reward's own values."""
        parts = {f"eval/{name}": value for name, value in self._pay(rollouts).describe().items()}
        return {**of_rollouts([r.sample for r in rollouts], self.objective), **parts}

    def finish(self, run: RunFolder, progress: Progress) -> dict[str, Any]:
        """The last evaluation and the curve; start and end for the summary."""
        self.evaluate(run, progress, run.steps, "after")
        run.draw_curve("reward", "eval/reward", f"Own prompts, {self.config.policy_class}", "mean return per dialogue")
        return run.start_and_end("eval/reward")

    def _conversation(self, prompts: Sequence[Prompt]) -> Conversation:
        config, clean = self.config, self.policy.chat.without_special
        return Conversation(prompts, self.partner, config.max_turns, config.stop_phrase, clean)

    def _pay(self, rollouts: Sequence[Rollout]) -> Scores:
        """Give every turn its reward, 0 where none could be had. ValueError where no turn of any dialogue has one."""
        conversations = [r.environment for r in rollouts if isinstance(r.environment, Conversation)]
        scores = score(self.rewards, [c.transcript() for c in conversations])
        turns = sum(map(len, scores.totals))
        if turns and scores.unscored == turns:
            raise ValueError(
                f"no turn of {len(rollouts)} dialogues could be scored by {', '.join(r.name for r in self.rewards)}"
            )
        if scores.unscored and not self.warned:
            self.warned = True
            seen = f"{scores.unscored} of {turns} turns could not be scored"
            warnings.warn(
                f"{seen}; they count as reward 0, and rewards/unscored in the metrics counts them", stacklevel=2
            )
        for rollout, row in zip(rollouts, scores.totals, strict=True):
            rollout.sample.rewards = [value or 0.0 for value in row]
        return scores

    def _make_sampler(self) -> EndpointSampler | None:
        """The endpoint that generates rollouts. ValueError where its log-probs or its weights would not be the
        policy's."""
        config = self.config
        if not config.sampler:
            return None
        if config.temperature != 1.0:
            raise ValueError(
                "a sampler endpoint wants temperature 1, where all servers mean the same by a log-prob, got "
                f"{config.temperature}"
            )
        if not config.sampler_refresh and not config.importance_cap:
            rule = (
                "a sampler endpoint that keeps its first weights wants importance_cap > 0 (or sampler_refresh, "
                "which reloads them)"
            )
            raise ValueError(f"{rule}, got {config.importance_cap}")
        return EndpointSampler(make_endpoint(config, "sampler"), self.policy.chat.end_id)

    def _refresh(self, command: str, state: dict[str, Any] | None) -> None:
        """Write the weights and have the sampler's server load them. OSError with what the command said where it
        fails."""
        folder = Path(self.config.output_dir, REFRESH_FOLDER).absolute()
        self.policy.model.save_pretrained(folder, state_dict=state)
        self.policy.tokenizer.save_pretrained(folder)
        arguments = [part.replace("{folder}", str(folder)) for part in shlex.split(command)]
        done = subprocess.run(arguments, capture_output=True, text=True, check=False)
        if done.returncode:
            raise OSError(
                f"sampler_refresh {command!r} failed with status {done.returncode}: "
                f"{(done.stderr or done.stdout).strip()[-300:]}"
            )

    def _readable(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The prompts that the policy can read and answer; the others are a warning each, an error if ``strict``, as
        are all of them."""
        config, kept = self.config, []
        limit = config.max_dialogue_tokens or getattr(
            self.policy.model.config.get_text_config(), "max_position_embeddings", None
        )
        for prompt in prompts:
            try:
                length = len(self.policy.chat.opening(prompt.messages))
                require(
                    not limit or length < limit,
                    f"an opening must be shorter than the {limit} tokens of a dialogue",
                    length,
                )
                kept.append(prompt)
            except ValueError as error:  # noqa: PERF203 (the good ones are kept)
                if config.strict:
                    raise ValueError(f"prompt {prompt.id!r}: {error}") from error
                warnings.warn(f"prompt {prompt.id!r}: {error}; left out", stacklevel=3)
        if not kept:
            raise ValueError(f"none of {len(prompts)} prompts can be written in the tokenizer's chat format")
        if isinstance(self.partner, LoggedPartner) and config.max_turns > 1 and not any(p.logged for p in kept):
            text = (
                "no prompt has a log to follow, so every dialogue has one turn; --partner names a partner that answers"
            )
            warnings.warn(text, stacklevel=3)
        return kept

    def _usage(self) -> dict[str, int]:
        """Requests and retries so far of the endpoints in use."""
        roles = {"partner": self.partner, "sampler": self.sampler, **{r.name: r.scorer for r in self.rewards}}
        used = {role: getattr(one, "endpoint", None) for role, one in roles.items()}
        return {f"endpoint/{role}/{k}": v for role, e in used.items() if e for k, v in vars(e.usage).items()}


def prompt_seeds(step: int, count: int, prompts: int, seed: int) -> list[int]:
    """The prompts of ``step`` (from 1), as seeds of `Conversation`: epoch * prompts + index, each epoch in an order of
    its own.

    A function of the step, so a resumed run goes on where it was; every prompt comes once an epoch.
    """
    places = [divmod(place, prompts) for place in range((step - 1) * count, step * count)]
    orders = {epoch: random.Random(f"{seed} {epoch}").sample(range(prompts), prompts) for epoch, _ in places}
    return [epoch * prompts + orders[epoch][position] for epoch, position in places]
