"""Where a configuration comes from: defaults, a YAML file, flags. Later wins; keys are the field names, dashes and
underscores the same."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_type_hints

from ppg_fast.config.checks import as_json_text
from ppg_fast.config.defaults import OFFLINE, PROMPTS
from ppg_fast.config.train import TrainConfig
from ppg_fast.losses import LOSS_TYPES, numbers_of
from ppg_fast.rules import did_you_mean

OBJECTS = ("chat_template_kwargs",)  # JSON as a flag, a mapping in a file
WHOLE = {"output_dir", "overwrite", "progress", "loss_type", "max_steps"}  # what only a run writes into one file
DEFAULTS = {field.name: field.default for field in dataclasses.fields(TrainConfig)}


def make_config(*sources: Mapping[str, Any]) -> TrainConfig:
    """The config of ``sources``; later ones win, over the defaults too. ValueError for an unknown key, one given twice,
    a wrong type or empty text."""
    given: dict[str, Any] = {}
    for source in sources:
        given |= _settings(source)
    others = OFFLINE if given.get("data") else PROMPTS if given.get("prompts") else {}
    return TrainConfig(**{**others, **given})


def read_yaml(path: str) -> dict[str, Any]:
    """The settings of a YAML file, a mapping of field names to values. ValueError names the file and what is wrong with
    it."""
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
        settings = yaml.load(text, Loader=_loader())
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"config {path}{line}: {error.problem or error.context}") from error
    except OSError as error:
        raise ValueError(f"config {path}: {error.strerror or error}") from error
    except RecursionError as error:
        raise ValueError(f"config {path} must be a mapping of settings to values, got one nested too deeply") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"config {path} must be UTF-8: {error.reason} at byte {error.start}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"config {path} must be YAML: {' '.join(str(error).split())}") from error
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise ValueError(f"config {path} must be a mapping of settings to values, got {type(settings).__name__}")
    if settings.keys() >= WHOLE:  # of a run: before auto estimated weights every run had candidates for it
        settings.pop("candidates", None)
    return as_now(_settings(settings, f"config {path}: "))


def as_now(settings: Mapping[str, Any]) -> dict[str, Any]:
    """``settings``, in today's words where a run wrote them whole before a loss had numbers of its own: what its loss
    did not use is left out, as is the lower bound of cispo, which had none."""
    loss_type = settings.get("loss_type")
    if "preset" in settings or loss_type not in LOSS_TYPES or not settings.keys() >= WHOLE:
        return dict(settings)
    unused = {"clip_low", "clip_high"} - numbers_of(loss_type).keys()
    unused |= {"clip_low"} if loss_type == "cispo" else set()
    return {**settings, **{name: None for name in unused if name in settings}}


def write_yaml(path: Path, config: TrainConfig) -> None:
    """Write every setting, so that `read_yaml` and `make_config` give back an equal config."""
    import yaml

    path.write_text(yaml.safe_dump(dataclasses.asdict(config), sort_keys=False), encoding="utf-8")


def base_type(hint: Any) -> type:
    """The type of a setting that may be None too."""
    return next(t for t in get_args(hint) if t is not type(None)) if isinstance(hint, UnionType) else hint


def _loader() -> Any:
    """PyYAML's safe loader, but a key that comes twice and a value that is not of its type are errors."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen = set()
            for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
                if isinstance(key, yaml.ScalarNode) and key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"setting {key.value!r} is given twice", key.start_mark
                    )
                seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
            return super().construct_mapping(node, deep)

        def construct_object(self, node: Any, deep: bool = False) -> Any:
            try:
                return super().construct_object(node, deep)
            except (ValueError, LookupError, AttributeError, TypeError, OverflowError) as error:  # of PyYAML itself
                rule = f"a {node.tag.rpartition(':')[2]} must be one, got {shown(node.value)}"
                raise yaml.constructor.ConstructorError(None, None, rule, node.start_mark) from error

    return Loader


def _settings(source: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """``source`` by field name, as the fields' types; ``where`` begins the messages."""
    types = get_type_hints(TrainConfig)
    given: dict[str, Any] = {}
    for key, value in source.items():
        name = str(key).replace("-", "_")
        if name not in types:
            raise ValueError(f"{where}unknown setting {shown(key)}{did_you_mean(name, types)}")
        if name in given:
            raise ValueError(f"{where}setting {name!r} is given twice")
        given[name] = _converted(name, value, types[name], where)
    return given


def _converted(name: str, value: Any, hint: Any, where: str) -> Any:
    """``value`` as a field's type: numbers may come as text (flags; YAML reads 1e-3 as text), nothing else is
    guessed."""
    base = base_type(hint)
    if name in OBJECTS and isinstance(value, Mapping):
        return as_json_text(value)
    if value is None and isinstance(hint, UnionType):
        return None
    usual = DEFAULTS[name]
    if (base is str or usual is None) and isinstance(value, str) and not value.strip() and usual != "":
        default = "" if usual is None else f" ({usual})"
        raise ValueError(f"{where}{name} must not be empty: leave it out for its default{default}")
    if base is not bool and not isinstance(value, bool) and isinstance(value, (base, str, int)) and not _endless(value):
        try:
            if base is not str or isinstance(value, str):
                return base(value)
        except (ValueError, OverflowError):
            pass
    if base is bool and isinstance(value, bool):
        return value
    raise ValueError(f"{where}{name} must be of type {base.__name__}, got {shown(value)}")


def shown(value: Any) -> str:
    """``repr``, cut where it is long, also of a number that Python does not print."""
    if _endless(value):
        return f"a number of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _endless(value: Any) -> bool:
    """Whether ``value`` is an integer that Python may refuse to print."""
    return isinstance(value, int) and value.bit_length() > 1024
