"""Answers that are kept: on disk, each in a file of its own that is either whole or not there; or with a value."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from bigpipe.files import make_directory, write_file
from bigpipe.redaction import redact_json


def remember(path: Path, answer: Any) -> None:
    """Write the JSON `answer` in one step. A memo that cannot be written costs time later, so it is no error."""
    try:
        make_directory(path.parent, durable=False)
        # json.dump would encode in Python, ten times slower
        write_file(path, json.dumps(redact_json(answer)), durable=False, mode=0o600)
    except OSError:
        return


def recall(path: Path) -> Any:
    """What was remembered under `path`, or None."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


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
