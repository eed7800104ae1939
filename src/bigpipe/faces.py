"""The face of a room: names that its `__init__` offers, each imported on first use."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any


def face(package: str, **modules: str) -> Callable[[str], Any]:
    """Return the `__getattr__` (PEP 562) of a package. modules: a module of it → the names it gives, in one text."""
    homes = {name: module for module, names in modules.items() for name in names.split()}

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        found = getattr(import_module(f"{package}.{homes[name]}"), name)
        setattr(sys.modules[package], name, found)
        return found

    return find
