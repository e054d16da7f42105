"""What becomes of a host's options: one table per adapter, walked by its check and shown in docs/integrations.md.

An option is obeyed, left to the host (which applies it itself, before or after our function), or refused by name. What
the table does not know is refused where it differs from the host's default, never swallowed.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any

from ppg_fast.losses import LOSS_TYPES, numbers_of
from ppg_fast.spec import BASELINES, VALUE, require, require_one_of

_ABSENT = object()
RUN = "the run"  # the part of options that have no effect on the loss of a batch
OFF = (None, False, 0, "", (), [], {})  # values with which an option of unknown default asks for nothing


@dataclass(frozen=True)
class Option:
    """One row of a table: options of a host with the same fate.

    ``names``: separated by spaces, dotted where the host nests them. ``part``: which of our functions they concern.
    ``fate``: obeyed, the host's, or refused. ``note``: as what it is obeyed, what the host does, or what to do instead.
    ``allows``: whether we can honour a value, ``must`` the same in words.
    """

    names: str
    part: str
    fate: str
    note: str
    allows: Callable[[Any], bool] | None = None
    must: str = ""


def obeyed(part: str, names: str, note: str, allows: Callable[[Any], bool] | None = None, must: str = "") -> Option:
    """Options that our function reads."""
    return Option(names, part, "obeyed", note, allows, must)


def hosts_own(part: str, names: str, note: str) -> Option:
    """Options that the host applies itself around our function, or that do not concern the loss."""
    return Option(names, part, "the host's", note)


def refused(part: str, names: str, only: Any, note: str) -> Option:
    """Options of which we can honour one value, as a rule the host's default, or a tuple of values; () for none."""
    values = only if isinstance(only, tuple) else (only,)
    must = " or ".join(map(repr, values)) or "absent"
    return Option(names, part, "refused", note, lambda value: value in values, must)


def own_numbers(loss_type: str, **numbers: Any) -> dict[str, Any]:
    """Those of ``numbers`` that a loss of this type uses, as arguments of `PolicyLossSpec`: a host has one list of them
    for all of its losses. A lower bound of a ratio is at most 1, since no ratio is below 0."""
    require_one_of("loss_type", loss_type, LOSS_TYPES)
    uses = numbers_of(loss_type)
    found = {name: number for name, number in numbers.items() if name in uses}
    if "clip_low" in found and loss_type != "dppo_kl":  # whose bound is a divergence
        found["clip_low"] = min(float(found["clip_low"]), 1.0)
    return found


def require_baseline(name: str) -> None:
    """ValueError for a baseline that is none of the group's: of the hosts whose turns we credit none hands over what
    their states are worth."""
    rule = f'a host hands over no values of its turns, so baseline "{VALUE}" is for `ppg-fast train`, whose critic has'
    require(name != VALUE, f"{rule} them: baseline must be one of {', '.join(BASELINES)} here", name)
    require_one_of("baseline", name, BASELINES)


def check(host: str, table: Sequence[Option], config: Any, part: str) -> None:
    """ValueError that names option, value and what to do, for the first option of ``config`` that the table refuses.

    ``config``: of the host, a mapping or an object with attributes. ``part``: the rows to walk.
    """
    for option in table:
        if option.part == part and option.allows is not None:
            for name in option.names.split():
                value = _value(config, name)
                if value is not _ABSENT:
                    require(option.allows(value), f"{name} of {host} must be {option.must} ({option.note})", value)


def check_unknown(
    host: str, table: Sequence[Option], config: Any, defaults: Any = None, names: Callable[[str], bool] | None = None
) -> None:
    """ValueError for an option of ``config`` that no row of the table names and that differs from the host's default.

    Args:
        config: a dataclass, a pydantic model, a mapping or a namespace; nested ones are walked where the table nests.
        defaults: the class that knows the defaults, or a mapping of them; the class of ``config`` if there is none. An
            option without a default must be off (None, False, 0, empty).
        names: which names to look at; every one by default.
    """
    known = {name for option in table for name in option.names.split()}
    nested = {name.rsplit(".", 1)[0] for name in known if "." in name}
    _walk(host, known, nested, config, type(config) if defaults is None else defaults, names, "")


def _walk(
    host: str, known: set[str], nested: set[str], config: Any, defaults: Any, names: Callable[[str], bool] | None,
    prefix: str,
) -> None:  # fmt: skip
    for name in _names(config):
        path = prefix + name
        if path in known or name.startswith("_") or (names is not None and not names(path)):
            continue
        value = _value(config, name)
        if path in nested and _names(value):
            _walk(host, known, nested, value, type(value), names, f"{path}.")
            continue
        default = _default(defaults, name)
        rule = f"{path} is an option of {host} that ppg_fast does not know: it must keep its default"
        if default is _ABSENT:
            require(any(value is off or value == off for off in OFF), f"{rule}, or be off", value)
        else:
            require(value == default, f"{rule} {default!r}", value)


def _value(config: Any, path: str) -> Any:
    """The value under a dotted path, _ABSENT where a step of it is missing or None."""
    for name in path.split("."):
        if isinstance(config, Mapping):
            config = config.get(name, _ABSENT)
        else:
            config = _ABSENT if config is None else getattr(config, name, _ABSENT)
        if config is _ABSENT:
            break
    return config


def _names(config: Any) -> Iterable[str]:
    """The names of a configuration's options; none for a plain value."""
    if isinstance(config, Mapping):
        return [str(name) for name in config]
    if is_dataclass(config):
        return [field.name for field in fields(config)]
    if hasattr(config, "model_fields_set"):  # pydantic, extra fields included
        return [name for name, _ in config]
    return list(vars(config)) if hasattr(config, "__dict__") and not callable(config) else []


def _default(kind: Any, name: str) -> Any:
    """The default of a field of a dataclass or a pydantic class, or in a mapping; _ABSENT where it has none."""
    if isinstance(kind, Mapping):
        return kind.get(name, _ABSENT)
    if is_dataclass(kind):
        field = next((field for field in fields(kind) if field.name == name), None)
        if field is not None and field.default_factory is not MISSING:
            return field.default_factory()
        return _ABSENT if field is None or field.default is MISSING else field.default
    field = getattr(kind, "model_fields", {}).get(name)
    return _ABSENT if field is None or field.is_required() else field.get_default(call_default_factory=True)
