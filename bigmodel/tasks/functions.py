"""`module:function`: a plain function as a task, called (model, rows, **arguments) and giving a dict per row."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bigpipe.bigmodel.sources import Sources

from .rows import Row
from .task import Answer, Answerer, Task, TaskOptions


def function_task(name: str, function: Callable[..., Any]) -> Task:
    """Return the task that calls `function`. Each row is its JSON object with `prompt`, `index` and `seed`."""

    def bind(model: Any, path: Path, options: TaskOptions, sources: Sources) -> Answerer:
        return partial(_answer, function, model, _arguments(function, options), options.seed)

    return Task(name=name, bind=bind)


def _arguments(function: Callable[..., Any], options: TaskOptions) -> dict[str, Any]:
    """`max_new_tokens` is passed where the function takes it."""
    parameters = inspect.signature(function).parameters.values()
    takes = any(each.kind is each.VAR_KEYWORD or each.name == "max_new_tokens" for each in parameters)
    return {**({"max_new_tokens": options.max_new_tokens} if takes else {}), **options.arguments}


def _answer(
    function: Callable[..., Any], model: Any, arguments: dict[str, Any], seed: int, rows: Sequence[Row]
) -> list[Answer]:
    import torch

    torch.manual_seed(seed + rows[0].index)
    given = [{**row.data, "prompt": row.prompt, "index": row.index, "seed": seed + row.index} for row in rows]
    made = function(model, given, **arguments)
    if not isinstance(made, list) or len(made) != len(rows) or not all(isinstance(entry, dict) for entry in made):
        raise TypeError(f"{function.__name__} must give a list of {len(rows)} dicts, one per row")
    return [Answer(dict(entry), entry["tokens"] if isinstance(entry.get("tokens"), int) else 0) for entry in made]
