"""Answers that are kept: on disk, each in a sealed file of its own, counted only as it was written; in this process;
or with a value."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from threading import Lock
from typing import Any, Concatenate, ParamSpec, TypeVar

from bigpipe.files import Damaged, make_directory, read_sealed, write_sealed
from bigpipe.redaction import redact_value

LARGEST = 16 << 20
"""Characters of JSON that one process keeps; the oldest answers go first."""
_said: dict[str, str] = {}
_saying = Lock()


def remember(path: Path, answer: Any) -> None:
    """Write the JSON `answer` in one step. A memo that cannot be written costs time later, so it is no error."""
    try:
        make_directory(path.parent, durable=False)
        text = json.dumps(answer)
        clean = redact_value(text)  # one search of the text: an answer may have a hundred thousand names
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


def answered(file: Path | None, key: str, ask: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """Return the JSON object that is kept in `file`, that this process was told under `key`, or that `ask` gives now;
    what it raises is not kept. key: a digest of everything the answer depends on."""
    if file and (found := recall(file)):
        return dict(found)
    text = _said.get(key) or _keep(key, json.dumps(ask()))
    answer: dict[str, Any] = json.loads(text)  # a copy: whoever changes theirs changes nobody else's
    if file:
        remember(file, answer)
    return answer


def _keep(key: str, text: str) -> str:
    with _saying:
        _said[key] = text
        while sum(map(len, _said.values())) > LARGEST:
            del _said[next(iter(_said))]
    return text


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
