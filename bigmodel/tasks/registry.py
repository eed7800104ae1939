"""Tasks by name: built-in ones, a `Task` of the user's, or a plain function of theirs; imported when asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, get_args

from bigpipe.errors import UsageError
from bigpipe.modules import foreign, import_attribute
from bigpipe.names import did_you_mean

if TYPE_CHECKING:
    from bigpipe.bigmodel.sources import Sources

    from .task import Arguments, Task

BuiltIn = Literal[
    "text-generation", "text2text-generation", "scoring", "feature-extraction", "text-classification",
    "token-classification", "fill-mask", "image-classification", "automatic-speech-recognition", "text-to-image",
    "image-text-to-text",
]  # fmt: skip
TASKS: Mapping[str, str] = {name: f"bigpipe.bigmodel.tasks.{name.replace('-', '_')}:TASK" for name in get_args(BuiltIn)}
"""Name → `module:NAME` of the task."""


def require_known(name: str) -> None:
    """Raise UsageError where `name` is neither a task of `TASKS` nor of the form `module:name`."""
    if name in TASKS or ":" in name:
        return
    cure = did_you_mean(name, TASKS) or f"use {', '.join(TASKS)}, or module:function"
    raise UsageError(f"task {name!r} is not known", cure)


def task_arguments() -> Mapping[str, type[Arguments]]:
    """Return what each built-in task takes, by its name."""
    from bigpipe.bigmodel.sources import Sources

    found = {name: find_task(name, Sources()).arguments for name in TASKS}
    return {name: model for name, model in found.items() if model is not None}


def built_in(name: str) -> Task | None:
    """Return the task of that name, if that is bigpipe's own; no code of others runs."""
    found: Task | None = import_attribute(TASKS[name]) if name in TASKS else None
    return found


def find_task(name: str, sources: Sources) -> Task:
    """Return the task of that name. A module that is not bigpipe's own is imported, and its code runs. Raise UsageError
    for an unknown name, a module that is not trusted, cannot be imported or has no such task."""
    from .task import Task, function_task

    require_known(name)
    if (task := built_in(name)) is not None:
        return task
    sources.trust.require_module(name, f"task {name}")
    try:
        with foreign(f"task {name} cannot be imported", "mend the module"):
            found = import_attribute(name, sources.base)
    except UsageError as error:
        if isinstance(error.__cause__, ImportError):
            cure = f"put the module into {sources.base}, or install it"
            raise UsageError(f"task {name}: {error.__cause__}", cure) from error
        if not _lacks(error.__cause__, name):
            raise
        found = None
    if isinstance(found, Task):
        return found
    if not callable(found):
        raise UsageError(f"task {name}: the module has no function or Task of that name", "check its name")
    return function_task(name, found)


def _lacks(error: BaseException | None, name: str) -> bool:
    """Is it the module itself that has no such name?"""
    return isinstance(error, AttributeError) and error.name in name.partition(":")[2].split(".")
