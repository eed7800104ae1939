"""YAML that is no manifest: a lock file, a launcher's configuration, the head of a model card.

PyYAML's loaders follow nesting on the C stack, and what they make of aliases may stand for millions of values. A text
is looked through before it is loaded.
"""

from __future__ import annotations

from typing import Any

MAX_DEPTH = 64


class NotPlain(ValueError):
    """It is no YAML, or none that can be read without harm."""


def load(text: bytes | str) -> Any:
    """Return the value of one document, of plain types. Raise NotPlain where it is no YAML, nests deeper than
    `MAX_DEPTH`, or holds an alias."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        _look_through(yaml, text, loader)
        return yaml.load(text, Loader=loader)  # noqa: S506  (a safe one)
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        raise NotPlain(_said(error)[:300]) from error


def _said(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return " ".join(str(error).split())
    parts = (getattr(error, name, None) for name in ("context", "problem"))
    return f"line {mark.line + 1}: {', '.join(filter(None, parts))}"


def _look_through(yaml: Any, text: bytes | str, loader: Any) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=loader):
        if isinstance(event, yaml.AliasEvent):
            raise NotPlain(f"line {event.start_mark.line + 1}: it holds the alias *{event.anchor}")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise NotPlain(f"line {event.start_mark.line + 1}: it nests deeper than {MAX_DEPTH}")
