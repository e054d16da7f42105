"""One line for a host that is missing."""

from importlib import import_module
from typing import Any


def import_host(module: str, needed: str) -> Any:
    """The module of a host; ImportError that names ``needed``, the package and its version, where it is not there."""
    try:
        return import_module(module)
    except ModuleNotFoundError as missing:
        if missing.name != module and not module.startswith(f"{missing.name}."):
            raise  # the host is there and lacks something of its own
        raise ImportError(f"ppg_fast.integrations needs {needed}, and {missing.name!r} cannot be imported") from None
