"""Faces of packages: what their `__init__` names is imported when it is first asked for (PEP 562).

A room's `__init__` imports its names under `if TYPE_CHECKING:`, where type checkers and readers find them, and says

    __getattr__, __all__ = face(__name__)

So a name costs no more than the module it comes from, and each is written once.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any


def face(package: str) -> tuple[Callable[[str], Any], list[str]]:
    """Return `__getattr__` and `__all__` for a package, by the relative imports in its `__init__`."""
    module = sys.modules[package]
    homes = _homes(Path(str(module.__file__)).read_bytes())

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        home = homes[name]
        value = (
            import_module(f"{package}.{name}") if home is None else getattr(import_module(f"{package}.{home}"), name)
        )
        setattr(module, name, value)
        return value

    return get, sorted(homes)


def _homes(source: bytes) -> dict[str, str | None]:
    blocks = [node for node in ast.parse(source).body if isinstance(node, ast.If)]
    imports = [node for block in blocks for node in block.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: node.module for node in imports for alias in node.names}
