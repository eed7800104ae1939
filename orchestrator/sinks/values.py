"""What several sinks make of values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (`a.b`, value) of everything in maps of maps; lists are values."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from flat(inner, f"{name}.{key}" if name else str(key))
    elif name:
        yield name, value


def gate_text(gate: Mapping[str, Any]) -> str:
    """Return `ratio >= 1.1: 1.55 (passed)`."""
    words = {True: "passed", False: "failed", None: "not decided"}
    return f"{gate['text']}: {gate['measured'] or 'unknown'} ({words[gate['passed']]})"
