"""What a config reads: where it lies, and a checksum of what is in it."""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from modulefinder import ModuleFinder
from pathlib import Path
from typing import Any

from ppg_fast.config import TrainConfig
from ppg_fast.dialogues.template_choice import template_text
from ppg_fast.jobs.log_ratio import LogRatio
from ppg_fast.rewards import Judge, PythonReward, Reward, RewardModel
from ppg_fast.rewards.formula import OF_TWO_MODELS, TERM, split_terms
from ppg_fast.rewards.judge import TASK
from ppg_fast.rollouts.tools.functions import split_place

PATHS = ("data", "prompts", "model", "teacher", "partner_prompt", "reward_model")
NAMES = ("chat_template",)  # of a file, or of something that ships
KEYS = ("partner_key", "judge_key", "sampler_key")  # env:NAME or file:PATH
FILE = "file:"


def input_paths(settings: Mapping[str, Any]) -> list[Path]:
    """Files and folders that a config's settings name."""
    named = [settings[name] for name in PATHS if settings.get(name)]
    named += [settings[name] for name in NAMES if settings.get(name) and os.path.isfile(settings[name])]
    named += [settings[name][len(FILE) :] for name in KEYS if (settings.get(name) or "").startswith(FILE)]
    named += [p for what in _sources(settings.get("reward")) for p in _split_source(what)[1].split(_between(what)) if p]
    tools = split_place(settings["tools"])[0] if settings.get("tools") else ""
    named += [tools] if tools.endswith(".py") else []
    return [Path(name) for name in named]


def with_absolute_paths(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The same settings, read alike from any folder."""
    changed = dict(settings)
    for name in PATHS:
        changed[name] = _absolute(settings[name]) if settings.get(name) else settings.get(name)
    for name in NAMES:
        if settings.get(name) and os.path.isfile(settings[name]):
            changed[name] = _absolute(settings[name])
    for name in KEYS:
        if (settings.get(name) or "").startswith(FILE):
            changed[name] = FILE + _absolute(settings[name][len(FILE) :])
    if (tools := settings.get("tools")) and (place := split_place(tools)[0]).endswith(".py"):
        changed["tools"] = _absolute(place) + tools.removeprefix(place)
    formula = settings.get("reward")
    if formula:
        terms = []
        for term, what in zip(split_terms(formula), _sources(formula), strict=True):
            before, path, after = _split_source(what)
            comma = _between(what)
            paths = comma.join(map(_absolute, path.split(comma)))
            terms.append(term.replace(what, before + paths + after) if path else term)
        whole = " + ".join(terms)
        changed["reward"] = whole if len(_sources(whole)) == len(terms) else formula  # a folder's name may hold " + "
    return changed


def reward_digest(formula: str | None, rewards: Sequence[Reward]) -> str:
    """A checksum of what decides a reward: weights, scopes, and the content of what scores.

    Of a Python function its file and the local modules that it imports, of a reward model its folder and the date
    that its template writes, of ratings the file, of a judge rubric, range, prompt and the model's name. Not where it
    lies, nor how often and how fast it is asked.
    """
    sources = _sources(formula or "judge")
    parts = [(r.weight, r.scope, *_content(what, r)) for what, r in zip(sources, rewards, strict=True)]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def model_digest(config: TrainConfig) -> str:
    """A checksum of a policy's configuration, tokenizer and template; its weights are in the checkpoint."""
    files = Path(config.model).glob("*") if config.model else ()
    read = [file for file in sorted(files) if file.suffix in (".json", ".jinja", ".model", ".txt") and file.is_file()]
    parts = [(file.name, content_digest(file)) for file in read]
    if config.chat_template or config.chat_template_kwargs:
        parts.append((_chosen(config.chat_template), config.chat_template_kwargs))
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _chosen(name: str) -> str:
    """The text of a chat template; the name of one that the tokenizer has, whose files are read anyway."""
    try:
        return template_text(name)
    except ValueError:
        return name


def partner_digest(config: TrainConfig) -> str:
    """A checksum of what a partner is told, and of the weights that it speaks with where these are the model's own."""
    told = content_digest(Path(config.partner_prompt)) if config.partner_prompt else ""
    weights = content_digest(Path(config.model)) if config.model and config.partner == "self" else ""
    return hashlib.sha256(f"{told} {weights}".encode()).hexdigest()


def tools_digest(where: str) -> str:
    """A checksum of the functions that a policy calls: their file, the local modules that it imports, their names."""
    place, names = split_place(where)
    return hashlib.sha256(repr([names, *map(content_digest, _modules(place))]).encode()).hexdigest()


def content_digest(path: Path) -> str:
    """A checksum of a file, or of all files of a folder and their names."""
    total = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
        total.update(f"{file.relative_to(path)} {file.stat().st_size}\0".encode())
        with open(file, "rb") as opened:
            while block := opened.read(1 << 20):
                total.update(block)
    return total.hexdigest()


def _content(what: str, reward: Reward) -> Iterator[object]:
    scorer = reward.scorer
    if isinstance(scorer, Judge):
        yield from ("judge", TASK, scorer.rubric, scorer.what, scorer.low, scorer.high)
        yield scorer.endpoint.model
    elif isinstance(scorer, PythonReward):
        place, _, function = what.rpartition(":")
        yield from ("python", function, *(content_digest(file) for file in _modules(place)))
    else:
        kind, _, path = what.partition(":")
        path = scorer.folder if isinstance(scorer, RewardModel) else path  # of human: the model's, not the ratings'
        yield from (kind, *(content_digest(Path(p)) for p in path.split(_between(what))))
        if isinstance(scorer, (RewardModel, LogRatio)):
            yield scorer.chat.renderer.date if isinstance(scorer, LogRatio) else scorer.renderer.date


def _modules(place: str) -> list[Path]:
    """The file of a Python module and those of the modules beside it that it imports, by their names; not what is
    installed."""
    path = Path(place) if place.endswith(".py") else None
    folders = [str(path.parent.resolve())] if path else []
    finder = ModuleFinder(path=[*folders, os.getcwd()])
    if path:
        finder.run_script(str(path))
    else:
        finder.import_hook(place)
    found = {name: getattr(module, "__file__", None) for name, module in finder.modules.items()}
    return [Path(file) for _, file in sorted(found.items()) if file and not file.endswith((".so", ".pyd"))]


def _sources(formula: str | None) -> list[str]:
    """The WHAT of each term; of what is no term, the term."""
    terms = split_terms(formula) if formula else []
    return [found["what"] if (found := TERM.fullmatch(term)) else term for term in terms]


def _split_source(what: str) -> tuple[str, str, str]:
    """Before the path, the path, after it; the path is empty where there is none."""
    kind, colon, rest = what.partition(":")
    if kind in ("judge", "model", "ratings", "human", *OF_TWO_MODELS):
        return kind + colon, rest, ""
    place, colon, function = what.rpartition(":")
    return ("", place, colon + function) if place.endswith(".py") else ("", "", what)


def _between(what: str) -> str:
    """What stands between the paths of a term; of one with a single path, what no path holds."""
    return "," if what.partition(":")[0] in OF_TWO_MODELS else "\0"


def _absolute(path: str) -> str:
    return os.path.abspath(path)
