"""The one version check of every host: which version was found, which is needed, what to install."""

import re
import sys
from importlib import import_module, metadata
from typing import Any

INSTALL = {  # where `pip install 'name>=minimum'` is not what installs a host
    "trl": "pip install 'trl>=1.16,<2'",
    "slime": "a clone of github.com/THUDM/slime",
    "nemo-rl": "a clone of github.com/NVIDIA-NeMo/RL",
    "prime-rl": "a clone of github.com/PrimeIntellect-ai/prime-rl",
}
_satisfied: set[tuple[str, str]] = set()


def require_host(name: str, minimum: str, module: str | None = None) -> Any:
    """The host's module, or one line that says why not.

    Args:
        name: of the distribution, as pip knows it; its package has underscores for hyphens.
        minimum: oldest version that will do, such as "1.16". A host of unknown version (a folder on the path, without
            metadata and ``__version__``) is taken as it is.
        module: which module to import; the host's package by default.

    Raises: ImportError where the host is missing or too old, or has no such module. An error inside of the host is the
        host's own.
    """
    package = name.replace("-", "_")
    needed = f"ppg_fast.integrations.{package} needs {name} >= {minimum}"
    install = INSTALL.get(name, f"pip install '{name}>={minimum}'")
    found = None if (name, minimum) in _satisfied else _version(name, package)
    if found is not None and _numbers(found) < _numbers(minimum):
        raise ImportError(f"{needed}, found {found}: {install}")
    try:
        import_module(package)
        imported = import_module(module or package)
    except ModuleNotFoundError as missing:
        if not any(f"{wanted}.".startswith(f"{missing.name}.") for wanted in (package, module)):
            raise  # the host is installed and lacks something of its own
        found = "none" if missing.name == package else f"{_version(name, package) or 'one'} without {missing.name!r}"
        raise ImportError(f"{needed}, found {found}: {install}") from None
    _satisfied.add((name, minimum))
    return imported


def _version(name: str, package: str) -> str | None:
    """The installed version: of the distribution, else what the package says of itself if it is imported already."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return getattr(sys.modules.get(package), "__version__", None)


def _numbers(version: str) -> tuple[int, ...]:
    """The release numbers of a version: (0, 10, 0) of "0.10.0.dev0"."""
    digits = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in digits.group().split(".")) if digits else ()
