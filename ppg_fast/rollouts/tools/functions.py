"""The user's functions as tools: what `--tools` names, their schemas, and environments of TRL's kind."""

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

from ppg_fast.dialogues.conversation import function_of
from ppg_fast.dialogues.prompts import Prompt
from ppg_fast.rewards.modules import imports_from
from ppg_fast.rewards.python import is_users, load_module, said_by

FACTORY = "environment_factory"
OWN = ("reset", "get_reward")  # an environment's methods that are no tools

Schema = Mapping[str, Any]


class Tools:
    """What ``where`` names: ``file.py`` (its public functions, and its ``environment_factory`` where it has one),
    ``file.py:name,name`` or ``module:name,name``: functions, or one class (or factory) of environments.

    An environment is made anew for each rollout, and its public methods are tools beside the functions. A dict of
    factories goes by the prompt's ``environment``. ``schemas``: of each factory ("" without), the tools by name.
    ``environments``: the classes. ValueError, one line, for what cannot be loaded or has no schema.
    """

    def __init__(self, where: str, loaded: dict[str, ModuleType] | None = None) -> None:
        self.place, names = split_place(where)
        self.folder = str(Path(self.place).resolve().parent) if self.place.endswith(".py") else None
        module = load_module(self.place, {} if loaded is None else loaded, f"tools {where}")
        found = _named(module, names, where) if names else _public(module)
        self.functions = {name: one for name, one in found.items() if inspect.isroutine(one) and name != FACTORY}
        made = {name: one for name, one in found.items() if name not in self.functions}
        if len(made) > 1:
            raise ValueError(f"tools {where}: one class or factory of environments at most, got {', '.join(made)}")
        factory = next(iter(made.values()), None)
        self.by_name = isinstance(factory, Mapping)
        self.factories: dict[str, Callable[[], Any]] = (
            {} if factory is None else {str(k): v for k, v in factory.items()} if self.by_name else {"": factory}
        )
        if not self.functions and not self.factories:
            rule = f"{self.place} has no public function and no {FACTORY}"
            raise ValueError(f"tools {where}: {rule}: name a class with {self.place}:CLASS")
        self.environments: list[type] = []
        self._warned: set[str] = set()
        own = {name: _schema(one, name, where) for name, one in self.functions.items()}
        self.schemas = {name: own | self._of_factory(name, own, where) for name in self.factories} or {"": own}

    def _of_factory(self, name: str, own: Mapping[str, Schema], where: str) -> dict[str, Schema]:
        """The tools of an environment, of one made to look at."""
        environment = self._make(name, f"tools {where}")
        if not callable(getattr(environment, "reset", None)):
            raise ValueError(f"tools {where}: an environment must have a method reset, {_kind(environment)} has none")
        if type(environment) not in self.environments:
            self.environments.append(type(environment))
        methods = methods_of(environment)
        if twice := own.keys() & methods.keys():
            raise ValueError(f"tools {where}: {min(twice)} is a function and a method of {_kind(environment)}")
        return {method: _schema(one, method, where) for method, one in methods.items()}

    def _make(self, name: str, where: str) -> Any:
        try:
            with self.importing():
                return self.factories[name]()
        except BaseException as error:
            if not is_users(error):
                raise
            raise ValueError(f"{where}: no environment can be made: {said_by(error)}") from error

    @property
    def names(self) -> list[str]:
        """Every tool once."""
        return list(dict.fromkeys(name for tools in self.schemas.values() for name in tools))

    def importing(self) -> Any:
        """While the user's code runs: its own folder comes first where it imports something."""
        return imports_from(self.folder) if self.folder else nullcontext()

    def select(self, prompt: Prompt) -> tuple[Schema, ...]:
        """The tools of a prompt: all, or those that it lists, with the parameters that it gives where it gives any.

        ValueError for one that no function serves, and for an environment that there is none of.
        """
        served = self.schemas[self._environment(prompt)]
        if not prompt.tools:
            return tuple(served.values())
        chosen: list[Schema] = []
        for tool in prompt.tools:
            name = function_of(tool).get("name")
            if name not in served:
                there = ", ".join(served)[:200]
                raise ValueError(f"tool {str(name)[:60]!r} has no function in {self.place}, which has {there}")
            chosen.append(tool if function_of(tool).get("parameters") else served[name])
        return tuple(chosen)

    def open(self, prompt: Prompt) -> tuple[Any, dict[str, Callable[..., Any]]]:
        """A new environment for the prompt (None where there is no factory), and every function by name."""
        if not self.factories:
            return None, self.functions
        environment = self._make(self._environment(prompt), f"prompt {prompt.id!r}")
        return environment, self.functions | methods_of(environment)

    def warn(self, name: str, text: str) -> None:
        """Once of each tool."""
        if name not in self._warned:
            self._warned.add(name)
            warnings.warn(f"{text} (shown once a tool; the policy reads an error, and may go on)", stacklevel=2)

    def _environment(self, prompt: Prompt) -> str:
        if not self.by_name:
            return ""
        name = prompt.info.get("environment")
        if name not in self.factories:
            there = ", ".join(self.factories)[:200]
            raise ValueError(f"environment must be one of {there}, got {str(name)[:60]!r}")
        return str(name)


def split_place(where: str) -> tuple[str, list[str]]:
    """The file or module of ``file.py``, ``file.py:name,name`` or ``module:name,name``, and the names."""
    place, colon, names = where.rpartition(":")
    if not colon or (where.endswith(".py") and "," not in names):
        place, names = where, ""
    listed = [name.strip() for name in names.split(",") if name.strip()]
    if not place or not (listed or place.endswith(".py")):
        raise ValueError(f"tools must be file.py, file.py:name,name or module:name,name, got {where!r}")
    return place, listed


def methods_of(environment: Any) -> dict[str, Callable[..., Any]]:
    """An environment's tools: its public methods but reset and get_reward; those of its class, as TRL has it."""
    names = [name for name, _ in inspect.getmembers(type(environment), inspect.isfunction)]
    return {name: getattr(environment, name) for name in names if name not in OWN and not name.startswith("_")}


def _named(module: ModuleType, names: Sequence[str], where: str) -> dict[str, Any]:
    found = {}
    for name in names:
        one = getattr(module, name, None)
        if not callable(one) and not (isinstance(one, Mapping) and all(map(callable, one.values()))):
            raise ValueError(f"tools {where}: {module.__name__} has no function or class {name!r}")
        found[name] = one
    return found


def _public(module: ModuleType) -> dict[str, Any]:
    """The functions that the file itself makes, in its order, and its factory of environments."""
    found = {
        name: one
        for name, one in vars(module).items()
        if inspect.isfunction(one) and one.__module__ == module.__name__ and not name.startswith("_")
    }
    return found | ({FACTORY: vars(module)[FACTORY]} if FACTORY in vars(module) else {})


def _schema(function: Callable[..., Any], name: str, where: str) -> Schema:
    """The JSON schema of a function, from its types and its docstring."""
    from transformers.utils.chat_template_utils import get_json_schema

    try:
        made = get_json_schema(function)
    except Exception as error:  # of transformers, and of what the user's annotations do
        why = " ".join(str(error).split())[:200]
        rule = "a tool wants types and a docstring that describes every argument (begin the name of one that is no tool"
        raise ValueError(f"tools {where}: {name}: {rule} with _): {why}") from error
    made["function"]["name"] = name
    return made


def _kind(environment: Any) -> str:
    return type(environment).__name__
