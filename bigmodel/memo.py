"""Answers that are kept: on disk, each in a sealed file of its own, counted only as it was written; or with a value."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from bigpipe.files import Damaged, make_directory, read_sealed, write_sealed
from bigpipe.redaction import redact


def remember(path: Path, answer: Any) -> None:
    """Write the JSON `answer` in one step. A memo that cannot be written costs time later, so it is no error."""
    try:
        make_directory(path.parent, durable=False)
        text = json.dumps(answer)
        clean = redact(text)  # one search of the text: an answer may have a hundred thousand names
        write_sealed(path, [path.name, answer if clean == text else json.loads(clean)], durable=False)
    except OSError:
        return


def recall(path: Path) -> Any:
    """What was remembered under `path`, or None."""
    try:
        name, answer = read_sealed(path)
    except (OSError, Damaged, ValueError, TypeError):
        return None
    return answer if name == path.name else None


Owner = TypeVar("Owner")
P = ParamSpec("P")
T = TypeVar("T")


def kept(function: Callable[Concatenate[Owner, P], T]) -> Callable[Concatenate[Owner, P], T]:
    """Keep what a function gives with its first argument, a value that never changes, per further arguments. A search
    for what fits asks for many budgets of one architecture. The further arguments must be hashable."""
    name = f"kept {function.__module__}.{function.__qualname__}"

    @wraps(function)
    def keeping(owner: Owner, /, *arguments: P.args, **options: P.kwargs) -> T:
        answers: dict[Any, T] = vars(owner).setdefault(name, {})
        key = arguments, tuple(sorted(options.items()))
        if key not in answers:
            answers[key] = function(owner, *arguments, **options)
        return answers[key]

    return keeping
