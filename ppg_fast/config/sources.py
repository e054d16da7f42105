"""Where a configuration comes from: defaults, a YAML file, flags. Later wins; keys are the field names, dashes and
underscores the same."""

import argparse
import dataclasses
import difflib
from collections.abc import Collection, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_type_hints

from ppg_fast.config.defaults import OFFLINE, PROMPTS, SECTIONS
from ppg_fast.config.train import TrainConfig


def make_config(*sources: Mapping[str, Any]) -> TrainConfig:
    """The config of ``sources``; later ones win, over the defaults too. ValueError for an unknown key or a wrong
    type."""
    types = get_type_hints(TrainConfig)
    given: dict[str, Any] = {}
    for source in sources:
        for key, value in source.items():
            name = str(key).replace("-", "_")
            if name not in types:
                near = difflib.get_close_matches(name, types, 1)
                raise ValueError(f"unknown setting {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
            given[name] = _converted(name, value, types[name])
    others = OFFLINE if given.get("data") else PROMPTS if given.get("prompts") else {}
    return TrainConfig(**{**others, **given})


def read_yaml(path: str) -> dict[str, Any]:
    """The settings of a YAML file, a mapping of field names to values. ValueError names the file and what is wrong with
    it."""
    import yaml

    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"config {path}: {error}") from error
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise ValueError(f"config {path} must be a mapping of settings to values, got {type(settings).__name__}")
    return settings


def write_yaml(path: Path, config: TrainConfig) -> None:
    """Write every setting, so that `read_yaml` and `make_config` give back an equal config."""
    import yaml

    path.write_text(yaml.safe_dump(dataclasses.asdict(config), sort_keys=False), encoding="utf-8")


def add_flags(parser: argparse.ArgumentParser, only: Collection[str] = ()) -> None:
    """One flag for every field, in the groups of `SECTIONS`, or for those in ``only``.

    A flag that is not given leaves no trace, so that a file's value survives.
    """
    types = get_type_hints(TrainConfig)
    group: Any = parser
    for field in dataclasses.fields(TrainConfig):
        if only and field.name not in only:
            continue
        group = parser.add_argument_group(SECTIONS[field.name]) if field.name in SECTIONS and not only else group
        default = [] if field.default is None else [str(field.default)]
        default += [
            f"with {job} {others[field.name]}"
            for job, others in (("data", OFFLINE), ("prompts", PROMPTS))
            if field.name in others
        ]
        text = field.metadata["help"].replace("%", "%%") + (f" [{'; '.join(default)}]" if default else "")
        options: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS, "help": text}
        if types[field.name] is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["metavar"] = _base_type(types[field.name]).__name__.upper()
        group.add_argument("--" + field.name.replace("_", "-"), **options)


def _base_type(hint: Any) -> type:
    return next(t for t in get_args(hint) if t is not type(None)) if isinstance(hint, UnionType) else hint


def _converted(name: str, value: Any, hint: Any) -> Any:
    """``value`` as a field's type: numbers may come as text (flags; YAML reads 1e-3 as text), nothing else is
    guessed."""
    base = _base_type(hint)
    if value is None and isinstance(hint, UnionType):
        return None
    if base is not bool and not isinstance(value, bool) and isinstance(value, (base, str, int)):
        try:
            if base is not str or isinstance(value, str):
                return base(value)
        except ValueError:
            pass
    if base is bool and isinstance(value, bool):
        return value
    raise ValueError(f"{name} must be of type {base.__name__}, got {value!r}")
