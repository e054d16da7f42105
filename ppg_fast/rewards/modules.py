"""The files that reward functions live in, imported as `python FILE` would import them."""

import hashlib
import importlib
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

_imported: dict[str, dict[str, ModuleType]] = {}  # the modules that came from each folder of a reward file


def import_file(path: str) -> ModuleType:
    """The module of a Python file, executed anew, in sys.modules under the file's name and its folder on sys.path.

    So dataclasses, pickle and process pools find its classes, and it may import what lies beside it. A name that
    another module has, or could be imported under, stays that module's: the file then goes by its name and a hash of
    its place. The compiled code is not kept: of a file that is rewritten within a second, Python would run the old one.
    """
    file = Path(path).resolve()
    folder, name = str(file.parent), _free_name(file)
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert isinstance(spec.loader, importlib.machinery.SourceFileLoader)
    code = spec.loader.source_to_code(spec.loader.get_data(str(file)), str(file))
    module = importlib.util.module_from_spec(spec)
    before, sys.modules[name] = sys.modules.get(name), module
    try:
        with imports_from(folder):
            exec(code, module.__dict__)
    except BaseException:
        sys.modules.pop(name, None)
        if before is not None:
            sys.modules[name] = before
        raise
    _imported[folder][name] = module
    if folder not in sys.path:  # for what is imported elsewhere later, and for processes
        sys.path.append(folder)
    return module


def import_module(name: str) -> ModuleType:
    """The module of that name, of the working directory too, as `python -m` has it."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    return importlib.import_module(name)


@contextmanager
def imports_from(folder: str) -> Iterator[None]:
    """``folder`` is first on sys.path, and a name that it holds means the module there, whatever another reward file
    imported under that name from its own folder."""
    own = _imported.setdefault(folder, {})
    others = [(n, m) for place, modules in _imported.items() if place != folder for n, m in modules.items()]
    aside = {n: m for n, m in others if sys.modules.get(n) is m and (n in own or _holds(folder, n))}
    for name in aside:
        del sys.modules[name]
    for name, module in own.items():
        sys.modules.setdefault(name, module)
    before = set(sys.modules)
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        if folder in sys.path:
            sys.path.remove(folder)
        own.update({n: sys.modules[n] for n in sys.modules.keys() - before if _is_from(folder, n)})
        sys.modules.update(aside)


def _free_name(file: Path) -> str:
    """The file's name where no other module has it."""
    name = file.stem
    if name in sys.modules:
        free = _file_of(sys.modules[name]) == file
    else:
        try:
            found = importlib.util.find_spec(name)
        except (ImportError, ValueError):  # a name with dots
            found, name = None, name.replace(".", "_")
        # a folder without __init__.py is found last, after any module
        free = name == file.stem and (found is None or found.origin is None or Path(found.origin).resolve() == file)
    return name if free else f"{name}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"


def _holds(folder: str, name: str) -> bool:
    place = Path(folder, name.partition(".")[0])
    return place.with_name(f"{place.name}.py").is_file() or (place / "__init__.py").is_file()


def _file_of(module: ModuleType | None) -> Path | None:
    file = getattr(module, "__file__", None)
    return Path(file).resolve() if isinstance(file, str) else None


def _is_from(folder: str, name: str) -> bool:
    place = Path(folder, *name.split("."))
    return _file_of(sys.modules[name]) in (place.with_name(f"{place.name}.py"), place / "__init__.py")
