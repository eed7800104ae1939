"""Tasks by name: the built-in ones, a `Task` of the user's, or a plain function of theirs as one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from bigpipe.bigmodel.sources import Sources
from bigpipe.errors import UsageError
from bigpipe.modules import import_attribute

from .rows import Row
from .task import Answer, Answerer, Task, TaskOptions

BuiltIn = Literal["text-generation", "feature-extraction"]
"""Each in the module of its name here, which is not imported before it is asked for."""
TASKS: tuple[str, ...] = get_args(BuiltIn)


def require_known(name: str) -> None:
    """Raise UsageError where `name` is neither a task of `TASKS` nor of the form `module:name`."""
    if name in TASKS or ":" in name:
        return
    from difflib import get_close_matches

    close = get_close_matches(name, TASKS, n=1)
    cure = f"did you mean {close[0]!r}?" if close else f"use {', '.join(TASKS)}, or module:function"
    raise UsageError(f"task {name!r} is not known", cure)


def find_task(name: str, sources: Sources) -> Task:
    """Return the task of that name. A module that is not bigpipe's own is imported, and its code runs.

    Raise UsageError for an unknown name, a module that is not trusted, cannot be imported or has no such task.
    """
    require_known(name)
    if name in TASKS:
        task: Task = import_attribute(f"{__package__}.{name.replace('-', '_')}:TASK")
        return task
    sources.trust.require_module(name, f"task {name}")
    try:
        found = import_attribute(name, sources.base)
    except ImportError as error:
        raise UsageError(f"task {name}: {error}", f"put the module into {sources.base}, or install it") from error
    except AttributeError:
        found = None
    if isinstance(found, Task):
        return found
    if not callable(found):
        raise UsageError(f"task {name}: the module has no function or Task of that name", "check its name")
    return _function_task(name, found)


def _function_task(name: str, function: Callable[..., Any]) -> Task:
    """The task that calls (model, rows, **arguments), each row its JSON object with `prompt`, `index` and `seed`."""

    def bind(model: Any, path: Path, options: TaskOptions, sources: Sources) -> Answerer:
        parameters = inspect.signature(function).parameters.values()
        takes = any(each.kind is each.VAR_KEYWORD or each.name == "max_new_tokens" for each in parameters)
        length = {"max_new_tokens": options.max_new_tokens} if takes else {}
        return partial(_call, partial(function, **{**length, **options.arguments}), model, options.seed)

    return Task(name=name, bind=bind)


def _call(function: partial[Any], model: Any, seed: int, rows: Sequence[Row]) -> list[Answer]:
    import torch

    torch.manual_seed(seed + rows[0].index)
    given = [{**row.data, "prompt": row.prompt, "index": row.index, "seed": seed + row.index} for row in rows]
    made = function(model, given)
    if not isinstance(made, list) or len(made) != len(rows) or not all(isinstance(entry, dict) for entry in made):
        raise TypeError(f"{function.func.__name__} must give a list of {len(rows)} dicts, one per row")
    return [Answer(dict(entry), entry["tokens"] if isinstance(entry.get("tokens"), int) else 0) for entry in made]
